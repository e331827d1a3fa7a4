"""Static int8 graphs, made from the float32 ones alone: same inputs, same outputs, same paths, rounded numbers.

The rounding is ONNX Runtime's own quantiser (QDQ form): weights as int8, symmetric, with a scale per output channel;
activations as uint8, with a zero point, whose ranges are the smallest and largest values seen on training images. The
first convolution, the last linear layer and what comes behind it stay in float32 (docs/adr/0012).

A gated graph is taken apart into one plain graph per candidate, which ONNX Runtime can quantise, and put together
again: the weights and the convolution of a candidate, and the rounding of its output, stand in its branch of the `If`,
so that each branch becomes one integer convolution. The ranges are common to all paths. A branch of several nodes has
no ranges inside and stays in float32 there.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from zoo.errors import BadInput
from zoo.export.assembly import model_of
from zoo.export.nodes import branches, choice, needed, reads, renamed
from zoo.export.stencil import GATES, IMAGES
from zoo.runtime import quantization

_library: Any = quantization()

METHOD = "min-max, uint8 activations, int8 weights per channel; first convolution and last linear layer in float32"
BATCH, GATED_BATCH = 32, 8
"""Images per batch of the calibration; a gated graph takes each batch along a path of its own, so it has many."""
WEIGHTED = ("Conv", "Gemm", "MatMul")
ROUNDED = (
    *(*WEIGHTED, "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool"),
    *("MaxPool", "Relu", "Reshape", "Squeeze", "Unsqueeze"),
)
"""What ONNX Runtime computes on integers; anything else stays in float32."""
_INSIDE = "/inside/"
"""Between the name of a choice and the number of a value within its branch."""


def quantised(content: bytes, images: np.ndarray, *, seed: int = 0) -> bytes:
    """Return the int8 twin of a float32 graph.

    Args:
        content: a graph of `zoo.export.onnx_graphs`: variant single, ensemble or gated.
        images: float32 (image, channel, height, width) in [0, 1], not from the test set.
        seed: of the paths along which a gated graph is calibrated.

    Raises:
        BadInput: no images; a graph without a convolution or linear layer to round, or whose values on these images
            are not finite; branches of a form that `zoo.export.onnx_graphs` does not make.
    """
    if not len(images):
        raise BadInput("calibration needs at least one training image, got none")
    model = onnx.load_from_string(content)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    ranges = _ranges(model, np.ascontiguousarray(images, dtype=np.float32), facts, seed)
    if "candidates" not in facts:
        rounded = _rounded(model, ranges)
        return _assembled(model, list(rounded.graph.node), list(rounded.graph.initializer))
    choices = {node.output[0]: node for node in model.graph.node if node.op_type == "If"}
    flat = [_along(model, choices, candidate) for candidate in range(int(facts["candidates"]))]
    mixed = _mixed(flat, choices)
    chosen = [name for name in _to_round(flat[0].graph) if name.partition(_INSIDE)[0] not in mixed]
    nodes = _gathered([_rounded(one, ranges, chosen) for one in flat], choices)
    gates = _choosing(model.graph, choices)
    numbers = {name for node in gates for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in numbers]
    return _assembled(model, [*gates, *nodes.graph.node], [*tensors, *nodes.graph.initializer])


# --- calibration ---


class _Reader(_library.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _ranges(model: ModelProto, images: np.ndarray, facts: Mapping[str, str], seed: int) -> Any:
    """Return the smallest and largest value of every float tensor outside the branches that may be rounded."""
    rng = np.random.default_rng(seed)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        size = GATED_BATCH if "gates" in facts else BATCH
        for start in range(0, len(images), size):
            feed = {IMAGES: images[start : start + size]}
            if "gates" in facts:
                feed[GATES] = rng.integers(0, int(facts["candidates"]), int(facts["gates"]), np.int64)
            yield feed

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        onnx.save(_with_what_branchesreads(model), file)
        method = _library.CalibrationMethod.MinMax
        augmented = str(Path(scratch) / "augmented.onnx")
        calibrator = _library.create_calibrator(file, [*ROUNDED, "If", "Identity"], augmented, method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which `_check_ranges` refuses
            calibrator.collect_data(_Reader(feeds()))
            return calibrator.compute_data()


def _with_what_branchesreads(model: ModelProto) -> ModelProto:
    """Return the model with a node that reads what the branches do, of whatever kind: the library overlooks these."""
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {tensor.name for tensor in model.graph.initializer}
    read = set().union(*(reads(node) - set(node.input) for node in model.graph.node)) - known
    copy.graph.node.extend(helper.make_node("Identity", [name], [f"{name}/read"], name=f"{name}/read") for name in read)
    return copy


# --- rounding of a graph without branches ---


def _rounded(model: ModelProto, ranges: Any, chosen: Sequence[str] | None = None) -> ModelProto:
    """Return the model with the nodes of these names rounded, all that `_to_round` names if None."""
    chosen = _to_round(model.graph) if chosen is None else chosen
    _check_ranges(model.graph, ranges, set(chosen))
    copy = ModelProto()
    copy.CopyFrom(model)  # the quantiser changes what it is given
    quantizer = _library.QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=_library.QuantType.QInt8,
        activation_qType=_library.QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=list(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=list(ROUNDED),
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    quantizer.quantize_model()
    result: ModelProto = quantizer.model.model
    return result


def _check_ranges(graph: GraphProto, ranges: Any, chosen: Set[str]) -> None:
    for name in {name for node in graph.node if node.name in chosen for name in (*node.input, *node.output)}:
        if name in ranges.data:
            low, high = (float(np.min(bound)) for bound in ranges[name].range_value)
            if not (np.isfinite(low) and np.isfinite(high)):
                raise BadInput(
                    f"the values of {name!r} on the calibration images reach from {low:g} to {high:g}, and only finite "
                    "values can be rounded; look for NaN or infinity in the weights"
                )


def _to_round(graph: GraphProto) -> list[str]:
    """Return the names of the nodes on the way to a weighted layer, without the first and the last such layers."""
    weighted = [node for node in graph.node if node.op_type in WEIGHTED]
    behind = {node.name: {other.name for other in needed(graph.node, node.input)} for node in weighted}
    names = set(behind)
    ways = set().union(*behind.values()) | names
    first = {name for name, way in behind.items() if not way & names}
    last = names - set().union(*behind.values())
    kept = first | last if names - first - last else set()
    stored = {tensor.name for tensor in graph.initializer} | {""}
    computed = {  # the library has no scale for weights or biases that are values of the graph
        node.name for node in weighted if node.op_type != "MatMul" and not stored.issuperset(node.input[1:])
    }
    chosen = [node.name for node in graph.node if node.op_type in ROUNDED and node.name in ways - kept - computed]
    if not names:
        raise BadInput("the graph has no convolution and no linear layer, so there is nothing to round")
    return chosen


# --- gated graphs ---


def _along(model: ModelProto, choices: Mapping[str, NodeProto], candidate: int) -> ModelProto:
    """Return the plain graph of the path that takes this candidate everywhere."""
    flat = ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[:]
    skipped = {node.name for node in _choosing(model.graph, choices)}
    for node in model.graph.node:
        if node.output[0] in choices:
            branch = _branch_of(node, candidate)
            flat.graph.node.extend(_inlined(branch, node.output[0]))
            flat.graph.initializer.extend(branch.initializer)
        elif node.name not in skipped:
            flat.graph.node.add().CopyFrom(node)
    kept = [entry for entry in flat.graph.input if entry.name != GATES]
    del flat.graph.input[:]
    flat.graph.input.extend(kept)
    return flat


def _inlined(branch: GraphProto, output: str) -> list[NodeProto]:
    """Return copies of the nodes of a branch that make `output`; the last has its name, others carry it in theirs."""
    (answer,) = branch.output
    inner = [name for node in branch.node for name in node.output if name]
    if any(branches(node) for node in branch.node) or [answer.name] not in [list(node.output) for node in branch.node]:
        raise BadInput(
            f"a branch of {output!r} holds branches, or no node that makes its output alone; expected a candidate's "
            "layer, and further choices only in a branch of their own"
        )
    names = {name: f"{output}{_INSIDE}{position}" for position, name in enumerate(inner)} | {answer.name: output}
    copies = [renamed(node, lambda name: names.get(name, name)) for node in branch.node]
    for copy in copies:
        copy.name = output if output in copy.output else copy.output[0]
    return copies


def _mixed(flat: Sequence[ModelProto], choices: Collection[str]) -> set[str]:
    """Return the names of the choices that are not one node of the same type in every branch."""
    types: dict[str, list[str]] = {name: [] for name in choices}
    for node in (node for model in flat for node in model.graph.node):
        types.get(_choice_of(node), []).append(node.op_type)
    return {name for name, found in types.items() if len(found) > len(flat) or len(set(found)) > 1}


def _choosing(graph: GraphProto, choices: Mapping[str, NodeProto]) -> list[NodeProto]:
    """Return the nodes from which the choices learn what the gates say."""
    return needed(graph.node, [condition for node in choices.values() for condition, _ in _conditions(node)])


def _conditions(choice: NodeProto) -> list[tuple[str, str]]:
    """Return the conditions of a choice and of those nested in it, each with the name of its node."""
    inner = [node for branch in branches(choice) for node in branch.node if node.op_type == "If"]
    return [(choice.input[0], choice.name), *(condition for node in inner for condition in _conditions(node))]


def _branch_of(choice: NodeProto, candidate: int) -> GraphProto:
    """Return the branch of a candidate: the first's, or that of one of those nested in the other branch."""
    ways = {attribute.name: attribute.g for attribute in choice.attribute}
    then: GraphProto = ways["then_branch"]
    otherwise: GraphProto = ways["else_branch"]
    if candidate == 0:
        return then
    nested = [node for node in otherwise.node if node.op_type == "If"]
    if nested and len(otherwise.node) == 1:
        return _branch_of(nested[0], candidate - 1)
    return otherwise


