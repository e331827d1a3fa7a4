"""Nodes of ONNX graphs and what is inside them: an `If` holds a graph of its own in each branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper


def renamed(node: NodeProto, rename: Callable[[str], str], name: str | None = None) -> NodeProto:
    """Return a copy of a node whose inputs and outputs have other names; its own is `name`, or the old one if None."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for ends in (copy.input, copy.output):
        for position, end in enumerate(ends):
            ends[position] = rename(end)
    copy.name = node.name if name is None else name
    return copy


def branches(node: NodeProto) -> list[GraphProto]:
    """Return the graphs in the branches of a node: none unless it is an `If`."""
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph, those inside branches included."""
    for node in graph.node:
        yield node
        for branch in branches(node):
            yield from all_nodes(branch)


def all_tensors(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield (name, tensor) of everything that a graph stores, inside branches included."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for branch in branches(node):
            yield from all_tensors(branch)


def reads(node: NodeProto) -> set[str]:
    """Return the names of what a node reads, and of what its branches read from outside."""
    names = set(node.input)
    for branch in branches(node):
        inside = {tensor.name for tensor in branch.initializer}
        inside |= {output for inner in branch.node for output in inner.output}
        names |= {name for inner in branch.node for name in reads(inner)} - inside
    return names


def needed(nodes: Sequence[NodeProto], values: Iterable[str]) -> list[NodeProto]:
    """Return the nodes that these values depend on, in their order, in which each stands behind those that it reads."""
    wanted, kept = set(values), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= reads(node)
    return kept[::-1]


def choice(stem: str, output: str, conditions: Sequence[tuple[str, str]], ways: Sequence[GraphProto]) -> NodeProto:
    """Return an `If` that runs one of several graphs, or asks the next `If` in its other branch.

    Args:
        stem: what the names of the graphs of nested choices begin with.
        output: what it makes.
        conditions: the name of the condition and that of the node, outermost first.
        ways: one more than conditions, with one output each, all of one type.
    """
    otherwise, kind = ways[-1], ways[0].output[0].type.tensor_type.elem_type
    for index, (condition, name) in reversed(list(enumerate(conditions))):
        made = f"{output}/from_{index}" if index else output
        node = helper.make_node("If", [condition], [made], name=name, then_branch=ways[index], else_branch=otherwise)
        value = helper.make_tensor_value_info(made, kind, None)
        otherwise = helper.make_graph([node], f"{stem}_from_{index}", [], [value])
    return node
