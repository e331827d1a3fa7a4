"""Fields of a dataclass whose checks, errors, help and docs are made from what the field says: type, range, meaning."""

import dataclasses
import difflib
import functools
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from zoo.errors import BadInput, shortened

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a field means, and what it may be beside its type."""

    text: str
    """Half a sentence for the help and the docs."""
    lowest: float | None = None
    highest: float | None = None
    """Of a number, both included."""
    allowed: Callable[[Any], object] | None = None
    """Says of a value of the field's type whether it may be; texts without control characters may, if this is None."""
    expected: str = ""
    """What an error asks for; empty says it from the type and the range."""
    metavar: str = ""
    """What the help calls a value."""


def setting(default: Value, text: str, lowest: float | None = None, highest: float | None = None, **more: Any) -> Value:
    """Return a field of a dataclass; the arguments after the default are those of `Meaning`."""
    meaning = Meaning(text=text, lowest=lowest, highest=highest, **more)
    made: Value = dataclasses.field(default=default, metadata={"meaning": meaning})
    return made


def meaning_of(field: "dataclasses.Field[Any]") -> Meaning:
    """Return what a field was given."""
    meaning: Meaning = field.metadata["meaning"]
    return meaning


def choices(field: "dataclasses.Field[Any]") -> list[str]:
    """Return the words that a field takes; none if it is no choice, and without the empty one."""
    return [word for word in typing.get_args(field.type) if word and isinstance(word, str)]


def check(settings: Any, origins: Mapping[str, str]) -> None:
    """Give each field of a dataclass a value of exactly its type, for which a list becomes a tuple and an int a float.

    Raises:
        BadInput: the name of a field with a wrong value, the value, what was expected, and its origin.
    """
    for name, (field, kind) in _fields(settings.__class__).items():
        given = getattr(settings, name)
        try:
            value = msgspec.convert(given, kind)
            allowed = _is_allowed(value, meaning_of(field))
        except msgspec.ValidationError:
            allowed = False
        if not allowed:
            origin = f" (from {origins[name]})" if name in origins else ""
            raise BadInput(f"{name} is {shortened(given)}, expected {_expected(field)}{origin}")
        object.__setattr__(settings, name, value)


def unknown(name: str, known: Sequence[str]) -> BadInput:
    """Return the refusal of a name that is no setting: it suggests the nearest of `known`, whatever the case."""
    spelled = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower(), spelled, n=1)
    suggestion = f"did you mean {spelled[nearest[0]]}? " if nearest else ""
    return BadInput(f"{name} is no setting; {suggestion}known: {', '.join(known)}")


def shown(value: Any) -> str:
    """Show a value as one writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@functools.cache
def _fields(kind: Any) -> "dict[str, tuple[dataclasses.Field[Any], Any]]":
    types = typing.get_type_hints(kind)
    listed = dataclasses.fields(kind)
    return {field.name: (field, types[field.name]) for field in listed if "meaning" in field.metadata}


def _is_allowed(value: Any, meaning: Meaning) -> bool:
    if meaning.lowest is not None and meaning.highest is not None:
        return bool(meaning.lowest <= value <= meaning.highest)  # written so that NaN fails
    if meaning.allowed is not None:
        return bool(meaning.allowed(value))
    return all(map(is_plain, value if isinstance(value, tuple) else (value,)))


def is_plain(text: object) -> bool:
    """Whether a value is no text, or one without control characters and halves of characters."""
    return not isinstance(text, str) or not any(unicodedata.category(each) in ("Cc", "Cs") for each in text)


def _expected(field: "dataclasses.Field[Any]") -> str:
    meaning = meaning_of(field)
    if meaning.expected:
        return meaning.expected
    if words := choices(field):
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if isinstance(field.default, bool):
        return "true or false"
    if meaning.lowest is not None:
        kind = "a whole number" if isinstance(field.default, int) else "a number"
        return f"{kind}, {shown(meaning.lowest)} to {shown(meaning.highest)}"
    return f"{'a list of texts' if isinstance(field.default, tuple) else 'text'} without control characters"
