"""Adversarial weight perturbation around any loss of one network (Wu et al. 2020, arXiv:2004.05884).

    v = gamma |w| g / |g|,  g = grad_w L(w),        for each weight tensor; one step of ascent, onto the bound
    w <- w - r grad L(w + v)

Examples are made at w. The optimiser steps after w is restored, bit for bit. The paper's code steps at w + v and then
subtracts v, which is the same up to rounding and weight decay: that acts on w + v there and on w here, a difference of
r * decay * v.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from training.objectives.adversarial import PgdAt
from training.objectives.base import Batch
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective, Wrapper
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Awp(Wrapper):
    """The loss within, at weights that were moved to make it large.

    Tensors with one dimension (biases, BatchNorm's gains) stay. With EWS the order is `Awp(inner=Ews(...))`: weak
    subnets see the moved weights and do not influence the direction.
    """

    method: ClassVar[str] = "awp"
    published: ClassVar[str] = "Wu et al., NeurIPS 2020"

    inner: NetworkObjective = field(default_factory=PgdAt)
    gamma: float = 0.01
    """Length of a tensor's perturbation relative to the tensor's; the paper's code has 0.005 with TRADES."""
    warm_up: int = 0
    """Epochs of the phase before weights are perturbed; the paper's code has 10 with TRADES."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < math.inf:
            raise BadInput(f"need a finite gamma >= 0, got {self.gamma}; the paper's are 0.01 and 0.005")
        if self.warm_up < 0:
            raise BadInput(f"need warm_up >= 0 epochs, got {self.warm_up}")
        if any(isinstance(inner, Awp) for inner in self.within):
            raise BadInput("awp is within awp, and weights are perturbed once; raise gamma instead")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; one more evaluation of the loss, and its gradient."""
        return self.inner.forwards(networks, exits) + 3.0 * networks * self.passes

    def backward(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """Add the gradients of the loss at w + v; the weights are w again when it returns, or raises."""
        if network.step.epoch < self.warm_up:
            return self.inner.backward(network, inputs, batch)
        with moved(network.parameters, self.perturbation(network, inputs, batch)):
            return self.inner.backward(network, inputs, batch)

    def perturbation(self, network: Network, inputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return v by parameter name; 0 for a weight whose gradient is 0, none for one the loss does not use.

        BatchNorm normalises with the batch and leaves its running statistics alone; dropout is off. No `.grad` is
        filled. Ranks that share a batch agree on v: it follows from the gradient over all of it.
        """
        weights = {name: weight for name, weight in network.parameters.items() if weight.ndim > 1}
        with network.statistics("train_frozen"):
            loss = self.inner.ascended(network, inputs, batch)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}
        # in one message where there are ranks to average over
        flat = network.step.average(torch.cat([gradient.reshape(-1) for gradient in gradients.values()]))
        parts = flat.split([gradient.numel() for gradient in gradients.values()])  # type: ignore[no-untyped-call]
        return {
            name: self.gamma * torch.linalg.vector_norm(weights[name].detach()) * _unit(part).view_as(weights[name])
            for name, part in zip(gradients, parts, strict=True)
        }


@contextlib.contextmanager
def moved(weights: Mapping[str, nn.Parameter], by: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with `weights` moved in place by the tensors named in `by`; afterwards their old values are copied back."""
    kept = {name: weights[name].detach().clone() for name in by}
    try:
        with torch.no_grad():
            for name, perturbation in by.items():
                weights[name].add_(perturbation)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                weights[name].copy_(value)


def _unit(gradient: Tensor) -> Tensor:
    """Return the gradient at length 1; 0 for 0."""
    # by the largest entry first: the square of a small gradient underflows
    scaled = gradient / gradient.abs().amax().clamp_min(1e-30)
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length.clamp_min(1e-12)
