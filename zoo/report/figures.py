"""The figures of a report: plain numbers in, SVG and PNG out, drawn by matplotlib without pyplot's global state.

The colours of a standalone file are fixed, on white. The SVG for the page has the same shapes with the page's variables
in place of the colours, so that it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.report.wording import MISSING, percent, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")
_WIDTH = 5.8
"""Inches; at 9 point the text stays legible where a page shows a figure 360 pixels wide."""
_ANNOTATED = 24
"""Up to how many rows and columns a heat map has its values written in."""
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


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


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One figure, as files and as a piece of the page."""

    svg: bytes
    png: bytes
    inline: str


def render(drawing: Drawing, *, name: str, title: str, alt: str) -> Rendered:
    """Draw a figure; the same numbers give the same bytes.

    Args:
        drawing: what to draw.
        name: of its files; also keeps its identifiers apart from those of other figures on the page.
        title: written above the standalone figure, which the page leaves out as it has a heading there.
        alt: what a reader who does not see the figure is told.
    """
    with _settings(name):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, _height(drawing)), dpi=72, layout="constrained")
        figure.suptitle(_wrapped(title, 58), x=0.01, ha="left", fontsize=10, fontweight="bold", gid="figure-title")
        _DRAW[type(drawing)](figure, drawing)
        svg = _saved(figure, format="svg", metadata={"Date": None, "Creator": None})
        below = _title_height(figure)
        png = _saved(figure, format="png", dpi=144, metadata={"Software": None})
    return Rendered(svg=svg, png=png, inline=_inline(svg, name=name, title=title, alt=alt, below=below))


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Set matplotlib's own defaults, whatever the user's configuration says, and put everything back."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": f"manygates {salt}",  # "none" alone would be no salt
                "svg.fonttype": "none",
                "font.family": ["DejaVu Sans"],
                "font.size": 9,
                "text.parse_math": False,  # a name with dollar signs is a name
                "axes.unicode_minus": False,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.facecolor": PAGE,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "figure.facecolor": PAGE,
                "savefig.facecolor": PAGE,
                "grid.color": GRID,
                "text.color": INK,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "legend.frameon": False,
                "legend.fontsize": 8,
                "legend.handlelength": 3.2,
            }
        )
        yield


def _saved(figure: Figure, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, **options)
    return stream.getvalue()


def _height(drawing: Drawing) -> float:
    """Return inches that leave room for every row and for the legend below, within what a PNG can be."""
    return min(_wanted_height(drawing), 60.0)


def _wanted_height(drawing: Drawing) -> float:
    if isinstance(drawing, (Lines, Scatter)):
        return 3.4 + 0.19 * math.ceil(len(drawing.series) / _legend_columns(drawing.series))
    if isinstance(drawing, Spread):
        return 1.1 + 0.55 * len(drawing.series)
    if isinstance(drawing, Bars):
        legend = math.ceil(len(drawing.series) / _legend_columns(drawing.series))
        each = 0.16 * len(drawing.series) + 0.1 if len(drawing.series) <= 4 else max(0.36, 0.06 * len(drawing.series))
        return 1.0 + max(each, 0.26) * len(drawing.categories) + 0.19 * legend
    return 1.5 + min(0.36 * len(drawing.rows), 9.0)


