"""Inference over HTTP on the application's way; `serving.http.connection` has the short way of plain requests."""

import asyncio
import json
import time
from typing import Any, Final

from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from serving.answers import Prediction
from serving.errors import Headers, RequestError, not_ready
from serving.http.bodies import Bodies, ClientGone, header_length
from serving.protocol.choices import Asked
from serving.protocol.open_inference import json_headers
from serving.scheduling.service import Served, Service

STOPPED: Final = "the server stopped before this was answered"


class Inference:
    """Answers `POST /v2/models/NAME/infer`."""

    def __init__(self, service: Service, bodies: Bodies) -> None:
        self._service = service
        self._bodies = bodies

    async def infer(self, served: Served, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request for a model."""
        try:
            async with self._bodies.reading(scope, receive) as body:
                served = served.latest
                started = time.perf_counter()
                request = served.codec.decode(body, header_length(scope))
                asked = request.form.asked
                answer = await predict(self._service, served, request.images, asked, scope, receive)
                headers, content = served.codec.encode(request, answer)
                status = 200
                served.metrics.answered("infer", asked.plan, time.perf_counter() - started)
                note(scope, served, asked, len(request.images))
        except asyncio.CancelledError:
            if not self._service.draining:
                raise
            status, headers, content = self._failure(served, not_ready(STOPPED))
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            status, headers, content = self._failure(served, self._service.failure(served, error))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _failure(self, served: Served, error: RequestError) -> tuple[int, Headers, bytes]:
        self._service.metrics.failed(served.name, error.reason)
        return error_response(error)


async def predict(
    service: Service, served: Served, images: NDArray[Any], asked: Asked, scope: Scope, receive: Receive
) -> Prediction:
    """Answer images as `Service.predict`; if the client hangs up first, leave the queue and raise `ClientGone`."""
    answer = asyncio.ensure_future(service.predict(served, images, asked, scope.get("manygates.notes")))
    told = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, told), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and told.result()["type"] == "http.disconnect":
            raise ClientGone
        return await answer
    finally:
        answer.cancel()
        told.cancel()


def note(scope: Scope, served: Served, asked: Asked, rows: int) -> None:
    """Leave what was answered for the log of requests and the trace."""
    scope["manygates.answered"] = {"model": served.name, "rows": rows}
    notes = scope.get("manygates.notes")
    if notes is not None:
        notes.model, notes.rows = served.name, rows
        notes.mode = (asked.plan or served.model.plan).mode


def error_response(error: RequestError) -> tuple[int, Headers, bytes]:
    """Return the status, headers and body that tell of an error."""
    content = json.dumps({"error": str(error)}).encode()
    return error.status, json_headers(len(content)) + error.headers, content
