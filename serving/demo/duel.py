"""The parts of the page on which two models stand side by side, and what happens when they are used."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from serving.demo import fragments, words
from serving.demo.attack import MAX_RESTARTS, MAX_SEED, MAX_STEPS, Attack
from serving.demo.contest import AUTOMATIC
from serving.demo.handlers import MAX_AMPLIFICATION, Handlers, has_test_images, uploaded_file
from serving.demo.shelf import Shelf

MAX_EPS_LEVELS = 32

_DRAWINGS = sorted(str(file) for file in (Path(__file__).parent / "examples").glob("*.png"))
_EPS_TEXT = f"(k) => `${{k}}/255 = ${{(k / 255).toFixed(4)}}: {words.EPS_MEANING}`"


_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of what happens beside the attack: it is no call of the API and shows no progress."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The parts that tell of one of the two models."""

    heading: gr.HTML
    card: gr.HTML
    panel: gr.Column
    """What is hidden until there is a result."""
    results: list[Any]
    """The pictures, the answers, the texts and the file, in the order of `Handlers.attack`."""


def add_duel(shelf: Shelf, cache_dir: str) -> None:
    """Add the parts to the page that is being built.

    Args:
        shelf: the models on offer.
        cache_dir: the folder from which gradio hands out files.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            asked = _ask_for_image(shelf)
        with gr.Column(scale=3, min_width=280):
            asked |= _ask_for_models(shelf) | _ask_for_attack()
            button = gr.Button("Attack", variant="primary", size="lg", elem_id="attack")
            status = gr.Markdown(words.NOTHING_YET, elem_id="status")
    with gr.Row():
        sides = [_side(letter, shelf, default) for letter, default in zip("AB", shelf.defaults, strict=True)]
    with gr.Accordion("How to read this, and what it cannot say", open=False):
        gr.Markdown(words.EXPLANATION)
    with gr.Accordion("The result as JSON", open=False):
        numbers = gr.JSON(label="Result", show_label=False)

    handlers = Handlers(shelf, cache_dir)
    clicked = button.click(
        handlers.attack,
        [asked[name] for name in inspect.signature(handlers.attack).parameters],
        [*sides[0].results, *sides[1].results, numbers, status],
        api_name="attack",
        api_description="Attack one image on two models; pictures come back as PNG files, numbers as JSON.",
        concurrency_limit=1,
    )
    panels = [side.panel for side in sides]
    clicked.success(lambda: [gr.update(visible=True)] * 2, None, panels, queue=False, **_QUIET)
    clicked.failure(lambda: words.DID_NOT_RUN, None, [status], queue=False, **_QUIET)
    for letter, model, side in zip("AB", (asked["model_a"], asked["model_b"]), sides, strict=True):
        describe = functools.partial(handlers.describe, letter)
        model.change(describe, [model], [side.heading, side.card], queue=False, **_QUIET)
        # the results shown were another model's
        model.change(lambda: gr.update(visible=False), None, [side.panel], queue=False, **_QUIET)
    asked["random"].click(
        handlers.random_image, [asked["model_a"]], [asked["image"], asked["label"]], concurrency_limit=1, **_QUIET
    )


def _ask_for_image(shelf: Shelf) -> dict[str, Any]:
    """Add what asks for the image, by the parameters of `Handlers.attack`, and the button "random"."""
    image = gr.Image(
        value=_DRAWINGS[0],
        label="Image",
        type="filepath",
        format="png",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=250,
        elem_classes="picture",
        elem_id="image",
        alt_text="The image to attack",
    )
    # gradio would try all of Pillow's decoders on the file, and answer damage with a traceback
    image.preprocess = uploaded_file  # type: ignore[method-assign]
    drawings = gr.Examples(_DRAWINGS, image, label="Drawings to try").dataset
    random_test = gr.Button("Random test image", visible=has_test_images(shelf), elem_id="random")
    label = gr.Dropdown(
        [("automatic (the clean answer)", AUTOMATIC), *((name, name) for name in shelf.classes)],
        value=AUTOMATIC,
        label="True label",
        info="A model whose answer leaves it is fooled. Automatic: what each model answers to the clean image.",
        elem_id="label",
    )
    for event in (image.upload, image.clear, drawings.click):  # another image has another label
        event(lambda: AUTOMATIC, None, [label], queue=False, **_QUIET)
    return {"image": image, "label": label, "random": random_test}


def _ask_for_models(shelf: Shelf) -> dict[str, Any]:
    """Add what asks for the models, by the parameters of `Handlers.attack`."""
    choices = [(choice.replace("/", ", "), choice) for choice in shelf.choices]
    with gr.Row():
        model_a, model_b = (
            gr.Dropdown(choices, value=value, label=f"Model {letter}", min_width=240, elem_id=f"model-{letter.lower()}")
            for letter, value in zip("AB", shelf.defaults, strict=True)
        )
    crafted = [
        ("on each model itself (white-box)", "own"),
        ("on A, shown to both (transfer)", "a"),
        ("on B, shown to both (transfer)", "b"),
    ]
    scenario = gr.Radio(crafted, value="own", label="The adversarial image is crafted", elem_id="crafted")
    return {"model_a": model_a, "model_b": model_b, "crafted": scenario}


def _ask_for_attack() -> dict[str, Any]:
    """Add what asks for the attack, by the parameters of `Handlers.attack`."""
    default = Attack()
    methods = [("PGD, many steps", "PGD"), ("FGSM, one step", "FGSM")]
    method = gr.Radio(methods, value=default.method, label="Attack", elem_id="method")
    with gr.Group():
        eps = gr.Slider(0, MAX_EPS_LEVELS, default.eps_levels, step=1, label="eps, in levels of 1/255", elem_id="eps")
        eps_text = gr.Markdown(words.eps_text(default.eps_levels), elem_id="eps-text")
    eps.change(None, [eps], [eps_text], js=_EPS_TEXT, **_QUIET)
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, default.steps, step=1, label="Steps (PGD)", min_width=140)
        restarts = gr.Slider(1, MAX_RESTARTS, default.restarts, step=1, label="Attempts (PGD)", min_width=140)
    with gr.Row():
        amplification = gr.Slider(1, MAX_AMPLIFICATION, 20, step=1, label="Amplify the shown change", min_width=140)
        seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=140)
    return {
        "method": method,
        "eps_levels": eps,
        "steps": steps,
        "restarts": restarts,
        "amplification": amplification,
        "seed": seed,
    }


def _side(letter: str, shelf: Shelf, default: str) -> Side:
    low = letter.lower()
    with gr.Column(min_width=320, elem_classes="side"):
        heading = _html(fragments.heading(letter, default))
        with gr.Column(visible=False) as panel:
            summary = _html(elem_id=f"summary-{low}")
            with gr.Row():
                pictures = [
                    gr.Image(
                        label=what,
                        format="png",
                        interactive=False,
                        buttons=["fullscreen"],
                        height=200,
                        min_width=130,
                        elem_classes="picture",
                        alt_text=f"{what} image of model {letter}; the text above says what was answered",
                        elem_id=f"{what.lower()}-{low}",
                    )
                    for what in ("Clean", "Adversarial", "Change")
                ]
            scale = _html()
            with gr.Row():
                clean = gr.Label(label="Clean answer", num_top_classes=3, min_width=150)
                adversarial = gr.Label(label="Adversarial answer", num_top_classes=3, min_width=150)
            details = _html(elem_id=f"details-{low}")
            download = gr.DownloadButton(
                f"Download the adversarial PNG of model {letter}", size="sm", elem_id=f"download-{low}"
            )
        card = _html(fragments.card(*shelf.card(default)))
    results = [*pictures, clean, adversarial, summary, scale, details, download]
    return Side(heading=heading, card=card, panel=panel, results=results)


def _html(value: str = "", *, elem_id: str | None = None) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, elem_id=elem_id)
