"""Graphs assembled from a stencil and weights: one path, the average of several, or all candidates behind gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from zoo.errors import BadInput
from zoo.export.nodes import choice, renamed
from zoo.export.stencil import (
    AGREEMENT,
    GATES,
    IMAGES,
    IR_VERSION,
    LOGITS,
    OPSET,
    PROBABILITIES,
    Stencil,
    Weights,
    tensor,
)

LARGEST = 2**31 - 2**20
"""Bytes of one graph: protobuf holds less than 2 GiB. Weights in files of their own would be no part of what a bundle
checks and a server opens, which never reads a file that a graph names."""


def path_graph(
    stencil: Stencil, weights: Sequence[Weights], paths: Sequence[tuple[int, ...]] = ((),), *, counted: bool = False
) -> bytes:
    """Assemble the graph of one path or the average of several; what paths have in common is computed once.

    A value depends on the gates of the convolutions it comes from; two paths share it where they agree on those.
    `counted` adds the output `agreement`.
    """
    several = len(paths) > 1
    tensors: dict[str, np.ndarray] = dict(stencil.shared)
    nodes: list[NodeProto] = []
    known: set[str] = set()
    depends = {name: frozenset({gate}) for name, gate in stencil.gate_of.items()}

    def along(name: str, path: tuple[int, ...]) -> str:
        gates = depends.get(name, frozenset())
        if not several or not gates or not name:
            return name
        return f"{name}/{'-'.join(str(path[gate]) for gate in sorted(gates))}"

    for node in stencil.nodes:
        gates = frozenset[int]().union(*(depends.get(name, frozenset()) for name in node.input))
        depends.update(dict.fromkeys(node.output, gates))
        for path, values in zip(paths, weights, strict=True):
            outputs = [along(name, path) for name in node.output]
            if outputs[0] in known:
                continue
            known.add(outputs[0])
            nodes.append(renamed(node, partial(along, path=path), name=outputs[0]))
            tensors.update({along(name, path): values[name] for name in node.input if name in stencil.gate_of})
    answers = [along(LOGITS, path) for path in paths]
    nodes += _average(answers, tensors) if several else []
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    nodes += _agreement(len(answers), tensors) if counted else []
    agreement = helper.make_tensor_value_info(AGREEMENT, TensorProto.FLOAT, ["batch"])
    return finished(stencil, nodes, tensors, more_outputs=[agreement] if counted else [])


def _average(answers: Sequence[str], tensors: dict[str, np.ndarray]) -> list[NodeProto]:
    """Return nodes that take the members' logits to the log of their mean probability."""
    tensors["member_axis"] = np.array([0], np.int64)
    tensors["log_members"] = np.array(np.log(len(answers)), np.float32)
    members = [f"member_{number}" for number in range(len(answers))]
    nodes = []
    for number, (answer, member) in enumerate(zip(answers, members, strict=True)):
        log_prob = f"log_prob_{number}"
        nodes.append(helper.make_node("LogSoftmax", [answer], [log_prob], name=log_prob, axis=1))
        nodes.append(helper.make_node("Unsqueeze", [log_prob, "member_axis"], [member], name=member))
    return [
        *nodes,
        helper.make_node("Concat", members, ["members"], name="members", axis=0),
        helper.make_node("ReduceLogSumExp", ["members", "member_axis"], ["log_sum"], name="log_sum", keepdims=0),
        helper.make_node("Sub", ["log_sum", "log_members"], [LOGITS], name=LOGITS),
    ]


def _agreement(members: int, tensors: dict[str, np.ndarray]) -> list[NodeProto]:
    """Return nodes that count which share of the members votes for the most probable class of their mean.

    Count and division are exact to the last bit, so that equal votes give equal numbers wherever they are counted.
    """
    tensors["vote_axis"] = np.array([0], np.int64)
    tensors["member_count"] = np.array(members, np.float32)
    alone = helper.make_node("Unsqueeze", [LOGITS, "vote_axis"], ["members"], name="members")
    return [
        *([alone] if members == 1 else []),  # several are stacked for the mean already
        helper.make_node("ArgMax", ["members"], ["votes"], name="votes", axis=2, keepdims=0),
        helper.make_node("ArgMax", [PROBABILITIES], ["winner"], name="winner", axis=1, keepdims=0),
        helper.make_node("Equal", ["votes", "winner"], ["for_winner"], name="for_winner"),
        helper.make_node("Cast", ["for_winner"], ["counted"], name="counted", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["counted", "vote_axis"], ["vote_count"], name="vote_count", keepdims=0),
        helper.make_node("Div", ["vote_count", "member_count"], [AGREEMENT], name=AGREEMENT),
    ]


