"""Dropen: TRS within one network, whose dropout masks are the members (its released code, adapted from that of TRS).

    CE(f(x), y) + lambda_a S + lambda_b Q
    S = mean_m mean_k |cos(g_k, g_mk)|               image gradients under other masks m, which are constants
    Q = 2 mean_k ||g_k||^2                           on half-perturbed images, see `Smoothness`

The released code compares a batch with the gradients of earlier batches, that is of other images. Here the other masks
see the same images by default; `memory="previous_batches"` is the released reading.

Its weights are 5 * 2 = 10 for S and 5 * 2 * 1e4 = 1e5 for Q, for gradients of the batch-mean loss at B = 1,000. Ours
belong to single images and are B times as long, so that lambda_b = 1e5 / 1000^2 = 0.1 is the same loss, at every size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from training.objectives.base import Batch, Memory, Needs, Objective, Step
from training.objectives.checks import check_choice, check_weights
from training.objectives.input_gradients import SECOND_ORDER, Smoothness, input_gradients
from training.objectives.network import Network, check_one_exit, networks_of
from zoo.errors import BadInput
from zoo.networks import MNIST_FORMAT

Compared = Literal["masks", "previous_batches"]


@dataclass(frozen=True, kw_only=True)
class Dropen(Objective):
    """Cross-entropy under one dropout mask, its image gradients' cosines with those of other masks, and their length.

    The networks of an ensemble are trained side by side, each by itself; of a random gated network one path is drawn.
    """

    method: ClassVar[str] = "dropen"
    published: ClassVar[str] = "Dropen (released code)"
    needs: ClassVar[Needs] = "dropout"

    memory: Compared = "masks"
    """What gradients are compared with: those of other masks on the same images, or of earlier batches of the epoch."""
    masks: int = 5
    """Masks on the same images, the trained one among them."""
    batches: int = 5
    """Batches that are remembered, at most."""
    lambda_a: float = 10.0
    """Weight of the similarity S."""
    lambda_b: float = 0.1
    """Weight of the smoothness Q, for gradients of single images."""
    smoothness: Smoothness = field(default_factory=lambda: Smoothness(eps_start=0.1, eps_end=0.2))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("memory", self.memory, Compared)
        if self.masks < 2 or self.batches < 1:
            raise BadInput(f"need at least 2 masks and 1 batch, got {self.masks} and {self.batches}")
        check_weights(lambda_a=self.lambda_a, lambda_b=self.lambda_b)

    @classmethod
    def release(cls, **changes: Any) -> Dropen:
        """Return the released code's reading: earlier batches, and a perturbation along the sum of its gradients."""
        smoothness = Smoothness(eps_start=0.1, eps_end=0.2, accumulate_gradients=True)
        return cls(**{"memory": "previous_batches", "smoothness": smoothness, **changes})

    @classmethod
    def mnist(cls, **changes: Any) -> Dropen:
        """Return the weights for digits: the released code trains them in standard scores, not in pixels.

        Its gradients are then std = 0.3081 times ours and its radius 1 / std times: Q counts std^2 as much.
        """
        std = MNIST_FORMAT.std[0]
        smoothness = Smoothness(eps_start=0.1 * std, eps_end=0.2 * std)
        return cls(**{"lambda_b": 0.1 * std**2, "smoothness": smoothness, **changes})

    @property
    def per_image_memory(self) -> bool:  # type: ignore[override]
        """See `Objective.per_image_memory`; of an object here, not of its class."""
        return self.memory == "previous_batches"

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        others = 2.0 * (self.masks - 1) if self.memory == "masks" else 0.0
        return networks * (SECOND_ORDER + others + self.smoothness.forwards)

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_one_exit(model, self.name)
        if not any(isinstance(part, _DropoutNd) and part.p > 0 for part in model.modules()):
            raise BadInput(
                f"{self.name} makes its members of dropout masks, and {type(model).__name__} has no dropout; train "
                'two_layer_cnn, or lenet with network_options={"dropout": 0.5}'
            )

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; the network must be in training mode, where every forward draws a mask."""
        (batch,) = batches
        measured = [self._train(network, batch, step) for network in networks_of(model, step)]
        return {name: torch.stack([one[name] for one in measured]).mean() for name in measured[0]}

    def _train(self, network: Network, batch: Batch, step: Step) -> dict[str, Tensor]:
        images = self.smoothness.images([network], batch.images, batch.labels, step)
        logits, gradients = input_gradients(network, batch.images, batch.labels)
        cross_entropy = self.cross_entropy(logits, batch.labels)
        similarity = self.similarity(gradients, self.others(network, batch, gradients.detach(), step))
        loss = cross_entropy + self.lambda_a * similarity
        if self.smoothness.perturbed == "none":
            penalty = self.smoothness.penalty(gradients)
            (loss + self.lambda_b * penalty).backward()  # type: ignore[no-untyped-call]
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            penalty = self.smoothness.penalty(input_gradients(network, images, batch.labels)[1])
            (self.lambda_b * penalty).backward()  # type: ignore[no-untyped-call]
        return {
            "loss": (loss + self.lambda_b * penalty).detach(),
            "accuracy": (logits.detach().argmax(1) == batch.labels).float().mean(),
            "cross_entropy": cross_entropy.detach(),
            "similarity": similarity.detach(),
            "smoothness": penalty.detach(),
        }

    def others(self, network: Network, batch: Batch, gradients: Tensor, step: Step) -> list[Tensor]:
        """Return the constant gradients (batch, pixels) that `gradients` are compared with, at most `masks` - 1 or
        `batches`; in the latter case `gradients` are then remembered.

        Raises:
            BadInput: an earlier batch of this epoch had another size.
        """
        if self.memory == "masks":
            return [
                input_gradients(network, batch.images, batch.labels, differentiable=False)[1]
                for _ in range(self.masks - 1)
            ]
        tensors = _of_this_epoch(step.memory, step.epoch)
        names = [f"dropen/gradients/{network.index}/{slot}" for slot in range(self.batches)]
        remembered = [tensors[name] for name in names if name in tensors]
        for earlier in remembered:
            if earlier.shape != gradients.shape:
                raise BadInput(
                    f"dropen with memory='previous_batches' pairs images by their row in the batch, got "
                    f"{len(gradients)} after {len(earlier)}; train on batches of one size, or with memory='masks'"
                )
        tensors[names[step.batch % self.batches]] = gradients
        return remembered

    def similarity(self, gradients: Tensor, others: list[Tensor]) -> Tensor:
        """Return the mean absolute cosine of gradients (batch, pixels) with those of others; 0 where there are none."""
        if not others:
            return gradients.new_zeros(())
        return torch.stack([F.cosine_similarity(gradients, other, dim=1).abs().mean() for other in others]).mean()


def _of_this_epoch(memory: Memory, epoch: int) -> dict[str, Tensor]:
    """Return the memory's tensors, with what was remembered in another epoch forgotten."""
    tensors = memory.tensors
    if "dropen/epoch" not in tensors or int(tensors["dropen/epoch"]) != epoch:
        for name in [name for name in tensors if name.startswith("dropen/")]:
            del tensors[name]
        tensors["dropen/epoch"] = torch.tensor(epoch)
    return tensors
