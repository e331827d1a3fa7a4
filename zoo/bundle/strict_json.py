"""JSON that is read as strictly as it is written, into dataclasses, with msgspec.

The types and the bounds of the fields are in their annotations (`msgspec.Meta`). What several fields must hold together
is checked by the `__post_init__` of their class, which raises BadInput with a sentence that begins with the field. The
classes have slots, without which msgspec forgets the fields that have their default.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from zoo.errors import BundleError

Kind = TypeVar("Kind")

MAX_DIGITS = 19
"""Of an integer: 64 bits hold no more."""
_MAX_SHOWN = 80
"""Characters of a value in a message."""
_ADVICE = "correct the card or export again"
_KINDS = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "array": "an array"}
_MEANINGS: dict[str, str] = {}
"""Pattern, as msgspec quotes it -> what it means, in words."""


def matching(pattern: str, meaning: str) -> msgspec.Meta:
    """Return the annotation of a text that matches all of `pattern`; `meaning` says in a message what was expected."""
    whole = rf"^(?:{pattern})\Z"
    _MEANINGS[repr(whole)] = meaning
    return msgspec.Meta(pattern=whole)


def one_of(names: Sequence[str]) -> msgspec.Meta:
    """Return the annotation of a text that is one of `names`."""
    return matching("|".join(map(re.escape, names)), f"one of {', '.join(names)}")


def read(kind: type[Kind], text: str) -> Kind:
    """Read a dataclass from the text of `card.json`.

    Raises:
        BundleError: it is not JSON, a key is missing, unknown or twice there, or a value has the wrong type, is not
            finite or out of bounds; the message names the key, the value and what was expected.
    """
    return convert(kind, parse(text))


def parse(text: str) -> Any:
    """Read JSON without what it must not hold: a key twice, a number that is not finite, an integer of many digits.

    Raises:
        BundleError: it holds one of these, or is not JSON.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"card.json is not JSON ({error}); fetch or export the bundle again") from error


def convert(kind: type[Kind], document: Any) -> Kind:
    """Turn what `parse` returns into a dataclass; raises what `read` does."""
    try:
        value = msgspec.convert(document, kind)
        # a key that is not a field's, or that was left out because its field has a default
        same_keys = msgspec.json.encode(document) == msgspec.json.encode(value)
    except msgspec.ValidationError as error:
        raise _refusal(kind, document, str(error)) from error
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        raise BundleError(
            f"card.json holds {ascii(error.object)[:_MAX_SHOWN]}, expected text that UTF-8 can write; {_ADVICE}"
        ) from error
    if not same_keys:
        _check_keys(document, msgspec.to_builtins(value), "")
    return value


def write(value: Any) -> str:
    """Return a dataclass as indented JSON that ends in a newline; `read` gives the same value back.

    Raises:
        BundleError: `read` would refuse it.
    """
    document = msgspec.to_builtins(value)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    read(type(value), text)
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BundleError(f"card.json has the key {twice!r} twice, expected once; delete one")
    return document


def _no_constant(constant: str) -> Any:
    raise BundleError(f"card.json holds {constant}, expected finite numbers only; measure that number again")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_constant(_shortened(digits))


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise BundleError(
            f"card.json holds an integer of {len(digits)} digits, {_shortened(digits, 20)}, expected at most "
            f"{MAX_DIGITS}; {_ADVICE}"
        )
    return int(digits)


def _check_keys(read: Any, written: Any, place: str) -> None:
    """Compare the keys of a document with those that it would be written with."""
    if isinstance(written, dict):
        for key in written.keys() - read.keys():
            raise BundleError(f"card.json lacks the key {place + key!r}; add it")
        for key in read.keys() - written.keys():
            raise BundleError(
                f"card.json has the unknown key {place + key!r} = {_shortened(repr(read[key]))}, expected only "
                f"{', '.join(written)}; remove it, or upgrade manygates if the card is newer"
            )
        for key in written:
            _check_keys(read[key], written[key], f"{place}{key}.")
    elif isinstance(written, (tuple, list)):
        for index, pair in enumerate(zip(read, written, strict=True)):
            _check_keys(*pair, f"{place.removesuffix('.')}[{index}].")


def _refusal(kind: type, document: Any, said: str) -> BundleError:
    """Return msgspec's error in words: "Expected `int` >= 1 - at `$.results[0].images`"."""
    sentence, steps, place, value = said, "", "", document
    if found := re.search(r" - at `\$((?:\.\w+|\[\d+\]|\[\.\.\.\])+)`\Z", said):  # else it is of the document itself
        sentence, steps = said[: found.start()], found[1]
    for step in re.findall(r"\w+|\.\.\.", steps):
        if isinstance(value, list):
            place, value = f"{place}[{step}]", value[int(step)]
        else:  # msgspec writes "..." for an entry of a mapping
            key = _wrong_entry(kind, document, value, said) if step == "..." else step
            place, value = f"{place}.{key}".removeprefix("."), value[key]
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", sentence):
        return BundleError(f"card.json lacks the key {f'{place}.{missing[1]}'.removeprefix('.')!r}; add it")
    if not sentence.startswith("Expected `"):  # a sentence of a __post_init__
        return BundleError(f"card.json: {place}{'.' if place else ''}{sentence}; {_ADVICE}")
    return BundleError(
        f"card.json: {place or 'the document'} is {_shortened(repr(value))}, expected {_expected(sentence)}; {_ADVICE}"
    )


def _wrong_entry(kind: type, document: Any, mapping: dict[str, Any], said: str) -> str:
    """Return the key of the entry that an error is about: without it the error is another, or there is none."""
    entries = [*mapping.items()]

    def without(number: int) -> bool:
        """Whether the error is gone when the first entries are."""
        mapping.clear()
        mapping.update(entries[number:])
        try:
            msgspec.convert(document, kind)
        except (msgspec.ValidationError, BundleError) as error:
            return str(error) != said
        return True

    found = bisect_left(range(1, len(entries) + 1), True, key=without)
    mapping.clear()
    mapping.update(entries)
    return entries[found][0]


def _expected(sentence: str) -> str:
    """Return what msgspec expected, in words."""
    expected, _, pattern = sentence.removeprefix("Expected ").partition(" matching regex ")
    if pattern:
        return _MEANINGS[pattern]
    kinds, _, bound = expected.partition(", got ")[0].removeprefix("`").partition("`")
    named = " or ".join(_KINDS.get(kind, "null" if kind == "null" else "an object") for kind in kinds.split(" | "))
    return named + bound


def _shortened(text: str, length: int = _MAX_SHOWN) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
