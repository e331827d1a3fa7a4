"""Attacks that only ask: Square for scores (Andriushchenko et al. 2020), RayS for labels (Chen and Gu 2020)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget
from zoo.attacks.rays import rays
from zoo.attacks.square import square
from zoo.bundle.card import Check, Result
from zoo.data.datasets import Images
from zoo.evaluation.intervals import share
from zoo.evaluation.run import BATCH, Run, correct
from zoo.evaluation.thresholds import OUTSIDE

QUERIES = 1000


def measure(run: Run) -> list[Result]:
    """Square and RayS on the deployed network, 1,000 queries per image each, 1,000 images; two results per eps.

    An image counts if it is answered correctly without an attack and after it. These attacks need no gradients, so they
    attack an int8 graph, which has none, as it is.
    """
    images = run.images(1000)
    run.check_deterministic(images[slice(0, BATCH)])
    return [
        _measure_at(run, eps, images, name, attack, answer)
        for eps in run.request.eps
        for name, attack, answer in (("Square", square, "scores"), ("RayS", rays, "labels"))
    ]


def _measure_at(
    run: Run, eps: Fraction, images: Images, name: str, attack: Callable[..., Tensor], answer: str
) -> Result:
    network, budget, queries = run.network, LinfBudget(eps=float(eps)), run.request.queries or QUERIES
    stage = f"{name}, {queries} queries, eps {eps}"

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Return where images are right after the attack, and where they stayed in the ball (image, 2)."""
        right = correct(network, pixels, labels)
        left, inside = right.clone(), torch.ones_like(right)
        if budget.eps and bool(right.any()):
            generator = run.generator(stage, batch)
            found = attack(network, pixels[right], labels[right], budget, queries=queries, generator=generator)
            left[right] = correct(network, found, labels[right])
            inside[right] = budget.distance(found, pixels[right]) <= budget.eps + OUTSIDE
        return torch.stack([left, inside], dim=1)

    judged = run.judged(stage, images, judge)
    outside = int((~judged[:, 1].bool()).sum())
    return run.result(
        attack=f"{name}, {queries:,} queries",
        accuracy=share(judged[:, 0]),
        images=len(images),
        eps=eps,
        restarts=1,
        note=f"{answer} only",
        checks=[
            Check(
                name="images stay in the ball",
                held=not outside,
                detail=f"{outside} of {len(images)} images moved further than eps {eps}",
            )
        ],
    )
