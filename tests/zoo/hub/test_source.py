"""Where models are found, and which ones are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zoo.bundle.bundle import write_bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile, UnknownName
from zoo.hub import source as catalogue
from zoo.hub.source import (
    KnownModel,
    Source,
    find,
    keep_seen,
    known_model,
    known_models,
    list_bundled,
    open_model,
    package_models,
    resolve,
)

FILES = {"rgn.safetensors": b"weights", "single.onnx": b"one", "ensemble.onnx": b"many", "gated.onnx": b"all"}
NAME = "eio-resnet20-cifar10"
GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))


def card(name: str, **changes: Any) -> Card:
    return replace(GOLDEN, **{"name": name, "int8": None, "results": (), "lint": (), **changes})


def put(folder: Path, *cards: Card, bundled: bool = True) -> None:
    for each in cards:
        file = folder / "bundles" / each.name / "card.json" if bundled else folder / "cards" / f"{each.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(each.to_json(), encoding="utf-8", newline="\n")


def on_hub(*cards: Card, author: str = "org") -> list[KnownModel]:
    return [KnownModel(card=each, stranger=True, repository=f"{author}/{each.name}", commit="c" * 40) for each in cards]


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue with one model in it."""
    folder = tmp_path / "bundles"
    write_bundle(folder / NAME, card(NAME), FILES)
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: folder)
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without models, and an empty cache."""
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path / "package/bundles")
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "package"


# --- where a model is ---


def test_a_bundled_model_is_found_by_its_name(bundled: Path) -> None:
    assert [card.name for card in list_bundled()] == [NAME]
    assert resolve(NAME) == Source(kind="bundled", folder=bundled / NAME)
    assert open_model(NAME, only=("single.onnx",)).read("single.onnx") == b"one"


def test_an_empty_catalogue_is_no_error(package: Path) -> None:
    assert list_bundled() == []
    with pytest.raises(UnknownName, match="none is known here"):
        resolve("anything")


def test_every_bundled_model_of_the_package_is_intact() -> None:
    for card in list_bundled():
        assert open_model(card.name).card == card


def test_a_bundled_folder_under_another_name_is_refused(bundled: Path) -> None:
    (bundled / NAME).rename(bundled / "other")
    with pytest.raises(BundleError, match="holds the card of 'eio-resnet20-cifar10', expected 'other'"):
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


def test_a_model_that_the_catalogue_knows_and_does_not_hold_says_how_to_get_it(bundled: Path) -> None:
    """It is not fetched by its name alone: anybody may publish a model under any name."""
    keep_seen(on_hub(card("far")))
    said = rf"'far' is in the catalogue .*: `manygates pull hf-hub:org/far@{'c' * 40}` fetches it"
    with pytest.raises(BadInput, match=said):
        resolve("far")
    with pytest.raises(UnknownName, match=rf"did you mean 'far'\? \(known: {NAME}, far\)"):
        resolve("fare")


def test_a_model_on_this_machine_is_found_where_it_is(bundled: Path) -> None:
    source = f"local-dir:{bundled / NAME}"
    found = find(source)
    assert (found.name, found.source.kind, found.card) == (source, "local", open_model(NAME).card)
    assert find(NAME).name == NAME
    assert found.open(["single.onnx"]).read("single.onnx") == b"one"
    by_card = resolve(NAME).open(lambda card: [f"{variant}.onnx" for variant in card.variants])
    assert by_card.read("gated.onnx") == b"all"


def test_a_model_that_was_found_is_checked_when_it_is_opened(bundled: Path) -> None:
    (bundled / NAME / "single.onnx").write_bytes(b"two")
    found = find(NAME)
    found.open(["gated.onnx"])
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx"):
        found.open()


@pytest.mark.parametrize("model", ["~nobody-of-this-name/model", "local-dir:~nobody-of-this-name/model"])
def test_a_home_that_is_not_known_is_said(model: str) -> None:
    with pytest.raises(BadInput, match="write the whole path"):
        resolve(model)


# --- which models are known ---


def test_cards_of_models_that_are_not_bundled_are_known_too(package: Path) -> None:
    put(package, card("with-files"))
    put(package, card("card-only"), bundled=False)
    assert [(model.card.name, model.bundled) for model in package_models()] == [
        ("card-only", False),
        ("with-files", True),
    ]
    only = known_model("card-only")
    assert only is not None
    assert only.card == card("card-only")
    assert known_model("nobody") is None


def test_a_bundle_that_is_being_written_is_not_there_yet(package: Path) -> None:
    put(package, card("ready"))
    (package / "bundles" / "ready").rename(package / "bundles" / ".ready.0123")
    assert known_models() == ()


def test_a_card_under_another_name_or_in_both_places_is_refused(package: Path) -> None:
    put(package, card("same"))
    put(package, card("same"), bundled=False)
    with pytest.raises(BundleError, match=r"same\.json is the card of 'same', which is bundled already"):
        package_models()
    (package / "cards" / "same.json").rename(package / "cards" / "other.json")
    with pytest.raises(BundleError, match="holds the card of 'same', expected 'other'"):
        package_models()
    (package / "cards" / "other.json").write_text("{")
    with pytest.raises(BundleError, match=r"other\.json: card\.json is not JSON"):
        package_models()
    (package / "cards" / "other.json").write_bytes(b"\xff")
    with pytest.raises(BundleError, match=r"other\.json is not UTF-8"):
        package_models()


def test_a_model_on_the_hub_with_the_same_card_is_the_same_model(package: Path) -> None:
    mine = card("mine", training=replace(GOLDEN.training, recipe={"name": "smoke"}, overrides=()))
    put(package, mine, bundled=False)
    (before,) = known_models()
    assert before.repository is None
    keep_seen(on_hub(mine))
    (found,) = known_models()
    assert (found.repository, found.commit, found.stranger) == ("org/mine", "c" * 40, False)
    assert replace(found, repository=None, commit=None) == before
    assert f"manygates pull hf-hub:org/mine@{'c' * 40}" in found.how_to_get()
    assert "manygates train smoke" in found.how_to_get()


@pytest.mark.parametrize("bundled_too", [True, False])
def test_a_stranger_s_numbers_never_stand_beside_a_name_of_the_package(bundled_too: bool, package: Path) -> None:
    """Name and weights' digest of every model are public: a card that has both proves nothing."""
    put(package, card("mine"), bundled=bundled_too)
    keep_seen(on_hub(card("mine", description="Better.")))
    stranger, ours = known_models()
    assert (stranger.source, stranger.card.description) == ("hf-hub:org/mine", "Better.")
    assert (ours.source, ours.card, ours.repository, ours.bundled) == ("mine", card("mine"), None, bundled_too)
    assert known_model("mine") == ours


