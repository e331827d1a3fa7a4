"""What the page's endpoints answer, without a server."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("gradio", reason="the demo needs gradio")

import gradio as gr

from serving.demo.handlers import Handlers, uploaded_file
from serving.demo.shelf import Shelf


@pytest.fixture
def handlers(shelf: Shelf, tmp_path: Path) -> Handlers:
    return Handlers(shelf, str(tmp_path / "cache"))


def attack(handlers: Handlers, image: str | None, **values: Any) -> list[Any]:
    arguments = {
        "label": "automatic",
        "model_a": "plain/single",
        "model_b": "plain/single",
        "method": "FGSM",
        "crafted": "own",
        "eps_levels": 8,
        "steps": 1,
        "restarts": 1,
        "seed": 0,
        "amplification": 10,
    }
    return handlers.attack(image, **{**arguments, **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"amplification": None}, "amplification is None"),
        ({"amplification": 51}, "51"),
        ({"seed": None}, "seed is None"),
        ({"model_a": None}, "model A"),
        ({"method": "CW"}, "'CW'"),
        ({"label": "<b>"}, "&lt;b&gt;"),
    ],
)
def test_what_the_user_can_put_right_is_said_as_html(
    handlers: Handlers, image_png: bytes, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    (tmp_path / "picture.png").write_bytes(image_png)
    with pytest.raises(gr.Error) as refused:
        attack(handlers, str(tmp_path / "picture.png"), **values)
    assert said in refused.value.message
    assert not refused.value.print_exception


def test_a_model_is_described_by_its_name_and_its_card(handlers: Handlers) -> None:
    heading, card = handlers.describe("B", "gates/ensemble")
    assert "Model B: gates, ensemble" in heading
    assert "<table>" in card
    with pytest.raises(gr.Error, match="nobody/single"):
        handlers.describe("A", "nobody/single")


def test_an_upload_is_taken_as_the_file_that_it_is() -> None:
    assert uploaded_file(None) is None
    assert uploaded_file(SimpleNamespace(path="/cache/text.png")) == "/cache/text.png"
    with pytest.raises(gr.Error):
        uploaded_file(SimpleNamespace(path=None))


@pytest.mark.data
@pytest.mark.slow
def test_a_random_test_image_comes_with_its_class(handlers: Handlers, shelf: Shelf) -> None:
    picture, label = handlers.random_image("digits/single")
    assert (picture.shape, picture.dtype) == ((28, 28), np.uint8)
    assert label in shelf.card("digits/single")[0].classes
