"""Bundles on the Hugging Face hub: fetched from one commit, checked, listed and published.

Files are kept in huggingface_hub's own cache, and its token is the only one that is used. A file becomes visible in the
cache when it is complete; what does not fit its card is taken out of the cache again.
"""

import errno
import hashlib
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.bundle.bundle import CARD_FILE, README_FILE, Bundle
from zoo.bundle.card import Card
from zoo.bundle.readme import TAG, model_card
from zoo.errors import BadInput, BundleError, ChecksumMismatch, ManygatesError, MissingFile

HUB_PREFIX = "hf-hub:"
PATIENCE = 0.7
"""Seconds without an answer after which we say that we are trying."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_BLANK = frozenset({".gitattributes", README_FILE})
"""What a repository holds that nobody has put anything into."""

logger = logging.getLogger(__name__)


class _Refused(BadInput):
    """The hub answers, and what it says of a repository is no: not there, not to be read, blocked."""


# --- fetching ---


def parse_repository(text: str) -> tuple[str, str | None]:
    """Split `organisation/name[@revision]`.

    Raises:
        BadInput: if it is not of that form.
    """
    repository, at, revision = text.partition("@")
    legal = _HUB_NAME.fullmatch(repository) is not None
    legal &= not (repository.endswith(".git") or "--" in repository or ".." in repository or len(repository) > 96)
    if not legal or (at and not revision):
        raise BadInput(
            f"{HUB_PREFIX + text!r} names no repository, expected {HUB_PREFIX}ORGANISATION/NAME or …/NAME@REVISION, "
            "of letters, digits, '-', '_' and '.', without '--', '..' or '.git' at the end"
        )
    return repository, revision or None


def fetch(
    repository: str,
    revision: str | None = None,
    only: Iterable[str] | Callable[[Card], Iterable[str]] | None = None,
) -> Bundle:
    """Fetch a bundle, the card first and then exactly the files that are wanted, all from one commit.

    What the cache holds is not fetched again; without a network, or with HF_HUB_OFFLINE=1, it is all there is.

    Args:
        repository: `organisation/name`.
        revision: a branch, tag or commit; None is the main branch.
        only: the files that are needed, or what says so of the card; None is all that the card lists.

    Returns:
        The bundle in the cache, checked; its folder is named after the commit.

    Raises:
        BadInput: if there is no such repository or revision, the hub cannot be reached, or the disk is full.
        MissingFile: if the repository holds no bundle, or not all of one.
        ChecksumMismatch: if a file is not what the card says; it is removed from the cache.
        BundleError: if the card cannot be read, or is newer than this version.
    """
    folder = _fetch_card(repository, revision)
    source = f"{HUB_PREFIX}{repository}@{folder.name}"
    card = _card_in(folder, source)
    wanted = None if only is None else tuple(only(card) if callable(only) else only)
    names = [name for name in card.files if wanted is None or name in wanted]
    if names:
        _check_space(source, sum(card.files[name].size for name in names if not (folder / name).is_file()))
        # the folder is named after its commit, so a push in between cannot mix two versions
        _snapshot(repository, folder.name, [CARD_FILE, *names])
    if absent := [name for name in names if not (folder / name).is_file()]:
        _check_answer(repository, folder.name, absent)
        raise MissingFile(f"{source} holds no {', '.join(absent)}, which its card lists; its owner must push it again")
    return _opened(folder, wanted)


def pinned(repository: str, bundle: Bundle) -> str:
    """Return the source of a fetched bundle with the commit that it came from."""
    return f"{HUB_PREFIX}{repository}@{bundle.folder.name}"


def hub_cards(author: str | None = None) -> list[tuple[str, str, Card]]:
    """Return the repository, commit and card of every bundle on the hub, sorted by repository; nothing else is fetched.

    A repository whose card cannot be read (broken, newer, private, blocked) is left out with a warning on the log.

    Args:
        author: an organisation or user; None is everybody.

    Raises:
        BadInput: if the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    doing = "list the hub's models" + (f" of {author}" if author else "")
    with _translated(doing, author or ""), _waiting(doing):
        if not constants.HF_HUB_OFFLINE:  # without retries: the list itself would try for half a minute
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        listed = sorted((info.id, info.sha) for info in huggingface_hub.list_models(filter=TAG, author=author))
    found = []
    for repository, commit in listed:
        try:
            folder = _fetch_card(repository, commit)
            found.append((repository, folder.name, _card_in(folder, f"{HUB_PREFIX}{repository}@{folder.name}")))
        except (BundleError, _Refused) as error:
            logger.warning("left out: %s", error)
    return found


