"""The compiled form of a gated graph answers like the portable one, or does not run."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serving.engine import gate_compiler
from serving.engine.gates import GatedGraph, SystemGates, open_gated
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card, InputFormat, NetworkSummary, Paths, Training
from zoo.errors import BadInput

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "zoo/bundles/eio-resnet20-cifar10"
OUTPUTS = ["probabilities", "logits"]
BATCHES = (1, 2, 3, 8)
GREY = {"channels": 1, "mean": (0.1,), "std": (0.3,)}
needs_blocks = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86-64 has a compiled form"
)


def open_session(graph: bytes, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Case:
    """A portable gated graph and its card."""

    graph: bytes
    card: Card

    def open(self, scope: str = "image", **more: Any) -> GatedGraph:
        return open_gated(
            self.graph, self.card, open_session=more.pop("open_session", open_session), scope=scope, **more
        )

    @property
    def num_gates(self) -> int:
        return len(self.card.architecture.gated_layers)

    def images(self, number: int) -> np.ndarray:
        format = self.card.input
        shape = (number, format.channels, format.height, format.width)
        return np.random.default_rng(number).random(shape, dtype=np.float32)

    def paths(self, number: int) -> np.ndarray:
        candidates = self.card.architecture.candidates
        return np.random.default_rng(number + 1).integers(0, candidates, (number, self.num_gates))

    def expected(self, images: np.ndarray, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image by image along its own path, by the portable graph."""
        session = open_session(self.graph, True)
        rows = [session.run(OUTPUTS, {"images": i[None], "gates": p}) for i, p in zip(images, paths, strict=True)]
        probabilities, logits = (np.concatenate(column) for column in zip(*rows, strict=True))
        return probabilities, logits


def card_of(shape: tuple[int, ...], num_gates: int, candidates: int, classes: int, sharing: str) -> Card:
    return Card(
        name="tiny",
        description="Not trained.",
        method="standard",
        license="apache-2.0",
        dataset="cifar10",
        architecture=NetworkSummary(
            name="tiny",
            options={},
            gated_layers=tuple(f"layer{gate}" for gate in range(num_gates)),
            candidates=candidates,
            sharing=sharing,
            parameters=1,
            single_path_parameters=1,
        ),
        input=InputFormat(
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            range=(0.0, 1.0),
            mean=(0.0,) * shape[0],
            std=(1.0,) * shape[0],
            resize="nearest",
        ),
        classes=tuple(f"class{number}" for number in range(classes)),
        paths=Paths(single="0" * num_gates, ensemble=()),
        variants=("gated",),
        training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="Not trained"),
        results=(),
        files={},
    )


def exported(build: Callable[[], Any], candidates: int, sharing: str) -> Case:
    """A random gated network whose BatchNorms have seen something, exported."""
    torch = pytest.importorskip("torch")
    from zoo.export import onnx_graphs
    from zoo.gates.rgn import randomly_gate

    torch.manual_seed(0)
    rgn = randomly_gate(build(), candidates=candidates, sharing=sharing)
    for module in rgn.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    rgn.eval()
    graph = onnx_graphs.rgn_graphs(rgn, None, [], gated=True)["gated"]
    shape = tuple(rgn.template.image_shape)
    with torch.no_grad():
        classes = rgn(torch.zeros(1, *shape), [0] * rgn.num_gates).shape[1]
    return Case(graph, card_of(shape, rgn.num_gates, candidates, classes, sharing))


def network(name: str, *, size: int = 16, image: Mapping[str, Any] = {}, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        from zoo.networks import ImageFormat, build

        return build(name, images=ImageFormat(height=size, width=size, **image), **options)

    return build


def convolutions_of_every_kind() -> Any:
    """Strides, groups, depth-wise, 1 x 1, max pooling, a flattened end, and channels that fill no block."""
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, padding=1, stride=2, groups=32),
        nn.ReLU(),
        nn.Conv2d(32, 30, 1),
        nn.Sigmoid(),
        nn.Conv2d(30, 16, 3, dilation=2, padding=2),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )
    network.image_shape = (3, 16, 16)
    return network


