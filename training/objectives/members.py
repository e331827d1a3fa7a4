"""Objectives of networks that differ: ADP, GAL and TRS for several, Dropen for the dropout masks of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from training.objectives.base import Batch, Memory, Needs, Objective, Step, check_choice, check_weights
from training.objectives.input_gradients import SECOND_ORDER, Smoothness, cosines, input_gradients
from training.objectives.network import Network, accuracy, check_members, check_one_exit, networks_of
from zoo.errors import BadInput
from zoo.gates.derive import mean_probability
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import MNIST_FORMAT


@dataclass(frozen=True, kw_only=True)
class MembersObjective(Objective):
    """An objective of all members of an ensemble together, or of distinct random paths of a random gated network."""

    needs: ClassVar[Needs] = "several members"

    paths: int = 3
    """Distinct random paths per step, of a random gated network; an ensemble is trained whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 2:
            raise BadInput(f"need at least 2 paths, got {self.paths}; one path has no other to differ from")

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        check_members(model, self.name)
        check_one_exit(model, self.name)
        if isinstance(model, RandomGatedNetwork) and model.candidates**model.num_gates < self.paths:
            raise BadInput(
                f"{self.name} draws {self.paths} distinct paths, and {model.num_gates} gates of {model.candidates} "
                f"candidates have only {model.candidates**model.num_gates}; set paths lower or candidates=2"
            )

    def networks(self, model: nn.Module, step: Step) -> list[Network]:
        """Return what this step trains: the members, or `paths` random paths."""
        return networks_of(model, step, drawn=self.paths)

    def count(self, networks: int) -> int:
        """Return how many networks a step trains, given the members of the model; it has 1 if it is gated."""
        return networks if networks > 1 else self.paths


@dataclass(frozen=True, kw_only=True)
class Adp(MembersObjective):
    """Cross-entropy of each member, the ensemble's entropy and the volume of the members' wrong answers.

    Adaptive diversity promoting training (Pang et al. 2019, arXiv:1901.08846, section 3):

        sum_i CE(f_i(x), y) - alpha H(mean_i p_i) - beta log det(M M^T)

    The rows of M are the members' probabilities of the wrong classes, scaled to length 1: the determinant is the
    squared volume that the members span, 1 if they spread over different wrong classes and 0 if two of them agree. H is
    the entropy of what the ensemble answers; it leaves the members room to differ.
    """

    method: ClassVar[str] = "adp"
    published: ClassVar[str] = "Pang et al., ICML 2019"

    alpha: float = 2.0
    """Weight of the entropy."""
    beta: float = 0.5
    """Weight of the logarithm of the determinant."""
    offset: float = 1e-6
    """Added to the diagonal before the determinant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(alpha=self.alpha, beta=self.beta)
        if not 0 < self.offset < 1:
            raise BadInput(f"need 0 < offset < 1, got {self.offset}; without it equal members have no logarithm")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return 3.0 * self.count(networks)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        (batch,) = batches
        answers = [network(batch.images) for network in self.networks(model, step)]
        logits = torch.stack(answers)
        num_members, _, classes = logits.shape
        if num_members > classes - 1:
            raise BadInput(
                f"adp spreads members over the wrong classes, and {num_members} of them cannot differ in "
                f"{classes - 1}; train at most {classes - 1} members"
            )
        cross_entropy = self.cross_entropies(answers, batch.labels).sum()
        spread, volume = entropy(logits).mean(), log_volume(logits, batch.labels, self.offset).mean()
        loss = cross_entropy - self.alpha * spread - self.beta * volume
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": cross_entropy.detach() / num_members,
            "entropy": spread.detach(),
            "log_volume": volume.detach(),
        }


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats (batch,) of the mean probability of logits (member, batch, class).

    It is taken in log space, where the offset of the released codes, log(p + 1e-20), is not needed.
    """
    log_prob = mean_probability(logits)
    return -(log_prob.exp() * log_prob).sum(1)


