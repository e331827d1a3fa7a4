"""Bodies of requests that do not take the short way: read within the limits of size and time, and accounted for."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.types import Receive, Scope

from serving.errors import RequestError, bad_request
from serving.operations.settings import Settings
from serving.protocol.admission import ByteBudget
from serving.protocol.open_inference import HEADER_LENGTH

_MAX_SMALL_BODY: Final = 64 * 2**10
"""Of calls that take a few words of JSON: it is parsed on the event loop."""


class ClientGone(Exception):  # noqa: N818 -- says what happened
    """The client hung up before its request was complete."""


class Bodies:
    """Reads bodies within the limits of the settings; what it holds counts towards the budget."""

    def __init__(self, settings: Settings, budget: ByteBudget) -> None:
        self._settings = settings
        self._budget = budget

    @asynccontextmanager
    async def reading(
        self, scope: Scope, receive: Receive, most: int | None = None, fix: str = "send fewer images at a time"
    ) -> AsyncIterator[bytes]:
        """Read the whole body of a request, and count its bytes until the block ends.

        It may have `most` bytes, and never more than the settings allow; `fix` is what a client is told to do else.

        Raises:
            RequestError: 408 if it comes too slowly, 413 if it is too large, 415 if it is compressed, 503 if there is
                no room for it among those of the others.
            ClientGone: if the client hangs up.
        """
        limit = min(self._settings.max_body_bytes, most or self._settings.max_body_bytes)
        length, encoding = _announced(scope)
        if encoding is not None:
            raise RequestError(
                415, "content_encoding", f"Content-Encoding is {encoding!r}, expected none; send it plain"
            )
        if length > limit:
            raise _too_large(length, limit, fix)
        body, held, more = bytearray(), 0, True
        try:
            try:
                async with asyncio.timeout(self._settings.body_timeout):
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        piece, more = message.get("body", b""), message.get("more_body", False)
                        body += piece
                        if len(body) > limit:
                            raise _too_large(len(body), limit, fix)
                        held += self._budget.take(len(piece))
            except TimeoutError as error:
                raise body_is_late(len(body), self._settings.body_timeout) from error
            yield bytes(body)
        finally:
            self._budget.give_back(held)

    async def read_json(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """Read a small JSON object; no body is an empty one. Errors as `reading`, and 400 for anything else."""
        async with self.reading(scope, receive, _MAX_SMALL_BODY, "send a few words of JSON, or nothing") as body:
            if not body:
                return {}
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"the body is not JSON ({error}); send an object, or nothing") from error
        if not isinstance(document, dict):
            raise bad_request("the body is JSON but no object; send an object, or nothing")
        return document


def _announced(scope: Scope) -> tuple[int, str | None]:
    """Return the length and the encoding that a request announces; 0 and None where it says nothing of them."""
    length, encoding = 0, None
    for name, value in scope["headers"]:
        if name == b"content-length":
            # the HTTP parser has already refused what is not a number
            length = int(value) if value.isdigit() and len(value) < 19 else 2**63
        elif name == b"content-encoding" and value.lower() != b"identity":
            encoding = value.decode("latin-1")
    return length, encoding


def header_length(scope: Scope) -> bytes | None:
    """Return what a request says about the length of the JSON in its body."""
    return next((value for name, value in reversed(scope["headers"]) if name == HEADER_LENGTH), None)


def body_is_late(received: int, seconds: float) -> RequestError:
    """Return what a request is answered with of whose body only so many bytes came in time."""
    told = f"only {received} bytes came within {seconds:g} seconds; send faster"
    return RequestError(408, "body_timeout", told, [(b"connection", b"close")])


def _too_large(length: int, limit: int, fix: str) -> RequestError:
    told = f"the body has at least {length} bytes, expected at most {limit}; {fix}"
    return RequestError(413, "body_too_large", told, [(b"connection", b"close")])