def linear() -> Case:
    """softmax(pixels @ weights + a bias per gate): no convolution, and the gates enter by `Gather`."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.normal(size=(12, 3)).astype(np.float32), "weights")]
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["sum0"]),
    ]
    for gate in range(4):
        constants.append(numpy_helper.from_array(np.int64(gate), f"index{gate}"))
        constants.append(numpy_helper.from_array(rng.normal(size=(3, 3)).astype(np.float32), f"biases{gate}"))
        nodes += [
            helper.make_node("Gather", ["gates", f"index{gate}"], [f"gate{gate}"]),
            helper.make_node("Gather", [f"biases{gate}", f"gate{gate}"], [f"bias{gate}"]),
            helper.make_node("Add", [f"sum{gate}", f"bias{gate}"], [f"sum{gate + 1}"]),
        ]
    nodes += [
        helper.make_node("Identity", ["sum4"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 2, 2]),
        helper.make_tensor_value_info("gates", TensorProto.INT64, [4]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in OUTPUTS]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return Case(model.SerializeToString(), card_of((3, 2, 2), 4, 3, 3, "independent"))


@functools.cache
def rounded() -> Case:
    """The int8 twin of a gated graph."""
    case = case_of("two candidates")
    from zoo.export.quantize import quantised

    return replace(case, graph=quantised(case.graph, case.images(64)))


CASES: dict[str, Callable[[], Case]] = {
    "bundled": lambda: Case(Bundle.open(BUNDLE).read("gated.onnx"), Bundle.open(BUNDLE).card),
    "two candidates": lambda: exported(network("resnet8"), 2, "independent"),
    "three candidates": lambda: exported(network("resnet8"), 3, "independent"),
    "four candidates": lambda: exported(network("resnet8"), 4, "independent"),
    "shared convolutions": lambda: exported(network("resnet8"), 2, "shared_conv"),
    "too narrow for blocks": lambda: exported(network("resnet8", width=3), 2, "independent"),
    "pre-activation": lambda: exported(network("preact_resnet18", width=8), 2, "independent"),
    "grey lenet": lambda: exported(network("lenet", image=GREY), 3, "independent"),
    "vgg": lambda: exported(network("vgg16", size=32, width=0.25), 2, "independent"),
    "linear": linear,
    "every kind": lambda: exported(convolutions_of_every_kind, 2, "independent"),
}


@functools.cache
def case_of(name: str) -> Case:
    return CASES[name]()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture(scope="module")
def small() -> Case:
    return case_of("two candidates")


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for answer, wanted in zip(found, expected, strict=True):
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


# --- answers ---


@needs_blocks
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_every_network_that_can_be_exported_is_compiled(case: Case, scope: str) -> None:
    opened = case.open(scope)
    assert (opened.form, opened.reason) == ("blocked", "")


@pytest.mark.parametrize("compiled", [True, False])
def test_each_image_of_a_batch_is_answered_along_its_own_path(case: Case, compiled: bool) -> None:
    opened = case.open("image", compiled=compiled)
    for size in BATCHES:
        images, paths = case.images(size), case.paths(size)
        assert_same(opened.run(images, paths), case.expected(images, paths))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_with_one_path_is_answered_along_it(case: Case, compiled: bool) -> None:
    opened = case.open("batch", compiled=compiled)
    for size in BATCHES:
        images, path = case.images(size), case.paths(size)[0]
        assert_same(opened.run(images, path), case.expected(images, np.tile(path, (size, 1))))


@needs_blocks
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_an_int8_graph_answers_as_it_does_with_its_path_fixed(scope: str) -> None:
    onnx = pytest.importorskip("onnx")
    case = rounded()
    opened = case.open(scope)
    assert opened.form == "blocked"
    images, paths = case.images(4), case.paths(4)
    for row, path in enumerate(paths):
        model = onnx.load_from_string(case.graph)
        del model.graph.input[[entry.name for entry in model.graph.input].index("gates")]
        model.graph.initializer.append(onnx.numpy_helper.from_array(path, "gates"))
        expected = open_session(model.SerializeToString(), True).run(OUTPUTS, {"images": images[row : row + 1]})
        found = opened.run(images[row : row + 1], paths[row : row + 1] if scope == "image" else path)
        assert_same(found, tuple(expected))


@needs_blocks
def test_how_a_convolution_is_chosen_changes_no_answer(small: Case) -> None:
    images, paths = small.images(5), small.paths(5)
    for gathered_bytes in (0, 10_000, 10**9):
        graph = gate_compiler.compile_gates(
            small.graph, candidates=2, scope="image", image_shape=images.shape[1:], gathered_bytes=gathered_bytes
        ).graph
        found = open_session(graph, False).run(OUTPUTS, {"images": images, "gates": paths})
        assert_same(tuple(found), small.expected(images, paths))


@needs_blocks
@pytest.mark.parametrize(("name", "candidates"), [("two", 2), ("three", 3), ("four", 4)])
def test_every_candidate_lies_equally_deep_so_that_none_is_reached_sooner(name: str, candidates: int) -> None:
    onnx = pytest.importorskip("onnx")
    case = case_of(f"{name} candidates")
    graph = gate_compiler.compile_gates(
        case.graph, candidates=candidates, scope="image", image_shape=(3, 16, 16), gathered_bytes=0
    ).graph

    def depths(graph: Any) -> set[int]:
        """How many choices are passed on the way to the work, of every choice in the graph."""
        found: set[int] = set()
        for node in graph.node:
            inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            below = set().union(*(depths(branch) for branch in inner)) if inner else set()
            found |= {depth + (node.op_type == "If") for depth in below or {0}} if inner else set()
        return found

    assert depths(onnx.load_from_string(graph).graph) == {1 if candidates == 2 else 2}


# --- the portable form ---


class Session:
    """Passes everything on, counts and remembers the calls, and may change what goes in."""

    def __init__(self, session: Any, change: Callable[[np.ndarray], np.ndarray] = lambda gates: gates) -> None:
        self._session, self._change = session, change
        self.fed: list[np.ndarray] = []

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> Any:
        if "gates" not in inputs:
            return self._session.run(outputs, inputs)
        self.fed.append(inputs["gates"])
        return self._session.run(outputs, {**inputs, "gates": self._change(inputs["gates"])})

    def get_providers(self) -> list[str]:
        return self._session.get_providers()


def assert_portable_and_right(case: Case, opened: GatedGraph, reason: str) -> None:
    assert opened.form == "portable"
    assert reason in opened.reason
    assert "\n" not in opened.reason
    images, paths = case.images(3), case.paths(3)
    if opened.scope == "image":
        assert_same(opened.run(images, paths), case.expected(images, paths))
    else:
        assert_same(opened.run(images, paths[0]), case.expected(images, np.tile(paths[0], (3, 1))))


SCOPES = pytest.mark.parametrize("scope", ["image", "batch"])


@SCOPES
def test_the_compiled_form_can_be_switched_off(small: Case, scope: str) -> None:
    assert_portable_and_right(small, small.open(scope, compiled=False), "switched off")


@SCOPES
def test_without_onnx_the_portable_form_answers(small: Case, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert_portable_and_right(small, small.open(scope), "onnx, which is not installed")


@SCOPES
def test_on_another_processor_the_portable_form_answers(
    small: Case, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert_portable_and_right(small, small.open(scope), "this is aarch64")


@SCOPES
def test_on_a_gpu_the_portable_form_answers(small: Case, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    opened = small.open(scope, open_session=lambda graph, optimise: Session(open_session(graph, optimise)))
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert_portable_and_right(small, opened, "runs on CUDAExecutionProvider")


@needs_blocks
@SCOPES
def test_without_a_folder_to_write_to_the_portable_form_answers(
    small: Case, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system", "/tmp/secret")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    opened = small.open(scope)
    assert_portable_and_right(small, opened, "a temporary folder to write to (Read-only file system)")
    assert "secret" not in opened.reason


@needs_blocks
@SCOPES
def test_whatever_goes_wrong_in_compiling_the_portable_form_answers(
    small: Case, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("unheard of\nsecond line")

    monkeypatch.setattr(gate_compiler, "compile_gates", fail)
    assert_portable_and_right(small, small.open(scope), "compiling failed: RuntimeError: unheard of")


@needs_blocks
def test_a_gate_without_a_choice_is_not_compiled(small: Case) -> None:
    with pytest.raises(gate_compiler.CannotCompileError, match="nothing to choose from"):
        gate_compiler.compile_gates(small.graph, candidates=1, scope="image", image_shape=(3, 16, 16))


WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "candidates swapped": lambda gates: 1 - gates,
    "one gate ignored": lambda gates: np.where(np.arange(gates.shape[-1]) == 3, 0, gates),
    "gates in another order": lambda gates: gates[..., ::-1].copy(),
    "a neighbour's path": lambda gates: np.roll(gates, 1, axis=0),
}


@needs_blocks
@SCOPES
@pytest.mark.parametrize("wrong", WRONG)
def test_a_compiled_form_that_answers_otherwise_is_not_used(small: Case, scope: str, wrong: str) -> None:
    def open_wrongly(graph: bytes, optimise: bool) -> Any:
        return open_session(graph, optimise) if optimise else Session(open_session(graph, optimise), WRONG[wrong])

    assert_portable_and_right(small, small.open(scope, open_session=open_wrongly), "answers differently")


@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_is_one_call_of_onnx_runtime(small: Case, compiled: bool) -> None:
    sessions: list[Session] = []

    def spy(graph: bytes, optimise: bool) -> Session:
        sessions.append(Session(open_session(graph, optimise)))
        return sessions[-1]

    opened = small.open("image", compiled=compiled, open_session=spy)
    for session in sessions:
        session.fed.clear()
    paths = small.paths(8)
    opened.run(small.images(8), paths)
    (fed,) = [fed for session in sessions for fed in session.fed]
    assert np.array_equal(fed, paths)


def test_the_first_session_is_opened_for_the_graph_itself(small: Case) -> None:
    calls: list[tuple[bytes, bool]] = []

    def spy(graph: bytes, optimise: bool) -> Any:
        calls.append((graph, optimise))
        return open_session(graph, optimise)

    small.open("image", open_session=spy)
    assert calls[0] == (small.graph, True)
    with pytest.raises(ZeroDivisionError):
        small.open("image", open_session=lambda graph, optimise: 1 / 0)


# --- what stays secret ---


@pytest.mark.parametrize("compiled", [True, False])
def test_an_error_of_onnx_runtime_hides_every_number(small: Case, compiled: bool) -> None:
    opened = small.open("image", compiled=compiled)
    with pytest.raises(RuntimeError, match="the gated graph failed") as caught:
        opened.run(np.zeros((2, 3, 5, 7), dtype=np.float32)[:, :2], small.paths(2))
    assert not any(character.isdigit() for character in str(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def chi_square(counts: np.ndarray) -> float:
    """By how many standard deviations the counts are further from uniform than chance makes them."""
    expected = counts.sum(axis=-1, keepdims=True) / counts.shape[-1]
    freedom = counts[..., 0].size * (counts.shape[-1] - 1)
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def assert_uniform(paths: np.ndarray, candidates: int) -> None:
    """Each gate, each pair of gates of an image, and each gate of images that follow one another."""
    width, rows = candidates**2, range(paths.shape[1])
    pairs = paths * candidates + np.roll(paths, 1, axis=1)
    followers = paths[1:] * candidates + paths[:-1]
    for values, sides in ((paths, candidates), (pairs, width), (followers, width)):
        counts = np.stack([np.bincount(values[:, gate], minlength=sides) for gate in rows])
        assert counts.shape == (len(rows), sides)
        assert abs(chi_square(counts)) < 6


@pytest.mark.parametrize("candidates", [2, 3, 5, 7])
def test_gates_are_uniform_and_independent(candidates: int) -> None:
    assert_uniform(SystemGates(9, candidates)(100_000), candidates)


def test_a_bias_of_one_per_cent_would_be_seen() -> None:
    paths = SystemGates(9, 2)(100_000)
    paths[::100] = 0
    with pytest.raises(AssertionError):
        assert_uniform(paths, 2)


def test_the_gates_that_onnx_runtime_is_fed_over_100_000_images_are_uniform() -> None:
    case = linear()
    sessions: list[Session] = []

    def spy(graph: bytes, optimise: bool) -> Session:
        sessions.append(Session(open_session(graph, optimise)))
        return sessions[-1]

    opened = case.open("image", open_session=spy)
    for session in sessions:
        session.fed.clear()
    draw = SystemGates(case.num_gates, 3)
    images = case.images(1000)
    for _ in range(100):
        opened.run(images, draw(1000))
    assert_uniform(np.concatenate([fed for session in sessions for fed in session.fed]), 3)


def test_a_number_of_candidates_that_no_card_has_is_refused() -> None:
    with pytest.raises(BadInput, match="0 candidates per gate, expected 1 to 1024"):
        SystemGates(3, 0)


FORK = """
import os, sys
from serving.engine.gates import SystemGates
draw = SystemGates(256, 2)
draw(1)
for _ in range(3):
    if os.fork() == 0:
        print("".join(map(str, draw(1)[0])), flush=True)
        os._exit(0)
    os.wait()
print("".join(map(str, draw(1)[0])), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_draw_other_gates() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.split()
    assert len(lines) == 4
    assert len({*lines}) == 4


def test_threads_that_share_a_source_draw_other_gates() -> None:
    draw = SystemGates(256, 2)
    drawn: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(row.tobytes() for row in draw(50)), name=str(n)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 200
    assert len({*drawn}) == 200


@needs_blocks
def test_threads_that_share_a_graph_get_the_answers_to_their_own_images(small: Case) -> None:
    opened = small.open("image")
    images, paths = small.images(16), small.paths(16)
    expected = small.expected(images, paths)
    wrong: list[int] = []

    def ask(row: int) -> None:
        mine = slice(row, row + 2)
        for _ in range(20):
            probabilities, logits = opened.run(images[mine], paths[mine])
            if not (np.allclose(probabilities, expected[0][mine], atol=1e-5) and logits.shape[0] == 2):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(row,)) for row in (0, 4, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
