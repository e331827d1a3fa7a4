"""The small vocabulary that the loop and the objectives share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Augmented images (batch, channel, height, width) in [0, 1] and labels int64 (batch,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in a run a step is; all its randomness follows from that."""

    seed: int
    number: int
    precision: torch.dtype = torch.float32
    """bfloat16 runs the forward passes under autocast."""
    rank: int = 0

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.precision)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Adds the gradients of one step to the parameters' `.grad` and reports what it measured."""

    streams: ClassVar[int] = 1
    """Independent shuffles of the training set that a step needs."""

    @abstractmethod
    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """Run forward and backward passes on `streams` batches; the loop zeroes gradients before and steps after.

        Returns:
            Scalars to log, detached; "loss" among them.
        """
