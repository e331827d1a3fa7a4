"""How what was trained relates to the recipes of this version; what the cards of the package say of it still holds."""

from typing import Any

import pytest

from training.known_recipes import overrides_of, published_scale
from training.recipes import override, recipe, resolved
from zoo.bundle.card import Card
from zoo.hub.source import package_models

CARDS = [model.card for model in package_models()]


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
    run: str, published: str, network: str, epochs: tuple[int, ...]
) -> None:
    found = published_scale(resolved(recipe(run)))
    assert found is not None
    assert (found.recipe, found.network, found.epochs) == (published, network, epochs)


def test_a_recipe_that_nobody_published_has_no_scale() -> None:
    unknown = {"name": "mine", "dataset": "cifar10", "phases": [{"objective": {"method": "mine"}, "epochs": 3}]}
    assert published_scale(unknown) is None


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["seed=7", "phases.0.epochs=3", "phases.0.milestones=[1,2]", "ema=0.99", "channels_last=true"],
        ['phases.0.objective={"method":"trades","beta":3}'],
    ],
)
def test_what_was_set_for_a_run_makes_the_same_recipe_again(settings: list[str]) -> None:
    made = override(recipe("standard-resnet20-cifar10-cpu"), settings)
    found = overrides_of(resolved(made))
    assert found is not None
    assert override(recipe(made.name), list(found)) == made


def test_a_recipe_of_other_phases_or_of_another_name_has_no_overrides() -> None:
    made = resolved(recipe("standard-resnet20-cifar10-cpu"))
    for other in ({**made, "phases": made["phases"] * 2}, {**made, "name": "mine"}, {}):
        assert overrides_of(other) is None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_of_the_package_says_how_its_recipe_is_made_and_published(card: Card) -> None:
    said, overrides = card.training.recipe, card.training.overrides
    assert overrides is not None
    made = resolved(override(recipe(said["name"]), list(overrides)))
    ignored = {"name", "description"}
    assert {key for key in made if key in said and key not in ignored and not agrees(made[key], said[key])} == set()
    assert card.training.published == published_scale(said)


def agrees(made: Any, said: Any) -> bool:
    """Whether two values are the same in everything that the second says: an older card says less."""
    if isinstance(said, dict) and isinstance(made, dict):
        return all(agrees(made[key], said[key]) for key in said if key in made)
    if isinstance(said, list) and isinstance(made, list):
        return len(made) == len(said) and all(map(agrees, made, said))
    return bool(made == said)
