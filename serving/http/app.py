"""The ASGI application: the Open Inference Protocol's calls, `/classify`, `/metrics`, and an index.

Inference is dispatched by hand, before any router: at a few hundred microseconds of computing per image a router would
be a tenth of the cost. Everything else is Starlette's.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.engine.graphs import modes_of
from serving.errors import Headers, RequestError, not_ready
from serving.http.bodies import Bodies
from serving.http.documented import Documented
from serving.http.edge import Edge
from serving.http.inference import STOPPED, Inference
from serving.http.models import Models, readiness
from serving.http.pictures import Pictures
from serving.operations.metrics import CONTENT_TYPE
from serving.operations.settings import Settings
from serving.protocol.admission import Admission, ByteBudget
from serving.scheduling.administration import Administration
from serving.scheduling.repository import Repository
from serving.scheduling.service import Model, Served, Service
from zoo.errors import BadInput
from zoo.vocabulary import VERSION

_ENDPOINTS = (
    "POST /classify",
    *(f"GET {path}" for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/metrics", "/openapi.json")),
)


class Collecting(Protocol):
    """A connection that is receiving a body outside of this application's way."""

    def stop_collecting(self, error: RequestError) -> None:
        """Answer with an error, and hang up."""


ServeBeside = Callable[["Application"], AbstractAsyncContextManager[int]]
"""Serves another protocol while its block runs; the block is given the port."""


class Application:
    """The ASGI application that serves some models.

    It takes requests between its start and its stop, which the lifespan protocol triggers (`running` does so in tests).
    """

    def __init__(
        self,
        models: Sequence[Model],
        settings: Settings | None = None,
        repository: Repository | None = None,
        *,
        tracer: Any = None,
        grpc: ServeBeside | None = None,
    ) -> None:
        """Prepare to serve; of the models the first is the one that `/classify` uses by default.

        Models may be loaded, reloaded and unloaded while the server runs if there is a `repository`. Without a `tracer`
        of OpenTelemetry nothing is traced; without `grpc` there is only HTTP.

        Raises:
            BadInput: if there is no model, two have the same name and version, or the settings name a file that cannot
                be used.
        """
        self.settings = settings or Settings()
        if not models and not self.settings.model_repository:
            raise BadInput("no model to serve; name at least one")
        self.service = Service(models, self.settings)
        self.metrics = self.service.metrics
        self.repository = repository
        if repository is not None:
            self.service.complete = lambda: repository.complete
        self.administration = Administration(self.service, repository)
        self.admission = Admission(self.settings)
        self.budget = ByteBudget(self.settings.max_total_body_bytes)
        """For the bodies of all protocols."""
        self.tracer = tracer
        self._grpc = grpc
        self.grpc_port: int | None = None
        """Where gRPC listens, once it does."""
        self.collecting: set[Collecting] = set()
        """The connections that are receiving the body of a plain inference request."""
        bodies = Bodies(self.settings, self.budget)
        self._inference = Inference(self.service, bodies)
        self._pictures = Pictures(self.service, self.admission, bodies)
        self._models = Models(self.service, self.administration, bodies)
        self._edge = Edge(self._route, self.settings, self.admission, self.metrics, tracer)
        self._short_way = not self.settings.log_requests and tracer is None
        self._hot_paths: dict[bytes, Served] = {}
        self._hot_paths_of = -1
        self._openapi_text = b""
        self._openapi_of = -1
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
                await self._inference.infer(served, scope, receive, send)
                return
        await self.rest(scope, receive, send)

    @property
    def stuck(self) -> bool:
        """Whether a thread is still at work after the stop, which the interpreter would wait for at its end."""
        return self.service.scheduler.stuck or self._pictures.busy

    def hot(self, path: bytes, headers: Headers) -> Served | None:
        """Return the model whose inference has this path, if a request with these headers may take the short way."""
        served = self._paths.get(path) if self._short_way else None
        if served is not None:
            try:
                self.admission.check(path.decode("latin-1"), headers)
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
        self._pictures.start()
        self.service.start()
        watching = None
        if self.repository is not None and self.settings.reload_seconds:
            watching = asyncio.create_task(self.repository.watch(self.service, self.settings.reload_seconds))
        try:
            async with AsyncExitStack() as beside:
                if self._grpc is not None:
                    self.grpc_port = await beside.enter_async_context(self._grpc(self))
                yield
        finally:
            if watching is not None:
                watching.cancel()
            await self.service.stop()
            if self.tracer is not None:
                await asyncio.to_thread(self.tracer.close)
            for connection in list(self.collecting):
                connection.stop_collecting(not_ready(STOPPED))
            self._pictures.stop()

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
            Route("/", self.index),
            Route("/openapi.json", self.openapi),
            Route("/metrics", self.prometheus, name="metrics"),
            Route("/classify", self._pictures.classify, methods=["POST"]),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", self.server_live),
            Route("/v2/health/ready", self.server_ready),
            *self._models.routes(),
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

    @Documented("server", answer="Index")
    async def index(self, request: Request) -> Response:
        """The models and the most used calls."""
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
        known = {"name": "manygates", "version": VERSION, "models": models, "endpoints": _ENDPOINTS}
        return JSONResponse(known)

    @Documented("server", answer="OpenApi")
    async def openapi(self, request: Request) -> Response:
        """This document."""
        from serving.http.openapi import document  # few ask for it, and a start is 10 ms shorter without

        if self._openapi_of != self.service.generation:
            self._openapi_of = self.service.generation
            found = document(self.service, self.starlette.routes)
            self._openapi_text = json.dumps(found, separators=(",", ":")).encode()
        return Response(self._openapi_text, media_type="application/json")

    @Documented("server", answer="Text")
    async def prometheus(self, request: Request) -> Response:
        """Counts and times in Prometheus's text format."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @Documented("server", answer="ServerMetadata")
    async def server_metadata(self, request: Request) -> Response:
        """The server's name, version and extensions."""
        return JSONResponse(self.service.description())

    @Documented("server", answer="Live")
    async def server_live(self, request: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"live": True})

    @Documented("server", answer="Ready", says_no=True)
    async def server_ready(self, request: Request) -> Response:
        """Whether all models that should be served take requests."""
        return readiness({}, self.service.ready)

    async def _answer_error(self, request: Request, error: RequestError) -> Response:
        self.metrics.failed(getattr(request.state, "model", ""), error.reason)
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)

    async def _answer_http_exception(self, request: Request, error: HTTPException) -> Response:
        path = request.url.path[:128]
        told = {
            404: ("not_found", f"no such path {path!r}; see /"),
            405: ("method_not_allowed", f"{request.method} is not offered on {path!r}; the header Allow names what is"),
        }
        reason, message = told.get(error.status_code, ("http", error.detail))
        self.metrics.failed(getattr(request.state, "model", ""), reason)
        return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)

    async def _answer_defect(self, request: Request, error: Exception) -> Response:
        self.metrics.failed(getattr(request.state, "model", ""), "defect")
        return JSONResponse({"error": "internal error; the server's log says more"}, status_code=500)


async def _to_folder(request: Request) -> Response:
    return RedirectResponse(request.url.replace(path=f"{request.url.path}/"))
