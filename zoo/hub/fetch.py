"""Bundles fetched from the Hugging Face hub: the card first, then the files that are wanted, all from one commit.

A file becomes visible in huggingface_hub's cache when it is complete; what does not fit its card is taken out again.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from zoo.bundle.bundle import CARD_FILE, README_FILE, Bundle
from zoo.bundle.card import Card
from zoo.bundle.readme import TAG
from zoo.errors import BadInput, BundleError, ChecksumMismatch, MissingFile
from zoo.files import sha256_of
from zoo.hub.client import Refused, bars, named, translated, waiting, without_network

logger = logging.getLogger(__name__)


def fetch_card(repository: str, revision: str | None = None) -> Bundle:
    """Fetch the card of a bundle alone; `fetch_files` then fetches files from the same commit.

    What the cache holds is not fetched again; without a network, or with HF_HUB_OFFLINE=1, it is all there is. The
    folder of the bundle is named after the commit; `revision` None is the main branch.

    Raises:
        BadInput: if there is no such repository or revision, the hub cannot be reached, or the disk is full.
        MissingFile: if the repository holds no bundle.
        ChecksumMismatch: if the card in the cache is not what the hub sent; it is removed from the cache.
        BundleError: if the card cannot be read, or is newer than this version; the error names the repository.
    """
    folder = _snapshot(repository, revision, [CARD_FILE], first=True)
    if not (folder / CARD_FILE).is_file():
        _check_answer(repository, revision, [CARD_FILE])
        _discard(folder, ())
        raise MissingFile(
            f"{named(repository, None)} holds no {CARD_FILE}, so it is not a manygates bundle; check the name"
        )
    if _is_damaged(folder / CARD_FILE):
        removed = _discard(folder, [CARD_FILE], everywhere=True)
        raise ChecksumMismatch(
            f"{folder / CARD_FILE} is not what the hub sent: it was damaged or changed in the cache, and {removed}"
            f"{_again()}"
        )
    try:
        return Bundle.open(folder, only=())
    except BundleError as error:
        source = named(repository, folder.name)
        raise type(error)(f"the card of {source}: {str(error).removeprefix(f'{folder}: ')}") from error


def fetch_files(repository: str, bundle: Bundle, only: Iterable[str] | None = None) -> None:
    """Fetch the files named in `only`, or all, of a bundle from `fetch_card`, from the same commit, and check them.

    Raises:
        BadInput: if the hub cannot be reached, or the disk is full.
        MissingFile: if the repository holds not all of the files.
        ChecksumMismatch: if a file is not what the card says; it is removed from the cache.
    """
    folder, wanted = bundle.folder, None if only is None else tuple(only)
    names = [name for name in bundle.card.files if wanted is None or name in wanted]
    if names:
        # the folder is named after its commit, so a push in between cannot mix two versions
        _snapshot(repository, folder.name, [CARD_FILE, *names])
    if absent := [name for name in names if not (folder / name).is_file()]:
        _check_answer(repository, folder.name, absent)
        raise MissingFile(
            f"{named(repository, folder.name)} holds no {', '.join(absent)}, which its card lists; its owner must push "
            "it again"
        )
    try:
        for name in wanted if wanted is not None else names:
            bundle.file(name)
    except ChecksumMismatch as error:
        raise ChecksumMismatch(f"{error}. {_discarded(bundle)}") from error


def hub_cards(author: str | None = None) -> list[tuple[str, str, Card]]:
    """Return the repository, commit and card of every bundle on the hub, sorted by repository; nothing else is fetched.

    A repository whose card cannot be read (broken, newer, private, blocked) is left out with a warning on the log.
    `author` is an organisation or user; None is everybody.

    Raises:
        BadInput: if the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    doing = "list the hub's models" + (f" of {author}" if author else "")
    with translated(doing, author or ""), waiting(doing):
        if not constants.HF_HUB_OFFLINE:  # without retries: the list itself would try for half a minute
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        listed = sorted((info.id, info.sha) for info in huggingface_hub.list_models(filter=TAG, author=author))
    found = []
    for repository, commit in listed:
        try:
            bundle = fetch_card(repository, commit)
            found.append((repository, bundle.folder.name, bundle.card))
        except (BundleError, Refused) as error:
            logger.warning("left out: %s", error)
    return found


