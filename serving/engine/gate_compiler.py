"""Rewriting the graph whose gates are an input, so that ONNX Runtime runs it fast.

In the bundle the graph is portable: an `If` per gated layer. ONNX Runtime rearranges the channels of convolutions into
blocks of the processor's vector width (its "NCHWc" layout), but leaves that layout at every `If`, so a random path
would cost a third more than a fixed one. The compiled form never leaves it (docs/adr/0011):

1. With its gates made a constant, ONNX Runtime prunes and blocks the graph, and writes down what became of it: one dump
   per candidate, and a few whose paths spell the number of every gate in base n, which show each tensor's gate.
2. A new graph is assembled of those nodes. What depends on a gate stands in the branch of an `If`, inside the blocked
   layout, or takes its weights from a `Gather` over the candidates.
3. With a path per image, that is the body of a `Scan` over the images. What comes before the first gate, and after the
   last one behind the global pooling, is computed for the whole batch.

The result depends on the processor and on the release of ONNX Runtime, so it lives in memory only, and whoever uses it
compares it with the portable graph first. This module needs `onnx`; it imports it when called.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.engine.graphs import GATES, INPUT, OUTPUTS
from zoo.runtime import run, runtime, session

Scope = Literal["image", "batch"]
Array = NDArray[Any]

_BLOCKED = "com.microsoft.nchwc"
_OURS = "manygates/"  # no name of a graph that ONNX Runtime wrote begins like this
_MAX_LEAVES = 1024
EXAMPLE_IMAGES = 2
_GATHERED_BYTES: dict[Scope, int] = {"image": 0, "batch": 40_000}
"""Up to this size the candidates of a layer are chosen by `Gather`, which copies the chosen one, instead of by `If`,
whose output cannot overwrite its input: measured, see docs/adr/0011."""
_NARROWING = ("GlobalAveragePool", "Flatten", "Reshape", "Gemm", "MatMul")


class CannotCompileError(Exception):
    """The graph is not one that this module knows how to rewrite; the words say why, in one sentence."""


class Answer(NamedTuple):
    """What the graph answers to a few images along one path."""

    path: NDArray[np.int64]
    images: NDArray[np.float32]
    """(image, channel, height, width)."""
    outputs: list[Array]
    """Probabilities and logits, (image, class)."""


class Compiled(NamedTuple):
    """A graph to be opened with the optimisations of ONNX Runtime switched off: it has had them."""

    graph: bytes
    quantised: bool
    """Whether it computes with integers; then the portable graph rounds elsewhere, and is no exact reference."""
    answers: list[Answer]
    """What ONNX Runtime answered along the paths that it was asked to prune, each constant one among them."""


def loop_over_images(graph: bytes) -> bytes:
    """Return the graph with gates of its own for each image: int64 (image, gate) instead of (gate).

    Raises:
        ImportError: if `onnx` is not installed.
        CannotCompileError: if it is not a graph of images and gates.
    """
    portable = _Portable(graph)
    onnx, inner = portable.onnx, portable.model.graph
    nodes = _scan(onnx, inner.node, [INPUT], [GATES], OUTPUTS)
    inputs = [portable.images, _gates_input(onnx, portable.num_gates, "image")]
    outer = onnx.helper.make_graph(nodes, "manygates", inputs, portable.outputs, inner.initializer[:-1])
    portable.model.graph.CopyFrom(outer)
    return bytes(portable.model.SerializeToString())


def compile_gates(
    graph: bytes, *, candidates: int, scope: Scope, image_shape: Sequence[int], gathered_bytes: int | None = None
) -> Compiled:
    """Return the graph that takes gates int64 (image, gate), or (gate) with scope `batch`, in the blocked layout.

    Args:
        graph: the portable graph, gates int64 (gate).
        candidates: how many candidates each gate has, at least 2.
        scope: whether each image has gates of its own.
        image_shape: (channel, height, width).
        gathered_bytes: up to which size the candidates of a convolution are chosen by `Gather`; None takes the size
            measured to be best.

    Raises:
        ImportError: if `onnx` is not installed.
        CannotCompileError: if it is not a graph that can be rewritten.
        OSError: if no temporary folder can be written to.
        Exception: whatever ONNX Runtime makes of a graph that it does not know.
    """
    portable = _Portable(graph)
    network = _network(portable, candidates, image_shape)
    limit = _GATHERED_BYTES[scope] if gathered_bytes is None else gathered_bytes
    assembly = _Assembly(portable, network, candidates, limit)
    model = assembly.of_images() if scope == "image" else assembly.of_batch()
    model.graph.input.extend([portable.images, _gates_input(portable.onnx, portable.num_gates, scope)])
    model.graph.output.extend(portable.outputs)
    model.ir_version = portable.model.ir_version
    quantised = any("Quantize" in node.op_type or "QLinear" in node.op_type for node in network.nodes)
    return Compiled(bytes(model.SerializeToString()), quantised, network.answers)


class _Portable:
    """The graph of the bundle."""

    def __init__(self, graph: bytes) -> None:
        import onnx

        self.onnx = onnx
        self.model = onnx.load_from_string(graph)
        inputs = {entry.name: entry for entry in self.model.graph.input}
        self.outputs = [output for output in self.model.graph.output if output.name in OUTPUTS]
        sizes = inputs[GATES].type.tensor_type.shape.dim if GATES in inputs else []
        self.num_gates = int(sizes[0].dim_value) if len(sizes) == 1 else 0
        if inputs.keys() != {INPUT, GATES} or len(self.outputs) != len(OUTPUTS) or self.num_gates < 1:
            raise CannotCompileError("it is not a graph of images and gates that answers with logits and probabilities")
        self.images = inputs[INPUT]
        self.model.graph.input.remove(inputs[GATES])
        self._path = self.model.graph.initializer.add()

    def pruned(self, path: Sequence[int], images: NDArray[np.float32], folder: Path) -> tuple[Any, Answer]:
        """Return what ONNX Runtime makes of the graph with these gates, and how that answers some images."""
        file = folder / "pruned.onnx"
        gates = np.array(path, np.int64)
        self._path.CopyFrom(self.onnx.numpy_helper.from_array(gates, GATES))

        def write_down(options: Any) -> None:
            options.inter_op_num_threads = 1
            options.log_severity_level = 4
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.optimized_model_filepath = str(file)

        opened = session(bytes(self.model.SerializeToString()), threads=1, configure=write_down)
        outputs = run(opened, {INPUT: images}, *OUTPUTS)
        pruned = self.onnx.load_from_string(file.read_bytes())
        file.unlink()
        return pruned, Answer(gates, images, [*outputs])


# --- from dumps to a network whose tensors are known by their gates ---

Slot = tuple[int, int]
"""Which input of which node: (node, input)."""


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The nodes that all paths have in common, and what stands in their constant inputs."""

    opsets: list[Any]
    nodes: list[Any]
    """In order. Values are named by where they come from; constant inputs are named by their slot."""
    shared: dict[Slot, Array]
    candidates: dict[Slot, list[Array]]
    """Gated tensors, one array per candidate."""
    gate_of: dict[Slot, int]
    same: dict[Slot, Slot]
    """Slots of the same shared tensor -> the first of them."""
    answers: list[Answer]

    def gates(self, number: int) -> tuple[int, ...]:
        """Return the gates of a node's own constants."""
        return tuple(sorted({gate for slot, gate in self.gate_of.items() if slot[0] == number}))

    def candidates_of(self, number: int) -> list[tuple[Slot, list[Array]]]:
        """Return a node's gated constants."""
        return [(slot, arrays) for slot, arrays in self.candidates.items() if slot[0] == number]


