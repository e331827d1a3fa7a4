"""The clients that people use, unmodified: tritonclient over HTTP and gRPC, blocking and asyncio, and KServe's."""

import asyncio
import importlib
import json
import os
import queue
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serving.operations.settings import Settings
from serving.server import build

FLAVOURS = ["http", "http.aio", "grpc", "grpc.aio"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:gevent", "ignore::DeprecationWarning:tritonclient", "ignore::DeprecationWarning:zope"
)


class Triton:
    """One of the four clients of tritonclient; those for asyncio are asked on a loop of their own."""

    def __init__(self, flavour: str, url: str, grpc_port: int) -> None:
        self.flavour = flavour
        self.library = importlib.import_module(f"tritonclient.{flavour}")
        self.error = importlib.import_module("tritonclient.utils").InferenceServerException
        self.is_grpc = flavour.startswith("grpc")
        self._runner = asyncio.Runner() if flavour.endswith("aio") else None
        address = f"127.0.0.1:{grpc_port}" if self.is_grpc else url.removeprefix("http://")
        self.client = self._made(address)

    def _made(self, address: str) -> Any:
        if self._runner is None:
            return self.library.InferenceServerClient(address)

        async def make() -> Any:
            return self.library.InferenceServerClient(address)

        return self._runner.run(make())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)
        if self._runner is None:
            return method
        return lambda *values, **named: self._runner.run(method(*values, **named))

    def json(self, name: str, *values: Any, **named: Any) -> Any:
        """Ask for something that gRPC's client can return as JSON."""
        return getattr(self, name)(*values, **named, **({"as_json": True} if self.is_grpc else {}))

    def input(self, images: np.ndarray, datatype: str = "FP32", binary: bool = True) -> Any:
        tensor = self.library.InferInput("images", list(images.shape), datatype)
        tensor.set_data_from_numpy(images, **({} if self.is_grpc else {"binary_data": binary}))
        return tensor

    def output(self, name: str, binary: bool = True) -> Any:
        return self.library.InferRequestedOutput(name, **({} if self.is_grpc else {"binary_data": binary}))

    def refuses(self, ask: Callable[[], Any], http: str, grpc: str, text: str) -> None:
        with pytest.raises(self.error, match=text) as caught:
            ask()
        status = caught.value.status()
        # the client for asyncio and HTTP tells no status
        assert status in ((f"StatusCode.{grpc}",) if self.is_grpc else (http, None)), status

    def close(self) -> None:
        closing = self.client.close()
        if self._runner is not None:
            self._runner.run(closing)
            self._runner.close()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(5).random((3, 3, 4, 4), dtype=np.float32)


