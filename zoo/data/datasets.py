"""Data sets: read from parquet files in the hub's layout, kept as bytes in memory, augmented in batches.

A data set is looked for in the folder named by `MANYGATES_DATA`; if that is not set, in `../shared/data` beside the
working folder, then on the Hugging Face hub (through huggingface_hub's cache, so `HF_HUB_OFFLINE=1` works once it has
been fetched).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import BadInput, DataMissing, UnknownName, check_count
from zoo.networks import CIFAR_FORMAT, MNIST_FORMAT, ImageFormat

DATA_VARIABLE = "MANYGATES_DATA"
# The same training images are held out whatever a recipe's seed: a run may start from the weights of another, and an
# evaluation that needs unseen images (thresholds of early exits) finds them.
HOLD_OUT_SEED = 5907322021003731600


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """Where a data set lives on the hub and what its images are."""

    repository: str
    folder: str
    image_column: str
    label_column: str
    format: ImageFormat
    classes: tuple[str, ...]
    sizes: dict[str, int]
    flips: bool  # a mirrored image is still of its class


DATASETS = {
    "cifar10": DatasetSource(
        repository="uoft-cs/cifar10",
        folder="plain_text",
        image_column="img",
        label_column="label",
        format=CIFAR_FORMAT,
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        sizes={"train": 50_000, "test": 10_000},
        flips=True,
    ),
    "mnist": DatasetSource(
        repository="ylecun/mnist",
        folder="mnist",
        image_column="image",
        label_column="label",
        format=MNIST_FORMAT,
        classes=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        sizes={"train": 60_000, "test": 10_000},
        flips=False,
    ),
}


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` uint8 (n, channel, height, width), `labels` int64 (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> Images:
        """Return the images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images in [0, 1], labels) in order, the last batch perhaps smaller."""
        for start in range(0, len(self), size):
            yield as_float(self.pixels[start : start + size]), self.labels[start : start + size]


def source(name: str) -> DatasetSource:
    """Return what is known of a data set.

    Raises:
        UnknownName: the message lists the known data sets.
    """
    if name not in DATASETS:
        raise UnknownName(name, DATASETS, kind="data set")
    return DATASETS[name]


def present(name: str, split: str) -> bool:
    """Whether a split of a data set is on this machine, so that `load` need not fetch it."""
    try:
        return bool(_files(source(name), split, fetch=False))
    except DataMissing:
        return False


def load(name: str, split: str, *, fetch: bool = True, number: int | None = None) -> Images:
    """Read one split of a data set, from the hub if need be and `fetch` allows it.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test".
        fetch: whether the hub may be asked for what is not on this machine.
        number: read only the images of `evaluation_subset` of this size; all images, in their own order, if None.

    Raises:
        UnknownName: no such data set.
        BadInput: no such split, or a number of images that it does not have.
        DataMissing: it is neither on this machine nor on a reachable hub, or its files are damaged.
    """
    from pyarrow.lib import concat_tables

    dataset = source(name)
    if split not in dataset.sizes:
        raise BadInput(f"data set {name} has the splits {', '.join(dataset.sizes)}, got {split!r}")
    tables = [_table(file, dataset) for file in _files(dataset, split, fetch=fetch)]
    table = concat_tables(tables)
    if len(table) != dataset.sizes[split]:
        raise DataMissing(
            f"{name} {split} has {len(table)} images, expected {dataset.sizes[split]}: a file is missing or "
            f"truncated; fetch {dataset.repository} again"
        )
    if number is not None:
        table = table.take(evaluation_index(len(table), number).numpy())
    labels = table.column(dataset.label_column).to_numpy().astype(np.int64)
    return Images(_decoded(table.column(dataset.image_column).to_pylist(), dataset), torch.from_numpy(labels))


def data_folder() -> Path:
    """Return the folder in which data sets are looked for: `MANYGATES_DATA`, or else `../shared/data`."""
    return Path(os.environ.get(DATA_VARIABLE) or "../shared/data")


def _files(dataset: DatasetSource, split: str, *, fetch: bool) -> list[Path]:
    pattern = f"{dataset.folder}/{split}-*.parquet"
    if files := sorted((data_folder() / dataset.repository).glob(pattern)):
        return files
    if named := os.environ.get(DATA_VARIABLE):
        raise DataMissing(
            f"{DATA_VARIABLE}={named} holds no {dataset.repository}/{pattern}; point it at a folder with the hub's "
            "layout, or unset it to fetch from the hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            dataset.repository, repo_type="dataset", allow_patterns=[pattern], local_files_only=not fetch
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataMissing(
            f"{dataset.repository} is not on this machine and {'cannot be' if fetch else 'was not'} fetched "
            f"({type(error).__name__}); "
            f"set {DATA_VARIABLE} to a folder that holds {dataset.repository}/{pattern}"
        ) from error
    files = sorted(Path(snapshot).glob(pattern))
    if not files:
        raise DataMissing(f"{dataset.repository} holds no {pattern}; the data set's layout has changed")
    return files


def _table(file: Path, dataset: DatasetSource) -> Any:
    """Read the encoded images and the labels of one file."""
    from pyarrow import parquet
    from pyarrow.lib import ArrowInvalid

    try:
        return parquet.read_table(file, columns=[dataset.image_column, dataset.label_column])  # type: ignore[no-untyped-call]
    except (ArrowInvalid, OSError) as error:
        raise DataMissing(
            f"{file} is not a readable parquet file ({error}); fetch {dataset.repository} again"
        ) from error


def _decoded(cells: Sequence[dict[str, bytes]], dataset: DatasetSource) -> Tensor:
    """Return encoded images as uint8 (image, channel, height, width)."""
    channels, height, width = dataset.format.channels, dataset.format.height, dataset.format.width
    pixels = np.empty((len(cells), height, width, channels), np.uint8)
    mode = "L" if channels == 1 else "RGB"  # copies of grey images may be stored in colour
    for index, cell in enumerate(cells):
        with Image.open(io.BytesIO(cell["bytes"])) as image:
            if image.size != (width, height):
                raise DataMissing(
                    f"{dataset.repository} holds an image of {image.height}x{image.width} pixels, expected "
                    f"{height}x{width}; fetch it again"
                )
            pixels[index] = np.asarray(image.convert(mode)).reshape(height, width, channels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def as_float(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return pixels.float() / 255


def augment(pixels: Tensor, generator: torch.Generator, *, flip: bool = True, padding: int = 4) -> Tensor:
    """Crop each image at random from its zero-padded self and, if `flip`, mirror it with probability 1/2.

    Pixels are (batch, channel, height, width); the generator is on the CPU, so that all devices have the same draws.
    """
    batch, _, height, width = pixels.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5 if flip else torch.zeros(batch, dtype=torch.bool)
    rows = offsets[0, :, None] + torch.arange(height)
    columns = torch.arange(width).expand(batch, width)
    columns = offsets[1, :, None] + torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(pixels, (padding,) * 4)
    index = (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :])
    cropped = padded.permute(0, 2, 3, 1)[tuple(part.to(pixels.device) for part in index)]
    return cropped.permute(0, 3, 1, 2)


def drawn(images: Images, number: int, seed: int) -> Images:
    """Return `number` of the images at random, all of them if there are no more: what a trial trains on.

    Raises:
        BadInput: fewer than one.
    """
    check_count("the number of images", number)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:number]]


def hold_out(images: Images, number: int, seed: int) -> tuple[Images, Images]:
    """Split off `number` images, drawn at random, for choices that must spare the test set: (the rest, held out)."""
    if not 0 <= number < len(images):
        raise BadInput(f"cannot hold out {number} of {len(images)} images; expected 0 to {len(images) - 1}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[number:]], images[order[:number]]


def evaluation_order(number: int) -> Tensor:
    """Return the fixed order in which the images of a test set of this size are taken for evaluation.

    For 10,000 images, as CIFAR-10 and MNIST have, it is a list stored with the package, else a seeded permutation.
    """
    stored = Path(__file__).parent / "evaluation_order" / f"{number}.json"
    if stored.is_file():
        return torch.tensor(json.loads(stored.read_text(encoding="utf-8")), dtype=torch.int64)
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))


def evaluation_index(total: int, number: int) -> Tensor:
    """Return the positions of `number` evaluation images among `total`; all of them stay in their own order.

    Raises:
        BadInput: more images than there are, or fewer than one.
    """
    if not 1 <= number <= total:
        raise BadInput(f"cannot measure {number} images, expected 1 to {total}")
    return torch.arange(total) if number == total else evaluation_order(total)[:number]


def evaluation_subset(images: Images, number: int) -> Images:
    """Return the fixed subset of a test set that robustness is measured on: the first `number` in `evaluation_order`.

    Raises:
        BadInput: more images than there are, or fewer than one.
    """
    return images[evaluation_index(len(images), number)]
