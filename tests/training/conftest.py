"""Recipes cut down to the tiny data set, and processes that know it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.recipes import Recipe, override, recipe
from zoo.data import datasets

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def make_recipe(tiny_dataset: str) -> Callable[..., Recipe]:
    """Return a function that cuts a recipe down to the data set: `make_recipe("smoke", "seed=1")`."""

    def make(name: str, *settings: str) -> Recipe:
        small = ["network=resnet8", 'network_options={"width": 4}', "train_images=none", "held_out=20", "batch_size=12"]
        # a processor without bfloat16 takes a hundred times as long for it
        return override(recipe(name), [f"dataset={tiny_dataset}", *small, "precision=fp32", *settings])

    return make


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, register_tiny: str) -> Iterator[Launch]:
    """Return a function that starts a fresh interpreter on `code`, the data set registered and one thread set."""
    scripts = tmp_path_factory.mktemp("scripts")
    started: list[subprocess.Popen[str]] = []

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        script = scripts / f"child_{len(started)}.py"
        script.write_text(f"import torch\ntorch.set_num_threads(1)\n{register_tiny}\n{code}\n")
        root = Path(__file__).parents[2]
        variables = {**os.environ, datasets.DATA_VARIABLE: str(tiny_folder), "PYTHONPATH": str(root), **environment}
        process = subprocess.Popen(
            [sys.executable, str(script)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
