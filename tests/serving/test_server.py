import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest

from serving import server
from serving.answers import Prediction, Predictor
from serving.http.app import Application
from serving.listener import bind
from serving.operations.settings import Settings
from serving.server import serve
from zoo.bundle.bundle import Bundle
from zoo.errors import BadInput, ChecksumMismatch, ManygatesError, UnknownName

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from serving.server import serve
from serving.operations.settings import Settings
serve(Settings.resolve({"models": sys.argv[1], "mode": sys.argv[2], "port": 0}))
"""


@contextmanager
def server_process(bundle_dir: Path, *, mode: str = "", **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server in a process of its own; yields it and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, f"local-dir:{bundle_dir}", mode],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        yield process, url_on(process.stderr)
    finally:
        process.kill()
        process.communicate()


def url_on(stream: Any) -> str:
    """Read what a server says at its start; returns where it serves."""
    said = []
    for line in stream:
        if "manygates serves" in line:
            return next(word for word in line.split() if word.startswith("http://"))
        said.append(line)
    raise AssertionError("".join(said))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(5).random((3, 3, 4, 4), dtype=np.float32)


@pytest.fixture
def expected(bundle_dir: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(bundle_dir / "single.onnx", providers=["CPUExecutionProvider"])
    names = ["probabilities", "logits"]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gevent", "ignore::DeprecationWarning:tritonclient")
def test_the_real_tritonclient_gets_what_onnx_runtime_answers(
    tiny_application, serve_in_a_thread, images, expected, binary: bool
) -> None:
    import tritonclient.http as triton

    with serve_in_a_thread(tiny_application("single")) as url:
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert client.get_server_metadata()["name"] == "manygates"
        assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 3, 4, 4]
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "probabilities")]
        answer = client.infer("tiny", [tensor], outputs=outputs, request_id="q7")
        assert answer.get_response()["id"] == "q7"
        default = client.infer("tiny", [tensor], model_version="1")
        for name, values in expected.items():
            assert answer.as_numpy(name) == pytest.approx(values, abs=1e-6)
            assert default.as_numpy(name) == pytest.approx(values, abs=1e-6)
        wrong = triton.InferInput("pixels", list(images.shape), "FP32")
        wrong.set_data_from_numpy(images, binary_data=binary)
        with pytest.raises(triton.InferenceServerException, match="unknown input 'pixels'"):
            client.infer("tiny", [wrong])
        client.close()


def test_a_server_answers_its_first_request_and_drains_on_sigterm(bundle_dir: Path) -> None:
    with server_process(bundle_dir) as (process, url):
        document = {"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]}
        answer = httpx.post(f"{url}/v2/models/tiny/infer", json=document)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert all(" INFO manygates.serving: " in line for line in process.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before", [(), (signal.SIGHUP,)], ids=["at once", "after a SIGHUP, which changes nothing"])
def test_a_signal_while_a_model_is_loaded_ends_the_server_at_once_and_without_a_traceback(
    number: int, before: tuple[int, ...]
) -> None:
    script = """
import time
from serving import server
from serving.operations.settings import Settings
def build(settings):
    print("loading", flush=True)
    time.sleep(600)
