"""The comparison of the whole zoo as a page of Markdown: a table and two figures per data set, from the cards alone.

A row is a variant of a model, fp32. Where a number is not what its column says (fewer images, random gates, another set
of transferred images), the difference stands beside it. Rows whose variant failed the linter come last and are marked.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from zoo.bundle import wording
from zoo.bundle.card import INT8, Card, Result
from zoo.bundle.headline import AUTOATTACK, CLEAN, TRANSFER, WHITEBOX, accuracy_of, eps_shown, main_variant
from zoo.bundle.wording import FAILED, MISSING, SUSPECT, eps_text
from zoo.errors import BadInput
from zoo.files import write_bytes_atomic, write_text_atomic
from zoo.report.document import Cell, Grid, Picture
from zoo.report.drawings import Drawing, Lines, Scatter, Series, Style
from zoo.report.entries import Entry, entries_of
from zoo.report.figures import render
from zoo.report.markdown import escaped, table_lines
from zoo.report.summary import accuracy_cell

BEGIN, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"
FIGURES_DIR = "figures"
PREFIX = "zoo-"
"""What the names of the figures begin with."""
RANDOM, ELSEWHERE = "§", "¶"
_TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
_NEW_PAGE = f"""# The zoo, measured

{BEGIN}
{END}
"""
_VARIANTS = ("single", "ensemble", "gated")


@dataclass(frozen=True, kw_only=True)
class _Attack:
    """Columns of one attack, a column per radius."""

    title: str
    protocols: tuple[str, ...]
    eps: tuple[Fraction, ...]
    usual: str
    """The terms of most of the numbers."""
    attack: str
    """What most of the numbers call it: tells sets of transferred images apart."""

    def of(self, entry: Entry, eps: Fraction) -> Result | None:
        """Return what was measured of a variant at one radius."""
        return accuracy_of(entry.card, self.protocols, eps, variant=entry.variant)


def write_leaderboard(cards: Sequence[Card], file: Path) -> list[Path]:
    """Write the comparison of all cards between the marks of a Markdown page, and its figures beside it.

    What else stands in the page stays. The same cards give the same bytes; a figure of last time that is not drawn
    again is removed.

    Args:
        cards: of any data sets; those without a result are named below the table.
        file: the page; made if it is not there. Figures are in `figures/` beside it, called `zoo-….svg`.

    Returns:
        The figures.

    Raises:
        BadInput: without cards, if the page has not exactly one pair of marks, or if matplotlib is not installed.
    """
    if not cards:
        raise BadInput(
            "no cards to compare, expected at least one; put bundles into zoo/bundles or cards into zoo/cards"
        )
    if file.suffix != ".md":
        raise BadInput(f"--out is {str(file)!r}, expected a page of Markdown for the leaderboard, such as docs/zoo.md")
    page = file.read_text(encoding="utf-8") if file.is_file() else _NEW_PAGE
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise BadInput(f"{file} lacks one {BEGIN} with one {END} behind it; put them where the leaderboard belongs")
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    blocks: list[str] = []
    pictures: list[tuple[str, Picture]] = []
    for dataset in sorted({card.dataset for card in cards}):
        found = _Board([card for card in cards if card.dataset == dataset], dataset)
        blocks += found.blocks()
        pictures += found.pictures()
    drawn = {f"{picture.name}.svg": _drawn(title, picture) for title, picture in pictures}
    folder = file.parent / FIGURES_DIR
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = [folder / name for name in drawn if not (folder / name).exists()]
    try:
        for name, content in drawn.items():
            write_bytes_atomic(folder / name, content)
        write_text_atomic(file, f"{before}{BEGIN}\n" + "\n\n".join(blocks) + f"\n{END}{after}")
    except OSError:  # a page that is not there needs no figures
        for figure in new:
            with contextlib.suppress(OSError):
                figure.unlink(missing_ok=True)
        raise
    for name in set(re.findall(rf"\({FIGURES_DIR}/({PREFIX}[a-z0-9-]+\.svg)\)", old)) - set(drawn):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in drawn]


def _drawn(title: str, picture: Picture) -> bytes:
    try:
        return render(picture.drawing, name=picture.name, title=title, alt=picture.alt).svg
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise BadInput(
            "the figures of the leaderboard need matplotlib, which is not installed; pip install 'manygates[report]'"
        ) from error


class _Board:
    """What is said of one data set."""

    def __init__(self, cards: Sequence[Card], dataset: str) -> None:
        self.dataset = dataset
        self.title = _TITLES.get(dataset, wording.plain(dataset))
        every = [entry for entry in entries_of(cards) if not entry.variant.endswith(INT8)]
        groups = (("white-box", WHITEBOX), ("transfer", TRANSFER), ("AutoAttack", AUTOATTACK))
        self.clean = _attack("clean", CLEAN, every, (Fraction(0),))
        self.attacks = [attack for title, protocols in groups if (attack := _attack(title, protocols, every, None)).eps]
        self.key = self._key(every)
        shown = [entry for entry in every if any(self._numbers(entry))]
        self.rows = sorted(shown, key=self._rank)
        self.unmeasured = sorted({entry.model for entry in every} - {entry.model for entry in shown})
        self.methods = sorted({entry.card.method for entry in self.rows})

    def _numbers(self, entry: Entry) -> Iterator[Result | None]:
        yield self.clean.of(entry, Fraction(0))
        for attack in self.attacks:
            for eps in attack.eps:
                yield attack.of(entry, eps)

    def _key(self, entries: Sequence[Entry]) -> tuple[_Attack, Fraction] | None:
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
            entry.variant in entry.card.suspect,
            entry.variant == "gated",  # answers at random, which rankings of deterministic models leave out
            found is None,
            0.0 if found is None else -found.accuracy,
            0.0 if clean is None else -clean.accuracy,
            entry.model,
            _VARIANTS.index(entry.variant),
        )

    # --- the table ---

    def blocks(self) -> Iterator[str]:
        """Yield the blocks of Markdown."""
        yield f"## {escaped(self.title)}"
        if self.rows:
            yield "\n".join(table_lines(self._grid(), groups_below=True))
            yield "\n".join(f"- {escaped(line)}" for line in self._legend())
        if self.unmeasured:
            yield f"Not measured yet: {escaped(', '.join(self.unmeasured))}."
        for _, picture in self.pictures():
            yield f"![{escaped(picture.alt)}]({FIGURES_DIR}/{picture.name}.svg)"

    def _grid(self) -> Grid:
        header = [Cell(text=text) for text in ("row", "model", "variant", "method", "passes", "clean")]
        groups = [Cell(text="", span=6)]
        for attack in self.attacks:
            header += [Cell(text=f"ε {eps_text(eps)}") for eps in attack.eps]
            groups.append(Cell(text=attack.title, span=len(attack.eps)))
        header += [Cell(text="trained"), Cell(text="linter")]
        groups.append(Cell(text="", span=2))
        return Grid(
            caption=f"Accuracy on {self.title}",
            groups=tuple(groups),
            header=tuple(header),
            rows=tuple(tuple(self._row(number, entry)) for number, entry in enumerate(self.rows, 1)),
            headings=4,
        )

    def _row(self, number: int, entry: Entry) -> Iterator[Cell]:
        yield Cell(text=str(number))
        yield Cell(text=entry.model)
        yield Cell(text=_variant(entry))
        yield Cell(text=entry.card.method)
        yield Cell(text=MISSING if entry.passes is None else str(entry.passes), value=entry.passes)
        yield self._cell(entry, self.clean, Fraction(0))
        for attack in self.attacks:
            for eps in attack.eps:
                yield self._cell(entry, attack, eps)
        yield Cell(text=self._trained(entry.card))
        verdict = entry.verdict
        yield replace(verdict, text=verdict.text.removeprefix("linter: "))

    def _cell(self, entry: Entry, attack: _Attack, eps: Fraction) -> Cell:
        found = attack.of(entry, eps)
        if found is None:
            return Cell(text=MISSING)
        cell = accuracy_cell(entry, [found], usual=attack.usual)
        marks = _marks(found, attack)
        if found.protocol == "random-gates":  # their other terms are the mark's
            cell = replace(cell, apart=wording.plural(found.images, "image"))
        return replace(cell, text=f"{cell.text} {marks}") if marks else cell

    def _trained(self, card: Card) -> str:
        epochs, published = card.training.epochs, card.training.published
        said = f"{_epochs(epochs)} epochs" if epochs else MISSING
        if published is not None:
            same = published.network == card.architecture.name
            scale = _epochs(published.epochs)
            said += f" of {scale}" if same else f" (published: {scale}, {published.network})"
        begun = card.training.recipe.get("start_from")
        return f"{said}, from {begun.rpartition('/')[2]}" if isinstance(begun, str) else said

    def _legend(self) -> Iterator[str]:
        if self.key is not None:
            attack, eps = self.key
            yield (
                f"Ranked by {attack.title} at ε {eps_text(eps)}. Random gates stand below what answers always alike, "
                "rows that failed the linter below all."
            )
        yield (
            "Per cent of test images answered correctly, 95 % interval in brackets; attacks may move a pixel by ε (1 "
            "is black to white). Passes: forward passes per image."
        )
        terms = [f"{attack.title}: {attack.usual}" for attack in (self.clean, *self.attacks) if attack.usual]
        yield f"Terms, where none stand beside a number: {'; '.join(terms)}."
        shown = [(entry, result) for entry in self.rows for result in self._numbers(entry) if result is not None]
        random = [result for _, result in shown if result.protocol == "random-gates"]
        if random:
            yield (
                f"{RANDOM} Random gates: for each image the lowest mean over {random[0].draws} fresh draws that any of "
                "many attacks reached, by one who knows all but the draw."
            )
        if any(ELSEWHERE in _marks(result, attack) for attack in self.attacks for result in self._of(attack)):
            yield f"{ELSEWHERE} On another set of transferred images than the rest of the column."
        if any(not check.held for _, result in shown for check in result.checks):
            yield f"{FAILED} A check of this measurement did not hold, so the number may be wrong."
        if any(entry.variant in entry.card.suspect for entry in self.rows):
            yield (
                f"{SUSPECT} The robustness linter raised an alarm: the numbers of this row may flatter the model, "
                "because the attacks may have failed for reasons other than robustness."
            )
        yield f"{MISSING} Not measured."

    def _of(self, attack: _Attack) -> list[Result]:
        found = (attack.of(entry, eps) for entry in self.rows for eps in attack.eps)
        return [result for result in found if result is not None]

    # --- the figures ---

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Yield the figures with their titles; one without points is left out."""
        stem = f"{PREFIX}{wording.slug(self.dataset)}"
        if self.key is not None and (drawing := self._scatter(*self.key)) is not None:
            attack, eps = self.key
            title = f"{self.title}: clean against {attack.title} at ε {eps_text(eps)}"
            alt = f"Scatter plot, {title}. The numbers at the points are the rows of the table above."
            yield title, Picture(name=f"{stem}-clean-robust", alt=alt, drawing=drawing)
        if (lines := self._lines()) is not None:
            title = f"{self.title}: white-box accuracy against ε"
            alt = f"Line chart, {title}. The numbers in the legend are the rows of the table above."
            yield title, Picture(name=f"{stem}-eps", alt=alt, drawing=lines)

    def _scatter(self, attack: _Attack, eps: Fraction) -> Drawing | None:
        grouped: dict[tuple[int, int], list[tuple[Result, Result, str]]] = {}
        for number, entry in enumerate(self.rows, 1):
            across, up = self.clean.of(entry, Fraction(0)), attack.of(entry, eps)
            if across is not None and up is not None:
                tag = f"{number}{SUSPECT if entry.variant in entry.card.suspect else ''}"
                style = (self.methods.index(entry.card.method), _VARIANTS.index(entry.variant))
                grouped.setdefault(style, []).append((across, up, tag))
        if not grouped:
            return None
        series = tuple(
            Series(
                label=f"{self.methods[method]} · {_VARIANTS[variant]}",
                style=Style(colour=method, dash=variant),
                at=tuple(across.accuracy for across, _, _ in points),
                values=tuple(up.accuracy for _, up, _ in points),
                ranges=tuple(up.interval for _, up, _ in points),
            )
            for (method, variant), points in sorted(grouped.items())
        )
        tags = tuple(tuple(tag for _, _, tag in points) for _, points in sorted(grouped.items()))
        return Scatter(
            across="accuracy on clean images",
            up=f"accuracy, {attack.title} at ε {eps_text(eps)}",
            series=series,
            tags=tags,
        )

    def _lines(self) -> Drawing | None:
        """Return white-box accuracy against eps of each model's main variant, at two radii at least."""
        series, places = [], {Fraction(0)}
        drawn: Counter[str] = Counter()
        for number, entry in enumerate(self.rows, 1):
            if entry.variant != main_variant(entry.card):
                continue
            at = {Fraction(r.eps_fraction) for r in entry.results if r.protocol in WHITEBOX and r.norm == "linf"}
            points = [accuracy_of(entry.card, WHITEBOX, eps, variant=entry.variant) for eps in sorted(at)]
            known = [self.clean.of(entry, Fraction(0)), *points]
            results = [result for result in known if result is not None]
            if len(at) < 2:
                continue
            method = entry.card.method
            mark = SUSPECT if entry.variant in entry.card.suspect else ""
            series.append(
                Series(
                    label=f"{number}{mark} {entry.model}",
                    style=Style(colour=self.methods.index(method), dash=drawn[method]),
                    at=tuple(result.eps for result in results),
                    values=tuple(result.accuracy for result in results),
                    ranges=tuple(result.interval for result in results),
                )
            )
            drawn[method] += 1
            places |= at
        if not series:
            return None
        ticks = tuple((float(place), eps_text(place)) for place in sorted(places))
        return Lines(axis=f"ε ({wording.norm('linf')})", ticks=ticks, series=tuple(series))


