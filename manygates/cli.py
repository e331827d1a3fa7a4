"""The command line: which commands there are, how one is run, and how each ends."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from manygates.output import DONE, INTERRUPTED, WRONG, say
from zoo.vocabulary import VERSION

_PACKAGES = ("zoo", "training", "serving")
_OF_TRAINING = ("torch", "onnx", "safetensors", "pyarrow", "tqdm")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the command line's parser.

    Args:
        command: only this command gets its arguments, which saves time; None gives all of them theirs.
    """
    from manygates.arguments import Parser
    from manygates.commands import attack, evaluate, export, models, report, serve, train

    root = Parser(
        prog="manygates",
        description="Adversarially robust image classifiers built on random gated networks.",
        epilog="MODEL: a catalogue name, local-dir:PATH or hf-hub:org/name[@revision]. RUN: a training run's folder.",
    )
    root.add_argument("--version", action="version", version=f"manygates {VERSION}")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (models, train, export, evaluate, report, attack, serve):
        for name, added in family.COMMANDS.items():
            own = subparsers.add_parser(name, help=added.summary, description=added.summary)
            own.set_defaults(run=added.run)
            if command in (None, name):
                added.add(own)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check did not hold, 2 wrong usage or bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    # before anything of our own is imported, and before the parser, which takes -1/255 for an option
    if (problem := _foreign_package() or _negative_number(words)) is not None:
        say(f"manygates: {problem}")
        return WRONG
    from manygates.arguments import advice
    from zoo.errors import ManygatesError

    arguments = parser(words[0] if words else "").parse_args(words)
    try:
        return _run(arguments)
    except ManygatesError as error:
        say(f"manygates: {error}")
        return WRONG
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.partition(".")[0] in ("manygates", *_PACKAGES):
            raise
        extra = "train" if name in _OF_TRAINING else "serve"
        say(f"manygates: {name} is not installed; pip install 'manygates[{extra}]'")
        return WRONG
    except BrokenPipeError:  # the reader of our output went away: `manygates list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:  # a place that cannot be written or read: by its rights, or because a disk is full
        told = advice(error, arguments)
        if told is None:
            raise
        say(f"manygates: {told}")
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    from zoo.files import check_writable

    if getattr(arguments, "out", None) is not None and not getattr(arguments, "resume", False):
        check_writable(arguments.out)  # before the work, which may take hours
    code = int(arguments.run(arguments))
    if sys.stdout is not None:  # it may be closed
        sys.stdout.flush()  # here, where a full disk is an error like any other
    return code


def _foreign_package() -> str | None:
    """Say so in one sentence if a package of ours is not ours: another `training` in the way, say."""
    here = Path(__file__).resolve().parents[1]
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != here / name:
            found = "nothing" if spec is None else spec.origin
            return (
                f"manygates needs its own package {name!r} beside {Path(__file__).parent}, but Python finds {found}; "
                "run it from another folder, or reinstall manygates in a virtual environment of its own"
            )
    return None


def _negative_number(words: Sequence[str]) -> str | None:
    """Say in one sentence that -1/255 is no value; the parser would take it for an option and say there is none."""
    options = words[: words.index("--")] if "--" in words else words
    option = ""
    for word in options:
        if option and re.fullmatch(r"-[0-9]*\.?[0-9]+(/[0-9.]+|e[+-]?[0-9]+)", word.lower()):
            return f"{option} is {word[:40]}, expected a number that is not negative"
        if word.startswith("--"):
            option = word
    return None
