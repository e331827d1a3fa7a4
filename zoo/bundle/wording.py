"""How a report spells numbers, terms and names. What comes from a card may be hostile, so `plain` goes first."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from zoo.bundle.card import Result

EN_DASH = "\N{EN DASH}"
MISSING = EN_DASH
FAILED = "†"
SUSPECT = "‡"
UNLESS = ", unless said otherwise"

_PROTOCOLS = {
    "clean": "clean",
    "whitebox": "white-box",
    "blackbox": "black-box",
    "autoattack": "AutoAttack",
    "random-gates": "random gates",
    "transfer-matrix": "transfer between paths",
    "diversity": "diversity",
    "corruptions": "corruptions",
    "exits": "exits",
    "queries": "queries",
}
PROTOCOL_ORDER = tuple(_PROTOCOLS)
# control characters, halves of surrogate pairs, unassigned code points, and what silently reverses or hides text
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Cn", "Co"})
_JOINERS = "\u200c\u200d"


def plain(text: str) -> str:
    """Return one line of printable text: any white space becomes a blank, what cannot be printed U+FFFD."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return text with its lines, in which what cannot be printed (a terminal's commands, say) is U+FFFD."""
    shown = (
        "\ufffd"
        if unicodedata.category(character) in _UNPRINTABLE and character not in _JOINERS and character != "\n"
        else character
        for character in text
    )
    return "".join(shown)


def slug(text: str, taken: Iterable[str] = ()) -> str:
    """Return a file name's stem of a-z, 0-9 and '-' that is not among those `taken`."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:72].strip("-") or "figure"
    names, number, name = set(taken), 1, stem
    while name in names:
        number += 1
        name = f"{stem}-{number}"
    return name


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as per cent; None (nothing was measured) is a dash."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def digits_for(images: int) -> int:
    """Return how many decimals of a per cent a sample of this size supports."""
    return 1 if images <= 1000 else 2


def accuracy(result: Result) -> str:
    """Write a measured accuracy."""
    return percent(result.accuracy, digits_for(result.images))


def interval(result: Result) -> str:
    """Write a 95 % interval, in per cent."""
    digits = digits_for(result.images)
    low, high = result.interval
    return f"{100 * low:.{digits}f}{EN_DASH}{100 * high:.{digits}f}"


def number(value: float | None) -> str:
    """Write a number that is no share."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def norm(name: str) -> str:
    """Write a norm: ℓ∞ or ℓ2."""
    return {"linf": "\N{SCRIPT SMALL L}∞", "l2": "\N{SCRIPT SMALL L}2"}.get(name, name)


def terms(result: Result) -> str:
    """Write on what terms an accuracy was measured; two numbers compare only if these are the same."""
    parts = []
    if result.steps:
        parts.append(f"{plural(result.steps, 'step')}{_step_size(result)}")
    if result.restarts > 1 or (result.restarts and result.steps):
        parts.append(plural(result.restarts, "restart"))
    if result.draws:
        parts.append(plural(result.draws, "draw"))
    parts += [plural(result.images, "image"), f"seed {result.seed}"]
    return ", ".join(parts)


def usual_terms(results: Iterable[Result]) -> str:
    """Return the terms that most of the results share, the first of them if it is a draw."""
    counted = Counter(terms(result) for result in results)
    return max(counted, key=lambda said: counted[said], default="")


def apart(result: Result, usual: str) -> str:
    """Return what is unusual about a result's terms; empty if nothing is."""
    said = terms(result)
    if said == usual:
        return ""
    # where it only lacks something, like restarts, all of its terms have to be said
    return ", ".join(part for part in said.split(", ") if part not in usual.split(", ")) or said


def measured(result: Result) -> str:
    """Name what was measured, without eps: "white-box PGD", "AutoAttack", "random gates, pointwise minimum"."""
    protocol, attack = _PROTOCOLS.get(result.protocol, plain(result.protocol)), plain(result.attack)
    if result.protocol == "corruptions":
        return corruptions(result)
    if attack in ("none", protocol):
        return protocol
    joined = f"{protocol} {attack}" if result.protocol in ("whitebox", "blackbox") else f"{protocol}, {attack}"
    return joined if result.norm == "linf" else f"{joined}, {norm(result.norm)}"


def corruptions(result: Result) -> str:
    """Name the corrupted images; ours are never called by the name of the official files."""
    if "synthetic" in result.note.casefold():
        return "synthetic corruptions"
    return "CIFAR-10-C" if "CIFAR-10-C" in result.note and "not CIFAR-10-C" not in result.note else "corruptions"


def eps(result: Result) -> str:
    """Write an attack's eps; empty where there is none."""
    return f"ε {result.eps_fraction}" if result.eps else ""


def eps_text(value: Fraction) -> str:
    """Write a radius as people do: 0.01, 0.3, and 8/255 where no short decimal is exact."""
    decimal = f"{float(value):.4g}"
    return decimal if Fraction(decimal) == value else str(value)


def _step_size(result: Result) -> str:
    if not result.step_size:
        return ""
    parts = result.eps / result.step_size
    if parts >= 1 and abs(parts - round(parts)) < 1e-4 * parts:
        return " of ε" if round(parts) == 1 else f" of ε/{round(parts)}"
    return f" of {result.step_size:g}"


def measured_at(result: Result) -> str:
    """Name what was measured, with eps."""
    return ", ".join(part for part in (measured(result), eps(result)) if part)


def only(values: Iterable[str]) -> str | None:
    """Return the one value that there is, None if there are several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def plural(many: int, noun: str, several: str = "") -> str:
    """Write a count with its noun, which takes an s unless its plural is given."""
    return f"{many:,} {noun if many == 1 else several or noun + 's'}"


def capital(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def terms_remark(results: Iterable[Result]) -> str:
    """Say the terms of results shown together, and whether they are equal."""
    listed = list(results)
    usual = usual_terms(listed)
    differ = any(terms(result) != usual for result in listed)
    return f"Terms: {usual}{UNLESS + '; where they differ, compare with care' if differ else ''}."
