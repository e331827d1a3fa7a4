"""Recipes: a training run is a Python function that returns a `Recipe`; a variant is `base().variant(field=...)`.

A recipe is called like its function, with dashes. The function's docstring says command, hardware, time and what to
expect; "not run" where nobody has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import isfunction

from training.recipes import adversarial, ensemble_in_one, ensembles, exits, subnets
from training.recipes.documents import from_resolved, override, resolved
from training.recipes.recipe import Phase, Recipe
from zoo.errors import UnknownName


def _named(name: str, function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    @wraps(function)
    def make() -> Recipe:
        return function().variant(name=name)

    return make


MODULES = (ensemble_in_one, adversarial, ensembles, subnets, exits)
"""Where recipes are: each public function that a module defines is one."""

RECIPES: dict[str, Callable[[], Recipe]] = {
    (dashed := name.replace("_", "-")): _named(dashed, value)
    for module in MODULES
    for name, value in vars(module).items()
    if isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
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
