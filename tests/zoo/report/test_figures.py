"""Figures: plain numbers in, SVG, PNG and a piece of a page out."""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from zoo.report.drawings import Bars, Heat, Lines, Scatter, Series, Spread, Style
from zoo.report.figures import render

pytest.importorskip("matplotlib", reason="the figures of a report need manygates[report]")


@pytest.mark.parametrize("number", [3, 9])
def test_figures_of_few_and_many_series_are_drawn_without_a_warning(number: int) -> None:
    series = tuple(
        Series(
            label=f"model {index} · single",
            style=Style(colour=index, dash=index),
            values=(0.5, None, 0.0),
            at=(0.0, 1.0, 2.0),
            ranges=((0.4, 0.6), (0.0, 1.0), (0.0, 0.0)),
        )
        for index in range(number)
    )
    names = tuple(f"category {index} with a long name, $x^2$" for index in range(3))
    drawings = [
        Lines(axis="ε", ticks=((0.0, "0"), (1.0, "1/100"), (1.01, "3/100"), (2.0, "2")), series=series),
        Bars(categories=names, series=series),
        Spread(axis="accuracy", series=(*series, replace(series[0], values=(None,)))),
        Heat(row_axis="made on", column_axis="on", rows=names, columns=names, values=((0.1, None, 1.0),) * 3),
        Scatter(across="clean", up="robust", series=series, tags=(("1", "2", "a name"),) * number),
    ]
    for index, drawing in enumerate(drawings):
        rendered = render(drawing, name=f"figure-{index}", title="A title " * 20, alt="alt")
        root = ElementTree.fromstring(rendered.inline)
        assert "id=" in rendered.inline
        assert all((element.get("id") or "figure-").startswith("figure-") for element in root.iter())
        assert "var(--page)" in rendered.inline
        assert b"var(--" not in rendered.svg


def test_a_matrix_too_large_to_annotate_is_still_drawn() -> None:
    names = tuple(str(index) for index in range(30))
    heat = Heat(row_axis="a", column_axis="b", rows=names, columns=names, values=((0.5,) * 30,) * 30)
    assert render(heat, name="large", title="", alt="").png.startswith(b"\x89PNG")


def test_drawing_leaves_the_user_s_matplotlib_settings_as_they_were() -> None:
    import matplotlib

    before, stateful = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    render(Bars(categories=("a",), series=()), name="none", title="", alt="")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == stateful
