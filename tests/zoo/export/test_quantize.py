from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F
from unsettled import unsettle

import manygates
from zoo.attacks.budget import LinfBudget
from zoo.bundle.bundle import Bundle, int8_file, write_bundle
from zoo.bundle.card import Lint, Training
from zoo.bundle.record import record_lint, record_results
from zoo.data import datasets
from zoo.errors import BadInput, BundleError, MissingFile
from zoo.evaluation import Request, evaluate
from zoo.evaluation.int8_graph import Int8Network, attack_weights, int8_graph
from zoo.evaluation.linter.bundle import lint_bundle
from zoo.export import quantize
from zoo.export.onnx_graphs import plain_graphs, rgn_graphs
from zoo.export.verify import strangers, verify_graphs
from zoo.export.write import Description, add_int8, export_members, export_rgn, without_int8
from zoo.gates import self_check
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.hub.source import open_model
from zoo.networks import MNIST_FORMAT, ImageFormat, build
from zoo.runtime import session
from zoo.weights.checkpoint import Architecture
from zoo.weights.models import load_rgn, member_networks

TRAINING = Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none")
DESCRIPTION = Description(name="some", description="made by a test", method="standard", training=TRAINING)
PATHS = [(0, 1, 0, 1, 0, 1, 0), (1, 1, 0, 1, 0, 1, 0)]
CALIBRATION = 200


def built(network: str = "resnet8", *, candidates: int = 1, width: int | None = 4, **options: object) -> nn.Module:
    """Return a network whose BatchNorms do something, in evaluation mode."""
    options = options if width is None else {"width": width, **options}
    sharing = "independent" if candidates > 1 else None
    torch.manual_seed(0)
    architecture = Architecture(
        network=network, options=options, dataset="tiny", candidates=candidates, sharing=sharing
    )  # fmt: skip
    return unsettle(architecture.build()).eval()


@cache
def pixels(number: int = CALIBRATION, split: str = "train") -> np.ndarray:
    return datasets.as_float(datasets.load("tiny", split).pixels[:number]).numpy()


def answers(content: bytes, images: np.ndarray, **more: np.ndarray) -> np.ndarray:
    (logits,) = session(content, threads=1).run(["logits"], {"images": images, **more})
    return logits


def nodes(graph: onnx.GraphProto, inside: bool = False) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Yield every node and whether it stands in a branch."""
    for node in graph.node:
        yield node, inside
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g, True)


def optimised(content: bytes, place: Path) -> Counter[tuple[str, bool]]:
    """Return what ONNX Runtime makes of a graph: how many nodes of each type, outside and inside branches."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(place)
    options.log_severity_level = 3  # it warns that such a file is for this machine
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter((node.op_type, inside) for node, inside in nodes(onnx.load(place).graph))


def as_written(content: bytes, images: np.ndarray, **more: np.ndarray) -> np.ndarray:
    """Return a graph's logits, every number rounded where it says so and multiplied as a float.

    Integer convolutions saturate on processors without VNNI, so what they answer depends on the machine.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (logits,) = opened.run(["logits"], {"images": images, **more})
    return logits


def off(content: bytes, twin: bytes, images: np.ndarray, **more: np.ndarray) -> float:
    """Return the root mean square error of an int8 graph as a part of its twin's logits."""
    pair = [as_written(graph, images, **more) for graph in (content, twin)]
    pair = [logits - logits.mean(1, keepdims=True) for logits in pair]
    return float(np.sqrt(np.mean((pair[0] - pair[1]) ** 2) / np.mean(pair[1] ** 2)))


@dataclass(frozen=True)
class Graphs:
    """Float32 graphs of a random gated network, and their int8 twins."""

    fp32: dict[str, bytes]
    int8: dict[str, bytes]


@pytest.fixture(scope="module")
def graphs(tiny_dataset: str) -> Graphs:
    rgn = built(candidates=2)
    assert isinstance(rgn, RandomGatedNetwork)
    made = rgn_graphs(rgn, PATHS[0], PATHS, gated=True)
    return Graphs(made, {name: quantize.quantised(content, pixels()) for name, content in made.items()})


# --- the graphs ---


@pytest.mark.parametrize("variant", ["single", "ensemble", "gated"])
def test_an_int8_graph_takes_and_returns_what_its_twin_does(graphs: Graphs, variant: str) -> None:
    ours, theirs = (onnx.load_from_string(made[variant]) for made in (graphs.int8, graphs.fp32))
    assert list(ours.graph.input) == list(theirs.graph.input)
    assert list(ours.graph.output) == list(theirs.graph.output)
    assert ours.metadata_props == theirs.metadata_props
    assert (ours.ir_version, ours.opset_import) == (theirs.ir_version, theirs.opset_import)


