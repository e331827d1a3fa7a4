from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from training.objectives import OBJECTIVES, EnsembleInOne, Standard
from training.recipes import RECIPES, Phase, Recipe, from_resolved, override, recipe, resolved
from zoo.data.datasets import DATASETS
from zoo.errors import BadInput, UnknownName
from zoo.networks import NETWORKS


@pytest.fixture(params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "base",
        "description": "two phases",
        "phases": (Phase(objective=Standard(), epochs=2), Phase(objective=EnsembleInOne(), epochs=3)),
        "candidates": 2,
        "train_images": 64,
    }
    return Recipe(**{**values, **changes})


def test_every_recipe_is_known_by_its_own_name(name: str) -> None:
    assert recipe(name).name == name


def test_every_recipe_can_be_built(name: str) -> None:
    made = recipe(name)
    assert made.network in NETWORKS
    assert made.dataset in DATASETS
    assert set(made.method.split("+")) <= OBJECTIVES.keys()
    assert made.epochs == sum(phase.epochs for phase in made.phases)
    assert made.description


def test_every_recipe_survives_being_written_and_read(name: str) -> None:
    made = recipe(name)
    document = json.loads(json.dumps(resolved(made)))
    assert from_resolved(document) == made
    assert resolved(from_resolved(document)) == document


def test_every_recipe_says_how_to_run_it(name: str) -> None:
    assert f"manygates train {name} --out RUN" in (RECIPES[name].__doc__ or "")


def test_a_resolved_recipe_holds_every_field_and_the_methods_names() -> None:
    document = resolved(base())
    assert document.keys() == {field.name for field in dataclasses.fields(Recipe)}
    first, second = (phase["objective"] for phase in document["phases"])
    assert first == {"method": "standard", "label_smoothing": 0.0, "consistency": 0.0}
    assert second.keys() == {"method", *(field.name for field in dataclasses.fields(EnsembleInOne))}


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_survives_in_a_recipe(method: str) -> None:
    made = base(phases=(Phase(objective=OBJECTIVES[method](), epochs=1, milestones=(3,)),))
    assert made.method == made.phases[0].objective.name
    assert made.method.split("+")[-1].split("-")[0] == method
    assert from_resolved(resolved(made)) == made


@pytest.mark.parametrize(
    ("setting", "read", "expected"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("network=resnet8", lambda r: r.network, "resnet8"),
        ("name=a=b", lambda r: r.name, "a=b"),
        ("train_images=100", lambda r: r.train_images, 100),
        ("train_images=none", lambda r: r.train_images, None),
        ("precision=fp32", lambda r: r.precision, "fp32"),
        ("channels_last=false", lambda r: r.channels_last, False),
        ('network_options={"width": 8}', lambda r: r.network_options, {"width": 8}),
        ("phases.0.epochs=9", lambda r: r.phases[0].epochs, 9),
        ("phases.1.learning_rate=1", lambda r: r.phases[1].learning_rate, 1.0),
        ("phases.1.milestones=[2, 3]", lambda r: r.phases[1].milestones, (2, 3)),
        ("phases.1.milestones=[]", lambda r: r.phases[1].milestones, ()),
        ("phases.1.objective.eps=0.03", lambda r: r.phases[1].objective.eps, 0.03),
        ("phases.1.objective.step_size=0.01", lambda r: r.phases[1].objective.step_size, 0.01),
        ("phases.1.objective.batch_norm=train", lambda r: r.phases[1].objective.batch_norm, "train"),
    ],
)
def test_any_field_can_be_overridden(setting: str, read: Callable[[Any], Any], expected: Any) -> None:
    changed = override(base(), [setting])
    assert read(changed) == expected
    assert type(read(changed)) is type(expected)
    assert read(base()) != expected
    assert from_resolved(resolved(changed)) == changed


