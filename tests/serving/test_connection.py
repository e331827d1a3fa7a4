"""Clients that no library would be: raw sockets against a running server."""

import json
import logging
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from serving import connection
from serving.engine import Prediction
from serving.server import Server, allow_open_files, bind

INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
CLASSIFY = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
DOCUMENT = json.dumps(
    {"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]}
).encode()


class Fixed:
    def predict(self, images: np.ndarray) -> Prediction:
        row = np.array([[0.125, 0.625, 0.25]], dtype=np.float32)
        return Prediction(np.repeat(row, len(images), axis=0), np.zeros((len(images), 3), np.float32))


@pytest.fixture
def serve(application_of, serve_in_a_thread) -> Any:
    """Return a context manager that serves with some settings, and yields a function that connects."""

    @contextmanager
    def running(predictor: Any = None, **settings: Any) -> Iterator[Any]:
        with serve_in_a_thread(application_of(predictor or Fixed(), **settings)) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            opened: list[socket.socket] = []

            def connect() -> socket.socket:
                opened.append(socket.create_connection((host, int(port)), timeout=10))
                return opened[-1]

            try:
                yield connect
            finally:
                for client in opened:
                    client.close()

    return running


def everything(client: socket.socket) -> bytes:
    """Read until the server hangs up."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Read one answer; returns its status and body."""
    content = b""
    while b"\r\n\r\n" not in content:
        piece = client.recv(65536)
        assert piece, f"hung up after {content!r}"
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2])
    while len(body) < length:
        body += client.recv(65536)
    return int(head.split()[1]), body


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


@pytest.mark.parametrize("start", [INFER, CLASSIFY], ids=["infer", "classify"])
def test_a_request_that_is_incomplete_when_the_time_to_drain_is_over_gets_503_and_leaves_no_traceback(
    application_of, start: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    listener = bind("127.0.0.1", 0)
    server = Server(application_of(Fixed(), drain_timeout=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    with caplog.at_level(logging.WARNING):
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=10) as client:
            client.sendall(start + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")  # the body is being waited for
            server.handle_exit(signal.SIGTERM, None)
            received = everything(client)
        thread.join(10)
    assert not thread.is_alive()
    assert received.startswith(b"HTTP/1.1 503 ")
    assert b"the server stopped before this was answered" in received
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
        def predict(self, images: np.ndarray) -> Prediction:
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
        assert answer(other)[0] == 200
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
    monkeypatch.setattr(connection, "SPARE_CONNECTIONS", 2)
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
