"""Losses of one network, and how they are taken together: what standard and adversarial training have in common.

Adversarial training, weight perturbation (AWP), weak subnets (EWS) and augmentation combine freely because each knows
one thing: a method *prepares* what its loss is taken on, with the weights as they are, and then computes the *loss*, a
sum over *views*. AWP moves the weights between the two; EWS adds a term per view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Objective, Step
from training.objectives.network import Network, check_one_exit, networks_of


@dataclass(frozen=True)
class View:
    """Images that a loss is taken on, what the network said of them, and how much they count."""

    images: Tensor
    logits: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The loss of one network in one step, differentiable, and its views; the first shows how well it classifies."""

    value: Tensor
    views: tuple[View, ...]


@dataclass(frozen=True, kw_only=True)
class NetworkObjective(Objective):
    """An objective that is a loss of one network.

    An ensemble's members are trained side by side on the same batch; of a random gated network one path is drawn.
    """

    @property
    def passes(self) -> int:
        """Forward passes over the batch that the loss takes, the making of its inputs left out."""
        return self.views

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Any]:
        """Return, per network, what its loss is taken on (adversarial examples, say), made with the present weights.

        The base implementation asks `inputs` for each network.
        """
        return [self.inputs(network, batch) for network in networks]

    def inputs(self, network: Network, batch: Batch) -> Any:
        """Return what the loss of one network is taken on; the batch's images by default."""
        return batch.images

    def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """Return the loss of `network` on what `prepare` returned for it."""
        raise NotImplementedError

    def ascended(self, network: Network, inputs: Any, batch: Batch) -> Tensor:
        """Return the loss that a perturbation of the weights maximises: the loss, without the terms of EWS."""
        return self.loss(network, inputs, batch).value

    def backward(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """Add the gradients of the loss to the network's parameters."""
        loss = self.loss(network, inputs, batch)
        loss.value.backward()  # type: ignore[no-untyped-call]
        return loss

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_one_exit(model, self.name)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        (batch,) = batches
        networks = networks_of(model, step)
        losses = [
            self.backward(network, inputs, batch)
            for network, inputs in zip(networks, self.prepare(networks, batch), strict=True)
        ]
        right = torch.stack(
            [(loss.views[0].logits.detach().argmax(1) == batch.labels).float().mean() for loss in losses]
        )
        return {"loss": torch.stack([loss.value.detach() for loss in losses]).mean(), "accuracy": right.mean()}


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of two logits (batch, class), averaged over the batch."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
