"""The small vocabulary that the loop and the objectives share, and checks of hyper-parameters."""

from __future__ import annotations

import contextlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.randomness import gate_generator, tensor_generator
from zoo.errors import BadInput

Needs = Literal["any network", "several members", "gates", "dropout", "several exits", "residual blocks"]


@dataclass(frozen=True)
class Batch:
    """Augmented images (batch, channel, height, width) in [0, 1] and labels int64 (batch,)."""

    images: Tensor
    labels: Tensor
    views: tuple[Tensor, ...] = ()
    """Further augmentations of the same images, `Objective.views` - 1 of them."""


class Stateful(Protocol):
    """What an objective keeps that is more than a tensor: a controller with its optimiser, say."""

    def state(self) -> dict[str, Tensor]:
        """Return everything it needs to go on bit for bit."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        ...


Part = TypeVar("Part", bound=Stateful)


class Memory:
    """What an objective keeps from step to step. Every checkpoint holds it, and each phase starts with none."""

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        self.tensors: dict[str, Tensor] = dict(state or {})
        self._parts: dict[str, Stateful] = {}

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Return what is kept under `name`; `make` builds it at its first use, the checkpoint then fills it."""
        if name not in self._parts:
            part = make()
            prefix = f"{name}/"
            stored = [key for key in self.tensors if key.startswith(prefix)]
            if stored:
                part.load({key.removeprefix(prefix): self.tensors.pop(key) for key in stored})
            self._parts[name] = part
        return cast(Part, self._parts[name])

    def state(self) -> dict[str, Tensor]:
        """Return everything that is kept, by name; `Memory(state)` goes on with it."""
        parts = {f"{name}/{key}": tensor for name, part in self._parts.items() for key, tensor in part.state().items()}
        return {**self.tensors, **parts}


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in a run a step is; all its randomness follows from that."""

    seed: int
    number: int
    """Of the step, over the whole run."""
    precision: torch.dtype = torch.float32
    """bfloat16 runs the forward passes under autocast."""
    rank: int = 0
    epoch: int = 0
    """Within the phase, from 0 on."""
    epochs: int = 1
    """Of the phase."""
    batch: int = 0
    """Within the epoch, from 0 on; steps that see the same images again count too."""
    memory: Memory = field(default_factory=Memory, compare=False)
    average: Callable[[Tensor], Tensor] = field(default=_alone, compare=False)
    """Averages a tensor over the processes of a distributed run, for what all of them must agree on."""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.precision)

    def generator(self, purpose: str, *parts: int | str) -> torch.Generator:
        """Return the CPU generator of tensors for one purpose in this step; every rank draws its own."""
        return tensor_generator(self.seed, purpose, self.number, *parts, self.rank)

    def rng(self, purpose: str, *parts: int | str) -> random.Random:
        """Return the generator of gates, layers and the like for one purpose in this step; all ranks draw the same."""
        return gate_generator(self.seed, purpose, self.number, *parts)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Adds the gradients of one step to the parameters' `.grad` and reports what it measured."""

    method: ClassVar[str]
    """What recipes and the command line call it: its key in `OBJECTIVES`."""
    streams: ClassVar[int] = 1
    """Independent shuffles of the training set that a step needs."""
    published: ClassVar[str] = ""
    """Where the method was published."""
    needs: ClassVar[Needs] = "any network"
    """What a network must have to be trained so."""
    per_image_memory: ClassVar[bool] = False
    """Whether it remembers something per image of a batch, which ties it to one process."""

    label_smoothing: float = 0.0
    """Share of every label that is spread over all classes, in the cross-entropies that train weights. Attacks,
    distances between features and divergences do without."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"need 0 <= label_smoothing < 1, got {self.label_smoothing}")

    @property
    def name(self) -> str:
        """The method's name in tables and cards; a wrapper puts its own behind that of what is within."""
        return self.method

    @property
    def views(self) -> int:
        """Augmentations of each image that a step compares; 1 where it takes just the image."""
        return 1

    @property
    def replays(self) -> int:
        """Consecutive steps that see the same images."""
        return 1

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """Return the predicted cost of a step in forward passes of one network over the batch; a backward counts two.

        `networks` are the members of an ensemble, `exits` those of a multi-exit network.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a step costs")

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits (batch, class) with smoothed labels, given as int64 (batch,)."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def cross_entropies(self, answers: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the `cross_entropy` of each of several answers, as (answer,)."""
        return torch.stack([self.cross_entropy(logits, labels) for logits in answers])

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most methods train whatever they are given
        """Check that `model` can be trained with this objective; called before the first step.

        Raises:
            BadInput: it lacks what the method needs.
        """

    @abstractmethod
    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """Run forward and backward passes on `streams` batches; the loop zeroes gradients before and steps after.

        Returns:
            Scalars to log, detached; "loss" among them.
        """


def check_choice(name: str, value: object, literal: Any) -> None:
    """Check that a value is one of a `Literal`'s.

    Raises:
        BadInput: It is not; the message lists them.
    """
    if value not in get_args(literal):
        raise BadInput(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")


def check_weights(**weights: float) -> None:
    """Check that the weights of a loss's terms are finite and not negative.

    Raises:
        BadInput: One is not; the message names it.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise BadInput(f"need a finite {name} >= 0, got {weight}")


def check_positive(**numbers: float) -> None:
    """Check that numbers are finite and greater than 0.

    Raises:
        BadInput: One is not; the message names it.
    """
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise BadInput(f"need a finite {name} > 0, got {number}")