@pytest.mark.parametrize("variant", ["single", "ensemble"])
def test_all_but_the_first_convolution_and_the_last_layer_run_on_integers(
    graphs: Graphs, variant: str, tmp_path: Path
) -> None:
    """Additions and the mean too, so that values are rounded once and not brought back in between."""
    found = optimised(graphs.int8[variant], tmp_path / "optimised.onnx")
    paths = 1 if variant == "single" else 2  # they share nothing but the normalisation
    kept = {"Conv": 1, "Gemm": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "QLinearGlobalAveragePool": 1}
    assert {name: found[name, False] for name in kept} == {name: number * paths for name, number in kept.items()}
    float_twin = Counter(node.op_type for node in onnx.load_from_string(graphs.fp32[variant]).graph.node)
    assert found["QLinearConv", False] == float_twin["Conv"] - paths
    assert found["QLinearAdd", False] == 3 * paths
    assert not found["Relu", False], "clipped away by the rounding of what stands before"


def test_every_branch_but_those_of_the_first_layer_is_one_integer_convolution(graphs: Graphs, tmp_path: Path) -> None:
    found = optimised(graphs.int8["gated"], tmp_path / "optimised.onnx")
    assert found["If", False] == 7
    assert found["QLinearConv", True] == 2 * 6
    assert found["Conv", True] == 2, "the first convolution's two candidates"
    assert not {"QuantizeLinear", "DequantizeLinear", "Gemm"} & {name for name, inside in found if inside}
    assert (found["QuantizeLinear", False], found["DequantizeLinear", False]) == (1, 1)


@pytest.mark.parametrize("candidates", [2, 3])
def test_a_gated_int8_graph_along_a_path_is_that_path_quantised_alone(tiny_dataset: str, candidates: int) -> None:
    """With the same ranges of activations, to the last bit: the branches change nothing."""
    rgn = built(candidates=candidates)
    assert isinstance(rgn, RandomGatedNetwork)
    content = rgn_graphs(rgn, None, [], gated=True)["gated"]
    gated = quantize.quantised(content, pixels(), seed=3)
    model = onnx.load_from_string(content)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    ranges = quantize._ranges(model, pixels(), facts, 3)
    choices = {node.output[0]: node for node in model.graph.node if node.op_type == "If"}
    for candidate in range(candidates):
        alone = quantize._rounded(quantize._along(model, choices, candidate), ranges).SerializeToString()
        gates = np.full(rgn.num_gates, candidate, np.int64)
        np.testing.assert_array_equal(answers(gated, pixels(), gates=gates), answers(alone, pixels()))
    mixed = np.arange(rgn.num_gates) % candidates
    assert off(gated, content, pixels(64, "test"), gates=mixed) < 0.1


def test_the_step_of_an_activation_is_its_range_on_the_calibration_images_in_255_parts(graphs: Graphs) -> None:
    model = onnx.load_from_string(graphs.fp32["single"])
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in relus)
    seen = session(model.SerializeToString(), threads=1).run(relus, {"images": pixels()})
    rounded = onnx.load_from_string(graphs.int8["single"]).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in rounded.initializer}
    for name, values in zip(relus, seen, strict=True):
        (rounding,) = (node for node in rounded.node if node.output[0] == f"{name}_QuantizeLinear_Output")
        assert tensors[rounding.input[1]] == pytest.approx(values.max() / 255, rel=1e-5)
        assert tensors[rounding.input[2]] == 0, "nothing behind a ReLU is negative"
        assert tensors[rounding.input[2]].dtype == np.uint8


def test_weights_are_symmetric_with_a_step_per_output_channel(graphs: Graphs) -> None:
    original, tensors = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(content).graph.initializer}
        for content in (graphs.fp32["single"], graphs.int8["single"])
    )
    rounded = [name for name, tensor in tensors.items() if tensor.dtype == np.int8 and tensor.ndim == 4]
    assert len(rounded) == 8
    for name in rounded:
        weight = original[name.removesuffix("_quantized")]
        most = np.abs(weight).max((1, 2, 3))
        step = tensors[name.replace("_quantized", "_scale")]
        np.testing.assert_allclose(step, most / 127.5, rtol=0.01)  # 255 steps over twice the largest weight
        assert not tensors[name.replace("_quantized", "_zero_point")].any()


def test_the_same_images_and_seed_give_the_same_bytes(graphs: Graphs) -> None:
    for variant, content in graphs.fp32.items():
        assert quantize.quantised(content, pixels()) == graphs.int8[variant]


