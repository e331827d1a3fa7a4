"""PGD on the deployed network, as DVERGE and Ensemble-in-One measure it (their sections 4)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.attacks.outputs import logits_of
from zoo.bundle.card import Check, Result, Table
from zoo.data.datasets import Images
from zoo.evaluation.int8_graph import attack_weights
from zoo.evaluation.intervals import share
from zoo.evaluation.protocols.whitebox_checks import converged, sanity
from zoo.evaluation.run import Run, agreement, correct, table
from zoo.evaluation.thresholds import LATE_GAIN

CHECKED_IMAGES = 100
STEPS_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def measure(run: Run) -> list[Result]:
    """PGD on the deployed network: 50 steps of eps / 5, 5 random starts, cross-entropy, 1,000 images, all-or-nothing.

    An image counts if it is answered correctly without an attack and at *every* iterate of every restart, which is
    stricter than DVERGE's last iterate of every restart.

    An int8 graph has two results per eps: for an attacker who has the weights only and shows the graph every iterate of
    an attack on them, and for one who has both (see `zoo.evaluation.int8_graph`).
    """
    images = run.images(1000)
    first = images[slice(0, CHECKED_IMAGES)]
    run.check_deterministic(first)
    checks = sanity(run, first)
    results = []
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps), steps=run.request.steps or 50, restarts=run.request.restarts or 5)
        if run.int8:
            results.append(_on_weights(run, images, eps, budget))
        results.append(_on_deployed(run, images, eps, budget, checks))
    return results


def _on_deployed(run: Run, images: Images, eps: Fraction, budget: LinfBudget, checks: Sequence[Check]) -> Result:
    """Attack what is deployed: float32 weights, or an int8 graph through its rounding."""
    network, stage = run.network, f"PGD-{budget.steps} x {budget.restarts}, eps {eps}"

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        generator = run.generator(stage, batch)
        adversarial = pgd(network, pixels, labels, budget, keep="first broken", generator=generator)
        return correct(network, pixels, labels) & correct(network, adversarial, labels)

    right = run.judged(stage, images, judge)
    first = images[slice(0, CHECKED_IMAGES)]
    return run.result(
        attack="PGD through the rounding" if run.int8 else "PGD",
        accuracy=share(right),
        images=len(images),
        eps=eps,
        steps=budget.steps,
        step_size=budget.step,
        restarts=budget.restarts,
        note="all-or-nothing over restarts and iterates"
        + ("; answers of the int8 graph, gradients of the float32 weights" if run.int8 else ""),
        checks=[*checks, *converged(run, first, right[: len(first)], budget)],
        tables=[_against_steps(run, first, eps, budget.steps)],
    )


def _on_weights(run: Run, images: Images, eps: Fraction, budget: LinfBudget) -> Result:
    """Show the int8 graph what an attack on the float32 weights makes."""
    stage = f"PGD-{budget.steps} x {budget.restarts} on the weights, eps {eps}"

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        generator = run.generator(stage, batch)
        weights_kept, graph_kept, last = attack_weights(run.weights, run.network, pixels, labels, budget, generator)
        same = logits_of(run.network, last).argmax(1) == logits_of(run.weights, last).argmax(1)
        return torch.stack([weights_kept, graph_kept, same], dim=1)

    judged = run.judged(stage, images, judge)
    of_weights, of_graph = share(judged[:, 0]), share(judged[:, 1])
    return run.result(
        attack="PGD on the weights",
        accuracy=of_graph,
        images=len(images),
        eps=eps,
        steps=budget.steps,
        step_size=budget.step,
        restarts=budget.restarts,
        note=f"a transfer: made on the float32 weights, of which the same images leave {of_weights:.4f}; "
        "all-or-nothing over restarts and iterates",
        checks=[
            Check(
                name="what fools the weights fools their rounding",
                held=of_graph - of_weights <= LATE_GAIN,
                detail=f"eps {eps}: the same images leave {of_weights:.3f} of the weights and {of_graph:.3f} of the "
                "int8 graph",
            )
        ],
        agreement=agreement(judged[:, 2]),
    )


def _against_steps(run: Run, images: Images, eps: Fraction, steps: int) -> Table:
    """Accuracy after ever more steps of one attempt, on the first images."""
    network = run.network

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        right = [correct(network, pixels, labels)]
        if not eps:
            return torch.stack(right * (steps + 1), dim=1)
        budget = LinfBudget(eps=float(eps), steps=steps)
        generator = run.generator(f"steps {eps}", batch)

        def watch(step: int, adversarial: Tensor, logits: Tensor) -> None:
            if step:
                right.append(logits.argmax(1) == labels)

        last = pgd(network, pixels, labels, budget, generator=generator, watch=watch)
        right.append(correct(network, last, labels))
        return torch.stack(right, dim=1)

    right = run.judged(f"accuracy against steps, eps {eps}", images, judge)
    shown = [step for step in STEPS_SHOWN if step < steps] + [steps]
    values = right.double().mean(0)[[0, *shown]]
    columns = ["0", *map(str, shown)]
    return table("steps", ("attack", "steps"), [f"PGD, eps {eps}, {len(images)} images"], columns, values[None])
