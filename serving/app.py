"""The ASGI application: the Open Inference Protocol's calls, `/classify`, `/metrics`, and an index.

Inference is dispatched by hand, before any router: at a few hundred microseconds of computing per image a router would
be a tenth of the cost. Everything else is Starlette's.
"""

import asyncio
import functools
import importlib.metadata
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.batcher import Batcher, Draining, PredictionFailed, QueueFull, WaitedTooLong
from serving.decoders import Decoders
from serving.engine import Mode, Prediction, Predictor, modes_of
from serving.exits import num_exits, read_confidence, read_exit
from serving.metrics import CONTENT_TYPE, Metrics, ModelMetrics
from serving.protocol import HEADER_LENGTH, VERSION, Codec, RequestError, bad_request, json_headers
from serving.settings import Settings
from zoo.card import Card
from zoo.errors import BadImage, BadInput, UnknownName, UnsupportedImage
from zoo.pictures import decode_image

logger = logging.getLogger("manygates.serving")

_DECODERS = 2
_MAX_DECODING = 64
_MAX_TEXT_FIELD = 4096
_BOUNDARY = re.compile(r""";\s*boundary=(?:"([^"\\]{1,70})"|([^\s;,"\\]{1,70}))\s*(?:;|$)""", re.ASCII | re.IGNORECASE)
# what clients send that were not told what the body is; the last is curl's default
_UNTOLD = ("", "application/octet-stream", "application/x-www-form-urlencoded")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be served: a card, the mode, and what answers."""

    card: Card
    mode: Mode
    predictor: Predictor
    limits: NDArray[np.float32] | None = None
    """Where requests may choose the exit: the limits, float32 (exit - 1), of those that do not."""


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A model with its queue."""

    model: Model
    codec: Codec
    batcher: Batcher
    metrics: ModelMetrics

    @property
    def name(self) -> str:
        return self.model.card.name


class _ClientGone(Exception):  # noqa: N818 -- says what happened
    """The client hung up before its request was complete."""


