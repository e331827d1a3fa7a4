"""What the figures of a report show, as plain numbers; `figures` makes SVG and PNG of them."""

from __future__ import annotations

from dataclasses import dataclass

INK, MUTED, GRID, PAGE = "#1b1d21", "#5a6069", "#d9dce1", "#ffffff"
# hues that people with a colour vision deficiency tell apart (after Okabe and Ito 2008), each at least 3:1 on white
SERIES = ("#0072b2", "#d55e00", "#00805d", "#b0558a", "#7d6608", "#332288", "#5f6368")
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    PAGE: "var(--page)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a series looks: the model decides the colour, the variant the dash and the marker."""

    colour: int = 0
    dash: int = 0
    hollow: bool = False

    @property
    def ink(self) -> str:
        """The colour as six hexadecimal digits."""
        return SERIES[self.colour % len(SERIES)]

    @property
    def fill(self) -> str:
        """The marker's face; the eighth model has the colour of the first and is hollow."""
        return PAGE if self.hollow != (self.colour // len(SERIES) % 2 == 1) else self.ink


@dataclass(frozen=True, kw_only=True)
class Series:
    """Named values; `at` are their places on the axis, `ranges` their intervals."""

    label: str
    style: Style
    values: tuple[float | None, ...]
    at: tuple[float, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Accuracy against something that is ordered."""

    axis: str
    ticks: tuple[tuple[float, str], ...]
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Accuracy per category: bars for a few series, dots for many."""

    categories: tuple[str, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the values of each series are spread."""

    axis: str
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A matrix of shares."""

    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """One accuracy against another; each point may have a short name."""

    across: str
    up: str
    series: tuple[Series, ...]
    """`at` is across, `values` is up, `ranges` are those of the values."""
    tags: tuple[tuple[str, ...], ...]
    """Of each series, the names of its points."""


Drawing = Lines | Bars | Spread | Heat | Scatter