def test_the_paths_of_the_calibration_follow_the_seed(graphs: Graphs) -> None:
    assert quantize.quantised(graphs.fp32["gated"], pixels(), seed=1) != graphs.int8["gated"]
    assert quantize.quantised(graphs.fp32["single"], pixels(), seed=1) == graphs.int8["single"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet", {}),
        ("msdnet", {"exits": 2, "base": 1, "step": 1, "channels": 16, "growth": 8}),
        ("preact_resnet18", {"width": 8}),
        ("two_layer_cnn", {}),
        pytest.param("vgg16", {}, marks=pytest.mark.slow),
    ],
)
def test_networks_of_every_kind_can_be_rounded(name: str, options: dict[str, int]) -> None:
    """All other tests have residual blocks; here are pooling, concatenation, exits and norms that cannot be folded."""
    side = 32 if name == "vgg16" else 16
    shape = MNIST_FORMAT if name == "lenet" else ImageFormat(height=side, width=side)
    torch.manual_seed(0)
    content = plain_graphs([build(name, images=shape, classes=10, **options).eval()])["single"]
    images = np.random.default_rng(0).random((40, shape.channels, shape.height, shape.width), np.float32)
    rounded = quantize.quantised(content, images[:32])
    assert strangers(rounded, content) == []
    assert off(rounded, content, images[32:]) < 0.15
    assert len(rounded) < 0.6 * len(content)


# --- whatever stands behind a convolution ---


class Behind(nn.Module):
    """A gated convolution that an activation reads, or several do, before the next one."""

    image_shape = (3, 12, 12)

    def __init__(self, activation: nn.Module, **convolution: object) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding="same", **convolution)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.first(images))
        hidden = self.activation(self.norm(self.second(hidden)))
        return self.head(self.third(hidden).amax((2, 3)))


class ReadByMany(Behind):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.activation(self.first(images)))
        pooled = F.max_pool2d(hidden, 3, 1, 1) + F.avg_pool2d(hidden, 3, 1, 1)
        joined = torch.cat([self.activation(hidden[:, :4]), pooled[:, 4:] * hidden[:, 4:].sigmoid()], 1)
        return self.head(self.third(joined).mean((2, 3)) + hidden.amax((2, 3)))


class Attention(Behind):
    """Products of two activations, and channels weighted by a small network (squeeze and excitation)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.norm(self.second(self.first(images))))
        hidden = hidden * self.third(F.adaptive_avg_pool2d(hidden, 1)).sigmoid()
        pixels = hidden.flatten(2)
        weights = (pixels @ pixels.transpose(1, 2)).softmax(2)
        return self.head(self.activation((weights @ pixels).mean(2)))


class IntoTheAnswer(nn.Module):
    """Its last gated convolution is the classifier, and its first reads the images as they are."""

    image_shape = (3, 6, 6)

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(images))).flatten(1)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, name)
    for name in (
        *("LeakyReLU", "SiLU", "GELU", "Hardswish", "PReLU", "ELU", "SELU", "CELU", "Mish", "Softplus", "Softsign"),
        *("Tanh", "Sigmoid", "Hardsigmoid", "LogSigmoid", "ReLU6", "Hardtanh", "Hardshrink", "ReLU", "Identity"),
    )
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda make=make: Behind(make()) for name, make in ACTIVATIONS.items()},  # type: ignore[misc]
    "GELU by tanh": lambda: Behind(nn.GELU("tanh")),
    "a slope per channel": lambda: Behind(nn.PReLU(8)),
    "read by many": lambda: ReadByMany(nn.SiLU()),
    "attention": lambda: Attention(nn.GELU()),
    "depthwise, no bias": lambda: Behind(nn.SiLU(), groups=8, bias=False),
    "grouped": lambda: Behind(nn.GELU(), groups=2),
    "dilated": lambda: Behind(nn.Hardswish(), dilation=2),
    "padded in a circle": lambda: Behind(nn.Mish(), padding_mode="circular"),
    "into the answer": lambda: IntoTheAnswer(nn.SiLU()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whatever_stands_behind_a_convolution_every_graph_can_be_rounded(name: str) -> None:
    torch.manual_seed(0)
    rgn = randomly_gate(NETWORKS[name]().eval(), candidates=3).eval()
    path, other = [0] * rgn.num_gates, [gate % 3 for gate in range(rgn.num_gates)]
    images = torch.rand((72, *rgn.template.image_shape)).numpy()  # type: ignore[misc]
    # a gated graph is rounded as one plain graph per candidate, so for an activation alone that one says it all
    graphs = rgn_graphs(
        rgn, None if name in ACTIVATIONS else path, [] if name in ACTIVATIONS else [path, other], gated=True
    )
    for variant, content in graphs.items():
        rounded = quantize.quantised(content, images[:64])
        assert strangers(rounded, content) == []
        assert "QuantizeLinear" in {node.op_type for node, _ in nodes(onnx.load_from_string(rounded).graph)}
        paths = [path, [1] * rgn.num_gates, [2] * rgn.num_gates, other] if variant == "gated" else [None]
        for gates in paths:
            chosen = {} if gates is None else {"gates": np.array(gates, np.int64)}
            assert off(rounded, content, images[64:], **chosen) < 0.2, (variant, gates)


def test_a_branch_of_an_activation_between_is_one_integer_convolution_all_the_same(tmp_path: Path) -> None:
    rgn = randomly_gate(Behind(nn.SiLU()).eval(), candidates=2).eval()
    content = rgn_graphs(rgn, None, [], gated=True)["gated"]
    rounded = quantize.quantised(content, np.random.default_rng(0).random((40, 3, 12, 12), np.float32))
    found = optimised(rounded, tmp_path / "optimised.onnx")
    assert found["QLinearConv", True] == 2 * 2, "of three layers the first stays as it is"
    assert found["Conv", True] == 2


def leaves(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the branches that hold a candidate's layer."""
    for branch in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        if any(node.op_type == "If" for node in branch.node):
            yield from leaves(branch)
        else:
            yield branch


