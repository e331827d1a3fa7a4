"""A small network with three exits for digits, as Triple Wins trains it (Hu et al. 2020, arXiv:2002.10025).

Its trunk is the network of TRADES; the layer sizes in the comments are those of 28x28 images.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.networks.image_format import ImageFormat, Normalise

HIDDEN = 200


class SmallCNN(nn.Module):
    """Four 3x3 convolutions without padding; exits behind the first, the third and the fourth.

    The first two exits have no activation between their linear layers. The last layer of the last exit starts at zero.
    """

    def __init__(self, images: ImageFormat, classes: int = 10, *, dropout: float = 0.5) -> None:
        def area(behind: int) -> int:
            """Number of positions: behind the pool of exit 1 (at 0), of exit 2 (at 1), of the trunk (at 2)."""
            sides = []
            for size in (images.height, images.width):
                first = size - 2
                second = (first - 2) // 2 - 2
                sides.append((((first - 3) // 2 + 1) // 2, second // 2, (second - 2) // 2)[behind])
            return sides[0] * sides[1] if min(sides) > 0 else 0

        if area(2) < 1:
            raise BadInput(f"SmallCNN needs images of at least 16x16 pixels, got {images.height}x{images.width}")
        super().__init__()
        self.num_exits = 3
        self.normalise = Normalise(images.mean, images.std)
        self.stage1 = nn.Sequential(nn.Conv2d(images.channels, 32, 3), nn.ReLU())
        self.exit1 = nn.Sequential(
            nn.Conv2d(32, 16, 3, stride=2), nn.MaxPool2d(2), nn.Flatten(), *_linear(16 * area(0), classes, dropout)
        )  # 576 features
        self.stage2 = nn.Sequential(
            nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU()
        )  # fmt: skip
        self.exit2 = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), *_linear(64 * area(1), classes, dropout))  # 1,600
        self.stage3 = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        last = nn.Linear(HIDDEN, classes)
        self.exit3 = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * area(2), HIDDEN),  # 1,024
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            last,
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the three exits, each (batch, class), of images in [0, 1]."""
        features = self.stage1(self.normalise(images))
        first = self.exit1(features)
        features = self.stage2(features)
        second = self.exit2(features)
        return first, second, self.exit3(self.stage3(features))


def _linear(features: int, classes: int, dropout: float) -> tuple[nn.Module, ...]:
    return nn.Linear(features, HIDDEN), nn.Dropout(dropout), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, classes)