def _draw_lines(figure: Figure, drawing: Lines) -> None:
    axes = figure.add_subplot()
    for series in drawing.series:
        known = [index for index, value in enumerate(series.values) if value is not None]
        at = [series.at[index] for index in known]
        values = [_number(series.values[index]) for index in known]
        axes.plot(
            at,
            values,
            color=series.style.ink,
            linestyle=_DASHES[series.style.dash % len(_DASHES)],
            marker=_MARKERS[series.style.dash % len(_MARKERS)],
            markersize=4.5,
            markerfacecolor=series.style.fill,
            linewidth=1.6,
            label=_legible(series.label, 70),
            zorder=3,
        )
        if series.ranges:
            ranges = [series.ranges[index] for index in known]
            axes.vlines(
                at, [low for low, _ in ranges], [high for _, high in ranges], color=series.style.ink, linewidth=1.1
            )
            axes.plot(at, [low for low, _ in ranges], "_", color=series.style.ink, markersize=5)
            axes.plot(at, [high for _, high in ranges], "_", color=series.style.ink, markersize=5)
    _share_axis(axes, "y")
    kept = _spaced(drawing.ticks)
    axes.set_xticks([place for place, _ in kept], [_legible(text, 14) for _, text in kept])
    axes.set_xlabel(_legible(drawing.axis, 70))
    axes.grid(axis="both", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, axes, drawing.series)


def _draw_bars(figure: Figure, drawing: Bars) -> None:
    axes = figure.add_subplot()
    number, bars = len(drawing.series), len(drawing.series) <= 4
    alike = len({series.style.ink for series in drawing.series}) < number
    for index, series in enumerate(drawing.series):
        known = [place for place, value in enumerate(series.values) if value is not None]
        values = [_number(series.values[place]) for place in known]
        if bars:
            thickness = 0.8 / number
            places = [place - 0.4 + (index + 0.5) * thickness for place in known]
            axes.barh(
                places,
                values,
                height=thickness * 0.86,
                facecolor=series.style.ink,
                edgecolor=PAGE,
                hatch=("", "////", "....", "xxxx")[series.style.dash % 4] if alike else "",
                linewidth=0,
                label=_legible(series.label, 70),
            )
            # a bar of no length must not look like one that is missing
            nought = [place for place, value in zip(places, values, strict=True) if value < 0.005]
            axes.plot([0.0] * len(nought), nought, "|", color=series.style.ink, markersize=max(3.0, 8.0 / number))
        else:
            offset = (index + 0.5) / number * 0.6 - 0.3
            axes.plot(
                values,
                [place + offset for place in known],
                linestyle="none",
                color=series.style.ink,
                marker=_MARKERS[series.style.dash % len(_MARKERS)],
                markersize=4.5,
                markerfacecolor=series.style.fill,
                label=_legible(series.label, 70),
            )
    _share_axis(axes, "x")
    axes.set_yticks(range(len(drawing.categories)), [_wrapped(name, 30) for name in drawing.categories])
    axes.set_ylim(len(drawing.categories) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.hlines([row + 0.5 for row in range(len(drawing.categories) - 1)], 0, 1, color=GRID, linewidth=0.4, zorder=0)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, axes, drawing.series)


def _draw_scatter(figure: Figure, drawing: Scatter) -> None:
    axes = figure.add_subplot()
    points: list[tuple[float, float, str]] = []
    for series, tags in zip(drawing.series, drawing.tags, strict=True):
        known = [index for index, value in enumerate(series.values) if value is not None]
        values = [_number(series.values[index]) for index in known]
        axes.plot(
            [series.at[index] for index in known],
            values,
            linestyle="none",
            color=series.style.ink,
            marker=_MARKERS[series.style.dash % len(_MARKERS)],
            markersize=6,
            markerfacecolor=series.style.fill,
            label=_legible(series.label, 70),
            zorder=3,
        )
        for index, value in zip(known, values, strict=True):
            points.append((series.at[index], value, tags[index]))
            if series.ranges:
                axes.vlines(series.at[index], *series.ranges[index], color=series.style.ink, linewidth=1.1, zorder=2)
    _share_axis(axes, "x", whole=False)
    _share_axis(axes, "y")
    axes.set_xlabel(_legible(drawing.across, 70))
    axes.set_ylabel(_legible(drawing.up, 46))
    axes.grid(axis="both", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, axes, drawing.series)
    _tag(figure, axes, points)


