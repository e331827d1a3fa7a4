"""Fields of a pydantic model whose errors, help and docs are made from what the field says: type, range, meaning."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from zoo.errors import BadInput, shortened


def setting(
    default: Any,
    meaning: str,
    lowest: float | None = None,
    highest: float | None = None,
    *,
    metavar: str = "",
    expected: str = "",
    **rules: Any,
) -> Any:
    """Return a field.

    Args:
        default: of the field's type.
        meaning: half a sentence for the help and the docs.
        lowest: of a number, included.
        highest: of a number, included.
        metavar: what the help calls a value.
        expected: what an error asks for; empty says it from the type and the range.
        rules: further ones of pydantic's `Field`.
    """
    more: dict[str, JsonValue] = {"metavar": metavar, "expected": expected}
    return Field(default, description=meaning, ge=lowest, le=highest, json_schema_extra=more, **rules)


class Checked(BaseModel):
    """Values of exactly their types; what else is given is refused in our words, with where it came from.

    Raises:
        BadInput: the first wrong value, what was expected, and where it came from if the field `origins` says so.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    if not TYPE_CHECKING:  # a type checker reads the arguments off the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _refusal(type(self), error, values.get("origins", {})) from None


def unknown(name: str, known: Sequence[str]) -> BadInput:
    """Return the refusal of a name that is no setting: it suggests the nearest of `known`, whatever the case."""
    spelled = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower(), spelled, n=1)
    suggestion = f"did you mean {spelled[nearest[0]]}? " if nearest else ""
    return BadInput(f"{name} is no setting; {suggestion}known: {', '.join(known)}")


def choices(field: FieldInfo) -> list[str]:
    """Return the words that a field takes; none if it is no choice, and without the empty one."""
    return [word for word in get_args(field.annotation) if word and isinstance(word, str)]


def bounds(field: FieldInfo) -> tuple[float, float]:
    """Return the lowest and the highest value of a number's field."""
    found = {name: getattr(rule, name) for rule in field.metadata for name in ("ge", "le") if hasattr(rule, name)}
    return found["ge"], found["le"]


def extra(field: FieldInfo, name: str) -> str:
    """Return the `metavar` or the `expected` that a field was given."""
    given = field.json_schema_extra
    return str(given.get(name, "")) if isinstance(given, dict) else ""


def shown(value: Any) -> str:
    """Show a value as one writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refusal(model: type[BaseModel], error: ValidationError, origins: Mapping[str, str]) -> BadInput:
    wrong = error.errors(include_url=False)[0]
    if isinstance(refusal := wrong.get("ctx", {}).get("error"), BadInput):  # of a validator of ours
        return refusal
    name = str(wrong["loc"][0])
    if wrong["type"] == "extra_forbidden":
        return unknown(name, list(model.model_fields))
    value = None if wrong["type"] == "missing" else wrong["input"]
    origin = f" (from {origins[name]})" if name in origins else ""
    return BadInput(f"{name} is {shortened(value)}, expected {_expected(model.model_fields[name])}{origin}")


def _expected(field: FieldInfo) -> str:
    if expected := extra(field, "expected"):
        return expected
    if words := choices(field):
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if isinstance(field.default, bool):
        return "true or false"
    if isinstance(field.default, int | float):
        lowest, highest = bounds(field)
        kind = "a whole number" if isinstance(field.default, int) else "a number"
        return f"{kind}, {shown(lowest)} to {shown(highest)}"
    return f"{'a list of texts' if isinstance(field.default, tuple) else 'text'} without control characters"
