"""The catalogue's numbers: what the cards say, where a model is to be had, and what `list` makes of it."""

import json
import shlex
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import manygates
from training.recipes import RECIPES, override, recipe, resolved
from zoo.bundle.card import Card, FileEntry, Finding, Lint, Paths, Result
from zoo.errors import BadInput, BundleError, UnknownName
from zoo.hub import catalog, listing
from zoo.hub import source as catalogue
from zoo.hub.catalog import Entry, Where

GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
GOLDEN = replace(GOLDEN, files={**GOLDEN.files, "rgn.safetensors": FileEntry(sha256="a" * 64, size=1)})
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


def plain(name: str, *results: Result, run: str = "standard-resnet20-cifar10-cpu", **changes: Any) -> Card:
    """A card of a plain network, trained by a recipe of that name."""
    network = replace(
        GOLDEN.architecture,
        gated_layers=(),
        candidates=1,
        sharing=None,
        parameters=GOLDEN.architecture.single_path_parameters,
    )
    training = replace(GOLDEN.training, recipe=resolved(recipe(run)), seed=0)
    fields = {"architecture": network, "paths": Paths(single=None, ensemble=()), "variants": ("single",)}
    return card(name, *results, **{**fields, "training": training, **changes})


def put(folder: Path, *cards: Card, bundled: bool = True) -> None:
    for each in cards:
        file = folder / "bundles" / each.name / "card.json" if bundled else folder / "cards" / f"{each.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(each.to_json(), encoding="utf-8", newline="\n")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without models, and an empty cache."""
    folder = tmp_path / "package"
    (folder / "bundles").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: folder / "bundles")
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def recipes() -> dict[str, dict[str, Any]]:
    return {name: resolved(recipe(name)) for name in RECIPES}


def file_it(package: Path, recipes: catalog.Recipes) -> None:
    catalog.write(catalog.build(recipes), package / "catalog.json")


def publish(monkeypatch: pytest.MonkeyPatch, *cards: Card, author: str = "org") -> None:
    found = [(f"{author}/{each.name}", "c" * 40, each) for each in cards]
    monkeypatch.setattr("zoo.hub.hub.hub_cards", lambda author=None: found)


def with_weights(each: Card, digest: str) -> Card:
    files = {
        name: FileEntry(sha256=digest * 64 if name.endswith(".safetensors") else entry.sha256, size=entry.size)
        for name, entry in each.files.items()
    }
    return replace(each, files=files)


# --- the filed catalogue ---


