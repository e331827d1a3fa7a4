"""attack, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import manygates
from manygates.commands.attack import ATTACK_FILES
from zoo.attacks.registry import ATTACKS


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_leaves_pictures_and_a_report(
    attack: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    words = ("--image", picture, "--attack", attack, "--eps", "0.1", "--label", "red", "--out", tmp_path / "out")
    report = cli.done("attack", model, *words, "--json").json
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


def test_an_attack_may_be_repeated_into_the_same_folder(model: Path, picture: Path, tmp_path: Path, cli: Any) -> None:
    words = ("--image", picture, "--steps", "2", "--out", tmp_path / "out", "--variant", "ensemble")
    said = cli.done("attack", model, *words)
    assert " at eps 8/255; " in said.out
    before = (tmp_path / "out/report.json").read_bytes()
    cli.done("attack", model, *words)
    assert (tmp_path / "out/report.json").read_bytes() == before
    report = cli.done("attack", model, *words, "--eps", "0", "--json").json
    assert (report["linf"], report["before"]) == (0, report["after"])


@pytest.mark.parametrize("target", [False, True])
def test_an_answer_that_was_wrong_before_is_no_success_of_the_attack(
    target: bool, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    words = ("--image", picture, "--out", tmp_path / "out", "--steps", "2")
    answer = cli.done("attack", model, *words, "--json").json["label"]
    wrong = next(name for name in ("red", "green", "blue") if name != answer)
    words += ("--label", wrong, *(("--target", answer) if target else ()))
    report = cli.done("attack", model, *words, "--json").json
    assert (report["outcome"], report["succeeded"]) == ("wrong before the attack", False)
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert ": wrong before the attack at eps" in cli.done("attack", model, *words).out


@pytest.mark.parametrize("name", ["apgd-t", "square"])
def test_an_attack_with_a_loss_of_its_own_takes_another(
    name: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    def attacked(*words: str) -> dict[str, object]:
        quick = ("--steps", "2", "--queries", "5", "--seed", "1", "--json", "--out", tmp_path)
        return cli.done("attack", model, "--image", picture, "--attack", name, *quick, *words).json

    own = "margin" if name == "square" else "dlr"
    if name == "square":
        assert attacked()["loss"] == own
    else:  # three classes are too few for a targeted DLR
        assert "use the margin loss" in cli.refused(
            "attack", model, "--image", picture, "--attack", name, "--out", tmp_path / "no"
        )
    assert attacked("--loss", "cross_entropy")["loss"] == "cross_entropy"
    assert attacked("--loss", "margin")["loss"] == "margin"


def test_an_attack_does_not_replace_a_folder_that_holds_anything_else(
    model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"dear to me")
    line = cli.refused("attack", model, "--image", picture, "--out", tmp_path)
    assert "holds 'holiday.jpg', which is no result of an attack and would be lost; choose an empty" in line
    assert (tmp_path / "holiday.jpg").exists()


def test_a_picture_of_another_kind_is_refused(model: Path, tmp_path: Path, cli: Any) -> None:
    def attack(image: Path) -> str:
        return cli.refused("attack", model, "--image", image, "--out", tmp_path / "out")

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
    words: tuple[str, ...], message: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    assert message in cli.refused("attack", model, "--image", picture, "--out", tmp_path / "out", *words)


@pytest.mark.parametrize("name", [*ATTACKS])
def test_every_attack_runs_on_a_picture_and_keeps_to_its_ball(
    name: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    quick = ("--steps", "3", "--queries", "30", "--eps", "20/255", "--label", "red", "--json")
    variant = "gated" if name == "square" else "single"
    draws = ("--draws", "3") if variant == "gated" else ()
    report = cli.done(
        "attack", model, "--image", picture, "--attack", name, "--variant", variant, *draws, *quick, "--out", tmp_path
    ).json
    assert report["attack"] == name
    assert report["linf"] <= 20 / 255 + 1e-6
    assert (tmp_path / "adversarial.png").is_file()


def test_a_targeted_attack_in_the_euclidean_ball_reports_both_norms(
    model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    report = cli.done(
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
    words: tuple[str, ...], message: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    assert message in cli.refused("attack", model, "--image", picture, "--out", tmp_path / "out", *words)


def test_a_target_that_is_what_the_model_answers_is_refused_by_name(
    model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    words = ("attack", model, "--image", picture, "--steps", "1", "--out", tmp_path / "out")
    answered = cli.done(*words, "--json").json["label"]
    assert f"the target is the label, {answered}, which is what the model answers" in cli.refused(
        *words, "--target", answered
    )
