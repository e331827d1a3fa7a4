"""The command line from end to end, on a data set of a few small images."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import manygates
from manygates.cli import main
from manygates.commands.attack import ATTACK_FILES
from manygates.commands.train import recalibration_batches
from zoo.attacks.registry import ATTACKS
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Check, Finding, Lint
from zoo.data import datasets
from zoo.gates.derive import derive, recalibrate
from zoo.hub import source as catalogue
from zoo.weights.checkpoint import load, save
from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS, load_members, load_rgn

ROOT = Path(__file__).parents[2]
RESULT_KEYS = {
    "protocol", "variant", "attack", "norm", "eps", "eps_fraction", "steps", "step_size", "restarts", "draws",
    "images", "seed", "accuracy", "interval", "note", "checks", "tables", "date", "command",
}  # fmt: skip
SMALL = [
    "dataset=tiny", "network=resnet8", 'network_options={"width": 4}', "train_images=none", "held_out=20",
    "batch_size=30", "ensemble_paths=2", "phases.0.epochs=3", "phases.1.epochs=1",
    "phases.1.objective.distillation_steps=2",
]  # fmt: skip
GATES = 7
TWO_OR_MORE = (("evaluate", "--paths"),)


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on standard output; anything beside it is an error."""
        return json.loads(self.out)


def manygates_(*words: str | Path) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def done(*words: str | Path) -> Said:
    said = manygates_(*words)
    assert said.code == 0, said.err
    return said


def refused(*words: str | Path) -> str:
    """Run a command that must be refused with one line; returns the line."""
    said = manygates_(*words)
    assert (said.code, said.out) == (2, ""), said
    assert said.err.startswith("manygates: ")
    assert said.err.count("\n") == 1
    return said.err.strip()


def changed(folder: Path, place: Path, *, card: dict[str, Any] | None = None, **files: bytes) -> Path:
    """Write a copy of a bundle with other files (dots written as __), whose card describes those."""
    bundle = Bundle.open(folder)
    contents = {name: bundle.read(name) for name in bundle.card.files}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    write_bundle(place, replace(bundle.card, **(card or {})), contents)
    return place


def document_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module", autouse=True)
def one_thread(tiny_dataset: str) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done("train", "smoke", "--out", folder, *settings, "--device", "cpu")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    folder = run.parent / "model"
    said = done("export", run, "--out", folder)
    assert "single, ensemble, gated" in said.err
    return folder


@pytest.fixture(scope="module")
def plain(model: Path) -> Path:
    folder = model.parent / "plain"
    done("derive", model, "--out", folder, "--path", "0110100")
    return folder


@pytest.fixture(scope="module")
def picture(tiny_folder: Path, model: Path) -> Path:
    """A test picture of the class "red", larger than the network's images."""
    images = datasets.load("tiny", "test")
    pixels = images.pixels[images.labels == 0][0].permute(1, 2, 0).numpy()
    file = model.parent / "red.png"
    Image.fromarray(pixels).save(file)
    return file


# --- the chain ---


def test_a_run_becomes_a_bundle_that_says_where_it_comes_from(run: Path, model: Path) -> None:
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
    shown = done("show", f"local-dir:{model}").out
    assert "| epoch | steps |" in shown
    assert "| 4 ensemble_in_one |" in shown


def test_the_best_checkpoint_and_another_name_can_be_exported(run: Path, model: Path, tmp_path: Path) -> None:
    done(
        "export", run, "--out", tmp_path / "best", "--checkpoint", "best", "--name", "other", "--description", "Mine."
    )  # fmt: skip
    card = Bundle.open(tmp_path / "best").card
    assert (card.name, card.description) == ("other", "Mine.")
    assert card.training.summary.endswith("(best checkpoint)")
    assert card.paths == Bundle.open(model).card.paths  # which paths depends on the run's seed alone


def test_the_card_of_a_run_that_goes_on_says_how_far_it_was(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    tensors, header = load(run / "last.safetensors")
    save(tmp_path / "run" / "last.safetensors", tensors, header | {"position": header["position"] | {"epoch": 2}})
    done("export", tmp_path / "run", "--out", tmp_path / "early")
    assert Bundle.open(tmp_path / "early").card.training.summary.startswith("2 of 3 + 1 epochs on ")


def test_exporting_a_bundle_again_gives_the_same_graphs(model: Path, plain: Path, tmp_path: Path) -> None:
    for folder in (model, plain):
        done("export", f"local-dir:{folder}", "--out", tmp_path / folder.name)
        assert Bundle.open(tmp_path / folder.name).card.files == Bundle.open(folder).card.files


def test_a_derived_path_is_the_networks_own(model: Path, plain: Path) -> None:
    bundle = Bundle.open(plain)
    assert bundle.card.variants == ("single",)
    assert (bundle.card.name, bundle.card.method) == ("smoke-derived", "ensemble_in_one")
    assert bundle.card.training.summary.endswith("; derived along 0110100")
    expected = derive(load_rgn(Bundle.open(model)), (0, 1, 1, 0, 1, 0, 0)).state_dict()
    (network,), _ = load_members(bundle.file(PLAIN_WEIGHTS))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_distinct_paths_are_drawn_by_the_seed(run: Path, tmp_path: Path) -> None:
    done("derive", run, "--out", tmp_path / "pair", "--paths", "2", "--name", "pair")
    done("derive", run, "--out", tmp_path / "one", "--seed", "1")
    pair, one = (Bundle.open(tmp_path / name).card for name in ("pair", "one"))
    assert (pair.name, pair.variants) == ("pair", ("single", "ensemble"))
    assert (one.name, one.variants) == ("smoke-derived", ("single",))
    drawn = [card.training.summary.rpartition("derived along ")[2].split(", ") for card in (pair, one)]
    assert [len(paths) for paths in drawn] == [2, 1]
    assert len({*drawn[0], *drawn[1]}) == 3
    assert all(len(path) == GATES for path in (*drawn[0], *drawn[1]))


def test_several_paths_can_be_named(model: Path, tmp_path: Path) -> None:
    done("derive", model, "--out", tmp_path / "out", "--path", "0000000", "--path", "1111111")
    bundle = Bundle.open(tmp_path / "out")
    rgn = load_rgn(Bundle.open(model))
    members, _ = load_members(bundle.file(PLAIN_WEIGHTS))
    for member, gate in zip(members, (0, 1), strict=True):
        expected = derive(rgn, [gate] * GATES).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in member.state_dict().items())


