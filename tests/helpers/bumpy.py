"""What tests of several attacks are tried on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bumpy(nn.Module):
    """A small network with a curved loss and a BatchNorm, for images of 3 x 8 x 8."""

    def __init__(self, seed: int = 1, scale: float = 20.0, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, classes)
        )
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * self.scale
