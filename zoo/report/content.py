"""What stands in a report.

Unlike things are kept apart: data sets, protocols, attacks and norms have tables and figures of their own, and where
results in one of them differ in images, steps, restarts, draws or seed, the terms stand beside each number.
"""

from __future__ import annotations

from collections.abc import Sequence

from zoo.bundle.card import Card
from zoo.bundle.wording import plural
from zoo.report.accuracies import accuracies
from zoo.report.against_eps import against_eps
from zoo.report.alone import variant_section
from zoo.report.compared import compared_tables
from zoo.report.document import Figures, Report
from zoo.report.entries import entries_of
from zoo.report.found import tables_of
from zoo.report.overview import overview
from zoo.report.provenance import models, trust


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
