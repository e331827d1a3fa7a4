"""Training all exits of a network together, clean or adversarially, and the distillation that NEO-KD is compared with.

    clean          sum_i CE(f_i(x), y)                                      Huang et al. 2018 (MSDNet), arXiv:1703.09844
    adversarial    the same and sum_i CE(f_i(x'), y)                        Hu et al. 2020, arXiv:2002.10025
    "self"         and w T^2 sum_i KL(p_L(x; T) || p_i(x; T)), for x' alike
    "ard"          and w T^2 sum_i KL(p_L(x; T) || p_i(x'; T))              after Goldblum et al. 2020, arXiv:1905.09747

f_i is the network up to exit i, x' an adversarial example against all exits, p_i(x; T) the softmax of f_i(x) / T, L the
last exit. What teaches has no gradient. Clean and adversarial images pass the network one after the other, so that each
have BatchNorm statistics of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.adversarial import TrainingAttack
from training.objectives.base import Batch, Needs, Objective, Step, check_choice, check_positive, check_weights
from training.objectives.network import Network, accuracy, statistics
from training.objectives.single import kl_divergence
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
            expected = f"1 to {exits}, the exits of {type(model).__name__}"
            raise BadInput(f"attacked_exit is {self.attacked_exit}, expected {expected}")

    def clean_term(self, clean: Sequence[Tensor]) -> Tensor:
        """Return what a method adds to the loss of clean images; `clean` are their logits, per exit (batch, class)."""
        return clean[0].new_zeros(())

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
        loss = share * self.cross_entropies(answers, batch.labels).sum() + term
        loss.backward()  # type: ignore[no-untyped-call]
        measured = {"loss": loss.detach(), "distillation": term.detach(), "accuracy": accuracy(answers, batch.labels)}
        if examples is None:
            return measured

        clean = [logits.detach() for logits in answers]
        answers = network.exits(examples)
        term = self.adversarial_term(answers, clean, batch, step)
        loss = share * self.cross_entropies(answers, batch.labels).sum() + term
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": measured["loss"] + loss.detach(),
            "distillation": measured["distillation"] + term.detach(),
            "accuracy": measured["accuracy"],
            "adversarial_accuracy": accuracy(answers, batch.labels),
        }


Distillation = Literal["none", "self", "ard"]


@dataclass(frozen=True, kw_only=True)
class MultiExit(ExitsObjective):
    """Cross-entropy summed over exits, on clean images and with an `attack` on adversarial ones as well."""

    method: ClassVar[str] = "multi_exit"
    published: ClassVar[str] = "Hu et al., ICLR 2020"

    distillation: Distillation = "none"
    """"self": every exit learns what the last one says of the same images; "ard": of adversarial examples every exit
    learns to say what the last one says of the clean images."""
    weight: float = 1.0
    """Of the distillation."""
    temperature: float = 1.0
    """What the logits of teacher and student are divided by; the loss is multiplied by its square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("distillation", self.distillation, Distillation)
        if self.distillation == "ard" and self.attack is None:
            raise BadInput("distillation='ard' teaches adversarial examples and needs an attack, got none")
        check_weights(weight=self.weight)
        check_positive(temperature=self.temperature)

    @classmethod
    def adversarial(cls, **changes: Any) -> MultiExit:
        """Return "Adv. w/o Distill" of NEO-KD: clean and max-average examples, made with running statistics."""
        return replace(cls(attack=EVAL_ATTACK), **changes)

    def clean_term(self, clean: Sequence[Tensor]) -> Tensor:
        """See `ExitsObjective.clean_term`."""
        return self._taught(clean[-1], clean[:-1]) if self.distillation == "self" else super().clean_term(clean)

    def adversarial_term(
        self, adversarial: Sequence[Tensor], clean: Sequence[Tensor], batch: Batch, step: Step
    ) -> Tensor:
        """See `ExitsObjective.adversarial_term`."""
        if self.distillation == "none":
            return adversarial[0].new_zeros(())
        if self.distillation == "self":
            return self._taught(adversarial[-1], adversarial[:-1])
        return self._taught(clean[-1], adversarial)

    def _taught(self, teacher: Tensor, students: Sequence[Tensor]) -> Tensor:
        """Return the weighted KL between the teacher, detached, and its students; a teacher's own would be 0."""
        fixed = teacher.detach() / self.temperature
        terms = torch.stack([kl_divergence(fixed, logits / self.temperature) for logits in students])
        return self.weight * self.temperature**2 * terms.sum()


