"""Filters and maps of images that the corruptions are made of, on float64 arrays (image, channel, height, width)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

TRUNCATION_SLACK = 1e-6

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
Border = Callable[[IntArray, int], IntArray]


def truncated(images: FloatArray) -> npt.NDArray[np.uint8]:
    """Return images in [0, 1] as bytes, cut off rather than rounded."""
    return (images.clip(0, 1) * 255 + TRUNCATION_SLACK).astype(np.uint8)


# --- borders: which pixel stands in for one outside ---


def edge(index: IntArray, size: int) -> IntArray:
    """a a | a b c d | d d."""
    return index.clip(0, size - 1)


def mirror(index: IntArray, size: int) -> IntArray:
    """c b | a b c d | c b, as far as it takes."""
    folded = np.abs(index) % (2 * size - 2)
    mirrored: IntArray = np.minimum(folded, 2 * size - 2 - folded)
    return mirrored


def symmetric(index: IntArray, size: int) -> IntArray:
    """b a | a b c d | d c, as far as it takes."""
    folded = index % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


# --- filters and maps on (…, height, width); sums are spelled out, so that no result depends on the batch ---


def padded(images: FloatArray, reach: int, axis: int, border: Border) -> FloatArray:
    """Return images with `reach` more pixels at both ends of an axis."""
    size = images.shape[axis]
    return images.take(border(np.arange(-reach, size + reach), size), axis)


def gaussian_weights(sigma: float, reach: int) -> FloatArray:
    """Return the weights of a Gaussian at the whole numbers from -reach to reach; they sum to 1."""
    weights: FloatArray = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return weights / float(weights.sum())


def filtered(images: FloatArray, weights: FloatArray, axis: int, border: Border) -> FloatArray:
    """Convolve images with weights along an axis."""
    size = images.shape[axis]
    wide = np.moveaxis(padded(images, len(weights) // 2, axis, border), axis, 0)
    shifted = (weight * wide[shift : shift + size] for shift, weight in enumerate(weights))
    return np.moveaxis(sum(shifted, np.zeros(())), 0, axis)


def gaussian_blurred(images: FloatArray, sigma: float, *, truncate: float, border: Border) -> FloatArray:
    """Convolve images with a Gaussian that is cut off at `truncate` times `sigma`, a width in pixels."""
    weights = gaussian_weights(sigma, reach=int(truncate * sigma + 0.5))
    return filtered(filtered(images, weights, -2, border), weights, -1, border)


def motion_blurred(images: FloatArray, radius: float, sigma: float, angles: list[float]) -> FloatArray:
    """Average along a line that starts at each pixel, weighted by half a Gaussian; angles in degrees, clockwise."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    reach, (height, width) = len(steps), images.shape[2:]
    wide = padded(padded(images, reach, 2, edge), reach, 3, edge)
    blurred = np.zeros_like(images)
    for number, angle in enumerate(angles):
        downwards, rightwards = (
            reach + np.ceil(steps * part(math.radians(angle)) - 0.5).astype(int) for part in (math.sin, math.cos)
        )
        for weight, top, left in zip(weights, downwards, rightwards, strict=True):
            blurred[number] += weight * wide[number, :, top : top + height, left : left + width]
    return np.floor(blurred * 255 + 0.5) / 255


def zoomed(images: FloatArray, factor: float) -> FloatArray:
    """Enlarge the middle of the images to their size, by linear interpolation from its first to its last pixel."""
    for axis in (-2, -1):
        size = images.shape[axis]
        crop = math.ceil(size / factor)
        enlarged = round(crop * factor)
        places = np.arange(size) + (enlarged - size) // 2
        position = places * ((crop - 1) / (enlarged - 1))
        low = np.floor(position).astype(np.intp)
        high = np.minimum(low + 1, crop - 1)
        weight = np.expand_dims(position - low, -1) if axis == -2 else position - low
        start = (size - crop) // 2
        images = images.take(start + low, axis) * (1 - weight) + images.take(start + high, axis) * weight
    return images


def sampled(images: FloatArray, rows: FloatArray, columns: FloatArray, border: Border) -> FloatArray:
    """Read images at real positions (n, height, width), bilinearly."""
    height, width = images.shape[2:]
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    above, below = (border(top.astype(np.intp) + i, height) * width for i in (0, 1))
    before, after = (border(left.astype(np.intp) + i, width) for i in (0, 1))
    upper = (1 - right) * gathered(images, above + before) + right * gathered(images, above + after)
    lower = (1 - right) * gathered(images, below + before) + right * gathered(images, below + after)
    return (1 - down) * upper + down * lower


def gathered(images: FloatArray, index: IntArray) -> FloatArray:
    """Read pixels by their place in the flattened image, the same for all channels; index (n, height, width)."""
    flat = images.reshape(*images.shape[:2], -1)
    return np.take_along_axis(flat, index.reshape(len(images), 1, -1), 2).reshape(images.shape)


def grey(images: FloatArray) -> FloatArray:
    """Return the luma of ITU-R BT.601, (n, 1, height, width)."""
    if images.shape[1] == 1:
        return images
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def square_noise(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """Draw what `plasma` needs for an image: a square whose side is a power of two and covers it."""
    side = 1 << (max(height, width) - 1).bit_length()
    return rng.uniform(-1, 1, (side, side))


def plasma(noise: FloatArray, decay: float) -> FloatArray:
    """Turn uniform noise in [-1, 1] into clouds in [0, 1] by midpoint displacement on a torus.

    Fournier, Fussell & Carpenter 1982. The displacement shrinks by `decay` squared from one scale to the next, as the
    authors' product of two decaying amplitudes does. The noise is (n, side, side), the side a power of two.
    """
    heights = np.zeros_like(noise)
    step, amplitude = noise.shape[-1], 1.0
    while step >= 2:
        middle, step_start = slice(step // 2, None, step), slice(None, None, step)
        corners = heights[:, step_start, step_start]
        pairs = corners + np.roll(corners, -1, 1)
        centres = (pairs + np.roll(pairs, -1, 2)) / 4 + amplitude * noise[:, middle, middle]
        level = corners + np.roll(corners, -1, 2) + centres + np.roll(centres, 1, 1)
        upright = pairs + centres + np.roll(centres, 1, 2)
        heights[:, middle, middle] = centres
        heights[:, step_start, middle] = level / 4 + amplitude * noise[:, step_start, middle]
        heights[:, middle, step_start] = upright / 4 + amplitude * noise[:, middle, step_start]
        step, amplitude = step // 2, amplitude / decay**2
    lowest: FloatArray = heights.min((1, 2), keepdims=True)
    highest: FloatArray = heights.max((1, 2), keepdims=True)
    return (heights - lowest) / (highest - lowest)


def through_pillow(images: FloatArray, change: Callable[[Image.Image], Image.Image]) -> FloatArray:
    """Apply a change to each image as Pillow's 8-bit image."""

    def changed() -> Iterator[npt.NDArray[np.uint8]]:
        for array in truncated(images).transpose(0, 2, 3, 1):
            grey = array.shape[2] == 1
            yield np.asarray(change(Image.fromarray(array[:, :, 0] if grey else array))).reshape(array.shape)

    return np.stack(list(changed())).transpose(0, 3, 1, 2) / 255
