"""What a traced network looks like: its convolutions, which of them are projections, and its prefixes.

Everything here works on the `torch.fx` graph of a plain network, so no network needs code of its own to become a random
gated one. Names of layers are the module names of the network (`stages.0.1.conv2`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn
from torch.func import functional_call

from zoo.errors import BadInput

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATION_MODULES = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU)
_ACTIVATION_FUNCTIONS = {torch.relu, nn.functional.relu, nn.functional.leaky_relu, nn.functional.relu6, "relu", "relu_"}


@dataclass(frozen=True)
class Convolution:
    """A convolution of a network and the BatchNorm that alone reads it, if there is one."""

    conv: str
    norm: str | None
    projection: bool  # stands on a shortcut, beside a longer main branch


def trace(network: nn.Module) -> fx.GraphModule:
    """Return the graph of `network` as evaluation mode runs it, sharing its layers.

    Layers such as `nn.Dropout` and `nn.BatchNorm2d` follow the mode of a call; functions that were given the mode, such
    as `F.dropout(x, training=self.training)`, are fixed to evaluation.

    Raises:
        BadInput: the network's forward depends on its input's values, so it has no fixed graph.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        return fx.symbolic_trace(network)
    except (fx.proxy.TraceError, TypeError, NotImplementedError, RuntimeError) as error:
        raise BadInput(
            f"{type(network).__name__} cannot be traced with torch.fx ({error}); expected a forward without branches "
            "that depend on the images"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def convolutions(graph_module: fx.GraphModule) -> list[Convolution]:
    """Return the 2-d convolutions in the order in which a forward pass meets them.

    Raises:
        BadInput: one convolution is called more than once; a gate could not say which call it belongs to.
    """
    modules = dict(graph_module.named_modules())
    conv_nodes = [node for node in graph_module.graph.nodes if _is(node, nn.Conv2d, modules)]
    names = [str(node.target) for node in conv_nodes]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"convolution {name!r} is used {names.count(name)} times in one forward; expected once each")
    projections = _projections(graph_module, set(conv_nodes))
    norm_calls = Counter(str(node.target) for node in graph_module.graph.nodes if _is(node, nn.BatchNorm2d, modules))
    found = []
    for node in conv_nodes:
        users = list(node.users)
        norm = None
        if len(users) == 1 and _is(users[0], nn.BatchNorm2d, modules):
            reader = str(users[0].target)
            # without running statistics it depends on the batch even in evaluation mode: never ours to gate or fold
            if norm_calls[reader] == 1 and cast(nn.BatchNorm2d, modules[reader]).track_running_stats:
                norm = reader
        found.append(Convolution(str(node.target), norm, node in projections))
    return found


def _is(node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...], modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kind)


def _projections(graph_module: fx.GraphModule, conv_nodes: set[fx.Node]) -> set[fx.Node]:
    """Convolutions on the shorter side of an addition, between the fork and the sum."""
    projections: set[fx.Node] = set()
    for _, (_, shortcut), _ in _forks(graph_module, conv_nodes):
        projections |= shortcut
    return projections


def _forks(
    graph_module: fx.GraphModule, conv_nodes: set[fx.Node]
) -> Iterator[tuple[fx.Node, tuple[fx.Node, set[fx.Node]], tuple[fx.Node, set[fx.Node]]]]:
    """Yield every addition of two branches of one fork with (operand, its convolutions since the fork), shorter first.

    Branches of equal length are left out: neither is a shortcut of the other.
    """
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        ancestors[node] = {node}.union(*(ancestors[source] for source in node.all_input_nodes))
    for node in graph_module.graph.nodes:
        operands = node.all_input_nodes
        if node.target not in _ADDITIONS or len(operands) != 2:
            continue
        left, right = (ancestors[operand] for operand in operands)
        branches = [(operands[0], (left - right) & conv_nodes), (operands[1], (right - left) & conv_nodes)]
        shorter, longer = sorted(branches, key=lambda branch: len(branch[1]))
        if len(shorter[1]) < len(longer[1]):
            yield node, shorter, longer


