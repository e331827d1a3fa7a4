from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from serving.answers import Plan
from serving.engine.engine import Engine, averaged
from serving.engine.gates import SystemGates
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.errors import BadInput, BundleError, ChecksumMismatch, UnknownName


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).random((5, 3, 4, 4), dtype=np.float32)


def probabilities_of_every_path(bundle: Bundle, images: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    session = onnxruntime.InferenceSession(bundle.read("gated.onnx"), providers=["CPUExecutionProvider"])
    return {
        path: session.run(["probabilities"], {"images": images, "gates": np.array(path, dtype=np.int64)})[0]
        for path in product((0, 1), repeat=2)
    }


@pytest.mark.parametrize(
    ("mode", "graph"), [(None, "single.onnx"), ("single", "single.onnx"), ("ensemble", "ensemble.onnx")]
)
def test_a_fixed_mode_answers_what_onnx_runtime_answers_on_its_graph(bundle_dir: Path, images, mode, graph) -> None:
    bundle = Bundle.open(bundle_dir)
    answer = Engine(bundle, mode).predict(images)
    session = onnxruntime.InferenceSession(bundle.read(graph), providers=["CPUExecutionProvider"])
    probabilities, logits = session.run(["probabilities", "logits"], {"images": images})
    assert np.array_equal(answer.probabilities, probabilities)
    assert np.array_equal(answer.logits, logits)


def test_each_image_of_a_random_batch_is_answered_by_its_own_path(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)
    gates = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 1]])
    answer = Engine(bundle, "random", gate_source=lambda num_images: gates[:num_images]).predict(images)
    every_path = probabilities_of_every_path(bundle, images)
    for row, path in enumerate(gates):
        assert np.allclose(answer.probabilities[row], every_path[tuple(path)][row], atol=1e-6)


def test_identical_random_requests_are_answered_by_different_paths(bundle_dir: Path, images) -> None:
    engine = Engine(Bundle.open(bundle_dir), "random")
    answers = {engine.predict(images[:1]).probabilities.tobytes() for _ in range(64)}
    assert len(answers) == 4  # all of them; missing one has a chance of 4 * 0.75^64 = 4e-8


def test_the_mean_of_many_random_answers_approaches_the_mean_over_all_paths(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)
    engine = Engine(bundle, "random")
    repeated = np.repeat(images[:1], 4000, axis=0)
    mean = engine.predict(repeated).probabilities.mean(axis=0)
    every_path = np.stack([answer[0] for answer in probabilities_of_every_path(bundle, images).values()])
    # five standard errors of the mean of 4000 draws
    assert np.all(np.abs(mean - every_path.mean(axis=0)) < 5 * every_path.std(axis=0) / np.sqrt(4000) + 1e-6)


@pytest.mark.parametrize("candidates", [2, 3, 7])
def test_system_gates_are_uniform_and_independent_of_each_other(candidates: int) -> None:
    gates = SystemGates(2, candidates)(20_000)
    assert gates.shape == (20_000, 2)
    assert gates.dtype == np.int64
    counts = Counter(map(tuple, gates.tolist()))
    expected = 20_000 / candidates**2
    chi_squared = sum((counts[pair] - expected) ** 2 / expected for pair in product(range(candidates), repeat=2))
    degrees = candidates**2 - 1
    assert sum(counts.values()) == 20_000
    assert chi_squared < degrees + 6 * np.sqrt(2 * degrees) + 10  # beyond any plausible chance


def test_two_sources_of_system_gates_differ() -> None:
    assert SystemGates(64, 2)(4).tobytes() != SystemGates(64, 2)(4).tobytes()


def test_warming_up_accepts_a_sound_model(bundle_dir: Path) -> None:
    for mode in ("single", "ensemble", "random"):
        engine = Engine(Bundle.open(bundle_dir), mode)
        engine.warm_up(4)
        assert engine.mode == mode
        assert len(engine.predict(np.zeros((4, 3, 4, 4), np.float32)).probabilities) == 4


