"""The accuracies side by side, each on its terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from zoo.bundle import wording
from zoo.bundle.card import Result
from zoo.bundle.wording import FAILED, MISSING, SUSPECT, UNLESS, measured, terms
from zoo.report.document import Cell, Exhibit, Grid, Section, grid
from zoo.report.entries import Entry

NOT_DEPLOYED = ("transfer-matrix", "diversity")
"""Their accuracies are of pairs of paths, on images that all answer: not what a deployed variant answers correctly."""
_WIDE = 9
"""More columns of accuracies under attack than this go into a further table."""
_CLEAN = "clean"


@dataclass(frozen=True, kw_only=True, order=True)
class Column:
    """One attack at one eps; columns stand in the order of protocols."""

    order: int
    group: str
    eps: Fraction
    text: str

    @classmethod
    def of(cls, result: Result) -> Column:
        """Return the column in which a result stands."""
        known = wording.PROTOCOL_ORDER
        return cls(
            order=known.index(result.protocol) if result.protocol in known else len(known),
            group=measured(result),
            eps=Fraction(result.eps_fraction),
            text=f"ε {Fraction(result.eps_fraction)}" if result.eps else "",
        )


def _grids(entries: Sequence[Entry]) -> list[Grid]:
    """Return the accuracies side by side: a table per data set, or several where there are many attacks."""
    grids = []
    for dataset in dict.fromkeys(entry.card.dataset for entry in entries):
        rows = [entry for entry in entries if entry.card.dataset == dataset]
        found = {Column.of(result) for entry in rows for result in deployed(entry)}
        for index, part in enumerate(parts := _parts(sorted(found))):
            # a table after the first only has the rows that it says something of
            said = [
                entry for entry in rows if any(Column.of(r) in part for r in deployed(entry) if measured(r) != _CLEAN)
            ]
            about = f"Accuracy on {dataset}" + (f", continued ({index + 1} of {len(parts)})" if index else "")
            grids.append(_grid(said if index else rows, part, about, costs=not index))
    return grids


def _parts(columns: Sequence[Column]) -> list[list[Column]]:
    """Split columns between attacks into tables that fit a page; each begins with the clean accuracy."""
    clean = [column for column in columns if column.group == _CLEAN]
    parts: list[list[Column]] = [[]]
    for group in dict.fromkeys(column.group for column in columns if column.group != _CLEAN):
        members = [column for column in columns if column.group == group]
        if parts[-1] and len(parts[-1]) + len(members) > _WIDE:
            parts.append([])
        parts[-1] += members
    return [[*clean, *part] for part in parts]


def _grid(entries: Sequence[Entry], columns: Sequence[Column], caption: str, *, costs: bool) -> Grid:
    by_group: dict[str, list[Result]] = {}
    for entry in entries:
        for result in deployed(entry):
            by_group.setdefault(measured(result), []).append(result)
    usual = {group: wording.usual_terms(results) for group, results in by_group.items()}
    groups, header = [Cell(text="", span=2)], [Cell(text="Model"), Cell(text="Variant")]
    for group in dict.fromkeys(column.group for column in columns):
        members = [column for column in columns if column.group == group]
        differ = any(terms(result) != usual[group] for result in by_group[group])
        groups.append(Cell(text=group, detail=usual[group] + (UNLESS if differ else ""), span=len(members)))
        header += [Cell(text=column.text or "accuracy") for column in members]
    rows = []
    for entry in entries:
        verdict, lint = entry.verdict, "" if entry.lint is None else "linter: "
        variant = Cell(text=entry.variant, detail=f"{lint}{verdict.text}", tone=verdict.tone, link=entry.key)
        cells = [Cell(text=entry.model, detail=entry.card.method), variant]
        for column in columns:
            there = [result for result in deployed(entry) if Column.of(result) == column]
            cells.append(accuracy_cell(entry, there, usual=usual[column.group]))
        rows.append((*cells, *(_costs(entry) if costs else [])))
    if costs:
        header += [Cell(text="parameters", detail="one path / all"), Cell(text="passes", detail="per image")]
        groups.append(Cell(text="cost", span=2))
    return grid(caption, header, rows, groups=groups, headings=2)


def deployed(entry: Entry) -> Iterator[Result]:
    """Return the results that say how often the deployed variant answers correctly."""
    return (result for result in entry.results if result.protocol not in NOT_DEPLOYED)


def accuracy_cell(entry: Entry, results: Sequence[Result], *, usual: str = "") -> Cell:
    """Return one accuracy (or several of the same attack) with its marks, its interval, and where its terms differ.

    `usual` are the terms that are said elsewhere; empty if the cell need not say how its own differ.
    """
    if not results:
        return Cell(text=MISSING)
    differing = [wording.apart(result, usual) if usual else "" for result in results]
    return Cell(
        text=" / ".join(f"{wording.accuracy(result)}{_marks(entry, result)}" for result in results),
        detail=" / ".join(map(wording.interval, results)),
        apart=" / ".join(said or "usual terms" for said in differing) if any(differing) else "",
        value=results[0].accuracy if len(results) == 1 else None,
        tone="alarm" if any(_marks(entry, result) for result in results) else "",
    )


def _marks(entry: Entry, result: Result) -> str:
    marks = ("" if held(result) else FAILED) + (SUSPECT if entry.suspect else "")
    return f" {marks}" if marks else ""


def held(result: Result) -> bool:
    """Say whether every check of a measurement held."""
    return all(check.held for check in result.checks)


def _costs(entry: Entry) -> tuple[Cell, Cell]:
    architecture = entry.card.architecture
    return (
        Cell(text=f"{architecture.single_path_parameters:,}", detail=f"{architecture.parameters:,}"),
        entry.cost,
    )


def meanings(entries: Sequence[Entry], results: Iterable[Result], *, missing: bool) -> Iterator[str]:
    """Yield what the marks mean that occur in a table of these rows and numbers; `missing` if it has gaps."""
    if not all(map(held, results)):
        yield f"{FAILED} A check of this measurement did not hold, so the number may be wrong."
    if any(entry.suspect for entry in entries):
        yield (
            f"{SUSPECT} The robustness linter raised an alarm: the numbers of this variant may flatter it, because the "
            "attacks may have failed for reasons other than robustness."
        )
    if any(entry.lint is None for entry in entries):
        yield "“not linted”: nobody has asked the robustness linter about this variant; run manygates lint."
    if missing:
        yield f"{MISSING} Not measured."


def accuracies(entries: Sequence[Entry]) -> Section:
    """Return the section of every accuracy under every attack, variant by variant."""
    left_out = sorted({measured(r) for e in entries for r in e.results if r.protocol in NOT_DEPLOYED})
    grids = tuple(_grids(entries))
    missing = any(Cell(text=MISSING) in row for grid in grids for row in grid.rows)
    remarks = list(meanings(entries, (result for entry in entries for result in entry.results), missing=missing))
    if left_out:
        remarks.append(f"Not in this table, as they say nothing about a deployed variant alone: {'; '.join(left_out)}.")
    return Section(
        key="accuracies",
        title="Every accuracy",
        intro="The share of test images that is answered correctly: as they are (clean), and after an attack that may "
        "move each pixel by ε (1 is black to white). Small print: the 95 % interval in per cent. Compare within a "
        "column, and only on equal terms. Passes are forward passes per image, the cost relative to one path.",
        exhibits=(Exhibit(grids=grids, remarks=tuple(remarks)),),
    )
