"""Clients that no library would be: raw sockets against a running server."""

import contextlib
import json
import logging
import random
import resource
import select
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trustme

from serving import server as server_module
from serving.answers import Prediction, Predictor
from serving.http import bounded
from serving.http.app import Application
from serving.http.connection import Connection
from serving.http.inference import Inference
from serving.listener import allow_open_files, bind
from serving.operations.settings import Settings
from serving.protocol.open_inference import Codec
from serving.scheduling.service import Model
from serving.server import Server, compose

INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
CLASSIFY = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
DOCUMENT = json.dumps(
    {"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]}
).encode()


class Fixed(Predictor):
    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        row = np.array([[0.125, 0.625, 0.25]], dtype=np.float32)
        return Prediction(np.repeat(row, len(images), axis=0), np.zeros((len(images), 3), np.float32))


@pytest.fixture(scope="module")
def application_with(make_card) -> Callable[..., Application]:
    """Return a function from a predictor's class and settings to an application that serves one under the tiny card."""

    def build(predictor: type[Any], **settings: Any) -> Application:
        model = Model(card=make_card(), mode="single", predictor=predictor())
        return compose([model], Settings(**{"threads": 2, **settings}))

    return build


@pytest.fixture
def serve(application_of, application_with, shared_server, serve_in_a_thread) -> Any:
    """Return a context manager that serves with some settings, and yields a function that connects.

    A predictor's class is served by a server that the tests share, a predictor or an application by one of its own. The
    function's attribute `application` is what is served; at the end it must hold nothing of any request.
    """

    @contextmanager
    def running(predictor: Any = Fixed, **settings: Any) -> Iterator[Any]:
        with ExitStack() as own:
            if isinstance(predictor, type):
                application, url = shared_server(application_with, predictor, **settings)
            else:
                served = isinstance(predictor, Application)
                application = predictor if served else application_of(predictor, **settings)
                url = own.enter_context(serve_in_a_thread(application))
            host, _, port = url.removeprefix("http://").partition(":")
            opened: list[socket.socket] = []

            def connect() -> socket.socket:
                opened.append(socket.create_connection((host, int(port)), timeout=10))
                return opened[-1]

            connect.application = application  # type: ignore[attr-defined]
            try:
                yield connect
            finally:
                for client in opened:
                    client.close()
        waits_until(lambda: application.budget.held == 0 and not application.collecting)

    return running


def everything(client: socket.socket) -> bytes:
    """Read until the server hangs up."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Read one answer, of which there is only one; returns its status and body."""
    reader = Reader(client)
    status, _, body = reader.answer()
    assert reader.rest == b""
    return status, body


class Reader:
    """Reads answers one after the other."""

    def __init__(self, client: socket.socket) -> None:
        self.client, self.rest = client, b""

    def answer(self) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Return an answer's status, its headers in lower case and its body."""
        while b"\r\n\r\n" not in self.rest:
            self._more()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        [length] = [int(value) for name, value in headers if name == b"content-length"]
        while len(self.rest) < length:
            self._more()
        body, self.rest = self.rest[:length], self.rest[length:]
        return int(first.split()[1]), headers, body

    def _more(self) -> None:
        piece = self.client.recv(2**18)
        assert piece, f"hung up after {self.rest!r}"
        self.rest += piece


@pytest.mark.parametrize("start", [INFER, CLASSIFY], ids=["infer", "classify"])
@pytest.mark.parametrize("headers", [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
@pytest.mark.parametrize("body", [b"", b"1\r\n"], ids=["nothing", "something"])
def test_a_body_that_does_not_come_is_given_up_with_408(serve, start: bytes, headers: bytes, body: bytes) -> None:
    with serve(body_timeout=0.1) as connect:
        client = connect()
        client.sendall(start + headers + body)
        received = everything(client)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"bytes came within 0.1 seconds" in received


def test_a_request_that_is_incomplete_when_the_time_to_drain_is_over_gets_503_and_leaves_no_traceback(
    application_of, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), server_to_stop(application_of(Fixed(), drain_timeout=1)) as server:
        clients = [server.connect(), server.connect()]
        for client, start in zip(clients, (INFER, CLASSIFY), strict=True):
            client.sendall(start + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")  # the body is being waited for
        server.terminate()
        for client in clients:
            received = everything(client)
            assert received.startswith(b"HTTP/1.1 503 ")
            assert b"the server stopped before this was answered" in received
        assert server.ends()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "start",
    [
        LIVE + b"X: " + b"a" * 400_000,
        LIVE + b"X: a\r\n" * 11_000,
        b"GET /" + b"a" * 70_000,
        LIVE + b"X" * 400_000,
        b"\r\n" * 200_000,
        LIVE + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        INFER + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: " + b"a" * 800_000,
        INFER + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n" + b"X: a\r\n" * 40_000,
    ],
    ids=["value", "lines", "target", "name", "empty lines", "complete", "trailer", "trailers"],
)
def test_a_head_of_more_than_64_kib_is_refused_with_431_and_the_connection_closed(serve, start: bytes) -> None:
    with serve() as connect:
        client = connect()
        client.sendall(start)
        received = everything(client)
        assert received.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert b"exceed 65536 bytes" in received
        other = connect()
        other.sendall(LIVE + b"\r\n")
        assert answer(other) == (200, b'{"live":true}')


def test_a_head_just_below_64_kib_and_a_body_far_above_are_answered(serve) -> None:
    with serve() as connect:
        client = connect()
        client.sendall(LIVE + b"X: " + b"a" * 65_000 + b"\r\n\r\n")
        assert answer(client)[0] == 200
        images = np.zeros((1000, 3, 4, 4), np.float32).tobytes()
        for _ in range(2):
            head = b"Inference-Header-Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(images)
            client.sendall(INFER + head + images)
            assert answer(client)[0] == 200


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET", LIVE, LIVE + b"X: "])
def test_a_connection_without_a_whole_head_in_time_is_closed(serve, start: bytes) -> None:
    with serve(header_timeout=0.1) as connect:
        client = connect()
        client.sendall(start)
        assert everything(client) == b""


@pytest.mark.parametrize("start", [b"\r\n", b"GET", LIVE])
def test_so_is_one_that_was_answered_before(serve, start: bytes) -> None:
    with serve(header_timeout=0.1) as connect:
        client = connect()
        client.sendall(LIVE + b"\r\n")
        assert answer(client)[0] == 200
        client.sendall(start)
        assert everything(client) == b""


def test_a_slow_answer_is_not_cut_off_by_the_next_requests_missing_head(serve) -> None:
    opened = threading.Event()

    class Slow(Fixed):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            assert opened.wait(10)
            return super().predict(images)

    with serve(Slow(), header_timeout=0.05) as connect:
        client = connect()
        client.sendall(INFER + b"Content-Length: %d\r\n\r\n" % len(DOCUMENT) + DOCUMENT + LIVE)
        client.settimeout(0.2)  # four times the time for a head
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        opened.set()
        received = everything(client)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_request_to_upgrade_is_answered_over_http_1_1_with_its_body(
    serve, protocol: bytes, at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\n" % protocol
    head = INFER + upgrade + b"Content-Length: %d\r\n\r\n" % len(DOCUMENT)
    with caplog.at_level(logging.WARNING), serve() as connect:
        client = connect()
        for _ in range(2):
            pieces = [head + DOCUMENT] if at_once else [head[:50], head[50:], DOCUMENT[:70], DOCUMENT[70:]]
            for piece in pieces:
                client.sendall(piece)
            status, body = answer(client)
            assert status == 200
            assert json.loads(body)["outputs"][0]["data"] == [0.125, 0.625, 0.25]
        client.sendall(LIVE + upgrade + b"\r\n" + LIVE + upgrade + b"\r\n")
        assert b"live" in client.recv(1000)
        other = connect()
        other.sendall((LIVE + upgrade + b"\r\n") * 20)
        assert Reader(other).answer()[0] == 200
    assert caplog.text == ""


@pytest.mark.parametrize("start", [b"CONNECT x:80 HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"])
def test_what_is_no_request_is_refused_with_400(serve, start: bytes) -> None:
    with serve() as connect:
        client = connect()
        client.sendall(start)
        assert everything(client).startswith(b"HTTP/1.1 400 ")


def test_a_body_in_broken_chunks_is_refused_with_400(serve) -> None:
    with serve() as connect:
        client = connect()
        client.sendall(INFER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert everything(client).startswith(b"HTTP/1.1 400 ")


def test_thousands_of_requests_sent_ahead_are_not_taken(serve) -> None:
    with serve() as connect:
        client = connect()
        client.sendall((LIVE + b"\r\n") * 20)
        client.sendall(LIVE + b"Connection: close\r\n\r\n")
        assert everything(client).count(b"HTTP/1.1 200 ") == 21
        greedy = connect()
        greedy.sendall((LIVE + b"\r\n") * 2000)
        try:
            answered = everything(greedy).count(b"HTTP/1.1 200 ")
        except ConnectionResetError:
            answered = 0
        assert answered < 2000


def test_connections_beyond_the_limit_get_503_and_far_beyond_it_nothing(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SPARE_CONNECTIONS", 2)
    with serve(max_connections=3, header_timeout=600.0) as connect:
        held = [connect() for _ in range(2)]
        for client in held:
            client.sendall(LIVE + b"\r\n")
            assert answer(client)[0] == 200
        third = connect()
        third.sendall(LIVE + b"\r\n")
        assert answer(third)[0] == 503
        assert everything(third) == b""
        waiting = [connect() for _ in range(3)]
        waiting[-1].sendall(LIVE + b"\r\n")
        assert answer(waiting[-1])[0] == 503
        waiting.append(connect())
        assert everything(connect()) == b""


def test_bodies_beyond_the_total_are_refused_until_others_are_answered(serve) -> None:
    with serve(max_body_bytes=1000, max_total_body_bytes=1500) as connect:
        first, second = connect(), connect()
        head = INFER + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
        for client in (first, second):
            client.sendall(head)
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        first.sendall(b" " * 900)
        second.sendall(b" " * 700)
        # which of the two is refused is theirs to settle, and the other one may go on
        refused, other, rest = (second, first, 100) if readable(second, first) is second else (first, second, 300)
        received = everything(refused)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in received
        other.sendall(b" " * rest)
        assert answer(other)[0] == 400  # a body without any JSON
        third = connect()
        for _ in range(10):
            third.sendall(INFER + b"Content-Length: %d\r\n\r\n" % len(DOCUMENT) + DOCUMENT)
            assert answer(third)[0] == 200


class Stoppable:
    """A server that a test stops as an operator would."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self._listener = bind("127.0.0.1", 0)
        self._server = Server(application)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._opened: list[socket.socket] = []
        self._thread.start()

    def connect(self) -> socket.socket:
        self._opened.append(socket.create_connection(self._listener.getsockname(), timeout=20))
        return self._opened[-1]

    def terminate(self) -> None:
        """Do as SIGTERM does."""
        self._server.handle_exit(signal.SIGTERM, None)

    def ends(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._server.should_exit = True
        for client in self._opened:
            client.close()


@contextmanager
def server_to_stop(application: Application) -> Iterator[Stoppable]:
    server = Stoppable(application)
    try:
        yield server
    finally:
        server.close()


def readable(*clients: socket.socket) -> socket.socket:
    ready, _, _ = select.select(clients, [], [], 10)
    assert len(ready) == 1
    return ready[0]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be_and_no_further(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    allow_open_files(200)
    assert limits == [(256, 4096)]
    allow_open_files(1000)
    assert limits[-1] == (1000, 4096)
    assert caplog.text == ""
    allow_open_files(5000)
    assert limits[-1] == (4096, 4096)
    assert "this process may open 4096 files, and max_connections needs 5000" in caplog.text
    limits.append((256, resource.RLIM_INFINITY))
    allow_open_files(5000)
    assert limits[-1] == (5000, resource.RLIM_INFINITY)


# --- the short way of a plain inference request ---


class Echo(Predictor):
    """Answers each image with its own first pixel."""

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        marks = np.ascontiguousarray(np.repeat(images[:, 0, 0, :1], 3, axis=1))
        return Prediction(marks, -marks)


class Gate(Echo):
    """An echo that waits until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        self.entered.set()
        assert self.opened.wait(10)
        return super().predict(images)


class Broken(Echo):
    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        raise RuntimeError("secret detail")


def post(body: bytes, *headers: bytes, path: bytes = b"/v2/models/tiny/infer") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: x", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


RAW = b"Inference-Header-Content-Length: 0"


def raw(*marks: float, path: bytes = b"/v2/models/tiny/infer", headers: tuple[bytes, ...] = ()) -> bytes:
    """A request of images whose pixels are all alike, without any JSON."""
    images = np.repeat(np.array(marks, dtype="<f4"), 48)
    return post(images.tobytes(), RAW, *headers, path=path)


def marks_of(body: bytes) -> list[float]:
    """Return what `Echo` answered to a raw request."""
    values = np.frombuffer(body[body.index(b"]}") + 2 :], "<f4").reshape(2, -1, 3)
    assert np.array_equal(values[0], -values[1])
    return values[0, :, 0].tolist()


def mixed(head: dict[str, Any], tensor: bytes, *headers: bytes) -> bytes:
    """A request of JSON and a binary tensor."""
    text = json.dumps(head).encode()
    return post(text + tensor, b"Inference-Header-Content-Length: %d" % len(text), *headers)


def document(data: list[Any] | None = None, rows: int = 1, size: int | None = None, **fields: Any) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": "images", "shape": [rows, 3, 4, 4], "datatype": fields.pop("datatype", "FP32")}
    if size is None:
        tensor["data"] = [0.25] * 48 * rows if data is None else data
    else:
        tensor["parameters"] = {"binary_data_size": size}
    return {"inputs": [tensor], **fields}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what took the short way, whose heads were read for it, and what took the application's."""
    counted: Counter[str] = Counter()
    on_long_way: ContextVar[bool] = ContextVar("on_long_way", default=False)
    hot, infer, decode = Application.hot, Inference.infer, Codec.decode

    def counting_hot(self: Application, *arguments: Any) -> Any:
        served = hot(self, *arguments)
        counted["read"] += served is not None
        return served

    async def counting_infer(self: Inference, *arguments: Any) -> None:
        counted["long"] += 1
        on_long_way.set(True)
        await infer(self, *arguments)

    def counting_decode(self: Codec, *arguments: Any) -> Any:
        counted["short"] += not on_long_way.get()
        return decode(self, *arguments)

    monkeypatch.setattr(Application, "hot", counting_hot)
    monkeypatch.setattr(Inference, "infer", counting_infer)
    monkeypatch.setattr(Codec, "decode", counting_decode)
    return counted


LEVELS = bytes(range(48))
PLAIN = {
    "json": post(json.dumps(document()).encode()),
    "json with an id": post(json.dumps(document(id="q7")).encode()),
    "json with a type": post(json.dumps(document()).encode(), b"Content-Type: application/json", b"Accept: */*"),
    "two images": post(json.dumps(document(rows=2)).encode()),
    "raw": raw(0.5),
    "three raw": raw(0.5, 0.25, 0.125),
    "json and tensor": mixed(document(size=192), np.full(48, 0.5, "<f4").tobytes()),
    "levels": mixed(document(size=48, datatype="UINT8"), LEVELS),
    "one output": mixed(document(size=192, outputs=[{"name": "logits"}]), bytes(192)),
    "binary output": mixed(document(size=48, datatype="UINT8", parameters={"binary_data_output": True}), LEVELS),
    "half binary": post(
        json.dumps(
            document(outputs=[{"name": "logits", "parameters": {"binary_data": True}}, {"name": "probabilities"}])
        ).encode()
    ),
    "bulk": post(json.dumps(document(parameters={"priority": 2, "timeout": 60_000_000})).encode()),
    "version": raw(0.5, path=b"/v2/models/tiny/versions/1/infer"),
    "request id": raw(0.5, headers=(b"X-Request-Id: a-1.b_2",)),
    "strange request id": raw(0.5, headers=(b"X-Request-Id: a b;c",)),
    "no json": post(b"{"),
    "no body": post(b""),
    "no object": post(b"[1]", b"X-Request-Id: bad-one"),
    "a dark pixel": post(json.dumps(document([0.5] * 47 + [-1])).encode()),
    "not a number": raw(float("nan")),
    "half a tensor": post(bytes(100), RAW),
    "an unknown output": post(json.dumps(document(outputs=[{"name": "gates"}])).encode()),
    "a long header": post(b"{}", b"Inference-Header-Content-Length: 7"),
    "a strange header": post(b"{}", b"Inference-Header-Content-Length: x"),
    "its mode": post(json.dumps(document(parameters={"mode": "random"})).encode()),
    "its exit": post(json.dumps(document(parameters={"exit": 1})).encode()),
    "a strange timeout": post(json.dumps(document(parameters={"timeout": -1})).encode()),
    "too many images": raw(*[0.5] * 9),
}


@pytest.mark.parametrize("predictor", [Echo, Broken])
@pytest.mark.parametrize("name", PLAIN)
def test_the_short_way_gives_the_very_answer_of_the_long_one(
    serve, ways: Counter[str], name: str, predictor: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = PLAIN[name]
    slow = plain.replace(b"\r\n", b"\r\nOrigin: http://elsewhere\r\n", 1)
    with caplog.at_level(logging.CRITICAL, logger="manygates.serving"), serve(predictor, max_queue=8) as connect:
        answers = []
        for request in (plain, plain, slow):
            client = connect()
            client.sendall(request)
            answers.append(Reader(client).answer())
            client.sendall(request)  # on a connection that knows the head
            answers.append(Reader(client).answer())
    assert ways == {"short": 4, "read": 2, "long": 2}
    [(status, headers, body), *others] = answers
    assert status == (
        200 if list(PLAIN).index(name) < list(PLAIN).index("no json") else 400 if len(plain) < 1800 else 413
    ) or (predictor is Broken and status == 500)
    assert (b"x-request-id", b"a-1.b_2") in headers or name != "request id"
    for other_status, other_headers, other_body in others:
        assert other_status == status
        assert other_body == body
        assert without_date(other_headers) == without_date(headers)


def without_date(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = [name for name, _ in headers]
    assert names.count(b"date") == 1
    assert len(names) == len(set(names))
    return sorted(header for header in headers if header[0] != b"date")


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.replace(b"HTTP/1.1", b"HTTP/1.0"),
        lambda request: request.replace(b"Host: x", b"Host: x\r\nConnection: close"),
        lambda request: request.replace(b"/infer", b"/infer?a=b"),
        lambda request: request.replace(b"models/tiny", b"models/t%69ny"),
        lambda request: request.replace(b"Host: x", b"Host: x\r\nContent-Encoding: identity"),
    ],
    ids=["1.0", "close", "query", "quoted", "identity"],
)
def test_what_is_not_plain_is_answered_as_well(serve, ways: Counter[str], change: Callable[[bytes], bytes]) -> None:
    with serve(Echo) as connect:
        client = connect()
        client.sendall(change(raw(0.5)))
        status, _, body = Reader(client).answer()
        assert (status, marks_of(body)) == (200, [0.5])
    assert +ways == {"long": 1}


@pytest.mark.parametrize("kind", ["gzip", "deflate", "x"])
def test_a_compressed_body_is_refused_on_either_way(serve, ways: Counter[str], kind: str) -> None:
    with serve(Echo) as connect:
        for _ in range(2):
            client = connect()
            client.sendall(raw(0.5, headers=(b"Content-Encoding: " + kind.encode(),)))
            assert answer(client)[0] == 415
    assert ways["short"] == 0


@pytest.mark.parametrize("seed", range(8))
def test_requests_of_every_kind_in_any_pieces_are_answered_in_their_order(serve, ways: Counter[str], seed: int) -> None:
    """Whole, cut anywhere, or many in one segment; on a connection that knows a head of theirs, or does not."""
    rng = random.Random(seed)
    wanted: list[Any] = []
    requests = []
    for _ in range(60):
        kind = rng.choice(["raw"] * 16 + ["other", "two", "id", "json", "live", "metrics", "bad", "chunked", "unknown"])
        mark = rng.randrange(1, 1000) / 1024
        if kind in ("raw", "other", "id"):
            head = {"raw": (), "other": (b"X-Other: yes",), "id": (b"X-Request-Id: r%d" % rng.randrange(10, 99),)}[kind]
            requests.append(raw(mark, headers=head))
            wanted.append((200, [mark], head[0].partition(b": ")[2] if kind == "id" else None))
        elif kind == "two":
            requests.append(raw(mark, mark / 2))
            wanted.append((200, [mark, mark / 2], None))
        elif kind == "json":
            requests.append(post(json.dumps(document([mark] * 48)).encode()))
            wanted.append((200, mark, None))
        elif kind == "live":
            requests.append(LIVE + b"\r\n")
            wanted.append((200, {"live": True}, None))
        elif kind == "metrics":
            requests.append(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            wanted.append((200, None, None))
        elif kind == "bad":
            requests.append(raw(7.0))
            wanted.append((400, None, None))
        elif kind == "unknown":
            requests.append(raw(mark, path=b"/v2/models/nobody/infer"))
            wanted.append((404, None, None))
        else:
            body = np.full(48, mark, "<f4").tobytes()
            chunks = b"40\r\n" + body[:64] + b"\r\n80\r\n" + body[64:] + b"\r\n0\r\n\r\n"
            requests.append(INFER + RAW + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
            wanted.append((200, [mark], None))
    with serve(Echo, threads=2) as connect:
        client = connect()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = Reader(client)
        for mark in (0.5, 0.25):
            client.sendall(raw(mark))
            assert marks_of(reader.answer()[2]) == [mark]
        sent = answered = 0
        while sent < len(requests):
            group = min(rng.choice([1, 1, 1, 1, 2, 3, 10]), len(requests) - sent)
            stream = b"".join(requests[sent : sent + group])
            cuts = sorted(rng.randrange(len(stream)) for _ in range(rng.choice([0, 0, 0, 1, 2, 5])))
            for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                client.sendall(stream[start:stop])
                time.sleep(0.002 if stop < len(stream) else 0)
            sent += group
            if rng.random() < 0.2 and sent < len(requests):
                continue  # without waiting for the answers
            while answered < sent:
                status, headers, body = reader.answer()
                expected_status, said, request_id = wanted[answered]
                assert status == expected_status, (answered, body)
                assert dict(headers).get(b"x-request-id") == request_id
                if isinstance(said, list):
                    assert marks_of(body) == said
                elif isinstance(said, float):
                    assert json.loads(body)["outputs"][0]["data"] == [said] * 3
                elif said is not None:
                    assert json.loads(body) == said
                answered += 1
        assert reader.rest == b""
    assert ways["short"] > ways["read"] > 0, "no head was recognised"
    assert ways["long"] > 0


def test_a_head_that_is_known_is_recognised_and_one_that_differs_in_a_byte_is_not(
    card, serve, ways: Counter[str]
) -> None:
    class Second(Echo):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            answered = super().predict(images)
            return Prediction(answered.probabilities / 2, answered.logits / 2)

    models = [
        Model(card=replace(card, name=name), mode="single", predictor=predictor)
        for name, predictor in (("tiny", Echo()), ("tine", Second()))
    ]
    with serve(Application(models, Settings(threads=1))) as connect:  # type: ignore[list-item]
        client = connect()
        reader = Reader(client)
        for turn in range(12):
            name = (b"tiny", b"tiny", b"tine")[turn % 3]
            client.sendall(raw(0.5, path=b"/v2/models/%s/infer" % name))
            status, _, body = reader.answer()
            assert (status, marks_of(body)) == (200, [0.5 if name == b"tiny" else 0.25])
        assert ways == {"short": 12, "read": 8}
        # the same length, but the tensor is announced to begin elsewhere
        wrong = raw(0.5).replace(b"Content-Length: 0", b"Content-Length: 4")
        client.sendall(raw(0.5))
        assert reader.answer()[0] == 200
        client.sendall(wrong)
        assert reader.answer()[0] == 400
        # and another method, or a target in capitals
        for start, status in ((b"POST /V2", 404), (b"PUT  /v2", 405)):
            client.sendall(raw(0.5))
            assert reader.answer()[0] == 200
            client.sendall(start + raw(0.5)[len(start) :])
            assert reader.answer()[0] == status


def test_a_known_head_is_read_anew_after_its_model_was_loaded_again(card, serve, ways: Counter[str]) -> None:
    class Half(Echo):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            answered = super().predict(images)
            return Prediction(answered.probabilities / 2, answered.logits / 2)

    application = Application([Model(card=card, mode="single", predictor=Echo())], Settings(threads=1))

    pending: list[Callable[[], None]] = []

    async def changing(scope: Any, receive: Any, send: Any) -> None:
        while pending:
            pending.pop()()
        await application.starlette(scope, receive, send)

    application.rest = changing

    with serve(application) as connect:
        client = connect()
        reader = Reader(client)

        def ask() -> Any:
            client.sendall(raw(0.5))
            status, _, body = reader.answer()
            return marks_of(body) if status == 200 else status

        def change(action: Callable[[], None]) -> None:
            pending.append(action)
            other = connect()
            other.sendall(LIVE + b"\r\n")
            assert answer(other)[0] == 200

        assert [ask(), ask()] == [[0.5], [0.5]]
        change(lambda: application.service.put(Model(card=card, mode="single", predictor=Half())))
        assert [ask(), ask()] == [[0.25], [0.25]]
        change(lambda: application.service.drop("tiny"))
        assert [ask(), ask()] == [404, 404]
        change(lambda: application.service.put(Model(card=card, mode="single", predictor=Echo())))
        assert [ask(), ask()] == [[0.5], [0.5]]
    assert ways == {"short": 6, "read": 3}


@pytest.mark.parametrize(
    "start",
    [
        INFER + b"Content-Length: %d\r\n\r\n",
        INFER + b"Origin: a\r\nContent-Length: %d\r\n\r\n",
        CLASSIFY + b"Content-Length: %d\r\n\r\n",
        INFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n",
    ],
    ids=["plain", "long way", "classify", "chunk"],
)
def test_bytes_of_a_body_are_never_taken_for_a_request_that_is_known(serve, start: bytes) -> None:
    with serve(Echo) as connect:
        client = connect()
        known = raw(0.5)
        for _ in range(2):
            client.sendall(known)
            assert answer(client)[0] == 200
        client.sendall(start % len(known))
        time.sleep(0.02)
        client.sendall(known)
        time.sleep(0.02)
        client.sendall(b"\r\n0\r\n\r\n" if b"chunked" in start else b"")
        status, body = answer(client)
        assert status in (400, 415)
        client.sendall(known)
        status, body = answer(client)
        assert (status, marks_of(body)) == (200, [0.5])


def test_bytes_of_a_head_are_never_taken_for_a_request_that_is_known(serve) -> None:
    with serve(Echo) as connect:
        client = connect()
        known = raw(0.5)
        client.sendall(known)
        assert answer(client)[0] == 200
        client.sendall(LIVE + b"X-Long: ")
        time.sleep(0.02)
        client.sendall(known)  # its lines are headers of ours, and its body is ours
        assert answer(client) == (200, b'{"live":true}')
        client.sendall(known)
        assert marks_of(answer(client)[1]) == [0.5]


def test_known_requests_sent_ahead_are_answered_each(serve, ways: Counter[str]) -> None:
    with serve(Echo, threads=1) as connect:
        client = connect()
        reader = Reader(client)
        for count in (1, 2, 1, 5, 1, 1):
            marks = [(turn + 1) / 16 for turn in range(count)]
            client.sendall(b"".join(raw(mark) for mark in marks))
            assert [marks_of(reader.answer()[2]) for _ in marks] == [[mark] for mark in marks]
        half = len(raw(0.5)) // 2
        client.sendall(raw(0.5) + raw(0.25)[:half])
        assert marks_of(reader.answer()[2]) == [0.5]
        client.sendall(raw(0.25)[half:])
        assert marks_of(reader.answer()[2]) == [0.25]
    assert ways["short"] > ways["read"]


def waits_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("abruptly", [False, True])
def test_a_client_that_hangs_up_in_the_queue_gives_up_its_place(serve, known: bool, abruptly: bool) -> None:
    gate = Gate()
    with serve(gate, threads=1, max_batch=1, max_queue=1) as connect:
        service = connect.application.service
        client = connect()
        if known:
            gate.opened.set()
            client.sendall(raw(0.5))
            assert answer(client)[0] == 200
            gate.opened.clear()
            gate.entered.clear()
        held = [connect(), connect()]
        for in_flight, other in enumerate(held, 1):
            other.sendall(raw(0.125))  # the second is at hand for the worker
            waits_until(lambda count=in_flight: service.scheduler.in_flight == count)
        client.sendall(raw(0.5))
        waits_until(lambda: service.find("tiny").queue.waiting == 1)
        refused = connect()
        refused.sendall(raw(0.125))
        assert answer(refused)[0] == 429
        if abruptly:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        waits_until(lambda: service.find("tiny").queue.waiting == 0)
        assert connect.application.budget.held == 2 * 192
        fits = connect()
        fits.sendall(raw(0.25))
        waits_until(lambda: service.find("tiny").queue.waiting == 1)
        gate.opened.set()
        assert marks_of(answer(fits)[1]) == [0.25]
        assert [marks_of(answer(other)[1]) for other in held] == [[0.125]] * 2


def test_a_client_that_hangs_up_while_it_is_computed_is_forgotten(serve) -> None:
    gate = Gate()
    with serve(gate, threads=1) as connect:
        client = connect()
        client.sendall(raw(0.5))
        assert gate.entered.wait(10)
        client.close()
        waits_until(lambda: connect.application.budget.held == 0)
        gate.opened.set()
        other = connect()
        other.sendall(raw(0.25))
        assert marks_of(answer(other)[1]) == [0.25]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_holds_nothing(serve) -> None:
    with serve(Echo) as connect:
        for part in (1, 100, 191):
            client = connect()
            client.sendall(raw(0.5)[: -192 + part])
            waits_until(lambda part=part: connect.application.budget.held == part)
            client.close()
            waits_until(lambda: connect.application.budget.held == 0)
            assert connect.application.collecting == set()


def test_bodies_that_are_only_announced_take_no_ones_room(serve, ways: Counter[str]) -> None:
    with serve(Echo, max_body_bytes=1000, max_total_body_bytes=1500) as connect:
        for _ in range(20):
            connect().sendall(INFER + b"Content-Length: 1000\r\n\r\n")
        client = connect()
        for _ in range(3):
            client.sendall(raw(0.5))
            assert marks_of(answer(client)[1]) == [0.5]
    assert ways["short"] == 3


def test_a_known_head_is_no_way_around_the_limit_of_all_bodies(serve) -> None:
    gate = Gate()
    gate.opened.set()
    with serve(gate, threads=1, max_body_bytes=1000, max_total_body_bytes=1000) as connect:
        clients = [connect() for _ in range(6)]
        for client in clients:
            client.sendall(raw(0.5))
            assert answer(client)[0] == 200
        gate.opened.clear()
        for client in clients:
            client.sendall(raw(0.5))
        refused = clients.pop() if (done := readable(*clients)) is clients[-1] else done
        if refused in clients:
            clients.remove(refused)
        received = everything(refused)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in received
        assert b"requests of 1000 bytes are being answered" in received
        assert connect.application.budget.held == 5 * 192
        gate.opened.set()
        assert [answer(client)[0] for client in clients] == [200] * 5


def test_a_body_that_outgrows_the_room_for_all_is_refused_and_its_room_given_back(serve) -> None:
    with serve(Echo, max_body_bytes=1000, max_total_body_bytes=1500) as connect:
        clients = [connect(), connect()]
        for client in clients:
            client.sendall(INFER + b"Content-Length: 1000\r\n\r\n")
        clients[0].sendall(b" " * 900)
        waits_until(lambda: connect.application.budget.held == 900)
        clients[1].sendall(b" " * 500)
        waits_until(lambda: connect.application.budget.held == 1400)
        clients[1].sendall(b" " * 200)
        assert everything(clients[1]).startswith(b"HTTP/1.1 503 ")
        waits_until(lambda: connect.application.budget.held == 900)
        clients[0].sendall(b" " * 100)
        assert answer(clients[0])[0] == 400


def test_a_client_that_does_not_read_its_answers_is_not_read_any_more(
    serve, ways: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[Connection] = []
    begin = Connection.connection_made

    def remembering(self: Connection, transport: Any) -> None:
        connections.append(self)
        begin(self, transport)

    monkeypatch.setattr(Connection, "connection_made", remembering)
    # a small request of a large answer, which comes in one piece and so by the shortest way
    request = mixed(document(rows=1000, size=48_000, datatype="UINT8"), bytes([100]) * 48_000)
    with serve(Echo, max_batch=1000, max_queue=1000) as connect:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(connect().getpeername())
        small.settimeout(10)
        metrics = connect.application.service.find("tiny").metrics

        def answered() -> int:
            return metrics.statistics()["inference_stats"]["success"]["count"]

        sent = 0
        while sent < 500:
            small.sendall(request)
            sent += 1
            deadline = time.monotonic() + 0.5
            while answered() < sent and time.monotonic() < deadline:
                time.sleep(0.001)
            if answered() < sent:
                break
        assert sent < 500, "everything was taken, for a client that reads nothing"
        other = connect()
        other.sendall(raw(0.25))
        assert marks_of(answer(other)[1]) == [0.25]
        assert [made.flow.read_paused for made in connections] == [False, True, False]
        reader = Reader(small)
        for _ in range(sent):
            data = json.loads(reader.answer()[2])["outputs"][0]["data"]
            assert set(data) == {float(np.float32(100) / np.float32(255))}
        small.sendall(raw(0.125))
        assert marks_of(reader.answer()[2]) == [0.125]
        small.close()
    assert ways["short"] > ways["read"]


def test_an_idle_connection_is_closed_at_its_time_and_not_before(serve) -> None:
    live = LIVE + b"\r\n"
    requests = {"read": [live, live, raw(0.5)], "known": [raw(0.5)] * 3, "long way": [raw(0.5), live, live]}
    with serve(Echo, keep_alive_timeout=1) as connect:
        clients = {last: connect() for last in requests}
        for step in range(3):
            time.sleep(0.6 if step else 0)
            for last, client in clients.items():
                client.sendall(requests[last][step])
                assert answer(client)[0] == 200
        started = time.monotonic()
        for client in clients.values():
            assert everything(client) == b""
            assert 0.8 < time.monotonic() - started < 2.5


def test_a_connection_is_not_idle_while_its_request_is_computed(serve) -> None:
    class Slow(Echo):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            time.sleep(0.0 if images[0, 0, 0, 0] < 0.4 else 1.3)
            return super().predict(images)

    with serve(Slow(), keep_alive_timeout=1) as connect:
        client = connect()
        for mark in (0.25, 0.5, 0.25):
            client.sendall(raw(mark))
            assert marks_of(answer(client)[1]) == [mark]


def test_each_request_gets_its_own_id_back(serve, ways: Counter[str]) -> None:
    with serve(Echo) as connect:
        client = connect()
        reader = Reader(client)
        for given, told in (
            ("one", "one"),
            ("one", "one"),
            ("two", "two"),
            ("two", "two"),
            (None, None),
            ("a b", None),
        ):
            client.sendall(raw(0.5, headers=(b"X-Request-Id: " + given.encode(),) if given else ()))
            found = [value.decode() for name, value in reader.answer()[1] if name == b"x-request-id"]
            assert found == ([told] if told else [])
    assert ways == {"short": 6, "read": 4}


def test_requests_on_the_short_way_that_are_in_flight_at_sigterm_are_answered_and_idle_connections_closed(
    application_of,
) -> None:
    gate = Gate()
    application = application_of(gate, threads=1, max_batch=2)
    try:
        with server_to_stop(application) as server:
            clients = [server.connect() for _ in range(12)]
            gate.opened.set()
            for client in clients[:9]:
                client.sendall(raw(0.5))
                assert answer(client)[0] == 200
            gate.opened.clear()
            gate.entered.clear()
            for number, client in enumerate(clients[:8]):
                client.sendall(raw(number / 16))
            assert gate.entered.wait(10)
            waits_until(lambda: application.budget.held == 8 * 192)
            server.terminate()
            for idle in clients[8:]:
                assert everything(idle) == b""
            gate.opened.set()
            for number, client in enumerate(clients[:8]):
                status, headers, body = Reader(client).answer()
                assert (status, marks_of(body)) == (200, [number / 16])
                assert (b"connection", b"close") in headers
                assert everything(client) == b""
            assert server.ends()
            assert application.budget.held == 0
    finally:
        gate.opened.set()


def test_a_full_queue_and_a_deadline_are_answered_on_the_short_way(serve) -> None:
    gate = Gate()
    with serve(gate, threads=1, max_batch=1, max_queue=1) as connect:
        clients = [connect() for _ in range(4)]
        for in_flight, client in enumerate(clients[:2], 1):
            client.sendall(raw(0.5))  # the second is at hand for the worker
            waits_until(lambda count=in_flight: connect.application.service.scheduler.in_flight == count)
        started = time.monotonic()
        clients[2].sendall(post(json.dumps(document(parameters={"timeout": 400_000})).encode()))
        waits_until(lambda: connect.application.service.find("tiny").queue.waiting == 1)
        clients[3].sendall(raw(0.5))
        status, headers, body = Reader(clients[3]).answer()
        assert status == 429
        assert (b"retry-after", b"1") in headers
        assert b"the queue is full (1 images)" in body
        status, _, body = Reader(clients[2]).answer()
        assert status == 504
        assert b"the request's own timeout is over" in body
        assert 0.3 < time.monotonic() - started < 5
        gate.opened.set()
        assert [answer(client)[0] for client in clients[:2]] == [200, 200]
        clients[2].sendall(raw(0.25))
        assert marks_of(answer(clients[2])[1]) == [0.25]


def test_a_defect_in_writing_an_answer_is_answered_with_500_and_costs_no_one_else_theirs(
    serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    with serve(gate, threads=1) as connect:
        codec = connect.application.service.find("tiny").codec
        respond = codec.respond

        def sometimes(request: Any, answered: Prediction) -> bytes:
            if answered.probabilities[0, 0] == 0.5:
                raise KeyError("a defect of ours")
            return respond(request, answered)

        monkeypatch.setattr(codec, "respond", sometimes)
        clients = [connect() for _ in range(4)]
        clients[0].sendall(raw(0.25))
        assert gate.entered.wait(10)
        for client, mark in zip(clients[1:], (0.125, 0.5, 0.375), strict=True):
            client.sendall(raw(mark))
            time.sleep(0.01)
        with caplog.at_level(logging.CRITICAL, logger="manygates.serving"):
            gate.opened.set()
            assert [answer(client)[0] for client in clients] == [200, 200, 500, 200]
        clients[2].sendall(raw(0.25))
        assert marks_of(answer(clients[2])[1]) == [0.25]
        clients[2].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'manygates_request_failures_total{model="tiny",reason="defect"} 1.0' in answer(clients[2])[1]


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100])
def test_garbage_behind_a_request_ends_the_connection_and_gives_its_place_back(serve, garbage: bytes) -> None:
    gate = Gate()
    with serve(gate, threads=1, max_batch=1) as connect:
        first = connect()
        first.sendall(raw(0.25))
        assert gate.entered.wait(10)
        client = connect()
        client.sendall(raw(0.5) + garbage)
        assert b"200 OK" not in everything(client)
        waits_until(lambda: connect.application.budget.held == 192)
        gate.opened.set()
        assert answer(first)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2], ids=["the time to drain is over", "a second signal came"])
def test_whoever_still_waits_at_the_end_gets_503_on_either_way(
    signals: int, application_of, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    application = application_of(gate, threads=1, max_batch=1, drain_timeout=1 if signals == 1 else 60)
    try:
        with server_to_stop(application) as server:
            clients = [server.connect() for _ in range(4)]
            for number, client in enumerate(clients):  # one is computed, one is at hand, and two wait
                client.sendall(raw(0.5, headers=(b"Origin: x",) if number % 2 else ()))
                waits_until(lambda count=number: application.budget.held == 192 * (count + 1))
            server.terminate()
            if signals == 2:
                time.sleep(0.3)
                server.terminate()
            for client in clients:
                received = everything(client)
                assert received.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nretry-after: 1\r\n" in received
            assert server.ends()
            assert application.stuck, "a batch is still being computed"
            assert "Traceback" not in caplog.text
            assert not gate.opened.is_set()
            assert application.budget.held == 0
    finally:
        gate.opened.set()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], ssl.SSLContext]:
    """Return the settings of a server with a certificate, and what a client needs that trusts it."""
    tmp_path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return {"tls_certificate": str(tmp_path / "certificate.pem"), "tls_key": str(tmp_path / "key.pem")}, client


@pytest.mark.parametrize(
    ("start", "status"), [(b"\x00\x01\r\n\r\n", 400), (LIVE + b"X: " + b"a" * 400_000, 431)], ids=["garbage", "head"]
)
def test_a_refusal_over_tls_leaves_no_traceback_and_waits_for_the_client_to_read_it(
    serve, tls, start: bytes, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounded, "LINGER_SECONDS", 0.5)
    settings, trusting = tls
    with serve(**settings) as connect:
        with trusting.wrap_socket(connect(), server_hostname="localhost") as client:
            client.sendall(LIVE + b"\r\n")
            assert answer(client)[0] == 200
            client.sendall(start)
            refused_at = time.monotonic()
            assert answer(client)[0] == status
            for _ in range(3):  # who still sends is not told off with a reset, which would destroy the answer
                time.sleep(0.05)
                client.sendall(b"a" * 1000)
            assert everything(client) == b""
        assert 0.3 < time.monotonic() - refused_at < 5
    assert caplog.text == ""


def test_whoever_begins_no_handshake_is_cut_off_after_the_time_for_a_head(serve, tls) -> None:
    with serve(header_timeout=0.3, **tls[0]) as connect:
        for begun in (b"", b"\x16\x03\x01\x02\x00\x01"):
            client = connect()
            client.sendall(begun)
            started = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
            assert 0.2 < time.monotonic() - started < 5


def test_connections_without_a_handshake_are_counted(serve, tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 2)
    settings, trusting = tls
    with serve(max_connections=3, header_timeout=0.5, **settings) as connect:
        silent = [connect() for _ in range(5)]
        with (
            pytest.raises((ConnectionError, ssl.SSLError)),
            trusting.wrap_socket(connect(), server_hostname="localhost"),
        ):
            pass
        for client in silent:  # their time is over
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        for _ in range(20):
            with trusting.wrap_socket(connect(), server_hostname="localhost") as client:
                client.sendall(LIVE + b"Connection: close\r\n\r\n")
                assert everything(client).startswith(b"HTTP/1.1 200 ")
