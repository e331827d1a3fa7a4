"""Losses on the gradients of the loss for the images, which GAL, TRS and Dropen share.

Gradients belong to single images: they are those of the *sum* of cross-entropies. The released codes take them of the
mean, which divides every gradient by the batch size B; cosines do not notice, squared norms shrink by B^2.

Forward passes run in the step's precision, all else in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from training.objectives.base import Step, check_choice
from training.objectives.network import Network, Statistics, statistics_of
from zoo.attacks import LinfBudget
from zoo.errors import BadInput

Perturbed = Literal["half", "all", "none"]

SECOND_ORDER = 6.0
"""Cost in forward passes of a loss on logits and image gradients: forward 1, gradient for the images 1, and a backward
through both to the weights, 2 each."""


def input_gradients(
    network: Network, images: Tensor, labels: Tensor, *, differentiable: bool = True
) -> tuple[Tensor, Tensor]:
    """Return logits (batch, class) and each image's gradient of its cross-entropy (batch, pixels).

    Where BatchNorm uses the batch's statistics, an image's gradient also holds what it does to the others.

    Args:
        network: what answers.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        differentiable: keep the graph behind the gradients, for a loss on them.
    """
    pixels = images.detach().requires_grad_(True)
    logits = network(pixels)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, pixels, create_graph=differentiable)
    return logits, gradients.flatten(1)


def cosines(gradients: Sequence[Tensor]) -> Tensor:
    """Return the cosine of every pair of several networks' gradients, each (batch, pixels), as (pair, batch).

    The pairs are (0, 1), (0, 2), ..., (1, 2), ... A gradient shorter than 1e-8 counts as being that long.
    """
    pairs = itertools.combinations(gradients, 2)
    return torch.stack([F.cosine_similarity(first, second, dim=1) for first, second in pairs])


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """How steep the loss is around the images (Yang et al. 2021, section 4; the authors' released code).

    2 mean_k ||d CE / d x_k||^2 on a batch in which a part of the images was moved to where the gradients are longest.
    """

    eps_start: float = 0.01
    """Radius of the perturbation in the first epoch of the phase, in pixel units."""
    eps_end: float = 0.03
    """Radius in its last epoch; it grows linearly, and stays at `eps_start` if there is just one."""
    steps: int = 6
    """Steps of the perturbation, each a second-order gradient; eps / 3 long, from a uniform start."""
    perturbed: Perturbed = "half"
    """Perturb the second half of the images (released code), all of them (the paper's maximum), or none (what the
    released code trains without its flag --plus-adv, "cos-l2")."""
    squared: bool = True
    """Squared norms (released code) or norms (the paper), in the penalty and in what the perturbation maximises."""
    accumulate_gradients: bool = False
    """Step along the sum of the gradients so far: the released code never zeroes them."""
    batch_norm: Statistics = "train"
    """BatchNorm while the perturbation is made; dropout is on in "train" alone."""

    def __post_init__(self) -> None:
        if not (0 <= self.eps_start <= 1 and 0 <= self.eps_end <= 1):
            raise BadInput(
                f"need 0 <= eps_start <= 1 and 0 <= eps_end <= 1, got {self.eps_start} and {self.eps_end}; pixels are "
                "in [0, 1], so write 0.03, not 8"
            )
        if self.steps < 1:
            raise BadInput(f"need at least 1 step, got {self.steps}; set perturbed='none' for no perturbation")
        check_choice("perturbed", self.perturbed, Perturbed)
        check_choice("batch_norm", self.batch_norm, Statistics)

    @property
    def forwards(self) -> float:
        """The cost per network in forward passes: a second-order step costs 4 where it is for the images alone."""
        share = {"half": 0.5, "all": 1.0, "none": 0.0}[self.perturbed]
        return SECOND_ORDER + 4.0 * self.steps * share if share else 0.0

    def eps(self, step: Step) -> float:
        """Return the radius at a step."""
        return self.eps_start + (self.eps_end - self.eps_start) * step.epoch / max(step.epochs - 1, 1)

    def penalty(self, gradients: Tensor) -> Tensor:
        """Return the penalty on one network's gradients (batch, pixels): 2 mean_k ||g_k||^2, or without the square.

        The 2 is that of the released code; the mean of q_i + q_j over all pairs of networks is the mean of 2 q_i.
        """
        return 2 * self.lengths(gradients).mean()

    def lengths(self, gradients: Tensor) -> Tensor:
        """Return how long each gradient of (batch, pixels) is, squared or not (batch,)."""
        if self.squared:
            return gradients.square().sum(1)
        norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
        return norms

    def images(self, networks: Sequence[Network], images: Tensor, labels: Tensor, step: Step) -> Tensor:
        """Return the images (batch, channel, height, width) of the penalty: clean ones first, then perturbed ones.

        The perturbation maximises the sum of the lengths over images and networks. No `.grad` is filled.
        """
        clean = {"half": len(images) // 2, "all": 0, "none": len(images)}[self.perturbed]
        if clean == len(images):
            return images
        moved = self._perturb(networks, images[clean:], labels[clean:], step)
        return torch.cat([images[:clean], moved])

    def _perturb(self, networks: Sequence[Network], images: Tensor, labels: Tensor, step: Step) -> Tensor:
        eps = self.eps(step)
        budget = LinfBudget(eps=eps, step_size=eps / 3 or None, steps=self.steps)
        generator = step.generator("smoothness", *(network.index for network in networks))
        moved, direction = budget.start(images, generator), torch.zeros_like(images)
        with statistics_of(networks, self.batch_norm):
            for _ in range(self.steps):
                uphill = self._uphill(networks, moved, labels)
                direction = direction + uphill if self.accumulate_gradients else uphill
                moved = budget.project(moved + budget.step * budget.direction(direction), images)
        return moved

    def _uphill(self, networks: Sequence[Network], images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the summed lengths for the images; one network's graph at a time is in memory."""
        pixels = images.detach().requires_grad_(True)
        total = torch.zeros_like(images)
        for network in networks:
            loss = F.cross_entropy(network(pixels), labels, reduction="sum")
            (gradients,) = torch.autograd.grad(loss, pixels, create_graph=True)
            (uphill,) = torch.autograd.grad(self.lengths(gradients.flatten(1)).sum(), pixels)
            total += uphill
        return total
