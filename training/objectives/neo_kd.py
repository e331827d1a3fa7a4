"""NEO-KD: adversarial training of all exits, each taught by its neighbours and by its own classes (Ham et al. 2023).

    L = sum_i [ CE(p_i(x), y) + CE(p_i(x'), y) + gamma_i (alpha NKD_i + beta EOKD_i) ]        arXiv:2311.00428
    NKD_i  = l(p_i(x'), mean of p_{i-1}(x), p_i(x), p_{i+1}(x))       the first and the last exit have one neighbour
    EOKD_i = l(p_i(x'), O_i(p_i(x)))        O_i keeps the true class and the classes of exit i, and normalises the rest

p_i is the softmax at exit i, x' an adversarial example, l the cross-entropy with a soft label. For each true class the
other classes are dealt to the exits at random, so that exits learn from different ones and fail to different ones.
There is no public code; docs/methods/neo_kd.md says what the paper leaves open and which field decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.attack import TrainingAttack
from training.objectives.base import Batch, Step
from training.objectives.checks import check_weights
from training.objectives.exits import EVAL_ATTACK, ExitsObjective, check_temperature
from training.objectives.network import statistics
from zoo.errors import BadInput
from zoo.networks import num_exits


@dataclass(frozen=True, kw_only=True)
class NeoKd(ExitsObjective):
    """Adversarial training of all exits with neighbour (NKD) and exit-wise orthogonal knowledge distillation (EOKD)."""

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
        check_temperature(self.temperature)

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

    def clean_term(self, clean: Sequence[Tensor]) -> Tensor:
        """See `ExitsObjective.clean_term`; there is none."""
        return clean[0].new_zeros(())

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
        terms = [
            gamma
            * (
                self.alpha * F.cross_entropy(logits / self.temperature, neighbour)
                + self.beta * F.cross_entropy(logits / self.temperature, own)
            )
            for gamma, logits, neighbour, own in zip(
                self._gammas(exits), adversarial, neighbours, orthogonal, strict=True
            )
        ]
        return self.temperature**2 * torch.stack(terms).sum()

    def _gammas(self, exits: int) -> tuple[float, ...]:
        """Return gamma of each exit.

        Raises:
            BadInput: there are not as many as exits.
        """
        if not isinstance(self.gamma, tuple):
            return (self.gamma,) * exits
        if len(self.gamma) != exits:
            raise BadInput(
                f"gamma has {len(self.gamma)} numbers, expected one, or {exits}: one per exit of the network"
            )
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

    Args:
        clean: logits of the clean images, per exit (batch, class); at least two exits.
        own_exit: count the exit itself among those around it.
        temperature: what the logits are divided by.
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

    All others are zero, and what is kept sums to 1.

    Args:
        clean: logits of the clean images, per exit (batch, class).
        labels: int64 (batch,).
        owners: of `dealt_classes`.
        temperature: what the logits are divided by.
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
