"""What needs the real client behind a socket, and a process of its own: real faults, a real disk, no network."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card

pytestmark = pytest.mark.slow

WRITER, READER = "hf_writer", "hf_reader"
DEAD = "http://127.0.0.1:9"
CLI = Callable[..., Any]
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
"""The kernel refuses to write more into a file, as a full disk does: with an error in the middle of a write."""
ROOT = Path(__file__).parents[3]
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


def left(cache: Path) -> list[str]:
    """The files in the cache, as their snapshots name them, and blobs without a name."""
    return sorted(
        place.name for kind in ("snapshots", "blobs") for place in cache.glob(f"{kind}/**/*") if place.is_file()
    )


def snapshot(cache: Path) -> Path:
    (found,) = (cache / "snapshots").iterdir()
    return found


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {name: bundle.read(name) for name in bundle.card.files}


def test_a_pulled_model_is_the_pushed_one_bit_for_bit(cli: CLI, published: Any, bundle: Bundle, tmp_path: Path) -> None:
    said = cli("pull", "hf-hub:org/model", "--out", "copy")
    assert said.code == 0, said.err
    assert f"it came from hf-hub:org/model@{published.references['main']}" in said.err
    for name in ("card.json", *bundle.card.files):
        assert (tmp_path / "copy" / name).read_bytes() == (bundle.folder / name).read_bytes()
    assert Bundle.open(tmp_path / "copy").card == bundle.card


def test_push_makes_a_repository_whose_pull_is_the_bundle(
    cli: CLI, hub: Any, url: str, bundle: Bundle, tmp_path: Path
) -> None:
    said = cli("push", bundle.folder, "org/new", "--private", HF_TOKEN=WRITER)
    assert said.code == 0, said.err
    repository = hub.repositories["org/new"]
    assert repository.private
    assert len(repository.commits) == 2, "the empty repository, and one commit with everything"
    commit = repository.references["main"]
    assert said.out.strip() == f"{url}/org/new/commit/{commit}"
    assert said.err.strip().endswith(f"{bundle.card.name} is hf-hub:org/new@{commit}")
    assert set(repository.main) == {".gitattributes", "README.md", "card.json", *bundle.card.files}
    assert cli("pull", "hf-hub:org/new", "--out", "back", HF_TOKEN=READER).code == 0
    for name in ("card.json", *bundle.card.files):
        assert (tmp_path / "back" / name).read_bytes() == (bundle.folder / name).read_bytes()


# --- what a pull meets ---


def test_a_connection_that_breaks_is_resumed_where_it_broke(
    cli: CLI, hub: Any, url: str, bundle: Bundle, tmp_path: Path, cache: Path
) -> None:
    """The client keeps whole pieces of 10 MiB."""
    weights = bytes(range(256)) * 2**16
    large = write_bundle(tmp_path / "large", bundle.card, {**contents(bundle), "rgn.safetensors": weights})
    hub.put("org/model", {place.name: place.read_bytes() for place in large.folder.iterdir()})
    answered = []

    def cut(method: str, path: str, answer: Any) -> Any:
        if method == "GET" and path.endswith("rgn.safetensors"):
            answered.append((answer.status, len(answer.body)))
            answer.sent = 11 * 2**20 if len(answered) == 1 else None
        return answer

    hub.after = cut
    said = cli("pull", "hf-hub:org/model")
    assert said.code == 0, said.err
    assert answered == [(200, 16 * 2**20), (206, 6 * 2**20)]
    Bundle.open(snapshot(cache))


def test_an_interrupted_pull_leaves_no_torn_file_and_goes_on_with_what_is_missing(
    cli: CLI, hub: Any, published: Any, bundle: Bundle, cache: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Killed while one file is half there: the whole ones are not fetched again, the half one never is used."""
    waiting = []

    def stall(method: str, path: str, answer: Any) -> Any:
        if method == "GET" and path.endswith("rgn.safetensors") and not waiting:
            deadline = time.monotonic() + 20
            while len(hub.asked("GET", "/resolve/")) < 1 + len(bundle.card.files) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)  # the others are written
            waiting.append(process)
            process.kill()
            answer.sent = len(answer.body) // 2
        return answer

    hub.after = stall
    code = "import sys, manygates; sys.exit(manygates.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, "pull", "hf-hub:org/model"], cwd=tmp_path, env=environment)
    assert process.wait(60) == -9
    present = {place.name for place in snapshot(cache).iterdir()}
    assert present == {"card.json", *bundle.card.files} - {"rgn.safetensors"}
    offline = cli("pull", "hf-hub:org/model", HF_HUB_OFFLINE="1").error
    assert "lacks rgn.safetensors" in offline
    hub.requests.clear()
    assert cli("pull", "hf-hub:org/model").code == 0
    assert [path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")] == ["rgn.safetensors"]
    Bundle.open(snapshot(cache))


def test_a_disk_that_is_full_in_the_middle_leaves_no_half_file(cli: CLI, published: Any, cache: Path) -> None:
    said = cli("pull", "hf-hub:org/model", before=SMALL_FILES).error
    assert "cannot fetch hf-hub:org/model" in said
    assert "no incomplete file is kept. Make room (`hf cache prune`), or set HF_HOME" in said
    assert not list(cache.rglob("*.incomplete"))
    assert not {"rgn.safetensors", "gated.onnx"} & set(left(cache))
    assert cli("pull", "hf-hub:org/model").code == 0


def test_a_disk_that_is_full_while_copying_leaves_no_folder(cli: CLI, published: Any, tmp_path: Path) -> None:
    assert cli("pull", "hf-hub:org/model").code == 0
    said = cli("pull", "hf-hub:org/model", "--out", "copy", before=SMALL_FILES).error
    assert "cannot write 0.2 MB to copy: File too large; nothing is left there" in said
    assert not [place for place in tmp_path.iterdir() if "copy" in place.name]


# --- no network ---


def test_without_a_network_it_says_what_is_missing_and_how_to_get_it(cli: CLI, published: Any) -> None:
    said = cli("pull", "hf-hub:org/model", HF_HUB_OFFLINE="1").error
    assert "HF_HUB_OFFLINE is set, and the cache" in said
    assert "lacks card.json" in said
    assert "`manygates pull hf-hub:org/model --out FOLDER`; bring FOLDER here and name it local-dir:FOLDER" in said
    began = time.monotonic()
    said = cli("pull", "hf-hub:org/model", HF_ENDPOINT=DEAD).error
    assert time.monotonic() - began < 15
    assert f"{DEAD} cannot be reached (" in said
    assert "lacks card.json" in said


def test_a_hub_that_does_not_answer_is_mentioned_within_a_second(
    hub: Any, published: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    asked = []

    def silent(method: str, path: str) -> None:
        asked.append(time.monotonic())
        time.sleep(3)

    hub.before = silent
    code = "import sys, manygates; sys.exit(manygates.main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "show", "hf-hub:org/model"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said, now = process.stderr.readline().decode(), time.monotonic()
        process.kill()
    assert now - min(asked, default=now) < 1
    assert f"still trying to reach {environment['HF_ENDPOINT']}, to fetch hf-hub:org/model" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert "local-dir:FOLDER" in said


def test_a_hub_that_cannot_be_reached_is_no_list(cli: CLI) -> None:
    began = time.monotonic()
    said = cli("list", "--hub", HF_ENDPOINT=DEAD).error
    assert time.monotonic() - began < 10
    assert f"{DEAD} cannot be reached (" in said
    assert "`manygates list` needs none" in said


# --- a real model ---


def test_a_real_model_goes_round_and_is_verified_and_served_offline(
    cli: CLI, hub: Any, url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    name = "standard-resnet20-cifar10"
    assert cli("push", name, f"org/{name}", HF_TOKEN=WRITER).code == 0
    verified = cli("verify", f"hf-hub:org/{name}")
    assert verified.code == 0, verified
    commit = hub.repositories[f"org/{name}"].references["main"]
    assert verified.out.rstrip().endswith(f"This is hf-hub:org/{name}@{commit}")
    assert "FAIL" not in verified.out
    hub.requests.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "manygates", "serve", f"hf-hub:org/{name}@{commit}", "--port", "0"],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        assert any("manygates serves" in line for line in process.stderr)
    finally:
        process.kill()
        process.communicate()
    assert hub.requests == []
