"""Checks of the attacks: whether more of them finds more, whether what they return is one, and what they miss."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.attacks.pixel_grid import to_grid
from zoo.attacks.training_mode import unchecked
from zoo.evaluation.intervals import exceeds
from zoo.evaluation.linter.check import Answer, check
from zoo.evaluation.linter.evidence import CURVE_STEPS, LONG_STEPS, NOISES, STEPS, Evidence, count
from zoo.evaluation.thresholds import (
    BLACK_BOX_ALONE,
    CURVE_RISE,
    FEW_LEFT,
    LATE_GAIN,
    LEFT_OVER,
    ONE_STEP_ALONE,
    OUTSIDE,
    PLANTED_MISSED,
    SILENT,
    STILL_RISING,
)

PLANTED_IMAGES, INNER_POINTS = 32, 32
"""X1 plants an example in the balls of so many images, and looks at so many random points of each."""


@check(
    "S1",
    "eps 0 equals clean accuracy",
    "The attack or its evaluation is broken: without a budget nothing may change; compare the preprocessing "
    "of the two.",
)
def zero_eps(evidence: Evidence) -> Answer:
    """Attack without a budget: nothing may move, and no answer may change."""
    still = pgd(evidence.net, evidence.images, evidence.labels, LinfBudget(eps=0.0, steps=1, random_start=False))
    changed = int(evidence.wrong(still).sum())
    moved = int((still != evidence.images).flatten(1).any(1).sum())
    return bool(changed or moved), (
        f"{changed} of {evidence.number} answers changed and {moved} images moved at eps 0, 1 step "
        f"({evidence.number} of the {evidence.given} images given are answered correctly and judged)"
    )


@check(
    "S2",
    "many steps beat one step",
    "The loss surface is rugged or the steps are wrong, so gradients lead astray; try other step sizes, "
    "smoothed gradients and attacks without gradients.",
)
def many_steps(evidence: Evidence) -> Answer:
    """Count what FGSM breaks and PGD does not."""
    one, many = evidence.wrong(evidence.one_step), evidence.trace.broken(STEPS)
    alone = count(one & ~many)
    return exceeds(alone, evidence.number, ONE_STEP_ALONE), (
        f"{alone} of {evidence.number} broken by FGSM alone (FGSM breaks {count(one)}, PGD-{STEPS} {count(many)}; "
        f"{evidence.ball})"
    )


@check(
    "S3",
    "more steps and starts change nothing",
    "The attack had not converged, so the accuracy it reports is too high; spend more steps and restarts "
    "until nothing changes.",
)
def converged(evidence: Evidence) -> Answer:
    """Count what twice the steps or a second start break, and look at the end of the loss of what is left."""
    usual = evidence.trace.broken(STEPS)
    steps = count(evidence.trace.broken(LONG_STEPS) & ~usual)
    start = count(evidence.second_start)
    late = evidence.trace.losses[:, ~evidence.cross_entropy].mean(1)
    rising = 0.0
    if late.isfinite().all() and float(late[-1]) > float(late.min()):
        rising = float((late[-1] - late[-11]) / (late[-1] - late.min()))
    few = not exceeds(count(~evidence.cross_entropy), evidence.number, FEW_LEFT)
    alarm = (
        exceeds(steps, evidence.number, LATE_GAIN)
        or exceeds(start, evidence.number, LATE_GAIN)
        or (rising > STILL_RISING and not few)
    )
    return alarm, (
        f"PGD-{STEPS} breaks {count(usual)} of {evidence.number}, {LONG_STEPS} steps {steps} more, a second start "
        f"{start} more; the last 10 steps gained {rising:.0%} of the loss of those left ({evidence.ball})"
    )


@check(
    "S4",
    "accuracy falls with eps to chance",
    "A larger ball holds the smaller one, and at 0.5 every ball holds plain grey: an attack that does not "
    "gain from room is failing; look at G1 to G4.",
)
def eps_curve(evidence: Evidence) -> Answer:
    """Attack at growing eps, up to the one whose ball holds plain grey."""
    lefts = [accuracy for _, accuracy in evidence.curve]
    stays = exceeds(round(lefts[-1] * evidence.number), evidence.number, LEFT_OVER)
    rise = max((after - before for before, after in pairwise(lefts)), default=0.0)
    rises = exceeds(round(max(rise, 0.0) * evidence.number), evidence.number, CURVE_RISE)
    shown = ", ".join(f"{eps:.3g}: {accuracy:.2f}" for eps, accuracy in evidence.curve)
    return rises or stays, (
        f"accuracy by eps {shown} (PGD-{CURVE_STEPS}, n = {evidence.number}; the last may be {LEFT_OVER} within its "
        "interval)"
    )


@check(
    "S5",
    "an unbounded attack succeeds",
    "With every image allowed no model can be right, so the attack does not see the model's gradients; look "
    "at G1 to G4 and use attacks without gradients.",
)
def unbounded(evidence: Evidence) -> Answer:
    """Attack at eps 1, where the ball holds every image."""
    everything = torch.arange(evidence.number, device=evidence.images.device)
    left = evidence.number - count(evidence.attacked("unbounded", everything, eps=1.0))
    return exceeds(left, evidence.number, LEFT_OVER), (
        f"PGD-{STEPS} at eps 1 leaves {left} of {evidence.number} (it may leave {LEFT_OVER:.0%} within the interval)"
    )


@check(
    "S6",
    "what was adversarial stays so",
    "The attack found adversarial images and lost them again; keep the first broken or the best iterate, and "
    "see R1 and B1 if they are not adversarial when asked again.",
)
def adversarial_stays(evidence: Evidence) -> Answer:
    """Count images that were adversarial on the way and are not at the end, or not when asked again."""
    found = evidence.trace.broken(LONG_STEPS)
    silent = count(found & ~evidence.trace.wrong[-1])
    lost = count(found & ~evidence.wrong(evidence.trace.first))
    alarm = exceeds(silent, evidence.number, SILENT) or exceeds(lost, evidence.number, SILENT)
    return alarm, (
        f"{silent} of {evidence.number} images adversarial on the way but not at the end of PGD-{LONG_STEPS}, "
        f"{lost} not adversarial when asked again ({evidence.ball})"
    )


@check(
    "S7",
    "images stay in the ball and in range",
    "Images outside the ball, outside [0, 1] or with NaN are no adversarial examples, and numbers from them "
    "count for nothing; see G1 for NaN.",
)
def inside_the_ball(evidence: Evidence) -> Answer:
    """Measure how far images moved, and whether they are still adversarial in 8 bits."""
    budget = LinfBudget(eps=evidence.eps)
    images = evidence.images
    produced = [evidence.one_step, evidence.trace.first, evidence.trace.last, evidence.squares]
    unusable = count(torch.stack([~found.flatten(1).isfinite().all(1) for found in produced]).any(0))
    finite = [found.nan_to_num() for found in produced]
    furthest = max(float(budget.distance(found, images).max()) for found in finite)
    low, high = min(float(found.min()) for found in finite), max(float(found.max()) for found in finite)
    on_grid = float((images * 255 - (images * 255).round()).abs().max()) < 1e-3
    replay = "images not of 8-bit origin, no replay"
    if on_grid:
        broken = evidence.trace.broken(LONG_STEPS)
        rounded = to_grid(evidence.trace.first.nan_to_num(), images, evidence.eps)
        furthest = max(furthest, float(budget.distance(rounded, images).max()))
        replay = f"{count(broken & evidence.wrong(rounded))} of {count(broken)} still adversarial in 8 bits"
    alarm = bool(unusable) or furthest > evidence.eps + OUTSIDE or low < 0 or high > 1
    return alarm, (
        f"largest change {furthest:.6f} for {evidence.ball}, pixels in [{low:g}, {high:g}], {unusable} of "
        f"{evidence.number} images with NaN; {replay}"
    )


@check(
    "W1",
    "gradients beat guessing",
    "An attack that knows less did better, the classic sign of masked gradients; report the black-box number "
    "and attack through the masking (BPDA).",
)
def beats_guessing(evidence: Evidence) -> Answer:
    """Attack what gradients left by queries, by noise and by transfer."""
    left = ~evidence.white_box
    found = {
        f"Square ({evidence.queries} queries)": evidence.wrong(evidence.squares) & left,
        f"random noise ({2 * NOISES} draws)": (evidence.corner_logits.argmax(2) != evidence.labels).any(0) & left,
    }
    if evidence.surrogate is not None:
        found[f"transfer (PGD-{STEPS})"] = evidence.wrong(evidence.on_surrogate[0]) & left
    alone = count(torch.stack(list(found.values())).any(0))
    each = ", ".join(f"{name} {count(broken)}" for name, broken in found.items())
    return exceeds(alone, evidence.number, BLACK_BOX_ALONE), (
        f"gradients break {count(~left)} of {evidence.number}; {alone} more broken without them: {each} "
        f"({evidence.ball})"
    )


@check(
    "X1",
    "a planted adversarial example is found",
    "The attack misses examples that are known to exist, so that it finds none proves nothing; strengthen it "
    "until it finds these.",
)
def planted(evidence: Evidence) -> Answer:
    """Plant a class where only one random corner of the ball is known to lie, and let PGD look for it.

    After Zimmermann et al. 2022, with logits in the place of features: the new class begins half-way, along the change
    of the logits at that corner, between the corner and the furthest of random points in the ball. Guessing will not
    find it, following the model's gradient will.
    """
    images, labels = evidence.images[:PLANTED_IMAGES], evidence.labels[:PLANTED_IMAGES]
    budget = LinfBudget(eps=evidence.eps, steps=STEPS, step_size=2.5 * evidence.eps / STEPS)
    generator = evidence.generator("planted")
    with torch.no_grad():
        base = evidence.net(images)
        moves = evidence.corner_logits[:, : len(images)] - base
        best = moves.norm(dim=2).nan_to_num().argmax(0)
        towards = moves[best, torch.arange(len(images), device=best.device)]
        length = towards.square().sum(1)

        def progress(logits: Tensor) -> Tensor:
            return ((logits - base) * towards).sum(1) / length  # 1 at the corner, 0 at the image

        inner = torch.stack(
            [progress(evidence.net(budget.start(images, generator))) for _ in range(INNER_POINTS)]
        ).amax(0)
    border = (1 + inner.clamp_min(0)) / 2
    planted = (length.sqrt() > evidence.notable) & (inner < 0.9)
    if not bool(planted.any()):
        return None, f"in none of {len(images)} balls do the logits tell a corner from inner points ({evidence.ball})"
    found = torch.zeros_like(planted)

    def binary(pixels: Tensor) -> Tensor:
        beyond = (progress(evidence.net(pixels)) - border) / (1 - border)
        found.logical_or_(beyond.detach() > 0)
        return torch.stack([torch.zeros_like(beyond), beyond], 1)

    pgd(unchecked(binary), images, torch.zeros_like(labels), budget, generator=generator)
    missed, total = count(planted & ~found), count(planted)
    return exceeds(missed, total, PLANTED_MISSED), (
        f"PGD-{STEPS} misses {missed} of {total} planted adversarial examples ({INNER_POINTS} inner points; "
        f"{evidence.ball})"
    )
