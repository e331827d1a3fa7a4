"""Adaptive diversity promoting training (Pang et al. 2019, arXiv:1901.08846, section 3).

    sum_i CE(f_i(x), y) - alpha H(mean_i p_i) - beta log det(M M^T)

The rows of M are the members' probabilities of the wrong classes, scaled to length 1: the determinant is the squared
volume that the members span, 1 if they spread over different wrong classes and 0 if two of them agree. H is the entropy
of what the ensemble answers; it leaves the members room to differ.
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
from training.objectives.members import MembersObjective, accuracy
from zoo.errors import BadInput
from zoo.gates.derive import mean_probability


@dataclass(frozen=True, kw_only=True)
class Adp(MembersObjective):
    """Cross-entropy of each member, the ensemble's entropy and the volume of the members' wrong answers."""

    method: ClassVar[str] = "adp"
    published: ClassVar[str] = "Pang et al., ICML 2019"

    alpha: float = 2.0
    """Weight of the entropy."""
    beta: float = 0.5
    """Weight of the logarithm of the determinant."""
    offset: float = 1e-6
    """Added to the diagonal before the determinant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(alpha=self.alpha, beta=self.beta)
        if not 0 < self.offset < 1:
            raise BadInput(f"need 0 < offset < 1, got {self.offset}; without it equal members have no logarithm")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return 3.0 * self.count(networks)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        (batch,) = batches
        answers = [network(batch.images) for network in self.networks(model, step)]
        logits = torch.stack(answers)
        num_members, _, classes = logits.shape
        if num_members > classes - 1:
            raise BadInput(
                f"adp spreads members over the wrong classes, and {num_members} of them cannot differ in "
                f"{classes - 1}; train at most {classes - 1} members"
            )
        cross_entropy = torch.stack(
            [F.cross_entropy(answer, batch.labels, label_smoothing=self.label_smoothing) for answer in answers]
        ).sum()
        spread, volume = entropy(logits).mean(), log_volume(logits, batch.labels, self.offset).mean()
        loss = cross_entropy - self.alpha * spread - self.beta * volume
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": cross_entropy.detach() / num_members,
            "entropy": spread.detach(),
            "log_volume": volume.detach(),
        }


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats (batch,) of the mean probability of logits (member, batch, class).

    It is taken in log space, where the offset of the released codes, log(p + 1e-20), is not needed.
    """
    log_prob = mean_probability(logits)
    return -(log_prob.exp() * log_prob).sum(1)


def log_volume(logits: Tensor, labels: Tensor, offset: float) -> Tensor:
    """Return log det(M M^T + offset I) per image (batch,), of logits (member, batch, class).

    The rows of M are softmaxes over the wrong classes alone: the same direction as the probabilities, and no 0 / 0 if a
    member is certain of the true class. The matrix has as many rows as there are members; it is computed in float64,
    because in float32 the offset is just 8 units in the last place.
    """
    true = labels[None, :, None].expand(len(logits), -1, 1)
    wrong = logits.scatter(2, true, -math.inf).softmax(2)  # a column of zeros adds nothing to lengths and products
    rows = F.normalize(wrong.double(), dim=2).transpose(0, 1)
    identity = torch.eye(len(logits), dtype=rows.dtype, device=rows.device)
    volume: Tensor = torch.linalg.slogdet(rows @ rows.mT + offset * identity).logabsdet
    return volume.to(logits.dtype)
