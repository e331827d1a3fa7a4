"""The black-box protocol of DVERGE and Ensemble-in-One: adversarial images made on surrogates, judged on the target.

Surrogates are ensembles of networks that the target has nothing to do with. Three of them give 30 versions of every
image (`zoo.evaluation.adversarial_set`). An image counts as robust only if the target answers *all* versions correctly.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from zoo.bundle.card import Result
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.evaluation.adversarial_set import STARTS, STEPS, VERSIONS, AdversarialSet, adversarial_set
from zoo.evaluation.intervals import share
from zoo.evaluation.run import BATCH, Run, table
from zoo.evaluation.surrogates import Surrogate, open_surrogate


def measure(run: Run) -> list[Result]:
    """Transfer attacks: 100 steps of eps / 5 on each surrogate, 10 versions each, 1,000 images, all-or-nothing.

    `request.surrogates` names the surrogates (three ensembles of 3, 5 and 8 members in the papers), `restarts` is not
    read: momentum PGD always has three starts. Clean correctness is part of the "and", as in TRS; the note holds the
    number without it, as in DVERGE's evaluator.
    """
    images = run.images(1000)
    surrogates = [open_surrogate(name) for name in run.request.surrogates]
    adversarial = adversarial_set(run, images, surrogates, run.request.steps or STEPS)
    if run.request.variant != "gated":
        run.check_deterministic(images[slice(0, BATCH)])
    clean = _right(run, "clean", images, datasets.as_float(images.pixels))
    return [_measure_at(run, eps, images, clean, adversarial, surrogates) for eps in run.request.eps]


def _measure_at(
    run: Run,
    eps: Fraction,
    images: Images,
    clean: Tensor,
    adversarial: AdversarialSet,
    surrogates: Sequence[Surrogate],
) -> Result:
    rows = []
    for surrogate in surrogates:
        versions = zip(VERSIONS, adversarial.versions(surrogate, eps, run.device), strict=True)
        rows.append(
            torch.stack(
                [_right(run, f"{surrogate.name}, {name}, eps {eps}", images, pixels) for name, pixels in versions]
            )
        )
    right = torch.stack(rows)  # (surrogate, version, image), correct on every draw
    every = right.all(1).all(0)
    names = [surrogate.name for surrogate in surrogates]
    values = torch.cat([right.double().mean(2), right.all(1).double().mean(1, keepdim=True)], dim=1)
    return run.result(
        attack=f"transfer, set {adversarial.digest[:12]}",
        accuracy=share(every & clean),
        images=len(images),
        eps=eps,
        steps=adversarial.steps,
        step_size=float(eps) / 5,
        restarts=STARTS,
        draws=1 if run.request.variant == "gated" else 0,
        note=f"{len(surrogates)} surrogates x {len(VERSIONS)} versions, all-or-nothing; {share(every):.4f} "
        f"where clean errors are not counted{_without_skips(surrogates)}",
        tables=[table("sources", ("surrogate", "version"), names, [*VERSIONS, "all"], values)],
    )


def _without_skips(surrogates: Sequence[Surrogate]) -> str:
    plain = [surrogate.name for surrogate in surrogates if surrogate.plain]
    return f"; SGM is momentum PGD on {', '.join(plain)}, which has no residual block" if plain else ""


def _right(run: Run, stage: str, images: Images, pixels: Tensor) -> Tensor:
    """Return where the deployed variant answers these versions of the images correctly (image,)."""
    judge, size = run.answers(stage)
    parts = zip(torch.split(pixels, size), torch.split(images.labels, size), strict=True)
    return torch.cat(
        [
            judge(part.contiguous(memory_format=torch.channels_last), labels, number)
            for number, (part, labels) in enumerate(parts)
        ]
    )
