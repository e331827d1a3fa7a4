"""The command line run in this process, and a small model that it made, on a data set of a few small images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from manygates.cli import main
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.data import datasets

SMALL = [
    "dataset=tiny", "network=resnet8", 'network_options={"width": 4}', "train_images=none", "held_out=20",
    "batch_size=30", "ensemble_paths=2", "phases.0.epochs=3", "phases.1.epochs=1",
    "phases.1.objective.distillation_steps=2",
]  # fmt: skip


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


class Cli:
    """The command line, in this process."""

    def __call__(self, *words: str | Path) -> Said:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main([str(word) for word in words])
            except SystemExit as stopped:  # argparse
                code = int(stopped.code or 0)
        return Said(code, out.getvalue(), err.getvalue())

    def done(self, *words: str | Path) -> Said:
        """Run a command that must succeed."""
        said = self(*words)
        assert said.code == 0, said.err
        return said

    def refused(self, *words: str | Path) -> str:
        """Run a command that must be refused with one line; returns the line."""
        said = self(*words)
        assert (said.code, said.out) == (2, ""), said
        assert said.err.startswith("manygates: ")
        assert said.err.count("\n") == 1
        return said.err.strip()


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


@pytest.fixture(scope="session")
def changed() -> Callable[..., Path]:
    """Return a function that writes a copy of a bundle with other files, whose card describes those."""

    def change(folder: Path, place: Path, *, card: dict[str, Any] | None = None, **files: bytes) -> Path:
        """Dots in the names of files are written as __."""
        bundle = Bundle.open(folder)
        contents = {name: bundle.read(name) for name in bundle.card.files}
        contents |= {name.replace("__", "."): content for name, content in files.items()}
        write_bundle(place, replace(bundle.card, **(card or {})), contents)
        return place

    return change


@pytest.fixture(scope="session")
def document_of() -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads the card in a folder as JSON."""
    return lambda folder: json.loads((folder / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def small() -> list[str]:
    """The words that cut a recipe down to the data set."""
    return [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(scope="session")
def tiny_known(tiny_folder: Path, register_tiny: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which the data set is known and found, and after which it is not."""

    @contextmanager
    def known() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            make_known(patch, tiny_folder, register_tiny)
            yield

    return known


def make_known(patch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    patch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    patch.setenv(datasets.DATA_VARIABLE, str(folder))
    exec(code, {})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, register_tiny: str) -> None:
    """All tests here know the data set; what a test patches on top is undone with it."""
    make_known(monkeypatch, tiny_folder, register_tiny)


@pytest.fixture(scope="session")
def run(
    tiny_known: Callable[[], AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
    cli: Cli,
    small: list[str],
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    with tiny_known():
        cli.done("train", "smoke", "--out", folder, *small, "--device", "cpu")
    return folder


@pytest.fixture(scope="session")
def model(tiny_known: Callable[[], AbstractContextManager[None]], run: Path, cli: Cli) -> Path:
    folder = run.parent / "model"
    with tiny_known():
        said = cli.done("export", run, "--out", folder)
    assert "single, ensemble, gated" in said.err
    return folder


@pytest.fixture(scope="session")
def plain(tiny_known: Callable[[], AbstractContextManager[None]], model: Path, cli: Cli) -> Path:
    folder = model.parent / "plain"
    with tiny_known():
        cli.done("derive", model, "--out", folder, "--path", "0110100")
    return folder


@pytest.fixture(scope="session")
def picture(tiny_known: Callable[[], AbstractContextManager[None]], model: Path) -> Path:
    """A test picture of the class "red"."""
    with tiny_known():
        images = datasets.load("tiny", "test")
    pixels = images.pixels[images.labels == 0][0].permute(1, 2, 0).numpy()
    file = model.parent / "red.png"
    Image.fromarray(pixels).save(file)
    return file
