"""TRADES: accuracy on clean images, and the same answer around them (Zhang et al. 2019, arXiv:1901.08573).

    min_w  E  CE(f_w(x), y) + beta max_{|d| <= eps} KL(p_w(x) || p_w(x + d)),        beta = 1 / lambda of the paper

The gradient flows through both sides of the divergence. As in the authors' code, examples are made with running
BatchNorm statistics, from Gaussian noise around the image, and clean and adversarial images go through the network
separately, each with its own batch statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from training.objectives.attack import TrainingAttack
from training.objectives.base import Batch
from training.objectives.checks import check_choice
from training.objectives.network import Network, together
from training.objectives.pgd_at import Attacked
from training.objectives.single import Loss, NetworkObjective, View, kl_divergence
from zoo.attacks import pgd, unchecked
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Trades(NetworkObjective):
    """Cross-entropy on clean images, and the divergence of the answers to images that were moved to make it large."""

    method: ClassVar[str] = "trades"
    published: ClassVar[str] = "Zhang et al., ICML 2019"

    attack: TrainingAttack = field(
        default_factory=lambda: TrainingAttack(
            eps=0.031, steps=10, step_size=0.007, random_start=False, batch_norm="eval"
        )
    )
    """What maximises the divergence; it starts from Gaussian noise unless `random_start` says uniformly in the ball."""
    start_noise: float = 0.001
    """Standard deviation of that noise, in pixel units; at the image itself the divergence has no gradient."""
    beta: float = 6.0
    """Weight of the divergence."""
    attacked: Attacked = "ensemble"
    """Of an ensemble: make the examples for what its members answer together, or for each member by itself."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise BadInput(f"need a finite beta >= 0, got {self.beta}; the paper's are 1 and 6")
        if not 0 < self.start_noise < math.inf:
            raise BadInput(
                f"need start_noise > 0, got {self.start_noise}; at the image itself the divergence has no gradient"
            )
        super().__post_init__()
        check_choice("attacked", self.attacked, Attacked)

    @property
    def passes(self) -> int:
        """See `NetworkObjective.passes`: clean images and adversarial ones."""
        return 2

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; what the clean images are answered is computed once per attack."""
        return networks * (1.0 + self.attack.forwards + 6.0)

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Tensor]:
        """Return the adversarial examples for each network; all are made before any weight has a gradient."""
        if self.attacked == "ensemble":
            return [self._examples(networks, batch)] * len(networks)
        return [self._examples([network], batch) for network in networks]

    def _examples(self, networks: Sequence[Network], batch: Batch) -> Tensor:
        images, model, step = batch.images, together(networks), networks[0].step
        generator = step.generator("attack", *(network.index for network in networks))
        start = None
        if not self.attack.random_start:
            noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
            start = images + self.start_noise * noise
        with ExitStack() as modes:
            for network in networks:
                modes.enter_context(network.statistics(self.attack.batch_norm))
            with torch.no_grad():
                clean = model(images).log_softmax(1)

            def divergence(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
                return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)

            return pgd(
                unchecked(model),
                images,
                batch.labels,
                self.attack.budget(),
                loss=divergence,
                start=start,
                generator=generator,
            )

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; two forward passes, clean images first."""
        clean, moved = network(batch.images), network(inputs)
        value = F.cross_entropy(clean, batch.labels, label_smoothing=self.label_smoothing)
        value = value + self.beta * kl_divergence(clean, moved)
        return Loss(value, (View(batch.images, clean), View(inputs, moved, self.beta)))