server.build = build
server.serve(Settings(models=("any",), port=0))
print("returned", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        for earlier in before:
            process.send_signal(earlier)
            time.sleep(0.2)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert output == "returned\n"
    assert errors == "manygates was stopped before it served anything\n"


def test_whoever_connects_while_the_models_are_loaded_is_answered_when_they_are(application_of) -> None:
    listener = bind("127.0.0.1", 0)
    with socket.create_connection(listener.getsockname(), timeout=10) as early:
        early.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        running = server.Server(application_of(None))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        assert early.recv(1000).startswith(b"HTTP/1.1 200 ")
    running.handle_exit(signal.SIGTERM, None)
    thread.join(10)
    assert not thread.is_alive()


def test_requests_in_flight_at_sigterm_are_answered(application_of, monkeypatch) -> None:
    entered, opened = threading.Event(), threading.Event()

    class Gate(Predictor):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Any:
            entered.set()
            assert opened.wait(10)
            return Prediction(np.full((len(images), 3), 1 / 3, np.float32), np.zeros((len(images), 3), np.float32))

    application: Application = application_of(Gate())
    listener = bind("127.0.0.1", 0)
    running = server.Server(application)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    body = json.dumps({"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/v2/models/tiny/infer", body)
    assert entered.wait(10)
    running.handle_exit(signal.SIGTERM, None)
    deadline = time.monotonic() + 10
    while not running.should_exit and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not application.service.ready
    assert thread.is_alive()
    opened.set()
    assert connection.getresponse().status == 200
    connection.close()
    thread.join(10)
    assert not thread.is_alive()
    listener.close()


def test_readiness_goes_first_when_draining_is_delayed(application_of) -> None:
    application: Application = application_of(None, drain_delay=0.5)
    running = server.Server(application)
    running.handle_exit(signal.SIGTERM, None)
    assert application.service.draining
    assert not running.should_exit
    asyncio.run(running.on_tick(1))
    assert not running.should_exit
    time.sleep(0.55)
    assert asyncio.run(running.on_tick(1))
    running.handle_exit(signal.SIGTERM, None)
    assert running.force_exit


def test_a_port_in_use_is_refused_before_anything_is_loaded(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_load(*_: object) -> None:
        raise AssertionError("loaded a model for a server that cannot start")

    monkeypatch.setattr(server, "build", must_not_load)
    models = (f"local-dir:{bundle_dir}",)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ManygatesError, match=f"cannot listen on 127.0.0.1 port {port} .*--port"):
            serve(Settings(models=models, port=port))
    with pytest.raises(BadInput, match="port 70000 is out of range"):
        bind("127.0.0.1", 70000)
    with pytest.raises(BadInput, match="cannot listen on no-such-host"):
        serve(Settings(models=models, host="no-such-host.invalid", port=0))


def test_a_model_that_cannot_be_served_is_an_error_that_leaves_no_socket_behind(bundle_dir: Path) -> None:
    models = (f"local-dir:{bundle_dir}",)
    with pytest.raises(BadInput, match="exit 1 was given, but tiny has only one exit"):
        serve(Settings(models=models, exit=1, port=0))
    with pytest.raises(UnknownName, match="unknown model 'no-such-model'"):
        serve(Settings(models=("no-such-model",), port=0))
    (bundle_dir / "single.onnx").write_bytes(b"x" * (bundle_dir / "single.onnx").stat().st_size)
    with pytest.raises(ChecksumMismatch):
        serve(Settings(models=models, port=0))


def test_only_the_graph_that_is_served_is_needed(bundle_dir: Path, load_model) -> None:
    (bundle_dir / "gated.onnx").unlink()
    assert load_model(bundle_dir).mode == "single"
    assert Bundle.open(bundle_dir, only=()).has_variant("gated")


def test_the_demo_is_mounted_beside_the_calls(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def mount(app: Any, path: str, models: list[str], **limits: int) -> Any:
        assert limits == {"max_pixels": 5_000_000}
        app.router.routes.append(Route(f"{path}/", lambda request: PlainTextResponse(f"demo of {models}")))
        return app

    demo = types.ModuleType("serving.demo.page")
    demo.mount = mount  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "serving.demo.page", demo)
    source = f"local-dir:{bundle_dir}"
    application = server.build(Settings(models=(source,), threads=1, demo=True, max_image_pixels=5_000_000))

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://server") as client:
            assert (await client.get("/demo/")).text == f"demo of {[source]}"
            assert (await client.get("/v2/health/live")).status_code == 200

    asyncio.run(main())


def test_a_missing_demo_is_an_error_that_says_what_to_install(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "serving.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(BadInput, match=r"needs 'gradio'; install it with `pip install 'manygates\[demo\]'`"):
        server.build(Settings(models=(f"local-dir:{bundle_dir}",), threads=1, demo=True))


def test_many_clients_at_once_over_real_sockets_get_their_own_answers(
    tiny_application, serve_in_a_thread, bundle_dir: Path
) -> None:
    session = onnxruntime.InferenceSession(bundle_dir / "single.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(2).random((8, 20, 3, 4, 4), dtype=np.float32)
    failures: list[str] = []

    def client(host: str, rows: np.ndarray) -> None:
        connection = http.client.HTTPConnection(host, timeout=10)
        for image in rows:
            headers = {"Inference-Header-Content-Length": "0"}
            connection.request("POST", "/v2/models/tiny/infer", image.tobytes(), headers)
            answer = connection.getresponse()
            content = answer.read()
            head = int(answer.headers["Inference-Header-Content-Length"])
            values = np.frombuffer(content[head:], "<f4")[:3]
            wanted = session.run(["probabilities"], {"images": image[np.newaxis]})[0][0]
            if not np.allclose(values, wanted, atol=1e-5):
                failures.append(f"{values} instead of {wanted}")
        connection.close()

    with serve_in_a_thread(tiny_application("single")) as url:
        threads = [threading.Thread(target=client, args=(url.removeprefix("http://"), rows)) for rows in images]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert failures == []
