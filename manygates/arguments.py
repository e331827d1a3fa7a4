"""What the commands' arguments share: values in a range, options of several commands, a command written down, and which
setting names another place where the system refuses to read or write one."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from manygates.output import WRONG
from zoo.errors import BadInput, shortened

MOST_COUNTED = 10**9  # as in a card
MOST_SEED = 2**63 - 1  # what every generator of random numbers here takes


class Command(NamedTuple):
    """A command of the command line."""

    summary: str
    add: Callable[[argparse.ArgumentParser], None]
    """Gives the command's parser its arguments."""
    run: Callable[[argparse.Namespace], int]
    """Takes the parsed arguments and returns the exit code."""


class Parser(argparse.ArgumentParser):
    """A parser that refuses a number out of range in one line, like everything that is refused after parsing."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; the usage is shown unless one of the types below refused a value."""
        option, refused, value = message.removeprefix("argument ").partition(": is ")
        if refused:
            self.exit(WRONG, f"manygates: {option} is {value}\n")
        super().error(message)


def count(lowest: int = 1, most: int = MOST_COUNTED) -> Callable[[str], int]:
    """Return the argparse type of a whole number from `lowest` to `most`."""

    def whole_number(text: str) -> int:
        value: int | str = text[:40]
        try:
            value = int(text)
            held = lowest <= value <= most
        except ValueError:
            held = False
        if not held or isinstance(value, str):
            raise argparse.ArgumentTypeError(f"is {shortened(value)}, expected a whole number from {lowest} to {most}")
        return value

    return whole_number


seed = count(0, MOST_SEED)
"""The argparse type of a seed."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command the flag --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Give a command the argument MODEL."""
    parser.add_argument("model", metavar="MODEL")


def add_seed(parser: argparse.ArgumentParser, name: str = "--seed", help: str | None = None) -> None:
    """Give a command a seed, 0 by default."""
    parser.add_argument(name, type=seed, default=0, metavar="S", help=help)


def repeating(command: str, *words: object, **options: object) -> str:
    """Return the command line that repeats a measurement, for the record.

    Args:
        command: the command's name.
        words: its arguments without an option.
        options: name -> value. A list becomes several words; None and an empty list leave the option out.
    """
    parts = ["manygates", command, *map(str, words)]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if values:
            parts += [f"--{name}", *map(str, values)]
    return shlex.join(parts)


def usable_device(name: str) -> str:
    """Return the name of a device if torch can use it here.

    Raises:
        BadInput: it cannot.
    """
    import torch

    try:
        torch.empty(0, device=name).cpu()  # out of meta, which holds no numbers, nothing comes back
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise BadInput(
            f"device {name[:40]!r} cannot be used here (GPUs that torch finds: {torch.cuda.device_count() or 'none'}); "
            "write cpu, or cuda where a GPU is, cuda:0 for the first of several"
        ) from error
    return name


def require(package: str, extra: str) -> None:
    """Refuse a command that needs an optional package.

    Raises:
        BadInput: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{package} is not installed; pip install 'manygates[{extra}]'")


def is_run(source: str) -> bool:
    """Return whether a folder holds a training run."""
    return (Path(source) / "recipe.json").is_file()


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

    from zoo.files import CACHE_VARIABLE, cache_dir

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
