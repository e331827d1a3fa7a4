"""Budgets: how far an attack may move an image, in which norm, and how it spends its steps.

An image is in its ball if |adversarial - image| <= eps, both in the arithmetic of the images and in float64. `project`
keeps that exactly, in float16 and bfloat16 too. If the type cannot represent eps, eps is rounded down to it.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from zoo.attacks.images import full_precision
from zoo.errors import BadInput

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ball(ABC):
    """The points around each image of a batch that an attack may reach."""

    @abstractmethod
    def project(self, points: Tensor) -> Tensor:
        """Return the nearest points in the ball and in [0, 1] (l2: one after the other), in the type of the images."""

    @abstractmethod
    def __getitem__(self, rows: Tensor) -> Ball:
        """Return the balls of some of the images."""


class LinfBall(Ball):
    """Between two images."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower, self.upper = lower, upper

    @classmethod
    def around(cls, images: Tensor, eps: float) -> LinfBall:
        """Return the ball of radius `eps`, rounded inwards to numbers of the images' type."""
        radius, wide = _rounded_down(eps, images.dtype), images.double()
        lower = (wide - radius).clamp_min_(0).to(images.dtype)
        upper = (wide + radius).clamp_max_(1).to(images.dtype)
        lower = torch.where(wide - lower.double() > radius, _step_towards(images, lower), lower)
        upper = torch.where(upper.double() - wide > radius, _step_towards(images, upper), upper)
        return cls(lower, upper)

    def project(self, points: Tensor) -> Tensor:
        """See `Ball.project`."""
        return points.to(self.lower.dtype).clamp(self.lower, self.upper)

    def __getitem__(self, rows: Tensor) -> LinfBall:
        """See `Ball.__getitem__`."""
        return LinfBall(self.lower[rows], self.upper[rows])


class L2Ball(Ball):
    """Around images, as far as the Euclidean length says."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.images, self.eps = images, eps

    def project(self, points: Tensor) -> Tensor:
        """See `Ball.project`."""
        images, dtype = self.images, self.images.dtype
        wide = images.double()
        difference = points.double() - wide
        radius = torch.full((len(images),), _rounded_down(self.eps, dtype), dtype=torch.float64, device=images.device)
        while True:
            scale = (radius / _norm(difference).clamp_min(1e-300)).clamp_max(1)
            inside = (wide + difference * _per_image(scale, images)).clamp_(0, 1)
            found = inside.to(dtype)
            # towards the image: rounding must not lengthen the change
            too_far = (found.double() - wide).abs() > (inside - wide).abs()
            found = torch.where(too_far, _step_towards(images, found), found)
            # a length computed in the images' own type is rounded as well: over many pixels by more than one digit
            excess = torch.maximum(_norm(found - images).double(), _norm(found.double() - wide)) / self.eps
            if not bool((excess > 1).any()):  # NaN is not
                return found
            radius = torch.where(excess > 1, radius / excess * (1 - 4 * torch.finfo(dtype).eps), radius)

    def __getitem__(self, rows: Tensor) -> L2Ball:
        """See `Ball.__getitem__`."""
        return L2Ball(self.images[rows], self.eps)


def _rounded_down(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of a type that is not above `value`, which is not negative."""
    nearest = torch.tensor(value, dtype=dtype)
    return float(nearest if float(nearest) <= value else _step_towards(torch.zeros_like(nearest), nearest))


def _step_towards(goal: Tensor, values: Tensor) -> Tensor:
    """Return the next numbers of the type; none is negative. `torch.nextafter` is not there for every type and device.

    Numbers that are not negative are ordered as their bits are.
    """
    bits = values.view(_BITS[values.element_size()])
    return (bits + (goal - values).sign().to(bits.dtype)).view(values.dtype)