def with_larger_branches(content: bytes, every: int = 1) -> bytes:
    """Return a gated graph in which each `every`-th branch scales what its convolution answers."""
    model = onnx.load_from_string(content)
    for number, branch in enumerate(leaves(model.graph)):
        if number % every == 0:
            (work,) = branch.node
            answer = work.output[0]
            work.output[0] = f"{answer}/raw"
            branch.initializer.append(numpy_helper.from_array(np.array(0.7, np.float32), f"{answer}/scale"))
            scaled = [work.output[0], f"{answer}/scale"]
            branch.node.append(onnx.helper.make_node("Mul", scaled, [answer], name=f"{answer}/scaled"))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_branches_of_several_nodes_stay_as_they_are_and_the_rest_is_rounded(every: int) -> None:
    torch.manual_seed(0)
    rgn = randomly_gate(Behind(nn.ReLU()).eval(), candidates=2).eval()
    images = torch.rand(72, 3, 12, 12).numpy()
    content = with_larger_branches(rgn_graphs(rgn, None, [], gated=True)["gated"], every)
    rounded = quantize.quantised(content, images[:64])
    assert strangers(rounded, content) == []
    for gates in ([0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]):
        assert off(rounded, content, images[64:], gates=np.array(gates)) < 0.1
    if every == 3:  # the middle layer's branches are one node each
        inside = Counter(node.op_type for node, inside in nodes(onnx.load_from_string(rounded).graph) if inside)
        assert inside["QuantizeLinear"] == 2


def test_a_choice_that_is_the_answer_can_be_rounded() -> None:
    """Of linear layers, which `zoo.export.onnx_graphs` does not gate."""
    rng = np.random.default_rng(0)
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node

    def branch(candidate: int, source: str, answer: str, shape: tuple[int, int]) -> onnx.GraphProto:
        weight = numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"{answer}.weight/{candidate}")
        work = node("MatMul", [source, weight.name], [f"{answer}/{candidate}"], name=f"{answer}/{candidate}")
        return onnx.helper.make_graph([work], "branch", [], [info(f"{answer}/{candidate}", 1, None)], [weight])

    def choice(gate: int, source: str, answer: str, shape: tuple[int, int]) -> list[onnx.NodeProto]:
        then, otherwise = (branch(candidate, source, answer, shape) for candidate in range(2))
        return [
            node("Gather", ["gates", f"number_{gate}"], [f"gate_{gate}"], name=f"gate_{gate}"),
            node("Equal", [f"gate_{gate}", "number_0"], [f"is_{gate}"], name=f"is_{gate}"),
            node("If", [f"is_{gate}"], [answer], name=answer, then_branch=then, else_branch=otherwise),
        ]

    graph = onnx.helper.make_graph(
        [
            node("Flatten", ["images"], ["flat"], name="flat"),
            *choice(0, "flat", "hidden", (12, 8)),
            node("Sigmoid", ["hidden"], ["active"], name="active"),
            *choice(1, "active", "logits", (8, 3)),
            node("Softmax", ["logits"], ["probabilities"], name="probabilities"),
        ],
        "gated",
        [info("images", 1, ["batch", 3, 2, 2]), info("gates", 7, [2])],
        [info("logits", 1, ["batch", 3]), info("probabilities", 1, ["batch", 3])],
        [numpy_helper.from_array(np.array(number), f"number_{number}") for number in range(2)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.helper.set_model_props(model, {"gates": "2", "candidates": "2"})
    content, images = model.SerializeToString(), rng.random((80, 3, 2, 2), np.float32)
    rounded = quantize.quantised(content, images[:64])
    for gates in ([0, 0], [0, 1], [1, 0], [1, 1]):
        assert 0 < off(rounded, content, images[64:], gates=np.array(gates)) < 0.05


def test_branches_within_the_work_of_a_branch_are_refused(graphs: Graphs) -> None:
    model = onnx.load_from_string(graphs.fp32["gated"])
    branch = next(leaves(model.graph))
    (work,), answer = branch.node, branch.output[0].name
    condition = next(node.input[0] for node in model.graph.node if node.op_type == "If")
    work.output[0] = "raw"
    ways = [
        onnx.helper.make_graph(
            [onnx.helper.make_node(kind, ["raw"], [kind], name=kind)],
            kind,
            [],
            [onnx.helper.make_tensor_value_info(kind, 1, None)],
        )
        for kind in ("Relu", "Abs")
    ]
    inner = {"then_branch": ways[0], "else_branch": ways[1]}
    branch.node.append(onnx.helper.make_node("If", [condition], [answer], name="inner", **inner))
    with pytest.raises(BadInput, match="holds branches"):
        quantize.quantised(model.SerializeToString(), pixels())


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("variant", ["single", "gated"])
def test_values_that_are_not_finite_are_refused(graphs: Graphs, variant: str, broken: float) -> None:
    model = onnx.load_from_string(graphs.fp32[variant])
    (mean,) = (tensor for tensor in model.graph.initializer if tensor.name == "normalise.mean")
    mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) * np.float32(broken), mean.name))
    with pytest.raises(BadInput, match="only finite values can be rounded"):
        quantize.quantised(model.SerializeToString(), pixels())


