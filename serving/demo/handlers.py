"""What the page's endpoints answer: from the values of gradio's parts to the values of gradio's parts."""

from __future__ import annotations

import contextlib
import functools
import html
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
from gradio import processing_utils
from numpy.typing import NDArray

from serving.demo import fragments, words
from serving.demo.attack import Attack, Method, check_choice
from serving.demo.contest import Outcome, Scenario, Setup, contest, report
from serving.demo.pictures import amplified, png_of, read_levels
from serving.demo.shelf import Shelf
from zoo.data import datasets
from zoo.errors import BadImage, ManygatesError, check_count

MAX_AMPLIFICATION = 50


class Handlers:
    """The endpoints' functions; the parameters of `attack` are the arguments of the endpoint of that name."""

    def __init__(self, shelf: Shelf, cache_dir: str) -> None:
        self._shelf = shelf
        self._cache_dir = cache_dir
        """The folder from which gradio hands out files."""

    def attack(
        self,
        image: str | None,
        label: str,
        model_a: str,
        model_b: str,
        method: str,
        crafted: str,
        eps_levels: int,
        steps: int,
        restarts: int,
        seed: int,
        amplification: int,
    ) -> list[Any]:
        """Attack one image on two models.

        Returns:
            the results of side A, those of side B (each as `duel.Side.results`), the report, the status line.
        """
        with shown_errors():
            check_count("amplification", amplification, 1, MAX_AMPLIFICATION)
            setup = Setup(
                model_a=model_a,
                model_b=model_b,
                label=label,
                scenario=cast(Scenario, crafted),
                attack=Attack(
                    method=cast(Method, method), eps_levels=eps_levels, steps=steps, restarts=restarts, seed=seed
                ),
            )
            outcomes = contest(self._shelf, _content(image), setup)
        sides = [
            self._side(letter, outcome, setup.attack, amplification)
            for letter, outcome in zip("ab", outcomes, strict=True)
        ]
        return [*sides[0], *sides[1], report(setup, outcomes), words.status(outcomes)]

    def random_image(self, model: str) -> tuple[NDArray[np.uint8], str]:
        """Return a random test image of a model's data set, (height, width[, channel]), and its class."""
        with shown_errors():
            check_choice("model A", model)
            card, _ = self._shelf.card(model)
            images = _test_images(card.dataset)
        index = random.SystemRandom().randrange(len(images))
        planes = images.pixels[index].numpy()
        picture = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
        return np.ascontiguousarray(picture), card.classes[int(images.labels[index])]

    def describe(self, letter: str, choice: str) -> tuple[str, str]:
        """Return a side's heading and its card."""
        with shown_errors():
            return fragments.heading(letter, choice), fragments.card(*self._shelf.card(choice))

    def _side(self, letter: str, outcome: Outcome, attack: Attack, amplification: int) -> list[Any]:
        card = outcome.contestant.card
        clean, adversarial = (read_levels(png, card.input) for png in (outcome.clean_png, outcome.adversarial_png))
        adversarial_file = self._saved(
            outcome.adversarial_png, f"model-{letter}-adversarial-{attack.eps_levels}-of-255.png"
        )
        return [
            self._saved(outcome.clean_png, f"model-{letter}-clean.png"),
            adversarial_file,
            self._saved(
                png_of(amplified(clean, adversarial, amplification)), f"model-{letter}-change-times-{amplification}.png"
            ),
            dict(zip(card.classes, outcome.clean.probabilities, strict=True)),
            dict(zip(card.classes, outcome.adversarial.probabilities, strict=True)),
            fragments.summary(outcome, attack),
            fragments.scale(amplification),
            fragments.details(outcome),
            adversarial_file,
        ]

    def _saved(self, png: bytes, name: str) -> str:
        return str(processing_utils.save_bytes_to_cache(png, name, self._cache_dir))


def uploaded_file(payload: Any) -> str | None:
    """Take an uploaded file as it is; `decode_image` decides what may be decoded."""
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("The image came without a file; upload a PNG, JPEG or WEBP file.", print_exception=False)
    return str(payload.path)


def has_test_images(shelf: Shelf) -> bool:
    """Whether a data set of these models is on this machine; nothing is fetched."""
    named = {card.dataset for card in shelf.cards} & set(datasets.DATASETS)
    return any(datasets.present(name, "test") for name in named)


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Turn what the user can put right into a message on the page; anything else stays a defect of ours."""
    try:
        yield
    except ManygatesError as error:
        # the page renders messages as HTML, and some quote bytes of the upload
        raise gr.Error(
            html.escape(str(error), quote=False), title="That did not work", print_exception=False
        ) from error


def _content(image: str | None) -> bytes:
    if image is None:
        raise BadImage("there is no image; upload one, or choose one of the drawings")
    return Path(image).read_bytes()


@functools.cache
def _test_images(name: str) -> datasets.Images:
    return datasets.load(name, "test", fetch=False)
