"""A hub on this machine, a bundle to put on it, and the command line in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card

ROOT = Path(__file__).parents[2]
NAME = "eio-resnet20-cifar10"
FILES = {
    "rgn.safetensors": b"weights" * 9000,
    "single.onnx": b"one" * 9000,
    "ensemble.onnx": b"many" * 9000,
    "gated.onnx": b"all" * 9000,
    "single.int8.onnx": b"i" * 900,
    "ensemble.int8.onnx": b"j" * 900,
}


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user error consists of."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("manygates: ")]
        assert self.err.splitlines()[-1] == lines[-1], self.err
        assert "Traceback" not in self.err
        return lines[-1]


@pytest.fixture
def hub(fake_hub: ModuleType) -> Any:
    return fake_hub.FakeHub()


@pytest.fixture
def url(fake_hub: ModuleType, hub: Any) -> Iterator[str]:
    with fake_hub.serve(hub) as url:
        yield url


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a random gated network; its graphs are no graphs, which nothing here looks at."""
    golden = Card.from_json((ROOT / "tests/zoo/golden_card.json").read_text(encoding="utf-8"))
    assert golden.int8 is not None
    rounded = tuple(variant for variant in golden.int8.variants)
    files = {name: body for name, body in FILES.items() if "int8" not in name or name.split(".")[0] in rounded}
    return write_bundle(tmp_path / "bundle", replace(golden, description="A bundle."), files)


@pytest.fixture
def published(hub: Any, url: str, bundle: Bundle) -> Any:
    """The bundle's repository on the hub: org/model."""
    return hub.put("org/model", {place.name: place.read_bytes() for place in bundle.folder.iterdir()})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / "models--org--model"


@pytest.fixture
def environment(tmp_path: Path, url: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error,ignore::DeprecationWarning",  # the hub's client has some of its own
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MANYGATES_CACHE": str(tmp_path / "manygates"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def cli(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Said]:
    """Return a function that runs `manygates` in a process of its own; keywords are further environment variables."""

    def run(*words: object, before: str = "", **more: str) -> Said:
        code = f"import sys, manygates\n{before}\nsys.exit(manygates.main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return run
