"""The rows and series of a report, every variant of every model, and the tables behind their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zoo.bundle import findings, wording
from zoo.bundle.card import Card, Lint, Result, Table
from zoo.bundle.wording import MISSING, SUSPECT, measured, number, only, slug, terms, terms_remark
from zoo.report.document import Cell, Grid, grid, share
from zoo.report.drawings import Series, Style
from zoo.vocabulary import INT8, MEASURED_VARIANTS, VARIANTS

_SHARES = ("transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits")
"""Tables of shares, shown as per cent; others are shown as the numbers they are."""
_LONG_LABEL = 12


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

    @property
    def cost(self) -> Cell:
        """The cell of `passes`."""
        return Cell(text=MISSING if self.passes is None else str(self.passes), value=self.passes)


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


def curve(label: str, style: Style, results: Sequence[Result]) -> Series:
    """Return accuracies against eps, with their intervals."""
    return Series(
        label=label,
        style=style,
        at=tuple(result.eps for result in results),
        values=tuple(result.accuracy for result in results),
        ranges=tuple(result.interval for result in results),
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """A table, the result it stands behind, and whose it is."""

    entry: Entry
    result: Result
    table: Table

    @property
    def values(self) -> tuple[tuple[float | None, ...], ...]:
        """The table's numbers; what is not finite was not measured."""
        return tuple(
            tuple(value if value is not None and math.isfinite(value) else None for value in row)
            for row in self.table.values
        )

    @property
    def shares(self) -> bool:
        """Whether it holds shares and nothing else."""
        return self.table.name in _SHARES and all(
            value is None or 0 <= value <= 1 for row in self.values for value in row
        )

    @property
    def context(self) -> str:
        """The measurement without the model: "white-box PGD, ε 1/100, on cifar10"."""
        said = [measured(self.result), wording.eps(self.result), f"on {self.entry.card.dataset}"]
        return ", ".join(part for part in said if part)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The terms, and what the measurement itself has to say."""
        note = wording.plain(self.result.note)
        return (f"Terms: {terms(self.result)}.", *([f"Note: {note}."] if note else []))

    @property
    def labels(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of rows and columns; numbers if both are the same long ones, as paths are."""
        rows, columns = self.table.rows, self.table.columns
        if rows != columns or all(len(name) <= _LONG_LABEL for name in rows):
            return rows, columns
        numbers = tuple(str(index + 1) for index in range(len(rows)))
        return numbers, numbers

    def grid(self, *, folded: bool = False) -> Grid:
        """The table as it stands in the card; where names are numbered, the row says which is which."""
        rows, columns = self.labels
        heads = [name if name == row else f"{row}: {name}" for name, row in zip(self.table.rows, rows, strict=True)]
        digits = wording.digits_for(self.result.images)

        def show(value: float | None) -> Cell:
            return share(value, digits) if self.shares else Cell(text=number(value), value=value)

        return grid(
            f"{self.entry.name}: {self.context} ({self.table.name})",
            (f"{self.table.row_axis} \\ {self.table.column_axis}", *columns),
            ((name, *map(show, row)) for name, row in zip(heads, self.values, strict=True)),
            folded=folded,
        )


def tables_of(entries: Sequence[Entry]) -> list[Found]:
    """Return every table that has rows and columns."""
    return [
        Found(entry=entry, result=result, table=table)
        for entry in entries
        for result in entry.results
        for table in result.tables
        if table.rows and table.columns
    ]


def grouped(found: Sequence[Found], name: str) -> Iterator[tuple[str, list[Found]]]:
    """Yield the tables of shares of one name by what was measured, so that models stand side by side."""
    groups: dict[str, list[Found]] = {}
    for each in found:
        if each.table.name == name and each.shares:
            groups.setdefault(each.context, []).append(each)
    yield from groups.items()


def labels_of(group: Sequence[Found]) -> list[str]:
    """Return the names of series, with what is unusual about their terms."""
    usual = wording.usual_terms(found.result for found in group)
    differing = [wording.apart(found.result, usual) for found in group]
    return [
        f"{found.entry.name} ({differs})" if differs else found.entry.name
        for found, differs in zip(group, differing, strict=True)
    ]


def remarks_of(group: Sequence[Found]) -> tuple[str, ...]:
    """Return the terms of a group, and the note if all have the same."""
    note = only(wording.plain(found.result.note) for found in group)
    return (terms_remark(found.result for found in group), *([f"Note: {note}."] if note else []))


def positions(names: Sequence[str]) -> dict[str, float] | None:
    """Return column names as numbers; None if one of them is no number of 0 or more."""
    try:
        places = {name: float(name) for name in names}
    except ValueError:
        return None
    return places if all(math.isfinite(place) and place >= 0 for place in places.values()) else None
