"""Clients that mean harm, over real sockets: each is refused or bounded, and the others never notice.

In every test a well-behaved client keeps asking on a connection of its own; each of its answers must be right, and none
may take seconds. The memory of the whole process is watched.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import os
import random
import selectors
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httptools
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from serving.answers import Prediction, Predictor
from serving.http.app import Application
from serving.listener import allow_open_files
from serving.protocol.messages import SERVICE, message
from zoo.bundle.bundle import Bundle
from zoo.files import sha256_of

MEGABYTE = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
CLASSIFY = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
INDEX = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
RAW = b"Inference-Header-Content-Length: 0\r\nContent-Length: %d\r\n\r\n"
MARK = np.float32(64 / 255)
"""The first pixel of a hostile client's images."""
HOSTILE = np.full((1, 3, 4, 4), MARK, np.float32).tobytes()
BODIES = pytest.mark.parametrize("start", [INFER, CLASSIFY, INDEX], ids=["infer", "classify", "index"])


def resident() -> int:
    """Return how many bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def tiny_answer(images: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """What the tiny model in mode `single` says."""
    weights = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
    return softmax(scale * (images.reshape(len(images), -1) @ weights))


class Answers:
    """Reads answers off a connection, one after another."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._rest = b""

    def read(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, headers and body; fails if the server hangs up before."""
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines[1:])
        length = int(headers[b"content-length"])
        while len(self._rest) < length:
            self._more()
        body, self._rest = self._rest[:length], self._rest[length:]
        return int(lines[0].split()[1]), headers, body

    def _more(self) -> None:
        piece = self._client.recv(65536)
        if not piece:
            raise ConnectionError(f"the server hung up after {self._rest!r}")
        self._rest += piece


class Steady(threading.Thread):
    """A client that means well: it asks, checks the answer, and asks again."""

    def __init__(self, address: tuple[str, int], right: Callable[[np.ndarray, np.ndarray], bool]) -> None:
        super().__init__()
        self._address, self._right = address, right
        self._ending = threading.Event()
        self.answered = 0
        self.slowest = 0.0
        self.most_resident = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        rng = np.random.default_rng(1)
        try:
            with socket.create_connection(self._address, timeout=10) as client:
                answers = Answers(client)
                while not self._ending.wait(0.002):
                    images = rng.random((rng.integers(1, 4), 3, 4, 4), dtype=np.float32)
                    content = images.tobytes()
                    started = time.monotonic()
                    client.sendall(INFER + RAW % len(content) + content)
                    status, headers, body = answers.read()
                    self.slowest = max(self.slowest, time.monotonic() - started)
                    assert status == 200, body
                    start = int(headers[b"inference-header-content-length"])
                    found = np.frombuffer(body, np.float32, 3 * len(images), start).reshape(-1, 3)
                    assert self._right(images, found), (images, found)
                    self.answered += 1
                    self.most_resident = max(self.most_resident, resident())
        except BaseException as error:  # noqa: BLE001 -- it is raised where the test ends
            self.failure = error

    def end(self) -> None:
        self._ending.set()
        self.join()
        if self.failure is not None:
            raise self.failure


@dataclass
class Target:
    """A server under attack."""

    application: Application
    address: tuple[str, int]
    steady: Steady
    before: int
    """Its memory at the beginning."""
    opened: list[socket.socket] = field(default_factory=list)

    def connect(self) -> socket.socket:
        self.opened.append(socket.create_connection(self.address, timeout=10))
        return self.opened[-1]

    def ask(self, content: bytes) -> bytes:
        """Send something on a connection of its own, and return all that comes back until the server hangs up."""
        client = self.connect()
        with contextlib.suppress(ConnectionError):  # it may hang up before all is sent
            client.sendall(content)
        return everything(client)

    @property
    def growth(self) -> float:
        """By how many megabytes the memory has grown at most."""
        return (max(self.steady.most_resident, resident()) - self.before) / MEGABYTE


def everything(client: socket.socket) -> bytes:
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def eventually(fact: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert fact()


def of_tiny(images: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.allclose(found, tiny_answer(images), atol=1e-4))


@pytest.fixture
def attack(shared_application, shared_server, serve_in_a_thread) -> Callable[..., Any]:
    """Return a context manager that serves, and lets a steady client ask; at the end all must be well.

    Without an application it serves the tiny model with some settings, on a server that the tests share.
    """

    @contextmanager
    def attacking(
        application: Application | None = None,
        right: Callable[[np.ndarray, np.ndarray], bool] = of_tiny,
        **settings: Any,
    ) -> Iterator[Target]:
        with contextlib.ExitStack() as own:
            if application is None:
                application, url = shared_server(shared_application, "single", **settings)
            else:
                url = own.enter_context(serve_in_a_thread(application))
            host, _, port = url.removeprefix("http://").partition(":")
            steady = Steady((host, int(port)), right)
            steady.start()
            target = Target(application, (host, int(port)), steady, 0)
            try:
                eventually(lambda: steady.answered > 20 or steady.failure)
                target.before = resident()
                yield target
                seen = steady.answered
                eventually(lambda: steady.answered > seen + 5 or steady.failure)
            finally:
                for client in target.opened:
                    client.close()
                steady.end()
            assert steady.slowest < 3
            eventually(lambda: not application.budget.held and not application.collecting)
            eventually(lambda: not any(served.queue.waiting for served in application.service.everything()))

    return attacking


# --- slow and unfinished


def dribble(target: Target, start: bytes, byte: bytes, *, number: int = 30, seconds: float = 5) -> list[bytes]:
    """Send a beginning and then one byte every few milliseconds, on many connections, until the server hangs up."""
    received: dict[socket.socket, bytes] = {}
    selector = selectors.DefaultSelector()
    for _ in range(number):
        client = target.connect()
        client.sendall(start)
        client.setblocking(False)
        received[client] = b""
        selector.register(client, selectors.EVENT_READ)
    deadline = time.monotonic() + seconds
    while selector.get_map():
        assert time.monotonic() < deadline, f"{len(selector.get_map())} connections are still open"
        time.sleep(0.02)
        for key, _ in selector.select(0):
            client = key.fileobj
            try:
                piece = client.recv(65536)
            except ConnectionError:
                piece = b""
            received[client] += piece
            if not piece:
                selector.unregister(client)
        for key in list(selector.get_map().values()):
            with contextlib.suppress(ConnectionError):
                key.fileobj.send(byte)
    return list(received.values())


STARTS = {"line": b"GET /", "get": b"GET / HTTP/1.1\r\nHost: x\r\nX: ", "post": INFER + b"X: "}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_heads_that_come_a_byte_at_a_time_are_cut_off(attack, start: bytes) -> None:
    with attack(header_timeout=0.15) as target:
        assert {*dribble(target, start, b"a")} == {b""}


@BODIES
@pytest.mark.parametrize(
    ("headers", "byte"),
    [(b"Content-Length: 60000\r\n\r\n", b" "), (b"Transfer-Encoding: chunked\r\n\r\nffff\r\n", b" ")],
    ids=["length", "chunks"],
)
def test_bodies_that_come_a_byte_at_a_time_are_given_up_with_408(
    attack, start: bytes, headers: bytes, byte: bytes
) -> None:
    with attack(body_timeout=0.15) as target:
        for received in dribble(target, start + headers, byte):
            assert received.startswith(b"HTTP/1.1 408 ")
            assert received.count(b"HTTP/1.1 ") == 1


@BODIES
def test_half_a_body_and_then_nobody_leaves_nothing_behind(attack, start: bytes) -> None:
    whole, part = (60_000, 30_000) if start == INDEX else (9_000_000, 300_000)  # of JSON alone there may be 64 KiB
    with attack() as target:
        for _ in range(20):
            for headers in (b"Content-Length: %d\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n"):
                client = target.connect()
                client.sendall(start + headers % whole + bytes(part))
        eventually(lambda: target.application.budget.held >= 40 * part)
        for client in target.opened:
            client.close()
        eventually(lambda: target.application.budget.held < 10_000)
        assert target.growth < 60


class Marked(Predictor):
    """Answers with the first pixel, slowly, and counts the images of hostile clients."""

    def __init__(self) -> None:
        self.hostile = 0

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        time.sleep(0.02)
        first = images[:, 0, 0, 0]
        self.hostile += int((first == MARK).sum())
        answer = np.stack([first, 1 - first, 0 * first], axis=1)
        return Prediction(answer, answer)


def of_marked(images: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.allclose(found[:, 0], images[:, 0, 0, 0]))


@pytest.mark.parametrize("way", ["short", "long", "picture", "reset"])
def test_clients_that_hang_up_in_the_queue_give_up_their_places(application_of, attack, way: str) -> None:
    predictor = Marked()
    headers = b"Origin: x\r\n" if way == "long" else b""
    content = INFER + headers + RAW % len(HOSTILE) + HOSTILE
    if way == "picture":
        content = CLASSIFY + b"Content-Length: %d\r\n\r\n" % len(tiny_png(64)) + tiny_png(64)
    application = application_of(predictor, threads=1, max_batch=2)
    with attack(application, of_marked) as target:
        for _ in range(100):
            client = target.connect()
            if way == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(content)
        (served,) = application.service.everything()
        eventually(lambda: served.queue.waiting > 50)
        for client in target.opened:
            client.close()
        eventually(lambda: served.queue.waiting < 5, seconds=0.5)  # all would take a second to answer
    assert predictor.hostile < 60


ENDINGS = {"none": b"", "garbage": b"\x00\x00", "half": INFER + b"Content-Length: 5\r\n\r\n"}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_hanging_up_on_requests_sent_ahead_leaves_no_traceback(
    attack, caplog: pytest.LogCaptureFixture, ending: bytes
) -> None:
    picture = CLASSIFY + b"Content-Length: %d\r\n\r\n" % len(tiny_png()) + tiny_png()
    slow = INFER + b"Origin: x\r\n" + RAW % len(HOSTILE) + HOSTILE
    with caplog.at_level("WARNING"), attack() as target:
        for content in (picture, slow):
            for number in (1, 2, 10):
                for _ in range(5):
                    client = target.connect()
                    client.sendall(content * number + ending)
                    client.close()
    assert caplog.text == ""


# --- large


def pour(target: Target, head: bytes, piece: bytes, size: int) -> tuple[int, bytes]:
    """Send a head and then `size` bytes until the server hangs up; returns how much it took, and what it said."""
    client = target.connect()
    client.sendall(head)
    client.setblocking(False)
    sent, received, position = 0, b"", 0
    deadline = time.monotonic() + 10
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while sent < size:
            assert time.monotonic() < deadline
            for _, events in selector.select(1):
                try:
                    if events & selectors.EVENT_READ:
                        more = client.recv(65536)
                        if not more:
                            return sent, received
                        received += more
                    if events & selectors.EVENT_WRITE:
                        done = client.send(piece[position:])
                        sent, position = sent + done, (position + done) % len(piece)
                except ConnectionError:
                    return sent, received
    return sent, received


@BODIES
def test_a_body_of_100_megabytes_is_refused_by_what_it_announces(attack, start: bytes) -> None:
    head = start + b"Content-Length: 100000000\r\n\r\n"
    with attack() as target:
        client = target.connect()
        client.sendall(head)
        assert everything(client).startswith(b"HTTP/1.1 413 ")
        sent, received = pour(target, head, bytes(65536), 100_000_000)
        assert sent < 30 * MEGABYTE  # what the sockets hold
        assert received[:13] in (b"HTTP/1.1 413 ", b"")  # it may be lost where the client does not stop sending
        assert target.growth < 40


@BODIES
def test_a_body_of_100_megabytes_in_chunks_is_refused_when_it_is_too_large(attack, start: bytes) -> None:
    with attack(max_body_bytes=4 * MEGABYTE) as target:
        for _ in range(3):
            chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
            sent, received = pour(target, start + b"Transfer-Encoding: chunked\r\n\r\n", chunk, 100_000_000)
            assert sent < 34 * MEGABYTE
            assert received[:13] in (b"HTTP/1.1 413 ", b"")
        assert target.growth < 60


@functools.cache
def gzip_bomb() -> bytes:
    return gzip.compress(bytes(50 * MEGABYTE))


@BODIES
def test_a_compressed_body_is_never_unpacked(attack, start: bytes) -> None:
    bomb = gzip_bomb()
    with attack() as target:
        before = target.growth
        for encoding in (b"gzip", b"deflate", b"br", b"identity, gzip", b"GZIP", b"x"):
            headers = b"Content-Encoding: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (encoding, len(bomb))
            received = target.ask(start + headers + bomb)
            assert received.startswith(b"HTTP/1.1 415 ")
            assert b"send it plain" in received
        assert target.growth < before + 20


def png_part(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, data: bytes, more: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [png_part(b"IHDR", header), more, png_part(b"IDAT", data), png_part(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def zeros(length: int) -> bytes:
    """Return so many zeros, compressed."""
    packer = zlib.compressobj(9)
    pieces = [packer.compress(bytes(MEGABYTE)) for _ in range(length // MEGABYTE)]
    return b"".join([*pieces, packer.compress(bytes(length % MEGABYTE)), packer.flush()])


def tiny_png(red: int = 10) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 200, 30)).save(stream, format="PNG")
    return stream.getvalue()


def tags(number: int, size: int) -> bytes:
    """Return Exif data of so many tags, each of which points to all of it; unpacked it would be their product."""
    entries = b"".join(struct.pack(">HHII", 0x9000 + place, 7, size, 8) for place in range(number))
    content = b"MM\0*" + struct.pack(">IH", 8, number) + entries + bytes(4)
    return content.ljust(size + 8, b"\0")


def webp_of(width: int, height: int, exif: bytes = b"") -> bytes:
    """A file that claims a canvas, around a frame that is small."""
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 200)]
    frames[0].save(stream, format="WEBP", save_all=True, append_images=frames[1:], lossless=True, exif=exif)
    content = bytearray(stream.getvalue())
    assert content[12:16] == b"VP8X"
    content[24:27] = (width - 1).to_bytes(3, "little")
    content[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(content)


def jpeg_of(width: int, height: int, marker: bytes = b"\xfe", more: bytes = b"") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="JPEG")
    content = bytearray(stream.getvalue())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    content[2:2] = b"\xff" + marker + struct.pack(">H", len(more) + 2) + more
    return bytes(content)


SMALL = zlib.compress(bytes(4 * 13))
BOMBS: dict[str, tuple[Callable[[], bytes], set[int]]] = {
    "png that claims 30,000 x 30,000": (lambda: png_of(30_000, 30_000, SMALL), {400}),
    "png of 30,000 x 30,000": (
        lambda: png_of(30_000, 30_000, zeros(30_000 * 3751), depth=1, colour=0),
        {400},
    ),
    "png with a text of 100 MB": (lambda: png_of(4, 4, SMALL, png_part(b"zTXt", b"a\0\0" + zeros(10**8))), {200, 400}),
    "png with a profile of 100 MB": (
        lambda: png_of(4, 4, SMALL, png_part(b"iCCP", b"a\0\0" + zeros(10**8))),
        {200, 400},
    ),
    "png with 100 MB too much": (lambda: png_of(4, 4, zeros(10**8)), {200, 400}),
    "png of 16 MB of empty parts": (lambda: png_of(4, 4, SMALL, png_part(b"teXt", b"") * 1_300_000), {200, 400}),
    "png whose every tag is the whole file": (
        lambda: png_of(4, 4, SMALL, png_part(b"eXIf", tags(2000, 500_000))),
        {200},
    ),
    "jpeg whose every tag is the whole file": (lambda: jpeg_of(8, 8, b"\xe1", b"Exif\0\0" + tags(4900, 60_000)), {200}),
    "webp whose every tag is the whole file": (lambda: webp_of(4, 4, tags(2000, 500_000)), {200}),
    "jpeg of 16 MB of padding": (lambda: jpeg_of(8, 8)[:2] + b"\xff" * 16_000_000 + jpeg_of(8, 8)[2:], {200, 400}),
    "jpeg of 16 MB of empty parts": (lambda: jpeg_of(8, 8)[:2] + b"\xff\xfe\0\2" * 4_000_000, {400}),
    "jpeg of 16 MB of junk": (lambda: jpeg_of(8, 8)[:2] + b"\xff\0a" * 5_000_000 + jpeg_of(8, 8)[2:], {200, 400}),
    "webp that claims 16,383 x 16,383": (lambda: webp_of(16_383, 16_383), {400}),
    "webp that claims 16,777,216 x 255": (lambda: webp_of(2**24, 255), {400}),
    "jpeg that claims 65,500 x 65,500": (lambda: jpeg_of(65_500, 65_500), {400}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_picture_that_unpacks_to_far_more_than_it_is_costs_no_memory(attack, bomb: str) -> None:
    make, statuses = BOMBS[bomb]
    content = make()
    with attack() as target:
        before = target.growth
        answers = []
        for _ in range(4):
            client = target.connect()
            client.sendall(CLASSIFY + b"Content-Length: %d\r\n\r\n" % len(content) + content)
            answers.append(Answers(client))
        assert {answer.read()[0] for answer in answers} <= statuses
        assert target.growth < before + 4 * 2 * len(content) / MEGABYTE + 30
        good = tiny_png()
        received = target.ask(CLASSIFY + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(good) + good)
        assert received.startswith(b"HTTP/1.1 200 ")


# --- many


def test_a_flood_of_heads_that_never_end_is_held_within_bounds(attack) -> None:
    flood = LIVE + b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(590))
    assert 60_000 < len(flood) < 64 * 1024
    with attack(header_timeout=1.0) as target:
        for _ in range(200):
            target.connect().sendall(flood)
        assert target.growth < 100
        for client in target.opened:
            assert everything(client) == b""


def test_a_thousand_idle_connections_keep_nobody_from_being_answered(attack) -> None:
    allow_open_files(4096)
    with attack(header_timeout=1.0) as target:
        for _ in range(1000):
            target.connect()
        seen = target.steady.answered
        eventually(lambda: target.steady.answered > seen + 20)
        assert target.growth < 60
        client = target.connect()
        client.sendall(LIVE + b"\r\n")
        assert Answers(client).read()[0] == 200
        for client in target.opened[:1000]:
            assert everything(client) == b""  # their time to say something was over


# --- names


NAMES = (
    "..", "../tiny", "../../etc/passwd", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2f..%2fetc%2fpasswd",
    "..%5c..%5cwindows", "tiny%2f..%2f..", "tiny%00", "%00", "%ff%fe", "tiny/..", "./tiny", "%252e%252e%252f", "tiny;x",
    "tiny%0d%0aX-Injected:%201", "a" * 5000, "~", "*",
)  # fmt: skip


def test_a_model_name_is_only_ever_looked_up_in_memory(attack) -> None:
    calls = [("GET", ""), ("POST", "/infer"), ("GET", "/ready"), ("GET", "/versions/1"), ("GET", "/config")]
    with attack(allow_repository_changes=True) as target:
        for name in NAMES:
            paths = [(method, f"/v2/models/{name}{suffix}") for method, suffix in calls]
            paths += [("GET", f"/v2/models/tiny/versions/{name}"), ("POST", f"/v2/models/tiny/versions/{name}/infer")]
            paths += [("POST", f"/v2/repository/models/{name}/{verb}") for verb in ("load", "unload")]
            paths += [("POST", f"/classify?model={name}"), ("POST", f"/classify?version={name}"), ("GET", f"/{name}")]
            for method, path in paths:
                head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                received = target.ask(head.encode())
                assert received[9:12] in (b"400", b"404", b"307"), (path, received)
                assert b"root:" not in received
                assert b"\r\nx-injected" not in received.lower()
                body = received.partition(b"\r\n\r\n")[2]
                assert not body or received[9:12] == b"400" or json.loads(body)["error"]


# --- more than one request in one


SECRET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request that is hidden in another one's body; nobody may answer it."""
FOUR = b"4\r\naaaa\r\n0\r\n\r\n"
SMUGGLED = {
    "length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECRET,
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + SECRET,
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(SECRET) + SECRET,
    "two lengths, the other first": b"Content-Length: %d\r\nContent-Length: 0\r\n\r\n" % len(SECRET) + SECRET,
    "lengths in one line": b"Content-Length: 0, %d\r\n\r\n" % len(SECRET) + SECRET,
    "a length with a sign": b"Content-Length: +0\r\n\r\n" + SECRET,
    "a negative length": b"Content-Length: -1\r\n\r\n" + SECRET,
    "a length in hexadecimal": b"Content-Length: 0x0\r\n\r\n" + SECRET,
    "a length with a space before the colon": b"Content-Length : %d\r\n\r\n" % len(SECRET) + SECRET,
    "a length on the next line": b"Content-Length:\r\n 0\r\n\r\n" + SECRET,
    "a length of twenty digits": b"Content-Length: 18446744073709551616\r\n\r\n" + SECRET,
    "chunks with a space before the colon": b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n" + FOUR + SECRET,
    "chunks of an unknown kind": b"Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n" + SECRET,
    "chunks, but not last": b"Transfer-Encoding: chunked, identity\r\n\r\n" + FOUR + SECRET,
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + FOUR + SECRET,
    "chunks with a tab": b"Transfer-Encoding:\tchunked\r\nContent-Length: 4\r\n\r\n" + FOUR + SECRET,
    "a chunk with a sign": b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + SECRET,
    "a chunk in hexadecimal": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SECRET,
    "a chunk beyond 64 bits": b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n" + SECRET,
    "a chunk without its end": b"Transfer-Encoding: chunked\r\n\r\n4\r\naaaa0\r\n\r\n" + SECRET,
    "a chunk whose end is a line feed": b"Transfer-Encoding: chunked\r\n\r\n0\n\n" + SECRET,
    "a carriage return alone": b"X: a\rContent-Length: 0\r\n\r\n" + SECRET,
    "a null in a header": b"X: \x00\r\nContent-Length: 0\r\n\r\n" + SECRET,
    "a name with a space": b"Content Length: %d\r\n\r\n" % len(SECRET) + SECRET,
}


def statuses_of(received: bytes) -> list[int]:
    return [int(piece[:3]) for piece in received.split(b"HTTP/1.1 ")[1:]]


def test_a_request_whose_length_is_in_doubt_ends_the_connection(attack) -> None:
    good = INFER + RAW % len(HOSTILE) + HOSTILE
    with attack(header_timeout=0.15, body_timeout=0.15) as target:
        begun = []
        for shape, headers in SMUGGLED.items():
            for start in (INFER, CLASSIFY):
                fresh, learnt = target.connect(), target.connect()
                for _ in range(2):  # a connection that has learnt the head of a good request
                    learnt.sendall(good)
                    assert Answers(learnt).read()[0] == 200
                for client in (fresh, learnt):
                    client.sendall(start + headers)
                    begun.append((shape, client))
        for shape, client in begun:
            received = everything(client)
            assert b"manygates_requests" not in received, shape
            assert len(statuses_of(received)) <= 1, (shape, received)
            assert {*statuses_of(received)} <= {400, 408, 413}, (shape, received)


@pytest.mark.parametrize("path", [b"/nothing", b"/v2/models/nobody/infer", b"/v2/repository/models/tiny/load"])
def test_a_body_that_looks_like_a_request_is_a_body_even_where_it_was_answered_before_it_came(
    attack, path: bytes
) -> None:
    good = INFER + RAW % len(HOSTILE) + HOSTILE
    with attack() as target:
        client = target.connect()
        answers = Answers(client)
        for _ in range(2):  # the connection has learnt this head
            client.sendall(good)
            assert answers.read()[0] == 200
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(good)))
        assert answers.read()[0] in (403, 404)
        client.sendall(good)
        client.sendall(LIVE + b"\r\n")
        assert answers.read()[2] == b'{"live":true}'


