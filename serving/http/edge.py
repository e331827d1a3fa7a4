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
from serving.http.inference import error_response
from serving.operations import log
from serving.operations.metrics import Metrics
from serving.operations.settings import Settings
from serving.protocol.admission import Admission, model_named_in
from serving.protocol.open_inference import HEADER_LENGTH

# none of our paths has any, and "$" in a pattern, the router's too, also stands before a newline at the end
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_ALLOWED_HEADERS: Final = ("authorization", "content-type", HEADER_LENGTH.decode(), "x-api-key", "x-request-id")


class Edge:
    """The ASGI application around ours."""

    def __init__(self, inner: ASGIApp, settings: Settings, admission: Admission, metrics: Metrics, tracer: Any) -> None:
        """Wrap `inner`, which answers what passes; without a `tracer` of OpenTelemetry nothing is traced."""
        self._inner = inner
        self._admission = admission
        self._metrics = metrics
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
                if _CONTROL.search(scope["path"]):
                    shown = repr(scope["path"][:128])
                    raise bad_request(f"the path {shown} holds a control character; no path here has one, see /")
                key = self._admission.check(scope["path"], scope["headers"])
            except RequestError as error:
                self._metrics.failed("", error.reason)
                code, headers, content = error_response(error)
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
