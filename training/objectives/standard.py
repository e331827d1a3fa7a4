"""Cross-entropy on clean images; of a random gated network, along one random path per batch.

For a random gated network this is the pre-training of Ensemble-in-One (algorithm 1, lines 1 to 6); for an ensemble,
separate networks trained on the same batches: the baseline of DVERGE and its relatives. With `consistency` it is AugMix
(Hendrycks et al. 2020, arXiv:1912.02781, section 3): the network should say the same of every augmentation of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from training.objectives.base import Batch
from training.objectives.checks import check_weights
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective, View


@dataclass(frozen=True, kw_only=True)
class Standard(NetworkObjective):
    """Mean cross-entropy, and the Jensen-Shannon divergence between views of an image if `consistency` is not 0."""

    method: ClassVar[str] = "standard"
    published: ClassVar[str] = "(empirical risk minimisation)"

    consistency: float = 0.0
    """Weight of the Jensen-Shannon divergence between the image and two augmentations of it (AugMix: 12)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(consistency=self.consistency)

    @property
    def views(self) -> int:
        """See `Objective.views`."""
        return 3 if self.consistency else 1

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return 3.0 * networks * self.views

    def inputs(self, network: Network, batch: Batch) -> Tensor:
        """Return all views of all images in one batch, so that they share BatchNorm statistics."""
        return torch.cat([batch.images, *batch.views]) if batch.views else batch.images

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        size = len(batch.labels)
        logits = network(inputs)
        value = F.cross_entropy(logits[:size], batch.labels, label_smoothing=self.label_smoothing)
        parts = torch.split(logits, size)
        if self.consistency and len(parts) > 1:
            value = value + self.consistency * jensen_shannon(parts)
        share = 1 / len(parts)
        views = [View(images, said, share) for images, said in zip(torch.split(inputs, size), parts, strict=True)]
        return Loss(value, tuple(views))


def jensen_shannon(logits: tuple[Tensor, ...]) -> Tensor:
    """Return the mean Jensen-Shannon divergence, in nats, between what several logits (batch, class) say."""
    probabilities = [part.softmax(1) for part in logits]
    # clamped as in the reference: the logarithm of a mixture that underflows would be infinite
    mixture = torch.stack(probabilities).mean(0).clamp(1e-7, 1).log()
    terms = [F.kl_div(mixture, part, reduction="batchmean") for part in probabilities]
    return torch.stack(terms).mean()
