"""The fifteen common corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261), and a reader of their own files.

`corrupt` makes them; the strengths in `CORRUPTIONS` are those of the authors' script for 32 x 32 images
(`make_cifar_c.py`), far milder than those for ImageNet. `official` reads CIFAR-10-C as its authors published it. What
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
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from zoo.data.datasets import DATA_VARIABLE
from zoo.errors import BadInput, DataMissing, UnknownName

SEVERITIES = (1, 2, 3, 4, 5)
MINIMUM_SIDE = 8
CHUNK = 64  # images at a time: their intermediate arrays stay in the processor's cache
TRUNCATION_SLACK = 1e-6

OFFICIAL_FOLDER = "CIFAR-10-C"
OFFICIAL_IMAGES = 10_000
OFFICIAL_SOURCE = "https://zenodo.org/records/2535967"

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
Border = Callable[[IntArray, int], IntArray]
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
    corruption = _corruption(name)
    severity = _checked_severity(severity)
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
        corrupted[start : start + CHUNK] = _truncated(changed)
    return torch.from_numpy(corrupted).to(pixels.device)


def find_official() -> Path | None:
    """Return `CIFAR-10-C` in the data folder (`MANYGATES_DATA`, or else `../shared/data`), None if absent."""
    folder = Path(os.environ.get(DATA_VARIABLE) or "../shared/data") / OFFICIAL_FOLDER
    return folder if folder.is_dir() else None


def official(folder: Path, name: str, severity: int) -> Tensor:
    """Read one cell of CIFAR-10-C: uint8 (10000, 3, 32, 32), in the order of CIFAR-10's test set.

    Raises:
        UnknownName: no such corruption.
        BadInput: no such severity.
        DataMissing: the file is missing, truncated, or not one of CIFAR-10-C.
    """
    _corruption(name)
    severity = _checked_severity(severity)
    images = _mapped(folder / f"{name}.npy", (5 * OFFICIAL_IMAGES, 32, 32, 3), ("uint8",))
    cell = images[(severity - 1) * OFFICIAL_IMAGES : severity * OFFICIAL_IMAGES]
    return torch.from_numpy(np.array(cell.transpose(0, 3, 1, 2), order="C"))


def official_labels(folder: Path) -> Tensor:
    """Read the labels of every cell of CIFAR-10-C: int64 (10000,).

    Raises:
        DataMissing: the file is missing, truncated, or not the one of CIFAR-10-C.
    """
    file = folder / "labels.npy"
    labels = np.array(_mapped(file, (5 * OFFICIAL_IMAGES,), ("uint8", "int32", "int64"))).astype(np.int64)
    by_severity = labels.reshape(5, OFFICIAL_IMAGES)
    if labels.min() < 0 or labels.max() > 9 or (by_severity != by_severity[0]).any():
        raise DataMissing(
            f"{file} holds labels from {labels.min()} to {labels.max()}, expected 0 to 9 and the same 10,000 for each "
            f"severity; unpack {OFFICIAL_FOLDER} again from {OFFICIAL_SOURCE}"
        )
    return torch.from_numpy(by_severity[0].copy())


def _corruption(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise UnknownName(name, CORRUPTIONS, kind="corruption")
    return CORRUPTIONS[name]


def _checked_severity(severity: int) -> int:
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


def _truncated(images: FloatArray) -> npt.NDArray[np.uint8]:
    """Return images in [0, 1] as bytes, cut off rather than rounded."""
    return (images.clip(0, 1) * 255 + TRUNCATION_SLACK).astype(np.uint8)


def _mapped(file: Path, shape: tuple[int, ...], types: tuple[str, ...]) -> npt.NDArray[Any]:
    """Map a file of CIFAR-10-C without reading it, once its shape and type are right; never unpickles."""
    advice = f"unpack {OFFICIAL_FOLDER} again from {OFFICIAL_SOURCE}"
    try:
        # what np.load(mmap_mode="r") calls, without its detours through zip archives and pickles
        array: npt.NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
    except FileNotFoundError as error:
        raise DataMissing(f"{file.parent} holds no {file.name}; {advice}") from error
    except (OSError, ValueError) as error:
        raise DataMissing(f"{file} is not a whole .npy file ({error}); {advice}") from error
    if array.shape != shape or array.dtype.name not in types:
        raise DataMissing(f"{file} holds {array.dtype} {array.shape}, expected {types[0]} {shape}; {advice}")
    return array


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
    smoothing = _gaussian_weights(softness, reach=1)
    for axis in (0, 1):
        disk = _filtered(disk, smoothing, axis, _edge)
    disk /= disk.sum()

    height, width = images.shape[2:]
    padded = _padded(_padded(images, reach, 2, _mirror), reach, 3, _mirror)
    blurred = np.zeros_like(images)
    for row, column in zip(*np.nonzero(disk), strict=True):
        blurred += disk[row, column] * padded[:, :, row : row + height, column : column + width]
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
    shattered = _truncated(_gaussian_blurred(images, sigma, truncate=4, border=_edge)) / 255
    for turn in range(rounds):
        index = (rows + shifts[:, turn, 0]) * width + columns + shifts[:, turn, 1]
        shattered = _gathered(shattered, index)
    return _gaussian_blurred(shattered, sigma, truncate=4, border=_edge)


def _motion_blur(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    radius, sigma = setting
    return _motion_blurred(images, radius, sigma, [rng.uniform(-45, 45) for rng in generators])


def _zoom_blur(images: FloatArray, end: float, generators: Generators) -> FloatArray:
    """Average the image with its enlargements by 1, 1.01, … up to about `end`."""
    factors = np.arange(1, end, 0.01)  # may or may not reach `end`, in the authors' script as here
    total = sum((_zoomed(images, factor) for factor in factors), images)
    return total / (len(factors) + 1)


# --- weather ---


def _snow(
    images: FloatArray, setting: tuple[float, float, float, float, float, float, float], generators: Generators
) -> FloatArray:
    """Add flakes, drawn, enlarged and blown along a line, and the same turned by 180 degrees, on a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, kept = setting
    draws = [(rng.normal(mean, deviation, images.shape[2:]), rng.uniform(-135, -45)) for rng in generators]
    flakes = _zoomed(np.stack([layer for layer, _ in draws])[:, None], zoom)
    flakes = _truncated(np.where(flakes < threshold, 0, flakes)) / 255
    flakes = _motion_blurred(flakes, radius, sigma, [angle for _, angle in draws])
    whitened = np.maximum(images, 1.5 * _grey(images) + 0.5)
    return kept * images + (1 - kept) * whitened + flakes + flakes[:, :, ::-1, ::-1]


