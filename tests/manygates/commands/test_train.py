"""train and derive, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manygates.commands.train import recalibration_batches
from zoo.bundle.bundle import Bundle
from zoo.gates.derive import derive, recalibrate
from zoo.weights.models import PLAIN_WEIGHTS, load_members, load_rgn

GATES = 7


def test_a_derived_path_is_the_networks_own(model: Path, plain: Path) -> None:
    bundle = Bundle.open(plain)
    assert bundle.card.variants == ("single",)
    assert (bundle.card.name, bundle.card.method) == ("smoke-derived", "ensemble_in_one")
    assert bundle.card.training.summary.endswith("; derived along 0110100")
    expected = derive(load_rgn(Bundle.open(model)), (0, 1, 1, 0, 1, 0, 0)).state_dict()
    (network,), _ = load_members(bundle.file(PLAIN_WEIGHTS))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_distinct_paths_are_drawn_by_the_seed(run: Path, tmp_path: Path, cli: Any) -> None:
    cli.done("derive", run, "--out", tmp_path / "pair", "--paths", "2", "--name", "pair")
    cli.done("derive", run, "--out", tmp_path / "one", "--seed", "1")
    pair, one = (Bundle.open(tmp_path / name).card for name in ("pair", "one"))
    assert (pair.name, pair.variants) == ("pair", ("single", "ensemble"))
    assert (one.name, one.variants) == ("smoke-derived", ("single",))
    drawn = [card.training.summary.rpartition("derived along ")[2].split(", ") for card in (pair, one)]
    assert [len(paths) for paths in drawn] == [2, 1]
    assert len({*drawn[0], *drawn[1]}) == 3
    assert all(len(path) == GATES for path in (*drawn[0], *drawn[1]))


def test_several_paths_can_be_named(model: Path, tmp_path: Path, cli: Any) -> None:
    cli.done("derive", model, "--out", tmp_path / "out", "--path", "0000000", "--path", "1111111")
    bundle = Bundle.open(tmp_path / "out")
    rgn = load_rgn(Bundle.open(model))
    members, _ = load_members(bundle.file(PLAIN_WEIGHTS))
    for member, gate in zip(members, (0, 1), strict=True):
        expected = derive(rgn, [gate] * GATES).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in member.state_dict().items())


def test_recalibration_and_fine_tuning_change_the_weights_and_are_said(
    model: Path, plain: Path, tmp_path: Path, cli: Any
) -> None:
    cli.done("derive", model, "--out", tmp_path / "calibrated", "--path", "0110100", "--recalibrate")
    cli.done("derive", model, "--out", tmp_path / "tuned", "--path", "0110100", "--finetune", "1", "--recalibrate")
    (before,), _ = load_members(Bundle.open(plain).file(PLAIN_WEIGHTS))
    (calibrated,), _ = load_members(Bundle.open(tmp_path / "calibrated").file(PLAIN_WEIGHTS))
    (tuned,), _ = load_members(Bundle.open(tmp_path / "tuned").file(PLAIN_WEIGHTS))
    for name, parameter in before.named_parameters():
        assert torch.equal(calibrated.get_parameter(name), parameter)
        assert not torch.equal(tuned.get_parameter(name), parameter)
    assert not torch.equal(calibrated.get_buffer("norm1.running_mean"), before.get_buffer("norm1.running_mean"))
    batches = list(recalibration_batches("tiny", 0))
    assert [len(batch) for batch in batches] == [128]  # of 200 images: no batch is empty
    recalibrate(before, batches)
    expected = before.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in calibrated.state_dict().items())
    summary = Bundle.open(tmp_path / "tuned").card.training.summary
    assert "1 epochs of fine-tuning on clean images; BatchNorm re-calibrated on augmented training images" in summary


def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path: Path, cli: Any) -> None:
    line = cli.refused("train", "smok", "--out", tmp_path / "run")
    assert "unknown recipe 'smok'; did you mean 'smoke'? (known: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "unknown field of Recipe 'sed'"),
        ("seed", "--set takes field=value, got 'seed'; for example seed=1"),
        ("seed=x", "'x' is not a value for it, expected int"),
        ("dataset=cifar", "unknown data set 'cifar'; did you mean 'cifar10'?"),
        ("network=resnet9", "unknown network 'resnet9'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, message: str, tmp_path: Path, cli: Any) -> None:
    assert message in cli.refused("train", "smoke", "--out", tmp_path / "run", "--set", setting)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(run: Path, tmp_path: Path, cli: Any) -> None:
    assert "already holds a run of 'smoke'; add --resume, or choose another" in cli.refused(
        "train", "smoke", "--out", run
    )
    assert "was started with another recipe" in cli.refused(
        "train", "smoke", "--out", run, "--resume", "--set", "seed=9"
    )
    (tmp_path / "notes.txt").touch()
    assert "is not empty and holds no run; choose an empty" in cli.refused("train", "smoke", "--out", tmp_path)


def test_a_finished_run_has_nothing_to_resume(run: Path, cli: Any, small: list[str]) -> None:
    before = (run / "last.safetensors").read_bytes()
    cli.done("train", "smoke", "--out", run, *small, "--resume", "--device", "cpu")
    assert (run / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["derive", "export"])
def test_what_is_neither_a_run_nor_a_model_is_refused_as_both(command: str, tmp_path: Path, cli: Any) -> None:
    line = cli.refused(command, tmp_path, "--out", tmp_path / "out")
    assert "is neither a training run (a folder with a recipe.json) nor a model: " in line
    assert "neither a training run" in cli.refused(command, "nowhere", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("0110", "path '0110' has 4 gates, expected 7; give one gate per gated layer"),
        ("0110102", "gate 2 at position 6 is out of range, expected 0 to 1"),
        ("01a0100", "is not a row of gates; write digits such as 0110"),
    ],
)
def test_a_path_that_does_not_fit_is_refused(path: str, message: str, model: Path, tmp_path: Path, cli: Any) -> None:
    assert message in cli.refused("derive", model, "--out", tmp_path / "out", "--path", path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--paths", "0"), "--paths is 0, expected a whole number from 1 to"),
        (("--paths", "2", "--path", "0000000"), "give --path (which ones) or --paths (how many), not both"),
        (("--paths", "200"), "200 paths cannot differ within 7 gates of 2 candidates: only 128 prefixes exist"),
        (("--path", "0000000", "--finetune", "-1"), "--finetune is -1, expected a whole number from 0 to"),
    ],
)
def test_paths_that_make_no_sense_are_refused(
    words: tuple[str, ...], message: str, model: Path, tmp_path: Path, cli: Any
) -> None:
    assert message in cli.refused("derive", model, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_plain_network_has_no_path_to_derive(plain: Path, tmp_path: Path, cli: Any) -> None:
    line = cli.refused("derive", plain, "--out", tmp_path / "out", "--paths", "1")
    assert "smoke-derived is a plain network without gates, so no path can be derived from it" in line


@pytest.mark.parametrize("width", [-4, "wide", 2**40])
def test_a_width_that_no_network_has_is_refused(width: object, tmp_path: Path, cli: Any, small: list[str]) -> None:
    option = f"network_options={json.dumps({'width': width})}"
    assert "width" in cli.refused("train", "smoke", "--out", tmp_path / "run", *small, "--set", option)


@pytest.mark.parametrize("number", ["-5", "0"])
def test_a_recipe_trains_on_at_least_one_image(number: str, tmp_path: Path, cli: Any) -> None:
    line = cli.refused("train", "smoke", "--out", tmp_path / "run", "--set", f"train_images={number}")
    assert f"train_images is {number}, expected a whole number, 1 or more" in line