def log_volume(logits: Tensor, labels: Tensor, offset: float) -> Tensor:
    """Return log det(M M^T + offset I) per image (batch,), of logits (member, batch, class).

    The rows of M are softmaxes over the wrong classes alone: the same direction as the probabilities, and no 0 / 0 if a
    member is certain of the true class. The matrix has as many rows as there are members; it is computed in float64,
    because in float32 the offset is just 8 units in the last place.
    """
    true = labels[None, :, None].expand(len(logits), -1, 1)
    wrong = logits.scatter(2, true, -math.inf).softmax(2)  # a column of zeros adds nothing to lengths and products
    rows = F.normalize(wrong.double(), dim=2).transpose(0, 1)
    identity = torch.eye(len(logits), dtype=rows.dtype, device=rows.device)
    volume: Tensor = torch.linalg.slogdet(rows @ rows.mT + offset * identity).logabsdet
    return volume.to(logits.dtype)


@dataclass(frozen=True, kw_only=True)
class Gal(MembersObjective):
    """Cross-entropy of each member, and how much their image gradients are aligned.

    Gradient alignment loss (Kariyappa and Qureshi 2019, arXiv:1901.09981, section 4):

        mean_i CE(f_i(x), y) + weight mean_x log sum_{i<j} exp(cos(g_i, g_j)),     g_i = d CE(f_i(x), y) / d x

    Members whose loss rises in different directions are fooled by different perturbations. The paper trains with leaky
    ReLUs, whose gradients are less sparse (`negative_slope=0.1` of the residual networks), and on images half of which
    are noisy.
    """

    method: ClassVar[str] = "gal"
    published: ClassVar[str] = "Kariyappa and Qureshi, 2019"

    weight: float = 0.5
    """Weight of the alignment."""
    noise: float = 0.045
    """Standard deviation of the noise, in pixel units."""
    noisy_share: float = 0.5
    """Probability that an image is made noisy."""
    clip_noise: bool = True
    """Keep noisy images in [0, 1]; the released code of DVERGE does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(weight=self.weight)
        if not (0 <= self.noise < math.inf and 0 <= self.noisy_share <= 1):
            raise BadInput(f"need noise >= 0 and 0 <= noisy_share <= 1, got {self.noise} and {self.noisy_share}")

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return SECOND_ORDER * self.count(networks)

    def noisy(self, images: Tensor, step: Step) -> Tensor:
        """Return the images, some of them with noise, each image with its own draw; all members see the same."""
        generator = step.generator("noise")
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < self.noisy_share
        noise = torch.randn(images.shape, generator=generator) * self.noise * chosen
        moved = images + noise.to(images.device)
        return moved.clamp(0, 1) if self.clip_noise else moved

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; one forward pass per member serves both terms."""
        (batch,) = batches
        images = self.noisy(batch.images, step)
        pairs = [input_gradients(network, images, batch.labels) for network in self.networks(model, step)]
        answers, gradients = [logits for logits, _ in pairs], [found for _, found in pairs]
        cross_entropy = self.cross_entropies(answers, batch.labels).mean()
        similar = cosines(gradients)
        loss = cross_entropy + self.weight * alignment(similar)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": cross_entropy.detach(),
            "cosine": similar.detach().mean(),
        }


def alignment(similar: Tensor) -> Tensor:
    """Return the mean over images of log sum over pairs of exp(cosine), of cosines (pair, batch)."""
    return similar.logsumexp(0).mean()


BATCH_SIZE = 128
"""Of the released code; its gradients carry 1 / 128."""


