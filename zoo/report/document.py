"""What a report is made of, before it is HTML or Markdown: sections of figures and tables of cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from zoo.bundle.wording import percent, slug
from zoo.report.drawings import Drawing

_BESIDE = 8
"""A table of more columns stands below its figure instead of beside it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table; `detail` is a second, smaller line."""

    text: str
    detail: str = ""
    apart: str = ""
    """How its terms differ from those of its neighbours; must not be overlooked."""
    value: float | None = None
    """The exact number behind the text."""
    tone: str = ""
    """"good", "alarm" or "unknown" for a verdict; said in words as well."""
    span: int = 1
    link: str = ""
    """The key of the section that the text leads to."""


def share(value: float | None, digits: int = 1) -> Cell:
    """Return the cell of a share, in per cent; a dash if it was not measured."""
    return Cell(text=percent(value, digits), value=value)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; the first `headings` columns name the row."""

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    groups: tuple[Cell, ...] = ()
    """A row above the header whose cells span several columns."""
    headings: int = 1
    folded: bool = False
    """Whether it is long and of use to few, so that it may be shown on demand."""

    @property
    def wide(self) -> bool:
        """Whether it has more columns than there is room for beside a figure."""
        return len(self.header) > _BESIDE


Row = tuple[str | Cell, ...]
"""The cells of one row of a table, where a text stands for a cell of that text."""


def grid(
    caption: str,
    header: Sequence[str | Cell],
    rows: Iterable[Sequence[str | Cell]],
    *,
    groups: Iterable[Cell] = (),
    headings: int = 1,
    folded: bool = False,
) -> Grid:
    """Return a table of cells; a text is a cell of that text."""
    return Grid(
        caption=caption,
        header=_cells(header),
        rows=tuple(map(_cells, rows)),
        groups=tuple(groups),
        headings=headings,
        folded=folded,
    )


def _cells(cells: Iterable[str | Cell]) -> tuple[Cell, ...]:
    return tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in cells)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and its text alternative; `name` is that of its files."""

    name: str
    alt: str
    drawing: Drawing


class Figures:
    """Makes the figures of a report, each with a file name that no other one has."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __call__(self, name: str, shown: str, drawing: Drawing) -> Picture:
        """Return a figure with this name, if no other has it, and with what a reader who does not see it is told."""
        self._names.append(slug(name, self._names))
        return Picture(name=self._names[-1], alt=f"{shown}; its numbers are in the table beside it.", drawing=drawing)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A line for a shell, and what it measures."""

    about: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a report says of one model in a sentence; the subject leads to where it is shown."""

    subject: str
    text: str
    """The sentence behind its subject."""
    tone: str = ""
    link: str = ""


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """Sentences, a figure with its numbers beside it, or tables alone."""

    title: str = ""
    claims: tuple[Claim, ...] = ()
    picture: Picture | None = None
    grids: tuple[Grid, ...] = ()
    remarks: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report."""

    key: str
    title: str
    intro: str = ""
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report: what everybody reads, then what compares the models, then each variant for itself."""

    title: str
    subtitle: str
    overview: Section
    compared: tuple[Section, ...]
    alone: tuple[Section, ...]

    @property
    def folded(self) -> tuple[Section, ...]:
        """Every section below the overview."""
        return (*self.compared, *self.alone)

    @property
    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Every figure with its title."""
        for section in (self.overview, *self.folded):
            for exhibit in section.exhibits:
                if exhibit.picture is not None:
                    yield exhibit.title, exhibit.picture
