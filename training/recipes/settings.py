"""Recipes as texts: fields changed by `name=value`, and the JSON that a run and a card keep."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from training.objectives import OBJECTIVES, Objective
from training.recipes.recipe import Recipe
from zoo.errors import BadInput, UnknownName


def override(base: Recipe, settings: list[str]) -> Recipe:
    """Return `base` with fields changed by texts: `seed=1`, `phases.1.epochs=5`, `phases.1.objective.eps=0.03`.

    Raises:
        BadInput: a text without `=`, a field that does not exist, or a value of the wrong type.
    """
    changed: Any = base
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise BadInput(f"--set takes field=value, got {setting!r}; for example seed=1 or phases.0.epochs=3")
        changed = _set(changed, name.split("."), text, name)
    return cast(Recipe, changed)


def _set(holder: Any, keys: list[str], text: str, name: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(holder, tuple):
        if not key.isdigit() or int(key) >= len(holder):
            raise BadInput(f"--set {name}: there is no element {key!r}, expected 0 to {len(holder) - 1}")
        changed = list(holder)
        changed[int(key)] = _set(holder[int(key)], rest, text, name) if rest else _parse(text, type(holder[0]), name)
        return tuple(changed)
    if isinstance(holder, dict):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        return {**holder, ".".join(keys): value}
    fields = {entry.name for entry in dataclasses.fields(holder)} if dataclasses.is_dataclass(holder) else set()
    if key not in fields:
        known = ", ".join(sorted(fields)) or "none"
        raise BadInput(f"--set {name}: {type(holder).__name__} has no field {key!r}; its fields: {known}")
    if rest:
        return replace(holder, **{key: _set(getattr(holder, key), rest, text, name)})
    kind = typing.get_type_hints(type(holder))[key]
    return replace(holder, **{key: _parse(text, kind, name)})


def _parse(text: str, kind: Any, name: str) -> Any:
    """Read `text` as a value of the annotated type `kind`."""
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal and text in get_args(option):
            return text
        if isinstance(option, type) and issubclass(option, Objective):
            return _parse_objective(text, option, name)
        if option is str:
            return text
        if origin is Literal or option is type(None):
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, bool) and type(value) is option:
            return value
        if (option is dict or origin is dict) and isinstance(value, dict):
            return value
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            try:
                return _decoded(option, value)
            except TypeError as error:
                raise BadInput(f"--set {name}: {error}") from error
        if origin is tuple and isinstance(value, list):
            entry_kind = get_args(option)[0]
            if entry_kind is float and all(type(entry) in (int, float) for entry in value):
                return tuple(float(entry) for entry in value)
            if all(type(entry) is entry_kind for entry in value):
                return tuple(value)
    expected = " or ".join(_described(option) for option in options)
    raise BadInput(f"--set {name}: {text!r} is not a value for it, expected {expected}")


def _parse_objective(text: str, kind: type[Objective], name: str) -> Objective:
    """Read an objective: a method's name, or an object such as {"method": "trades", "beta": 3}."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"method": text}
    if not isinstance(value, dict) or "method" not in value:
        raise BadInput(
            f"--set {name}: {text!r} is no objective, expected a method ({', '.join(OBJECTIVES)}) or an object with one"
        )
    try:
        return _objective(value, kind)
    except TypeError as error:
        raise BadInput(f"--set {name}: {error}") from error


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def resolved(run: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON values, its objectives by method name."""
    return cast(dict[str, Any], json.loads(json.dumps(_encoded(run))))


def _encoded(value: Any) -> Any:
    """Return a value of a recipe as JSON values; an objective says its method."""
    if isinstance(value, tuple):
        return [_encoded(entry) for entry in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {entry.name: _encoded(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Objective):
        method = next(name for name, kind in OBJECTIVES.items() if type(value) is kind)
        return {"method": method, **fields}
    return fields


def from_resolved(document: dict[str, Any]) -> Recipe:
    """Return the recipe that `resolved` wrote.

    Raises:
        BadInput: a field that this version does not know, or one that is missing.
    """
    try:
        return cast(Recipe, _decoded(Recipe, document))
    except (KeyError, TypeError) as error:
        raise BadInput(f"not a recipe of this version: {error}") from error


def _decoded(kind: Any, value: Any) -> Any:
    """Return the value of the annotated type `kind` that `_encoded` wrote."""
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if isinstance(value, dict) and isinstance(option, type) and issubclass(option, Objective):
            return _objective(value, option)
        if isinstance(value, dict) and dataclasses.is_dataclass(option):
            hints = typing.get_type_hints(option)
            unknown = sorted(value.keys() - hints.keys())
            if unknown:
                raise TypeError(f"{getattr(option, '__name__', option)} has no field {unknown[0]!r}")
            return cast(Any, option)(**{name: _decoded(hints[name], entry) for name, entry in value.items()})
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            return tuple(_decoded(get_args(option)[0], entry) for entry in value)
    return value


def _objective(document: Mapping[str, Any], kind: type[Objective] = Objective) -> Objective:
    """Return the objective that a document describes by its method and fields.

    Raises:
        UnknownName: there is no such method.
        BadInput: the method is none that fits here.
    """
    fields = dict(document)
    method = fields.pop("method")
    if method not in OBJECTIVES:
        raise UnknownName(method, OBJECTIVES, kind="method")
    chosen = OBJECTIVES[method]
    if not issubclass(chosen, kind):
        raise BadInput(f"{method} does not fit here: expected a loss of one network, such as standard or pgd_at")
    hints = typing.get_type_hints(chosen)
    unknown = sorted(fields.keys() - hints.keys())
    if unknown:
        known = ", ".join(entry.name for entry in dataclasses.fields(chosen))
        raise TypeError(f"{method} has no field {unknown[0]!r}; its fields: {known}")
    return chosen(**{name: _decoded(hints[name], entry) for name, entry in fields.items()})
