"""Multi-exit models: which exit answers, who may choose it, and how an answer tells."""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from serving.answers import Prediction, Predictor
from serving.engine.engine import Engine
from serving.engine.exits import LAST_EXIT, ExitChoice, read_confidence, read_exit
from serving.engine.graphs import graph_files
from serving.errors import RequestError
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.protocol.choices import Choices
from serving.protocol.open_inference import Codec
from serving.scheduling.queue import Queue
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.service import Model
from serving.server import build, serve
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card, Exit, Paths
from zoo.errors import BadInput, BundleError

ROOT = Path(__file__).parents[2]
EXITS, SHAPE = 3, (3, 4, 4)
LOGITS, PROBABILITIES = ("logits", "probabilities")
WEIGHTS = [(0.4 * np.random.default_rng(k).normal(size=(48, 3))).astype(np.float32) for k in range(EXITS)]
CONFIDENCE = 0.8
INF = float("inf")


def at_every_exit(images: np.ndarray) -> np.ndarray:
    """Return probabilities (exit, image, class)."""
    logits = np.stack([images.reshape(len(images), -1) @ weights for weights in WEIGHTS])
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def first_confident(images: np.ndarray, *confidence: float) -> np.ndarray:
    """Return which exit, from 1, is the first whose largest probability reaches its confidence, else the last."""
    sure = at_every_exit(images)[:-1].max(axis=-1) >= np.array(confidence)[:, np.newaxis]
    return np.where(sure.any(axis=0), sure.argmax(axis=0), EXITS - 1) + 1


