"""Pruned ONNX graphs of a random gated network, assembled from one exported template.

The template is exported by torch once, with its gated tensors as inputs (`zoo.export.stencil`). Every graph is then put
together from that stencil and the candidates' weights, BatchNorms folded:

    single    the stencil with one path's weights
    ensemble  the stencil once per path, every node that two paths share computed once, the probabilities averaged and
              the share of paths that vote for the winner counted
    gated     each gated convolution an `If` over its candidates; the gates are an input

So a graph holds nothing of the candidates that it does not run (docs/adr/0005). Every graph is compared with the torch
network on random images, at several batch sizes and along several paths, before it is returned.

A network with several exits has two graphs: `single`, which answers at all of them, and `early_exit`, in which every
node behind the first exit stands in the branch of an `If` that runs only where the exits before were not sure enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

from zoo import paths
from zoo.errors import BadInput, BundleError
from zoo.export.stencil import (
    AGREEMENT,
    EXIT,
    EXIT_LOGITS,
    GATES,
    IMAGES,
    IR_VERSION,
    LIMITS,
    LOGITS,
    OPSET,
    PROBABILITIES,
    Stencil,
    Weights,
    stencil_of,
)
from zoo.export.stencil import tensor as _tensor
from zoo.gates import graphs, self_check
from zoo.gates.derive import Ensemble, derive
from zoo.gates.rgn import RandomGatedNetwork
from zoo.paths import Path
from zoo.runtime import run, session

LARGEST = 2**31 - 2**20
"""Bytes of one graph: protobuf holds less than 2 GiB. Weights in files of their own would be no part of what a bundle
checks and a server opens, which never reads a file that a graph names."""

__all__ = [
    "AGREEMENT", "EXIT", "EXIT_LOGITS", "GATES", "IMAGES", "IR_VERSION", "LIMITS", "LOGITS", "OPSET", "PROBABILITIES",
    "as_numpy", "count_parameters", "early_exit_graph", "members_graph", "plain_graphs", "rgn_graphs", "single_graph",
]  # fmt: skip


def plain_graphs(members: Sequence[nn.Module]) -> dict[str, bytes]:
    """Return the ONNX files of plain networks of one architecture by file stem, all from one run of the exporter.

    "single" is the first network alone. With several there is also "ensemble", and of a network with several exits
    "early_exit"; see `single_graph`, `members_graph` and `early_exit_graph`.

    Raises:
        BadInput: see `single_graph`.
    """
    if len(members) > 1:
        stencil, weights = _members_stencil(members)
        single = _checked_path(_path_graph(stencil, weights[:1]), members[0], stencil)
        return {"single": single, "ensemble": _ensemble_graph(members, stencil, weights)}
    stencil = stencil_of(members[0], _image_shape(members[0]))
    made = {"single": _single_graph(members[0], stencil)}
    if len(stencil.exits) > 1:
        made["early_exit"] = _early_exit_graph(members[0], stencil)
    return made


def single_graph(network: nn.Module) -> bytes:
    """Return the ONNX file of a plain network in evaluation mode.

    Input `images` float32 (batch, channel, height, width) in [0, 1]; outputs `logits` and `probabilities`. Of a
    multi-exit network these are the last exit's, and `exit_logits` (batch, exit, class) are those of all.

    Raises:
        BadInput: the network does not say the shape of its images, cannot be exported, or answers otherwise than the
            graph does.
    """
    return _single_graph(network, stencil_of(network, _image_shape(network)))


def early_exit_graph(network: nn.Module) -> bytes:
    """Return the ONNX file of a multi-exit network in evaluation mode that computes no more than its answer takes.

    Inputs: `images` float32 (1, channel, height, width) in [0, 1], and `limits` float32 (exit - 1). The answer is that
    of the first exit k whose largest probability is at least limits[k], else the last one's. Outputs: `logits` and
    `probabilities` (1, class), and `exit` int64 (1), counted from 0.

    Raises:
        BadInput: the network has one exit; see also `single_graph`.
    """
    stencil = stencil_of(network, _image_shape(network))
    if len(stencil.exits) < 2:
        raise BadInput(f"{type(network).__name__} has one exit, so it cannot answer early; export its variant single")
    return _early_exit_graph(network, stencil)


def rgn_graphs(
    rgn: RandomGatedNetwork, single: Path | None, ensemble: Sequence[Path], *, gated: bool
) -> dict[str, bytes]:
    """Return the ONNX files of the wanted variants of a random gated network, by variant name.

    Raises:
        BadPath: a path does not fit the network.
        BadInput: the network has a single candidate per layer and a gated graph is wanted, it does not say the shape
            of its images, it cannot be exported, or a graph answers otherwise than the network does.
    """
    network = derive(rgn, [0] * rgn.num_gates)
    own = dict(graphs.tensors(network))
    choices = [rgn.select([candidate] * rgn.num_gates) for candidate in range(rgn.candidates)]
    gates = {part: gate for gate, layer in enumerate(rgn.layers) for part in rgn.parts(layer).values()}
    first = {id(own[name]): name for name in choices[0]}
    # a module may have two names, and the exporter takes either
    chosen = {name: first[id(tensor)] for name, tensor in own.items() if id(tensor) in first}
    gate_of = {
        name: gate for name, gated in chosen.items() for part, gate in gates.items() if gated.startswith(f"{part}.")
    }
    stencil = stencil_of(network, _image_shape(rgn.template), gate_of)
    candidates = [
        stencil.gated({**own, **{name: choice[gated] for name, gated in chosen.items()}}) for choice in choices
    ]
    made = {}
    if single is not None:
        path = rgn.check(single)
        graph = _path_graph(stencil, [_weights_of(candidates, stencil.gate_of, path)])
        made["single"] = _checked_path(graph, derive(rgn, path), stencil)
    if ensemble:
        keyed = [rgn.check(path) for path in ensemble]
        weights = [_weights_of(candidates, stencil.gate_of, path) for path in keyed]
        graph = _path_graph(stencil, weights, keyed, counted=True)
        made["ensemble"] = _checked_path(graph, Ensemble(derive(rgn, path) for path in keyed).eval(), stencil)
    if gated:
        made["gated"] = _checked_gated(_gated_graph(stencil, candidates, rgn.num_gates), rgn, stencil)
    return made


def members_graph(members: Sequence[nn.Module]) -> bytes:
    """Return one ONNX file that averages the probabilities of separate plain networks of one architecture.

    Outputs: `logits` and `probabilities` (batch, class), and `agreement` float32 (batch): the share of the networks
    whose most probable class is that of the average.

    Raises:
        BadInput: see `single_graph`.
    """
    return _ensemble_graph(members, *_members_stencil(members))


def _single_graph(network: nn.Module, stencil: Stencil) -> bytes:
    if len(stencil.exits) == 1:
        return _checked_path(_path_graph(stencil, [{}]), network, stencil)
    graph = _all_exits_graph(stencil)
    opened = session(graph)

    def exits(images: Tensor) -> tuple[Tensor, ...]:
        return _run(opened, {IMAGES: as_numpy(images)}, EXIT_LOGITS)[0].unbind(1)

    _check("single", network, network, exits, stencil)
    return graph


def _ensemble_graph(members: Sequence[nn.Module], stencil: Stencil, weights: Sequence[Weights]) -> bytes:
    graph = _path_graph(stencil, weights, [(number,) for number in range(len(weights))], counted=True)
    return _checked_path(graph, Ensemble(members).eval(), stencil)


def _members_stencil(members: Sequence[nn.Module]) -> tuple[Stencil, list[dict[str, np.ndarray]]]:
    """Return a stencil in which every weight is one gate's, and each member's weights for it."""
    if not members:
        raise BadInput("an ensemble needs at least one network, got none")
    for member in members:
        graphs.check_evaluating(member, "an export")
    tensors = [dict(graphs.tensors(member)) for member in members]
    shapes = [{name: tensor.shape for name, tensor in member.items()} for member in tensors]
    for number, other in enumerate(shapes):
        if differing := sorted(name for name in {*other, *shapes[0]} if other.get(name) != shapes[0].get(name)):
            raise BadInput(
                f"network {number + 1} of the ensemble differs from the first in {differing[0]!r}; expected networks "
                "of one architecture"
            )
    buffers = dict(members[0].named_buffers())
    # A buffer that is common to all, such as the normalisation's, is computed with once.
    own = [
        name
        for name, tensor in tensors[0].items()
        if name not in buffers or not all(torch.equal(tensor, other[name]) for other in tensors[1:])
    ]
    stencil = stencil_of(members[0], _image_shape(members[0]), dict.fromkeys(own, 0))
    return stencil, [stencil.gated(member) for member in tensors]


# --- checks ---


def _checked_path(graph: bytes, network: nn.Module, stencil: Stencil) -> bytes:
    """Return a graph without gates if it answers as `network` does."""
    opened = session(graph)
    what = "ensemble" if isinstance(network, Ensemble) else "single"
    _check(what, network, network, lambda images: _run(opened, {IMAGES: as_numpy(images)}, LOGITS)[0], stencil)
    return graph


def _checked_gated(graph: bytes, rgn: RandomGatedNetwork, stencil: Stencil) -> bytes:
    """Return a gated graph if it answers as `rgn` does along the constant paths and two random ones."""
    opened, draws = session(graph), random.Random(0)  # noqa: S311 - repeatable
    chosen = [(gate,) * rgn.num_gates for gate in range(rgn.candidates)]
    for path in (*chosen, *(paths.sample(rgn.num_gates, rgn.candidates, draws) for _ in range(2))):
        gates = np.array(path, np.int64)

        def found(images: Tensor, gates: np.ndarray = gates) -> Tensor:
            return _run(opened, {IMAGES: as_numpy(images), GATES: gates}, LOGITS)[0]

        _check(f"gated, path {paths.format_path(path)},", rgn.template, partial(rgn, path=path), found, stencil)
    return graph


def _check(
    what: str,
    network: nn.Module,
    expected: Callable[[Tensor], Tensor],
    found: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    stencil: Stencil,
) -> None:
    images = self_check.images((max(self_check.BATCH_SIZES), *stencil.image_shape))
    first = self_check.like(network)
    self_check.check_same(
        network,
        lambda batch: expected(batch.to(first.device, first.dtype)),
        found,
        images,
        f"the graph {what}",
        "torch's exporter changed it, or its operations mean something else in ONNX",
    )


def _run(opened: object, feeds: dict[str, np.ndarray], *names: str) -> tuple[Tensor, ...]:
    try:
        return tuple(torch.from_numpy(found) for found in run(opened, feeds, *names))
    except BundleError as error:
        raise BadInput(str(error)) from error


# --- assembly ---


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
    shape = self_check.declared_shape(network)
    if shape is None:
        raise BadInput(
            f"{type(network).__name__} does not say the shape of its images; set network.image_shape = "
            "(channel, height, width) before exporting it"
        )
    return shape


def _weights_of(candidates: Sequence[Weights], gate_of: Mapping[str, int], path: Path) -> dict[str, np.ndarray]:
    return {name: candidates[path[gate]][name] for name, gate in gate_of.items()}


def _path_graph(
    stencil: Stencil,
    weights: Sequence[Weights],
    paths: Sequence[tuple[int, ...]] = ((),),
    *,
    counted: bool = False,
) -> bytes:
    """Assemble the graph of one path or the average of several; what paths have in common is computed once.

    A value depends on the gates of the convolutions it comes from; two paths share it where they agree on those.
    `counted` adds the output `agreement`.
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
    nodes += _agreement(len(answers), tensors) if counted else []
    agreement = helper.make_tensor_value_info(AGREEMENT, TensorProto.FLOAT, ["batch"])
    return _finish(stencil, nodes, tensors, more_outputs=[agreement] if counted else [])


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


