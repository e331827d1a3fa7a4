"""One call over gRPC: what it came with, and what is known of it for the log and the metrics."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from serving.operations.log import clean_request_id

_HEADERS: Final = frozenset(("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"))


class Call:
    """A call that is being answered."""

    __slots__ = ("context", "headers", "held", "key", "method", "mode", "model", "request_id", "rows", "started")

    def __init__(self, method: str, context: Any) -> None:
        self.method = method
        self.context = context
        self.headers = headers_of(context.invocation_metadata())
        self.started = time.perf_counter()
        self.held = 0
        """Bytes of its message that count towards the server's total until it is answered."""
        self.model = ""
        """Empty until it names one that is known."""
        self.request_id = clean_request_id(self.headers.get(b"x-request-id"))
        self.key: str | None = None
        """The name of the key that allowed it."""
        self.mode: str | None = None
        self.rows: int | None = None


Answer = Callable[[Any, Call], Awaitable[Any]]
"""Answers a message, for a call, with a message."""


def headers_of(metadata: Any) -> dict[bytes, bytes]:
    """Return what we look at of a call's metadata."""
    return {name.encode(): value.encode() for name, value in metadata or () if name in _HEADERS}
