"""What the wire says: our own messages over a plain channel. `test_clients.py` has the clients that people use."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
from grpc_health.v1 import health_pb2

from serving.answers import Prediction, Predictor
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.protocol.messages import SERVICE, message
from serving.scheduling.service import Model
from serving.server import build, compose
from zoo.errors import BadInput

HEALTH = "grpc.health.v1.Health"


class Client:
    """Calls by name; answers are messages."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        address = f"localhost:{port}" if credentials else f"127.0.0.1:{port}"
        options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )

    def method(self, name: str) -> grpc.UnaryUnaryMultiCallable:
        return self.channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            response_deserializer=message(f"{name}Response").FromString,
        )

    def call(
        self, method: str, request: Any = None, /, *, timeout: float | None = 10, metadata: Any = None, **fields: Any
    ) -> Any:
        request = message(f"{method}Request")(**fields) if request is None else request
        return self.method(method)(request, timeout=timeout, metadata=metadata)

    def health(self, name: str = "") -> int:
        check = self.channel.unary_unary(
            f"/{HEALTH}/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return check(health_pb2.HealthCheckRequest(service=name), timeout=10).status

    def watch(self, name: str) -> Any:
        """Return what the server says of a name, until it has ended."""
        watch = self.channel.unary_stream(
            f"/{HEALTH}/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return watch(health_pb2.HealthCheckRequest(service=name), timeout=10)


@contextmanager
def refused(code: str, *texts: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert (caught.value.code().name, [text for text in texts if text not in caught.value.details()]) == (code, [])


def infer_request(images: np.ndarray, *, name: str = "tiny", datatype: str = "FP32", raw: bool = True) -> Any:
    request = message("ModelInferRequest")(model_name=name)
    tensor = request.inputs.add(name="images", datatype=datatype, shape=images.shape)
    if raw:
        request.raw_input_contents.append(images.tobytes())
    elif datatype == "FP32":
        tensor.contents.fp32_contents.extend(images.ravel().tolist())
    else:
        tensor.contents.uint_contents.extend(images.ravel().tolist())
    return request


def tensors(response: Any) -> dict[str, np.ndarray]:
    types = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {
        output.name: np.frombuffer(content, dtype=types[output.datatype]).reshape(list(output.shape))
        for output, content in pairs
    }


@pytest.fixture
def serve(serve_in_a_thread) -> Callable[[Application], Any]:
    @contextmanager
    def serving(application: Application) -> Iterator[Client]:
        with serve_in_a_thread(application):
            assert application.grpc_port
            client = Client(application.grpc_port)
            try:
                yield client
            finally:
                client.channel.close()

    return serving


@pytest.fixture(scope="module")
def application(shared_application, serve_in_a_thread) -> Iterator[Application]:
    """What most tests ask: the tiny model, as it is served by default."""
    served = shared_application("single", grpc_port=0)
    with serve_in_a_thread(served):
        yield served


@pytest.fixture(scope="module")
def client(application: Application) -> Iterator[Client]:
    assert application.grpc_port
    connected = Client(application.grpc_port)
    yield connected
    connected.channel.close()


def failures(application: Application) -> float:
    """Return how many requests have failed."""
    lines = application.metrics.text().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("manygates_request_failures_total{"))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(5).random((3, 3, 4, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def answer(shared_bundle_dir: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(shared_bundle_dir / "single.onnx", providers=["CPUExecutionProvider"])
    names = ["probabilities", "logits"]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


class Slow(Predictor):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started = threading.Event()

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        self.started.set()
        assert self.go.wait(10)
        flat = np.zeros((len(images), 3), dtype=np.float32)
        return Prediction(flat, flat)


@pytest.fixture
def slow() -> Iterator[Slow]:
    predictor = Slow()
    yield predictor
    predictor.go.set()


@dataclass
class Patient:
    """A server of a slow model, which several tests share."""

    predictor: Slow
    application: Application
    client: Client

    def begin(self, images: np.ndarray) -> Any:
        """Send a request, and return when it is being computed."""
        self.predictor.started.clear()
        call = self.client.method("ModelInfer").future(infer_request(images))
        assert self.predictor.started.wait(5)
        return call

    @property
    def waiting(self) -> int:
        return self.application.service.find("tiny").queue.waiting


@pytest.fixture(scope="module")
def patient_server(make_card, serve_in_a_thread) -> Iterator[Patient]:
    predictor = Slow()
    model = Model(card=make_card(), mode="single", predictor=predictor)  # type: ignore[arg-type]
    application = compose([model], Settings(threads=1, grpc_port=0))
    with serve_in_a_thread(application):
        client = Client(application.grpc_port)
        yield Patient(predictor, application, client)
        client.channel.close()


@pytest.fixture
def patient(patient_server: Patient) -> Iterator[Patient]:
    patient_server.predictor.go.clear()
    try:
        yield patient_server
    finally:
        patient_server.predictor.go.set()
    eventually(lambda: patient_server.waiting == 0)
    eventually(lambda: patient_server.application.budget.held == 0)


def eventually(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert fact()


# --- inference


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_pixels_in_either_form_get_what_onnx_runtime_answers(client, images, answer, datatype, raw) -> None:
    levels = np.random.default_rng(6).integers(0, 256, images.shape, dtype=np.uint8)
    sent, meant = (images, images) if datatype == "FP32" else (levels, levels.astype(np.float32) / 255)
    response = client.call("ModelInfer", infer_request(sent, datatype=datatype, raw=raw))
    found = tensors(response)
    assert list(found) == ["probabilities", "logits"]
    for name, expected in answer(meant).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "")


def test_a_request_gets_its_id_back_and_the_outputs_it_names_in_its_order(client, images) -> None:
    request = infer_request(images)
    request.id = "number seven"
    for name in ("logits", "probabilities"):
        request.outputs.add(name=name)
    response = client.call("ModelInfer", request)
    del request.outputs[1:]
    alone = client.call("ModelInfer", request)
    assert response.id == "number seven"
    assert [output.name for output in response.outputs] == ["logits", "probabilities"]
    assert [output.name for output in alone.outputs] == ["logits"]
    assert alone.raw_output_contents[0] == response.raw_output_contents[0]


def change(**fields: Any) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        for name, value in fields.items():
            setattr(request, name, value)

    return apply


def change_input(**fields: Any) -> Callable[[Any], None]:
    return lambda request: change(**fields)(request.inputs[0])


def reshape(*shape: int) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        request.inputs[0].shape[:] = shape

    return apply


def with_parameter(name: str, **value: Any) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        for field, content in value.items():
            setattr(request.parameters[name], field, content)

    return apply


def raw_of(*contents: bytes) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        request.raw_input_contents[:] = contents

    return apply


def typed_as_well(request: Any) -> None:
    request.inputs[0].contents.fp32_contents.append(0.5)


def typed_instead(field: str, *values: float) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        del request.raw_input_contents[:]
        getattr(request.inputs[0].contents, field).extend(values)

    return apply


def typed_levels(request: Any) -> None:
    request.inputs[0].datatype = "UINT8"
    typed_instead("uint_contents", *([0] * 143), 256)(request)


def output(*names: str, **parameters: int) -> Callable[[Any], None]:
    def apply(request: Any) -> None:
        for name in names:
            wanted = request.outputs.add(name=name)
            for parameter, value in parameters.items():
                wanted.parameters[parameter].int64_param = value

    return apply


@pytest.mark.parametrize(
    ("change_request", "code", "text"),
    [
        (change(model_name="tniy"), "NOT_FOUND", "tiny"),
        (change(model_name=""), "NOT_FOUND", "unknown model"),
        (change(model_version="7"), "NOT_FOUND", "no version '7'"),
        (change(id="x" * 300), "INVALID_ARGUMENT", "256 characters"),
        (lambda request: request.inputs.pop(), "INVALID_ARGUMENT", "got 0 inputs"),
        (lambda request: request.inputs.add(name="images"), "INVALID_ARGUMENT", "got 2 inputs"),
        (change_input(name="image"), "INVALID_ARGUMENT", "takes only 'images'"),
        (change_input(datatype="FP64"), "INVALID_ARGUMENT", "expected FP32"),
        (change_input(datatype=""), "INVALID_ARGUMENT", "expected FP32"),
        (reshape(3, 4, 4), "INVALID_ARGUMENT", "add the leading batch dimension"),
        (reshape(2, 3, 4, 4), "INVALID_ARGUMENT", "576 bytes, expected 384"),
        (reshape(-1, 3, 4, 4), "INVALID_ARGUMENT", "expected [images, 3, 4, 4]"),
        (reshape(2**40, 3, 4, 4), "INVALID_ARGUMENT", "at most 1024"),
        (raw_of(b"123"), "INVALID_ARGUMENT", "3 bytes, expected 576"),
        (raw_of(b"", b""), "INVALID_ARGUMENT", "got 2 raw_input_contents"),
        (raw_of(), "INVALID_ARGUMENT", "no contents, expected raw_input_contents, or fp32_contents"),
        (raw_of(np.full(144, np.nan, np.float32).tobytes()), "INVALID_ARGUMENT", "nan"),
        (raw_of(np.full(144, 255, np.float32).tobytes()), "INVALID_ARGUMENT", "divide by 255"),
        (typed_as_well, "INVALID_ARGUMENT", "send one of them"),
        (typed_instead("fp32_contents", 0.5), "INVALID_ARGUMENT", "1 numbers in fp32_contents, expected 144"),
        (typed_instead("fp64_contents", 0.5), "INVALID_ARGUMENT", "fp64_contents, expected raw_input_contents"),
        (typed_levels, "INVALID_ARGUMENT", "reach to 256"),
        (output("labels"), "INVALID_ARGUMENT", "unknown output 'labels'"),
        (output("logits", "logits"), "INVALID_ARGUMENT", "asked for twice"),
        (output("logits", classification=3), "INVALID_ARGUMENT", "'classification', which this server does not offer"),
        (with_parameter("timeout", int64_param=-1), "INVALID_ARGUMENT", "timeout is -1"),
        (with_parameter("mode", string_param="ensemble"), "INVALID_ARGUMENT", "here the server chooses"),
        (with_parameter("shared_memory_region", string_param="r"), "INVALID_ARGUMENT", "does not offer"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_wrong_and_counted(
    application, client, images, change_request, code, text
) -> None:
    request = infer_request(images)
    change_request(request)
    before = failures(application)
    with refused(code, text):
        client.call("ModelInfer", request)
    assert failures(application) == before + 1
    assert application.budget.held == 0
    client.call("ModelInfer", infer_request(images))  # the next is none the worse


def test_parameters_choose_where_the_operator_allows_it(tiny_application, serve, images, bundle_dir) -> None:
    session = onnxruntime.InferenceSession(bundle_dir / "ensemble.onnx", providers=["CPUExecutionProvider"])
    request = infer_request(images)
    request.parameters["mode"].string_param = "ensemble"
    request.parameters["priority"].uint64_param = 2
    application = tiny_application("single", grpc_port=0, allow_mode_choice=True)
    with serve(application) as client:
        found = tensors(client.call("ModelInfer", request))
        (expected,) = session.run(["probabilities"], {"images": images})
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
        metrics = application.metrics.text().decode()
    assert 'manygates_requests_total{endpoint="grpc",mode="ensemble",model="tiny",version="1"} 1.0' in metrics


def test_agreement_comes_to_those_who_ask(card, serve, images) -> None:
    class Voting(Predictor):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            flat = np.zeros((len(images), 3), dtype=np.float32)
            return Prediction(flat, flat, agreement=np.array([1.0, 0.25, 0.5], dtype=np.float32)[: len(images)])

    model = Model(card=card, mode="ensemble", predictor=Voting(), voting=("ensemble",))  # type: ignore[arg-type]
    request = infer_request(images)
    output("agreement")(request)
    with serve(compose([model], Settings(threads=1, grpc_port=0))) as client:
        response = client.call("ModelInfer", request)
    found = tensors(response)
    assert found["agreement"].tolist() == [1.0, 0.25, 0.5]


# --- time


def test_a_calls_deadline_ends_its_wait_and_is_counted(patient, images) -> None:
    before = failures(patient.application)
    first = patient.begin(images[:1])
    with refused("DEADLINE_EXCEEDED"):
        patient.client.call("ModelInfer", infer_request(images[:1]), timeout=0.1)
    eventually(lambda: patient.waiting == 0)
    eventually(lambda: failures(patient.application) == before + 1)
    assert b'reason="deadline"' in patient.application.metrics.text()
    patient.predictor.go.set()
    assert len(first.result(timeout=5).outputs) == 2


def test_the_shorter_of_deadline_and_timeout_goes_to_the_scheduler(
    application, client, images, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[float | None] = []
    predict = application.service.predict

    async def listening(served: Any, images: np.ndarray, asked: Any) -> Prediction:
        asked_for.append(asked.timeout)
        return await predict(served, images, asked)

    monkeypatch.setattr(application.service, "predict", listening)
    longer, shorter = infer_request(images), infer_request(images)
    longer.parameters["timeout"].int64_param = 60_000_000
    shorter.parameters["timeout"].int64_param = 3_000_000
    for request in (longer, shorter, infer_request(images)):
        client.call("ModelInfer", request, timeout=8)
    client.call("ModelInfer", infer_request(images), timeout=None)
    by_deadline, by_parameter, alone, without = asked_for
    assert 7 < by_deadline < 9  # it is rounded on its way
    assert by_parameter == 3
    assert 7 < alone < 9
    assert without is None


def test_the_timeout_parameter_counts_where_it_is_shorter_than_the_deadline(patient, images) -> None:
    request = infer_request(images[:1])
    request.parameters["timeout"].int64_param = 50_000  # microseconds
    patient.begin(images[:1])
    began = time.monotonic()
    with refused("DEADLINE_EXCEEDED", "the request's own timeout is over"):
        patient.client.call("ModelInfer", request, timeout=9)
    assert time.monotonic() - began < 5


def test_a_cancelled_call_gives_up_its_place_and_is_no_error(patient, images) -> None:
    before = failures(patient.application)
    first = patient.begin(images[:1])
    second = patient.client.method("ModelInfer").future(infer_request(images[:2]))
    eventually(lambda: patient.waiting == 2)
    second.cancel()
    eventually(lambda: patient.waiting == 0)
    patient.predictor.go.set()
    first.result(timeout=5)
    eventually(lambda: patient.application.budget.held == 0)
    assert failures(patient.application) == before


def test_a_full_queue_is_resource_exhausted_and_says_when_to_come_again(application_of, serve, slow, images) -> None:
    with serve(application_of(slow, threads=1, grpc_port=0, max_queue=1)) as client:
        running = client.method("ModelInfer").future(infer_request(images[:1]))
        assert slow.started.wait(5)
        waiting = client.method("ModelInfer").future(infer_request(images[:1]))
        with pytest.raises(grpc.RpcError) as caught:
            client.call("ModelInfer", infer_request(images[:1]))
        slow.go.set()
        running.result(timeout=5)
        waiting.result(timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the queue is full (1 images)" in caught.value.details()
    assert ("retry-after", "1") in [tuple(pair) for pair in caught.value.trailing_metadata()]


def test_stopping_answers_what_is_in_flight_and_takes_nothing_new(
    application_of, serve_in_a_thread, slow, images
) -> None:
    application = application_of(slow, threads=1, grpc_port=0, drain_timeout=5)
    with serve_in_a_thread(application):
        client = Client(application.grpc_port)
        assert client.health() == health_pb2.HealthCheckResponse.SERVING
        future = client.method("ModelInfer").future(infer_request(images[:1]))
        assert slow.started.wait(5)
        application.service.begin_drain()
        assert client.health() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not client.call("ServerReady").ready
        assert client.call("ServerLive").live
        # leaving the block stops the server, which waits for the call
        threading.Timer(0.3, slow.go.set).start()
    assert len(future.result(timeout=5).outputs) == 2
    with refused("UNAVAILABLE"):
        client.call("ServerLive", timeout=1)
    client.channel.close()


def test_under_load_a_stop_answers_each_request_or_says_to_try_again(
    tiny_application, serve_in_a_thread, images
) -> None:
    outcomes: Counter[str] = Counter()
    application = tiny_application("single", grpc_port=0)

    def ask_until_refused(port: int) -> None:
        client = Client(port)
        request = infer_request(images)
        code = "OK"
        while code == "OK":
            try:
                client.call("ModelInfer", request)
            except grpc.RpcError as error:
                code = error.code().name
            outcomes[code] += 1
        client.channel.close()

    with ThreadPoolExecutor(12) as pool:
        with serve_in_a_thread(application):
            asking = [pool.submit(ask_until_refused, application.grpc_port) for _ in range(12)]
            eventually(lambda: outcomes["OK"] > 300)
        for asked in asking:
            asked.result(timeout=10)
    assert set(outcomes) == {"OK", "UNAVAILABLE"}
    assert outcomes["UNAVAILABLE"] == 12


def test_calls_without_an_end_hear_of_the_stop_and_do_not_hold_it_up(
    tiny_application, serve_in_a_thread, images
) -> None:
    application = tiny_application("single", grpc_port=0, drain_timeout=20)
    with serve_in_a_thread(application):
        client = Client(application.grpc_port)
        watched = client.watch("tiny")
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        application.service.begin_drain()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stream = stream_of(client)(iter([infer_request(images), _Wait()]), timeout=10)
        assert not next(stream).error_message
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert list(watched) == []
    client.channel.close()


def test_health_knows_the_server_the_service_and_the_models(client) -> None:
    for name in ("", SERVICE, "tiny"):
        assert client.health(name) == health_pb2.HealthCheckResponse.SERVING
    with refused("NOT_FOUND", "no service and no model has the name 'other'"):
        client.health("other")
    watched = client.watch("other")  # which may come to be served
    assert next(watched).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watched.cancel()


# --- streams


def _never(seconds: float = 1) -> Iterator[bytes]:
    time.sleep(seconds)
    yield from ()


def stream_of(client: Client) -> Any:
    return client.channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
        response_deserializer=message("ModelStreamInferResponse").FromString,
    )


def test_a_stream_is_answered_in_order_and_a_wrong_request_does_not_end_it(application, client, images, answer) -> None:
    requests = []
    for number in range(200):
        request = infer_request(images[number % 3 : number % 3 + 1], name="tiny" if number % 10 != 9 else "nope")
        request.id = str(number)
        requests.append(request)
    requests.append(b"\xff\xff")
    expected = answer(images)["probabilities"]
    responses = list(stream_of(client)(iter(requests), timeout=20))
    assert application.budget.held == 0
    assert [response.infer_response.id for response in responses] == [*map(str, range(200)), ""]
    for number, response in enumerate(responses[:200]):
        if number % 10 == 9:
            assert "unknown model 'nope'" in response.error_message
        else:
            found = tensors(response.infer_response)["probabilities"]
            np.testing.assert_allclose(found, expected[number % 3][None], atol=1e-6)
    assert "is no good ModelInferRequest" in responses[200].error_message


def test_a_stream_that_is_left_gives_up_its_places(patient, images) -> None:
    patient.predictor.started.clear()
    stream = stream_of(patient.client)(iter([infer_request(images[:1])] * 5 + [_Wait()]), timeout=20)
    assert patient.predictor.started.wait(5)
    eventually(lambda: patient.waiting >= 3)
    stream.cancel()
    eventually(lambda: patient.waiting == 0)


class _Wait:
    def SerializeToString(self) -> bytes:
        time.sleep(0.5)
        return b""


# --- limits


def test_a_message_above_the_limit_is_refused_compressed_or_not(tiny_application, serve) -> None:
    with serve(tiny_application("single", grpc_port=0, max_body_bytes=100_000)) as client:
        call = client.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            with refused("RESOURCE_EXHAUSTED", "larger than max"):
                call(bytes(200_000), compression=compression, timeout=10)
        assert client.call("ServerLive").live


def test_a_small_message_is_not_large(application, client) -> None:
    with refused("INVALID_ARGUMENT", "expected at most 65536"):
        client.call("ModelMetadata", name="x" * 100_000)
    eventually(lambda: application.budget.held == 0)


def test_the_server_holds_no_more_bytes_than_it_may(application_of, serve, slow, images) -> None:
    request = infer_request(images)
    length = len(request.SerializeToString())
    settings = {"max_body_bytes": length, "max_total_body_bytes": 2 * length - 1}
    with serve(application_of(slow, threads=1, grpc_port=0, **settings)) as client:
        first = client.method("ModelInfer").future(request)
        assert slow.started.wait(5)
        with refused("UNAVAILABLE", "try again in a second"):
            client.call("ModelInfer", request)
        slow.go.set()
        first.result(timeout=5)
        assert len(client.call("ModelInfer", request).outputs) == 2


def test_a_request_of_very_many_parts_is_told_so(client) -> None:
    with refused("INVALID_ARGUMENT", "too many parts"):
        client.call("ModelInfer", b"\x32\x00" * 20_000)


def test_numbers_that_are_not_packed_are_read_too(client, images, answer) -> None:
    """Protocol buffers allow either; some clients' libraries write one number a field."""
    numbers = b"".join(b"\x35" + number.tobytes() for number in images[:1].ravel())
    contents = b"\x2a" + _length(numbers) + numbers
    head = b"\x0a\x06images\x12\x04FP32\x1a\x04\x01\x03\x04\x04"
    body = b"\x0a\x04tiny\x2a" + _length(head + contents) + head + contents
    found = tensors(client.call("ModelInfer", body))
    np.testing.assert_allclose(found["logits"], answer(images[:1])["logits"], atol=1e-6)


def _length(content: bytes) -> bytes:
    return bytes([len(content) & 127 | 128, len(content) >> 7])


def test_damaged_messages_are_refused_and_never_our_fault(application, client, images) -> None:
    good = infer_request(images)
    output("logits")(good)
    good.parameters["timeout"].int64_param = 5_000_000
    body = good.SerializeToString()
    head = len(body) - images.nbytes
    draws = np.random.default_rng(3)
    codes = set()
    for _ in range(400):
        damaged = bytearray(body)
        for _ in range(draws.integers(1, 4)):
            # all of it but the pixels, which are the other half
            damaged[draws.integers(0, head)] = draws.integers(0, 256)
        if draws.random() < 0.3:
            damaged = damaged[: draws.integers(0, len(damaged))]
        try:
            client.call("ModelInfer", bytes(damaged))
            codes.add("OK")
        except grpc.RpcError as error:
            codes.add(error.code().name)
    assert application.budget.held == 0
    assert "INVALID_ARGUMENT" in codes
    assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}


def test_a_call_without_a_message_is_refused_and_one_whose_message_does_not_come_is_ended(
    tiny_application, serve
) -> None:
    with serve(tiny_application("single", grpc_port=0, body_timeout=0.2)) as client:
        call = client.channel.stream_unary(f"/{SERVICE}/ModelInfer")
        with refused("INVALID_ARGUMENT", "ended without a message"):
            call(iter(()), timeout=10)
        with refused("DEADLINE_EXCEEDED", "no message came within 0.2 seconds"):
            call(_never(), timeout=10)


@pytest.mark.slow
def test_messages_that_come_slowly_are_as_many_as_the_server_may_hold(tiny_application, serve, images) -> None:
    """How much of a message has come is not to be seen before all of it has."""
    limits = {"max_body_bytes": 2**20, "max_total_body_bytes": 2 * 2**20}
    with serve(tiny_application("single", grpc_port=0, body_timeout=1.5, **limits)) as client:

        def start(method: str) -> Any:
            return client.channel.stream_unary(f"/{SERVICE}/{method}").future(_never(3), timeout=10)

        held = [start("ModelInfer"), start("ServerLive")]
        time.sleep(0.5)  # until they count as slow
        with refused("UNAVAILABLE", "too many messages are being sent slowly"):
            start("ServerLive").result()
        assert len(client.call("ModelInfer", infer_request(images)).outputs) == 2, "one that comes at once is answered"
        for call in held:
            with refused("DEADLINE_EXCEEDED", "no message came within 1.5 seconds"):
                call.result()
        with refused("DEADLINE_EXCEEDED", "no message came within 1.5 seconds"):
            start("ServerLive").result()


def test_streams_and_watchers_cannot_use_up_all_calls(tiny_application, serve, images) -> None:
    with serve(tiny_application("single", grpc_port=0, max_connections=2)) as client:
        first = stream_of(client)(iter([infer_request(images), _Wait()]), timeout=10)
        assert not next(first).error_message
        with refused("RESOURCE_EXHAUSTED", "1 calls of ModelStreamInfer are open"):
            next(stream_of(client)(iter([infer_request(images)]), timeout=10))
        assert len(client.call("ModelInfer", infer_request(images)).outputs) == 2
        first.cancel()


def test_a_client_that_was_idle_for_long_is_answered_again(tiny_application, serve) -> None:
    with serve(tiny_application("single", grpc_port=0, keep_alive_timeout=0.2)) as client:
        assert client.call("ServerLive").live
        time.sleep(0.5)
        assert client.call("ServerLive").live


def test_a_connection_that_says_nothing_is_closed(tiny_application, serve) -> None:
    application = tiny_application("single", grpc_port=0, header_timeout=0.2)
    with serve(application), socket.create_connection(("127.0.0.1", application.grpc_port), timeout=5) as silent:
        while silent.recv(1000):  # its own settings, and then its end
            pass


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(99)]
)
def test_other_protocols_are_cut_off(application, client, said) -> None:
    with socket.create_connection(("127.0.0.1", application.grpc_port), timeout=5) as other:
        other.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while other.recv(1000):
                pass
    assert client.call("ServerLive").live


def test_whatever_a_name_holds_the_error_can_be_said(client) -> None:
    for name in ("../../etc/passwd", "a\nb", "tiny\x00", "ümläut 🐈", "x" * 60_000):
        with refused("NOT_FOUND", "unknown model"):
            client.call("ModelMetadata", name=name)


def test_an_unknown_method_is_unimplemented(client) -> None:
    for path in (f"/{SERVICE}/TraceSetting", "/inference.Other/ModelInfer", "/x"):
        with refused("UNIMPLEMENTED"):
            client.channel.unary_unary(path)(b"", timeout=10)


# --- the repository


def test_models_are_loaded_and_unloaded_where_clients_may(bundle_dir, serve, tmp_path, images) -> None:
    place = tmp_path / "repository" / "tiny"
    place.parent.mkdir()
    bundle_dir.rename(place)
    settings = Settings(
        model_repository=str(place.parent), threads=1, mode="single", grpc_port=0, allow_repository_changes=True
    )
    with serve(build(settings)) as client:
        (entry,) = client.call("RepositoryIndex").models
        assert (entry.name, entry.version, entry.state) == ("tiny", "1", "READY")
        client.call("RepositoryModelUnload", model_name="tiny")
        assert not client.call("ModelReady", name="tiny").ready
        assert [model.state for model in client.call("RepositoryIndex").models] == ["UNAVAILABLE"]
        assert not client.call("RepositoryIndex", ready=True).models
        with refused("NOT_FOUND", "unknown model 'tiny'"):
            client.call("ModelInfer", infer_request(images))
        client.call("RepositoryModelLoad", model_name="tiny")
        assert client.call("ModelReady", name="tiny").ready
        assert len(client.call("ModelInfer", infer_request(images)).outputs) == 2
        with refused("NOT_FOUND", "no model 'other'"):
            client.call("RepositoryModelLoad", model_name="other")
        load = message("RepositoryModelLoadRequest")(model_name="tiny")
        load.parameters["config"].string_param = "{}"
        with refused("INVALID_ARGUMENT", "send no parameters"):
            client.call("RepositoryModelLoad", load)


def test_nothing_is_loaded_or_unloaded_where_the_operator_did_not_allow_it(client) -> None:
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        with refused("PERMISSION_DENIED", "the operator may allow it"):
            client.call(method, model_name="tiny")
    assert client.call("ModelReady", name="tiny").ready


# --- who may ask


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    keys_file, administrators = tmp_path / "keys", tmp_path / "administrators"
    keys_file.write_text("alice:alice-alice-alice-1\nbob:bob-bob-bob-bob-bob-1:another\n")
    administrators.write_text("root:root-root-root-root-1:tiny\n")
    for file in (keys_file, administrators):
        file.chmod(0o600)
    return {"api_keys_file": str(keys_file), "admin_keys_file": str(administrators)}


def test_calls_need_a_key_that_is_good_for_their_model(tiny_application, serve, images, keys) -> None:
    alice = [("authorization", "Bearer alice-alice-alice-1")]
    with serve(tiny_application("single", grpc_port=0, **keys)) as client:
        assert client.call("ServerLive").live  # probes have no keys
        assert client.health() == health_pb2.HealthCheckResponse.SERVING
        for method, fields in (("ServerMetadata", {}), ("ModelMetadata", {"name": "tiny"}), ("RepositoryIndex", {})):
            with refused("UNAUTHENTICATED", "no API key"):
                client.call(method, **fields)
            client.call(method, metadata=alice, **fields)
        request = infer_request(images)
        with refused("UNAUTHENTICATED", "no API key"):
            client.call("ModelInfer", request)
        with refused("UNAUTHENTICATED", "not one of this server's"):
            client.call("ModelInfer", request, metadata=[("x-api-key", "mallory-mallory-1")])
        with refused("PERMISSION_DENIED", "only for another"):
            client.call("ModelInfer", request, metadata=[("x-api-key", "bob-bob-bob-bob-bob-1")])
        assert len(client.call("ModelInfer", request, metadata=alice).outputs) == 2
        assert len(client.call("ModelInfer", request, metadata=[("x-api-key", "alice-alice-alice-1")]).outputs) == 2
        with refused("UNAUTHENTICATED", "no API key"):
            next(stream_of(client)(iter([request]), timeout=10))
        (denied,) = stream_of(client)(iter([request]), timeout=10, metadata=[("x-api-key", "bob-bob-bob-bob-bob-1")])
        assert "only for another" in denied.error_message


def test_loading_needs_an_administrators_key(tiny_application, serve, keys) -> None:
    application = tiny_application("single", grpc_port=0, allow_repository_changes=True, **keys)
    with serve(application) as client:
        for metadata in (None, [("x-api-key", "alice-alice-alice-1")]):
            with refused("UNAUTHENTICATED"):
                client.call("RepositoryModelUnload", model_name="tiny", metadata=metadata)
        root = [("x-api-key", "root-root-root-root-1")]
        with refused("PERMISSION_DENIED", "only for tiny"):
            client.call("RepositoryModelUnload", model_name="other", metadata=root)
        assert client.call("ModelReady", name="tiny", metadata=[("x-api-key", "alice-alice-alice-1")]).ready
        client.call("RepositoryModelUnload", model_name="tiny", metadata=root)


def test_a_call_without_a_key_is_refused_before_its_message_is_there(tiny_application, serve, keys) -> None:
    with serve(tiny_application("single", grpc_port=0, body_timeout=8, **keys)) as client:
        began = time.monotonic()
        with refused("UNAUTHENTICATED"):
            client.channel.stream_unary(f"/{SERVICE}/ModelInfer")(_never(), timeout=10)
        assert time.monotonic() - began < 0.9  # the message would have taken a second


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    for name in ("server", "client"):
        (tmp_path / f"{name}.conf").write_text("subjectAltName=DNS:localhost\n")
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2", "-extfile", f"{name}.conf", "-CAcreateserial"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return tmp_path


def test_tls_serves_those_who_trust_it_and_asks_for_their_certificates_if_it_is_to(
    tiny_application, serve_in_a_thread, certificates, images
) -> None:
    own = {"tls_certificate": str(certificates / "server.pem"), "tls_key": str(certificates / "server.key")}
    trust = (certificates / "ca.pem").read_bytes()
    identity = [(certificates / f"client.{kind}").read_bytes() for kind in ("key", "pem")]
    for authority in ("", str(certificates / "ca.pem")):
        application = tiny_application("single", grpc_port=0, tls_client_ca=authority, **own)
        # gRPC alone: what HTTP does over TLS is tested elsewhere
        with running_alone(application):
            known = Client(application.grpc_port, grpc.ssl_channel_credentials(trust, *identity))
            assert len(known.call("ModelInfer", infer_request(images)).outputs) == 2
            stranger = Client(application.grpc_port, grpc.ssl_channel_credentials(trust))
            plain = Client(application.grpc_port)
            if authority:
                with refused("UNAVAILABLE"):
                    stranger.call("ServerLive", timeout=5)
            else:
                assert stranger.call("ServerLive").live
            with refused("UNAVAILABLE"):
                plain.call("ServerLive", timeout=5)
            for client in (known, stranger, plain):
                client.channel.close()


@contextmanager
def running_alone(application: Application) -> Iterator[None]:
    """Run an application without HTTP, on a loop in a thread."""
    started, stop = threading.Event(), threading.Event()

    async def main() -> None:
        async with application.running():
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(10)
        yield
    finally:
        stop.set()
        thread.join(10)


# --- starting


def test_a_port_in_use_stops_the_start_with_what_to_do(tiny_application, serve) -> None:
    with serve(tiny_application("single", grpc_port=0)) as client:
        first = tiny_application("single", grpc_port=0)
        del client

        async def start(application: Application) -> None:
            async with application.running():
                second = tiny_application("single", grpc_port=application.grpc_port)
                with pytest.raises(BadInput, match="choose another port with --grpc-port"):
                    async with second.running():
                        pass

        asyncio.run(start(first))


def test_without_a_port_there_is_no_grpc(tiny_application, serve_in_a_thread) -> None:
    application = tiny_application("single")
    with serve_in_a_thread(application):
        assert application.grpc_port is None


def test_the_log_tells_the_address(tiny_application, serve, caplog) -> None:
    with caplog.at_level("INFO", "manygates.serving"):
        application = tiny_application("single", grpc_port=0)
        with serve(application):
            assert f"gRPC at 127.0.0.1:{application.grpc_port}" in caplog.messages


def test_requests_are_logged_and_traced_where_that_is_wanted(tiny_application, serve, images, keys, caplog) -> None:
    spans: list[dict[str, Any]] = []

    class Recorder:
        def record(self, name: str, notes: Any, **about: Any) -> None:
            spans.append({"name": name, "notes": notes, **about})

    application = tiny_application("single", grpc_port=0, log_requests=True, **keys)
    application.tracer = Recorder()  # type: ignore[assignment]
    request = infer_request(images)
    request.id = "seven"
    metadata = [("x-api-key", "alice-alice-alice-1"), ("traceparent", "00-1-2-01")]
    with caplog.at_level("INFO", "manygates"), serve(application) as client:
        client.call("ModelInfer", request, metadata=metadata)
        with refused("NOT_FOUND"):
            client.call("ModelMetadata", name="nope", metadata=metadata)
    answered, failed = [record for record in caplog.records if record.name == "manygates.access"]
    assert answered.access.items() >= {"path": "ModelInfer", "status": 200, "rows": 3, "key": "alice"}.items()
    assert answered.request_id == "seven"
    assert failed.access["status"] == 404
    first, second = spans
    assert (first["name"], first["protocol"]) == ("ModelInfer", "grpc")
    assert (first["notes"].mode, first["notes"].model) == ("single", "tiny")
    assert first["headers"][b"traceparent"] == b"00-1-2-01"
    assert second["notes"].reason == "unknown_model"
    told = [(span["name"], span["notes"]) for span in spans]
    assert not any("alice-alice" in str(said) for said in (*caplog.messages, *told))
