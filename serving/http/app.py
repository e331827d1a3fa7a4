"""The ASGI application: the Open Inference Protocol's calls, `/classify`, `/metrics`, and an index.

Inference is dispatched by hand, before any router: at a few hundred microseconds of computing per image a router would
be a tenth of the cost. Everything else is Starlette's.
"""

import asyncio
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.datastructures import Headers as HeaderMap
from starlette.datastructures import QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.answers import Prediction
from serving.engine.exits import read_confidence, read_exit
from serving.engine.graphs import modes_of
from serving.errors import Headers, RequestError, bad_request, busy, too_many_bytes
from serving.http import openapi
from serving.http.connection import Connection
from serving.http.decoders import Decoders
from serving.http.edge import Admission, Edge
from serving.operations.metrics import CONTENT_TYPE
from serving.operations.settings import Settings
from serving.protocol.open_inference import HEADER_LENGTH, Asked, json_headers
from serving.scheduling.repository import Repository
from serving.scheduling.scheduler import DeadlineExceeded
from serving.scheduling.service import Model, Served, Service
from zoo.errors import BadImage, BadInput, UnsupportedImage
from zoo.pictures import decode_image

logger = logging.getLogger("manygates.serving")

_DECODERS = 2
_MAX_DECODING = 64
_MAX_TEXT_FIELD = 4096
_MAX_SMALL_BODY = 64 * 2**10
"""Of calls that take a few words of JSON: it is parsed on the event loop."""
_BOUNDARY = re.compile(r""";\s*boundary=(?:"([^"\\]{1,70})"|([^\s;,"\\]{1,70}))\s*(?:;|$)""", re.ASCII | re.IGNORECASE)
# what clients send that were not told what the body is; the last is curl's default
_UNTOLD = ("", "application/octet-stream", "application/x-www-form-urlencoded")


class _ClientGone(Exception):  # noqa: N818 -- says what happened
    """The client hung up before its request was complete."""


