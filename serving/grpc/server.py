"""The Open Inference Protocol over gRPC, and gRPC's own health protocol, on the event loop of everything else.

A call's deadline is its request's timeout, and a call that is cancelled gives up its place in the queue. Errors say
over gRPC what they say over HTTP, and keys and limits are the same ones: a call without a key is refused before any of
its message is read. Tensors come as raw bytes or as typed contents, and go as raw bytes.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from serving.errors import RequestError, bad_request, busy
from serving.http.app import Application
from serving.operations.log import clean_request_id, log_request, new_request_id
from serving.operations.settings import Settings
from serving.operations.tls import pems
from serving.protocol.messages import SERVICE, Malformed, check_infer_request, message
from serving.protocol.open_inference import INPUT, OUTPUTS, Asked
from serving.scheduling.service import Served
from zoo.errors import BadInput

logger = logging.getLogger("manygates.serving")

HEALTH_SERVICE: Final = "grpc.health.v1.Health"

_MAX_SMALL_BYTES: Final = 65_536  # of a message without tensors
_MAX_PARTS: Final = 10_000  # of an inference request; one has about twenty, or one per number if they are not packed
_MAX_ID: Final = 256
_MAX_SHOWN: Final = 80
_IN_STREAM: Final = 64  # requests of one stream at a time
_HEALTH_SECONDS: Final = 0.2  # between two looks of a watcher
_QUIET_SECONDS: Final = 0.02  # without a request, before gRPC stops
_PROMPT_SECONDS: Final = 0.25  # in which a message has to come that counts as what it turns out to be
_QUIET_LOOKS: Final = 25
_MAX_WATCHERS: Final = 64  # of health, which needs no key and never ends
_DATATYPES: Final = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}
_CONTENTS: Final = {"FP32": "fp32_contents", "UINT8": "uint_contents"}
_UNSUPPORTED: Final = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "classification")
_HEADERS: Final = frozenset(("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"))
_MOST: Final = 2**31 - 1  # a gRPC option is a 32-bit integer

# The path of the same call over HTTP, by which keys are asked for.
_HTTP_PATHS: Final = {
    "ServerLive": "/v2/health/live",
    "ServerReady": "/v2/health/ready",
    "ServerMetadata": "/v2",
    "ModelReady": "/v2/models/{model}/ready",
    "ModelMetadata": "/v2/models/{model}",
    "ModelInfer": "/v2/models/{model}/infer",
    "ModelStreamInfer": "/v2/models/{model}/infer",
    "ModelConfig": "/v2/models/{model}/config",
    "ModelStatistics": "/v2/models/{model}/stats",
    "RepositoryIndex": "/v2/repository/index",
    "RepositoryModelLoad": "/v2/repository/models/{model}/load",
    "RepositoryModelUnload": "/v2/repository/models/{model}/unload",
}


@asynccontextmanager
async def running(application: Application) -> AsyncIterator[None]:
    """Serve gRPC inside the block, on the address of HTTP and the settings' port for gRPC.

    On leaving it no new calls are taken, and those in flight have what is left of the time to drain.

    Raises:
        BadInput: if the address cannot be used, or a file of the settings for TLS.
    """
    settings = application.settings
    server = grpc.aio.server(options=_options(settings), maximum_concurrent_rpcs=settings.max_connections)
    calls = _Calls(application)
    server.add_generic_rpc_handlers((calls,))
    application.grpc_port = _bind(server, settings)
    await server.start()
    logger.info("gRPC at %s", _address(settings.host, application.grpc_port))
    try:
        yield
    finally:
        service = application.service
        await calls.refuse_more()
        calls.stopping.set()
        stopping = asyncio.ensure_future(server.stop(grace=service.time_to_drain))
        hurried = asyncio.ensure_future(service.hurried.wait())
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await server.stop(grace=0)
        hurried.cancel()
        await stopping


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", min(settings.max_body_bytes, _MOST)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", min(settings.max_connections, _MOST)),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server behind it
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.header_timeout)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.keep_alive_timeout)),
        # find clients that vanished, and bear those that look after us as often
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, min(int(1000 * seconds), _MOST))


def _address(host: str, port: int) -> str:
    try:
        return f"[{host}]:{port}" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else f"{host}:{port}"
    except ValueError:  # a name
        return f"{host}:{port}"


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    """Listen, and return the port."""
    address = _address(settings.host, settings.grpc_port)
    files = pems(settings)
    try:
        if files is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials(
            [(files.key, files.certificate)],
            root_certificates=files.client_ca,
            require_client_auth=files.client_ca is not None,
        )
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise BadInput(
            f"cannot serve gRPC on {address}; choose another port with --grpc-port, or stop what uses it"
        ) from error


class _Call:
    """One call: what it came with, and what is known of it for the log and the metrics."""

    __slots__ = ("context", "headers", "held", "key", "method", "mode", "model", "request_id", "rows", "started")

    def __init__(self, method: str, context: Any) -> None:
        self.method = method
        self.context = context
        self.headers = _headers(context.invocation_metadata())
        self.started = time.perf_counter()
        self.held = 0
        """Bytes of its message that count towards the server's total until it is answered."""
        self.model = ""
        """Empty until it names one that is known."""
        self.request_id = clean_request_id(self.headers.get(b"x-request-id"))
        self.key: str | None = None
        """The name of the key that allowed it."""
        self.mode: str | None = None
        self.rows: int | None = None


