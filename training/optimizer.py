"""The optimiser of a phase and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from training.recipes import Phase

ADAM_EPS = 1e-7
"""That of the published codes of ADP, GAL, TRS and Dropen; torch's default is 1e-8."""


def optimizer_of(phase: Phase, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a new optimiser as the phase describes it."""
    if phase.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, eps=ADAM_EPS)
    return torch.optim.SGD(
        parameters,
        lr=phase.learning_rate,
        momentum=phase.momentum,
        nesterov=phase.nesterov,
        weight_decay=phase.weight_decay,
    )


def learning_rate(phase: Phase, epoch: float) -> float:
    """Return the learning rate `epoch` epochs into a phase (a fraction within an epoch)."""
    if phase.schedule == "step":
        passed = sum(int(epoch) >= milestone for milestone in phase.milestones)
        return phase.learning_rate * 0.1**passed
    if phase.schedule == "cyclic":
        return phase.learning_rate * (1 - abs(2 * epoch / phase.epochs - 1))
    warm_up = phase.epochs / 20
    if epoch < warm_up:
        return phase.learning_rate * (epoch + 1e-3) / (warm_up + 1e-3)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / (phase.epochs - warm_up)))
