"""What `list` and `show` print of the models that are known."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import manygates
from training.recipes import recipe, resolved
from zoo.bundle.card import Card, FileEntry, Finding, Lint, Paths, Published, Result
from zoo.errors import BadInput, UnknownName
from zoo.hub import listing, source
from zoo.hub.source import KnownModel, known_models

GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
CLEAN = Result(
    protocol="clean",
    variant="single",
    attack="none",
    eps=0.0,
    eps_fraction="0",
    steps=0,
    step_size=0.0,
    restarts=0,
    images=10_000,
    seed=0,
    accuracy=0.8,
    interval=(0.79, 0.81),
    note="",
    checks=(),
    date="2026-11-21",
    command="manygates evaluate",
)
FOUND = Finding(code="G2", name="gradients", verdict="alarm", figure="none", meaning="masking")


def attacked(accuracy: float, eps: str = "1/100", **changes: Any) -> Result:
    low, high = max(0.0, accuracy - 0.03), min(1.0, accuracy + 0.03)
    named: dict[str, Any] = {"protocol": "whitebox", "attack": "PGD", "steps": 50, "restarts": 5, "images": 1000}
    return replace(
        CLEAN,
        eps=float(Fraction(eps)),
        eps_fraction=eps,
        accuracy=accuracy,
        interval=(low, high),
        **{**named, **changes},
    )


def card(name: str, *results: Result, **changes: Any) -> Card:
    fields = {"int8": None, "lint": (), "results": results or (CLEAN, attacked(0.4)), **changes}
    return replace(GOLDEN, name=name, **fields)


def whole(name: str) -> Card:
    """A card that lists the graph of each variant."""
    found = card(name, CLEAN)
    graph = FileEntry(sha256="a" * 64, size=1)
    return replace(found, files={**found.files, **{f"{variant}.onnx": graph for variant in found.variants}})


def unbundled(name: str, *results: Result, **changes: Any) -> Card:
    """A card of a plain network, trained by a recipe that is known."""
    one = GOLDEN.architecture.single_path_parameters
    network = replace(GOLDEN.architecture, gated_layers=(), candidates=1, sharing=None, parameters=one)
    run = resolved(recipe("standard-resnet20-cifar10-cpu"))
    scale = Published(recipe="standard-resnet20-cifar10", network="resnet20", epochs=(200,))
    fields = {"architecture": network, "paths": Paths(single=None, ensemble=()), "variants": ("single",)}
    training = replace(GOLDEN.training, recipe=run, overrides=("seed=7",), published=scale)
    return card(name, *results, **{**fields, "training": training, **changes})


def known(name: str, *results: Result, **changes: Any) -> KnownModel:
    return KnownModel(card=card(name, *results, **changes), bundled=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without models, and an empty cache."""
    folder = tmp_path / "package"
    (folder / "bundles").mkdir(parents=True)
    (folder / "cards").mkdir()
    monkeypatch.setattr(source, "bundled_dir", lambda: folder / "bundles")
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    return folder


def publish(monkeypatch: pytest.MonkeyPatch, *cards: Card) -> None:
    found = [(f"org/{each.name}", "c" * 40, each) for each in cards]
    monkeypatch.setattr("zoo.hub.fetch.hub_cards", lambda author=None: found)


# --- the table ---


def test_the_table_has_a_row_per_model_with_its_numbers_and_marks() -> None:
    alarm = Lint(variant="single", images=9, seed=0, findings=(FOUND,), date="2026-11-21", command="")
    few = attacked(0.123, "8/255", images=100)
    said = listing.tables([known("a-model", CLEAN, attacked(0.4), few), known("b-model", lint=(alarm,))])
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if "-model" in line}
    assert rows["a-model"] == ["resnet20", "single", "80.00", "40.0", "12.3*", "-", "bundled"]
    assert rows["b-model"] == ["resnet20", "single", "80.00", "40.0", "-", "ALARM:", "single", "bundled"]
    assert "* measured on fewer than 1,000 images" in said
    assert "the numbers of these variants may flatter them" in said
    assert "0.01" in said.splitlines()[1]
    assert "8/255" in said.splitlines()[1]


def test_data_sets_have_tables_with_radii_of_their_own() -> None:
    digits = known("digits", CLEAN, attacked(0.9, "3/10"), attacked(0.95, "1/10"), dataset="mnist")
    said = listing.tables([known("pictures"), digits])
    heads = [line.split() for line in said.splitlines() if line.split()[1:3] == ["network", "variant"]]
    assert [(head[0], head[4:-2]) for head in heads] == [("cifar10", ["0.01"]), ("mnist", ["0.1", "0.3"])]


def test_random_gates_stand_in_the_column_of_those_who_have_the_weights() -> None:
    only = known("r", attacked(0.2, protocol="random-gates", variant="gated", draws=100), variants=("gated",))
    assert "20.0" in listing.tables([only])


def test_an_empty_catalogue_says_how_to_ask_the_hub() -> None:
    assert listing.tables([]) == "no model is known here; `manygates list --hub` asks the hub\n"