Answer = Callable[[Any, _Call], Awaitable[Any]]


def _headers(metadata: Any) -> dict[bytes, bytes]:
    """Return what we look at of a call's metadata."""
    return {name.encode(): value.encode() for name, value in metadata or () if name in _HEADERS}


class _Calls(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Finds out what a call asks for and answers it."""

    def __init__(self, application: Application) -> None:
        self.stopping = asyncio.Event()
        """Set when calls without an end are to end."""
        self._application = application
        self._service = application.service
        self._settings = application.settings
        self._refusing = False
        self._refused = 0
        self._slow = 0
        """Calls whose message has begun and not come at once."""
        self._open: Counter[str] = Counter()
        """Calls without an end, by method: they must not use up all that there may be."""
        answers: dict[str, Answer] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        # Whatever a client sends is read by ourselves: after its keys, within the limits, and with our own errors.
        self._handlers = {
            f"/{SERVICE}/{name}": grpc.stream_unary_rpc_method_handler(
                self._unary(name, message(f"{name}Request"), answer)
            )
            for name, answer in answers.items()
        }
        self._handlers[f"/{SERVICE}/ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        check = self._unary("Check", health_pb2.HealthCheckRequest, self._check_health)
        self._handlers[f"/{HEALTH_SERVICE}/Check"] = grpc.stream_unary_rpc_method_handler(check)
        self._handlers[f"/{HEALTH_SERVICE}/Watch"] = grpc.stream_stream_rpc_method_handler(self._watch_health)

    def service(self, handler_call_details: Any) -> Any:
        """Return what answers a call, before any of its message is read; None for an unknown method."""
        path = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is None:
            return None
        method = path.rpartition("/")[2]
        if (self._refusing or self._service.closing) and method in ("ModelInfer", "ModelStreamInfer"):
            self._refused += 1
            stopping = busy(503, "not_ready", "the server is stopping; try again, it may be another")
            return grpc.stream_unary_rpc_method_handler(self._refusal(method, stopping))
        try:
            # which model it asks is in its message, which is not read without a key that is good for something
            self._admit(method, _headers(handler_call_details.invocation_metadata))
        except RequestError as error:
            if error.status == 401:
                return grpc.stream_unary_rpc_method_handler(self._refusal(method, error))
        return handler

    async def refuse_more(self) -> None:
        """Refuse new requests from now on, and return when nobody sends any, or soon in any case.

        What gRPC has not handed to us when it stops it ends as cancelled, after which no client tries again. This says
        `UNAVAILABLE`, after which they do.
        """
        self._refusing = True
        for _ in range(_QUIET_LOOKS):
            before = self._refused
            await asyncio.sleep(_QUIET_SECONDS)
            if self._refused == before:
                return

    def _admit(self, method: str, headers: dict[bytes, bytes], model: str | None = None) -> str | None:
        """Ask for keys as HTTP does on the path of the same call; returns the name of the key.

        Raises:
            RequestError: 401 without a key that holds, 403 if it does not hold for this model.
        """
        path = _HTTP_PATHS.get(method, _HTTP_PATHS["ServerReady"])
        return self._application.admit(path.format(model="-"), list(headers.items()), model)

    def _refusal(self, method: str, error: RequestError) -> Any:
        async def refuse(_: Any, context: Any) -> None:
            await self._fail(_Call(method, context), error)

        return refuse

    def _unary(self, method: str, request_class: Any, answer: Answer) -> Any:
        """Return what grpc is to call for a method of one request and one answer."""

        async def call(_: Any, context: Any) -> bytes:
            known = _Call(method, context)
            try:
                request = self._parse(request_class, await self._receive(known), known)
                known.key = self._admit(method, known.headers, _model_named_by(request))
                content: bytes = (await answer(request, known)).SerializeToString()
            except asyncio.CancelledError:
                self._count_deadline(known)
                raise
            except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
                failure = self._failure(known, error)
            else:
                self._finish(known, 200)
                return content
            finally:
                self._application.held_bytes -= known.held
            await self._fail(known, failure)
            return b""

        return call

    async def _receive(self, call: _Call) -> bytes:
        """Read a call's message within the limits of size and time.

        How much of a message has come is not to be seen before all of it has. So what does not come at once counts as
        large as it may become, and there are never more of those than the server may hold.
        """
        slow = refused = False

        def take_time() -> None:
            nonlocal slow, refused
            slow = self._slow < max(1, self._settings.max_total_body_bytes // self._settings.max_body_bytes)
            refused = not slow
            self._slow += slow
            if refused:
                limit.reschedule(asyncio.get_running_loop().time())

        prompt = asyncio.get_running_loop().call_later(_PROMPT_SECONDS, take_time)
        try:
            async with asyncio.timeout(self._settings.body_timeout) as limit:
                body = await call.context.read()
        except TimeoutError as error:
            if refused:
                raise busy(503, "too_many_bytes", "too many messages are being sent slowly; try again later") from error
            raise RequestError(
                408, "body_timeout", f"no message came within {self._settings.body_timeout:g} seconds; send faster"
            ) from error
        finally:
            prompt.cancel()
            self._slow -= slow
        if body is grpc.aio.EOF:
            raise bad_request(f"the call ended without a message; send one {call.method}Request")
        assert isinstance(body, bytes)
        return body

    def _parse(self, request_class: Any, body: bytes, call: _Call) -> Any:
        """Read a message, and account for its bytes."""
        limit = self._settings.max_total_body_bytes
        if self._application.held_bytes + len(body) > limit:
            raise busy(503, "too_many_bytes", f"requests of {limit} bytes are being answered; try again in a second")
        self._application.held_bytes += len(body)
        call.held += len(body)
        try:
            if request_class is message("ModelInferRequest"):
                check_infer_request(body, _MAX_PARTS)
            elif len(body) > _MAX_SMALL_BYTES:
                raise RequestError(
                    413, "body_too_large", f"the message has {len(body)} bytes, expected at most {_MAX_SMALL_BYTES}"
                )
            return request_class.FromString(body)
        except (DecodeError, Malformed) as error:
            raise bad_request(
                f"the message of {len(body)} bytes is no good {request_class.DESCRIPTOR.name}: {error}"
            ) from error

    def _failure(self, call: _Call, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        logger.error("the call %s failed for a reason of ours", call.method, exc_info=error)
        return RequestError(500, "defect", "internal error; the server's log says more")

    async def _fail(self, call: _Call, error: RequestError) -> None:
        """Count an error and end the call with it."""
        self._count(call, error)
        trailing = tuple(
            (name.decode(), value.decode())
            for name, value in error.headers
            if name in (b"retry-after", b"www-authenticate")
        )
        await call.context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error), trailing)

    def _count_deadline(self, call: _Call) -> None:
        """Count a call that gRPC ended, if it was its deadline; a client that hung up is no error."""
        if call.context.time_remaining() == 0:
            self._count(call, RequestError(504, "deadline", ""))

    def _count(self, call: _Call, error: RequestError) -> None:
        self._application.metrics.failed(call.model, error.reason)
        self._finish(call, error.status, error.reason)

    def _finish(self, call: _Call, status: int, reason: str | None = None) -> None:
        """Write a call into the log and the traces, if they are wanted."""
        ended = time.perf_counter()
        if self._settings.log_requests:
            log_request(
                method="GRPC",
                path=call.method,
                status=status,
                seconds=ended - call.started,
                request_id=call.request_id or new_request_id(),
                model=call.model or None,
                rows=call.rows,
                key=call.key,
            )
        if self._application.tracer is not None:
            self._application.tracer.record(
                call.method,
                started=call.started,
                ended=ended,
                status=status,
                model=call.model or None,
                mode=call.mode,
                rows=call.rows,
                protocol="grpc",
                request_id=call.request_id,
                reason=reason,
                traceparent=call.headers.get(b"traceparent"),
                tracestate=call.headers.get(b"tracestate"),
            )

    def _find(self, name: str, version: str, call: _Call) -> Served:
        served = self._service.find(name, version)
        call.model = served.name  # an error from here on is counted as this model's
        return served

    async def _server_live(self, request: Any, call: _Call) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, request: Any, call: _Call) -> Any:
        return message("ServerReadyResponse")(ready=self._service.ready)

    async def _server_metadata(self, request: Any, call: _Call) -> Any:
        return message("ServerMetadataResponse")(**self._service.description())

    async def _model_ready(self, request: Any, call: _Call) -> Any:
        return message("ModelReadyResponse")(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, name: str, version: str = "") -> bool:
        """Tell whether a model takes requests; one that there is not does not, so that clients can wait for it."""
        try:
            served = self._service.find(name, version)
        except RequestError:
            return False
        return served.ready

    async def _model_metadata(self, request: Any, call: _Call) -> Any:
        served = self._find(request.name, request.version, call)
        metadata = {**served.codec.metadata(), "versions": self._service.versions(served.name)}
        return ParseDict(metadata, message("ModelMetadataResponse")(), ignore_unknown_fields=True)

    async def _model_config(self, request: Any, call: _Call) -> Any:
        served = self._find(request.name, request.version, call)
        return ParseDict(
            {"config": served.configuration()}, message("ModelConfigResponse")(), ignore_unknown_fields=True
        )

    async def _model_statistics(self, request: Any, call: _Call) -> Any:
        everything = [self._find(request.name, request.version, call)] if request.name else self._service.everything()
        statistics = [served.metrics.statistics() for served in everything]
        return ParseDict({"model_stats": statistics}, message("ModelStatisticsResponse")(), ignore_unknown_fields=True)

    async def _repository_index(self, request: Any, call: _Call) -> Any:
        return ParseDict(
            {"models": self._application.index(only_ready=request.ready)}, message("RepositoryIndexResponse")()
        )

    async def _load(self, request: Any, call: _Call) -> Any:
        repository = self._application.changeable()
        if request.parameters:
            raise bad_request("a model is loaded as the operator configured it; send no parameters")
        await repository.load(self._service, request.model_name)
        return message("RepositoryModelLoadResponse")()

    async def _unload(self, request: Any, call: _Call) -> Any:
        repository = self._application.changeable()
        await repository.unload(self._service, request.model_name)
        return message("RepositoryModelUnloadResponse")()

    async def _model_infer(self, request: Any, call: _Call) -> Any:
        """Answer an inference request."""
        started = time.perf_counter()
        call.request_id = clean_request_id(request.id) or call.request_id
        served = self._find(request.model_name, request.model_version, call)
        if len(request.id) > _MAX_ID:
            raise bad_request(f"'id' must be a string of at most {_MAX_ID} characters, got {_shown(request.id)}")
        asked = served.codec.asked(_parameters(request.parameters, "the request"))
        remaining = call.context.time_remaining()
        if remaining is not None and (asked.timeout is None or remaining < asked.timeout):
            asked = dataclasses.replace(asked, timeout=remaining)
        outputs = _outputs(served, request, asked)
        images = _images(served, request)
        call.rows, call.mode = len(images), (asked.plan or served.model.plan).mode
        answer = await self._service.predict(served, images, asked)
        response = message("ModelInferResponse")(model_name=served.name, model_version=served.version, id=request.id)
        for name in outputs:
            values = served.codec.values(answer, name)
            response.outputs.add(name=name, datatype=_DATATYPES[values.dtype], shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        served.metrics.answered("grpc", asked.plan, time.perf_counter() - started)
        return response

    async def _stream_infer(self, _: Any, context: Any) -> None:
        """Answer a stream of inference requests in their order; some are computed at a time."""
        call = _Call("ModelStreamInfer", context)
        try:
            with self._one_more(call.method, max(1, self._settings.max_connections // 2)):
                await self._answer_stream(context)
        except RequestError as error:
            await self._fail(call, error)

    @contextlib.contextmanager
    def _one_more(self, method: str, most: int) -> Iterator[None]:
        """Count a call without an end.

        Raises:
            RequestError: 429 if there are `most` already.
        """
        if self._open[method] >= most:
            raise busy(429, "too_many_streams", f"{most} calls of {method} are open; try again later")
        self._open[method] += 1
        try:
            yield
        finally:
            self._open[method] -= 1

    async def _answer_stream(self, context: Any) -> None:
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_IN_STREAM)
        stop = asyncio.create_task(self.stopping.wait())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_stream(answers, context))
                while True:
                    read = asyncio.ensure_future(context.read())
                    await asyncio.wait({read, stop}, return_when=asyncio.FIRST_COMPLETED)
                    if not read.done() or read.result() is grpc.aio.EOF:
                        read.cancel()
                        break
                    await answers.put(group.create_task(self._answer_in_stream(read.result(), context)))
                await answers.put(None)
        finally:
            stop.cancel()

    async def _send_stream(self, answers: "asyncio.Queue[asyncio.Task[bytes] | None]", context: Any) -> None:
        while (answer := await answers.get()) is not None:
            await context.write(await answer)

    async def _answer_in_stream(self, body: bytes, context: Any) -> bytes:
        """Return an answer, or what went wrong: one bad request does not end the stream."""
        call = _Call("ModelStreamInfer", context)
        response = message("ModelStreamInferResponse")()
        request_id = ""
        try:
            request = self._parse(message("ModelInferRequest"), body, call)
            request_id = request.id[:_MAX_ID]
            call.key = self._admit(call.method, call.headers, request.model_name)
            response.infer_response.CopyFrom(await self._model_infer(request, call))
            self._finish(call, 200)
        except asyncio.CancelledError:
            self._count_deadline(call)
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            failure = self._failure(call, error)
            self._count(call, failure)
            response.error_message = str(failure)
            response.infer_response.id = request_id
        finally:
            self._application.held_bytes -= call.held
        content: bytes = response.SerializeToString()
        return content

    def _health_of(self, name: str) -> int | None:
        """Return the status of the server (an empty name), the protocol's service or a model; None for other names."""
        if name in ("", SERVICE):
            ready = self._service.ready and not self.stopping.is_set()
        elif name in self._service.names or any(name == entry["name"] for entry in self._application.index()):
            ready = self._is_ready(name) and not self.stopping.is_set()
        else:
            return None
        statuses = health_pb2.HealthCheckResponse
        return int(statuses.SERVING if ready else statuses.NOT_SERVING)

    async def _check_health(self, request: Any, call: _Call) -> Any:
        status = self._health_of(request.service)
        if status is None:
            raise RequestError(
                404, "unknown_service", f"no service and no model has the name {_shown(request.service)}"
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def _watch_health(self, _: Any, context: Any) -> None:
        """Tell the status now and after each change, until the client has enough or the server stops."""
        call = _Call("Watch", context)
        try:
            with self._one_more(call.method, _MAX_WATCHERS):
                request = self._parse(health_pb2.HealthCheckRequest, await self._receive(call), call)
                await self._tell_health(request.service, context)
        except RequestError as error:
            await self._fail(call, error)
        finally:
            self._application.held_bytes -= call.held

    async def _tell_health(self, name: str, context: Any) -> None:
        told = None
        while True:
            status = self._health_of(name)
            if status is None:
                status = int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status).SerializeToString())
                told = status
            if self.stopping.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), _HEALTH_SECONDS)


