"""What a request may be answered with instead of an answer, in any protocol."""

from typing import Final

Headers = list[tuple[bytes, bytes]]

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
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        reason: one word or two for the metrics.
        headers: to be sent along over HTTP.
    """

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
