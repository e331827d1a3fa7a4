"""Accuracy against eps: a figure per data set, protocol, attack and norm."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from zoo.bundle import wording
from zoo.bundle.card import Result
from zoo.bundle.headline import CLEAN, accuracy_of
from zoo.bundle.wording import capital, plural, terms, terms_remark
from zoo.report.accuracies import Column, accuracy_cell, deployed
from zoo.report.document import Cell, Exhibit, Figures, Section, grid
from zoo.report.drawings import Lines, Series, Style
from zoo.report.entries import Entry


def against_eps(entries: Sequence[Entry], figure: Figures) -> Section:
    """Return the section."""
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
            cells.append(accuracy_cell(entry, there))
        rows.append(cells)
    remarks = [terms_remark(result for _, result in found)]
    cleans = sorted({terms(clean) for clean in map(_clean, owners.values()) if clean and anchored})
    if cleans:
        remarks.append(f"Clean: {'; '.join(cleans)}.")
    norms = dict.fromkeys(result.norm for _, result in found)
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
        grids=(
            grid(
                f"{title}: accuracy (95 % interval)",
                ("Model", *(f"ε {place}" if place else "clean" for place in places)),
                rows,
            ),
        ),
        remarks=tuple(remarks),
    )


def _anchored(result: Result) -> bool:
    """Say whether clean accuracy is the same measurement at eps 0: over exits an accuracy is a mean, clean is not."""
    return result.protocol != "exits"


def _clean(entry: Entry) -> Result | None:
    return accuracy_of(entry.card, CLEAN, Fraction(0), variant=entry.variant)
