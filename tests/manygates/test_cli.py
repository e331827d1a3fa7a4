"""What all commands have in common: numbers, places, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from manygates.cli import main
from zoo.data import datasets

ROOT = Path(__file__).parents[2]
TWO_OR_MORE = (("evaluate", "--paths"),)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, which names no file


def writing_commands(
    model: Path, picture: Path, run: Path, place: Path, small: list[str]
) -> dict[str, list[str | Path]]:
    return {
        "export": ["export", run, "--out", place],
        "derive": ["derive", run, "--out", place, "--paths", "1"],
        "report": ["report", model, "--out", place],
        "report --zoo": ["report", "--zoo", "--out", place],
        "train": ["train", "smoke", "--out", place, *small],
        "attack": ["attack", model, "--image", picture, "--steps", "1", "--out", place],
        "pull": ["pull", model, "--out", place],
    }


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python in a process of its own."""

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return start


@pytest.mark.parametrize("command", ["export", "derive", "report", "report --zoo", "train", "attack", "pull"])
@pytest.mark.parametrize("trouble", ["read-only", "full", "file in the way", "name too long"])
def test_a_command_that_cannot_write_says_where_and_what_moves_it_and_leaves_nothing(
    command: str,
    trouble: str,
    model: Path,
    run: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Any,
    small: list[str],
) -> None:
    (tmp_path / "mount").mkdir()
    place = tmp_path / "mount" / "out.md"
    words = writing_commands(model, picture, run, place, small)[command]
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
        words = writing_commands(model, picture, run, place, small)[command]
    line = cli.refused(*words)
    assert str(place.parent) in line
    assert "choose another place" in line
    assert command == "pull" or "--out" in line
    monkeypatch.undo()
    assert (tmp_path / "mount").is_file() or not list((tmp_path / "mount").rglob("*.*"))


@pytest.mark.parametrize("trouble", ["file in the way", "full"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    trouble: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    if trouble == "full":
        write = Path.open

        def full(self: Path, *mode: Any, **options: Any) -> Any:
            return full_disk() if self.suffix == ".jsonl" else write(self, *mode, **options)

        monkeypatch.setattr(Path, "open", full)
    else:
        (tmp_path / "cache").touch()
    line = cli.refused("evaluate", model, "--protocol", "clean", "--images", "8")
    assert str(tmp_path / "cache") in line
    assert "set MANYGATES_CACHE to a folder that can be written" in line


def test_a_user_without_a_home_is_told_to_name_a_cache(model: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("MANYGATES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "set MANYGATES_CACHE" in cli.refused("evaluate", model, "--protocol", "clean", "--images", "8")
    assert cli.done("list").out
    assert cli.done("show", model, "--json").json["name"]


@pytest.mark.parametrize("command", ["evaluate", "lint"])
def test_a_card_that_cannot_be_changed_is_told_before_the_work(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, changed: Any
) -> None:
    own = changed(model, tmp_path / "mount" / "own")

    def read_only(self: Path, *mode: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(datasets, "load", None)  # not reached
    more = {"evaluate": ["--protocol", "clean"], "lint": []}[command]
    line = cli.refused(command, own, *more, "--record")
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
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert "set TMPDIR to a folder that can be written" in cli.refused("export", run, "--out", tmp_path / "out")


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
    option: str, words: tuple[str, ...], model: Path, tmp_path: Path, cli: Any
) -> None:
    named = {"MODEL": model, "OUT": tmp_path / "out"}
    least = {"--finetune": 0}.get(option, 2 if (words[0], option) in TWO_OR_MORE else 1)
    for wrong in (-3, least - 1, 10**9 + 1, 10**30):
        line = cli.refused(*(named.get(word, word) for word in words), option, str(wrong))
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
    option: str, words: tuple[str, ...], seed: str, model: Path, tmp_path: Path, cli: Any
) -> None:
    named = {"MODEL": model, "OUT": tmp_path / "out"}
    line = cli.refused(*(named.get(word, word) for word in words), option, seed)
    assert f"{option} is {seed}, expected a whole number from 0 to 9223372036854775807" in line


def test_the_largest_seed_is_taken(model: Path, picture: Path, tmp_path: Path, cli: Any) -> None:
    largest = ("--seed", str(2**63 - 1))
    cli.done("evaluate", model, "--protocol", "clean", "--images", "9", *largest)
    cli.done("attack", model, "--image", picture, "--steps", "1", "--out", tmp_path / "out", *largest)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 2**63 - 1


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
    words: tuple[str, ...], number: str, model: Path, picture: Path, tmp_path: Path, cli: Any
) -> None:
    named = {"MODEL": model, "PICTURE": picture, "OUT": tmp_path / "out"}
    own = [str(named.get(word, word)) for word in words]
    option = [word for word in own if word.startswith("--")][-1]
    assert f"{option} is {number}, expected a number that is not negative" in cli.refused(*own, number)
    if own[-1] == "--eps" and "l2" not in own:
        line = cli.refused(*own[:-1], f"--eps={number}")
        assert f"eps {number} is outside [0, 1]; a radius is not negative" in line


@pytest.mark.parametrize("words", [(), ("fly",), ("train", "smoke"), ("evaluate", "x"), ("serve", "--mode", "all")])
def test_a_command_that_cannot_be_parsed_ends_with_2(words: tuple[str, ...], cli: Any) -> None:
    said = cli(*words)
    assert (said.code, said.out) == (2, "")
    assert "usage: manygates" in said.err


def test_the_process_ends_with_the_commands_exit_code(fresh: Any, model: Path, document_of: Any) -> None:
    shown = fresh("-m", "manygates", "show", str(model), "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout) == document_of(model)
    unknown = fresh("-m", "manygates", "show", "nowhere")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("manygates: unknown model 'nowhere'")
    assert unknown.stderr.count("\n") == 1
