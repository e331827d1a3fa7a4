"""Accuracy under common corruptions (Hendrycks and Dietterich 2019, arXiv:1903.12261): 15 kinds in 5 severities."""

from __future__ import annotations

import torch

from zoo.bundle.card import Result
from zoo.data import datasets
from zoo.data.cifar10_c import find_official, official, official_labels
from zoo.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.run import Run, share, table


def corruptions(run: Run) -> list[Result]:
    """Mean accuracy over the 75 cells; 1 minus it is the corruption error of the papers.

    Each cell has 1,000 images by default, all 10,000 where the official files are read.

    On CIFAR-10 the official files are read where they are (`request.corrupted`, or a folder CIFAR-10-C among the data);
    elsewhere test images are corrupted here by `zoo.data.corruptions`, and the note says that it is not CIFAR-10-C.
    """
    card = run.bundle.card
    folder = run.request.corrupted or (find_official() if card.dataset == "cifar10" else None)
    if folder is not None and card.dataset != "cifar10":
        raise BadInput(f"{folder} holds CIFAR-10-C, and {card.name} was trained on {card.dataset}")
    images = run.images(1000) if folder is None else None
    cells, counted = [], 0
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            if images is not None:
                pixels = corrupt(images.pixels.cpu(), name, severity, seed=run.request.seed).to(run.device)
                corrupted = Images(pixels, images.labels)
            else:
                assert folder is not None
                whole = Images(official(folder, name, severity), official_labels(folder))
                corrupted = datasets.evaluation_subset(whole, run.request.images or len(whole)).to(run.device)
            counted = len(corrupted)
            stage = f"{name}, severity {severity}"
            judge, size = run.answers(stage)
            cells.append(share(run.judged(stage, corrupted, judge, size=size)))
    values = torch.tensor(cells, dtype=torch.float64).reshape(len(CORRUPTIONS), len(SEVERITIES))
    said = "CIFAR-10-C, the official files" if folder else "synthetic: corrupted by manygates, not CIFAR-10-C"
    columns = [str(severity) for severity in SEVERITIES]
    return [
        run.result(
            attack="corruptions",
            accuracy=float(values.mean()),
            images=counted,
            draws=1 if run.request.variant == "gated" else 0,
            note=f"{said}; mean over {len(CORRUPTIONS)} corruptions x {len(SEVERITIES)} severities",
            tables=[table("corruptions", ("corruption", "severity"), list(CORRUPTIONS), columns, values)],
        )
    ]
