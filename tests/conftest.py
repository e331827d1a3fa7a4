"""What all tests share. It imports no torch itself: the tests of the server run where torch is not installed."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

DATA_VARIABLE = "MANYGATES_DATA"
REPOSITORIES = ("uoft-cs/cifar10", "ylecun/mnist")

# for the processes that tests start: on cores that other tests use too, threads that wait for each other take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _missing_data() -> str | None:
    """Say why the real data sets cannot be read here, by the rule of `zoo.data.datasets`; None if they can."""
    folder = Path(os.environ.get(DATA_VARIABLE) or "../shared/data")
    absent = [repository for repository in REPOSITORIES if not (folder / repository).is_dir()]
    if not absent:
        return None
    return f"{folder} holds no {' and no '.join(absent)}; set {DATA_VARIABLE} to a folder in the hub's layout"


def _missing_gpu() -> str | None:
    """Say why nothing can run on a GPU here; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@pytest.fixture(scope="session")
def fake_hub() -> ModuleType:
    """The module of a Hugging Face hub in memory: `FakeHub`, `Answer`, `serve`."""
    place = Path(__file__).with_name("hub") / "fake_hub.py"
    spec = importlib.util.spec_from_file_location("fake_hub", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_hub"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SKIPS: dict[str, Callable[[], str | None]] = {"data": _missing_data, "gpu": _missing_gpu}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="check every case of what a default run checks on a few")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in SKIPS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> None:
    """Tensors in tests are small: threads cost more than they give, and sums must not depend on their number."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another left half done, and none writes into the user's cache."""
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# --- a data set of a few small images that can be learnt: a picture's class is its strongest colour ---

TINY_SIZE, TINY_SPLITS = 16, {"train": 200, "test": 120}

REGISTER_TINY = f"""
from zoo.data import datasets
from zoo.networks import ImageFormat

datasets.DATASETS["tiny"] = datasets.DatasetSource(
    repository="nobody/tiny", folder="plain", image_column="img", label_column="label",
    format=ImageFormat(height={TINY_SIZE}, width={TINY_SIZE}), classes=("red", "green", "blue"),
    sizes={TINY_SPLITS}, flips=True,
)
"""


@pytest.fixture(scope="session")
def register_tiny() -> str:
    """Return the code that makes the data set known; for processes that tests start."""
    return REGISTER_TINY


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the data set in the hub's layout; returns what `MANYGATES_DATA` is to be."""
    import numpy as np
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("hub")
    (folder / "nobody/tiny/plain").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in TINY_SPLITS.items():
        labels = rng.integers(0, 3, number)
        cells = []
        for label in labels:
            pixels = rng.integers(0, 160, (TINY_SIZE, TINY_SIZE, 3), np.uint8)
            pixels[:, :, label] += 60
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "PNG")
            cells.append({"bytes": encoded.getvalue(), "path": None})
        file = folder / f"nobody/tiny/plain/{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.table({"img": cells, "label": labels}), file)
    return folder


@pytest.fixture(scope="module")
def tiny_dataset(tiny_folder: Path) -> Iterator[str]:
    """Make the data set known and findable; returns its name."""
    from zoo.data import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
        patch.setenv(datasets.DATA_VARIABLE, str(tiny_folder))
        exec(REGISTER_TINY, {})
        yield "tiny"
