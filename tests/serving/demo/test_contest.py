"""One image against two models."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")

from PIL import Image

from serving.demo.attack import Attack
from serving.demo.contest import Outcome, Setup, contest, report
from serving.demo.shelf import EOT_DRAWS, VOTES, Shelf
from zoo.errors import BadImage, BadInput, UnknownName

PLAIN, GATED, DIGITS = "plain/single", "gates/gated", "digits/single"
EPS_8 = Attack(eps_levels=8, steps=3)


def setup(attack: Attack = EPS_8, **values: Any) -> Setup:
    return Setup(**{"model_a": PLAIN, "model_b": GATED, **values}, attack=attack)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def distance(outcome: Outcome) -> int:
    return int(np.abs(pixels(outcome.adversarial_png) - pixels(outcome.clean_png)).max())


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
@pytest.mark.parametrize("eps_levels", [1, 8])
def test_an_adversarial_image_is_a_png_within_the_ball(
    shelf: Shelf, image_png: bytes, method: Any, eps_levels: int
) -> None:
    outcomes = contest(shelf, image_png, setup(replace(EPS_8, method=method, eps_levels=eps_levels)))

    for outcome in outcomes:
        assert (pixels(outcome.clean_png) == pixels(image_png)).all(), "a 32x32 picture is shown as it is"
        assert 0 < distance(outcome) <= eps_levels
        assert outcome.distance == distance(outcome)
    assert outcomes[1].crafted.gradients == EOT_DRAWS * (1 if method == "FGSM" else 3)


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
def test_eps_0_returns_the_image_itself(shelf: Shelf, image_png: bytes, method: Any) -> None:
    attack = Attack(method=method, eps_levels=0, steps=2)

    for outcome in contest(shelf, image_png, setup(attack, model_b="gates/ensemble")):
        assert (pixels(outcome.adversarial_png) == pixels(image_png)).all()
        assert outcome.verdict == "held"


def test_random_gates_vote_on_fresh_paths(shelf: Shelf, image_png: bytes) -> None:
    plain, gated = contest(shelf, image_png, setup())

    assert sum(gated.clean.votes) == sum(gated.adversarial.votes) == VOTES
    assert sum(plain.clean.votes) == 1
    document = report(setup(), (plain, gated))
    assert document["a"]["votes"] is None
    assert document["b"]["votes"]["draws"] == sum(document["b"]["votes"]["clean"].values()) == VOTES


def test_the_same_seed_gives_the_same_result_and_another_seed_another(shelf: Shelf, image_png: bytes) -> None:
    first, second, third = (
        contest(shelf, image_png, setup(replace(EPS_8, steps=2, seed=seed), model_a=GATED))[0] for seed in (5, 5, 6)
    )

    assert first.adversarial_png == second.adversarial_png != third.adversarial_png
    assert first.clean.votes == second.clean.votes
    assert first.adversarial == second.adversarial


def test_a_transferred_image_is_the_one_crafted_on_the_other_model(shelf: Shelf, image_png: bytes) -> None:
    own, shown = contest(shelf, image_png, setup(scenario="a", model_b="gates/single"))

    assert own.adversarial_png == shown.adversarial_png
    assert (own.transferred, shown.transferred) == (False, True)
    document = report(setup(scenario="a"), (own, shown))
    assert document["attack"]["crafted"] == "a"
    assert document["b"]["crafted_on"] == PLAIN


def test_a_gradient_of_an_ensemble_counts_its_members(shelf: Shelf, image_png: bytes) -> None:
    attack = replace(EPS_8, steps=2)
    both = contest(shelf, image_png, setup(attack, scenario="b", model_a="gates/single", model_b="gates/ensemble"))

    assert [outcome.crafted.gradients for outcome in both] == [4, 4], "an ensemble of two, two steps"
    assert both[0].surrogate_letter == "B"


def test_a_clean_answer_that_is_wrong_is_not_to_the_attacks_credit(shelf: Shelf, image_png: bytes) -> None:
    (automatic, _) = contest(shelf, image_png, setup(Attack(eps_levels=0, steps=1), model_b=PLAIN))
    classes = shelf.card(PLAIN)[0].classes
    label = next(name for index, name in enumerate(classes) if index != automatic.clean.top)

    (given, _) = contest(shelf, image_png, setup(label=label, model_b=PLAIN))

    assert (automatic.label_given, automatic.label) == (False, automatic.clean.top)
    assert (given.label_given, given.verdict) == (True, "wrong before")


def test_a_large_photograph_is_scaled_to_what_each_model_takes(shelf: Shelf) -> None:
    file = io.BytesIO()
    Image.effect_noise((640, 400), 60).convert("RGB").save(file, "jpeg")

    colour, grey = contest(shelf, file.getvalue(), setup(Attack(steps=1), model_b=DIGITS))

    assert pixels(colour.clean_png).shape == (32, 32, 3)
    assert pixels(grey.clean_png).shape == (28, 28)


# -------------------------------------------------------------------------------------------------------- what is wrong


def encoded(kind: str, *images: Image.Image) -> bytes:
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


FRAMES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: encoded("gif", *FRAMES), "PNG, JPEG or WEBP"),
        (lambda: encoded("png", *FRAMES), "2 frames"),
        (lambda: b"<script>", "PNG, JPEG or WEBP"),
        (lambda: encoded("png", Image.new("1", (4000, 4000))), "4,000,000"),
        (lambda: b"\x89PNG\r\n\x1a\n\0\0\0", "decoded"),
    ],
    ids=["gif", "animated png", "text", "huge", "cut"],
)
def test_a_file_that_is_no_still_image_is_refused(shelf: Shelf, content: Callable[[], bytes], message: str) -> None:
    with pytest.raises(BadImage, match=message):
        contest(shelf, content(), setup(model_b=PLAIN))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"label": None}, BadInput, "true label"),
        ({"label": "7"}, BadInput, "'7' .* plain, .* airplane"),
        ({"model_a": None}, BadInput, "model A"),
        ({"model_b": ""}, BadInput, "model B"),
        ({"model_b": "plain/gated"}, UnknownName, "plain/gated"),
        ({"scenario": "c"}, UnknownName, "'c'"),
        ({"scenario": "a", "model_b": DIGITS}, BadInput, "plain .* digits"),
    ],
)
def test_a_setup_that_makes_no_sense_is_refused(
    shelf: Shelf, image_png: bytes, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        contest(shelf, image_png, setup(**values))
