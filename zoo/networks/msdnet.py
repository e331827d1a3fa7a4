"""Multi-scale dense networks with several exits (Huang et al. 2018, arXiv:1703.09844), as they are trained on CIFAR.

Every layer adds features at each of three scales, from those of its own scale and of the finer one; all earlier
features stay in reach (dense connections). Exits read the coarsest scale only. On the way the finest scale is dropped
twice, each time with a transition that halves the channels (the paper's network reduction).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise
from zoo.networks.resnet import initialise

SCALES = 3
WIDENING = (1, 2, 4)
"""Channels of a scale relative to the finest; the bottleneck's width grows alike."""
REDUCTION = 0.5
EXIT_CHANNELS = 128
STEP_MODES = ("even", "lin_grow")


def _conv(channels_in: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """conv-BN-ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _bottleneck(channels_in: int, channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 convolution to `width` times the new channels, then the 3x3 convolution that makes them."""
    inner = min(channels_in, width * channels)
    return nn.Sequential(_conv(channels_in, inner, 1), _conv(inner, channels, 3, stride))


class FirstLayer(nn.Module):
    """Features of every scale from the image, each scale by a stride of 2 from the one before."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for scale in range(SCALES):
            out = channels * WIDENING[scale]
            self.scales.append(_conv(channels_in, out, stride=1 if scale == 0 else 2))
            channels_in = out

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features of all scales, finest first."""
        features = []
        for scale in self.scales:
            images = scale(images)
            features.append(images)
        return features


class DenseLayer(nn.Module):
    """New features at the scales from `first` on; where a finer scale came in, half of them are made from it.

    Args:
        channels: of the features so far, at the finest of all scales (a coarser one has `WIDENING` times as many).
        growth: of the new features, alike.
        first: the finest scale that goes out.
        dropped: how many scales finer than `first` came in: 0 or 1.
    """

    def __init__(self, channels: int, growth: int, first: int, dropped: int) -> None:
        super().__init__()
        self.dropped = dropped
        self.same, self.finer = nn.ModuleList(), nn.ModuleList()
        for scale in range(first, SCALES):
            widening = WIDENING[scale]
            has_finer = scale > first - dropped
            new = growth * widening // 2 if has_finer else growth * widening
            self.same.append(_bottleneck(channels * widening, new, widening))
            if has_finer:
                narrower = WIDENING[scale - 1]
                self.finer.append(_bottleneck(channels * narrower, new, narrower, stride=2))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return features of the scales that go on, each the old ones and the new ones."""
        finer = features if self.dropped else [None, *features]
        own = features[self.dropped :]
        grown, down = [], iter(self.finer)
        for same, narrow, coarse in zip(self.same, finer, own, strict=False):
            parts = [coarse, same(coarse)] if narrow is None else [coarse, next(down)(narrow), same(coarse)]
            grown.append(torch.cat(parts, 1))
        return grown


class Transition(nn.Module):
    """1x1 convolutions that halve the channels of every scale from `first` on."""

    def __init__(self, channels_in: int, channels: int, first: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            _conv(channels_in * widening, channels * widening, 1) for widening in WIDENING[first:]
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return features of the same scales."""
        return [scale(feature) for scale, feature in zip(self.scales, features, strict=True)]


class Exit(nn.Module):
    """Two convolutions of stride 2, the average over what is left, and a linear classifier."""

    def __init__(self, channels_in: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(channels_in, EXIT_CHANNELS, stride=2), _conv(EXIT_CHANNELS, EXIT_CHANNELS, stride=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(EXIT_CHANNELS, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (batch, class) of features of the coarsest scale."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(features)), 1))
        return logits


class MSDNet(nn.Module):
    """A multi-scale dense network with `num_exits` exits.

    Args:
        images: what comes in.
        classes: how many there are.
        exits: how many blocks, each with an exit behind it; at least 2.
        base: layers of the first block.
        step: layers of each further block; with `step_mode` "lin_grow", block i (from 1) has step * i + 1.
        step_mode: "even" or "lin_grow".
        growth: channels that a layer adds at the finest scale.
        channels: of the first layer at the finest scale.

    Raises:
        BadInput: a count that is too small, or an unknown step mode.
    """

    def __init__(
        self,
        images: ImageFormat,
        classes: int = 10,
        *,
        exits: int = 3,
        base: int = 4,
        step: int = 2,
        step_mode: str = "even",
        growth: int = 6,
        channels: int = 16,
    ) -> None:
        counts = {"exits": exits, "base": base, "step": step, "growth": growth, "channels": channels}
        for name, count in counts.items():
            least = 2 if name == "exits" else 1
            if count < least:
                raise BadInput(f"an MSDNet needs {name} of at least {least}, got {count}")
        if step_mode not in STEP_MODES:
            raise BadInput(f"step_mode must be one of {', '.join(STEP_MODES)}, got {step_mode!r}")
        super().__init__()
        self.num_exits = exits
        layers = [base] + [step if step_mode == "even" else step * block + 1 for block in range(1, exits)]
        interval = math.ceil(sum(layers) / SCALES)
        self.normalise = Normalise(images.mean, images.std)
        self.first = FirstLayer(images.channels, channels)
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        built, first = 0, 0
        for number in layers:
            block = nn.Sequential()
            for _ in range(number):
                before, first = first, built // interval
                block.append(DenseLayer(channels, growth, first, first - before))
                channels += growth
                if first > before:
                    reduced = math.floor(REDUCTION * channels)
                    block.append(Transition(channels, reduced, first))
                    channels = reduced
                built += 1
            self.blocks.append(block)
            self.exits.append(Exit(channels * WIDENING[-1], classes))
        initialise(self)
        for head in self.exits:
            nn.init.zeros_(head.classifier.bias)  # type: ignore[arg-type,union-attr]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of every exit, first exit first, each (batch, class); images are in [0, 1]."""
        features = self.first(self.normalise(images))
        answers = []
        for block, head in zip(self.blocks, self.exits, strict=True):
            features = block(features)
            answers.append(head(features[-1]))
        return tuple(answers)
