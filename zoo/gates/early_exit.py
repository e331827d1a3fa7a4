"""Where a multi-exit network answers: the first exit whose confidence reaches its limit, and how limits are chosen.

As in MSDNet (Huang et al. 2018, arXiv:1703.09844, section 5). Confidence is the largest probability of an exit. There
is one limit for every exit but the last, which answers whatever reaches it; `early_exit.onnx` takes the same limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from zoo.errors import BadInput


def leaving(confidence: Tensor, limits: Sequence[float]) -> Tensor:
    """Return the exit at which each image leaves (image,) int64, from 0; `confidence` is (image, exit).

    Raises:
        BadInput: the limits are not one for each exit but the last.
    """
    if len(limits) != confidence.shape[1] - 1:
        raise BadInput(f"need {confidence.shape[1] - 1} limits, one per exit but the last, got {len(limits)}")
    reached = torch.ones(confidence.shape, dtype=torch.int8, device=confidence.device)
    reached[:, :-1] = confidence[:, :-1] >= confidence.new_tensor(list(limits))
    return reached.argmax(1)


def thresholds(confidence: Tensor, quotas: Sequence[Fraction | float]) -> list[float]:
    """Return the limits at which each exit takes its quota of the images given.

    `confidence` is that of each validation image at each exit (image, exit); the last exit takes what is left.

    Raises:
        BadInput: quotas that are not one share per exit, or do not sum to 1.
    """
    images, number = confidence.shape
    if len(quotas) != number or any(quota < 0 for quota in quotas) or abs(float(sum(quotas)) - 1) > 1e-6:
        raise BadInput(f"need {number} shares that sum to 1, one per exit, got {[float(quota) for quota in quotas]}")
    waiting = torch.ones(images, dtype=torch.bool)
    found = []
    for index in range(number - 1):
        taken = round(float(quotas[index]) * images)
        candidates = confidence[:, index].masked_fill(~waiting, -1)
        if taken <= 0 or not bool(waiting.any()):
            found.append(float("inf"))
            continue
        threshold = float(candidates.topk(min(taken, int(waiting.sum()))).values[-1])
        found.append(threshold)
        waiting &= confidence[:, index] < threshold
    return found


def geometric_quotas(ratio: float, exits: int) -> list[float]:
    """Return shares of which each is `ratio` times the one before, and that sum to 1 (MSDNet's budgets)."""
    shares = [ratio**index for index in range(exits)]
    return [share / sum(shares) for share in shares]
