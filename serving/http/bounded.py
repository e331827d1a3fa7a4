"""One HTTP connection: uvicorn's, with bounds on what comes before a body, and on how long anything may take."""

import asyncio
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 2**10
"""Request line, headers and trailers together; more is answered with 431. A line without an end may be longer by what
one read from the socket brings, a quarter of a megabyte."""
SPARE_CONNECTIONS: Final = 64
"""Connections beyond the limit that get an answer, 503; any more are closed at once."""
LINGER_SECONDS: Final = 2.0
"""How long a client that is refused may still send, so that it reads why."""
_MAX_PIPELINED: Final = 32


class BoundedConnection(HttpToolsProtocol):
    """Uvicorn's connection, which alone would wait for ever for the end of a head and keep all of it in memory.

    A client has `header_timeout` seconds from connecting, and from the first byte of each further request, to send a
    head of at most `MAX_HEAD_BYTES`. A request to upgrade to another protocol is answered over HTTP/1.1, as the
    standard allows; uvicorn would drop its body.
    """

    header_timeout: float = 10.0
    """Set on a class of its own, because uvicorn creates the connections itself; so is the next."""
    body_timeout: float = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = False
        self._in_body = False
        """Whether a body is still coming, of a request that may be answered already."""
        self._head_bytes = 0
        self._silent_bytes = 0
        self._progressed = False
        self._refused = False
        self._begun = 0
        """How many requests began in what came last."""
        self._timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._earlier: list[Any] = []
        """Requests before the last one that are not answered yet; uvicorn would not tell them that the client left."""
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
        """Forget the timers, and tell every request that the client has gone."""
        self._cancel_timer()
        self._cancel_body_timer()
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
        self._unset_keepalive_if_required()
        self._progressed = False
        self._begun = 0
        self._feed(data)
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
        self.begin_answer()
        self._in_head = False
        self._in_body = self._progressed = True
        self._cancel_timer()

    def begin_answer(self) -> None:
        """Hand a request whose head is complete to the application."""
        earlier = self.cycle
        super().on_headers_complete()
        if earlier is not None and not earlier.response_complete:
            self._earlier = [*(cycle for cycle in self._earlier if not cycle.response_complete), earlier]

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Say that the body is complete."""
        self._end_body()
        if not self._in_head:
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

    def _end_body(self) -> None:
        self._progressed = True
        self._in_body = False
        self._cancel_body_timer()

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
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

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

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