def test_an_unknown_mode_is_refused_with_the_known_ones(bundle_dir: Path) -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'random'.*ensemble, random, single"):
        Engine(Bundle.open(bundle_dir), "randon")  # type: ignore[arg-type]


def test_a_mode_whose_variant_is_missing_is_refused_with_what_there_is(tmp_path, make_card, write_bundle_dir) -> None:
    bundle = Bundle.open(write_bundle_dir(tmp_path / "fixed", make_card(variants=("ensemble",))))
    with pytest.raises(BadInput, match=r"mode 'random'.*'gated'.*only the modes ensemble"):
        Engine(bundle, "random")
    assert Engine(bundle).mode == "ensemble"


def test_a_tampered_graph_is_never_loaded(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    graph = bytearray((bundle_dir / "single.onnx").read_bytes())
    graph[-1] ^= 1
    (bundle_dir / "single.onnx").write_bytes(graph)
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx.*sha256"):
        Engine(bundle)


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path, make_card, make_graph) -> None:
    bundle = write_bundle(tmp_path / "broken", make_card(variants=("single",)), {"single.onnx": b"not a graph"})
    with pytest.raises(BundleError, match=r"tiny/single\.onnx"):
        Engine(bundle)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd", "folder/../weights.bin"])
def test_a_graph_that_reads_its_weights_from_another_file_is_refused(
    tmp_path: Path, make_card, make_graph, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    model = onnx.ModelProto.FromString(make_graph(gated=False))
    weights = model.graph.initializer[0]
    content = weights.raw_data
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(content)))):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    for folder in (tmp_path, tmp_path / "bundle", tmp_path / "here"):
        folder.mkdir(exist_ok=True)
        (folder / "weights.bin").write_bytes(content)
    (tmp_path / "bundle" / "weights.bin").unlink()
    monkeypatch.chdir(tmp_path / "here")
    bundle = write_bundle(
        tmp_path / "bundle", make_card(variants=("single",)), {"single.onnx": model.SerializeToString()}
    )
    with pytest.raises(BundleError, match=r"tiny/single\.onnx"):
        Engine(bundle)


def test_a_graph_that_does_not_fit_its_card_is_refused(tmp_path: Path, make_card, make_graph) -> None:
    card = make_card(variants=("single",))
    gated = write_bundle(tmp_path / "gated", card, {"single.onnx": make_graph(gated=True)})
    with pytest.raises(BundleError, match=r"inputs \['gates', 'images'\], expected \['images'\]"):
        Engine(gated)
    wide = replace(card, input=replace(card.input, width=8))
    with pytest.raises(BundleError, match=r"'images' is tensor\(float\).*expected.*8"):
        Engine(write_bundle(tmp_path / "wide", wide, {"single.onnx": make_graph(gated=False)}))
    more_classes = replace(card, classes=("a", "b", "c", "d"))
    engine = Engine(write_bundle(tmp_path / "more", more_classes, {"single.onnx": make_graph(gated=False)}))
    with pytest.raises(BundleError, match=r"shape \(1, 3\), expected \(1, 4\)"):
        engine.warm_up(2)


@pytest.mark.parametrize(("key", "said"), [("candidates", "3"), ("gates", "5")])
def test_a_gated_graph_that_counts_otherwise_than_its_card_is_refused(
    tmp_path: Path, make_card, make_graph, key: str, said: str
) -> None:
    model = onnx.ModelProto.FromString(make_graph(gated=True))
    onnx.helper.set_model_props(model, {"candidates": "2", "gates": "2"})
    card = make_card(variants=("gated",))
    right = write_bundle(tmp_path / "right", card, {"gated.onnx": model.SerializeToString()})
    assert Engine(right, "random").mode == "random"
    onnx.helper.set_model_props(model, {"candidates": "2", "gates": "2", key: said})
    wrong = write_bundle(tmp_path / "wrong", card, {"gated.onnx": model.SerializeToString()})
    with pytest.raises(BundleError, match=f"tiny/gated.onnx has '{said}' {key}, its card says 2; export it again"):
        Engine(wrong, "random")


