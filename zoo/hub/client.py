"""What fetching and pushing share: the names of repositories, and what the hub's errors and its silence mean.

Files are kept in huggingface_hub's own cache, and its token is the only one that is used.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from zoo.errors import BadInput

HUB_PREFIX = "hf-hub:"
PATIENCE = 0.7
"""Seconds without an answer after which we say that we are trying."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)

logger = logging.getLogger(__name__)


class Refused(BadInput):
    """The hub answers, and what it says of a repository is no: not there, not to be read, blocked."""


def parse_repository(text: str) -> tuple[str, str | None]:
    """Split `organisation/name[@revision]`; the hub's client knows which names are legal.

    Raises:
        BadInput: if it is not of that form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its stubs re-export nothing

    repository, at, revision = text.partition("@")
    try:
        validate_repo_id(repository)
        why = "" if repository.count("/") == 1 and (revision or not at) else ", of two words and perhaps a revision"
    except HFValidationError as error:
        why = f" ({error})"
    if why:
        raise BadInput(
            f"{HUB_PREFIX + text!r} names no repository, expected {HUB_PREFIX}ORGANISATION/NAME or …/NAME@REVISION{why}"
        )
    return repository, revision or None


def named(repository: str, revision: str | None) -> str:
    """Return the source of a repository, with its revision where one is given."""
    return f"{HUB_PREFIX}{repository}" + (f"@{revision}" if revision else "")


def endpoint() -> str:
    """Return the hub's address, without a password that stands in it."""
    from huggingface_hub import constants

    return _without_credentials(constants.ENDPOINT)


def bars(*, wanted: bool = True) -> AbstractContextManager[object]:
    """Let the client draw its bars on a terminal where they are wanted; HF_HUB_DISABLE_PROGRESS_BARS decides if set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is False or (wanted and sys.stderr.isatty()):
        return nullcontext()
    quiet: AbstractContextManager[object] = disable_progress_bars()
    return quiet


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Say that we are trying if the hub does not answer at once."""

    def say() -> None:
        logger.warning(
            "manygates: still trying to reach %s, to %s; without it, HF_HUB_OFFLINE=1 uses what is in the cache, and "
            "local-dir:FOLDER a folder",
            endpoint(),
            doing,
        )

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def translated(
    doing: str,
    repository: str,
    revision: str | None = None,
    names: Iterable[str] = (),
    refusals: Mapping[int, str] | None = None,
) -> Iterator[None]:
    """Turn the errors of the hub, the network and the disk into one of ours that says what to do.

    It begins with "cannot" and what was being done. `names` are the files that were asked for; `refusals` says what
    certain answers mean here, by status.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client that it uses

    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # the hub's errors are subclasses of these
        kind, text = _explained(error, doing, repository, revision, tuple(names), refusals or {})
        said = _without_credentials(text)
        if said != text:
            raise kind(said) from None  # the cause would show them
        raise kind(said) from error


def without_network(repository: str, revision: str | None, names: Iterable[str], error: Exception | None = None) -> str:
    """Say what is missing, and how to do without a network; `error` says why there is none."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or error is None:
        reason = "HF_HUB_OFFLINE is set"
    else:
        cause = error.__cause__ or error
        answered = isinstance(cause, errors.HfHubHTTPError)
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = f"{endpoint()} {'does not answer as it should' if answered else 'cannot be reached'} ({said})"
    if not names:
        return f"{reason}; try again where there is a network. `manygates list` needs none"
    cached = {name: huggingface_hub.try_to_load_from_cache(repository, name, revision=revision) for name in names}
    missing = [name for name, place in cached.items() if not isinstance(place, str)]
    return (
        f"{reason}, and the cache {constants.HF_HUB_CACHE} lacks {', '.join(missing)}. Where there is a network: "
        f"`manygates pull {named(repository, revision)} --out FOLDER`; bring FOLDER here and name it local-dir:FOLDER"
    )


def _explained(
    error: Exception,
    doing: str,
    repository: str,
    revision: str | None,
    names: tuple[str, ...],
    refusals: Mapping[int, str],
) -> tuple[type[BadInput], str]:
    """Return which of our errors one of the hub's client is, and its message."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.RevisionNotFoundError):
        return Refused, f"{HUB_PREFIX}{repository} has no revision {revision!r}; name a branch, tag or commit after '@'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return Refused, (
            f"the hub has no repository {repository!r} that you may read; check the name, and if it is private or "
            "gated log in with `hf auth login`"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return Refused, f"cannot {doing}: {_refusal(error, refusals)}"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError)):  # type: ignore[attr-defined]
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403, 429):
            return Refused, f"cannot {doing}: {_refusal(cause, refusals)}"
        return BadInput, f"cannot {doing}: {without_network(repository, revision, names, error)}"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return BadInput, (
            f"cannot {doing}: {error.strerror} ({constants.HF_HUB_CACHE}); no incomplete file is kept. Make room "
            "(`hf cache prune`), or set HF_HOME to a folder on another disk"
        )
    if isinstance(error, OSError) and error.errno in _NO_FOLDER:
        return BadInput, (
            f"cannot {doing}: the cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror}); set HF_HOME to "
            "a folder that can be written"
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    advice = "try again later" + (", or with HF_HUB_DISABLE_XET=1" if isinstance(error, RuntimeError) else "")
    return BadInput, f"cannot {doing}: {first_line}; {advice}"


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


def _without_credentials(text: str) -> str:
    """Take `user:password@` out of every address."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
