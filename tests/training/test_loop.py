from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.loop import train
from training.recipes import Recipe, resolved
from training.run import COLUMNS, load_run, log
from training.start import images_of
from zoo.errors import BadInput, CheckpointError, UnknownName
from zoo.gates.rgn import RandomGatedNetwork
from zoo.weights import checkpoint
from zoo.weights.checkpoint import network_state

MakeRecipe = Callable[..., Recipe]

SHORT = ("phases.0.epochs=2", "phases.1.epochs=1", "phases.1.objective.distillation_steps=2")


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def smoke(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe("smoke", *SHORT)


@pytest.mark.slow
def test_a_run_leaves_its_recipe_origin_log_and_weights(smoke: Recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/first"
    model = train(smoke, run_dir, device="cpu")

    assert isinstance(model, RandomGatedNetwork)
    assert not model.training
    assert {file.name for file in run_dir.iterdir()} == {
        "recipe.json", "provenance.json", "log.csv", "last.safetensors", "best.safetensors", "events",
    }  # fmt: skip
    assert json.loads((run_dir / "recipe.json").read_text()) == resolved(smoke)
    origin = json.loads((run_dir / "provenance.json").read_text())
    assert origin["seed"] == smoke.seed
    (start,) = origin["starts"]
    assert start.keys() == {"step", "commit", "versions", "hardware", "date"}
    assert start["step"] == 0
    assert start["versions"]["torch"] == torch.__version__

    rows = table(run_dir)
    assert tuple(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["steps"] for row in rows] == ["15", "30", "45"]  # 180 images in batches of 12
    assert [row["objective"] for row in rows] == ["standard", "standard", "ensemble_in_one"]
    assert all(0 <= float(row["held_out_clean"]) <= 1 and float(row["loss"]) > 0 for row in rows)
    assert all(0 <= float(row["held_out_robust"]) <= 1 for row in rows)

    (kept,) = log(run_dir)
    assert kept.rows == ("1 standard", "2 standard", "3 ensemble_in_one")
    assert kept.columns == tuple(name for name in COLUMNS[2:] if any(row[name] for row in rows))
    written = [[float(row[name]) for name in kept.columns if row[name]] for row in rows]
    assert [[value for value in values if value is not None] for values in kept.values] == [
        pytest.approx(values, rel=1e-5) for values in written
    ]

    loaded, architecture, read = load_run(run_dir)
    assert read == smoke
    assert architecture == smoke.architecture
    assert not loaded.training
    expected = network_state(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network_state(loaded).items())
    best, _, _ = load_run(run_dir, which="best")
    assert network_state(best).keys() == expected.keys()
    assert list((run_dir / "events").iterdir())


@pytest.mark.slow
def test_a_run_learns_and_keeps_the_best_epoch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = make_recipe("standard-resnet20-cifar10-cpu", "phases.0.epochs=4", "validate_every=1", "held_out=50")
    train(made, tmp_path, device="cpu")
    rows = table(tmp_path)
    losses, clean = ([float(row[name]) for row in rows] for name in ("loss", "held_out_clean"))
    assert losses[-1] < 0.7 * losses[0]
    assert max(clean) > 0.7  # chance is 1/3
    _, header = checkpoint.load(tmp_path / "best.safetensors")
    assert header["position"]["best"] == pytest.approx(max(clean))
    assert header["position"]["epoch"] == 1 + clean.index(max(clean))


def test_equal_recipes_give_equal_weights_and_other_seeds_others(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        made = make_recipe("standard-resnet20-cifar10-cpu", "phases.0.epochs=1", "train_images=60", f"seed={seed}")
        weights.append(network_state(train(made, tmp_path / str(number), device="cpu")))
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_recipe_with_one_candidate_trains_the_plain_network(candidates: int, make_recipe: MakeRecipe) -> None:
    made = make_recipe("standard-resnet20-cifar10-cpu", f"candidates={candidates}")
    assert made.architecture.gated == isinstance(made.architecture.build(), RandomGatedNetwork)
    assert made.architecture.gated == (candidates > 1)


def test_a_folder_that_holds_a_run_is_refused_without_resume(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = make_recipe("standard-resnet20-cifar10-cpu", "phases.0.epochs=1", "train_images=40")
    train(made, tmp_path, device="cpu")
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(BadInput, match="already holds a run of 'standard-resnet20-cifar10-cpu'; add --resume"):
        train(made, tmp_path, device="cpu")
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(smoke: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(BadInput, match="is not empty and holds no run"):
            train(smoke, tmp_path, resume=resume, device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_data_set_smaller_than_a_batch_is_refused_with_both_numbers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="10 training images are less than one batch of 12; lower batch_size"):
        train(make_recipe("smoke", "train_images=30"), tmp_path, device="cpu")
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


def test_an_unknown_data_set_is_refused_before_anything_is_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown data set 'cifar11'"):
        train(make_recipe("smoke", "dataset=cifar11"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_lower(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = ("phases.0.epochs=3", "phases.0.learning_rate=1e30", "phases.0.schedule=step")
    with pytest.raises(CheckpointError, match=r"stopped being finite at step \d+ .*lower learning rate"):
        train(make_recipe("standard-resnet20-cifar10-cpu", *settings), tmp_path, device="cpu")


def test_a_recipe_whose_network_cannot_take_the_images_leaves_no_folder(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="cannot be trained"):
        train(
            make_recipe("smoke", *SHORT, "network=vgg16", "network_options.width=0.1"), tmp_path / "run", device="cpu"
        )
    assert not (tmp_path / "run").exists()


def test_the_same_images_are_held_out_whatever_the_seed(make_recipe: MakeRecipe) -> None:
    (_, first), (_, other) = (images_of(make_recipe("smoke", f"seed={seed}")) for seed in (0, 1))
    assert torch.equal(first.pixels, other.pixels)
