"""Pulling: the whole bundle or what some variants need, into the cache or as a copy; what a pull meets on the way."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, ChecksumMismatch
from zoo.hub.pull import part_of, pull

CLI = Callable[..., Any]


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {name: bundle.read(name) for name in bundle.card.files}


def snapshot(cache: Path) -> Path:
    (found,) = (cache / "snapshots").iterdir()
    return found


def test_a_pull_says_what_is_where_for_programs(cli: CLI, published: Any, bundle: Bundle, cache: Path) -> None:
    said = json.loads(cli("pull", "hf-hub:org/name@main", "--json").out)
    assert said["source"] == f"hf-hub:org/name@{published.references['main']}"
    assert said["folder"] == str(snapshot(cache))
    assert said["files"] == {
        name: {"sha256": entry.sha256, "size": entry.size} for name, entry in bundle.card.files.items()
    }
    assert cli("pull", "hf-hub:org/name").out.strip() == said["folder"]


def test_only_what_a_variant_needs_is_fetched(cli: CLI, hub: Any, published: Any, cache: Path) -> None:
    assert cli("pull", "hf-hub:org/name", "--variant", "single").code == 0
    assert sorted(place.name for place in snapshot(cache).iterdir()) == ["card.json", "single.onnx"]
    assert cli("pull", "hf-hub:org/name", "--variant", "single", "--precision", "int8").code == 0
    assert sorted(place.name for place in snapshot(cache).iterdir()) == ["card.json", "single.int8.onnx", "single.onnx"]
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {
        "card.json",
        "single.onnx",
        "single.int8.onnx",
    }


def test_a_warm_cache_fetches_nothing_again_and_works_offline(
    cli: CLI, hub: Any, published: Any, tmp_path: Path
) -> None:
    assert cli("pull", "hf-hub:org/name").code == 0
    fetched = len(hub.asked("GET", "/resolve/"))
    assert cli("pull", "hf-hub:org/name").code == 0
    assert len(hub.asked("GET", "/resolve/")) == fetched
    hub.requests.clear()
    said = cli("pull", "hf-hub:org/name", "--out", "copy", HF_HUB_OFFLINE="1")
    assert said.code == 0, said.err
    assert hub.requests == []
    assert cli("show", "local-dir:copy", HF_HUB_OFFLINE="1").code == 0


def test_what_another_program_downloaded_into_a_plain_folder_is_a_model(
    cli: CLI, published: Any, tmp_path: Path
) -> None:
    huggingface_hub.snapshot_download("org/name", local_dir=tmp_path / "plain")
    assert (tmp_path / "plain" / ".cache").is_dir()
    assert cli("pull", "local-dir:plain", "--json", HF_HUB_OFFLINE="1").code == 0


def test_a_model_is_pinned_to_the_commit_that_is_shown(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    first = published.references["main"]
    newer = json.loads((bundle.folder / "card.json").read_text()) | {"description": "A newer one."}
    hub.put("org/name", {**published.main, "card.json": json.dumps(newer).encode()})
    shown = cli("show", "hf-hub:org/name").out
    assert "A newer one." in shown
    assert f"manygates serve hf-hub:org/name@{published.references['main']}" in shown
    old = cli("show", f"hf-hub:org/name@{first}").out
    assert "A bundle." in old
    assert old.rstrip().endswith(f"This is hf-hub:org/name@{first}")
    document = json.loads(cli("show", "hf-hub:org/name", "--json").out)
    assert document.pop("source") == f"hf-hub:org/name@{published.references['main']}"
    assert document == newer


def test_a_download_that_is_too_short_is_refused_and_not_kept(cli: CLI, hub: Any, published: Any, cache: Path) -> None:
    """A proxy that answers with fewer bytes, and says so."""

    def shorten(method: str, path: str, answer: Any) -> Any:
        if method == "GET" and path.endswith("gated.onnx"):
            answer.body = answer.body[:1]
        return answer

    hub.after = shorten
    said = cli("pull", "hf-hub:org/name")
    assert "cannot fetch hf-hub:org/name" in said.error
    assert "should be of size" in said.error
    assert not (snapshot(cache) / "gated.onnx").exists()
    hub.after = lambda method, path, answer: answer
    assert cli("pull", "hf-hub:org/name").code == 0


def test_a_file_that_changed_on_the_hub_is_named_and_nothing_stays_in_the_cache(
    cli: CLI, hub: Any, published: Any, cache: Path, tmp_path: Path
) -> None:
    evil = published.main["single.onnx"].replace(b"one", b"two")
    hub.put("org/name", {**published.main, "single.onnx": evil})
    said = cli("pull", "hf-hub:org/name", "--out", "copy")
    assert "single.onnx has sha256" in said.error
    assert "The hub itself holds it so: the model's owner must push it again. This revision is removed" in said.error
    assert not cache.exists()
    assert not (tmp_path / "copy").exists()
    verified = cli("verify", "hf-hub:org/name")
    assert verified.code == 1
    assert verified.out.startswith("FAIL  checksums: ")
    assert not cache.exists()


def test_a_file_that_was_changed_in_the_cache_is_removed_and_fetched_again(
    cli: CLI, hub: Any, published: Any, bundle: Bundle, cache: Path
) -> None:
    assert cli("pull", "hf-hub:org/name").code == 0
    place = snapshot(cache) / "gated.onnx"
    place.resolve().write_bytes(b"ill")
    said = cli("verify", "hf-hub:org/name")
    assert (said.code, said.out.count("\n")) == (1, 3)
    assert "gated.onnx has sha256" in said.out
    assert "is not what the hub sent, and is removed; the same command fetches it again" in said.out
    assert sorted(entry.name for entry in snapshot(cache).iterdir()) == sorted(
        {"card.json", *bundle.card.files} - {"gated.onnx"}
    )
    hub.requests.clear()
    assert cli("pull", "hf-hub:org/name").code == 0
    assert [path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")] == ["gated.onnx"]


def test_an_unknown_variant_or_precision_is_refused_before_anything_is_fetched(
    cli: CLI, hub: Any, published: Any
) -> None:
    said = cli("pull", "hf-hub:org/name", "--variant", "singel").error
    assert "unknown variant of eio-resnet20-cifar10 'singel'; did you mean 'single'?" in said
    said = cli("pull", "hf-hub:org/name", "--variant", "gated", "--precision", "int8").error
    assert "has no int8 graph of gated" in said
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_fetched(
    cli: CLI, hub: Any, published: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    assert "is not empty and holds no bundle" in cli("pull", "hf-hub:org/name", "--out", "notes").error
    assert hub.requests == []


# --- copies ---


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("--variant", "single"), {"single.onnx"}),
        (("--variant", "gated", "ensemble"), {"gated.onnx", "ensemble.onnx"}),
        (("--variant", "single", "--precision", "int8"), {"single.onnx", "single.int8.onnx"}),
    ],
)
def test_a_copy_of_some_variants_is_a_bundle_of_its_own(
    words: tuple[str, ...], files: set[str], cli: CLI, published: Any, tmp_path: Path
) -> None:
    said = cli("pull", "hf-hub:org/name", *words, "--out", "part")
    assert said.code == 0, said.err
    part = Bundle.open(tmp_path / "part").card
    assert set(part.files) == files
    assert {f"{variant}.onnx" for variant in part.variants} == {name for name in files if "int8" not in name}
    assert all(result.variant.removesuffix("-int8") in part.variants for result in part.results)
    assert part.results or "single" not in part.variants
    verified = cli("verify", "part")
    assert (verified.code, verified.err) == (0, "")
    assert verified.out.splitlines()[0] == f"ok    checksums: {len(files)} files are what the card says"
    assert verified.out.splitlines()[1].startswith("skip  the graphs are not compared with the weights")


@pytest.mark.parametrize("part", [(), ("single",)])
def test_a_copy_that_is_written_wrongly_is_no_copy(
    part: tuple[str, ...], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def crooked(place: Path, content: bytes) -> int:
        return write(place, content[:-1] + b"?" if place.suffix == ".onnx" else content)

    monkeypatch.setattr(Path, "write_bytes", crooked)
    with pytest.raises(ChecksumMismatch, match=r"\.onnx has sha256"):
        pull(str(bundle.folder), variants=part, out=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_replaces_an_earlier_one_of_the_same_files_and_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", replace(bundle.card, name="another"), contents(bundle))
    out = tmp_path / "copy"
    pull(str(bundle.folder), variants=("single",), out=out)
    pull(str(bundle.folder), out=out)  # more than before
    pull(str(bundle.folder), out=out)
    before = {place.name: place.read_bytes() for place in out.iterdir()}
    with pytest.raises(
        BadInput, match=r"copy holds ensemble\.onnx, gated\.onnx, rgn\.safetensors, single\.int8\.onnx, which this"
    ):
        pull(str(bundle.folder), variants=("single",), out=out)
    with pytest.raises(BadInput, match=f"holds the model {bundle.card.name!r}, and would lose it; choose another"):
        pull(str(other.folder), out=out)
    assert {place.name: place.read_bytes() for place in out.iterdir()} == before


def test_a_place_that_cannot_be_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="File name too long; choose another place"):
        pull(str(bundle.folder), out=tmp_path / ("x" * 300))


# --- parts of a bundle ---


@pytest.mark.parametrize("variants", [("single",), ("ensemble", "gated"), ("single", "ensemble", "gated")])
@pytest.mark.parametrize("rounded", [(), ("single",)])
def test_a_part_says_nothing_of_what_it_does_not_hold(
    variants: tuple[str, ...], rounded: tuple[str, ...], card: Card
) -> None:
    if not set(rounded) <= set(variants):
        return
    part = part_of(card, variants, rounded)
    measured = {*variants, *(f"{variant}-int8" for variant in rounded)}
    assert part.variants == variants
    assert {result.variant for result in part.results} <= measured
    assert {lint.variant for lint in part.lint} <= measured
    assert (part.int8 is None) == (not rounded)
    assert all(result in part.results for result in card.results if result.variant in measured)
    assert Card.from_json(part.to_json()) == part


def test_a_model_of_this_machine_is_pulled_from_where_it_is(bundle: Bundle, tmp_path: Path) -> None:
    found = pull(str(bundle.folder), variants=("single",))
    assert (found.folder, found.files) == (bundle.folder, ("single.onnx",))
    copied = pull(str(bundle.folder), variants=("single",), out=tmp_path / "copy")
    assert sorted(place.name for place in copied.folder.iterdir()) == ["README.md", "card.json", "single.onnx"]
    assert Bundle.open(copied.folder).card.variants == ("single",)


def test_a_bundle_without_int8_graphs_cannot_be_pulled_in_int8(bundle: Bundle, tmp_path: Path) -> None:
    files = {name: body for name, body in contents(bundle).items() if "int8" not in name}
    plain = write_bundle(tmp_path / "plain", part_of(bundle.card, bundle.card.variants), files)
    with pytest.raises(BadInput, match="has no int8 graph of single, ensemble, gated, only of none"):
        pull(str(plain.folder), precision="int8")
