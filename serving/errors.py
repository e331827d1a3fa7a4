"""What a request may be answered with instead of an answer, in any protocol."""

import itertools
import logging
import reprlib
from typing import Any, Final

logger = logging.getLogger("manygates.serving")

Headers = list[tuple[bytes, bytes]]

_MAX_SHOWN: Final = 160

GRPC_CODES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""HTTP status -> name of the gRPC status code."""


class RequestError(Exception):
    """A request that is answered with an HTTP status, a reason of a word or two for the metrics, and some headers."""

    def __init__(self, status: int, reason: str, message: str, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = headers or []

    @property
    def grpc_code(self) -> str:
        """The name of the gRPC status code that says the same."""
        return GRPC_CODES.get(self.status, "UNKNOWN")


def bad_request(message: str) -> RequestError:
    """Return a 400 that says `message`."""
    return RequestError(400, "bad_request", message)


def busy(status: int, reason: str, message: str) -> RequestError:
    """Return an error that passes: it asks to try again in a second."""
    return RequestError(status, reason, message, [(b"retry-after", b"1")])


def not_ready(why: str = "the server is starting or stopping") -> RequestError:
    """Return a 503 that says why nothing is answered here for a while."""
    return busy(503, "not_ready", f"{why}; try again, it may be another")


def defect(error: Exception, what: str = "a request") -> RequestError:
    """Write a failure that is ours into the log, and return a 500 that tells nothing of it."""
    logger.error("%s failed for a reason of ours", what, exc_info=error)
    return RequestError(500, "defect", "internal error; the server's log says more")


def shown(value: Any) -> str:
    """Show a value from a request in a message to its client, however large it is."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _Shortened(reprlib.Repr):
    """The standard library's short forms, without its sorting of a whole object to show four of its keys."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        first = itertools.islice(x.items(), self.maxdict)
        entries = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first]
        return "{" + ", ".join(entries + ["..."] * (len(x) > self.maxdict)) + "}"


_SHORTENED: Final = _Shortened()
_SHORTENED.maxlevel = 2
