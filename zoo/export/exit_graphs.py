"""Graphs of a network with several exits, assembled from a stencil: one that answers at all, one that stops early."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from zoo.export.assembly import answer_values, any_float, finished, images_value, model_of
from zoo.export.nodes import needed, renamed
from zoo.export.stencil import EXIT, EXIT_LOGITS, LIMITS, LOGITS, PROBABILITIES, Stencil, tensor


def all_exits_graph(stencil: Stencil) -> bytes:
    """Assemble the graph that answers at every exit."""
    tensors = {**stencil.shared, "exit_axis": np.array([1], np.int64)}
    rows = [f"{name}/row" for name in stencil.exits]
    nodes = list(stencil.nodes)
    for name, row in zip(stencil.exits, rows, strict=True):
        nodes.append(helper.make_node("Unsqueeze", [name, "exit_axis"], [row], name=row))
    nodes.append(helper.make_node("Concat", rows, [EXIT_LOGITS], name=EXIT_LOGITS, axis=1))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    shape: list[int | str | None] = ["batch", len(rows), stencil.classes]
    every = helper.make_tensor_value_info(EXIT_LOGITS, TensorProto.FLOAT, shape)
    return finished(stencil, nodes, tensors, more_outputs=[every])


def early_exit_graph(stencil: Stencil) -> bytes:
    """Assemble the graph of nested choices: one for each exit but the last."""
    nodes, tensors = _answer_from(stencil, _stages(stencil), 0, (LOGITS, PROBABILITIES, EXIT))
    limits = helper.make_tensor_value_info(LIMITS, TensorProto.FLOAT, [len(stencil.exits) - 1])
    answers = [*answer_values(stencil, 1), helper.make_tensor_value_info(EXIT, TensorProto.INT64, [1])]
    constants = [tensor(array, name) for name, array in tensors.items()]
    return model_of(nodes, constants, [images_value(stencil, 1), limits], answers, {"exits": str(len(stencil.exits))})


def _answer_from(
    stencil: Stencil, stages: Sequence[Sequence[NodeProto]], exit_index: int, outputs: Sequence[str]
) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """Return nodes, and the tensors that they are the first to use, for the answer of this exit or of one behind it.

    The exits behind it are in a branch of their own, and so is all that they need beyond what is computed already.
    """
    logits, probabilities = f"{EXIT_LOGITS}_{exit_index}", f"exit_probabilities_{exit_index}"
    earlier = {name for nodes in stages[:exit_index] for node in nodes for name in node.input}
    used = {name for node in stages[exit_index] for name in node.input} - earlier  # a branch sees what is around it
    tensors = {name: array for name, array in stencil.shared.items() if name in used}
    softmax = helper.make_node("Softmax", [logits], [probabilities], name=probabilities, axis=1)
    nodes = [*stages[exit_index], softmax]

    def answer(names: Sequence[str]) -> list[NodeProto]:
        return [
            helper.make_node("Identity", [logits], [names[0]], name=names[0]),
            helper.make_node("Identity", [probabilities], [names[1]], name=names[1]),
            helper.make_node("Constant", [], [names[2]], name=names[2], value_ints=[exit_index]),
        ]

    if exit_index == len(stages) - 1:
        return [*nodes, *answer(outputs)], tensors
    position, limit, most, sure = (f"{name}_{exit_index}" for name in ("position", "limit", "confidence", "sure"))
    tensors[position] = np.array(exit_index, np.int64)
    leaving, staying = ([f"{name}/{way}_{exit_index}" for name in outputs] for way in ("left_at", "behind"))
    behind, theirs = _answer_from(stencil, stages, exit_index + 1, staying)
    held = [tensor(array, name) for name, array in theirs.items()]
    leave = helper.make_graph(answer(leaving), f"leave_at_{exit_index}", [], _answers_of(leaving))
    stay = helper.make_graph(behind, f"behind_{exit_index}", [], _answers_of(staying), held)
    nodes += [
        helper.make_node("ReduceMax", [probabilities], [most], name=most, keepdims=0),
        helper.make_node("Gather", [LIMITS, position], [limit], name=limit),
        helper.make_node("GreaterOrEqual", [most, limit], [sure], name=sure),
        helper.make_node("If", [sure], outputs, name=f"exit_{exit_index}", then_branch=leave, else_branch=stay),
    ]
    return nodes, tensors


def _answers_of(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [*map(any_float, names[:2]), helper.make_tensor_value_info(names[2], TensorProto.INT64, None)]


def _stages(stencil: Stencil) -> list[list[NodeProto]]:
    """Return the nodes by the first exit that needs them, in their order; the last logits get a number as well."""
    last = f"{EXIT_LOGITS}_{len(stencil.exits) - 1}"
    stages: list[list[NodeProto]] = []
    known: set[str] = set()
    for answer in stencil.exits:
        new = [node for node in needed(stencil.nodes, [answer]) if node.output[0] not in known]
        known |= {node.output[0] for node in new}
        stages.append([renamed(node, lambda name: last if name == LOGITS else name) for node in new])
    return stages