class Application:
    """The ASGI application that serves some models.

    It takes requests between its start and its stop, which the lifespan protocol triggers (`running` does so in tests).
    """

    def __init__(
        self, models: Sequence[Model], settings: Settings | None = None, repository: Repository | None = None
    ) -> None:
        """Prepare to serve `models`; the first is the one that `/classify` uses by default.

        `repository` is where they come from, which may load, reload and unload models while the server runs.

        Raises:
            BadInput: if there is none, two have the same name and version, or the settings name a file that cannot be
                used.
        """
        self.settings = settings or Settings()
        if not models and not self.settings.model_repository:
            raise BadInput("no model to serve; name at least one")
        self.service = Service(models, self.settings)
        self.repository = repository
        if repository is not None:
            self.service.complete = lambda: repository.complete
        self.admission = Admission(self.settings)
        self.tracer = _tracer(self.settings)
        self._edge = Edge(self._route, self.settings, self.admission, self._refuse, self.tracer)
        self._short_way = not self.settings.log_requests and self.tracer is None
        self.metrics = self.service.metrics
        self._hot_paths: dict[bytes, Served] = {}
        self._hot_paths_of = -1
        self._openapi_text = b""
        self._openapi_of = -1
        self._decoders: Decoders | None = None
        self.held_bytes = 0
        self.connections: set[Connection] = set()
        """Those that are receiving the body of a plain inference request."""
        self.grpc_port: int | None = None
        """Where gRPC listens, once it does."""
        self.starlette = self._routes()
        self.rest: ASGIApp = self.starlette
        """Answers everything but inference; a demo may wrap or replace it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] == "http":
            await self._edge(scope, receive, send)
        else:
            await self.rest(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            served = self._paths.get(scope["path"].encode())
            if served is not None:
                await self._infer(served, scope, receive, send)
                return
        await self.rest(scope, receive, send)

    @property
    def draining(self) -> bool:
        """Whether we are about to stop."""
        return self.service.draining

    @property
    def ready(self) -> bool:
        """Whether all is served that should be, and every model takes requests, and will for a while."""
        return self.service.ready

    def begin_drain(self) -> None:
        """Say that we are not ready any more, so that no new clients are sent here; requests are still answered."""
        self.service.begin_drain()

    def admit(self, path: str, headers: Headers, model: str | None = None) -> str | None:
        """Return the name of the key that allows a request, in any protocol; see `Admission.check`.

        Raises:
            RequestError: 401 without a key that holds, 403 if it does not hold for this model.
        """
        return self.admission.check_headers(path, headers, model)

    def hot(self, path: bytes, headers: Headers) -> Served | None:
        """Return the model whose inference has this path, if a request with these headers may take the short way."""
        served = self._paths.get(path) if self._short_way else None
        if served is not None:
            try:
                self.admission.check_headers(path.decode("latin-1"), headers)
            except RequestError:
                return None  # the long way says why
        return served

    @property
    def hot_generation(self) -> object:
        """Changes whenever `hot` may answer otherwise than before."""
        return self.service.generation, self.admission.generation

    @asynccontextmanager
    async def running(self, _: object = None) -> AsyncIterator[None]:
        """Take requests inside the block; on leaving it finish those in flight."""
        decoders = self._decoders = Decoders(_DECODERS)
        self.service.start()
        watching = None
        if self.repository is not None and self.settings.reload_seconds:
            watching = asyncio.create_task(self.repository.watch(self.service, self.settings.reload_seconds))
        try:
            async with self._grpc():
                yield
        finally:
            if watching is not None:
                watching.cancel()
            await self.service.stop()
            if self.tracer is not None:
                await asyncio.to_thread(self.tracer.close)
            for connection in list(self.connections):
                connection.stop_collecting(_stopped())
            self._decoders = None
            decoders.stop()

    @asynccontextmanager
    async def _grpc(self) -> AsyncIterator[None]:
        """Serve gRPC beside HTTP, inside the block, if the settings say so."""
        if self.settings.grpc_port < 0:
            yield
            return
        try:
            grpc_server = importlib.import_module("serving.grpc.server")  # not above: few need its libraries
        except ModuleNotFoundError as error:
            raise BadInput(f"gRPC needs {error.name!r}; install it with `pip install 'manygates[serve]'`") from error
        async with grpc_server.running(self):
            yield

    @property
    def _paths(self) -> dict[bytes, Served]:
        """The models by the path of their inference."""
        service = self.service
        if self._hot_paths_of != service.generation:
            self._hot_paths = {}
            for name in service.names:
                self._hot_paths[f"/v2/models/{name}/infer".encode()] = service.find(name)
                for version in service.versions(name):
                    path = f"/v2/models/{name}/versions/{version}/infer"
                    self._hot_paths[path.encode()] = service.find(name, version)
            self._hot_paths_of = service.generation
        return self._hot_paths

    def _routes(self) -> Starlette:
        routes = [
            Route("/", self._index),
            Route("/openapi.json", self._openapi),
            Route("/metrics", self._metrics),
            Route("/classify", self._classify, methods=["POST"]),
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._server_ready),
        ]
        routes += [
            Route("/v2/repository/index", self._repository_index, methods=["POST"]),
            Route("/v2/repository/models/{model}/load", self._load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", self._unload, methods=["POST"]),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(prefix, self._model_metadata),
                Route(f"{prefix}/ready", self._model_ready),
                Route(f"{prefix}/config", self._model_config),
                Route(f"{prefix}/stats", self._model_stats),
                Route(f"{prefix}/infer", self._unknown_infer, methods=["POST"]),
            ]
        if self.settings.demo:  # whose mount answers below it only
            routes.append(Route("/demo", _to_folder))
        handlers: dict[Any, Any] = {
            RequestError: self._answer_error,
            HTTPException: self._answer_http_exception,
            Exception: self._answer_defect,
        }
        application = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.running)
        application.router.redirect_slashes = False
        return application

    async def _infer(self, served: Served, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an inference request that did not take the short way of `serving.http.connection`."""
        sizes = _Sizes(scope)
        try:
            body = await self._body(sizes, receive)
            served = served.latest
            started = time.perf_counter()
            request = served.codec.decode(body, sizes.header_length)
            answer = await self._predict(served, request.images, request.form.asked, scope, receive)
            headers, content = served.codec.encode(request, answer)
            status = 200
            served.metrics.answered("infer", request.form.asked.plan, time.perf_counter() - started)
            _note(scope, served, request.form.asked, len(request.images))
        except asyncio.CancelledError:
            if not self.draining:
                raise
            status, headers, content = self._failure(served, _stopped())
        except _ClientGone:
            return
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            status, headers, content = self._failure(served, self.service.failure(served, error))
        finally:
            self.held_bytes -= sizes.held
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _predict(
        self, served: Served, images: NDArray[Any], asked: Asked, scope: Scope, receive: Receive
    ) -> Prediction:
        """Answer images; if the client hangs up before their turn has come, give up its place in the queue."""
        answer = asyncio.ensure_future(self.service.predict(served, images, asked, scope.get("manygates.notes")))
        told = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((answer, told), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and told.result()["type"] == "http.disconnect":
                raise _ClientGone
            return await answer
        finally:
            answer.cancel()
            told.cancel()

    def _refuse(self, error: RequestError, path: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Count a request that was refused before anything was looked up."""
        self.metrics.failed("", error.reason)
        content = json.dumps({"error": str(error)}).encode()
        return error.status, json_headers(len(content)) + error.headers, content

    def _failure(self, served: Served, error: RequestError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Count an error, and return its status, headers and body."""
        self.metrics.failed(served.name, error.reason)
        content = json.dumps({"error": str(error)}).encode()
        return error.status, json_headers(len(content)) + error.headers, content

    async def _body(self, sizes: "_Sizes", receive: Receive, limit: int | None = None) -> bytes:
        """Read a body within the limits of size and time; what is held must be given back, see `_Sizes.held`.

        `limit` is in bytes; None takes the settings'.
        """
        fix = "send fewer images at a time" if limit is None else "send a few words of JSON, or nothing"
        limit = self.settings.max_body_bytes if limit is None else limit
        if sizes.content_encoding is not None:
            raise RequestError(
                415, "content_encoding", f"Content-Encoding is {sizes.content_encoding!r}, expected none; send it plain"
            )
        if sizes.content_length is not None and sizes.content_length > limit:
            raise _too_large(sizes.content_length, limit, fix)
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
                        raise _too_large(len(body), limit, fix)
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
        if self.held_bytes + length > limit:
            raise too_many_bytes(limit)
        self.held_bytes += length
        sizes.held += length

    async def _classify(self, request: Request) -> Response:
        served = self.service.find(request.query_params.get("model"), request.query_params.get("version"))
        # a key for some models only: here the path does not say which one is asked
        self.admit(request.url.path, request.headers.raw, served.name)
        request.state.model = served.name  # an error from here on is counted as this model's
        top = _top(request.query_params.get("top"), len(served.model.card.classes))
        asked = served.codec.asked(_parameters(request.query_params))
        sizes = _Sizes(request.scope)
        try:
            body = await self._body(sizes, request.receive)
            started = time.perf_counter()
            content = await _image_file(request.headers, body)
            images = await self._decode_image(served, content, asked.timeout)
            if served.latest is not served and served.latest.model.card.input == served.model.card.input:
                served = served.latest
                asked = served.codec.asked(_parameters(request.query_params))
            if asked.timeout is not None:
                left = asked.timeout - (time.perf_counter() - started)
                if left <= 0:
                    raise self.service.failure(served, DeadlineExceeded())
                asked = dataclasses.replace(asked, timeout=left)
            answer = await self._predict(served, images, asked, request.scope, request.receive)
        except _ClientGone:
            return Response(status_code=499)
        except asyncio.CancelledError as error:
            if not self.draining:
                raise
            raise _stopped() from error
        finally:
            self.held_bytes -= sizes.held
        classes = served.model.card.classes
        probabilities = answer.probabilities[0].tolist()
        ranked = sorted(zip(classes, probabilities, strict=True), key=lambda entry: -entry[1])
        served.metrics.answered("classify", asked.plan, time.perf_counter() - started)
        _note(request.scope, served, asked, 1)
        told: dict[str, Any] = {} if answer.exits is None else {"exit": int(answer.exits[0])}
        if answer.agreement is not None:
            told["agreement"] = round(float(answer.agreement[0]), 4)
        return JSONResponse(
            {
                "model": served.name,
                "mode": (asked.plan or served.model.plan).mode,
                **told,
                "label": ranked[0][0],
                "probabilities": dict(ranked[:top]),
            }
        )

    async def _decode_image(self, served: Served, content: bytes, timeout: float | None) -> NDArray[np.float32]:
        """Decode within `timeout` seconds on one of a few threads: a large JPEG takes longer than many predictions."""
        if self._decoders is None:
            raise busy(503, "not_ready", "the server is starting or stopping; try again, it may be another")
        if self._decoders.waiting >= _MAX_DECODING:
            raise busy(429, "queue_full", f"{_MAX_DECODING} images are being decoded; try again in a second")
        try:
            async with asyncio.timeout(timeout):
                decode = functools.partial(decode_image, max_pixels=self.settings.max_image_pixels)
                return await self._decoders.run(functools.partial(decode, content, served.model.card.input))
        except TimeoutError as error:
            raise self.service.failure(served, DeadlineExceeded()) from error
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
                "versions": self.service.versions(name),
                "description": served.model.card.description,
                "classes": list(served.model.card.classes),
                "infer": f"/v2/models/{name}/infer",
            }
            for name in self.service.names
            for served in [self.service.find(name)]
        ]
        endpoints = ["POST /classify", "GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /metrics"]
        endpoints.append("GET /openapi.json")
        return JSONResponse({"name": "manygates", "version": _version(), "models": models, "endpoints": endpoints})

    async def _openapi(self, request: Request) -> Response:
        if self._openapi_of != self.service.generation:
            self._openapi_of = self.service.generation
            self._openapi_text = json.dumps(openapi.document(self.service), separators=(",", ":")).encode()
        return Response(self._openapi_text, media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _server_metadata(self, request: Request) -> Response:
        return JSONResponse(self.service.description())

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _server_ready(self, request: Request) -> Response:
        return _readiness({"ready": self.ready}, self.ready)

    async def _model_metadata(self, request: Request) -> Response:
        served = self._model_of(request)
        return JSONResponse({**served.codec.metadata(), "versions": self.service.versions(served.name)})

    async def _model_ready(self, request: Request) -> Response:
        served = self._model_of(request)
        return _readiness({"name": served.name, "ready": served.ready}, served.ready)

    async def _model_config(self, request: Request) -> Response:
        return JSONResponse(self._model_of(request).configuration())

    async def _model_stats(self, request: Request) -> Response:
        return JSONResponse({"model_stats": [self._model_of(request).metrics.statistics()]})

    async def _repository_index(self, request: Request) -> Response:
        wanted = await self._json(request)
        only_ready = wanted.get("ready", False)
        if not isinstance(only_ready, bool):
            raise bad_request("'ready' must be true or false; leave it out for all models")
        return JSONResponse(self.index(only_ready=only_ready))

    async def _load(self, request: Request) -> Response:
        repository = self.changeable()
        if (await self._json(request)).get("parameters"):
            raise bad_request("a model is loaded as the operator configured it; send no parameters")
        gone = await repository.load(self.service, request.path_params["model"])
        return JSONResponse({"gone": gone} if gone else {})

    async def _unload(self, request: Request) -> Response:
        repository = self.changeable()
        await self._json(request)
        await repository.unload(self.service, request.path_params["model"])
        return JSONResponse({})

    async def _json(self, request: Request) -> dict[str, Any]:
        """Read a small JSON object; no body is an empty one."""
        sizes = _Sizes(request.scope)
        try:
            body = await self._body(sizes, request.receive, min(_MAX_SMALL_BODY, self.settings.max_body_bytes))
        finally:
            self.held_bytes -= sizes.held
        if not body:
            return {}
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"the body is not JSON ({error}); send an object, or nothing") from error
        if not isinstance(document, dict):
            raise bad_request("the body is JSON but no object; send an object, or nothing")
        return document

    def index(self, *, only_ready: bool = False) -> list[dict[str, str]]:
        """Return the repository's index: what is served and, if there is a repository, what could be."""
        if self.repository is not None:
            entries = self.repository.index()
        else:
            entries = [
                {"name": served.name, "version": served.version, "state": "READY", "reason": ""}
                for served in self.service.everything()
            ]
        return [entry for entry in entries if entry["state"] == "READY" or not only_ready]

    def changeable(self) -> Repository:
        """Return the repository, if clients may load and unload models.

        Raises:
            RequestError: 403 if they may not.
        """
        if self.repository is None or not self.settings.allow_repository_changes:
            raise RequestError(
                403,
                "not_allowed",
                "this server loads and unloads nothing on request (the operator may allow it with "
                "MANYGATES_SERVE_ALLOW_REPOSITORY_CHANGES=true)",
            )
        return self.repository

    async def _unknown_infer(self, request: Request) -> Response:
        self._model_of(request)  # known models never get here, so this says what is wrong with the name
        raise RequestError(404, "not_found", f"no such path {request.url.path!r}; see /")

    def _model_of(self, request: Request) -> Served:
        served = self.service.find(request.path_params["model"], request.path_params.get("version"))
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


