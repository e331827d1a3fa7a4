"""Which exit of a multi-exit network answers: a chosen one, or the first that is confident enough.

An exit's answer is final when its largest probability reaches the exit's limit, and later stages are then not computed
(anytime and budgeted prediction, Huang et al. 2018, arXiv:1703.09844). Every choice becomes such limits, one per exit
but the last, which answers whatever is left; the graph `early_exit.onnx` takes them beside the image. People and
answers count exits from 1, that graph from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.errors import shown
from zoo.bundle.card import Card
from zoo.errors import BadInput

_MAX_TEXT: Final = 1000


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """An exit, or the confidence at which an exit answers; neither means the last exit."""

    exit: int | None = None
    """Counted from 1."""
    confidence: float | Sequence[float] | None = None
    """The largest probability from which on an exit answers, in (0, 1]: one for all, or one per exit but the last.

    Among several, inf is an exit that never answers, as the protocol `exits` gives to one with no share of the images.
    """

    def __post_init__(self) -> None:
        if self.exit is not None and self.confidence is not None:
            raise BadInput(
                f"exit {shown(self.exit)} and confidence {shown(self.confidence)} were both given; leave one out"
            )
        if self.exit is not None and (not isinstance(self.exit, int) or isinstance(self.exit, bool)):
            raise BadInput(f"exit is {shown(self.exit)}, expected a whole number; the first exit is 1")
        for number in _each(self.confidence):
            if not _is_confidence(number) and not (isinstance(self.confidence, Sequence) and number == np.inf):
                raise BadInput(f"confidence is {shown(number)}, expected a number above 0 and up to 1, like 0.9")

    def __bool__(self) -> bool:
        """Whether anything but the last exit was asked for by name."""
        return self.exit is not None or self.confidence is not None

    def limits(self, name: str, num_exits: int) -> NDArray[np.float32]:
        """Return the limits, float32 (exit - 1), that make the model `name` of `num_exits` exits answer so.

        They are +inf before a chosen exit and -inf from it on; where nothing was chosen all are +inf. BadInput if the
        model has no such exit or needs another number of confidences.
        """
        if self.confidence is not None:
            each = _each(self.confidence)
            if not isinstance(self.confidence, Sequence):
                each = each * (num_exits - 1)
            if len(each) != num_exits - 1:
                raise BadInput(
                    f"confidence has {len(each)} numbers, expected one, or {num_exits - 1}: one per exit of {name} but "
                    "the last"
                )
            return np.array(each, dtype=np.float32)
        chosen = num_exits if self.exit is None else self.exit
        if not 1 <= chosen <= num_exits:
            raise BadInput(f"exit is {shown(chosen)}, expected 1 to {num_exits}, the exits of {name}")
        return np.where(np.arange(1, num_exits) < chosen, np.inf, -np.inf).astype(np.float32)


def num_exits(card: Card) -> int:
    """Return how many exits a model has; 1 for all but multi-exit networks, which are served in mode `single` only."""
    return len(card.exits) or 1


def choose_exit(card: Card, choice: ExitChoice) -> NDArray[np.float32] | None:
    """Return the limits by which a model answers, float32 (exit - 1); None with one exit. BadInput if none fit."""
    if card.exits:
        return choice.limits(card.name, num_exits(card))
    if choice:
        given = f"exit {shown(choice.exit)}" if choice.exit is not None else f"confidence {shown(choice.confidence)}"
        raise BadInput(f"{given} was given, but {card.name} has only one exit; leave it out")
    return None


def always_last(limits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Say for each row of limits, float32 (…, exit - 1), whether only the last exit can answer."""
    return np.asarray(np.isposinf(limits).all(axis=-1))


def read_exit(text: str) -> int:
    """Read the number of an exit; BadInput if it is no whole number."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadInput(f"exit is {shown(text)}, expected a whole number; the first exit is 1")
    return int(text)


def read_confidence(text: str) -> float | tuple[float, ...]:
    """Read one confidence, or several like "0.9,0.8"; BadInput if there is anything else in it."""
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"more than {_MAX_TEXT} characters")
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInput(f'confidence is {shown(text)}, expected numbers like "0.9" or "0.9,0.8"') from error
    return numbers if len(numbers) > 1 else numbers[0]


def _is_confidence(value: object) -> bool:
    # a bool is a number to Python; the comparison is written so that NaN fails
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and bool(0 < value <= 1)


def _each(confidence: float | Sequence[float] | None) -> tuple[float, ...]:
    if confidence is None:
        return ()
    return tuple(confidence) if isinstance(confidence, Sequence) else (confidence,)


LAST_EXIT: Final = ExitChoice()
