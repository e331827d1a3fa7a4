"""Accuracy under common corruptions (Hendrycks and Dietterich 2019, arXiv:1903.12261): 15 kinds in 5 severities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from zoo.bundle.card import Result
from zoo.data import datasets
from zoo.data.cifar10_c import find_official, official, official_labels
from zoo.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.intervals import share
from zoo.evaluation.run import Run, table

Cell = Callable[[str, int], Images]
"""(corruption, severity) -> the images of that cell."""


def measure(run: Run) -> list[Result]:
    """Mean accuracy over the 75 cells; 1 minus it is the corruption error of the papers.

    Each cell has 1,000 images by default, all 10,000 where the official files are read.

    On CIFAR-10 the official files are read where they are (`request.corrupted`, or a folder CIFAR-10-C among the data);
    elsewhere test images are corrupted here by `zoo.data.corruptions`, and the note says that it is not CIFAR-10-C.
    """
    card = run.bundle.card
    folder = run.request.corrupted or (find_official() if card.dataset == "cifar10" else None)
    if folder is not None and card.dataset != "cifar10":
        raise BadInput(f"{folder} holds CIFAR-10-C, and {card.name} was trained on {card.dataset}")
    cell = _official(run, folder) if folder else _synthetic(run)
    cells, counted = [], 0
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            corrupted = cell(name, severity)
            counted, stage = len(corrupted), f"{name}, severity {severity}"
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


def _official(run: Run, folder: Path) -> Cell:
    def read(name: str, severity: int) -> Images:
        whole = Images(official(folder, name, severity), official_labels(folder))
        return datasets.evaluation_subset(whole, run.request.images or len(whole)).to(run.device)

    return read


def _synthetic(run: Run) -> Cell:
    images = run.images(1000)
    pixels = images.pixels.cpu()

    def make(name: str, severity: int) -> Images:
        return Images(corrupt(pixels, name, severity, seed=run.request.seed).to(run.device), images.labels)

    return make
