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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from zoo import paths
from zoo.errors import BadInput, BundleError
from zoo.export import exit_graphs
from zoo.export.assembly import gated_graph, path_graph
from zoo.export.nodes import all_tensors
from zoo.export.stencil import EXIT_LOGITS, GATES, IMAGES, LIMITS, LOGITS, Stencil, stencil_of
from zoo.gates import graphs, self_check
from zoo.gates.derive import Ensemble, derive
from zoo.gates.rgn import RandomGatedNetwork
from zoo.paths import Path
from zoo.runtime import run, session


def plain_graphs(members: Sequence[nn.Module]) -> dict[str, bytes]:
    """Return the ONNX files of plain networks of one architecture by file stem, all from one run of the exporter.

    `single` is the first network alone: input `images` float32 (batch, channel, height, width) in [0, 1], outputs
    `logits` and `probabilities` (batch, class). Of a network with several exits these are the last one's, and
    `exit_logits` (batch, exit, class) are those of all.

    `ensemble`, of several networks, averages their probabilities; its further output `agreement` float32 (batch) is the
    share of the networks whose most probable class is that of the average.

    `early_exit`, of a network with several exits, computes no more than its answer takes. Inputs: `images` float32 (1,
    channel, height, width) in [0, 1], and `limits` float32 (exit - 1). The answer is that of the first exit k whose
    largest probability is at least limits[k], else the last one's. Outputs: `logits` and `probabilities` (1, class),
    and `exit` int64 (1), counted from 0.

    Raises:
        BadInput: no network, or networks of several architectures; one that is in training mode, does not say the shape
            of its images, cannot be exported, or answers otherwise than its graph does.
    """
    if not members:
        raise BadInput("an ensemble needs at least one network, got none")
    first = members[0]
    if len(members) > 1:
        stencil, weights = _members_stencil(members)
        ensemble = path_graph(stencil, weights, [(number,) for number in range(len(weights))], counted=True)
        return {
            "single": _checked_path(path_graph(stencil, weights[:1]), first, stencil),
            "ensemble": _checked_path(ensemble, Ensemble(members).eval(), stencil),
        }
    stencil = stencil_of(first, _image_shape(first))
    if len(stencil.exits) == 1:
        return {"single": _checked_path(path_graph(stencil, [{}]), first, stencil)}
    return {"single": _all_exits_graph(first, stencil), "early_exit": _early_exit_graph(first, stencil)}


@dataclass(frozen=True)
class GatedStencil:
    """A random gated network exported once: the graph of any of its paths is put together without torch's exporter."""

    rgn: RandomGatedNetwork
    stencil: Stencil
    candidates: list[dict[str, np.ndarray]]
    """The tensors of the stencil that have a gate, for each candidate."""

    @classmethod
    def of(cls, rgn: RandomGatedNetwork) -> GatedStencil:
        """Export a random gated network in evaluation mode; raises as `rgn_graphs`."""
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
        swapped = ({**own, **{name: choice[gated] for name, gated in chosen.items()}} for choice in choices)
        return cls(rgn, stencil, [stencil.gated(tensors) for tensors in swapped])

    def single(self, path: Sequence[int]) -> bytes:
        """Return the graph of one path; raises as `rgn_graphs`."""
        path = self.rgn.check(path)
        return _checked_path(path_graph(self.stencil, [self._weights(path)]), derive(self.rgn, path), self.stencil)

    def ensemble(self, chosen: Sequence[Sequence[int]]) -> bytes:
        """Return the graph that averages the probabilities of several paths, with the outputs of an `ensemble`."""
        keyed = [self.rgn.check(path) for path in chosen]
        graph = path_graph(self.stencil, [self._weights(path) for path in keyed], keyed, counted=True)
        return _checked_path(graph, Ensemble(derive(self.rgn, path) for path in keyed).eval(), self.stencil)

    def gated(self) -> bytes:
        """Return the graph whose gates are an input; raises as `rgn_graphs`."""
        return _checked_gated(gated_graph(self.stencil, self.candidates, self.rgn.num_gates), self.rgn, self.stencil)

    def _weights(self, path: Path) -> dict[str, np.ndarray]:
        return {name: self.candidates[path[gate]][name] for name, gate in self.stencil.gate_of.items()}


def rgn_graphs(
    rgn: RandomGatedNetwork, single: Path | None, ensemble: Sequence[Path], *, gated: bool
) -> dict[str, bytes]:
    """Return the ONNX files of the wanted variants of a random gated network, by variant name; see `GatedStencil`.

    Raises:
        BadPath: a path does not fit the network.
        BadInput: the network has a single candidate per layer and a gated graph is wanted, it does not say the shape
            of its images, it cannot be exported, or a graph answers otherwise than the network does.
    """
    for path in [*ensemble, *([] if single is None else [single])]:
        rgn.check(path)  # before the export, which takes seconds
    exported = GatedStencil.of(rgn)
    made = {} if single is None else {"single": exported.single(single)}
    if ensemble:
        made["ensemble"] = exported.ensemble(ensemble)
    if gated:
        made["gated"] = exported.gated()
    return made


def _all_exits_graph(network: nn.Module, stencil: Stencil) -> bytes:
    graph = exit_graphs.all_exits_graph(stencil)
    opened = session(graph)

    def exits(images: Tensor) -> tuple[Tensor, ...]:
        return _run(opened, {IMAGES: as_numpy(images)}, EXIT_LOGITS)[0].unbind(1)

    _check("single", network, network, exits, stencil)
    return graph


def _members_stencil(members: Sequence[nn.Module]) -> tuple[Stencil, list[dict[str, np.ndarray]]]:
    """Return a stencil in which every weight is one gate's, and each member's weights for it."""
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


def _early_exit_graph(network: nn.Module, stencil: Stencil) -> bytes:
    """Return the graph that stops early if it answers as `network` does with limits that choose each exit."""
    graph = exit_graphs.early_exit_graph(stencil)
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
        {f"the graph {what}": found},
        images,
        "torch's exporter changed it, or its operations mean something else in ONNX",
    )


def _run(opened: object, feeds: dict[str, np.ndarray], *names: str) -> tuple[Tensor, ...]:
    try:
        return tuple(torch.from_numpy(found) for found in run(opened, feeds, *names))
    except BundleError as error:
        raise BadInput(str(error)) from error


def count_parameters(file: bytes) -> int:
    """Return how many numbers a graph's tensors hold, those inside its branches included."""
    tensors = [tensor for _, tensor in all_tensors(onnx.load_from_string(file).graph)]
    floats = [tensor for tensor in tensors if tensor.data_type == TensorProto.FLOAT]
    return sum(int(np.prod(tensor.dims)) for tensor in floats if tensor.dims)  # a scalar is a bound


def _image_shape(network: nn.Module) -> tuple[int, ...]:
    """Return (channel, height, width) of the images a network was built for."""
    shape = self_check.declared_shape(network)
    if shape is None:
        raise BadInput(
            f"{type(network).__name__} does not say the shape of its images; set network.image_shape = "
            "(channel, height, width) before exporting it"
        )
    return shape


def as_numpy(images: Tensor) -> np.ndarray:
    """Return images as the float32 array that a graph takes."""
    return np.ascontiguousarray(images.detach().cpu().numpy().astype(np.float32))
