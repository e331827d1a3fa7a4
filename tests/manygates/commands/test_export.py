"""export, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Finding, Lint
from zoo.weights.checkpoint import load, save

GATES = 7


def test_a_run_becomes_a_bundle_that_says_where_it_comes_from(run: Path, model: Path, cli: Any) -> None:
    card = Bundle.open(model).card
    assert (card.name, card.method, card.dataset) == ("smoke", "ensemble_in_one", "tiny")
    assert card.variants == ("single", "ensemble", "gated")
    assert len(card.architecture.gated_layers) == GATES
    assert len(set(card.paths.ensemble)) == 2
    assert card.paths.single == card.paths.ensemble[0]
    recipe = dict(card.training.recipe)
    assert recipe.pop("method") == "ensemble_in_one"
    assert [start["step"] for start in recipe.pop("starts")] == [0]
    assert recipe == json.loads((run / "recipe.json").read_text())
    assert card.training.seed == 0
    assert card.training.summary.startswith("3 + 1 epochs on ")
    assert card.training.summary.endswith("(last checkpoint)")
    assert [log.rows for log in card.training.logs] == [
        ("1 standard", "2 standard", "3 standard", "4 ensemble_in_one"),
    ]
    shown = cli.done("show", f"local-dir:{model}").out
    assert "| epoch | steps |" in shown
    assert "| 4 ensemble_in_one |" in shown


def test_the_best_checkpoint_and_another_name_can_be_exported(run: Path, model: Path, tmp_path: Path, cli: Any) -> None:
    cli.done(
        "export", run, "--out", tmp_path / "best", "--checkpoint", "best", "--name", "other", "--description", "Mine."
    )  # fmt: skip
    card = Bundle.open(tmp_path / "best").card
    assert (card.name, card.description) == ("other", "Mine.")
    assert card.training.summary.endswith("(best checkpoint)")
    assert card.paths == Bundle.open(model).card.paths  # which paths depends on the run's seed alone


def test_the_card_of_a_run_that_goes_on_says_how_far_it_was(run: Path, tmp_path: Path, cli: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    tensors, header = load(run / "last.safetensors")
    save(tmp_path / "run" / "last.safetensors", tensors, header | {"position": header["position"] | {"epoch": 2}})
    cli.done("export", tmp_path / "run", "--out", tmp_path / "early")
    assert Bundle.open(tmp_path / "early").card.training.summary.startswith("2 of 3 + 1 epochs on ")


def test_exporting_a_bundle_again_gives_the_same_graphs_and_keeps_what_the_linter_found(
    model: Path, plain: Path, tmp_path: Path, cli: Any, changed: Any
) -> None:
    finding = Finding(code="G1", name="gradients", verdict="ok", figure="none is zero", meaning="masking")
    lint = Lint(variant="single", images=9, seed=0, findings=(finding,), date="2026-11-21", command="manygates lint")
    for folder in (changed(model, tmp_path / "linted", card={"lint": (lint,)}), plain):
        cli.done("export", f"local-dir:{folder}", "--out", tmp_path / "again" / folder.name)
        before, after = (Bundle.open(place).card for place in (folder, tmp_path / "again" / folder.name))
        assert (after.files, after.lint) == (before.files, before.lint)


@pytest.mark.parametrize("command", ["export", "derive"])
def test_a_place_that_is_taken_is_refused_before_any_work(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.setattr("training.run.load_run", None)  # not reached
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no bundle, so its content would be lost" in cli.refused(
        command, run, "--out", tmp_path
    )
    assert "is a file, expected a directory or nothing" in cli.refused(command, run, "--out", tmp_path / "thesis.tex")


def test_a_run_without_its_origin_is_refused(run: Path, tmp_path: Path, cli: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/provenance.json").unlink()
    line = cli.refused("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "holds no readable provenance.json" in line
    (tmp_path / "run/best.safetensors").unlink()
    line = cli.refused("export", tmp_path / "run", "--out", tmp_path / "out", "--checkpoint", "best")
    assert "has no best.safetensors yet; train for longer, or pick another checkpoint" in line


def test_runs_become_an_ensemble_of_separately_trained_networks(
    tiny_folder: Path, tmp_path: Path, picture: Path, cli: Any, document_of: Any
) -> None:
    settings = [
        "dataset=tiny", "network=resnet8", 'network_options={"width": 4}', "held_out=20", "batch_size=30",
        "phases.0.epochs=1",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs, start=7):
        cli.done(
            "train", "standard-resnet20-cifar10-cpu", "--out", run, *words, "--set", f"seed={seed}", "--device", "cpu"
        )
    said = cli.done("export", *runs, "--out", tmp_path / "both", "--name", "pair")
    assert "pair: single, ensemble" in said.err
    card = document_of(tmp_path / "both")
    assert card["training"]["summary"].startswith("2 networks trained separately (seeds 7, 8)")
    assert [log["rows"] for log in card["training"]["logs"]] == [["1 standard"], ["1 standard"]]
    cli.done("verify", tmp_path / "both")
    matrix = cli.done(
        "evaluate", tmp_path / "both", "--protocol", "transfer-matrix", "--variant", "ensemble", "--eps", "0.05",
        "--images", "60", "--steps", "3", "--restarts", "1", "--json",
    ).json  # fmt: skip
    assert matrix["tables"][0]["rows"] == ["member 1", "member 2"]


def test_an_ensemble_is_made_of_plain_runs(run: Path, model: Path, tmp_path: Path, cli: Any) -> None:
    assert "its ensemble is made of its own paths" in cli.refused("export", run, run, "--out", tmp_path / "x")
    assert "is no training run" in cli.refused("export", model, run, "--out", tmp_path / "x")
