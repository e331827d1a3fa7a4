"""Pre-activation ResNet-18 for 32x32 images (He et al. 2016, arXiv:1603.05027), as AWP and Fast AT train it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.networks.normalise import Normalise
from zoo.networks.resnet import initialise
from zoo.networks.wide_resnet import WideBlock


class PreActResNet18(nn.Module):
    """Four stages of two pre-activation blocks with `width`, 2, 4 and 8 `width` channels, a final BN and ReLU."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], classes: int = 10, *, width: int = 64) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        stages, channels_in = [], width
        for stage in range(4):
            channels = width << stage
            stages.append(
                nn.Sequential(
                    WideBlock(channels_in, channels, 1 if stage == 0 else 2, dropout=0.0),
                    WideBlock(channels, channels, 1, dropout=0.0),
                )
            )
            channels_in = channels
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels_in)
        self.activation = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_in, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.stages(self.conv1(self.normalise(images)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.activation(self.norm(features))), 1))
        return logits
