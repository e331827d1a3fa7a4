"""The commands that make a model from nothing."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from manygates.cli import parser
from zoo.bundle.card import Card
from zoo.hub.source import commands_of, package_models

GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))


def trained(name: str, recipe: dict[str, Any], *overrides: str, summary: str = "", int8: bool = False) -> Card:
    training = replace(GOLDEN.training, recipe={"name": "smoke", **recipe}, overrides=overrides, summary=summary)
    return replace(GOLDEN, name=name, training=training, int8=GOLDEN.int8 if int8 else None, results=(), lint=())


def test_what_was_changed_for_a_run_is_in_its_command() -> None:
    train, export = commands_of(trained("mine", {}, "seed=7", 'phases.0.objective={"method":"trades"}'))
    assert shlex.split(train) == [
        *("manygates", "train", "smoke", "--out", "runs/mine"),
        *("--set", "seed=7", "--set", 'phases.0.objective={"method":"trades"}'),
    ]
    assert export == "manygates export runs/mine --out models/mine --name mine"


def test_a_model_that_no_recipe_makes_has_no_command() -> None:
    card = trained("mine", {})
    assert commands_of(replace(card, training=replace(card.training, overrides=None))) == ()


def test_an_ensemble_of_runs_is_a_run_per_seed() -> None:
    commands = commands_of(trained("pair", {"seeds": [101, 102]}, "seed=101", "ema=0.9"))
    assert commands == (
        "manygates train smoke --out runs/pair-101 --set ema=0.9 --set seed=101",
        "manygates train smoke --out runs/pair-102 --set ema=0.9 --set seed=102",
        "manygates export runs/pair-101 runs/pair-102 --out models/pair --name pair",
    )


def test_a_derived_model_is_derived_along_its_own_paths() -> None:
    derived = {"from": "eio", "paths": ["0110", "1001"], "finetune_epochs": 2, "recalibrated": True, "seed": 5}
    assert commands_of(trained("two", {"derived": derived}))[1:] == (
        "manygates derive runs/two --out models/two --name two --path 0110 --path 1001 --recalibrate --finetune 2 "
        "--seed 5",
    )
    assert commands_of(trained("two", {"derived": derived}, int8=True))[2] == (
        "manygates export local-dir:models/two --int8"
    )
    members = {"members": [1, 2]}
    assert "--member 1 --member 2" in commands_of(trained("two", {"derived": members}))[1]


def test_the_best_checkpoint_and_int8_graphs_are_asked_for_where_the_card_has_them() -> None:
    _, export = commands_of(trained("fast", {}, summary="30 epochs (best checkpoint)", int8=True))
    assert export.endswith("--name fast --checkpoint best --int8")


def test_the_command_line_takes_every_command_of_the_package() -> None:
    commands = [command for model in package_models() for command in model.commands]
    assert len(commands) > 20
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
