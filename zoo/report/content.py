"""What stands in a report: sections of tables and figures made from cards, before any HTML or Markdown.

Unlike things are kept apart: data sets, protocols, attacks and norms have tables and figures of their own, and where
results in one of them differ in images, steps, restarts, draws or seed, the terms stand beside each number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from zoo.card import VARIANTS, Card, Lint, Result, Table
from zoo.report import wording
from zoo.report.figures import Bars, Drawing, Heat, Lines, Series, Spread, Style
from zoo.report.wording import FAILED, MISSING, SUSPECT, measured, number, percent, terms

_NOT_DEPLOYED = ("transfer-matrix", "diversity")
"""Their accuracies are of pairs of paths, on images that all answer: not what a deployed variant answers correctly."""
_SHARES = ("transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits")
"""Tables of shares, shown as per cent; others are shown as the numbers they are."""
_WIDE = 9
"""More columns of accuracies under attack than this go into a further table."""
_CLEAN = "clean"
_UNLESS = ", unless said otherwise"
_LONG_LABEL = 12
_SHORT_LIST = 8
_LARGE_MATRIX = 64
"""Beyond so many rows or columns a heat map says less than its size costs."""
_TONES = {"ok": "good", "alarm": "alarm", "skipped": "unknown"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table; `detail` is a second, smaller line."""

    text: str
    detail: str = ""
    apart: str = ""
    """How its terms differ from those of its neighbours; must not be overlooked."""
    value: float | None = None
    """The exact number behind the text."""
    tone: str = ""
    """"good", "alarm" or "unknown" for a verdict; said in words as well."""
    span: int = 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; the first `headings` columns name the row."""

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    groups: tuple[Cell, ...] = ()
    """A row above the header whose cells span several columns."""
    headings: int = 1
    folded: bool = False
    """Whether it is long and of use to few, so that it may be shown on demand."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and its text alternative; `name` is that of its files."""

    name: str
    alt: str
    drawing: Drawing


@dataclass(frozen=True, kw_only=True)
class Command:
    """A line for a shell, and what it measures."""

    about: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A figure with its numbers beside it, or tables alone."""

    title: str = ""
    picture: Picture | None = None
    grids: tuple[Grid, ...] = ()
    remarks: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report."""

    key: str
    title: str
    intro: str
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Every figure with its title."""
        for section in self.sections:
            for exhibit in section.exhibits:
                if exhibit.picture is not None:
                    yield exhibit.title, exhibit.picture


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One variant of one model: a row of the summary, a series of a figure."""

    card: Card
    model: str
    """The card's name, with a number where two cards share it."""
    variant: str
    style: Style

    @property
    def name(self) -> str:
        """The series' name, marked if the linter raised an alarm."""
        return f"{self.model} · {self.variant}{SUSPECT if self.variant in self.card.suspect else ''}"

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
        """The linter's verdict in words."""
        if self.lint is None:
            return Cell(text="not linted", tone="unknown")
        if self.lint.alarms:
            codes = ", ".join(finding.code for finding in self.lint.alarms)
            return Cell(text=f"linter: {_plural(len(self.lint.alarms), 'alarm')} ({codes})", tone="alarm")
        if all(finding.verdict == "skipped" for finding in self.lint.findings):
            return Cell(text="linter: nothing applied", tone="unknown")
        return Cell(text="linter: no alarm", tone="good")

    @property
    def passes(self) -> int | None:
        """Forward passes per image; None where the card does not say how many members an ensemble has."""
        if self.variant != "ensemble":
            return 1
        if self.card.paths.ensemble:
            return len(self.card.paths.ensemble)
        whole, one = self.card.architecture.parameters, self.card.architecture.single_path_parameters
        return whole // one if not self.card.architecture.gated_layers and whole % one == 0 else None