@pytest.mark.parametrize("candidates", [0, -1, 1025, 10**12])
def test_a_number_of_candidates_that_no_network_has_is_refused(candidates: int) -> None:
    with pytest.raises(BadInput, match=f"{candidates} candidates per gate, expected 1 to 1024"):
        SystemGates(2, candidates)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidia0").exists(),
    reason="this machine has a GPU",
)
@pytest.mark.filterwarnings("ignore:.*provider:UserWarning")
def test_falling_back_from_a_missing_gpu_is_an_error_unless_allowed(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)
    with pytest.raises(BadInput, match="CUDAExecutionProvider"):
        Engine(bundle, "single", device="cuda")
    engine = Engine(bundle, "single", device="cuda", allow_cpu_fallback=True)
    assert engine.predict(images).probabilities.shape == (5, 3)


# --- several votes ---


def tiny_ensemble(make_graph, members: list[float], *, told: bool = True) -> bytes:
    """The mean of softmax(scale * scores) over some scales, one of which may be negative and so votes otherwise."""
    model = onnx.ModelProto.FromString(make_graph(gated=False))
    graph, helper = model.graph, onnx.helper
    del graph.node[2:]
    number = len(members)
    constants = {
        "scales": np.array(members, np.float32).reshape(number, 1, 1),
        "class_axis": np.array([0]),
        "count": np.array(number, np.float32),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["scores", "class_axis"], ["one"]),
            helper.make_node("Mul", ["one", "scales"], ["each"]),
            helper.make_node("Softmax", ["each"], ["each_probabilities"], axis=2),
            helper.make_node("ReduceMean", ["each_probabilities", "class_axis"], ["mean"], keepdims=0),
            helper.make_node("Log", ["mean"], ["logits"]),
            helper.make_node("Identity", ["mean"], ["probabilities"]),
            helper.make_node("ArgMax", ["each"], ["votes"], axis=2, keepdims=0),
            helper.make_node("ArgMax", ["mean"], ["winner"], axis=1, keepdims=0),
            helper.make_node("Equal", ["votes", "winner"], ["same"]),
            helper.make_node("Cast", ["same"], ["same_number"], to=onnx.TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["same_number", "class_axis"], ["agreement"], keepdims=0),
        ]
    )
    if told:
        graph.output.append(helper.make_tensor_value_info("agreement", onnx.TensorProto.FLOAT, ["batch"]))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result


def ensemble_bundle(folder: Path, make_card, make_graph, *, told: bool = True) -> Bundle:
    graphs = {
        "single.onnx": make_graph(gated=False),
        "ensemble.onnx": tiny_ensemble(make_graph, [1.0, 2.0, -1.5], told=told),
        "gated.onnx": make_graph(gated=True),
    }
    return write_bundle(folder, make_card(), graphs)


def test_the_agreement_of_an_ensemble_is_the_share_of_members_that_vote_for_its_answer(
    tmp_path: Path, make_card, make_graph, images
) -> None:
    bundle = ensemble_bundle(tmp_path / "votes", make_card, make_graph)
    engine = Engine(bundle, "ensemble", more_modes=("single",))
    assert engine.agreement_modes == ("ensemble",)
    answer = engine.predict(images)
    scores = engine.predict(images, plan=Plan("single")).logits
    each = np.stack([softmax(scale * scores) for scale in (1.0, 2.0, -1.5)])
    mean = each.mean(axis=0)
    assert answer.probabilities == pytest.approx(mean, abs=1e-6)
    assert answer.agreement is not None
    assert answer.agreement.dtype == np.float32
    assert answer.agreement == pytest.approx((each.argmax(axis=2) == mean.argmax(axis=1)).mean(axis=0))
    assert engine.predict(images, plan=Plan("single")).agreement is None


