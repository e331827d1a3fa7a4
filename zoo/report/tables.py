"""The sections made of the tables behind results, each kind drawn in its own way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from zoo.bundle import wording
from zoo.bundle.card import Result, Table
from zoo.bundle.wording import capital, measured, number, only, percent, plural, terms, terms_remark
from zoo.report.document import Cell, Exhibit, Grid, Picture, Section
from zoo.report.drawings import Bars, Heat, Lines, Series, Spread, Style
from zoo.report.entries import Entry

_SHARES = ("transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits")
"""Tables of shares, shown as per cent; others are shown as the numbers they are."""
_COST, _ACCURACY = "million MACs, ", "accuracy, "
"""How the columns of a table "budgeted" begin: two for every kind of images."""
_LONG_LABEL = 12
_SHORT_LIST = 8
_LARGE_MATRIX = 64
"""Beyond so many rows or columns a heat map says less than its size costs."""


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
        digits = digits_of(self.result)
        show = (lambda value: percent(value, digits)) if self.shares else number
        return Grid(
            caption=f"{self.title} ({self.table.name})",
            header=(
                Cell(text=f"{self.table.row_axis} \\ {self.table.column_axis}"),
                *(Cell(text=name) for name in columns),
            ),
            rows=tuple(
                (Cell(text=name), *(Cell(text=show(value), value=value) for value in row))
                for name, row in zip(heads, self.values, strict=True)
            ),
            folded=folded,
        )


def digits_of(result: Result) -> int:
    """Return the decimals of the per cents in a result's tables."""
    return wording.digits_for(result.images)


