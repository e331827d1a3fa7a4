"""The bundle: a folder with a card, its graphs and its weights, the same on disk, in the wheel and on the hub."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from zoo.bundle.card import Card, FileEntry, check_file_name
from zoo.bundle.readme import model_card
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile
from zoo.files import replace_directory, sha256_of, write_text_atomic

CARD_FILE = "card.json"
README_FILE = "README.md"
EARLY_EXIT_FILE = "early_exit.onnx"
"""The graph of a multi-exit network that stops where it is sure; a file, no variant."""
_MAX_CARD_BYTES = 16 * 2**20


class Bundle:
    """An opened bundle: its card, and files that are what the card says.

    `Bundle.open` and `write_bundle` return one. Each file is checked once: when the bundle is opened, or when the file
    is first asked for.
    """

    def __init__(self, folder: Path, card: Card, *, verify: bool = True) -> None:
        self._folder = folder
        self._card = card
        self._verify = verify
        self._checked: set[str] = set()

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = True, only: Iterable[str] | None = None) -> Self:
        """Open the bundle in `folder` and check its files.

        Args:
            folder: holds `card.json`.
            verify: also compare each file's SHA-256; otherwise only its presence and size.
            only: the names of the files to check now; None checks all that the card lists. A file outside `only` is
                checked when `file` or `read` is called for it.

        Raises:
            MissingFile: if the folder, its card or a file is not there.
            ChecksumMismatch: if a file is not what the card describes.
            BundleError: if the card cannot be read, or lists something unsafe.
        """
        folder = Path(folder)
        card_file = folder / CARD_FILE
        if not folder.is_dir():
            raise MissingFile(f"no folder {folder}; a bundle is a folder with a {CARD_FILE}")
        if not card_file.is_file():
            raise MissingFile(f"{folder} holds no {CARD_FILE}, so it is not a bundle; `manygates export` makes one")
        size = card_file.stat().st_size
        if size > _MAX_CARD_BYTES:
            raise BundleError(f"{card_file} has {size} bytes, expected at most {_MAX_CARD_BYTES}; it is not a card")
        try:
            card = Card.from_json(card_file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BundleError(f"{card_file} is not UTF-8 ({error}); fetch or export the bundle again") from error
        except BundleError as error:
            raise type(error)(f"{folder}: {error}") from error
        quantise = f"quantise it again with `manygates export {folder} --int8`"
        graphs = [(f"{name}.onnx", f"the variant {name!r}", "export it again") for name in variants_in(card, "fp32")]
        graphs += [(int8_file(name), f"an int8 graph of {name!r}", quantise) for name in variants_in(card, "int8")]
        graphs += [(EARLY_EXIT_FILE, f"{len(card.exits)} exits", "export it again")] if card.exits else []
        for name, what, advice in graphs:
            if name not in card.files:
                raise MissingFile(f"{folder}: the card has {what} but lists no {name}; {advice}")
        bundle = cls(folder, card, verify=verify)
        for name in card.files if only is None else only:
            bundle.file(name)
        return bundle

    @property
    def card(self) -> Card:
        """The card as it was read."""
        return self._card

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return self._folder

    def has_variant(self, variant: str) -> bool:
        """Whether there is a graph for `variant` (`single`, `ensemble` or `gated`)."""
        return variant in self._card.variants

    def has_int8(self, variant: str) -> bool:
        """Whether there is an int8 graph for `variant` (`single`, `ensemble` or `gated`)."""
        return self._card.int8 is not None and variant in self._card.int8.variants

    def file(self, name: str) -> Path:
        """Return where a listed file is, checked.

        Raises:
            MissingFile: if the card does not list it, or it is not on the disk.
            ChecksumMismatch: if it is not the file that the card describes.
        """
        place, entry = self._entry(name)
        if name not in self._checked:
            size = place.stat().st_size
            if size != entry.size:
                raise _mismatch(place, f"{size} bytes", f"{entry.size} bytes")
            if self._verify:
                digest = sha256_of(place)
                if digest != entry.sha256:
                    raise _mismatch(place, f"sha256 {digest}", f"sha256 {entry.sha256}")
            self._checked.add(name)
        return place

    def read(self, name: str) -> bytes:
        """Return a listed file's content; the very bytes returned are what was checked. Raises as `file`."""
        place, entry = self._entry(name)
        if place.stat().st_size != entry.size:
            raise _mismatch(place, f"{place.stat().st_size} bytes", f"{entry.size} bytes")
        content = place.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._verify and digest != entry.sha256:
            raise _mismatch(place, f"sha256 {digest}", f"sha256 {entry.sha256}")
        return content

    def with_card(self, card: Card) -> Self:
        """Write another card, and the README made from it, for the same files; returns the bundle with it.

        Raises:
            BadInput: the card lists other files; `write_bundle` writes those.
            BundleError: a value of the card is out of range.
        """
        if card.files != self._card.files:
            raise BadInput(
                f"the card lists {', '.join(card.files) or 'no files'}, expected the files that are in {self._folder} "
                "and their checksums; write a bundle of them first"
            )
        for name, text in _described(card).items():
            write_text_atomic(self._folder / name, text)
        changed = type(self)(self._folder, card, verify=self._verify)
        changed._checked = self._checked
        return changed

    def _entry(self, name: str) -> tuple[Path, FileEntry]:
        entry = self._card.files.get(name)
        if entry is None:
            listed = ", ".join(self._card.files) or "no files"
            raise MissingFile(f"the bundle {self._card.name!r} lists no {name!r}, only {listed}")
        place = self._folder / name
        if not place.is_file():
            raise MissingFile(f"{place} is listed in the card and not there; fetch or export the bundle again")
        return place, entry


