"""What an image must look like before a model sees it."""

import dataclasses
from typing import Annotated, Final

from msgspec import Meta

from zoo.errors import BadInput

RESIZES: Final = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_PIXELS: Final = 4_000_000
"""Of a picture that is decoded, unless somebody allows more, and of a model's input."""
MAX_SIDE: Final = 4096
"""Pixels of a side of a model's input; without it a row of four million would pass."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InputFormat:
    """What an image must look like; mean and std are inside the graphs and stand here for the reader.

    Raises:
        BadInput: a value that no image has; the message names it.
    """

    channels: int
    """1 (grey) or 3 (red, green, blue)."""
    height: Annotated[int, Meta(ge=1, le=MAX_SIDE)]
    width: Annotated[int, Meta(ge=1, le=MAX_SIDE)]
    range: tuple[float, float]
    mean: tuple[float, ...]
    """One per channel, as is `std`."""
    std: tuple[float, ...]
    resize: str
    """The filter that brings an image file to height x width."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise BadInput(f"channels is {self.channels}, expected 1 (grey) or 3 (red, green, blue)")
        if self.height * self.width > MAX_PIXELS:
            raise BadInput(f"height x width is {self.height * self.width}, expected at most {MAX_PIXELS}")
        if self.range[0] >= self.range[1]:
            raise BadInput(f"range is {self.range}, expected [low, high] with low < high")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise BadInput(f"{key} is {values}, expected {self.channels} values, one per channel")
        if min(self.std) <= 0:
            raise BadInput(f"std is {self.std}, expected positive values")
        if self.resize not in RESIZES:
            raise BadInput(f"resize is {self.resize!r}, expected one of {', '.join(RESIZES)}")
