"""Where models stand side by side, a figure per measurement and a series per variant: against eps, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from zoo.bundle import wording
from zoo.bundle.card import Result
from zoo.bundle.headline import CLEAN, accuracy_of
from zoo.bundle.wording import capital, only, plural, terms, terms_remark
from zoo.report.accuracies import Column, accuracy_cell, deployed
from zoo.report.document import Cell, Exhibit, Figures, Grid, Row, Section, grid, share
from zoo.report.drawings import Bars, Lines, Series, Spread, Style
from zoo.report.entries import Entry, Found, curve, grouped, labels_of, positions, remarks_of

_SHORT_LIST = 8
"""With more categories than these a comparison has a row per category."""


def against_eps(entries: Sequence[Entry], figure: Figures) -> Section:
    """Return accuracy against eps: a figure per data set, protocol, attack and norm."""
    panels: dict[tuple[str, int, str], list[tuple[Entry, Result]]] = {}
    for entry in entries:
        for result in deployed(entry):
            column = Column.of(result)
            panels.setdefault((entry.card.dataset, column.order, column.group), []).append((entry, result))
    exhibits = []
    for (dataset, _, group), found in sorted(panels.items(), key=lambda panel: panel[0]):
        clean = _anchored(found[0][1]) and any(_clean(entry) for entry, _ in found)
        if len({result.eps for _, result in found} | ({0.0} if clean else set())) > 1:
            title = f"{capital(group)} on {dataset}"
            exhibits.append(_eps_exhibit(title, found, f"eps {group} {dataset}", figure))
    return Section(
        key="eps",
        title="Accuracy against ε",
        intro="Each point is one measured accuracy with its 95 % interval; the lines between them only guide the eye. "
        "At ε 0 stands the clean accuracy of the same variant.",
        exhibits=tuple(exhibits),
    )


def _eps_exhibit(title: str, found: Sequence[tuple[Entry, Result]], name: str, figure: Figures) -> Exhibit:
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
        series.append(curve(f"{label} ({differs})" if differs else label, style, points))
        at = [[point for point in points if Fraction(point.eps_fraction) == place] for place in places]
        rows.append([Cell(text=label, apart=differs), *(accuracy_cell(entry, there) for there in at)])
    remarks = [terms_remark(result for _, result in found)]
    cleans = sorted({terms(clean) for clean in map(_clean, owners.values()) if clean and anchored})
    if cleans:
        remarks.append(f"Clean: {'; '.join(cleans)}.")
    norms = dict.fromkeys(result.norm for _, result in found)
    header = ("Model", *(f"ε {place}" if place else "clean" for place in places))
    return Exhibit(
        title=title,
        picture=figure(
            name,
            f"Line chart: accuracy from 0 to 100 % against ε for {plural(len(series), 'series', 'series')}",
            Lines(
                axis=f"ε ({', '.join(wording.norm(norm) for norm in norms)})",
                ticks=tuple((float(place), str(place)) for place in places),
                series=tuple(series),
            ),
        ),
        grids=(grid(f"{title}: accuracy (95 % interval)", header, rows),),
        remarks=tuple(remarks),
    )


def _anchored(result: Result) -> bool:
    """Say whether clean accuracy is the same measurement at eps 0: over exits an accuracy is a mean, clean is not."""
    return result.protocol != "exits"


def _clean(entry: Entry) -> Result | None:
    return accuracy_of(entry.card, CLEAN, Fraction(0), variant=entry.variant)


# --- the tables behind results ---


def compared_tables(found: Sequence[Found], figure: Figures) -> list[Section]:
    """Return a section per kind of table, also where no card has such a table."""
    return [
        Section(
            key=key,
            title=title,
            intro=intro,
            exhibits=tuple(each for context, group in grouped(found, key) for each in shown(context, group, figure)),
        )
        for key, title, intro, shown in _SECTIONS
    ]


def _curves(context: str, group: list[Found], figure: Figures) -> Iterator[Exhibit]:
    names = list(dict.fromkeys(name for found in group for name in found.table.columns))
    places = _steps_scale(names)
    ordered = sorted(names, key=lambda name: places[name])
    common = only(row for found in group for row in found.table.rows)
    series: list[Series] = []
    rows: list[Row] = []
    for found, label_of in zip(group, labels_of(group), strict=True):
        for index, (row, values) in enumerate(zip(found.table.rows, found.values, strict=True)):
            known = dict(zip(found.table.columns, values, strict=True))
            label = label_of if common else f"{label_of}, {row}"
            columns = [name for name in ordered if name in known]
            look = found.entry.style
            series.append(
                Series(
                    label=label,
                    style=Style(colour=look.colour, dash=look.dash + index, hollow=index > 0),
                    at=tuple(places[name] for name in columns),
                    values=tuple(known[name] for name in columns),
                )
            )
            rows.append((label, *(share(known.get(name)) for name in ordered)))
    axis = group[0].table.column_axis
    yield Exhibit(
        title=capital(context),
        picture=figure(
            f"steps {context}",
            f"Line chart: accuracy from 0 to 100 % against {axis}, up to {ordered[-1]}, for "
            f"{plural(len(series), 'series', 'series')}",
            Lines(axis=axis, ticks=tuple((places[name], name) for name in ordered), series=tuple(series)),
        ),
        grids=(grid(f"{capital(context)}: accuracy against {axis}", ("Model", *ordered), rows),),
        remarks=(*([f"Each curve: {common}."] if common else []), terms_remark(found.result for found in group)),
    )


def _spreads(context: str, group: list[Found], figure: Figures) -> Iterator[Exhibit]:
    """Show how paths differ, a figure per column of the tables."""
    for name in dict.fromkeys(name for each in group for name in each.table.columns):
        members = [each for each in group if name in each.table.columns]
        yield _spread(f"{capital(context)}: {name}", name, members, figure)


def _spread(title: str, column: str, group: list[Found], figure: Figures) -> Exhibit:
    usual = wording.usual_terms(found.result for found in group)
    series: list[Series] = []
    rows: list[Row] = []
    for found in group:
        at = found.table.columns.index(column)
        values = tuple(row[at] for row in found.values)
        series.append(Series(label=found.entry.name, style=found.entry.style, values=values))
        known = sorted(value for value in values if value is not None)
        quartiles = np.quantile(known, (0, 0.25, 0.5, 0.75, 1)).tolist() if known else [None] * 5
        head = Cell(text=found.entry.name, apart=wording.apart(found.result, usual))
        rows.append((head, str(len(known)), *map(share, (*quartiles, _mean(known)))))
    header = ("Model", "paths", "worst", "lower quartile", "median", "upper quartile", "best", "mean")
    return Exhibit(
        title=title,
        picture=figure(
            f"paths {title}",
            f"Strip and box chart: the accuracies of the paths of {plural(len(series), 'variant')}",
            Spread(axis=f"accuracy: {column}", series=tuple(series)),
        ),
        grids=(
            grid(f"{title}: quartiles over paths", header, rows),
            *(found.grid(folded=True) for found in group if column == found.table.columns[-1]),
        ),
        remarks=remarks_of(group),
    )


def _corruptions(context: str, group: list[Found], figure: Figures) -> Iterator[Exhibit]:
    """Show the mean accuracy per corruption."""
    title = capital(context)
    means = [[_mean(row) for row in found.values] for found in group]
    names = list(dict.fromkeys(name for found in group for name in found.table.rows))
    by_name = [dict(zip(found.table.rows, mean, strict=True)) for found, mean in zip(group, means, strict=True)]
    series = [
        Series(label=label, style=found.entry.style, values=(*(known.get(name) for name in names), _mean(mean)))
        for label, found, known, mean in zip(labels_of(group), group, by_name, means, strict=True)
    ]
    yield Exhibit(
        title=title,
        picture=figure(
            context,
            f"Bar chart: mean accuracy over severities under each of {len(names)} corruptions, and their mean, for "
            f"{plural(len(group), 'variant')}",
            Bars(categories=(*names, "mean"), series=tuple(series)),
        ),
        grids=(
            _comparison(f"{title}: mean over severities", "Corruption", (*names, "mean"), series),
            *(found.grid(folded=True) for found in group),
        ),
        remarks=remarks_of(group),
    )


def _by_category(context: str, group: list[Found], figure: Figures) -> Iterator[Exhibit]:
    """Show the last column of sources, row by row, and the first of attacks; of attacks in one row, its columns."""
    title, kind = capital(context), group[0].table.name
    last = kind == "sources"
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
        for label, found, known in zip(labels_of(group), group, shown, strict=True)
    ]
    columns = ", ".join(dict.fromkeys(drawn))
    compared = _comparison(f"{title}{': ' if columns else ''}{columns}", kind[:-1].capitalize(), names, series)
    yield Exhibit(
        title=title,
        picture=figure(
            f"{kind} {title}",
            f"Bar chart: accuracy for each of {plural(len(names), 'row')} and {plural(len(series), 'variant')}",
            Bars(categories=names, series=tuple(series)),
        ),
        grids=(compared, *whole) if len(group) > 1 else (group[0].grid(),),
        remarks=(*([f"The figure shows the column “{columns}”."] if columns else []), *remarks_of(group)),
    )


def _comparison(caption: str, corner: str, categories: Sequence[str], series: Sequence[Series]) -> Grid:
    """Return the numbers of a figure: the longer of the two lists goes down the page."""
    if len(categories) <= _SHORT_LIST:
        return grid(caption, ("Model", *categories), ((each.label, *map(share, each.values)) for each in series))
    columns = zip(*(each.values for each in series), strict=True)
    rows: list[Row] = [(name, *map(share, values)) for name, values in zip(categories, columns, strict=True)]
    return grid(caption, (corner, *(each.label for each in series)), rows)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _steps_scale(names: Sequence[str]) -> dict[str, float]:
    """Return where each number of steps stands: on a logarithmic axis that has room for 0, or in the order given."""
    places = positions(names)
    if places is None:
        return {name: float(index) for index, name in enumerate(names)}
    return {name: math.log1p(place) for name, place in places.items()}


_SECTIONS = (
    (
        "steps",
        "Accuracy against steps",
        "A curve that still falls at its right end belongs to an attack that needs more steps, and the accuracy above "
        "it is too high.",
        _curves,
    ),
    (
        "paths",
        "Spread over paths",
        "Each point is one path; the box spans the middle half, its bar is the median, the line reaches from the worst "
        "path to the best.",
        _spreads,
    ),
    (
        "corruptions",
        "Common corruptions",
        "Accuracy under noise, blur, weather and digital changes that nobody chose to fool the network.",
        _corruptions,
    ),
    (
        "sources",
        "Black-box attacks by surrogate",
        "On which surrogate the transferred images were made. An image counts only if all of its versions are answered "
        "correctly.",
        _by_category,
    ),
    (
        "attacks",
        "Attack by attack",
        "What each attack alone leaves. The accuracy of all of them takes for every image the attack that served it "
        "worst, so it is at most the smallest of these.",
        _by_category,
    ),
)
"""Kind of table, title, introduction, and what shows the tables of one measurement."""
