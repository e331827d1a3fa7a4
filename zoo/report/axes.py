"""Each kind of drawing on matplotlib's axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from zoo.bundle.wording import MISSING, percent, plain
from zoo.report.drawings import GRID, INK, PAGE, Bars, Drawing, Heat, Lines, Scatter, Series, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")
_ANNOTATED = 24
"""Up to how many rows and columns a heat map has its values written in."""


def draw(figure: Figure, drawing: Drawing) -> None:
    """Draw on an empty figure."""
    _DRAW[type(drawing)](figure, drawing)


def height(drawing: Drawing) -> float:
    """Return inches that leave room for every row and for the legend below, within what a PNG can be."""
    return min(_wanted_height(drawing), 60.0)


def _wanted_height(drawing: Drawing) -> float:
    if isinstance(drawing, Heat):
        return 1.5 + min(0.36 * len(drawing.rows), 9.0)
    number = len(drawing.series)
    if isinstance(drawing, Spread):
        return 1.1 + 0.55 * number
    legend = 0.19 * math.ceil(number / _legend_columns(drawing.series))
    if isinstance(drawing, Bars):
        each = 0.16 * number + 0.1 if number <= 4 else max(0.36, 0.06 * number)
        return 1.0 + max(each, 0.26) * len(drawing.categories) + legend
    return 3.4 + legend


def _known(series: Series) -> tuple[list[int], list[float]]:
    """Return which values were measured, and these values."""
    pairs = [(index, value) for index, value in enumerate(series.values) if value is not None]
    return [index for index, _ in pairs], [value for _, value in pairs]


def _points(series: Series, size: float = 4.5) -> dict[str, Any]:
    """Return how matplotlib draws the points of a series."""
    return {
        "color": series.style.ink,
        "marker": _MARKERS[series.style.dash % len(_MARKERS)],
        "markersize": size,
        "markerfacecolor": series.style.fill,
        "label": _legible(series.label, 70),
    }


def _behind(axes: Axes, which: Literal["x", "y", "both"]) -> None:
    """Draw the grid of an axis behind everything."""
    axes.grid(axis=which, linewidth=0.6)
    axes.set_axisbelow(True)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a drawing from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _draw_lines(figure: Figure, drawing: Lines) -> None:
    axes = figure.add_subplot()
    for series in drawing.series:
        known, values = _known(series)
        at = [series.at[index] for index in known]
        dash = _DASHES[series.style.dash % len(_DASHES)]
        axes.plot(at, values, linestyle=dash, linewidth=1.6, zorder=3, **_points(series))
        if series.ranges:
            low, high = ([series.ranges[index][end] for index in known] for end in (0, 1))
            axes.vlines(at, low, high, color=series.style.ink, linewidth=1.1)
            for ends in (low, high):
                axes.plot(at, ends, "_", color=series.style.ink, markersize=5)
    _share_axis(axes, "y")
    kept = _spaced(drawing.ticks)
    axes.set_xticks([place for place, _ in kept], [_legible(text, 14) for _, text in kept])
    axes.set_xlabel(_legible(drawing.axis, 70))
    _behind(axes, "both")
    _legend(figure, axes, drawing.series)


def _draw_bars(figure: Figure, drawing: Bars) -> None:
    axes = figure.add_subplot()
    number, bars = len(drawing.series), len(drawing.series) <= 4
    alike = len({series.style.ink for series in drawing.series}) < number
    for index, series in enumerate(drawing.series):
        known, values = _known(series)
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
            axes.plot(values, [place + offset for place in known], linestyle="none", **_points(series))
    _share_axis(axes, "x")
    _rows(axes, [wrapped(name, 30) for name in drawing.categories])
    axes.hlines([row + 0.5 for row in range(len(drawing.categories) - 1)], 0, 1, color=GRID, linewidth=0.4, zorder=0)
    _behind(axes, "x")
    _legend(figure, axes, drawing.series)


def _draw_scatter(figure: Figure, drawing: Scatter) -> None:
    axes = figure.add_subplot()
    points: list[tuple[float, float, str]] = []
    for series, tags in zip(drawing.series, drawing.tags, strict=True):
        known, values = _known(series)
        axes.plot([series.at[index] for index in known], values, linestyle="none", zorder=3, **_points(series, 6))
        for index, value in zip(known, values, strict=True):
            points.append((series.at[index], value, tags[index]))
            if series.ranges:
                axes.vlines(series.at[index], *series.ranges[index], color=series.style.ink, linewidth=1.1, zorder=2)
    _share_axis(axes, "x", whole=False)
    _share_axis(axes, "y")
    axes.set_xlabel(_legible(drawing.across, 70))
    axes.set_ylabel(_legible(drawing.up, 46))
    _behind(axes, "both")
    _legend(figure, axes, drawing.series)
    _tag(figure, axes, points)


def _tag(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point, on the side where it covers the fewest others."""
    figure.draw_without_rendering()  # settles where the axes are
    at = [tuple(map(float, axes.transData.transform((across, up)))) for across, up, _ in points]
    taken = [(x, y, 4.0) for x, y in at]
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": INK, "zorder": 5}
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
        axes.annotate(_legible(tag, 8), (across, up), xytext=side, textcoords="offset points", **look)


