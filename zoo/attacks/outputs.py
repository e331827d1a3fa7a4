"""What a model returns: where its logits are, whether they are logits, and their gradient in the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from zoo.attacks.images import full_precision
from zoo.errors import BadInput, ManygatesError

Model = Callable[[Tensor], Tensor]
"""images (batch, channel, height, width) in [0, 1] -> logits (batch, class)."""
Output = str | int | Callable[[Any], Tensor]
"""Where the logits are in what a model returns: a key or an attribute, a position, or a function of it."""
PASSED_ON: Final = (ManygatesError, torch.OutOfMemoryError, MemoryError, Warning)
"""Errors of a model that are passed on: they explain themselves, or are not the fault of the model."""


@contextmanager
def explained_errors(images: Tensor) -> Iterator[None]:
    """Turn an error in the forward or backward pass of a model into a `BadInput` that names the images' shape."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        hint = ""
        if "type" in str(error):
            hint = f"; images are {images.dtype}, and images and weights must be of one type"
        elif len(images) == 1:
            hint = "; if it fails on single images only, it may drop the batch: write squeeze(-1) or flatten(1)"
        raise BadInput(
            f"the model fails on images of shape {tuple(images.shape)}: {type(error).__name__}: "
            f"{lines[-1] if lines else 'no reason given'}{hint}"
        ) from error


@torch.no_grad()
def logits_of(model: Model, images: Tensor) -> Tensor:
    """Return the logits of a model that is judged, not attacked. It gets a copy of the images.

    Raises:
        BadInput: see `find_logits`, or an answer that is NaN.
    """
    logits = find_logits(model(images.clone()), None, len(images))
    check_not_nan(logits)
    return logits


def find_logits(raw: Any, output: Output | None, batch: int) -> Tensor:
    """Return the logits in what a model returned.

    Raises:
        BadInput: they are not where `output` says, or are no floating-point tensor (batch, class).
    """
    found = raw
    if output is not None:
        try:
            if callable(output):
                return find_logits(output(raw), None, batch)
            by_name = isinstance(output, str) and not isinstance(raw, Mapping)
            found = getattr(raw, str(output)) if by_name else raw[output]
        except PASSED_ON:
            raise
        except Exception as error:
            said = getattr(output, "__name__", repr(output))
            raise BadInput(f"output={said} finds no logits in what the model returns, {_described(raw)}") from error
    if not isinstance(found, Tensor):
        raise BadInput(
            f"a model must return logits as one tensor, got {_described(found)}"
            + (_how_to_pick(found) if output is None else "")
        )
    if found.layout != torch.strided or found.is_nested or found.is_meta:
        raise BadInput(
            f"a model must return logits as a dense tensor, got one of layout {found.layout} on {found.device}; "
            "call .to_dense(), and keep the model off the meta device"
        )
    if not found.is_floating_point():
        raise BadInput(
            f"a model must return logits, which are floating-point, got {found.dtype}; classes alone cannot be "
            "attacked by scores or gradients"
        )
    if found.dim() != 2 or found.shape[1] < 2 or found.shape[0] != batch:
        raise BadInput(
            f"a model must return logits (batch, class), got shape {tuple(found.shape)} for {batch} "
            f"image{'' if batch == 1 else 's'}" + (_dropped(found) if batch == 1 else "")
        )
    return found


def _described(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} with {', '.join(map(repr, list(raw)[:8])) or 'nothing in it'}"
    if isinstance(raw, list | tuple):
        parts = (str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in raw[:8])
        return f"a {type(raw).__name__} of {len(raw)}: {', '.join(parts)}"
    if isinstance(raw, Tensor):
        return f"a tensor of shape {tuple(raw.shape)}"
    return f"{raw!r}" if raw is None else f"a {type(raw).__module__}.{type(raw).__name__}"


def _how_to_pick(raw: Any) -> str:
    if raw is None:
        return "; does it end without a return?"
    if isinstance(raw, np.ndarray):
        return "; numpy keeps no gradient: return the torch tensor, or torch.from_numpy(...) for square and rays"
    if isinstance(raw, Mapping):
        return f"; pick them with output={'logits' if 'logits' in raw else next(iter(raw), 'KEY')!r}"
    if isinstance(raw, list | tuple) and not hasattr(raw, "logits"):
        return "; pick them with output=0"
    return "; pick them with output='logits', or a function of it"


def _dropped(logits: Tensor) -> str:
    if logits.dim() == 1:
        return "; does it squeeze() the batch away? Write squeeze(-1) or flatten(1)"
    return ""


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


def check_numbers(logits: Tensor, losses: Tensor, gradient: Tensor | None = None) -> None:
    """Check that an answer, its loss and its gradient, if there is one, are numbers.

    Raises:
        BadInput: one is NaN, or the gradient infinite. Minus infinity is a logit (of probability 0).
    """
    # one value to wait for where a GPU computes; a NaN or an infinity survives the sum
    gradient = losses[:0, None] if gradient is None else gradient
    if not bool(logits.isnan().any() | losses.isnan().any() | ~gradient.sum().isfinite()):
        return
    check_not_nan(logits)
    for name, rows in (("loss", losses.isnan()), ("gradient", ~gradient.flatten(1).isfinite().all(1))):
        if not bool(rows.any()):
            continue
        position = int(rows.nonzero()[0, 0])
        answer = logits[position]
        why = "look for a root, a logarithm or a division at 0 in the forward"
        if bool((answer == torch.inf).any()):
            why = "a logit is infinite; in half precision that is one above 65,504"
        elif name == "loss" and bool(answer.isneginf().any()):
            why = "most of its logits are -inf, and DLR needs 3 that are not (targeted: 4); use the margin loss"
        raise BadInput(
            f"the {name} of {int(rows.sum())} of {len(rows)} images is NaN or infinite, the first of them image "
            f"{position}, so the attack cannot move, which is no robustness: {why}"
        )


def check_not_nan(logits: Tensor) -> None:
    """Check that no logit is NaN.

    Raises:
        BadInput: one is; the message names the first such image.
    """
    rows = logits.isnan().any(1)
    if not bool(rows.any()):
        return
    raise BadInput(
        f"the model answers NaN to {int(rows.sum())} of {len(rows)} images, the first of them image "
        f"{int(rows.nonzero()[0, 0])}; NaN is no class, and an attack cannot tell what it did. Look for a weight that "
        "is NaN, or for a division by 0, a root or a logarithm in the forward"
    )


def gradient_of(total: Tensor, images: Tensor, *, weights: Tensor | None = None, retain_graph: bool = False) -> Tensor:
    """Return the gradient of a value in the images, in full precision; of several values, summed by `weights`.

    Raises:
        BadInput: the value does not depend on the images.
    """
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, images, weights, allow_unused=True, retain_graph=retain_graph)
    if gradient is None:
        raise BadInput(
            "the model's answer has no gradient in the images: something detaches it, such as no_grad, .detach(), "
            ".data or numpy; take that out, or use square or rays, which need no gradient"
        )
    return full_precision(gradient)
