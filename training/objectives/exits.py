"""What methods for networks with several exits share: a loss summed over exits, on clean and on attacked images.

    L = sum_i CE(f_i(x), y) + sum_i CE(f_i(x'), y)        Hu et al. 2020 (Triple Wins), arXiv:2002.10025

f_i is the network up to exit i, x' an adversarial example against all exits. Clean and adversarial images pass the
network one after the other, so that each have BatchNorm statistics of their own. A method adds terms of distillation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.attack import TrainingAttack
from training.objectives.base import Batch, Needs, Objective, Step
from training.objectives.checks import check_choice
from training.objectives.network import Network
from zoo.attacks import average_exits, max_average_exits, single_exit, unchecked
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import num_exits

Attacked = Literal["max-average", "average", "single"]
"""What the attack maximises: per image the worst of the attacks on single exits, judged by the loss summed over all
exits; the mean loss of all exits; the loss of one exit."""

EVAL_ATTACK = TrainingAttack(batch_norm="eval")
"""PGD-10 at 8/255 with running statistics: for colour images. For digits: eps=0.3, steps=40, step_size=0.01."""


@dataclass(frozen=True, kw_only=True)
class ExitsObjective(Objective):
    """Cross-entropy summed over the exits, and what a method adds to it."""

    needs: ClassVar[Needs] = "several exits"

    attack: TrainingAttack | None = None
    """How adversarial examples are made; without an attack the exits learn the clean images alone."""
    attacked: Attacked = "max-average"
    attacked_exit: int | None = None
    """The exit of a "single" attack, counted from 1; the last one if None."""
    halved: bool = False
    """Take half of the clean and half of the adversarial cross-entropy, as the code of Triple Wins does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attacked", self.attacked, Attacked)
        if self.attacked_exit is not None and self.attacked != "single":
            raise BadInput(
                f"attacked_exit={self.attacked_exit} is for attacked='single', got attacked={self.attacked!r}; "
                "leave one out"
            )
        if self.attacked_exit is not None and self.attacked_exit < 1:
            raise BadInput(f"attacked_exit must be at least 1, the first exit, got {self.attacked_exit}")
        if self.halved and self.attack is None:
            raise BadInput("halved shares the loss between clean and adversarial images and needs an attack, got none")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`.

        A max-average attack is one attack per exit, a forward after each to judge it, and one before to count exits. A
        forward runs all exits even where one is attacked; the backward from an early exit is counted whole and costs
        less.
        """
        if self.attack is None:
            return 3.0
        attack = self.attack.forwards
        if self.attacked == "max-average":
            attack = 1.0 + exits * (attack + 1.0)
        return attack + 6.0

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        for kind, setting in ((RandomGatedNetwork, "candidates=1"), (Ensemble, "members=1")):
            if isinstance(model, kind):
                raise BadInput(
                    f"{self.name} trains one plain network with several exits, got {kind.__name__}; set {setting} "
                    "(and network=msdnet3 or small_cnn3)"
                )
        exits = num_exits(model)
        if exits < 2:
            raise BadInput(
                f"{self.name} trains networks with several exits, and {type(model).__name__} has one; use "
                "network=msdnet3 or small_cnn3, or a method for one exit"
            )
        if self.attacked_exit is not None and self.attacked_exit > exits:
            raise BadInput(
                f"attacked_exit is {self.attacked_exit}, expected 1 to {exits}, the exits of {type(model).__name__}"
            )

    @abstractmethod
    def clean_term(self, clean: Sequence[Tensor]) -> Tensor:
        """Return what a method adds to the loss of clean images; `clean` are their logits, per exit (batch, class)."""

    @abstractmethod
    def adversarial_term(
        self, adversarial: Sequence[Tensor], clean: Sequence[Tensor], batch: Batch, step: Step
    ) -> Tensor:
        """Return what a method adds to the loss of adversarial examples.

        Args:
            adversarial: logits of the examples, per exit (batch, class).
            clean: logits of the images they were made from, likewise, without gradient.
            batch: the clean images and their labels.
            step: where the run is.
        """

    def examples(self, network: Network, batch: Batch, attack: TrainingAttack) -> Tensor:
        """Return adversarial examples (shape of the images), made while BatchNorm does what `attack` says."""
        images, labels, budget = batch.images, batch.labels, attack.budget()
        answers = unchecked(network.exits)
        generator = network.step.generator("attack", network.index)
        with network.statistics(attack.batch_norm):
            if self.attacked == "single":
                index = (self.attacked_exit or num_exits(network.module)) - 1
                return single_exit(answers, images, labels, budget, index, generator=generator)
            several = average_exits if self.attacked == "average" else max_average_exits
            return several(answers, images, labels, budget, generator=generator)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; accuracies are means over the exits."""
        (batch,) = batches
        network = Network(model, step)
        share = 0.5 if self.halved else 1.0
        # made before any weight has a gradient
        examples = None if self.attack is None else self.examples(network, batch, self.attack)

        answers = network.exits(batch.images)
        term = self.clean_term(answers)
        loss = share * summed_cross_entropy(answers, batch.labels, self.label_smoothing) + term
        loss.backward()  # type: ignore[no-untyped-call]
        measured = {"loss": loss.detach(), "distillation": term.detach(), "accuracy": _accuracy(answers, batch.labels)}
        if examples is None:
            return measured

        clean = [logits.detach() for logits in answers]
        answers = network.exits(examples)
        term = self.adversarial_term(answers, clean, batch, step)
        loss = share * summed_cross_entropy(answers, batch.labels, self.label_smoothing) + term
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": measured["loss"] + loss.detach(),
            "distillation": measured["distillation"] + term.detach(),
            "accuracy": measured["accuracy"],
            "adversarial_accuracy": _accuracy(answers, batch.labels),
        }


def summed_cross_entropy(answers: Sequence[Tensor], labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the sum over exits of the mean cross-entropy of their logits (batch, class)."""
    return torch.stack([F.cross_entropy(logits, labels, label_smoothing=label_smoothing) for logits in answers]).sum()


def check_temperature(temperature: float) -> None:
    """Check the number that logits are divided by before they teach.

    Raises:
        BadInput: it is not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise BadInput(f"need a finite temperature > 0, got {temperature}")


def _accuracy(answers: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([(logits.detach().argmax(1) == labels).float().mean() for logits in answers]).mean()