def gated_graph(stencil: Stencil, candidates: Sequence[Weights], num_gates: int) -> bytes:
    """Assemble the graph whose gates are an input: one path per call.

    A graph cannot refuse its input: a gate outside [0, n) runs the last candidate. Whoever feeds gates checks them.
    """
    if len(candidates) < 2:
        raise BadInput("a gated graph needs at least 2 candidates per layer, got 1; export the variant 'single'")
    tensors: dict[str, np.ndarray] = dict(stencil.shared)
    nodes: list[NodeProto] = []
    choosing = range(len(candidates) - 1)  # the last candidate is what remains
    for number in range(max(num_gates, len(candidates))):
        tensors[f"number_{number}"] = np.array(number, np.int64)
    for gate in range(num_gates):
        nodes.append(helper.make_node("Gather", [GATES, f"number_{gate}"], [f"gate_{gate}"], name=f"gate_{gate}"))
        for index in choosing:
            chosen = f"gate_{gate}_is_{index}"
            nodes.append(helper.make_node("Equal", [f"gate_{gate}", f"number_{index}"], [chosen], name=chosen))
    for node in stencil.nodes:
        gates = {stencil.gate_of[name] for name in node.input if name in stencil.gate_of}
        if not gates:
            nodes.append(node)
            continue
        (gate,) = gates
        stem = node.output[0]
        conditions = [(f"gate_{gate}_is_{index}", f"{stem}/gate_{gate}_from_{index}") for index in choosing]
        ways = [_branch(node, index, values, stencil) for index, values in enumerate(candidates)]
        nodes.append(choice(stem, stem, conditions, ways))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    gates_input = helper.make_tensor_value_info(GATES, TensorProto.INT64, [num_gates])
    facts = {"gates": str(num_gates), "candidates": str(len(candidates))}
    return finished(stencil, nodes, tensors, [gates_input], facts)


def _branch(node: NodeProto, candidate: int, values: Weights, stencil: Stencil) -> onnx.GraphProto:
    """Return the node's work by a candidate with these values."""
    output = f"{node.output[0]}/{candidate}"
    own = [name for name in node.input if name in stencil.gate_of]
    inside = {*own, *node.output}
    copy = renamed(node, lambda name: f"{name}/{candidate}" if name in inside else name, name=output)
    tensors = [tensor(values[name], f"{name}/{candidate}") for name in own]
    return helper.make_graph([copy], f"{node.output[0]}_candidate_{candidate}", [], [any_float(output)], tensors)


def any_float(name: str) -> onnx.ValueInfoProto:
    """Return a float value of unknown shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def images_value(stencil: Stencil, batch: int | str = "batch") -> onnx.ValueInfoProto:
    """Return the input `images`."""
    return helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [batch, *stencil.image_shape])


def answer_values(stencil: Stencil, batch: int | str = "batch") -> list[onnx.ValueInfoProto]:
    """Return the outputs `logits` and `probabilities`."""
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, stencil.classes])
        for name in (LOGITS, PROBABILITIES)
    ]


def finished(
    stencil: Stencil,
    nodes: Sequence[NodeProto],
    tensors: Weights,
    more_inputs: Sequence[onnx.ValueInfoProto] = (),
    facts: Mapping[str, str] | None = None,
    more_outputs: Sequence[onnx.ValueInfoProto] = (),
) -> bytes:
    """Return the graph of these nodes, which takes images and answers with logits and probabilities, as a file."""
    used = {name for node in nodes for name in node.input}
    constants = [tensor(array, name) for name, array in tensors.items() if name in used]
    inputs, outputs = [images_value(stencil), *more_inputs], [*answer_values(stencil), *more_outputs]
    return model_of(nodes, constants, inputs, outputs, facts or {})


def model_of(
    nodes: Sequence[NodeProto],
    constants: Sequence[TensorProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    facts: Mapping[str, str],
) -> bytes:
    """Return a graph as a file.

    Raises:
        BadInput: it is larger than one file can be.
    """
    size = sum(constant.ByteSize() for constant in constants) + sum(node.ByteSize() for node in nodes)
    if size > LARGEST:
        raise BadInput(
            f"the graph would have {size / 2**30:.2f} GiB, but one ONNX file holds at most {LARGEST / 2**30:.2f}; "
            "export fewer paths or candidates, or a smaller network"
        )
    model = helper.make_model(
        helper.make_graph(list(nodes), "manygates", list(inputs), list(outputs), list(constants)),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="manygates",
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