def int8_file(variant: str) -> str:
    """Return the name of a variant's int8 graph."""
    return f"{variant}.int8.onnx"


def variants_in(card: Card, precision: str) -> tuple[str, ...]:
    """Return the variants that have a graph in a precision, "fp32" or "int8"."""
    if precision == "fp32":
        return card.variants
    return () if card.int8 is None else card.int8.variants


def _described(card: Card) -> dict[str, str]:
    """Return the text of the files that say what the others are."""
    return {CARD_FILE: card.to_json(), README_FILE: model_card(card)}


def write_bundle(folder: Path | str, card: Card, files: Mapping[str, bytes | Path | str]) -> Bundle:
    """Write a bundle, replacing the one that `folder` held in one step.

    Args:
        folder: created, and replaced as a whole if it holds a bundle.
        card: its `files` are ignored and filled in from `files`.
        files: the content of each file, or the file to copy it from.

    Raises:
        BadInput: if `folder` holds something that is not part of a bundle (it would be lost).
        BundleError: if a name is unsafe, or the card names a variant without its graph.
    """
    folder = Path(folder)
    check_target(folder)
    for name in files:
        check_file_name(name)
    with replace_directory(folder) as new_dir:
        entries = {}
        for name, content in files.items():
            read = content if isinstance(content, bytes) else Path(content).read_bytes()
            (new_dir / name).write_bytes(read)
            entries[name] = FileEntry(sha256=hashlib.sha256(read).hexdigest(), size=len(read))
        for name, text in _described(replace(card, files=entries)).items():
            (new_dir / name).write_text(text, encoding="utf-8", newline="\n")
        Bundle.open(new_dir)
    return Bundle.open(folder)


def check_target(folder: Path) -> None:
    """Check that a bundle may be written to `folder`; for callers that do long work before they write.

    Raises:
        BadInput: if it is a file, or holds something that is not part of a bundle (it would be lost).
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file, expected a directory or nothing; choose another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        listed = Bundle.open(folder, verify=False, only=()).card.files
    except BundleError as error:
        raise BadInput(
            f"{folder} is not empty and holds no bundle, so its content would be lost; choose an empty or new folder"
        ) from error
    for entry in folder.iterdir():
        if entry.name not in (CARD_FILE, README_FILE, *listed) or not entry.is_file():
            raise BadInput(
                f"{folder} holds {entry.name!r}, which is no part of its bundle and would be lost; "
                "choose an empty or new folder"
            )


def _mismatch(place: Path, found: str, expected: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{place} has {found}, its card says {expected}; it is damaged or was changed, so fetch or export it again"
    )
