"""Where models are found: bundled with the package, in a folder, or on the Hugging Face hub.

One spelling everywhere: a catalogue name (`eio-resnet20-cifar10`), `local-dir:FOLDER` (or just a folder that holds a
card.json), or `hf-hub:ORGANISATION/NAME[@REVISION]`.
"""

import importlib.resources
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zoo.bundle.bundle import CARD_FILE, Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, ManygatesError, UnknownName
from zoo.hub.hub import HUB_PREFIX as HUB_PREFIX
from zoo.hub.hub import fetch, parse_repository, pinned

LOCAL_PREFIX = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model's bundle is: in a folder (bundled or local), or in a repository on the hub."""

    kind: Literal["bundled", "local", "hub"]
    folder: Path | None = None
    repository: str | None = None
    """`organisation/name` on the hub."""
    revision: str | None = None
    """A branch, tag or commit of the repository; None is its main branch."""

    def open(self, only: Iterable[str] | Callable[[Card], Iterable[str]] | None = None) -> Bundle:
        """Fetch the model if it is on the hub, and open its bundle with its checksums checked.

        Args:
            only: the files that are needed, like ("single.onnx",), or what says so of the card; None is all of them.
                Others are not fetched.

        Raises:
            BadInput: if the hub has no such repository or cannot be reached.
            BundleError: as `Bundle.open`.
        """
        if self.kind == "hub":
            assert self.repository is not None
            return fetch(self.repository, self.revision, only)
        assert self.folder is not None
        if not callable(only):
            return Bundle.open(self.folder, only=only)
        bundle = Bundle.open(self.folder, only=())
        for name in only(bundle.card):
            bundle.file(name)
        return bundle


def bundled_dir() -> Path:
    """Return the folder inside the package that holds one bundle per model; it need not exist."""
    return Path(str(importlib.resources.files("zoo") / "bundles"))


def list_bundled() -> list[Card]:
    """Return the cards of the models that come with the package, sorted by name; their files are not checked."""
    return [_bundled_card(name) for name in _bundled_names()]


def resolve(model: str) -> Source:
    """Say where `model` is to be found, without fetching or opening it.

    Raises:
        BadInput: if it is empty, a malformed repository, or looks like a folder that holds no card.
        UnknownName: if it is no name in the catalogue; the message lists those.

    A model that is in the catalogue and not bundled is no name either: BadInput says how to pull or train it. It is not
    fetched by that name, because anybody may publish a model under any name; a repository says whose it is.
    """
    if model.startswith(LOCAL_PREFIX):
        place = model.removeprefix(LOCAL_PREFIX)
        if not place:
            raise BadInput(f"{model!r} names no folder, expected {LOCAL_PREFIX}FOLDER")
        return Source(kind="local", folder=_at_home(place))
    if model.startswith(HUB_PREFIX):
        repository, revision = parse_repository(model.removeprefix(HUB_PREFIX))
        return Source(kind="hub", repository=repository, revision=revision)
    if model in _bundled_names():
        return Source(kind="bundled", folder=bundled_dir() / model)
    if model and ((folder := _at_home(model)) / CARD_FILE).is_file():
        return Source(kind="local", folder=folder)
    if not model or model.startswith((".", "~")) or "/" in model or "\\" in model or Path(model).exists():
        raise BadInput(
            f"{model!r} is no name in the catalogue and no folder with a {CARD_FILE}; write {LOCAL_PREFIX}FOLDER for a "
            f"bundle on this machine or {HUB_PREFIX}ORGANISATION/NAME for one on the hub"
        )
    raise _not_here(model)


def open_model(model: str, *, only: Iterable[str] | None = None) -> Bundle:
    """Find `model`, fetch it if it is on the hub, and open its bundle with its checksums checked.

    Args:
        model: a catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME[@REVISION]`.
        only: the files that are needed, like ("single.onnx",); None is all of them. Others are not fetched.

    Raises:
        BadInput, UnknownName: as `resolve`, and if the hub has no such repository or cannot be reached.
        BundleError: as `Bundle.open`.
    """
    return resolve(model).open(only)


def pin(model: str) -> tuple[str, Card]:
    """Return a name of the very version of `model` that is there now, and its card.

    A model of the hub gets its commit: what is opened by the returned name is of one version, and asks the hub for
    nothing that is in the cache.

    Raises:
        ManygatesError: as `open_model`.
    """
    bundle = open_model(model, only=())
    source = resolve(model)
    return (model if source.repository is None else pinned(source.repository, bundle)), bundle.card


def _at_home(place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{place!r} is below a home folder that nobody knows here; write the whole path") from error


def _bundled_names() -> list[str]:
    folder = bundled_dir()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CARD_FILE).is_file())


def _not_here(model: str) -> ManygatesError:
    """Say how to get a model that the catalogue knows, or which ones there are."""
    from zoo.hub import catalog  # it needs this module

    entries = catalog.load()
    entry = catalog.entry(model)
    if entry is not None:
        return BadInput(f"{model!r} is in the catalogue and does not come with manygates: {entry.how_to_get()}")
    return UnknownName(model, {*_bundled_names(), *(entry.name for entry in entries)}, kind="model")


def _bundled_card(name: str) -> Card:
    card = Bundle.open(bundled_dir() / name, only=()).card
    if card.name != name:
        raise BundleError(f"the bundled folder {name!r} holds the card of {card.name!r}; rename one of them")
    return card
