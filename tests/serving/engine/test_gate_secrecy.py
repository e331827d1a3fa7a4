"""The gates of a running server: uniform where they reach ONNX Runtime, and nowhere to be read outside of it."""

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.engine import graphs
from serving.engine.engine import Engine
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.protocol.open_inference import HEADER_LENGTH
from serving.scheduling.service import Model
from zoo.bundle.bundle import Bundle

ROOT = Path(__file__).parents[3]
BUNDLED = ROOT / "zoo/bundles/eio-resnet20-cifar10"
RAW = {HEADER_LENGTH.decode(): "0"}
PATHS = [np.array(path) for path in ((0, 0), (0, 1), (1, 0), (1, 1))]


class Spy:
    """A session of ONNX Runtime that remembers the gates it was fed."""

    def __init__(self, session: Any, fed: list[np.ndarray]) -> None:
        self._session, self._fed = session, fed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, outputs: Any, inputs: dict[str, np.ndarray], *more: Any) -> Any:
        if "gates" in inputs:
            self._fed.append(inputs["gates"].copy())
        return self._session.run(outputs, inputs, *more)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The gates that sessions opened in this test are fed, call by call."""
    found: list[np.ndarray] = []
    opened = graphs.session
    monkeypatch.setattr(graphs, "session", lambda *content, **options: Spy(opened(*content, **options), found))
    return found


LIMITS = {1: 23.93, 3: 30.66}
"""Degrees of freedom -> what chi-square exceeds once in a million."""


def chi_square(values: np.ndarray, sides: int) -> float:
    counts = np.bincount(values, minlength=sides)
    assert len(counts) == sides
    expected = len(values) / sides
    return float(((counts - expected) ** 2 / expected).sum())


def assert_uniform(paths: np.ndarray) -> None:
    """Each gate of two candidates, each pair of neighbours in a path, and each gate of paths in a row."""
    for gate in range(paths.shape[1]):
        assert chi_square(paths[:, gate], 2) < LIMITS[1]
        assert chi_square(2 * paths[1:, gate] + paths[:-1, gate], 4) < LIMITS[3]
    for gate in range(paths.shape[1] - 1):
        assert chi_square(2 * paths[:, gate] + paths[:, gate + 1], 4) < LIMITS[3]
        assert chi_square(2 * paths[1:, gate] + paths[:-1, gate + 1], 4) < LIMITS[3]


def ask(application: Application, requests: list[int]) -> None:
    """Have so many images answered in each of some requests, all at once, through the queue and the workers."""
    (served,) = application.service.everything()

    async def main() -> None:
        async with application.running():
            images = [np.full((number, 3, 4, 4), 0.5, np.float32) for number in requests]
            await asyncio.gather(*(application.service.predict(served, each) for each in images))

    asyncio.run(main())


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_gates_that_a_server_feeds_over_100_000_draws_are_uniform(
    tiny_application, fed: list[np.ndarray], scope: str, draws: int
) -> None:
    # with one path for a batch a batch is one draw, so batches are of one image there
    most = 8 if scope == "image" else 1
    application = tiny_application("random", draws=draws, gate_scope=scope, max_batch=most, max_queue=2**20)
    fed.clear()  # what was compared and warmed up
    wanted = 100_000 if scope == "image" else 20_000
    ask(application, [200] * (wanted // draws // 200 + 1))
    paths = np.concatenate([gates.reshape(-1, 2) for gates in fed])
    assert len(paths) >= wanted
    assert_uniform(paths)


def test_a_gate_that_is_fixed_once_in_forty_draws_is_found() -> None:
    paths = np.random.default_rng(0).integers(0, 2, (100_000, 5))
    assert_uniform(paths)
    paths[::40, 3] = 0
    with pytest.raises(AssertionError):
        assert_uniform(paths)


def test_a_gate_that_follows_its_neighbour_now_and_then_is_found() -> None:
    paths = np.random.default_rng(0).integers(0, 2, (100_000, 5))
    paths[::40, 2] = paths[::40, 1]
    with pytest.raises(AssertionError):
        assert_uniform(paths)


# --- what a client, the log and the metrics tell


def along(path: np.ndarray, bundle_dir: Path, card: Any) -> Application:
    """A server that takes one path for ever."""
    predictor = Engine(Bundle.open(bundle_dir), "random", gate_source=lambda images: np.tile(path, (images, 1)))
    model = Model(card=card, mode="random", predictor=predictor, modes=("random",), voting=("random",))
    settings = Settings(threads=1, log_requests=True, log_format="json", allow_mode_choice=True)
    return Application([model], settings)


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (120, 120, 120)).save(stream, format="PNG")
    return stream.getvalue()


async def answers_of(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
    image = np.full((1, 3, 4, 4), 0.5, np.float32)
    tensor = {"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": image.ravel().tolist()}
    path = "/v2/models/tiny/infer"
    drawn = {"mode": "random", "draws": 4}
    return {
        "raw": await client.post(path, content=image.tobytes(), headers=RAW),
        "json": await client.post(path, json={"inputs": [tensor], "outputs": [{"name": "probabilities"}]}),
        "draws": await client.post(path, json={"inputs": [tensor], "parameters": drawn, "outputs": []}),
        "picture": await client.post("/classify", content=png()),
        "wrong": await client.post(path, json={"inputs": [tensor], "outputs": [{"name": "gates"}]}),
        "metadata": await client.get("/v2/models/tiny"),
        "config": await client.get("/v2/models/tiny/config"),
        "metrics": await client.get("/metrics"),
    }


def shape_of(value: Any) -> Any:
    """Return a document without the numbers that answer, and without times."""
    if isinstance(value, dict):
        hidden = ("label",)
        return {key: None if key in hidden else shape_of(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape_of(entry) for entry in value]
    return 0.0 if isinstance(value, float) else value


def test_what_identical_requests_leave_behind_is_the_same_along_every_path(
    bundle_dir: Path, card, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    answered = set()
    for path in PATHS:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="manygates"):
            answers = run(along(path, bundle_dir, card), answers_of)
        answered.add(answers["raw"].content)
        answers["picture"].read()
        shown: dict[str, Any] = {
            "sizes": {name: len(answers[name].content) for name in ("raw", "wrong", "metadata", "config")},
            "headers": {name: sorted(answer.headers) for name, answer in answers.items()},
            "statuses": {name: answer.status_code for name, answer in answers.items()},
            "json": [shape_of(answers[name].json()) for name in ("json", "draws", "config", "metadata", "wrong")],
            "picture": sorted(answers["picture"].json()),
            "metrics": [
                line.rpartition(" ")[0] if re.search("seconds|process_", line) else line
                for line in answers["metrics"].text.splitlines()
            ],
            "log": [re.sub(r"\d+\.\d+ ms", "", record.getMessage()) for record in caplog.records],
        }
        assert shown["log"]
        told.append(shown)
    assert len(answered) == len(PATHS)  # the paths do answer differently
    for other in told[1:]:
        assert other == told[0]


def run(application: Application, body: Callable[[httpx.AsyncClient], Any]) -> Any:
    async def main() -> Any:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client, application.running():
            return await body(client)

    return asyncio.run(main())


def spellings(path: np.ndarray) -> list[str]:
    """Return how a path could be written down."""
    digits = [str(gate) for gate in path]
    number = int("".join(digits), 2)
    backwards = int("".join(reversed(digits)), 2)
    return ["".join(digits), "".join(reversed(digits)), ",".join(digits), ", ".join(digits), " ".join(digits)] + [
        str(value) for value in (number, backwards, f"{number:x}", f"{backwards:x}") if len(str(value)) > 4
    ]


def test_no_path_of_nineteen_gates_is_written_down_anywhere(
    fed: list[np.ndarray], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(BUNDLED)
    predictor = Engine(bundle, "random")
    fed.clear()
    model = Model(card=bundle.card, mode="random", predictor=predictor, modes=("random",), voting=("random",))
    application = Application([model], Settings(threads=1, log_requests=True, allow_mode_choice=True))
    image = np.full((2, 3, 32, 32), 0.5, np.float32)
    path = f"/v2/models/{bundle.card.name}/infer"

    async def body(client: httpx.AsyncClient) -> str:
        found = []
        for number in range(12):
            tensor = {"name": "images", "shape": [2, 3, 32, 32], "datatype": "FP32", "data": image.ravel().tolist()}
            outputs = [{"name": name} for name in ("probabilities", "logits", "agreement")]
            asked = {"id": str(number), "inputs": [tensor], "outputs": outputs, "parameters": {"draws": 2}}
            for answer in (
                await client.post(path, json=asked),
                await client.post(path, content=image.tobytes(), headers=RAW),
                await client.post("/classify", content=png()),
            ):
                assert answer.status_code == 200
                # numbers that answer have a point; what is left could be gates
                text = answer.text if "json" in answer.headers["content-type"] else answer.content.decode("latin-1")
                found.append(re.sub(r"-?\d+\.\d+(e-?\d+)?", "", text) + str(answer.headers))
        metrics = (await client.get("/metrics")).text
        found.append(re.sub(r" [\d.]+(e[+-]\d+)?$", "", metrics, flags=re.MULTILINE))  # how often and how long
        found += [(await client.get(where)).text for where in (f"/v2/models/{bundle.card.name}/stats", "/")]
        return "\n".join(found)

    with caplog.at_level(logging.DEBUG):
        text = run(application, body)
    text += caplog.text + "".join(map(str, capfd.readouterr()))
    paths = np.concatenate(fed)
    assert paths.shape == (12 * 7, 19)
    for drawn in paths:
        for written in spellings(drawn):
            assert not re.search(rf"(?<![\w.-]){re.escape(written)}(?![\w.])", text), written


# --- no stream twice


STREAMS = """
import os, sys, threading
from pathlib import Path
import numpy as np
from serving.engine import graphs
from serving.engine.engine import Engine
from zoo.bundle.bundle import Bundle