def _model_named_by(request: Any) -> str | None:
    """Return the name of the model that a message asks for; None where it asks none."""
    fields = request.DESCRIPTOR.fields_by_name
    if "model_name" in fields:
        return str(request.model_name)
    if "name" in fields:
        return str(request.name) or None
    return None


def _parameters(parameters: Any, where: str) -> dict[str, Any]:
    """Return parameters in Python's types."""
    if not parameters:
        return {}
    for name in _UNSUPPORTED:
        if name in parameters:
            raise bad_request(f"{where} has the parameter {name!r}, which this server does not offer; remove it")
    values = {}
    for name, value in parameters.items():
        field = value.WhichOneof("parameter_choice")
        if field is not None:
            values[name] = getattr(value, field)
    return values


def _outputs(served: Served, request: Any, asked: Asked) -> list[str]:
    """Return the names of the outputs that a request wants."""
    outputs: list[str] = []
    for output in request.outputs:
        name = served.codec.check_output(output.name, asked)
        if name in outputs:
            raise bad_request(f"the output {name!r} is asked for twice; name it once")
        _parameters(output.parameters, f"the output {name!r}")
        outputs.append(name)
    return outputs or list(OUTPUTS)


def _images(served: Served, request: Any) -> NDArray[Any]:
    """Return the checked images of a request, from raw bytes or typed contents."""
    for tensor in request.inputs:
        if tensor.name != INPUT:
            raise bad_request(f"unknown input {_shown(tensor.name)}; {served.name} takes only {INPUT!r}")
    if len(request.inputs) != 1:
        raise bad_request(f"got {len(request.inputs)} inputs, expected exactly one, {INPUT!r}")
    tensor = request.inputs[0]
    shape = list(tensor.shape)
    rows = served.codec.rows(shape)
    _parameters(tensor.parameters, f"the input {INPUT!r}")
    datatype = tensor.datatype
    typed = [field.name for field, _ in tensor.contents.ListFields()]
    if request.raw_input_contents:
        if typed:
            raise bad_request(f"the input {INPUT!r} has {typed[0]}, and there are raw_input_contents; send one of them")
        if len(request.raw_input_contents) != 1:
            raise bad_request(f"got {len(request.raw_input_contents)} raw_input_contents, expected one, of {INPUT!r}")
        return served.codec.pixels(request.raw_input_contents[0], datatype, rows)
    expected = _CONTENTS.get(datatype)
    if expected is None:
        return served.codec.pixels(b"", datatype, rows)  # says what is wrong with the type
    if typed != [expected]:
        found = ", ".join(typed) or "no contents"
        raise bad_request(
            f"the input {INPUT!r} has {found}, expected raw_input_contents, or {expected} for datatype {datatype}"
        )
    numbers = getattr(tensor.contents, expected)
    if len(numbers) != math.prod(shape):
        raise bad_request(
            f"the input {INPUT!r} has {len(numbers)} numbers in {expected}, expected {math.prod(shape)} for {shape}"
        )
    if datatype == "FP32":
        return served.codec.pixels(np.array(numbers, dtype="<f4").tobytes(), datatype, rows)
    levels = np.array(numbers, dtype=np.uint32)
    if levels.max() > 255:
        raise bad_request(f"the pixels of {INPUT!r} reach to {levels.max()}, expected 0 to 255 for UINT8")
    return served.codec.pixels(levels.astype(np.uint8).tobytes(), datatype, rows)


def _shown(text: str) -> str:
    """Show a text from a request, however long it is."""
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
