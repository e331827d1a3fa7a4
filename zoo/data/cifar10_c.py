"""A reader of CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv:1903.12261) as its authors published it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoo.data.corruptions import checked_severity, corruption_named
from zoo.data.datasets import data_folder
from zoo.errors import DataMissing

OFFICIAL_FOLDER = "CIFAR-10-C"
OFFICIAL_IMAGES = 10_000
OFFICIAL_SOURCE = "https://zenodo.org/records/2535967"


def find_official() -> Path | None:
    """Return `CIFAR-10-C` in the data folder (`MANYGATES_DATA`, or else `../shared/data`), None if absent."""
    folder = data_folder() / OFFICIAL_FOLDER
    return folder if folder.is_dir() else None


def official(folder: Path, name: str, severity: int) -> Tensor:
    """Read one cell of CIFAR-10-C: uint8 (10000, 3, 32, 32), in the order of CIFAR-10's test set.

    Raises:
        UnknownName: no such corruption.
        BadInput: no such severity.
        DataMissing: the file is missing, truncated, or not one of CIFAR-10-C.
    """
    corruption_named(name)
    severity = checked_severity(severity)
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
