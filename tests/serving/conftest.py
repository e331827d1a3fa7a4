"""Small models with known answers, and servers for them."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.http.app import Application
from serving.listener import bind, url_of
from serving.operations.settings import ModelSettings, Settings
from serving.scheduling.repository import load
from serving.scheduling.service import Model
from serving.server import Server, build, compose
from zoo.bundle.bundle import write_bundle
from zoo.bundle.card import Card, InputFormat, NetworkSummary, Paths, Training

SHAPE = (3, 4, 4)
CLASSES = ("cat", "dog", "frog")
GATE_BIASES = np.array([[[0, 0, 0], [2, 0, -1]], [[0, 0, 0], [-1, 3, 0]]], dtype=np.float32)


def tiny_card(name: str = "tiny", variants: tuple[str, ...] = ("single", "ensemble", "gated")) -> Card:
    return Card(
        name=name,
        description="A linear model with two gates.",
        method="standard",
        license="apache-2.0",
        dataset="cifar10",
        architecture=NetworkSummary(
            name="linear",
            options={},
            gated_layers=("bias1", "bias2"),
            candidates=2,
            sharing="independent",
            parameters=156,
            single_path_parameters=150,
        ),
        input=InputFormat(
            channels=3, height=4, width=4, range=(0.0, 1.0), mean=(0.0,) * 3, std=(1.0,) * 3, resize="nearest"
        ),
        classes=CLASSES,
        paths=Paths(single="01", ensemble=("01", "10")),
        variants=variants,
        training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="Not trained"),
        results=(),
        files={},
    )


def tiny_graph(*, gated: bool, scale: float = 1.0) -> bytes:
    """softmax(flatten(images) @ weights [+ one bias per gate]); the weights follow from a fixed seed."""
    weights = (scale * np.random.default_rng(0).normal(size=(48, 3))).astype(np.float32)
    constants = [numpy_helper.from_array(weights, "weights")]
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])]
    scores = "scores"
    if gated:
        inputs.append(helper.make_tensor_value_info("gates", TensorProto.INT64, [2]))
        for gate in range(2):
            constants.append(numpy_helper.from_array(np.int64(gate), f"index{gate}"))
            constants.append(numpy_helper.from_array(GATE_BIASES[gate], f"biases{gate}"))
            nodes += [
                helper.make_node("Gather", ["gates", f"index{gate}"], [f"gate{gate}"]),
                helper.make_node("Gather", [f"biases{gate}", f"gate{gate}"], [f"bias{gate}"]),
                helper.make_node("Add", [scores, f"bias{gate}"], [f"sum{gate}"]),
            ]
            scores = f"sum{gate}"
    nodes += [
        helper.make_node("Identity", [scores], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("logits", "probabilities")
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def write_tiny_bundle(folder: Path, card: Card | None = None, *, scale: float = 1.0) -> Path:
    """Write a bundle; its logits are `scale` times those of the others, which tells them apart."""
    card = card or tiny_card()
    graphs = {f"{variant}.onnx": tiny_graph(gated=variant == "gated", scale=scale) for variant in card.variants}
    write_bundle(folder, card, graphs)
    return folder


def load_from_folder(folder: Path, settings: Settings | None = None, **own: object) -> Model:
    """Load the bundle in a folder; `own` is what a `ModelSettings` may say."""
    model = ModelSettings(source=f"local-dir:{folder}", **own)  # type: ignore[arg-type]
    return load(model, settings or Settings(threads=1))[0]


@contextmanager
def server_in_a_thread(application: Application) -> Iterator[str]:
    """Serve on a free port; yields the URL."""
    listener = bind("127.0.0.1", 0)
    server = Server(application)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    url = url_of(listener)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@pytest.fixture
def card() -> Card:
    return tiny_card()


@pytest.fixture(scope="session")
def make_card() -> Callable[..., Card]:
    return tiny_card


@pytest.fixture(scope="session")
def make_graph() -> Callable[..., bytes]:
    return tiny_graph


@pytest.fixture(scope="session")
def gate_biases() -> np.ndarray:
    return GATE_BIASES


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture(scope="session")
def write_bundle_dir() -> Callable[..., Path]:
    return write_tiny_bundle


@pytest.fixture(scope="session")
def serve_in_a_thread() -> Callable[[Application], object]:
    return server_in_a_thread


@pytest.fixture(scope="session")
def load_model() -> Callable[..., Model]:
    """Return a function that loads a bundle from a folder, as `load_from_folder` does."""
    return load_from_folder


@pytest.fixture(scope="session")
def shared_bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, for tests that do not change it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("shared") / "tiny")


@pytest.fixture(scope="module")
def shared_application(shared_bundle_dir: Path) -> Callable[..., Application]:
    """Return what `tiny_application` does, of a bundle that all tests share."""

    def build_shared(mode: str | None = None, **settings: object) -> Application:
        chosen = {"threads": 2, "models": (f"local-dir:{shared_bundle_dir}",), "mode": mode or "", **settings}
        return build(Settings(**chosen))  # type: ignore[arg-type]

    return build_shared


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Callable[..., tuple[Application, str]]]:
    """Return a function that serves `make(*arguments, **settings)` until the module ends, once for the same arguments.

    It returns the application and its URL.
    """
    with ExitStack() as stack:
        running: dict[Hashable, tuple[Application, str]] = {}

        def serve(make: Callable[..., Application], *arguments: Any, **settings: Any) -> tuple[Application, str]:
            key = (make, arguments, tuple(sorted(settings.items())))
            if key not in running:
                application = make(*arguments, **settings)
                running[key] = application, stack.enter_context(server_in_a_thread(application))
            return running[key]

        yield serve


@pytest.fixture
def tiny_application(bundle_dir: Path) -> Callable[..., Application]:
    """Return a function from modes and settings to an application that serves the tiny model in them."""

    def build_tiny(mode: str | None = None, **settings: object) -> Application:
        chosen = {"threads": 2, "models": (f"local-dir:{bundle_dir}",), "mode": mode or "", **settings}
        return build(Settings(**chosen))  # type: ignore[arg-type]

    return build_tiny


@pytest.fixture
def application_of(card: Card) -> Callable[..., Application]:
    """Return a function from a predictor to an application that serves it under the tiny model's card."""

    def build_of(predictor: object, **settings: object) -> Application:
        chosen = Settings(**{"threads": 2, **settings})  # type: ignore[arg-type]
        return compose([Model(card=card, mode="single", predictor=predictor)], chosen)  # type: ignore[arg-type]

    return build_of