def _all_exits_graph(stencil: Stencil) -> bytes:
    """Assemble the graph that answers at every exit."""
    tensors = {**stencil.shared, "exit_axis": np.array([1], np.int64)}
    nodes = list(stencil.nodes)
    rows = [f"{name}/row" for name in stencil.exits]
    nodes += [
        helper.make_node("Unsqueeze", [name, "exit_axis"], [row], name=row)
        for name, row in zip(stencil.exits, rows, strict=True)
    ]
    nodes.append(helper.make_node("Concat", rows, [EXIT_LOGITS], name=EXIT_LOGITS, axis=1))
    nodes.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1))
    shape: list[int | str | None] = ["batch", len(rows), stencil.classes]
    return _finish(
        stencil, nodes, tensors, more_outputs=[helper.make_tensor_value_info(EXIT_LOGITS, TensorProto.FLOAT, shape)]
    )


def _early_exit_graph(network: nn.Module, stencil: Stencil) -> bytes:
    """Assemble the graph of nested choices; see `_answer_from`. It is checked with limits that choose each exit."""
    nodes, tensors = _answer_from(stencil, _stages(stencil), 0, (LOGITS, PROBABILITIES, EXIT))
    limits = helper.make_tensor_value_info(LIMITS, TensorProto.FLOAT, [len(stencil.exits) - 1])
    graph = _model(
        nodes,
        tensors,
        [_images(stencil, 1), limits],
        [*_answers(stencil, 1), helper.make_tensor_value_info(EXIT, TensorProto.INT64, [1])],
        {"exits": str(len(stencil.exits))},
    )
    opened, last = session(graph), len(stencil.exits) - 1
    for chosen in range(last + 1):
        limit = np.array([np.inf] * chosen + [0.0] * (last - chosen), np.float32)

        def found(images: Tensor, limit: np.ndarray = limit) -> Tensor:
            one_by_one = [_run(opened, {IMAGES: as_numpy(image[None]), LIMITS: limit}, LOGITS)[0] for image in images]
            return torch.cat(one_by_one)

        def expected(images: Tensor, chosen: int = chosen) -> Tensor:
            answer: Tensor = network(images)[chosen]
            return answer

        _check(f"early_exit, leaving at exit {chosen + 1},", network, expected, found, stencil)
    return graph


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
    nodes = [
        *stages[exit_index],
        helper.make_node("Softmax", [logits], [probabilities], name=probabilities, axis=1),
    ]

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
    choice = helper.make_node(
        "If",
        [sure],
        list(outputs),
        name=f"exit_{exit_index}",
        then_branch=helper.make_graph(answer(leaving), f"leave_at_{exit_index}", [], _answers_of(leaving)),
        else_branch=helper.make_graph(
            behind,
            f"behind_{exit_index}",
            [],
            _answers_of(staying),
            [_tensor(array, name) for name, array in theirs.items()],
        ),
    )
    nodes += [
        helper.make_node("ReduceMax", [probabilities], [most], name=most, keepdims=0),
        helper.make_node("Gather", [LIMITS, position], [limit], name=limit),
        helper.make_node("GreaterOrEqual", [most, limit], [sure], name=sure),
        choice,
    ]
    return nodes, tensors


