"""Losses of one network, and how they are taken together: what standard and adversarial training have in common.

Adversarial training, weight perturbation (AWP), weak subnets (EWS) and augmentation combine freely because each knows
one thing: a method *prepares* what its loss is taken on, with the weights as they are, and then computes the *loss*, a
sum over *views*. AWP moves the weights between the two; EWS adds a term per view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Objective, Step, check_weights
from training.objectives.network import Network, accuracy, check_one_exit, networks_of
from zoo.errors import BadInput


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
        right = accuracy([loss.views[0].logits for loss in losses], batch.labels)
        return {"loss": torch.stack([loss.value.detach() for loss in losses]).mean(), "accuracy": right}


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of two logits (batch, class), averaged over the batch."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


@dataclass(frozen=True, kw_only=True)
class Wrapper(NetworkObjective):
    """Passes everything on to the objective within; a subclass adds its own term, and its cost (`forwards`)."""

    inner: NetworkObjective
    """The objective within. It makes the adversarial examples, decides on views and replays, and checks the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, NetworkObjective):
            raise BadInput(
                f"{type(self).__name__} goes around the loss of one network, such as standard, pgd_at or trades, "
                f"got {type(self.inner).__name__}"
            )
        if self.label_smoothing:
            smoothing = f"label_smoothing={self.label_smoothing}"
            raise BadInput(f"{smoothing} belongs to the loss within; set inner.label_smoothing instead")

    @property
    def within(self) -> list[NetworkObjective]:
        """The objectives within, from the outside in."""
        return [self.inner, *(self.inner.within if isinstance(self.inner, Wrapper) else [])]

    @property
    def name(self) -> str:
        """The name of what is within, then its own: "trades+awp"."""
        return f"{self.inner.name}+{self.method}"

    @property
    def views(self) -> int:
        """See `Objective.views`."""
        return self.inner.views

    @property
    def passes(self) -> int:
        """See `NetworkObjective.passes`."""
        return self.inner.passes

    @property
    def replays(self) -> int:
        """See `Objective.replays`."""
        return self.inner.replays

    @property
    def per_image_memory(self) -> bool:  # type: ignore[override]
        """See `Objective.per_image_memory`; of an object here, not of its class."""
        return self.inner.per_image_memory

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        self.inner.check(model)

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Any]:
        """See `NetworkObjective.prepare`."""
        return self.inner.prepare(networks, batch)

    def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`."""
        return self.inner.loss(network, inputs, batch)

    def ascended(self, network: Network, inputs: Any, batch: Batch) -> Tensor:
        """See `NetworkObjective.ascended`."""
        return self.inner.ascended(network, inputs, batch)


@dataclass(frozen=True, kw_only=True)
class Standard(NetworkObjective):
    """Mean cross-entropy, and the Jensen-Shannon divergence between views of an image if `consistency` is not 0.

    For a random gated network this is the pre-training of Ensemble-in-One (algorithm 1, lines 1 to 6); for an ensemble,
    separate networks trained on the same batches: the baseline of DVERGE and its relatives. With `consistency` it is
    AugMix (Hendrycks et al. 2020, arXiv:1912.02781, section 3): a network should say the same of every augmentation.
    """

    method: ClassVar[str] = "standard"
    published: ClassVar[str] = "(empirical risk minimisation)"

    consistency: float = 0.0
    """Weight of the Jensen-Shannon divergence between the image and two augmentations of it (AugMix: 12)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(consistency=self.consistency)

    @property
    def views(self) -> int:
        """See `Objective.views`."""
        return 3 if self.consistency else 1

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return 3.0 * networks * self.views

    def inputs(self, network: Network, batch: Batch) -> Tensor:
        """Return all views of all images in one batch, so that they share BatchNorm statistics."""
        return torch.cat([batch.images, *batch.views]) if batch.views else batch.images

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        size = len(batch.labels)
        logits = network(inputs)
        value = self.cross_entropy(logits[:size], batch.labels)
        parts = torch.split(logits, size)
        if self.consistency and len(parts) > 1:
            value = value + self.consistency * jensen_shannon(parts)
        share = 1 / len(parts)
        views = [View(images, said, share) for images, said in zip(torch.split(inputs, size), parts, strict=True)]
        return Loss(value, tuple(views))


def jensen_shannon(logits: tuple[Tensor, ...]) -> Tensor:
    """Return the mean Jensen-Shannon divergence, in nats, between what several logits (batch, class) say."""
    probabilities = [part.softmax(1) for part in logits]
    # clamped as in the reference: the logarithm of a mixture that underflows would be infinite
    mixture = torch.stack(probabilities).mean(0).clamp(1e-7, 1).log()
    terms = [F.kl_div(mixture, part, reduction="batchmean") for part in probabilities]
    return torch.stack(terms).mean()