def entries_of(cards: Sequence[Card]) -> list[Entry]:
    """Return every variant that a card exports or has results of; a card given twice counts once."""
    distinct = [card for index, card in enumerate(cards) if card not in cards[:index]]
    entries = []
    for index, card in enumerate(distinct):
        same = sum(other.name == card.name for other in distinct[:index])
        model = f"{card.name} ({same + 1})" if same else card.name
        named = dict.fromkeys([*card.variants, *(result.variant for result in card.results)])
        for variant in sorted(named, key=lambda name: (VARIANTS.index(name) if name in VARIANTS else 9, name)):
            dash = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            style = Style(colour=index if len(distinct) > 1 else dash, dash=dash)
            entries.append(Entry(card=card, model=model, variant=variant, style=style))
    return entries


def report_of(cards: Sequence[Card], *, title: str) -> Report:
    """Return the report of cards; a section for which no card has data is left out."""
    entries = entries_of(cards)
    names: list[str] = []

    def named(text: str) -> str:
        names.append(wording.slug(text, names))
        return names[-1]

    tabled = _Tabled(entries, named)
    sections = [
        _summary(entries),
        _against_eps(entries, named),
        tabled.steps(),
        tabled.transfer(),
        tabled.paths(),
        tabled.corruptions(),
        tabled.sources(),
        tabled.attacks(),
        tabled.exits(),
        tabled.others(),
        _lint(entries),
        _models(entries),
        _every_result(entries),
        _repeat(entries),
    ]
    models = len({entry.model for entry in entries})
    results = [result for entry in entries for result in entry.results]
    dates = sorted({result.date for result in results})
    when = "" if not dates else f", measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    return Report(
        title=title,
        subtitle=f"{_plural(models, 'model')}, {_plural(len(entries), 'variant')}, "
        f"{_plural(len(results), 'result')}{when}",
        sections=tuple(section for section in sections if section is not None and section.exhibits),
    )


# The summary


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One attack at one eps."""

    order: int
    group: str
    eps: Fraction
    text: str

    @classmethod
    def of(cls, result: Result) -> _Column:
        known = wording.PROTOCOL_ORDER
        return cls(
            order=known.index(result.protocol) if result.protocol in known else len(known),
            group=measured(result),
            eps=Fraction(result.eps_fraction),
            text=f"ε {Fraction(result.eps_fraction)}" if result.eps else "",
        )

    def key(self) -> tuple[int, str, Fraction]:
        return self.order, self.group, self.eps


def summary_grids(entries: Sequence[Entry], *, compact: bool = False) -> list[Grid]:
    """Return the accuracies side by side: a table per data set, or several where there are many attacks.

    Args:
        entries: the rows.
        compact: leave out the intervals and the costs and never split, for a README.
    """
    grids = []
    for dataset in dict.fromkeys(entry.card.dataset for entry in entries):
        rows = [entry for entry in entries if entry.card.dataset == dataset]
        found = {_Column.of(result) for entry in rows for result in _deployed(entry)}
        columns = sorted(found, key=_Column.key)
        parts = [columns] if compact else _parts(columns)
        for index, part in enumerate(parts):
            # a table after the first only has the rows that it says something of
            said = [
                entry for entry in rows if any(_Column.of(r) in part for r in _deployed(entry) if measured(r) != _CLEAN)
            ]
            about = f"Accuracy on {dataset}" + (f", continued ({index + 1} of {len(parts)})" if index else "")
            grids.append(_summary_grid(said if index else rows, part, about, compact=compact, costs=not index))
    return grids


def _parts(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Split columns between attacks into tables that fit a page; each begins with the clean accuracy."""
    clean = [column for column in columns if column.group == _CLEAN]
    parts: list[list[_Column]] = [[]]
    for group in dict.fromkeys(column.group for column in columns if column.group != _CLEAN):
        members = [column for column in columns if column.group == group]
        if parts[-1] and len(parts[-1]) + len(members) > _WIDE:
            parts.append([])
        parts[-1] += members
    return [[*clean, *part] for part in parts]


