"""Adversarial examples as training makes them: PGD on the network that is being trained (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from training.objectives.checks import check_choice
from training.objectives.network import Network, Statistics, together
from zoo.attacks import LinfBudget, pgd, unchecked
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """PGD in an l_inf ball around each image; radii and steps in pixel units ([0, 1])."""

    eps: float = 8 / 255
    steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    """Start uniformly in the ball."""
    batch_norm: Statistics = "train"
    """Statistics while the examples are made: "train" as in the reference codes of Madry et al. and of AWP, where every
    forward moves the running statistics; "train_frozen" leaves those alone; "eval" as TRADES."""

    def __post_init__(self) -> None:
        self.budget()  # checks the numbers
        if self.steps < 1:
            raise BadInput(f"need at least 1 attack step, got {self.steps}; train with standard for none")
        check_choice("batch_norm", self.batch_norm, Statistics)

    def budget(self) -> LinfBudget:
        """Return the budget of the attack."""
        return LinfBudget(
            eps=self.eps, steps=self.steps, step_size=self.step_size, random_start=self.random_start, restarts=1
        )

    def on(
        self, networks: Network | Sequence[Network], images: Tensor, labels: Tensor, purpose: str = "attack"
    ) -> Tensor:
        """Return adversarial examples, shaped like `images`, against one network or several that answer together."""
        chosen = [networks] if isinstance(networks, Network) else list(networks)
        step = chosen[0].step
        return self.against(
            together(chosen), chosen, images, labels, step.generator(purpose, *(one.index for one in chosen))
        )

    def against(
        self,
        model: Callable[[Tensor], Tensor],
        networks: Sequence[Network],
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return adversarial examples against `model`, a function of `networks`, whose BatchNorm is set meanwhile."""
        with ExitStack() as modes:
            for network in networks:
                modes.enter_context(network.statistics(self.batch_norm))
            return pgd(unchecked(model), images, labels, self.budget(), generator=generator)

    @property
    def forwards(self) -> float:
        """The cost in forward passes: per step one, and a backward for the images alone, about one more."""
        return 2.0 * self.steps
