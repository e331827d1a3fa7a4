"""Gradient attacks on a model that is known and deterministic: FGSM, PGD and their momentum and input-diversity kin.

    FGSM        Goodfellow et al. 2015, arXiv:1412.6572
    PGD         Madry et al. 2018, arXiv:1706.06083
    MI-FGSM     Dong et al. 2018, arXiv:1710.06081           PGD with momentum=1
    M-DI2-FGSM  Xie et al. 2019, arXiv:1803.06978            momentum=1 and diversity=InputDiversity()

An attack leaves no gradient on the model, switches no mode, and draws only from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.budget import Ball, Budget, check_budget, check_generator, check_momentum
from zoo.attacks.images import check_batch, full_precision
from zoo.attacks.losses import Ascent, Loss, ascent, succeeded
from zoo.attacks.models import checked_model
from zoo.attacks.outputs import Model, Output
from zoo.errors import BadInput, UnknownName

Watch = Callable[[int, Tensor, Tensor], None]
Keep = Literal["last", "first broken"]


@dataclass(frozen=True, kw_only=True)
class InputDiversity:
    """Shrink each image with a probability and pad it back with zeros, differently at every step (Xie et al. 2019).

    DVERGE does not give the sizes for 32x32 pixels; ours are those from 7/8 of the side up.
    """

    probability: float = 0.5
    smallest: float = 7 / 8
    """The smallest side that an image is shrunk to, as a share of its own."""

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 < self.smallest <= 1):
            raise BadInput(
                f"need 0 <= probability <= 1 and 0 < smallest <= 1, got {self.probability} and {self.smallest}"
            )

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the images, some of them shrunk (bilinear) to a random size at a random offset; differentiable."""
        side = images.shape[-1]
        shrunk = torch.rand(len(images), generator=generator) < self.probability
        if not bool(shrunk.any()):
            return images
        # one size for the images of this call that are shrunk, an offset for each: sizes differ from step to step
        low = max(1, round(self.smallest * side))
        size = int(torch.randint(low, side + 1, (1,), generator=generator))
        height = max(1, round(size * images.shape[-2] / side))
        small = F.interpolate(images, size=(height, size), mode="bilinear", align_corners=False)
        top = torch.randint(0, images.shape[-2] - height + 1, (len(images),), generator=generator)
        left = torch.randint(0, side - size + 1, (len(images),), generator=generator)
        padded = F.pad(small, (side - size, side - size, images.shape[-2] - height, images.shape[-2] - height))
        rows = (images.shape[-2] - height - top)[:, None] + torch.arange(images.shape[-2])
        columns = (side - size - left)[:, None] + torch.arange(side)
        index = torch.arange(len(images))[:, None, None]
        placed = padded.permute(0, 2, 3, 1)[
            index.to(images.device), rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)
        ].permute(0, 3, 1, 2)
        return torch.where(shrunk.to(images.device)[:, None, None, None], placed, images)


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    loss: str | Loss = "cross_entropy",
    targets: Tensor | None = None,
    output: Output | None = None,
) -> Tensor:
    """One step of length eps along the steepest ascent: for l_inf clip(x + eps * sign(grad L(x, y))).

    Args, returns and raises as `pgd`; only `budget.eps` is read.
    """
    check_budget(budget)
    checked = checked_model(model, output)
    images, labels, targets = check_batch(images, labels, targets)
    if not len(images):
        return images.clone()
    gradient, _, _ = ascent(checked, loss)(images, labels, targets)
    return budget.project(images + budget.eps * budget.direction(gradient), images)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    loss: str | Loss = "cross_entropy",
    targets: Tensor | None = None,
    momentum: float = 0.0,
    diversity: InputDiversity | None = None,
    keep: Keep = "last",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    output: Output | None = None,
) -> Tensor:
    """Projected gradient ascent in a ball, with restarts.

    x[t+1] = clip(project(x[t] + step * sign(grad L(x[t], y))))    Madry et al. 2018, section 2.1
    with momentum: g[t+1] = momentum * g[t] + grad / |grad|_1 in the gradient's place    Dong et al. 2018, equation 6

    Args:
        model: images -> logits (log-probabilities of an ensemble serve as well), deterministic; its modules must be in
            evaluation mode. Its parameters collect no gradient. A random model is attacked draw by draw, with a
            warning; `eot_pgd` is the attack for it.
        images: float (batch, channel, height, width) in [0, 1]; numpy's are taken.
        labels: int64 (batch,); lists and numpy's are taken.
        budget: radius, steps, restarts.
        loss: one of `LOSSES` or a function like them.
        targets: int64 (batch,) for a targeted attack: the class to be reached.
        momentum: 0 for plain PGD, 1 for MI-FGSM.
        diversity: shrink and pad at random before every gradient.
        keep: "last" judges an attempt by its last iterate, as DVERGE does; "first broken" returns the first iterate
            that reached the goal and goes on without that image, which is stricter and faster; not with diversity,
            behind which the model's answer to the iterate is not known.
        start: where every attempt begins, inside the ball; what the budget says if None.
        generator: draws the random starts and the diversity, on the CPU; torch's global generator if None.
        watch: called after each step with (step, iterate, logits at the iterate before the step).
        output: where the logits are in what the model returns; see `outputs.Output`.

    Returns:
        For each image what `keep` says of the first attempt that reached the goal, else the last iterate of the last
        attempt; within `budget.eps` of the image and in [0, 1]. An iterate is returned even where the model still
        answers correctly: a transfer attack is scored on another model.

    Raises:
        BadInput: see `images.check_batch` and `losses.ascent`; a momentum that is negative or not finite; "first
            broken" with diversity; a start of another shape.
        UnknownName: no such `keep`.
    """
    if keep not in get_args(Keep):
        raise UnknownName(keep, get_args(Keep), kind="keep")
    if diversity is not None and keep != "last":
        raise BadInput(
            f"keep={keep!r} needs the model's answer to each iterate, which input diversity hides; use keep='last'"
        )
    check_budget(budget)
    check_generator(generator)
    momentum = check_momentum(momentum)
    checked = checked_model(model, output)
    images, labels, targets = check_batch(images, labels, targets)
    if start is not None and start.shape != images.shape:
        raise BadInput(f"start must be shaped like the images, {tuple(images.shape)}, got {tuple(start.shape)}")
    if not len(images):
        return images.clone()
    attacked = checked if diversity is None else checked.preceded_by(partial(diversity, generator=generator))
    rise = ascent(attacked, loss)
    ball = budget.around(images)
    result = images.clone()
    remaining = torch.arange(len(images), device=images.device)
    for attempt in range(budget.restarts):
        if not len(remaining):
            break
        # drawn for all images, so that a start does not depend on which others are still unbroken
        if start is not None:
            starts = ball.project(start.detach())
        else:
            starts = budget.start(images, generator) if budget.random_start else images
        rows, adversarial = _attempt(
            rise,
            checked,
            ball[remaining],
            starts[remaining],
            labels[remaining],
            None if targets is None else targets[remaining],
            budget,
            momentum=momentum,
            keep=keep,
            judged=attempt + 1 < budget.restarts,
            watch=watch,
        )
        result[remaining] = adversarial
        remaining = remaining[rows]
    return result


