"""One HTTP connection: uvicorn's, with bounds on what comes before a body, and a short way for inference.

At a few hundred microseconds of computing per image, a task, an ASGI scope and a router for each request would be a
fifth of the cost. So a plain inference request goes from the parser into the queue, and its answer from there to the
socket. And a client sends the same head with each of its requests, whose bytes mean what they meant before: a head that
was read once is recognised, not read again. Whatever is not plain (a proxy's upgrade, a body in chunks, an unknown
model, a refused key) takes the ASGI application's way and is answered there.
"""

import asyncio
import json
import ssl
import time
import weakref
from collections.abc import Collection
from typing import Any, Final, NamedTuple, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import Headers, RequestError, too_many_bytes
from serving.operations.log import clean_request_id
from serving.protocol.open_inference import HEADER_LENGTH, InferRequest, http_response, json_headers
from serving.scheduling.queue import Outcome, Ticket
from serving.scheduling.service import Served, Service

MAX_HEAD_BYTES: Final = 64 * 2**10
"""Request line, headers and trailers together; more is answered with 431. A line without an end may be longer by what
one read from the socket brings, a quarter of a megabyte."""
SPARE_CONNECTIONS: Final = 64
"""Connections beyond the limit that get an answer, 503; any more are closed at once."""
_MAX_PIPELINED: Final = 32
_LINGER_SECONDS: Final = 2.0
_MAX_REMEMBERED_HEAD: Final = 4096
# what a plain request does not have, or not with any other value
_COLD: Final = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"traceparent", b"origin"))


class Hot(Protocol):
    """What the short way needs of an application."""

    service: Service
    held_bytes: int
    """Bytes of all bodies that are being received or answered."""
    connections: "set[Connection]"
    """Those that are receiving the body of a plain inference request."""

    def hot(self, path: bytes, headers: Headers) -> Served | None:
        """Return the model whose inference has this path, if a request with these headers may take the short way."""
        ...

    @property
    def hot_generation(self) -> object:
        """Changes whenever `hot` may answer otherwise than before."""
        ...


class Call(NamedTuple):
    """What the head of a plain inference request says."""

    served: Served
    length: int
    """Of the body."""
    header_length: bytes | None
    request_id: str | None


class _Memory(NamedTuple):
    """The head of this connection's last request."""

    head: bytes
    size: int
    """Of the whole request."""
    call: Call
    generation: object


class _HotCycle:
    """A plain inference request that is being answered; uvicorn sees in it one of its own."""

    __slots__ = (
        "body", "call", "connection", "disconnected", "held", "keep_alive", "more_body", "request",
        "response_complete", "response_started", "started", "ticket",
    )  # fmt: skip

    def __init__(self, connection: "Connection", call: Call) -> None:
        self.connection = connection
        self.call = call
        self.request: InferRequest | None = None
        self.ticket: Ticket | None = None
        self.started = 0.0
        self.held = 0
        """Bytes of the body that count towards the server's total until it is answered."""
        self.body: list[bytes] = []
        self.more_body = True
        self.disconnected = False
        self.keep_alive = True
        self.response_started = False
        self.response_complete = False

    @property
    def message_event(self) -> "_HotCycle":
        """What uvicorn wakes when the client has gone."""
        return self

    def set(self) -> None:
        """Give up the place in the queue if the client has gone."""
        if self.disconnected and not self.response_complete:
            self.response_complete = True
            if self.ticket is not None:
                application = self.connection.application
                assert application is not None  # it gave the ticket
                application.service.scheduler.leave(self.ticket)
            self.connection.release(self)

    def done(self, outcome: Outcome) -> None:
        """Take the answer or the failure."""
        if not self.response_complete:
            self.connection.answer(self, outcome)


