from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.loop import train
from training.recipes import Recipe, resolved
from zoo.errors import BadInput, CheckpointError
from zoo.weights import checkpoint
from zoo.weights.checkpoint import network_state

MakeRecipe = Callable[..., Recipe]
Launch = Callable[..., "subprocess.Popen[str]"]

# Both kinds of recipe: bfloat16 or float32, channels last, momentum, a new optimiser in the second phase.
KINDS = {
    "standard": ("standard-resnet20-cifar10-cpu", "phases.0.epochs=3", "batch_size=6", "precision=bf16"),
    "ensemble_in_one": (
        "smoke",
        "phases.0.epochs=1",
        "phases.1.epochs=2",
        "phases.1.objective.distillation_steps=2",
        "batch_size=6",
    ),
}
BATCHES = 180 // 6
TIMINGS = {"seconds"}

# A pause in every step leaves time to kill the process between two of them.
CHILD = """
import json, pathlib, time
from training.loop import train
from training.recipes import from_resolved
from zoo.data import datasets

augment = datasets.augment
datasets.augment = lambda *arguments, **options: time.sleep(0.02) or augment(*arguments, **options)
train(from_resolved(json.loads({recipe!r})), pathlib.Path({run_dir!r}), device="cpu", checkpoint_seconds=0)
"""


def position(run_dir: Path) -> dict[str, Any]:
    return dict(checkpoint.load(run_dir / "last.safetensors")[1]["position"])


def everything(run_dir: Path) -> dict[str, Tensor]:
    """Weights, statistics and momenta of a run's last checkpoint."""
    return checkpoint.load(run_dir / "last.safetensors")[0]


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


def kill_in_second_epoch(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Wait until a checkpoint from the middle of the second epoch is on disk, then SIGKILL the process."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the run ended before it could be killed: {process.communicate()[1]}")
        if (run_dir / "last.safetensors").exists():
            process.send_signal(signal.SIGSTOP)  # so that what is read stays true until it is killed
            now = position(run_dir)
            if now["epoch"] == 1 and 0 < now["batch"] < BATCHES:
                process.send_signal(signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("no checkpoint of the second epoch within two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_for_bit(kind: str, make_recipe: MakeRecipe, launch: Launch, tmp_path: Path) -> None:
    name, *settings = KINDS[kind]
    made = make_recipe(name, *settings)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = launch(CHILD.format(recipe=json.dumps(resolved(made)), run_dir=str(killed)))
    kill_in_second_epoch(process, killed)
    train(made, whole, device="cpu")
    (killed / ".last.safetensors.0123").write_bytes(b"half")  # what a kill in the middle of a write leaves
    at = position(killed)
    assert at["epoch"] == 1
    assert 0 < at["batch"] < BATCHES, "killed in the middle of an epoch"

    resumed = train(made, killed, resume=True, device="cpu")

    expected, found = everything(whole), everything(killed)
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer/momentum_buffer/") for key in expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert all(torch.equal(tensor, expected[f"model/{key}"]) for key, tensor in network_state(resumed).items())
    assert table(killed) == table(whole)
    assert [row["epoch"] for row in table(killed)] == ["1", "2", "3"]
    best, best_whole = (checkpoint.load(folder / "best.safetensors") for folder in (killed, whole))
    assert all(torch.equal(best[0][key], tensor) for key, tensor in best_whole[0].items())
    assert best[1]["position"]["best"] == best_whole[1]["position"]["best"]
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}


@pytest.fixture
def short(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe("standard-resnet20-cifar10-cpu", "phases.0.epochs=2", "train_images=60")


def test_a_finished_run_resumed_returns_its_weights_and_writes_nothing(short: Recipe, tmp_path: Path) -> None:
    first = network_state(train(short, tmp_path, device="cpu"))
    files = ("last.safetensors", "best.safetensors", "log.csv", "recipe.json", "provenance.json")
    before = {name: (tmp_path / name).read_bytes() for name in files}
    again = train(short, tmp_path, resume=True, device="cpu")
    assert not again.training
    assert all(torch.equal(tensor, first[name]) for name, tensor in network_state(again).items())
    assert {name: (tmp_path / name).read_bytes() for name in files} == before


def test_resuming_where_nothing_was_started_starts(short: Recipe, tmp_path: Path) -> None:
    fresh = network_state(train(short, tmp_path / "fresh", device="cpu"))
    resumed = network_state(train(short, tmp_path / "resumed", resume=True, device="cpu"))
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize(
    ("setting", "different"),
    [("seed=1", "seed"), ("phases.0.learning_rate=0.2", "phases"), ("batch_size=6", "batch_size")],
)
def test_resuming_with_another_recipe_is_refused_by_what_differs(
    setting: str, different: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    settings = ("phases.0.epochs=1", "train_images=60")
    (tmp_path / "recipe.json").write_text(json.dumps(resolved(make_recipe("standard-resnet20-cifar10-cpu", *settings))))
    with pytest.raises(
        BadInput, match=rf"started with another recipe \(different: {different}\); resume with the same"
    ):
        train(make_recipe("standard-resnet20-cifar10-cpu", *settings, setting), tmp_path, resume=True, device="cpu")


def test_a_broken_checkpoint_is_refused_and_kept(short: Recipe, tmp_path: Path) -> None:
    train(short, tmp_path, device="cpu")
    file = tmp_path / "last.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        train(short, tmp_path, resume=True, device="cpu")
    assert len(file.read_bytes()) == 1000
