"""Recipes as documents: the JSON that a run and a card keep, and fields changed by `name=value`."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import replace
from typing import Any, Literal, cast, get_args, get_origin

from training.objectives import OBJECTIVES, Objective
from training.recipes.recipe import Recipe
from zoo.errors import BadInput, UnknownName


def resolved(run: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON values, its objectives by method name."""
    return cast(dict[str, Any], json.loads(json.dumps(_encoded(run))))


def from_resolved(document: dict[str, Any]) -> Recipe:
    """Return the recipe that `resolved` wrote.

    Raises:
        BadInput: A field that this version does not know, one that is missing, or one of another type.
        UnknownName: A method that this version does not know.
    """
    try:
        if "name" not in document:
            raise TypeError("it has no name")
        return cast(Recipe, _built(Recipe, document))
    except TypeError as error:
        raise BadInput(f"not a recipe of this version: {error}") from error


def override(base: Recipe, settings: list[str]) -> Recipe:
    """Return `base` with fields changed by texts: `seed=1`, `phases.1.epochs=5`, `phases.1.objective.eps=0.03`.

    Raises:
        BadInput: A text without `=`, a field that does not exist, or a value of the wrong type.
        UnknownName: A method that does not exist.
    """
    changed: Any = base
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise BadInput(f"--set takes field=value, got {setting!r}; for example seed=1 or phases.0.epochs=3")
        try:
            changed = _set(changed, name.split("."), text)
        except TypeError as error:
            raise BadInput(f"--set {name}: {error}") from error
    return cast(Recipe, changed)


def _set(holder: Any, keys: list[str], text: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(holder, tuple):
        if not key.isdigit() or int(key) >= len(holder):
            raise TypeError(f"there is no element {key!r}, expected 0 to {len(holder) - 1}")
        entry = holder[int(key)]
        changed = _set(entry, rest, text) if rest else _parsed(type(entry), text)
        return (*holder[: int(key)], changed, *holder[int(key) + 1 :])
    if isinstance(holder, dict):
        return {**holder, ".".join(keys): _json_or_text(text)}
    kinds = typing.get_type_hints(type(holder)) if dataclasses.is_dataclass(holder) else {}
    _check_fields(type(holder), [key])
    return replace(holder, **{key: _set(getattr(holder, key), rest, text) if rest else _parsed(kinds[key], text)})


def _check_fields(kind: type, names: typing.Iterable[str]) -> None:
    """Check that a class has all these fields; one that it lacks is a TypeError that suggests the nearest."""
    known = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for name in names:
        if name not in known:
            raise TypeError(str(UnknownName(name, known, kind=f"field of {kind.__name__}")))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parsed(kind: Any, text: str) -> Any:
    """Read a text as a value of the annotated type `kind`: `none`, JSON, or the text itself where texts may stand."""
    options = _options(kind)
    if types.NoneType in options and text.lower() == "none":
        return None
    return _value(kind, text if str in options else _json_or_text(text))


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _value(kind: Any, value: Any) -> Any:
    """Return a JSON value as the annotated type `kind`; a TypeError says what was expected.

    Types are strict (1 is no bool and true no number), but for a whole number where a fraction may stand. A number must
    be finite. A text for an objective is its method, with default fields.
    """
    for option in _options(kind):
        origin = get_origin(option)
        if isinstance(option, type) and issubclass(option, Objective) and isinstance(value, str | dict):
            return _objective(option, {"method": value} if isinstance(value, str) else value)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _built(option, value)
        if origin is tuple and isinstance(value, list):
            with_kind = get_args(option)[0]
            return tuple(_value(with_kind, entry) for entry in value)
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if origin is Literal and value in get_args(option):
            return value
        if option is not float and type(value) is (origin or option):
            return value
    expected = " or ".join(_described(option) for option in _options(kind))
    raise TypeError(f"{value!r} is not a value for it, expected {expected}")


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _built(kind: Any, document: dict[str, Any]) -> Any:
    """Return the dataclass `kind` with the fields of a document."""
    _check_fields(kind, document)
    kinds = typing.get_type_hints(kind)
    values = {}
    for name, value in document.items():
        try:
            values[name] = _value(kinds[name], value)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    return kind(**values)


def _objective(kind: type[Objective], document: dict[str, Any]) -> Objective:
    """Return the objective that a document describes by its method and fields.

    Raises:
        UnknownName: There is no such method.
        BadInput: The method is none that fits here.
    """
    method = document.get("method")
    if not isinstance(method, str):
        known = ", ".join(OBJECTIVES)
        raise TypeError(f"{document} is no objective, expected a method ({known}) or an object with one")
    if method not in OBJECTIVES:
        raise UnknownName(method, OBJECTIVES, kind="method")
    chosen = OBJECTIVES[method]
    if not issubclass(chosen, kind):
        raise BadInput(f"{method} does not fit here: expected a loss of one network, such as standard or pgd_at")
    return cast(Objective, _built(chosen, {name: value for name, value in document.items() if name != "method"}))


def _encoded(value: Any) -> Any:
    """Return a value of a recipe as JSON values; an objective says its method."""
    if isinstance(value, tuple):
        return [_encoded(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: _encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"method": value.method, **fields} if isinstance(value, Objective) else fields
