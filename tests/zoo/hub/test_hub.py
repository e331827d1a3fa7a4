"""The hub's client in this process, its transport replaced by a hub in memory; see tests/hub for the command line."""

import json
import logging
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants, errors, set_client_factory
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results
from huggingface_hub.utils import close_session

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card
from zoo.bundle.readme import model_card
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile
from zoo.hub import hub as module
from zoo.hub.fetch import part_of, pull
from zoo.hub.hub import fetch, hub_cards, parse_repository, plan_push, push
from zoo.hub.source import list_bundled, open_model, pin

# the hub's client hands a file to its HTTP library in a way that the library wants to retire
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HERE = Path(__file__).parents[1]
FILES = {"rgn.safetensors": b"weights", "single.onnx": b"one", "ensemble.onnx": b"many", "gated.onnx": b"all"}


@pytest.fixture
def hub(fake_hub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub behind the client's own transport: whatever host is asked, it answers, and no socket is opened."""
    hub = fake_hub.FakeHub()
    hub.url = "https://huggingface.co"

    def handle(request: httpx2.Request) -> httpx2.Response:
        headers = {key.lower(): value for key, value in request.headers.items()}
        answer = hub.answer(request.method, request.url.raw_path.decode(), headers, request.read())
        length = {"Content-Length": str(len(answer.body))}
        content = b"" if request.method == "HEAD" else answer.body
        return httpx2.Response(answer.status, content=content, headers=answer.headers | length)

    def no_socket(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_socket)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(handle)))
    yield hub
    set_client_factory(huggingface_hub.utils._http.default_client_factory)
    close_session()


@pytest.fixture
def card() -> Card:
    golden = Card.from_json((HERE / "golden_card.json").read_text(encoding="utf-8"))
    return replace(golden, int8=None)


@pytest.fixture
def bundle(tmp_path: Path, card: Card) -> Bundle:
    return write_bundle(tmp_path / "bundle", card, FILES)


@pytest.fixture
def published(hub: Any, bundle: Bundle) -> Any:
    """The repository org/name, which holds the bundle."""
    return hub.put("org/name", contents(bundle))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--name"


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in bundle.folder.iterdir()}


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


def test_files_that_the_card_does_not_list_are_never_fetched(hub: Any, published: Any) -> None:
    hub.put("org/name", {**published.main, "pytorch_model.bin": b"pickle"})
    folder = open_model("hf-hub:org/name").folder
    assert sorted(place.name for place in folder.iterdir()) == sorted(["card.json", *FILES])


def test_a_push_between_card_and_files_cannot_mix_two_versions(hub: Any, published: Any, bundle: Bundle) -> None:
    first = published.references["main"]
    other = write_bundle(bundle.folder.parent / "other", bundle.card, {name: body * 2 for name, body in FILES.items()})

    def race(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/card.json") and len(published.commits) == 1:
            hub.put("org/name", contents(other))

    hub.before = race
    assert fetch("org/name").folder.name == first
    assert fetch("org/name").read("single.onnx") == b"oneone"


def test_a_pinned_model_stays_what_it_was(hub: Any, published: Any, bundle: Bundle) -> None:
    source, card = pin("hf-hub:org/name")
    assert source == f"hf-hub:org/name@{published.references['main']}"
    other = replace(bundle.card, description="Another.")
    hub.put("org/name", {**published.main, "card.json": other.to_json().encode()})
    assert open_model(source).card == card == bundle.card
    assert open_model("hf-hub:org/name").card.description == "Another."


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
    hub: Any, published: Any, cache: Path
) -> None:
    first = fetch("org/name")
    hub.put("org/name", {**published.main, "single.onnx": b"two"})
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx .* The hub itself holds it so"):
        fetch("org/name")
    assert [place.name for place in (cache / "snapshots").iterdir()] == [first.folder.name]
    assert not (cache / "refs" / "main").exists()
    assert len(list((cache / "blobs").iterdir())) == 1 + len(FILES)
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


