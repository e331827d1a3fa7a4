"""A data set of two hundred small images that can be learnt, in the hub's layout."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from training.recipes import Recipe, override, recipe
from zoo import data

NUM_IMAGES, SIZE = 200, 16

# Registers the data set; run here and in the processes that tests start.
REGISTER = f"""
from zoo import data
from zoo.networks import ImageFormat

data.DATASETS["tiny"] = data.DatasetSource(
    repository="nobody/tiny", folder="plain", image_column="img", label_column="label",
    format=ImageFormat(height={SIZE}, width={SIZE}), classes=("red", "green", "blue"),
    sizes={{"train": {NUM_IMAGES}}}, flips=True,
)
"""

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, NUM_IMAGES)
    cells = []
    for label in labels:
        pixels = rng.integers(0, 160, (SIZE, SIZE, 3), np.uint8)
        pixels[:, :, label] += 60
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        cells.append({"bytes": encoded.getvalue(), "path": None})
    file = folder / "nobody/tiny/plain/train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"img": cells, "label": labels}), file)
    return folder


@pytest.fixture(scope="module")
def tiny_dataset(tiny_folder: Path) -> Iterator[str]:
    """Make the data set known and findable; returns its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DATASETS", dict(data.DATASETS))
        patch.setenv(data.DATA_VARIABLE, str(tiny_folder))
        exec(REGISTER, {})
        yield "tiny"


@pytest.fixture(scope="module")
def make_recipe(tiny_dataset: str) -> Callable[..., Recipe]:
    """Return a function that cuts a recipe down to the data set: `make_recipe("smoke", "seed=1")`."""

    def make(name: str, *settings: str) -> Recipe:
        small = ["network=resnet8", 'network_options={"width": 4}', "train_images=none", "held_out=20", "batch_size=12"]
        return override(recipe(name), [f"dataset={tiny_dataset}", *small, *settings])

    return make


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Launch]:
    """Return a function that starts a fresh interpreter on `code`, the data set registered and one thread set."""
    scripts = tmp_path_factory.mktemp("scripts")
    started: list[subprocess.Popen[str]] = []

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        script = scripts / f"child_{len(started)}.py"
        script.write_text(f"import torch\ntorch.set_num_threads(1)\n{REGISTER}\n{code}\n")
        root = Path(__file__).parents[2]
        variables = {**os.environ, data.DATA_VARIABLE: str(tiny_folder), "PYTHONPATH": str(root), **environment}
        process = subprocess.Popen(
            [sys.executable, str(script)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