def _fetch_card(repository: str, revision: str | None) -> Path:
    """Fetch the card alone; returns the folder of its commit in the cache."""
    folder = _snapshot(repository, revision, [CARD_FILE], first=True)
    if not (folder / CARD_FILE).is_file():
        _check_answer(repository, revision, [CARD_FILE])
        _discard(folder, ())
        raise MissingFile(
            f"{HUB_PREFIX}{repository} holds no {CARD_FILE}, so it is not a manygates bundle; check the name"
        )
    if _is_damaged(folder / CARD_FILE):
        removed = _discard(folder, [CARD_FILE], everywhere=True)
        raise ChecksumMismatch(
            f"{folder / CARD_FILE} is not what the hub sent: it was damaged or changed in the cache, and {removed}"
            f"{_again()}"
        )
    return folder


def _card_in(folder: Path, source: str) -> Card:
    """Read the card of a commit in the cache; an error names the repository, not the cache."""
    try:
        return _opened(folder, ()).card
    except ChecksumMismatch:
        raise
    except BundleError as error:
        raise type(error)(f"the card of {source}: {str(error).removeprefix(f'{folder}: ')}") from error


def _check_answer(repository: str, revision: str | None, names: list[str]) -> None:
    """Make sure that it is the hub that says that files are not there, and not a cache that holds only some.

    Raises:
        BadInput: if the hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub import constants

    doing = _fetching(repository, revision)
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"cannot {doing}: {_without_network(repository, revision, names)}")
    with _translated(doing, repository, revision, names):
        huggingface_hub.file_exists(repository, names[0], revision=revision)


def _opened(folder: Path, only: tuple[str, ...] | None) -> Bundle:
    """Open a bundle in the cache; a file that does not fit its card is taken out of the cache."""
    try:
        return Bundle.open(folder, only=only)
    except ChecksumMismatch as error:
        card = Bundle.open(folder, only=()).card
        places = {name: folder / name for name in card.files if (folder / name).is_file()}
        damaged = [name for name, place in places.items() if _is_damaged(place)]
        if damaged:
            removed = _discard(folder, damaged, everywhere=True)
            said = f"In the cache {', '.join(damaged)} is not what the hub sent, and {removed}{_again()}"
        else:
            linked = all(place.is_symlink() for place in places.values())  # else the cache cannot tell
            removed = _discard(folder, [CARD_FILE, README_FILE, *card.files])
            said = (
                "The hub itself holds it so" if linked else "If it is so the next time too, the hub itself holds it so"
            )
            said += f": the model's owner must push it again. This revision {removed}"
        raise ChecksumMismatch(f"{error}. {said}") from error


def _snapshot(repository: str, revision: str | None, names: list[str], *, first: bool = False) -> Path:
    """Bring files into the cache; returns the folder of their commit.

    Args:
        repository: `organisation/name`.
        revision: a branch, tag or commit.
        names: the files.
        first: nothing was asked of the hub yet, so it is said if it does not answer; no bars are drawn.
    """
    import huggingface_hub  # lazily: a bundled or local model needs no HTTP client

    doing = _fetching(repository, revision)
    with _translated(doing, repository, revision, names), _waiting(doing, wanted=first), _bars(wanted=not first):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=names))


def _fetching(repository: str, revision: str | None) -> str:
    return f"fetch {HUB_PREFIX}{repository}" + (f"@{revision}" if revision else "")


@contextmanager
def _bars(*, wanted: bool = True) -> Iterator[None]:
    """Let the hub's progress bars be drawn only on a terminal, and where they are wanted."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its stubs re-export nothing
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    chosen = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # by the environment, which goes first
    if chosen or are_progress_bars_disabled() or (wanted and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _check_space(source: str, needed: int) -> None:
    from huggingface_hub import constants

    cache_dir = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(cache_dir).free  # it exists: the card is in it
    if needed > free:
        raise BadInput(
            f"cannot fetch {source}: {needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free in {cache_dir}; "
            "make room (`hf cache prune`), or set HF_HOME to a folder on another disk"
        )


# --- what is in the cache ---


def _is_damaged(place: Path) -> bool:
    """Whether a file in the cache is not what the hub sent; the cache names a file's content by its digest there."""
    if not place.is_symlink():  # a file system without links: nothing to compare with
        return False
    name = place.readlink().name
    content = place.read_bytes()
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return hashlib.sha256(content).hexdigest() != name
    if re.fullmatch(r"[0-9a-f]{40}", name):  # as git names it
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return git.hexdigest() != name
    return False


def _discard(folder: Path, names: Iterable[str], *, everywhere: bool = False) -> str:
    """Take files of one commit out of the cache, and what nothing in it refers to any more.

    Args:
        folder: the commit's folder: REPOSITORY/snapshots/COMMIT.
        names: the files; others, which another program may have put there, stay.
        everywhere: also from other commits that hold the very same content.

    Returns:
        What became of them, in words.
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


# --- publishing ---


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push will do, once `plan_push` has checked that it may."""

    bundle: Bundle
    repository: str
    branch: str
    creates_repository: bool
    creates_branch: bool
    private: bool
    pull_request: bool
    message: str
    parent: str | None
    """The commit that was looked at; the push is refused if there is a newer one. None in a new repository."""
    files: Mapping[str, bytes]
    """What is sent: the very bytes that were checked."""
    removed: tuple[str, ...]
    """Files of the previous version that this one no longer has."""

    def described(self) -> list[str]:
        """Say it, a sentence or a file a line."""
        made = f"create the {'private' if self.private else 'public'} repository" if self.creates_repository else "use"
        place = f"{self.repository}, branch {self.branch}" + (" (created)" if self.creates_branch else "")
        how = "propose in a pull request" if self.pull_request else "commit"
        lines = [f"{made} {place}", f"{how}: {self.message}"]
        lines += [f"  {len(content):>12,} bytes  {name}" for name, content in self.files.items()]
        return [*lines, *(f"  {'remove':>12}        {name}" for name in self.removed)]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did."""

    source: str
    """`hf-hub:ORGANISATION/NAME@COMMIT`: the very files that were pushed."""
    url: str
    """Of the commit, or of the pull request."""
    changed: bool
    """False if the hub held the same files already."""


def plan_push(
    bundle: Bundle,
    repository: str,
    *,
    branch: str | None = None,
    pull_request: bool = False,
    private: bool = False,
    message: str | None = None,
) -> Push:
    """Check that a bundle may be pushed, and say what that would do; nothing is written.

    Args:
        bundle: opened with all its files checked.
        repository: `organisation/name`; created if there is none.
        branch: None is the main one; created from it if there is none.
        pull_request: propose the change instead of making it.
        private: of a repository that is created.
        message: of the commit.

    Raises:
        BadInput: without a token or a network, and if the repository holds something else than this model.
    """
    name, revision = parse_repository(repository)
    if revision is not None:
        raise BadInput(f"{repository!r} names a revision, expected ORGANISATION/NAME; write --branch {revision}")
    _check_can_push(name)
    info = _head(name, None)
    if info is None and pull_request:
        raise BadInput(f"there is no repository {name} to propose a change to; push without --create-pr creates it")
    if info is not None and private and not info.private:
        raise BadInput(f"{name} exists and is public; --private is for a repository that is created, leave it out")
    there = info is not None and branch is not None and _head(name, branch)
    if pull_request and branch is not None and not there:
        raise BadInput(f"{name} has no branch {branch!r} to propose a change to; push without --create-pr creates it")
    head = there or info  # a new branch begins as the main one
    removed: tuple[str, ...] = ()
    if head is not None and head.sha is not None:
        present = {sibling.rfilename for sibling in head.siblings or ()}
        removed = _check_same_model(name, head.sha, present, bundle.card)
    card = bundle.card
    files = {file: bundle.read(file) for file in card.files}
    files[CARD_FILE] = (bundle.folder / CARD_FILE).read_bytes()
    files[README_FILE] = model_card(card, f"{HUB_PREFIX}{name}").encode()
    return Push(
        bundle=bundle,
        repository=name,
        branch=branch or "main",
        creates_repository=info is None,
        creates_branch=branch not in (None, "main") and not there,
        private=private,
        pull_request=pull_request,
        message=message or f"{'Update' if removed or _holds_card(head) else 'Add'} {card.name}",
        parent=None if head is None else head.sha,
        files=files,
        removed=removed,
    )


def push(plan: Push) -> Pushed:
    """Do what a plan says, all files in one commit.

    Raises:
        BadInput: if the hub refuses, cannot be reached, or has a newer commit than the one that was looked at.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = huggingface_hub.HfApi()
    _check_can_push(plan.repository)
    doing = f"push to {plan.repository}"
    if plan.creates_repository:
        with _translated(doing, plan.repository, refusals={403: "the token may not create a repository there"}):
            api.create_repo(plan.repository, private=plan.private)
        doing += ", which was created and is still empty"
    refusals = {403: "the token may not write there; use one that may, or propose the change with --create-pr"}
    if plan.creates_branch:
        with _translated(doing, plan.repository, refusals=refusals):
            api.create_branch(plan.repository, branch=plan.branch)
        doing += f", whose branch {plan.branch} was created and is still as the main one"
    with _translated(doing, plan.repository, plan.branch, refusals=refusals), _bars():
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in plan.files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in plan.removed]
        try:
            commit = api.create_commit(
                plan.repository,
                operations,
                commit_message=plan.message,
                revision=plan.branch,
                create_pr=plan.pull_request,
                parent_commit=plan.parent,
            )
        except RuntimeError as error:  # of one file; what it was is behind it
            raise error.__cause__ or error from error
    return Pushed(
        source=f"{HUB_PREFIX}{plan.repository}@{commit.oid}",
        url=commit.pr_url or commit.commit_url,
        changed=commit.oid != plan.parent,
    )