class Tabled:
    """The sections made of the tables behind results."""

    def __init__(self, entries: Sequence[Entry], named: Callable[[str], str]) -> None:
        self.named = named
        self.found = [
            Found(entry=entry, result=result, table=table)
            for entry in entries
            for result in entry.results
            for table in result.tables
            if table.rows and table.columns
        ]

    def of(self, name: str) -> list[Found]:
        """Return the tables of one name that can be drawn."""
        return [found for found in self.found if found.table.name == name and found.shares]

    def grouped(self, name: str) -> Iterator[tuple[str, list[Found]]]:
        """Yield the tables of one name by what was measured, so that models stand side by side."""
        groups: dict[str, list[Found]] = {}
        for found in self.of(name):
            groups.setdefault(found.context, []).append(found)
        yield from groups.items()

    def others(self) -> Section:
        """Tables of another name, or with other numbers than shares."""
        drawn = [name for name in _SHARES if name != "draws"]
        plain = [
            found
            for found in self.found
            if (found.table.name not in drawn or not found.shares) and not _budgets_of(found)
        ]
        return Section(
            key="tables",
            title="Other tables",
            intro="What else the measurements have left, as it stands in the cards.",
            exhibits=tuple(
                Exhibit(
                    title=f"{capital(found.table.name)} of {found.title}", grids=(found.grid(),), remarks=found.remarks
                )
                for found in plain
            ),
        )

    def steps(self) -> Section:
        """Accuracy against the attack's steps."""
        exhibits = [self._curves(context, group) for context, group in self.grouped("steps")]
        return Section(
            key="steps",
            title="Accuracy against steps",
            intro="A curve that still falls at its right end belongs to an attack that needs more steps, and the "
            "accuracy above it is too high.",
            exhibits=tuple(exhibits),
        )

    def _curves(self, context: str, group: list[Found]) -> Exhibit:
        names = list(dict.fromkeys(name for found in group for name in found.table.columns))
        places = _steps_scale(names)
        ordered = sorted(names, key=lambda name: places[name])
        rows_named = {row for found in group for row in found.table.rows}
        common = only(rows_named)
        labels = _labels(group)
        series, rows = [], []
        for found, label_of in zip(group, labels, strict=True):
            for index, (row, values) in enumerate(zip(found.table.rows, found.values, strict=True)):
                known = dict(zip(found.table.columns, values, strict=True))
                label = label_of if common else f"{label_of}, {row}"
                columns = [name for name in ordered if name in known]
                series.append(
                    Series(
                        label=label,
                        style=Style(
                            colour=found.entry.style.colour, dash=found.entry.style.dash + index, hollow=index > 0
                        ),
                        at=tuple(places[name] for name in columns),
                        values=tuple(known[name] for name in columns),
                    )
                )
                cells = [Cell(text=percent(known.get(name)), value=known.get(name)) for name in ordered]
                rows.append((Cell(text=label), *cells))
        axis = group[0].table.column_axis
        remarks = [f"Each curve: {common}."] if common else []
        remarks.append(terms_remark(found.result for found in group))
        return Exhibit(
            title=capital(context),
            picture=Picture(
                name=self.named(f"steps {context}"),
                alt=f"Line chart: accuracy from 0 to 100 % against {axis}, up to {ordered[-1]}, for "
                f"{plural(len(series), 'series', 'series')}; its numbers are in the table beside it.",
                drawing=Lines(axis=axis, ticks=tuple((places[name], name) for name in ordered), series=tuple(series)),
            ),
            grids=(
                Grid(
                    caption=f"{capital(context)}: accuracy against {axis}",
                    header=(Cell(text="Model"), *(Cell(text=name) for name in ordered)),
                    rows=tuple(rows),
                ),
            ),
            remarks=tuple(remarks),
        )

    def transfer(self) -> Section:
        """Heat maps."""
        exhibits = []
        for found in self.of("transfer"):
            table = found.table
            rows, columns = found.labels
            exhibits.append(
                Exhibit(
                    title=found.title,
                    picture=None
                    if max(len(rows), len(columns)) > _LARGE_MATRIX
                    else Picture(
                        name=self.named(f"transfer {_short(found)}"),
                        alt=f"Heat map of {len(rows)} by {len(columns)} accuracies in per cent, {table.row_axis} by "
                        f"{table.column_axis}; its numbers are in the table beside it.",
                        drawing=Heat(
                            row_axis=table.row_axis,
                            column_axis=table.column_axis,
                            rows=rows,
                            columns=columns,
                            values=found.values,
                        ),
                    ),
                    grids=(found.grid(),),
                    remarks=found.remarks,
                )
            )
        return Section(
            key="transfer",
            title="Attacks carried from one network to another",
            intro="What is left (per cent) of the network in the column when the attack was made on the one in the "
            "row. High off the diagonal: attacks do not transfer. All figures have the same scale.",
            exhibits=tuple(exhibits),
        )

    def paths(self) -> Section:
        """How paths differ."""
        exhibits = []
        for context, group in self.grouped("paths"):
            for name in dict.fromkeys(name for found in group for name in found.table.columns):
                members = [found for found in group if name in found.table.columns]
                exhibits.append(self._spread(f"{capital(context)}: {name}", name, members))
        return Section(
            key="paths",
            title="Spread over paths",
            intro="Each point is one path; the box spans the middle half, its bar is the median, the line reaches from "
            "the worst path to the best.",
            exhibits=tuple(exhibits),
        )

    def _spread(self, title: str, column: str, group: list[Found]) -> Exhibit:
        usual = wording.usual_terms(found.result for found in group)
        series, rows = [], []
        for found in group:
            at = found.table.columns.index(column)
            values = [row[at] for row in found.values]
            series.append(Series(label=found.entry.name, style=found.entry.style, values=tuple(values)))
            known = sorted(value for value in values if value is not None)
            figures = [_quantile(known, share) for share in (0, 0.25, 0.5, 0.75, 1)]
            mean = sum(known) / len(known) if known else None
            shown = [Cell(text=percent(value), value=value) for value in (*figures, mean)]
            differs = wording.apart(found.result, usual)
            rows.append((Cell(text=found.entry.name, apart=differs), Cell(text=str(len(known))), *shown))
        header = ("Model", "paths", "worst", "lower quartile", "median", "upper quartile", "best", "mean")
        return Exhibit(
            title=title,
            picture=Picture(
                name=self.named(f"paths {title}"),
                alt=f"Strip and box chart: the accuracies of the paths of {plural(len(series), 'variant')}; their "
                "quartiles are in the table beside it.",
                drawing=Spread(axis=f"accuracy: {column}", series=tuple(series)),
            ),
            grids=(
                Grid(
                    caption=f"{title}: quartiles over paths",
                    header=tuple(Cell(text=name) for name in header),
                    rows=tuple(rows),
                ),
                *(found.grid(folded=True) for found in group if column == found.table.columns[-1]),
            ),
            remarks=_shared_remarks(group),
        )

    def corruptions(self) -> Section:
        """Mean accuracy per corruption."""
        exhibits = []
        for context, group in self.grouped("corruptions"):
            means = [[_mean(row) for row in found.values] for found in group]
            names = list(dict.fromkeys(name for found in group for name in found.table.rows))
            by_name = [dict(zip(found.table.rows, mean, strict=True)) for found, mean in zip(group, means, strict=True)]
            overall = [_mean(mean) for mean in means]
            labels = _labels(group)
            series = [
                Series(
                    label=label,
                    style=found.entry.style,
                    values=(*(known.get(name) for name in names), mean),
                )
                for label, found, known, mean in zip(labels, group, by_name, overall, strict=True)
            ]
            exhibits.append(
                Exhibit(
                    title=capital(context),
                    picture=Picture(
                        name=self.named(context),
                        alt=f"Bar chart: mean accuracy over severities under each of {len(names)} corruptions, and "
                        f"their mean, for {plural(len(group), 'variant')}; its numbers are in the table beside it.",
                        drawing=Bars(categories=(*names, "mean"), series=tuple(series)),
                    ),
                    grids=(
                        _comparison(
                            f"{capital(context)}: mean over severities", "Corruption", (*names, "mean"), series
                        ),
                        *(found.grid(folded=True) for found in group),
                    ),
                    remarks=_shared_remarks(group),
                )
            )
        return Section(
            key="corruptions",
            title="Common corruptions",
            intro="Accuracy under noise, blur, weather and digital changes that nobody chose to fool the network.",
            exhibits=tuple(exhibits),
        )

    def sources(self) -> Section:
        """Black-box attacks per surrogate."""
        return Section(
            key="sources",
            title="Black-box attacks by surrogate",
            intro="On which surrogate the transferred images were made. An image counts only if all of its versions "
            "are answered correctly.",
            exhibits=tuple(
                self._by_category(capital(context), group, "sources", last=True)
                for context, group in self.grouped("sources")
            ),
        )

    def attacks(self) -> Section:
        """Attack by attack."""
        return Section(
            key="attacks",
            title="Attack by attack",
            intro="What each attack alone leaves. The accuracy in the summary takes for every image the attack that "
            "served it worst, so it is at most the smallest of these.",
            exhibits=tuple(
                self._by_category(capital(context), group, "attacks", last=False)
                for context, group in self.grouped("attacks")
            ),
        )

    def _by_category(self, title: str, group: list[Found], kind: str, *, last: bool) -> Exhibit:
        """Show one column of tables row by row; of a table with a single row, that row column by column."""
        shown: list[dict[str, float | None]] = []
        drawn, whole = [], []
        for found in group:
            if len(found.table.rows) == 1 and not last:
                shown.append(dict(zip(found.table.columns, found.values[0], strict=True)))
            else:
                at = len(found.table.columns) - 1 if last else 0
                shown.append({row: values[at] for row, values in zip(found.table.rows, found.values, strict=True)})
                drawn.append(found.table.columns[at])
                whole.append(found.grid(folded=True))
        names = tuple(dict.fromkeys(name for known in shown for name in known))
        series = [
            Series(label=label, style=found.entry.style, values=tuple(known.get(name) for name in names))
            for label, found, known in zip(_labels(group), group, shown, strict=True)
        ]
        columns = ", ".join(dict.fromkeys(drawn))
        remarks = (f"The figure shows the column “{columns}”.",) if columns else ()
        compared = _comparison(f"{title}{': ' if columns else ''}{columns}", kind[:-1].capitalize(), names, series)
        return Exhibit(
            title=title,
            picture=Picture(
                name=self.named(f"{kind} {title}"),
                alt=f"Bar chart: accuracy for each of {plural(len(names), 'row')} and "
                f"{plural(len(series), 'variant')}; its numbers are in the table beside it.",
                drawing=Bars(categories=names, series=tuple(series)),
            ),
            grids=(compared, *whole) if len(group) > 1 else (group[0].grid(),),
            remarks=(*remarks, *_shared_remarks(group)),
        )

    def exits(self) -> Section:
        """Accuracy at every exit."""
        exhibits = []
        for found in self.of("exits"):
            places = _positions(found.table.columns) or dict(
                zip(found.table.columns, map(float, range(len(found.table.columns))), strict=True)
            )
            ordered = sorted(found.table.columns, key=lambda name: places[name])
            series = [
                Series(
                    label=row,
                    style=Style(colour=index, dash=index),
                    at=tuple(places[name] for name in ordered),
                    values=tuple(dict(zip(found.table.columns, values, strict=True))[name] for name in ordered),
                )
                for index, (row, values) in enumerate(zip(found.table.rows, found.values, strict=True))
            ]
            exhibits.append(
                Exhibit(
                    title=found.title,
                    picture=Picture(
                        name=self.named(f"exits {_short(found)}"),
                        alt=f"Line chart: accuracy from 0 to 100 % at each of {len(ordered)} exits for "
                        f"{plural(len(series), 'attack')}; its numbers are in the table beside it.",
                        drawing=Lines(
                            axis=found.table.column_axis,
                            ticks=tuple((places[name], name) for name in ordered),
                            series=tuple(series),
                        ),
                    ),
                    grids=(found.grid(),),
                    remarks=found.remarks,
                )
            )
        return Section(
            key="exits",
            title="Accuracy at every exit",
            intro="Of a network that may answer early. The row “single” attacks each exit for itself.",
            exhibits=tuple(exhibits),
        )

    def budgeted(self) -> Section:
        """Accuracy against what an answer costs in the mean."""
        exhibits = []
        for found in self.found:
            curves = _budgets_of(found)
            if not curves:
                continue
            costs = [cost for points in curves.values() for cost, _ in points]
            low, high = min(costs), max(costs)
            places = dict.fromkeys(low + (high - low) * index / 4 for index in range(5))
            exhibits.append(
                Exhibit(
                    title=found.title,
                    picture=Picture(
                        name=self.named(f"budgeted {_short(found)}"),
                        alt="Line chart: accuracy from 0 to 100 % against the mean cost of an answer, for "
                        f"{plural(len(curves), 'kind')} of images; its numbers are in the table beside it.",
                        drawing=Lines(
                            axis="million multiply-accumulates per answer, mean",
                            ticks=tuple((place, number(place)) for place in places),
                            series=tuple(
                                Series(
                                    label=name,
                                    style=Style(colour=index, dash=index),
                                    at=tuple(cost for cost, _ in points),
                                    values=tuple(accuracy for _, accuracy in points),
                                )
                                for index, (name, points) in enumerate(curves.items())
                            ),
                        ),
                    ),
                    grids=(found.grid(folded=True),),
                    remarks=found.remarks,
                )
            )
        return Section(
            key="budgeted",
            title="Accuracy at a mean cost",
            intro="Every image leaves at the first exit that is sure enough; a point is one choice of how sure.",
            exhibits=tuple(exhibits),
        )