def test_recalibration_and_fine_tuning_change_the_weights_and_are_said(
    model: Path, plain: Path, tmp_path: Path
) -> None:
    done("derive", model, "--out", tmp_path / "calibrated", "--path", "0110100", "--recalibrate")
    done("derive", model, "--out", tmp_path / "tuned", "--path", "0110100", "--finetune", "1", "--recalibrate")
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


def test_evaluate_prints_one_result_for_one_eps_and_an_array_for_several(model: Path) -> None:
    quick = ("--images", "30", "--steps", "2", "--restarts", "1", "--json")
    clean = done("evaluate", model, "--protocol", "clean", "--json").json
    one = done("evaluate", model, "--protocol", "whitebox", "--eps", "8/255", *quick).json
    several = done("evaluate", f"local-dir:{model}", "--protocol", "whitebox", "--eps", "0.01", "8/255", *quick).json
    assert clean.keys() == one.keys() == RESULT_KEYS
    assert (clean["eps"], clean["eps_fraction"], clean["images"]) == (0, "0", 120)
    assert (one["eps"], one["eps_fraction"], one["images"], one["seed"]) == (8 / 255, "8/255", 30, 0)
    assert 0 <= one["interval"][0] <= one["accuracy"] <= one["interval"][1] <= 1
    assert one["accuracy"] <= clean["accuracy"] + 0.2
    assert {"name", "held", "detail"} == one["checks"][0].keys()
    assert [result["eps_fraction"] for result in several] == ["1/100", "8/255"]
    assert {key: several[1][key] for key in ("accuracy", "checks")} == {key: one[key] for key in ("accuracy", "checks")}


def test_the_command_of_a_result_measures_it_again(model: Path) -> None:
    words = ("--protocol", "whitebox", "--eps", "1/50", "--images", "20", "--steps", "2", "--restarts", "1")
    first = done("evaluate", model, *words, "--variant", "ensemble", "--seed", "3", "--json").json
    command = shlex.split(first["command"])
    assert command[:3] == ["manygates", "evaluate", str(model)]
    again = done(*command[1:], "--json").json
    assert again == first


def test_results_are_printed_for_people_with_their_checks(model: Path) -> None:
    said = done("evaluate", model, "--protocol", "clean", "--variant", "gated", "--images", "20")
    assert said.out.startswith("clean gated: ")
    assert "20 images, seed 0; mean over 10 draws" in said.out
    said = done(
        "evaluate", model, "--protocol", "whitebox", "--eps", "0.1", "--images", "20", "--steps", "2", "--restarts", "1"
    )  # fmt: skip
    assert "  ok    eps 0 equals clean: " in said.out


def test_a_recorded_result_is_in_the_card_and_in_the_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tmp_path / "bundles"
    folder = changed(model, bundled / "smoke")
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: bundled)
    said = done("evaluate", f"local-dir:{folder}", "--protocol", "clean", "--record")
    assert "recorded in" in said.err
    (result,) = document_of(folder)["results"]
    assert result["command"] == "manygates evaluate smoke --protocol clean --variant single --seed 0"

    (listed,) = done("list", "--json").json
    assert listed.keys() >= {"name", "method", "architecture", "dataset", "variants", "results"}
    assert (listed["name"], listed["architecture"], listed["dataset"]) == ("smoke", "resnet8", "tiny")
    (number,) = listed["results"]
    kept = number.keys() & result.keys()
    assert {key: number[key] for key in kept} == {key: result[key] for key in kept}
    assert {"protocol", "variant", "accuracy", "interval", "images"} <= kept
    table = done("list").out
    assert f"{100 * result['accuracy']:.2f}*" in table, "measured on few images"
    assert done("show", "smoke", "--json").json == document_of(folder)
    assert "# smoke" in done("show", "smoke").out
    assert done("pull", "smoke").out.strip() == str(folder)
    line = refused("evaluate", "smoke", "--protocol", "clean", "--record")
    assert "--record writes into a bundle of yours" in line


