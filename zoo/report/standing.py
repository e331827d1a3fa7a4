"""How the models of one data set stand: which numbers compare them, and in which order.

The first screen of a report and the leaderboard say the same, because both ask here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from zoo.bundle import headline, wording
from zoo.bundle.card import Result
from zoo.bundle.wording import MISSING, eps_text
from zoo.report.accuracies import accuracy_cell, meanings
from zoo.report.document import Cell
from zoo.report.drawings import Lines, Style
from zoo.report.entries import Entry, curve
from zoo.vocabulary import INT8, VARIANTS

RANDOM, ELSEWHERE = "§", "¶"
"""Marks of a number: by random gates' own protocol, and on another set of transferred images than its column."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """One attack, at the radii at which models are compared."""

    title: str
    protocols: tuple[str, ...]
    eps: tuple[Fraction, ...]
    usual: str
    """The terms of most of the numbers."""
    attack: str
    """What most of the numbers call it: tells sets of transferred images apart."""

    def of(self, entry: Entry, eps: Fraction) -> Result | None:
        """Return the l_inf accuracy that stands for a variant at one radius."""
        return headline.accuracy_of(entry.card, self.protocols, eps, variant=entry.variant)

    def mark(self, result: Result) -> str:
        """Return the mark of a number that is not what most of the column is."""
        if result.protocol == "random-gates":
            return RANDOM
        return ELSEWHERE if self.protocols == headline.TRANSFER and result.attack != self.attack else ""

    def cell(self, entry: Entry, eps: Fraction) -> Cell:
        """Return a number with its interval, its marks, and where its terms differ."""
        found = self.of(entry, eps)
        if found is None:
            return Cell(text=MISSING)
        cell = accuracy_cell(entry, [found], usual=self.usual)
        if found.protocol == "random-gates":  # their other terms are the mark's
            cell = replace(cell, apart=wording.plural(found.images, "image"))
        mark = self.mark(found)
        return replace(cell, text=f"{cell.text} {mark}") if mark else cell


Place = tuple[Columns, Fraction]
"""One column: an attack at a radius."""


class Standing:
    """How the variants of one data set's models stand, fp32 alone."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        every = [entry for entry in entries if not entry.variant.endswith(INT8)]
        self.clean = _columns("clean", headline.CLEAN, every, (Fraction(0),))
        groups = (
            ("white-box", headline.WHITEBOX),
            ("transfer", headline.TRANSFER),
            ("AutoAttack", headline.AUTOATTACK),
        )
        self.attacks = [found for title, protocols in groups if (found := _columns(title, protocols, every)).eps]
        self.key = self._key(every)
        self.places: list[Place] = [(attack, eps) for attack in self.attacks for eps in attack.eps]
        shown = [entry for entry in every if any(attack.of(entry, eps) for attack, eps in self._all)]
        self.rows = sorted(shown, key=self._rank)
        self.unmeasured = sorted({entry.model for entry in every} - {entry.model for entry in shown})

    @property
    def _all(self) -> list[Place]:
        return [(self.clean, Fraction(0)), *self.places]

    def _key(self, entries: Sequence[Entry]) -> Place | None:
        """Return the column that ranks: the one of the first attack that most rows have, of equals the larger eps."""
        if not self.attacks:
            return None
        attack = self.attacks[0]
        counted = {eps: sum(attack.of(entry, eps) is not None for entry in entries) for eps in attack.eps}
        return attack, max(attack.eps, key=lambda eps: (counted[eps], eps))

    def _rank(self, entry: Entry) -> tuple[object, ...]:
        found = None if self.key is None else self.key[0].of(entry, self.key[1])
        clean = self.clean.of(entry, Fraction(0))
        return (
            entry.suspect,
            entry.variant == "gated",  # answers at random, which rankings of deterministic models leave out
            found is None,
            0.0 if found is None else -found.accuracy,
            0.0 if clean is None else -clean.accuracy,
            entry.model,
            (*VARIANTS, entry.variant).index(entry.variant),
        )

    def legend(self, places: Sequence[Place]) -> Iterator[str]:
        """Yield how to read a table of the clean accuracy and of some columns."""
        if self.key is not None:
            attack, eps = self.key
            yield (
                f"Ranked by {attack.title} at ε {eps_text(eps)}. Random gates stand below what always gives the same "
                "answer; rows that failed the linter stand last."
            )
        yield (
            "Per cent of test images answered correctly, with the 95 % interval; attacks may move a pixel by ε (1 is "
            "black to white). Passes: forward passes per image."
        )
        shown = [(self.clean, Fraction(0)), *places]
        columns = {attack.title: attack for attack, _ in shown}.values()
        terms = [f"{attack.title}: {attack.usual}" for attack in columns if attack.usual]
        yield f"Terms, where none stand beside a number: {'; '.join(terms)}."
        cells = [(attack, attack.of(entry, eps)) for entry in self.rows for attack, eps in shown]
        results = [(attack, result) for attack, result in cells if result is not None]
        marks = {attack.mark(result): result for attack, result in results}
        if RANDOM in marks:
            yield (
                f"{RANDOM} Random gates: for each image the lowest mean over {marks[RANDOM].draws} fresh draws that "
                "any of many attacks reached, by one who knows all but the draw."
            )
        if ELSEWHERE in marks:
            yield f"{ELSEWHERE} On another set of transferred images than the rest of the column."
        yield from meanings(self.rows, (result for _, result in results), missing=len(results) < len(cells))

    def lines(self, label: Callable[[Entry], str], style: Callable[[Entry], Style]) -> Lines | None:
        """Return white-box accuracy against eps of each model's main variant; None without a line of two points."""
        series, places = [], {Fraction(0)}
        for entry in self.rows:
            at = set(headline.measured_eps(entry.card, headline.WHITEBOX, variant=entry.variant))
            points = [(headline.CLEAN, Fraction(0)), *((headline.WHITEBOX, eps) for eps in sorted(at))]
            known = (headline.accuracy_of(entry.card, which, eps, variant=entry.variant) for which, eps in points)
            results = [result for result in known if result is not None]
            if entry.variant != headline.main_variant(entry.card) or not at or len(results) < 2:
                continue
            series.append(curve(label(entry), style(entry), results))
            places |= at
        ticks = tuple((float(place), eps_text(place)) for place in sorted(places))
        return Lines(axis=f"ε ({wording.norm('linf')})", ticks=ticks, series=tuple(series)) if series else None


def _columns(
    title: str, protocols: tuple[str, ...], entries: Sequence[Entry], eps: tuple[Fraction, ...] | None = None
) -> Columns:
    """Return the columns of an attack; `eps` None chooses the radii that are shown."""
    every = (eps for entry in entries for eps in headline.measured_eps(entry.card, protocols, variant=entry.variant))
    places = tuple(headline.eps_shown(every)) if eps is None else eps
    columns = Columns(title=title, protocols=protocols, eps=places, usual="", attack="")
    found = [columns.of(entry, place) for entry in entries for place in places]
    shown = [result for result in found if result is not None and result.protocol == protocols[0]]
    named = Counter(result.attack for result in shown)
    return replace(
        columns,
        usual=wording.usual_terms(shown),
        attack=max(named, key=lambda name: named[name], default=""),
    )