def test_offline_an_uncached_model_is_an_error_and_touches_no_network(hub: Any, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    set_client_factory(huggingface_hub.utils._http.default_client_factory)
    with pytest.raises(BadInput, match=r"HF_HUB_OFFLINE is set, and the cache .* lacks card\.json"):
        open_model("hf-hub:org/name")
    assert hub.requests == []


@pytest.mark.parametrize("missing", [["card.json"], ["rgn.safetensors", "gated.onnx"]])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_that_holds_a_part_does_not_speak_for_the_hub(
    missing: list[str], offline: bool, hub: Any, published: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("org/name").folder
    for name in missing:
        (folder / name).unlink()
    shutil.rmtree(cache / "trees", ignore_errors=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(refuse)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own attempts
    why = "HF_HUB_OFFLINE is set" if offline else r"https://huggingface\.co cannot be reached \(.*refused\)"
    with pytest.raises(BadInput, match=rf"{why}, and the cache .* lacks {missing[0]}.*Where there is a network"):
        fetch("org/name", folder.name)
    assert (folder / "single.onnx").is_file(), "what is there stays there"


def test_what_to_fetch_elsewhere_is_the_very_revision(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    set_client_factory(huggingface_hub.utils._http.default_client_factory)
    with pytest.raises(BadInput, match="`manygates pull hf-hub:org/name@v2 --out FOLDER`"):
        fetch("org/name", "v2")


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
    with pytest.raises(BundleError, match=rf"^the card of hf-hub:org/name@{commit}: card\.json has schema 99"):
        fetch("org/name")


def test_credentials_in_the_address_of_a_mirror_are_not_shown(
    hub: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:s3cret@mirror.example")
    monkeypatch.setattr(module, "PATIENCE", 0.0)

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
    caplog.set_level(logging.WARNING, "zoo.hub.hub")
    fetch("org/name", only=("single.onnx",))
    assert caplog.messages == []
    monkeypatch.setattr(module, "PATIENCE", 0.05)

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


def test_no_list_without_a_network(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    set_client_factory(huggingface_hub.utils._http.default_client_factory)
    with pytest.raises(BadInput, match="cannot list the hub's models of org: HF_HUB_OFFLINE is set"):
        hub_cards("org")


# --- pushing ---


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def test_a_push_and_a_pull_give_the_same_bundle(hub: Any, token: None, bundle: Bundle, tmp_path: Path) -> None:
    pushed = push(plan_push(bundle, "org/new"))
    assert pushed.changed
    assert pushed.source == f"hf-hub:org/new@{hub.repositories['org/new'].references['main']}"
    found = pull(pushed.source, out=tmp_path / "copy")
    assert found.card == bundle.card
    assert Bundle.open(found.folder).card == bundle.card


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
    other = write_bundle(tmp_path / "other", replace(bundle.card, name="another"), FILES)
    out = tmp_path / "copy"
    pull(str(bundle.folder), variants=("single",), out=out)
    pull(str(bundle.folder), out=out)  # more than before
    pull(str(bundle.folder), out=out)
    before = {place.name: place.read_bytes() for place in out.iterdir()}
    with pytest.raises(BadInput, match=r"copy holds ensemble\.onnx, gated\.onnx, rgn\.safetensors, which this"):
        pull(str(bundle.folder), variants=("single",), out=out)
    with pytest.raises(BadInput, match=f"holds the model {bundle.card.name!r}, and would lose it; choose another"):
        pull(str(other.folder), out=out)
    assert {place.name: place.read_bytes() for place in out.iterdir()} == before


def test_a_place_that_cannot_be_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="File name too long; choose another place"):
        pull(str(bundle.folder), out=tmp_path / ("x" * 300))


def test_a_new_branch_is_not_made_for_a_proposal(hub: Any, token: None, published: Any, bundle: Bundle) -> None:
    with pytest.raises(BadInput, match="org/name has no branch 'v2' to propose a change to"):
        plan_push(bundle, "org/name", branch="v2", pull_request=True)
    assert "v2" not in published.references


def test_a_push_that_fails_behind_a_new_branch_says_what_is_left(
    fake_hub: ModuleType, hub: Any, token: None, published: Any, bundle: Bundle
) -> None:
    plan = plan_push(bundle, "org/name", branch="v2")
    hub.before = lambda method, path: fake_hub.Answer(500) if "/commit/" in path else None
    with pytest.raises(BadInput, match="whose branch v2 was created and is still as the main one: the hub answers 500"):
        push(plan)


def test_what_a_token_may_not_do_is_said_of_what_was_tried(
    hub: Any, published: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(BadInput, match=r"403 .*: the token may not create a repository there$"):
        push(plan_push(bundle, "org/new"))
    with pytest.raises(
        BadInput, match=r"403 .*: the token may not write there; .* propose the change with --create-pr$"
    ):
        push(plan_push(bundle, "org/name", branch="v2"))


def test_what_is_pushed_is_what_was_checked(hub: Any, token: None, bundle: Bundle) -> None:
    plan = plan_push(bundle, "org/new")
    (bundle.folder / "single.onnx").write_bytes(b"ill")
    push(plan)
    assert hub.repositories["org/new"].main["single.onnx"] == b"one"


def test_a_plan_writes_nothing_and_says_everything(hub: Any, token: None, published: Any, bundle: Bundle) -> None:
    less = part_of(bundle.card, ("single",))
    small = write_bundle(bundle.folder.parent / "small", less, {"single.onnx": b"one"})
    plan = plan_push(small, "org/name", branch="small", message="Less")
    assert (plan.creates_repository, plan.creates_branch) == (False, True)
    assert plan.removed == ("rgn.safetensors", "ensemble.onnx", "gated.onnx")
    lines = plan.described()
    assert lines[:2] == ["use org/name, branch small (created)", "commit: Less"]
    assert [line.split()[-1] for line in lines[2:]] == ["single.onnx", "card.json", "README.md", *plan.removed]
    assert not any(method != "GET" and method != "HEAD" for method, _ in hub.requests)


def test_the_token_is_looked_for_where_the_hub_keeps_it_and_nowhere_else(
    hub: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYGATES_TOKEN", "hf_writer")
    with pytest.raises(BadInput, match=r"there is no token for https://huggingface.co; .* `hf auth login`"):
        plan_push(bundle, "org/new")
    (tmp_path / "token").write_text("hf_writer")
    assert plan_push(bundle, "org/new").creates_repository


def test_an_empty_repository_may_be_filled(hub: Any, token: None, bundle: Bundle) -> None:
    hub.put("org/new", {"README.md": b"---\nlicense: mit\n---\n"})
    plan = plan_push(bundle, "org/new")
    assert not plan.creates_repository
    assert push(plan).changed


# --- the README on the hub ---


def read_back(text: str) -> list[EvalResult]:
    """What the hub's own reader makes of a README's front matter."""
    data = ModelCard(text).data.to_dict()
    return model_index_to_eval_results(data["model-index"])[1] if "model-index" in data else []


@pytest.mark.parametrize("name", [card.name for card in list_bundled()])
def test_the_hub_reads_every_result_of_a_card_from_its_readme(name: str) -> None:
    card = open_model(name, only=()).card
    results = read_back(model_card(card, f"hf-hub:org/{name}"))
    assert [result.metric_value for result in results] == [result.accuracy for result in card.results]
    assert {result.task_type for result in results} <= {"image-classification"}
    assert {result.metric_type for result in results} <= {"accuracy"}
    assert {result.dataset_split for result in results} <= {"test"}
    assert all(result.dataset_type in ("uoft-cs/cifar10", "ylecun/mnist") for result in results)
    assert len({result.metric_name for result in results}) == len(results), "the name says which one it is"
    for result, measured in zip(results, card.results, strict=True):
        assert result.metric_args == {
            "variant": measured.variant,
            "protocol": measured.protocol,
            "attack": measured.attack,
            "norm": measured.norm,
            "eps": measured.eps_fraction,
            "images": measured.images,
            "interval": list(measured.interval),
        }
        assert result.verified is None, "that word is the hub's own"


def test_a_readme_without_results_has_no_model_index(card: Card) -> None:
    data = ModelCard(model_card(replace(card, results=()))).data
    assert data.eval_results is None
    assert data.library_name == "manygates"


# --- parts of a bundle ---


@pytest.mark.parametrize("variants", [("single",), ("ensemble", "gated"), ("single", "ensemble", "gated")])
@pytest.mark.parametrize("rounded", [(), ("single",)])
def test_a_part_says_nothing_of_what_it_does_not_hold(variants: tuple[str, ...], rounded: tuple[str, ...]) -> None:
    card = Card.from_json((HERE / "golden_card.json").read_text(encoding="utf-8"))
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


def test_a_bundle_without_int8_graphs_cannot_be_pulled_in_int8(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match="has no int8 graph of single, ensemble, gated, only of none"):
        pull(str(bundle.folder), precision="int8")