def _frost(images: FloatArray, setting: tuple[float, float], generators: Generators) -> FloatArray:
    kept, added = setting
    height, width = images.shape[2:]
    drawn = [(_square_noise(rng, height, width), _ferns(rng, height, width)) for rng in generators]
    clouds = _plasma(np.stack([noise for noise, _ in drawn]), 1.4)[:, :height, :width]
    whiteness = np.clip(0.75 * clouds + 0.7 * np.stack([ferns for _, ferns in drawn]) - 0.1, 0, 1)
    slate, white = np.array([0.22, 0.30, 0.40]), np.array([0.92, 0.97, 1.0])
    ice = slate[:, None, None] + (white - slate)[:, None, None] * whiteness[:, None]
    return kept * images + added * (ice if images.shape[1] == 3 else _grey(ice))


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
    plasma = _plasma(np.stack([_square_noise(rng, height, width) for rng in generators]), decay)
    brightest: FloatArray = images.max((1, 2, 3), keepdims=True)
    return (images + thickness * plasma[:, None, :height, :width]) * brightest / (brightest + thickness)


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
    images = _sampled(images, source_rows, source_columns, _mirror)
    if strength == 0:
        return images
    field = strength * _gaussian_blurred(np.stack([noise for _, noise in draws]), sigma, truncate=3, border=_symmetric)
    return _sampled(images, rows + field[:, 0], columns + field[:, 1], _symmetric)


def _pixelate(images: FloatArray, share: float, generators: Generators) -> FloatArray:
    height, width = images.shape[2:]
    small = (int(width * share), int(height * share))

    def pixelated(image: Image.Image) -> Image.Image:
        box = Image.Resampling.BOX
        return image.resize(small, box).resize((width, height), box)

    return _through_pillow(images, pixelated)


def _jpeg_compression(images: FloatArray, quality: int, generators: Generators) -> FloatArray:
    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _through_pillow(images, compressed)


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


# --- borders: which pixel stands in for one outside ---


def _edge(index: IntArray, size: int) -> IntArray:
    """a a | a b c d | d d."""
    return index.clip(0, size - 1)


def _mirror(index: IntArray, size: int) -> IntArray:
    """c b | a b c d | c b, as far as it takes."""
    folded = np.abs(index) % (2 * size - 2)
    mirrored: IntArray = np.minimum(folded, 2 * size - 2 - folded)
    return mirrored


