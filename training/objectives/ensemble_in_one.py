"""Ensemble-in-One's diversity training (Cai et al., AAAI 2023, algorithm 1; distillation as in DVERGE, NeurIPS 2020).

Per batch: draw a layer l and p paths that differ within the first l gates; for each path distil the non-robust features
of target images into source images, x' = argmin ||f_l(x) - f_l(x_target)||^2 within eps of the source; then train each
path to classify the images distilled by the *other* paths as the source's class.

The paper and the authors' released code differ. `EnsembleInOne.paper()` and `EnsembleInOne.release()` are the two
readings; each disputed detail is a field.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from training.objectives.base import Needs
from training.objectives.distilled import DistilledObjective
from zoo.errors import BadInput
from zoo.gates.rgn import RandomGatedNetwork


@dataclass(frozen=True, kw_only=True)
class EnsembleInOne(DistilledObjective):
    """Cross-entropy of each path on what the other paths distilled."""

    method: ClassVar[str] = "ensemble_in_one"
    published: ClassVar[str] = "Cai et al., AAAI 2023"
    needs: ClassVar[Needs] = "gates"

    divide_by_paths: bool = True
    """Divide each path's loss by p (release); the paper does not."""

    @classmethod
    def paper(cls, **changes: Any) -> EnsembleInOne:
        """Return the paper's reading: distillation by DVERGE's rules, losses not divided by p."""
        preset = cls(momentum=1.0, batch_norm="train", random_start=False, activated=False, divide_by_paths=False)
        return replace(preset, **changes)

    @classmethod
    def release(cls, **changes: Any) -> EnsembleInOne:
        """Return the released code's reading: random start, no momentum, running statistics, activated features."""
        preset = cls(momentum=0.0, batch_norm="eval", random_start=True, activated=True, divide_by_paths=True)
        return replace(preset, **changes)

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        if not isinstance(model, RandomGatedNetwork):
            raise BadInput(
                f"ensemble_in_one trains a random gated network, got a plain {type(model).__name__}; "
                "set candidates=2 in the recipe, or train an ensemble with dverge"
            )
        super().check(model)

    def combined(self, distilled: Tensor, adversarial: Tensor | None, networks: int) -> Tensor:
        """See `DistilledObjective.combined`; the released code divides the adversarial term too."""
        loss = distilled if adversarial is None else distilled + adversarial
        return loss / networks if self.divide_by_paths else loss
