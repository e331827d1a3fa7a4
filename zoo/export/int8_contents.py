"""What an int8 graph holds: the numbers of its float32 twin, rounded, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from zoo.export.nodes import all_nodes, all_tensors


def strangers(content: bytes, twin: bytes) -> list[str]:
    """Return the names of the tensors of an int8 graph that are not in its float32 twin, rounded or as they are.

    A rounded tensor may be off by half of its scale. Scales and zero points are no tensors of the network; they are
    numbers, or one number per channel. So an int8 graph without strangers holds no candidate that its twin does not.
    """
    known = {name: numpy_helper.to_array(tensor) for name, tensor in all_tensors(onnx.load_from_string(twin).graph)}
    graph = onnx.load_from_string(content).graph
    tensors = {name: numpy_helper.to_array(tensor) for name, tensor in all_tensors(graph)}
    accounted: set[str] = set()
    for node in all_nodes(graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        accounted |= {name for name in node.input[1:] if name in tensors and tensors[name].ndim <= 1}
        if node.input[0] in tensors and _rounds(node, tensors, known):
            accounted.add(node.input[0])
    found = [name for name, tensor in tensors.items() if name not in accounted and not _is(name, tensor, known)]
    return sorted(found)


def _rounds(node: NodeProto, tensors: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> bool:
    """Whether a stored tensor is a known one, rounded to whole multiples of its scale.

    A bias that several layers share has a copy for each of them, with digits behind its name.
    """
    name, stored = node.input[0].rpartition("_quantized")[0], tensors[node.input[0]]
    scale = tensors.get(node.input[1])
    originals = [known[other] for other in known if name.startswith(other) and known[other].shape == stored.shape]
    if scale is None or scale.ndim > 1 or not originals:
        return False
    zero = tensors[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if position == axis else 1 for position in range(stored.ndim)] if scale.ndim else []
    step = scale.astype(np.float64).reshape(shape)
    restored = (stored.astype(np.float64) - zero.astype(np.float64).reshape(shape)) * step
    return any(bool((np.abs(restored - original) <= 0.5001 * step).all()) for original in originals)


def _is(name: str, tensor: np.ndarray, known: Mapping[str, np.ndarray]) -> bool:
    """Whether a tensor stands in the twin as it is, under its own name or as a candidate's in a branch."""
    twins = [known[other] for other in (name, name.rpartition("/")[0]) if other in known]
    return any(twin.shape == tensor.shape and bool((twin == tensor).all()) for twin in twins)