def test_a_weight_that_the_graph_computes_is_left_as_it_is(graphs: Graphs) -> None:
    model = onnx.load_from_string(graphs.fp32["single"])
    work = [node for node in model.graph.node if node.op_type == "Conv"][2]
    computed = onnx.helper.make_node("Tanh", [work.input[1]], ["computed"], name="computed")
    work.input[1] = "computed"
    model.graph.node.insert(0, computed)
    content = model.SerializeToString()
    rounded = quantize.quantised(content, pixels())
    assert strangers(rounded, content) == []
    assert off(rounded, content, pixels(64, "test")) < 0.1


def test_calibration_needs_images(graphs: Graphs) -> None:
    with pytest.raises(BadInput, match="at least one training image, got none"):
        quantize.quantised(graphs.fp32["single"], pixels()[:0])


def test_a_graph_without_layers_is_refused(tiny_dataset: str) -> None:
    info = onnx.helper.make_tensor_value_info
    relu = onnx.helper.make_node("Relu", ["images"], ["logits"], name="relu")
    graph = onnx.helper.make_graph(
        [relu], "none", [info("images", 1, ["batch", 3, 16, 16])], [info("logits", 1, ["batch", 3, 16, 16])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(BadInput, match="no convolution and no linear layer"):
        quantize.quantised(model.SerializeToString(), pixels())


# --- what an int8 graph holds ---


@pytest.mark.parametrize("variant", ["single", "ensemble", "gated"])
def test_an_int8_graph_holds_its_twins_tensors_rounded_and_no_others(graphs: Graphs, variant: str) -> None:
    assert strangers(graphs.int8[variant], graphs.fp32[variant]) == []


def test_an_int8_graph_of_all_candidates_does_not_pass_for_that_of_one_path(graphs: Graphs) -> None:
    found = strangers(graphs.int8["gated"], graphs.fp32["single"])
    assert sum("weight" in name for name in found) >= 7, "the other candidate of every gated layer"


@pytest.mark.parametrize("smuggled", ["another tensor", "another weight", "a bias of another step", "a wide scale"])
def test_a_tensor_that_the_twin_does_not_have_is_named(graphs: Graphs, smuggled: str) -> None:
    model = onnx.load_from_string(graphs.int8["single"])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = next(name for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims)
    stem = weight.removesuffix("_quantized")
    if smuggled == "another tensor":
        changed, values = "hidden", np.zeros((3, 3), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, changed))
    else:
        changed = {
            "another weight": weight,
            "a bias of another step": stem.replace("weight", "bias") + "_quantized",
            "a wide scale": f"{stem}_scale",
        }[smuggled]
        values = numpy_helper.to_array(tensors[changed]).copy()
        if smuggled == "a wide scale":
            values = np.broadcast_to(values[:, None, None], (len(values), 3, 3)).copy()
        else:
            values.flat[0] += 3 if values.flat[0] < 100 else -3
        tensors[changed].CopyFrom(numpy_helper.from_array(values, changed))
    assert changed in strangers(model.SerializeToString(), graphs.fp32["single"])


# --- bundles ---


@pytest.fixture(scope="module")
def gated_folder(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with int8 graphs."""
    architecture = Architecture(
        network="resnet8", options={"width": 4}, dataset="tiny", candidates=2, sharing="independent"
    )
    rgn = built(candidates=2)
    assert isinstance(rgn, RandomGatedNetwork)
    folder = tmp_path_factory.mktemp("models") / "gated"
    export_rgn(folder, rgn, architecture, DESCRIPTION, single=PATHS[0], ensemble=PATHS)
    add_int8(folder, images=CALIBRATION)
    return folder


@pytest.fixture
def bundle(gated_folder: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may write to."""
    original = Bundle.open(gated_folder)
    return write_bundle(tmp_path / "bundle", original.card, {n: original.file(n) for n in original.card.files})


def with_files(bundle: Bundle, change: Callable[[dict[str, bytes]], None]) -> Bundle:
    """Return the bundle with other files, whose card knows them all the same."""
    files = {name: bundle.read(name) for name in bundle.card.files}
    change(files)
    return write_bundle(bundle.folder, bundle.card, files)


def failed(bundle: Bundle) -> dict[str, str]:
    return {check.name: check.detail for check in verify_graphs(bundle) if not check.held}


def test_added_int8_graphs_are_in_the_card_and_verify(bundle: Bundle) -> None:
    assert bundle.card.int8 is not None
    assert bundle.card.int8.variants == ("single", "ensemble", "gated")
    assert bundle.card.int8.calibration.images == CALIBRATION
    assert bundle.card.int8.calibration.tool == f"onnxruntime {onnxruntime.__version__}"
    assert all(bundle.has_int8(variant) and int8_file(variant) in bundle.card.files for variant in bundle.card.variants)
    assert failed(bundle) == {}
    text = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert "`single.int8.onnx`, `ensemble.int8.onnx`, `gated.int8.onnx`: min-max" in text
    assert "calibrated on 200 training images (seed 0)" in text


def test_the_float32_files_stay_as_they_were(bundle: Bundle) -> None:
    before = {name: bundle.read(name) for name in bundle.card.files}
    after = add_int8(bundle.folder, images=150)
    changed = {name for name in before if after.read(name) != before[name]}
    assert changed == {"single.int8.onnx", "ensemble.int8.onnx", "gated.int8.onnx"}


def test_a_card_with_int8_graphs_that_are_not_there_is_refused(bundle: Bundle) -> None:
    with pytest.raises(MissingFile, match=r"lists no gated\.int8\.onnx; quantise it again with `manygates export"):
        with_files(bundle, lambda files: files.__delitem__("gated.int8.onnx"))


def test_an_int8_graph_of_another_path_does_not_verify(bundle: Bundle) -> None:
    other = rgn_graphs(load_rgn(bundle), PATHS[1], [], gated=False)["single"]
    foreign = quantize.quantised(other, pixels())
    found = failed(with_files(bundle, lambda files: files.__setitem__("single.int8.onnx", foreign)))
    assert "single.int8.onnx holds the numbers of single.onnx and no others" in found


def test_an_int8_graph_with_other_outputs_does_not_verify(bundle: Bundle) -> None:
    def swap(files: dict[str, bytes]) -> None:
        files["gated.int8.onnx"] = files["single.int8.onnx"]

    assert "gated.int8.onnx has the signature of gated.onnx" in failed(with_files(bundle, swap))


def test_an_int8_graph_of_useless_ranges_does_not_verify(bundle: Bundle) -> None:
    """Its weights are right and its activations are clipped to nearly nothing."""

    def clip(files: dict[str, bytes]) -> None:
        model = onnx.load_from_string(files["single.int8.onnx"])
        steps = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        for tensor in model.graph.initializer:
            if tensor.name in steps:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 100, tensor.name))
        files["single.int8.onnx"] = model.SerializeToString()

    found = failed(with_files(bundle, clip))
    assert set(found) == {"single.int8.onnx answers as its weights"}


