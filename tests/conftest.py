"""What all tests share. It imports no torch itself: the tests of the server run where torch is not installed."""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parent
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


SKIPS: dict[str, Callable[[], str | None]] = {"data": _missing_data, "gpu": _missing_gpu}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, missing in SKIPS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
    # costly files first: one that a worker begins last holds up the end
    costly = Counter(item.path for item in items for marker in ("slow", "browser") if item.get_closest_marker(marker))
    items.sort(key=lambda item: -costly[item.path])
    if config.getoption("quick"):
        left_out = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


# --- the quick set (`make quick`): no process, server, training run or browser ---

NOT_QUICK = ("slow", "browser", "gpu", "integration")
STARTING_MODULES = {
    "manygates.cli", "multiprocessing", "playwright.sync_api", "serving.server", "subprocess", "training.finetune",
    "training.loop", "uvicorn",
}  # fmt: skip
STARTING_NAMES = {"Popen", "bind", "create_subprocess_exec"}
STARTING_EVENTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "socket.bind", "subprocess.Popen"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests without a process, server, training run, browser")
    parser.addoption("--exhaustive", action="store_true", help="check every case of what a default run checks on a few")


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is not slow, and starts nothing, as far as its code, its fixtures and their helpers tell."""
    assert isinstance(item, pytest.Function)
    if any(item.get_closest_marker(marker) for marker in NOT_QUICK):
        return False
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    return not any(starts_something(function, set()) for function in (item.function, *fixtures))


def starts_something(thing: Any, seen: set[int]) -> bool:
    """Whether a function of the tests, or a class, names something that starts processes, servers or training runs."""
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, type):
        return any(starts_something(member, seen) for member in vars(thing).values())
    function = inspect.unwrap(thing) if callable(thing) else thing
    if not isinstance(function, FunctionType) or not function.__code__.co_filename.startswith(str(TESTS)):
        return False
    names = names_in(function.__code__)
    if names & STARTING_NAMES:
        return True
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    origins = {value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "") for value in used}
    return bool(origins & STARTING_MODULES) or any(starts_something(value, seen) for value in used)


def names_in(code: CodeType) -> set[str]:
    """Return the names that a function uses, those of functions inside it too."""
    return {*code.co_names}.union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def pytest_configure(config: pytest.Config) -> None:
    """Let a test of the quick set fail that starts something after all."""
    if not config.getoption("quick"):
        return

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in STARTING_EVENTS and os.environ.get("PYTEST_CURRENT_TEST"):
            raise AssertionError(f"a quick test starts something ({event}): mark it with pytest.mark.integration")

    sys.addaudithook(refuse)


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
