"""How far an attack on one path or member carries to the others."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.attacks.outputs import Model
from zoo.bundle.card import Result
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.run import Run, correct, table


def measure(run: Run) -> list[Result]:
    """PGD made on one path or member, judged on every other: 50 steps of eps / 5, 5 restarts (DVERGE, section 4.1).

    Judged are images that all of them answer correctly; entry (i, j) is the share that j still answers correctly on
    *every* restart made on i. The accuracy of the result is the mean over i != j, what is left of a single-path attack.
    """
    names, models = run.path_models(run.request.paths)
    given = run.images(1000)
    clean = answered(run, models, given)
    images = answered_by_all(given, clean)
    return [_measure_at(run, eps, images, names, models, clean) for eps in run.request.eps]


def _measure_at(
    run: Run, eps: Fraction, images: Images, names: Sequence[str], models: Sequence[Model], clean: Tensor
) -> Result:
    steps, restarts = run.request.steps or 50, run.request.restarts or 5
    budget = LinfBudget(eps=float(eps), steps=steps)

    def row(name: str, attacked: Model) -> Tensor:
        """Return the share that each network still answers after the attack on one of them (network,)."""
        stage = f"made on {name}, eps {eps}"

        def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
            generator = run.generator(stage, batch)
            right = torch.ones(len(labels), len(models), dtype=torch.bool, device=labels.device)
            for _ in range(restarts):
                adversarial = pgd(attacked, pixels, labels, budget, generator=generator)
                right &= torch.stack([correct(model, adversarial, labels) for model in models], dim=1)
            return right

        return run.judged(stage, images, judge).double().mean(0)

    matrix = torch.stack([row(name, model) for name, model in zip(names, models, strict=True)])
    own = float(matrix.diagonal().mean())
    others = float(matrix[~torch.eye(len(models), dtype=torch.bool)].mean())
    kind = "path" if run.bundle.card.architecture.gated_layers else "member"
    columns = [f"clean, {len(clean)} images", f"attacked itself, eps {eps}, {len(images)} images"]
    each = torch.stack([clean.double().mean(0), matrix.diagonal()], dim=1)
    return run.result(
        attack="PGD transfer",
        accuracy=others,
        images=len(images),
        eps=eps,
        steps=steps,
        step_size=budget.step,
        restarts=restarts,
        note=f"mean over pairs of different {kind}s; on the attacked one itself {own:.3f}; images that "
        f"all {len(models)} answer correctly",
        tables=[
            table("transfer", ("made on", "judged on"), names, names, matrix),
            table("paths", (kind, "accuracy"), names, columns, each),
        ],
    )


def answered(run: Run, models: Sequence[Model | nn.Module], images: Images) -> Tensor:
    """Return which network answers which image correctly (image, network)."""

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        return torch.stack([correct(model, pixels, labels) for model in models], dim=1)

    return run.judged("clean", images, judge)


def answered_by_all(images: Images, right: Tensor) -> Images:
    """Return the images that every network answers correctly."""
    by_all = right.all(1)
    if not bool(by_all.any()):
        raise BadInput(
            f"none of {len(images)} images is answered correctly by all {right.shape[1]} networks; take more"
        )
    return images[by_all.to(images.labels.device).nonzero()[:, 0]]
