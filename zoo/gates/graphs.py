"""What a traced network looks like: its convolutions, which of them are projections, and its prefixes.

Everything here works on the `torch.fx` graph of a plain network, so no network needs code of its own to become a random
gated one. Names of layers are the module names of the network (`stages.0.1.conv2`).
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from zoo.errors import BadInput

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATION_MODULES = tuple(
    kind
    for name in nn.modules.activation.__all__
    if name != "MultiheadAttention" and isinstance(kind := getattr(nn, name), type)
)
_ACTIVATION_NAMES = frozenset(
    name.lower() for name in (*nn.modules.activation.__all__, "clamp", "leaky_relu", "log_softmax", "sigmoid", "swish")
)
_OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTION_NAMES = frozenset(
    [*(f"conv{kind}{size}d" for kind in ("", "_transpose") for size in (1, 2, 3)), "convolution", "_convolution"]
)


@dataclass(frozen=True)
class Convolution:
    """A convolution of a network and the BatchNorm that alone reads it, if there is one."""

    conv: str
    norm: str | None
    projection: bool  # stands on the linear shortcut of a residual block
    tied: bool = False
    """Another layer uses one of its tensors too, so it cannot have candidates of its own."""
    foldable: bool = False
    """The norm is affine in evaluation mode and the convolution linear in its weight: one can go into the other."""

    @property
    def main(self) -> bool:
        """Whether it is one of those that get candidates: on the main branch, with tensors of its own."""
        return not self.projection and not self.tied


class _Tracer(fx.Tracer):
    """Records convolutions and BatchNorms of every kind as one call each, and the network's first argument alone."""

    proxy_buffer_attributes = True  # a buffer that forward reads is looked up at each call, as a parameter is

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(module, (nn.Conv2d, _BatchNorm, torch.jit.ScriptModule))
        return leaf or super().is_leaf_module(module, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., object], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., object], list[object]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]


def trace(network: nn.Module) -> fx.GraphModule:
    """Return the graph of `network` as evaluation mode runs it on its first argument alone, sharing its layers.

    Layers such as `nn.Dropout` and `nn.BatchNorm2d` follow the mode of a call; functions that were given the mode, such
    as `F.dropout(x, training=self.training)`, are fixed to evaluation. Tracing can miss what a forward does with the
    presence of its arguments, and hooks; `zoo.gates.self_check.trace` also compares.

    Raises:
        BadInput: the network's forward depends on its input's values, so it has no fixed graph.
    """
    check_network(network)
    try:
        with evaluating(network):
            return fx.GraphModule(network, _Tracer().trace(network), type(network).__name__)
    except Exception as error:
        raise BadInput(
            f"{type(network).__name__} cannot be traced with torch.fx ({type(error).__name__}: {error}); expected a "
            "forward of operations on tensors, without branches that depend on the images"
        ) from error


def check_network(network: nn.Module) -> None:
    """Check that this is a network itself, with its tensors, and not a wrapper around one.

    Raises:
        BadInput: no module, compiled, scripted, on several devices at once, lazy, or without values.
    """
    if not isinstance(network, nn.Module):
        raise BadInput(f"expected a network, an nn.Module, got {type(network).__name__}")
    name = type(network).__name__
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise BadInput(f"{name} is a wrapper; pass the network inside, network.module")
    if hasattr(network, "_orig_mod"):
        raise BadInput(f"{name} is compiled; pass the network from before torch.compile, network._orig_mod")
    if isinstance(network, torch.jit.ScriptModule):
        raise BadInput(f"{name} is a scripted or traced network; pass the nn.Module that it was made of")
    for key, tensor in tensors(network):
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
            raise BadInput(f"{key} of {name} has no shape yet; run the network on some images once, then go on")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_evaluating(network: nn.Module, what: str) -> None:
    """Check that a network and all modules inside are in evaluation mode.

    Raises:
        BadInput: one is not; `what` needs it, in words.
    """
    for name, module in network.named_modules():
        if module.training:
            where = f"{name} of {type(network).__name__}" if name else type(network).__name__
            raise BadInput(f"{where} is in training mode; {what} needs evaluation mode, call .eval() first")


