"""Adversarial training: cross-entropy on PGD examples (Madry et al. 2018, arXiv:1706.06083, equation 2.1).

    min_w  E  max_{|d| <= eps}  CE(f_w(x + d), y)

The reference is the code of Rice et al. 2020 and of AWP: examples from a uniform start, in training mode. An ensemble
is attacked as a whole, through its mean probability, and each member learns the same examples (DVERGE's `AdvT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from training.objectives.attack import TrainingAttack
from training.objectives.base import Batch
from training.objectives.checks import check_choice
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective, View

Attacked = Literal["ensemble", "member"]


@dataclass(frozen=True, kw_only=True)
class PgdAt(NetworkObjective):
    """Mean cross-entropy on PGD examples against the network itself."""

    method: ClassVar[str] = "pgd_at"
    published: ClassVar[str] = "Madry et al., ICLR 2018"

    attack: TrainingAttack = field(default_factory=TrainingAttack)
    attacked: Attacked = "ensemble"
    """Of an ensemble: attack what its members answer together, or each member by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attacked", self.attacked, Attacked)

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return networks * (self.attack.forwards + 3.0)

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Tensor]:
        """Return the adversarial examples for each network; all are made before any weight has a gradient."""
        if self.attacked == "ensemble":
            return [self.attack.on(networks, batch.images, batch.labels)] * len(networks)
        return [self.attack.on(network, batch.images, batch.labels) for network in networks]

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        logits = network(inputs)
        value = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return Loss(value, (View(inputs, logits),))