class Spy:
    def __init__(self, session):
        self.session = session
    def __getattr__(self, name):
        return getattr(self.session, name)
    def run(self, outputs, inputs, *more):
        if "gates" in inputs:
            streams.setdefault(threading.current_thread().name, []).append(inputs["gates"].copy())
        return self.session.run(outputs, inputs, *more)

opened = graphs.session
graphs.session = lambda *content, **options: Spy(opened(*content, **options))
streams = {}
predictor = Engine(Bundle.open(Path(sys.argv[1])), "random")
images = np.zeros((64, 3, 4, 4), np.float32)
predictor.predict(images)

def tell():
    streams.clear()
    threads = [threading.Thread(target=lambda: [predictor.predict(images) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 2
    for calls in streams.values():
        for gates in calls:
            print("".join(map(str, gates.ravel())))
    sys.stdout.flush()

for _ in range(2):
    if os.fork() == 0:
        tell()
        os._exit(0)
    os.wait()
tell()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_forks_and_threads_of_one_server_never_draw_the_same(bundle_dir: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STREAMS, str(bundle_dir)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    lines = [line for process in running for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in running] == [0, 0]
    # of each: itself and two forks, two threads each, 20 calls of 64 images of two gates
    assert len(lines) == 2 * 3 * 2 * 20
    assert {len(line) for line in lines} == {128}
    assert len({*lines}) == len(lines)
    parts = [line[start : start + 64] for line in lines for start in (0, 64)]
    assert len({*parts}) == len(parts)
    together = np.array([list(map(int, line)) for line in lines]).reshape(-1, 2)
    assert_uniform(together)


def test_a_request_cannot_choose_its_path(tiny_application, fed: list[np.ndarray]) -> None:
    application = tiny_application("random", allow_mode_choice=True)
    fed.clear()
    tensor = {"name": "images", "shape": [64, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48 * 64}
    parameters = {
        "gates": [0, 0],
        "gate": "00",
        "gate_seed": 1,
        "path": "00",
        "path_id": 0,
        "seed": 1,
        "mode": "random",
    }

    async def body(client: httpx.AsyncClient) -> list[bytes]:
        content = json.dumps({"inputs": [tensor], "parameters": parameters})
        headers = {"x-gates": "00", "gate-seed": "1"}
        answers = [
            await client.post(f"/v2/models/tiny/infer?gate_seed=1&path={number}", content=content, headers=headers)
            for number in range(2)
        ]
        assert [answer.status_code for answer in answers] == [200, 200]
        return [answer.content for answer in answers]

    first, second = run(application, body)
    assert first != second
    paths = np.concatenate(fed)
    assert len(paths) == 128
    assert len({tuple(path) for path in paths}) == 4