def _norm(difference: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return length


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class Budget(ABC):
    """A ball around each image, in pixel units (1.0 is black to white), and how an attack moves in it."""

    norm: ClassVar[str]

    eps: float = 8 / 255
    """Radius of the ball; a `Fraction` or a text such as "8/255" is taken as well."""
    steps: int = 10
    """Gradient steps."""
    step_size: float | None = None
    """Length of one step in the budget's norm; eps / 5 if None, as in the DVERGE protocol."""
    restarts: int = 1
    """Attempts, each from its own start; an image is broken if any of them breaks it."""
    random_start: bool = True
    """Start each attempt uniformly in the ball instead of at the image."""

    def __post_init__(self) -> None:
        for name in ("eps", "step_size"):
            if name == "eps" or self.step_size is not None:
                object.__setattr__(self, name, number(getattr(self, name), name))
        for name in ("steps", "restarts"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        if self.steps < 1 or self.restarts < 1:
            raise BadInput(f"need at least 1 step and 1 restart, got steps={self.steps} restarts={self.restarts}")

    @property
    def step(self) -> float:
        """The length of one step, resolved."""
        return self.eps / 5 if self.step_size is None else self.step_size

    @abstractmethod
    def around(self, images: Tensor) -> Ball:
        """Return the ball around each image."""

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the nearest point in the ball around `images`; see `Ball.project`."""
        return self.around(images).project(adversarial)

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

    def around(self, images: Tensor) -> Ball:
        """See `Budget.around`."""
        return LinfBall.around(images, self.eps)

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

    def around(self, images: Tensor) -> Ball:
        """See `Budget.around`."""
        return L2Ball(images, self.eps)

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Budget.start`."""
        precision = torch.promote_types(images.dtype, torch.float32)
        noise = torch.randn(images.shape, generator=generator, dtype=precision).to(images.device)
        radius = torch.rand(len(images), generator=generator, dtype=precision).to(images.device)
        radius = radius ** (1 / images[0].numel()) if len(images) else radius
        direction = self.direction(noise)
        return self.project(images + self.eps * _per_image(radius, images) * direction, images)

    def direction(self, gradient: Tensor) -> Tensor:
        """See `Budget.direction`."""
        # by the largest entry first: the square of a small gradient underflows; in half precision 1e-30 does as well
        gradient = full_precision(gradient)
        scaled = gradient / _per_image(gradient.flatten(1).abs().amax(1).clamp_min(1e-30), gradient)
        return scaled / _per_image(_norm(scaled).clamp_min(1e-12), gradient)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """See `Budget.distance`."""
        return _norm(adversarial - images)


def number(value: object, name: str) -> float:
    """Return a number that may be written as a `Fraction` or a text such as "8/255".

    Raises:
        BadInput: it is none; the message calls it `name`.
    """
    if isinstance(value, int | float):
        return value
    try:
        return float(Fraction(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type] # tried
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise BadInput(f"{name} must be a number such as 8/255 or 0.03, got {value!r:.40}") from error


def whole(value: object, name: str) -> int:
    """Return a whole number, of whatever integer type.

    Raises:
        BadInput: it is none; the message calls it `name`.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type] # tried
    except TypeError as error:
        raise BadInput(f"{name} must be a whole number, got {value!r:.40}") from error


def check_momentum(momentum: object) -> float:
    """Return a momentum as a number.

    Raises:
        BadInput: it is negative, infinite or no number.
    """
    found = number(momentum, "momentum")
    if not 0 <= found < math.inf:
        raise BadInput(f"need a finite momentum >= 0, got {found}; 0 is plain PGD, and 1 is usual otherwise")
    return found


def check_budget(budget: object) -> None:
    """Check that a budget is one.

    Raises:
        BadInput: it is not.
    """
    if not isinstance(budget, Budget):
        raise BadInput(f"a budget must be a Budget, got {budget!r:.40}; write LinfBudget(eps=8/255)")


def linf_of(budget: Budget, attack: str) -> LinfBudget:
    """Return the budget of an attack that searches the l_inf ball only.

    Raises:
        BadInput: it is no budget, or one in another norm; the message names the attack.
    """
    check_budget(budget)
    if not isinstance(budget, LinfBudget):
        raise BadInput(f"{attack} searches the l_inf ball, got a budget in {budget.norm}; use LinfBudget, or pgd")
    return budget


def check_generator(generator: object) -> None:
    """Check a source of random numbers.

    Raises:
        BadInput: it is no generator of torch's on the CPU, and not None.
    """
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        return
    found = f"one on {generator.device}" if isinstance(generator, torch.Generator) else f"{generator!r:.40}"
    raise BadInput(
        f"a generator must be a torch.Generator on the CPU, got {found}; write torch.Generator().manual_seed(3)"
    )