def test_an_ensemble_that_was_exported_before_agreement_still_answers_without_it(
    tmp_path: Path, make_card, make_graph, images
) -> None:
    bundle = ensemble_bundle(tmp_path / "older", make_card, make_graph, told=False)
    engine = Engine(bundle, "ensemble", wide=2)
    engine.warm_up(2)
    assert engine.agreement_modes == ()
    for wide in (False, True):
        assert engine.predict(images[:1], wide=wide).agreement is None


@pytest.mark.parametrize("draws", [2, 3, 8])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_several_draws_are_averaged_and_their_agreement_is_the_share_that_votes_for_the_mean(
    bundle_dir: Path, images, draws: int, scope
) -> None:
    rng = np.random.default_rng(draws)
    drawn: list[np.ndarray] = []

    def source(number: int) -> np.ndarray:
        drawn.append(rng.integers(0, 2, (number, 2)))
        return drawn[-1]

    bundle = Bundle.open(bundle_dir)
    answer = Engine(bundle, "random", draws=draws, gate_scope=scope, gate_source=source).predict(images)
    paths = np.concatenate(drawn)
    # draw after draw, and within each image after image; with one path per batch there is one for each draw
    paths = paths.reshape(draws, 5, 2) if scope == "image" else np.repeat(paths[:, np.newaxis], 5, axis=1)
    every_path = probabilities_of_every_path(bundle, images)
    each = np.array([[every_path[tuple(paths[k, row])][row] for row in range(5)] for k in range(draws)])
    mean = each.mean(axis=0)
    assert answer.probabilities == pytest.approx(mean, abs=1e-6)
    assert answer.logits == pytest.approx(np.log(mean), abs=1e-5)
    assert answer.agreement == pytest.approx((each.argmax(axis=2) == mean.argmax(axis=1)).mean(axis=0))


def test_the_average_of_draws_does_not_overflow_and_keeps_the_smallest_probabilities() -> None:
    logits = np.array([[[1000.0, 0.0, -1000.0]], [[0.0, 1000.0, -1000.0]]], dtype=np.float32)
    answer = averaged(logits)
    assert answer.probabilities == pytest.approx(np.array([[0.5, 0.5, 0.0]]))
    assert np.isfinite(answer.logits).all()
    assert answer.logits[0, 2] == pytest.approx(-2000)
    assert answer.agreement == pytest.approx([0.5])
    alike = averaged(np.repeat(logits[:1], 4, axis=0))
    assert alike.agreement == pytest.approx([1.0])
    assert alike.probabilities == pytest.approx(softmax(logits[0]))


def test_one_draw_has_no_agreement(bundle_dir: Path, images) -> None:
    assert Engine(Bundle.open(bundle_dir), "random").predict(images).agreement is None