@dataclass(frozen=True, kw_only=True)
class NeoKd(ExitsObjective):
    """Adversarial training of all exits with neighbour (NKD) and exit-wise orthogonal knowledge distillation (EOKD).

    Ham et al. 2023, arXiv:2311.00428:

        L = sum_i [ CE(p_i(x), y) + CE(p_i(x'), y) + gamma_i (alpha NKD_i + beta EOKD_i) ]
        NKD_i  = l(p_i(x'), mean of p_{i-1}(x), p_i(x), p_{i+1}(x))       the first and the last exit have one neighbour
        EOKD_i = l(p_i(x'), O_i(p_i(x)))     O_i keeps the true class and the classes of exit i, and normalises the rest

    p_i is the softmax at exit i, l the cross-entropy with a soft label. For each true class the other classes are dealt
    to the exits at random, so that exits learn from different ones and fail to different ones. There is no public code;
    docs/methods/neo_kd.md says what the paper leaves open and which field decides it.
    """

    method: ClassVar[str] = "neo_kd"
    published: ClassVar[str] = "Ham et al., NeurIPS 2023"

    attack: TrainingAttack = EVAL_ATTACK
    alpha: float = 3.0
    """Weight of the neighbours (NKD)."""
    beta: float = 1.0
    """Weight of the orthogonal labels (EOKD)."""
    gamma: float | tuple[float, ...] = 1.0
    """Weight of both at every exit, or at each, first exit first. 1 for three exits; (1, 1, 1, 1.5, 1.5) for five,
    (1, 1, 1, 1.5, 1.5, 1.5, 1.5) for seven."""
    own_exit: bool = True
    """Whether the mean that teaches an exit holds its own clean answer beside its neighbours'."""
    temperature: float = 1.0
    """What logits are divided by before they teach and learn; both terms are multiplied by its square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack is None:
            raise BadInput("neo_kd teaches adversarial examples and needs an attack, got none; use multi_exit for none")
        check_weights(alpha=self.alpha, beta=self.beta)
        for weight in self.gamma if isinstance(self.gamma, tuple) else (self.gamma,):
            check_weights(gamma=weight)
        check_positive(temperature=self.temperature)

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        super().check(model)
        exits = num_exits(model)
        self._gammas(exits)
        shape = getattr(model, "image_shape", None)
        if shape is not None:
            device = next(model.parameters()).device
            with statistics(model, "eval"), torch.no_grad():
                check_classes(model(torch.zeros(1, *shape, device=device))[-1].shape[1], exits)

    def adversarial_term(
        self, adversarial: Sequence[Tensor], clean: Sequence[Tensor], batch: Batch, step: Step
    ) -> Tensor:
        """See `ExitsObjective.adversarial_term`."""
        exits, classes = len(clean), clean[0].shape[1]
        check_classes(classes, exits)
        # from the generator of gates, which all ranks share: one deal for the whole batch
        generator = torch.Generator().manual_seed(step.rng("classes").getrandbits(63))
        owners = dealt_classes(classes, exits, generator, batch.labels.device)
        neighbours = neighbour_targets(clean, own_exit=self.own_exit, temperature=self.temperature)
        orthogonal = orthogonal_targets(clean, batch.labels, owners, temperature=self.temperature)
        terms = []
        for gamma, logits, near, own in zip(self._gammas(exits), adversarial, neighbours, orthogonal, strict=True):
            neighbourly = F.cross_entropy(logits / self.temperature, near)
            orthogonally = F.cross_entropy(logits / self.temperature, own)
            terms.append(gamma * (self.alpha * neighbourly + self.beta * orthogonally))
        return self.temperature**2 * torch.stack(terms).sum()

    def _gammas(self, exits: int) -> tuple[float, ...]:
        """Return gamma of each exit.

        Raises:
            BadInput: there are not as many as exits.
        """
        if not isinstance(self.gamma, tuple):
            return (self.gamma,) * exits
        if (got := len(self.gamma)) != exits:
            raise BadInput(f"gamma has {got} numbers, expected one, or {exits}: one per exit of the network")
        return self.gamma


def check_classes(classes: int, exits: int) -> None:
    """Check that every exit can have a wrong class of its own.

    Raises:
        BadInput: there are too few classes.
    """
    if classes - 1 < exits:
        raise BadInput(
            f"neo_kd deals the wrong classes of an image to {exits} exits, at least one each, and needs at least "
            f"{exits + 1} classes, got {classes}; use multi_exit"
        )


def neighbour_targets(clean: Sequence[Tensor], *, own_exit: bool = True, temperature: float = 1.0) -> list[Tensor]:
    """Return what teaches each exit in NKD: the mean probability of the exits around it, (batch, class), detached.

    `clean` are the logits of the clean images, per exit (batch, class), of at least two exits; they are divided by the
    temperature. With `own_exit` an exit counts among those around it.
    """
    probabilities = torch.stack([(logits.detach() / temperature).softmax(1) for logits in clean])
    exits = len(clean)
    around = [
        [other for other in (index - 1, index, index + 1) if 0 <= other < exits and (own_exit or other != index)]
        for index in range(exits)
    ]
    return [probabilities[chosen].mean(0) for chosen in around]


def orthogonal_targets(
    clean: Sequence[Tensor], labels: Tensor, owners: Tensor, *, temperature: float = 1.0
) -> list[Tensor]:
    """Return what teaches each exit in EOKD: its probabilities of the true class and its own classes, detached.

    All others are zero, and what is kept sums to 1. `clean` are the logits of the clean images, per exit
    (batch, class), `labels` int64 (batch,), `owners` those of `dealt_classes`.
    """
    owner = owners[labels]
    targets = []
    for index, logits in enumerate(clean):
        # zeroed as logits: all probabilities that are kept may be too small for a quotient
        dropped = (owner != index) & (owner != TRUE_CLASS)
        targets.append((logits.detach() / temperature).masked_fill(dropped, -torch.inf).softmax(1))
    return targets


TRUE_CLASS = -1
"""The owner of the true class: every exit."""


def dealt_classes(classes: int, exits: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Deal, for every true class, the other classes to the exits at random, floor((classes - 1) / exits) to each.

    Returns:
        int64 (true class, class): the exit that keeps the class, from 0 on; `exits` for one that is left over, and
        `TRUE_CLASS` for the true class.
    """
    size = (classes - 1) // exits
    # the true class is sorted to the front of its row, whatever the draw
    scores = torch.rand(classes, classes, generator=generator).fill_diagonal_(-1).to(device)
    position = scores.argsort(dim=1, stable=True).argsort(dim=1) - 1
    owners: Tensor = position.div(size, rounding_mode="floor").clamp_max(exits)
    return owners