def _head(repository: str, branch: str | None) -> Any:
    """Return what the hub says of a branch's newest commit; None if it has no such repository or branch."""
    import huggingface_hub
    from huggingface_hub import errors

    doing = f"push to {repository}"
    with _translated(doing, repository), _waiting(doing):
        try:
            return huggingface_hub.model_info(repository, revision=branch)
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError):
            return None


def _check_can_push(repository: str) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"cannot push to {repository}: HF_HUB_OFFLINE is set; unset it where there is a network")
    if huggingface_hub.get_token() is None:
        raise BadInput(
            f"cannot push to {repository}: there is no token for {_endpoint()}; make one that may write at "
            f"{_endpoint()}/settings/tokens and log in with `hf auth login`, or set HF_TOKEN"
        )


def _check_same_model(repository: str, commit: str, present: set[str], card: Card) -> tuple[str, ...]:
    """Check that a repository is empty or holds this model; returns the files that this version no longer has."""
    if CARD_FILE not in present:
        if strangers := sorted(present - _BLANK):
            raise BadInput(
                f"{repository} is no manygates bundle: it holds {', '.join(strangers[:3])}"
                f"{' and more' if len(strangers) > 3 else ''} and no {CARD_FILE}; push to a repository of its own"
            )
        return ()
    try:
        old = _opened(_fetch_card(repository, commit), ()).card
    except BundleError as error:
        raise BadInput(f"the card in {repository} cannot be read, so nothing is pushed over it ({error})") from error
    if old.name != card.name:
        raise BadInput(
            f"{repository} holds another model, {old.name!r}, expected {card.name!r}; push to a repository of its own, "
            f"or export this one with --name {old.name}"
        )
    return tuple(name for name in old.files if name in present and name not in card.files)