@pytest.mark.parametrize("compiled", [True, False])
def test_with_one_path_per_batch_all_images_of_a_batch_take_it_and_the_next_batch_another(
    bundle_dir: Path, images, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr("serving.engine.gates._obstacle", lambda session: "not today")
    asked: list[int] = []
    paths = iter([(0, 1), (1, 1), (1, 0)])

    def source(number: int) -> np.ndarray:
        asked.append(number)
        return np.array([next(paths)] * number)

    bundle = Bundle.open(bundle_dir)
    engine = Engine(bundle, "random", gate_scope="batch", gate_source=source)
    every_path = probabilities_of_every_path(bundle, images)
    for path in ((0, 1), (1, 1), (1, 0)):
        assert engine.predict(images).probabilities == pytest.approx(every_path[path], abs=1e-6)
    assert asked == [1, 1, 1]


# --- the wide session, precision, modes ---


@pytest.mark.parametrize("mode", ["single", "ensemble", "random"])
def test_a_wide_answer_is_the_narrow_one(tmp_path: Path, make_card, make_graph, images, mode) -> None:
    bundle = ensemble_bundle(tmp_path / "wide", make_card, make_graph)
    engine = Engine(bundle, mode, wide=2, gate_source=lambda number: np.array([[1, 0]] * number))
    assert engine.wide
    engine.warm_up(2)
    for row in range(5):
        narrow, wide = (engine.predict(images[row : row + 1], wide=wide) for wide in (False, True))
        for one, other in zip(narrow, wide, strict=True):
            assert (one is None) == (other is None)
            assert one is None or np.allclose(one, other, atol=1e-6)


def test_an_engine_of_one_core_has_nothing_wide(bundle_dir: Path) -> None:
    assert not Engine(Bundle.open(bundle_dir)).wide


@pytest.mark.parametrize("mode", ["single", "ensemble", "random"])
def test_int8_without_its_graph_is_refused_with_how_to_make_it(bundle_dir: Path, mode) -> None:
    name = {"single": "single", "ensemble": "ensemble", "random": "gated"}[mode]
    with pytest.raises(
        BadInput, match=rf"tiny has no {name}\.int8\.onnx; add it with `manygates export --int8`, or serve .*fp32"
    ):
        Engine(Bundle.open(bundle_dir), mode, precision="int8")


def test_int8_runs_the_quantised_graphs(tmp_path: Path, make_card, make_graph, images) -> None:
    graphs = {"single.onnx": make_graph(gated=False), "single.int8.onnx": make_graph(gated=False, scale=2.0)}
    bundle = write_bundle(tmp_path / "both", make_card(variants=("single",)), graphs)
    full, small = (Engine(bundle, precision=precision) for precision in ("fp32", "int8"))
    assert (full.precision, small.precision) == ("fp32", "int8")
    assert small.predict(images).logits == pytest.approx(2 * full.predict(images).logits, abs=1e-5)
    with pytest.raises(UnknownName):
        Engine(bundle, "fast", precision="int8")  # type: ignore[arg-type]


def test_int8_graphs_are_not_served_on_a_gpu(bundle_dir: Path) -> None:
    with pytest.raises(BadInput, match=r"precision int8 was asked for on device cuda, .*serve fp32 there"):
        Engine(Bundle.open(bundle_dir), "single", precision="int8", device="cuda")


def test_an_engine_of_several_modes_answers_in_each_as_one_of_that_mode_does(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)

    def source(number: int) -> np.ndarray:
        return np.array([[0, 1]] * number)

    every = Engine(bundle, "random", more_modes=("single", "ensemble", "random"), draws=2, gate_source=source)
    assert every.modes == ("random", "single", "ensemble")
    assert every.plan == Plan("random", 2)
    every.warm_up(2)
    for mode in every.modes:
        alone = Engine(bundle, mode, gate_source=source).predict(images)
        asked = every.predict(images, plan=Plan(mode))
        assert asked.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
        assert asked.agreement is None
    assert every.predict(images).agreement == pytest.approx(np.ones(5))
    with pytest.raises(BadInput, match="no variant"):
        Engine(
            write_bundle(
                bundle_dir.parent / "one",
                replace(bundle.card, variants=("single",)),
                {"single.onnx": bundle.read("single.onnx")},
            ),
            more_modes=("random",),
        )


def test_where_requests_may_choose_all_graphs_are_loaded_and_else_only_the_one(bundle_dir: Path, load_model) -> None:
    chooses = load_model(bundle_dir, mode="random", draws=4, allow_mode_choice=True)
    assert set(chooses.modes) == {"single", "ensemble", "random"}
    assert chooses.plan == Plan("random", 4)
    fixed = load_model(bundle_dir, mode="single")
    assert fixed.modes == ()
    assert fixed.predictor.modes == ("single",)
    with pytest.raises(KeyError):
        fixed.predictor.predict(np.zeros((1, 3, 4, 4), np.float32), plan=Plan("random"))
