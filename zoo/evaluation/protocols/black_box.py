"""Attacks that only ask: Square for scores (Andriushchenko et al. 2020), RayS for labels (Chen and Gu 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget
from zoo.attacks.rays import rays
from zoo.attacks.square import square
from zoo.bundle.card import Check, Result
from zoo.data import datasets
from zoo.evaluation.intervals import share
from zoo.evaluation.run import BATCH, Run, correct

QUERIES = 1000


def queried(run: Run) -> list[Result]:
    """Square and RayS on the deployed network, 1,000 queries per image each, 1,000 images; two results per eps.

    An image counts if it is answered correctly without an attack and as the attack left it. These need no gradients, so
    they also see a model as it is that has none: the int8 graphs.
    """
    network = run.network
    queries = run.request.queries or QUERIES
    images = run.images(1000)
    first = images[slice(0, BATCH)]
    run.check_deterministic(datasets.as_float(first.pixels), first.labels)
    attacks: dict[str, Callable[..., Tensor]] = {"Square": square, "RayS": partial(rays)}
    results = []
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps))
        for name, attack in attacks.items():
            stage = f"{name}, {queries} queries, eps {eps}"

            def judge(
                pixels: Tensor,
                labels: Tensor,
                batch: int,
                stage: str = stage,
                attack: Callable[..., Tensor] = attack,
                budget: LinfBudget = budget,
            ) -> Tensor:
                right = correct(network, pixels, labels)
                left, inside = right.clone(), torch.ones_like(right)
                if budget.eps and bool(right.any()):
                    generator = run.generator(stage, batch)
                    found = attack(network, pixels[right], labels[right], budget, queries=queries, generator=generator)
                    left[right] = correct(network, found, labels[right])
                    inside[right] = budget.distance(found, pixels[right]) <= budget.eps + 1e-6
                return torch.stack([left, inside], dim=1)

            judged = run.judged(stage, images, judge)
            outside = int((~judged[:, 1].bool()).sum())
            results.append(
                run.result(
                    attack=f"{name}, {queries:,} queries",
                    accuracy=share(judged[:, 0]),
                    images=len(images),
                    eps=eps,
                    restarts=1,
                    note="scores only" if name == "Square" else "labels only",
                    checks=[
                        Check(
                            name="images stay in the ball",
                            held=not outside,
                            detail=f"{outside} of {len(images)} images moved further than eps {eps}",
                        )
                    ],
                )
            )
    return results