def _answers_of(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [*map(_any, names[:2]), helper.make_tensor_value_info(names[2], TensorProto.INT64, None)]


def _stages(stencil: Stencil) -> list[list[NodeProto]]:
    """Return the nodes by the first exit that needs them, in their order; the last logits get a number as well."""
    number = len(stencil.exits)
    makes = {output: index for index, node in enumerate(stencil.nodes) for output in node.output}
    first: dict[int, int] = {}
    for exit_index, answer in enumerate(stencil.exits):
        waiting = [answer]
        while waiting:
            node = makes.get(waiting.pop())
            if node is not None and node not in first:
                first[node] = exit_index
                waiting += stencil.nodes[node].input
    stages: list[list[NodeProto]] = [[] for _ in range(number)]
    for index in sorted(first):
        copy = NodeProto()
        copy.CopyFrom(stencil.nodes[index])
        for names in (copy.input, copy.output):
            for position, name in enumerate(names):
                names[position] = f"{EXIT_LOGITS}_{number - 1}" if name == LOGITS else name
        stages[first[index]].append(copy)
    return stages


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


def _images(stencil: Stencil, batch: int | str = "batch") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [batch, *stencil.image_shape])


def _answers(stencil: Stencil, batch: int | str = "batch") -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, stencil.classes])
        for name in (LOGITS, PROBABILITIES)
    ]


