"""The first screen: a sentence per model, a plot and a short table per data set; everything else is behind links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from zoo.bundle import findings, wording
from zoo.bundle.card import Result
from zoo.bundle.headline import headline
from zoo.bundle.wording import SUSPECT, eps_text, measured
from zoo.report.accuracies import held
from zoo.report.document import Cell, Claim, Exhibit, Figures, Grid, Row, Section, grid
from zoo.report.entries import Entry
from zoo.report.standing import Place, Standing

_ATTACKS = 3
"""So many columns of the table are attacks, so that it has at most eight."""


def overview(entries: Sequence[Entry], figure: Figures) -> Section:
    """Return the section."""
    datasets = dict.fromkeys(entry.card.dataset for entry in entries)
    return Section(
        key="overview",
        title="In short",
        exhibits=tuple(
            _exhibit(dataset, [entry for entry in entries if entry.card.dataset == dataset], figure)
            for dataset in datasets
        ),
    )


def _exhibit(dataset: str, entries: Sequence[Entry], figure: Figures) -> Exhibit:
    standing = Standing(entries)
    lines = standing.lines(
        lambda entry: f"{entry.model}{SUSPECT if entry.suspect else ''}", lambda entry: replace(entry.style, dash=0)
    )
    shown = "Line chart: accuracy from 0 to 100 % against ε of the variant that stands for each model"
    places = _places(standing)
    return Exhibit(
        title=f"White-box accuracy on {dataset}" if lines else "",
        claims=tuple(_claims(standing, entries)),
        picture=figure(f"overview {dataset}", shown, lines) if lines else None,
        grids=(_table(standing, places, dataset),) if standing.rows else (),
        remarks=tuple(standing.legend(places)) if standing.rows else (),
    )


def _claims(standing: Standing, entries: Sequence[Entry]) -> Iterator[Claim]:
    """Yield a sentence per model, in the order of the table."""
    order = [entry.model for entry in standing.rows] + standing.unmeasured
    for model in dict.fromkeys(order):
        of_model = [entry for entry in entries if entry.model == model]
        card, eps = of_model[0].card, standing.key[1] if standing.key else None
        found = headline(card, eps=eps)
        if found.robust is None:  # not measured where the others were
            found = headline(card)
        entry = next((entry for entry in of_model if entry.variant == found.variant), of_model[0])
        yield Claim(
            subject=model,
            text=f"{_accuracies(entry, found.clean, found.robust)}; {_trust(entry, found.robust)}.",
            tone="alarm" if entry.suspect else "",
            link=entry.key,
        )


def _accuracies(entry: Entry, clean: Result | None, robust: Result | None) -> str:
    said = [] if clean is None else [f"answers {wording.accuracy(clean)} of clean images correctly"]
    if robust is not None:
        share, eps = wording.accuracy(robust), eps_text(Fraction(robust.eps_fraction))
        said.append(f"{share} ({wording.interval(robust)}) under {measured(robust)} at ε {eps}")
    elif said:
        said.append("was not attacked white-box yet")
    which = "" if entry.said == "the network" else f"({entry.said}) "
    return which + (" and ".join(said) or "has not been measured yet")


def _trust(entry: Entry, robust: Result | None) -> str:
    failed = "" if robust is None or held(robust) else "a check of the attack did not hold, and "
    return f"{failed}{'it ' if entry.lint else ''}{findings.sentence(entry.lint)}"


def _places(standing: Standing) -> list[Place]:
    """Return the columns of the table: each attack at the radius that ranks, then what else was measured."""
    if standing.key is None:
        return []
    key = standing.key[1]
    nearest = [(attack, key if key in attack.eps else attack.eps[-1]) for attack in standing.attacks]
    picked = list(dict.fromkeys([*nearest, *standing.places]))[:_ATTACKS]
    return [place for place in standing.places if place in picked]


def _table(standing: Standing, places: Sequence[Place], dataset: str) -> Grid:
    header = ("Model", "Variant", "passes", "clean", *(f"{attack.title}, ε {eps_text(eps)}" for attack, eps in places))
    rows: list[Row] = [
        (
            entry.model,
            Cell(text=entry.variant, detail=entry.said, link=entry.key),
            entry.cost,
            standing.clean.cell(entry, Fraction(0)),
            *(attack.cell(entry, eps) for attack, eps in places),
            entry.verdict,
        )
        for entry in standing.rows
    ]
    return grid(f"How the models stand on {dataset}", (*header, "linter"), rows, headings=2)
