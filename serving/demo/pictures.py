"""The demo's pictures, in whole levels of 1/255.

The page shows what was classified. An adversarial image is rounded to 8 bits and put back into the ball *before* any
model judges it, and the page hands out those very PNG files. Rounding afterwards could leave the ball or undo the
attack, and a lossy picture (gradio's default is WebP) differs from the original by more than a typical eps.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from zoo.attacks import to_grid
from zoo.errors import BadImage
from zoo.input_format import InputFormat
from zoo.pictures import DAMAGE, FORMATS, MAX_PIXELS, decode_image, encode_png

Levels = NDArray[np.uint8]
"""An image as its file holds it: (channel, height, width), levels 0 to 255."""


def read_levels(content: bytes, wanted: InputFormat, *, max_pixels: int = MAX_PIXELS) -> Levels:
    """Decode an image file and scale it to what a model takes; of an animation take the first frame.

    Raises:
        BadImage: if the bytes are no PNG, JPEG or WEBP file, or the image has more than `max_pixels`.
    """
    levels: Levels = np.rint(decode_image(content, wanted, max_pixels=max_pixels)[0] * 255).astype(np.uint8)
    return levels


def check_still(content: bytes) -> None:
    """Refuse an image that can be decoded but moves.

    Raises:
        BadImage: if it has several frames.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
    except DAMAGE:  # in its metadata, which the decoder leaves alone
        return
    if frames > 1:
        raise BadImage(f"the image is an animation of {frames} frames, expected a still image; export one frame")


def png_of(levels: Levels) -> bytes:
    """Return the PNG file of these levels."""
    return encode_png(levels.astype(np.float32) / np.float32(255))


def batch_of(levels: Levels) -> Tensor:
    """Return a batch of one image, float32 (1, channel, height, width) in [0, 1]."""
    return torch.from_numpy(levels.astype(np.float32) / np.float32(255))[None]


def levels_in_the_ball(images: Tensor, clean: Levels, eps_levels: int) -> Levels:
    """Round a batch of one image to whole levels that differ from `clean` by at most `eps_levels`."""
    rounded = to_grid(images, batch_of(clean), eps_levels / 255)
    levels: Levels = (rounded[0] * 255).round().numpy().astype(np.uint8)
    return levels


def amplified(clean: Levels, adversarial: Levels, factor: int) -> Levels:
    """Return the signed difference times `factor` around the grey level 128, cut off at black and white."""
    difference = adversarial.astype(np.int32) - clean.astype(np.int32)
    return (128 + factor * difference).clip(0, 255).astype(np.uint8)


def png_distance(clean_png: bytes, adversarial_png: bytes) -> int:
    """Decode two PNG files and return the largest difference of any number in them, in levels of 1/255."""
    first, second = (np.asarray(Image.open(io.BytesIO(png))).astype(np.int32) for png in (clean_png, adversarial_png))
    return int(np.abs(first - second).max())
