"""A model in the form that the linter attacks: logits in full precision, differentiable in the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.attacks.models import CheckedModel
from zoo.attacks.outputs import Model, are_probabilities
from zoo.attacks.training_mode import unchecked


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model computes, as its first answers tell."""

    dtype: torch.dtype
    """Of the images that it is given."""
    half: torch.dtype | None
    """The type of half precision in which it computes, or None."""
    probabilities: bool
    """Whether it returns probabilities; their logarithm is attacked then."""
    differentiates: bool
    """Whether it takes gradients inside its forward."""

    @classmethod
    def of(cls, outputs: Tensor, images: torch.dtype, *, differentiates: bool) -> Form:
        """Return the form of a model that gave these outputs (image, class) to images of a type."""
        return cls(
            dtype=images,
            half=_half(outputs, images),
            probabilities=are_probabilities(outputs),
            differentiates=differentiates,
        )


def _half(outputs: Tensor, images: torch.dtype) -> torch.dtype | None:
    for dtype in (torch.bfloat16, torch.float16):
        same = outputs.to(dtype).to(outputs) == outputs
        if images == dtype or bool(same[outputs.isfinite()].all()):
            return dtype
    return None


def differentiable(seen: CheckedModel, form: Form) -> Model:
    """Return a model as attacks need it: logits in full precision, differentiable in the images."""

    def model(images: Tensor) -> Tensor:
        ask = seen if bool(images.isfinite().all()) else seen.answer  # NaN from an attack is not the model's
        if form.differentiates and not torch.is_grad_enabled():
            with torch.enable_grad():
                logits = ask(images.to(form.dtype)).detach()
        elif form.half is not None and torch.is_grad_enabled() and images.requires_grad:
            sizes: list[Tensor] = []
            # torch has no annotations for these
            logits = ask(_Rescaled.apply(images, sizes).to(form.dtype))  # type: ignore[no-untyped-call]
            logits = _Scaled.apply(logits, sizes)  # type: ignore[no-untyped-call]
        else:
            logits = ask(images.to(form.dtype))
        if form.probabilities:
            logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
        if torch.is_grad_enabled() and images.requires_grad:
            # without a path from the logits to the pixels: a gradient of zero, for G1 to find, and no error
            logits = logits + (0 * images).flatten(1).sum(1, keepdim=True)
        return logits

    return unchecked(model)


class _Scaled(torch.autograd.Function):
    """The identity; on the way back each image's gradient is divided by its largest entry, which `sizes` gets.

    A model in half precision would lose it otherwise: a wrong class of probability 1e-8 has no gradient in float16.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, sizes: list[Tensor]) -> Tensor:
        context.sizes = sizes
        return logits.view_as(logits)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = gradient.abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        context.sizes[:] = [size]
        return gradient / size[:, None], None


class _Rescaled(torch.autograd.Function):
    """The identity; on the way back the gradient is multiplied by what `_Scaled` divided it by."""

    @staticmethod
    def forward(context: Any, images: Tensor, sizes: list[Tensor]) -> Tensor:
        context.sizes = sizes
        return images.view_as(images)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (size,) = context.sizes
        return gradient * size.to(gradient)[:, None, None, None], None
