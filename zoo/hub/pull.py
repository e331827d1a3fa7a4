"""Fetching a model, whole or only what some of its variants need, and copying it into a folder of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zoo.bundle.bundle import CARD_FILE, EARLY_EXIT_FILE, Bundle, check_target, int8_file, write_bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, UnknownName
from zoo.hub.source import Found, find
from zoo.vocabulary import INT8


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A model that is on this machine, checked."""

    source: str
    """Where it came from; a model of the hub with its commit."""
    card: Card
    """As it is in `folder`: of a copy of some variants, only what is said of those."""
    folder: Path
    files: tuple[str, ...]
    """The files of the card that are there."""


def pull(model: str, *, variants: Sequence[str] = (), precision: str | None = None, out: Path | None = None) -> Pulled:
    """Fetch a model and check it.

    Args:
        model: a catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME[@REVISION]`.
        variants: fetch only the graphs of these, and no weights; none is the whole bundle.
        precision: "int8" for the int8 graphs alone, "fp32" for the others alone; None is both, of a whole bundle.
        out: copy it there, as a bundle of what was fetched; None leaves it where it is.

    Raises:
        UnknownName: the model has no such variant.
        BadInput: it has no int8 graph of a variant, or `out` holds something else that would be lost, another model or
            more files of this one among it, or cannot be written.
        ManygatesError: as `open_model`.
    """
    if out is not None:
        try:
            check_target(out)
        except OSError as error:  # a name that no file can have
            raise BadInput(f"cannot write to {out}: {error.strerror}; choose another place") from error
    found = find(model)
    card = found.card
    for variant in variants:
        if variant not in card.variants:
            raise UnknownName(variant, card.variants, kind=f"variant of {card.name}")
    if not variants and precision is None:
        return _put(found, card, tuple(card.files), out)
    chosen = tuple(variant for variant in card.variants if variant in (variants or card.variants))
    rounded = _rounded(card, chosen, bool(variants)) if precision == "int8" else ()
    # a bundle must hold the float32 twin of an int8 graph; in the cache it need not be
    plain = chosen if precision != "int8" else rounded if out is not None else ()
    names = [f"{variant}.onnx" for variant in plain] + [int8_file(variant) for variant in rounded]
    names += [EARLY_EXIT_FILE] if card.exits and plain else []
    files = tuple(name for name in card.files if name in names)
    card = card if out is None else part_of(card, plain, rounded)
    return _put(found, card, files, out)


def part_of(card: Card, variants: Sequence[str], rounded: Sequence[str] = ()) -> Card:
    """Return the card of a bundle that holds only the graphs of some variants, and the int8 graphs of `rounded`."""

    def kept(measured: str) -> bool:
        plain = measured.removesuffix(INT8)
        return plain in variants and (plain in rounded or not measured.endswith(INT8))

    return replace(
        card,
        variants=tuple(variants),
        int8=replace(card.int8, variants=tuple(rounded)) if card.int8 and rounded else None,
        results=tuple(result for result in card.results if kept(result.variant)),
        lint=tuple(lint for lint in card.lint if kept(lint.variant)),
    )


def _rounded(card: Card, chosen: Sequence[str], named: bool) -> tuple[str, ...]:
    """Return which of the chosen variants have int8 graphs: all of them if they were named."""
    there = () if card.int8 is None else card.int8.variants
    missing = [variant for variant in chosen if variant not in there]
    if missing and (named or not there):
        raise BadInput(
            f"{card.name} has no int8 graph of {', '.join(missing)}, only of {', '.join(there) or 'none'}; leave "
            "--precision int8 out, or make one with `manygates export BUNDLE --int8`"
        )
    return tuple(variant for variant in chosen if variant in there)


def _check_not_lost(out: Path, card: Card, files: Sequence[str]) -> None:
    """Check that a bundle in the way is an earlier copy of the same files, which this one may replace.

    Raises:
        BadInput: if it is of another model, or holds a file that this copy does not.
    """
    if not (out / CARD_FILE).is_file():
        return
    old = Bundle.open(out, verify=False, only=()).card
    lost = sorted(set(old.files) - set(files))
    if old.name != card.name or lost:
        what = f"the model {old.name!r}" if old.name != card.name else f"{', '.join(lost)}, which this copy lacks"
        raise BadInput(f"{out} holds {what}, and would lose it; choose another folder, or remove that one first")


def _put(found: Found, card: Card, files: tuple[str, ...], out: Path | None) -> Pulled:
    """Fetch and check files, and copy them unless they may stay where they are."""
    bundle = found.open(files)
    if out is None:
        return Pulled(source=found.name, card=bundle.card, folder=bundle.folder, files=files)
    _check_not_lost(out, card, files)
    try:
        copy = write_bundle(out, card, {name: bundle.read(name) for name in files})
    except OSError as error:
        size = sum(bundle.card.files[name].size for name in files)
        raise BadInput(
            f"cannot write {size / 1e6:.1f} MB to {out}: {error.strerror}; nothing is left there, choose another place"
        ) from error
    return Pulled(source=found.name, card=copy.card, folder=out, files=files)
