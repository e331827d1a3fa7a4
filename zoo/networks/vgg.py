"""VGG-16 for 32x32 images (Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D), with BatchNorm.

Thirteen 3x3 convolutions with bias and one linear classifier, as in the released Ensemble-in-One code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.networks.image_format import ImageFormat, Normalise
from zoo.networks.resnet import initialise

# Output channels of each convolution; 0 is a 2x2 max pool.
LAYOUT = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """VGG-16; `width` scales its channels (1.0 is the published network)."""

    def __init__(self, images: ImageFormat, classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        self.normalise = Normalise(images.mean, images.std)
        layers: list[nn.Module] = []
        channels_in = images.channels
        for entry in LAYOUT:
            if entry == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            channels = max(1, round(entry * width))
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_in, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(self.normalise(images))), 1))
        return logits