@dataclass(frozen=True, kw_only=True)
class Trs(MembersObjective):
    """Cross-entropy of each member, the absolute cosines of their image gradients, and how long these are.

    Transferability reduced smooth ensembles (Yang et al. 2021, arXiv:2104.00671, section 4):

        sum_i CE(f_i(x), y) + lambda_a S + lambda_b Q
        S = mean_{i<j} mean_k |cos(g_ik, g_jk)|          members' image gradients should be orthogonal
        Q = mean_i 2 mean_k ||g_ik||^2                   and short around the images, see `Smoothness`

    The authors give lambda_a 40 and lambda_b 2.5 for CIFAR-10, for gradients of the batch-mean loss at B = 128. Ours
    belong to single images and are B times as long: lambda_b = 2.5 / 128^2 = 1.53e-4 is the same loss, at every size.
    """

    method: ClassVar[str] = "trs"
    published: ClassVar[str] = "Yang et al., NeurIPS 2021"

    lambda_a: float = 40.0
    """Weight of the similarity S."""
    lambda_b: float = 2.5 / BATCH_SIZE**2
    """Weight of the smoothness Q, for gradients of single images."""
    smoothness: Smoothness = field(default_factory=Smoothness)
    average_members: bool = False
    """Average the members' cross-entropies instead of adding them (released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(lambda_a=self.lambda_a, lambda_b=self.lambda_b)

    @classmethod
    def mnist(cls, **changes: Any) -> Trs:
        """Return the defaults of the released script, 5 (2 S + 2 Q) and a radius from 0.1 to 0.2, re-expressed."""
        options = {"lambda_a": 10.0, "lambda_b": 10.0 / BATCH_SIZE**2}
        return cls(**{**options, "smoothness": Smoothness(eps_start=0.1, eps_end=0.2), **changes})

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`."""
        return (SECOND_ORDER + self.smoothness.forwards) * self.count(networks)

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        (batch,) = batches
        networks = self.networks(model, step)
        # before any weight has a gradient, and with the weights as they are
        images = self.smoothness.images(networks, batch.images, batch.labels, step)
        pairs = [input_gradients(network, batch.images, batch.labels) for network in networks]
        answers, gradients = [logits for logits, _ in pairs], [found for _, found in pairs]
        losses = self.cross_entropies(answers, batch.labels)
        similarity = cosines(gradients).abs().mean()
        loss = (losses.mean() if self.average_members else losses.sum()) + self.lambda_a * similarity
        share = self.lambda_b / len(networks)
        penalties = []
        if self.smoothness.perturbed == "none":
            penalties = [self.smoothness.penalty(found) for found in gradients]
            loss = loss + share * torch.stack(penalties).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if not penalties:  # one network's graph at a time is in memory
            for network in networks:
                penalty = self.smoothness.penalty(input_gradients(network, images, batch.labels)[1])
                (share * penalty).backward()  # type: ignore[no-untyped-call]
                penalties.append(penalty.detach())
                loss = loss.detach() + share * penalty.detach()
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(answers, batch.labels),
            "cross_entropy": losses.detach().mean(),
            "similarity": similarity.detach(),
            "smoothness": torch.stack(penalties).detach().mean(),
        }


Compared = Literal["masks", "previous_batches"]


@dataclass(frozen=True, kw_only=True)
class Dropen(Objective):
    """Cross-entropy under one dropout mask, its image gradients' cosines with those of other masks, and their length.

    The networks of an ensemble are trained side by side, each by itself; of a random gated network one path is drawn.

    The released code of Dropen, adapted from that of TRS:

        CE(f(x), y) + lambda_a S + lambda_b Q
        S = mean_m mean_k |cos(g_k, g_mk)|               image gradients under other masks m, which are constants
        Q = 2 mean_k ||g_k||^2                           on half-perturbed images, see `Smoothness`

    The released code compares a batch with the gradients of earlier batches, that is of other images. Here the other
    masks see the same images by default; `memory="previous_batches"` is the released reading.

    Its weights are 5 * 2 = 10 for S and 5 * 2 * 1e4 = 1e5 for Q, for gradients of the batch-mean loss at B = 1,000.
    Ours belong to single images and are B times as long: lambda_b = 1e5 / 1000^2 = 0.1 is the same loss, at every size.
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
