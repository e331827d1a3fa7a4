"""What several networks have in common: attacks carried from one to another, and DVERGE's diversity."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.distillation import distil
from zoo.attacks.gradient import pgd
from zoo.attacks.outputs import Model, logits_of
from zoo.bundle.card import Result
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.run import Run, correct, table

DIVERSITY_GROUP = 10


def transfer_matrix(run: Run) -> list[Result]:
    """PGD made on one path or member, judged on every other: 50 steps of eps / 5, 5 restarts (DVERGE, section 4.1).

    Judged are images that all of them answer correctly; entry (i, j) is the share that j still answers correctly on
    *every* restart made on i. The accuracy of the result is the mean over i != j, what is left of a single-path attack.
    """
    steps, restarts = run.request.steps or 50, run.request.restarts or 5
    names, models = run.path_models(run.request.paths)
    given = run.images(1000)
    answered = _answered(run, models, given)
    images = _answered_by_all(given, answered)
    results = []
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps), steps=steps)
        rows = []
        for name, model in zip(names, models, strict=True):
            stage = f"made on {name}, eps {eps}"

            def judge(
                pixels: Tensor,
                labels: Tensor,
                batch: int,
                stage: str = stage,
                model: Model = model,
                budget: LinfBudget = budget,
            ) -> Tensor:
                generator = run.generator(stage, batch)
                right = torch.ones(len(labels), len(models), dtype=torch.bool, device=labels.device)
                for _ in range(restarts):
                    adversarial = pgd(model, pixels, labels, budget, generator=generator)
                    right &= torch.stack([correct(other, adversarial, labels) for other in models], dim=1)
                return right

            rows.append(run.judged(stage, images, judge).double().mean(0))
        matrix = torch.stack(rows)
        own = float(matrix.diagonal().mean())
        others = float(matrix[~torch.eye(len(models), dtype=torch.bool)].mean())
        results.append(
            run.result(
                attack="PGD transfer",
                accuracy=others,
                images=len(images),
                eps=eps,
                steps=steps,
                step_size=budget.step,
                restarts=restarts,
                note=f"mean over pairs of different {_kind(run)}s; on the attacked one itself {own:.3f}; images that "
                f"all {len(models)} answer correctly",
                tables=[
                    table("transfer", ("made on", "judged on"), names, names, matrix),
                    table(
                        "paths",
                        (_kind(run), "accuracy"),
                        names,
                        [f"clean, {len(given)} images", f"attacked itself, eps {eps}, {len(images)} images"],
                        torch.stack([answered.double().mean(0), matrix.diagonal()], dim=1),
                    ),
                ],
            )
        )
    return results


def diversity(run: Run) -> list[Result]:
    """DVERGE's diversity: how little one path sees of the features that another confuses (DVERGE, equation 2).

    Images x' are distilled on path i (eps 0.07, 10 steps of 0.007, a random layer per 10 images): they look like their
    source, and i's layer takes them for their target. Entry (i, j) of the table "diversity" is the cross-entropy of j
    on x' for the *target's* class: high where j does not share i's confusion. The accuracy of the result is the share
    of x' that other paths still answer with the source's class. `eps` of the request is not read; DVERGE fixes it.
    """
    names, models = run.path_models(run.request.paths)
    if not run.bundle.card.architecture.gated_layers:
        raise BadInput(
            f"{run.bundle.card.name} has no gated layers; diversity is measured on the layers of a random gated "
            "network, use --protocol transfer-matrix"
        )
    given = run.images(1000)
    images = _answered_by_all(given, _answered(run, models, given))
    budget = LinfBudget(eps=0.07, steps=10, step_size=0.007, random_start=False)
    gates = [paths.parse(name, run.rgn.num_gates, run.rgn.candidates) for name in names]
    losses, kept = [], []
    for name, path in zip(names, gates, strict=True):
        stage = f"distilled on {name}"
        tensors = run.rgn.folded(path)

        def judge(
            pixels: Tensor, labels: Tensor, batch: int, stage: str = stage, tensors: dict[str, Tensor] = tensors
        ) -> Tensor:
            # the same layers and pairs for every path, so that rows can be compared
            rng = run.rng("diversity", batch)
            layer = rng.randint(1, run.rgn.num_features)
            shuffled = list(range(len(labels)))
            rng.shuffle(shuffled)
            following = dict(zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True))
            order = [following[row] for row in range(len(labels))]  # no image is its own target
            feature = run.rgn.runner(layer, tensors, folded=True)
            distilled = distil(feature, pixels, pixels[order], budget, momentum=1.0)
            logits = torch.stack([logits_of(model, distilled) for model in models], dim=1)
            seen = torch.stack(
                [F.cross_entropy(logits[:, j], labels[order], reduction="none") for j in range(len(models))], dim=1
            )
            right = (logits.argmax(2) == labels[:, None]).to(seen.dtype)
            return torch.stack([seen, right], dim=2)

        values = run.judged(stage, images, judge, size=DIVERSITY_GROUP).double().mean(0)
        losses.append(values[:, 0])
        kept.append(values[:, 1])
    others = ~torch.eye(len(models), dtype=torch.bool)
    loss, right = torch.stack(losses), torch.stack(kept)
    return [
        run.result(
            attack="feature distillation",
            accuracy=float(right[others].mean()),
            images=len(images),
            eps=Fraction(7, 100),
            steps=budget.steps,
            step_size=budget.step,
            restarts=1,
            note=f"diversity {float(loss[others].mean()):.3f}: mean cross-entropy of other paths for the target's "
            f"class; on the distilling path itself {float(loss.diagonal().mean()):.3f}",
            tables=[
                table("diversity", ("distilled on", "judged on"), names, names, loss),
                table("transfer", ("distilled on", "judged on"), names, names, right),
            ],
        )
    ]


def _answered(run: Run, models: Sequence[Model | nn.Module], images: Images) -> Tensor:
    """Return which network answers which image correctly (image, network)."""

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        return torch.stack([correct(model, pixels, labels) for model in models], dim=1)

    return run.judged("clean", images, judge)


def _answered_by_all(images: Images, answered: Tensor) -> Images:
    """Return the images that every network answers correctly."""
    right = answered.all(1)
    if not bool(right.any()):
        raise BadInput(
            f"none of {len(images)} images is answered correctly by all {answered.shape[1]} networks; take more"
        )
    return images[right.to(images.labels.device).nonzero()[:, 0]]


def _kind(run: Run) -> str:
    return "path" if run.bundle.card.architecture.gated_layers else "member"
