"""The 8-bit grid: an adversarial image that leaves as a picture must still be adversarial, and still in the ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.attacks.budget import number


def to_grid(adversarial: Tensor, images: Tensor, eps: float) -> Tensor:
    """Round adversarial pixels to k/255 without leaving the ball around `images`, themselves on the grid.

    Rounding alone may leave it: 0.1 is 25.5/255, and a pixel 25.5 steps away rounds to 26. So the difference is
    clamped to floor(255 eps) whole steps. In these the result is in the ball; as floats, two levels may differ from
    k/255 by rounding.

    Args:
        adversarial: (batch, channel, height, width) in [0, 1].
        images: the clean images, of 8-bit origin.
        eps: radius in pixel units; a `Fraction` or "8/255" is taken as well.
    """
    clean = (images * 255).round()
    most = math.floor(255 * number(eps, "eps") + 1e-6)
    difference = ((adversarial * 255).round() - clean).clamp(-most, most)
    return torch.clamp(clean + difference, 0, 255) / 255
