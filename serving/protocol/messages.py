"""The messages of the Open Inference Protocol over gRPC, from `inference.proto`.

Its compiled form, `inference.binpb`, is read into a pool of its own: the modules that the compiler generates share one
pool per process, which refuses the same package of a client's library. It also ties us to no version of the compiler.
"""

import functools
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

COMPILED: Final = Path(__file__).with_name("inference.binpb")
SERVICE: Final = "inference.GRPCInferenceService"


@functools.cache
def pool() -> DescriptorPool:
    """Return the protocol's descriptors."""
    own = DescriptorPool()
    for file in FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        own.Add(file)
    return own


@functools.cache
def message(name: str) -> Any:
    """Return the class of a message, such as `ModelInferRequest`; KeyError for one that the protocol has not."""
    return GetMessageClass(pool().FindMessageTypeByName(f"inference.{name}"))


class Malformed(ValueError):  # noqa: N818 -- says what the message is
    """Bytes that are no message, or one of more parts than any good one has."""


# Where messages within a ModelInferRequest hold further lists: inputs, their contents, requested outputs.
_LISTS: Final[dict[int, Any]] = {5: {5: {}}, 6: {}}


def check_infer_request(body: bytes, max_parts: int) -> None:
    """Refuse, with Malformed, a request that does not hold its fields, or more than `max_parts` of them.

    16 MB of empty ones take 400 MB and a second to parse.
    """
    _count(body, 0, len(body), _LISTS, max_parts)


def _count(body: bytes, position: int, end: int, lists: dict[int, Any], parts_left: int) -> int:
    """Walk over the fields between two positions; returns how many more there may be elsewhere."""
    while position < end:
        parts_left -= 1
        if parts_left < 0:
            raise Malformed("it has too many parts; send tensors raw, or their numbers packed")
        tag, position = _varint(body, position, end)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(body, position, end)
            continue
        if kind == 2:
            length, position = _varint(body, position, end)
        elif kind == 5:
            length = 4
        elif kind == 1:
            length = 8
        else:
            raise Malformed(f"it has a field of wire type {kind}")
        if length > end - position:
            raise Malformed("a field is cut short")
        if kind == 2:
            below = lists.get(tag >> 3)
            if below is not None:
                parts_left = _count(body, position, position + length, below, parts_left)
            elif lists is _LISTS[5] and tag >> 3 == _SHAPE and length > _MAX_SHAPE_BYTES:
                raise Malformed("a shape has too many dimensions")
        position += length
    return parts_left


_SHAPE: Final = 3
_MAX_SHAPE_BYTES: Final = 1024


def _varint(body: bytes, position: int, end: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and the position after it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = body[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise Malformed("a number is cut short")
