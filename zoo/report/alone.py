"""Each variant for itself: what the linter found, every result with its terms and tables, how to repeat them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from zoo.bundle import findings, wording
from zoo.bundle.wording import MISSING, capital, measured_at, number, plural, terms
from zoo.report.accuracies import accuracy_cell
from zoo.report.document import Cell, Command, Exhibit, Figures, Section, grid
from zoo.report.drawings import Heat, Lines, Series, Style
from zoo.report.entries import Entry, Found, positions, tables_of

_COST, _ACCURACY = "million MACs, ", "accuracy, "
"""How the columns of a table "budgeted" begin: two for every kind of images."""
_ELSEWHERE = ("steps", "paths", "corruptions", "sources", "attacks")
"""Tables that `compared` shows."""
_LARGE_MATRIX = 64
"""Beyond so many rows or columns a heat map says less than its size costs."""


def variant_section(entry: Entry, figure: Figures) -> Section:
    """Return everything that is known of one variant and compared nowhere else."""
    found = tables_of([entry])
    tables = (exhibit for each in found for exhibit in _table(each, figure))
    exhibits = (*_findings(entry), *_results(entry), *tables, *_commands(entry))
    nothing = Exhibit(remarks=("Nothing was measured of this variant yet.",))
    return Section(key=entry.key, title=entry.name, exhibits=exhibits or (nothing,))


def _findings(entry: Entry) -> Iterator[Exhibit]:
    lint = entry.lint
    if lint is None:
        return
    rows = [
        (each.code, each.name, Cell(text=each.verdict, tone=findings.TONES[each.verdict]), each.figure, each.meaning)
        for each in lint.findings
    ]
    header = ("Code", "Question", "Verdict", "Figure", "What an alarm means")
    yield Exhibit(
        title=f"The linter: {findings.verdict(lint)[0]}",
        grids=(grid(f"Findings of the linter on {entry.name}", header, rows, headings=2),),
        remarks=(f"{plural(lint.images, 'image')}, seed {lint.seed}, {lint.date}.",),
    )


def _results(entry: Entry) -> Iterator[Exhibit]:
    rows = [
        (
            measured_at(result),
            accuracy_cell(entry, [result]),
            terms(result),
            f"{sum(check.held for check in result.checks)} of {len(result.checks)} held" if result.checks else MISSING,
            wording.plain(result.note) or MISSING,
            result.date,
        )
        for result in entry.results
    ]
    header = ("Measurement", "Accuracy", "Terms", "Checks", "Note", "Date")
    if rows:
        yield Exhibit(title="Every result", grids=(grid(f"Every result of {entry.name}", header, rows),))


def _commands(entry: Entry) -> Iterator[Exhibit]:
    """Return the command of every number, each once."""
    about: dict[str, list[str]] = {}
    for result in entry.results:
        about.setdefault(wording.plain(result.command), []).append(measured_at(result))
    if entry.lint is not None:
        about.setdefault(wording.plain(entry.lint.command), []).append("the linter")
    commands = tuple(Command(about="; ".join(dict.fromkeys(said)), line=line) for line, said in about.items() if line)
    if commands:
        yield Exhibit(title="How to repeat", commands=commands)


def _table(found: Found, figure: Figures) -> Iterator[Exhibit]:
    curves = _budgets_of(found)
    if curves:
        yield _budgeted(found, curves, figure)
    elif found.shares and found.table.name == "transfer":
        yield _transfer(found, figure)
    elif found.shares and found.table.name == "exits":
        yield _exits(found, figure)
    elif not found.shares or found.table.name not in _ELSEWHERE:
        title = f"{capital(found.table.name)}: {found.context}"
        yield Exhibit(title=title, grids=(found.grid(),), remarks=found.remarks)


def _transfer(found: Found, figure: Figures) -> Exhibit:
    """Show as a heat map what attacks on one network do to another."""
    table = found.table
    rows, columns = found.labels
    picture = figure(
        f"transfer {_short(found)}",
        f"Heat map of {len(rows)} by {len(columns)} accuracies in per cent, {table.row_axis} by {table.column_axis}",
        Heat(row_axis=table.row_axis, column_axis=table.column_axis, rows=rows, columns=columns, values=found.values),
    )
    return Exhibit(
        title=f"Attacks carried from one network to another: {found.context}",
        picture=None if max(len(rows), len(columns)) > _LARGE_MATRIX else picture,
        grids=(found.grid(),),
        remarks=(
            "What is left (per cent) of the network in the column when the attack was made on the one in the row. High "
            "off the diagonal: attacks do not transfer.",
            *found.remarks,
        ),
    )


def _exits(found: Found, figure: Figures) -> Exhibit:
    """Show the accuracy at every exit of a network that may answer early."""
    columns = found.table.columns
    places = positions(columns) or {name: float(index) for index, name in enumerate(columns)}
    ordered = sorted(columns, key=lambda name: places[name])
    at = tuple(places[name] for name in ordered)
    series = []
    for index, (row, values) in enumerate(zip(found.table.rows, found.values, strict=True)):
        known = dict(zip(columns, values, strict=True))
        shown = tuple(known[name] for name in ordered)
        series.append(Series(label=row, style=Style(colour=index, dash=index), at=at, values=shown))
    ticks = tuple(zip(at, ordered, strict=True))
    return Exhibit(
        title=f"Accuracy at every exit: {found.context}",
        picture=figure(
            f"exits {_short(found)}",
            f"Line chart: accuracy from 0 to 100 % at each of {len(ordered)} exits for {plural(len(series), 'attack')}",
            Lines(axis=found.table.column_axis, ticks=ticks, series=tuple(series)),
        ),
        grids=(found.grid(),),
        remarks=("The row “single” attacks each exit for itself.", *found.remarks),
    )


def _budgeted(found: Found, curves: dict[str, list[tuple[float, float]]], figure: Figures) -> Exhibit:
    """Show accuracy against what an answer costs in the mean."""
    costs = [cost for points in curves.values() for cost, _ in points]
    low, high = min(costs), max(costs)
    places = dict.fromkeys(low + (high - low) * index / 4 for index in range(5))
    series = []
    for index, (name, points) in enumerate(curves.items()):
        at, values = zip(*points, strict=True)
        series.append(Series(label=name, style=Style(colour=index, dash=index), at=at, values=values))
    return Exhibit(
        title=f"Accuracy at a mean cost: {found.context}",
        picture=figure(
            f"budgeted {_short(found)}",
            "Line chart: accuracy from 0 to 100 % against the mean cost of an answer, for "
            f"{plural(len(curves), 'kind')} of images",
            Lines(
                axis="million multiply-accumulates per answer, mean",
                ticks=tuple((place, number(place)) for place in places),
                series=tuple(series),
            ),
        ),
        grids=(found.grid(folded=True),),
        remarks=(
            "Every image leaves at the first exit that is sure enough; a point is one choice of how sure.",
            *found.remarks,
        ),
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


def _short(found: Found) -> str:
    """Name a table for a file."""
    return f"{found.entry.model} {found.entry.variant} {found.result.protocol} {found.result.eps_fraction}"