def _gathered(flat: Sequence[ModelProto], choices: Mapping[str, NodeProto]) -> ModelProto:
    """Return one graph whose choices hold the rounded layers of all candidates.

    The candidates' graphs are the same but for their gated layers.
    """
    graphs = [model.graph for model in flat]
    tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in graphs]
    common = ModelProto()
    common.CopyFrom(flat[0])
    del common.graph.node[:]
    replaced: set[str] = set()
    for node in graphs[0].node:
        if node.name not in choices:
            continue
        rounding = [other for other in graphs[0].node if node.output[0] in other.input]
        rounding = rounding if [other.op_type for other in rounding] == ["QuantizeLinear"] else []
        layers = [[other for other in graph.node if _choice_of(other) == node.name] for graph in graphs]
        works = [[*_numbers(graph, layer), *layer, *rounding] for graph, layer in zip(graphs, layers, strict=True)]
        output = [node, *rounding][-1].output[0]
        common.graph.node.append(_choice(choices[node.name], works, tensors, output))
        replaced |= {other.name for other in (*layers[0], *rounding)}
    common.graph.node.extend(node for node in graphs[0].node if node.name not in replaced)
    return common


def _choice_of(node: NodeProto) -> str:
    """Return the name of the choice in whose branch a node stood, if it did."""
    return str(node.name).partition(_INSIDE)[0]