def _holds_card(info: Any) -> bool:
    return info is not None and any(sibling.rfilename == CARD_FILE for sibling in info.siblings or ())


# --- the hub's errors, and its silence ---


@contextmanager
def _waiting(doing: str, *, wanted: bool = True) -> Iterator[None]:
    """Say that we are trying if the hub does not answer at once."""
    if not wanted:
        yield
        return

    def say() -> None:
        logger.warning(
            "manygates: still trying to reach %s, to %s; without it, HF_HUB_OFFLINE=1 uses what is in the cache, and "
            "local-dir:FOLDER a folder",
            _endpoint(),
            doing,
        )

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _endpoint() -> str:
    from huggingface_hub import constants

    return _without_credentials(constants.ENDPOINT)


def _without_credentials(text: str) -> str:
    """Take `user:password@` out of every address."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


@contextmanager
def _translated(
    doing: str,
    repository: str,
    revision: str | None = None,
    names: Iterable[str] = (),
    refusals: Mapping[int, str] | None = None,
) -> Iterator[None]:
    """Turn the errors of the hub, the network and the disk into one of ours that says what to do.

    Args:
        doing: what was tried, behind "cannot".
        repository: `organisation/name`.
        revision: of it.
        names: the files that were asked for.
        refusals: what certain answers mean here, by status, instead of what they usually mean.
    """
    try:
        with _told(doing, repository, revision, names, refusals or {}):
            yield
    except BadInput as error:
        if (text := _without_credentials(str(error))) != str(error):
            raise type(error)(text) from None  # the cause would show it
        raise


@contextmanager
def _told(
    doing: str, repository: str, revision: str | None, names: Iterable[str], refusals: Mapping[int, str]
) -> Iterator[None]:
    from huggingface_hub import constants, errors

    transport_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP client it uses
    try:
        yield
    except ManygatesError:
        raise
    except errors.RevisionNotFoundError as error:
        raise _Refused(
            f"{HUB_PREFIX}{repository} has no revision {revision!r}; name a branch, tag or commit after '@'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _Refused(
            f"the hub has no repository {repository!r} that you may read; check the name, and if it is private or "
            "gated log in with `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _Refused(f"cannot {doing}: {_refusal(error, refusals)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, transport_error) as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403, 429):
            raise _Refused(f"cannot {doing}: {_refusal(cause, refusals)}") from error
        raise BadInput(f"cannot {doing}: {_without_network(repository, revision, names, error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # the hub's other errors are subclasses of these
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise BadInput(
                f"cannot {doing}: {error.strerror} ({constants.HF_HUB_CACHE}); no incomplete file is kept. Make room "
                "(`hf cache prune`), or set HF_HOME to a folder on another disk"
            ) from error
        if isinstance(error, OSError) and error.errno in _NO_FOLDER:
            raise BadInput(
                f"cannot {doing}: the cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror}); set HF_HOME to "
                "a folder that can be written"
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "try again later" + (", or with HF_HUB_DISABLE_XET=1" if isinstance(error, RuntimeError) else "")
        raise BadInput(f"cannot {doing}: {first_line}; {advice}") from error


def _refusal(error: Any, refusals: Mapping[int, str]) -> str:
    """Say what the hub's answer means, and what to do."""
    status = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    advice = {
        401: "the token is not valid; log in again with `hf auth login`",
        403: "it may not be read, or not by you; see its page on the hub, and if it is gated log in there first",
        409: "somebody else did the same at this moment; try again",
        412: "there is a newer version than the one that was compared; look at it, then push again",
        429: "too many requests; wait a few minutes",
        **refusals,
    }.get(status, "try again later" if status >= 500 else "check the name and the token")
    return f"the hub answers {status} ({said}): {advice}"


def _without_network(
    repository: str, revision: str | None, names: Iterable[str], error: Exception | None = None
) -> str:
    """Say what is missing, and how to do without a network; `error` says why there is none."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or error is None:
        reason = "HF_HUB_OFFLINE is set"
    else:
        cause = error.__cause__ or error
        answered = isinstance(cause, errors.HfHubHTTPError)
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = f"{_endpoint()} {'does not answer as it should' if answered else 'cannot be reached'} ({said})"
    if not names:
        return f"{reason}; try again where there is a network. `manygates list` needs none"
    cached = {name: huggingface_hub.try_to_load_from_cache(repository, name, revision=revision) for name in names}
    missing = [name for name, place in cached.items() if not isinstance(place, str)]
    source = f"{HUB_PREFIX}{repository}" + (f"@{revision}" if revision else "")
    return (
        f"{reason}, and the cache {constants.HF_HUB_CACHE} lacks {', '.join(missing)}. Where there is a network: "
        f"`manygates pull {source} --out FOLDER`; bring FOLDER here and name it local-dir:FOLDER"
    )
