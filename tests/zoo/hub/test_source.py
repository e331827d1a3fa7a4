from dataclasses import replace
from pathlib import Path

import pytest

from zoo.bundle.bundle import write_bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile, UnknownName
from zoo.hub import catalog
from zoo.hub import source as catalogue
from zoo.hub.source import Source, list_bundled, open_model, pin, resolve

FILES = {"rgn.safetensors": b"weights", "single.onnx": b"one", "ensemble.onnx": b"many", "gated.onnx": b"all"}
NAME = "eio-resnet20-cifar10"


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one model in it."""
    folder = tmp_path / "bundles"
    card = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
    write_bundle(folder / NAME, replace(card, int8=None), FILES)
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: folder)
    return folder


def test_a_bundled_model_is_found_by_its_name(bundled: Path) -> None:
    assert [card.name for card in list_bundled()] == [NAME]
    assert resolve(NAME) == Source(kind="bundled", folder=bundled / NAME)
    assert open_model(NAME, only=("single.onnx",)).read("single.onnx") == b"one"


def test_an_empty_catalogue_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path / "none")
    assert list_bundled() == []
    monkeypatch.setattr(catalog, "load", lambda warn=None: ())
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


def test_a_model_that_the_catalogue_knows_and_does_not_hold_says_how_to_get_it(bundled: Path, monkeypatch) -> None:
    """It is not fetched by its name alone: anybody may publish a model under any name."""
    golden = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
    entry = catalog.entry_of(replace(golden, name="far"), "0" * 64, {}, bundled=False, repository="org/far", commit="c")
    monkeypatch.setattr(catalog, "load", lambda warn=None: (entry,))
    with pytest.raises(BadInput, match=r"'far' is in the catalogue .*: `manygates pull hf-hub:org/far@c` fetches it"):
        resolve("far")
    with pytest.raises(UnknownName, match=rf"did you mean 'far'\? \(known: {NAME}, far\)"):
        resolve("fare")


def test_a_model_on_this_machine_is_pinned_to_where_it_is(bundled: Path) -> None:
    source = f"local-dir:{bundled / NAME}"
    assert pin(source) == (source, open_model(NAME).card)
    assert pin(NAME)[0] == NAME


@pytest.mark.parametrize("model", ["~nobody-of-this-name/model", "local-dir:~nobody-of-this-name/model"])
def test_a_home_that_is_not_known_is_said(model: str) -> None:
    with pytest.raises(BadInput, match="write the whole path"):
        resolve(model)
