"""Ensemble-in-One's diversity training (Cai et al., AAAI 2023, algorithm 1; distillation as in DVERGE, NeurIPS 2020).

Per batch: draw a layer l and p paths that differ within the first l gates; for each path distil the non-robust features
of target images into source images, x' = argmin ||f_l(x) - f_l(x_target)||^2 within eps of the source; then train each
path to classify the images distilled by the *other* paths as the source's class.

The paper and the authors' released code differ. `EnsembleInOne.paper()` and `EnsembleInOne.release()` are the two
readings; each disputed detail is a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Objective, Step
from training.randomness import gate_generator, tensor_generator
from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.distillation import distil
from zoo.errors import BadInput
from zoo.paths import Path
from zoo.rgn import RandomGatedNetwork


@dataclass(frozen=True, kw_only=True)
class EnsembleInOne(Objective):
    """Cross-entropy of each path on what the other paths distilled."""

    streams: ClassVar[int] = 2

    paths: int = 3
    """Paths per step, p; fewer where the first l gates do not allow that many distinct prefixes."""
    eps: float = 0.07
    """Radius of the distillation, in pixel units (0.03 for VGG-16)."""
    distillation_steps: int = 10
    step_size: float | None = None
    """Length of a distillation step; eps / distillation_steps if None."""
    random_start: bool = False
    """Start uniformly in the ball (release) instead of at the source image (DVERGE)."""
    momentum: float = 0.0
    """Momentum on the L1-normalised gradient; DVERGE uses 1, the release none."""
    batch_norm: str = "eval"
    """BatchNorm in distillation: "eval" uses and keeps the running statistics (release); "train" uses batch
    statistics and updates the running ones at every step (DVERGE)."""
    activated: bool = False
    """Compare features behind the activation (release) instead of before it (DVERGE)."""
    divide_by_paths: bool = True
    """Divide each path's loss by p (release); the paper does not."""

    def __post_init__(self) -> None:
        if self.paths < 1 or self.distillation_steps < 1:
            raise BadInput(f"need at least 1 path and 1 step, got {self.paths} and {self.distillation_steps}")
        if not 0 <= self.eps <= 1:
            raise BadInput(f"need 0 <= eps <= 1, got {self.eps}; pixels are in [0, 1], so write 0.07, not 18")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise BadInput(f"need 0 < step_size <= 1, got {self.step_size}; pixels are in [0, 1]")
        if not 0 <= self.momentum < math.inf:
            raise BadInput(f"need momentum >= 0, got {self.momentum}")
        if self.batch_norm not in ("eval", "train"):
            raise BadInput(f"batch_norm must be 'eval' or 'train', got {self.batch_norm!r}")

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

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; `batches` are the source and the target, from independent shuffles."""
        if not isinstance(model, RandomGatedNetwork):
            raise BadInput(f"ensemble_in_one trains a random gated network, got a plain {type(model).__name__}")
        source, target = batches
        rng = gate_generator(step.seed, "gates", step.number)
        layer = rng.randint(1, model.num_features)
        within = min(layer, model.num_gates)
        num_paths = min(self.paths, model.candidates**within)
        chosen = paths.sample_distinct(num_paths, model.num_gates, model.candidates, rng, within=within)

        # All images are distilled before any gradient is accumulated: they must come from one state of the weights.
        distilled = [
            self.distil(model, path, layer, source.images, target.images, step, number)
            for number, path in enumerate(chosen)
        ]
        losses = []
        for number, path in enumerate(chosen):
            others = [images for other, images in enumerate(distilled) if other != number] or distilled
            terms = []
            with step.autocast(source.images.device):
                # One forward per distiller: concatenated batches would share BatchNorm statistics.
                terms = [F.cross_entropy(model(images, path).float(), source.labels) for images in others]
            loss = torch.stack(terms).sum()
            (loss / num_paths if self.divide_by_paths else loss).backward()
            losses.append(loss.detach() / len(others))
        return {"loss": torch.stack(losses).mean(), "layer": torch.tensor(float(layer))}

    def distil(
        self,
        model: RandomGatedNetwork,
        path: Path,
        layer: int,
        source: Tensor,
        target: Tensor,
        step: Step,
        number: int = 0,
    ) -> Tensor:
        """Return images within eps of `source`, in [0, 1], whose feature `layer` along `path` imitates the target's.

        Only the prefix up to the layer runs, the target's feature is computed once (where the BatchNorm mode keeps it
        valid), and gradients are taken for the images alone.
        """
        run = self._runner(model, path, layer, step, source.device)
        budget = LinfBudget(
            eps=self.eps,
            steps=self.distillation_steps,
            step_size=self.step_size or self.eps / self.distillation_steps or None,
            random_start=self.random_start,
        )
        generator = tensor_generator(step.seed, "distil", step.number, number, step.rank)
        training = model.training
        model.train(self.batch_norm == "train")
        images = distil(
            run,
            source,
            target,
            budget,
            momentum=self.momentum,
            fixed=self.batch_norm == "eval",  # else statistics move with every forward, as in DVERGE
            generator=generator,
        )
        model.train(training)
        return images

    def _runner(
        self, model: RandomGatedNetwork, path: Path, layer: int, step: Step, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """Return the prefix as a function of images alone, its tensors bound and detached."""
        if self.batch_norm == "eval":
            tensors = model.folded(path, dtype=None if step.precision == torch.float32 else step.precision)
            folded = model.runner(layer, tensors, activated=self.activated, folded=True)
            return lambda images: folded(images.to(step.precision))
        tensors = {name: tensor.detach() for name, tensor in {**_shared(model), **model.select(path)}.items()}
        plain = model.runner(layer, tensors, activated=self.activated)

        def run(images: Tensor) -> Tensor:
            with step.autocast(device):
                return plain(images)

        return run


def _shared(model: RandomGatedNetwork) -> dict[str, Tensor]:
    return {**dict(model.template.named_parameters()), **dict(model.template.named_buffers())}
