"""From a bundle's weights to networks: what is deployed, as `nn.Module` on images in [0, 1]."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo import paths
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, CheckpointError
from zoo.gates.derive import Ensemble, derive
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import num_exits
from zoo.weights.checkpoint import (
    MAX_STACKED,
    Architecture,
    assembled,
    load,
    load_network,
    network_state,
    read_architecture,
    save,
    save_network,
)

RGN_WEIGHTS, PLAIN_WEIGHTS = "rgn.safetensors", "weights.safetensors"


class RandomGates(nn.Module):
    """A random gated network that answers every image along a fresh path of its own, as the server does.

    Gates come from `rng`, the operating system's generator if that is None; `random.Random(seed)` is repeatable.
    """

    def __init__(self, rgn: RandomGatedNetwork, rng: random.Random | None = None) -> None:
        super().__init__()
        self.rgn = rgn
        self.rng = secrets.SystemRandom() if rng is None else rng

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, class); two calls answer differently."""
        draws = [paths.sample(self.rgn.num_gates, self.rgn.candidates, self.rng) for _ in range(len(images))]
        return torch.cat([self.rgn(image[None], path) for image, path in zip(images, draws, strict=True)])


class AtExit(nn.Module):
    """One exit of a multi-exit network as a network of its own, with one answer.

    Its layers and mode are the network's. Exits count from 0; negative ones count from the last.

    Raises:
        BadInput: a network with one exit, or no such exit.
    """

    def __init__(self, network: nn.Module, exit_index: int = -1) -> None:
        super().__init__()
        exits = num_exits(network)
        if exits < 2:
            raise BadInput(f"{type(network).__name__} has one exit, so there is none to choose; use it as it is")
        if not -exits <= exit_index < exits:
            raise BadInput(f"exit {exit_index} is out of range, expected 0 to {exits - 1}, or {-exits} to -1")
        self.network = network
        self.exit_index = exit_index % exits
        if hasattr(network, "image_shape"):
            self.image_shape = network.image_shape
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, class) of the chosen exit."""
        logits: Tensor = self.network(images)[self.exit_index]
        return logits


def weights_file(card: Card) -> str:
    """Return the name of the bundle's weights: of the bank, or of the plain members."""
    return RGN_WEIGHTS if card.architecture.gated_layers else PLAIN_WEIGHTS


def save_members(file: Path, members: Sequence[nn.Module], architecture: Architecture) -> None:
    """Write plain networks of one architecture; with several, every tensor has them as its leading dimension."""
    if len(members) == 1:
        save_network(file, members[0], architecture)
        return
    states = [network_state(member) for member in members]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    save(file, stacked, {"architecture": architecture.member.described(), "members": len(members)})


def load_members(file: Path) -> tuple[list[nn.Module], Architecture]:
    """Read what `save_members` wrote, in evaluation mode.

    Raises:
        CheckpointError: see `zoo.weights.checkpoint.load`.
    """
    tensors, header = load(file)
    architecture = read_architecture(header, file)
    number = header.get("members", 1)
    if type(number) is not int or not 1 <= number <= MAX_STACKED:
        raise CheckpointError(f"{file} says it has {number!r} members, expected a count; export the bundle again")
    short = [name for name, tensor in tensors.items() if number > 1 and tensor.shape[:1] != (number,)]
    if short:
        raise CheckpointError(f"{file}: {short[0]} is not stacked over {number} members; export the bundle again")
    if number == 1:
        return [assembled(architecture, tensors)], architecture
    states = ({name: tensor[index] for name, tensor in tensors.items()} for index in range(number))
    return [assembled(architecture, state) for state in states], architecture


@dataclass(frozen=True)
class Weights:
    """What a bundle's file of weights holds: one random gated network, or plain networks of one architecture."""

    networks: list[nn.Module]
    architecture: Architecture
    card: Card

    @classmethod
    def of(cls, bundle: Bundle) -> Weights:
        """Read the weights of a bundle; its networks are in evaluation mode.

        Raises:
            CheckpointError: the file is damaged, or holds another kind of network than its card describes.
        """
        file = bundle.file(weights_file(bundle.card))
        if not bundle.card.architecture.gated_layers:
            return cls(*load_members(file), bundle.card)
        network, architecture = load_network(file)
        if not isinstance(network, RandomGatedNetwork):
            raise CheckpointError(f"{file} holds a plain network, and its card a gated one; export the bundle again")
        return cls([network], architecture, bundle.card)

    @property
    def rgn(self) -> RandomGatedNetwork | None:
        """The random gated network, if it is one."""
        (first, *_) = self.networks
        return first if isinstance(first, RandomGatedNetwork) else None

    def members(self, variant: str) -> list[nn.Module]:
        """Return the plain networks of the variant "single" or "ensemble", in evaluation mode.

        Each has one answer: of a multi-exit network it is the last exit's.
        """
        if self.rgn is None:
            answering = [network if num_exits(network) == 1 else AtExit(network) for network in self.networks]
            return answering[:1] if variant == "single" else answering
        chosen = [self.card.paths.single] if variant == "single" else self.card.paths.ensemble
        shape = self.rgn.num_gates, self.rgn.candidates
        return [derive(self.rgn, paths.parse(path, *shape)) for path in chosen if path is not None]


def load_rgn(bundle: Bundle) -> RandomGatedNetwork:
    """Return the random gated network of a bundle, in evaluation mode.

    Raises:
        BadInput: the bundle holds a plain network.
    """
    rgn = Weights.of(bundle).rgn if bundle.card.architecture.gated_layers else None
    if rgn is None:
        raise BadInput(f"{bundle.card.name} is a plain network without gates; expected a random gated one")
    return rgn


def member_networks(bundle: Bundle, variant: str) -> list[nn.Module]:
    """Return the plain networks of a variant, as `Weights.members`; BadInput if there is none."""
    check_variant(bundle, variant)
    return Weights.of(bundle).members(variant)


def load_exits(bundle: Bundle) -> nn.Module:
    """Return the whole multi-exit network of a bundle, in evaluation mode: it answers with a tuple of logits.

    Raises:
        BadInput: its network has one exit.
    """
    network = None if bundle.card.architecture.gated_layers else Weights.of(bundle).networks[0]
    if network is None or num_exits(network) == 1:
        raise BadInput(f"{bundle.card.name} has one exit; expected a network with several, such as msdnet3")
    return network


def load_variant(bundle: Bundle, variant: str, *, rng: random.Random | None = None) -> nn.Module:
    """Return what a variant deploys, in evaluation mode: a plain network, an `Ensemble` or `RandomGates`.

    Of a multi-exit network the last exit answers; `load_exits` and `AtExit` give the others.

    Raises:
        BadInput: the bundle has no such variant.
    """
    check_variant(bundle, variant)
    if variant == "gated":
        return RandomGates(load_rgn(bundle), rng).eval()
    members = member_networks(bundle, variant)
    return members[0] if variant == "single" else Ensemble(members).eval()


def check_variant(bundle: Bundle, variant: str) -> None:
    """Raise BadInput if the bundle has no such variant."""
    if not bundle.has_variant(variant):
        raise BadInput(
            f"{bundle.card.name} has no variant {variant!r}; it has {', '.join(bundle.card.variants) or 'none'}"
        )