def test_a_stranger_s_commands_are_not_passed_on(package: Path) -> None:
    training = replace(GOLDEN.training, recipe={"name": "smoke; rm -r ~"}, overrides=("seed=1",))
    keep_seen(on_hub(card("evil", training=training)))
    (found,) = known_models()
    assert found.commands == ()
    assert found.how_to_get() == f"`manygates pull hf-hub:org/evil@{'c' * 40}` fetches it"
    assert KnownModel(card=card("own")).how_to_get() == "no recipe of this version makes it"


def test_what_was_seen_on_the_hub_is_replaced_as_a_whole_or_of_one_author(package: Path) -> None:
    keep_seen([*on_hub(card("one"), card("two")), *on_hub(card("three"), author="them")])
    keep_seen(on_hub(card("one")), author="org")
    assert [model.source for model in known_models()] == ["hf-hub:org/one", "hf-hub:them/three"]
    keep_seen(on_hub(card("four"), author="them"))
    assert [model.source for model in known_models()] == ["hf-hub:them/four"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("org--x--cc.json", b"{"),
        ("org--x--cc.json", b'{"schema": 99}'),
        ("org--x--cc.json", b"\xff"),
        ("x.json", card("x").to_json().encode()),
    ],
)
def test_a_damaged_card_in_the_cache_is_left_out_and_said(file: str, content: bytes, package: Path) -> None:
    put(package, card("bundled"))
    (keep_seen([]) / file).write_bytes(content)
    warnings: list[str] = []
    assert [model.card.name for model in known_models(warnings.append)] == ["bundled"]
    (warning,) = warnings
    assert file in warning
    assert warning.endswith("`manygates list --hub` writes it again")
    assert [model.card.name for model in known_models()] == ["bundled"]


def test_a_user_without_a_home_has_seen_nothing_on_the_hub(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(package, card("bundled"))

    def homeless() -> Path:
        raise BadInput("this user has no home folder")

    monkeypatch.setattr(catalogue, "cache_dir", homeless)
    assert [model.card.name for model in known_models()] == ["bundled"]
