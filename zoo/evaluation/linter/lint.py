"""The robustness linter: questions whose wrong answers show that a robust accuracy is an artefact of its measurement.

A model that looks robust is robust, or its attack failed. Every check here looks for one way in which attacks fail and
answers "ok", "alarm" or "skipped". No alarm is no proof: the list is neither necessary nor sufficient, as its sources
say of theirs, and every "ok" is worth the budget printed beside it.

    Carlini et al. 2019, arXiv:1902.06705        the checklist (S1 to S5, W1, E1)
    Athalye et al. 2018, arXiv:1802.00420        the signs of obfuscated gradients (S2, S5, W1, E1)
    Croce and Hein 2020, arXiv:2003.01690        scale-free losses (G2) and the flags of AutoAttack (O1, R1, G1, W1, D1)
    Pintor et al. 2022, arXiv:2106.09947         indicators of attack failure (S3, S6, T1)
    Zimmermann et al. 2022, arXiv:2206.13991     planted adversarial examples (X1)

Three questions are our own: whether some kinds of direction have no gradient although the answer depends on them (G4),
and two for int8 graphs, where rounding can look like robustness (Q1, Q2).

The checks share their attacks: `Evidence` runs each one when the first check asks for it. What their figures are
compared with stands in `zoo.evaluation.thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from zoo.attacks.budget import number, whole
from zoo.attacks.outputs import Model, Output
from zoo.attacks.random_gates import Sampler
from zoo.bundle.card import Finding
from zoo.errors import BadInput
from zoo.evaluation.linter.check import Check
from zoo.evaluation.linter.checks import attacks, behaviour, comparisons, draws, gradients
from zoo.evaluation.linter.evidence import QUERIES, Evidence, Served
from zoo.evaluation.linter.side_effects import own_randomness

CHECKS: tuple[Check, ...] = (
    attacks.zero_eps,
    attacks.many_steps,
    attacks.converged,
    attacks.eps_curve,
    attacks.unbounded,
    attacks.adversarial_stays,
    attacks.inside_the_ball,
    attacks.beats_guessing,
    gradients.gradients_exist,
    gradients.other_losses,
    gradients.finite_differences,
    gradients.kinds_of_direction,
    behaviour.logits,
    behaviour.repeats,
    draws.averaging,
    draws.self_report,
    draws.known_draw,
    behaviour.batch,
    behaviour.unchanged,
    behaviour.inner_gradients,
    comparisons.surrogate,
    comparisons.served,
    attacks.planted,
    comparisons.rounding_keeps,
    comparisons.graph_asked,
)
"""In this order. A model that draws from the global random numbers depends on it."""


def lint_model(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    sampler: Sampler | None = None,
    surrogate: Model | None = None,
    served: Served | None = None,
    seed: int = 0,
    queries: int = QUERIES,
    watch: Callable[[Finding], None] | None = None,
    output: Output | None = None,
    checks: Sequence[Check] = CHECKS,
) -> tuple[Finding, ...]:
    """Ask a model every question of `CHECKS`, or some.

    Attacks are judged on the images that the model answers correctly. The global random states of torch, Python and
    numpy are set to `seed` for the duration, for models that draw from them, and given back.

    Args:
        model: images -> logits, deterministic; or a random model itself, of which every call is a draw, with `sampler`.
        images: float (batch, channel, height, width) in [0, 1], of 8-bit origin if replay on the 8-bit grid is to be
            checked; 50 to 200 of them.
        labels: int64 (batch,).
        eps: radius of the l_inf ball; a `Fraction` or a text such as "8/255" is taken as well.
        sampler: fresh deterministic draws of a random model. The questions about gradients are then asked of one draw,
            as a path that became known, and three more of the whole.
        surrogate: another deterministic model of the task, for transfer (W1, T1) and a direction from outside (G3).
        served: what is deployed, from float32 arrays of pixels, such as a session on the exported graph (P1).
        seed: of starts, noise and squares.
        queries: of the Square attack, for each image that no gradient broke.
        watch: called with each finding as soon as it is there.
        output: where the logits are in what the model and its draws return; a surrogate that needs it is given as
            `zoo.attacks.models.checked_model(surrogate, output)`.
        checks: what to ask, in this order.

    Returns:
        One finding per check, in the order of `checks`.

    Raises:
        BadInput: no image is answered correctly, eps is outside (0, 1], fewer than 1 query, a model that fails, returns
            no logits or NaN, or is partly in training mode; see `zoo.attacks.models.checked_model`.
    """
    eps, queries, seed = number(eps, "eps"), whole(queries, "queries"), whole(seed, "seed")
    if not 0 < eps <= 1:
        raise BadInput(f"need 0 < eps <= 1, got {eps}; pixels are in [0, 1], so write 8/255, not 8")
    if queries < 1:
        raise BadInput(f"the Square attack needs at least 1 query per image, got {queries}")
    findings = []
    with own_randomness(seed, images.device):
        evidence = Evidence(
            model,
            images,
            labels,
            eps=eps,
            sampler=sampler,
            surrogate=surrogate,
            served=served,
            seed=seed,
            queries=queries,
            output=output,
        )
        for check in checks:
            alarm, figure = check.ask(evidence)
            verdict = "skipped" if alarm is None else "alarm" if alarm else "ok"
            finding = Finding(code=check.code, name=check.name, verdict=verdict, figure=figure, meaning=check.meaning)
            findings.append(finding)
            if watch is not None:
                watch(finding)
    return tuple(findings)


def passed(findings: Sequence[Finding]) -> bool:
    """Whether no check raised an alarm; skipped checks say nothing."""
    return all(finding.verdict != "alarm" for finding in findings)
