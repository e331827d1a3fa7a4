"""What each call of the protocol over gRPC answers, but for streams and health."""

import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.json_format import ParseDict

from serving.errors import bad_request, shown
from serving.grpc.tensors import images_of, outputs_of, parameters_of, response_of
from serving.operations.log import clean_request_id
from serving.operations.tracing import RequestNotes
from serving.protocol.messages import message
from serving.protocol.open_inference import MAX_ID
from serving.scheduling.administration import Administration
from serving.scheduling.service import Served, Service

_HEADERS: Final = frozenset(("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"))


class Call:
    """A call that is being answered: what it came with, and what is known of it for the log and the metrics."""

    __slots__ = ("context", "headers", "held", "key", "method", "notes", "started")

    def __init__(self, method: str, context: Any) -> None:
        self.method = method
        self.context = context
        self.headers = headers_of(context.invocation_metadata())
        self.started = time.perf_counter()
        self.held = 0
        """Bytes of its message that count towards the server's total until it is answered."""
        self.key: str | None = None
        """The name of the key that allowed it."""
        self.notes = RequestNotes(request_id=clean_request_id(self.headers.get(b"x-request-id")))


Answer = Callable[[Any, Call], Awaitable[Any]]
"""Answers a message, for a call, with a message."""


def headers_of(metadata: Any) -> dict[bytes, bytes]:
    """Return what we look at of a call's metadata."""
    return {name.encode(): value.encode() for name, value in metadata or () if name in _HEADERS}


class Methods:
    """Answers read messages with messages; raises `RequestError` where it cannot."""

    def __init__(self, service: Service, administration: Administration) -> None:
        self._service = service
        self._administration = administration

    def by_name(self) -> dict[str, Answer]:
        """Return what answers the methods of one request and one answer."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self.model_infer,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def model_infer(self, request: Any, call: Call) -> Any:
        """Answer an inference request."""
        started = time.perf_counter()
        call.notes.request_id = clean_request_id(request.id) or call.notes.request_id
        served = self._find(request.model_name, request.model_version, call)
        if len(request.id) > MAX_ID:
            raise bad_request(f"'id' must be a string of at most {MAX_ID} characters, got {shown(request.id)}")
        asked = served.codec.choices.asked(parameters_of(request.parameters, "the request"))
        remaining = call.context.time_remaining()
        if remaining is not None and (asked.timeout is None or remaining < asked.timeout):
            asked = dataclasses.replace(asked, timeout=remaining)
        outputs = outputs_of(served, request, asked)
        images = images_of(served, request)
        call.notes.rows, call.notes.mode = len(images), (asked.plan or served.model.plan).mode
        answer = await self._service.predict(served, images, asked)
        response = response_of(served, request, outputs, answer)
        served.metrics.answered("grpc", asked.plan, time.perf_counter() - started)
        return response

    async def _server_live(self, request: Any, call: Call) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, request: Any, call: Call) -> Any:
        return message("ServerReadyResponse")(ready=self._service.ready)

    async def _server_metadata(self, request: Any, call: Call) -> Any:
        return message("ServerMetadataResponse")(**self._service.description())

    async def _model_ready(self, request: Any, call: Call) -> Any:
        return message("ModelReadyResponse")(ready=self._service.is_ready(request.name, request.version))

    async def _model_metadata(self, request: Any, call: Call) -> Any:
        served = self._find(request.name, request.version, call)
        metadata = {**served.codec.metadata(), "versions": self._service.versions(served.name)}
        return ParseDict(metadata, message("ModelMetadataResponse")(), ignore_unknown_fields=True)

    async def _model_config(self, request: Any, call: Call) -> Any:
        served = self._find(request.name, request.version, call)
        return ParseDict(
            {"config": served.configuration()}, message("ModelConfigResponse")(), ignore_unknown_fields=True
        )

    async def _model_statistics(self, request: Any, call: Call) -> Any:
        everything = [self._find(request.name, request.version, call)] if request.name else self._service.everything()
        statistics = [served.metrics.statistics() for served in everything]
        return ParseDict({"model_stats": statistics}, message("ModelStatisticsResponse")(), ignore_unknown_fields=True)

    async def _repository_index(self, request: Any, call: Call) -> Any:
        models = self._administration.index(only_ready=request.ready)
        return ParseDict({"models": models}, message("RepositoryIndexResponse")())

    async def _load(self, request: Any, call: Call) -> Any:
        await self._administration.load(request.model_name, parameters=request.parameters)
        return message("RepositoryModelLoadResponse")()

    async def _unload(self, request: Any, call: Call) -> Any:
        await self._administration.unload(request.model_name)
        return message("RepositoryModelUnloadResponse")()

    def _find(self, name: str, version: str, call: Call) -> Served:
        served = self._service.find(name, version)
        call.notes.model = served.name  # an error from here on is counted as this model's
        return served