async def _image_file(headers: HeaderMap, body: bytes) -> bytes:
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


async def _image_field(headers: HeaderMap, body: bytes) -> bytes:
    async def stream() -> Any:
        yield body

    boundary = _BOUNDARY.search(headers["content-type"])
    if boundary is None:
        raise bad_request("the form cannot be read (no boundary); send multipart/form-data with 'image'")
    # not the client's own header: it may name a charset, and some of Python's take minutes
    plain = HeaderMap({"content-type": f'multipart/form-data; boundary="{boundary[1] or boundary[2]}"'})
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


async def _to_folder(request: Request) -> Response:
    return RedirectResponse(request.url.replace(path=f"{request.url.path}/"))


def _note(scope: Scope, served: Served, asked: Asked, rows: int) -> None:
    """Leave what was answered for the log of requests and the trace."""
    scope["manygates.answered"] = {"model": served.name, "rows": rows}
    notes = scope.get("manygates.notes")
    if notes is not None:
        notes.model, notes.rows = served.name, rows
        notes.mode = (asked.plan or served.model.plan).mode


def _tracer(settings: Settings) -> Any:
    if settings.tracing == "off":
        return None
    return importlib.import_module("serving.operations.tracing").make_tracer(settings)  # not above: an extra


def _top(text: str | None, num_classes: int) -> int:
    if text is None:
        return num_classes
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise bad_request(f"top is {text[:40]!r}, expected a whole number from 1 to {num_classes}")
    return min(int(text), num_classes)


