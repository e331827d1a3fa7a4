"""Training all exits of a network together, clean or adversarially, and the distillation that NEO-KD is compared with.

    clean          sum_i CE(f_i(x), y)                                      Huang et al. 2018 (MSDNet), arXiv:1703.09844
    adversarial    the same and sum_i CE(f_i(x'), y)                        Hu et al. 2020, arXiv:2002.10025
    "self"         and w T^2 sum_i KL(p_L(x; T) || p_i(x; T)), for x' alike
    "ard"          and w T^2 sum_i KL(p_L(x; T) || p_i(x'; T))              after Goldblum et al. 2020, arXiv:1905.09747

p_i(x; T) is the softmax of exit i's logits divided by the temperature T, L the last exit. What teaches has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from training.objectives.base import Batch, Step
from training.objectives.checks import check_choice, check_weights
from training.objectives.exits import EVAL_ATTACK, ExitsObjective, check_temperature
from training.objectives.single import kl_divergence
from zoo.errors import BadInput

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
        check_temperature(self.temperature)

    @classmethod
    def adversarial(cls, **changes: Any) -> MultiExit:
        """Return "Adv. w/o Distill" of NEO-KD: clean and max-average examples, made with running statistics."""
        return replace(cls(attack=EVAL_ATTACK), **changes)

    def clean_term(self, clean: Sequence[Tensor]) -> Tensor:
        """See `ExitsObjective.clean_term`."""
        if self.distillation != "self":
            return clean[0].new_zeros(())
        return self._taught(clean[-1], clean[:-1])

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
