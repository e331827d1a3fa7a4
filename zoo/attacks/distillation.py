"""Feature distillation (DVERGE, Yang et al. 2020, arXiv:2009.14720, equation 1): an image that looks like another.

Within the ball around its source, the distilled image minimises the squared distance between its feature at one layer
and that of an unrelated target. It shows what that layer confuses: features that the model relies on and that are not
robust. Ensemble-in-One trains each path on what the others confuse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from zoo.attacks.budget import Budget, check_budget, check_generator, check_momentum
from zoo.attacks.gradient import accumulated
from zoo.attacks.images import check_images, differentiable, full_precision
from zoo.attacks.outputs import explained_errors, gradient_of
from zoo.attacks.training_mode import Unchecked
from zoo.errors import BadInput


def distil(
    feature: Callable[[Tensor], Tensor],
    source: Tensor,
    target: Tensor,
    budget: Budget,
    *,
    momentum: float = 0.0,
    fixed: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images in the ball around `source` whose feature imitates that of `target`.

    min_{x'} |f(x') - f(x_t)|_2^2  subject to  |x' - x_s| <= eps

    Args:
        feature: images -> any feature (batch, ...), such as `RandomGatedNetwork.runner(layer, ...)`. It gets a copy.
        source: float (batch, channel, height, width) in [0, 1].
        target: as `source`; row i is imitated by image i.
        budget: radius, steps, step size, random start; one attempt, whatever its `restarts`.
        momentum: of the normalised gradient; 1 in DVERGE's code, 0 in Ensemble-in-One's.
        fixed: compute the feature of the target once. False for BatchNorm in training mode, where every forward moves
            the statistics and so the feature.
        generator: draws the random start, on the CPU.

    Raises:
        BadInput: a pixel outside [0, 1], sources and targets of different shapes, a feature that fails, or one whose
            gradient is missing, NaN or infinite (the last not for `unchecked(feature)`).
    """
    check_budget(budget)
    check_generator(generator)
    momentum = check_momentum(momentum)
    source, target = check_images(source), check_images(target)
    if source.shape != target.shape:
        raise BadInput(f"source and target must be alike, got {tuple(source.shape)} and {tuple(target.shape)}")
    images = budget.start(source, generator) if budget.random_start else source
    ball = budget.around(source)
    velocity = torch.zeros_like(full_precision(source))
    wanted: Tensor | None = None
    trusted = isinstance(feature, Unchecked)
    for _ in range(budget.steps):
        if wanted is None or not fixed:
            with torch.no_grad(), nullcontext() if trusted else explained_errors(target):
                wanted = full_precision(feature(target.clone()))
        with torch.enable_grad():
            images = differentiable(images)
            with nullcontext() if trusted else explained_errors(images):
                distance = (full_precision(feature(images.clone())) - wanted).square().sum()
            gradient = gradient_of(distance, images)
        if not trusted and not bool(gradient.isfinite().all()):
            raise BadInput(
                "the gradient of the feature is NaN or infinite, so nothing can be distilled; look for a root, a "
                "logarithm or a division at 0, or a weight that is NaN"
            )
        if momentum:
            gradient = velocity = accumulated(velocity, gradient, momentum)
        images = ball.project(images.detach() - budget.step * budget.direction(gradient))
    return images.detach()
