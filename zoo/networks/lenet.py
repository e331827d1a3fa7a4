"""LeNet for digits, as TRS and Dropen train it: two 5x5 convolutions, two linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise


class LeNet(nn.Module):
    """conv5x5 20, pool, conv5x5 50, pool, linear 500, linear; Dropen adds `dropout` 0.5 after the first linear."""

    def __init__(self, images: ImageFormat, classes: int = 10, *, dropout: float = 0.0) -> None:
        height, width = ((size - 4) // 2 for size in (images.height, images.width))
        height, width = ((size - 4) // 2 for size in (height, width))
        if min(height, width) < 1:
            raise BadInput(f"LeNet needs images of at least 16x16 pixels, got {images.height}x{images.width}")
        super().__init__()
        self.normalise = Normalise(images.mean, images.std)
        self.conv1 = nn.Conv2d(images.channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.hidden = nn.Linear(50 * height * width, 500)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) of images (batch, channel, height, width) in [0, 1]."""
        features = self.pool2(self.conv2(self.pool1(self.conv1(self.normalise(images)))))
        hidden = self.activation(self.hidden(torch.flatten(features, 1)))
        logits: Tensor = self.classifier(self.dropout(hidden))
        return logits
