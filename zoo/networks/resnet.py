"""Residual networks for 32x32 images (He et al. 2016, arXiv:1512.03385, section 4.2), depth 6k + 2.

Shortcuts that change the shape are 1x1 convolutions with BatchNorm (the paper's option B), as in the networks of
DVERGE and Ensemble-in-One: ResNet-20 has 272,474 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.normalise import Normalise


def initialise(module: nn.Module) -> None:
    """Draw every convolution of `module` from N(0, 2 / (kernel area * output channels)), its bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, added to the shortcut, ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activation2 = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, channels, h / stride, w / stride)."""
        hidden = self.activation1(self.norm1(self.conv1(features)))
        return self.activation2(self.norm2(self.conv2(hidden)) + self.shortcut(features))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A residual network of three stages with `width`, 2 `width` and 4 `width` channels.

    `negative_slope` > 0 makes its activations leaky (GAL trains with 0.1).
    """

    def __init__(
        self,
        depth: int,
        mean: Sequence[float],
        std: Sequence[float],
        classes: int = 10,
        *,
        width: int = 16,
        negative_slope: float = 0.0,
    ) -> None:
        if depth < 8 or (depth - 2) % 6 != 0:
            raise BadInput(f"a CIFAR ResNet has depth 6k + 2 (8, 14, 20, 32, …), got {depth}")
        super().__init__()

        def activation() -> nn.Module:
            return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()

        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = activation()
        stages, channels_in = [], width
        for stage in range(3):
            blocks, channels = [], width << stage
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels_in, channels, stride, activation))
                channels_in = channels
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
