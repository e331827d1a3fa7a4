"""The tensors of the protocol for one model: `images` in, `probabilities`, `logits` and what else it tells out.

Everything about pixels is checked here, before a request may join a batch, whether they came raw or as numbers.
"""

import itertools
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Prediction
from serving.engine.graphs import AGREEMENT, EXIT, INPUT
from serving.errors import RequestError, bad_request, shown
from zoo.bundle.card import Card

ITEM_BYTES: Final = {"FP32": 4, "UINT8": 1}
"""Datatype of the input -> bytes of a number."""
_WIRE: Final = {"probabilities": "<f4", "logits": "<f4", EXIT: "<i8", AGREEMENT: "<f4"}
"""Output -> its type in numpy's words, as raw bytes have it."""


class Tensors:
    """The shapes of one model, and the checks that go with them."""

    def __init__(self, card: Card, max_rows: int) -> None:
        """Prepare for a model whose requests may hold `max_rows` images."""
        self.image_shape = (card.input.channels, card.input.height, card.input.width)
        self.image_items = math.prod(self.image_shape)
        self.max_rows = max_rows
        self._classes = len(card.classes)

    def rows(self, shape: Any) -> int:
        """Return how many images a declared shape means; 400 for another model's shape, 413 for too many images."""
        whole = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not whole or tuple(shape[1:]) != self.image_shape or shape[0] < 1:
            expected = f"[images, {', '.join(map(str, self.image_shape))}]"
            hint = "; add the leading batch dimension" if whole and tuple(shape) == self.image_shape else ""
            raise bad_request(f"the input {INPUT!r} has shape {shown(shape)}, expected {expected}{hint}")
        rows = shape[0]
        assert isinstance(rows, int)
        self.check_rows(rows)
        return rows

    def check_rows(self, rows: int) -> None:
        """Refuse more images than one request may hold, with 413."""
        if rows > self.max_rows:
            raise RequestError(
                413,
                "too_many_images",
                f"{shown(rows)} images in one request, expected at most {self.max_rows}; split it",
            )

    def check_size(self, size: Any, rows: int, datatype: str) -> None:
        """Refuse a declared size in bytes that is not that of so many images, with 400."""
        # Python's integers do not overflow, and `rows` is bounded
        expected = rows * self.image_items * ITEM_BYTES[datatype]
        if type(size) is not int or size != expected:
            raise bad_request(
                f"the input {INPUT!r} has a 'binary_data_size' of {shown(size)}, expected {expected} for {datatype} "
                f"{[rows, *self.image_shape]}"
            )

    def check_datatype(self, datatype: object) -> str:
        """Return the name of a datatype that pixels may have; 400 for any other."""
        if not isinstance(datatype, str) or datatype not in ITEM_BYTES:
            raise bad_request(
                f"the input {INPUT!r} has datatype {shown(datatype)}, expected FP32 (pixels in [0, 1]) or UINT8 (0 to "
                "255)"
            )
        return datatype

    def pixels(self, content: bytes, datatype: str, rows: int) -> NDArray[Any]:
        """Return the pixels of a raw little-endian tensor, FP32 or UINT8; 400 for another size, or outside [0, 1]."""
        expected = rows * self.image_items * ITEM_BYTES[self.check_datatype(datatype)]
        if len(content) != expected:
            raise bad_request(
                f"the input {INPUT!r} has {len(content)} bytes, expected {expected} for {datatype} "
                f"{[rows, *self.image_shape]}"
            )
        return self.view(content, 0, datatype, rows)

    def view(self, body: bytes, offset: int, datatype: str, rows: int) -> NDArray[Any]:
        """Return the pixels of a raw tensor of the right size, from `offset` of a body on; 400 if outside [0, 1]."""
        shape = (rows, *self.image_shape)
        if datatype == "UINT8":
            return np.frombuffer(body, dtype=np.uint8, offset=offset).reshape(shape)
        images = np.frombuffer(body, dtype="<f4", offset=offset).reshape(shape)
        # the tensor starts wherever the JSON ends, and unaligned arrays are slow and unsafe further down
        return _checked(images.astype(np.float32, copy=not images.flags.aligned))

    def row_shape(self, output: str) -> tuple[int, ...]:
        """Return the shape of an output for one image."""
        return () if output in (EXIT, AGREEMENT) else (self._classes,)

    def size_of(self, output: str, rows: int) -> int:
        """Return how many bytes an output of `rows` images has."""
        return rows * math.prod(self.row_shape(output)) * np.dtype(_WIRE[output]).itemsize


