"""A network exported to ONNX once, as a stencil from which the graphs of its paths and members are assembled.

Tensors that differ between candidates or members are inputs of the stencil while torch's exporter and its optimiser
work on it, so nothing can be made of their values: no norm is fused with them, no expression of them is computed
(docs/adr/0005). What depends on them alone, and not on the images, is computed afterwards for each candidate: the
weight that a parametrisation makes, and the convolution into which the BatchNorm behind it is folded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zoo.errors import BadInput
from zoo.export.nodes import branches, needed, renamed
from zoo.gates import graphs
from zoo.networks import num_exits
from zoo.runtime import session

OPSET = 18
IR_VERSION = 10  # onnx.helper would write a newer one than ONNX Runtime loads
LOGITS, PROBABILITIES, IMAGES, GATES = "logits", "probabilities", "images", "gates"
EXIT_LOGITS, LIMITS, EXIT = "exit_logits", "limits", "exit"
AGREEMENT = "agreement"

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stencil:
    """An exported network: nodes in order, and tensors by name, of which some have a gate."""

    nodes: list[NodeProto]
    shared: dict[str, np.ndarray]
    image_shape: tuple[int, ...]
    classes: int
    gate_of: dict[str, int]
    """Name of a tensor that differs between candidates -> position of its gate."""
    exits: tuple[str, ...]
    """Names of the logits of every exit, first exit first; the last are always `logits`."""
    computed: Callable[[Weights], dict[str, np.ndarray]]

    def gated(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return the tensors that have a gate, for a candidate with these tensors of the network."""
        return {name: array for name, array in self.computed(arrays(tensors)).items() if name in self.gate_of}


