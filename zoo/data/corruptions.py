"""The fifteen common corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261).

`corrupt` makes them; the strengths in `CORRUPTIONS` are those of the authors' script for 32 x 32 images
(`make_cifar_c.py`), far milder than those for ImageNet. `zoo.data.cifar10_c` reads CIFAR-10-C itself. What
`corrupt` makes is *not* CIFAR-10-C and must not be called so. The differences:

- Randomness: numpy's generators, one stream per image, so that an image looks the same in whatever batch it comes.
- frost: the authors overlay crops of photographs; here each image gets a texture drawn for it, fern-like crystals
  that cover it on clouds from slate blue to white. Density and brightness are our choice, and accuracy depends on
  them: expect the largest difference here.
- motion_blur and snow: the blur follows ImageMagick's rule (a one-sided Gaussian along rounded offsets), in 8 bits.
- fog: our own plasma (diamond-square on a torus), with the authors' amplitudes.
- elastic_transform: positions are exact, where OpenCV rounds those of the affine map to 1/32 of a pixel.
- glass_blur: no difference meant. The authors' exchange of two pixels copies one over the other, because both are
  views of one array; what their script does, not what it says, is done here.
- Values are truncated to 8 bits, as by the authors, but only after adding 1e-6 of a level: what is whole in exact
  arithmetic stays whole.

A higher severity is meant to be harder, which need not be a larger distance: elastic_transform moves the whole image
most at severity 1 and bends it most at 5, and glass_blur is further from the image at 1 than at 3.

Time on one core of a shared server: 1,000 images of 32 x 32 through all 75 cells take 10 s
(6 s of processor time); zoom_blur, elastic_transform and frost, the slowest, a little over 1 s each.
"""

from __future__ import annotations

import io
import math
import operator
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.data.filters import (
    FloatArray,
    edge,
    filtered,
    gathered,
    gaussian_blurred,
    gaussian_weights,
    grey,
    mirror,
    motion_blurred,
    padded,
    plasma,
    sampled,
    square_noise,
    symmetric,
    through_pillow,
    truncated,
    zoomed,
)
from zoo.errors import BadInput, UnknownName

SEVERITIES = (1, 2, 3, 4, 5)
MINIMUM_SIDE = 8
CHUNK = 64  # images at a time: their intermediate arrays stay in the processor's cache

Generators = Iterable[np.random.Generator]


@dataclass(frozen=True)
class Corruption:
    """A corruption and its strengths."""

    apply: Callable[[FloatArray, Any, Generators], FloatArray]
    """(images, setting, generators) -> corrupted images, perhaps outside [0, 1]; images float64 (n, channel, height,
    width) in [0, 1], one generator per image, in order and to be gone through once."""
    settings: tuple[Any, Any, Any, Any, Any]
    """What `apply` is given at severity 1 to 5."""