def test_a_file_that_is_no_graph_does_not_verify(bundle: Bundle) -> None:
    found = failed(with_files(bundle, lambda files: files.__setitem__("single.int8.onnx", b"rubbish")))
    assert "cannot load the graph" in found["single.int8.onnx answers as its weights"]


def test_a_graph_that_is_not_near_its_weights_is_not_added(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: entry.read_bytes() for entry in bundle.folder.iterdir()}
    single = bundle.read("single.int8.onnx")
    monkeypatch.setattr(quantize, "quantised", lambda content, images, *, seed: single)
    with pytest.raises(BundleError, match=r"nothing was written: .*ensemble\.int8\.onnx"):
        add_int8(bundle.folder, images=CALIBRATION)
    assert {entry.name: entry.read_bytes() for entry in bundle.folder.iterdir()} == before


# --- measuring them ---


def test_a_result_of_an_int8_graph_is_recorded_under_its_own_variant_with_its_agreement(bundle: Bundle) -> None:
    (result,) = evaluate(bundle, Request(protocol="clean", precision="int8", command="measure"))
    assert result.variant == "single-int8"
    images = datasets.load("tiny", "test")
    theirs = member_networks(bundle, "single")[0](datasets.as_float(images.pixels)).argmax(1)
    logits = answers(bundle.read("single.int8.onnx"), datasets.as_float(images.pixels).numpy())
    ours = torch.from_numpy(logits).argmax(1)
    assert result.accuracy == pytest.approx(float((ours == images.labels).double().mean()), abs=1e-6)
    card = record_results(bundle.folder, [result]).card
    agreement = card.results[0].agreement
    assert agreement is not None
    assert agreement.share == pytest.approx(float((ours == theirs).double().mean()), abs=1e-6)
    assert record_results(bundle.folder, [result]).card == card, "the same terms again replace it"
    text = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert f"%) | {agreement.share:.2%} (" in text


