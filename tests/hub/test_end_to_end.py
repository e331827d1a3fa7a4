"""Pull, push, list, show and verify with the real client of the hub, over loopback, each in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.hub.source import bundled_dir

WRITER, READER = "hf_writer", "hf_reader"
DEAD = "http://127.0.0.1:9"
CLI = Callable[..., Any]


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


# --- pull ---


def test_a_pulled_model_is_the_pushed_one_bit_for_bit(cli: CLI, published: Any, bundle: Bundle, tmp_path: Path) -> None:
    said = cli("pull", "hf-hub:org/model", "--out", "copy")
    assert said.code == 0, said.err
    assert f"it came from hf-hub:org/model@{published.references['main']}" in said.err
    for name in ("card.json", *bundle.card.files):
        assert (tmp_path / "copy" / name).read_bytes() == (bundle.folder / name).read_bytes()
    assert Bundle.open(tmp_path / "copy").card == bundle.card


def test_a_pull_says_what_is_where_for_programs(cli: CLI, published: Any, bundle: Bundle, cache: Path) -> None:
    said = json.loads(cli("pull", "hf-hub:org/model@main", "--json").out)
    assert said["source"] == f"hf-hub:org/model@{published.references['main']}"
    assert said["folder"] == str(snapshot(cache))
    assert said["files"] == {
        name: {"sha256": entry.sha256, "size": entry.size} for name, entry in bundle.card.files.items()
    }
    assert cli("pull", "hf-hub:org/model").out.strip() == said["folder"]


def test_only_what_a_variant_needs_is_fetched(cli: CLI, hub: Any, published: Any, cache: Path) -> None:
    assert cli("pull", "hf-hub:org/model", "--variant", "single").code == 0
    assert sorted(place.name for place in snapshot(cache).iterdir()) == ["card.json", "single.onnx"]
    assert cli("pull", "hf-hub:org/model", "--variant", "single", "--precision", "int8").code == 0
    assert sorted(place.name for place in snapshot(cache).iterdir()) == ["card.json", "single.int8.onnx", "single.onnx"]
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {
        "card.json",
        "single.onnx",
        "single.int8.onnx",
    }


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
    said = cli("pull", "hf-hub:org/model", *words, "--out", "part")
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


def test_a_warm_cache_fetches_nothing_again_and_works_offline(
    cli: CLI, hub: Any, published: Any, tmp_path: Path
) -> None:
    assert cli("pull", "hf-hub:org/model").code == 0
    fetched = len(hub.asked("GET", "/resolve/"))
    assert cli("pull", "hf-hub:org/model").code == 0
    assert len(hub.asked("GET", "/resolve/")) == fetched
    hub.requests.clear()
    said = cli("pull", "hf-hub:org/model", "--out", "copy", HF_HUB_OFFLINE="1")
    assert said.code == 0, said.err
    assert hub.requests == []
    assert cli("show", "local-dir:copy", HF_HUB_OFFLINE="1").code == 0
    assert cli("pull", "hf-hub:org/model", HF_ENDPOINT=DEAD).code == 0


def test_what_another_program_downloaded_into_a_plain_folder_is_a_model(
    cli: CLI, published: Any, tmp_path: Path
) -> None:
    download = "import huggingface_hub as h; h.snapshot_download('org/model', local_dir='plain'); sys.exit()"
    assert cli(before=download).code == 0
    assert (tmp_path / "plain" / ".cache").is_dir()
    assert cli("pull", "local-dir:plain", "--json", HF_HUB_OFFLINE="1").code == 0


def test_a_model_is_pinned_to_the_commit_that_is_shown(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    first = published.references["main"]
    newer = json.loads((bundle.folder / "card.json").read_text()) | {"description": "A newer one."}
    hub.put("org/model", {**published.main, "card.json": json.dumps(newer).encode()})
    shown = cli("show", "hf-hub:org/model").out
    assert "A newer one." in shown
    assert f"manygates serve hf-hub:org/model@{published.references['main']}" in shown
    old = cli("show", f"hf-hub:org/model@{first}").out
    assert "A bundle." in old
    assert old.rstrip().endswith(f"This is hf-hub:org/model@{first}")
    document = json.loads(cli("show", "hf-hub:org/model", "--json").out)
    assert document.pop("source") == f"hf-hub:org/model@{published.references['main']}"
    assert document == newer


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


def test_a_download_that_is_too_short_is_refused_and_not_kept(cli: CLI, hub: Any, published: Any, cache: Path) -> None:
    """A proxy that answers with fewer bytes, and says so."""

    def shorten(method: str, path: str, answer: Any) -> Any:
        if method == "GET" and path.endswith("gated.onnx"):
            answer.body = answer.body[:1000]
        return answer

    hub.after = shorten
    said = cli("pull", "hf-hub:org/model")
    assert "cannot fetch hf-hub:org/model" in said.error
    assert "should be of size" in said.error
    assert "gated.onnx" not in left(cache)
    hub.after = lambda method, path, answer: answer
    assert cli("pull", "hf-hub:org/model").code == 0


def test_a_file_that_changed_on_the_hub_is_named_and_nothing_stays_in_the_cache(
    cli: CLI, hub: Any, published: Any, cache: Path, tmp_path: Path
) -> None:
    evil = published.main["single.onnx"].replace(b"one", b"two")
    hub.put("org/model", {**published.main, "single.onnx": evil})
    said = cli("pull", "hf-hub:org/model", "--out", "copy")
    assert "single.onnx has sha256" in said.error
    assert "The hub itself holds it so: the model's owner must push it again. This revision is removed" in said.error
    assert not cache.exists()
    assert not (tmp_path / "copy").exists()
    verified = cli("verify", "hf-hub:org/model")
    assert verified.code == 1
    assert verified.out.startswith("FAIL  checksums: ")
    assert not cache.exists()


def test_a_file_that_was_changed_in_the_cache_is_removed_and_fetched_again(
    cli: CLI, hub: Any, published: Any, bundle: Bundle, cache: Path
) -> None:
    assert cli("pull", "hf-hub:org/model").code == 0
    place = snapshot(cache) / "gated.onnx"
    place.resolve().write_bytes(b"all" * 8999 + b"ill")
    said = cli("verify", "hf-hub:org/model")
    assert (said.code, said.out.count("\n")) == (1, 3)
    assert "gated.onnx has sha256" in said.out
    assert "is not what the hub sent, and is removed; the same command fetches it again" in said.out
    assert sorted(entry.name for entry in snapshot(cache).iterdir()) == sorted(
        {"card.json", *bundle.card.files} - {"gated.onnx"}
    )
    hub.requests.clear()
    assert cli("pull", "hf-hub:org/model").code == 0
    assert [path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")] == ["gated.onnx"]


def test_a_card_that_was_changed_in_the_cache_is_not_believed(cli: CLI, published: Any, cache: Path) -> None:
    """No checksum in the bundle covers the card; the cache's own name of it does."""
    assert cli("pull", "hf-hub:org/model").code == 0
    blob = (snapshot(cache) / "card.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"A bundle.", b"A better."))
    assert "card.json is not what the hub sent" in cli("show", "hf-hub:org/model", HF_HUB_OFFLINE="1").error
    assert "A bundle." in cli("show", "hf-hub:org/model").out


def test_a_repository_that_lacks_a_file_of_its_card_says_so(cli: CLI, hub: Any, published: Any) -> None:
    hub.put("org/model", {name: body for name, body in published.main.items() if name != "gated.onnx"})
    said = cli("pull", "hf-hub:org/model").error
    assert f"hf-hub:org/model@{published.references['main']} holds no gated.onnx, which its card lists" in said
    assert cli("pull", "hf-hub:org/model", "--variant", "single").code == 0


def test_a_revision_that_does_not_exist_is_named(cli: CLI, published: Any) -> None:
    assert (
        "hf-hub:org/model has no revision 'v9'; name a branch, tag or commit"
        in cli("show", "hf-hub:org/model@v9").error
    )
    commit = "0" * 40
    assert f"hf-hub:org/model has no revision '{commit}'" in cli("show", f"hf-hub:org/model@{commit}").error


def test_a_repository_that_may_not_be_read_is_named(cli: CLI, hub: Any, published: Any) -> None:
    said = cli("pull", "hf-hub:org/nowhere").error
    assert "the hub has no repository 'org/nowhere' that you may read" in said
    assert "`hf auth login`" in said
    published.private = True
    assert "no repository 'org/model' that you may read" in cli("pull", "hf-hub:org/model").error
    assert cli("pull", "hf-hub:org/model", HF_TOKEN=READER).code == 0
    refused = cli("pull", "hf-hub:org/model", HF_TOKEN="hf_expired", HF_HOME="elsewhere").error
    assert "the hub answers 401" in refused
    assert "the token is not valid; log in again" in refused


def test_a_repository_that_is_no_bundle_leaves_nothing_in_the_cache(cli: CLI, hub: Any, url: str, cache: Path) -> None:
    hub.put("org/model", {"config.json": b"{}", "model.safetensors": b"x"})
    said = cli("pull", "hf-hub:org/model").error
    assert "hf-hub:org/model holds no card.json, so it is not a manygates bundle" in said
    assert left(cache) == []


def test_a_bundle_of_a_newer_schema_asks_for_an_upgrade(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    newer = json.loads((bundle.folder / "card.json").read_text()) | {"schema": 99}
    hub.put("org/model", {**published.main, "card.json": json.dumps(newer).encode()})
    said = cli("pull", "hf-hub:org/model").error
    assert "card.json has schema 99" in said
    assert "pip install --upgrade manygates" in said


def test_an_unknown_variant_or_precision_is_refused_before_anything_is_fetched(
    cli: CLI, hub: Any, published: Any
) -> None:
    said = cli("pull", "hf-hub:org/model", "--variant", "singel").error
    assert "unknown variant of eio-resnet20-cifar10 'singel'; did you mean 'single'?" in said
    said = cli("pull", "hf-hub:org/model", "--variant", "gated", "--precision", "int8").error
    assert "has no int8 graph of gated" in said
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_fetched(
    cli: CLI, hub: Any, published: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    assert "is not empty and holds no bundle" in cli("pull", "hf-hub:org/model", "--out", "notes").error
    assert hub.requests == []


# --- no space, no network ---

SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
"""The kernel refuses to write more into a file, as a full disk does: with an error in the middle of a write."""


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


def test_too_little_space_is_seen_before_anything_is_fetched(cli: CLI, hub: Any, published: Any) -> None:
    full = "import shutil; shutil.disk_usage = lambda place: type('Usage', (), {'free': 50_000})"
    said = cli("pull", "hf-hub:org/model", before=full).error
    assert "0.2 MB are needed and 0.1 MB are free in" in said
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}


def test_without_a_network_it_says_what_is_missing_and_how_to_get_it(cli: CLI, published: Any, tmp_path: Path) -> None:
    said = cli("pull", "hf-hub:org/model", HF_HUB_OFFLINE="1").error
    assert "HF_HUB_OFFLINE is set, and the cache" in said
    assert "lacks card.json" in said
    assert "`manygates pull hf-hub:org/model --out FOLDER`; bring FOLDER here and name it local-dir:FOLDER" in said
    assert cli("pull", "hf-hub:org/model", "--variant", "single").code == 0
    said = cli("pull", "hf-hub:org/model", "--variant", "gated", HF_HUB_OFFLINE="1").error
    assert "lacks gated.onnx" in said
    began = time.monotonic()
    said = cli("pull", "hf-hub:org/other", HF_ENDPOINT=DEAD).error
    assert time.monotonic() - began < 15
    assert f"{DEAD} cannot be reached (" in said
    assert "lacks card.json" in said


def test_a_hub_that_does_not_answer_is_mentioned_within_a_second(
    cli: CLI, hub: Any, published: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    asked, said = [], []

    def silent(method: str, path: str) -> None:
        asked.append(time.monotonic())
        time.sleep(3)

    hub.before = silent
    code = "import sys, manygates; sys.exit(manygates.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "show", "hf-hub:org/model"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.readline().decode()
    waited = time.monotonic() - asked[0]
    process.kill()
    process.communicate()
    assert waited < 1
    assert f"still trying to reach {environment['HF_ENDPOINT']}, to fetch hf-hub:org/model" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert "local-dir:FOLDER" in said


# --- push ---


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


def test_the_pushed_readme_names_the_repository_and_carries_the_results(
    cli: CLI, hub: Any, url: str, bundle: Bundle
) -> None:
    assert cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).code == 0
    readme = ModelCard(hub.repositories["org/new"].main["README.md"].decode())
    assert "manygates serve hf-hub:org/new\n" in readme.text
    assert "manygates" in readme.data.tags
    assert readme.data.eval_results is not None
    assert len(readme.data.eval_results) == len(bundle.card.results)


def test_a_second_push_of_the_same_changes_nothing(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert cli("push", bundle.folder, "org/model", HF_TOKEN=WRITER).code == 0  # the README's words
    before = dict(published.references)
    said = cli("push", bundle.folder, "org/model", HF_TOKEN=WRITER)
    assert (said.code, said.out) == (0, "")
    assert "holds the very same files already" in said.err
    assert published.references == before


def test_a_newer_version_replaces_the_old_one_and_what_it_no_longer_has(
    cli: CLI, hub: Any, published: Any, bundle: Bundle
) -> None:
    hub.put("org/model", {**published.main, "poster.png": b"mine"})
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    said = cli("push", "less", "org/model", "--message", "Only one path", HF_TOKEN=WRITER)
    assert said.code == 0, said.err
    assert set(published.main) == {".gitattributes", "README.md", "card.json", "single.onnx", "poster.png"}


def test_a_pull_request_changes_no_branch_and_can_be_pulled(
    cli: CLI, hub: Any, published: Any, bundle: Bundle, url: str, tmp_path: Path
) -> None:
    before = published.references["main"]
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    said = cli("push", "less", "org/model", "--create-pr", HF_TOKEN=READER)
    assert said.code == 0, said.err
    assert said.out.strip() == f"{url}/org/model/discussions/1"
    assert published.references["main"] == before
    proposed = json.loads(cli("show", "hf-hub:org/model@refs/pr/1", "--json").out)
    assert proposed["variants"] == ["single"]


def test_a_branch_is_made_and_main_stays(cli: CLI, published: Any, bundle: Bundle) -> None:
    before = published.references["main"]
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    assert cli("push", "less", "org/model", "--branch", "small", HF_TOKEN=WRITER).code == 0
    assert published.references["main"] == before
    small = published.commits[published.references["small"]]
    assert set(small) == {".gitattributes", "README.md", "card.json", "single.onnx"}
    assert json.loads(cli("show", "hf-hub:org/model@small", "--json").out)["variants"] == ["single"]


def test_a_dry_run_says_everything_and_writes_nothing(cli: CLI, hub: Any, url: str, bundle: Bundle) -> None:
    said = cli("push", bundle.folder, "org/new", "--private", "--dry-run", HF_TOKEN=WRITER)
    assert said.code == 0, said.err
    assert said.out.startswith("create the private repository org/new, branch main\ncommit: Add eio-resnet20-cifar10\n")
    for name in ("card.json", "README.md", *bundle.card.files):
        assert f"bytes  {name}\n" in said.out
    assert hub.repositories == {}
    assert {method for method, _ in hub.requests} == {"GET"}


def test_without_a_token_nothing_is_asked_of_the_hub(cli: CLI, hub: Any, url: str, bundle: Bundle) -> None:
    said = cli("push", bundle.folder, "org/new").error
    assert f"there is no token for {url}" in said
    assert "`hf auth login`" in said
    assert hub.requests == []


def test_a_token_that_may_not_write_is_refused_with_advice(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    before = dict(published.references)
    assert "propose the change with --create-pr" in cli("push", "less", "org/model", HF_TOKEN=READER).error
    assert "the hub answers 403" in cli("push", "less", "org/new", HF_TOKEN=READER).error
    assert "the token is not valid" in cli("push", "less", "org/new", HF_TOKEN="hf_expired").error
    assert published.references == before
    assert list(hub.repositories) == ["org/model"]


def test_another_model_is_not_pushed_over(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    other = json.loads((bundle.folder / "card.json").read_text()) | {"name": "another"}
    hub.put("org/model", {**published.main, "card.json": json.dumps(other).encode()})
    before = dict(published.references)
    for words in ((), ("--create-pr",), ("--branch", "main"), ("--branch", "new")):
        said = cli("push", bundle.folder, "org/model", *words, HF_TOKEN=WRITER).error
        assert "org/model holds another model, 'another', expected 'eio-resnet20-cifar10'" in said
    assert published.references == before


def test_a_repository_of_something_else_is_not_pushed_over(cli: CLI, hub: Any, url: str, bundle: Bundle) -> None:
    hub.put("org/model", {"config.json": b"{}", "model.safetensors": b"x", "a": b"", "b": b""})
    said = cli("push", bundle.folder, "org/model", HF_TOKEN=WRITER).error
    assert "org/model is no manygates bundle: it holds a, b, config.json and more and no card.json" in said
    hub.put("org/newer", {"card.json": b'{"schema": 99}'})
    said = cli("push", bundle.folder, "org/newer", HF_TOKEN=WRITER).error
    assert "the card in org/newer cannot be read, so nothing is pushed over it" in said
    assert "pip install --upgrade manygates" in said


def test_a_push_that_comes_in_between_is_not_overwritten(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0

    def race(method: str, path: str) -> None:
        if "/preupload/" in path:
            hub.put("org/model", {**published.main, "poster.png": b"theirs"})

    hub.before = race
    said = cli("push", "less", "org/model", HF_TOKEN=WRITER).error
    assert "the hub answers 412" in said
    assert "there is a newer version than the one that was compared" in said
    assert published.main["poster.png"] == b"theirs"


def test_a_push_that_fails_leaves_the_repository_as_it_was_and_can_be_repeated(
    cli: CLI, hub: Any, url: str, bundle: Bundle
) -> None:
    hub.before = lambda method, path: fault(403) if path.startswith("/lfs/") else None

    def fault(status: int) -> Any:
        answer = hub.answer("GET", "/nowhere/at/all", {})
        answer.status = status
        return answer

    said = cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).error
    assert "cannot push to org/new, which was created and is still empty" in said
    assert set(hub.repositories["org/new"].main) == {".gitattributes"}
    hub.before = lambda method, path: None
    assert cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("org/new", "--create-pr"), "there is no repository org/new to propose a change to"),
        (("new",), "'hf-hub:new' names no repository, expected hf-hub:ORGANISATION/NAME"),
        (("org/new@main",), "'org/new@main' names a revision, expected ORGANISATION/NAME; write --branch main"),
        (("org/model", "--private"), "org/model exists and is public; --private is for a repository that is created"),
    ],
)
def test_a_push_that_makes_no_sense_is_refused(
    words: tuple[str, ...], said: str, cli: CLI, hub: Any, published: Any, bundle: Bundle
) -> None:
    assert said in cli("push", bundle.folder, *words, HF_TOKEN=WRITER).error
    assert list(hub.repositories) == ["org/model"]


def test_a_damaged_bundle_or_one_of_the_hub_is_not_pushed(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert "is on the hub already" in cli("push", "hf-hub:org/model", "org/new", HF_TOKEN=WRITER).error
    (bundle.folder / "single.onnx").write_bytes(b"two" * 9000)
    assert "single.onnx has sha256" in cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).error
    assert (
        "cannot push to org/new: HF_HUB_OFFLINE is set"
        in cli("push", "standard-resnet20-cifar10", "org/new", HF_TOKEN=WRITER, HF_HUB_OFFLINE="1").error
    )
    assert list(hub.repositories) == ["org/model"]


# --- list, show, verify, serve ---


def test_the_hub_is_listed_from_its_cards_alone(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    hub.put("them/stranger", {"README.md": b"---\ntags: [manygates]\n---\n", "card.json": b"{}"})
    hub.put("them/untagged", {"model.onnx": b"x"})
    said = cli("list", "--hub")
    assert said.code == 0, said.err
    assert "org/model" in said.out
    assert "left out: " in said.err
    assert "stranger" not in said.out
    (document,) = json.loads(cli("list", "--hub", "--author", "org", "--json").out)
    assert document["name"] == bundle.card.name
    assert document["where"]["repository"] == "org/model"
    assert document["where"]["commit"] == published.references["main"]
    assert {path.rpartition("/")[2] for path in hub.asked("GET", "/resolve/")} == {"card.json"}
    assert "is for --hub" in cli("list", "--author", "org").error


def test_a_hub_that_cannot_be_reached_is_no_list(cli: CLI, url: str) -> None:
    said = cli("list", "--hub", HF_HUB_OFFLINE="1").error
    assert "cannot list the hub's models: HF_HUB_OFFLINE is set" in said
    began = time.monotonic()
    said = cli("list", "--hub", HF_ENDPOINT=DEAD).error
    assert time.monotonic() - began < 10
    assert f"{DEAD} cannot be reached (" in said
    assert "`manygates list` needs none" in said


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
    assert json.loads((bundled_dir() / name / "card.json").read_text())["name"] == name