def test_the_filed_catalogue_is_what_the_cards_say(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    assert manygates.main(["catalog", "build", "--out", str(file)]) == 0
    filed = catalog.package_dir() / "catalog.json"
    assert file.read_bytes() == filed.read_bytes(), "run `manygates catalog build`"


def test_every_command_of_the_filed_catalogue_trains_what_the_card_says() -> None:
    known = {each.name: each for each in catalog.cards()}
    for entry in catalog.load():
        if not entry.where.commands:
            continue
        for command in entry.where.commands:
            words = shlex.split(command)
            arguments = manygates.parser().parse_args(words[1:])
            if words[1] != "train":
                continue
            made = resolved(override(recipe(arguments.recipe), arguments.set))
            said = known[entry.name].training.recipe
            ignored = {"seed"} if "seeds" in said else set()
            differ = {key for key in made if key in said and key not in ("name", "description", *ignored)}
            assert {key for key in differ if not agrees(made[key], said[key])} == set(), entry.name


def agrees(made: Any, said: Any) -> bool:
    """Whether two values are the same in everything that the second says: an older card says less."""
    if isinstance(said, dict) and isinstance(made, dict):
        return all(agrees(made[key], said[key]) for key in said if key in made)
    if isinstance(said, list) and isinstance(made, list):
        return len(made) == len(said) and all(map(agrees, made, said))
    return bool(made == said)


# --- building ---


def test_an_entry_says_what_the_model_is_and_every_number_of_its_card(package: Path, recipes: catalog.Recipes) -> None:
    alarmed = Lint(variant="ensemble", images=9, seed=0, findings=(FOUND,), date="2026-12-01", command="")
    ensemble = attacked(0.5, "8/255", variant="ensemble")
    put(package, card("golden", CLEAN, attacked(0.4), ensemble, lint=(alarmed,)))
    (entry,) = catalog.build(recipes)
    assert (entry.name, entry.method, entry.dataset) == ("golden", GOLDEN.method, GOLDEN.dataset)
    assert (entry.classes, entry.variants, entry.main) == (GOLDEN.classes, GOLDEN.variants, "single")
    assert entry.bytes == sum(file.size for file in GOLDEN.files.values())
    assert [(each.accuracy, each.interval, each.images) for each in entry.results] == [
        (0.8, (0.79, 0.81), 10_000),
        (0.4, attacked(0.4).interval, 1000),
        (0.5, ensemble.interval, 1000),
    ]
    assert [each.linter for each in entry.results] == ["not linted", "not linted", "failed"]
    assert entry.suspect == ("ensemble",)
    assert entry.date == "2026-12-01"
    assert entry.measured(("whitebox",), Fraction(8, 255)) is None
    found = entry.measured(("whitebox",), Fraction(8, 255), "ensemble")
    assert found is not None
    assert found.accuracy == 0.5


def test_a_catalogue_is_read_as_it_was_written_and_has_a_line_per_result(
    package: Path, recipes: catalog.Recipes
) -> None:
    put(package, card("one"), card("two"))
    entries = catalog.build(recipes)
    text = catalog.to_json(entries)
    assert catalog.from_json(text) == entries
    assert catalog.to_json(catalog.build(recipes)) == text
    assert json.loads(text)["models"][0]["results"][1]["accuracy"] == 0.4
    assert sum('"protocol"' in line for line in text.splitlines()) == 4


def test_cards_of_models_that_are_not_bundled_are_in_it_too(package: Path, recipes: catalog.Recipes) -> None:
    put(package, card("with-files"))
    put(package, card("card-only"), bundled=False)
    assert {entry.name: entry.where.bundled for entry in catalog.build(recipes)} == {
        "card-only": False,
        "with-files": True,
    }
    assert [each.name for each in catalog.cards()] == ["card-only", "with-files"]
    only = catalog.card_of("card-only")
    assert only is not None
    assert only.name == "card-only"
    assert catalog.card_of("nobody") is None


def test_a_bundle_that_is_being_written_is_not_there_yet(package: Path, recipes: catalog.Recipes) -> None:
    put(package, card("ready"))
    (package / "bundles" / "ready").rename(package / "bundles" / ".ready.0123")
    assert catalog.build(recipes) == ()


def test_a_card_under_another_name_or_in_both_places_is_refused(package: Path, recipes: catalog.Recipes) -> None:
    put(package, card("same"))
    put(package, card("same"), bundled=False)
    with pytest.raises(BundleError, match=r"same\.json is the card of 'same', which is bundled already"):
        catalog.build(recipes)
    (package / "cards" / "same.json").rename(package / "cards" / "other.json")
    with pytest.raises(BundleError, match="holds the card of 'same', expected 'other'"):
        catalog.build(recipes)
    (package / "cards" / "other.json").write_text("{")
    with pytest.raises(BundleError, match=r"other\.json: card\.json is not JSON"):
        catalog.build(recipes)


# --- how long, and by which command ---


@pytest.mark.parametrize(
    ("run", "published", "network", "epochs"),
    [
        ("eio-resnet20-cifar10-cpu", "eio-resnet20-cifar10", "resnet20", (200, 200)),
        ("pgd-at-eps4-resnet20-cifar10-cpu", "pgd-at-preact18-cifar10", "preact_resnet18", (200,)),
        ("ews-at-resnet20-cifar10-cpu", "ews-at-preact18-cifar10", "preact_resnet18", (200,)),
        ("dropen-lenet-mnist-cpu", "dropen-lenet-mnist", "lenet", (120,)),
        ("trades-wrn34-cifar10", "trades-wrn34-cifar10", "wide_resnet34_10", (76,)),
    ],
)
def test_the_published_scale_is_that_of_the_nearest_full_recipe(
    run: str, published: str, network: str, epochs: tuple[int, ...], recipes: catalog.Recipes
) -> None:
    found = catalog.published_scale(recipes[run], recipes)
    assert found is not None
    assert (found.recipe, found.network, found.epochs) == (published, network, epochs)


def test_a_recipe_that_nobody_published_has_none(recipes: catalog.Recipes) -> None:
    unknown = {"name": "mine", "dataset": "cifar10", "phases": [{"objective": {"method": "mine"}, "epochs": 3}]}
    assert catalog.published_scale(unknown, recipes) is None
    assert catalog.epochs_of(unknown) == (3,)
    assert catalog.epochs_of({}) == ()


def test_what_was_changed_for_a_run_is_in_its_command(recipes: catalog.Recipes) -> None:
    settings = ["seed=7", "phases.0.epochs=3", "phases.0.milestones=[1,2]", "ema=0.99", "network_options.width=8"]
    made = override(recipe("standard-resnet20-cifar10-cpu"), settings)
    mine = plain("mine", training=replace(GOLDEN.training, recipe=resolved(made)))
    train, export = catalog.commands_of(mine, recipes)
    words = shlex.split(train)
    assert words[:5] == ["manygates", "train", "standard-resnet20-cifar10-cpu", "--out", "runs/mine"]
    arguments = manygates.parser().parse_args(words[1:])
    # options that the recipe does not have are not seen, as a card of an older version says less than a recipe
    expected = resolved(override(recipe("standard-resnet20-cifar10-cpu"), settings[:-1]))
    assert resolved(override(recipe(arguments.recipe), arguments.set)) | {"network_options": {}} == expected
    assert export == "manygates export runs/mine --out models/mine --name mine"


def test_another_method_in_a_phase_is_set_as_a_whole(recipes: catalog.Recipes) -> None:
    made = override(recipe("standard-resnet20-cifar10-cpu"), ['phases.0.objective={"method":"trades","beta":3}'])
    mine = plain("mine", training=replace(GOLDEN.training, recipe=resolved(made)))
    words = shlex.split(catalog.commands_of(mine, recipes)[0])
    arguments = manygates.parser().parse_args(words[1:])
    assert resolved(override(recipe(arguments.recipe), arguments.set)) == resolved(made)


def test_a_recipe_of_other_phases_or_of_another_name_has_no_command(recipes: catalog.Recipes) -> None:
    made = resolved(recipe("standard-resnet20-cifar10-cpu"))
    twice = {**made, "phases": made["phases"] * 2}
    for other in (twice, {**made, "name": "mine"}, {}):
        mine = plain("mine", training=replace(GOLDEN.training, recipe=other))
        assert catalog.commands_of(mine, recipes) == ()


def test_an_ensemble_of_runs_is_a_run_per_seed(recipes: catalog.Recipes) -> None:
    made = {**resolved(recipe("standard-resnet20-cifar10-cpu")), "seed": 101, "seeds": [101, 102]}
    commands = catalog.commands_of(plain("pair", training=replace(GOLDEN.training, recipe=made)), recipes)
    assert [shlex.split(command)[-1] for command in commands[:2]] == ["seed=101", "seed=102"]
    assert commands[2] == "manygates export runs/pair-101 runs/pair-102 --out models/pair --name pair"


def test_a_derived_model_is_derived_along_its_own_paths(recipes: catalog.Recipes) -> None:
    derived = {"from": "eio", "paths": ["0110", "1001"], "finetune_epochs": 2, "recalibrated": True, "seed": 5}
    made = {**resolved(recipe("eio-resnet20-cifar10-cpu")), "derived": derived}
    commands = catalog.commands_of(plain("two", training=replace(GOLDEN.training, recipe=made)), recipes)
    assert commands[-1] == (
        "manygates derive runs/two --out models/two --name two --path 0110 --path 1001 --recalibrate --finetune 2 "
        "--seed 5"
    )
    manygates.parser().parse_args(shlex.split(commands[-1])[1:])
    rounded = card("two", CLEAN, training=replace(GOLDEN.training, recipe=made), int8=GOLDEN.int8)
    assert catalog.commands_of(rounded, recipes)[-1] == "manygates export local-dir:models/two --int8"


def test_the_best_checkpoint_and_int8_graphs_are_asked_for_where_the_card_has_them(recipes: catalog.Recipes) -> None:
    training = replace(
        GOLDEN.training, recipe=resolved(recipe("fast-at-resnet20-cifar10-cpu")), summary="30 epochs (best checkpoint)"
    )
    (_, export) = catalog.commands_of(plain("fast", training=training), recipes)
    assert export.endswith("--name fast --checkpoint best")
    assert GOLDEN.int8 is not None
    both = card("golden", CLEAN, training=training, int8=GOLDEN.int8)
    assert catalog.commands_of(both, recipes)[-1].endswith("--checkpoint best --int8")


@pytest.mark.parametrize(
    ("variants", "gated", "main"),
    [
        (("single", "ensemble", "gated"), True, "single"),
        (("gated",), True, "gated"),
        (("single",), False, "single"),
        (("single", "ensemble"), False, "ensemble"),
    ],
)
def test_the_variant_that_stands_for_a_model(variants: tuple[str, ...], gated: bool, main: str) -> None:
    make = card if gated else plain
    assert catalog.main_variant(make("any", CLEAN, variants=variants)) == main


# --- what is known ---


def test_a_number_recorded_into_a_bundled_card_is_known_at_once(package: Path, recipes: catalog.Recipes) -> None:
    put(package, plain("model", CLEAN))
    put(package, plain("other", CLEAN), bundled=False)
    file_it(package, recipes)
    before = {entry.name: entry for entry in catalog.load()}
    put(package, plain("model", CLEAN, attacked(0.3)))
    after = {entry.name: entry for entry in catalog.load()}
    assert len(after["model"].results) == len(before["model"].results) + 1
    assert after["model"].where == before["model"].where
    assert after["model"].trained == before["model"].trained
    assert after["other"] == before["other"]


def test_a_bundle_that_was_added_or_removed_since_is_told_by_its_folder(
    package: Path, recipes: catalog.Recipes
) -> None:
    put(package, card("gone"))
    file_it(package, recipes)
    (package / "bundles/gone/card.json").unlink()
    put(package, card("new"))
    assert [entry.name for entry in catalog.load()] == ["new"]
    (package / "catalog.json").unlink()
    assert [entry.name for entry in catalog.load()] == ["new"]


def test_a_model_on_the_hub_with_the_same_card_is_the_same_model(
    package: Path, recipes: catalog.Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(package, plain("mine", CLEAN), bundled=False)
    file_it(package, recipes)
    before = catalog.load()[0]
    assert before.where.repository is None
    publish(monkeypatch, plain("mine", CLEAN))
    file, found = catalog.refresh()
    assert file.is_file()
    assert len(found) == 1
    (entry,) = catalog.load()
    assert (entry.where.repository, entry.where.commit) == ("org/mine", "c" * 40)
    assert replace(entry, where=before.where) == before
    assert f"manygates pull hf-hub:org/mine@{'c' * 40}" in entry.how_to_get()
    assert "manygates train standard-resnet20-cifar10-cpu" in entry.how_to_get()


@pytest.mark.parametrize("bundled", [True, False])
def test_a_stranger_s_numbers_never_stand_beside_a_name_of_the_package(
    bundled: bool, package: Path, recipes: catalog.Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name and weights' digest of every model are public: a card that has both proves nothing."""
    put(package, card("mine", CLEAN), bundled=bundled)
    file_it(package, recipes)
    publish(monkeypatch, card("mine", replace(CLEAN, accuracy=0.99, interval=(0.98, 1.0), date="2030-01-01")))
    catalog.refresh()
    stranger, ours = catalog.load()
    assert (stranger.source, stranger.results[0].accuracy) == ("hf-hub:org/mine", 0.99)
    assert (ours.source, ours.results[0].accuracy, ours.where.repository) == ("mine", 0.8, None)
    assert ours.where.bundled == bundled
    assert catalog.entry("mine") == ours


def test_another_model_of_the_same_name_is_called_by_its_repository(
    package: Path, recipes: catalog.Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(package, card("mine", CLEAN))
    file_it(package, recipes)
    publish(monkeypatch, with_weights(card("mine", CLEAN), "f"), card("further", CLEAN))
    catalog.refresh("org")
    assert [entry.source for entry in catalog.load()] == ["hf-hub:org/further", "hf-hub:org/mine", "mine"]
    ours, further = catalog.entry("mine"), catalog.entry("further")
    assert ours is not None
    assert ours.where.bundled
    assert further is not None
    assert further.how_to_get() == f"`manygates pull hf-hub:org/further@{'c' * 40}` fetches it"
    assert catalog.entry("nobody") is None


def test_a_hub_that_cannot_be_reached_leaves_what_was_known(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, card("further", CLEAN))
    catalog.refresh()

    def fail(author: str | None = None) -> Any:
        raise BadInput("the hub cannot be reached")

    monkeypatch.setattr("zoo.hub.hub.hub_cards", fail)
    with pytest.raises(BadInput, match="cannot be reached"):
        catalog.refresh()
    assert [entry.name for entry in catalog.load()] == ["further"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"schema": 99, "models": []}', "has schema 99, this version reads 1"),
        ('{"schema": 1, "models": [{"name": "x"}]}', "expected the keys name, description"),
        ('{"schema": 1, "models": 3}', "expected"),
        ("[]", "has schema None"),
    ],
)
def test_a_damaged_catalogue_is_left_out_and_said(content: str, said: str, package: Path) -> None:
    put(package, card("bundled"))
    catalog.cached_file().parent.mkdir(parents=True)
    catalog.cached_file().write_text(content)
    warnings: list[str] = []
    assert [entry.name for entry in catalog.load(warnings.append)] == ["bundled"]
    (warning,) = warnings
    assert said in warning
    assert warning.endswith("`manygates catalog refresh` writes it again")


def test_a_value_of_another_type_is_refused(package: Path, recipes: catalog.Recipes) -> None:
    put(package, card("one"))
    document = json.loads(catalog.to_json(catalog.build(recipes)))
    document["models"][0]["results"][0]["accuracy"] = "80 %"
    with pytest.raises(BundleError, match=r"models\[0\]\.results\[0\]\.accuracy = '80 %', expected float"):
        catalog.from_json(json.dumps(document))


def test_a_model_that_no_recipe_makes_says_so() -> None:
    where = Where(bundled=False)
    assert replace(entry_named("x"), where=where).how_to_get() == "no recipe of this version makes it"


def entry_named(name: str, *results: Result, **changes: Any) -> Entry:
    return catalog.entry_of(card(name, *results, **changes), "0" * 64, {}, bundled=True)


# --- the table ---


def test_the_table_has_a_row_per_model_with_its_numbers_and_marks() -> None:
    alarm = Lint(variant="single", images=9, seed=0, findings=(FOUND,), date="2026-11-21", command="")
    few = attacked(0.123, "8/255", images=100)
    said = listing.tables([entry_named("a-model", CLEAN, attacked(0.4), few), entry_named("b-model", lint=(alarm,))])
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if "-model" in line}
    assert rows["a-model"] == ["resnet20", "single", "80.00", "40.0", "12.3*", "-", "bundled"]
    assert rows["b-model"] == ["resnet20", "single", "80.00", "40.0", "-", "ALARM:", "single", "bundled"]
    assert "* measured on fewer than 1,000 images" in said
    assert "the numbers of these variants may flatter them" in said
    assert "0.01" in said.splitlines()[1]
    assert "8/255" in said.splitlines()[1]


def test_data_sets_have_tables_with_radii_of_their_own() -> None:
    digits = entry_named("digits", CLEAN, attacked(0.9, "3/10"), attacked(0.95, "1/10"), dataset="mnist")
    said = listing.tables([entry_named("pictures"), digits])
    heads = [line.split() for line in said.splitlines() if line.split()[1:3] == ["network", "variant"]]
    assert [(head[0], head[4:-2]) for head in heads] == [("cifar10", ["0.01"]), ("mnist", ["0.1", "0.3"])]


def test_the_number_of_a_column_is_the_one_on_most_images_and_then_the_lowest() -> None:
    entry = entry_named(
        "m",
        attacked(0.5),
        attacked(0.4, attack="another"),
        attacked(0.1, images=50),
        attacked(0.2, norm="l2"),
        attacked(0.3, variant="ensemble"),
    )
    found = entry.measured(("whitebox",), Fraction(1, 100))
    assert found is not None
    assert found.accuracy == 0.4


def test_random_gates_stand_in_the_column_of_those_who_have_the_weights() -> None:
    only = entry_named("r", attacked(0.2, protocol="random-gates", variant="gated", draws=100), variants=("gated",))
    assert "20.0" in listing.tables([only])


def test_an_empty_catalogue_says_how_to_ask_the_hub() -> None:
    assert listing.tables([]) == "no model is known here; `manygates catalog refresh` asks the hub\n"


def test_models_are_chosen_by_data_set_and_method_and_sorted_by_a_number() -> None:
    one = entry_named("one", CLEAN, attacked(0.1), attacked(0.3, "8/255"))
    two = entry_named("two", replace(CLEAN, accuracy=0.7, interval=(0.6, 0.8)), attacked(0.5), method="trades")
    three = entry_named("three", CLEAN, dataset="mnist")
    entries = [one, three, two]

    def names(**options: Any) -> list[str]:
        return [entry.name for entry in listing.select(entries, **options)]

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
        listing.select([entry_named("one")], **options)


def test_what_is_not_bundled_says_where_it_comes_from(
    package: Path, recipes: catalog.Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(package, plain("recipe-only", CLEAN), bundled=False)
    file_it(package, recipes)
    publish(monkeypatch, with_weights(card("hub-only", CLEAN), "f"))
    catalog.refresh()
    said = listing.tables(catalog.load())
    lines = {line.split()[0]: line for line in said.splitlines() if "only" in line}
    assert lines["recipe-only"].endswith("train standard-resnet20-cifar10-cpu")
    assert lines["hf-hub:org/hub-only"].endswith("hub")
    assert "`manygates show NAME` says how to get it" in said


def test_hostile_text_of_a_card_does_not_reach_the_terminal(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, card("x", CLEAN, dataset="evil\x1b[2J\u202eset"))
    catalog.refresh()
    said = listing.tables(catalog.load())
    assert "\x1b" not in said
    assert "\u202e" not in said


def test_list_as_json_has_every_number_and_how_to_get_it(
    package: Path, recipes: catalog.Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    put(package, plain("mine", CLEAN, attacked(0.3)), bundled=False)
    file_it(package, recipes)
    assert manygates.main(["list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["results"][1]["accuracy"] == 0.3
    assert listed["where"]["commands"][0].startswith("manygates train standard-resnet20-cifar10-cpu")
    assert (listed["source"], listed["suspect"]) == ("mine", [])
    assert listed["trained"]["published"] == {
        "recipe": "standard-resnet20-cifar10",
        "network": "resnet20",
        "epochs": [200],
    }


def test_refresh_and_list_on_the_command_line(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, card("further", CLEAN))
    assert manygates.main(["catalog", "refresh", "--author", "org"]) == 0
    assert "what the hub's cards say now (models: 1)" in capsys.readouterr().err
    assert manygates.main(["list"]) == 0
    assert "hf-hub:org/further" in capsys.readouterr().out
    assert manygates.main(["list", "--method", "nothing"]) == 2
    assert "unknown method" in capsys.readouterr().err


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
