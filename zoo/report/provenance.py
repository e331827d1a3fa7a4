"""Whether the numbers can be trusted, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.bundle import findings
from zoo.bundle.card import Card
from zoo.bundle.wording import MISSING, measured_at, plural
from zoo.report.document import Cell, Exhibit, Row, Section, grid
from zoo.report.entries import Entry


def trust(entries: Sequence[Entry]) -> Section:
    """Return the linter's verdicts side by side, and the checks of single results that did not hold."""
    linted = [entry for entry in entries if entry.lint is not None]
    missing = [entry.name for entry in entries if entry.lint is None]
    exhibits = [_side_by_side(linted)] if linted else []
    failed = [
        (entry.name, measured_at(result), Cell(text=check.name, tone="alarm"), check.detail)
        for entry in entries
        for result in entry.results
        for check in result.checks
        if not check.held
    ]
    if failed:
        table = grid("Checks that did not hold", ("Model", "Measurement", "Check", "Found"), failed)
        exhibits.append(Exhibit(title="Checks of single measurements that did not hold", grids=(table,)))
    return Section(
        key="lint",
        title="Can these numbers be trusted?",
        intro="The robustness linter asks whether the attacks could have worked: a network that hides its gradient "
        "looks robust and is not." + (f" Not linted: {', '.join(missing)}." if missing and exhibits else ""),
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
    rows: list[Row] = []
    for question in questions:
        told = [known.get(question, MISSING) for known in verdicts]
        rows.append((*question, *(Cell(text=said, tone=findings.TONES.get(said, "")) for said in told)))
    header: Row = ("Code", "Question", *(Cell(text=entry.name, link=entry.key) for entry in linted))
    title = "Verdicts side by side"
    return Exhibit(title=title, grids=(grid(title, header, rows, headings=2),))


def models(entries: Sequence[Entry]) -> Section:
    """Return what each model is and where its weights come from."""
    rows = []
    for model, card in {entry.model: entry.card for entry in entries}.items():
        training = card.training
        origin = f"seed {training.seed}, commit {training.commit or MISSING}, {training.date}"
        network = Cell(text=card.architecture.name, detail=_gates(card))
        trained = Cell(text=training.summary or MISSING, detail=origin)
        named = Cell(text=model, detail=card.description)
        rows.append((named, card.method, network, card.dataset, trained, card.license))
    header = ("Model", "Method", "Architecture", "Data set", "Training", "Licence")
    title = "The models"
    return Section(key="models", title=title, exhibits=(Exhibit(grids=(grid(title, header, rows),)),))


def _gates(card: Card) -> str:
    gates, candidates = len(card.architecture.gated_layers), card.architecture.candidates
    return f"{plural(gates, 'gated layer')} of {candidates} candidates" if gates else "no gates"