def _network(portable: _Portable, candidates: int, image_shape: Sequence[int]) -> _Network:
    """Let ONNX Runtime prune and block a few paths, and compare what it wrote."""
    if candidates < 2:
        raise CannotCompileError("its gates have nothing to choose from")
    numbers = range(portable.num_gates)
    digits = _digits(portable.num_gates, candidates)
    paths = [[candidate] * portable.num_gates for candidate in range(candidates)]
    paths += [[_digit(gate, digit, candidates) for gate in numbers] for digit in range(digits)]
    rng = np.random.default_rng(0)
    dumps: list[_Dump] = []
    with tempfile.TemporaryDirectory(prefix="manygates-") as folder:
        for path in paths:
            images = rng.random((EXAMPLE_IMAGES, *image_shape), dtype=np.float32)
            dumps.append(_Dump(portable, path, images, Path(folder)))
            if len(dumps) > candidates:
                dumps[-1].arrays.clear()  # of these only the digests are needed, and a large network has many of them
    first, *others = dumps[:candidates]
    spelled = dumps[candidates:]
    for other in [*others, *spelled]:
        if other.skeleton != first.skeleton:
            raise CannotCompileError("ONNX Runtime makes different graphs of different paths")
    shared, gated, gate_of = {}, {}, {}
    same: dict[Slot, Slot] = {}
    firsts: dict[str, Slot] = {}
    for slot, digest in first.digests.items():
        of_candidate = [digest, *(dump.digests[slot] for dump in others)]
        found = [dump.digests[slot] for dump in spelled]
        if len({*of_candidate, *found}) == 1:
            same[slot] = firsts.setdefault(digest, slot)
            shared[same[slot]] = first.arrays[slot]
            continue
        fitting = [
            gate
            for gate in numbers
            if all(found[digit] == of_candidate[_digit(gate, digit, candidates)] for digit in range(digits))
        ]
        if len(fitting) != 1:
            raise CannotCompileError("a tensor depends on several gates, or candidates are equal")
        gate_of[slot] = fitting[0]
        gated[slot] = [dump.arrays[slot] for dump in (first, *others)]
    if not gate_of:
        raise CannotCompileError("no tensor depends on a gate")
    return _Network(
        opsets=list(first.opsets),
        nodes=first.nodes,
        shared=shared,
        candidates=gated,
        gate_of=gate_of,
        same=same,
        answers=[dump.answer for dump in dumps],
    )