def _budgets_of(found: Found) -> dict[str, list[tuple[float, float]]]:
    """Return (cost, accuracy) in order of cost, by what the images are; empty if it is no table "budgeted" to draw."""
    columns = found.table.columns
    if found.table.name != "budgeted":
        return {}
    curves = {}
    for cost, accuracy in itertools.pairwise(range(len(columns))):
        name = columns[cost].removeprefix(_COST)
        if name == columns[cost] or columns[accuracy] != _ACCURACY + name:
            continue
        points = [(row[cost], row[accuracy]) for row in found.values]
        known = [(x, y) for x, y in points if x is not None and y is not None and x >= 0 and 0 <= y <= 1]
        if len(known) == len(points):
            curves[name] = sorted(known)
    return curves if 2 * len(curves) == len(columns) else {}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return a quantile of sorted values, linear between neighbours; None of nothing."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _positions(names: Sequence[str]) -> dict[str, float] | None:
    """Return column names as numbers; None if one of them is no number of 0 or more."""
    try:
        places = {name: float(name) for name in names}
    except ValueError:
        return None
    return places if all(math.isfinite(place) and place >= 0 for place in places.values()) else None


def _steps_scale(names: Sequence[str]) -> dict[str, float]:
    """Return where each number of steps stands: on a logarithmic axis that has room for 0, or in the order given."""
    places = _positions(names)
    if places is None:
        return {name: float(index) for index, name in enumerate(names)}
    return {name: math.log1p(place) for name, place in places.items()}


