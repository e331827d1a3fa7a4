"""What objectives have in common that train several networks against each other by one loss: ADP, GAL and TRS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from training.objectives.base import Needs, Objective, Step
from training.objectives.network import Network, check_members, check_one_exit, networks_of
from zoo.errors import BadInput
from zoo.gates.rgn import RandomGatedNetwork


@dataclass(frozen=True, kw_only=True)
class MembersObjective(Objective):
    """An objective of all members of an ensemble together, or of distinct random paths of a random gated network."""

    needs: ClassVar[Needs] = "several members"

    paths: int = 3
    """Distinct random paths per step, of a random gated network; an ensemble is trained whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 2:
            raise BadInput(f"need at least 2 paths, got {self.paths}; one path has no other to differ from")

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_members(model, self.name)
        check_one_exit(model, self.name)
        if isinstance(model, RandomGatedNetwork) and model.candidates**model.num_gates < self.paths:
            raise BadInput(
                f"{self.name} draws {self.paths} distinct paths, and {model.num_gates} gates of {model.candidates} "
                f"candidates have only {model.candidates**model.num_gates}; set paths lower or candidates=2"
            )

    def networks(self, model: nn.Module, step: Step) -> list[Network]:
        """Return what this step trains: the members, or `paths` random paths."""
        return networks_of(model, step, drawn=self.paths)

    def count(self, networks: int) -> int:
        """Return how many networks a step trains, given the members of the model; it has 1 if it is gated."""
        return networks if networks > 1 else self.paths


def accuracy(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Return the mean accuracy of several logits, each (batch, class), detached."""
    return (torch.stack(logits).detach().argmax(2) == labels).float().mean()
