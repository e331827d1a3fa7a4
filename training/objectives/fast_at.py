"""Fast adversarial training: FGSM from a random start (Wong, Rice and Kolter 2020, arXiv:2001.03994, algorithm 3).

    d ~ U(-eps, eps);  d <- clip(d + a sign(grad_d CE(f_w(x + d), y)));  min_w CE(f_w(x + d), y),  a = 1.25 eps

It is Madry's training with one longer step. Robust accuracy may collapse within an epoch while clean accuracy rises
("catastrophic overfitting"): watch it on held-out images, and keep the last good state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from training.objectives.attack import TrainingAttack
from training.objectives.pgd_at import PgdAt
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class FastAt(PgdAt):
    """Mean cross-entropy on examples of one gradient step."""

    method: ClassVar[str] = "fast_at"
    published: ClassVar[str] = "Wong et al., ICLR 2020"

    attack: TrainingAttack = field(default_factory=lambda: TrainingAttack(steps=1, step_size=10 / 255))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack.steps != 1:
            raise BadInput(f"fast_at takes 1 attack step, got {self.attack.steps}; train with pgd_at for more")
