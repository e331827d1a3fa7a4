"""What is told of the models over HTTP, and their loading and unloading."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.errors import RequestError, bad_request
from serving.http.bodies import Bodies
from serving.http.documented import Documented
from serving.scheduling.administration import Administration
from serving.scheduling.service import Served, Service


class Models:
    """Answers what is below `/v2/models` and `/v2/repository`, but for inference."""

    def __init__(self, service: Service, administration: Administration, bodies: Bodies) -> None:
        self._service = service
        self._administration = administration
        self._bodies = bodies

    def routes(self) -> list[Route]:
        """Return the routes of all of it."""
        routes = [
            Route("/v2/repository/index", self.repository_index, methods=["POST"]),
            Route("/v2/repository/models/{model}/load", self.model_load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", self.model_unload, methods=["POST"]),
        ]
        for prefix, mark in (("/v2/models/{model}", ""), ("/v2/models/{model}/versions/{version}", "_of_version")):
            routes += [
                Route(prefix, self.model_metadata, name=f"model_metadata{mark}"),
                Route(f"{prefix}/ready", self.model_ready, name=f"model_ready{mark}"),
                Route(f"{prefix}/config", self.model_config, name=f"model_config{mark}"),
                Route(f"{prefix}/stats", self.model_stats, name=f"model_stats{mark}"),
                Route(f"{prefix}/infer", self.model_infer, name=f"model_infer{mark}", methods=["POST"]),
            ]
        return routes

    @Documented("models", answer="ModelMetadata", refuses=(404,))
    async def model_metadata(self, request: Request) -> Response:
        """The inputs and outputs of a model."""
        served = self._find(request)
        return JSONResponse({**served.codec.metadata(), "versions": self._service.versions(served.name)})

    @Documented("models", answer="ModelReady", refuses=(404,), says_no=True)
    async def model_ready(self, request: Request) -> Response:
        """Whether a model takes requests."""
        served = self._find(request)
        return readiness({"name": served.name}, served.ready)

    @Documented("models", answer="ModelConfiguration", refuses=(404,))
    async def model_config(self, request: Request) -> Response:
        """How a model is batched and run."""
        return JSONResponse(self._find(request).configuration())

    @Documented("models", answer="Statistics", refuses=(404,))
    async def model_stats(self, request: Request) -> Response:
        """Counts and times of a model."""
        return JSONResponse({"model_stats": [self._find(request).metrics.statistics()]})

    @Documented("inference", takes="InferRequest", answer="InferResponse", refuses=(404, 408, 413, 415, 429, 500, 504))
    async def model_infer(self, request: Request) -> Response:
        """Probabilities and logits of images.

        The body is JSON; or JSON and then the raw tensor, its length told by `Inference-Header-Content-Length`; or,
        where that is 0, one raw FP32 tensor and nothing else, which is the cheapest request there is.
        """
        self._find(request)  # known models never get here, so this says what is wrong with the name
        raise RequestError(404, "not_found", f"no such path {request.url.path!r}; see /")

    @Documented("models", takes="RepositoryIndexRequest", answer="RepositoryIndex", refuses=(408, 413, 415))
    async def repository_index(self, request: Request) -> Response:
        """The models there are, and whether they are ready."""
        wanted = await self._bodies.read_json(request.scope, request.receive)
        only_ready = wanted.get("ready", False)
        if not isinstance(only_ready, bool):
            raise bad_request("'ready' must be true or false; leave it out for all models")
        return JSONResponse(self._administration.index(only_ready=only_ready))

    @Documented("models", takes="LoadRequest", answer="Loaded", refuses=(403, 404, 408, 413, 415))
    async def model_load(self, request: Request) -> Response:
        """Load a model, again if it is served already, as the operator configured it.

        403 unless the operator allows it.
        """
        self._administration.check_changes()
        wanted = await self._bodies.read_json(request.scope, request.receive)
        gone = await self._administration.load(request.path_params["model"], parameters=wanted.get("parameters"))
        return JSONResponse({"gone": gone} if gone else {})

    @Documented("models", takes="UnloadRequest", answer="Unloaded", refuses=(403, 404, 408, 413, 415))
    async def model_unload(self, request: Request) -> Response:
        """Serve a model no longer, until it is loaded again.

        403 unless the operator allows it.
        """
        self._administration.check_changes()
        await self._bodies.read_json(request.scope, request.receive)
        await self._administration.unload(request.path_params["model"])
        return JSONResponse({})

    def _find(self, request: Request) -> Served:
        served = self._service.find(request.path_params["model"], request.path_params.get("version"))
        request.state.model = served.name  # an error from here on is counted as this model's
        return served


def readiness(told: dict[str, object], ready: bool) -> Response:
    """Return an answer that says whether something is ready, with its status as well."""
    body = {**told, "ready": ready}
    return JSONResponse(body) if ready else JSONResponse(body, 503, headers={"retry-after": "1"})
