"""Gradient alignment loss (Kariyappa and Qureshi 2019, arXiv:1901.09981, section 4).

    mean_i CE(f_i(x), y) + weight mean_x log sum_{i<j} exp(cos(g_i, g_j)),     g_i = d CE(f_i(x), y) / d x

Members whose loss rises in different directions are fooled by different perturbations. The paper trains with leaky
ReLUs, whose gradients are less sparse (`negative_slope=0.1` of the residual networks), and on images half of which are
noisy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Step
from training.objectives.checks import check_weights
from training.objectives.input_gradients import SECOND_ORDER, cosines, input_gradients
from training.objectives.members import MembersObjective, accuracy
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Gal(MembersObjective):
    """Cross-entropy of each member, and how much their image gradients are aligned."""

    method: ClassVar[str] = "gal"
    published: ClassVar[str] = "Kariyappa and Qureshi, 2019"

    weight: float = 0.5
    """Weight of the alignment."""
    noise: float = 0.045
    """Standard deviation of the noise, in pixel units."""
    noisy_share: float = 0.5
    """Probability that an image is made noisy."""
    clip_noise: bool = True
    """Keep noisy images in [0, 1]; the released code of DVERGE does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(weight=self.weight)
        if not (0 <= self.noise < math.inf and 0 <= self.noisy_share <= 1):
            raise BadInput(f"need noise >= 0 and 0 <= noisy_share <= 1, got {self.noise} and {self.noisy_share}")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return SECOND_ORDER * self.count(networks)

    def noisy(self, images: Tensor, step: Step) -> Tensor:
        """Return the images, some of them with noise, each image with its own draw; all members see the same."""
        generator = step.generator("noise")
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < self.noisy_share
        noise = torch.randn(images.shape, generator=generator) * self.noise * chosen
        moved = images + noise.to(images.device)
        return moved.clamp(0, 1) if self.clip_noise else moved

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; one forward pass per member serves both terms."""
        (batch,) = batches
        images = self.noisy(batch.images, step)
        pairs = [input_gradients(network, images, batch.labels) for network in self.networks(model, step)]
        answers, gradients = [logits for logits, _ in pairs], [found for _, found in pairs]
        cross_entropy = torch.stack(
            [F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing) for logits in answers]
        ).mean()
        similar = cosines(gradients)
        loss = cross_entropy + self.weight * alignment(similar)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": cross_entropy.detach(),
            "cosine": similar.detach().mean(),
        }


def alignment(similar: Tensor) -> Tensor:
    """Return the mean over images of log sum over pairs of exp(cosine), of cosines (pair, batch)."""
    return similar.logsumexp(0).mean()