def _tag(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point, on the side where it covers the fewest others."""
    figure.draw_without_rendering()  # settles where the axes are
    at = [tuple(map(float, axes.transData.transform((across, up)))) for across, up, _ in points]
    taken = [(x, y, 4.0) for x, y in at]
    for (x, y), (across, up, tag) in zip(at, points, strict=True):
        half = 2.4 * len(tag)
        sides = [(side * (6 + half), height) for height in (0.0, 8.0, -8.0) for side in (1, -1)]

        def covers(side: tuple[float, float], x: float = x, y: float = y, half: float = half) -> int:
            return sum(
                abs(x + side[0] - other) < half + width and abs(y + side[1] - height) < 8
                for other, height, width in taken
            )

        side = min(sides, key=covers)
        taken.append((x + side[0], y + side[1], half))
        axes.annotate(
            _legible(tag, 8),
            (across, up),
            xytext=side,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=INK,
            zorder=5,
        )


def _draw_spread(figure: Figure, drawing: Spread) -> None:
    import numpy as np

    axes = figure.add_subplot()
    for row, series in enumerate(drawing.series):
        values = [value for value in series.values if value is not None]
        if not values:
            continue
        low, first, median, third, high = (float(np.quantile(values, q)) for q in (0, 0.25, 0.5, 0.75, 1))
        ink = series.style.ink
        axes.hlines(row, low, high, color=ink, linewidth=1.1)
        axes.barh(row, third - first, left=first, height=0.5, facecolor=PAGE, edgecolor=ink, linewidth=1.2, zorder=2)
        axes.vlines(median, row - 0.25, row + 0.25, color=ink, linewidth=2.2, zorder=4)
        # the golden ratio spreads neighbours apart without a random number
        places = [row + 0.34 * (2 * ((index + 1) * 0.618034 % 1) - 1) for index in range(len(values))]
        axes.plot(
            values,
            places,
            linestyle="none",
            marker=_MARKERS[series.style.dash % len(_MARKERS)],
            markersize=3.5,
            color=ink,
            markerfacecolor=series.style.fill,
            alpha=0.75,
            zorder=3,
        )
    _share_axis(axes, "x", whole=False)
    axes.set_yticks(range(len(drawing.series)), [_in_two(series.label) for series in drawing.series])
    axes.set_ylim(len(drawing.series) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_legible(drawing.axis, 70))
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_heat(figure: Figure, drawing: Heat) -> None:
    import matplotlib
    import numpy as np

    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    shares = np.array([[math.nan if value is None else value for value in row] for row in drawing.values])
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1, edgecolors=PAGE, linewidth=1)
    size = max(len(drawing.rows), len(drawing.columns))
    if size <= _ANNOTATED:
        for row, values in enumerate(drawing.values):
            for column, value in enumerate(values):
                dark = value is not None and _luminance(colours(value)[:3]) < 0.18
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    MISSING if value is None else f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=9 if size <= 10 else 6,
                    color=INK if value is None else "#fefefe" if dark else "#000000",
                )
    rows = [_legible(name, 18) for name in drawing.rows]
    columns = [_legible(name, 18) for name in drawing.columns]
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    upright = max(map(len, columns)) * len(columns) > 50
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 if upright else 0)
    axes.set_ylim(len(rows), 0)
    axes.tick_params(length=0)
    axes.set_ylabel(_legible(drawing.row_axis, 40))
    axes.set_xlabel(_legible(drawing.column_axis, 70))
    for spine in axes.spines.values():
        spine.set_visible(False)


_DRAW: dict[type[Any], Callable[[Any, Any], None]] = {
    Lines: _draw_lines,
    Bars: _draw_bars,
    Spread: _draw_spread,
    Heat: _draw_heat,
    Scatter: _draw_scatter,
}


def _luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of red, green and blue in [0, 1]; white text is the clearer one below 0.18."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _share_axis(axes: Axes, which: str, *, whole: bool = True) -> None:
    """Make an axis one of shares in per cent; the whole range, or what the values need."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    low, high = (0.0, 1.0) if whole else (max(low, 0.0), min(high, 1.0))
    if high - low < 0.02:
        low, high = max(0.0, low - 0.01), min(1.0, high + 0.01)
    margin = 0.02 * (high - low)
    step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 8 or step == 0.2)
    first, last = math.ceil(round(low / step, 6)), math.floor(round(high / step, 6))
    ticks = [index * step for index in range(first, last + 1) if index * step <= 1]
    labels = [percent(tick, 1 if step < 0.01 else 0) for tick in ticks]
    if which == "y":
        axes.set_ylim(low - margin, high + margin)
        axes.set_yticks(ticks, labels)
        axes.set_ylabel("accuracy")
    else:
        axes.set_xlim(low - margin / (2 if whole else 1), high + margin)
        axes.set_xticks(ticks, labels)
        axes.set_xlabel("accuracy")


