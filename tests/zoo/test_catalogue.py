from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from zoo import catalogue
from zoo.bundle import write_bundle
from zoo.card import Card
from zoo.catalogue import Source, list_bundled, open_model, resolve
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile, UnknownName

FILES = {"rgn.safetensors": b"weights", "single.onnx": b"one", "ensemble.onnx": b"many", "gated.onnx": b"all"}
NAME = "eio-resnet20-cifar10"


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one model in it."""
    folder = tmp_path / "bundles"
    card = Card.from_json((Path(__file__).parent / "golden_card.json").read_text(encoding="utf-8"))
    write_bundle(folder / NAME, replace(card, int8=None), FILES)
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: folder)
    return folder


class Hub:
    """A hub that holds one repository, as `huggingface_hub.snapshot_download` shows it."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.snapshot_dir = cache_dir / ("c" * 40)
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repository, revision, allow_patterns))
        self.snapshot_dir.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (self.folder / name).exists():
                (self.snapshot_dir / name).write_bytes((self.folder / name).read_bytes())
        return str(self.snapshot_dir)


@pytest.fixture
def hub(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(bundled / NAME, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_bundled_model_is_found_by_its_name(bundled: Path) -> None:
    assert [card.name for card in list_bundled()] == [NAME]
    assert resolve(NAME) == Source(kind="bundled", folder=bundled / NAME)
    assert open_model(NAME, only=("single.onnx",)).read("single.onnx") == b"one"


def test_an_empty_catalogue_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path / "none")
    assert list_bundled() == []
    with pytest.raises(UnknownName, match="none is known here"):
        resolve("anything")


def test_every_bundled_model_of_the_package_is_intact() -> None:
    for card in list_bundled():
        assert open_model(card.name).card == card


def test_a_bundled_folder_under_another_name_is_refused(bundled: Path) -> None:
    (bundled / NAME).rename(bundled / "other")
    with pytest.raises(BundleError, match="'other' holds the card of 'eio-resnet20-cifar10'"):
        list_bundled()


def test_an_unknown_name_lists_the_known_ones(bundled: Path) -> None:
    with pytest.raises(UnknownName, match=rf"unknown model 'eio-resnet20'; did you mean '{NAME}'\? \(known: {NAME}\)"):
        open_model("eio-resnet20")


def test_a_folder_is_opened_by_its_prefix_or_its_card(bundled: Path, tmp_path: Path, monkeypatch) -> None:
    folder = bundled / NAME
    assert resolve(f"local-dir:{folder}") == Source(kind="local", folder=folder)
    assert resolve(str(folder)) == Source(kind="local", folder=folder)
    assert open_model(str(folder)).card.name == NAME
    monkeypatch.setenv("HOME", str(bundled))
    assert open_model(f"local-dir:~/{NAME}").card.name == NAME
    with pytest.raises(MissingFile, match="no folder"):
        open_model(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(BadInput, match="names no folder, expected local-dir:FOLDER"):
        resolve("local-dir:")


def test_the_catalogue_goes_before_a_folder_of_the_same_name(bundled: Path, monkeypatch) -> None:
    monkeypatch.chdir(bundled)
    assert resolve(NAME).kind == "bundled"


@pytest.mark.parametrize("model", ["./nowhere", "some/where", "~/models", "..", "", "a\\b"])
def test_what_looks_like_a_folder_without_a_card_names_both_prefixes(bundled: Path, model: str) -> None:
    with pytest.raises(BadInput, match=r"local-dir:FOLDER .* hf-hub:ORGANISATION/NAME"):
        resolve(model)


def test_a_tampered_model_is_refused(bundled: Path) -> None:
    (bundled / NAME / "single.onnx").write_bytes(b"two")
    with pytest.raises(ChecksumMismatch):
        open_model(NAME)


@pytest.mark.parametrize(
    ("model", "repository", "revision"),
    [("hf-hub:org/name", "org/name", None), ("hf-hub:org/name@v1.0", "org/name", "v1.0")],
)
def test_a_repository_on_the_hub_is_named_with_its_revision(model: str, repository: str, revision: str | None) -> None:
    assert resolve(model) == Source(kind="hub", repository=repository, revision=revision)


@pytest.mark.parametrize(
    "model", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:o/n@", "hf-hub:o/n x"]
)
def test_a_malformed_repository_is_refused(model: str) -> None:
    with pytest.raises(BadInput, match="names no repository, expected hf-hub:ORGANISATION/NAME"):
        resolve(model)


def test_only_what_is_wanted_is_fetched_and_all_from_one_commit(hub: Hub) -> None:
    bundle = open_model("hf-hub:org/name@main", only=("single.onnx",))
    assert bundle.read("single.onnx") == b"one"
    assert hub.asked == [
        ("org/name", "main", ["card.json"]),
        ("org/name", "c" * 40, ["card.json", "README.md", "single.onnx"]),
    ]
    assert not (hub.snapshot_dir / "rgn.safetensors").exists()


def test_without_a_wish_exactly_the_listed_files_are_fetched(hub: Hub) -> None:
    (hub.folder / "pytorch_model.bin").touch()
    open_model("hf-hub:org/name")
    assert sorted(hub.asked[1][2]) == sorted(["card.json", "README.md", *FILES])


def test_a_repository_without_a_card_is_no_bundle(hub: Hub) -> None:
    (hub.folder / "card.json").unlink()
    with pytest.raises(MissingFile, match=r"hf-hub:org/name holds no card\.json"):
        open_model("hf-hub:org/name")


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """An error of the hub without the response it would carry, which nobody here looks at."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached .* not in the local cache"),
        (http_error(errors.RepositoryNotFoundError), "no repository 'org/name' that you may read"),
        (http_error(errors.GatedRepoError), "private or gated log in"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (errors.HFValidationError("odd"), "cannot fetch hf-hub:org/name: odd"),
        (OSError("No space left on device"), "cannot fetch hf-hub:org/name: No space left"),
    ],
)
def test_an_error_of_the_hub_says_what_to_do(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BadInput, match=said):
        open_model("hf-hub:org/name@v9")


def test_offline_an_uncached_model_is_an_error_and_touches_no_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        open_model("hf-hub:org/name")
