"""Checks of the gradients: that they exist, lead somewhere, and account for what the model does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.losses import ascent, margin
from zoo.evaluation.intervals import exceeds
from zoo.evaluation.linter.check import Answer, check
from zoo.evaluation.linter.evidence import NOISES, STEPS, Evidence, count
from zoo.evaluation.thresholds import COVERED, EXPLAINED, LOSS_GAP, NO_GRADIENT, UNEXPLAINED_IMAGES

SLOPE_IMAGES, SLOPE_POINTS = 50, 12
"""G3 looks at so many images, with so many gradients along each segment."""
COVER_IMAGES, FEWEST_COVER_IMAGES = 24, 8
COVER_POINTS, CERTAIN_POINTS = 3, 16
"""G4 takes so many gradients along each direction, and the second number before it alarms."""
MOST_GROUPS = 4
"""G4 looks at so many groups of channels."""


@check(
    "G1",
    "gradients are neither zero nor NaN",
    "The model blocks its gradient: rounding, detaching, saturation (if cross-entropy alone is zero); replace "
    "the blocking part by the identity on the way back, or attack logits before it.",
)
def gradients_exist(evidence: Evidence) -> Answer:
    """Count gradients that are zero or NaN, of two losses."""
    shown, alarm = [], False
    for loss in ("cross_entropy", "margin"):
        rise = ascent(evidence.net, loss)
        gradient = torch.cat([rise(*batch, None)[0] for batch in evidence.batches()]).flatten(1)
        zero, bad = count((gradient == 0).all(1)), count(~gradient.isfinite().all(1))
        alarm = alarm or bad > 0 or exceeds(zero, len(gradient), NO_GRADIENT)
        shown.append(f"{loss.replace('_', '-')}: {zero} zero, {bad} with NaN")
    return alarm, f"gradients of {evidence.number} images, {'; '.join(shown)}"


@check(
    "G2",
    "losses agree at every scale of logits",
    "Logits so large, or so shaped, that cross-entropy has no useful gradient, or one that leads to a class "
    "that cannot be reached; report the margin or DLR loss, towards each class in turn (AutoAttack).",
)
def other_losses(evidence: Evidence) -> Answer:
    """Count what other losses, and other target classes, break beyond cross-entropy."""
    left = count(~evidence.cross_entropy)
    most = max(count(broken) for broken in evidence.other_losses.values())
    each = ", ".join(f"{name} {count(broken)}" for name, broken in evidence.other_losses.items())
    return exceeds(most, evidence.number, LOSS_GAP), (
        f"cross-entropy leaves {left} of {evidence.number}; of these {STEPS} steps break by {each} ({evidence.ball})"
    )


@check(
    "G3",
    "gradients explain finite differences",
    "The gradient is not the slope of the model: a step function or a false backward pass lies in between; "
    "use BPDA or attacks without gradients.",
)
def finite_differences(evidence: Evidence) -> Answer:
    """The change of the margin along a segment is the integral of its gradient, for every honest function.

    f(b) - f(a) = integral over t from 0 to 1 of <grad f(a + t (b - a)), b - a>

    The segment's direction is found without the model's gradients: by the surrogate's, or by the differences between
    random corners (SPSA). The own gradient would be blind where it is zero, which is where it matters; a difference
    quotient against a single gradient would alarm wherever the function is merely curved.
    """
    images, labels = evidence.images[:SLOPE_IMAGES], evidence.labels[:SLOPE_IMAGES]
    number = len(images)
    directions = {"random corners": _corner_direction(evidence, number)}
    if evidence.surrogate is not None:
        gradient, _, _ = ascent(evidence.surrogate, "margin")(images, labels, None)
        directions["surrogate"] = gradient.nan_to_num().sign()

    def margins(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return margin(evidence.net(pixels), labels)

    change = torch.zeros(number, device=images.device, dtype=images.dtype)
    low, high = images, images
    for direction in directions.values():
        below = (images - evidence.eps * direction).clamp(0, 1)
        above = (images + evidence.eps * direction).clamp(0, 1)
        difference = (margins(above) - margins(below)).nan_to_num().to(change)
        larger = difference.abs() > change.abs()
        change = torch.where(larger, difference, change)
        low = torch.where(larger[:, None, None, None], below, low)
        high = torch.where(larger[:, None, None, None], above, high)
    slope = _slope(evidence, low, high, labels, SLOPE_POINTS)
    judged = change.abs() > evidence.notable
    if not bool(judged.any()):
        return None, f"the margin of none of {number} images changes along {' or '.join(directions)} ({evidence.ball})"
    explained = slope[judged] / change[judged]
    poor, total = count(explained < EXPLAINED), len(explained)
    return exceeds(poor, total, UNEXPLAINED_IMAGES), (
        f"gradients account for less than {EXPLAINED:.0%} of the change along {' or '.join(directions)} on {poor} of "
        f"{total} images, the median is {float(explained.median()):.0%} ({SLOPE_POINTS} gradients each; "
        f"{evidence.ball})"
    )


@check(
    "G4",
    "gradients cover every kind of direction",
    "The answer depends on something that gradients do not see, such as fine detail, one channel or a "
    "detached branch: a step function lies in the way of a part of the image; use BPDA there, or attacks "
    "without gradients.",
)
def kinds_of_direction(evidence: Evidence) -> Answer:
    """The same as G3 for each kind of direction, so that none without a gradient hides behind the others.

    G3's direction is a mixture, of which the gradient may account for enough while all its fine detail, or a channel,
    has none. Each image's change c along its direction of a kind, and the integral s of its gradient along it, are
    equal for an honest function; over images, sum(s c) / sum(c c) is the part that gradients account for.
    """
    number = min(COVER_IMAGES, evidence.number)
    if evidence.weights is not None:
        return None, "the gradients of an int8 graph are those of its weights, which leave rounding out: see Q1 and Q2"
    if number < FEWEST_COVER_IMAGES:
        return None, f"{number} images are too few, needs {FEWEST_COVER_IMAGES}"
    if evidence.sampler is None and not evidence.repeats:
        return None, "answers differ from call to call anyway, see R1"
    images, labels = evidence.images[:number], evidence.labels[:number]
    accounted: dict[str, tuple[float, float]] = {}
    for name, direction in _kinds_of_direction(images.shape, evidence.generator("kinds of direction")):
        signs = direction.to(images)
        low, high = ((images + way * evidence.eps * signs).clamp(0, 1) for way in (-1, 1))
        with torch.no_grad():
            change = (margin(evidence.net(high), labels) - margin(evidence.net(low), labels)).nan_to_num().double()
        if float(change.square().mean().sqrt()) <= evidence.notable:
            continue
        part, error = _accounted(evidence, low, high, labels, change, COVER_POINTS)
        if part < 1 - (1 - COVERED) / 2:  # few gradients are a coarse integral
            part, error = _accounted(evidence, low, high, labels, change, CERTAIN_POINTS)
        accounted[name] = part, error
    if not accounted:
        return None, f"the margin of {number} images changes along no kind of direction ({evidence.ball})"
    least = min(accounted, key=lambda name: sum(accounted[name]))
    part, error = accounted[least]
    lacking = sum(part + error < COVERED for part, error in accounted.values())
    return lacking > 0, (
        f"gradients account for {part:.0%} ± {error:.0%} of the change along {least}, and for less than {COVERED:.0%} "
        f"along {lacking} of {len(accounted)} kinds of direction (n = {number}; {evidence.ball})"
    )


def _corner_direction(evidence: Evidence, number: int) -> Tensor:
    """Return the signs of the gradient of the margin as estimated from random corners alone (SPSA)."""
    labels = evidence.labels[:number]
    values = torch.stack([margin(logits[:number], labels) for logits in evidence.corner_logits])
    total = torch.zeros_like(evidence.images[:number])
    for pair in range(NOISES):
        weight = (values[2 * pair] - values[2 * pair + 1]).nan_to_num().to(total)
        total += weight[:, None, None, None] * evidence.corner(2 * pair)[:number]
    return total.sign()


def _accounted(
    evidence: Evidence, low: Tensor, high: Tensor, labels: Tensor, change: Tensor, points: int
) -> tuple[float, float]:
    """Return the part of the change from `low` to `high` that gradients account for, and two standard errors of it."""
    slope = _slope(evidence, low, high, labels, points).double()
    size = change.square().sum()
    part = (slope * change).sum() / size
    error = ((slope - part * change) * change).square().sum().sqrt() / size
    return float(part), 2 * float(error)


def _slope(evidence: Evidence, low: Tensor, high: Tensor, labels: Tensor, points: int) -> Tensor:
    """Return the integral of the margin's gradient from `low` to `high` (image,), by the midpoint rule."""
    slope, rise = torch.zeros(len(low), device=low.device, dtype=low.dtype), ascent(evidence.net, "margin")
    for point in range(points):
        gradient, _, _ = rise(low + (point + 0.5) / points * (high - low), labels, None)
        slope += (gradient * (high - low)).flatten(1).sum(1).nan_to_num() / points
    return slope


