"""Whatever bytes come as a request, the parser answers with a sound request or a refusal that is the client's fault.

The same examples at every run, unless MANYGATES_FUZZ_EXAMPLES asks for so many new ones.
"""

import copy
import json
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.answers import Plan, Prediction
from serving.errors import RequestError
from serving.protocol.choices import Choices
from serving.protocol.open_inference import Codec, InferRequest
from zoo.bundle.card import Card, Exit, Paths
from zoo.vocabulary import MODES

SHAPE = (3, 4, 4)
ITEMS = 48
MAX_ROWS = 5
IMAGES = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
LEVELS = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
MORE = int(os.environ.get("MANYGATES_FUZZ_EXAMPLES", "0"))
BOUNDED = settings(
    max_examples=MORE or 400,
    deadline=2000,
    derandomize=not MORE,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],  # the card is the same each time
)
WORDS = (
    "id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "binary_data_size", "binary_data",
    "binary_data_output", "images", "probabilities", "logits", "exit", "agreement", "mode", "draws",
    "confidence", "timeout", "priority", "FP32", "UINT8", "BYTES", "single", "random", "ensemble", "0.9,inf", "inf",
    "shared_memory_region", "classification", "\ud800", "\x00",
)  # fmt: skip


def codecs(card: Card) -> list[Codec]:
    """A parser that lets requests choose nothing, and two that let them choose what there is."""
    plain = replace(card.architecture, gated_layers=(), candidates=1, sharing=None)
    early = replace(
        card,
        architecture=plain,
        paths=Paths(single=None, ensemble=()),
        variants=("single",),
        exits=(Exit(macs=1), Exit(macs=2), Exit(macs=3)),
    )
    return [
        Codec(card, max_rows=MAX_ROWS),
        Codec(
            card,
            Choices(card, Plan("random", 3), MODES, voting=("ensemble", "random"), max_draws=64),
            max_rows=MAX_ROWS,
        ),
        Codec(early, Choices(early, may_choose_exit=True), max_rows=MAX_ROWS),
    ]


def outcome(codec: Codec, body: bytes, length: bytes | None) -> Any:
    """Decode, and check what came of it; returns what identifies it."""
    refused, request = None, None
    try:
        request = codec.decode(body, length)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 413)
        assert len(str(refused)) < 1500
        json.dumps({"error": str(refused)}).encode()  # as it is sent
        return refused.status, str(refused)
    assert isinstance(request, InferRequest)
    images = request.images
    assert images.shape[1:] == SHAPE
    assert 1 <= len(images) <= MAX_ROWS
    assert images.dtype == np.uint8 or (images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1)
    assert answered(codec, request)
    return images.tobytes(), request.form.outputs, request.form.heading, request.form.asked.plan


def answered(codec: Codec, request: InferRequest) -> bytes:
    """Write an answer to a request that passed: nothing about it may fail any more."""
    rows = len(request.images)
    flat = np.full((rows, 3), 1 / 3, np.float32)
    answer = Prediction(flat, flat, np.ones(rows, np.int64), np.linspace(0.3, 1, rows, dtype=np.float32))
    headers, body = codec.encode(request, answer)
    whole = codec.respond(request, answer)
    assert whole.endswith(b"\r\n\r\n" + body)
    assert dict(headers)[b"content-length"] == str(len(body)).encode()
    return whole


def never_fails(card: Card, body: bytes, length: bytes | None) -> None:
    KNOWN[:] = KNOWN or codecs(card)
    for known, fresh in zip(KNOWN, codecs(card), strict=True):
        # one that has seen many requests before answers as one that has seen none
        assert outcome(known, body, length) == outcome(fresh, body, length)


KNOWN: list[Codec] = []
"""Parsers that have seen all requests of this file."""


