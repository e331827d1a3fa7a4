"""What the images of a network look like, and its first layer: pixels to standard scores, so budgets stay in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


class Normalise(nn.Module):
    """`(images - mean) / std` per channel; images (batch, channel, height, width) in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return standard scores of the shape of `images`."""
        return (images - self.mean) / self.std
