"""What `import manygates` offers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import manygates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python in a process of its own."""

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return start


def test_the_module_is_light_and_exposes_what_it_promises(fresh: Any) -> None:
    code = """
import sys, manygates
heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "huggingface_hub"}
print(sorted(heavy & sys.modules.keys()))
names = {}
exec("from manygates import *", names)
names.pop("__builtins__")
print(sorted(names) == sorted(manygates.__all__))
print(callable(manygates.load), manygates.attacks.__name__, manygates.evaluate.__name__, manygates.derive.__module__)
"""
    said = fresh("-c", code)
    assert said.stdout.splitlines() == ["[]", "True", "True zoo.attacks evaluate zoo.gates.derive"], said.stderr


def test_the_public_names_are_those_of_the_design() -> None:
    assert manygates.__all__ == ["attacks", "derive", "evaluate", "load", "main", "randomly_gate"]
    with pytest.raises(AttributeError, match=r"no attribute 'serve'; it has attacks, derive, evaluate, load, "):
        _ = manygates.serve  # type: ignore[attr-defined]


def test_the_public_names_make_the_chain_of_the_readme(model: Path) -> None:
    network = manygates.load(f"local-dir:{model}")
    rgn = manygates.randomly_gate(network, candidates=2)
    path = [0, 1] * (rgn.num_gates // 2) + [0] * (rgn.num_gates % 2)
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    single = manygates.derive(rgn, path)
    assert torch.equal(single(images), rgn.eval()(images, path))
    budget = manygates.attacks.LinfBudget(eps=0.01, steps=2)
    assert manygates.attacks.pgd(single, images, labels, budget).shape == images.shape