def test_pulling_copies_the_bundle_itself(model: Path, tmp_path: Path) -> None:
    done("pull", model, "--to", tmp_path / "copy")
    assert {entry.name for entry in (tmp_path / "copy").iterdir()} == {entry.name for entry in model.iterdir()}
    for entry in model.iterdir():
        assert (tmp_path / "copy" / entry.name).read_bytes() == entry.read_bytes()


def test_verify_says_that_a_whole_bundle_is_whole(model: Path, plain: Path) -> None:
    document = done("verify", model, "--json").json
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
    assert done("verify", plain).out.startswith("ok    checksums: 2 files are what the card says\n")


def test_verify_compares_checksums_where_torch_is_not_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else find(name, *more))
    said = done("verify", model).out
    assert said.startswith("ok    checksums: 4 files are what the card says\n")
    assert "skip  the graphs are not compared with the weights: torch is not installed; pip install" in said
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "single.onnx").write_bytes(b"ill")
    assert manygates_("verify", broken).code == 1


def test_verify_ends_with_1_where_a_file_was_changed(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    content = bytearray((broken / "gated.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "gated.onnx").write_bytes(content)
    said = manygates_("verify", broken, "--json")
    assert said.code == 1
    (check,) = said.json["checks"]
    assert (check["name"], check["held"]) == ("checksums", False)
    assert "gated.onnx" in check["detail"]
    assert manygates_("verify", broken).out.startswith("FAIL  checksums: ")


def test_verify_ends_with_1_where_a_graph_is_not_that_of_the_weights(model: Path, plain: Path, tmp_path: Path) -> None:
    other = (plain / "single.onnx").read_bytes()  # a true graph, of another path
    broken = changed(model, tmp_path / "broken", single__onnx=other, ensemble__onnx=b"no graph at all")
    said = manygates_("verify", broken, "--json")
    assert said.code == 1
    failed = [check["name"] for check in said.json["checks"] if not check["held"]]
    assert failed == ["single.onnx answers as its weights", "ensemble.onnx answers as its weights"]


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_leaves_pictures_and_a_report(attack: str, model: Path, picture: Path, tmp_path: Path) -> None:
    words = ("--image", picture, "--attack", attack, "--eps", "0.1", "--label", "red", "--out", tmp_path / "out")
    report = done("attack", model, *words, "--json").json
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == set(ATTACK_FILES)
    assert (report["model"], report["variant"], report["attack"]) == ("smoke", "single", attack)
    assert (report["label"], report["eps"], report["eps_fraction"]) == ("red", 0.1, "1/10")
    assert report["before"].keys() == report["after"].keys() == {"red", "green", "blue"}
    assert sum(report["after"].values()) == pytest.approx(1, abs=1e-5)
    assert report["after"]["red"] < report["before"]["red"]

    clean, adversarial = (
        torch.frombuffer(bytearray(Image.open(tmp_path / "out" / name).tobytes()), dtype=torch.uint8).int()
        for name in ("clean.png", "adversarial.png")
    )
    assert int((clean - adversarial).abs().max()) == 25  # 0.1 is 25.5 levels
    assert report["linf"] == pytest.approx(25 / 255, abs=1e-6)
    network = manygates.load(str(model))
    with torch.no_grad():  # the picture itself does what the report says
        answer = network(adversarial.view(1, 16, 16, 3).permute(0, 3, 1, 2) / 255).softmax(1)[0]
    assert answer.tolist() == pytest.approx(list(report["after"].values()), abs=1e-5)


def test_an_attack_may_be_repeated_into_the_same_folder(model: Path, picture: Path, tmp_path: Path) -> None:
    words = ("--image", picture, "--steps", "2", "--out", tmp_path / "out", "--variant", "ensemble")
    said = done("attack", model, *words)
    assert " at eps 8/255; " in said.out
    before = (tmp_path / "out/report.json").read_bytes()
    done("attack", model, *words)
    assert (tmp_path / "out/report.json").read_bytes() == before
    report = done("attack", model, *words, "--eps", "0", "--json").json
    assert (report["linf"], report["before"]) == (0, report["after"])


@pytest.mark.parametrize("target", [False, True])
def test_an_answer_that_was_wrong_before_is_no_success_of_the_attack(
    target: bool, model: Path, picture: Path, tmp_path: Path
) -> None:
    words = ("--image", picture, "--out", tmp_path / "out", "--steps", "2")
    answer = done("attack", model, *words, "--json").json["label"]
    wrong = next(name for name in ("red", "green", "blue") if name != answer)
    words += ("--label", wrong, *(("--target", answer) if target else ()))
    report = done("attack", model, *words, "--json").json
    assert (report["outcome"], report["succeeded"]) == ("wrong before the attack", False)
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert ": wrong before the attack at eps" in done("attack", model, *words).out


@pytest.mark.parametrize("name", ["apgd-t", "square"])
def test_an_attack_with_a_loss_of_its_own_takes_another(name: str, model: Path, picture: Path, tmp_path: Path) -> None:
    def attacked(*words: str) -> dict[str, object]:
        quick = ("--steps", "2", "--queries", "5", "--seed", "1", "--json", "--out", tmp_path)
        return done("attack", model, "--image", picture, "--attack", name, *quick, *words).json

    own = "margin" if name == "square" else "dlr"
    if name == "square":
        assert attacked()["loss"] == own
    else:  # three classes are too few for a targeted DLR
        assert "use the margin loss" in refused(
            "attack", model, "--image", picture, "--attack", name, "--out", tmp_path / "no"
        )
    assert attacked("--loss", "cross_entropy")["loss"] == "cross_entropy"
    assert attacked("--loss", "margin")["loss"] == "margin"


def test_an_attack_does_not_replace_a_folder_that_holds_anything_else(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"dear to me")
    line = refused("attack", model, "--image", picture, "--out", tmp_path)
    assert "holds 'holiday.jpg', which is no result of an attack and would be lost; choose an empty" in line
    assert (tmp_path / "holiday.jpg").exists()


# --- what is refused, with exit code 2 and one line ---


def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    line = refused("train", "smok", "--out", tmp_path / "run")
    assert "unknown recipe 'smok'; did you mean 'smoke'? (known: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "Recipe has no field 'sed'; its fields: "),
        ("seed", "--set takes field=value, got 'seed'; for example seed=1"),
        ("seed=x", "'x' is not a value for it, expected int"),
        ("dataset=cifar", "unknown data set 'cifar'; did you mean 'cifar10'?"),
        ("network=resnet9", "unknown network 'resnet9'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    assert message in refused("train", "smoke", "--out", tmp_path / "run", "--set", setting)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(run: Path, tmp_path: Path) -> None:
    assert "already holds a run of 'smoke'; add --resume, or choose another" in refused("train", "smoke", "--out", run)
    assert "was started with another recipe" in refused("train", "smoke", "--out", run, "--resume", "--set", "seed=9")
    (tmp_path / "notes.txt").touch()
    assert "is not empty and holds no run; choose an empty" in refused("train", "smoke", "--out", tmp_path)


def test_a_finished_run_has_nothing_to_resume(run: Path) -> None:
    before = (run / "last.safetensors").read_bytes()
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done("train", "smoke", "--out", run, *settings, "--resume", "--device", "cpu")
    assert (run / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [("show",), ("verify",), ("pull",), ("evaluate", "--protocol", "clean"), ("attack", "--image", "x", "--out", "y")],
)
def test_an_unknown_model_is_refused_with_the_known_ones(
    words: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(model, tmp_path / "smoke")
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    assert "unknown model 'smokey'; did you mean 'smoke'? (known: smoke)" in refused(command, "smokey", *rest)
    assert "write local-dir:FOLDER" in refused(command, "./smokey", *rest)


@pytest.mark.parametrize("command", ["derive", "export"])
def test_what_is_neither_a_run_nor_a_model_is_refused_as_both(command: str, tmp_path: Path) -> None:
    line = refused(command, tmp_path, "--out", tmp_path / "out")
    assert "is neither a training run (a folder with a recipe.json) nor a model: " in line
    assert "neither a training run" in refused(command, "nowhere", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("0110", "path '0110' has 4 gates, expected 7; give one gate per gated layer"),
        ("0110102", "gate 2 at position 6 is out of range, expected 0 to 1"),
        ("01a0100", "is not a row of gates; write digits such as 0110"),
    ],
)
def test_a_path_that_does_not_fit_is_refused(path: str, message: str, model: Path, tmp_path: Path) -> None:
    assert message in refused("derive", model, "--out", tmp_path / "out", "--path", path)


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
    words: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    assert message in refused("derive", model, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_plain_network_has_no_path_to_derive(plain: Path, tmp_path: Path) -> None:
    line = refused("derive", plain, "--out", tmp_path / "out", "--paths", "1")
    assert "smoke-derived is a plain network without gates, so no path can be derived from it" in line


@pytest.mark.parametrize("command", ["export", "derive"])
def test_a_place_that_is_taken_is_refused_before_any_work(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.run.load_run", None)  # not reached
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no bundle, so its content would be lost" in refused(command, run, "--out", tmp_path)
    assert "is a file, expected a directory or nothing" in refused(command, run, "--out", tmp_path / "thesis.tex")


def test_a_place_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "choose another place" in refused("pull", model, "--to", place)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, which names no file


def writing_commands(model: Path, picture: Path, run: Path, place: Path) -> dict[str, list[str | Path]]:
    return {
        "export": ["export", run, "--out", place],
        "derive": ["derive", run, "--out", place, "--paths", "1"],
        "report": ["report", model, "--out", place],
        "report --zoo": ["report", "--zoo", "--out", place],
        "train": ["train", "smoke", "--out", place, *(word for setting in SMALL for word in ("--set", setting))],
        "attack": ["attack", model, "--image", picture, "--steps", "1", "--out", place],
        "pull": ["pull", model, "--out", place],
    }


@pytest.mark.parametrize("command", ["export", "derive", "report", "report --zoo", "train", "attack", "pull"])
@pytest.mark.parametrize("trouble", ["read-only", "full", "file in the way", "name too long"])
def test_a_command_that_cannot_write_says_where_and_what_moves_it_and_leaves_nothing(
    command: str, trouble: str, model: Path, run: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    place = tmp_path / "mount" / "out.md"
    words = writing_commands(model, picture, run, place)[command]
    if trouble == "read-only":
        make = Path.mkdir

        def read_only(self: Path, *mode: Any, **options: Any) -> None:
            if self.is_relative_to(tmp_path / "mount"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
            make(self, *mode, **options)

        monkeypatch.setattr(Path, "mkdir", read_only)
    elif trouble == "full":
        flush = os.fsync
        monkeypatch.setattr(
            os,
            "fsync",
            lambda file: full_disk() if "mount" in str(Path(f"/proc/self/fd/{file}").readlink()) else flush(file),
        )
    elif trouble == "file in the way":
        (tmp_path / "mount").rmdir()
        (tmp_path / "mount").touch()
    else:
        place = place.with_name("n" * 300)
        words = writing_commands(model, picture, run, place)[command]
    line = refused(*words)
    assert str(place.parent) in line
    assert "choose another place" in line
    assert command == "pull" or "--out" in line
    monkeypatch.undo()
    assert (tmp_path / "mount").is_file() or not list((tmp_path / "mount").rglob("*.*"))


@pytest.mark.parametrize("trouble", ["file in the way", "full"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    trouble: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    if trouble == "full":
        write = Path.open

        def full(self: Path, *mode: Any, **options: Any) -> Any:
            return full_disk() if self.suffix == ".jsonl" else write(self, *mode, **options)

        monkeypatch.setattr(Path, "open", full)
    else:
        (tmp_path / "cache").touch()
    line = refused("evaluate", model, "--protocol", "clean", "--images", "8")
    assert str(tmp_path / "cache") in line
    assert "set MANYGATES_CACHE to a folder that can be written" in line


def test_a_user_without_a_home_is_told_to_name_a_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("MANYGATES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "set MANYGATES_CACHE" in refused("evaluate", model, "--protocol", "clean", "--images", "8")
    assert done("list").out
    assert done("show", model, "--json").json["name"]


@pytest.mark.parametrize("command", ["evaluate", "lint"])
def test_a_card_that_cannot_be_changed_is_told_before_the_work(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = changed(model, tmp_path / "mount" / "own")

    def read_only(self: Path, *mode: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(datasets, "load", None)  # not reached
    more = {"evaluate": ["--protocol", "clean"], "lint": []}[command]
    line = refused(command, own, *more, "--record")
    assert str(own) in line
    assert "pull MODEL --out DIR" in line


def test_output_that_cannot_be_written_is_an_error_like_any_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = io.StringIO()
    with redirect_stdout(Full()), redirect_stderr(told):
        assert main(["show", str(model)]) == 2
    assert told.getvalue().startswith("manygates: standard output: No space left on device")


@pytest.mark.slow
def test_a_machine_without_a_folder_for_temporary_files_is_told_of_the_variable(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert "set TMPDIR to a folder that can be written" in refused("export", run, "--out", tmp_path / "out")


@pytest.mark.parametrize("width", [-4, "wide", 2**40])
def test_a_width_that_no_network_has_is_refused(width: object, tmp_path: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    option = f"network_options={json.dumps({'width': width})}"
    assert "width" in refused("train", "smoke", "--out", tmp_path / "run", *settings, "--set", option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--calibration-images", ("export", "MODEL", "--out", "OUT", "--int8")),
        ("--images", ("evaluate", "MODEL", "--protocol", "clean")),
        ("--steps", ("evaluate", "MODEL", "--protocol", "whitebox")),
        ("--restarts", ("evaluate", "MODEL", "--protocol", "whitebox")),
        ("--draws", ("evaluate", "MODEL", "--protocol", "random-gates")),
        ("--queries", ("evaluate", "MODEL", "--protocol", "queries")),
        ("--images", ("lint", "MODEL")),
        ("--queries", ("lint", "MODEL")),
        ("--queries", ("attack", "MODEL", "--image", "x.png", "--out", "OUT")),
        ("--draws", ("attack", "MODEL", "--image", "x.png", "--out", "OUT")),
        ("--steps", ("attack", "MODEL", "--image", "x.png", "--out", "OUT")),
        ("--restarts", ("attack", "MODEL", "--image", "x.png", "--out", "OUT")),
        ("--paths", ("derive", "MODEL", "--out", "OUT")),
        ("--paths", ("evaluate", "MODEL", "--protocol", "transfer-matrix")),
        ("--finetune", ("derive", "MODEL", "--out", "OUT")),
    ],
)
def test_what_is_no_count_is_refused_with_the_least_that_is_taken(
    option: str, words: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    named = {"MODEL": model, "OUT": tmp_path / "out"}
    least = {"--finetune": 0}.get(option, 2 if (words[0], option) in TWO_OR_MORE else 1)
    for wrong in (-3, least - 1, 10**9 + 1, 10**30):
        line = refused(*(named.get(word, word) for word in words), option, str(wrong))
        assert f"{option} is {wrong}, expected a whole number from {least} to 1000000000" in line


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--calibration-seed", ("export", "MODEL", "--out", "OUT", "--int8")),
        ("--seed", ("derive", "MODEL", "--out", "OUT")),
        ("--seed", ("evaluate", "MODEL", "--protocol", "clean")),
        ("--seed", ("lint", "MODEL")),
        ("--seed", ("attack", "MODEL", "--image", "x.png", "--out", "OUT")),
    ],
)
@pytest.mark.parametrize("seed", ["99999999999999999999", str(2**63), "-1"])
def test_a_seed_is_what_every_generator_takes(
    option: str, words: tuple[str, ...], seed: str, model: Path, tmp_path: Path
) -> None:
    named = {"MODEL": model, "OUT": tmp_path / "out"}
    line = refused(*(named.get(word, word) for word in words), option, seed)
    assert f"{option} is {seed}, expected a whole number from 0 to 9223372036854775807" in line


def test_the_largest_seed_is_taken(model: Path, picture: Path, tmp_path: Path) -> None:
    largest = ("--seed", str(2**63 - 1))
    done("evaluate", model, "--protocol", "clean", "--images", "9", *largest)
    done("attack", model, "--image", picture, "--steps", "1", "--out", tmp_path / "out", *largest)


@pytest.mark.parametrize(
    "words",
    [
        ("attack", "MODEL", "--image", "PICTURE", "--out", "OUT", "--eps"),
        ("attack", "MODEL", "--image", "PICTURE", "--out", "OUT", "--norm", "l2", "--eps"),
        ("evaluate", "MODEL", "--protocol", "whitebox", "--eps"),
        ("evaluate", "MODEL", "--protocol", "whitebox", "--eps", "0.01"),
        ("lint", "MODEL", "--eps"),
    ],
)
@pytest.mark.parametrize("number", ["-1/255", "-1e-3"])
def test_a_negative_number_is_refused_in_one_sentence_however_it_is_written(
    words: tuple[str, ...], number: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    named = {"MODEL": model, "PICTURE": picture, "OUT": tmp_path / "out"}
    own = [str(named.get(word, word)) for word in words]
    option = [word for word in own if word.startswith("--")][-1]
    assert f"{option} is {number}, expected a number that is not negative" in refused(*own, number)
    if own[-1] == "--eps" and "l2" not in own:
        line = refused(*own[:-1], f"--eps={number}")
        assert f"eps {number} is outside [0, 1]; a radius is not negative" in line


@pytest.mark.parametrize("number", ["-5", "0"])
def test_a_recipe_trains_on_at_least_one_image(number: str, tmp_path: Path) -> None:
    line = refused("train", "smoke", "--out", tmp_path / "run", "--set", f"train_images={number}")
    assert f"train_images is {number}, expected a whole number, 1 or more" in line


@pytest.mark.parametrize("images", [{"height": 65_536}, {"height": 32}, {"width": 32}, {"range": [0, 255]}])
def test_verify_refuses_a_card_whose_images_are_not_those_of_the_weights(
    images: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    document = document_of(model)
    document["input"] |= images
    (own / "card.json").write_text(json.dumps(document), encoding="utf-8")
    said = manygates_("verify", own)
    assert said.code in (1, 2)
    assert f"input.{next(iter(images))}" in said.out + said.err


def test_a_picture_of_another_kind_is_refused(model: Path, tmp_path: Path) -> None:
    def attack(image: Path) -> str:
        return refused("attack", model, "--image", image, "--out", tmp_path / "out")

    assert f"no image file {tmp_path / 'none.png'}; check the name" in attack(tmp_path / "none.png")
    (tmp_path / "notes.png").write_text("not a picture")
    assert "are no PNG, JPEG or WEBP file; convert the image first" in attack(tmp_path / "notes.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "moving.gif")
    assert "are no PNG, JPEG or WEBP file; convert the image first" in attack(tmp_path / "moving.gif")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    assert "is damaged or cut short" in attack(tmp_path / "cut.png")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    assert "expected at most 4,000,000; scale it down first" in attack(tmp_path / "huge.png")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eps", "8"), "eps 8 is outside [0, 1]; pixels are in [0, 1], so write 8/255, not 8"),
        (("--eps", "small"), "eps 'small' is not a number; write 8/255 or 0.03"),
        (("--label", "read"), "unknown class 'read'; did you mean 'red'? (known: blue, green, red)"),
        (("--steps", "0"), "--steps is 0, expected a whole number from 1 to"),
        (("--variant", "gated"), "one draw per step proves nothing; average over several with --draws 20"),
    ],
)
def test_an_attack_that_makes_no_sense_is_refused(
    words: tuple[str, ...], message: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    assert message in refused("attack", model, "--image", picture, "--out", tmp_path / "out", *words)


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
def test_an_evaluation_that_makes_no_sense_is_refused(words: tuple[str, ...], message: str, model: Path) -> None:
    assert message in refused("evaluate", model, "--protocol", *words)


@pytest.mark.parametrize("words", [("evaluate", "--protocol", "clean"), ("lint",)])
def test_a_device_is_refused_without_the_list_of_those_that_torch_knows(words: tuple[str, ...], model: Path) -> None:
    line = refused(words[0], model, *words[1:], "--device", "nonsense")
    assert "write cpu, or cuda where a GPU is, cuda:0 for the first of several" in line
    assert "mkldnn" not in line


def test_a_variant_that_is_not_there_is_refused(plain: Path) -> None:
    line = refused("evaluate", plain, "--protocol", "clean", "--variant", "gated")
    assert "smoke-derived has no variant 'gated'; it has single" in line


def test_missing_data_are_named(model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    expected = "holds no nobody/tiny/plain/test-*.parquet; point it at a folder with the hub's layout"
    assert expected in refused("evaluate", model, "--protocol", "clean")
    settings = [word for setting in SMALL for word in ("--set", setting)]
    assert "train-*.parquet" in refused("train", "smoke", "--out", tmp_path / "run", *settings)


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    pickled = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, pickled)
    disguised = changed(model, tmp_path / "disguised", **{RGN_WEIGHTS.replace(".", "__"): pickled.getvalue()})
    line = refused("evaluate", disguised, "--protocol", "clean")
    assert "pickled weights (.pt, .pth, .bin) are refused because loading one can run code" in line
    listed = tmp_path / "listed"
    shutil.copytree(model, listed)
    card = document_of(listed)
    card["files"]["weights.pt"] = card["files"].pop(RGN_WEIGHTS)
    (listed / "card.json").write_text(json.dumps(card))
    assert "'weights.pt', which is a pickle and can run code" in refused("evaluate", listed, "--protocol", "clean")


def test_a_run_without_its_origin_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/provenance.json").unlink()
    line = refused("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "holds no readable provenance.json" in line
    (tmp_path / "run/best.safetensors").unlink()
    line = refused("export", tmp_path / "run", "--out", tmp_path / "out", "--checkpoint", "best")
    assert "has no best.safetensors yet; train for longer, or pick another checkpoint" in line


def test_a_port_in_use_is_refused(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused("serve", model, "--port", str(taken.getsockname()[1]))
    assert "choose another with --host or --port, or stop what uses it" in line


def test_serving_without_any_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    assert "no model is bundled with this installation; name one" in refused("serve")
    assert done("list", "--json").json == []


def test_a_result_whose_checks_do_not_hold_is_not_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(model, tmp_path / "model")
    alarm = Check(name="gradients are not zero", held=False, detail="all are")
    monkeypatch.setattr("zoo.evaluation.protocols.whitebox.sanity", lambda *_: (alarm,))
    words = ("--protocol", "whitebox", "--eps", "0.01", "--images", "9", "--steps", "1", "--restarts", "1", "--record")
    said = manygates_("evaluate", tmp_path / "model", *words, "--json")
    assert said.code == 1
    assert said.json["checks"][:1] == [{"name": "gradients are not zero", "held": False, "detail": "all are"}]
    assert "ALARM: gradients are not zero does not hold (all are); this number may flatter the model" in said.err
    assert "not recorded: a result whose checks do not hold enters no card" in said.err
    assert document_of(tmp_path / "model")["results"] == []


def test_a_model_on_the_hub_cannot_be_recorded_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("evaluate", "hf-hub:some/model", "--protocol", "clean", "--record")
    assert "first manygates pull hf-hub:some/model --to DIR, then evaluate local-dir:DIR" in line


@pytest.mark.parametrize("words", [(), ("fly",), ("train", "smoke"), ("evaluate", "x"), ("serve", "--mode", "all")])
def test_a_command_that_cannot_be_parsed_ends_with_2(words: tuple[str, ...]) -> None:
    said = manygates_(*words)
    assert (said.code, said.out) == (2, "")
    assert "usage: manygates" in said.err


# --- the process and the module ---


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python in a process of its own."""

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return start


def test_the_process_ends_with_the_commands_exit_code(fresh: Any, model: Path) -> None:
    shown = fresh("-m", "manygates", "show", str(model), "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout) == document_of(model)
    unknown = fresh("-m", "manygates", "show", "nowhere")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("manygates: unknown model 'nowhere'")
    assert unknown.stderr.count("\n") == 1


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


# --- the linter, reports, further attacks ---


def test_lint_asks_every_question_and_records_what_it_found(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "model")
    words = ("--variant", "single", "--images", "60", "--eps", "0.05", "--queries", "20")
    said = manygates_("lint", folder, *words, "--record")
    lines = [line.strip() for line in said.out.splitlines()]
    assert lines[0] == "smoke single"
    asked = {line.split()[1] for line in lines[1:-1] if line.split()[0] in ("ok", "ALARM", "skipped")}
    assert {"S1", "S5", "W1", "G1", "G2", "O1", "R1", "B1", "M1", "P1", "X1"} <= asked
    assert not any(line.startswith("ALARM  P1") for line in lines), "the exported graph is what was attacked"
    (lint,) = document_of(folder)["lint"]
    alarms = [finding["code"] for finding in lint["findings"] if finding["verdict"] == "alarm"]
    assert said.code == (1 if alarms else 0)
    assert lint["command"].startswith(f"manygates lint {folder} --variant single --eps 0.05 --images 60 --queries 20")
    shown = done("show", folder).out
    assert ("failed the robustness linter" in shown) == bool(alarms)
    assert "the robustness linter has not looked at it" in shown  # the other variants


def test_a_model_that_failed_the_linter_is_marked_in_the_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(code="G1", name="gradients", verdict="alarm", figure="all are zero", meaning="masking")
    lint = Lint(variant="single", images=9, seed=0, findings=(finding,), date="2026-11-21", command="manygates lint")
    changed(model, tmp_path / "smoke", card={"lint": (lint,)})
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path)
    said = done("list")
    assert "ALARM: single" in said.out
    assert "may flatter them" in said.out
    (listed,) = done("list", "--json").json
    assert listed["suspect"] == ["single"]
    assert "**failed the robustness linter; its numbers may flatter it**" in done("show", "smoke").out


def test_an_exported_copy_keeps_what_the_linter_found(model: Path, tmp_path: Path) -> None:
    finding = Finding(code="G1", name="gradients", verdict="ok", figure="none is zero", meaning="masking")
    lint = Lint(variant="single", images=9, seed=0, findings=(finding,), date="2026-11-21", command="manygates lint")
    changed(model, tmp_path / "linted", card={"lint": (lint,)})
    done("export", tmp_path / "linted", "--out", tmp_path / "again")
    assert document_of(tmp_path / "again")["lint"] == document_of(tmp_path / "linted")["lint"]


def test_a_report_stands_beside_its_figures(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    folder = changed(model, tmp_path / "model")
    for words in (
        ("clean",),
        ("whitebox", "--eps", "0.02", "0.1", "--images", "20", "--steps", "20", "--restarts", "1"),
    ):
        done("evaluate", folder, "--protocol", *words, "--record")
    said = done("report", folder, "--out", tmp_path / "report")
    assert "report.html" in said.err
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "smoke" in page
    assert list((tmp_path / "report" / "figures").glob("*.svg"))
    assert "smoke" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    refused("report", folder, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", [*ATTACKS])
def test_every_attack_runs_on_a_picture_and_keeps_to_its_ball(
    name: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    quick = ("--steps", "3", "--queries", "30", "--eps", "20/255", "--label", "red", "--json")
    variant = "gated" if name == "square" else "single"
    draws = ("--draws", "3") if variant == "gated" else ()
    report = done(
        "attack", model, "--image", picture, "--attack", name, "--variant", variant, *draws, *quick, "--out", tmp_path
    ).json
    assert report["attack"] == name
    assert report["linf"] <= 20 / 255 + 1e-6
    assert (tmp_path / "adversarial.png").is_file()


def test_a_targeted_attack_in_the_euclidean_ball_reports_both_norms(model: Path, picture: Path, tmp_path: Path) -> None:
    report = done(
        "attack", model, "--image", picture, "--norm", "l2", "--eps", "3", "--label", "red", "--target", "blue",
        "--loss", "margin", "--out", tmp_path, "--json",
    ).json  # fmt: skip
    assert (report["norm"], report["target"]) == ("l2", "blue")
    assert 0 < report["l2"] <= 3 + 1e-4
    assert report["succeeded"] == (max(report["after"], key=report["after"].get) == "blue")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--targeted",), "needs the class to be reached, got none; name it with --target CLASS"),
        (("--target", "red", "--label", "red"), "the target is the label, red; name another class"),
        (("--attack", "rays", "--target", "blue"), "rays cannot be asked for a class"),
        (("--attack", "rays", "--loss", "margin"), "rays sees no scores, so it has no loss to maximise"),
        (("--attack", "apgd-t", "--loss", "hinge"), "unknown loss 'hinge'"),
        (("--attack", "square", "--norm", "l2"), "square searches the l_inf ball, got a budget in l2"),
        (("--norm", "l2", "--eps", "-1"), "eps -1 is no length in l2"),
        (("--loss", "hinge"), "unknown loss 'hinge'"),
        (
            ("--variant", "gated", "--attack", "apgd", "--draws", "20"),
            "apgd cannot average over random gates; use",
        ),
        (("--server", "http://127.0.0.1:9"), "pgd needs gradients, and a server gives none; use one of square, rays"),
        (("--server", "http://example.org", "--attack", "square"), "attack only servers that you are allowed to"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(
    words: tuple[str, ...], message: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    assert message in refused("attack", model, "--image", picture, "--out", tmp_path / "out", *words)


def test_a_target_that_is_what_the_model_answers_is_refused_by_name(model: Path, picture: Path, tmp_path: Path) -> None:
    words = ("attack", model, "--image", picture, "--steps", "1", "--out", tmp_path / "out")
    answered = done(*words, "--json").json["label"]
    assert f"the target is the label, {answered}, which is what the model answers" in refused(
        *words, "--target", answered
    )


def test_runs_become_an_ensemble_of_separately_trained_networks(
    tiny_folder: Path, tmp_path: Path, picture: Path
) -> None:
    settings = [
        "dataset=tiny", "network=resnet8", 'network_options={"width": 4}', "held_out=20", "batch_size=30",
        "phases.0.epochs=1",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs, start=7):
        done("train", "standard-resnet20-cifar10-cpu", "--out", run, *words, "--set", f"seed={seed}", "--device", "cpu")
    said = done("export", *runs, "--out", tmp_path / "both", "--name", "pair")
    assert "pair: single, ensemble" in said.err
    card = document_of(tmp_path / "both")
    assert card["training"]["summary"].startswith("2 networks trained separately (seeds 7, 8)")
    assert [log["rows"] for log in card["training"]["logs"]] == [["1 standard"], ["1 standard"]]
    done("verify", tmp_path / "both")
    matrix = done(
        "evaluate", tmp_path / "both", "--protocol", "transfer-matrix", "--variant", "ensemble", "--eps", "0.05",
        "--images", "60", "--steps", "3", "--restarts", "1", "--json",
    ).json  # fmt: skip
    assert matrix["tables"][0]["rows"] == ["member 1", "member 2"]


def test_an_ensemble_is_made_of_plain_runs(run: Path, model: Path, tmp_path: Path) -> None:
    assert "its ensemble is made of its own paths" in refused("export", run, run, "--out", tmp_path / "x")
    assert "is no training run" in refused("export", model, run, "--out", tmp_path / "x")
