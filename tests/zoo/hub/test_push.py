"""Pushing: what a plan says, what becomes of the repository, what is refused; and the README that the hub reads."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card
from zoo.bundle.readme import model_card
from zoo.errors import BadInput
from zoo.hub.pull import part_of
from zoo.hub.push import plan_push, push
from zoo.hub.source import list_bundled

# the hub's client hands a file to its HTTP library in a way that the library wants to retire
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WRITER, READER = "hf_writer", "hf_reader"
CLI = Callable[..., Any]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def test_the_pushed_readme_names_the_repository_and_carries_the_results(cli: CLI, hub: Any, bundle: Bundle) -> None:
    assert cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).code == 0
    readme = ModelCard(hub.repositories["org/new"].main["README.md"].decode())
    assert "manygates serve hf-hub:org/new\n" in readme.text
    assert "manygates" in readme.data.tags
    assert readme.data.eval_results is not None
    assert len(readme.data.eval_results) == len(bundle.card.results)


def test_a_second_push_of_the_same_changes_nothing(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert cli("push", bundle.folder, "org/name", HF_TOKEN=WRITER).code == 0  # the README's words
    before = dict(published.references)
    said = cli("push", bundle.folder, "org/name", HF_TOKEN=WRITER)
    assert (said.code, said.out) == (0, "")
    assert "holds the very same files already" in said.err
    assert published.references == before


def test_a_newer_version_replaces_the_old_one_and_what_it_no_longer_has(
    cli: CLI, hub: Any, published: Any, bundle: Bundle
) -> None:
    hub.put("org/name", {**published.main, "poster.png": b"mine"})
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    said = cli("push", "less", "org/name", "--message", "Only one path", HF_TOKEN=WRITER)
    assert said.code == 0, said.err
    assert set(published.main) == {".gitattributes", "README.md", "card.json", "single.onnx", "poster.png"}


def test_a_pull_request_changes_no_branch_and_can_be_pulled(
    cli: CLI, hub: Any, published: Any, bundle: Bundle, tmp_path: Path
) -> None:
    before = published.references["main"]
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    said = cli("push", "less", "org/name", "--create-pr", HF_TOKEN=READER)
    assert said.code == 0, said.err
    assert said.out.strip() == f"{hub.url}/org/name/discussions/1"
    assert published.references["main"] == before
    proposed = json.loads(cli("show", "hf-hub:org/name@refs/pr/1", "--json").out)
    assert proposed["variants"] == ["single"]


def test_a_branch_is_made_and_main_stays(cli: CLI, published: Any, bundle: Bundle) -> None:
    before = published.references["main"]
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0
    assert cli("push", "less", "org/name", "--branch", "small", HF_TOKEN=WRITER).code == 0
    assert published.references["main"] == before
    small = published.commits[published.references["small"]]
    assert set(small) == {".gitattributes", "README.md", "card.json", "single.onnx"}
    assert json.loads(cli("show", "hf-hub:org/name@small", "--json").out)["variants"] == ["single"]


def test_a_dry_run_says_everything_and_writes_nothing(cli: CLI, hub: Any, bundle: Bundle) -> None:
    said = cli("push", bundle.folder, "org/new", "--private", "--dry-run", HF_TOKEN=WRITER)
    assert said.code == 0, said.err
    assert said.out.startswith("create the private repository org/new, branch main\ncommit: Add eio-resnet20-cifar10\n")
    for name in ("card.json", "README.md", *bundle.card.files):
        assert f"bytes  {name}\n" in said.out
    assert hub.repositories == {}
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_plan_writes_nothing_and_says_everything(hub: Any, token: None, published: Any, bundle: Bundle) -> None:
    less = part_of(bundle.card, ("single",))
    small = write_bundle(bundle.folder.parent / "small", less, {"single.onnx": b"one"})
    plan = plan_push(small, "org/name", branch="small", message="Less")
    assert (plan.creates_repository, plan.creates_branch) == (False, True)
    assert plan.removed == ("rgn.safetensors", "ensemble.onnx", "gated.onnx", "single.int8.onnx")
    lines = plan.described()
    assert lines[:2] == ["use org/name, branch small (created)", "commit: Less"]
    assert [line.split()[-1] for line in lines[2:]] == ["single.onnx", "card.json", "README.md", *plan.removed]
    assert not any(method != "GET" and method != "HEAD" for method, _ in hub.requests)


def test_what_is_pushed_is_what_was_checked(hub: Any, token: None, bundle: Bundle) -> None:
    plan = plan_push(bundle, "org/new")
    (bundle.folder / "single.onnx").write_bytes(b"ill")
    push(plan)
    assert hub.repositories["org/new"].main["single.onnx"] == b"one"


def test_an_empty_repository_may_be_filled(hub: Any, token: None, bundle: Bundle) -> None:
    hub.put("org/new", {"README.md": b"---\nlicense: mit\n---\n"})
    plan = plan_push(bundle, "org/new")
    assert not plan.creates_repository
    assert push(plan).changed


# --- what is refused ---


def test_the_token_is_looked_for_where_the_hub_keeps_it_and_nowhere_else(
    hub: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYGATES_TOKEN", "hf_writer")
    with pytest.raises(BadInput, match=r"there is no token for https://huggingface.co; .* `hf auth login`"):
        plan_push(bundle, "org/new")
    assert hub.requests == []
    (tmp_path / "token").write_text("hf_writer")
    assert plan_push(bundle, "org/new").creates_repository


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


def test_another_model_is_not_pushed_over(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    other = json.loads((bundle.folder / "card.json").read_text()) | {"name": "another"}
    hub.put("org/name", {**published.main, "card.json": json.dumps(other).encode()})
    before = dict(published.references)
    for words in ((), ("--create-pr",), ("--branch", "main"), ("--branch", "new")):
        said = cli("push", bundle.folder, "org/name", *words, HF_TOKEN=WRITER).error
        assert "org/name holds another model, 'another', expected 'eio-resnet20-cifar10'" in said
    assert published.references == before


def test_a_repository_of_something_else_is_not_pushed_over(cli: CLI, hub: Any, bundle: Bundle) -> None:
    hub.put("org/name", {"config.json": b"{}", "model.safetensors": b"x", "a": b"", "b": b""})
    said = cli("push", bundle.folder, "org/name", HF_TOKEN=WRITER).error
    assert "org/name is no manygates bundle: it holds a, b, config.json and more and no card.json" in said
    hub.put("org/newer", {"card.json": b'{"schema": 99}'})
    said = cli("push", bundle.folder, "org/newer", HF_TOKEN=WRITER).error
    assert "the card in org/newer cannot be read, so nothing is pushed over it" in said
    assert "pip install --upgrade manygates" in said


def test_a_push_that_comes_in_between_is_not_overwritten(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert cli("pull", bundle.folder, "--variant", "single", "--out", "less").code == 0

    def race(method: str, path: str) -> None:
        if "/preupload/" in path:
            hub.put("org/name", {**published.main, "poster.png": b"theirs"})

    hub.before = race
    said = cli("push", "less", "org/name", HF_TOKEN=WRITER).error
    assert "the hub answers 412" in said
    assert "there is a newer version than the one that was compared" in said
    assert published.main["poster.png"] == b"theirs"


def test_a_push_that_fails_leaves_the_repository_as_it_was_and_can_be_repeated(
    cli: CLI, hub: Any, bundle: Bundle
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("org/new", "--create-pr"), "there is no repository org/new to propose a change to"),
        (("new",), "'hf-hub:new' names no repository, expected hf-hub:ORGANISATION/NAME"),
        (("org/new@main",), "'org/new@main' names a revision, expected ORGANISATION/NAME; write --branch main"),
        (("org/name", "--private"), "org/name exists and is public; --private is for a repository that is created"),
    ],
)
def test_a_push_that_makes_no_sense_is_refused(
    words: tuple[str, ...], said: str, cli: CLI, hub: Any, published: Any, bundle: Bundle
) -> None:
    assert said in cli("push", bundle.folder, *words, HF_TOKEN=WRITER).error
    assert list(hub.repositories) == ["org/name"]


def test_a_damaged_bundle_or_one_of_the_hub_is_not_pushed(cli: CLI, hub: Any, published: Any, bundle: Bundle) -> None:
    assert "is on the hub already" in cli("push", "hf-hub:org/name", "org/new", HF_TOKEN=WRITER).error
    (bundle.folder / "single.onnx").write_bytes(b"two")
    assert "single.onnx has sha256" in cli("push", bundle.folder, "org/new", HF_TOKEN=WRITER).error
    assert (
        "cannot push to org/new: HF_HUB_OFFLINE is set"
        in cli("push", "standard-resnet20-cifar10", "org/new", HF_TOKEN=WRITER, HF_HUB_OFFLINE="1").error
    )
    assert list(hub.repositories) == ["org/name"]


# --- the README on the hub ---


def read_back(text: str) -> list[EvalResult]:
    """What the hub's own reader makes of a README's front matter."""
    data = ModelCard(text).data.to_dict()
    return model_index_to_eval_results(data["model-index"])[1] if "model-index" in data else []


@pytest.mark.parametrize("card", list_bundled(), ids=lambda card: card.name)
def test_the_hub_reads_every_result_of_a_card_from_its_readme(card: Card) -> None:
    results = read_back(model_card(card, f"hf-hub:org/{card.name}"))
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
