"""Clean accuracy, and PGD on the deployed network, as DVERGE and Ensemble-in-One measure them (their sections 4)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import fgsm, pgd
from zoo.attacks.outputs import logits_of
from zoo.attacks.random_gates import path_model
from zoo.bundle.card import Check, Result, Table
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.evaluation.int8_graph import shown
from zoo.evaluation.run import GROUP, Run, agreement, correct, share, table

CHECKED_IMAGES = 100
CLEAN_DRAWS = 10
GAIN, OTHER_LOSS = 0.02, 0.05
"""What a harder attack, and one on another loss, may find beyond the recorded one; the linter's S3 and G2."""
STEPS_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def clean(run: Run) -> list[Result]:
    """Accuracy on unperturbed test images, all of them by default; for random gates the mean over ten draws."""
    images = run.images(None)
    if run.request.variant != "gated":

        def answered(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
            found = logits_of(run.network, pixels).argmax(1)
            theirs = logits_of(run.weights, pixels).argmax(1) if run.rounds else found
            return torch.stack([found == labels, found == theirs], dim=1)

        judged = run.judged("clean", images, answered)
        return [
            run.result(
                attack="none",
                accuracy=share(judged[:, 0]),
                images=len(images),
                agreement=agreement(judged[:, 1]) if run.rounds else None,
            )
        ]
    draws = run.request.draws or CLEAN_DRAWS

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        rng = run.rng("clean", batch)
        drawn = [paths.sample(run.rgn.num_gates, run.rgn.candidates, rng) for _ in range(draws)]
        right = torch.stack([correct(run.along(path), pixels, labels) for path in drawn], dim=1)
        if not run.rounds:
            return right
        both = run.along(drawn[0]), path_model(run.rgn, drawn[0])
        ours, theirs = (logits_of(model, pixels).argmax(1) for model in both)
        return torch.cat([right, (ours == theirs)[:, None]], dim=1)

    judged = run.judged("clean", images, judge, size=GROUP)
    right = judged[:, :draws]
    per_draw = right.double().mean(0)
    error = float(per_draw.std()) / draws**0.5 if draws > 1 else 0.0
    return [
        run.result(
            attack="none",
            accuracy=share(right),
            images=len(images),
            draws=draws,
            note=f"mean over {draws} draws (standard error {error:.4f}), each with a fresh path per {GROUP} images",
            agreement=agreement(judged[:, draws]) if run.rounds else None,
        )
    ]


def whitebox(run: Run) -> list[Result]:
    """PGD on the deployed network: 50 steps of eps / 5, 5 random starts, cross-entropy, 1,000 images, all-or-nothing.

    An image counts if it is answered correctly without an attack and at *every* iterate of every restart, which is
    stricter than DVERGE's last iterate of every restart.

    An int8 graph has two results per eps: for an attacker who has the weights only and shows the graph every iterate of
    an attack on them, and for one who has both (see `zoo.evaluation.int8_graph`).
    """
    steps, restarts = run.request.steps or 50, run.request.restarts or 5
    network = run.network
    images = run.images(1000)
    first = images[slice(0, CHECKED_IMAGES)]
    run.check_deterministic(datasets.as_float(first.pixels), first.labels)
    checks = sanity(run, first)
    results = []
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps), steps=steps, restarts=restarts)
        if run.rounds:
            results.append(_on_weights(run, images, eps, budget))
        stage = f"PGD-{steps} x {restarts}, eps {eps}"

        def judge(
            pixels: Tensor, labels: Tensor, batch: int, stage: str = stage, budget: LinfBudget = budget
        ) -> Tensor:
            adversarial = pgd(
                network, pixels, labels, budget, keep="first broken", generator=run.generator(stage, batch)
            )
            return correct(network, pixels, labels) & correct(network, adversarial, labels)

        right = run.judged(stage, images, judge)
        results.append(
            run.result(
                attack="PGD through the rounding" if run.rounds else "PGD",
                accuracy=share(right),
                images=len(images),
                eps=eps,
                steps=steps,
                step_size=budget.step,
                restarts=restarts,
                note="all-or-nothing over restarts and iterates"
                + ("; answers of the int8 graph, gradients of the float32 weights" if run.rounds else ""),
                checks=[*checks, *_converged(run, first, right[: len(first)], budget)],
                tables=[_against_steps(run, first, eps, steps)],
            )
        )
    return results


