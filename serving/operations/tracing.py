"""OpenTelemetry traces, if they are asked for: a span per request, with its wait and its computing below it.

Spans are written when a request is answered, from times that were taken anyway, so that a server without traces does
nothing for them and a path through the server needs no span in hand. Where they go is OpenTelemetry's own business
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, …). No span says which
path through the gates an image took, what it showed, or which key was used.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from serving.errors import Headers
from serving.operations.log import logger
from serving.operations.settings import Settings
from zoo.errors import BadInput
from zoo.vocabulary import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

_CLOSE_SECONDS: Final = 5.0
_MAX_HEADER: Final = 512
_CLIENT_GONE: Final = 499
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
_CALLS: Final = frozenset(("infer", "classify", "live", "ready", "load", "unload", "index", "metrics", "v2"))


def make_tracer(settings: Settings) -> "Tracer | None":
    """Return what sends spans by OTLP over HTTP, if that is wanted; BadInput if its packages are not installed."""
    if settings.tracing == "off":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise BadInput(
            f"tracing is {settings.tracing!r}, but {error.name!r} is not installed; pip install 'manygates[tracing]', "
            "or leave the setting out"
        ) from error
    return Tracer(BatchSpanProcessor(OTLPSpanExporter()))


@dataclass(slots=True)
class RequestNotes:
    """What is learnt of a request while it is answered."""

    status: int = 500
    """The HTTP status of the answer, or the one that the gRPC code stands for."""
    model: str | None = None
    mode: str | None = None
    rows: int | None = None
    """How many images."""
    queue_seconds: float | None = None
    """Its wait for its first batch: a span `queue`, which ends where `compute` begins."""
    compute_seconds: float | None = None
    """From there to its answer: a span `compute`, which ends with the request."""
    request_id: str | None = None
    """If clean."""
    reason: str | None = None
    """Of a failure, as in the metrics."""

    def answered(self, status: int) -> None:
        """Take the status of the answer; 0 is none, because the client has gone."""
        self.status = status or _CLIENT_GONE


class Tracer:
    """Writes a span for each request to a processor of OpenTelemetry's."""

    def __init__(self, processor: "SpanProcessor") -> None:
        """Prepare to write; the sampler chooses which requests are written (OTEL_TRACES_SAMPLER; all by default)."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation import tracecontext

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        name = {} if named else {"service.name": "manygates"}
        resource = Resource.create({**name, "service.version": VERSION})
        self._trace = trace
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("manygates", VERSION)

    def record(
        self,
        name: str,
        notes: RequestNotes,
        *,
        started: float,
        ended: float,
        protocol: Literal["http", "grpc"],
        headers: Mapping[bytes, bytes],
        method: str | None = None,
    ) -> None:
        """Write the span of a request that is answered.

        Args:
            name: what was asked, of few values: `infer`, `classify`; never a path that a client chose.
            notes: what is known of it.
            started: when its head was there, by `time.perf_counter`.
            ended: when its answer was handed over, by the same clock.
            protocol: by which it came.
            headers: `traceparent` and `tracestate` are read; what makes no sense begins a new trace.
            method: of HTTP.
        """
        trace = self._trace
        # the clock of requests counts from anywhere, that of spans from 1970
        offset = time.time_ns() - int(time.perf_counter() * 1e9)
        begin, end = int(started * 1e9) + offset, int(ended * 1e9) + offset
        attributes: dict[str, str | int | None] = {
            "network.protocol.name": protocol,
            "http.response.status_code": notes.status if protocol == "http" else None,
            "http.request.method": method if method is None or method in _METHODS else "_OTHER",
            "manygates.model": notes.model,
            "manygates.mode": notes.mode,
            "manygates.rows": notes.rows,
            "manygates.request_id": notes.request_id,
            "error.type": notes.reason,
        }
        span = self._tracer.start_span(
            name,
            self._parent(headers),
            kind=trace.SpanKind.SERVER,
            attributes={key: value for key, value in attributes.items() if value is not None},
            start_time=begin,
        )
        if notes.status >= 500:
            span.set_status(trace.StatusCode.ERROR, notes.reason)
        if span.is_recording():
            inside = trace.set_span_in_context(span)
            compute_from = end
            if notes.compute_seconds is not None:
                compute_from = max(begin, end - int(notes.compute_seconds * 1e9))
                self._tracer.start_span("compute", inside, start_time=compute_from).end(end)
            if notes.queue_seconds is not None:
                first = max(begin, compute_from - int(notes.queue_seconds * 1e9))
                self._tracer.start_span("queue", inside, start_time=first).end(compute_from)
        span.end(end)

    @contextmanager
    def request(self, method: str, path: str, headers: Headers) -> Iterator["RequestNotes"]:
        """Write the span of an HTTP request that is answered inside the block; the names of headers are in lower case.

        Of the path only the calls we have are told apart, so that a client can invent no names.
        """
        notes = RequestNotes()
        started = time.perf_counter()
        try:
            yield notes
        finally:
            called = path.rstrip("/").rpartition("/")[2]
            name = called if called in _CALLS else "other"
            ended = time.perf_counter()
            self.record(
                name, notes, started=started, ended=ended, protocol="http", headers=dict(headers), method=method
            )

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Send what waits, for at most that long, and stop; call it once, when the last request is answered.

        It blocks, so an event loop that has anything else to do calls it from a thread.
        """
        # OpenTelemetry's own limits of time are for each attempt to send
        closing = threading.Thread(target=self._provider.shutdown, name="manygates-tracing", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            logger.warning("some traces were not sent within %g seconds", seconds)

    def _parent(self, headers: Mapping[bytes, bytes]) -> "Context":
        """Return the context in which a client asks; an empty one where it says nothing that can be understood."""
        from opentelemetry.context import Context

        given = {name.decode(): headers.get(name, b"") for name in (b"traceparent", b"tracestate")}
        carrier = {name: value.decode("latin-1") for name, value in given.items() if 0 < len(value) <= _MAX_HEADER}
        return self._propagator.extract(carrier, Context())
