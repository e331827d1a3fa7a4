"""How an image is answered, what comes of it, and who answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.vocabulary import Mode


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


class Predictor(ABC):
    """Anything that answers images; called from several threads at once."""

    wide: bool = False
    """Whether it can use every core for an image that comes alone."""

    @abstractmethod
    def predict(
        self,
        images: NDArray[np.float32],
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        wide: bool = False,
    ) -> Prediction:
        """Answer float32 (image, channel, height, width) in [0, 1] with one row per image, in the same order.

        Args:
            images: the images.
            limits: float32 (image, exit - 1), where requests may choose their exit; None is the predictor's own choice.
            plan: how to answer; None is the predictor's own plan.
            wide: the image came alone, and every core is free.
        """
