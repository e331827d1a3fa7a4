"""Budgets: how far an attack may move an image, in which norm, and how it spends its steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Budget(ABC):
    """A ball around each image, in pixel units (1.0 is black to white), and how an attack moves in it."""

    norm: ClassVar[str]

    eps: float = 8 / 255
    """Radius of the ball."""
    steps: int = 10
    """Gradient steps."""
    step_size: float | None = None
    """Length of one step in the budget's norm; eps / 5 if None, as in the DVERGE protocol."""
    restarts: int = 1
    """Attempts, each from its own start; an image is broken if any of them breaks it."""
    random_start: bool = True
    """Start each attempt uniformly in the ball instead of at the image."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise BadInput(f"need at least 1 step and 1 restart, got steps={self.steps} restarts={self.restarts}")

    @property
    def step(self) -> float:
        """The length of one step, resolved."""
        return self.eps / 5 if self.step_size is None else self.step_size

    @abstractmethod
    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the nearest point in the ball around `images` and in [0, 1] (l2: one after the other)."""

    @abstractmethod
    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a point drawn uniformly in each image's ball, brought into [0, 1]; the draw is made on the CPU."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit norm along which a function with this gradient rises fastest; 0 for 0."""

    @abstractmethod
    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return how far each image was moved (batch,)."""


@dataclass(frozen=True, kw_only=True)
class LinfBudget(Budget):
    """Every pixel may move by eps."""

    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eps <= 1:
            raise BadInput(f"need 0 <= eps <= 1, got {self.eps}; pixels are in [0, 1], so write 8/255, not 8")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise BadInput(
                f"need 0 < step_size <= 1, got {self.step_size}; pixels are in [0, 1], so write 2/255, not 2"
            )

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """See `Budget.project`."""
        return torch.minimum(torch.maximum(adversarial, images - self.eps), images + self.eps).clamp_(0, 1)

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Budget.start`."""
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        return self.project(images + self.eps * (2 * noise - 1), images)

    def direction(self, gradient: Tensor) -> Tensor:
        """See `Budget.direction`."""
        return gradient.sign()

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """See `Budget.distance`."""
        return (adversarial - images).flatten(1).abs().amax(1)


@dataclass(frozen=True, kw_only=True)
class L2Budget(Budget):
    """The Euclidean length of an image's change may be eps; 0.5 and 1 are usual for 32x32 pixels."""

    norm: ClassVar[str] = "l2"

    eps: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eps < math.inf:
            raise BadInput(f"need a finite eps >= 0, got {self.eps}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise BadInput(f"need a finite step_size > 0, got {self.step_size}")

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """See `Budget.project`."""
        difference = adversarial - images
        length = _length(difference)
        return (images + difference * (self.eps / length.clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Budget.start`."""
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        radius = torch.rand(len(images), generator=generator, dtype=images.dtype).to(images.device)
        radius = radius ** (1 / images[0].numel()) if len(images) else radius
        direction = self.direction(noise)
        return self.project(images + self.eps * radius.reshape(-1, *[1] * (images.dim() - 1)) * direction, images)

    def direction(self, gradient: Tensor) -> Tensor:
        """See `Budget.direction`."""
        # by the largest entry first: the square of a small gradient underflows
        scaled = gradient / gradient.flatten(1).abs().amax(1).clamp_min(1e-30).reshape(-1, *[1] * (gradient.dim() - 1))
        return scaled / _length(scaled).clamp_min(1e-12)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """See `Budget.distance`."""
        length: Tensor = torch.linalg.vector_norm((adversarial - images).flatten(1), dim=1)
        return length


def _length(difference: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return length.reshape(-1, *[1] * (difference.dim() - 1))
