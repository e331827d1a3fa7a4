"""A report written to a folder, as one HTML page, one Markdown file and the figures: all of it or nothing.

Unlike things are kept apart: data sets, protocols, attacks and norms have tables and figures of their own, and where
results in one of them differ in images, steps, restarts, draws or seed, the terms stand beside each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoo.bundle.card import Card
from zoo.bundle.wording import plural
from zoo.errors import BadInput
from zoo.files import replace_directory
from zoo.report.accuracies import accuracies
from zoo.report.alone import variant_section
from zoo.report.compared import against_eps, compared_tables
from zoo.report.document import Figures, Report
from zoo.report.entries import entries_of, tables_of
from zoo.report.figures import needs_extra, render
from zoo.report.markdown import markdown_of
from zoo.report.overview import overview
from zoo.report.page import MARK, figure_files, page_of
from zoo.report.provenance import models, trust

TITLE = "Robustness report"
HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
FIGURES_DIR = "figures"


def write_report(cards: Sequence[Card], folder: Path, *, title: str = TITLE) -> Path:
    """Write `report.html` (one self-contained page), `report.md` and `figures/` to `folder`, and return the page.

    An older report there is replaced as a whole; the same cards give the same bytes.

    Raises:
        BadInput: without cards, if `folder` holds anything but a report, or if the extra `report` is not installed.
    """
    if not cards:
        raise BadInput("no cards to report on, expected at least one; name a model")
    check_report_target(folder)
    report = report_of(cards, title=title)
    with needs_extra("a report"):
        figures = {
            picture.name: render(picture.drawing, name=picture.name, title=said, alt=picture.alt)
            for said, picture in report.pictures
        }
        page = page_of(report, figures)
    with replace_directory(folder) as new_dir:
        (new_dir / HTML_FILE).write_bytes(page.encode())
        (new_dir / MARKDOWN_FILE).write_bytes(markdown_of(report).encode())
        if figures:
            (new_dir / FIGURES_DIR).mkdir()
        for name, figure in figures.items():
            (new_dir / FIGURES_DIR / f"{name}.svg").write_bytes(figure.svg)
            (new_dir / FIGURES_DIR / f"{name}.png").write_bytes(figure.png)
    return folder / HTML_FILE


def check_report_target(folder: Path) -> None:
    """Check that a report may be written to `folder`; for callers that do long work before they write.

    Raises:
        BadInput: if it is a file, or holds something that is not part of a report (it would be lost).
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, expected a directory or nothing; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    page = folder / HTML_FILE
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    if MARK not in text:
        raise BadInput(
            f"{folder} is not empty and holds no report, so its content would be lost; choose an empty or new folder"
        )
    written = {HTML_FILE, MARKDOWN_FILE, *(f"{FIGURES_DIR}/{name}" for name in figure_files(text))}
    for place in sorted(folder.rglob("*")):
        name = place.relative_to(folder).as_posix()
        known = name == FIGURES_DIR if place.is_dir() else name in written
        if not known or place.is_symlink():
            raise BadInput(
                f"{folder} holds {name!r}, which is no part of its report and would be lost; "
                "choose an empty or new folder"
            )


def report_of(cards: Sequence[Card], *, title: str) -> Report:
    """Return the report of cards; a section for which no card has data is left out."""
    entries = entries_of(cards)
    figure = Figures()
    first = overview(entries, figure)
    compared = [
        accuracies(entries),
        against_eps(entries, figure),
        *compared_tables(tables_of(entries), figure),
        trust(entries),
        models(entries),
    ]
    number = len({entry.model for entry in entries})
    results = [result for entry in entries for result in entry.results]
    dates = sorted({result.date for result in results})
    when = "" if not dates else f", measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    return Report(
        title=title,
        subtitle=f"{plural(number, 'model')}, {plural(len(entries), 'variant')}, "
        f"{plural(len(results), 'result')}{when}",
        overview=first,
        compared=tuple(section for section in compared if section.exhibits),
        alone=tuple(variant_section(entry, figure) for entry in entries),
    )