def corrupt(pixels: Tensor, name: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images; the result depends on each image, its index and the arguments, and on nothing else.

    Args:
        pixels: uint8 (n, channel, height, width), 1 or 3 channels, sides of at least 8. The strengths are meant for
            sides of about 32: only elastic_transform grows with the image.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: picks another draw of every random corruption.
        first: index of the first image in its data set. Images of one index, corruption, severity and seed share
            their draws, so that a data set may be corrupted batch by batch, in any order.

    Returns:
        uint8, shaped like `pixels`, on their device. Draws are the same on every machine with the same numpy version.

    Raises:
        UnknownName: no such corruption.
        BadInput: pixels of another type or shape, or a number out of range.
    """
    corruption = corruption_named(name)
    severity = checked_severity(severity)
    _check_pixels(pixels)
    seed, first = _whole(seed, "seed"), _whole(first, "first")
    if seed < 0 or first < 0:
        raise BadInput(f"seed {seed} and first {first} must not be negative; count from 0")
    images = np.ascontiguousarray(pixels.cpu().numpy())
    corrupted = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        indices = range(first + start, first + start + len(chunk))
        generators = (_generator(seed, name, severity, index) for index in indices)
        changed = corruption.apply(chunk / 255, corruption.settings[severity - 1], generators)
        corrupted[start : start + CHUNK] = truncated(changed)
    return torch.from_numpy(corrupted).to(pixels.device)


def corruption_named(name: str) -> Corruption:
    """Return a corruption, or raise UnknownName."""
    if name not in CORRUPTIONS:
        raise UnknownName(name, CORRUPTIONS, kind="corruption")
    return CORRUPTIONS[name]


def checked_severity(severity: int) -> int:
    """Return a severity as a plain number, or raise BadInput unless it is 1 to 5."""
    if severity not in SEVERITIES:
        raise BadInput(f"severity {severity!r} does not exist; expected 1 (mildest) to 5, and no corruption is no call")
    return _whole(severity, "severity")


def _whole(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise BadInput(f"{name} must be a whole number, got {value!r:.40}") from error


def _check_pixels(pixels: object) -> None:
    if not isinstance(pixels, Tensor):
        raise BadInput(f"pixels are a {type(pixels).__name__}, expected a torch tensor of uint8")
    if pixels.dtype != torch.uint8:
        raise BadInput(f"pixels are {pixels.dtype}, expected torch.uint8; corrupt them before scaling to [0, 1]")
    shape = tuple(pixels.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise BadInput(
            f"pixels have the shape {shape}, expected (n, 1 or 3, height, width); add the batch dimension to a single "
            "image, and put channels before height and width"
        )
    if min(shape[2:]) < MINIMUM_SIDE:
        raise BadInput(
            f"images of {shape[2]}x{shape[3]} pixels are too small, expected sides of {MINIMUM_SIDE} or more"
        )


def _generator(seed: int, name: str, severity: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(name.encode()), severity, index))


# --- noise ---


def _gaussian_noise(images: FloatArray, scale: float, generators: Generators) -> FloatArray:
    return images + scale * np.stack([rng.standard_normal(images.shape[1:]) for rng in generators])


def _shot_noise(images: FloatArray, photons: float, generators: Generators) -> FloatArray:
    """Count photons: Poisson with mean `photons` where the image is white."""
    return np.stack([rng.poisson(image * photons) for image, rng in zip(images, generators, strict=True)]) / photons


def _impulse_noise(images: FloatArray, share: float, generators: Generators) -> FloatArray:
    """Set a share of the values, each channel on its own, to 0 or 1 with equal probability."""
    draws = np.stack([rng.random(images.shape[1:]) for rng in generators])
    return np.where(draws < share, draws < share / 2, images)


# --- blur ---


def _defocus_blur(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    """Convolve with a disk of `radius` pixels, itself smoothed by a 3 x 3 Gaussian of width `softness`."""
    radius, softness = setting
    reach = math.ceil(radius) + 1
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    smoothing = gaussian_weights(softness, reach=1)
    for axis in (0, 1):
        disk = filtered(disk, smoothing, axis, edge)
    disk /= disk.sum()

    height, width = images.shape[2:]
    wide = padded(padded(images, reach, 2, mirror), reach, 3, mirror)
    blurred = np.zeros_like(images)
    for row, column in zip(*np.nonzero(disk), strict=True):
        blurred += disk[row, column] * wide[:, :, row : row + height, column : column + width]
    return blurred


def _glass_blur(images: FloatArray, setting: tuple[float, int], generators: Generators) -> FloatArray:
    """Blur, replace pixels by themselves or a neighbour above or to the left, `rounds` times, and blur again.

    The authors walk from the last pixel back to the third of each line, so that they only copy pixels which this round
    has not reached yet: each round is one gather.
    """
    sigma, rounds = setting
    height, width = images.shape[2:]
    rows, columns = np.arange(height)[:, None], np.arange(width)
    shifts = np.stack([rng.integers(-1, 1, (rounds, 2, height, width)) for rng in generators])
    shifts[:, :, :, (rows < 2) | (columns < 2)] = 0
    shattered = truncated(gaussian_blurred(images, sigma, truncate=4, border=edge)) / 255
    for turn in range(rounds):
        index = (rows + shifts[:, turn, 0]) * width + columns + shifts[:, turn, 1]
        shattered = gathered(shattered, index)
    return gaussian_blurred(shattered, sigma, truncate=4, border=edge)


def _motion_blur(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    radius, sigma = setting
    return motion_blurred(images, radius, sigma, [rng.uniform(-45, 45) for rng in generators])


def _zoom_blur(images: FloatArray, end: float, generators: Generators) -> FloatArray:
    """Average the image with its enlargements by 1, 1.01, … up to about `end`."""
    factors = np.arange(1, end, 0.01)  # may or may not reach `end`, in the authors' script as here
    total = sum((zoomed(images, factor) for factor in factors), images)
    return total / (len(factors) + 1)


# --- weather ---


def _snow(
    images: FloatArray, setting: tuple[float, float, float, float, float, float, float], generators: Generators
) -> FloatArray:
    """Add flakes, drawn, enlarged and blown along a line, and the same turned by 180 degrees, on a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, kept = setting
    draws = [(rng.normal(mean, deviation, images.shape[2:]), rng.uniform(-135, -45)) for rng in generators]
    flakes = zoomed(np.stack([layer for layer, _ in draws])[:, None], zoom)
    flakes = truncated(np.where(flakes < threshold, 0, flakes)) / 255
    flakes = motion_blurred(flakes, radius, sigma, [angle for _, angle in draws])
    whitened = np.maximum(images, 1.5 * grey(images) + 0.5)
    return kept * images + (1 - kept) * whitened + flakes + flakes[:, :, ::-1, ::-1]


def _frost(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    kept, added = setting
    height, width = images.shape[2:]
    drawn = [(square_noise(rng, height, width), _ferns(rng, height, width)) for rng in generators]
    clouds = plasma(np.stack([noise for noise, _ in drawn]), 1.4)[:, :height, :width]
    whiteness = np.clip(0.75 * clouds + 0.7 * np.stack([ferns for _, ferns in drawn]) - 0.1, 0, 1)
    slate, white = np.array([0.22, 0.30, 0.40]), np.array([0.92, 0.97, 1.0])
    ice = slate[:, None, None] + (white - slate)[:, None, None] * whiteness[:, None]
    return kept * images + added * (ice if images.shape[1] == 3 else grey(ice))


def _ferns(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """Draw ice crystals, (height, width) in [0, 1]: straight stems with branches at 60 degrees, as water freezes."""
    stems = 12
    side = max(height, width)

    def drawn(low: float, high: float) -> FloatArray:
        return rng.uniform(low, high, (stems, 1, 1))

    angle, length, spread = drawn(0, 2 * math.pi), side * drawn(0.5, 1.1), side * drawn(0.15, 0.35)
    spacing, thickness = side / 32 * drawn(2.5, 4.5), side / 32 * drawn(0.4, 0.8)
    rows = np.arange(height)[:, None] - height * drawn(0, 1)
    columns = np.arange(width) - width * drawn(0, 1)
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = np.abs(rows * np.cos(angle) - columns * np.sin(angle))

    root = along - across / math.tan(math.pi / 3)  # where on the stem the branch through this point begins
    nearest = np.abs(root / spacing - np.round(root / spacing)) * spacing * math.sin(math.pi / 3)
    reach = spread * (1 - root / length)  # branches shorten towards the tip
    grown = (root > 0) & (across < reach)
    fading = 1 - np.divide(across, reach, out=np.zeros_like(across), where=grown)
    branches = np.exp(-((nearest / thickness) ** 2)) * fading
    stem = np.exp(-((across / thickness) ** 2))
    ferns: FloatArray = np.where(grown, np.maximum(stem, branches), 0).max(0)
    return ferns


def _fog(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    """Add plasma up to `thickness` and scale back to the image's own brightest value."""
    thickness, decay = setting
    height, width = images.shape[2:]
    clouds = plasma(np.stack([square_noise(rng, height, width) for rng in generators]), decay)
    brightest: FloatArray = images.max((1, 2, 3), keepdims=True)
    return (images + thickness * clouds[:, None, :height, :width]) * brightest / (brightest + thickness)


def _brightness(images: FloatArray, added: float, generators: Generators) -> FloatArray:
    """Raise V in HSV, up to 1; with hue and saturation kept, this scales the channels alike."""
    value: FloatArray = images.max(1, keepdims=True)
    raised = (value + added).clip(max=1)
    return np.where(value > 0, images * raised / np.where(value > 0, value, 1), raised)


# --- digital ---


def _contrast(images: FloatArray, kept: float, generators: Generators) -> FloatArray:
    means: FloatArray = images.mean((2, 3), keepdims=True)
    return (images - means) * kept + means


def _elastic_transform(images: FloatArray, setting: tuple[float, float, float], generators: Generators) -> FloatArray:
    """Move three points and the image with them by an affine map, then every pixel by a smooth random field.

    The setting, in sides of the image: strength and smoothness of the field, range of the three points.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    strength, sigma, jitter = (side * part for part in setting)
    middle, arm = (height // 2, width // 2), side // 3
    corners = np.array([[1, 1, 1], [-1, 1, 1], [-1, -1, 1]]) * [arm, arm, 1] + [*middle, 0]  # (row, column, 1)
    draws = [(rng.uniform(-jitter, jitter, (3, 2)), rng.uniform(-1, 1, (2, height, width))) for rng in generators]
    moved = corners + np.pad(np.stack([shift for shift, _ in draws]), ((0, 0), (0, 0), (0, 1)))
    back = np.linalg.solve(moved, np.broadcast_to(corners[:, :2], (len(images), 3, 2)))[..., None, None]
    rows, columns = np.arange(height)[:, None], np.arange(width)
    source_rows, source_columns = (back[:, 0, i] * rows + back[:, 1, i] * columns + back[:, 2, i] for i in (0, 1))
    images = sampled(images, source_rows, source_columns, mirror)
    if strength == 0:
        return images
    field = strength * gaussian_blurred(np.stack([noise for _, noise in draws]), sigma, truncate=3, border=symmetric)
    return sampled(images, rows + field[:, 0], columns + field[:, 1], symmetric)


def _pixelate(images: FloatArray, share: float, generators: Generators) -> FloatArray:
    height, width = images.shape[2:]
    small = (int(width * share), int(height * share))

    def pixelated(image: Image.Image) -> Image.Image:
        box = Image.Resampling.BOX
        return image.resize(small, box).resize((width, height), box)

    return through_pillow(images, pixelated)


def _jpeg_compression(images: FloatArray, quality: int, generators: Generators) -> FloatArray:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return through_pillow(images, compressed)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(_glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": Corruption(_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        _elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40)),
}
"""In the paper's order. All settings are in pixels of a 32 x 32 image or in units of its range of values."""
