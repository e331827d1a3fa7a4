"""Shares of images and what they are worth: intervals, and comparisons that luck does not decide."""

from __future__ import annotations

import math

from torch import Tensor


def share(kept: Tensor) -> float:
    """Return the mean of a mask or of shares."""
    return float(kept.double().mean())


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share measured on `images` images."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def rounded_interval(found: float, images: int) -> tuple[float, float]:
    """Return the interval of `wilson` as cards hold it: six digits, and the share itself within."""
    low, high = wilson(found, images)
    return round(min(low, found), 6), round(max(high, found), 6)


def exceeds(count: int, total: int, threshold: float) -> bool:
    """Whether a share lies above a threshold with its whole 95 % Wilson interval."""
    return total > 0 and wilson(count / total, total)[0] > threshold


def exceeds_on_average(differences: Tensor, threshold: float) -> bool:
    """Whether paired differences are larger than a threshold on average, and than two standard errors."""
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return float(differences.mean()) > max(threshold, 2 * error)
