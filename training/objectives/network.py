"""What a step trains: plain networks, whether they are the model, members of an ensemble or paths of a gated one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from training.objectives.base import Step
from zoo import paths
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble, mean_probability
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import num_exits
from zoo.paths import Path

Statistics = Literal["train", "train_frozen", "eval"]
"""How BatchNorm normalises: with the batch's statistics, moving the running ones; with the batch's, leaving the running
ones alone; with the running ones."""


@dataclass(frozen=True)
class Network:
    """One plain network: images (batch, channel, height, width) in [0, 1] -> logits (batch, class) in float32.

    Forward passes run in the step's precision. Attacks take it as it is: gradients for images alone fill no `.grad`.
    """

    module: nn.Module
    """What runs: the network itself, or the template of a random gated one."""
    step: Step
    index: int = 0
    """Which of the networks of this step it is."""
    rgn: RandomGatedNetwork | None = None
    path: Path | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (batch, class)."""
        return cast(Tensor, self._run(images)).float()

    def exits(self, images: Tensor) -> list[Tensor]:
        """Return the logits of every exit of a multi-exit network, each (batch, class)."""
        return [logits.float() for logits in self._run(images)]

    def _run(self, images: Tensor) -> Tensor | Sequence[Tensor]:
        with self.step.autocast(images.device):
            if self.rgn is not None and self.path is not None:
                return self.rgn(images, self.path)  # type: ignore[no-any-return]
            return self.module(images)  # type: ignore[no-any-return]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters under the names of the plain network; for a path those of its own candidates."""
        own = dict(self.module.named_parameters())
        if self.rgn is not None and self.path is not None:
            chosen = self.rgn.select(self.path)
            own |= {name: tensor for name, tensor in chosen.items() if isinstance(tensor, nn.Parameter)}
        return own

    def statistics(self, mode: Statistics) -> contextlib.AbstractContextManager[None]:
        """Return the context in which BatchNorm behaves as `mode` says; see `statistics`."""
        return statistics(self.module, mode)


@contextlib.contextmanager
def statistics(module: nn.Module, mode: Statistics) -> Iterator[None]:
    """Run with BatchNorm as `mode` says. Dropout is on in "train" alone. Modes are put back afterwards."""
    before = [(part, part.training) for part in module.modules()]
    norms = [part for part, _ in before if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for part, _ in before:
            part.training = mode == "train"
        if mode == "train_frozen":
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for part, training in before:
            part.training = training
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track


@contextlib.contextmanager
def statistics_of(networks: Sequence[Network], mode: Statistics) -> Iterator[None]:
    """Run with BatchNorm of several networks as `mode` says."""
    with contextlib.ExitStack() as modes:
        for network in networks:
            modes.enter_context(network.statistics(mode))
        yield


def networks_of(model: nn.Module, step: Step, *, drawn: int = 1) -> list[Network]:
    """Return what a step trains: a plain network, the members of an `Ensemble`, or `drawn` distinct random paths of a
    random gated network, the same on all ranks.
    """
    if isinstance(model, RandomGatedNetwork):
        rng = step.rng("gates")
        if drawn == 1:
            chosen = [paths.sample(model.num_gates, model.candidates, rng)]
        else:
            number = min(drawn, model.candidates**model.num_gates)
            chosen = paths.sample_distinct(number, model.num_gates, model.candidates, rng)
        return [Network(model.template, step, index, model, path) for index, path in enumerate(chosen)]
    if isinstance(model, Ensemble):
        return [Network(member, step, index) for index, member in enumerate(model.members)]
    return [Network(model, step)]


def together(networks: Sequence[Network]) -> Callable[[Tensor], Tensor]:
    """Return the ensemble of several networks as a function: images -> log of their mean probability (batch, class)."""
    if len(networks) == 1:
        return networks[0]
    return lambda images: mean_probability(torch.stack([network(images) for network in networks]))


def accuracy(answers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean over several answers, logits (batch, class), of the share of images that each says right."""
    return torch.stack([(logits.detach().argmax(1) == labels).float().mean() for logits in answers]).mean()


def check_members(model: nn.Module, method: str) -> None:
    """Check that there are several networks to train against each other: members of an ensemble, or paths.

    Raises:
        BadInput: a single plain network, or an ensemble of one.
    """
    if isinstance(model, RandomGatedNetwork):
        return
    number = len(model.members) if isinstance(model, Ensemble) else 1
    if number < 2:
        raise BadInput(
            f"{method} trains several networks against each other, got {number}; set members=3 in the recipe "
            "(or candidates=2 to take paths of a random gated network)"
        )


def check_one_exit(model: nn.Module, method: str) -> None:
    """Check that the model has one exit.

    Raises:
        BadInput: it has several.
    """
    for part in model.modules():
        if num_exits(part) > 1:
            raise BadInput(
                f"{method} trains networks with one exit, and {type(part).__name__} has {num_exits(part)}; "
                "use multi_exit or neo_kd"
            )
