"""How what was trained relates to the recipes of this version: what `--set` changed, and the published scale.

Both stand in the card, so that the zoo can say how to train a model again without the training library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from training.recipes import RECIPES, recipe, resolved
from zoo.bundle.card import Published


def overrides_of(run: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the texts for `--set` that make this recipe from the one of its name; None if there are none.

    Args:
        run: a recipe as JSON values, as `resolved` returns it or a card holds it. What it lacks is as in the recipe of
            its name: a card of an older version says less.
    """
    name = str(run.get("name", ""))
    if name not in RECIPES:
        return None
    base = {key: value for key, value in _known()[name].items() if key not in ("name", "description")}
    # a method's name on the outside is that of the last phase, which says it itself
    texts: list[str] = []
    same_shape = _compare(base, {key: value for key, value in run.items() if key != "method"}, "", texts)
    return tuple(texts) if same_shape else None


def _compare(there: Any, here: Any, name: str, texts: list[str]) -> bool:
    """Add what differs to the texts; returns False if it cannot be said so."""
    inside = f"{name}." if name else ""
    if isinstance(there, dict) and isinstance(here, dict) and there.get("method") == here.get("method"):
        return all(_compare(there[key], here[key], f"{inside}{key}", texts) for key in there if key in here)
    if isinstance(there, list) and isinstance(here, list) and any(isinstance(entry, dict) for entry in there):
        pairs = enumerate(zip(there, here, strict=False))
        return len(there) == len(here) and all(_compare(*pair, f"{inside}{at}", texts) for at, pair in pairs)
    if there != here:
        texts.append(f"{name}={_setting(here)}")
    return True


def _setting(value: Any) -> str:
    """Write a value as `--set` reads it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def published_scale(run: Mapping[str, Any]) -> Published | None:
    """Return the scale at which a recipe's method was published: that of the nearest recipe that is not for a CPU.

    Nearest is the one of the same name without `-cpu`, else one of the same method (with the same method inside it, and
    on the same data set) whose members, candidates, sharing and network agree best.

    Args:
        run: a recipe as JSON values.
    """
    full = {name: values for name, values in _known().items() if not name.endswith("-cpu") and name != "smoke"}
    nearest = str(run.get("name", "")).removesuffix("-cpu")
    if nearest not in full:
        alike = [
            name
            for name, values in full.items()
            if _methods(values) == _methods(run) and values["dataset"] == run.get("dataset")
        ]
        if not alike:
            return None
        keys = ("members", "candidates", "sharing", "network")
        nearest = max(alike, key=lambda name: [full[name][key] == run.get(key) for key in keys])
    found = recipe(nearest)
    return Published(recipe=nearest, network=found.network, epochs=tuple(phase.epochs for phase in found.phases))


def _methods(run: Mapping[str, Any]) -> Sequence[str]:
    """Return the method of a recipe's last phase, and those inside it."""
    phases = run.get("phases")
    holder = phases[-1].get("objective") if isinstance(phases, list) and phases else None
    found = []
    while isinstance(holder, dict):
        found.append(str(holder.get("method", "")))
        holder = holder.get("inner")
    return found


@cache
def _known() -> dict[str, dict[str, Any]]:
    return {name: resolved(recipe(name)) for name in RECIPES}