def _labels(group: Sequence[Found]) -> list[str]:
    """Return the names of series, with what is unusual about their terms."""
    usual = wording.usual_terms(found.result for found in group)
    differing = [wording.apart(found.result, usual) for found in group]
    return [
        f"{found.entry.name} ({differs})" if differs else found.entry.name
        for found, differs in zip(group, differing, strict=True)
    ]


def _short(found: Found) -> str:
    """Name a table for a file."""
    return f"{found.entry.model} {found.entry.variant} {found.result.protocol} {found.result.eps_fraction}"


def _shared_remarks(group: Sequence[Found]) -> tuple[str, ...]:
    """Return the terms of a group, and the note if all have the same."""
    note = only(wording.plain(found.result.note) for found in group)
    return (terms_remark(found.result for found in group), *([f"Note: {note}."] if note else []))


def _comparison(caption: str, corner: str, categories: Sequence[str], series: Sequence[Series]) -> Grid:
    """Return the numbers of a figure: the longer of the two lists goes down the page."""
    if len(categories) <= _SHORT_LIST:
        header = ("Model", *categories)
        rows = [(each.label, each.values) for each in series]
    else:
        header = (corner, *(each.label for each in series))
        columns = zip(*(each.values for each in series), strict=True)
        rows = list(zip(categories, columns, strict=True))
    return Grid(
        caption=caption,
        header=tuple(Cell(text=name) for name in header),
        rows=tuple((Cell(text=name), *(Cell(text=percent(value), value=value) for value in row)) for name, row in rows),
    )
