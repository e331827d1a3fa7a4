"""White-box attacks in the l_inf ball: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018, arXiv:1706.06083).

An attack leaves no gradient on the model, switches no mode, and draws from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import BadInput

Model = Callable[[Tensor], Tensor]
Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class LinfBudget:
    """How far an attack may move each pixel, in pixel units (1.0 is black to white), and how it gets there."""

    eps: float = 8 / 255
    """Radius of the ball."""
    steps: int = 10
    """Gradient steps."""
    step_size: float | None = None
    """Length of one step; eps / 5 if None, as in the DVERGE protocol."""
    restarts: int = 1
    """Attempts, each from its own start; an image is broken if any of them breaks it."""
    random_start: bool = True
    """Start each attempt uniformly in the ball instead of at the image."""

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise BadInput(f"need 0 <= eps <= 1, got {self.eps}; pixels are in [0, 1], so write 8/255, not 8")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise BadInput(
                f"need 0 < step_size <= 1, got {self.step_size}; pixels are in [0, 1], so write 2/255, not 2"
            )
        if self.steps < 1 or self.restarts < 1:
            raise BadInput(f"need at least 1 step and 1 restart, got steps={self.steps} restarts={self.restarts}")

    @property
    def step(self) -> float:
        """The length of one step, resolved."""
        return self.eps / 5 if self.step_size is None else self.step_size


def fgsm(model: Model, images: Tensor, labels: Tensor, budget: LinfBudget) -> Tensor:
    """One step of length eps along the sign of the gradient: clip(x + eps * sign(grad L(x, y))).

    Args and returns as `pgd`; only `budget.eps` is read.
    """
    images = _checked(images)
    return _project(images + budget.eps * _gradient(model, images, labels).sign(), images, budget.eps)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy in an l_inf ball, with restarts.

    x[t+1] = clip(project(x[t] + step * sign(grad L(x[t], y))))    Madry et al. 2018, section 2.1

    Args:
        model: images -> logits (log-probabilities of an ensemble serve as well). Used in the mode it is in; its
            parameters collect no gradient.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: radius, steps, restarts.
        generator: draws the random starts, on the CPU; torch's global generator if None.
        watch: called after each step with (step, iterate, logits at the iterate before the step).

    Returns:
        The last iterate of the first attempt that broke the image, else of the last attempt; within `budget.eps` of
        the image and in [0, 1]. An iterate is returned even where the model still answers correctly: a transfer
        attack is scored on another model.

    Raises:
        BadInput: a pixel outside [0, 1].
    """
    images = _checked(images)
    result = images.clone()
    remaining = torch.arange(len(images), device=images.device)
    for _ in range(budget.restarts):
        start, target = images[remaining], labels[remaining]
        adversarial = start
        if budget.random_start:
            noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)[remaining]
            adversarial = _project(start + budget.eps * (2 * noise - 1), start, budget.eps)
        for step in range(budget.steps):
            gradient, logits = _gradient_and_logits(model, adversarial, target)
            adversarial = _project(adversarial + budget.step * gradient.sign(), start, budget.eps)
            if watch is not None:
                watch(step, adversarial, logits)
        result[remaining] = adversarial
        with torch.no_grad():
            remaining = remaining[model(adversarial).argmax(1) == target]
        if not len(remaining):
            break
    return result


def _gradient_and_logits(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images)
        # The sum, not the mean: a mean over a large batch may underflow an image's gradient.
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient, logits.detach()


def _gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    return _gradient_and_logits(model, images, labels)[0]


def _project(adversarial: Tensor, images: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(adversarial, images - eps), images + eps).clamp_(0, 1).detach()


def _checked(images: Tensor) -> Tensor:
    images = images.detach()
    low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise BadInput(f"pixels must be in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and do not normalise")
    return images
