"""The page's HTML, from `templates/`. Every text goes through `plain`, and jinja2 escapes it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jinja2

from serving.demo import words
from serving.demo.attack import Attack
from serving.demo.contest import Outcome
from serving.demo.shelf import VOTES
from zoo.bundle import findings, wording
from zoo.bundle.card import Card, Result
from zoo.bundle.headline import CLEAN, TRANSFER, WHITEBOX, accuracy_of, eps_shown, measured_eps
from zoo.report.page import environment_of

WIDTH, HEIGHT = 300, 70
"""Of the drawing of a trace, in its own units."""
_COMMON_EPS = (Fraction(1, 100), Fraction(3, 100))
"""The radii that a card is asked for if it was measured at none."""


def style() -> str:
    """Return the page's style sheet."""
    return (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")


def heading(letter: str, choice: str) -> str:
    """Name a model and its variant."""
    name, _, variant = choice.rpartition("/")
    return _render("heading", letter=letter, name=name, variant=variant)


def card(card: Card, variant: str) -> str:
    """Show what a card has measured of a variant, and what the robustness linter found."""
    lint = next((lint for lint in card.lint if lint.variant == variant), None)
    return _render("card", card=card, variant=variant, accuracies=accuracies(card, variant), lint=lint)


def accuracies(card: Card, variant: str) -> list[tuple[str, Result | None]]:
    """Return the accuracies that stand for a variant, by name; None where it was not measured.

    The radii are those of all variants, so that a missing measurement is seen. Of transfer it is the largest.
    """
    white, transfer = (_eps_of(card, protocols) or _COMMON_EPS for protocols in (WHITEBOX, TRANSFER))
    attacker = "random gates" if variant == "gated" else "white-box"
    wanted = [
        ("clean", CLEAN, Fraction(0)),
        *((f"{attacker}, eps {wording.eps_text(eps)}", WHITEBOX, eps) for eps in white),
        (f"transfer, eps {wording.eps_text(transfer[-1])}", TRANSFER, transfer[-1]),
    ]
    return [(name, accuracy_of(card, protocols, eps, variant=variant)) for name, protocols, eps in wanted]


def summary(outcome: Outcome, attack: Attack) -> str:
    """Show the verdict on a model and what it took."""
    return _render("summary", outcome=outcome, facts=words.facts(outcome, attack))


def scale(amplification: int) -> str:
    """Say how to read the picture of the change."""
    return _render("scale", amplification=amplification)


def details(outcome: Outcome) -> str:
    """Draw the vote of random gates, and the label's probability while PGD ran on this model."""
    shown_trace = not outcome.transferred and any(outcome.crafted.trace)
    return _render(
        "details",
        outcome=outcome,
        votes=_votes(outcome) if outcome.contestant.gated else [],
        total=VOTES,
        lines=_lines(outcome.crafted.trace) if shown_trace else [],
        steps=max(map(len, outcome.crafted.trace), default=0),
        width=WIDTH,
        height=HEIGHT,
    )


def _eps_of(card: Card, protocols: Sequence[str]) -> list[Fraction]:
    return eps_shown(eps for variant in card.variants for eps in measured_eps(card, protocols, variant=variant))


def _votes(outcome: Outcome) -> list[tuple[str, bool, tuple[int, int]]]:
    """Return each class that got a vote: its name, whether it is the label, the votes before and after the attack."""
    counts = zip(outcome.contestant.card.classes, outcome.clean.votes, outcome.adversarial.votes, strict=True)
    rows = [
        (name, index == outcome.label, (clean, adversarial))
        for index, (name, clean, adversarial) in enumerate(counts)
        if clean or adversarial
    ]
    return sorted(rows, key=lambda row: -row[2][0])


def _lines(trace: Sequence[Sequence[float]]) -> list[str]:
    """Return the points of a line for each attempt, as SVG writes them."""
    widest = max(max(map(len, trace)) - 1, 1)
    return [
        " ".join(
            f"{WIDTH * step / widest:.1f},{HEIGHT * (1 - probability):.1f}" for step, probability in enumerate(seen)
        )
        for seen in trace
    ]


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(f"{template}.html.jinja").render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = environment_of("serving.demo")
    environment.globals.update(words=words, wording=wording, findings=findings)
    return environment
