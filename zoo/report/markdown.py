"""A report, or its summary alone, as Markdown that GitHub and PyPI render alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from zoo.bundle.card import Card
from zoo.bundle.wording import capital, plain
from zoo.errors import BadInput
from zoo.report.document import Cell, Exhibit, Figures, Grid, Report
from zoo.report.entries import entries_of
from zoo.report.overview import overview


def markdown_table(cards: Sequence[Card]) -> str:
    """Return the table of the first screen for a README, with the terms and the marks below it.

    It is Markdown that ends in a newline: a table per data set, at most eight columns wide, and a row per variant of
    each model that was measured.

    Raises:
        BadInput: without cards.
    """
    if not cards:
        raise BadInput("no cards to tabulate, expected at least one; name a model")
    blocks = []
    for exhibit in overview(entries_of(cards), Figures()).exhibits:
        blocks += ["\n".join(table_lines(grid)) for grid in exhibit.grids]
        blocks.append("\n".join(f"- {escaped(remark)}" for remark in exhibit.remarks))
    return "\n\n".join(filter(None, blocks)) + "\n"


def markdown_of(report: Report) -> str:
    """Return a whole report as Markdown; its figures are the files in `figures/`."""
    blocks = [f"# {escaped(report.title)}", escaped(report.subtitle)]
    for section in (report.overview, *report.folded):
        blocks.append(f"## {escaped(section.title)}")
        blocks += [escaped(section.intro)] if section.intro else []
        for exhibit in section.exhibits:
            blocks += _exhibit(exhibit)
    return "\n\n".join(blocks) + "\n"


def _exhibit(exhibit: Exhibit) -> Iterator[str]:
    if exhibit.claims:
        yield "\n".join(f"- **{escaped(claim.subject)}** {escaped(claim.text)}" for claim in exhibit.claims)
    if exhibit.title:
        yield f"### {escaped(exhibit.title)}"
    if exhibit.picture is not None:
        yield f"![{escaped(exhibit.picture.alt)}](figures/{exhibit.picture.name}.svg)"
    for grid in exhibit.grids:
        if len(exhibit.grids) > 1:
            yield f"{escaped(grid.caption)}:"
        yield "\n".join(table_lines(grid))
    if exhibit.remarks:
        yield "\n".join(f"- {escaped(remark)}" for remark in exhibit.remarks)
    for command in exhibit.commands:
        yield f"{escaped(capital(command.about))}:"
        # indented on one line: nothing in it can end the block
        yield f"    {plain(command.line)}"


def table_lines(grid: Grid, *, groups_below: bool = False) -> Iterator[str]:
    """Yield the lines of a table; a group's name goes into each of its columns, its terms unless `groups_below`."""
    above: list[Cell] = []
    for group in grid.groups:
        above += [group] * group.span
    header = []
    for index, cell in enumerate(grid.header):
        group = above[index] if above else Cell(text="")
        name = ", ".join(part for part in (group.text, cell.text) if part and part != "accuracy")
        details = [cell.detail] if groups_below else [group.detail, cell.detail]
        header.append(_cell(Cell(text=name, detail="; ".join(detail for detail in details if detail))))
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---' if index < grid.headings else _align(grid, index) for index in range(len(header)))}|"
    for row in grid.rows:
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"


def _align(grid: Grid, index: int) -> str:
    """Return the mark that sets columns of numbers to the right."""
    return "---:" if any(row[index].value is not None for row in grid.rows) else "---"


def _cell(cell: Cell) -> str:
    details = "; ".join(escaped(detail) for detail in (cell.detail, cell.apart) if detail)
    return f"{escaped(cell.text)} ({details})" if details else escaped(cell.text)


def escaped(text: str) -> str:
    """Escape what Markdown or the HTML inside it would take for its own."""
    safe = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    safe = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", safe)
    # at the start of a line these would open a heading, a list or a rule
    return re.sub(r"^([#+=-])", r"\\\1", safe)
