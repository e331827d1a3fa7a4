"""Every call over gRPC from its first byte to its end: keys, limits of size and time, errors, the log, streams.

A call's deadline is its request's timeout, and a call that is cancelled gives up its place in the queue. Errors say
over gRPC what they say over HTTP, and keys and limits are the same ones: a call without a key is refused before any of
its message is read.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from serving.errors import RequestError, bad_request, busy, defect, not_ready
from serving.grpc.health import HEALTH_SERVICE, Health
from serving.grpc.methods import Answer, Call, Methods, headers_of
from serving.operations.log import log_request, new_request_id
from serving.protocol.admission import Admission, ByteBudget
from serving.protocol.messages import SERVICE, Malformed, check_infer_request, message
from serving.protocol.open_inference import MAX_ID
from serving.scheduling.administration import Administration
from serving.scheduling.service import Service

_MAX_SMALL_BYTES: Final = 65_536  # of a message without tensors
_MAX_PARTS: Final = 10_000  # of an inference request; one has about twenty, or one per number if they are not packed
_IN_STREAM: Final = 64  # requests of one stream at a time
_HEALTH_SECONDS: Final = 0.2  # between two looks at what a watcher is to be told
_QUIET_SECONDS: Final = 0.02  # without a request, before gRPC stops
_PROMPT_SECONDS: Final = 0.25  # in which a message has to come that counts as what it turns out to be
_QUIET_LOOKS: Final = 25
_MAX_WATCHERS: Final = 64  # of health, which needs no key and never ends

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


class Calls(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Finds out what a call asks for and answers it."""

    def __init__(
        self, service: Service, admission: Admission, budget: ByteBudget, administration: Administration, tracer: Any
    ) -> None:
        self.stopping = asyncio.Event()
        """Set when calls without an end are to end."""
        self.health = Health(service, administration)
        self._service = service
        self._settings = service.settings
        self._admission = admission
        self._budget = budget
        self._tracer = tracer
        self._methods = Methods(service, administration)
        self._refusing = False
        self._refused = 0
        self._slow = 0
        """Calls whose message has begun and not come at once."""
        self._open: Counter[str] = Counter()
        """Calls without an end, by method: they must not use up all that there may be."""
        # Whatever a client sends is read by ourselves: after its keys, within the limits, and with our own errors.
        self._handlers = {
            f"/{SERVICE}/{name}": grpc.stream_unary_rpc_method_handler(
                self._unary(name, message(f"{name}Request"), answer)
            )
            for name, answer in self._methods.by_name().items()
        }
        self._handlers[f"/{SERVICE}/ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        check = self._unary("Check", health_pb2.HealthCheckRequest, self._check_health)
        self._handlers[f"/{HEALTH_SERVICE}/Check"] = grpc.stream_unary_rpc_method_handler(check)
        self._handlers[f"/{HEALTH_SERVICE}/Watch"] = grpc.stream_stream_rpc_method_handler(
            self._watch_health, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
        )

    def service(self, handler_call_details: Any) -> Any:
        """Return what answers a call, before any of its message is read; None for an unknown method."""
        path = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is None:
            return None
        method = path.rpartition("/")[2]
        if (self._refusing or self._service.closing) and method in ("ModelInfer", "ModelStreamInfer"):
            self._refused += 1
            return grpc.stream_unary_rpc_method_handler(self._refusal(method, not_ready("the server is stopping")))
        try:
            # which model it asks is in its message, which is not read without a key that is good for something
            self._admit(method, headers_of(handler_call_details.invocation_metadata))
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
        """Ask for keys as HTTP does on the path of the same call (401, 403); returns the name of the key."""
        path = _HTTP_PATHS.get(method, _HTTP_PATHS["ServerReady"])
        return self._admission.check(path.format(model="-"), list(headers.items()), model)

    def _refusal(self, method: str, error: RequestError) -> Any:
        async def refuse(_: Any, context: Any) -> None:
            await self._fail(Call(method, context), error)

        return refuse

    def _unary(self, method: str, request_class: Any, answer: Answer) -> Any:
        """Return what grpc is to call for a method of one request and one answer."""

        async def call(_: Any, context: Any) -> bytes:
            known = Call(method, context)
            try:
                request = self._parse(request_class, await self._receive(known), known)
                known.key = self._admit(method, known.headers, _model_named_by(request))
                content: bytes = (await answer(request, known)).SerializeToString()
            except asyncio.CancelledError:
                self._count_deadline(known)
                raise
            except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
                failure = _failure(known, error)
            else:
                self._finish(known, 200)
                return content
            finally:
                self._budget.give_back(known.held)
            await self._fail(known, failure)
            return b""

        return call

    async def _receive(self, call: Call) -> bytes:
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

    def _parse(self, request_class: Any, body: bytes, call: Call) -> Any:
        """Read a message, and account for its bytes."""
        call.held += self._budget.take(len(body))
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

    async def _fail(self, call: Call, error: RequestError) -> None:
        """Count an error and end the call with it."""
        self._count(call, error)
        trailing = tuple(
            (name.decode(), value.decode())
            for name, value in error.headers
            if name in (b"retry-after", b"www-authenticate")
        )
        await call.context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error), trailing)

    def _count_deadline(self, call: Call) -> None:
        """Count a call that gRPC ended, if it was its deadline; a client that hung up is no error."""
        if call.context.time_remaining() == 0:
            self._count(call, RequestError(504, "deadline", ""))

    def _count(self, call: Call, error: RequestError) -> None:
        self._service.metrics.failed(call.notes.model or "", error.reason)
        call.notes.reason = error.reason
        self._finish(call, error.status)

    def _finish(self, call: Call, status: int) -> None:
        """Write a call into the log and the traces, if they are wanted."""
        ended, notes = time.perf_counter(), call.notes
        notes.status = status
        if self._settings.log_requests:
            log_request(
                method="GRPC",
                path=call.method,
                status=status,
                seconds=ended - call.started,
                request_id=notes.request_id or new_request_id(),
                model=notes.model,
                rows=notes.rows,
                key=call.key,
            )
        if self._tracer is not None:
            self._tracer.record(
                call.method, notes, started=call.started, ended=ended, protocol="grpc", headers=call.headers
            )

    async def _stream_infer(self, _: Any, context: Any) -> None:
        """Answer a stream of inference requests in their order; some are computed at a time."""
        call = Call("ModelStreamInfer", context)
        try:
            with self._one_more(call.method, max(1, self._settings.max_connections // 2)):
                await self._answer_stream(context)
        except RequestError as error:
            await self._fail(call, error)

    @contextlib.contextmanager
    def _one_more(self, method: str, most: int) -> Iterator[None]:
        """Count a call without an end; 429 if there are `most` already."""
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
        call = Call("ModelStreamInfer", context)
        response = message("ModelStreamInferResponse")()
        request_id = ""
        try:
            request = self._parse(message("ModelInferRequest"), body, call)
            request_id = request.id[:MAX_ID]
            call.key = self._admit(call.method, call.headers, request.model_name)
            response.infer_response.CopyFrom(await self._methods.model_infer(request, call))
            self._finish(call, 200)
        except asyncio.CancelledError:
            self._count_deadline(call)
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it was, the client waits for an answer
            failure = _failure(call, error)
            self._count(call, failure)
            response.error_message = str(failure)
            response.infer_response.id = request_id
        finally:
            self._budget.give_back(call.held)
        content: bytes = response.SerializeToString()
        return content

    async def _check_health(self, request: Any, call: Call) -> Any:
        return await self.health.check(request, call.context)

    async def _watch_health(self, _: Any, context: Any) -> None:
        """Tell the status now and after each change, until the client has enough or the server stops."""
        call = Call("Watch", context)
        try:
            with self._one_more(call.method, _MAX_WATCHERS):
                request = self._parse(health_pb2.HealthCheckRequest, await self._receive(call), call)
                await self.health.refresh()
                watching = asyncio.ensure_future(self.health.Watch(request, context))
                stopping = asyncio.ensure_future(self.stopping.wait())
                try:
                    while not (watching.done() or stopping.done()):
                        await asyncio.wait(
                            {watching, stopping}, timeout=_HEALTH_SECONDS, return_when=asyncio.FIRST_COMPLETED
                        )
                        await self.health.refresh()
                finally:
                    watching.cancel()
                    stopping.cancel()
        except RequestError as error:
            await self._fail(call, error)
        finally:
            self._budget.give_back(call.held)


def _failure(call: Call, error: Exception) -> RequestError:
    return error if isinstance(error, RequestError) else defect(error, f"the call {call.method}")


def _model_named_by(request: Any) -> str | None:
    """Return the name of the model that a message asks for; None where it asks none."""
    fields = request.DESCRIPTOR.fields_by_name
    if "model_name" in fields:
        return str(request.model_name)
    if "name" in fields:
        return str(request.name) or None
    return None