def test_the_int8_graph_is_measured_under_both_attackers(bundle: Bundle) -> None:
    request = Request(protocol="whitebox", precision="int8", eps=(Fraction(8, 255),), images=40, steps=5, restarts=2)
    transferred, through = evaluate(bundle, request)
    assert (transferred.attack, through.attack) == ("PGD on the weights", "PGD through the rounding")
    assert "a transfer" in transferred.note
    assert transferred.agreement is not None
    assert through.agreement is None
    float_result = evaluate(bundle, replace(request, precision="fp32"))[0]
    assert float_result.variant == "single"
    assert abs(float_result.accuracy - through.accuracy) <= 0.1


def test_random_gates_of_the_int8_graph_are_judged_along_the_same_paths(bundle: Bundle) -> None:
    request = Request(protocol="clean", variant="gated", precision="int8", draws=4)
    (result,) = evaluate(bundle, request)
    (float_result,) = evaluate(bundle, replace(request, precision="fp32"))
    assert result.variant == "gated-int8"
    assert abs(result.accuracy - float_result.accuracy) <= 0.05
    assert result.agreement is not None
    assert result.agreement.share >= 0.9
    assert float_result.agreement is None


def test_questions_alone_are_asked_of_the_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights out of reach: neither attack may ask for a gradient or for the weights' answers."""
    request = Request(protocol="queries", precision="int8", eps=(Fraction(1, 10),), images=20, queries=15)

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the weights were asked")

    for checks, name in ((RandomGatedNetwork, "check_itself"), (self_check, "check_same")):  # when weights are loaded
        monkeypatch.setattr(checks, name, lambda *_: None)
    monkeypatch.setattr(nn.Conv2d, "forward", never)
    results = evaluate(bundle, request)
    assert [result.attack for result in results] == ["Square, 15 queries", "RayS, 15 queries"]
    assert {result.variant for result in results} == {"single-int8"}
    assert all(check.held for result in results for check in result.checks)


def test_a_model_without_the_graph_and_a_protocol_that_compares_networks_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match="transfer-matrix compares networks, not what a graph answers; use one of clean"):
        evaluate(bundle, Request(protocol="transfer-matrix", variant="gated", precision="int8"))
    files = {name: bundle.read(name) for name in bundle.card.files if "int8" not in name}
    plain = write_bundle(bundle.folder, without_int8(bundle.card), files)
    with pytest.raises(BadInput, match=r"some has no int8 graph of 'single', only of none; .*--int8"):
        evaluate(plain, Request(protocol="clean", precision="int8"))


def test_the_linter_asks_the_int8_graph_and_is_recorded_beside_the_weights(bundle: Bundle) -> None:
    lint = lint_bundle(bundle, "single", images=24, queries=10, precision="int8")
    codes = {finding.code: finding.verdict for finding in lint.findings}
    assert lint.variant == "single-int8"
    assert {codes["Q1"], codes["Q2"]} <= {"ok", "alarm"}
    other = Lint(variant="single", images=1, seed=0, findings=(), date="2026-11-21", command="c")
    record_lint(bundle.folder, lint)
    assert [entry.variant for entry in record_lint(bundle.folder, other).card.lint] == ["single", "single-int8"]


