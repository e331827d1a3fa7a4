"""Image files, whole levels, and the way between them."""

import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")

from PIL import Image

from serving.demo import pictures
from zoo.errors import BadImage


def encoded(kind: str, frames: int) -> bytes:
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")[:frames]]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_an_image_that_moves_is_refused_and_a_still_one_is_not(kind: str) -> None:
    with pytest.raises(BadImage, match="2 frames"):
        pictures.check_still(encoded(kind, 2))
    pictures.check_still(encoded(kind, 1))


def test_what_is_no_image_is_left_to_the_decoder() -> None:
    pictures.check_still(b"no image")


def test_levels_come_back_from_their_png() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    with Image.open(io.BytesIO(pictures.png_of(levels))) as image:
        assert (np.asarray(image).transpose(2, 0, 1) == levels).all()


@pytest.mark.parametrize(("eps_levels", "expected"), [(0, [100, 0, 255]), (2, [102, 2, 255])])
def test_an_image_is_rounded_inside_the_ball(eps_levels: int, expected: list[int]) -> None:
    clean = np.array([100, 0, 255], dtype=np.uint8).reshape(3, 1, 1)
    moved = (pictures.batch_of(clean) + 0.4 / 255 + eps_levels / 255).clamp(0, 1)
    assert pictures.levels_in_the_ball(moved, clean, eps_levels).ravel().tolist() == expected


def test_the_change_is_amplified_around_grey() -> None:
    clean = np.array([100, 100, 100, 100], dtype=np.uint8).reshape(1, 2, 2)
    adversarial = np.array([100, 102, 97, 255], dtype=np.uint8).reshape(1, 2, 2)
    assert pictures.amplified(clean, adversarial, 10).ravel().tolist() == [128, 148, 98, 255]


def test_the_drawings_are_small_pictures_of_the_right_size() -> None:
    drawings = sorted((Path(pictures.__file__).parent / "examples").glob("*.png"))
    assert len(drawings) == 5
    for file in drawings:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
