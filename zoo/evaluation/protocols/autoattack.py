"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) on a deterministic variant, by the reference implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from zoo.attacks.autoattack import ATTACKS, autoattack
from zoo.attacks.budget import LinfBudget
from zoo.bundle.card import Check, Result
from zoo.data.datasets import Images
from zoo.evaluation.intervals import share
from zoo.evaluation.run import Run, correct, table
from zoo.evaluation.thresholds import BLACK_BOX_ALONE

BATCH = 100
SQUARE = ATTACKS.index("square")
SQUARE_FLAG = "Square"
"""What the library says of images that Square alone breaks in a batch; they are counted over all batches instead."""


def measure(run: Run) -> list[Result]:
    """AutoAttack `standard`: APGD-CE, targeted APGD-DLR, FAB-T and Square with 5,000 queries, 1,000 images by default.

    An image counts if none of the four breaks it. What the library warns of (a random model, probabilities, zero
    gradients, Square breaking what the others leave) becomes a check of the result.
    """
    images = run.images(1000)
    run.check_deterministic(images[slice(0, BATCH)])
    return [_measure_at(run, eps, images) for eps in run.request.eps]


def _measure_at(run: Run, eps: Fraction, images: Images) -> Result:
    network, stage, budget = run.network, f"AutoAttack, eps {eps}", LinfBudget(eps=float(eps))

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Return where images are right without an attack, and after each of the four (image, 5)."""
        right = correct(network, pixels, labels)
        left = torch.stack([right] * (len(ATTACKS) + 1), dim=1)
        if not budget.eps or not bool(right.any()):
            return left
        found = autoattack(network, pixels, labels, budget, seed=run.generator(stage, batch).initial_seed() % 2**31)
        # kept beside the batch, so that a resumed evaluation forgets no warning
        flags = "\n".join(flag for flag in found.flags if SQUARE_FLAG not in flag)
        run.ledger.put(f"{stage} warnings/{batch}", torch.tensor(list(f"\n{flags}".encode()), dtype=torch.uint8))
        for column, attack in enumerate(ATTACKS, start=1):
            left[:, column] = left[:, column - 1] & found.robust[attack]
        # judged once more here, on the images that the library returns
        left[:, -1] &= correct(network, found.adversarial, labels)
        return left

    left = run.judged(stage, images, judge, size=BATCH)
    warnings = _warnings(run, stage, len(images))
    alone = int((left[:, SQUARE] & ~left[:, SQUARE + 1]).sum())
    return run.result(
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
                detail="; ".join(warnings) or f"{len(images)} images",
            ),
            Check(
                name="gradients find what Square finds",
                held=alone <= BLACK_BOX_ALONE * len(images),
                detail=f"Square alone breaks {alone} of {len(images)} images with 5,000 queries",
            ),
        ],
        tables=[table("attacks", ("eps", "after"), [str(eps)], ["clean", *ATTACKS], left.double().mean(0)[None])],
    )


def _warnings(run: Run, stage: str, images: int) -> list[str]:
    """Return what the library warned of in any batch, each once."""
    found: dict[str, None] = {}
    for batch in range(math.ceil(images / BATCH)):
        kept = run.ledger.get(f"{stage} warnings/{batch}")
        text = bytes(kept.tolist()).decode() if kept is not None else ""
        found.update(dict.fromkeys(line for line in text.splitlines() if line))
    return list(found)
