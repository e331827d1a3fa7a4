"""What the commands' arguments share: values in a range, options of several commands, and a command written down."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
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
