"""What every HTTP request passes before it is answered: keys, request ids, the access log, traces, CORS.

A plain inference request goes past all this (`serving.http.connection`); only its key is checked there, by the same
`Admission`. Where requests are logged or traced there is no such short way.
"""

import re
import time
from typing import Any, Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import RequestError, bad_request
from serving.operations import log
from serving.operations.settings import Settings
from serving.protocol.admission import Admission, model_named_in
from serving.protocol.open_inference import HEADER_LENGTH

# none of our paths has any, and "$" in a pattern, the router's too, also stands before a newline at the end
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_ALLOWED_HEADERS: Final = ("authorization", "content-type", HEADER_LENGTH.decode(), "x-api-key", "x-request-id")


class Edge:
    """The ASGI application around ours."""

    def __init__(self, inner: ASGIApp, settings: Settings, admission: Admission, refuse: Any, tracer: Any) -> None:
        """Wrap `inner`.

        Args:
            inner: answers what passes.
            settings: whose CORS origins and log are used.
            admission: says who passes.
            refuse: returns (status, headers, body) for a RequestError and the path it was for, and counts it.
            tracer: of OpenTelemetry; None traces nothing.
        """
        self._inner = inner
        self._admission = admission
        self._refuse = refuse
        self._tracer = tracer
        self._log_requests = settings.log_requests
        self._outer: ASGIApp = self._pass
        if settings.cors_origins:
            self._outer = CORSMiddleware(
                self._pass,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=_ALLOWED_HEADERS,
                expose_headers=(HEADER_LENGTH.decode(), "x-request-id", "retry-after"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._outer(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        request_id = log.clean_request_id(given)
        told = request_id is not None or self._log_requests
        request_id = request_id or log.new_request_id()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if told:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        token = log.request_id.set(request_id)
        key: str | None = None
        try:
            try:
                _check_path(scope["path"])
                key = self._admission.check_headers(scope["path"], scope["headers"])
            except RequestError as error:
                code, headers, content = self._refuse(error, scope["path"])
                await answer({"type": "http.response.start", "status": code, "headers": headers})
                await answer({"type": "http.response.body", "body": content})
                return
            if self._tracer is None:
                await self._inner(scope, receive, answer)
            else:
                with self._tracer.request(scope["method"], scope["path"], scope["headers"]) as span:
                    span.request_id = request_id
                    scope["manygates.notes"] = span
                    await self._inner(scope, receive, answer)
                    span.answered(status)
        finally:
            log.request_id.reset(token)
            if self._log_requests:
                notes = scope.get("manygates.answered", {})
                log.log_request(
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=time.perf_counter() - started,
                    request_id=request_id,
                    model=notes.get("model") or model_named_in(scope["path"]),
                    rows=notes.get("rows"),
                    key=key,
                )


def _check_path(path: str) -> None:
    """Refuse control characters: two readers of a path may see different ones in it.

    Raises:
        RequestError: 400 if there are any.
    """
    if _CONTROL.search(path):
        raise bad_request(f"the path {path[:128]!r} holds a control character; no path here has one, see /")
