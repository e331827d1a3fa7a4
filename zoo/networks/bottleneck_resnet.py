"""ResNet-50 for 32x32 images, with bottlenecks (He et al. 2016, arXiv:1512.03385), as EWS trains it on CIFAR.

The stem is a 3x3 convolution of stride 1 and there is no pooling behind it; where a shortcut changes the shape it is a
1x1 convolution with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.networks.normalise import Normalise
from zoo.networks.resnet import initialise

EXPANSION = 4
BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with BN, ReLU between them; added to the shortcut, ReLU."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels = EXPANSION * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.activation3 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, 4 width, h / stride, w / stride)."""
        hidden = self.activation1(self.norm1(self.conv1(features)))
        hidden = self.activation2(self.norm2(self.conv2(hidden)))
        return self.activation3(self.norm3(self.conv3(hidden)) + self.shortcut(features))  # type: ignore[no-any-return]


class CifarResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 bottlenecks, `width`, 2, 4 and 8 `width` wide inside."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], classes: int = 10, *, width: int = 64) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = nn.ReLU()
        stages, channels_in = [], width
        for stage, number in enumerate(BLOCKS):
            blocks = []
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels_in, width << stage, stride))
                channels_in = EXPANSION * (width << stage)
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_in, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.activation1(self.norm1(self.conv1(self.normalise(images))))
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.stages(features)), 1))
        return logits
