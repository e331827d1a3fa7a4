"""Pruned ONNX graphs of a random gated network, assembled from one exported template.

The template is exported by torch once, its BatchNorms folded, its gated convolutions filled with random numbers so that
no exporter can merge or drop them. Every graph is then put together from that stencil and the candidates' weights:

    single    the stencil with one path's weights
    ensemble  the stencil once per path, every node that two paths share computed once, the probabilities averaged
    gated     each gated convolution an `If` over its candidates; the gates are an input

So a graph holds nothing of the candidates that it does not run (docs/adr/0005).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from zoo.derive import derive, folded_copy
from zoo.errors import BadInput
from zoo.paths import Path
from zoo.rgn import RandomGatedNetwork

OPSET = 18
IR_VERSION = 10  # onnx.helper would write a newer one than ONNX Runtime loads
LOGITS, PROBABILITIES, IMAGES, GATES = "logits", "probabilities", "images", "gates"

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stencil:
    """The exported template: nodes in order, shared tensors by name, and the gate of each gated convolution."""

    nodes: list[NodeProto]
    shared: dict[str, np.ndarray]
    image_shape: tuple[int, ...]
    classes: int
    gate_of: dict[str, int] = field(default_factory=dict)
    """Gated tensor name -> position of its gate."""


def single_graph(network: nn.Module) -> bytes:
    """Return the ONNX file of a plain network in evaluation mode.

    Input `images` float32 (batch, channel, height, width) in [0, 1]; outputs `logits` and `probabilities`.
    """
    stencil = _stencil(folded_copy(network), _image_shape(network))
    return _path_graph(stencil, [{}])


def rgn_graphs(
    rgn: RandomGatedNetwork, single: Path | None, ensemble: Sequence[Path], *, gated: bool
) -> dict[str, bytes]:
    """Return the ONNX files of the wanted variants of a random gated network, by variant name.

    Raises:
        BadPath: a path does not fit the network.
        BadInput: the network has a single candidate per layer and a gated graph is wanted, it does not say the shape
            of its images, or the exporter changed a gated layer.
    """
    image_shape = _image_shape(rgn.template)
    network = folded_copy(derive(rgn, [0] * rgn.num_gates))
    gate_of: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate, layer in enumerate(rgn.layers):
            for name, parameter in network.get_submodule(layer.conv).named_parameters():
                parameter.normal_(generator=generator)
                gate_of[f"{layer.conv}.{name}"] = gate
    stencil = _stencil(network, image_shape, gate_of)
    folded = [rgn.folded([candidate] * rgn.num_gates) for candidate in range(rgn.candidates)]
    candidates = [{name: weights[name].numpy() for name in gate_of} for weights in folded]
    graphs = {}
    if single is not None:
        graphs["single"] = _path_graph(stencil, [_weights_of(candidates, gate_of, rgn.check(single))])
    if ensemble:
        keyed = [rgn.check(path) for path in ensemble]
        graphs["ensemble"] = _path_graph(stencil, [_weights_of(candidates, gate_of, path) for path in keyed], keyed)
    if gated:
        graphs["gated"] = _gated_graph(stencil, candidates, rgn.num_gates)
    return graphs


def members_graph(members: Sequence[nn.Module]) -> bytes:
    """Return one ONNX file that averages the probabilities of separate plain networks of one architecture."""
    image_shape = _image_shape(members[0])
    folded = [folded_copy(member) for member in members]
    # A BatchNorm that cannot be folded has buffers of its own in each member; the normalisation's are common to all.
    buffers = [
        name
        for name, buffer in folded[0].named_buffers()
        if buffer.is_floating_point() and not all(torch.equal(buffer, m.get_buffer(name)) for m in folded[1:])
    ]
    own = [dict(m.named_parameters()) | {name: m.get_buffer(name) for name in buffers} for m in folded]
    weights = [{name: tensor.detach().numpy().copy() for name, tensor in tensors.items()} for tensors in own]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in own[0].values():
            tensor.normal_(generator=generator)
    stencil = _stencil(folded[0], image_shape, dict.fromkeys(weights[0], 0))
    return _path_graph(stencil, weights, [(number,) for number in range(len(members))])


def count_parameters(file: bytes) -> int:
    """Return how many numbers a graph's tensors hold, those inside its branches included."""

    def inside(graph: onnx.GraphProto) -> int:
        floats = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
        own = sum(int(np.prod(tensor.dims)) for tensor in floats if tensor.dims)  # a scalar is a bound, no weight
        branches = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        return own + sum(inside(branch) for branch in branches)

    return inside(onnx.load_from_string(file).graph)