def _legend_columns(series: Sequence[Series]) -> int:
    return 2 if all(len(each.label) <= 34 for each in series) else 1


def _legend(figure: Figure, axes: Axes, series: Sequence[Series]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=_legend_columns(series))


def _spaced(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out ticks whose labels would run into each other; the first and the last stay."""
    if not ticks:
        return []
    ordered = sorted(ticks)
    span = (ordered[-1][0] - ordered[0][0]) or 1.0
    kept = ordered[:1]
    for place, text in ordered[1:]:
        if (place - kept[-1][0]) / span >= 0.011 * (len(text) + len(kept[-1][1])):
            kept.append((place, text))
        elif place == ordered[-1][0] and len(kept) > 1:
            kept[-1] = (place, text)
    return kept


def _legible(text: str, length: int) -> str:
    """Return a label in the glyphs that the font has, cut to a length; the table beside the figure has it whole."""
    text = plain(text)
    known = _glyphs()
    text = "".join(character if ord(character) in known else "\N{WHITE SQUARE}" for character in text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(_legible(text, 3 * width), width)[:3])


def _in_two(label: str) -> str:
    """Break "model · variant" in two lines."""
    model, _, variant = label.rpartition(" · ")
    return f"{_legible(model, 28)}\n{_legible(variant, 28)}" if model else _legible(label, 28)


def _glyphs() -> dict[int, int]:
    from matplotlib import font_manager

    file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans"))
    return dict(font_manager.get_font(file).get_charmap())


def _title_height(figure: Figure) -> float:
    """Return how many points from the top the title ends."""
    title = next(text for text in figure.texts if text.get_gid() == "figure-title")
    box = title.get_window_extent()
    return float(figure.get_figheight() * 72 - box.y0 * 72 / figure.dpi + 4)


def _inline(svg: bytes, *, name: str, title: str, alt: str, below: float) -> str:
    """Turn a standalone SVG into a piece of a page: own identifiers, the page's colours, no title, a description."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)  # noqa: S314 -- what matplotlib has just written
    for parent in list(root.iter()):
        for child in list(parent):
            # a style of "*" would reach the whole page; metadata says nothing here
            if child.get("id") == "figure-title" or child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}--{value}")
            elif value.startswith("#") and key.endswith("href"):
                element.set(key, f"#{name}--{value[1:]}")
            else:
                value = value.replace("url(#", f"url(#{name}--")
                element.set(key, re.sub(r"#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), value))
    width, height = (float(length) for length in (root.get("viewBox") or "0 0 1 1").split()[2:])
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("viewBox", f"0 {below:.1f} {width:g} {height - below:.1f}")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}--title {name}--alt")
    for place, (key, text) in enumerate((("title", title), ("desc", alt))):
        said = ElementTree.Element(f"{{{_SVG}}}{key}", {"id": f"{name}--{'alt' if key == 'desc' else key}"})
        said.text = plain(text)
        root.insert(place, said)
    return ElementTree.tostring(root, encoding="unicode")
