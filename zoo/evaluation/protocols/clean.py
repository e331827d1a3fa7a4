"""Accuracy without an attack, as DVERGE and Ensemble-in-One measure it (their sections 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.outputs import logits_of
from zoo.attacks.random_gates import path_model
from zoo.bundle.card import Result
from zoo.evaluation.intervals import share
from zoo.evaluation.run import GROUP, Run, agreement, correct

DRAWS = 10


def measure(run: Run) -> list[Result]:
    """Accuracy on unperturbed test images, all of them by default; for random gates the mean over ten draws."""
    return [_over_draws(run) if run.request.variant == "gated" else _once(run)]


def _once(run: Run) -> Result:
    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        found = logits_of(run.network, pixels).argmax(1)
        of_weights = logits_of(run.weights, pixels).argmax(1) if run.int8 else found
        return torch.stack([found == labels, found == of_weights], dim=1)

    images = run.images(None)
    judged = run.judged("clean", images, judge)
    return run.result(
        attack="none",
        accuracy=share(judged[:, 0]),
        images=len(images),
        agreement=agreement(judged[:, 1]) if run.int8 else None,
    )


def _over_draws(run: Run) -> Result:
    draws = run.request.draws or DRAWS

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        rng = run.rng("clean", batch)
        drawn = [paths.sample(run.rgn.num_gates, run.rgn.candidates, rng) for _ in range(draws)]
        right = torch.stack([correct(run.along(path), pixels, labels) for path in drawn], dim=1)
        if not run.int8:
            return right
        both = run.along(drawn[0]), path_model(run.rgn, drawn[0])
        of_graph, of_weights = (logits_of(model, pixels).argmax(1) for model in both)
        return torch.cat([right, (of_graph == of_weights)[:, None]], dim=1)

    images = run.images(None)
    judged = run.judged("clean", images, judge, size=GROUP)
    right = judged[:, :draws]
    per_draw = right.double().mean(0)
    error = float(per_draw.std()) / draws**0.5 if draws > 1 else 0.0
    return run.result(
        attack="none",
        accuracy=share(right),
        images=len(images),
        draws=draws,
        note=f"mean over {draws} draws (standard error {error:.4f}), each with a fresh path per {GROUP} images",
        agreement=agreement(judged[:, draws]) if run.int8 else None,
    )
