"""The models that the demo offers: what is attacked, and what answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from zoo import paths
from zoo.attacks import unchecked
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, MissingFile, UnknownName
from zoo.gates.derive import Ensemble, folded_copy, mean_probability
from zoo.gates.rgn import RandomGatedNetwork
from zoo.hub.source import find, list_bundled
from zoo.pictures import MAX_PIXELS
from zoo.weights.models import load_rgn, member_networks, weights_file

EOT_DRAWS = 4
"""Fresh paths over which one gradient of a random gated model is averaged."""
VOTES = 32
"""Fresh paths that answer in the vote."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model with one of its variants."""

    name: str
    variant: str
    card: Card
    network: nn.Module
    """A plain network or an ensemble, BatchNorms folded; for the variant "gated" the random gated network itself."""

    @property
    def gated(self) -> bool:
        """Whether each answer comes along a fresh random path."""
        return isinstance(self.network, RandomGatedNetwork)

    @property
    def passes(self) -> int:
        """Networks that are differentiated for one gradient."""
        if self.gated:
            return EOT_DRAWS
        return len(self.network.members) if isinstance(self.network, Ensemble) else 1

    def differentiable(self, rng: random.Random) -> Callable[[Tensor], Tensor]:
        """Return the function images -> logits that an attacker differentiates.

        For random gates that is the log of the mean probability over `EOT_DRAWS` fresh paths. Each call draws new ones,
        so its gradient averages over gates (expectation over transformation, Athalye et al. 2018, arXiv:1707.07397).
        """
        if not self.gated:
            return self.network
        # without `unchecked`, the attack would warn of a model that answers at random
        return unchecked(
            lambda images: mean_probability(torch.stack([self._along_a_path(images, rng) for _ in range(EOT_DRAWS)]))
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor, rng: random.Random, draws: int = VOTES) -> Tensor:
        """Return probabilities (draw, batch, class); a deterministic model has one draw and leaves `rng` alone."""
        if not self.gated:
            return cast(Tensor, self.network(images)).softmax(1)[None]
        return torch.stack([self._along_a_path(images, rng).softmax(1) for _ in range(draws)])

    def _along_a_path(self, images: Tensor, rng: random.Random) -> Tensor:
        rgn = cast(RandomGatedNetwork, self.network)
        return rgn(images, paths.sample(rgn.num_gates, rgn.candidates, rng))  # type: ignore[no-any-return]


class Shelf:
    """The models on offer. Their cards are read at once, their weights when they are first attacked."""

    def __init__(self, models: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> None:
        """Open the bundles of `models`; all that come with the package if there are none.

        Raises:
            ManygatesError: if a model cannot be found or opened, or holds no weights; or if two have the same name.
        """
        self.max_pixels = max_pixels
        """The largest uploaded image that is taken."""
        self._bundles: dict[str, Bundle] = {}
        self._loaded: dict[str, Contestant] = {}
        for model in models or [card.name for card in list_bundled()]:
            found = find(model)
            card = found.card
            if card.name in self._bundles:
                raise BadInput(f"{card.name!r} is to be shown twice; name each model once")
            if weights_file(card) not in card.files:
                raise MissingFile(
                    f"{card.name!r} holds no {weights_file(card)}, but an attack needs gradients; export it anew"
                )
            self._bundles[card.name] = found.open([weights_file(card)])
        if not self._bundles:
            raise BadInput("no model to attack: none comes with this installation; name one, like local-dir:FOLDER")

    @property
    def cards(self) -> list[Card]:
        """The cards, in the order in which the models were named."""
        return [bundle.card for bundle in self._bundles.values()]

    @property
    def choices(self) -> list[str]:
        """What can be chosen, each as "name/variant"."""
        return [f"{card.name}/{variant}" for card in self.cards for variant in card.variants]

    @property
    def defaults(self) -> tuple[str, str]:
        """A plain model against random gates where there are such, else the first choice against the last."""
        plain = [f"{card.name}/single" for card in self.cards if not card.architecture.gated_layers]
        gated = [choice for choice in self.choices if choice.endswith("/gated")]
        return (plain or self.choices)[0], (gated or self.choices[::-1])[0]

    @property
    def classes(self) -> list[str]:
        """The classes of all models, each once."""
        return list(dict.fromkeys(name for card in self.cards for name in card.classes))

    def card(self, choice: str) -> tuple[Card, str]:
        """Return the card and the variant of a choice.

        Raises:
            UnknownName: if it is not on offer.
        """
        bundle, variant = self._find(choice)
        return bundle.card, variant

    def contestant(self, choice: str) -> Contestant:
        """Return a choice, loaded.

        Raises:
            UnknownName: if it is not on offer.
            ManygatesError: if its weights cannot be read.
        """
        if choice not in self._loaded:
            bundle, variant = self._find(choice)
            network = _network(bundle, variant).requires_grad_(False)
            self._loaded[choice] = Contestant(name=bundle.card.name, variant=variant, card=bundle.card, network=network)
        return self._loaded[choice]

    def _find(self, choice: str) -> tuple[Bundle, str]:
        name, _, variant = choice.rpartition("/")
        bundle = self._bundles.get(name)
        if bundle is None or not bundle.has_variant(variant):
            raise UnknownName(choice, self.choices, kind="model/variant")
        return bundle, variant


def _network(bundle: Bundle, variant: str) -> nn.Module:
    if variant == "gated":
        return load_rgn(bundle)
    members: list[nn.Module] = [folded_copy(member) for member in member_networks(bundle, variant)]
    return members[0] if variant == "single" else Ensemble(members).eval()
