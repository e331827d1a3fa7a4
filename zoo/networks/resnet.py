"""Residual networks for 32x32 images (He et al. 2016, arXiv:1512.03385).

Those of section 4.2 have depth 6k + 2; ResNet-50 has bottlenecks, as EWS trains it on CIFAR, and a stem of one 3x3
convolution without pooling. Shortcuts that change the shape are 1x1 convolutions with BatchNorm (the paper's option B),
as in the networks of DVERGE and Ensemble-in-One: ResNet-20 has 272,474 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise

EXPANSION = 4


def initialise(module: nn.Module) -> None:
    """Draw every convolution of `module` from N(0, 2 / (kernel area * output channels)), its bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def staged(
    channels: int, stages: Sequence[tuple[int, int]], block: Callable[[int, int, int], nn.Module], expansion: int = 1
) -> tuple[nn.Sequential, int]:
    """Return stages of blocks and the channels that come out; each stage but the first halves height and width.

    Args:
        channels: that come in.
        stages: (width, number of blocks) of each.
        block: makes one of (channels that come in, width, stride).
        expansion: channels that a block puts out per width.
    """
    made = nn.Sequential()
    for stage, (width, number) in enumerate(stages):
        blocks = nn.Sequential()
        for index in range(number):
            blocks.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
            channels = expansion * width
        made.append(blocks)
    return made, channels


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels_in == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


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
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, channels, h / stride, w / stride)."""
        hidden = self.activation1(self.norm1(self.conv1(features)))
        return self.activation2(self.norm2(self.conv2(hidden)) + self.shortcut(features))  # type: ignore[no-any-return]


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
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, 4 width, h / stride, w / stride)."""
        hidden = self.activation1(self.norm1(self.conv1(features)))
        hidden = self.activation2(self.norm2(self.conv2(hidden)))
        return self.activation3(self.norm3(self.conv3(hidden)) + self.shortcut(features))  # type: ignore[no-any-return]


class _ResNet(nn.Module):
    """A 3x3 convolution, stages, and a linear classifier of the mean over what is left."""

    def __init__(
        self,
        images: ImageFormat,
        classes: int,
        stages: Sequence[tuple[int, int]],
        block: Callable[[int, int, int], nn.Module],
        activation: Callable[[], nn.Module] = nn.ReLU,
        expansion: int = 1,
    ) -> None:
        super().__init__()
        width = stages[0][0]
        self.normalise = Normalise(images.mean, images.std)
        self.conv1 = nn.Conv2d(images.channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = activation()
        self.stages, channels = staged(width, stages, block, expansion)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.activation1(self.norm1(self.conv1(self.normalise(images))))
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.stages(features)), 1))
        return logits


class CifarResNet(_ResNet):
    """A residual network of three stages with `width`, 2 `width` and 4 `width` channels.

    `negative_slope` > 0 makes its activations leaky (GAL trains with 0.1).
    """

    def __init__(
        self, depth: int, images: ImageFormat, classes: int = 10, *, width: int = 16, negative_slope: float = 0.0
    ) -> None:
        if depth < 8 or (depth - 2) % 6 != 0:
            raise BadInput(f"a CIFAR ResNet has depth 6k + 2 (8, 14, 20, 32, …), got {depth}")
        activation = partial(nn.LeakyReLU, negative_slope) if negative_slope else nn.ReLU
        stages = [(width << stage, (depth - 2) // 6) for stage in range(3)]
        super().__init__(images, classes, stages, partial(BasicBlock, activation=activation), activation)


class CifarResNet50(_ResNet):
    """Four stages of 3, 4, 6 and 3 bottlenecks, `width`, 2, 4 and 8 `width` wide inside."""

    def __init__(self, images: ImageFormat, classes: int = 10, *, width: int = 64) -> None:
        stages = [(width << stage, number) for stage, number in enumerate((3, 4, 6, 3))]
        super().__init__(images, classes, stages, Bottleneck, expansion=EXPANSION)