def test_a_body_that_trickles_in_after_its_answer_holds_no_connection_open(attack) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with attack(body_timeout=0.3, keep_alive_timeout=1) as target:
        for received in dribble(target, head % 10**15 + b"a", b"a"):
            assert received.startswith(b"HTTP/1.1 404 ")
        # nor does one that came whole, but late
        client = target.connect()
        client.sendall(head % 1)
        assert Answers(client).read()[0] == 404
        client.sendall(b"a")
        client.settimeout(3)
        assert everything(client) == b""


GARBAGE = (
    b"\x00" * 50, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"aaaa" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\nHELO x\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"{}" * 100,
)  # fmt: skip


def test_garbage_behind_a_good_request_spoils_no_answer(attack) -> None:
    good = INFER + RAW % len(HOSTILE) + HOSTILE
    with attack(header_timeout=0.15) as target:
        begun = []
        for garbage in GARBAGE:
            for learnt, at_once in itertools.product((False, True), repeat=2):
                client = target.connect()
                if learnt:
                    client.sendall(good)
                    assert Answers(client).read()[0] == 200
                client.sendall(good + garbage if at_once else good)
                if not at_once:
                    client.sendall(garbage)
                begun.append((garbage, client))
        for garbage, client in begun:
            received = everything(client)
            # the good one is answered, or the connection is closed; what follows is refused, or not answered
            assert statuses_of(received) in ([200], [200, 400], [], [400]), garbage
            if statuses_of(received)[:1] == [200]:
                assert HOSTILE_ANSWER in received