def residual_branches(graph_module: fx.GraphModule, *, projections: bool) -> list[tuple[fx.Node, fx.Node]]:
    """Return (addition, its residual operand) of every residual block: the operand with convolutions of its own.

    Args:
        graph_module: a traced network.
        projections: include blocks whose shortcut has convolutions too, fewer than the branch; else the shortcut must
            be an identity.
    """
    modules = dict(graph_module.named_modules())
    conv_nodes = {node for node in graph_module.graph.nodes if _is(node, nn.Conv2d, modules)}
    found = []
    for addition, shorter, longer in _forks(graph_module, conv_nodes):
        if longer[1] and (projections or not shorter[1]):
            found.append((addition, longer[0]))
    return found


def answers(graph_module: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Return the nodes that a network answers with, one per exit, first exit first; one for a network without exits."""
    (output,) = graph_module.graph.find_nodes(op="output")
    answered = output.args[0]
    return tuple(answered) if isinstance(answered, (tuple, list)) else (answered,)


def prune(graph_module: fx.GraphModule) -> None:
    """Take out of the graph what no answer depends on, such as the exits that were not chosen.

    What changes its input in place stays: an answer may depend on it without reading its output.
    """
    modules = dict(graph_module.named_modules())

    def needed(node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(modules[str(node.target)], "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or (name.startswith("i") and hasattr(operator, name)) or name == "setitem"
        return node.is_impure() or in_place or bool(node.kwargs.get("inplace", False))

    graph_module.graph.eliminate_dead_code(needed)
    graph_module.recompile()


def feature_nodes(graph_module: fx.GraphModule, layers: Sequence[Convolution], *, activated: bool) -> list[str]:
    """Name the graph node that is the feature of each layer: what distillation compares (DVERGE, section 3.1).

    The feature of a convolution is its BatchNorm's output, followed through the addition that ends a residual block
    and, if `activated`, through the activation behind it. Layers whose output has several readers stop there.
    """
    modules = dict(graph_module.named_modules())
    by_target = {str(node.target): node for node in graph_module.graph.nodes if node.op == "call_module"}
    features = []
    for layer in layers:
        node = by_target[layer.norm or layer.conv]
        if len(node.users) == 1 and (reader := next(iter(node.users))).target in _ADDITIONS:
            node = reader
        if activated and len(node.users) == 1:
            reader = next(iter(node.users))
            if _is(reader, _ACTIVATION_MODULES, modules) or reader.target in _ACTIVATION_FUNCTIONS:
                node = reader
        features.append(node.name)
    return features


def cut(graph_module: fx.GraphModule, node_name: str) -> fx.GraphModule:
    """Return the part of the graph that computes the node called `node_name`, sharing the layers."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    if node_name not in nodes:
        raise BadInput(f"the graph has no node {node_name!r}; known: {', '.join(nodes)}")
    needed, waiting = set(), [nodes[node_name]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[nodes[node_name]])
    return fx.GraphModule(graph_module, graph)


def without_norms(graph_module: fx.GraphModule, layers: Sequence[Convolution]) -> fx.GraphModule:
    """Return the graph with the BatchNorms of `layers` left out, for weights into which they have been folded."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    norms = {layer.norm for layer in layers}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in norms:
            copies[node] = copies[node.all_input_nodes[0]]
            continue
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda source: copies[source]))
            continue
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    return fx.GraphModule(graph_module, graph)


def prefix(
    graph_module: fx.GraphModule,
    layers: Sequence[Convolution],
    layer: int,
    *,
    activated: bool,
    folded: Sequence[Convolution] = (),
) -> fx.GraphModule:
    """Return the network cut off at feature `layer`, sharing its layers.

    Args:
        graph_module: a traced network.
        layers: whose features may be compared; see `feature_nodes`.
        layer: 1 to len(layers) + 1; the last is what the network answers.
        activated: take the feature behind the activation.
        folded: convolutions whose BatchNorm is left out, for weights into which it has been folded.

    Raises:
        BadInput: a layer out of range.
    """
    if not 1 <= layer <= len(layers) + 1:
        raise BadInput(f"layer {layer} is out of range, expected 1 to {len(layers) + 1}")
    if layer <= len(layers):
        graph_module = cut(graph_module, feature_nodes(graph_module, layers, activated=activated)[layer - 1])
    normed = [convolution for convolution in folded if convolution.norm is not None]
    return without_norms(graph_module, normed) if normed else graph_module


def bound(graph_module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a graph as a function of images, with those of `tensors` bound whose layers it has."""
    present = {name for name, _ in graph_module.named_modules()}
    needed = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in present}
    return lambda images: cast(torch.Tensor, functional_call(graph_module, needed, (images,)))
