"""Files that are either the old ones or the new ones, never half of each.

Everything is written beside its final place, flushed to the disk and then renamed: a crash, a full disk or a second
process leaves the previous content untouched.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import BadInput

CACHE_VARIABLE = "MANYGATES_CACHE"


def sha256_of(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes_atomic(file: Path, content: bytes) -> None:
    """Write `content` to `file`, replacing it in one step; the folder must exist.

    Raises:
        OSError: it cannot be written; its `filename` is `file`.
    """
    temporary_file = _sibling(file)
    with writing(file, temporary_file):
        try:
            with temporary_file.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary_file.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):  # where nothing can be written nothing is there to be removed
                temporary_file.unlink(missing_ok=True)
            raise
        _flush_directory(file.parent)


@contextmanager
def writing(place: Path, *temporary: Path) -> Iterator[None]:
    """Let the system's errors name the place that was to be written, and not what stands for it until it is done.

    Args:
        place: what the caller asked for.
        temporary: what is written instead; errors that name nothing, such as a full disk, are of `place` too.
    """
    try:
        yield
    except OSError as error:
        foreign = error.filename is not None and not any(
            Path(str(error.filename)).is_relative_to(path) for path in (place, *temporary)
        )
        if error.errno is None or foreign:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


def check_writable(place: Path) -> None:
    """Find out, before long work, whether something can be put at `place`; nothing stays there.

    Raises:
        OSError: it cannot; its `filename` is `place`.
    """
    folder = place.absolute().parent
    with writing(place, folder):
        while not folder.exists():
            folder = folder.parent
    trial = _sibling(folder / place.name)
    with writing(place, trial):
        trial.mkdir()
        trial.rmdir()


def write_text_atomic(file: Path, text: str) -> None:
    """Write `text` to `file` in UTF-8, replacing it in one step; line ends are kept as they are."""
    write_bytes_atomic(file, text.encode("utf-8"))


def write_json_atomic(file: Path, value: object) -> None:
    """Write `value` to `file` as indented JSON that ends in a newline, replacing it in one step.

    Raises:
        ValueError: if a number is not finite (JSON has no word for it).
        TypeError: if something in `value` is not JSON.
    """
    write_text_atomic(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replace_directory(target_dir: Path) -> Iterator[Path]:
    """Build a directory's new content in a temporary sibling and swap it in when the block ends.

    Yields:
        The empty temporary directory to fill. If the block raises, it is removed and the old content stays.

    Raises:
        BadInput: if `target_dir` exists and is not a directory.
        OSError: it cannot be written; its `filename` is `target_dir`.
    """
    asked, target_dir = target_dir, target_dir.resolve()
    if target_dir.exists() and not target_dir.is_dir():
        raise BadInput(f"{target_dir} is a file, expected a directory or nothing; choose another place")
    if target_dir == Path.cwd() or target_dir in Path.cwd().parents or target_dir.is_mount():
        raise BadInput(
            f"{target_dir} is the working folder, above it, or a mounted volume, so it cannot be replaced in one step; "
            "choose a folder inside it"
        )
    new_dir = _sibling(target_dir)
    with writing(asked, target_dir.parent):
        target_dir.parent.mkdir(parents=True, exist_ok=True)
    with writing(asked, new_dir, target_dir):
        new_dir.mkdir()
        try:
            yield new_dir
            for file in new_dir.rglob("*"):
                if file.is_file():
                    _flush_file(file)
            _flush_directory(new_dir)
            _swap(new_dir, target_dir)
        except BaseException:
            shutil.rmtree(new_dir, ignore_errors=True)
            raise
        _flush_directory(target_dir.parent)


def _swap(new_dir: Path, target_dir: Path) -> None:
    """Put `new_dir` in the place of `target_dir`; on failure the old directory is put back."""
    if not target_dir.exists():
        new_dir.rename(target_dir)
        return
    old_dir = _sibling(target_dir)
    target_dir.rename(old_dir)
    try:
        new_dir.rename(target_dir)
    except BaseException:
        old_dir.rename(target_dir)
        raise
    shutil.rmtree(old_dir)


def _sibling(place: Path) -> Path:
    """Return an unused hidden name beside `place` (made by us rather than tempfile, so that the umask holds)."""
    return place.with_name(f".{place.name}.{secrets.token_hex(6)}")


def _flush_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows opens no directories; its renames are journalled
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Return the folder for what can be made again: `MANYGATES_CACHE`, else `manygates` in the user's cache.

    Raises:
        BadInput: if neither is known: the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "manygates"
    try:
        return Path.home() / ".cache" / "manygates"
    except RuntimeError as error:
        raise BadInput(f"this user has no home folder to keep anything in; set {CACHE_VARIABLE} to a folder") from error
