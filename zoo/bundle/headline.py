"""Which numbers of a card stand for its model. The list, the leaderboard, the README, the page and the report ask here.

A variant may have been measured several times at the same radius: by several attacks, on more or fewer images. One rule
chooses between them everywhere: the accuracy on most images, of these the lowest. When it was measured does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from zoo.bundle.card import Card, Result
from zoo.vocabulary import VARIANTS

CLEAN = ("clean",)
WHITEBOX = ("whitebox", "random-gates")
"""The protocols of an attacker who has the weights; what stands against random gates is the minimum of many attacks."""
TRANSFER = ("blackbox",)
AUTOATTACK = ("autoattack",)

USUAL_EPS = (Fraction(1, 100), Fraction(3, 100), Fraction(8, 255))
"""The radii at which models are compared, where they were measured."""
SHOWN_EPS = 3
"""So many radii are shown of a data set whose models were measured at none of the usual ones."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The two numbers that stand for a variant of a model."""

    variant: str
    clean: Result | None
    """On the images as they are; None if that was not measured."""
    robust: Result | None
    """Against an attacker who has the weights; None if that was not measured."""


def headline(card: Card, *, variant: str | None = None, eps: Fraction | None = None) -> Headline:
    """Return the numbers that stand for a model, at an l_inf radius (1 is black to white).

    A variant of None is the one that stands for the model, an eps of None the largest that is shown of it.
    """
    variant = variant or main_variant(card)
    if eps is None:
        places = eps_shown(measured_eps(card, WHITEBOX, variant=variant))
        eps = places[-1] if places else None
    return Headline(
        variant=variant,
        clean=accuracy_of(card, CLEAN, Fraction(0), variant=variant),
        robust=None if eps is None else accuracy_of(card, WHITEBOX, eps, variant=variant),
    )


def main_variant(card: Card) -> str:
    """Return the variant that stands for a model: one path, all members of an ensemble, or the network."""
    order = VARIANTS if card.architecture.gated_layers else ("ensemble", "single")
    return next((variant for variant in order if variant in card.variants), order[0])


def accuracy_of(
    card: Card, protocols: Sequence[str], eps: Fraction, *, variant: str | None = None, norm: str = "linf"
) -> Result | None:
    """Return the accuracy under any of these protocols that stands for a variant; None if there is none.

    The radius `eps` is 0 for clean images. A variant of None is the one that stands for the model.
    """
    named = variant or main_variant(card)
    return chosen(
        result
        for result in card.results
        if (result.variant, result.norm) == (named, norm)
        and result.protocol in protocols
        and Fraction(result.eps_fraction) == eps
    )


def chosen(results: Iterable[Result]) -> Result | None:
    """Return which of several accuracies of the same thing stands for it: on most images, of these the lowest."""
    return min(results, key=lambda result: (-result.images, result.accuracy), default=None)


def measured_eps(card: Card, protocols: Sequence[str], *, variant: str | None = None) -> list[Fraction]:
    """Return the l_inf radius of every measurement of a variant, the one that stands for the model if it is None."""
    named = variant or main_variant(card)
    return [
        Fraction(result.eps_fraction)
        for result in card.results
        if result.protocol in protocols and result.variant == named and result.norm == "linf"
    ]


def eps_shown(eps: Iterable[Fraction]) -> list[Fraction]:
    """Return which radii to compare at, ascending: the usual ones among these, else those that occur most often."""
    counted = Counter(place for place in eps if place)
    usual = [place for place in USUAL_EPS if place in counted]
    return sorted(usual or sorted(counted, key=lambda place: (-counted[place], place))[:SHOWN_EPS])