def test_overrides_apply_in_order_and_leave_the_rest_alone() -> None:
    changed = override(base(), ["seed=1", "phases.0.epochs=5", "seed=2"])
    assert changed == dataclasses.replace(
        base(), seed=2, phases=(dataclasses.replace(base().phases[0], epochs=5), base().phases[1])
    )
    assert override(base(), []) == base()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", r"Recipe 'sed'; did you mean 'seed'\? .*train_images"),
        ("phases.0.lr=1", r"phases.0.lr: .*Phase 'lr'.*learning_rate"),
        ("phases.1.objective.epsilon=1", r"EnsembleInOne 'epsilon'.*eps"),
        ("phases.2.epochs=1", r"no element '2', expected 0 to 1"),
        ("phases.last.epochs=1", r"no element 'last', expected 0 to 1"),
        ("seed.high=1", r"int 'high'"),
        ("seed=one", r"seed: 'one' is not a value for it, expected int"),
        ("seed=1.5", r"seed: 1\.5 is .* expected int"),
        ("seed=true", r"seed: True is .* expected int"),
        ("channels_last=1", r"channels_last: 1 is .* expected bool"),
        ("train_images=many", r"expected int or None"),
        ("precision=fp16", r"'fp16' is not a value for it, expected 'fp32' or 'bf16'"),
        ("phases.0.schedule=linear", r"expected 'step' or 'cosine'"),
        ("phases.0.milestones=[0.5]", r"milestones: 0\.5 is .* expected int"),
        ("phases.0.milestones=5", r"expected tuple\[int, ...\]"),
        ("phases=[1]", r"phases: 1 is .* expected Phase"),
        ("phases.0=1", r"phases.0: 1 is .* expected Phase"),
        ("network_options=8", r"network_options: 8 is .* expected dict"),
        ("seed", r"takes field=value, got 'seed'"),
        ("=1", r"takes field=value, got '=1'"),
        ("phases.1.objective.eps=8", r"need 0 <= eps <= 1, got 8"),
        ("phases.0.epochs=0", r"epochs is 0"),
        ("batch_size=1", r"batch_size is 1"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused_with_what_was_expected(setting: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        override(base(), [setting])


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"recipe 'smok'; did you mean 'smoke'\? \(known: adp3-lenet-mnist-cpu, "):
        recipe("smok")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(lr=1), "lr"),
        (lambda d: d.pop("name"), "name"),
        (lambda d: d.pop("phases"), "phases"),
        (lambda d: d["phases"][0].update(warm=1), "warm"),
        (lambda d: d["phases"][0].pop("objective"), "objective"),
        (lambda d: d["phases"][1]["objective"].update(radius=1), "radius"),
    ],
)
def test_a_document_of_another_version_is_refused_by_the_field(change: Callable[[Any], Any], message: str) -> None:
    document = resolved(base())
    change(document)
    with pytest.raises(BadInput, match=f"not a recipe of this version: .*{message}"):
        from_resolved(document)


def test_a_document_with_an_unknown_method_is_refused_with_the_known_ones() -> None:
    document = resolved(base())
    document["phases"][0]["objective"]["method"] = "magic"
    with pytest.raises(UnknownName, match=r"unknown method 'magic' .*known: adp, .*, trs\)"):
        from_resolved(document)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": ()}, "recipe base has no phase"),
        ({"candidates": 0}, "candidates is 0"),
        ({"ensemble_paths": 0}, "ensemble_paths is 0"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, got 'fp8'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        base(**changes)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"learning_rate": 0.0}, {"schedule": "linear"}])
def test_a_phase_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"epochs is 0|learning_rate > 0|schedule must be one of step, cosine"):
        Phase(**{"objective": Standard(), "epochs": 1, **changes})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["validate_every=0"], "validate_every is 0"),
        (["held_out=-1"], "held_out is -1"),
        (["start_noise=-0.1"], "start_noise >= 0"),
        (["candidates=1"], "ensemble_in_one needs candidates >= 2"),
        (["sharing=none"], "sharing"),
        (["selection=loud"], "selection"),
        (["phases.0.momentum=-1"], "0 <= momentum < 1"),
        (["phases.0.weight_decay=-1"], "weight_decay >= 0"),
        (["phases.0.momentum=0", "phases.0.nesterov=true"], "nesterov needs momentum"),
        (["phases.0.learning_rate=NaN"], "not a value for it"),
        (["phases.0.objective.label_smoothing=2"], "label_smoothing"),
        (["phases.1.objective.step_size=-0.01"], "step_size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        override(recipe("smoke"), settings)


def test_an_option_of_the_network_is_set_by_its_name() -> None:
    assert override(recipe("smoke"), ["network_options.width=8"]).network_options == {"width": 8}


def test_the_three_readings_of_ensemble_in_one_differ_where_paper_and_release_do() -> None:
    mixed, paper, release = (recipe(f"eio-resnet20-cifar10{suffix}") for suffix in ("", "-paper", "-release"))
    assert (mixed.sharing, paper.sharing, release.sharing) == ("independent", "independent", "shared_conv")
    assert paper.phases[1].objective == EnsembleInOne.paper()
    assert release.phases[1].objective == mixed.phases[1].objective == EnsembleInOne.release()
    assert [phase.nesterov for phase in release.phases] == [True, True]


@pytest.mark.parametrize("number", [-5, 0, True, 2.5])
def test_a_recipe_counts_its_training_images_from_one_on(number: Any) -> None:
    with pytest.raises(BadInput, match="train_images is"):
        base(train_images=number)


def test_a_phase_has_no_milestone_before_its_beginning() -> None:
    with pytest.raises(BadInput, match="a milestone is -5"):
        Phase(objective=Standard(), epochs=2, milestones=(-5, 1))