def info(name: str, kind: int, shape: list[Any] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> bytes:
    graph = helper.make_graph(nodes, "exits", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def whole_graph() -> bytes:
    """The last exit of a batch, and the logits of all exits."""
    nodes = [helper.make_node("Flatten", ["images"], ["flat"])]
    for k in range(EXITS):
        nodes += [
            helper.make_node("MatMul", ["flat", f"weights{k}"], [f"logits{k}"]),
            helper.make_node("Unsqueeze", [f"logits{k}", "one"], [f"row{k}"]),
        ]
    nodes += [
        helper.make_node("Concat", [f"row{k}" for k in range(EXITS)], ["exit_logits"], axis=1),
        helper.make_node("Identity", [f"logits{EXITS - 1}"], [LOGITS]),
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=1),
    ]
    constants = [numpy_helper.from_array(weights, f"weights{k}") for k, weights in enumerate(WEIGHTS)]
    constants.append(numpy_helper.from_array(np.array([1]), "one"))
    outputs = [info(name, TensorProto.FLOAT, ["batch", 3]) for name in (LOGITS, PROBABILITIES)]
    outputs.append(info("exit_logits", TensorProto.FLOAT, ["batch", EXITS, 3]))
    return model_of(nodes, [info("images", TensorProto.FLOAT, ["batch", *SHAPE])], outputs, constants)


def early_exit_graph(*, broken_from: int = EXITS, told: tuple[int, ...] = (0, 1, 2), num_limits: int = 2) -> bytes:
    """One image, stage by stage in nested `If`s; from stage `broken_from` on computing anything is an error."""

    def stage(k: int) -> tuple[list[Any], list[str]]:
        nodes = [helper.make_node("MatMul", ["flat", f"weights{k}"], [f"raw{k}"])]
        if k >= broken_from:
            nodes += [
                helper.make_node("ReduceMax", ["flat"], [f"brightest{k}"], keepdims=0),
                helper.make_node("Cast", [f"brightest{k}"], [f"dark{k}"], to=TensorProto.INT64),
                helper.make_node("Add", [f"dark{k}", "far"], [f"outside{k}"]),
                helper.make_node("Gather", ["far", f"outside{k}"], [f"nothing{k}"]),
                helper.make_node("Cast", [f"nothing{k}"], [f"shift{k}"], to=TensorProto.FLOAT),
                helper.make_node("Add", [f"raw{k}", f"shift{k}"], [f"logits{k}"]),
            ]
        else:
            nodes.append(helper.make_node("Identity", [f"raw{k}"], [f"logits{k}"]))
        nodes += [
            helper.make_node("Softmax", [f"logits{k}"], [f"probabilities{k}"], axis=1),
            helper.make_node("Identity", [f"told{k}"], [f"exit{k}"]),
        ]
        own = [f"logits{k}", f"probabilities{k}", f"exit{k}"]
        if k == EXITS - 1:
            return nodes, own
        leaving = [f"{name}_leaving" for name in own]
        leave = [helper.make_node("Identity", [name], [left]) for name, left in zip(own, leaving, strict=True)]
        later, later_names = stage(k + 1)
        answered = [f"{name}_answered" for name in own]
        branches = {"then_branch": branch(leave, leaving), "else_branch": branch(later, later_names)}
        nodes += [
            helper.make_node("ReduceMax", [f"probabilities{k}"], [f"top{k}"], keepdims=0),
            helper.make_node("Gather", ["limits", f"index{k}"], [f"limit{k}"]),
            helper.make_node("GreaterOrEqual", [f"top{k}", f"limit{k}"], [f"sure{k}"]),
            helper.make_node("If", [f"sure{k}"], answered, **branches),
        ]
        return nodes, answered

    def branch(nodes: list[Any], names: list[str]) -> Any:
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
        outputs = [info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
        return helper.make_graph(nodes, "branch", [], outputs)

    nodes, names = stage(0)
    wanted = (LOGITS, PROBABILITIES, "exit")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        *nodes,
        *(helper.make_node("Identity", [name], [output]) for name, output in zip(names, wanted, strict=True)),
    ]
    constants = [numpy_helper.from_array(weights, f"weights{k}") for k, weights in enumerate(WEIGHTS)]
    constants += [numpy_helper.from_array(np.array([told[k]]), f"told{k}") for k in range(EXITS)]
    constants += [numpy_helper.from_array(np.int64(k), f"index{k}") for k in range(EXITS)]
    constants.append(numpy_helper.from_array(np.array([1_000_000]), "far"))
    inputs = [info("images", TensorProto.FLOAT, [1, *SHAPE]), info("limits", TensorProto.FLOAT, [num_limits])]
    outputs = [info(name, TensorProto.FLOAT, [1, 3]) for name in wanted[:2]] + [info("exit", TensorProto.INT64, [1])]
    return model_of(nodes, inputs, outputs, constants)


@pytest.fixture
def exits_card(card: Card) -> Card:
    plain = replace(card.architecture, gated_layers=(), candidates=1, sharing=None)
    return replace(
        card,
        name="leaver",
        architecture=plain,
        paths=Paths(single=None, ensemble=()),
        variants=("single",),
        exits=tuple(Exit(macs=144 * (k + 1)) for k in range(EXITS)),
    )


@pytest.fixture
def exits_bundle(tmp_path: Path, exits_card: Card) -> Bundle:
    return with_early_graph(tmp_path / "leaver", exits_card, early_exit_graph())


def with_early_graph(folder: Path, card: Card, early: bytes) -> Bundle:
    return write_bundle(folder, card, {"single.onnx": whole_graph(), "early_exit.onnx": early})


@pytest.fixture
def exits_application(exits_bundle: Bundle) -> Callable[..., Application]:
    """Return a function from settings to an application of the multi-exit model."""

    def build_exits(**settings: Any) -> Application:
        return build(Settings(**{"threads": 2, "models": (f"local-dir:{exits_bundle.folder}",), **settings}))

    return build_exits


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(7).random((40, *SHAPE), dtype=np.float32)


def ask(application: Application, body: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(application)
        async with application.running(), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await body(client)

    asyncio.run(main())


def document(images: np.ndarray, *outputs: str, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [tensor], "outputs": [{"name": name} for name in outputs], "parameters": parameters}


def png_of(image: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return a file and the very pixels that are in it."""
    levels = (image * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels.transpose(1, 2, 0)).save(stream, format="PNG")
    return stream.getvalue(), levels[np.newaxis].astype(np.float32) / 255


# --- what a choice means ---


@pytest.mark.parametrize(
    ("choice", "limits"),
    [
        (LAST_EXIT, [INF, INF]),
        (ExitChoice(exit=1), [-INF, -INF]),
        (ExitChoice(exit=2), [INF, -INF]),
        (ExitChoice(exit=3), [INF, INF]),
        (ExitChoice(confidence=0.5), [0.5, 0.5]),
        (ExitChoice(confidence=(0.75, 0.5)), [0.75, 0.5]),
        (ExitChoice(confidence=[1.0, 1]), [1.0, 1.0]),
        (ExitChoice(confidence=(INF, 0.5)), [INF, 0.5]),
        (ExitChoice(confidence=np.float32(0.25)), [0.25, 0.25]),  # type: ignore[arg-type]
    ],
)
def test_a_choice_becomes_one_limit_per_exit_but_the_last(choice: ExitChoice, limits: list[float]) -> None:
    made = choice.limits("leaver", EXITS)
    assert made.dtype == np.float32
    assert made.tolist() == limits


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"exit": 0}, "exit is 0, expected 1 to 3, the exits of leaver"),
        ({"exit": 4}, "exit is 4, expected 1 to 3"),
        ({"exit": -1}, "exit is -1, expected 1 to 3"),
        ({"exit": 10**4000}, "expected 1 to 3"),
        ({"exit": True}, "exit is True, expected a whole number; the first exit is 1"),
        ({"exit": 1.0}, r"exit is 1\.0, expected a whole number"),
        ({"exit": "1"}, "exit is '1', expected a whole number"),
        ({"confidence": 0}, "confidence is 0, expected a number above 0 and up to 1"),
        ({"confidence": 0.0}, r"confidence is 0\.0, expected"),
        ({"confidence": -0.1}, r"confidence is -0\.1, expected"),
        ({"confidence": 90}, r"confidence is 90, expected a number above 0 and up to 1, like 0\.9"),
        ({"confidence": 1.0000001}, r"confidence is 1\.0000001, expected"),
        ({"confidence": float("nan")}, "confidence is nan, expected"),
        ({"confidence": INF}, "confidence is inf, expected"),
        ({"confidence": True}, "confidence is True, expected"),
        ({"confidence": {}}, "confidence is {}, expected"),
        ({"confidence": ["0.9", 0.8]}, r"confidence is '0\.9', expected"),
        ({"confidence": (0.9, 2)}, "confidence is 2, expected"),
        ({"confidence": (0.9, -INF)}, "confidence is -inf, expected"),
        ({"confidence": (0.9,)}, "confidence has 1 numbers, expected one, or 2: one per exit of leaver but the last"),
        ({"confidence": (0.9, 0.8, 0.7)}, "confidence has 3 numbers, expected one, or 2"),
        ({"confidence": []}, "confidence has 0 numbers"),
        ({"exit": 1, "confidence": 0.9}, r"exit 1 and confidence 0\.9 were both given; leave one out"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused_with_what_was_expected(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refusal:
        ExitChoice(**chosen).limits("leaver", EXITS)
    assert len(str(refusal.value)) < 200


def test_the_words_of_a_command_line_or_a_url_are_read_into_the_same_choice() -> None:
    assert read_exit("2") == 2
    assert read_confidence("0.9") == 0.9
    assert read_confidence("0.9, 0.8") == (0.9, 0.8)
    assert read_confidence("inf,0.8") == (INF, 0.8)
    for text in ("", "one", "-1", "1.0", "²", "9" * 5000):
        with pytest.raises(BadInput, match=r"exit is '.*', expected a whole number"):
            read_exit(text)
    for text in ("", "high", "0.9,", "0.9;0.8", "0.5," * 1000):
        with pytest.raises(BadInput, match=r"confidence is '.*', expected numbers like"):
            read_confidence(text)


# --- the engine ---


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_a_chosen_exit_answers_every_image(exits_bundle: Bundle, images: np.ndarray, chosen: int) -> None:
    answer = Engine(exits_bundle, exit_choice=ExitChoice(exit=chosen)).predict(images)
    assert answer.exits.tolist() == [chosen] * 40
    assert answer.exits.dtype == np.int64
    assert answer.probabilities == pytest.approx(at_every_exit(images)[chosen - 1], abs=1e-5)
    assert np.exp(answer.logits) / np.exp(answer.logits).sum(axis=1, keepdims=True) == pytest.approx(
        answer.probabilities, abs=1e-5
    )


@pytest.mark.parametrize("confidence", [CONFIDENCE, (0.95, 0.6)])
def test_with_a_confidence_each_image_leaves_at_the_first_exit_that_reaches_it(
    exits_bundle: Bundle, images: np.ndarray, confidence: Any
) -> None:
    answer = Engine(exits_bundle, exit_choice=ExitChoice(confidence=confidence)).predict(images)
    each = confidence if isinstance(confidence, tuple) else (confidence,) * 2
    expected = first_confident(images, *each)
    assert set(expected) == {1, 2, 3}, "the images are too alike to tell"
    assert answer.exits.tolist() == expected.tolist()
    assert answer.probabilities == pytest.approx(at_every_exit(images)[expected - 1, np.arange(40)], abs=1e-5)


def test_an_exit_answers_at_exactly_its_confidence_and_not_a_hair_below(
    exits_bundle: Bundle, images: np.ndarray
) -> None:
    engine = Engine(exits_bundle, any_exit=True)
    first = ExitChoice(exit=1).limits("leaver", EXITS)
    top = engine.predict(images[:1], first[np.newaxis]).probabilities.max()
    exactly, above = np.array([[top, 1.0]]), np.array([[np.nextafter(top, np.float32(2)), 1.0]])
    assert engine.predict(images[:1], exactly.astype(np.float32)).exits.tolist() == [1]
    assert engine.predict(images[:1], above.astype(np.float32)).exits.tolist() == [3]


@pytest.mark.parametrize("chosen", [1, 2])
def test_stages_behind_the_exit_that_answers_are_not_computed(
    tmp_path: Path, exits_card: Card, images: np.ndarray, chosen: int
) -> None:
    bundle = with_early_graph(tmp_path / "broken", exits_card, early_exit_graph(broken_from=chosen))
    engine = Engine(bundle, exit_choice=ExitChoice(exit=chosen), any_exit=True)
    assert engine.predict(images).exits.tolist() == [chosen] * 40
    next_exit = np.array([[INF, -INF if chosen == 1 else 0.9999]], dtype=np.float32)
    with pytest.raises(Exception, match="out of data bounds"):  # so it would have been noticed
        engine.predict(images[:1], next_exit)


def test_the_last_exit_is_the_default_and_the_very_answer_of_the_batched_graph(
    exits_bundle: Bundle, images: np.ndarray
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exits_bundle.read("single.onnx"), providers=["CPUExecutionProvider"])
    probabilities, logits = session.run([PROBABILITIES, LOGITS], {"images": images})
    for options in ({}, {"exit_choice": ExitChoice(exit=3)}, {"any_exit": True}):
        engine = Engine(exits_bundle, **options)
        engine.warm_up(4)
        answer = engine.predict(images)
        assert np.array_equal(answer.probabilities, probabilities)
        assert np.array_equal(answer.logits, logits)
        assert answer.exits.tolist() == [3] * 40


@pytest.mark.parametrize(
    ("choice", "any_exit", "files"),
    [
        (LAST_EXIT, False, ["single.onnx"]),
        (ExitChoice(exit=3), False, ["single.onnx"]),
        (ExitChoice(exit=2), False, ["early_exit.onnx"]),
        (ExitChoice(confidence=1.0), False, ["early_exit.onnx"]),
        (LAST_EXIT, True, ["single.onnx", "early_exit.onnx"]),
        (ExitChoice(exit=1), True, ["single.onnx", "early_exit.onnx"]),
    ],
)
def test_only_the_graphs_that_may_answer_are_needed(
    exits_bundle: Bundle,
    load_model: Callable[..., Model],
    images: np.ndarray,
    choice: ExitChoice,
    any_exit: bool,
    files: list[str],
) -> None:
    assert graph_files(exits_bundle.card, ["single"], choice, any_exit=any_exit) == files
    for file in {"single.onnx", "early_exit.onnx"}.difference(files):
        exits_bundle.file(file).unlink()
    settings = Settings(threads=1, allow_exit_choice=any_exit)
    confidence = () if choice.confidence is None else (choice.confidence,)
    model = load_model(exits_bundle.folder, settings, exit=choice.exit or 0, confidence=confidence)
    assert len(model.predictor.predict(images).probabilities) == 40


def test_images_with_different_limits_share_a_batch(exits_bundle: Bundle, images: np.ndarray) -> None:
    engine = Engine(exits_bundle, any_exit=True)
    choices = [LAST_EXIT, ExitChoice(exit=1), ExitChoice(exit=2), ExitChoice(confidence=CONFIDENCE)]
    limits = np.stack([choices[row % 4].limits("leaver", EXITS) for row in range(40)])
    answer = engine.predict(images, limits)
    confident = first_confident(images, CONFIDENCE, CONFIDENCE)
    expected = np.array([(3, 1, 2, confident[row])[row % 4] for row in range(40)])
    assert answer.exits.tolist() == expected.tolist()
    assert answer.probabilities == pytest.approx(at_every_exit(images)[expected - 1, np.arange(40)], abs=1e-5)
    for row in range(4):
        alone = engine.predict(images[row : row + 1], limits[row : row + 1])
        assert alone.logits == pytest.approx(answer.logits[row : row + 1], abs=1e-5)


def test_an_engine_that_has_only_its_last_exit_refuses_to_answer_for_another(
    exits_bundle: Bundle, images: np.ndarray
) -> None:
    engine = Engine(exits_bundle)
    assert engine.predict(images[:1], np.full((1, 2), np.inf, np.float32)).exits.tolist() == [3]
    with pytest.raises(BadInput, match="leaver was loaded for its last exit only"):
        engine.predict(images[:1], np.full((1, 2), 0.5, np.float32))


@pytest.mark.parametrize("choice", [{"exit": 1}, {"confidence": (0.9,)}])
def test_a_model_with_one_exit_has_none_to_choose(
    bundle_dir: Path, load_model: Callable[..., Model], choice: dict[str, Any]
) -> None:
    for mode in ("single", "ensemble", "random"):
        with pytest.raises(BadInput, match=r"(exit 1|confidence 0\.9) was given, but tiny has only one exit; leave it"):
            load_model(bundle_dir, mode=mode, **choice)
    model = load_model(bundle_dir, Settings(threads=1, allow_exit_choice=True), mode="single")
    assert model.limits is None
    assert model.predictor.predict(np.zeros((2, *SHAPE), np.float32)).exits is None


def test_an_operator_who_names_a_missing_exit_or_another_mode_is_told_so(
    exits_bundle: Bundle, load_model: Callable[..., Model]
) -> None:
    with pytest.raises(BadInput, match="exit is 4, expected 1 to 3, the exits of leaver"):
        load_model(exits_bundle.folder, exit=4)
    with pytest.raises(BadInput, match=r"mode 'random'.*only the modes single"):
        load_model(exits_bundle.folder, mode="random", exit=1)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (lambda: early_exit_graph(num_limits=4), r"'limits' is tensor\(float\) \[4\], expected tensor\(float\) \[2\]"),
        (lambda: early_exit_graph(told=(0, 0, 2)), r"exit \[1\] answers where 2 was asked; export it again"),
        (lambda: early_exit_graph(told=(0, 1, 1)), r"exit \[2\] answers where 3 was asked; export it again"),
        (whole_graph, r"inputs \['images'\], expected \['images', 'limits'\]"),
    ],
)
def test_a_graph_whose_exits_are_not_the_cards_is_refused(
    tmp_path: Path, exits_card: Card, graph: Callable[[], bytes], said: str
) -> None:
    bundle = with_early_graph(tmp_path / "other", exits_card, graph())
    with pytest.raises(BundleError, match=said):
        Engine(bundle, exit_choice=ExitChoice(exit=1)).warm_up(1)


# --- the queue ---


def test_limits_travel_with_their_images_through_shared_and_cut_batches() -> None:
    batches: list[np.ndarray] = []

    class Mirror(Predictor):
        """Answers each image with its own first pixel and limit."""

        def predict(self, images: np.ndarray, limits: np.ndarray | None = None, *_: Any, **__: Any) -> Prediction:
            assert limits is not None
            batches.append(limits)
            marks = images[:, 0, 0]
            return Prediction(limits, marks, marks[:, 0].astype(np.int64))

    async def one(scheduler: Scheduler, queue: Queue, mark: int, rows: int) -> None:
        images = np.full((rows, 1, 1, 1), mark, dtype=np.float32)
        limits = np.arange(rows, dtype=np.float32)[:, np.newaxis] + 100 * mark
        answer = await scheduler.submit(queue, images, limits)
        assert answer.probabilities.tolist() == limits.tolist()
        assert answer.exits is not None
        assert answer.exits.tolist() == [mark] * rows

    async def main() -> None:
        scheduler = Scheduler(2)
        queue = Queue(Mirror(), max_batch=8, max_queue=10_000)
        scheduler.start()
        scheduler.open(queue)
        await asyncio.gather(*(one(scheduler, queue, mark, (1, 2, 20)[mark % 3]) for mark in range(60)))
        await scheduler.close(queue, 5)
        scheduler.stop()

    asyncio.run(main())
    assert any(len(set((limits // 100).ravel())) > 1 for limits in batches), "no batch was shared"


# --- over the protocol ---


def test_the_metadata_of_a_multi_exit_model_lists_the_exit_and_that_of_others_does_not(
    exits_card: Card, card: Card
) -> None:
    outputs = Codec(exits_card, max_rows=4).metadata()["outputs"]
    assert outputs == [
        {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, 3]},
        {"name": LOGITS, "datatype": "FP32", "shape": [-1, 3]},
        {"name": "exit", "datatype": "INT64", "shape": [-1]},
    ]
    assert Codec(card, max_rows=4).metadata()["outputs"] == outputs[:2]
    with pytest.raises(RequestError, match="unknown output 'exit'; tiny has probabilities, logits"):
        Codec(card, max_rows=4).decode(json.dumps(document(np.zeros((1, *SHAPE)), "exit")).encode(), None)


def test_an_answer_names_the_exit_only_if_the_request_asked_for_it(
    exits_application: Callable[..., Application], images: np.ndarray
) -> None:
    expected = first_confident(images, CONFIDENCE, CONFIDENCE).tolist()

    async def body(client: httpx.AsyncClient) -> None:
        url = "/v2/models/leaver/infer"
        plain = (await client.post(url, json=document(images))).json()
        assert [output["name"] for output in plain["outputs"]] == [PROBABILITIES, LOGITS]
        asked = (await client.post(url, json=document(images, "exit", LOGITS))).json()["outputs"]
        assert [output["name"] for output in asked] == ["exit", LOGITS]
        assert asked[0] == {"name": "exit", "datatype": "INT64", "shape": [40], "data": expected}
        raw = await client.post(url, content=images.tobytes(), headers={"inference-header-content-length": "0"})
        assert b'"exit"' not in raw.content
        assert (await client.get("/")).json()["models"][0]["exits"] == 3

    ask(exits_application(confidence=(CONFIDENCE,)), body)


def test_a_binary_answer_holds_the_exit_as_little_endian_int64(exits_card: Card) -> None:
    codec = Codec(exits_card, max_rows=4)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for mixed in (False, True):  # all outputs in binary take a shorter way than some
        asked = document(np.zeros((2, *SHAPE)), "exit", PROBABILITIES, LOGITS, binary_data_output=True)
        asked["outputs"][2]["parameters"] = {"binary_data": not mixed}
        request = codec.decode(json.dumps(asked).encode(), None)
        headers, body = codec.encode(request, Prediction(values, -values, np.array([2, 1])))
        head_length = int(dict(headers)[b"inference-header-content-length"])
        head, tensors = json.loads(body[:head_length]), body[head_length:]
        assert int(dict(headers)[b"content-length"]) == len(body)
        exit_form = {"name": "exit", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}}
        assert head["outputs"][0] == exit_form
        assert head["outputs"][1]["parameters"] == {"binary_data_size": 24}
        assert np.frombuffer(tensors[:16], "<i8").tolist() == [2, 1]
        assert np.array_equal(np.frombuffer(tensors[16:40], "<f4").reshape(2, 3), values)
        assert len(tensors) == (40 if mixed else 64)


@pytest.mark.parametrize(
    ("parameters", "confidence"),
    [
        ({"exit": 1}, None),
        ({"exit": 2}, None),
        ({"exit": 3}, None),
        ({"confidence": CONFIDENCE}, (CONFIDENCE, CONFIDENCE)),
        ({"confidence": [0.95, 0.6]}, (0.95, 0.6)),
        ({"confidence": "0.95,0.6"}, (0.95, 0.6)),
        ({}, (0.9, 0.9)),
        ({"exit": None, "confidence": None}, (0.9, 0.9)),
    ],
)
def test_a_request_chooses_its_exit_where_the_operator_allows_it(
    exits_application: Callable[..., Application], images: np.ndarray, parameters: dict[str, Any], confidence: Any
) -> None:
    expected = [parameters["exit"]] * 40 if confidence is None else first_confident(images, *confidence).tolist()

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v2/models/leaver/infer", json=document(images, "exit", **parameters))
        assert answer.json()["outputs"][0]["data"] == expected

    ask(exits_application(confidence=(0.9,), allow_exit_choice=True), body)


def test_a_remembered_header_does_not_remember_anothers_exit(exits_card: Card) -> None:
    codec = Codec(exits_card, Choices(exits_card, may_choose_exit=True), max_rows=4)
    for chosen in (1, 3, None, 2, 1):
        asked = document(np.zeros((1, *SHAPE)), exit=chosen)
        del asked["inputs"][0]["data"]
        asked["inputs"][0]["parameters"] = {"binary_data_size": 192}
        head = json.dumps(asked).encode()
        limits = codec.decode(head + bytes(192), str(len(head)).encode()).form.asked.limits
        wanted = None if chosen is None else ExitChoice(exit=chosen).limits("leaver", EXITS).tolist()
        assert (None if limits is None else limits.tolist()) == wanted


def test_concurrent_requests_with_exits_of_their_own_each_get_them(
    exits_application: Callable[..., Application], images: np.ndarray
) -> None:
    truth = at_every_exit(images)

    async def one(client: httpx.AsyncClient, row: int) -> None:
        asked = document(
            images[row : row + 1], "exit", PROBABILITIES, **({} if row % 4 == 3 else {"exit": row % 4 + 1})
        )
        outputs = (await client.post("/v2/models/leaver/infer", json=asked)).json()["outputs"]
        answered = 3 if row % 4 == 3 else row % 4 + 1
        assert outputs[0]["data"] == [answered]
        assert outputs[1]["data"] == pytest.approx(truth[answered - 1, row], abs=1e-5)

    async def body(client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(one(client, row) for row in range(40)))

    ask(exits_application(allow_exit_choice=True), body)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"exit": 4}, "exit is 4, expected 1 to 3, the exits of leaver"),
        ({"exit": "2"}, "exit is '2', expected a whole number"),
        ({"exit": [1]}, "exit is [1], expected a whole number"),
        ({"exit": False}, "exit is False, expected a whole number"),
        ({"confidence": 1.5}, "confidence is 1.5, expected a number above 0 and up to 1"),
        ({"confidence": 0}, "confidence is 0, expected"),
        ({"confidence": "high"}, "confidence is 'high', expected numbers like"),
        ({"confidence": [0.9] * 50}, "confidence has 50 numbers, expected one, or 2"),
        ({"exit": 1, "confidence": 0.9}, "exit 1 and confidence 0.9 were both given; leave one out"),
    ],
)
def test_a_request_that_chooses_nonsense_is_refused(exits_card: Card, parameters: dict[str, Any], said: str) -> None:
    codec = Codec(exits_card, Choices(exits_card, may_choose_exit=True), max_rows=4)
    with pytest.raises(RequestError) as refusal:
        codec.decode(json.dumps(document(np.zeros((1, *SHAPE)), **parameters)).encode(), None)
    assert refusal.value.status == 400
    assert said in str(refusal.value)


@pytest.mark.parametrize("parameters", [{"exit": 1}, {"confidence": 0.5}, {"exit": "x", "confidence": 7}])
def test_a_request_that_may_not_choose_is_refused_in_one_sentence(
    exits_application: Callable[..., Application], images: np.ndarray, parameters: dict[str, Any]
) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v2/models/leaver/infer", json=document(images, **parameters))
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            f"the request chooses by {next(iter(parameters))!r}, but here the server chooses which exit answers; leave "
            "it out (the operator may allow it with MANYGATES_SERVE_ALLOW_EXIT_CHOICE=true)"
        )

    ask(exits_application(), body)


@pytest.mark.parametrize("name", ["exit", "confidence"])
def test_a_request_to_a_model_with_one_exit_cannot_choose_even_where_others_may(
    tiny_application: Callable[..., Application], images: np.ndarray, name: str
) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v2/models/tiny/infer", json=document(images, **{name: 1}))
        assert answer.status_code == 400
        said = f"the request chooses by {name!r}, but tiny has only one exit; leave it out"
        assert answer.json()["error"] == said
        classified = await client.post(f"/classify?{name}=1", content=png_of(images[0])[0])
        assert (classified.status_code, classified.json()["error"]) == (400, said)
        assert "exit" not in (await client.post("/classify", content=png_of(images[0])[0])).json()
        assert "exits" not in (await client.get("/")).json()["models"][0]
        assert "manygates_exit_answers_total{" not in (await client.get("/metrics")).text

    ask(tiny_application("single", allow_exit_choice=True), body)


# --- an image file, the metrics ---


def test_classify_says_which_exit_answered_and_lets_the_url_choose_it(
    exits_application: Callable[..., Application], images: np.ndarray
) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        for image in images[:8]:
            file, pixels = png_of(image)
            default = (await client.post("/classify", content=file)).json()
            assert list(default) == ["model", "mode", "exit", "label", "probabilities"]
            assert default["exit"] == 3
            confident = first_confident(pixels, CONFIDENCE, CONFIDENCE)[0]
            for query, expected in (("exit=1", 1), ("exit=2", 2), (f"confidence={CONFIDENCE}", confident)):
                answer = (await client.post(f"/classify?{query}", files={"image": ("a.png", file)})).json()
                assert answer["exit"] == expected
                truth = at_every_exit(pixels)[expected - 1, 0]
                named = [answer["probabilities"][label] for label in ("cat", "dog", "frog")]
                assert named == pytest.approx(truth, abs=1e-5)
        for query, said in (
            ("exit=0", "exit is 0, expected 1 to 3"),
            ("exit=", "exit is '', expected a whole number"),
            ("confidence=2", "confidence is 2.0, expected"),
            ("confidence=0.9,0.8,0.7", "confidence has 3 numbers"),
            ("confidence=x", "confidence is 'x'"),
            ("exit=1&confidence=0.9", "were both given"),
        ):
            refused = await client.post(f"/classify?{query}", content=file)
            assert refused.status_code == 400
            assert said in refused.json()["error"]

    ask(exits_application(allow_exit_choice=True), body)


def test_classify_refuses_a_choice_that_the_operator_did_not_allow(
    exits_application: Callable[..., Application], images: np.ndarray
) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        file, _ = png_of(images[0])
        refused = await client.post("/classify?exit=1", content=file)
        assert refused.status_code == 400
        assert "here the server chooses which exit answers" in refused.json()["error"]
        assert (await client.post("/classify", content=file)).json()["exit"] == 2

    ask(exits_application(exit=2), body)


def test_the_metrics_count_the_answers_of_each_exit(
    exits_application: Callable[..., Application], images: np.ndarray
) -> None:
    confident = first_confident(images, CONFIDENCE, CONFIDENCE).tolist()
    expected = {1: confident.count(1) + 2, 2: confident.count(2), 3: confident.count(3)}

    async def body(client: httpx.AsyncClient) -> None:
        before = (await client.get("/metrics")).text
        await client.post("/v2/models/leaver/infer", json=document(images))
        await client.post("/v2/models/leaver/infer", json=document(images[:2], exit=1))
        after = (await client.get("/metrics")).text
        for exit, answers in expected.items():
            assert f'manygates_exit_answers_total{{exit="{exit}",model="leaver",version="1"}} 0.0' in before
            assert f'manygates_exit_answers_total{{exit="{exit}",model="leaver",version="1"}} {answers}.0' in after

    ask(exits_application(confidence=(CONFIDENCE,), allow_exit_choice=True), body)


# --- over real sockets ---


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gevent", "ignore::DeprecationWarning:tritonclient")
def test_the_real_tritonclient_chooses_exits_and_reads_which_answered(
    exits_application: Callable[..., Application], serve_in_a_thread: Any, images: np.ndarray, binary: bool
) -> None:
    import tritonclient.http as triton

    with serve_in_a_thread(exits_application(confidence=(CONFIDENCE,), allow_exit_choice=True)) as url:
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        assert client.get_model_metadata("leaver")["outputs"][2] == {"name": "exit", "datatype": "INT64", "shape": [-1]}
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in (PROBABILITIES, "exit")]
        confident, strict = first_confident(images, CONFIDENCE, CONFIDENCE), first_confident(images, 0.95, 0.6)
        for parameters, exits in (
            (None, confident),
            ({"exit": 1}, np.full(40, 1)),
            ({"exit": 3}, np.full(40, 3)),
            ({"confidence": "0.95,0.6"}, strict),
        ):
            answer = client.infer("leaver", [tensor], outputs=outputs, parameters=parameters)
            assert answer.as_numpy("exit").tolist() == exits.tolist()
            assert answer.as_numpy("exit").dtype == np.int64
            truth = at_every_exit(images)[exits - 1, np.arange(40)]
            assert answer.as_numpy(PROBABILITIES) == pytest.approx(truth, abs=1e-5)
        default = client.infer("leaver", [tensor])
        assert default.as_numpy("exit") is None
        with pytest.raises(triton.InferenceServerException, match="exit is 7, expected 1 to 3, the exits of leaver"):
            client.infer("leaver", [tensor], parameters={"exit": 7})
        client.close()


SERVE = """
import sys
from serving.server import serve
from serving.operations.settings import Settings
serve(Settings.resolve({"models": sys.argv[1], "exit": sys.argv[2], "port": 0}))
"""


@pytest.mark.parametrize(("allowed", "status"), [("false", 400), ("true", 200)])
def test_a_server_process_answers_at_the_exit_that_its_operator_chose(
    exits_bundle: Bundle, images: np.ndarray, allowed: str, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, f"local-dir:{exits_bundle.folder}", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MANYGATES_SERVE_ALLOW_EXIT_CHOICE": allowed, "MANYGATES_SERVE_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "manygates serves" in line)
        url = next(word for word in line.split() if word.startswith("http://"))
        file, pixels = png_of(images[0])
        answer = httpx.post(f"{url}/classify", content=file).json()
        assert answer["exit"] == 2
        assert answer["probabilities"]["cat"] == pytest.approx(at_every_exit(pixels)[1, 0, 0], abs=1e-5)
        assert httpx.post(f"{url}/classify?exit=1", content=file).status_code == status
    finally:
        process.kill()
        process.communicate()


def test_a_choice_that_fits_no_model_stops_the_server_before_it_listens(exits_bundle: Bundle) -> None:
    for chosen, said in (
        ({"exit": 1, "confidence": (0.5,)}, "were both given"),
        ({"exit": 9}, "exit is 9, expected 1 to 3"),
        ({"confidence": (0.5, 0.5, 0.5)}, "confidence has 3 numbers, expected one, or 2"),
    ):
        with pytest.raises(BadInput, match=said):
            serve(Settings(models=(f"local-dir:{exits_bundle.folder}",), port=0, **chosen))  # type: ignore[arg-type]


def test_models_with_and_without_exits_are_served_side_by_side(
    exits_bundle: Bundle, bundle_dir: Path, images: np.ndarray
) -> None:
    sources = tuple(f"local-dir:{place}" for place in (exits_bundle.folder, bundle_dir))
    settings = Settings(threads=1, allow_exit_choice=True, models=sources)

    async def body(client: httpx.AsyncClient) -> None:
        file, _ = png_of(images[0])
        assert (await client.post("/classify?exit=1", content=file)).json()["exit"] == 1
        assert "exit" not in (await client.post("/classify?model=tiny", content=file)).json()
        answer = (await client.post("/v2/models/tiny/infer", json=document(images))).json()
        assert [output["name"] for output in answer["outputs"]] == [PROBABILITIES, LOGITS]

    ask(build(settings), body)
