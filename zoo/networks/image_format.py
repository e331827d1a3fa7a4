"""What the images of a network look like."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """What a network's input looks like. `mean` and `std` are per channel, in pixel units."""

    channels: int = 3
    height: int = 32
    width: int = 32
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise BadInput(f"need one mean and std per channel ({self.channels}), got mean={self.mean} std={self.std}")
        if min(self.std) <= 0:
            raise BadInput(f"std must be positive, got {self.std}")


CIFAR_FORMAT = ImageFormat()
MNIST_FORMAT = ImageFormat(channels=1, height=28, width=28, mean=(0.1307,), std=(0.3081,))
