"""What stands in a report.

Unlike things are kept apart: data sets, protocols, attacks and norms have tables and figures of their own, and where
results in one of them differ in images, steps, restarts, draws or seed, the terms stand beside each number.
"""

from __future__ import annotations

from collections.abc import Sequence

from zoo.bundle import wording
from zoo.bundle.card import Card
from zoo.bundle.wording import plural
from zoo.report.against_eps import against_eps
from zoo.report.document import Report
from zoo.report.entries import entries_of
from zoo.report.provenance import commands, every_result, findings, models
from zoo.report.summary import summary
from zoo.report.tables import Tabled


def report_of(cards: Sequence[Card], *, title: str) -> Report:
    """Return the report of cards; a section for which no card has data is left out."""
    entries = entries_of(cards)
    names: list[str] = []

    def named(text: str) -> str:
        names.append(wording.slug(text, names))
        return names[-1]

    tabled = Tabled(entries, named)
    sections = [
        summary(entries),
        against_eps(entries, named),
        tabled.steps(),
        tabled.transfer(),
        tabled.paths(),
        tabled.corruptions(),
        tabled.sources(),
        tabled.attacks(),
        tabled.exits(),
        tabled.budgeted(),
        tabled.others(),
        findings(entries),
        models(entries),
        every_result(entries),
        commands(entries),
    ]
    number = len({entry.model for entry in entries})
    results = [result for entry in entries for result in entry.results]
    dates = sorted({result.date for result in results})
    when = "" if not dates else f", measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    return Report(
        title=title,
        subtitle=f"{plural(number, 'model')}, {plural(len(entries), 'variant')}, "
        f"{plural(len(results), 'result')}{when}",
        sections=tuple(section for section in sections if section is not None and section.exhibits),
    )