HOSTILE_ANSWER = b'"name":"probabilities","datatype":"FP32","shape":[1,3]'


# --- a bundle that changes while it is served


def tampered(bundle: Path, kind: str) -> None:
    """Change a bundle in place as an attacker would who can write to it but has no good one."""
    card, graph = bundle / "card.json", bundle / "single.onnx"
    document = json.loads(card.read_text())

    def write(model: bytes) -> None:
        """Replace the graph, and say so in the card."""
        graph.write_bytes(model)
        document["files"]["single.onnx"] = {"sha256": sha256_of(graph), "size": len(model)}

    if kind == "another graph":
        graph.write_bytes(graph.read_bytes().replace(b"tiny", b"evil"))
        document["description"] = "Changed."
    elif kind == "a graph cut short":
        write(graph.read_bytes()[:200])
    elif kind == "no graph":
        write(b"\x00" * 1000)
    elif kind == "weights from elsewhere":
        model = onnx.load_from_string(graph.read_bytes())
        weights = model.graph.initializer[0]
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value="../../../../../etc/passwd")
        write(model.SerializeToString())
    elif kind == "an operator of its own":
        model = onnx.load_from_string(graph.read_bytes())
        model.graph.node[0].domain = "evil"
        model.opset_import.add(domain="evil", version=1)
        write(model.SerializeToString())
    elif kind == "other classes":
        document["classes"] = [*document["classes"], "one more"]
    elif kind == "a pickle":
        (bundle / "weights.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        document["files"]["weights.pt"] = {"sha256": sha256_of(bundle / "weights.pt"), "size": 24}
    elif kind == "a file elsewhere":
        document["files"]["../card.json"] = document["files"]["single.onnx"]
    elif kind == "no card":
        card.write_text("{" * 100_000)
        return
    elif kind == "a card of the future":
        document["schema"] = 10**9
    card.write_text(json.dumps(document))


TAMPERED = (
    "another graph", "a graph cut short", "no graph", "weights from elsewhere", "an operator of its own",
    "other classes", "a pickle", "a file elsewhere", "no card", "a card of the future",
)  # fmt: skip


def test_a_tampered_bundle_is_never_served_and_the_one_before_goes_on(
    tiny_application, bundle_dir: Path, write_bundle_dir, attack, tmp_path: Path
) -> None:
    scales = [1.0]

    def right(images: np.ndarray, found: np.ndarray) -> bool:
        return any(np.allclose(found, tiny_answer(images, scale), atol=1e-4) for scale in tuple(scales))

    original = tmp_path / "original"
    shutil.copytree(bundle_dir, original)
    application = tiny_application("single", reload_seconds=0.02)
    with attack(application, right) as target:
        for kind in TAMPERED:
            tampered(bundle_dir, kind)
            eventually(lambda: application.administration.index()[0]["reason"])
            (entry,) = application.administration.index()
            assert entry["state"] == "READY"
            assert str(tmp_path) not in entry["reason"]
            shutil.rmtree(bundle_dir)
            shutil.copytree(original, bundle_dir)
            eventually(lambda: not application.administration.index()[0]["reason"])
        assert target.application.service.ready
        scales.append(2.0)
        generation = application.service.generation
        write_bundle_dir(bundle_dir, scale=2.0)
        eventually(lambda: application.service.generation > generation)
        seen = target.steady.answered
        eventually(lambda: target.steady.answered > seen + 3 or target.steady.failure)
        scales.remove(1.0)
        assert Bundle.open(bundle_dir).card.name == "tiny"


# --- keys for some models


def test_a_key_for_one_model_opens_no_other_by_any_way(
    tiny_application, bundle_dir: Path, write_bundle_dir, make_card, tmp_path: Path, serve_in_a_thread
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("bob:bob-bob-bob-bob-bob-1:other\n")
    keys.chmod(0o600)
    other = write_bundle_dir(tmp_path / "other", make_card("other"))
    models = (f"local-dir:{bundle_dir}", f"local-dir:{other}")
    key = b"X-API-Key: bob-bob-bob-bob-bob-1\r\n"
    application = tiny_application("single", models=models, api_keys_file=str(keys), grpc_port=0)
    picture = tiny_png()
    raw = RAW % len(HOSTILE) + HOSTILE
    cold = b"Expect: 100-continue\r\n"

    def infer(path: bytes, headers: bytes = b"") -> bytes:
        return b"POST %s HTTP/1.1\r\nHost: x\r\n%s%s" % (path, key, headers) + raw

    def classify(query: bytes) -> bytes:
        head = b"POST /classify%s HTTP/1.1\r\nHost: x\r\n%s" % (query, key)
        return head + b"Content-Length: %d\r\n\r\n" % len(picture) + picture

    def get(path: bytes) -> bytes:
        return b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path, key)

    denied = [
        classify(b""),
        classify(b"?model=tiny"),
        classify(b"?model=t%69ny"),
        classify(b"?model=other&model=tiny"),
        infer(b"/v2/models/tiny/infer"),
        infer(b"/v2/models/tiny/versions/1/infer"),
        infer(b"/v2/models/tiny/infer", cold),
        infer(b"/v2/models/t%69ny/infer"),
        infer(b"/v2/models/tiny/infer?model=other"),
        get(b"/v2/models/tiny"),
        get(b"/v2/models/tiny/stats"),
    ]
    allowed = [
        classify(b"?model=other"),
        infer(b"/v2/models/other/infer"),
        infer(b"/v2/models/other/versions/1/infer"),
        infer(b"/v2/models/other/infer", cold),
        get(b"/v2/models/other"),
    ]
    with serve_in_a_thread(application) as url:
        host, _, port = url.removeprefix("http://").partition(":")

        def status(client: socket.socket, content: bytes) -> int:
            client.sendall(content)
            received = b""
            while not received or received == b"HTTP/1.1 100 Continue\r\n\r\n":
                received = client.recv(65536).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n") or received[:0]
            return int(received.split()[1])

        with socket.create_connection((host, int(port)), timeout=10) as client:
            for good in allowed:
                assert status(client, good) == 200
                assert status(client, good) == 200  # what the connection has learnt
                for bad in denied:
                    assert status(client, bad) == 403
        channel = grpc.insecure_channel(f"{host}:{application.grpc_port}")
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", request_serializer=lambda each: each.SerializeToString())
        metadata = [("x-api-key", "bob-bob-bob-bob-bob-1")]
        try:
            for name in ("tiny", ""):
                with pytest.raises(grpc.RpcError) as caught:
                    call(grpc_request(name), timeout=10, metadata=metadata)
                assert caught.value.code().name in ("PERMISSION_DENIED", *(("NOT_FOUND",) if not name else ()))
            assert call(grpc_request("other"), timeout=10, metadata=metadata)
        finally:
            channel.close()


def grpc_request(name: str) -> Any:
    request = message("ModelInferRequest")(model_name=name)
    request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 4, 4])
    request.raw_input_contents.append(HOSTILE)
    return request


