"""Recipes: a training run is a Python function that returns a `Recipe`; a variant is `base().variant(field=...)`.

A recipe is called like its function, with dashes. The function's docstring says command, hardware, time and what to
expect; "not run" where nobody has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType

from training.recipes import adversarial, ensemble_in_one, ensembles, exits, standard, subnets
from training.recipes.documents import from_resolved, override, resolved
from training.recipes.recipe import Phase, Recipe
from zoo.errors import UnknownName


def _recipes_in(module: ModuleType) -> Iterator[tuple[str, Callable[[], Recipe]]]:
    """Yield the public functions of a module, in their order, under the names of their recipes."""
    for function in vars(module).values():
        if getattr(function, "__module__", "") == module.__name__ and not function.__name__.startswith("_"):
            name = function.__name__.replace("_", "-")
            yield name, _named(name, function)


def _named(name: str, function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    @wraps(function)
    def make() -> Recipe:
        return function().variant(name=name)

    return make


RECIPES: dict[str, Callable[[], Recipe]] = {
    name: make
    for module in (ensemble_in_one, standard, adversarial, ensembles, subnets, exits)
    for name, make in _recipes_in(module)
}


def recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UnknownName: the message lists the known recipes.
    """
    if name not in RECIPES:
        raise UnknownName(name, RECIPES, kind="recipe")
    return RECIPES[name]()


__all__ = ["RECIPES", "Phase", "Recipe", "from_resolved", "override", "recipe", "resolved"]
