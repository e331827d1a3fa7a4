"""Accuracy against eps: a figure per data set, protocol, attack and norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from zoo.bundle import wording
from zoo.bundle.card import Result
from zoo.bundle.wording import capital, plural, terms, terms_remark
from zoo.report.document import Cell, Exhibit, Grid, Picture, Section
from zoo.report.drawings import Lines, Series, Style
from zoo.report.entries import Entry
from zoo.report.summary import Column, accuracy_cell, deployed


def against_eps(entries: Sequence[Entry], named: Callable[[str], str]) -> Section:
    """Return the section; `named` makes a file name that no other figure has."""
    panels: dict[tuple[str, int, str], list[tuple[Entry, Result]]] = {}
    for entry in entries:
        for result in deployed(entry):
            column = Column.of(result)
            panels.setdefault((entry.card.dataset, column.order, column.group), []).append((entry, result))
    exhibits = []
    for (dataset, _, group), found in sorted(panels.items(), key=lambda panel: panel[0]):
        clean = _anchored(found[0][1]) and any(clean_result(entry) for entry, _ in found)
        if len({result.eps for _, result in found} | ({0.0} if clean else set())) > 1:
            title = f"{capital(group)} on {dataset}"
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
        clean = clean_result(entry) if anchored and not any(result.eps == 0 for result in results) else None
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
        rows.append(tuple(cells))
    remarks = [terms_remark(result for _, result in found)]
    cleans = sorted({terms(clean) for clean in map(clean_result, owners.values()) if clean and anchored})
    if cleans:
        remarks.append(f"Clean: {'; '.join(cleans)}.")
    norms = dict.fromkeys(result.norm for _, result in found)
    return Exhibit(
        title=title,
        picture=Picture(
            name=name,
            alt=f"Line chart: accuracy from 0 to 100 % against ε for {plural(len(series), 'series', 'series')}; "
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


def clean_result(entry: Entry) -> Result | None:
    """Return the clean result on most images."""
    clean = [result for result in entry.results if result.protocol == "clean" and result.attack == "none"]
    return max(clean, key=lambda result: result.images) if clean else None
