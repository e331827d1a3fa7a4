"""What all tests share. It imports no torch itself: the tests of the server run where torch is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DATA_VARIABLE = "MANYGATES_DATA"
REPOSITORIES = ("uoft-cs/cifar10", "ylecun/mnist")


def _missing_data() -> str | None:
    """Say why the real data sets cannot be read here, by the rule of `zoo.data`; None if they can."""
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