class Application:
    """The ASGI application that serves some models.

    It takes requests between its start and its stop, which the lifespan protocol triggers (`running` does so in tests).
    """

    def __init__(self, models: Sequence[Model], settings: Settings | None = None) -> None:
        """Prepare to serve `models`; the first is the one that `/classify` uses by default.

        Raises:
            BadInput: if there is none, or two have the same name.
        """
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self._served: dict[str, _Served] = {}
        for model in models:
            if model.card.name in self._served:
                raise BadInput(f"{model.card.name!r} is to be served twice; name each model once")
            self._served[model.card.name] = self._serve(model)
        if not self._served:
            raise BadInput("no model to serve; name at least one")
        self._infer_paths = {
            path: served
            for name, served in self._served.items()
            for path in (f"/v2/models/{name}/infer", f"/v2/models/{name}/versions/{VERSION}/infer")
        }
        self._draining = False
        self._decoders: Decoders | None = None
        self._held_bytes = 0
        self.starlette = self._routes()
        self.rest: ASGIApp = self.starlette
        """Answers everything but inference; a demo may wrap or replace it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] == "http":
            served = self._infer_paths.get(scope["path"])
            if served is not None and scope["method"] == "POST":
                await self._infer(served, scope, receive, send)
                return
        await self.rest(scope, receive, send)

    @property
    def draining(self) -> bool:
        """Whether we are about to stop."""
        return self._draining

    @property
    def ready(self) -> bool:
        """Whether every model takes requests, and will for a while."""
        return not self._draining and all(served.batcher.accepting for served in self._served.values())

    def begin_drain(self) -> None:
        """Say that we are not ready any more, so that no new clients are sent here; requests are still answered."""
        self._draining = True

    @asynccontextmanager
    async def running(self, _: object = None) -> AsyncIterator[None]:
        """Take requests inside the block; on leaving it finish those in flight."""
        decoders = self._decoders = Decoders(_DECODERS)
        for served in self._served.values():
            served.batcher.start()
        try:
            yield
        finally:
            self._draining = True
            await asyncio.gather(
                *(served.batcher.stop(self.settings.drain_timeout) for served in self._served.values())
            )
            self._decoders = None
            decoders.stop()

    def _serve(self, model: Model) -> _Served:
        settings = self.settings
        # the queue reports to the metrics and the metrics ask the queue, so one of them must come first
        metrics = self.metrics.of_model(
            model.card.name,
            random=model.mode == "random",
            num_exits=num_exits(model.card),
            waiting=lambda: batcher.waiting,
            ready=lambda: self.ready and batcher.accepting,
        )
        batcher = Batcher(
            model.predictor,
            workers=settings.workers,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            queue_timeout=settings.queue_timeout,
            observer=metrics,
        )
        codec = Codec(
            model.card,
            max_rows=settings.max_queue,
            may_choose_exit=model.limits is not None,
        )
        return _Served(model=model, codec=codec, batcher=batcher, metrics=metrics)

    def _routes(self) -> Starlette:
        routes = [
            Route("/", self._index),
            Route("/metrics", self._metrics),
            Route("/classify", self._classify, methods=["POST"]),
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._server_ready),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(prefix, self._model_metadata),
                Route(f"{prefix}/ready", self._model_ready),
                Route(f"{prefix}/infer", self._unknown_infer, methods=["POST"]),
            ]
        handlers: dict[Any, Any] = {
            RequestError: self._answer_error,
            HTTPException: self._answer_http_exception,
            Exception: self._answer_defect,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self.running)

    async def _infer(self, served: _Served, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an inference request; the path that has to be fast."""
        sizes = _Sizes(scope)
        try:
            body = await self._body(sizes, receive)
            started = time.perf_counter()
            request = served.codec.decode(body, sizes.header_length)
            answer = await self._predict(served, request.images, request.form.limits)
            headers, content = served.codec.encode(request, answer)
            status = 200
            served.metrics.infer_requests.inc()
            served.metrics.request_seconds.observe(time.perf_counter() - started)
        except RequestError as error:
            status, headers, content = self._failure(served, error)
        except asyncio.CancelledError:
            if not self._draining:
                raise
            status, headers, content = self._failure(served, _stopped())
        except _ClientGone:
            return
        except Exception:
            logger.exception("an inference request failed for a reason of ours")
            defect = RequestError(500, "defect", "internal error; the server's log says more")
            status, headers, content = self._failure(served, defect)
        finally:
            self._held_bytes -= sizes.held
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _failure(self, served: _Served, error: RequestError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Count an error, and return its status, headers and body."""
        self.metrics.failed(served.name, error.reason)
        content = json.dumps({"error": str(error)}).encode()
        return error.status, json_headers(len(content)) + error.headers, content

    async def _predict(
        self, served: _Served, images: NDArray[np.float32], chosen: NDArray[np.float32] | None
    ) -> Prediction:
        """Answer images; `chosen` are the limits, float32 (exit - 1), that the request chose for all of them."""
        limits = served.model.limits if chosen is None else chosen
        if limits is not None:
            limits = np.broadcast_to(limits, (len(images), len(limits)))
        try:
            return await served.batcher.submit(images, limits)
        except QueueFull as error:
            limit = served.batcher.max_queue
            raise _busy(429, "queue_full", f"the queue is full ({limit} images); try again in a second") from error
        except WaitedTooLong as error:
            seconds = self.settings.queue_timeout
            raise _busy(503, "queue_timeout", f"no turn within {seconds:g} seconds; try again later") from error
        except Draining as error:
            raise _busy(503, "not_ready", "the server is starting or stopping; try again, it may be another") from error
        except PredictionFailed as error:
            raise RequestError(
                500, "model_failed", "the model failed on this batch; the server's log says more"
            ) from error

    async def _body(self, sizes: "_Sizes", receive: Receive) -> bytes:
        """Read a body within the limits of size and time; what is held must be given back, see `_Sizes.held`."""
        limit = self.settings.max_body_bytes
        if sizes.content_encoding is not None:
            raise RequestError(
                415, "content_encoding", f"Content-Encoding is {sizes.content_encoding!r}, expected none; send it plain"
            )
        if sizes.content_length is not None and sizes.content_length > limit:
            raise _too_large(sizes.content_length, limit)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    if not more and not body:  # as a rule all of it comes at once
                        body = piece
                    else:
                        body += piece
                    if len(body) > limit:
                        raise _too_large(len(body), limit)
                    self._hold(sizes, len(piece))
        except TimeoutError as error:
            raise RequestError(
                408,
                "body_timeout",
                f"only {len(body)} bytes came within {self.settings.body_timeout:g} seconds; send faster",
                [(b"connection", b"close")],
            ) from error
        return bytes(body)

    def _hold(self, sizes: "_Sizes", length: int) -> None:
        """Account for bytes of a body."""
        limit = self.settings.max_total_body_bytes
        if self._held_bytes + length > limit:
            error = _busy(503, "too_many_bytes", f"requests of {limit} bytes are being answered; try again in a second")
            error.headers.append((b"connection", b"close"))
            raise error
        self._held_bytes += length
        sizes.held += length

    async def _classify(self, request: Request) -> Response:
        served = self._model_named(request, request.query_params.get("model"))
        top = _top(request.query_params.get("top"), len(served.model.card.classes))
        limits = served.codec.exit_limits(_exit_parameters(request.query_params))
        sizes = _Sizes(request.scope)
        try:
            body = await self._body(sizes, request.receive)
            started = time.perf_counter()
            images = await self._decode_image(served, await _image_file(request.headers, body))
            answer = await self._predict(served, images, limits)
        except _ClientGone:
            return Response(status_code=499)
        except asyncio.CancelledError as error:
            if not self._draining:
                raise
            raise _stopped() from error
        finally:
            self._held_bytes -= sizes.held
        classes = served.model.card.classes
        probabilities = answer.probabilities[0].tolist()
        ranked = sorted(zip(classes, probabilities, strict=True), key=lambda entry: -entry[1])
        served.metrics.classify_requests.inc()
        served.metrics.request_seconds.observe(time.perf_counter() - started)
        exit_answered = {} if answer.exits is None else {"exit": int(answer.exits[0])}
        return JSONResponse(
            {
                "model": served.name,
                "mode": served.model.mode,
                **exit_answered,
                "label": ranked[0][0],
                "probabilities": dict(ranked[:top]),
            }
        )

    async def _decode_image(self, served: _Served, content: bytes) -> NDArray[np.float32]:
        """Decode on one of a few threads: a large JPEG takes longer than many predictions."""
        if self._decoders is None:
            raise _busy(503, "not_ready", "the server is starting or stopping; try again, it may be another")
        if self._decoders.waiting >= _MAX_DECODING:
            raise _busy(429, "queue_full", f"{_MAX_DECODING} images are being decoded; try again in a second")
        try:
            return await self._decoders.run(functools.partial(decode_image, content, served.model.card.input))
        except UnsupportedImage as error:
            raise RequestError(415, "unsupported_image", str(error)) from error
        except BadImage as error:
            raise RequestError(400, "bad_image", str(error)) from error

    async def _index(self, request: Request) -> Response:
        models = [
            {
                "name": name,
                "mode": served.model.mode,
                "modes": modes_of(served.model.card),
                **({"exits": len(served.model.card.exits)} if served.model.card.exits else {}),
                "description": served.model.card.description,
                "classes": list(served.model.card.classes),
                "infer": f"/v2/models/{name}/infer",
            }
            for name, served in self._served.items()
        ]
        endpoints = ["POST /classify", "GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /metrics"]
        return JSONResponse({"name": "manygates", "version": _version(), "models": models, "endpoints": endpoints})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": "manygates", "version": _version(), "extensions": ["binary_tensor_data"]})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _server_ready(self, request: Request) -> Response:
        return _readiness({"ready": self.ready}, self.ready)

    async def _model_metadata(self, request: Request) -> Response:
        return JSONResponse(self._model_of(request).codec.metadata())

    async def _model_ready(self, request: Request) -> Response:
        served = self._model_of(request)
        ready = self.ready and served.batcher.accepting
        return _readiness({"name": served.name, "ready": ready}, ready)

    async def _unknown_infer(self, request: Request) -> Response:
        self._model_of(request)  # known models never get here, so this says what is wrong with the name
        raise RequestError(404, "not_found", f"no such path {request.url.path!r}; see /")

    def _model_of(self, request: Request) -> _Served:
        served = self._model_named(request, request.path_params["model"])
        version = request.path_params.get("version", VERSION)
        if version != VERSION:
            raise RequestError(
                404, "unknown_version", f"{served.name} has no version {version[:40]!r}, only {VERSION!r}"
            )
        return served

    def _model_named(self, request: Request, name: str | None) -> _Served:
        served = next(iter(self._served.values())) if name is None else self._served.get(name)
        if served is None:
            assert name is not None
            raise RequestError(404, "unknown_model", str(UnknownName(name[:128], self._served, kind="model")))
        request.state.model = served.name  # an error from here on is counted as this model's
        return served

    async def _answer_error(self, request: Request, error: RequestError) -> Response:
        self.metrics.failed(getattr(request.state, "model", ""), error.reason)
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)

    async def _answer_http_exception(self, request: Request, error: HTTPException) -> Response:
        path = request.url.path[:128]
        reasons = {404: "not_found", 405: "method_not_allowed"}
        messages = {
            404: f"no such path {path!r}; see /",
            405: f"{request.method} is not offered on {path!r}; the header Allow names what is",
        }
        self.metrics.failed(getattr(request.state, "model", ""), reasons.get(error.status_code, "http"))
        message = messages.get(error.status_code, error.detail)
        return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)

    async def _answer_defect(self, request: Request, error: Exception) -> Response:
        self.metrics.failed(getattr(request.state, "model", ""), "defect")
        return JSONResponse({"error": "internal error; the server's log says more"}, status_code=500)


class _Sizes:
    """What the request's headers say about its body, and how much of that is here."""

    __slots__ = ("content_encoding", "content_length", "header_length", "held")

    def __init__(self, scope: Scope) -> None:
        self.content_length: int | None = None
        self.header_length: bytes | None = None
        self.content_encoding: str | None = None
        self.held = 0
        """Bytes of its body that count towards the server's total until it is answered."""
        for name, value in scope["headers"]:
            if name == b"content-length":
                # the HTTP parser has already refused what is not a number
                self.content_length = int(value) if value.isdigit() and len(value) < 19 else 2**63
            elif name == HEADER_LENGTH:
                self.header_length = value
            elif name == b"content-encoding" and value.lower() != b"identity":
                self.content_encoding = value.decode("latin-1")


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, which would write files above a megabyte to the disk; the body is bounded already."""

    spool_max_size = 2**40


async def _image_file(headers: Headers, body: bytes) -> bytes:
    """Take the image file out of a body: the field `image` of a form, or the whole body."""
    if not body:
        raise bad_request("the body is empty; send an image file, or a form with the field 'image'")
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _image_field(headers, body)
    if content_type.startswith("image/") or content_type in _UNTOLD:
        return body
    raise RequestError(
        415,
        "unsupported_media_type",
        f"Content-Type is {content_type[:80]!r}, expected multipart/form-data with the field 'image', or image/png, "
        "image/jpeg or image/webp",
    )


async def _image_field(headers: Headers, body: bytes) -> bytes:
    async def stream() -> Any:
        yield body

    boundary = _BOUNDARY.search(headers["content-type"])
    if boundary is None:
        raise bad_request("the form cannot be read (no boundary); send multipart/form-data with 'image'")
    # not the client's own header: it may name a charset, and some of Python's take minutes
    plain = Headers({"content-type": f'multipart/form-data; boundary="{boundary[1] or boundary[2]}"'})
    parser = _InMemoryParser(plain, stream(), max_files=8, max_fields=8, max_part_size=_MAX_TEXT_FIELD)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(
            f"the form cannot be read ({error.message}); send multipart/form-data with 'image'"
        ) from error
    try:
        field = form.get("image")
        if not isinstance(field, UploadFile):
            found = ", ".join(repr(name[:40]) for name in form) or "none"
            raise bad_request(f"the form has the fields {found}, expected a file in the field 'image'")
        return await field.read()
    finally:
        await form.close()


def _top(text: str | None, num_classes: int) -> int:
    if text is None:
        return num_classes
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise bad_request(f"top is {text[:40]!r}, expected a whole number from 1 to {num_classes}")
    return min(int(text), num_classes)


def _exit_parameters(query: QueryParams) -> dict[str, Any]:
    """Take what chooses an exit out of a URL, in the types that it has in a request's JSON."""
    parameters: dict[str, Any] = {}
    try:
        if "exit" in query:
            parameters["exit"] = read_exit(query["exit"])
        if "confidence" in query:
            parameters["confidence"] = read_confidence(query["confidence"])
    except BadInput as error:
        raise bad_request(str(error)) from error
    return parameters


def _busy(status: int, reason: str, message: str) -> RequestError:
    return RequestError(status, reason, message, [(b"retry-after", b"1")])


def _stopped() -> RequestError:
    return _busy(503, "not_ready", "the server stopped before this was answered; try again, it may be another")


def _too_large(length: int, limit: int) -> RequestError:
    return RequestError(
        413,
        "body_too_large",
        f"the body has at least {length} bytes, expected at most {limit}; send fewer images at a time",
        [(b"connection", b"close")],
    )


def _readiness(body: dict[str, Any], ready: bool) -> Response:
    return JSONResponse(body, status_code=200) if ready else JSONResponse(body, 503, headers={"retry-after": "1"})


def _version() -> str:
    try:
        return importlib.metadata.version("manygates")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0"