def _summary_grid(
    entries: Sequence[Entry], columns: Sequence[_Column], caption: str, *, compact: bool, costs: bool
) -> Grid:
    by_group: dict[str, list[Result]] = {}
    for entry in entries:
        for result in _deployed(entry):
            by_group.setdefault(measured(result), []).append(result)
    usual = {group: wording.usual_terms(results) for group, results in by_group.items()}
    groups, header = [Cell(text="", span=2)], [Cell(text="Model"), Cell(text="Variant")]
    for group in dict.fromkeys(column.group for column in columns):
        members = [column for column in columns if column.group == group]
        differ = any(terms(result) != usual[group] for result in by_group[group])
        groups.append(Cell(text=group, detail=usual[group] + (_UNLESS if differ else ""), span=len(members)))
        header += [Cell(text=column.text or "accuracy") for column in members]
    rows = []
    for entry in entries:
        # in a README the linter has a column of its own
        cells = [Cell(text=entry.model, detail="" if compact else entry.card.method), _variant_cell(entry, compact)]
        for column in columns:
            there = [result for result in _deployed(entry) if _Column.of(result) == column]
            cells.append(_accuracy_cell(entry, there, usual=usual[column.group], compact=compact))
        rows.append((*cells, *([entry.verdict] if compact else _costs(entry) if costs else [])))
    if compact:
        header.append(Cell(text="Linter"))
        groups.append(Cell(text=""))
    elif costs:
        header += [Cell(text="parameters", detail="one path / all"), Cell(text="passes", detail="per image")]
        groups.append(Cell(text="cost", span=2))
    return Grid(caption=caption, groups=tuple(groups), header=tuple(header), rows=tuple(rows), headings=2)


def _variant_cell(entry: Entry, compact: bool) -> Cell:
    if compact:
        return Cell(text=entry.variant)
    return Cell(text=entry.variant, detail=entry.verdict.text, tone=entry.verdict.tone)


def _deployed(entry: Entry) -> Iterator[Result]:
    return (result for result in entry.results if result.protocol not in _NOT_DEPLOYED)


def _accuracy_cell(entry: Entry, results: Sequence[Result], *, usual: str = "", compact: bool = False) -> Cell:
    """Return one accuracy (or several of the same attack) with its marks, its interval, and where its terms differ.

    Args:
        entry: whose results these are.
        results: of one attack at one eps.
        usual: the terms that are said elsewhere; empty if the cell need not say how its own differ.
        compact: leave out the interval.
    """
    if not results:
        return Cell(text=MISSING)
    differing = [wording.apart(result, usual) if usual else "" for result in results]
    return Cell(
        text=" / ".join(f"{wording.accuracy(result)}{_marks(entry, result)}" for result in results),
        detail="" if compact else " / ".join(map(wording.interval, results)),
        apart=" / ".join(said or "usual terms" for said in differing) if any(differing) else "",
        value=results[0].accuracy if len(results) == 1 else None,
        tone="alarm" if any(_marks(entry, result) for result in results) else "",
    )


def _marks(entry: Entry, result: Result) -> str:
    failed = any(not check.held for check in result.checks)
    marks = (FAILED if failed else "") + (SUSPECT if entry.variant in entry.card.suspect else "")
    return f" {marks}" if marks else ""


def _costs(entry: Entry) -> tuple[Cell, Cell]:
    architecture = entry.card.architecture
    return (
        Cell(text=f"{architecture.single_path_parameters:,}", detail=f"{architecture.parameters:,}"),
        Cell(text=MISSING if entry.passes is None else str(entry.passes), value=entry.passes),
    )


def legend(entries: Sequence[Entry]) -> list[str]:
    """Return what the marks in these entries' tables mean; only the marks that occur."""
    said = []
    if any(not check.held for entry in entries for result in entry.results for check in result.checks):
        said.append(f"{FAILED} A check of this measurement did not hold, so the number may be wrong.")
    if any(entry.variant in entry.card.suspect for entry in entries):
        said.append(
            f"{SUSPECT} The robustness linter raised an alarm: the numbers of this variant may flatter it, because the "
            "attacks may have failed for reasons other than robustness."
        )
    if any(entry.lint is None for entry in entries):
        said.append("“not linted”: nobody has asked the robustness linter about this variant; run manygates lint.")
    if any(Cell(text=MISSING) in row for grid in summary_grids(entries) for row in grid.rows):
        said.append(f"{MISSING} Not measured.")
    return said