def convolutions(graph_module: fx.GraphModule) -> list[Convolution]:
    """Return the 2-d convolutions, subclasses included, in the order in which a forward pass first meets them."""
    modules = dict(graph_module.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if _is(node, nn.Conv2d, modules):
            calls.setdefault(str(node.target), []).append(node)
    conv_nodes = {node for nodes in calls.values() for node in nodes}
    # on the shortcut of a residual block: they stay shared (Ensemble-in-One, section 3.2)
    projections = {node for _, shortcut, _ in _blocks(graph_module, conv_nodes) for node in shortcut}
    norm_calls = Counter(str(node.target) for node in graph_module.graph.nodes if _is(node, _BatchNorm, modules))
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    tied = _tied(graph_module)

    def owned(layer: str) -> set[str]:
        return {f"{layer}.{name}" for name, _ in tensors(modules[layer])}

    found = []
    for name, nodes in calls.items():
        users = [user for node in nodes for user in node.users]
        norm = None
        if len(users) == len(nodes) == 1 and _is(users[0], _BatchNorm, modules):
            reader = str(users[0].target)
            # without running statistics it depends on the batch even in evaluation mode: never ours to gate or fold
            if norm_calls[reader] == 1 and modules[reader].track_running_stats and not owned(reader) & tied:
                norm = reader
        foldable = (
            norm is not None
            and type(modules[name]) is nn.Conv2d
            and type(modules[norm]) is nn.BatchNorm2d
            and not any(modules[part]._forward_hooks or modules[part]._forward_pre_hooks for part in (name, norm))
            and not (owned(name) | owned(norm)) & read
        )
        is_tied = bool(owned(name) & tied)
        found.append(Convolution(name, norm, bool(projections & set(nodes)), is_tied, foldable and not is_tied))
    return found


def tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer of a module and of those inside it, by name."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def put(network: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where `network` has, or had before it was taken out, the parameter or buffer `name`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = network.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner.register_parameter(leaf, cast(nn.Parameter, tensor))
    else:
        owner._buffers[leaf] = tensor


def copied(network: nn.Module) -> nn.Module:
    """Return a deep copy.

    Raises:
        BadInput: it cannot be copied, or a hook computes a weight (the old weight_norm and spectral_norm, pruning).
    """
    for name, module in network.named_modules():
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask"):
                raise BadInput(
                    f"{name or type(network).__name__} has its weight from a hook, which a copy may lose; use "
                    "weight_norm and spectral_norm of torch.nn.utils.parametrizations, or make the weight permanent "
                    "with torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
                )
    check_network(network)
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise BadInput(
            f"{type(network).__name__} cannot be copied ({error}); expected modules that copy.deepcopy can copy"
        ) from error


def others(graph_module: fx.GraphModule, layers: Sequence[Convolution]) -> list[str]:
    """Name what convolves in the network and can have no gate: no `nn.Conv2d`, or one of `layers` that is tied."""
    modules = dict(graph_module.named_modules())
    found = [layer.conv for layer in layers if layer.tied and not layer.projection]
    for node in graph_module.graph.nodes:
        if _is(node, _OTHER_CONVOLUTIONS, modules):
            found.append(f"{node.target} ({type(modules[str(node.target)]).__name__})")
        elif node.op in ("call_function", "call_method") and _name(node) in _CONVOLUTION_NAMES:
            found.append(f"{node.name} (a call of {_name(node)})")
        elif _is(node, torch.jit.ScriptModule, modules):
            found.append(f"{node.target} (a scripted module)")
    return list(dict.fromkeys(found))


def _tied(graph_module: fx.GraphModule) -> set[str]:
    """Return the names of the tensors that two different modules hold, such as a weight that was assigned to both."""
    owners: dict[object, set[nn.Module]] = {}
    names: dict[object, set[str]] = {}
    for prefix, module in graph_module.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is not None:
                    place = tensor.untyped_storage().data_ptr()  # 0 on the meta device and for empty tensors
                    key = (place, tensor.storage_offset()) if place else id(tensor)
                    owners.setdefault(key, set()).add(module)
                    names.setdefault(key, set()).add(f"{prefix}.{leaf}" if prefix else leaf)
    return {name for key, found in names.items() if len(owners[key]) > 1 for name in found}


def _is(node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...], modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kind)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _activates(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is an activation function, or a module that holds one."""
    if node.op == "call_module":
        return any(isinstance(part, _ACTIVATION_MODULES) for part in modules[str(node.target)].modules())
    return node.op in ("call_function", "call_method") and _name(node).removesuffix("_") in _ACTIVATION_NAMES


def _blocks(graph_module: fx.GraphModule, conv_nodes: set[fx.Node]) -> Iterator[tuple[fx.Node, set[fx.Node], fx.Node]]:
    """Yield (addition, convolutions of its shortcut, other operand) of every residual block.

    A block is a sum of two branches of one fork. Its shortcut is the branch with fewer convolutions in a row, and has
    none, or is linear beside a branch that is not. Other sums, of parallel convolutions or of resolutions, have no
    shortcut.
    """
    modules = dict(graph_module.named_modules())
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        ancestors[node] = {node}.union(*(ancestors[source] for source in node.all_input_nodes))

    def in_a_row(branch: set[fx.Node]) -> int:
        longest: dict[fx.Node, int] = {}
        for node in graph_module.graph.nodes:  # in an order in which they can run
            if node in branch:
                before = max((longest.get(source, 0) for source in node.all_input_nodes), default=0)
                longest[node] = before + (node in conv_nodes)
        return max(longest.values(), default=0)

    for node in graph_module.graph.nodes:
        operands = node.all_input_nodes
        if node.target not in _ADDITIONS or len(operands) != 2:
            continue
        left, right = (ancestors[operand] for operand in operands)
        branches = [(left - right, operands[1], right - left), (right - left, operands[0], left - right)]
        shortcut, operand, main = min(branches, key=lambda branch: in_a_row(branch[0]))
        if in_a_row(shortcut) >= in_a_row(main):
            continue
        convs = shortcut & conv_nodes
        curved = [any(_activates(part, modules) for part in branch) for branch in (shortcut, main)]
        if not convs or curved == [False, True]:
            yield node, convs, operand


def residual_branches(graph_module: fx.GraphModule, *, projections: bool) -> list[tuple[fx.Node, fx.Node]]:
    """Return (addition, its residual operand) of every residual block: the operand with convolutions of its own.

    `projections` includes blocks whose shortcut has convolutions too; else it must be an identity.
    """
    modules = dict(graph_module.named_modules())
    conv_nodes = {node for node in graph_module.graph.nodes if _is(node, nn.Conv2d, modules)}
    blocks = _blocks(graph_module, conv_nodes)
    return [(addition, operand) for addition, shortcut, operand in blocks if projections or not shortcut]


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
        name = _name(node)
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
            if _activates(reader, modules) and not _is(reader, (nn.Conv2d, _BatchNorm), modules):
                node = reader
        features.append(node.name)
    return features


def cut(graph_module: fx.GraphModule, node_name: str) -> fx.GraphModule:
    """Return the part of the graph that computes the node called `node_name`, sharing the layers."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    if node_name not in nodes:
        raise BadInput(f"the graph has no node {node_name!r}; known: {', '.join(nodes)}")
    needed = {nodes[node_name]}
    for node in reversed(graph_module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
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
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda source: copies[source]))
        else:
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
        layers, activated: see `feature_nodes`.
        layer: 1 to len(layers) + 1; the last is what the network answers.
        folded: convolutions whose BatchNorm is left out, for weights into which it has been folded.

    Raises:
        BadInput: a layer out of range.
    """
    if not 1 <= layer <= len(layers) + 1:
        raise BadInput(f"layer {layer} is out of range, expected 1 to {len(layers) + 1}")
    if layer <= len(layers):
        graph_module = cut(graph_module, feature_nodes(graph_module, layers, activated=activated)[layer - 1])
    normed = [convolution for convolution in folded if convolution.foldable]
    return without_norms(graph_module, normed) if normed else graph_module


def bound(graph_module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a graph as a function of images, with those of `tensors` bound whose layers it has."""
    present = {name for name, _ in graph_module.named_modules()}
    needed = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in present}
    return lambda images: cast(torch.Tensor, functional_call(graph_module, needed, (images,)))
