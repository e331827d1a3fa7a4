"""Dropen's network for CIFAR: two convolutions and one linear layer behind a dropout.

The paper says "two convolutional layers" without their sizes; those here are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise


class TwoLayerCNN(nn.Module):
    """conv5x5 `width`, ReLU, pool, conv5x5 2 `width`, ReLU, pool, dropout, linear; each dropout mask is a sub-model."""

    def __init__(self, images: ImageFormat, classes: int = 10, *, width: int = 64, dropout: float = 0.5) -> None:
        if min(images.height, images.width) < 4:
            raise BadInput(f"TwoLayerCNN needs images of at least 4x4 pixels, got {images.height}x{images.width}")
        super().__init__()
        self.normalise = Normalise(images.mean, images.std)
        self.conv1 = nn.Conv2d(images.channels, width, 5, padding=2)
        self.activation1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, padding=2)
        self.activation2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Linear(2 * width * (images.height // 4) * (images.width // 4), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.pool1(self.activation1(self.conv1(self.normalise(images))))
        features = self.pool2(self.activation2(self.conv2(features)))
        logits: Tensor = self.classifier(self.dropout(torch.flatten(features, 1)))
        return logits