def _summary(entries: Sequence[Entry]) -> Section:
    left_out = sorted({measured(r) for e in entries for r in e.results if r.protocol in _NOT_DEPLOYED})
    remarks = legend(entries)
    if left_out:
        remarks.append(f"Not in this table, as they say nothing about a deployed variant alone: {'; '.join(left_out)}.")
    grids = tuple(summary_grids(entries))
    return Section(
        key="summary",
        title="Summary",
        intro="The share of test images that is answered correctly: as they are (clean), and after an attack that may "
        "move each pixel by ε (1 is black to white). Small print: the 95 % interval in per cent. Compare within a "
        "column, and only on equal terms. Passes are forward passes per image, the cost relative to one path.",
        exhibits=(Exhibit(grids=grids, remarks=tuple(remarks)),),
    )


# Accuracy against eps


def _against_eps(entries: Sequence[Entry], named: Callable[[str], str]) -> Section:
    panels: dict[tuple[str, int, str], list[tuple[Entry, Result]]] = {}
    for entry in entries:
        for result in _deployed(entry):
            column = _Column.of(result)
            panels.setdefault((entry.card.dataset, column.order, column.group), []).append((entry, result))
    exhibits = []
    for (dataset, _, group), found in sorted(panels.items(), key=lambda panel: panel[0]):
        clean = _anchored(found[0][1]) and any(_clean(entry) for entry, _ in found)
        if len({result.eps for _, result in found} | ({0.0} if clean else set())) > 1:
            title = f"{_capital(group)} on {dataset}"
            exhibits.append(_eps_exhibit(title, found, named(f"eps {group} {dataset}")))
    return Section(
        key="eps",
        title="Accuracy against ε",
        intro="Each point is one measured accuracy with its 95 % interval; the lines between them only guide the eye. "
        "At ε 0 stands the clean accuracy of the same variant.",
        exhibits=tuple(exhibits),
    )


def _eps_exhibit(title: str, found: Sequence[tuple[Entry, Result]], name: str) -> Exhibit:
    usual = wording.usual_terms(result for _, result in found)
    lines: dict[tuple[str, str], list[Result]] = {}
    owners: dict[str, Entry] = {}
    for entry, result in found:
        owners[entry.name] = entry
        lines.setdefault((entry.name, terms(result)), []).append(result)
    anchored = _anchored(found[0][1])
    places = sorted({Fraction(result.eps_fraction) for _, result in found} | ({Fraction(0)} if anchored else set()))
    series, rows, seen = [], [], set()
    for (label, _), results in lines.items():
        entry = owners[label]
        differs = wording.apart(results[0], usual)
        clean = _clean(entry) if anchored and not any(result.eps == 0 for result in results) else None
        points = sorted([*([clean] if clean else []), *results], key=lambda result: Fraction(result.eps_fraction))
        style = Style(colour=entry.style.colour, dash=entry.style.dash, hollow=label in seen)
        seen.add(label)
        series.append(
            Series(
                label=f"{label} ({differs})" if differs else label,
                style=style,
                at=tuple(point.eps for point in points),
                values=tuple(point.accuracy for point in points),
                ranges=tuple(point.interval for point in points),
            )
        )
        cells = [Cell(text=label, apart=differs)]
        for place in places:
            there = [point for point in points if Fraction(point.eps_fraction) == place]
            cells.append(_accuracy_cell(entry, there))
        rows.append(tuple(cells))
    remarks = [_terms_remark(result for _, result in found)]
    cleans = sorted({terms(clean) for clean in map(_clean, owners.values()) if clean and anchored})
    if cleans:
        remarks.append(f"Clean: {'; '.join(cleans)}.")
    norms = dict.fromkeys(result.norm for _, result in found)
    return Exhibit(
        title=title,
        picture=Picture(
            name=name,
            alt=f"Line chart: accuracy from 0 to 100 % against ε for {_plural(len(series), 'series', 'series')}; "
            "its numbers are in the table beside it.",
            drawing=Lines(
                axis=f"ε ({', '.join(wording.norm(norm) for norm in norms)})",
                ticks=tuple((float(place), str(place)) for place in places),
                series=tuple(series),
            ),
        ),
        grids=(
            Grid(
                caption=f"{title}: accuracy (95 % interval)",
                header=(Cell(text="Model"), *(Cell(text=f"ε {place}" if place else "clean") for place in places)),
                rows=tuple(rows),
            ),
        ),
        remarks=tuple(remarks),
    )


