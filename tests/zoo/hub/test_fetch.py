"""Fetching: the hub's client in this process, its transport replaced by a hub in memory."""

import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors, set_client_factory

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile
from zoo.hub import client
from zoo.hub.client import parse_repository
from zoo.hub.fetch import fetch_card, fetch_files, hub_cards
from zoo.hub.source import find, open_model

READER = "hf_reader"
CLI = Callable[..., Any]
Offline = Callable[[], AbstractContextManager[None]]


def fetch(repository: str, revision: str | None = None, only: tuple[str, ...] | None = None) -> Bundle:
    bundle = fetch_card(repository, revision)
    fetch_files(repository, bundle, only)
    return bundle


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in bundle.folder.iterdir()}


def snapshot(cache: Path) -> Path:
    (found,) = (cache / "snapshots").iterdir()
    return found


# --- names ---


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("org/name", ("org/name", None)), ("o/n@refs/pr/1", ("o/n", "refs/pr/1")), ("a.b/c-d_e", ("a.b/c-d_e", None))],
)
def test_a_repository_may_have_a_revision(text: str, parsed: tuple[str, str | None]) -> None:
    assert parse_repository(text) == parsed


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "../x", "o/n@", "o/n x", "@v1", "o/a--b", "o/a..b", "o/a.git"])
def test_what_names_no_repository_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="names no repository, expected hf-hub:ORGANISATION/NAME"):
        parse_repository(text)


# --- fetching ---


def test_only_what_is_wanted_is_fetched_and_all_from_one_commit(hub: Any, published: Any) -> None:
    bundle = open_model("hf-hub:org/name@main", only=("single.onnx",))
    assert bundle.read("single.onnx") == b"one"
    assert bundle.folder.name == published.references["main"]
    assert sorted(place.name for place in bundle.folder.iterdir()) == ["card.json", "single.onnx"]


def test_files_that_the_card_does_not_list_are_never_fetched(hub: Any, published: Any, bundle: Bundle) -> None:
    hub.put("org/name", {**published.main, "pytorch_model.bin": b"pickle"})
    folder = open_model("hf-hub:org/name").folder
    assert sorted(place.name for place in folder.iterdir()) == sorted(["card.json", *bundle.card.files])