def test_models_are_chosen_by_data_set_and_method_and_sorted_by_a_number() -> None:
    one = known("one", CLEAN, attacked(0.1), attacked(0.3, "8/255"))
    two = known("two", replace(CLEAN, accuracy=0.7, interval=(0.6, 0.8)), attacked(0.5), method="trades")
    three = known("three", CLEAN, dataset="mnist")
    models = [one, three, two]

    def names(**options: Any) -> list[str]:
        return [model.card.name for model in listing.select(models, **options)]

    assert names() == ["one", "three", "two"]
    assert names(dataset="cifar10") == ["one", "two"]
    assert names(method="trades") == ["two"]
    assert names(sort="clean") == ["one", "three", "two"]
    assert names(sort="whitebox") == ["two", "one", "three"]
    assert names(sort="whitebox:8/255") == ["one", "three", "two"]
    assert names(sort="transfer") == ["one", "three", "two"]
    assert names(sort="method")[-1] == "two"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dataset": "cifar"}, UnknownName, "unknown data set 'cifar'; did you mean 'cifar10'"),
        ({"method": "none"}, UnknownName, "unknown method 'none'"),
        ({"sort": "size"}, BadInput, "--sort is 'size', expected one of name, method, clean"),
        ({"sort": "clean:0.1"}, BadInput, "expected one of"),
        ({"sort": "whitebox:much"}, BadInput, "expected a radius such as 0.01 or 8/255"),
        ({"sort": "whitebox:1/0"}, BadInput, "expected a radius"),
    ],
)
def test_a_wrong_choice_is_refused(options: dict[str, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        listing.select([known("one")], **options)


def test_what_is_not_bundled_says_where_it_comes_from() -> None:
    trained = KnownModel(card=unbundled("recipe-only", CLEAN))
    stranger = KnownModel(card=unbundled("hub-only", CLEAN), stranger=True, repository="org/hub-only", commit="c")
    said = listing.tables([trained, stranger])
    lines = {line.split()[0]: line for line in said.splitlines() if "only" in line}
    assert lines["recipe-only"].endswith("train standard-resnet20-cifar10-cpu")
    assert lines["hf-hub:org/hub-only"].endswith("hub")
    assert "`manygates show NAME` says how to get it" in said


def test_hostile_text_of_a_card_does_not_reach_the_terminal() -> None:
    said = listing.tables([known("x", CLEAN, dataset="evil\x1b[2J\u202eset")])
    assert "\x1b" not in said
    assert "\u202e" not in said


# --- the JSON document ---


def test_the_document_says_what_a_model_is_and_every_number_of_its_card() -> None:
    alarmed = Lint(variant="ensemble", images=9, seed=0, findings=(FOUND,), date="2026-12-01", command="")
    ensemble = attacked(0.5, "8/255", variant="ensemble")
    (document,) = listing.documents([known("golden", CLEAN, attacked(0.4), ensemble, lint=(alarmed,))])
    assert (document["name"], document["method"], document["dataset"]) == ("golden", GOLDEN.method, GOLDEN.dataset)
    assert (document["variants"], document["main"]) == (list(GOLDEN.variants), "single")
    assert document["bytes"] == sum(file.size for file in GOLDEN.files.values())
    assert [(each["accuracy"], each["images"], each["linter"]) for each in document["results"]] == [
        (0.8, 10_000, "not linted"),
        (0.4, 1000, "not linted"),
        (0.5, 1000, "failed"),
    ]
    assert (document["suspect"], document["date"]) == (["ensemble"], "2026-12-01")
    assert document["lint"] == [{"variant": "ensemble", "alarms": ["G2"], "images": 9, "date": "2026-12-01"}]


def test_list_as_json_says_how_to_get_a_model(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = unbundled("mine", CLEAN, attacked(0.3))
    (package / "cards" / "mine.json").write_text(mine.to_json(), encoding="utf-8")
    assert manygates.main(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["where"]["commands"] == [
        "manygates train standard-resnet20-cifar10-cpu --out runs/mine --set seed=7",
        "manygates export runs/mine --out models/mine --name mine",
    ]
    assert (listed["source"], listed["where"]["bundled"]) == ("mine", False)
    assert listed["trained"]["published"] == {
        "recipe": "standard-resnet20-cifar10",
        "network": "resnet20",
        "epochs": [200],
    }


# --- the hub ---


def test_what_was_listed_from_the_hub_is_known_from_then_on(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, card("further", CLEAN))
    for words in (["list", "--hub", "--author", "org"], ["list"]):
        assert manygates.main(words) == 0
        assert "hf-hub:org/further" in capsys.readouterr().out
    assert manygates.main(["list", "--method", "nothing"]) == 2
    assert "unknown method 'nothing'" in capsys.readouterr().err
    assert manygates.main(["list", "--author", "org"]) == 2
    assert "is for --hub" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_leaves_what_was_known(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, card("further", CLEAN))
    assert manygates.main(["list", "--hub"]) == 0

    def fail(author: str | None = None) -> Any:
        raise BadInput("the hub cannot be reached")

    monkeypatch.setattr("zoo.hub.fetch.hub_cards", fail)
    assert manygates.main(["list", "--hub"]) == 2
    assert [model.card.name for model in known_models()] == ["further"]


# --- show ---


def test_show_lets_no_command_of_a_card_reach_the_terminal(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    evil = replace(whole("model"), description="red \x1b[31m\x1b]0;title\x07 and \u202etfel")
    (tmp_path / "model" / "card.json").write_text(evil.to_json(), encoding="utf-8")
    assert manygates.main(["show", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert "red \ufffd[31m\ufffd]0;title\ufffd and \ufffdtfel" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


def test_show_takes_the_folder_that_the_other_commands_would_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "baseline3-resnet20-cifar10"
    (tmp_path / name).mkdir()
    (tmp_path / name / "card.json").write_text(replace(whole(name), description="Mine.").to_json(), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert manygates.main(["show", name]) == 0
    assert "Mine." in capsys.readouterr().out


def test_show_prints_the_card_of_a_model_that_is_not_bundled_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "baseline3-resnet20-cifar10"
    assert manygates.main(["show", name]) == 0
    shown = capsys.readouterr().out
    assert f"# {name}\n" in shown
    assert "| clean | ensemble | none |" in shown
    assert "It does not come with manygates: `manygates train standard-resnet20-cifar10-cpu " in shown
    assert f"manygates serve local-dir:models/{name}\n" in shown
    assert manygates.main(["show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name