def stencil_of(network: nn.Module, image_shape: tuple[int, ...], gate_of: Mapping[str, int] | None = None) -> Stencil:
    """Export a network in evaluation mode for images of (channel, height, width).

    `gate_of` maps those of its parameters and buffers that get other values later to the position of their gate.

    Raises:
        BadInput: a part is in training mode, torch cannot export it, or an operation reads the tensors of two gates.
    """
    name, gate_of = type(network).__name__, gate_of or {}
    graphs.check_evaluating(network, "an export")
    network = graphs.copied(network).float().cpu()
    own = arrays({key: tensor for key, tensor in graphs.tensors(network) if tensor.is_floating_point()})
    if taken := sorted(own.keys() & {IMAGES, LOGITS, PROBABILITIES, GATES, AGREEMENT, LIMITS, EXIT, EXIT_LOGITS}):
        raise BadInput(f"{name} has a tensor called {taken[0]!r}, as an input or output of its graph is; rename it")
    exits = (*(f"{EXIT_LOGITS}_{index}" for index in range(num_exits(network) - 1)), LOGITS)
    graph = _exported(network, torch.zeros(2, *image_shape), exits, own)
    if any(map(branches, graph.node)):
        raise BadInput(f"{name} was exported with a branch or a loop of its own; expected a network without them")
    kinds = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    if LOGITS not in kinds or len(kinds[LOGITS].shape.dim) != 2 or kinds[LOGITS].elem_type != TensorProto.FLOAT:
        raise BadInput(f"{name} does not answer with one tensor of logits (batch, class); expected a classifier")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        del node.metadata_props[:]  # stack traces of the machine that exported
        node.doc_string = ""
        nodes.append(_pooled(node, constants, kinds))
    gates = {key: frozenset({gate_of[key]}) if key in gate_of else frozenset[int]() for key in own}
    nodes, gates, computed = _separated(nodes, constants, gates, exits)
    for node in nodes:
        meeting = frozenset[int]().union(*(gates.get(read, frozenset()) for read in node.input))
        if len(meeting) > 1 or (meeting and len(node.output) > 1):
            raise BadInput(
                f"{name} computes {node.output[0]!r} ({node.op_type}) from the tensors of the gates {sorted(meeting)}; "
                "expected layers with one output, each from the tensors of one gate"
            )
    read = {key for node in nodes for key in node.input}
    shared = {key: array for key, array in constants.items() if key in read}
    shared.update((key, array) for key, array in computed(own).items() if not gates[key])
    return Stencil(
        nodes=nodes,
        shared=shared,
        image_shape=image_shape,
        classes=kinds[LOGITS].shape.dim[1].dim_value,
        gate_of={key: min(found) for key, found in gates.items() if found},
        exits=exits,
        computed=computed,
    )


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as numpy arrays, floating-point ones as float32."""
    found = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in found.items()}


def _exported(
    network: nn.Module, example: torch.Tensor, exits: Sequence[str], inputs: Iterable[str]
) -> onnx.GraphProto:
    """Return the optimised graph, of which the network's tensors of these names are inputs, where they are used."""
    from torch.onnx._internal.exporter import _core  # a second to import, which only an export should pay

    try:
        with warnings.catch_warnings():
            # torch's exporter calls its own deprecated functions (FutureWarning, DeprecationWarning).
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            program = _core.export(
                network,
                (example,),
                registry=_registry("torchvision" in sys.modules),
                optimize=False,
                opset_version=OPSET,
                input_names=[IMAGES],
                output_names=list(exits),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            graph = program.model.graph
            for name in inputs:
                value = graph.initializers.pop(name, None)
                if value is not None and value.uses():
                    value.const_value = None
                    graph.inputs.append(value)
            program.optimize()
            return program.model_proto.graph
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise BadInput(
            f"torch cannot export {type(network).__name__} to ONNX ({_reason(error)}); expected a forward without "
            "branches that depend on the images, for any batch size"
        ) from error


@cache
def _registry(torchvision: bool) -> Any:
    """Return torch's table of ONNX functions, made once per process: `torch.onnx.export` makes it anew at every call.

    That is half of the time that a small network takes. The exporter below the public function takes a table and only
    reads it. torch is pinned to one version, and a test compares what both make. Once torchvision is loaded, its
    operators are in the table.
    """
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _pooled(node: NodeProto, constants: Weights, kinds: Mapping[str, Any]) -> NodeProto:
    """Write a mean over height and width as GlobalAveragePool, which keeps ONNX Runtime's blocked layout."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
        return node
    kept = {attribute.name: attribute.i for attribute in node.attribute}.get("keepdims", 1)
    read = kinds.get(node.input[0])
    if not kept or read is None or len(read.shape.dim) != 4:
        return node
    if sorted(int(axis) % 4 for axis in constants[node.input[1]].reshape(-1)) != [2, 3]:
        return node
    return helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)


@dataclass(frozen=True)
class _Fold:
    """A convolution and the BatchNorm that alone reads it, by the names of their tensors."""

    conv: tuple[str, str]  # weight and bias, "" if it has none
    norm: tuple[str, str, str, str]  # scale, shift, mean, variance
    eps: float
    made: tuple[str, str]

    def __call__(self, known: Weights) -> dict[str, np.ndarray]:
        """Return the weight and the bias of the convolution that does the work of both."""
        weight, scale, shift, mean, variance = (torch.tensor(known[name]) for name in (self.conv[0], *self.norm))
        bias = torch.tensor(known[self.conv[1]]) if self.conv[1] else None
        folded = fuse_conv_bn_weights(weight, bias, mean, variance, self.eps, scale, shift)
        return {name: tensor.detach().numpy() for name, tensor in zip(self.made, folded, strict=True)}


def _separated(
    nodes: Sequence[NodeProto], constants: Weights, own: Mapping[str, frozenset[int]], outputs: Sequence[str]
) -> tuple[list[NodeProto], dict[str, frozenset[int]], Callable[[Weights], dict[str, np.ndarray]]]:
    """Separate what depends on the images from what depends on the network's own tensors alone, which have gates.

    Returns:
        The nodes that depend on the images, each BatchNorm folded into the convolution that it alone reads; the gates
        of the tensors that they read beside the constants; and the function that computes those from the network's.
    """
    gates = {**dict.fromkeys(["", *constants], frozenset[int]()), **own}  # of everything no image has a part in
    steady, behind = [], []
    for node in nodes:
        if node.input and all(name in gates for name in node.input):
            steady.append(node)
            gates.update(dict.fromkeys(node.output, frozenset[int]().union(*(gates[name] for name in node.input))))
        else:
            behind.append(node)
    behind, folds = _folded(needed(behind, outputs), gates, {*constants, *own})
    made = {
        name: frozenset().union(*(gates[read] for read in (*fold.conv, *fold.norm)))
        for fold in folds
        for name in fold.made
    }
    direct = [name for name in dict.fromkeys(name for node in behind for name in node.input) if name in gates]
    direct = [name for name in direct if name and name not in constants and name not in made]
    read = {*direct, *(name for fold in folds for name in (*fold.conv, *fold.norm))}
    run = _computing(steady, constants, [name for node in steady for name in node.output if name in read])

    def computed(tensors: Weights) -> dict[str, np.ndarray]:
        known = {**constants, **tensors, **run(tensors)}
        found = {name: known[name] for name in direct}
        for fold in folds:
            found.update(fold(known))
        return found

    return behind, {**{name: gates[name] for name in direct}, **made}, computed


def _folded(
    nodes: Sequence[NodeProto], steady: Collection[str], given: Collection[str]
) -> tuple[list[NodeProto], list[_Fold]]:
    """Merge each BatchNorm into the convolution that it alone reads: valid in evaluation mode, where it is affine.

    The nodes depend on the images, `steady` are the names of all values that do not, and `given` are those among them
    that no node computes.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    merged: list[NodeProto] = []
    folds: list[_Fold] = []
    gone: set[str] = set()
    for node in nodes:
        if node.output[0] in gone:
            continue
        norms = readers.get(node.output[0], [])
        if (
            node.op_type != "Conv"
            or [norm.op_type for norm in norms] != ["BatchNormalization"]
            or not all(name in steady for name in (*node.input[1:], *norms[0].input[1:]))
        ):
            merged.append(node)
            continue
        (norm,) = norms
        weight, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
        # the names of the convolution's own tensors, where nobody else reads them
        alone = weight in given and len(readers[weight]) == 1 and len(readers.get(bias, [node])) == 1
        stem = weight.removesuffix(".weight") if alone else norm.output[0]
        copy = renamed(node, str)
        del copy.input[:], copy.output[:]
        copy.input.extend([node.input[0], f"{stem}.weight", f"{stem}.bias"])
        copy.output.extend(norm.output)
        merged.append(copy)
        gone.add(norm.output[0])
        eps = {attribute.name: attribute.f for attribute in norm.attribute}.get("epsilon", 1e-5)
        scale, shift, mean, variance = norm.input[1:]
        folds.append(_Fold((weight, bias), (scale, shift, mean, variance), eps, (f"{stem}.weight", f"{stem}.bias")))
    return merged, folds


def _computing(
    nodes: Sequence[NodeProto], constants: Weights, wanted: Sequence[str]
) -> Callable[[Weights], dict[str, np.ndarray]]:
    """Return a function that computes the values named in `wanted` from tensors by name."""
    nodes = needed(nodes, wanted)
    makes = {output for node in nodes for output in node.output}
    read = [name for name in dict.fromkeys(name for node in nodes for name in node.input) if name and name not in makes]
    fixed = [tensor(constants[name], name) for name in read if name in constants]
    fed = [name for name in read if name not in constants]

    def run(tensors: Weights) -> dict[str, np.ndarray]:
        if not wanted:
            return {}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in ((name, tensors[name]) for name in fed)
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
        model = helper.make_model(
            helper.make_graph(nodes, "weights", inputs, outputs, fixed),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        opened = session(onnx.shape_inference.infer_shapes(model).SerializeToString())
        return dict(zip(wanted, opened.run(list(wanted), {name: tensors[name] for name in fed}), strict=True))

    return run


def tensor(array: np.ndarray, name: str) -> TensorProto:
    """Return an array as a tensor of a graph; one without dimensions stays so."""
    return numpy_helper.from_array(np.asarray(array, order="C"), name)