def test_a_push_between_card_and_files_cannot_mix_two_versions(hub: Any, published: Any, bundle: Bundle) -> None:
    first = published.references["main"]
    twice = {name: bundle.read(name) * 2 for name in bundle.card.files}
    other = write_bundle(bundle.folder.parent / "other", bundle.card, twice)

    def race(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/card.json") and len(published.commits) == 1:
            hub.put("org/name", contents(other))

    hub.before = race
    assert fetch("org/name").folder.name == first
    assert fetch("org/name").read("single.onnx") == b"oneone"


def test_a_model_that_was_found_stays_what_it_was(hub: Any, published: Any, bundle: Bundle) -> None:
    found = find("hf-hub:org/name")
    assert found.name == f"hf-hub:org/name@{published.references['main']}"
    assert sorted(place.name for place in found.bundle.folder.iterdir()) == ["card.json"]
    other = replace(bundle.card, description="Another.")
    hub.put("org/name", {**published.main, "card.json": other.to_json().encode(), "single.onnx": b"two"})
    assert found.open(["single.onnx"]).read("single.onnx") == b"one"
    assert open_model(found.name, only=()).card == found.card == bundle.card
    assert find("hf-hub:org/name").card.description == "Another."


def test_without_symbolic_links_the_cache_works_the_same(
    hub: Any, published: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = fetch("org/name").folder
    if any(place.is_symlink() for place in folder.iterdir()):
        pytest.skip("this version of huggingface_hub has no such switch")
    (folder / "single.onnx").write_bytes(b"two")
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx .* If it is so the next time too, the hub itself"):
        fetch("org/name")
    assert not cache.exists()
    assert fetch("org/name").read("single.onnx") == b"one"


def test_a_cache_that_cannot_be_written_still_names_the_file(
    hub: Any, published: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a container mounts its models read-only."""
    (fetch("org/name").folder / "gated.onnx").resolve().write_bytes(b"ill")

    def read_only(place: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(place))

    monkeypatch.setattr(Path, "unlink", read_only)
    said = rf"gated\.onnx has sha256 .* cannot be removed from it \(Read-only file system\): replace .* {cache.parent}"
    with pytest.raises(ChecksumMismatch, match=said):
        fetch("org/name")


# --- what stays in the cache, and what does not ---


def test_a_broken_repository_leaves_nothing_and_an_older_commit_stays_whole(
    hub: Any, published: Any, bundle: Bundle, cache: Path
) -> None:
    first = fetch("org/name")
    hub.put("org/name", {**published.main, "single.onnx": b"two"})
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx .* The hub itself holds it so"):
        fetch("org/name")
    assert [place.name for place in (cache / "snapshots").iterdir()] == [first.folder.name]
    assert not (cache / "refs" / "main").exists()
    assert len(list((cache / "blobs").iterdir())) == 1 + len(bundle.card.files)
    assert fetch("org/name", first.folder.name).card == first.card


def test_files_of_other_programs_stay_in_the_cache(hub: Any, published: Any, cache: Path) -> None:
    hub.put("org/name", {**published.main, "config.json": b"{}", "single.onnx": b"two"})
    other = huggingface_hub.hf_hub_download("org/name", "config.json")
    with pytest.raises(ChecksumMismatch):
        fetch("org/name")
    assert Path(other).read_bytes() == b"{}"
    assert [place.name for place in Path(other).parent.iterdir()] == ["config.json"]


def test_a_damaged_file_goes_from_all_commits_that_share_it(hub: Any, published: Any, bundle: Bundle) -> None:
    first = fetch("org/name")
    other = replace(bundle.card, description="Another.")
    hub.put("org/name", {**published.main, "card.json": other.to_json().encode()})
    second = fetch("org/name")
    (second.folder / "gated.onnx").resolve().write_bytes(b"ill")
    with pytest.raises(ChecksumMismatch, match=r"gated\.onnx is not what the hub sent, and is removed"):
        fetch("org/name")
    for folder in (first.folder, second.folder):
        assert not (folder / "gated.onnx").exists()
        assert (folder / "single.onnx").exists()
    assert fetch("org/name", first.folder.name).read("gated.onnx") == b"all"


def test_a_file_that_another_program_links_to_elsewhere_in_the_cache_stays(hub: Any, published: Any) -> None:
    hub.put("org/name", {**published.main, "onnx/single.onnx": b"shared"})
    other = Path(huggingface_hub.hf_hub_download("org/name", "onnx/single.onnx"))
    hub.put("org/name", {**published.main, "gated.onnx": b"shared"})
    with pytest.raises(
        ChecksumMismatch, match=r"gated\.onnx .* The hub itself holds it so: .* This revision is removed$"
    ):
        fetch("org/name")
    assert other.read_bytes() == b"shared"


def test_a_file_that_is_not_asked_for_is_not_looked_at(hub: Any, published: Any) -> None:
    folder = fetch("org/name").folder
    (folder / "gated.onnx").resolve().write_bytes(b"ill")
    assert fetch("org/name", only=("single.onnx",)).read("single.onnx") == b"one"


def test_a_repository_without_a_card_is_no_bundle(hub: Any, cache: Path) -> None:
    hub.put("org/name", {"config.json": b"{}"})
    with pytest.raises(MissingFile, match=r"hf-hub:org/name holds no card\.json"):
        fetch("org/name")
    assert not cache.exists()


def test_a_card_with_unsafe_names_fetches_nothing(hub: Any, published: Any, bundle: Bundle) -> None:
    document = json.loads(bundle.card.to_json())
    document["files"]["../../x.onnx"] = document["files"]["single.onnx"]
    hub.put("org/name", {**published.main, "card.json": json.dumps(document).encode()})
    with pytest.raises(BundleError, match="without folders"):
        fetch("org/name")
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}


def test_a_card_that_was_changed_in_the_cache_is_not_believed(cli: CLI, published: Any, cache: Path) -> None:
    """No checksum in the bundle covers the card; the cache's own name of it does."""
    assert cli("pull", "hf-hub:org/name").code == 0
    blob = (snapshot(cache) / "card.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"A bundle.", b"A better."))
    assert "card.json is not what the hub sent" in cli("show", "hf-hub:org/name", HF_HUB_OFFLINE="1").error
    assert "A bundle." in cli("show", "hf-hub:org/name").out


# --- errors, in one sentence that helps ---


def http_error(kind: type[errors.HfHubHTTPError], status: int = 500) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/name")
    return kind("from the hub\nwith details", response=httpx2.Response(status, request=request))


def unreachable(status: int = 404) -> Exception:
    """What the client raises where something else than a hub answers: a page that asks for a login, say."""
    error = errors.LocalEntryNotFoundError("gone")
    error.__cause__ = http_error(errors.HfHubHTTPError, status)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("gone"), "cannot be reached .* lacks card.json. Where there is a network"),
        (http_error(errors.RepositoryNotFoundError), "no repository 'org/name' that you may read"),
        (http_error(errors.GatedRepoError), "private or gated log in"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (http_error(errors.HfHubHTTPError, 503), r"the hub answers 503 \(from the hub\): try again later"),
        (http_error(errors.HfHubHTTPError, 429), "too many requests; wait a few minutes"),
        (http_error(errors.HfHubHTTPError, 401), "the token is not valid"),
        (http_error(errors.HfHubHTTPError, 418), "check the name and the token"),
        (httpx2.ConnectError("refused"), r"cannot be reached \(refused\), and the cache"),
        (httpx2.ReadTimeout(""), r"cannot be reached \(ReadTimeout\), and the cache"),
        (unreachable(403), r"the hub answers 403 \(from the hub\): it may not be read, or not by you"),
        (PermissionError(13, "Permission denied"), r"the cache .* cannot be used \(Permission denied\); set HF_HOME"),
        (unreachable(), r"does not answer as it should \(from the hub\), and the cache"),
        (errors.HFValidationError("odd"), "cannot fetch hf-hub:org/name@v9: odd; try again later"),
        (OSError(28, "No space left on device"), "No space left on device .*; no incomplete file is kept. Make room"),
        (OSError(122, "Disk quota exceeded"), "Make room"),
        (OSError("two\nlines"), "cannot fetch hf-hub:org/name@v9: two; try again later"),
        (RuntimeError("Data processing error"), "try again later, or with HF_HUB_DISABLE_XET=1"),
    ],
)
def test_an_error_of_the_hub_says_what_to_do(
    error: Exception, said: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BadInput, match=said) as caught:
        open_model("hf-hub:org/name@v9")
    assert "\n" not in str(caught.value)


def test_a_defect_of_ours_keeps_its_traceback(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise TypeError("ours")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TypeError, match="ours"):
        open_model("hf-hub:org/name")


def test_offline_an_uncached_model_is_an_error_and_touches_no_network(hub: Any, offline: Offline) -> None:
    said = (
        r"HF_HUB_OFFLINE is set, and the cache .* lacks card\.json.* `manygates pull hf-hub:org/name@v2 --out FOLDER`"
    )
    with offline(), pytest.raises(BadInput, match=said):
        open_model("hf-hub:org/name@v2")
    assert hub.requests == []


@pytest.mark.parametrize("missing", [["card.json"], ["rgn.safetensors", "gated.onnx"]])
@pytest.mark.parametrize("without_network", [True, False])
def test_a_cache_that_holds_a_part_does_not_speak_for_the_hub(
    missing: list[str], without_network: bool, hub: Any, published: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("org/name").folder
    for name in missing:
        (folder / name).unlink()
    shutil.rmtree(cache / "trees", ignore_errors=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", without_network)

    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(refuse)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own attempts
    why = "HF_HUB_OFFLINE is set" if without_network else r"https://huggingface\.co cannot be reached \(.*refused\)"
    with pytest.raises(BadInput, match=rf"{why}, and the cache .* lacks {missing[0]}.*Where there is a network"):
        fetch("org/name", folder.name)
    assert (folder / "single.onnx").is_file(), "what is there stays there"


def test_offline_a_damaged_file_is_fetched_again_elsewhere(
    hub: Any, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("org/name").folder
    (folder / "gated.onnx").resolve().write_bytes(b"ill")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ChecksumMismatch, match=r"the same command fetches it again where there is a network"):
        fetch("org/name", folder.name)


def test_a_card_that_cannot_be_used_names_the_repository_and_not_the_cache(hub: Any, published: Any) -> None:
    commit = hub.put("org/name", {**published.main, "card.json": b'{"schema": 99}'}).references["main"]
    said = rf"^the card of hf-hub:org/name@{commit}: card\.json has schema 99.* `pip install --upgrade manygates`"
    with pytest.raises(BundleError, match=said):
        fetch("org/name")


def test_credentials_in_the_address_of_a_mirror_are_not_shown(
    hub: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:s3cret@mirror.example")
    monkeypatch.setattr(client, "PATIENCE", 0.0)

    def fail(*_: Any, **__: Any) -> str:
        time.sleep(0.1)
        raise httpx2.ConnectError("refused by https://user:s3cret@mirror.example/api")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BadInput, match=r"https://mirror\.example cannot be reached") as caught:
        fetch("org/name")
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    assert "https://mirror.example" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_slow_hub_is_mentioned_once_and_a_quick_one_never(
    hub: Any, published: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "zoo.hub.client")
    fetch("org/name", only=("single.onnx",))
    assert caplog.messages == []
    monkeypatch.setattr(client, "PATIENCE", 0.05)

    def slow(method: str, path: str) -> None:
        if "/revision/" in path:
            time.sleep(0.3)

    hub.before = slow
    fetch("org/name", only=("single.onnx",))
    (said,) = caplog.messages
    assert "still trying to reach https://huggingface.co, to fetch hf-hub:org/name;" in said


def test_bars_are_for_terminals_and_come_back(
    hub: Any, published: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    fetch("org/name", only=("single.onnx",))
    assert capsys.readouterr().err == ""
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fetch("org/name")
    assert "Fetching" in capsys.readouterr().err


def test_a_repository_that_lacks_a_file_of_its_card_says_so(cli: CLI, hub: Any, published: Any) -> None:
    hub.put("org/name", {name: body for name, body in published.main.items() if name != "gated.onnx"})
    said = cli("pull", "hf-hub:org/name").error
    assert f"hf-hub:org/name@{published.references['main']} holds no gated.onnx, which its card lists" in said
    assert cli("pull", "hf-hub:org/name", "--variant", "single").code == 0


def test_a_revision_that_does_not_exist_is_named(cli: CLI, published: Any) -> None:
    assert (
        "hf-hub:org/name has no revision 'v9'; name a branch, tag or commit" in cli("show", "hf-hub:org/name@v9").error
    )
    commit = "0" * 40
    assert f"hf-hub:org/name has no revision '{commit}'" in cli("show", f"hf-hub:org/name@{commit}").error


def test_a_repository_that_may_not_be_read_is_named(cli: CLI, hub: Any, published: Any) -> None:
    said = cli("pull", "hf-hub:org/nowhere").error
    assert "the hub has no repository 'org/nowhere' that you may read" in said
    assert "`hf auth login`" in said
    published.private = True
    assert "no repository 'org/name' that you may read" in cli("pull", "hf-hub:org/name").error
    refused = cli("pull", "hf-hub:org/name", HF_TOKEN="hf_expired").error
    assert "the hub answers 401" in refused
    assert "the token is not valid; log in again" in refused
    assert cli("pull", "hf-hub:org/name", HF_TOKEN=READER).code == 0


# --- the list ---


def test_cards_of_the_hub_are_listed_with_their_commits(
    fake_hub: ModuleType, hub: Any, published: Any, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put("them/newer", contents(bundle) | {"card.json": b'{"schema": 99}'})
    hub.put("them/same", contents(bundle))
    hub.put("them/blocked", contents(bundle))
    hub.put("them/odd", contents(bundle))
    commits = {name: repository.references["main"] for name, repository in hub.repositories.items()}
    answers = {"them/blocked": (403, ""), "them/odd": (404, "RevisionNotFound")}

    def refuse(method: str, path: str) -> Any:
        for name, (status, code) in answers.items():
            if name in path:
                said = {"X-Error-Code": code, "X-Error-Message": "Access to this resource is disabled."}
                return fake_hub.Answer(status, b"{}", said)
        return None

    hub.before = refuse
    assert hub_cards() == [
        ("org/name", commits["org/name"], bundle.card),
        ("them/same", commits["them/same"], bundle.card),
    ]
    assert "left out: " in caplog.text
    assert "schema 99" in caplog.text
    assert "them/blocked: the hub answers 403 (Access to this resource is disabled.): it may not be read" in caplog.text
    assert [repository for repository, _, _ in hub_cards("them")] == ["them/same"]
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}


def test_no_list_without_a_network(hub: Any, offline: Offline) -> None:
    with offline(), pytest.raises(BadInput, match="cannot list the hub's models of org: HF_HUB_OFFLINE is set"):
        hub_cards("org")