def _numbers(graph: GraphProto, layer: Sequence[NodeProto]) -> list[NodeProto]:
    """Return the nodes through which a layer reads rounded numbers."""
    read = {name for node in layer for name in node.input}
    return [node for node in graph.node if node.op_type == "DequantizeLinear" and read & set(node.output)]


def _choice(
    original: NodeProto, works: Sequence[Sequence[NodeProto]], tensors: Sequence[Mapping[str, TensorProto]], output: str
) -> NodeProto:
    """Return the `If`, nested like the original, whose branches are these layers and end in `output`."""
    kind = TensorProto.UINT8 if works[0][-1].op_type == "QuantizeLinear" else TensorProto.FLOAT

    def branch(candidate: int) -> GraphProto:
        """Return a candidate's branch; what is inside carries its number, because names outside may be the same."""
        own = {name for node in works[candidate] for name in node.input if name in tensors[candidate]}
        inside = own | {name for node in works[candidate] for name in node.output}

        def own_name(name: str) -> str:
            return f"{name}/{candidate}" if name in inside else name

        nodes = [renamed(node, own_name, name=f"{node.name}/{candidate}") for node in works[candidate]]
        initializers = []
        for name in sorted(own):
            tensor = TensorProto()
            tensor.CopyFrom(tensors[candidate][name])
            tensor.name = f"{name}/{candidate}"
            initializers.append(tensor)
        answer = helper.make_tensor_value_info(f"{output}/{candidate}", kind, None)
        return helper.make_graph(nodes, f"{original.output[0]}_candidate_{candidate}", [], [answer], initializers)

    return choice(original.output[0], output, _conditions(original), [branch(index) for index in range(len(works))])


# --- assembly ---


def _assembled(model: ModelProto, nodes: Sequence[NodeProto], tensors: Sequence[TensorProto]) -> bytes:
    """Return a graph of these nodes, where an output needs them, with the inputs, outputs and facts of the model."""
    given = {"", *(entry.name for entry in model.graph.input), *(tensor.name for tensor in tensors)}
    kept = needed(_in_order(nodes, given), [entry.name for entry in model.graph.output])
    read = set[str]().union(*map(reads, kept))
    constants = sorted((tensor for tensor in tensors if tensor.name in read), key=lambda tensor: str(tensor.name))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    return model_of(kept, constants, list(model.graph.input), list(model.graph.output), facts)


def _in_order(nodes: Sequence[NodeProto], known: set[str]) -> list[NodeProto]:
    """Return nodes such that each comes behind those whose values it or its branches read."""
    waiting, ordered = list(nodes), []
    while waiting:
        ready = [node for node in waiting if reads(node) <= known]
        assert ready, f"{waiting[0].name} reads what no node makes"
        ordered += ready
        known = known.union(*(node.output for node in ready))
        done = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in done]
    return ordered