def _on_weights(run: Run, images: Images, eps: Fraction, budget: LinfBudget) -> Result:
    """Show the int8 graph what an attack on the float32 weights makes."""
    stage = f"PGD-{budget.steps} x {budget.restarts} on the weights, eps {eps}"

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        generator = run.generator(stage, batch)
        theirs, ours, last = shown(run.weights, run.network, pixels, labels, budget, generator)
        same = logits_of(run.network, last).argmax(1) == logits_of(run.weights, last).argmax(1)
        return torch.stack([theirs, ours, same], dim=1)

    judged = run.judged(stage, images, judge)
    theirs, ours = share(judged[:, 0]), share(judged[:, 1])
    return run.result(
        attack="PGD on the weights",
        accuracy=ours,
        images=len(images),
        eps=eps,
        steps=budget.steps,
        step_size=budget.step,
        restarts=budget.restarts,
        note=f"a transfer: made on the float32 weights, of which the same images leave {theirs:.4f}; all-or-nothing "
        "over restarts and iterates",
        checks=[
            Check(
                name="what fools the weights fools their rounding",
                held=ours - theirs <= GAIN,
                detail=f"eps {eps}: the same images leave {theirs:.3f} of the weights and {ours:.3f} of the int8 graph",
            )
        ],
        agreement=agreement(judged[:, 2]),
    )


def _converged(run: Run, images: Images, right: Tensor, budget: LinfBudget) -> tuple[Check, ...]:
    """Attack the first images that the recorded attack left, harder and by another loss: neither may find much more."""
    right = right.to(images.labels.device)
    rows = right.nonzero()[:, 0]
    pixels, labels = datasets.as_float(images.pixels[rows]), images.labels[rows]
    harder = replace(budget, steps=2 * budget.steps)
    once = replace(budget, restarts=1)

    def broken(budget: LinfBudget, loss: str) -> float:
        if not budget.eps or not len(rows):
            return 0.0
        generator = run.generator(f"converged, eps {budget.eps}, {loss}", budget.steps)
        adversarial = pgd(run.network, pixels, labels, budget, loss=loss, keep="first broken", generator=generator)
        return float((~correct(run.network, adversarial, labels)).sum()) / len(images)

    gained, other = broken(harder, "cross_entropy"), broken(once, "margin")
    return (
        Check(
            name="twice the steps do not help the attacker",
            held=gained <= GAIN,
            detail=f"eps {budget.eps:g}: PGD-{harder.steps} x {harder.restarts} from other starts breaks {gained:.3f} "
            f"of {len(images)} images beyond PGD-{budget.steps} x {budget.restarts}",
        ),
        Check(
            name="a loss that does not saturate finds no more",
            held=other <= OTHER_LOSS,
            detail=f"eps {budget.eps:g}: PGD-{once.steps} on the margin breaks {other:.3f} of {len(images)} images "
            "that the cross-entropy leaves",
        ),
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


def sanity(run: Run, images: Images) -> tuple[Check, ...]:
    """Check on a few images what must hold of an honest number (Carlini et al. 2019, arXiv:1902.06705).

    The linter (`zoo.evaluation.linter.checks`) asks more; these few run with every evaluation.
    """
    network, request = run.network, run.request
    pixels, labels = datasets.as_float(images.pixels), images.labels
    eps = float(max(request.eps)) or 8 / 255

    def attacked(eps: float, steps: int, step_size: float | None = None) -> Tensor:
        budget = LinfBudget(eps=eps, steps=steps, step_size=step_size)
        adversarial = pgd(
            network, pixels, labels, budget, keep="first broken", generator=run.generator(f"sanity {eps}", steps)
        )
        return correct(network, adversarial, labels)

    unharmed = correct(network, pixels, labels)
    none = correct(network, pgd(network, pixels, labels, LinfBudget(eps=0.0, steps=1)), labels)
    one_step = correct(network, fgsm(network, pixels, labels, LinfBudget(eps=eps)), labels)
    many = attacked(eps, 50)
    huge = attacked(0.5, 50, 0.05)
    noise = torch.rand(pixels.shape, generator=run.generator("sanity noise", 0)).to(pixels.device)
    noisy = correct(network, (pixels + eps * (2 * noise - 1).sign()).clamp(0, 1), labels)
    with torch.enable_grad():
        probe = pixels.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(network(probe), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, probe)
    silent = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    number = len(images)
    return (
        Check(name="eps 0 equals clean", held=bool((none == unharmed).all()), detail=f"{number} images"),
        Check(
            name="PGD is at least as strong as one step",
            held=int((~one_step & many).sum()) <= 0.03 * number,
            detail=f"eps {eps:g}: FGSM leaves {share(one_step):.3f}, PGD-50 {share(many):.3f} of {number} images",
        ),
        Check(
            name="a large eps reaches zero",
            held=share(huge) <= 0.02,
            detail=f"eps 0.5: PGD-50 leaves {share(huge):.3f}",
        ),
        Check(
            name="random noise is weaker than the gradient",
            held=share(noisy) >= share(many) - 0.03,
            detail=f"eps {eps:g}: random signs leave {share(noisy):.3f}, PGD-50 {share(many):.3f}",
        ),
        Check(name="gradients are not zero", held=silent <= 0.05, detail=f"{silent:.3f} of the images have none"),
    )
