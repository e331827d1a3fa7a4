"""The tables behind results, with whose they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zoo.bundle import wording
from zoo.bundle.card import Result, Table
from zoo.bundle.wording import measured, number, only, terms, terms_remark
from zoo.report.document import Cell, Grid, grid, share
from zoo.report.entries import Entry

_SHARES = ("transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits")
"""Tables of shares, shown as per cent; others are shown as the numbers they are."""
_LONG_LABEL = 12


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
    def title(self) -> str:
        """The model and the measurement."""
        return f"{self.entry.name}: {self.context}"

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
        show = (
            (lambda value: share(value, digits))
            if self.shares
            else (lambda value: Cell(text=number(value), value=value))
        )
        return grid(
            f"{self.title} ({self.table.name})",
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
