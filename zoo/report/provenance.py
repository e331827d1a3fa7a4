"""Whether the numbers can be trusted, whose they are, and how to measure them again."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.bundle import wording
from zoo.bundle.card import Card
from zoo.bundle.wording import MISSING, measured_at, plural, terms
from zoo.report.document import Cell, Command, Exhibit, Grid, Section
from zoo.report.entries import Entry
from zoo.report.summary import accuracy_cell

_TONES = {"ok": "good", "alarm": "alarm", "skipped": "unknown"}


def findings(entries: Sequence[Entry]) -> Section:
    """Return what the linter found, and the checks of single results that did not hold."""
    exhibits = []
    for entry in entries:
        lint = entry.lint
        if lint is None:
            continue
        rows = tuple(
            (
                Cell(text=finding.code),
                Cell(text=finding.name),
                Cell(text=finding.verdict, tone=_TONES[finding.verdict]),
                Cell(text=finding.figure),
                Cell(text=finding.meaning),
            )
            for finding in lint.findings
        )
        header = tuple(Cell(text=name) for name in ("Code", "Question", "Verdict", "Figure", "What an alarm means"))
        exhibits.append(
            Exhibit(
                title=f"{entry.name}: {plural(len(lint.alarms), 'alarm')}",
                grids=(Grid(caption=f"Findings of the linter on {entry.name}", header=header, rows=rows, headings=2),),
                remarks=(f"{plural(lint.images, 'image')}, seed {lint.seed}, {lint.date}.",),
            )
        )
    failed = tuple(
        (
            Cell(text=entry.name),
            Cell(text=measured_at(result)),
            Cell(text=check.name, tone="alarm"),
            Cell(text=check.detail),
        )
        for entry in entries
        for result in entry.results
        for check in result.checks
        if not check.held
    )
    if failed:
        header = tuple(Cell(text=name) for name in ("Model", "Measurement", "Check", "Found"))
        exhibits.append(
            Exhibit(
                title="Checks of single measurements that did not hold",
                grids=(Grid(caption="Checks that did not hold", header=header, rows=failed),),
            )
        )
    linted = [entry for entry in entries if entry.lint is not None]
    if len(linted) > 1:
        exhibits.insert(0, _side_by_side(linted))
    missing = [entry.name for entry in entries if entry.lint is None]
    said = f" Not linted: {', '.join(missing)}." if missing and exhibits else ""
    return Section(
        key="lint",
        title="Can these numbers be trusted?",
        intro="The robustness linter asks whether the attacks could have worked: a network that hides its gradient "
        f"looks robust and is not.{said}",
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
    rows = tuple(
        (
            Cell(text=code),
            Cell(text=name),
            *(
                Cell(text=known.get((code, name), MISSING), tone=_TONES.get(known.get((code, name), ""), ""))
                for known in verdicts
            ),
        )
        for code, name in questions
    )
    header = (Cell(text="Code"), Cell(text="Question"), *(Cell(text=entry.name) for entry in linted))
    return Exhibit(
        title="Verdicts side by side",
        grids=(Grid(caption="Verdicts side by side", header=header, rows=rows, headings=2),),
    )


def models(entries: Sequence[Entry]) -> Section:
    """Return what each model is and where its weights come from."""
    rows = []
    for model in dict.fromkeys(entry.model for entry in entries):
        card = next(entry.card for entry in entries if entry.model == model)
        training = card.training
        rows.append(
            (
                Cell(text=model, detail=card.description),
                Cell(text=card.method),
                Cell(text=card.architecture.name, detail=_gates(card)),
                Cell(text=card.dataset),
                Cell(
                    text=training.summary or MISSING,
                    detail=f"seed {training.seed}, commit {training.commit or MISSING}, {training.date}",
                ),
                Cell(text=card.license),
            )
        )
    header = ("Model", "Method", "Architecture", "Data set", "Training", "Licence")
    return Section(
        key="models",
        title="The models",
        intro="",
        exhibits=(
            Exhibit(
                grids=(Grid(caption="The models", header=tuple(Cell(text=name) for name in header), rows=tuple(rows)),)
            ),
        ),
    )


def _gates(card: Card) -> str:
    gates, candidates = len(card.architecture.gated_layers), card.architecture.candidates
    return f"{plural(gates, 'gated layer')} of {candidates} candidates" if gates else "no gates"


def every_result(entries: Sequence[Entry]) -> Section:
    """Return all results in one list, with terms, checks and notes."""
    rows = []
    for entry in entries:
        for result in entry.results:
            held = sum(check.held for check in result.checks)
            rows.append(
                (
                    Cell(text=entry.name),
                    Cell(text=measured_at(result)),
                    accuracy_cell(entry, [result]),
                    Cell(text=terms(result)),
                    Cell(text=f"{held} of {len(result.checks)} held" if result.checks else MISSING),
                    Cell(text=wording.plain(result.note) or MISSING),
                    Cell(text=result.date),
                )
            )
    header = ("Model", "Measurement", "Accuracy", "Terms", "Checks", "Note", "Date")
    grid = Grid(caption="Every result", header=tuple(Cell(text=name) for name in header), rows=tuple(rows))
    return Section(
        key="results",
        title="Every result and its terms",
        intro="",
        exhibits=(Exhibit(grids=(grid,)),) if rows else (),
    )


def commands(entries: Sequence[Entry]) -> Section:
    """Return the command of every number, each once per variant."""
    exhibits = []
    for entry in entries:
        lines: dict[str, list[str]] = {}
        for result in entry.results:
            lines.setdefault(wording.plain(result.command), []).append(measured_at(result))
        if entry.lint is not None:
            lines.setdefault(wording.plain(entry.lint.command), []).append("the linter")
        lines_of = tuple(
            Command(about="; ".join(dict.fromkeys(about)), line=line) for line, about in lines.items() if line
        )
        if lines_of:
            exhibits.append(Exhibit(title=entry.name, commands=lines_of))
    return Section(
        key="repeat",
        title="How to repeat",
        intro="Every number above came from one of these commands.",
        exhibits=tuple(exhibits),
    )
