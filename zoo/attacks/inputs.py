"""What every attack checks before it begins: pixels, labels, targets, the model's mode and what it returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.errors import BadInput

Model = Callable[[Tensor], Tensor]
"""images (batch, channel, height, width) in [0, 1] -> logits (batch, class)."""


_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def checked(
    model: object, images: Tensor, labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return images, labels and targets, detached, if an attack can begin with them.

    Raises:
        BadInput: pixels outside [0, 1], labels or targets that do not fit the images or are negative, a target that is
            the label, or a BatchNorm or dropout in training mode.
    """
    check_mode(model)
    images = checked_images(images)
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is None:
            continue
        if classes.shape != images.shape[:1] or classes.dtype != torch.int64:
            raise BadInput(
                f"{name} must be int64 of shape ({len(images)},), one per image, got {classes.dtype} of shape "
                f"{tuple(classes.shape)}"
            )
        if len(classes) and int(classes.min()) < 0:
            raise BadInput(f"{name} must be classes from 0 on, got {int(classes.min())}")
    if targets is not None and bool((targets == labels).any()):
        position = int((targets == labels).nonzero()[0, 0])
        raise BadInput(
            f"the target of image {position} is its label, {int(labels[position])}; a targeted attack needs another"
        )
    return images, labels, targets


def check_mode(model: object) -> None:
    """Check that nothing in a module depends on its training mode.

    Raises:
        BadInput: a BatchNorm or dropout in training mode.
    """
    if isinstance(model, nn.Module):
        for name, part in model.named_modules():
            if part.training and isinstance(part, _MODAL):
                raise BadInput(
                    f"the model's {type(part).__name__} {name!r} is in training mode, where every forward of an attack "
                    "moves its statistics or draws at random; call .eval() first"
                )


def checked_images(images: Tensor) -> Tensor:
    """Return images, detached, if all pixels are in [0, 1]; NaN is not."""
    if not images.is_floating_point() or images.dim() != 4:
        raise BadInput(
            f"images must be float (batch, channel, height, width), got {images.dtype} of shape {tuple(images.shape)}; "
            "divide bytes by 255"
        )
    images = images.detach()
    low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise BadInput(f"pixels must be in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and do not normalise")
    return images


def check_logits(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> None:
    """Check the first answer of a model.

    Raises:
        BadInput: a label or target that is no class of the model, or probabilities instead of logits.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise BadInput(f"a model must return logits (batch, class), got shape {tuple(logits.shape)}")
    for name, classes in (("label", labels), ("target", targets)):
        if classes is not None and len(classes) and int(classes.max()) >= logits.shape[1]:
            raise BadInput(
                f"{name} {int(classes.max())} is out of range, expected 0 to {logits.shape[1] - 1}: "
                f"the model has {logits.shape[1]} classes"
            )
    if are_probabilities(logits):
        raise BadInput(
            "the model returns probabilities (rows are non-negative and sum to 1), expected logits: a softmax in the "
            "way hides gradients; give the model without its softmax, or with a log behind it"
        )


def are_probabilities(outputs: Tensor) -> bool:
    """Whether every row is non-negative and sums to 1, as logits hardly ever do."""
    if not len(outputs):
        return False
    rows = outputs.float()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())


@torch.no_grad()
def first_logits(model: Model, images: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the model's checked logits on `images`; for attacks that begin by asking."""
    logits = full_precision(model(images))
    check_logits(logits, labels, targets)
    return logits


def full_precision(logits: Tensor) -> Tensor:
    """Return logits of half precision as float32, others as they are: losses and comparisons need the digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