class Connection(HttpToolsProtocol):
    """Uvicorn's connection, which alone would wait for ever for the end of a head and keep all of it in memory.

    A client has `header_timeout` seconds from connecting, and from the first byte of each further request, to send a
    head of at most `MAX_HEAD_BYTES`. A request to upgrade to another protocol is answered over HTTP/1.1, as the
    standard allows; uvicorn would drop its body.
    """

    header_timeout: float = 10.0
    """Set by `connections_of`, because uvicorn creates the connections itself; so are the next three."""
    body_timeout: float = 30.0
    max_body_bytes: int = 2**24
    max_total_body_bytes: int = 2**30
    application: Hot | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = False
        self._in_body = False
        """Whether a body is still coming, of a request that may be answered already."""
        self._head_bytes = 0
        self._silent_bytes = 0
        self._progressed = False
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._collecting: _HotCycle | None = None
        self._hot: _HotCycle | None = None
        """The last plain request; others may have been sent ahead since."""
        self._earlier: list[Any] = []
        """Requests before the last one that are not answered yet; uvicorn would not tell them that the client left."""
        self._memory: _Memory | None = None
        self._default_headers: Headers = []
        self._default_lines = b""
        self._begun = 0
        self._idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are far too many connections."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + SPARE_CONNECTIONS:
            self._refused = True
            transport.close()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers, and give up the place in the queue."""
        self._cancel_timer()
        self._cancel_body_timer()
        if self._hot is not None:
            self._hot.disconnected = True
            self._hot.set()
        for cycle in self._earlier:
            cycle.disconnected = True
            cycle.message_event.set()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse what is no request or has too long a head."""
        if self._refused:
            return  # we only wait for the client to read why
        memory = self._memory
        if memory is not None and len(data) == memory.size and self._is_idle and data.startswith(memory.head):
            if memory.generation != self.application.hot_generation:  # type: ignore[union-attr]
                self._memory = None
            elif self._has_room(memory.call.length):
                cycle = self.cycle = self._hot = _HotCycle(self, memory.call)  # type: ignore[assignment]
                self._hold(cycle, memory.call.length)
                cycle.more_body = False
                self._enter(cycle, data[len(memory.head) :])
                return
        self._unset_keepalive_if_required()
        self._progressed = False
        self._begun = 0
        clean = self._is_idle
        self._feed(data)
        if clean and self._begun == 1:
            self._remember(data)
        if self._refused or self.transport.is_closing():
            return
        # the parser keeps an unfinished line to itself, so what came is counted, not only what it reports
        self._silent_bytes = 0 if self._progressed else self._silent_bytes + len(data)
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._timer is None and (self._in_head or self.cycle is None or not self._progressed):
            self._expect_head()
        elif self.cycle is not None and self.cycle.response_complete:
            self._expect_rest()

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_head = self._progressed = True
        self._begun += 1
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, or one trailer."""
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer; but a request to upgrade is parsed again without that wish, see `_feed`."""
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests sent ahead")  # ends the parser, see `_feed`
        call = self._plain_call()
        if call is None:
            earlier = self.cycle
            super().on_headers_complete()
            if earlier is not None and not earlier.response_complete:
                self._earlier = [*(cycle for cycle in self._earlier if not cycle.response_complete), earlier]
        else:
            self.cycle = self._collecting = self._hot = _HotCycle(self, call)  # type: ignore[assignment]
            assert self.application is not None
            self._body_timer = self.loop.call_later(self.body_timeout, self._body_is_late, self._collecting)
            self.application.connections.add(self)
        self._in_head = False
        self._in_body = self._progressed = True
        self._cancel_timer()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._progressed = True
        cycle = self._collecting
        if cycle is None:
            super().on_body(body)
        elif self._has_room(len(body)):
            self._hold(cycle, len(body))
            cycle.body.append(body)
        else:
            self._answer_error(cycle, too_many_bytes(self.max_total_body_bytes))

    def on_message_complete(self) -> None:
        """Say that the body is complete."""
        self._progressed = True
        self._in_body = False
        self._cancel_body_timer()
        cycle = self._collecting
        if cycle is not None:
            self._stop_collecting()
            cycle.more_body = False
            self._enter(cycle, cycle.body[0] if len(cycle.body) == 1 else b"".join(cycle.body))
        elif not self._in_head:
            super().on_message_complete()

    def resume_writing(self) -> None:
        """Read on: the client has read what it was sent."""
        super().resume_writing()
        self.flow.resume_reading()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it has been idle for as long as it may be."""
        self.timeout_keep_alive_task = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a new timer starts when it is answered
        rest = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if rest > 0.01:
            self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def answer(self, cycle: _HotCycle, outcome: Outcome | RequestError) -> None:
        """Write what a plain inference request is answered with."""
        served = cycle.call.served
        if isinstance(outcome, Exception):
            assert self.application is not None
            self._answer_error(cycle, self.application.service.failure(served, outcome))
            return
        request = cycle.request
        assert request is not None
        try:
            response = served.codec.respond(request, outcome)
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            self.answer(cycle, error)
            return
        served.metrics.answered("infer", request.form.asked.plan, time.perf_counter() - cycle.started)
        self._complete(cycle, response)

    def release(self, cycle: _HotCycle) -> None:
        """Forget a body that is answered or given up."""
        assert self.application is not None
        self.application.held_bytes -= cycle.held
        cycle.held = 0
        if self._collecting is cycle:
            self._stop_collecting()

    def stop_collecting(self, error: RequestError) -> None:
        """Answer a plain inference request whose body is incomplete, and hang up."""
        if self._collecting is not None:
            self._answer_error(self._collecting, error)

    @property
    def _is_idle(self) -> bool:
        """Whether the next byte begins a request, and nothing is being answered."""
        cycle = self.cycle
        return (
            not self._in_head
            and not self._in_body
            and not self._silent_bytes
            and (cycle is None or cycle.response_complete)
            and not self.pipeline
            and not self.flow.write_paused
        )

    def _plain_call(self) -> Call | None:
        """Return what the head says, if the request may take the short way."""
        application = self.application
        if application is None or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        if (self.cycle is not None and not self.cycle.response_complete) or self.pipeline or self.flow.write_paused:
            return None
        served = application.hot(self.url, self.headers)
        if served is None or not self.parser.should_keep_alive():
            return None
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            return None
        length, header_length, request_id = None, None, None
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value) if value.isdigit() and len(value) < 19 else None
            elif name == HEADER_LENGTH:
                header_length = value
            elif name == b"x-request-id":
                request_id = clean_request_id(value)
            elif name in _COLD:
                return None
        if length is None or length > self.max_body_bytes or not self._has_room(length):
            return None
        return Call(served, length, header_length, request_id)

    def _has_room(self, length: int) -> bool:
        """Whether as many bytes more may be held."""
        assert self.application is not None
        return self.application.held_bytes + length <= self.max_total_body_bytes

    def _hold(self, cycle: _HotCycle, length: int) -> None:
        """Account for bytes of a body that have come: what was only announced takes no one's place."""
        assert self.application is not None
        self.application.held_bytes += length
        cycle.held += length

    def _remember(self, data: bytes) -> None:
        """Remember the head of a plain request that came whole, and alone, in one piece."""
        cycle: Any = self.cycle
        if not isinstance(cycle, _HotCycle) or cycle.more_body or self._collecting is not None:
            return
        head = data[: len(data) - cycle.call.length]
        if len(head) <= _MAX_REMEMBERED_HEAD and data.find(b"\r\n\r\n") + 4 == len(head) and head.startswith(b"POST "):
            assert self.application is not None
            self._memory = _Memory(head, len(data), cycle.call, self.application.hot_generation)

    def _enter(self, cycle: _HotCycle, body: bytes) -> None:
        """Read a whole request and queue it."""
        served = cycle.call.served
        if served.replaced:  # it was loaded again while the body came
            served = served.latest
            cycle.call = cycle.call._replace(served=served)
        cycle.started = time.perf_counter()
        assert self.application is not None
        try:
            cycle.request = request = served.codec.decode(body, cycle.call.header_length)
            cycle.ticket = self.application.service.enter(served, request.images, request.form.asked, cycle.done)
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            self._answer_error(cycle, self.application.service.failure(served, error))

    def _answer_error(self, cycle: _HotCycle, error: RequestError) -> None:
        assert self.application is not None
        self.application.service.metrics.failed(cycle.call.served.name, error.reason)
        content = json.dumps({"error": str(error)}).encode()
        status = STATUS_LINE[error.status].removeprefix(b"HTTP/1.1 ").rstrip()
        response = http_response(status, json_headers(len(content)) + error.headers, content)
        if cycle.more_body or (b"connection", b"close") in error.headers:
            cycle.keep_alive = False
        self._complete(cycle, response)

    def _complete(self, cycle: _HotCycle, response: bytes) -> None:
        """Write a response, and go on with what came meanwhile."""
        cycle.response_complete = True
        self.release(cycle)
        if self.transport.is_closing():
            return
        if self.server_state.default_headers is not self._default_headers:  # the date, which changes every second
            self._default_headers = self.server_state.default_headers
            self._default_lines = b"".join(b"%s: %s\r\n" % header for header in self._default_headers)
        more = self._default_lines
        if cycle.call.request_id is not None:
            more += b"x-request-id: %s\r\n" % cycle.call.request_id.encode()
        if not cycle.keep_alive and b"\r\nconnection: close\r\n" not in response.partition(b"\r\n\r\n")[0] + b"\r\n":
            more += b"connection: close\r\n"
        end = response.index(b"\r\n") + 2
        response = b"".join((response[:end], more, response[end:]))
        if not cycle.keep_alive:
            self.transport.write(response)
            self.transport.close()
            return
        self.transport.write(response)
        if self.pipeline:
            self.on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.flow.write_paused:
            self.flow.pause_reading()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _body_is_late(self, cycle: _HotCycle) -> None:
        self._body_timer = None
        received = sum(map(len, cycle.body))
        self._answer_error(
            cycle,
            RequestError(
                408,
                "body_timeout",
                f"only {received} bytes came within {self.body_timeout:g} seconds; send faster",
                [(b"connection", b"close")],
            ),
        )

    def _stop_collecting(self) -> None:
        self._collecting = None
        self._cancel_body_timer()
        if self.application is not None:
            self.application.connections.discard(self)

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _feed(self, data: bytes) -> None:
        pieces = [data]
        while pieces and not self._refused:
            piece = pieces.pop()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    self._refuse(400, "CONNECT is not offered.")
                    return
                pieces.append(piece[upgrade.args[0] :])
                pieces.append(self._head_without_upgrade())
                # a parser cannot be talked out of it
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse_head()
                else:
                    self._refuse(400, "Invalid HTTP request received.")

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _count(self, length: int) -> None:
        self._head_bytes += length
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # ends the parser, see `_feed`

    def _refuse_head(self) -> None:
        self._refuse(431, f"The request line and headers exceed {MAX_HEAD_BYTES} bytes.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, and hang up a little later: a client that is still sending would miss the answer."""
        self._refused = True
        self._cancel_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            if self._in_head or self.pipeline or self.cycle.response_started:
                self.transport.close()  # an earlier answer is to come first, and ours would be taken for it
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        headers = (
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(message)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + headers.encode() + message.encode())
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _expect_rest(self) -> None:
        """See to it that a connection ends in time whose request was answered before all of its body had come."""
        if self._in_body:
            if self._body_timer is None:
                self._body_timer = self.loop.call_later(self.body_timeout, self.transport.close)
        elif self._is_idle and self.timeout_keep_alive_task is None:
            self._idle_since = self.loop.time()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # an earlier request of this connection is still being answered
        else:
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connections_of(
    application: Hot | None,
    *,
    header_timeout: float,
    body_timeout: float = 30.0,
    max_body_bytes: int = 2**24,
    max_total_body_bytes: int = 2**30,
) -> type[Connection]:
    """Return the connection's class with those limits, for uvicorn to create connections from."""
    fields = {
        "application": application,
        "header_timeout": header_timeout,
        "body_timeout": body_timeout,
        "max_body_bytes": max_body_bytes,
        "max_total_body_bytes": max_total_body_bytes,
    }
    return type("Connection", (Connection,), fields)


def limit_handshakes(context: ssl.SSLContext, connections: Collection[object], most: int, timeout: float) -> None:
    """Close a connection before its TLS handshake if there are `most` in theirs and among `connections` already.

    A `Connection` is told of its transport after the handshake only, so it cannot count those that never begin one.
    `timeout` is how many seconds the event loop gives a handshake.
    """
    begun: weakref.WeakKeyDictionary[ssl.SSLObject, float] = weakref.WeakKeyDictionary()

    def full() -> bool:
        return len(begun) + len(connections) >= most

    class Counted(ssl.SSLObject):
        """One connection's TLS."""

        def __new__(cls) -> "Counted":
            now = time.monotonic()
            if full():  # asyncio leaves what was broken off to the garbage collector, which may come late
                for gone in [one for one, since in begun.items() if now - since > timeout]:
                    del begun[gone]
            if full():
                raise ConnectionAbortedError("too many connections")
            new = super().__new__(cls)
            begun[new] = now
            return new

        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except BaseException:
                begun.pop(self, None)
                raise
            begun.pop(self, None)

    context.sslobject_class = Counted