def test_a_rounded_model_answers_as_its_graph_and_slopes_as_its_weights(bundle: Bundle) -> None:
    (weights,) = member_networks(bundle, "single")
    model = Int8Network(weights, int8_graph(bundle, "single"))
    images = torch.from_numpy(pixels(8, "test"))
    expected = torch.from_numpy(answers(bundle.read("single.int8.onnx"), images.numpy()))
    assert torch.equal(model(images), expected)
    probe, plain = images.clone().requires_grad_(True), images.clone().requires_grad_(True)
    model(probe)[:, 0].sum().backward()
    weights(plain)[:, 0].sum().backward()
    assert torch.equal(model(probe.detach().requires_grad_(True)), expected)
    assert torch.equal(probe.grad, plain.grad)  # type: ignore[arg-type]
    assert not torch.equal(weights(images), expected)


def test_what_is_shown_to_a_model_that_is_the_weights_breaks_it_alike(bundle: Bundle) -> None:
    (weights,) = member_networks(bundle, "single")
    images = datasets.load("tiny", "test")[slice(0, 30)]
    budget = LinfBudget(eps=4 / 255, steps=6, restarts=3)
    float_images = datasets.as_float(images.pixels)
    theirs, ours, last = attack_weights(
        weights, weights, float_images, images.labels, budget, torch.Generator().manual_seed(0)
    )
    assert torch.equal(theirs, ours)
    assert float((last - float_images).abs().max()) <= 4 / 255 + 1e-6


# --- the command line ---


def run(*arguments: object) -> int:
    return manygates.main([str(argument) for argument in arguments])


def test_the_command_adds_int8_graphs_to_a_bundle_and_exports_with_them(
    tiny_dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = Architecture(network="resnet8", options={"width": 4}, dataset=tiny_dataset)
    export_members(tmp_path / "bundle", [built()], architecture, DESCRIPTION)
    bundle = add_int8(tmp_path / "bundle", images=CALIBRATION)
    (result,) = evaluate(bundle, Request(protocol="clean", precision="int8"))
    record_results(bundle.folder, [result])
    model = f"local-dir:{bundle.folder}"
    calibration = ("--int8", "--calibration-images", CALIBRATION)
    assert run("export", model, *calibration) == 0
    assert [entry.variant for entry in Bundle.open(bundle.folder).card.results] == ["single-int8"]
    assert run("export", model, "--out", tmp_path / "again", *calibration) == 0
    again = Bundle.open(tmp_path / "again").card
    assert again.results == Bundle.open(bundle.folder).card.results, "calibrated alike, so the same graphs"
    assert again.int8 == Bundle.open(bundle.folder).card.int8
    assert run("export", model, "--out", tmp_path / "other", "--int8", "--calibration-images", 150) == 0
    other = Bundle.open(tmp_path / "other").card
    assert other.results == ()
    assert other.int8 is not None
    capsys.readouterr()
    assert run("export", model, "--out", tmp_path / "without") == 0
    assert "its int8 graphs, and what was measured on them, are left out" in capsys.readouterr().err
    assert Bundle.open(tmp_path / "without").card.int8 is None


def test_the_command_without_a_place_to_write_to_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "standard-resnet20-cifar10") == 2
    assert "export needs --out DIR" in capsys.readouterr().err
    assert run("export", "standard-resnet20-cifar10", "--int8") == 2
    assert "name another folder with --out DIR" in capsys.readouterr().err


def test_the_command_measures_the_int8_graph(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"local-dir:{bundle.folder}"
    assert run("evaluate", model, "--protocol", "clean", "--precision", "int8", "--json", "--record") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["variant"] == "single-int8"
    assert result["command"].endswith("--variant single --precision int8 --seed 0")
    (recorded,) = Bundle.open(bundle.folder).card.results
    assert recorded.command == result["command"]
    assert recorded.agreement is not None


def test_a_model_without_int8_graphs_needs_none_of_its_files(bundle: Bundle) -> None:
    """Who asks for the float32 graph fetches that alone."""
    (bundle.folder / "single.int8.onnx").unlink()
    assert open_model(f"local-dir:{bundle.folder}", only=("single.onnx",)).read("single.onnx")
    with pytest.raises(MissingFile):
        open_model(f"local-dir:{bundle.folder}", only=("single.int8.onnx",))


def test_an_ensemble_of_plain_networks_has_int8_graphs_too(tiny_dataset: str, tmp_path: Path) -> None:
    architecture = Architecture(network="resnet8", options={"width": 4}, dataset="tiny")
    members = [built(), built()]
    with torch.no_grad():
        members[1].get_submodule("conv1").weight.mul_(-1)  # type: ignore[operator, union-attr]
    export_members(tmp_path / "plain", members, architecture, DESCRIPTION)
    bundle = add_int8(tmp_path / "plain", images=CALIBRATION)
    assert bundle.card.int8 is not None
    assert bundle.card.int8.variants == ("single", "ensemble")
    assert failed(bundle) == {}
