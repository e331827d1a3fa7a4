"""The comparison of the whole zoo as a page of Markdown: a table and two figures per data set, from the cards alone.

A row is a variant of a model, fp32. Where a number is not what its column says (fewer images, random gates, another set
of transferred images), the difference stands beside it. Rows whose variant failed the linter come last and are marked.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from zoo.bundle import wording
from zoo.bundle.card import Card, Result
from zoo.bundle.wording import MISSING, SUSPECT, eps_text
from zoo.errors import BadInput
from zoo.files import write_bytes_atomic, write_text_atomic
from zoo.report.document import Cell, Grid, Picture, grid
from zoo.report.drawings import Lines, Scatter, Series, Style
from zoo.report.entries import Entry, entries_of
from zoo.report.figures import needs_extra, render
from zoo.report.markdown import escaped, table_lines
from zoo.report.standing import Columns, Standing
from zoo.vocabulary import VARIANTS

BEGIN, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"
FIGURES_DIR = "figures"
PREFIX = "zoo-"
"""What the names of the figures begin with."""
_TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
_NEW_PAGE = f"""# The zoo, measured

{BEGIN}
{END}
"""


def write_leaderboard(cards: Sequence[Card], file: Path) -> list[Path]:
    """Write the comparison of all cards between the marks of a Markdown page; returns its figures.

    The page is made if it is not there; what else stands in it stays. Its figures are in `figures/` beside it, called
    `zoo-….svg`; one of last time that is not drawn again is removed. The same cards give the same bytes.

    Raises:
        BadInput: without cards, if the page has not exactly one pair of marks, or if matplotlib is not installed.
    """
    if not cards:
        raise BadInput("no cards to compare, expected one or more; put bundles into zoo/bundles, cards into zoo/cards")
    if file.suffix != ".md":
        raise BadInput(f"--out is {str(file)!r}, expected a page of Markdown for the leaderboard, such as docs/zoo.md")
    page = file.read_text(encoding="utf-8") if file.is_file() else _NEW_PAGE
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise BadInput(f"{file} lacks one {BEGIN} with one {END} behind it; put them where the leaderboard belongs")
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    new, pictures = leaderboard_of(cards)
    with needs_extra("the leaderboard"):
        drawn = {
            f"{picture.name}.svg": render(picture.drawing, name=picture.name, title=title, alt=picture.alt).svg
            for title, picture in pictures
        }
    folder = file.parent / FIGURES_DIR
    _write(file, f"{before}{BEGIN}\n{new}\n{END}{after}", folder, drawn)
    for name in set(re.findall(rf"\({FIGURES_DIR}/({PREFIX}[a-z0-9-]+\.svg)\)", old)) - set(drawn):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in drawn]


def leaderboard_of(cards: Sequence[Card]) -> tuple[str, list[tuple[str, Picture]]]:
    """Return the comparison of all cards as Markdown, and its figures with their titles."""
    boards = [
        _Board([card for card in cards if card.dataset == dataset], dataset)
        for dataset in sorted({card.dataset for card in cards})
    ]
    blocks = [block for board in boards for block in board.blocks()]
    return "\n\n".join(blocks), [picture for board in boards for picture in board.pictures]


def _write(file: Path, page: str, folder: Path, drawn: dict[str, bytes]) -> None:
    """Write the figures and then the page; new figures go again if the page cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if drawn:
        folder.mkdir(exist_ok=True)
    new = [folder / name for name in drawn if not (folder / name).exists()]
    try:
        for name, content in drawn.items():
            write_bytes_atomic(folder / name, content)
        write_text_atomic(file, page)
    except OSError:
        for figure in new:
            with contextlib.suppress(OSError):
                figure.unlink(missing_ok=True)
        raise