def _symmetric(index: IntArray, size: int) -> IntArray:
    """b a | a b c d | d c, as far as it takes."""
    folded = index % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


# --- filters and maps on (…, height, width); sums are spelled out, so that no result depends on the batch ---


def _padded(images: FloatArray, reach: int, axis: int, border: Border) -> FloatArray:
    size = images.shape[axis]
    return images.take(border(np.arange(-reach, size + reach), size), axis)


def _gaussian_weights(sigma: float, reach: int) -> FloatArray:
    weights: FloatArray = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return weights / float(weights.sum())


def _filtered(images: FloatArray, weights: FloatArray, axis: int, border: Border) -> FloatArray:
    size = images.shape[axis]
    padded = np.moveaxis(_padded(images, len(weights) // 2, axis, border), axis, 0)
    shifted = (weight * padded[shift : shift + size] for shift, weight in enumerate(weights))
    return np.moveaxis(sum(shifted, np.zeros(())), 0, axis)


def _gaussian_blurred(images: FloatArray, sigma: float, *, truncate: float, border: Border) -> FloatArray:
    weights = _gaussian_weights(sigma, reach=int(truncate * sigma + 0.5))
    return _filtered(_filtered(images, weights, -2, border), weights, -1, border)


def _motion_blurred(images: FloatArray, radius: float, sigma: float, angles: list[float]) -> FloatArray:
    """Average along a line that starts at each pixel, weighted by half a Gaussian; angles in degrees, clockwise."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    reach, (height, width) = len(steps), images.shape[2:]
    padded = _padded(_padded(images, reach, 2, _edge), reach, 3, _edge)
    blurred = np.zeros_like(images)
    for number, angle in enumerate(angles):
        downwards, rightwards = (
            reach + np.ceil(steps * part(math.radians(angle)) - 0.5).astype(int) for part in (math.sin, math.cos)
        )
        for weight, top, left in zip(weights, downwards, rightwards, strict=True):
            blurred[number] += weight * padded[number, :, top : top + height, left : left + width]
    return np.floor(blurred * 255 + 0.5) / 255


def _zoomed(images: FloatArray, factor: float) -> FloatArray:
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


def _sampled(images: FloatArray, rows: FloatArray, columns: FloatArray, border: Border) -> FloatArray:
    """Read images at real positions (n, height, width), bilinearly."""
    height, width = images.shape[2:]
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    above, below = (border(top.astype(np.intp) + i, height) * width for i in (0, 1))
    before, after = (border(left.astype(np.intp) + i, width) for i in (0, 1))
    upper = (1 - right) * _gathered(images, above + before) + right * _gathered(images, above + after)
    lower = (1 - right) * _gathered(images, below + before) + right * _gathered(images, below + after)
    return (1 - down) * upper + down * lower


def _gathered(images: FloatArray, index: IntArray) -> FloatArray:
    """Read pixels by their place in the flattened image, the same for all channels; index (n, height, width)."""
    flat = images.reshape(*images.shape[:2], -1)
    return np.take_along_axis(flat, index.reshape(len(images), 1, -1), 2).reshape(images.shape)


def _grey(images: FloatArray) -> FloatArray:
    """Return the luma of ITU-R BT.601, (n, 1, height, width)."""
    if images.shape[1] == 1:
        return images
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def _square_noise(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """Draw what `_plasma` needs for an image: a square whose side is a power of two and covers it."""
    side = 1 << (max(height, width) - 1).bit_length()
    return rng.uniform(-1, 1, (side, side))


def _plasma(noise: FloatArray, decay: float) -> FloatArray:
    """Turn uniform noise in [-1, 1] into clouds in [0, 1] by midpoint displacement on a torus.

    Fournier, Fussell & Carpenter 1982. The displacement shrinks by `decay` squared from one scale to the next, as the
    authors' product of two decaying amplitudes does.

    Args:
        noise: (n, side, side), the side a power of two.
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


def _through_pillow(images: FloatArray, change: Callable[[Image.Image], Image.Image]) -> FloatArray:
    """Apply a change to each image as Pillow's 8-bit image."""

    def changed() -> Iterator[npt.NDArray[np.uint8]]:
        for array in _truncated(images).transpose(0, 2, 3, 1):
            grey = array.shape[2] == 1
            yield np.asarray(change(Image.fromarray(array[:, :, 0] if grey else array))).reshape(array.shape)

    return np.stack(list(changed())).transpose(0, 3, 1, 2) / 255