def _anchored(result: Result) -> bool:
    """Say whether clean accuracy is the same measurement at eps 0: over exits an accuracy is a mean, clean is not."""
    return result.protocol != "exits"


def _clean(entry: Entry) -> Result | None:
    """Return the clean result on most images."""
    clean = [result for result in entry.results if result.protocol == "clean" and result.attack == "none"]
    return max(clean, key=lambda result: result.images) if clean else None


# The tables behind the results


@dataclass(frozen=True, kw_only=True)
class _Found:
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


class _Tabled:
    """The sections made of the tables behind results."""

    def __init__(self, entries: Sequence[Entry], named: Callable[[str], str]) -> None:
        self.named = named
        self.found = [
            _Found(entry=entry, result=result, table=table)
            for entry in entries
            for result in entry.results
            for table in result.tables
            if table.rows and table.columns
        ]

    def of(self, name: str) -> list[_Found]:
        """Return the tables of one name that can be drawn."""
        return [found for found in self.found if found.table.name == name and found.shares]

    def grouped(self, name: str) -> Iterator[tuple[str, list[_Found]]]:
        """Yield the tables of one name by what was measured, so that models stand side by side."""
        groups: dict[str, list[_Found]] = {}
        for found in self.of(name):
            groups.setdefault(found.context, []).append(found)
        yield from groups.items()

    def others(self) -> Section:
        """Tables of another name, or with other numbers than shares."""
        drawn = [name for name in _SHARES if name != "draws"]
        plain = [found for found in self.found if found.table.name not in drawn or not found.shares]
        return Section(
            key="tables",
            title="Other tables",
            intro="What else the measurements have left, as it stands in the cards.",
            exhibits=tuple(
                Exhibit(
                    title=f"{_capital(found.table.name)} of {found.title}", grids=(found.grid(),), remarks=found.remarks
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

    def _curves(self, context: str, group: list[_Found]) -> Exhibit:
        names = list(dict.fromkeys(name for found in group for name in found.table.columns))
        places = _steps_scale(names)
        ordered = sorted(names, key=lambda name: places[name])
        rows_named = {row for found in group for row in found.table.rows}
        common = _only(rows_named)
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
        remarks.append(_terms_remark(found.result for found in group))
        return Exhibit(
            title=_capital(context),
            picture=Picture(
                name=self.named(f"steps {context}"),
                alt=f"Line chart: accuracy from 0 to 100 % against {axis}, up to {ordered[-1]}, for "
                f"{_plural(len(series), 'series', 'series')}; its numbers are in the table beside it.",
                drawing=Lines(axis=axis, ticks=tuple((places[name], name) for name in ordered), series=tuple(series)),
            ),
            grids=(
                Grid(
                    caption=f"{_capital(context)}: accuracy against {axis}",
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
                exhibits.append(self._spread(f"{_capital(context)}: {name}", name, members))
        return Section(
            key="paths",
            title="Spread over paths",
            intro="Each point is one path; the box spans the middle half, its bar is the median, the line reaches from "
            "the worst path to the best.",
            exhibits=tuple(exhibits),
        )

    def _spread(self, title: str, column: str, group: list[_Found]) -> Exhibit:
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
                alt=f"Strip and box chart: the accuracies of the paths of {_plural(len(series), 'variant')}; their "
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
                    title=_capital(context),
                    picture=Picture(
                        name=self.named(context),
                        alt=f"Bar chart: mean accuracy over severities under each of {len(names)} corruptions, and "
                        f"their mean, for {_plural(len(group), 'variant')}; its numbers are in the table beside it.",
                        drawing=Bars(categories=(*names, "mean"), series=tuple(series)),
                    ),
                    grids=(
                        _comparison(
                            f"{_capital(context)}: mean over severities", "Corruption", (*names, "mean"), series
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
                self._by_category(_capital(context), group, "sources", last=True)
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
                self._by_category(_capital(context), group, "attacks", last=False)
                for context, group in self.grouped("attacks")
            ),
        )

    def _by_category(self, title: str, group: list[_Found], kind: str, *, last: bool) -> Exhibit:
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
                alt=f"Bar chart: accuracy for each of {_plural(len(names), 'row')} and "
                f"{_plural(len(series), 'variant')}; its numbers are in the table beside it.",
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
                        f"{_plural(len(series), 'attack')}; its numbers are in the table beside it.",
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


# The linter, the models, and how to repeat


def _lint(entries: Sequence[Entry]) -> Section:
    exhibits = []
    for entry in entries:
        lint = entry.lint
        if lint is None:
            continue
        rows = tuple(
            (
                Cell(text=finding.code),
                Cell(text=finding.name),
                Cell(text=finding.verdict, tone=_TONES[finding.verdict]),
                Cell(text=finding.figure),
                Cell(text=finding.meaning),
            )
            for finding in lint.findings
        )
        header = tuple(Cell(text=name) for name in ("Code", "Question", "Verdict", "Figure", "What an alarm means"))
        exhibits.append(
            Exhibit(
                title=f"{entry.name}: {_plural(len(lint.alarms), 'alarm')}",
                grids=(Grid(caption=f"Findings of the linter on {entry.name}", header=header, rows=rows, headings=2),),
                remarks=(f"{_plural(lint.images, 'image')}, seed {lint.seed}, {lint.date}.",),
            )
        )
    failed = tuple(
        (
            Cell(text=entry.name),
            Cell(text=_measured_at(result)),
            Cell(text=check.name, tone="alarm"),
            Cell(text=check.detail),
        )
        for entry in entries
        for result in entry.results
        for check in result.checks
        if not check.held
    )
    if failed:
        header = tuple(Cell(text=name) for name in ("Model", "Measurement", "Check", "Found"))
        exhibits.append(
            Exhibit(
                title="Checks of single measurements that did not hold",
                grids=(Grid(caption="Checks that did not hold", header=header, rows=failed),),
            )
        )
    linted = [entry for entry in entries if entry.lint is not None]
    if len(linted) > 1:
        exhibits.insert(0, _side_by_side(linted))
    missing = [entry.name for entry in entries if entry.lint is None]
    said = f" Not linted: {', '.join(missing)}." if missing and exhibits else ""
    return Section(
        key="lint",
        title="Can these numbers be trusted?",
        intro="The robustness linter asks whether the attacks could have worked: a network that hides its gradient "
        f"looks robust and is not.{said}",
        exhibits=tuple(exhibits),
    )


def _side_by_side(linted: Sequence[Entry]) -> Exhibit:
    """Return the verdicts alone, a row per question."""
    verdicts = [
        {(finding.code, finding.name): finding.verdict for finding in entry.lint.findings}
        for entry in linted
        if entry.lint is not None
    ]
    questions = dict.fromkeys(question for known in verdicts for question in known)
    rows = tuple(
        (
            Cell(text=code),
            Cell(text=name),
            *(
                Cell(text=known.get((code, name), MISSING), tone=_TONES.get(known.get((code, name), ""), ""))
                for known in verdicts
            ),
        )
        for code, name in questions
    )
    header = (Cell(text="Code"), Cell(text="Question"), *(Cell(text=entry.name) for entry in linted))
    return Exhibit(
        title="Verdicts side by side",
        grids=(Grid(caption="Verdicts side by side", header=header, rows=rows, headings=2),),
    )


def _models(entries: Sequence[Entry]) -> Section:
    rows = []
    for model in dict.fromkeys(entry.model for entry in entries):
        card = next(entry.card for entry in entries if entry.model == model)
        training = card.training
        rows.append(
            (
                Cell(text=model, detail=card.description),
                Cell(text=card.method),
                Cell(text=card.architecture.name, detail=_gates(card)),
                Cell(text=card.dataset),
                Cell(
                    text=training.summary or MISSING,
                    detail=f"seed {training.seed}, commit {training.commit or MISSING}, {training.date}",
                ),
                Cell(text=card.license),
            )
        )
    header = ("Model", "Method", "Architecture", "Data set", "Training", "Licence")
    return Section(
        key="models",
        title="The models",
        intro="",
        exhibits=(
            Exhibit(
                grids=(Grid(caption="The models", header=tuple(Cell(text=name) for name in header), rows=tuple(rows)),)
            ),
        ),
    )


def _gates(card: Card) -> str:
    gates, candidates = len(card.architecture.gated_layers), card.architecture.candidates
    return f"{_plural(gates, 'gated layer')} of {candidates} candidates" if gates else "no gates"


def _every_result(entries: Sequence[Entry]) -> Section:
    rows = []
    for entry in entries:
        for result in entry.results:
            held = sum(check.held for check in result.checks)
            rows.append(
                (
                    Cell(text=entry.name),
                    Cell(text=_measured_at(result)),
                    _accuracy_cell(entry, [result]),
                    Cell(text=terms(result)),
                    Cell(text=f"{held} of {len(result.checks)} held" if result.checks else MISSING),
                    Cell(text=wording.plain(result.note) or MISSING),
                    Cell(text=result.date),
                )
            )
    header = ("Model", "Measurement", "Accuracy", "Terms", "Checks", "Note", "Date")
    grid = Grid(caption="Every result", header=tuple(Cell(text=name) for name in header), rows=tuple(rows))
    return Section(
        key="results",
        title="Every result and its terms",
        intro="",
        exhibits=(Exhibit(grids=(grid,)),) if rows else (),
    )


def _repeat(entries: Sequence[Entry]) -> Section:
    exhibits = []
    for entry in entries:
        lines: dict[str, list[str]] = {}
        for result in entry.results:
            lines.setdefault(wording.plain(result.command), []).append(_measured_at(result))
        if entry.lint is not None:
            lines.setdefault(wording.plain(entry.lint.command), []).append("the linter")
        commands = tuple(
            Command(about="; ".join(dict.fromkeys(about)), line=line) for line, about in lines.items() if line
        )
        if commands:
            exhibits.append(Exhibit(title=entry.name, commands=commands))
    return Section(
        key="repeat",
        title="How to repeat",
        intro="Every number above came from one of these commands.",
        exhibits=tuple(exhibits),
    )


# Small things


def _measured_at(result: Result) -> str:
    return ", ".join(part for part in (measured(result), wording.eps(result)) if part)


def _only(values: Iterable[str]) -> str | None:
    """Return the one value that there is, None if there are several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _plural(many: int, noun: str, plural: str = "") -> str:
    return f"{many:,} {noun if many == 1 else plural or noun + 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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


def _labels(group: Sequence[_Found]) -> list[str]:
    """Return the names of series, with what is unusual about their terms."""
    usual = wording.usual_terms(found.result for found in group)
    differing = [wording.apart(found.result, usual) for found in group]
    return [
        f"{found.entry.name} ({differs})" if differs else found.entry.name
        for found, differs in zip(group, differing, strict=True)
    ]


def _terms_remark(results: Iterable[Result]) -> str:
    """Say the terms of results shown together, and whether they are equal."""
    listed = list(results)
    usual = wording.usual_terms(listed)
    differ = any(terms(result) != usual for result in listed)
    return f"Terms: {usual}{_UNLESS + '; where they differ, compare with care' if differ else ''}."


def _short(found: _Found) -> str:
    """Name a table for a file."""
    return f"{found.entry.model} {found.entry.variant} {found.result.protocol} {found.result.eps_fraction}"


def _shared_remarks(group: Sequence[_Found]) -> tuple[str, ...]:
    """Return the terms of a group, and the note if all have the same."""
    note = _only(wording.plain(found.result.note) for found in group)
    return (_terms_remark(found.result for found in group), *([f"Note: {note}."] if note else []))


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