class _Board:
    """What is said of one data set."""

    def __init__(self, cards: Sequence[Card], dataset: str) -> None:
        self.title = _TITLES.get(dataset, wording.plain(dataset))
        self.standing = Standing(entries_of(cards))
        self.numbers = {entry.key: number for number, entry in enumerate(self.standing.rows, 1)}
        self.methods = sorted({entry.card.method for entry in self.standing.rows})
        self.pictures = list(self._pictures(f"{PREFIX}{wording.slug(dataset)}"))

    def blocks(self) -> Iterator[str]:
        """Yield the blocks of Markdown."""
        yield f"## {escaped(self.title)}"
        if self.standing.rows:
            yield "\n".join(table_lines(self._grid(), groups_below=True))
            yield "\n".join(f"- {escaped(line)}" for line in self.standing.legend(self.standing.places))
        if self.standing.unmeasured:
            yield f"Not measured yet: {escaped(', '.join(self.standing.unmeasured))}."
        for _, picture in self.pictures:
            yield f"![{escaped(picture.alt)}]({FIGURES_DIR}/{picture.name}.svg)"

    def _grid(self) -> Grid:
        standing = self.standing
        groups = [Cell(text=attack.title, span=len(attack.eps)) for attack in standing.attacks]
        return grid(
            f"Accuracy on {self.title}",
            (
                *("row", "model", "variant", "method", "passes", "clean"),
                *(f"ε {eps_text(eps)}" for _, eps in standing.places),
                *("trained", "linter"),
            ),
            (
                (
                    str(self.numbers[entry.key]),
                    entry.model,
                    entry.said,
                    entry.card.method,
                    entry.cost,
                    standing.clean.cell(entry, Fraction(0)),
                    *(attack.cell(entry, eps) for attack, eps in standing.places),
                    _trained(entry.card),
                    entry.verdict,
                )
                for entry in standing.rows
            ),
            groups=(Cell(text="", span=6), *groups, Cell(text="", span=2)),
            headings=4,
        )

    # --- the figures ---

    def _tag(self, entry: Entry) -> str:
        """Return the number of a row, marked if the linter raised an alarm."""
        return f"{self.numbers[entry.key]}{SUSPECT if entry.suspect else ''}"

    def _pictures(self, stem: str) -> Iterator[tuple[str, Picture]]:
        """Yield the figures with their titles; one without points is left out."""
        if self.standing.key is not None and (scatter := self._scatter(*self.standing.key)) is not None:
            attack, eps = self.standing.key
            title = f"{self.title}: clean against {attack.title} at ε {eps_text(eps)}"
            alt = f"Scatter plot, {title}. The numbers at the points are the rows of the table above."
            yield title, Picture(name=f"{stem}-clean-robust", alt=alt, drawing=scatter)
        if (lines := self._lines()) is not None:
            title = f"{self.title}: white-box accuracy against ε"
            alt = f"Line chart, {title}. The numbers in the legend are the rows of the table above."
            yield title, Picture(name=f"{stem}-eps", alt=alt, drawing=lines)

    def _scatter(self, attack: Columns, eps: Fraction) -> Scatter | None:
        grouped: dict[tuple[int, int], list[tuple[Result, Result, str]]] = {}
        for entry in self.standing.rows:
            across, up = self.standing.clean.of(entry, Fraction(0)), attack.of(entry, eps)
            if across is not None and up is not None:
                style = (self.methods.index(entry.card.method), (*VARIANTS, entry.variant).index(entry.variant))
                grouped.setdefault(style, []).append((across, up, self._tag(entry)))
        if not grouped:
            return None
        names = (*VARIANTS, "other")
        series = tuple(
            Series(
                label=f"{self.methods[method]} · {names[variant]}",
                style=Style(colour=method, dash=variant),
                at=tuple(across.accuracy for across, _, _ in points),
                values=tuple(up.accuracy for _, up, _ in points),
                ranges=tuple(up.interval for _, up, _ in points),
            )
            for (method, variant), points in sorted(grouped.items())
        )
        return Scatter(
            across="accuracy on clean images",
            up=f"accuracy, {attack.title} at ε {eps_text(eps)}",
            series=series,
            tags=tuple(tuple(tag for _, _, tag in points) for _, points in sorted(grouped.items())),
        )

    def _lines(self) -> Lines | None:
        """Return the line of each model in the colour of its method."""
        drawn: Counter[str] = Counter()

        def style(entry: Entry) -> Style:
            method = entry.card.method
            drawn[method] += 1
            return Style(colour=self.methods.index(method), dash=drawn[method] - 1)

        return self.standing.lines(lambda entry: f"{self._tag(entry)} {entry.model}", style)


def _trained(card: Card) -> str:
    """Say how long a model was trained, and how long the published one."""
    training = card.training
    said = f"{_epochs(training.epochs)} epochs" if training.epochs else MISSING
    if training.published is not None:
        scale, network = _epochs(training.published.epochs), training.published.network
        said += f" of {scale}" if network == card.architecture.name else f" (published: {scale}, {network})"
    begun = training.recipe.get("start_from")
    return f"{said}, from {begun.rpartition('/')[2]}" if isinstance(begun, str) else said


def _epochs(epochs: Sequence[int]) -> str:
    return " + ".join(map(str, epochs))
