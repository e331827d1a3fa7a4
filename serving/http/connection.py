"""One HTTP connection: a bounded one, with a short way for inference.

At a few hundred microseconds of computing per image, a task, an ASGI scope and a router for each request would be a
fifth of the cost. So a plain inference request goes from the parser into the queue, and its answer from there to the
socket. And a client sends the same head with each of its requests, whose bytes mean what they meant before: a head that
was read once is recognised, not read again. Whatever is not plain (a proxy's upgrade, a body in chunks, an unknown
model, a refused key) takes the ASGI application's way and is answered there.
"""

import json
import time
from typing import Any, Final, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.errors import Headers, RequestError
from serving.http.app import Application
from serving.http.bodies import body_is_late
from serving.http.bounded import BoundedConnection
from serving.operations.log import clean_request_id
from serving.operations.settings import Settings
from serving.protocol.open_inference import HEADER_LENGTH, InferRequest, http_response, json_headers
from serving.scheduling.queue import Outcome, Ticket
from serving.scheduling.service import Served

_MAX_REMEMBERED_HEAD: Final = 4096
# what a plain request does not have, or not with any other value
_COLD: Final = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"traceparent", b"origin"))


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
                self.connection.application.service.scheduler.leave(self.ticket)
            self.connection.release(self)

    def done(self, outcome: Outcome) -> None:
        """Take the answer or the failure."""
        if not self.response_complete:
            self.connection.answer(self, outcome)


class Connection(BoundedConnection):
    """A bounded connection that knows the short way."""

    application: Application
    """Set by `connections_of`; so is the next."""
    max_body_bytes: int = 2**24

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._collecting: _HotCycle | None = None
        self._hot: _HotCycle | None = None
        """The last plain request; others may have been sent ahead since."""
        self._memory: _Memory | None = None
        self._default_headers: Headers = []
        self._default_lines = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the place in the queue."""
        if self._hot is not None:
            self._hot.disconnected = True
            self._hot.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Recognise the head of the last request, or parse what came."""
        if self._refused:
            return  # we only wait for the client to read why
        idle = self._is_idle
        memory = self._memory
        if memory is not None and idle and len(data) == memory.size and data.startswith(memory.head):
            if memory.generation != self.application.hot_generation:
                self._memory = None
            elif self.application.budget.has_room(memory.call.length):
                cycle = self.cycle = self._hot = _HotCycle(self, memory.call)  # type: ignore[assignment]
                cycle.held = self.application.budget.take(memory.call.length)
                cycle.more_body = False
                self._enter(cycle, data[len(memory.head) :])
                return
        super().data_received(data)
        if idle and self._begun == 1:
            self._remember(data)

    def begin_answer(self) -> None:
        """Collect the body of a plain request; hand any other one to the application."""
        call = self._plain_call()
        if call is None:
            super().begin_answer()
            return
        self.cycle = self._collecting = self._hot = _HotCycle(self, call)  # type: ignore[assignment]
        self._body_timer = self.loop.call_later(self.body_timeout, self._body_is_late, self._collecting)
        self.application.collecting.add(self)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        cycle = self._collecting
        if cycle is None:
            super().on_body(body)
            return
        self._progressed = True
        try:
            cycle.held += self.application.budget.take(len(body))
        except RequestError as error:
            self._answer_error(cycle, error)
        else:
            cycle.body.append(body)

    def on_message_complete(self) -> None:
        """Say that the body is complete."""
        cycle = self._collecting
        if cycle is None:
            super().on_message_complete()
            return
        self._end_body()
        self._stop_collecting()
        cycle.more_body = False
        self._enter(cycle, cycle.body[0] if len(cycle.body) == 1 else b"".join(cycle.body))

    def answer(self, cycle: _HotCycle, outcome: Outcome | RequestError) -> None:
        """Write what a plain inference request is answered with."""
        served = cycle.call.served
        if isinstance(outcome, Exception):
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
        self.application.budget.give_back(cycle.held)
        cycle.held = 0
        if self._collecting is cycle:
            self._stop_collecting()

    def stop_collecting(self, error: RequestError) -> None:
        """Answer a plain inference request whose body is incomplete, and hang up."""
        if self._collecting is not None:
            self._answer_error(self._collecting, error)

    def _plain_call(self) -> Call | None:
        """Return what the head says, if the request may take the short way."""
        parser, cycle = self.parser, self.cycle
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return None
        if (cycle is not None and not cycle.response_complete) or self.pipeline or self.flow.write_paused:
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
        if length is None or length > self.max_body_bytes or not self.application.budget.has_room(length):
            return None
        served = self.application.hot(self.url, self.headers)
        return None if served is None else Call(served, length, header_length, request_id)

    def _remember(self, data: bytes) -> None:
        """Remember the head of a plain request that came whole, and alone, in one piece."""
        cycle: Any = self.cycle
        if not isinstance(cycle, _HotCycle) or cycle.more_body or self._collecting is not None:
            return
        head = data[: len(data) - cycle.call.length]
        if len(head) <= _MAX_REMEMBERED_HEAD and data.find(b"\r\n\r\n") + 4 == len(head) and head.startswith(b"POST "):
            self._memory = _Memory(head, len(data), cycle.call, self.application.hot_generation)

    def _enter(self, cycle: _HotCycle, body: bytes) -> None:
        """Read a whole request and queue it."""
        served = cycle.call.served
        if served.replaced:  # it was loaded again while the body came
            served = served.latest
            cycle.call = cycle.call._replace(served=served)
        cycle.started = time.perf_counter()
        try:
            cycle.request = request = served.codec.decode(body, cycle.call.header_length)
            cycle.ticket = self.application.service.enter(served, request.images, request.form.asked, cycle.done)
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            self._answer_error(cycle, self.application.service.failure(served, error))

    def _answer_error(self, cycle: _HotCycle, error: RequestError) -> None:
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
        self.transport.write(response)
        if not cycle.keep_alive:
            self.transport.close()
            return
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
        self._answer_error(cycle, body_is_late(received, self.body_timeout))

    def _stop_collecting(self) -> None:
        self._collecting = None
        self._cancel_body_timer()
        self.application.collecting.discard(self)


def connections_of(application: Application, settings: Settings) -> type[Connection]:
    """Return the connection's class with those limits, for uvicorn to create connections from."""
    limits = {name: getattr(settings, name) for name in ("header_timeout", "body_timeout", "max_body_bytes")}
    return type("Connection", (Connection,), {"application": application, **limits})
