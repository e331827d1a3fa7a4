"""list, show, pull and verify, from the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.card import Finding, Lint
from zoo.hub import source as catalogue


def test_a_recorded_result_is_in_the_card_and_in_the_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, changed: Any, document_of: Any
) -> None:
    bundled = tmp_path / "bundles"
    folder = changed(model, bundled / "smoke")
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: bundled)
    said = cli.done("evaluate", f"local-dir:{folder}", "--protocol", "clean", "--record")
    assert "recorded in" in said.err
    (result,) = document_of(folder)["results"]
    assert result["command"] == "manygates evaluate smoke --protocol clean --variant single --seed 0"

    (listed,) = cli.done("list", "--json").json
    assert listed.keys() >= {"name", "method", "architecture", "dataset", "variants", "results"}
    assert (listed["name"], listed["architecture"], listed["dataset"]) == ("smoke", "resnet8", "tiny")
    (number,) = listed["results"]
    kept = number.keys() & result.keys()
    assert {key: number[key] for key in kept} == {key: result[key] for key in kept}
    assert {"protocol", "variant", "accuracy", "interval", "images"} <= kept
    table = cli.done("list").out
    assert f"{100 * result['accuracy']:.2f}*" in table, "measured on few images"
    assert cli.done("show", "smoke", "--json").json == document_of(folder)
    assert "# smoke" in cli.done("show", "smoke").out
    assert cli.done("pull", "smoke").out.strip() == str(folder)
    line = cli.refused("evaluate", "smoke", "--protocol", "clean", "--record")
    assert "--record writes into a bundle of yours" in line


def test_pulling_copies_the_bundle_itself(model: Path, tmp_path: Path, cli: Any) -> None:
    cli.done("pull", model, "--to", tmp_path / "copy")
    assert {entry.name for entry in (tmp_path / "copy").iterdir()} == {entry.name for entry in model.iterdir()}
    for entry in model.iterdir():
        assert (tmp_path / "copy" / entry.name).read_bytes() == entry.read_bytes()


def test_verify_says_that_a_whole_bundle_is_whole(model: Path, plain: Path, cli: Any) -> None:
    document = cli.done("verify", model, "--json").json
    assert document["held"] is True
    assert [check["name"] for check in document["checks"]] == [
        "checksums",
        "the card describes its weights",
        "single.onnx answers as its weights",
        "single.onnx holds one path only",
        "ensemble.onnx answers as its weights",
        "ensemble.onnx counts votes as its weights",
        "gated.onnx answers as its weights",
    ]
    assert cli.done("verify", plain).out.startswith("ok    checksums: 2 files are what the card says\n")


def test_verify_compares_checksums_where_torch_is_not_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else find(name, *more))
    said = cli.done("verify", model).out
    assert said.startswith("ok    checksums: 4 files are what the card says\n")
    assert "skip  the graphs are not compared with the weights: torch is not installed; pip install" in said
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "single.onnx").write_bytes(b"ill")
    assert cli("verify", broken).code == 1


def test_verify_ends_with_1_where_a_file_was_changed(model: Path, tmp_path: Path, cli: Any) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    content = bytearray((broken / "gated.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "gated.onnx").write_bytes(content)
    said = cli("verify", broken, "--json")
    assert said.code == 1
    (check,) = said.json["checks"]
    assert (check["name"], check["held"]) == ("checksums", False)
    assert "gated.onnx" in check["detail"]
    assert cli("verify", broken).out.startswith("FAIL  checksums: ")


def test_verify_ends_with_1_where_a_graph_is_not_that_of_the_weights(
    model: Path, plain: Path, tmp_path: Path, cli: Any, changed: Any
) -> None:
    other = (plain / "single.onnx").read_bytes()  # a true graph, of another path
    broken = changed(model, tmp_path / "broken", single__onnx=other, ensemble__onnx=b"no graph at all")
    said = cli("verify", broken, "--json")
    assert said.code == 1
    failed = [check["name"] for check in said.json["checks"] if not check["held"]]
    assert failed == ["single.onnx answers as its weights", "ensemble.onnx answers as its weights"]


@pytest.mark.parametrize(
    "words",
    [("show",), ("verify",), ("pull",), ("evaluate", "--protocol", "clean"), ("attack", "--image", "x", "--out", "y")],
)
def test_an_unknown_model_is_refused_with_the_known_ones(
    words: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, changed: Any
) -> None:
    changed(model, tmp_path / "smoke")
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    assert "unknown model 'smokey'; did you mean 'smoke'? (known: smoke)" in cli.refused(command, "smokey", *rest)
    assert "write local-dir:FOLDER" in cli.refused(command, "./smokey", *rest)


def test_a_place_that_cannot_be_written_is_refused(model: Path, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "choose another place" in cli.refused("pull", model, "--to", place)


@pytest.mark.parametrize("images", [{"height": 65_536}, {"height": 32}, {"width": 32}, {"range": [0, 255]}])
def test_verify_refuses_a_card_whose_images_are_not_those_of_the_weights(
    images: dict[str, Any], model: Path, tmp_path: Path, cli: Any, document_of: Any
) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    document = document_of(model)
    document["input"] |= images
    (own / "card.json").write_text(json.dumps(document), encoding="utf-8")
    said = cli("verify", own)
    assert said.code in (1, 2)
    assert f"input.{next(iter(images))}" in said.out + said.err


def test_a_model_that_failed_the_linter_is_marked_in_the_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, changed: Any
) -> None:
    finding = Finding(code="G1", name="gradients", verdict="alarm", figure="all are zero", meaning="masking")
    lint = Lint(variant="single", images=9, seed=0, findings=(finding,), date="2026-11-21", command="manygates lint")
    changed(model, tmp_path / "smoke", card={"lint": (lint,)})
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    said = cli.done("list")
    assert "ALARM: single" in said.out
    assert "may flatter them" in said.out
    (listed,) = cli.done("list", "--json").json
    assert listed["suspect"] == ["single"]
    assert "**failed the robustness linter; its numbers may flatter it**" in cli.done("show", "smoke").out
