from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from serving.engine import Engine, SystemGates
from zoo.bundle import Bundle, write_bundle
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
    answer = Engine(bundle, mode, threads=1).predict(images)
    session = onnxruntime.InferenceSession(bundle.read(graph), providers=["CPUExecutionProvider"])
    probabilities, logits = session.run(["probabilities", "logits"], {"images": images})
    assert np.array_equal(answer.probabilities, probabilities)
    assert np.array_equal(answer.logits, logits)


def test_each_image_of_a_random_batch_is_answered_by_its_own_path(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)
    gates = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 1]])
    answer = Engine(bundle, "random", threads=1, gate_source=lambda num_images: gates[:num_images]).predict(images)
    every_path = probabilities_of_every_path(bundle, images)
    for row, path in enumerate(gates):
        assert np.allclose(answer.probabilities[row], every_path[tuple(path)][row], atol=1e-6)


def test_identical_random_requests_are_answered_by_different_paths(bundle_dir: Path, images) -> None:
    engine = Engine(Bundle.open(bundle_dir), "random", threads=1)
    answers = {engine.predict(images[:1]).probabilities.tobytes() for _ in range(64)}
    assert len(answers) == 4  # all of them; missing one has a chance of 4 * 0.75^64 = 4e-8


def test_the_mean_of_many_random_answers_approaches_the_mean_over_all_paths(bundle_dir: Path, images) -> None:
    bundle = Bundle.open(bundle_dir)
    engine = Engine(bundle, "random", threads=1)
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
        engine = Engine(Bundle.open(bundle_dir), mode, threads=2)
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
    assert Engine(bundle, threads=1).mode == "ensemble"


def test_a_tampered_graph_is_never_loaded(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    graph = bytearray((bundle_dir / "single.onnx").read_bytes())
    graph[-1] ^= 1
    (bundle_dir / "single.onnx").write_bytes(graph)
    with pytest.raises(ChecksumMismatch, match=r"single\.onnx.*sha256"):
        Engine(bundle, threads=1)


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path, make_card, make_graph) -> None:
    bundle = write_bundle(tmp_path / "broken", make_card(variants=("single",)), {"single.onnx": b"not a graph"})
    with pytest.raises(BundleError, match=r"tiny/single\.onnx cannot be loaded"):
        Engine(bundle, threads=1)


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
    with pytest.raises(BundleError, match=r"tiny/single\.onnx cannot be loaded"):
        Engine(bundle, threads=1)


def test_a_graph_that_does_not_fit_its_card_is_refused(tmp_path: Path, make_card, make_graph) -> None:
    card = make_card(variants=("single",))
    gated = write_bundle(tmp_path / "gated", card, {"single.onnx": make_graph(gated=True)})
    with pytest.raises(BundleError, match=r"inputs \['gates', 'images'\], expected \['images'\]"):
        Engine(gated, threads=1)
    wide = replace(card, input=replace(card.input, width=8))
    with pytest.raises(BundleError, match=r"'images' is tensor\(float\).*expected.*8"):
        Engine(write_bundle(tmp_path / "wide", wide, {"single.onnx": make_graph(gated=False)}), threads=1)
    more_classes = replace(card, classes=("a", "b", "c", "d"))
    engine = Engine(write_bundle(tmp_path / "more", more_classes, {"single.onnx": make_graph(gated=False)}), threads=1)
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
    assert Engine(right, "random", threads=1).mode == "random"
    onnx.helper.set_model_props(model, {"candidates": "2", "gates": "2", key: said})
    wrong = write_bundle(tmp_path / "wrong", card, {"gated.onnx": model.SerializeToString()})
    with pytest.raises(BundleError, match=f"tiny/gated.onnx has '{said}' {key}, its card says 2; export it again"):
        Engine(wrong, "random", threads=1)


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
        Engine(bundle, "single", device="cuda", threads=1)
    engine = Engine(bundle, "single", device="cuda", threads=1, allow_cpu_fallback=True)
    assert engine.predict(images).probabilities.shape == (5, 3)