def _parameters(query: QueryParams) -> dict[str, Any]:
    """Take what a request may choose out of a URL, in the types that it has in a request's JSON."""
    parameters: dict[str, Any] = {name: query[name] for name in ("mode",) if name in query}
    for name in ("draws", "timeout", "priority"):
        if name in query:
            text = query[name]
            if not (text.isascii() and text.isdigit() and len(text) < 16):
                raise bad_request(f"{name} is {text[:40]!r}, expected a whole number")
            parameters[name] = int(text)
    try:
        if "exit" in query:
            parameters["exit"] = read_exit(query["exit"])
        if "confidence" in query:
            parameters["confidence"] = read_confidence(query["confidence"])
    except BadInput as error:
        raise bad_request(str(error)) from error
    return parameters


def _stopped() -> RequestError:
    return busy(503, "not_ready", "the server stopped before this was answered; try again, it may be another")


def _too_large(length: int, limit: int, fix: str) -> RequestError:
    return RequestError(
        413,
        "body_too_large",
        f"the body has at least {length} bytes, expected at most {limit}; {fix}",
        [(b"connection", b"close")],
    )


def _readiness(body: dict[str, Any], ready: bool) -> Response:
    return JSONResponse(body, status_code=200) if ready else JSONResponse(body, 503, headers={"retry-after": "1"})


def _version() -> str:
    try:
        return importlib.metadata.version("manygates")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0"