@pytest.fixture
def answer(bundle_dir: Path) -> Callable[..., dict[str, np.ndarray]]:
    names = ["probabilities", "logits"]

    def compute(images: np.ndarray, graph: str = "single.onnx") -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(bundle_dir / graph, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return compute


@pytest.fixture
def application(tiny_application) -> Any:
    return tiny_application("single", grpc_port=0)


@pytest.fixture(params=FLAVOURS)
def client(request: pytest.FixtureRequest, application, serve_in_a_thread) -> Iterator[Triton]:
    pytest.importorskip("tritonclient")
    with serve_in_a_thread(application) as url:
        found = Triton(request.param, url, application.grpc_port)
        yield found
        found.close()


def test_health_and_readiness(client: Triton) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")


def test_metadata_configuration_statistics_and_index(client: Triton, images: np.ndarray) -> None:
    server = client.json("get_server_metadata")
    assert server["name"] == "manygates"
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(server["extensions"])
    model = client.json("get_model_metadata", "tiny")
    shapes = {tensor["name"]: list(map(int, tensor["shape"])) for tensor in (*model["inputs"], *model["outputs"])}
    assert shapes == {"images": [-1, 3, 4, 4], "probabilities": [-1, 3], "logits": [-1, 3]}
    assert (model["platform"], model["versions"]) == ("onnxruntime_onnx", ["1"])
    config = client.json("get_model_config", "tiny")
    config = config.get("config", config)
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (8, "TYPE_FP32")
    for _ in range(3):
        client.infer("tiny", [client.input(images)])
    (statistics,) = client.json("get_inference_statistics", "tiny")["model_stats"]
    assert int(statistics["inference_count"]) == 9
    assert int(statistics["inference_stats"]["success"]["count"]) == 3
    assert int(statistics["inference_stats"]["compute_infer"]["ns"]) > 0
    index = client.json("get_model_repository_index")
    (entry,) = index["models"] if client.is_grpc else index
    assert (entry["name"], entry["version"], entry["state"]) == ("tiny", "1", "READY")


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_answers_are_onnx_runtimes(client: Triton, images, answer, datatype: str, binary: bool) -> None:
    levels = np.random.default_rng(6).integers(0, 256, images.shape, dtype=np.uint8)
    sent, meant = (images, images) if datatype == "FP32" else (levels, levels.astype(np.float32) / 255)
    outputs = [client.output(name, binary) for name in ("logits", "probabilities")]
    result = client.infer("tiny", [client.input(sent, datatype, binary)], outputs=outputs, request_id="seven")
    for name, expected in answer(meant).items():
        np.testing.assert_allclose(result.as_numpy(name), expected, atol=1e-6)
    response = result.get_response()
    assert (response.id if client.is_grpc else response["id"]) == "seven"


def test_only_the_outputs_asked_for_come(client: Triton, images) -> None:
    result = client.infer("tiny", [client.input(images)], model_version="1", outputs=[client.output("logits")])
    assert result.as_numpy("logits").shape == (3, 3)
    assert result.as_numpy("probabilities") is None
    everything = client.infer("tiny", [client.input(images)])
    np.testing.assert_array_equal(everything.as_numpy("logits"), result.as_numpy("logits"))
    assert everything.as_numpy("probabilities").shape == (3, 3)


def test_wrong_requests_are_refused_with_what_is_wrong(client: Triton, images) -> None:
    good = [client.input(images)]
    wrong = [client.input(images[:, :, :2])]
    bad = images.copy()
    bad[1, 2, 3, 3] = np.nan
    cases: list[tuple[Callable[[], Any], str, str, str]] = [
        (lambda: client.infer("tniy", good), "404", "NOT_FOUND", "unknown model 'tniy'.*tiny"),
        (lambda: client.infer("tiny", good, model_version="4"), "404", "NOT_FOUND", "no version '4', only '1'"),
        (
            lambda: client.infer("tiny", good, outputs=[client.output("labels")]),
            "400",
            "INVALID_ARGUMENT",
            "unknown output 'labels'",
        ),
        (lambda: client.infer("tiny", wrong), "400", "INVALID_ARGUMENT", r"expected \[images, 3, 4, 4\]"),
        (lambda: client.infer("tiny", [client.input(bad)]), "400", "INVALID_ARGUMENT", "nan"),
        (
            lambda: client.infer("tiny", good, parameters={"mode": "ensemble"}),
            "400",
            "INVALID_ARGUMENT",
            "ALLOW_MODE_CHOICE",
        ),
        (lambda: client.json("get_model_metadata", "tniy"), "404", "NOT_FOUND", "unknown model 'tniy'"),
        (lambda: client.load_model("tiny"), "403", "PERMISSION_DENIED", "loads and unloads nothing"),
        (lambda: client.unload_model("tiny"), "403", "PERMISSION_DENIED", "loads and unloads nothing"),
    ]
    for case in cases:
        client.refuses(*case)
    assert client.infer("tiny", good).as_numpy("logits").shape == (3, 3)


def test_a_request_whose_time_is_over_is_told_so(client: Triton, images) -> None:
    # a microsecond: over before any worker could have begun
    client.refuses(
        lambda: client.infer("tiny", [client.input(images)], timeout=1),
        "504",
        "DEADLINE_EXCEEDED",
        "the request's own timeout is over",
    )
    result = client.infer("tiny", [client.input(images)], timeout=9_000_000)
    assert result.as_numpy("logits").shape == (3, 3)


def test_the_mode_is_chosen_where_that_is_allowed(tiny_application, serve_in_a_thread, images, answer) -> None:
    application = tiny_application("single", grpc_port=0, allow_mode_choice=True)
    expected = answer(images, "ensemble.onnx")["probabilities"]
    with serve_in_a_thread(application) as url:
        for flavour in FLAVOURS:
            client = Triton(flavour, url, application.grpc_port)
            chosen = {"mode": "ensemble"}
            result = client.infer("tiny", [client.input(images)], parameters=chosen, priority=2)
            np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)
            random = client.infer("tiny", [client.input(images)], parameters={"mode": "random", "draws": 5})
            np.testing.assert_allclose(random.as_numpy("probabilities").sum(axis=1), 1, atol=1e-5)
            client.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_models_are_loaded_and_unloaded_where_clients_may(
    tmp_path, bundle_dir, serve_in_a_thread, images, flavour
) -> None:
    for version in ("1", "3"):
        shutil.copytree(bundle_dir, tmp_path / "repository" / "tiny" / version)
    settings = Settings(
        model_repository=str(tmp_path / "repository"),
        threads=1,
        mode="single",
        grpc_port=0,
        allow_repository_changes=True,
    )
    application = build(settings)
    with serve_in_a_thread(application) as url:
        client = Triton(flavour, url, application.grpc_port)

        def version_that_answers(**asked: str) -> str:
            response = client.infer("tiny", [client.input(images)], **asked).get_response()
            return str(response.model_version if client.is_grpc else response["model_version"])

        assert version_that_answers() == "3"
        assert version_that_answers(model_version="1") == "1"
        client.unload_model("tiny")
        assert not client.is_model_ready("tiny")
        client.refuses(version_that_answers, "404", "NOT_FOUND", "unknown model")
        client.load_model("tiny")
        assert client.is_model_ready("tiny")
        assert version_that_answers() == "3"
        client.refuses(lambda: client.load_model("other"), "404", "NOT_FOUND", "no model 'other'")
        client.close()