def _check_answer(repository: str, revision: str | None, names: list[str]) -> None:
    """Make sure that it is the hub that says that files are not there, and not a cache that holds only some.

    Raises:
        BadInput: if the hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub import constants

    doing = f"fetch {named(repository, revision)}"
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"cannot {doing}: {without_network(repository, revision, names)}")
    with translated(doing, repository, revision, names):
        huggingface_hub.file_exists(repository, names[0], revision=revision)


def _discarded(bundle: Bundle) -> str:
    """Take what does not fit its card out of the cache, and say whose fault it was."""
    folder, card = bundle.folder, bundle.card
    places = {name: folder / name for name in card.files if (folder / name).is_file()}
    if damaged := [name for name, place in places.items() if _is_damaged(place)]:
        removed = _discard(folder, damaged, everywhere=True)
        return f"In the cache {', '.join(damaged)} is not what the hub sent, and {removed}{_again()}"
    linked = all(place.is_symlink() for place in places.values())  # else the cache cannot tell
    removed = _discard(folder, [CARD_FILE, README_FILE, *card.files])
    so = "The hub itself holds it so" if linked else "If it is so the next time too, the hub itself holds it so"
    return f"{so}: the model's owner must push it again. This revision {removed}"


def _snapshot(repository: str, revision: str | None, names: list[str], *, first: bool = False) -> Path:
    """Bring files into the cache, and return the folder of their commit.

    Where they are the `first` that is asked of the hub, it is said if it does not answer, and no bars are drawn.
    """
    from huggingface_hub import snapshot_download  # lazily: a bundled or local model needs no HTTP client

    doing = f"fetch {named(repository, revision)}"
    patience = waiting(doing) if first else nullcontext()
    with translated(doing, repository, revision, names), patience, bars(wanted=not first):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names))


# --- what is in the cache ---


def _is_damaged(place: Path) -> bool:
    """Whether a file in the cache is not what the hub sent; the cache names a file's content by its digest there."""
    from huggingface_hub.utils.sha import git_hash

    if not place.is_symlink():  # a file system without links: nothing to compare with
        return False
    name = place.readlink().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return sha256_of(place) != name
    return re.fullmatch(r"[0-9a-f]{40}", name) is not None and git_hash(place.read_bytes()) != name


def _discard(folder: Path, names: Iterable[str], *, everywhere: bool = False) -> str:
    """Take files out of the cache's REPOSITORY/snapshots/COMMIT, and say what became of them.

    What nothing refers to any more goes too; other files, which another program may have put there, stay. `everywhere`
    takes the very same content out of other commits as well.
    """
    try:
        _remove(folder, names, everywhere)
    except OSError as error:  # a cache that is mounted read-only
        return f"cannot be removed from it ({error.strerror}): replace the cache {folder.parents[2]}"
    return "is removed"


def _again() -> str:
    from huggingface_hub import constants

    where = " where there is a network (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return f"; the same command fetches it again{where}"


def _remove(folder: Path, names: Iterable[str], everywhere: bool) -> None:
    repository_dir = folder.parent.parent
    for place in [folder / name for name in names]:
        blob = place.parent / place.readlink() if place.is_symlink() else None
        if blob is not None:
            target = blob.resolve()
            others = [link for link in repository_dir.glob("snapshots/**/*") if link.resolve() == target]
            for link in others if everywhere else ():
                link.unlink(missing_ok=True)
            if everywhere or others == [place]:
                blob.unlink(missing_ok=True)
            if everywhere:
                target.unlink(missing_ok=True)  # of a store that several repositories share
        place.unlink(missing_ok=True)
    if folder.is_dir() and any(folder.iterdir()):
        return
    shutil.rmtree(folder, ignore_errors=True)
    (repository_dir / "trees" / f"{folder.name}.json").unlink(missing_ok=True)
    for reference in repository_dir.glob("refs/**/*"):
        if reference.is_file() and reference.read_text(encoding="utf-8") == folder.name:
            reference.unlink()
    if not any(place.is_file() for kind in ("snapshots", "blobs") for place in repository_dir.glob(f"{kind}/**/*")):
        shutil.rmtree(repository_dir, ignore_errors=True)
