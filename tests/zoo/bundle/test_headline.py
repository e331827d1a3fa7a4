"""Which numbers of a card stand for its model."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.card import Card, Paths, Result
from zoo.bundle.headline import (
    CLEAN,
    WHITEBOX,
    accuracy_of,
    eps_shown,
    headline,
    main_variant,
)

GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
MEASURED = Result(
    protocol="clean",
    variant="single",
    attack="none",
    eps=0.0,
    eps_fraction="0",
    steps=0,
    step_size=0.0,
    restarts=0,
    images=10_000,
    seed=0,
    accuracy=0.8,
    interval=(0.79, 0.81),
    note="",
    checks=(),
    date="2026-11-21",
    command="manygates evaluate",
)


def attacked(accuracy: float, eps: str = "1/100", **changes: Any) -> Result:
    low, high = max(0.0, accuracy - 0.03), min(1.0, accuracy + 0.03)
    named: dict[str, Any] = {"protocol": "whitebox", "attack": "PGD", "steps": 50, "restarts": 5, "images": 1000}
    return replace(
        MEASURED,
        eps=float(Fraction(eps)),
        eps_fraction=eps,
        accuracy=accuracy,
        interval=(low, high),
        **{**named, **changes},
    )


def card(*results: Result, **changes: Any) -> Card:
    return replace(GOLDEN, int8=None, lint=(), **{"results": results, **changes})


def plain(variants: tuple[str, ...]) -> Card:
    one = GOLDEN.architecture.single_path_parameters
    network = replace(GOLDEN.architecture, gated_layers=(), candidates=1, sharing=None, parameters=one)
    return card(architecture=network, paths=Paths(single=None, ensemble=()), variants=variants)


@pytest.mark.parametrize(
    ("found", "main"),
    [
        (card(variants=("single", "ensemble", "gated")), "single"),
        (card(variants=("gated",)), "gated"),
        (plain(("single",)), "single"),
        (plain(("single", "ensemble")), "ensemble"),
    ],
)
def test_the_variant_that_stands_for_a_model(found: Card, main: str) -> None:
    assert main_variant(found) == main
    assert headline(found).variant == main


def test_the_accuracy_on_most_images_stands_for_a_variant_and_of_these_the_lowest() -> None:
    found = card(
        attacked(0.5),
        attacked(0.4, attack="another"),
        attacked(0.1, images=50, date="2030-01-01"),
        attacked(0.2, norm="l2"),
        attacked(0.3, variant="ensemble"),
    )
    chosen = accuracy_of(found, WHITEBOX, Fraction(1, 100))
    assert chosen is not None
    assert chosen.accuracy == 0.4
    other = accuracy_of(found, WHITEBOX, Fraction(1, 100), variant="ensemble")
    assert other is not None
    assert other.accuracy == 0.3
    assert accuracy_of(found, CLEAN, Fraction(0)) is None


def test_the_headline_is_clean_accuracy_and_that_at_the_largest_usual_radius() -> None:
    found = headline(card(MEASURED, attacked(0.5), attacked(0.3, "8/255"), attacked(0.1, "1/10")))
    assert found.clean == MEASURED
    assert found.robust is not None
    assert (found.robust.accuracy, found.robust.eps_fraction) == (0.3, "8/255")
    nearer = headline(card(MEASURED, attacked(0.5), attacked(0.3, "8/255")), eps=Fraction(1, 100))
    assert nearer.robust is not None
    assert nearer.robust.accuracy == 0.5
    nothing = headline(card(), variant="ensemble")
    assert (nothing.variant, nothing.clean, nothing.robust) == ("ensemble", None, None)


def test_the_usual_radii_are_shown_where_they_were_measured_else_the_most_frequent() -> None:
    usual, odd = Fraction(3, 100), Fraction(1, 10)
    assert eps_shown([odd, odd, usual, Fraction(0)]) == [usual]
    many = [Fraction(1, 2), odd, odd, Fraction(2, 10), Fraction(2, 10), Fraction(3, 10), Fraction(3, 10)]
    assert eps_shown(many) == [odd, Fraction(2, 10), Fraction(3, 10)]
    assert eps_shown([]) == []
