"""One HTTP connection: uvicorn's, with bounds on the heads of requests, and without a way to other protocols."""

import asyncio
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 2**10
"""Request line and headers together; more is answered with 431."""
_SPARE_CONNECTIONS: Final = 64
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
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are far too many connections to be worth an answer."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency + _SPARE_CONNECTIONS:
            self._refused = True
            transport.close()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse it once a head is too long."""
        if self._refused:
            return  # we only wait for the client to read why
        was_in_head = self._in_head
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._refused or self.transport.is_closing():
            return
        if was_in_head and self._in_head:
            # the parser keeps an unfinished line to itself, so what came is counted, not what it reported
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, "The request line and headers are too long.")
                return
        if self._head_timer is None and (self._in_head or self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_message_begin(self) -> None:
        """Count from here."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer, but for a request to upgrade, which is parsed again without that wish."""
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._cancel_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Say that the body is complete."""
        if not self._in_head:
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, "The request line and headers are too long.")
            else:
                self._refuse(400, "Invalid HTTP request received.")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse the request again without its header `Upgrade`, and `rest` behind it; a parser cannot be talked out."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "CONNECT is not offered.")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n")
        if rest and not self._refused:
            self._feed(rest)

    def _count(self, length: int) -> None:
        self._head_bytes += length
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # ends the parser, see _feed

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, and hang up a little later: a client that still sends would miss the answer else."""
        self._refused = True
        self._cancel_head_timer()
        head = (
            f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(message)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + head.encode() + message.encode())
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # an earlier request of this connection is still being answered
        else:
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def with_header_timeout(seconds: float) -> type[Connection]:
    """Return the connection's class with a timeout of its own, which is what uvicorn takes."""
    return type("Connection", (Connection,), {"header_timeout": seconds})
