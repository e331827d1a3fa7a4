"""Where models are found: bundled with the package, in a folder, or on the Hugging Face hub.

One spelling everywhere: a catalogue name (`eio-resnet20-cifar10`), `local-dir:FOLDER` (or just a folder that holds a
card.json), or `hf-hub:ORGANISATION/NAME[@REVISION]`.
"""

import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zoo.bundle import CARD_FILE, README_FILE, Bundle
from zoo.card import Card
from zoo.errors import BadInput, BundleError, MissingFile, UnknownName

LOCAL_PREFIX = "local-dir:"
HUB_PREFIX = "hf-hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model's bundle is: in a folder (bundled or local), or in a repository on the hub."""

    kind: Literal["bundled", "local", "hub"]
    folder: Path | None = None
    repository: str | None = None
    """`organisation/name` on the hub."""
    revision: str | None = None
    """A branch, tag or commit of the repository; None is its main branch."""


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
    """
    if model.startswith(LOCAL_PREFIX):
        place = model.removeprefix(LOCAL_PREFIX)
        if not place:
            raise BadInput(f"{model!r} names no folder, expected {LOCAL_PREFIX}FOLDER")
        return Source(kind="local", folder=Path(place).expanduser())
    if model.startswith(HUB_PREFIX):
        return _hub_source(model)
    if model in _bundled_names():
        return Source(kind="bundled", folder=bundled_dir() / model)
    if model and (Path(model).expanduser() / CARD_FILE).is_file():
        return Source(kind="local", folder=Path(model).expanduser())
    if not model or model.startswith((".", "~")) or "/" in model or "\\" in model or Path(model).exists():
        raise BadInput(
            f"{model!r} is no name in the catalogue and no folder with a {CARD_FILE}; write {LOCAL_PREFIX}FOLDER for a "
            f"bundle on this machine or {HUB_PREFIX}ORGANISATION/NAME for one on the hub"
        )
    raise UnknownName(model, _bundled_names(), kind="model")


def open_model(model: str, *, only: Iterable[str] | None = None) -> Bundle:
    """Find `model`, fetch it if it is on the hub, and open its bundle with its checksums checked.

    Args:
        model: a catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME[@REVISION]`.
        only: the files that are needed, like ("single.onnx",); None is all of them. Others are not fetched.

    Raises:
        BadInput, UnknownName: as `resolve`, and if the hub has no such repository or cannot be reached.
        BundleError: as `Bundle.open`.
    """
    source = resolve(model)
    wanted = None if only is None else tuple(only)
    if source.kind == "hub":
        return Bundle.open(_fetch(source, wanted), only=wanted)
    assert source.folder is not None
    return Bundle.open(source.folder, only=wanted)


def _bundled_names() -> list[str]:
    folder = bundled_dir()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CARD_FILE).is_file())


def _bundled_card(name: str) -> Card:
    card = Bundle.open(bundled_dir() / name, only=()).card
    if card.name != name:
        raise BundleError(f"the bundled folder {name!r} holds the card of {card.name!r}; rename one of them")
    return card


def _hub_source(model: str) -> Source:
    repository, _, revision = model.removeprefix(HUB_PREFIX).partition("@")
    if not _HUB_NAME.fullmatch(repository) or (model.endswith("@")):
        raise BadInput(f"{model!r} names no repository, expected {HUB_PREFIX}ORGANISATION/NAME or …/NAME@REVISION")
    return Source(kind="hub", repository=repository, revision=revision or None)


def _fetch(source: Source, wanted: tuple[str, ...] | None) -> Path:
    """Download the card, then exactly the files it lists (and that are wanted), from one commit."""
    folder = _snapshot(source, [CARD_FILE], source.revision)
    if not (folder / CARD_FILE).is_file():
        raise MissingFile(
            f"{HUB_PREFIX}{source.repository} holds no {CARD_FILE}, so it is not a manygates bundle; check the name"
        )
    listed = Bundle.open(folder, only=()).card.files
    names = [name for name in listed if wanted is None or name in wanted]
    # the snapshot's folder is named after its commit, so a push in between cannot mix two versions
    return _snapshot(source, [CARD_FILE, README_FILE, *names], folder.name)


def _snapshot(source: Source, names: list[str], revision: str | None) -> Path:
    import huggingface_hub  # lazily: a bundled or local model needs no HTTP client
    from huggingface_hub import errors

    assert source.repository is not None
    try:
        return Path(huggingface_hub.snapshot_download(source.repository, revision=revision, allow_patterns=names))
    except errors.LocalEntryNotFoundError as error:
        raise BadInput(
            f"cannot fetch {HUB_PREFIX}{source.repository}: the hub cannot be reached (or HF_HUB_OFFLINE is set) and "
            "the model is not in the local cache; connect once, or use local-dir:FOLDER"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(
            f"{HUB_PREFIX}{source.repository} has no revision {revision!r}; name a branch, tag or commit after '@'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"the hub has no repository {source.repository!r} that you may read; check the name, and if it is private "
            "or gated log in with `hf auth login`"
        ) from error
    except (OSError, ValueError) as error:  # the hub's other errors are subclasses of these
        raise BadInput(f"cannot fetch {HUB_PREFIX}{source.repository}: {error}; try again later") from error
