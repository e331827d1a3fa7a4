"""What `manygates list` prints: the catalogue as a table per data set, or as one JSON document."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from zoo.bundle.wording import eps_text, plain
from zoo.errors import BadInput, UnknownName
from zoo.hub.catalog import AUTOATTACK, FAILED, NOT_LINTED, TRANSFER, WHITEBOX, Entry, Measured, eps_shown

KINDS = {"whitebox": WHITEBOX, "transfer": TRANSFER, "autoattack": AUTOATTACK}
"""What `sort` can name beside "name", "method" and "clean"; each may be followed by ":EPS"."""
SORTS = ("name", "method", "clean", *KINDS)
MANY_IMAGES = 1000
_CLEAN = (("clean",), Fraction(0))
_HEADS = {"whitebox": "white-box", "transfer": "transfer", "autoattack": "AutoAttack"}
_NUMBERS = 4
"""So many columns stand before those of attacks."""
_LINTER = {"passed": "ok", FAILED: "ALARM", NOT_LINTED: "-"}


def select(
    entries: Sequence[Entry], *, dataset: str | None = None, method: str | None = None, sort: str | None = None
) -> list[Entry]:
    """Return the entries of a data set and a method, in the order asked for: numbers from high to low, missing last.

    Args:
        entries: the catalogue.
        dataset: its name; None is any.
        method: its name; None is any.
        sort: "name" (the default), "method", "clean", or "whitebox", "transfer" or "autoattack" at the lowest radius
            that is shown, or at the radius that stands behind a colon: "whitebox:8/255".

    Raises:
        UnknownName: no model has such a data set or method.
        BadInput: there is no such order.
    """
    for kind, wanted in (("dataset", dataset), ("method", method)):
        known = {getattr(entry, kind) for entry in entries}
        if wanted is not None and wanted not in known:
            raise UnknownName(wanted, known, kind="data set" if kind == "dataset" else kind)
    found = [entry for entry in entries if dataset in (None, entry.dataset) and method in (None, entry.method)]
    return sorted(found, key=_order(found, sort or "name"))


def _order(entries: Sequence[Entry], sort: str) -> Callable[[Entry], tuple[Any, ...]]:
    name, _, radius = sort.partition(":")
    if name not in SORTS or (radius and name not in KINDS):
        raise BadInput(
            f"--sort is {sort!r}, expected one of {', '.join(SORTS)}; the last three may name a radius: whitebox:8/255"
        )
    if name == "name":
        return lambda entry: (entry.name, entry.source)
    if name == "method":
        return lambda entry: (entry.method, entry.name, entry.source)
    try:
        eps = Fraction(radius) if radius else None
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"--sort is {sort!r}, expected a radius such as 0.01 or 8/255 behind the colon") from error

    def key(entry: Entry) -> tuple[Any, ...]:
        if name == "clean":
            found = entry.measured(*_CLEAN)
        else:
            places = [eps] if eps is not None else _shown(entries, entry.dataset, KINDS[name])[:1]
            found = entry.measured(KINDS[name], places[0]) if places else None
        return (found is None, 0.0 if found is None else -found.accuracy, entry.name, entry.source)

    return key


def documents(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the entries as JSON values."""
    return [
        {
            **json.loads(json.dumps(dataclasses.asdict(entry))),
            "suspect": list(entry.suspect),
            "source": entry.source,
        }
        for entry in entries
    ]


def tables(entries: Sequence[Entry]) -> str:
    """Return a table per data set, with what its marks mean below; ends in a newline."""
    if not entries:
        return "no model is known here; `manygates catalog refresh` asks the hub\n"
    blocks = []
    for dataset in sorted({entry.dataset for entry in entries}):
        blocks.append("\n".join(_table(dataset, [entry for entry in entries if entry.dataset == dataset])))
    said = [
        "Accuracy in per cent of the variant named: as the images are (clean), and after an l_inf attack of that "
        "radius.\nwhite-box: PGD by one who has the weights (random gates: the minimum of many attacks); "
        "transfer: attacks made on\nsurrogates."
    ]
    if any("*" in block for block in blocks):
        said.append(f"* measured on fewer than {MANY_IMAGES:,} images.")
    if any(entry.suspect for entry in entries):
        said.append("ALARM: the robustness linter found that the numbers of these variants may flatter them.")
    if any(not entry.where.bundled for entry in entries):
        said.append("What does not come with manygates: `manygates show NAME` says how to get it.")
    return "\n\n".join([*blocks, "\n".join(said)]) + "\n"


def _table(dataset: str, entries: Sequence[Entry]) -> list[str]:
    columns = [(kind, eps) for kind, protocols in KINDS.items() for eps in _shown(entries, dataset, protocols)]
    rows = [
        (
            plain(dataset),
            "network",
            "variant",
            "clean",
            *(eps_text(eps) for _, eps in columns),
            "lint",
            "from",
        )
    ]
    for entry in entries:
        alarms = f"ALARM: {', '.join(entry.suspect)}" if entry.suspect else _LINTER[entry.linter(entry.main)]
        rows.append(
            (
                plain(entry.source if not entry.where.commands else entry.name),
                plain(entry.architecture),
                entry.main,
                _number(entry.measured(*_CLEAN), 2),
                *(_number(entry.measured(KINDS[kind], eps), 1) for kind, eps in columns),
                alarms,
                _origin(entry),
            )
        )
    # the names of attacks stand over their radii, which are given the room for it
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    above = " " * sum(width + 2 for width in widths[:_NUMBERS])
    place = _NUMBERS
    for kind in dict.fromkeys(kind for kind, _ in columns):
        span = sum(other == kind for other, _ in columns)
        room = sum(width + 2 for width in widths[place : place + span]) - 2
        missing = max(0, len(_HEADS[kind]) + 2 - room)
        widths[place] += missing
        room += missing
        above += f" {_HEADS[kind]} ".center(room, "-") + "  "
        place += span
    return [
        *([above.rstrip()] if columns else []),
        *(
            "  ".join(
                cell.rjust(width) if _NUMBERS - 1 <= index < len(row) - 2 else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ),
    ]


def _shown(entries: Sequence[Entry], dataset: str, protocols: Sequence[str]) -> list[Fraction]:
    """Return the radii at which the main variants of a data set's models are compared."""
    return eps_shown(
        Fraction(result.eps_fraction)
        for entry in entries
        if entry.dataset == dataset
        for result in entry.results
        if result.protocol in protocols and result.variant == entry.main and result.norm == "linf"
    )


def _number(found: Measured | None, digits: int) -> str:
    if found is None:
        return "-"
    return f"{100 * found.accuracy:.{digits}f}" + ("*" if found.images < MANY_IMAGES else "")


def _origin(entry: Entry) -> str:
    if entry.where.bundled:
        return "bundled"
    if entry.where.repository is not None:
        return "hub"
    return f"train {entry.trained.recipe}" if entry.where.commands else "-"
