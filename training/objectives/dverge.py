"""DVERGE: members that do not share their weaknesses (Yang et al., NeurIPS 2020, arXiv:2009.14720).

For a layer l each member distils the non-robust features of target images into source images (equation 1),

    x'_i = argmin |f_i^l(x) - f_i^l(x_t)|_2^2    subject to  |x - x_s| <= eps,

and learns what the other members distilled: member i minimises sum_{j != i} CE(f_i(x'_j), y_s). There is no clean term.
Training starts from networks that were trained on their own (`standard`). The defaults are the released code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from training.objectives.base import Needs
from training.objectives.checks import check_weights
from training.objectives.distilled import DistillationNorm, DistilledObjective, LayerDrawn
from training.objectives.network import check_members
from zoo.errors import BadInput
from zoo.gates.rgn import RandomGatedNetwork


@dataclass(frozen=True, kw_only=True)
class Dverge(DistilledObjective):
    """Cross-entropy of each member on what the other members distilled.

    Of a random gated network `paths` random paths stand for the members.
    """

    method: ClassVar[str] = "dverge"
    published: ClassVar[str] = "Yang et al., NeurIPS 2020"
    needs: ClassVar[Needs] = "several members"

    momentum: float = 1.0
    """Momentum on the L1-normalised gradient of distillation."""
    batch_norm: DistillationNorm = "train"
    """BatchNorm in distillation: "train" uses batch statistics and updates the running ones at every step; "eval" uses
    and keeps the running ones, and costs less."""
    layer_drawn: LayerDrawn = "epoch"
    """How long a layer is kept: for an epoch, or for one batch."""
    coefficient: float = 1.0
    """Weight of the loss on distilled images; that on adversarial ones, if there are any, counts 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 2:
            raise BadInput(f"need at least 2 paths to train against each other, got {self.paths}")
        check_weights(coefficient=self.coefficient)
        if self.coefficient == 0 and self.adversarial is None:
            raise BadInput("with coefficient 0 and no adversarial attack there is nothing to learn; set one of them")

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_members(model, "dverge")
        if isinstance(model, RandomGatedNetwork) and model.candidates < 2:
            raise BadInput(f"dverge needs candidates >= 2 per gated layer, got {model.candidates}: there is one path")
        super().check(model)

    def combined(self, distilled: Tensor, adversarial: Tensor | None, networks: int) -> Tensor:
        """See `DistilledObjective.combined`."""
        loss = self.coefficient * distilled
        return loss if adversarial is None else loss + adversarial