def _draw_spread(figure: Figure, drawing: Spread) -> None:
    import numpy as np

    axes = figure.add_subplot()
    for row, series in enumerate(drawing.series):
        _, values = _known(series)
        if not values:
            continue
        low, first, median, third, high = (float(np.quantile(values, q)) for q in (0, 0.25, 0.5, 0.75, 1))
        ink = series.style.ink
        axes.hlines(row, low, high, color=ink, linewidth=1.1)
        axes.barh(row, third - first, left=first, height=0.5, facecolor=PAGE, edgecolor=ink, linewidth=1.2, zorder=2)
        axes.vlines(median, row - 0.25, row + 0.25, color=ink, linewidth=2.2, zorder=4)
        # the golden ratio spreads neighbours apart without a random number
        places = [row + 0.34 * (2 * ((index + 1) * 0.618034 % 1) - 1) for index in range(len(values))]
        axes.plot(values, places, linestyle="none", alpha=0.75, zorder=3, **_points(series, 3.5))
    _share_axis(axes, "x", whole=False)
    _rows(axes, [_in_two(series.label) for series in drawing.series])
    axes.set_xlabel(_legible(drawing.axis, 70))
    _behind(axes, "x")


def _draw_heat(figure: Figure, drawing: Heat) -> None:
    import matplotlib
    import numpy as np

    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    shares = np.array([[math.nan if value is None else value for value in row] for row in drawing.values])
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1, edgecolors=PAGE, linewidth=1)
    size = max(len(drawing.rows), len(drawing.columns))
    if size <= _ANNOTATED:
        fontsize = 9 if size <= 10 else 6
        for row, values in enumerate(drawing.values):
            for column, value in enumerate(values):
                dark = value is not None and _luminance(colours(value)[:3]) < 0.18
                ink = INK if value is None else "#fefefe" if dark else "#000000"
                text = MISSING if value is None else f"{100 * value:.0f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=fontsize, color=ink)
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


def wrapped(text: str, width: int) -> str:
    """Return a text in at most three lines of a width in characters."""
    return "\n".join(textwrap.wrap(_legible(text, 3 * width), width)[:3])


def _in_two(label: str) -> str:
    """Break "model · variant" in two lines."""
    model, _, variant = label.rpartition(" · ")
    return f"{_legible(model, 28)}\n{_legible(variant, 28)}" if model else _legible(label, 28)


def _glyphs() -> dict[int, int]:
    from matplotlib import font_manager

    file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans"))
    return dict(font_manager.get_font(file).get_charmap())
