"""Models on which transfer attacks are made, and what a model must be to stand for a black box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from zoo.attacks.skip_gradient import skip_gradient
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, ManygatesError
from zoo.evaluation.ledger import digest_of
from zoo.evaluation.run import ready
from zoo.gates.derive import Ensemble
from zoo.hub.source import open_model
from zoo.weights.models import member_networks, weights_file


@dataclass(frozen=True)
class Surrogate:
    """A model on which transfer attacks are made."""

    name: str
    weights: str
    """SHA-256 of its weights."""
    bundle: Bundle

    @cached_property
    def plain(self) -> bool:
        """Whether it has no residual block, so that the skip gradient method is momentum PGD."""
        try:
            skip_gradient(self.members()[0])
        except BadInput:
            return True
        return False

    def members(self) -> list[nn.Module]:
        """Return its plain networks: the ensemble's if it has one."""
        return member_networks(self.bundle, "ensemble" if self.bundle.has_variant("ensemble") else "single")

    def deployed(self, device: torch.device) -> Ensemble:
        """Return it as it is attacked: members folded, probabilities averaged."""
        return Ensemble([ready(member, device) for member in self.members()]).eval()


def open_surrogate(name: str) -> Surrogate:
    """Open a model as a surrogate.

    Raises:
        BadInput: there is no such model, or it is broken.
    """
    try:
        card = open_model(name, only=()).card
        bundle = open_model(name, only=(weights_file(card),))
    except ManygatesError as error:
        raise BadInput(f"surrogate {name}: {error}") from error
    return Surrogate(f"{card.name}", card.files[weights_file(card)].sha256, bundle)


def check_surrogates(target: Bundle, surrogates: Sequence[Surrogate]) -> None:
    """Check that the surrogates are others than the target.

    Raises:
        BadInput: none is named, one is the target, shares a member with it or is what it was trained from, or one was
            trained on another data set.
    """
    card = target.card
    if not surrogates:
        raise BadInput(
            "the blackbox protocol needs surrogates, got none; name models with --surrogates, for instance ensembles "
            "of standard networks of other seeds"
        )
    twice = [surrogate.name for surrogate in surrogates if [s.weights for s in surrogates].count(surrogate.weights) > 1]
    if twice:
        raise BadInput(f"surrogate {twice[0]} is named twice, expected different models")
    own = {_fingerprint(member) for member in _plain_networks(target)}
    start, digests = card.training.recipe.get("start_from"), _started_from(card)
    for surrogate in surrogates:
        theirs = surrogate.bundle.card
        if theirs.dataset != card.dataset:
            raise BadInput(f"surrogate {surrogate.name} was trained on {theirs.dataset}, the target on {card.dataset}")
        if surrogate.weights == card.files[weights_file(card)].sha256 or any(
            _fingerprint(member) in own for member in surrogate.members()
        ):
            raise BadInput(
                f"surrogate {surrogate.name} is the target itself or shares a member with it, which is a white-box "
                "attack; name models of other seeds"
            )
        if surrogate.weights in digests or (start is not None and theirs.name == start):
            raise BadInput(
                f"surrogate {surrogate.name} is what {card.name} was trained from, so it knows more than a black-box "
                "attacker; name models of other seeds"
            )


def _started_from(card: Card) -> set[object]:
    """Return the digests of the weights that the members of a model were trained from."""
    starts = card.training.recipe.get("starts")
    return (
        {start.get("start_from") for start in starts if isinstance(start, dict)} if isinstance(starts, list) else set()
    )


def _plain_networks(target: Bundle) -> list[nn.Module]:
    variants = [variant for variant in ("single", "ensemble") if target.has_variant(variant)]
    return [member for variant in variants for member in member_networks(target, variant)]


def _fingerprint(network: nn.Module) -> str:
    sums = {
        name: [float(tensor.double().sum()), float(tensor.double().square().sum())]
        for name, tensor in network.state_dict().items()
    }
    return digest_of(sums)