def _kinds_of_direction(shape: torch.Size, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield names and signs (image, channel, height, width) of random directions, from fine to coarse, and by channel.

    A pattern of a size is a Haar wavelet: it has no mean over squares twice that size, and is constant in squares of
    that size. The patterns, and the squares behind the last, are a basis of all images.
    """
    channels, side = shape[1], min(shape[2:])
    size = 1
    while 8 * size <= side:
        yield f"patterns of {size} pixel{'s' if size > 1 else ''}", _patterns(shape, size, generator)
        size *= 2
    if size > 1 or channels == 1:
        yield f"squares of {size} pixel{'s' if size > 1 else ''}", _squares(shape, size, generator)
    yield "whole channels", _squares(shape, max(shape[2:]), generator)
    groups = min(channels, MOST_GROUPS)
    for group in range(groups if channels > 1 else 0):
        signs = torch.zeros(shape)
        signs[:, group::groups] = _squares(signs[:, group::groups].shape, 1, generator)
        yield f"channel {group}" if groups == channels else f"every {groups}th channel from {group}", signs


def _squares(shape: torch.Size, size: int, generator: torch.Generator) -> Tensor:
    images, channels, height, width = shape
    signs = torch.randint(0, 2, (images, channels, -(-height // size), -(-width // size)), generator=generator) * 2 - 1
    return F.interpolate(signs.float(), scale_factor=size)[..., :height, :width]


def _patterns(shape: torch.Size, size: int, generator: torch.Generator) -> Tensor:
    images, channels, height, width = shape
    rows, columns = -(-height // (2 * size)), -(-width // (2 * size))
    wavelets = torch.tensor([[[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
    chosen = torch.randint(0, 3, (images, channels, rows, columns), generator=generator)
    signs = torch.randint(0, 2, (images, channels, rows, columns, 1, 1), generator=generator) * 2 - 1
    tiles = (wavelets[chosen] * signs).transpose(3, 4).reshape(images, channels, 2 * rows, 2 * columns)
    return F.interpolate(tiles.float(), scale_factor=size)[..., :height, :width]