def document(kind: str) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of a good request, and the tensor after it."""
    tensor: dict[str, Any] = {"name": "images", "shape": [2, *SHAPE]}
    if kind == "numbers":
        tensor |= {"datatype": "FP32", "data": IMAGES.ravel().round(3).tolist()}
    elif kind == "nested":
        tensor |= {"datatype": "UINT8", "data": LEVELS.tolist()}
    else:
        content = IMAGES.tobytes() if kind == "floats" else LEVELS.tobytes()
        datatype = "FP32" if kind == "floats" else "UINT8"
        tensor |= {"datatype": datatype, "parameters": {"binary_data_size": len(content)}}
        more = {"id": "7", "parameters": {"binary_data_output": True, "timeout": 1000}, "outputs": [{"name": "logits"}]}
        return {**more, "inputs": [tensor]}, content
    return {"inputs": [tensor], "outputs": [{"name": "probabilities", "parameters": {"binary_data": False}}]}, b""


KINDS = st.sampled_from(["numbers", "nested", "floats", "levels"])
NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63), 96, 192, 384, 0.5, -0.0, 1e308, 1e-320]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), inner)
    ),
    max_leaves=8,
)
LENGTHS = st.one_of(
    st.none(),
    st.integers(-1, 2000).map(lambda number: str(number).encode()),
    st.sampled_from([b"", b"0", b"00", b"+1", b"1e2", b"9" * 18, b"9" * 5000, b"\xb2", b"0x10", b" 1"]),
    st.binary(max_size=10),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where something is in a document, the ends of long lists only."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = [(place, value[place]) for place in sorted({*range(min(4, len(value))), len(value) - 1} - {-1})]
    return [at, *(place for key, each in inner for place in places(each, (*at, key)))]


@st.composite
def edited(draw: Any) -> tuple[bytes, bytes]:
    """A good request's JSON after some edits, and its tensor."""
    found, content = document(draw(KINDS))
    whole: Any = {"": copy.deepcopy(found)}
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([place for place in places(whole) if place]))
        holder = whole
        for key in at[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "replace":
            holder[at[-1]] = draw(VALUES)
        elif action == "delete" and len(at) > 1:
            del holder[at[-1]]
        elif isinstance(holder, list):
            holder.insert(at[-1], draw(VALUES))
        elif len(at) > 1:
            holder[draw(st.sampled_from(WORDS))] = draw(VALUES)
    text = json.dumps(whole[""]).encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32"])))
    return text, content


@st.composite
def damaged(draw: Any) -> tuple[bytes, bytes | None]:
    """A good request of which some bytes were changed, taken out or put in."""
    found, content = document(draw(KINDS))
    text = json.dumps(found, separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))).encode()
    body = bytearray(text + content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(body)))
        stop = place + draw(st.integers(0, 8))
        body[place:stop] = draw(st.binary(max_size=8))
    if draw(st.booleans()):
        body = body[: draw(st.integers(0, len(body)))]
    length = draw(st.one_of(LENGTHS, st.just(str(len(text)).encode() if content else None)))
    return bytes(body), length


@BOUNDED
@given(
    body=st.one_of(st.binary(max_size=2000), st.integers(0, 12).map(lambda n: b"\x00" * (ITEMS * n * 2))),
    length=LENGTHS,
)
def test_arbitrary_bytes_are_a_request_or_a_refusal(card: Card, body: bytes, length: bytes | None) -> None:
    never_fails(card, body, length)


@BOUNDED
@given(request=edited(), told=st.one_of(st.just("right"), LENGTHS), cut=st.integers(-8, 8))
def test_so_is_a_good_request_whose_json_was_edited(
    card: Card, request: tuple[bytes, bytes], told: Any, cut: int
) -> None:
    text, content = request
    content = content[: len(content) + cut] if cut < 0 else content + bytes(cut)
    length = str(len(text)).encode() if told == "right" and content else told
    never_fails(card, text + content, None if length == "right" else length)


@BOUNDED
@given(request=damaged())
def test_so_is_a_good_request_whose_bytes_were_damaged(card: Card, request: tuple[bytes, bytes | None]) -> None:
    never_fails(card, *request)


@BOUNDED
@given(value=VALUES, field=st.sampled_from(["mode", "draws", "exit", "confidence", "timeout", "priority"]))
def test_so_is_any_value_of_a_parameter(card: Card, value: Any, field: str) -> None:
    found, content = document("levels")
    found["parameters"] = {field: value, **({"mode": "random"} if field == "draws" else {})}
    text = json.dumps(found).encode()
    never_fails(card, text + content, str(len(text)).encode())


@pytest.mark.parametrize("kind", ["numbers", "nested", "floats", "levels"])
def test_the_request_that_is_edited_and_damaged_here_is_a_good_one(card: Card, kind: str) -> None:
    found, content = document(kind)
    text = json.dumps(found).encode()
    length = str(len(text)).encode() if content else None
    for codec in codecs(card):
        assert len(codec.decode(text + content, length).images) == 2


LONG = {
    "lists": b"[" * 10**6,
    "objects": b'{"inputs":' * 10**5,
    "digits": b"9" * 10**7,
    "escapes": b'"' + b"\\u0000" * 10**6 + b'"',
    "zeros": b"\x00" * 10**7,
    "number": b'{"a":' + b"1" * 5000 + b"}",
    "inputs": b'{"inputs": [' + b"{}," * 900 + b"{}]}",
    "spaces": b" " * 10**7 + b"{}",
}


@pytest.mark.parametrize("kind", LONG)
def test_long_bodies_take_no_longer_than_reading_them(card: Card, kind: str) -> None:
    for codec in codecs(card):
        started = time.process_time()
        assert outcome(codec, LONG[kind], None)[0] in (400, 413)
        assert time.process_time() - started < 2
