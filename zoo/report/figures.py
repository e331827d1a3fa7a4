"""The figures of a report as SVG and PNG, drawn by matplotlib without pyplot's global state.

The colours of a standalone file are fixed, on white. The SVG for the page has the same shapes with the page's variables
in place of the colours, so that it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.bundle.wording import plain
from zoo.errors import BadInput
from zoo.report.axes import draw, height, wrapped
from zoo.report.drawings import GRID, INK, MUTED, PAGE, VARIABLES, Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 5.8
"""Inches; at 9 point the text stays legible where a page shows a figure 360 pixels wide."""
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


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

        figure = Figure(figsize=(_WIDTH, height(drawing)), dpi=72, layout="constrained")
        figure.suptitle(wrapped(title, 58), x=0.01, ha="left", fontsize=10, fontweight="bold", gid="figure-title")
        draw(figure, drawing)
        svg = _saved(figure, format="svg", metadata={"Date": None, "Creator": None})
        below = _title_height(figure)
        png = _saved(figure, format="png", dpi=144, metadata={"Software": None})
    return Rendered(svg=svg, png=png, inline=_inline(svg, name=name, title=title, alt=alt, below=below))


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Raise BadInput with advice where matplotlib or jinja2 is missing; `what` needs it, as a sentence's subject."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise BadInput(f"{what} needs {error.name}, which is not installed; pip install 'manygates[report]'") from error


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