def accumulated(velocity: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """Return momentum * velocity + gradient / |gradient|_1, per image (Dong et al. 2018, equation 6).

    The norm is clamped: after one gradient of zero, 0/0 would freeze the image for ever.
    """
    gradient = full_precision(gradient)
    size = gradient.flatten(1).abs().sum(1).clamp_min(1e-12)
    return momentum * velocity + gradient / size.reshape(-1, *[1] * (gradient.dim() - 1))


def _attempt(
    rise: Ascent,
    model: Model,
    ball: Ball,
    adversarial: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    budget: Budget,
    *,
    momentum: float,
    keep: Keep,
    judged: bool,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """One attempt from the given starts; returns which images did not reach the goal, and where each one ended.

    If not `judged`, as for the last attempt, the last iterates are not tried, and all images still attacked count.
    """
    result = adversarial.clone()
    active = torch.arange(len(adversarial), device=adversarial.device)
    velocity = torch.zeros_like(full_precision(adversarial))
    for step in range(budget.steps):
        gradient, _, logits = rise(adversarial, labels, targets)
        if keep == "first broken":  # these logits are the model's own answer to this iterate
            broken = succeeded(logits, labels, targets)
            if bool(broken.any()):
                result[active[broken]] = adversarial[broken]
                left = ~broken
                active, ball, adversarial, labels = active[left], ball[left], adversarial[left], labels[left]
                gradient, velocity, logits = gradient[left], velocity[left], logits[left]
                targets = None if targets is None else targets[left]
                if not len(active):
                    break
        if momentum:
            gradient = velocity = accumulated(velocity, gradient, momentum)
        adversarial = ball.project(adversarial + budget.step * budget.direction(gradient))
        if watch is not None:
            watch(step, adversarial, logits)
    result[active] = adversarial
    if judged and len(active):
        with torch.no_grad():
            active = active[~succeeded(model(adversarial), labels, targets)]
    return active, result
