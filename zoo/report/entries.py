"""The rows and series of a report: every variant of every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.bundle import findings
from zoo.bundle.card import Card, Lint, Result
from zoo.bundle.wording import SUSPECT, slug
from zoo.report.document import Cell
from zoo.report.drawings import Style
from zoo.vocabulary import INT8, MEASURED_VARIANTS, VARIANTS


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One variant of one model: a row of the summary, a series of a figure."""

    card: Card
    model: str
    """The card's name, with a number where two cards share it."""
    variant: str
    key: str
    """Of its section in a report."""
    style: Style

    @property
    def name(self) -> str:
        """The series' name, marked if the linter raised an alarm."""
        return f"{self.model} · {self.variant}{SUSPECT if self.suspect else ''}"

    @property
    def lint(self) -> Lint | None:
        """What the linter found; None if it was not asked."""
        return next((lint for lint in self.card.lint if lint.variant == self.variant), None)

    @property
    def results(self) -> tuple[Result, ...]:
        """What was measured of it, in the card's order."""
        return tuple(result for result in self.card.results if result.variant == self.variant)

    @property
    def verdict(self) -> Cell:
        """The linter's verdict in a few words."""
        text, tone = findings.verdict(self.lint)
        return Cell(text=text, tone=tone)

    @property
    def suspect(self) -> bool:
        """Whether the linter raised an alarm, so that the numbers may flatter."""
        return self.variant in self.card.suspect

    @property
    def said(self) -> str:
        """What the variant is: "one path", "3 members averaged"."""
        if self.card.architecture.gated_layers:
            paths = len(self.card.paths.ensemble)
            words = {"single": "one path", "ensemble": f"{paths} paths averaged", "gated": "random gates"}
            return words.get(self.variant, self.variant)
        if "ensemble" in self.card.variants:
            members = "all members" if self.passes is None else f"{self.passes} members averaged"
            return members if self.variant == "ensemble" else "one member"
        return "last exit" if self.card.exits else "the network"

    @property
    def passes(self) -> int | None:
        """Forward passes per image; None where the card does not say how many members an ensemble has."""
        if self.variant.removesuffix(INT8) != "ensemble":
            return 1
        if self.card.paths.ensemble:
            return len(self.card.paths.ensemble)
        whole, one = self.card.architecture.parameters, self.card.architecture.single_path_parameters
        return whole // one if not self.card.architecture.gated_layers and whole % one == 0 else None


def entries_of(cards: Sequence[Card]) -> list[Entry]:
    """Return every variant that a card exports or has results of; a card given twice counts once."""
    distinct = [card for index, card in enumerate(cards) if card not in cards[:index]]
    entries: list[Entry] = []
    for index, card in enumerate(distinct):
        same = sum(other.name == card.name for other in distinct[:index])
        model = f"{card.name} ({same + 1})" if same else card.name
        named = dict.fromkeys([*card.variants, *(result.variant for result in card.results)])
        for variant in sorted(named, key=lambda name: (*MEASURED_VARIANTS, name).index(name)):
            dash = (*VARIANTS, variant).index(variant)
            style = Style(colour=index if len(distinct) > 1 else dash, dash=dash)
            key = slug(f"variant {model} {variant}", (entry.key for entry in entries))
            entries.append(Entry(card=card, model=model, variant=variant, key=key, style=style))
    return entries
