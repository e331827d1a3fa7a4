"""Transferability reduced smooth ensembles (Yang et al. 2021, arXiv:2104.00671, section 4).

    sum_i CE(f_i(x), y) + lambda_a S + lambda_b Q
    S = mean_{i<j} mean_k |cos(g_ik, g_jk)|          members' image gradients should be orthogonal
    Q = mean_i 2 mean_k ||g_ik||^2                   and short around the images, see `Smoothness`

The authors give lambda_a 40 and lambda_b 2.5 for CIFAR-10, for gradients of the batch-mean loss at B = 128. Ours belong
to single images and are B times as long, so that lambda_b = 2.5 / 128^2 = 1.53e-4 is the same loss, at every size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Step
from training.objectives.checks import check_weights
from training.objectives.input_gradients import SECOND_ORDER, Smoothness, cosines, input_gradients
from training.objectives.members import MembersObjective, accuracy

BATCH_SIZE = 128
"""Of the released code; its gradients carry 1 / 128."""


@dataclass(frozen=True, kw_only=True)
class Trs(MembersObjective):
    """Cross-entropy of each member, the absolute cosines of their image gradients, and how long these are."""

    method: ClassVar[str] = "trs"
    published: ClassVar[str] = "Yang et al., NeurIPS 2021"

    lambda_a: float = 40.0
    """Weight of the similarity S."""
    lambda_b: float = 2.5 / BATCH_SIZE**2
    """Weight of the smoothness Q, for gradients of single images."""
    smoothness: Smoothness = field(default_factory=Smoothness)
    average_members: bool = False
    """Average the members' cross-entropies instead of adding them (released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(lambda_a=self.lambda_a, lambda_b=self.lambda_b)

    @classmethod
    def mnist(cls, **changes: Any) -> Trs:
        """Return the defaults of the released script, 5 (2 S + 2 Q) and a radius from 0.1 to 0.2, re-expressed."""
        options = {"lambda_a": 10.0, "lambda_b": 10.0 / BATCH_SIZE**2}
        return cls(**{**options, "smoothness": Smoothness(eps_start=0.1, eps_end=0.2), **changes})

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return (SECOND_ORDER + self.smoothness.forwards) * self.count(networks)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        (batch,) = batches
        networks = self.networks(model, step)
        # before any weight has a gradient, and with the weights as they are
        images = self.smoothness.images(networks, batch.images, batch.labels, step)
        pairs = [input_gradients(network, batch.images, batch.labels) for network in networks]
        answers, gradients = [logits for logits, _ in pairs], [found for _, found in pairs]
        losses = torch.stack(
            [F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing) for logits in answers]
        )
        similarity = cosines(gradients).abs().mean()
        loss = (losses.mean() if self.average_members else losses.sum()) + self.lambda_a * similarity
        share = self.lambda_b / len(networks)
        penalties = []
        if self.smoothness.perturbed == "none":
            penalties = [self.smoothness.penalty(found) for found in gradients]
            loss = loss + share * torch.stack(penalties).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if not penalties:  # one network's graph at a time is in memory
            for network in networks:
                penalty = self.smoothness.penalty(input_gradients(network, images, batch.labels)[1])
                (share * penalty).backward()  # type: ignore[no-untyped-call]
                penalties.append(penalty.detach())
                loss = loss.detach() + share * penalty.detach()
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": losses.detach().mean(),
            "similarity": similarity.detach(),
            "smoothness": torch.stack(penalties).detach().mean(),
        }
