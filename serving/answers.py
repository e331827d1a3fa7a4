"""How an image is answered, and what comes of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Mode = Literal["single", "ensemble", "random"]


@dataclass(frozen=True)
class Plan:
    """How an image is answered: what all images of one batch have in common."""

    mode: Mode
    draws: int = 1
    """Paths drawn per image in mode `random`, whose probabilities are averaged."""


class Prediction(NamedTuple):
    """What a model says about some images, row by row."""

    probabilities: NDArray[np.float32]
    """(image, class); each row sums to 1."""
    logits: NDArray[np.float32]
    """(image, class)."""
    exits: NDArray[np.int64] | None = None
    """(image,): which exit answered, counted from 1; None where the model has only one."""
    agreement: NDArray[np.float32] | None = None
    """(image,): the share of draws or members whose largest class is the answer's; None where only one path votes."""