def _image_shape(network: nn.Module) -> tuple[int, ...]:
    """Return (channel, height, width) of the images a network was built for."""
    shape = getattr(network, "image_shape", None)
    if shape is None:
        raise BadInput(
            f"{type(network).__name__} does not say the shape of its images; set network.image_shape = "
            "(channel, height, width) before exporting it"
        )
    return tuple(shape)


def _stencil(network: nn.Module, image_shape: tuple[int, ...], gate_of: dict[str, int] | None = None) -> Stencil:
    gate_of = gate_of or {}
    example = torch.zeros(2, *image_shape)
    with warnings.catch_warnings():
        # torch's exporter calls its own deprecated functions (FutureWarning, DeprecationWarning).
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[IMAGES],
            output_names=[LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    lost = sorted(gate_of.keys() - constants.keys())
    if lost:
        raise BadInput(f"the exporter merged or renamed the gated tensors {lost[:3]}; this network cannot be pruned")
    nodes = []
    for node in graph.node:
        del node.metadata_props[:]  # stack traces of the machine that exported
        node.doc_string = ""
        nodes.append(_pooled(node, constants))
    used = {name for node in nodes for name in node.input}
    shared = {name: array for name, array in constants.items() if name in used and name not in gate_of}
    with torch.no_grad():
        classes = network(example).shape[1]
    return Stencil(nodes, shared, image_shape, classes, gate_of)


def _pooled(node: NodeProto, constants: Weights) -> NodeProto:
    """Write a mean over height and width as GlobalAveragePool, which keeps ONNX Runtime's blocked layout."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
        return node
    keepdims = {attribute.name: attribute.i for attribute in node.attribute}.get("keepdims", 1)
    axes = sorted(int(axis) % 4 for axis in constants[node.input[1]])
    if axes != [2, 3] or not keepdims:
        return node
    return helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)


def _weights_of(candidates: Sequence[Weights], gate_of: Mapping[str, int], path: Path) -> dict[str, np.ndarray]:
    return {name: candidates[path[gate]][name] for name, gate in gate_of.items()}


def _path_graph(stencil: Stencil, weights: Sequence[Weights], paths: Sequence[tuple[int, ...]] = ((),)) -> bytes:
    """Assemble the graph of one path or the average of several; what paths have in common is computed once.

    A value depends on the gates of the convolutions it comes from; two paths share it where they agree on those.
    """
    several = len(paths) > 1
    tensors: dict[str, np.ndarray] = dict(stencil.shared)
    nodes: list[NodeProto] = []
    known: set[str] = set()
    depends: dict[str, frozenset[int]] = {}

    def renamed(name: str, path: tuple[int, ...]) -> str:
        gates = depends.get(name, frozenset({stencil.gate_of[name]}) if name in stencil.gate_of else frozenset())
        if not several or not gates or not name:
            return name
        return f"{name}/{'-'.join(str(path[gate]) for gate in sorted(gates))}"

    for node in stencil.nodes:
        gates = [depends.get(name, frozenset()) for name in node.input]
        gates += [frozenset({stencil.gate_of[name]}) for name in node.input if name in stencil.gate_of]
        for output in node.output:
            depends[output] = frozenset().union(*gates)
        for path, values in zip(paths, weights, strict=True):
            outputs = [renamed(name, path) for name in node.output]
            if outputs[0] in known:
                continue
            known.add(outputs[0])
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = outputs[0]
            del copy.input[:], copy.output[:]
            copy.input.extend(renamed(name, path) for name in node.input)
            copy.output.extend(outputs)
            nodes.append(copy)
            for name in node.input:
                if name in stencil.gate_of:
                    tensors[renamed(name, path)] = values[name]
    answers = [renamed(LOGITS, path) for path in paths]
    nodes += _average(answers, tensors) if several else []
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    return _finish(stencil, nodes, tensors)


def _average(answers: Sequence[str], tensors: dict[str, np.ndarray]) -> list[NodeProto]:
    """Return nodes that take the members' logits to the log of their mean probability."""
    tensors["member_axis"] = np.array([0], np.int64)
    tensors["log_members"] = np.array(np.log(len(answers)), np.float32)
    nodes = []
    for number, answer in enumerate(answers):
        nodes.append(
            helper.make_node("LogSoftmax", [answer], [f"log_prob_{number}"], name=f"log_prob_{number}", axis=1)
        )
        nodes.append(
            helper.make_node(
                "Unsqueeze", [f"log_prob_{number}", "member_axis"], [f"member_{number}"], name=f"member_{number}"
            )
        )
    members = [f"member_{number}" for number in range(len(answers))]
    nodes.append(helper.make_node("Concat", members, ["members"], name="members", axis=0))
    nodes.append(
        helper.make_node("ReduceLogSumExp", ["members", "member_axis"], ["log_sum"], name="log_sum", keepdims=0)
    )
    nodes.append(helper.make_node("Sub", ["log_sum", "log_members"], [LOGITS], name=LOGITS))
    return nodes


def _gated_graph(stencil: Stencil, candidates: Sequence[Weights], num_gates: int) -> bytes:
    """Assemble the graph whose gates are an input: one path per call.

    A graph cannot refuse its input: a gate outside [0, n) runs the last candidate. Whoever feeds gates checks them.
    """
    if len(candidates) < 2:
        raise BadInput("a gated graph needs at least 2 candidates per layer, got 1; export the variant 'single'")
    tensors: dict[str, np.ndarray] = dict(stencil.shared)
    nodes: list[NodeProto] = []
    for number in range(max(num_gates, len(candidates))):
        tensors[f"number_{number}"] = np.array(number, np.int64)
    for gate in range(num_gates):
        nodes.append(helper.make_node("Gather", [GATES, f"number_{gate}"], [f"gate_{gate}"], name=f"gate_{gate}"))
        for candidate in range(len(candidates) - 1):
            chosen = f"gate_{gate}_is_{candidate}"
            nodes.append(helper.make_node("Equal", [f"gate_{gate}", f"number_{candidate}"], [chosen], name=chosen))
    for node in stencil.nodes:
        gates = {stencil.gate_of[name] for name in node.input if name in stencil.gate_of}
        if not gates:
            nodes.append(node)
            continue
        (gate,) = gates
        nodes.append(_choice(node, gate, 0, candidates, stencil))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    gates_input = helper.make_tensor_value_info(GATES, TensorProto.INT64, [num_gates])
    facts = {"gates": str(num_gates), "candidates": str(len(candidates))}
    return _finish(stencil, nodes, tensors, [gates_input], facts)


def _choice(node: NodeProto, gate: int, candidate: int, candidates: Sequence[Weights], stencil: Stencil) -> NodeProto:
    """Return the node's work by `candidate`, or by one of those behind it."""
    branch = _branch(node, candidate, candidates, stencil)
    if candidate == len(candidates) - 2:
        otherwise = _branch(node, candidate + 1, candidates, stencil)
    else:
        inner = _choice(node, gate, candidate + 1, candidates, stencil)
        inner_output = f"{node.output[0]}/from_{candidate + 1}"
        del inner.output[:]
        inner.output.append(inner_output)
        otherwise = helper.make_graph([inner], f"{node.output[0]}_from_{candidate + 1}", [], [_any(inner_output)])
    return helper.make_node(
        "If",
        [f"gate_{gate}_is_{candidate}"],
        list(node.output),
        name=f"{node.output[0]}/gate_{gate}_from_{candidate}",
        then_branch=branch,
        else_branch=otherwise,
    )


def _branch(node: NodeProto, candidate: int, candidates: Sequence[Weights], stencil: Stencil) -> onnx.GraphProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    output = f"{node.output[0]}/{candidate}"
    copy.name = output
    own = [name for name in node.input if name in stencil.gate_of]
    del copy.input[:], copy.output[:]
    copy.input.extend(f"{name}/{candidate}" if name in own else name for name in node.input)
    copy.output.append(output)
    tensors = [_tensor(candidates[candidate][name], f"{name}/{candidate}") for name in own]
    return helper.make_graph([copy], f"{node.output[0]}_candidate_{candidate}", [], [_any(output)], tensors)


def _any(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _tensor(array: np.ndarray, name: str) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def _finish(
    stencil: Stencil,
    nodes: Sequence[NodeProto],
    tensors: Weights,
    more_inputs: Sequence[onnx.ValueInfoProto] = (),
    facts: Mapping[str, str] | None = None,
) -> bytes:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        list(nodes),
        "manygates",
        [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, ["batch", *stencil.image_shape]), *more_inputs],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", stencil.classes])
            for name in (LOGITS, PROBABILITIES)
        ],
        [_tensor(array, name) for name, array in tensors.items() if name in used],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="manygates"
    )
    helper.set_model_props(model, dict(facts or {}))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def as_numpy(images: Tensor) -> np.ndarray:
    """Return images as the float32 array that a graph takes."""
    return np.ascontiguousarray(images.detach().cpu().numpy().astype(np.float32))
