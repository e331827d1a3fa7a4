"""Checks of random models that are given with a sampler of their draws."""

from __future__ import annotations

from torch import Tensor

from zoo.evaluation.intervals import exceeds_on_average, share
from zoo.evaluation.linter.check import Answer, check
from zoo.evaluation.linter.evidence import EOT_DRAWS, EOT_IMAGES, EOT_STEPS, FRESH_DRAWS, STEPS, Evidence
from zoo.evaluation.thresholds import EOT_GAIN, FIXED_GAP, SELF_REPORT_GAP

NO_SAMPLER = "no sampler given: the model is deterministic, or R1 alarms"


@check(
    "E1",
    "averaging over draws changes nothing",
    "Attacks with one draw per step are too weak for this random model; report EOT with draws until flat.",
)
def averaging(evidence: Evidence) -> Answer:
    """Compare attacks that average over one draw and over many."""
    if evidence.sampler is None:
        return None, NO_SAMPLER
    one, many = evidence.averaged[1][0], evidence.averaged[EOT_DRAWS][0]
    return exceeds_on_average(one - many, EOT_GAIN), (
        f"accuracy on {FRESH_DRAWS} fresh draws {share(one):.3f} after attacks with 1 draw per step, {share(many):.3f} "
        f"with {EOT_DRAWS} ({_spent(evidence, one)})"
    )


@check(
    "E2",
    "self-reported equals fresh-draw accuracy",
    "An attack that judges itself by its own draws reports luck; judge what it returns on fresh draws.",
)
def self_report(evidence: Evidence) -> Answer:
    """Compare what an attack reports by its own draws with fresh ones."""
    if evidence.sampler is None:
        return None, NO_SAMPLER
    fresh, reported = evidence.averaged[1]
    gap = fresh - reported
    return exceeds_on_average(gap, SELF_REPORT_GAP) or exceeds_on_average(-gap, SELF_REPORT_GAP), (
        f"an attack that stops at the first draw it fools reports {share(reported):.3f}, {FRESH_DRAWS} fresh draws of "
        f"what it returns {share(fresh):.3f} ({_spent(evidence, fresh)})"
    )


@check(
    "E3",
    "a known draw is attacked like a plain network",
    "A path that is known should be the easiest prey: if it is not, its own gradients are masked, and "
    "randomness only covers that; lint one fixed draw as a plain network.",
)
def known_draw(evidence: Evidence) -> Answer:
    """Compare PGD on one draw with EOT over all."""
    if evidence.sampler is None:
        return None, NO_SAMPLER
    fixed = (~evidence.trace.broken(STEPS))[:EOT_IMAGES].double()
    fresh = evidence.averaged[EOT_DRAWS][0]
    return exceeds_on_average(fixed - fresh, FIXED_GAP), (
        f"PGD-{STEPS} on one known draw leaves {share(fixed):.3f}, EOT over unknown draws {share(fresh):.3f} "
        f"({_spent(evidence, fresh)})"
    )


def _spent(evidence: Evidence, values: Tensor) -> str:
    return f"EOT of {EOT_STEPS} steps, n = {len(values)}, {evidence.ball}"
