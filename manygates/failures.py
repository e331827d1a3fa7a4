"""What to do where the system refuses to read or write: which setting of the command names another place."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from pathlib import Path


def advice(error: OSError, arguments: argparse.Namespace) -> str | None:
    """Say in a sentence which place cannot be used, and what puts it elsewhere; None of errors that have no place."""
    place = error.filename2 or error.filename
    if place is not None:
        return f"{place}: {error.strerror}; {_elsewhere(Path(str(place)), arguments)}"
    if error.errno == errno.ENOENT:  # of tempfile, which has tried them all
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return None
    # `zoo.files` names every other place
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
    return f"standard output: {error.strerror}; send it to another place, or make room"


def _elsewhere(place: Path, arguments: argparse.Namespace) -> str:
    """Say which setting makes a command use another place than this one."""
    import tempfile

    from zoo.cache import CACHE_VARIABLE, cache_dir

    def within(folder: object) -> bool:
        """Whether the place is in a folder, or is what that folder was to be made in."""
        if not folder:
            return False
        ours, theirs = place.absolute(), Path(str(folder)).absolute()
        return ours.is_relative_to(theirs) or (theirs.is_relative_to(ours) and not ours.is_dir())

    out, stored = getattr(arguments, "out", None), getattr(arguments, "set", None)
    beside = getattr(arguments, "zoo", False) and isinstance(out, Path) and within(out.parent / "figures")
    if within(out) or beside:
        return "choose another place with --out"
    models = [getattr(arguments, name, None) for name in ("model", "source")]
    if any(isinstance(model, str) and within(model.removeprefix("local-dir:")) for model in models):
        return "the bundle cannot be changed there; change a copy, made by `manygates pull MODEL --out DIR`"
    if isinstance(stored, Path) and within(stored):
        return "choose another place with --set"
    if within(cache_dir()):
        return f"set {CACHE_VARIABLE} to a folder that can be written"
    if within(os.environ.get("TMPDIR")) or within(tempfile.tempdir):
        return "set TMPDIR to a folder that can be written"
    return "choose another place"