def _attack(
    title: str, protocols: tuple[str, ...], entries: Sequence[Entry], eps: tuple[Fraction, ...] | None
) -> _Attack:
    """Return the columns of an attack; `eps` None chooses the radii that are shown."""
    found = [
        result
        for entry in entries
        for result in entry.results
        if result.protocol in protocols and result.norm == "linf"
    ]
    places = tuple(eps_shown(Fraction(result.eps_fraction) for result in found)) if eps is None else eps
    shown = [
        result
        for entry in entries
        for place in places
        if (result := accuracy_of(entry.card, protocols, place, variant=entry.variant)) is not None
        and result.protocol == protocols[0]
    ]
    named = Counter(result.attack for result in shown)
    return _Attack(
        title=title,
        protocols=protocols,
        eps=places,
        usual=wording.usual_terms(shown),
        attack=max(named, key=lambda name: named[name], default=""),
    )


def _marks(result: Result, attack: _Attack) -> str:
    if result.protocol == "random-gates":
        return RANDOM
    return ELSEWHERE if result.protocol in TRANSFER and result.attack != attack.attack else ""


def _variant(entry: Entry) -> str:
    """Say what a variant is."""
    if entry.card.architecture.gated_layers:
        paths = len(entry.card.paths.ensemble)
        return {"single": "one path", "ensemble": f"{paths} paths averaged", "gated": "random gates"}[entry.variant]
    if "ensemble" in entry.card.variants:
        members = "all members" if entry.passes is None else f"{entry.passes} members averaged"
        return members if entry.variant == "ensemble" else "one member"
    return "last exit" if entry.card.exits else "the network"


def _epochs(epochs: Sequence[int]) -> str:
    return " + ".join(map(str, epochs))