def pixels_of_json(data: Any, shape: tuple[int, ...], datatype: str) -> NDArray[np.float32]:
    """Return the pixels of flat or nested numbers, float32 in [0, 1] of `shape`; 400 if they do not fit it."""
    numbers = _numbers(data, shape)
    if datatype == "UINT8":
        # compared as Python's integers, which have no width to overflow
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > 255:
            raise bad_request(f"the 'data' of {INPUT!r} must be integers from 0 to 255 for UINT8; send FP32 for [0, 1]")
        return np.divide(np.array(numbers, dtype=np.uint8).reshape(shape), np.float32(255), dtype=np.float32)
    try:
        values = np.array(numbers, dtype=np.float64)
    except OverflowError as error:  # an integer beyond 1e308; a float like that is infinite already
        raise bad_request(f"the 'data' of {INPUT!r} holds a number beyond any float; pixels are in [0, 1]") from error
    with np.errstate(over="ignore"):  # too large becomes infinite, which is refused like any other pixel
        return _checked(values.astype(np.float32).reshape(shape))


def _numbers(data: Any, shape: tuple[int, ...]) -> list[int | float]:
    """Return flat or nested numbers as one flat list.

    All of it is checked before numpy sees any: a single long string among numbers would make numpy reserve its length
    for every one of them.
    """
    if not isinstance(data, list):
        raise bad_request(f"the 'data' of {INPUT!r} must hold numbers only, got {shown(data)}")
    if data and isinstance(data[0], list):
        numbers: list[Any] = [data]
        for depth, size in enumerate(shape):
            for row in numbers:
                if not isinstance(row, list) or len(row) != size:
                    found = f"{len(row)} entries" if isinstance(row, list) else shown(row)
                    raise bad_request(
                        f"the 'data' of {INPUT!r} is not a regular array: {found} in dimension {depth + 1}, expected "
                        f"{size} entries; send it flat or as {list(shape)}"
                    )
            numbers = list(itertools.chain.from_iterable(numbers))
    else:
        numbers = data
        if len(numbers) != math.prod(shape):
            raise bad_request(
                f"the 'data' of {INPUT!r} has {len(numbers)} numbers, expected {math.prod(shape)}, flat or as "
                f"{list(shape)}"
            )
    if not {int, float}.issuperset(map(type, numbers)):
        wrong = next(number for number in numbers if type(number) not in (int, float))
        raise bad_request(f"the 'data' of {INPUT!r} must hold numbers only, got {shown(wrong)}")
    return numbers


def _checked(images: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise bad_request(
            f"the pixels of {INPUT!r} reach from {low:g} to {high:g}; pixels are in [0, 1]: divide by 255, or send "
            "them as UINT8"
        )
    return images


def output_of(answer: Prediction, name: str) -> NDArray[Any]:
    """Return an output of an answer: (image, class) or (image,), in its own type."""
    if name == "probabilities":
        return answer.probabilities
    if name == "logits":
        return answer.logits
    if name == EXIT:
        assert answer.exits is not None  # only multi-exit models have this output
        return answer.exits
    assert answer.agreement is not None  # the request was checked to be answered by several votes
    return answer.agreement


def bytes_of(answer: Prediction, name: str) -> bytes:
    """Return an output of an answer as raw little-endian bytes."""
    return output_of(answer, name).astype(_WIRE[name], copy=False).tobytes()


def datatype_of(name: str) -> str:
    """Return the protocol's word for an output's type."""
    return "INT64" if name == EXIT else "FP32"