def _digits(number: int, base: int) -> int:
    """Return how many digits it takes to count to `number`."""
    return next(digits for digits in itertools.count(1) if base**digits >= number)


def _digit(number: int, position: int, base: int) -> int:
    return int(number // base**position % base)


class _Dump:
    """What ONNX Runtime wrote of one path."""

    def __init__(self, portable: _Portable, path: Sequence[int], images: NDArray[np.float32], folder: Path) -> None:
        model, self.answer = portable.pruned(path, images, folder)
        self.opsets = model.opset_import
        self.nodes: list[Any] = []
        self.arrays: dict[Slot, Array] = {}
        self.digests: dict[Slot, str] = {}
        tensors = {tensor.name: portable.onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        digests = {name: _digest(array) for name, array in tensors.items()}
        named = {name: name for name in (INPUT, "", *OUTPUTS)}
        for number, node in enumerate(model.graph.node):
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise CannotCompileError(
                    f"ONNX Runtime leaves a choice in it even where the path is fixed ({node.op_type})"
                )
            for position, name in enumerate(node.output):
                named.setdefault(name, f"value_{number}_{position}")
            for position, name in enumerate(node.input):
                if name in tensors:
                    self.arrays[number, position], self.digests[number, position] = tensors[name], digests[name]
                    node.input[position] = _slot_name((number, position))
                else:
                    node.input[position] = named[name]
            for position, name in enumerate(node.output):
                node.output[position] = named[name]
            node.name = f"node_{number}"
            node.doc_string = ""
            self.nodes.append(node)
        self.skeleton = [node.SerializeToString(deterministic=True) for node in self.nodes]
        if {output.name for output in model.graph.output} & {*tensors}:
            raise CannotCompileError("its answer is a constant")


def _digest(array: Array) -> str:
    return f"{array.dtype}{array.shape}{hashlib.blake2b(array.tobytes()).hexdigest()}"


def _slot_name(slot: Slot) -> str:
    return f"{_OURS}constant_{slot[0]}_{slot[1]}"


# --- from the network to a graph ---


class _Assembly:
    """Puts the graph together out of the network's nodes."""

    def __init__(self, portable: _Portable, network: _Network, candidates: int, gathered_bytes: int) -> None:
        self._onnx = portable.onnx
        self._node = portable.onnx.helper.make_node
        self._num_gates = portable.num_gates
        self._network = network
        self._num_candidates = candidates
        self._bits = range(_digits(candidates, 2))
        self._gathered_bytes = gathered_bytes
        self._constants: dict[str, Any] = {}
        self._indexed = False
        self._branched = False
        self._readers: dict[str, set[int]] = {}
        for number, node in enumerate(network.nodes):
            for name in node.input:
                self._readers.setdefault(name, set()).add(number)

    def of_batch(self) -> Any:
        """Return the graph in which all images have the same gates."""
        body = self._body(range(len(self._network.nodes)))
        return self._model([*self._bit_nodes(), *self._splits(), *body])

    def of_images(self) -> Any:
        """Return the graph in which each image has its own."""
        nodes = self._network.nodes
        head, body, tail = self._parts()
        made = {name for number in body for name in nodes[number].output}
        read_by_body = {name for number in body for name in nodes[number].input}
        made_by_head = {name for number in head for name in nodes[number].output}
        entering = sorted(read_by_body & (made_by_head | {INPUT}))
        leaving = sorted(made & ({name for number in tail for name in nodes[number].input} | {*OUTPUTS}))
        inside = self._body(body)
        gates = [GATES] if self._indexed else []
        gates += [_bit_name(bit) for bit in self._bits] if self._branched else []
        loop = _scan(self._onnx, [*self._splits(), *inside], entering, gates, leaving)
        plain_head, plain_tail = ([self._copy(number) for number in part] for part in (head, tail))
        return self._model([*plain_head, *self._bit_nodes(), *loop, *plain_tail])

    def _parts(self) -> tuple[list[int], list[int], list[int]]:
        """Return the nodes before, in and after the loop over the images."""
        nodes = self._network.nodes
        everything = list(range(len(nodes)))
        if any(node.op_type in ("Shape", "Size") for node in nodes):
            return [], everything, []  # what is computed from the batch's size is not the same for one image
        gated = [number for number in everything if self._network.gates(number)]
        depends: set[str] = set()
        for number in everything:
            if number in gated or depends & {*nodes[number].input}:
                depends |= {*nodes[number].output}
        head = [number for number in everything if not depends & {*nodes[number].output}]
        behind = [number for number in everything if number not in head]
        for last in range(gated[-1], len(nodes)):
            tail = [number for number in behind if number > last]
            made_by_tail = {name for number in tail for name in nodes[number].output}
            read = {name for number in tail for name in nodes[number].input} - made_by_tail
            read = {name for name in read if name and not name.startswith(_OURS)}
            if tail and read == {*nodes[last].output} and nodes[last].op_type in _NARROWING:
                return head, [number for number in behind if number <= last], tail
        return head, behind, []

    def _model(self, nodes: Sequence[Any]) -> Any:
        helper = self._onnx.helper
        graph = helper.make_graph(nodes, "manygates", [], [], list(self._constants.values()))
        return helper.make_model(graph, opset_imports=self._network.opsets)

    def _constant(self, array: Array, name: str) -> str:
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def _input_of(self, slot: Slot, name: str) -> str:
        """Return the name of what stands in a slot that does not depend on the path itself."""
        if slot not in self._network.same:
            return name
        first = self._network.same[slot]
        return self._constant(self._network.shared[first], _slot_name(first))

    def _copy(self, number: int, inputs: Mapping[Slot, str] = MappingProxyType({})) -> Any:
        """Return a node, with the names of some of its inputs replaced."""
        copy = self._onnx.NodeProto()
        copy.CopyFrom(self._network.nodes[number])
        for position, name in enumerate(copy.input):
            slot = (number, position)
            copy.input[position] = inputs[slot] if slot in inputs else self._input_of(slot, name)
        return copy

    # gates

    def _bit_nodes(self) -> list[Any]:
        """Return nodes that take the gates, of whatever shape, to their binary digits."""
        if not self._branched:
            return []
        if len(self._bits) == 1:
            return [self._node("Cast", [GATES], [_bit_name(0)], to=self._onnx.TensorProto.BOOL)]
        two = self._constant(np.array(2, np.int64), f"{_OURS}two")
        nodes = []
        for bit in self._bits:
            weight = self._constant(np.array(2**bit, np.int64), f"{_OURS}weight_{bit}")
            shifted, digit = f"{_bit_name(bit)}/shifted", f"{_bit_name(bit)}/digit"
            nodes += [
                self._node("Div", [GATES, weight], [shifted]),
                self._node("Mod", [shifted, two], [digit]),
                self._node("Cast", [digit], [_bit_name(bit)], to=self._onnx.TensorProto.BOOL),
            ]
        return nodes

    def _splits(self) -> list[Any]:
        """Return nodes that take the gates of one path, and their binary digits, apart."""
        wanted = {_bit_name(bit): bit for bit in self._bits} if self._branched else {}
        sources: dict[str, int | None] = {**wanted, **({GATES: None} if self._indexed else {})}
        ones = self._constant(np.ones(self._num_gates, np.int64), f"{_OURS}ones")
        return [
            self._node("Split", [source, ones], [_gate_name(gate, bit) for gate in range(self._num_gates)], axis=0)
            for source, bit in sources.items()
        ]

    def _body(self, numbers: Iterable[int]) -> list[Any]:
        """Return nodes that do the work of these along the path that the gates say."""
        body: list[Any] = []
        run: list[int] = []
        for number in numbers:
            gates = self._network.gates(number)
            if run and (gates != self._network.gates(run[0]) or self._is_gathered(number)):
                body.append(self._branches(run))
                run = []
            if not gates:
                body.append(self._copy(number))
            elif self._is_gathered(number):
                body += self._gathered(number, gates[0])
            else:
                run.append(number)
        return [*body, self._branches(run)] if run else body

    def _is_gathered(self, number: int) -> bool:
        node = self._network.nodes[number]
        size = sum(arrays[0].nbytes for _, arrays in self._network.candidates_of(number))
        return node.domain == _BLOCKED and size <= self._gathered_bytes and len(self._network.gates(number)) == 1

    def _gathered(self, number: int, gate: int) -> list[Any]:
        """Return nodes that do one node's work with the weights that its gate picks."""
        self._indexed = True
        nodes, inputs = [], {}
        for slot, arrays in self._network.candidates_of(number):
            stacked = self._constant(np.stack(arrays), f"{_slot_name(slot)}/all")
            inputs[slot] = f"{_slot_name(slot)}/chosen"
            # unlike Gather, it drops the axis of the candidates for an index of shape (1)
            nodes.append(self._node("GatherND", [stacked, _gate_name(gate)], [inputs[slot]]))
        return [*nodes, self._copy(number, inputs)]

    def _branches(self, run: Sequence[int]) -> Any:
        """Return an `If` that does the work of neighbouring nodes that depend on the same gates.

        Each binary digit of a gate is an `If` of its own, so that all candidates lie equally deep and none is reached
        sooner than another.
        """
        self._branched = True
        gates = self._network.gates(run[0])
        digits = [(gate, bit) for gate in gates for bit in reversed(self._bits)]
        if 2 ** len(digits) > _MAX_LEAVES:
            raise CannotCompileError(f"a node has {2 ** len(digits)} cases")
        made = [name for number in run for name in self._network.nodes[number].output if name]
        outputs = [name for name in made if name in OUTPUTS or self._readers.get(name, set()) - {*run}]

        def choice(chosen: tuple[int, ...]) -> Any:
            taken, other = (branch((*chosen, digit)) for digit in (1, 0))
            gate, bit = digits[len(chosen)]
            names = [_in_branch(name, chosen) for name in outputs]
            return self._node("If", [_gate_name(gate, bit)], names, then_branch=taken, else_branch=other)

        def branch(chosen: tuple[int, ...]) -> Any:
            nodes: list[Any] = []
            tensors: list[Any] = []
            if len(chosen) < len(digits):
                nodes.append(choice(chosen))
            else:
                path = dict.fromkeys(gates, 0)
                for (gate, bit), digit in zip(digits, chosen, strict=True):
                    path[gate] += digit << bit
                nodes, tensors = self._leaf(run, path, {name: _in_branch(name, chosen) for name in made})
            results = [self._onnx.helper.make_empty_tensor_value_info(_in_branch(name, chosen)) for name in outputs]
            return self._onnx.helper.make_graph(nodes, _in_branch("branch", chosen), [], results, tensors)

        return choice(())

    def _leaf(
        self, run: Sequence[int], path: Mapping[int, int], names: Mapping[str, str]
    ) -> tuple[list[Any], list[Any]]:
        """Return the nodes of one case, and the tensors that only this case has."""
        nodes: list[Any] = []
        tensors: list[Any] = []
        for number in run:
            inputs = {}
            for slot, arrays in self._network.candidates_of(number):
                # beyond the last candidate there are cases where their number is no power of two; none is reached
                candidate = min(path[self._network.gate_of[slot]], self._num_candidates - 1)
                inputs[slot] = f"{_slot_name(slot)}/own"
                tensors.append(self._onnx.numpy_helper.from_array(arrays[candidate], inputs[slot]))
            nodes.append(self._copy(number, inputs))
        _rename(nodes, names)
        return nodes, tensors


def _bit_name(bit: int) -> str:
    return f"{_OURS}bit_{bit}"


def _gate_name(gate: int, bit: int | None = None) -> str:
    """Name what one gate says, or one binary digit of it; shape (1)."""
    return f"{_OURS}gate_{gate}" if bit is None else f"{_bit_name(bit)}_of_gate_{gate}"


def _in_branch(name: str, chosen: Sequence[int]) -> str:
    return f"{name}/{''.join(map(str, chosen))}" if chosen else name


def _scan(
    onnx: Any, body: Sequence[Any], entering: Sequence[str], gates: Sequence[str], leaving: Sequence[str]
) -> list[Any]:
    """Return nodes that run the body once per image.

    `entering`, (image, ...), arrives in the body as (1, ...) and `gates`, (image, gate), as (gate); `leaving`, (1, ...)
    in the body, is (image, ...) behind the nodes.
    """
    make, empty = onnx.helper.make_node, onnx.helper.make_empty_tensor_value_info
    inside = {name: f"{_OURS}in/{name}" for name in (*entering, *gates)}
    inside |= {name: f"{_OURS}out/{name}" for name in leaving}
    nodes = [make("Constant", [], [f"{_OURS}second_axis"], value_ints=[1])]
    slices = [f"{_OURS}each/{name}" for name in entering]
    stacks = [f"{_OURS}all/{name}" for name in leaving]
    for name, sliced in zip(entering, slices, strict=True):
        nodes.append(make("Unsqueeze", [name, nodes[0].output[0]], [sliced]))
    _rename(body, inside)
    graph = onnx.helper.make_graph(
        body,
        "image",
        [empty(inside[name]) for name in (*entering, *gates)],
        [empty(inside[name]) for name in leaving],
    )
    inputs = [*slices, *gates]
    nodes.append(make("Scan", inputs, stacks, body=graph, num_scan_inputs=len(inputs)))
    for name, stack in zip(leaving, stacks, strict=True):
        nodes.append(make("Squeeze", [stack, nodes[0].output[0]], [name]))
    return nodes


def _rename(nodes: Iterable[Any], names: Mapping[str, str]) -> None:
    """Rename values, in place and also within branches."""
    for node in nodes:
        for listed in (node.input, node.output):
            for position, name in enumerate(listed):
                listed[position] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, names)
                for output in attribute.g.output:
                    output.name = names.get(output.name, output.name)


def _gates_input(onnx: Any, num_gates: int, scope: Scope) -> Any:
    shape: list[int | str] = [num_gates] if scope == "batch" else ["batch", num_gates]
    return onnx.helper.make_tensor_value_info(GATES, onnx.TensorProto.INT64, shape)
