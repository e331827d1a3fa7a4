"""What an attack maximises, per image: cross-entropy, margin (Carlini and Wagner 2017) and DLR (Croce and Hein 2020).

Every loss takes logits (batch, class), labels (batch,) and, for a targeted attack, targets (batch,), and returns
(batch,), larger where the attack is nearer to its goal. All are unchanged by a constant added to the logits, so the
log-probabilities of an ensemble serve as well. Cross-entropy vanishes on saturated logits; margin and DLR do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.images import differentiable
from zoo.attacks.models import checked_model
from zoo.attacks.outputs import PASSED_ON, Model, check_logits, check_numbers, gradient_of
from zoo.errors import BadInput, UnknownName


class Loss(Protocol):
    """See the module."""

    def __call__(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of each image (batch,)."""


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return -log p_y; targeted: log p_t."""
    if targets is not None:
        return -F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None, *, confidence: float = math.inf) -> Tensor:
    """Return min(max_{j != y} z_j - z_y, confidence); targeted: min(z_t - max_{j != t} z_j, confidence).

    The true class is left out of the maximum by -inf. DVERGE's released code multiplies it by zero instead, which is a
    constant 0 among log-probabilities, all negative, and so has no gradient as soon as p_y < exp(-confidence).
    """
    pivot = labels if targets is None else targets
    other = logits.scatter(1, pivot[:, None], -math.inf).amax(1)
    chosen = logits.gather(1, pivot[:, None])[:, 0]
    return (other - chosen if targets is None else chosen - other).clamp_max(confidence)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio: -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)); targeted below.

    Targeted: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2). Unchanged by a positive factor on the logits (Croce and Hein
    2020, arXiv:2003.01690, equations 6 and 7). NaN where fewer than 3 logits (targeted: 4) are more than -inf.

    Raises:
        BadInput: fewer than 3 classes, or than 4 if targeted.
    """
    needed = 3 if targets is None else 4
    if logits.shape[1] < needed:
        raise BadInput(f"the DLR loss needs at least {needed} classes, got {logits.shape[1]}; use the margin loss")
    ordered = logits.topk(needed, dim=1).values
    # without a third logit it would be 0 wherever the image is: nothing broken, and nobody told
    lacking = ordered[:, -1].isneginf()
    true = logits.gather(1, labels[:, None])[:, 0]
    if targets is None:
        other = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        return ((other - true) / (ordered[:, 0] - ordered[:, 2] + 1e-12)).masked_fill(lacking, math.nan)
    wanted = logits.gather(1, targets[:, None])[:, 0]
    ratio = (wanted - true) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)
    return ratio.masked_fill(lacking, math.nan)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "margin": margin,
    "margin-0.1": partial(margin, confidence=0.1),
    "dlr": dlr,
}


def loss_named(loss: str | Loss) -> Loss:
    """Return the loss of a name; another function is returned with a look at what it returns.

    Raises:
        BadInput: no function; what is returned raises it where the function fails or returns no loss of each image.
        UnknownName: the message lists the known losses.
    """
    if not isinstance(loss, str):
        return loss if isinstance(loss, _Own) or loss in LOSSES.values() else _Own(loss)
    if loss not in LOSSES:
        raise UnknownName(loss, LOSSES, kind="loss")
    return LOSSES[loss]


class _Own:
    """A loss of the caller's own, which must be one number for each image."""

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise BadInput(f"a loss must be one of {', '.join(LOSSES)} or a function like them, got {loss!r:.40}")
        self._loss = loss

    def __call__(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        name = getattr(self._loss, "__name__", type(self._loss).__name__)
        try:
            losses: object = self._loss(logits, labels, targets)
        except PASSED_ON:
            raise
        except Exception as error:
            raise BadInput(
                f"the loss {name} fails on (logits, labels, targets): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise BadInput(
                f"the loss {name} must return one number for each image, shape ({len(logits)},), got {found}; leave "
                "its mean or sum out, with reduction='none'"
            )
        return losses


def succeeded(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return where the attack reached its goal: another class than the label, or the target (batch,) bool."""
    predicted = logits.argmax(1)
    return predicted != labels if targets is None else predicted == targets


Ascent = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor, Tensor]"]
"""(images, labels, targets) -> (gradient of the loss shaped like images, loss (batch,), logits (batch, class))."""


def ascent(model: Model, loss: str | Loss = "cross_entropy") -> Ascent:
    """Return the function that gives an attack the gradient of `loss` on `model`; parameters collect none.

    Raises:
        BadInput: see `models.checked_model`. The returned function raises it as `models.CheckedModel.answer`,
            `outputs.check_logits` (for the first answer; later checks would only wait for the device) and
            `outputs.check_numbers` say.
    """
    chosen, checked = loss_named(loss), checked_model(model)
    first = True

    def step(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal first
        with torch.enable_grad():
            images = differentiable(images)
            logits = checked.answer(images)
            if first:
                check_logits(logits.detach(), labels, targets)
                first = False
            losses = chosen(logits, labels, targets)
            # The sum, not the mean: a mean over a large batch may underflow an image's gradient.
            with checked.explained_errors(images):
                gradient = gradient_of(losses.sum(), images)
        losses, logits = losses.detach(), logits.detach()
        if not checked.trusted:
            check_numbers(logits, losses, gradient)
        return gradient, losses, logits

    return step
