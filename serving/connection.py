"""One HTTP connection: uvicorn's, with bounds on what comes before a body, and without a way to other protocols."""

import asyncio
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 2**10
"""Request line, headers and trailers together; more is answered with 431. A line without an end may be longer by what
one read from the socket brings, a quarter of a megabyte."""
SPARE_CONNECTIONS: Final = 64
"""Connections beyond the limit that get an answer, 503; any more are closed at once."""
_MAX_PIPELINED: Final = 32
_LINGER_SECONDS: Final = 2.0


class Connection(HttpToolsProtocol):
    """Uvicorn's connection, which alone would wait for ever for the end of a head and keep all of it in memory.

    A client has `header_timeout` seconds from connecting, and from the first byte of each further request, to send a
    head of at most `MAX_HEAD_BYTES`. A request to upgrade to another protocol is answered over HTTP/1.1, as the
    standard allows; uvicorn would drop its body.
    """

    header_timeout: float = 10.0
    """Set by `with_header_timeout`, because uvicorn creates the connections itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = False
        self._head_bytes = 0
        self._silent_bytes = 0
        self._progressed = False
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are far too many connections."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + SPARE_CONNECTIONS:
            self._refused = True
            transport.close()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse what is no request or has too long a head."""
        if self._refused:
            return  # we only wait for the client to read why
        self._unset_keepalive_if_required()
        self._progressed = False
        self._feed(data)
        if self._refused or self.transport.is_closing():
            return
        # the parser keeps an unfinished line to itself, so what came is counted, not only what it reports
        self._silent_bytes = 0 if self._progressed else self._silent_bytes + len(data)
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._timer is None and (self._in_head or self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_head = self._progressed = True
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
        super().on_headers_complete()
        self._in_head = False
        self._progressed = True
        self._cancel_timer()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Say that the body is complete."""
        self._progressed = True
        if not self._in_head:
            super().on_message_complete()

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
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

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


def with_header_timeout(seconds: float) -> type[Connection]:
    """Return the connection's class with that timeout, for uvicorn to create connections from."""
    return type("Connection", (Connection,), {"header_timeout": seconds})