def _finish(
    stencil: Stencil,
    nodes: Sequence[NodeProto],
    tensors: Weights,
    more_inputs: Sequence[onnx.ValueInfoProto] = (),
    facts: Mapping[str, str] | None = None,
    more_outputs: Sequence[onnx.ValueInfoProto] = (),
) -> bytes:
    used = {name for node in nodes for name in node.input}
    return _model(
        nodes,
        {name: array for name, array in tensors.items() if name in used},
        [_images(stencil), *more_inputs],
        [*_answers(stencil), *more_outputs],
        facts or {},
    )


def _model(
    nodes: Sequence[NodeProto],
    tensors: Weights,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    facts: Mapping[str, str],
) -> bytes:
    size = sum(array.nbytes for array in tensors.values()) + sum(node.ByteSize() for node in nodes)
    if size > LARGEST:
        raise BadInput(
            f"the graph would have {size / 2**30:.2f} GiB, but one ONNX file holds at most {LARGEST / 2**30:.2f}; "
            "export fewer paths or candidates, or a smaller network"
        )
    constants = [_tensor(array, name) for name, array in tensors.items()]
    model = helper.make_model(
        helper.make_graph(list(nodes), "manygates", list(inputs), list(outputs), constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="manygates",
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def as_numpy(images: Tensor) -> np.ndarray:
    """Return images as the float32 array that a graph takes."""
    return np.ascontiguousarray(images.detach().cpu().numpy().astype(np.float32))
