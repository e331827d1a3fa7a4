"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) on a deterministic variant, by the reference implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import data
from zoo.attacks.autoattack import ATTACKS, autoattack
from zoo.attacks.budget import LinfBudget
from zoo.card import Check, Result
from zoo.evaluation.run import Run, correct, share, table

BATCH = 100


def autoattacked(run: Run) -> list[Result]:
    """AutoAttack `standard`: APGD-CE, targeted APGD-DLR, FAB-T and Square with 5,000 queries, 1,000 images by default.

    An image counts if none of the four breaks it. What the library warns of (a random model, probabilities, zero
    gradients, Square breaking what the others leave) becomes a check of the result.
    """
    network = run.network
    images = run.images(1000)
    first = images[slice(0, BATCH)]
    run.check_deterministic(data.as_float(first.pixels), first.labels)
    results = []
    for eps in run.request.eps:
        stage = f"AutoAttack, eps {eps}"
        budget = LinfBudget(eps=float(eps))
        warnings: list[str] = []

        def judge(
            pixels: Tensor,
            labels: Tensor,
            batch: int,
            stage: str = stage,
            budget: LinfBudget = budget,
            warnings: list[str] = warnings,
        ) -> Tensor:
            right = correct(network, pixels, labels)
            left = torch.stack([right] * (len(ATTACKS) + 1), dim=1)
            if not budget.eps or not bool(right.any()):
                return left
            found = autoattack(network, pixels, labels, budget, seed=run.generator(stage, batch).initial_seed() % 2**31)
            warnings += found.flags
            for column, attack in enumerate(ATTACKS, start=1):
                left[:, column] = left[:, column - 1] & found.robust[attack]
            # judged once more on what comes back, in the ball and by our own hand
            left[:, -1] &= correct(network, found.adversarial, labels)
            return left

        left = run.judged(stage, images, judge, size=BATCH)
        values = left.double().mean(0)[None]
        results.append(
            run.result(
                attack="AutoAttack",
                accuracy=share(left[:, -1]),
                images=len(images),
                eps=eps,
                restarts=1,
                note="standard: APGD-CE and targeted APGD-DLR (9 targets) of 100 steps, FAB-T, Square of 5,000 queries",
                checks=[
                    Check(
                        name="AutoAttack raises no warning",
                        held=not warnings,
                        detail="; ".join(dict.fromkeys(warnings)) or f"{len(images)} images",
                    )
                ],
                tables=[table("attacks", ("eps", "after"), [str(eps)], ["clean", *ATTACKS], values)],
            )
        )
    return results