def test_grpc_calls_in_the_background_and_in_a_stream(application, serve_in_a_thread, images, answer) -> None:
    expected = answer(images)["probabilities"]
    with serve_in_a_thread(application) as url:
        client = Triton("grpc", url, application.grpc_port)
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        for number in range(20):
            client.async_infer(
                "tiny",
                [client.input(images[number % 3][None])],
                callback=lambda result, error: arrived.put((result, error)),
                request_id=str(number),
            )
        for _ in range(20):
            result, error = arrived.get(timeout=10)
            assert error is None
            number = int(result.get_response().id)
            np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected[number % 3], atol=1e-6)
        client.start_stream(callback=lambda result, error: arrived.put((result, error)))
        for number in range(20):
            name = "tiny" if number != 7 else "other"
            client.async_stream_infer(name, [client.input(images[number % 3][None])], request_id=str(number))
        for number in range(20):
            result, error = arrived.get(timeout=10)
            if number == 7:
                assert "unknown model 'other'" in str(error)
                continue
            assert result.get_response().id == str(number)
            np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected[number % 3], atol=1e-6)
        client.stop_stream()
        client.close()


def test_the_asyncio_clients_stream_is_answered(application, serve_in_a_thread, images, answer) -> None:
    expected = answer(images)["probabilities"]

    async def ask(port: int) -> list[Any]:
        library = importlib.import_module("tritonclient.grpc.aio")

        async def requests() -> Any:
            for number in range(9):
                tensor = library.InferInput("images", [1, 3, 4, 4], "FP32")
                tensor.set_data_from_numpy(images[number % 3][None])
                yield {"model_name": "tiny", "inputs": [tensor], "request_id": str(number)}

        async with library.InferenceServerClient(f"127.0.0.1:{port}") as client:
            return [answered async for answered in client.stream_infer(requests())]

    with serve_in_a_thread(application):
        for number, (result, error) in enumerate(asyncio.run(ask(application.grpc_port))):
            assert error is None
            np.testing.assert_allclose(result.as_numpy("probabilities")[0], expected[number % 3], atol=1e-6)
        assert number == 8


def test_kserves_clients_get_what_onnx_runtime_answers(application, serve_in_a_thread, images, answer) -> None:
    """KServe's package asks for versions that our environment does not have, so it lives in one of its own."""
    python = os.environ.get("MANYGATES_KSERVE_PYTHON")
    if not python:
        pytest.skip("MANYGATES_KSERVE_PYTHON names no Python that has KServe (pip install kserve)")
    script = Path(__file__).with_name("kserve_client.py")
    with serve_in_a_thread(application) as url:
        ran = subprocess.run(
            [python, str(script), url, f"127.0.0.1:{application.grpc_port}", "tiny", json.dumps(images.tolist())],
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["ready"] == {
        f"{protocol} {what}": True for protocol in ("rest", "grpc") for what in ("live", "ready", "model")
    }
    expected = answer(images)
    for way in ("rest json", "rest binary", "grpc raw", "grpc contents"):
        assert told["answers"][way]["id"] == "seven"
        for name in ("probabilities", "logits"):
            np.testing.assert_allclose(told["answers"][way][name], expected[name], atol=1e-6, err_msg=way)
    assert "unknown model" in told["errors"]["rest"]
    assert told["errors"]["grpc"].startswith("NOT_FOUND unknown model")