# --- anything at all


DOCUMENT = json.dumps(
    {"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]}
).encode()
GOOD = (
    INFER + RAW % len(HOSTILE) + HOSTILE,
    INFER + b"Content-Length: %d\r\n\r\n" % len(DOCUMENT) + DOCUMENT,
    INFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(DOCUMENT), DOCUMENT),
    CLASSIFY + b"Content-Length: %d\r\n\r\n" % len(tiny_png()) + tiny_png(),
    INDEX + b"Content-Length: 2\r\n\r\n{}",
    LIVE + b"\r\n",
    b"GET /v2/models/tiny/versions/1/stats?x=y HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nOrigin: http://y\r\n\r\n",
)
PIECES = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b":", b"\x00", b"\xff", b"\t", b"%00", b"%2e%2e", b"/", b"?", b"#",
    b"HTTP/1.1", b"HTTP/0.9", b"HEAD", b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Content-Encoding: gzip\r\n",
    b"Content-Type: multipart/form-data; boundary=a\r\n", b"Inference-Header-Content-Length: 7\r\n",
    b"X-Request-Id: 1\r\n", b"Host: \r\n", b"ffffffffffffffff\r\n", b"0\r\n\r\n",
)  # fmt: skip


@st.composite
def conversation(draw: Any) -> list[bytes]:
    """Some requests, damaged, in pieces."""
    content = bytearray(b"".join(draw(st.lists(st.sampled_from(GOOD), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.one_of(st.integers(0, min(200, len(content))), st.integers(0, len(content))))
        stop = place + draw(st.sampled_from([0, 0, 1, 3, 20]))
        content[place:stop] = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)))
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=4)))
    return [bytes(content[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]


class Reader:
    """Checks that what a server says is HTTP, answer by answer."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.statuses.append(self.parser.get_status_code())


def talk(address: tuple[str, int], conversations: list[list[bytes]]) -> None:
    """Hold conversations side by side until the server has hung up on each, and check what it said."""
    selector = selectors.DefaultSelector()
    received: dict[socket.socket, bytes] = {}
    clients = []
    for pieces in conversations:
        client = socket.create_connection(address, timeout=10)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setblocking(False)
        clients.append((client, list(pieces)))
        received[client] = b""
        selector.register(client, selectors.EVENT_READ)
    deadline = time.monotonic() + 10
    while selector.get_map():
        waiting = [
            (conversations[place], received[client])
            for place, (client, _) in enumerate(clients)
            if client in {key.fileobj for key in selector.get_map().values()}
        ]
        assert time.monotonic() < deadline, f"still waiting: {waiting}"
        for client, pieces in clients:
            if pieces:
                with contextlib.suppress(ConnectionError):
                    client.send(pieces.pop(0))
        for key, _ in selector.select(0.005):
            try:
                piece = key.fileobj.recv(65536)
            except ConnectionError:
                piece = b""
            received[key.fileobj] += piece
            if not piece:
                selector.unregister(key.fileobj)
    for client, _ in clients:
        client.close()
    for (_, _), content, pieces in zip(clients, received.values(), conversations, strict=True):
        check(content, b"".join(pieces))


def check(received: bytes, sent: bytes) -> None:
    statuses = statuses_of(received)
    assert all(status < 500 for status in statuses), (sent, received)
    if b"HEAD" in sent:
        return  # whose answers have lengths and no bodies
    reader = Reader()
    try:
        reader.parser.feed_data(received)
    except httptools.HttpParserError as error:
        raise AssertionError(f"{sent!r} was answered with {received!r}") from error
    assert reader.statuses == statuses


FUZZED = int(os.environ.get("MANYGATES_FUZZ_EXAMPLES", "0"))


@pytest.mark.slow
def test_any_bytes_in_any_pieces_get_answers_or_a_closed_connection(attack) -> None:
    limits = {"header_timeout": 0.1, "body_timeout": 0.1, "keep_alive_timeout": 1}
    with attack(**limits, cors_origins=("http://y",)) as target:

        @settings(
            max_examples=FUZZED or 3,
            deadline=None,
            derandomize=not FUZZED,
            database=None,
            phases=[Phase.generate],  # what depends on time cannot be made smaller
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(conversation(), min_size=120, max_size=120))
        def side_by_side(conversations: list[list[bytes]]) -> None:
            talk(target.address, conversations)

        side_by_side()
        # and with nothing but chance, which nobody thought of
        chance = random.Random(0)
        talk(target.address, [[chance.randbytes(chance.randint(1, 300))] for _ in range(100)])
