"""What a report is made of, before it is HTML or Markdown: sections of figures and tables of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zoo.report.drawings import Drawing


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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and its text alternative; `name` is that of its files."""

    name: str
    alt: str
    drawing: Drawing


@dataclass(frozen=True, kw_only=True)
class Command:
    """A line for a shell, and what it measures."""

    about: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A figure with its numbers beside it, or tables alone."""

    title: str = ""
    picture: Picture | None = None
    grids: tuple[Grid, ...] = ()
    remarks: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report."""

    key: str
    title: str
    intro: str
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """Every figure with its title."""
        for section in self.sections:
            for exhibit in section.exhibits:
                if exhibit.picture is not None:
                    yield exhibit.title, exhibit.picture
