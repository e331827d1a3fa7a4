import http.server
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving.operations.settings import Settings
from serving.operations.tracing import RequestNotes, Tracer, make_tracer
from zoo.errors import BadInput

pytestmark = pytest.mark.integration  # its fixtures start servers in ways that the code does not show

ROOT = Path(__file__).parents[3]
TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE:032x}-{PARENT:016x}-01".encode()


@pytest.fixture(autouse=True)
def no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans() -> Iterator[Any]:
    """Return a tracer, and a function to its spans by name."""
    exporter = InMemorySpanExporter()
    writes = Tracer(SimpleSpanProcessor(exporter))
    yield writes, lambda: {span.name: span for span in exporter.get_finished_spans()}
    writes.close()


def record(writes: Tracer, *, headers: dict[bytes, bytes] | None = None, **notes: Any) -> None:
    now = time.perf_counter()
    noted = RequestNotes(**{"status": 200, **notes})
    writes.record("infer", noted, started=now - 0.010, ended=now, protocol="http", headers=headers or {})


def test_without_tracing_there_is_no_tracer_and_no_package_is_loaded() -> None:
    assert make_tracer(Settings()) is None
    code = """
import sys
from serving.operations.settings import Settings
from serving.operations.tracing import make_tracer
assert make_tracer(Settings()) is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace.export", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_traces_without_their_packages_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=r"is not installed; pip install 'manygates\[tracing\]', or leave"):
        make_tracer(Settings(tracing="otlp"))


def test_a_request_is_a_span_with_its_wait_and_its_computing_below_it(spans: Any) -> None:
    writes, found = spans
    before = time.time_ns()
    record(
        writes,
        model="eio",
        mode="random",
        rows=3,
        queue_seconds=0.004,
        compute_seconds=0.005,
        request_id="abc",
    )
    root, queue, compute = (found()[name] for name in ("infer", "queue", "compute"))
    assert root.parent is None
    assert root.kind is SpanKind.SERVER
    assert dict(root.attributes) == {
        "network.protocol.name": "http",
        "http.response.status_code": 200,
        "manygates.model": "eio",
        "manygates.mode": "random",
        "manygates.rows": 3,
        "manygates.request_id": "abc",
    }
    assert root.status.status_code is StatusCode.UNSET
    for child in (queue, compute):
        assert child.parent.span_id == root.context.span_id
        assert child.context.trace_id == root.context.trace_id
        assert not child.attributes
    assert root.end_time - root.start_time == pytest.approx(10e6, abs=1e3)
    assert queue.end_time - queue.start_time == pytest.approx(4e6, abs=1e3)
    assert compute.end_time - compute.start_time == pytest.approx(5e6, abs=1e3)
    assert root.start_time <= queue.start_time < queue.end_time == compute.start_time < compute.end_time
    assert compute.end_time == root.end_time
    assert abs(root.end_time - before) < 1e9


def test_children_never_begin_before_their_request(spans: Any) -> None:
    writes, found = spans
    record(writes, queue_seconds=5.0, compute_seconds=7.0)
    assert {span.start_time for span in found().values()} == {found()["infer"].start_time}
    assert found()["queue"].end_time == found()["queue"].start_time


def test_a_clients_trace_is_continued(spans: Any) -> None:
    writes, found = spans
    record(writes, headers={b"traceparent": TRACEPARENT, b"tracestate": b"vendor=x"}, queue_seconds=0.001)
    root = found()["infer"]
    assert root.context.trace_id == found()["queue"].context.trace_id == TRACE
    assert (root.parent.span_id, root.parent.is_remote) == (PARENT, True)
    assert root.context.trace_state["vendor"] == "x"


def test_what_a_client_does_not_sample_is_not_written(spans: Any) -> None:
    writes, found = spans
    record(writes, headers={b"traceparent": TRACEPARENT[:-2] + b"00"}, queue_seconds=0.001)
    assert found() == {}


@pytest.mark.parametrize(
    "traceparent",
    [
        b"",
        b"00",
        b"nonsense",
        b"00-" + 32 * b"0" + b"-" + 16 * b"0" + b"-01",
        b"ff" + TRACEPARENT[2:],
        TRACEPARENT.replace(b"-", b"\n"),
        b"\xff" * 55,
        TRACEPARENT + 10_000 * b"0",
    ],
)
def test_a_header_that_makes_no_sense_begins_a_trace_of_its_own(spans: Any, traceparent: bytes) -> None:
    writes, found = spans
    record(writes, headers={b"traceparent": traceparent, b"tracestate": b"\xff,=,"})
    assert found()["infer"].parent is None
    assert found()["infer"].context.trace_id not in (0, TRACE)


@pytest.mark.parametrize(
    ("status", "expected"), [(404, StatusCode.UNSET), (429, StatusCode.UNSET), (503, StatusCode.ERROR)]
)
def test_only_failures_of_ours_are_errors(spans: Any, status: int, expected: StatusCode) -> None:
    writes, found = spans
    record(writes, status=status, reason="queue_full")
    root = found()["infer"]
    assert root.status.status_code is expected
    assert root.attributes["error.type"] == "queue_full"
    assert root.attributes["http.response.status_code"] == status
    assert set(found()) == {"infer"}


def test_a_request_in_a_block_is_written_with_what_was_noted_meanwhile(spans: Any) -> None:
    writes, found = spans
    headers = [(b"host", b"x"), (b"traceparent", TRACEPARENT)]
    with writes.request("POST", "/v2/models/eio/infer", headers) as notes:
        notes.model, notes.mode, notes.rows, notes.compute_seconds = "eio", "random", 2, 0.0
        notes.answered(200)
    root = found()["infer"]
    assert root.context.trace_id == TRACE
    assert dict(root.attributes) == {
        "network.protocol.name": "http",
        "http.response.status_code": 200,
        "http.request.method": "POST",
        "manygates.model": "eio",
        "manygates.mode": "random",
        "manygates.rows": 2,
    }
    assert set(found()) == {"infer", "compute"}


def test_a_client_can_invent_no_names_of_spans_and_no_methods(spans: Any) -> None:
    writes, found = spans
    for path in ("/v2/models/eio/made-up", "/", "", "/%2e%2e/x\n"):
        with writes.request("BREW", path, []) as notes:
            notes.answered(404)
    assert set(found()) == {"other"}
    assert found()["other"].attributes["http.request.method"] == "_OTHER"


def test_a_block_that_fails_is_a_failure_and_a_client_that_left_is_none(spans: Any) -> None:
    writes, found = spans
    with pytest.raises(RuntimeError), writes.request("GET", "/v2", []):
        raise RuntimeError
    assert found()["v2"].status.status_code is StatusCode.ERROR
    with writes.request("POST", "/classify", []) as notes:
        notes.answered(0)
    assert found()["classify"].attributes["http.response.status_code"] == 499


def test_the_service_is_called_as_we_are_unless_the_environment_calls_it_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value, expected in (
        (None, "", "manygates"),
        ("OTEL_SERVICE_NAME", "zoo", "zoo"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop", "shop"),
    ):
        with monkeypatch.context() as patched:
            if variable:
                patched.setenv(variable, value)
            exporter = InMemorySpanExporter()
            writes = Tracer(SimpleSpanProcessor(exporter))
            record(writes)
            assert exporter.get_finished_spans()[0].resource.attributes["service.name"] == expected
            writes.close()


def test_spans_arrive_at_a_collector_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        writes = make_tracer(Settings(tracing="otlp"))
        assert writes is not None
        record(writes, model="eio", queue_seconds=0.001, compute_seconds=0.002)
        writes.close()
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, body),) = received
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (scope,) = resource.scope_spans
    assert sorted(span.name for span in scope.spans) == ["compute", "infer", "queue"]


def test_a_collector_that_does_not_answer_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        writes = make_tracer(Settings(tracing="otlp"))
        assert writes is not None
        record(writes)
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, "manygates.serving"):
            writes.close(0.2)
        assert time.monotonic() - began < 1
        assert "some traces were not sent within 0.2 seconds" in caplog.messages
        for thread in threading.enumerate():  # the rest of the suite is not to meet what it logs
            if thread.name == "manygates-tracing":
                thread.join(5)
