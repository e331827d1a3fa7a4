"""The errors a user can meet, as one small tree.

    ManygatesError
    ├── UnknownName            a model, recipe, attack, … that does not exist
    ├── BadInput (ValueError)  an argument or a file the user got wrong
    │   ├── BadPath            a route through the gates that does not fit the network
    │   └── BadImage           an image file that cannot or must not be decoded
    │       └── UnsupportedImage   one of a kind that is never decoded
    ├── BundleError            a bundle that is broken, too new or unsafe
    │   ├── ChecksumMismatch   a file that is not the one its card describes
    │   └── MissingFile        a file or folder that should be there
    ├── DataMissing            a data set that is not on this machine
    └── CheckpointError        a training run that cannot be read or resumed

The command line turns any of them into one line on standard error and exit code 2; every other exception is a defect of
ours and keeps its traceback.
"""

# ruff: noqa: N818 -- the names say what happened; "UnknownNameError" says no more

import difflib
from collections.abc import Iterable


class ManygatesError(Exception):
    """Anything that the user, not we, can put right; the message says how."""


class UnknownName(ManygatesError):
    """A name that is not among the known ones; the message lists those and suggests the nearest."""

    def __init__(self, name: str, known: Iterable[str], *, kind: str = "name") -> None:
        self.name = name
        self.known = tuple(sorted(known))
        nearest = difflib.get_close_matches(name, self.known, n=1)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
        listed = f"known: {', '.join(self.known)}" if self.known else "none is known here"
        super().__init__(f"unknown {kind} {name!r}{suggestion} ({listed})")


class BadInput(ManygatesError, ValueError):
    """An argument, a file or a setting the user got wrong."""


def check_count(name: str, number: object, lowest: int = 1, most: int | None = None) -> None:
    """Refuse what is no count: Python would take a negative one from the end of a list without a word.

    Raises:
        BadInput: not a whole number, below `lowest`, or above `most`.
    """
    if type(number) is not int or number < lowest or (most is not None and number > most):
        allowed = f", {lowest} or more" if most is None else f" from {lowest} to {most}"
        raise BadInput(f"{name} is {shortened(number)}, expected a whole number{allowed}")


def shortened(value: object) -> str:
    """Return a value for a message; a number of thousands of digits is cut."""
    if type(value) is int and abs(value) >= 10**40:  # Python refuses to write the longest
        return "a number of more than 40 digits"
    return repr(value)


class BadPath(BadInput):
    """A route through the gates that does not fit the network."""


class BadImage(BadInput):
    """An image file that cannot be decoded, or that must not be."""


class UnsupportedImage(BadImage):
    """An image file of a kind that is never decoded, or no image at all."""


class BundleError(ManygatesError):
    """A bundle that is broken, written by a newer version, or unsafe to load."""


class ChecksumMismatch(BundleError):
    """A file whose content is not what its card describes."""


class MissingFile(BundleError):
    """A file or folder that should be there and is not."""


class DataMissing(ManygatesError):
    """A data set that is not on this machine; the message says where it is looked for."""


class CheckpointError(ManygatesError):
    """A training run's folder that cannot be read or resumed."""


class GatingWarning(UserWarning):
    """Something that a user of a random gated network would not expect, such as convolutions without gates."""
