"""evaluate and lint, from the command line."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.bundle.card import Check
from zoo.weights.models import RGN_WEIGHTS

RESULT_KEYS = {
    "protocol", "variant", "attack", "norm", "eps", "eps_fraction", "steps", "step_size", "restarts", "draws",
    "images", "seed", "accuracy", "interval", "note", "checks", "tables", "date", "command",
}  # fmt: skip


def test_evaluate_prints_one_result_for_one_eps_and_an_array_for_several(model: Path, cli: Any) -> None:
    quick = ("--images", "30", "--steps", "2", "--restarts", "1", "--json")
    clean = cli.done("evaluate", model, "--protocol", "clean", "--json").json
    one = cli.done("evaluate", model, "--protocol", "whitebox", "--eps", "8/255", *quick).json
    several = cli.done(
        "evaluate", f"local-dir:{model}", "--protocol", "whitebox", "--eps", "0.01", "8/255", *quick
    ).json
    assert clean.keys() == one.keys() == RESULT_KEYS
    assert (clean["eps"], clean["eps_fraction"], clean["images"]) == (0, "0", 120)
    assert (one["eps"], one["eps_fraction"], one["images"], one["seed"]) == (8 / 255, "8/255", 30, 0)
    assert 0 <= one["interval"][0] <= one["accuracy"] <= one["interval"][1] <= 1
    assert one["accuracy"] <= clean["accuracy"] + 0.2
    assert {"name", "held", "detail"} == one["checks"][0].keys()
    assert [result["eps_fraction"] for result in several] == ["1/100", "8/255"]
    assert {key: several[1][key] for key in ("accuracy", "checks")} == {key: one[key] for key in ("accuracy", "checks")}


def test_the_command_of_a_result_measures_it_again(model: Path, cli: Any) -> None:
    words = ("--protocol", "whitebox", "--eps", "1/50", "--images", "20", "--steps", "2", "--restarts", "1")
    first = cli.done("evaluate", model, *words, "--variant", "ensemble", "--seed", "3", "--json").json
    command = shlex.split(first["command"])
    assert command[:3] == ["manygates", "evaluate", str(model)]
    again = cli.done(*command[1:], "--json").json
    assert again == first


def test_results_are_printed_for_people_with_their_checks(model: Path, cli: Any) -> None:
    said = cli.done("evaluate", model, "--protocol", "clean", "--variant", "gated", "--images", "20")
    assert said.out.startswith("clean gated: ")
    assert "20 images, seed 0; mean over 10 draws" in said.out
    said = cli.done(
        "evaluate", model, "--protocol", "whitebox", "--eps", "0.1", "--images", "20", "--steps", "2", "--restarts", "1"
    )  # fmt: skip
    assert "  ok    eps 0 equals clean: " in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("whitebox", "--eps", "8"), "so write 8/255, not 8"),
        (("blackbx",), "unknown protocol 'blackbx'; did you mean 'blackbox'?"),
        (("blackbox",), "needs surrogates, got none; name models with --surrogates"),
        (("exits",), "has one exit; the protocol exits is for multi-exit networks"),
        (("random-gates",), "measures the variant gated, got 'single'"),
        (("corruptions", "--corrupted", "."), "holds CIFAR-10-C, and smoke was trained on tiny"),
        (("whitebox", "--variant", "gated"), "says nothing about random gates; measure the variants"),
        (("clean", "--images", "121"), "cannot measure 121 images, expected 1 to 120"),
        *((("clean", "--device", name), f"device {name!r} cannot be used here") for name in ("gpu", "", "meta", "CPU")),
        (("clean", "--device", "cuda:99"), "write cpu, or cuda where a GPU is"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(
    words: tuple[str, ...], message: str, model: Path, cli: Any
) -> None:
    assert message in cli.refused("evaluate", model, "--protocol", *words)


@pytest.mark.parametrize("words", [("evaluate", "--protocol", "clean"), ("lint",)])
def test_a_device_is_refused_without_the_list_of_those_that_torch_knows(
    words: tuple[str, ...], model: Path, cli: Any
) -> None:
    line = cli.refused(words[0], model, *words[1:], "--device", "nonsense")
    assert "write cpu, or cuda where a GPU is, cuda:0 for the first of several" in line
    assert "mkldnn" not in line


def test_a_variant_that_is_not_there_is_refused(plain: Path, cli: Any) -> None:
    line = cli.refused("evaluate", plain, "--protocol", "clean", "--variant", "gated")
    assert "smoke-derived has no variant 'gated'; it has single" in line


def test_missing_data_are_named(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, small: list[str]
) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    expected = "holds no nobody/tiny/plain/test-*.parquet; point it at a folder with the hub's layout"
    assert expected in cli.refused("evaluate", model, "--protocol", "clean")
    assert "train-*.parquet" in cli.refused("train", "smoke", "--out", tmp_path / "run", *small)


def test_pickled_weights_are_refused(model: Path, tmp_path: Path, cli: Any, changed: Any, document_of: Any) -> None:
    pickled = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, pickled)
    disguised = changed(model, tmp_path / "disguised", **{RGN_WEIGHTS.replace(".", "__"): pickled.getvalue()})
    line = cli.refused("evaluate", disguised, "--protocol", "clean")
    assert "pickled weights (.pt, .pth, .bin) are refused because loading one can run code" in line
    listed = tmp_path / "listed"
    shutil.copytree(model, listed)
    card = document_of(listed)
    card["files"]["weights.pt"] = card["files"].pop(RGN_WEIGHTS)
    (listed / "card.json").write_text(json.dumps(card))
    assert "'weights.pt', which is a pickle and can run code" in cli.refused("evaluate", listed, "--protocol", "clean")


def test_a_result_whose_checks_do_not_hold_is_not_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, changed: Any, document_of: Any
) -> None:
    changed(model, tmp_path / "model")
    alarm = Check(name="gradients are not zero", held=False, detail="all are")
    monkeypatch.setattr("zoo.evaluation.protocols.whitebox.sanity", lambda *_: (alarm,))
    words = ("--protocol", "whitebox", "--eps", "0.01", "--images", "9", "--steps", "1", "--restarts", "1", "--record")
    said = cli("evaluate", tmp_path / "model", *words, "--json")
    assert said.code == 1
    assert said.json["checks"][:1] == [{"name": "gradients are not zero", "held": False, "detail": "all are"}]
    assert "ALARM: gradients are not zero does not hold (all are); this number may flatter the model" in said.err
    assert "not recorded: a result whose checks do not hold enters no card" in said.err
    assert document_of(tmp_path / "model")["results"] == []


def test_a_model_on_the_hub_cannot_be_recorded_into(monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = cli.refused("evaluate", "hf-hub:some/model", "--protocol", "clean", "--record")
    assert "first manygates pull hf-hub:some/model --to DIR, then evaluate local-dir:DIR" in line


def test_lint_asks_every_question_and_records_what_it_found(
    model: Path, tmp_path: Path, cli: Any, changed: Any, document_of: Any
) -> None:
    folder = changed(model, tmp_path / "model")
    words = ("--variant", "single", "--images", "60", "--eps", "0.05", "--queries", "20")
    said = cli("lint", folder, *words, "--record")
    lines = [line.strip() for line in said.out.splitlines()]
    assert lines[0] == "smoke single"
    asked = {line.split()[1] for line in lines[1:-1] if line.split()[0] in ("ok", "ALARM", "skipped")}
    assert {"S1", "S5", "W1", "G1", "G2", "O1", "R1", "B1", "M1", "P1", "X1"} <= asked
    assert not any(line.startswith("ALARM  P1") for line in lines), "the exported graph is what was attacked"
    (lint,) = document_of(folder)["lint"]
    alarms = [finding["code"] for finding in lint["findings"] if finding["verdict"] == "alarm"]
    assert said.code == (1 if alarms else 0)
    assert lint["command"].startswith(f"manygates lint {folder} --variant single --eps 0.05 --images 60 --queries 20")
    shown = cli.done("show", folder).out
    assert ("failed the robustness linter" in shown) == bool(alarms)
    assert "the robustness linter has not looked at it" in shown  # the other variants
