"""Residual networks for 32x32 images of pre-activation blocks.

Wide ones (Zagoruyko and Komodakis 2016, arXiv:1605.07146) have depth 6k + 4; ResNet-18 (He et al. 2016,
arXiv:1603.05027) is as AWP and Fast AT train it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise
from zoo.networks.resnet import initialise, staged


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-(dropout)-conv; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.activation1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activation2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or channels_in != channels
        # a module either way, so that a hook on it always sees what the skip carries
        self.shortcut: nn.Module = nn.Identity()
        if self.projects:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, channels, h / stride, w / stride)."""
        active = self.activation1(self.norm1(features))
        carried = self.shortcut(active if self.projects else features)
        hidden = self.dropout(self.activation2(self.norm2(self.conv1(active))))
        return self.conv2(hidden) + carried  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A wide residual network, for example depth 28 and widening factor 10."""

    def __init__(self, depth: int, widen: int, images: ImageFormat, classes: int = 10, *, dropout: float = 0.0) -> None:
        if depth < 10 or (depth - 4) % 6 != 0:
            raise BadInput(f"a wide ResNet has depth 6k + 4 (10, 16, 28, 34, …), got {depth}")
        super().__init__()
        self.normalise = Normalise(images.mean, images.std)
        self.conv1 = nn.Conv2d(images.channels, 16, 3, padding=1, bias=False)
        groups = [(width * widen, (depth - 4) // 6) for width in (16, 32, 64)]
        self.groups, channels = staged(16, groups, partial(WideBlock, dropout=dropout))
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.groups(self.conv1(self.normalise(images)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.activation(self.norm(features))), 1))
        return logits


class PreActResNet18(nn.Module):
    """Four stages of two pre-activation blocks with `width`, 2, 4 and 8 `width` channels, a final BN and ReLU."""

    def __init__(self, images: ImageFormat, classes: int = 10, *, width: int = 64) -> None:
        super().__init__()
        self.normalise = Normalise(images.mean, images.std)
        self.conv1 = nn.Conv2d(images.channels, width, 3, padding=1, bias=False)
        self.stages, channels = staged(width, [(width << stage, 2) for stage in range(4)], WideBlock)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.stages(self.conv1(self.normalise(images)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.activation(self.norm(features))), 1))
        return logits
