"""DVERGE's diversity of paths (Yang et al. 2020, arXiv:2009.14720)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.distillation import distil
from zoo.attacks.outputs import Model, logits_of
from zoo.bundle.card import Result
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.protocols.transfer_matrix import answered, answered_by_all
from zoo.evaluation.run import Run, table

IMAGES_PER_LAYER = 10


def measure(run: Run) -> list[Result]:
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
    images = answered_by_all(given, answered(run, models, given))
    budget = LinfBudget(eps=0.07, steps=10, step_size=0.007, random_start=False)
    gates = [paths.parse(name, run.rgn.num_gates, run.rgn.candidates) for name in names]
    # (path distilled on, path judged on, loss and correctness)
    values = torch.stack([_distilled_on(run, path, images, models, budget) for path in gates])
    others = ~torch.eye(len(models), dtype=torch.bool)
    loss, right = values[..., 0], values[..., 1]
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


def _distilled_on(run: Run, path: paths.Path, images: Images, models: Sequence[Model], budget: LinfBudget) -> Tensor:
    """Return the mean loss for the target's class, and accuracy, of each path on what one distils (path, 2)."""
    tensors = run.rgn.folded(path)

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        # the same layers and pairs for every path, so that rows can be compared
        rng = run.rng("diversity", batch)
        layer = rng.randint(1, run.rgn.num_features)
        shuffled = list(range(len(labels)))
        rng.shuffle(shuffled)
        following = dict(zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True))
        order = [following[row] for row in range(len(labels))]  # no image is its own target
        feature = run.rgn.runner(layer, tensors, folded=True)
        distilled = distil(feature, pixels, pixels[order], budget, momentum=1.0)
        logits = [logits_of(model, distilled) for model in models]
        losses = torch.stack([F.cross_entropy(each, labels[order], reduction="none") for each in logits], dim=1)
        right = torch.stack([each.argmax(1) == labels for each in logits], dim=1)
        return torch.stack([losses, right.to(losses.dtype)], dim=2)

    stage = f"distilled on {paths.format_path(path)}"
    return run.judged(stage, images, judge, size=IMAGES_PER_LAYER).double().mean(0)
