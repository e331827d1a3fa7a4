"""Verification: every graph of a bundle is compared with the weights that it was made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn

from zoo import paths
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle, int8_file
from zoo.bundle.card import Card, Check, Exit, NetworkSummary
from zoo.data import datasets
from zoo.errors import DataMissing
from zoo.export import onnx_graphs
from zoo.export.nodes import all_nodes, all_tensors
from zoo.export.stencil import AGREEMENT, EXIT, EXIT_LOGITS, GATES, IMAGES, LIMITS, LOGITS, PROBABILITIES
from zoo.gates.cost import macs
from zoo.gates.derive import Ensemble, agreement, derive, folded_copy
from zoo.gates.early_exit import leaving
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import num_exits
from zoo.runtime import GraphError, run, session
from zoo.weights.checkpoint import Architecture
from zoo.weights.models import AtExit, Weights

TOLERANCE = 1e-4
"""How far logits below 100 may differ; larger ones by a millionth of the largest, about what float32 rounds away."""
CLOSE_CALL = 1e-4
"""A probability so near to its limit may fall on either side in the graph and in the weights."""
BATCH_SIZES = (1, 3, 64)
LEAST_AGREEMENT, MOST_ROUNDING = 0.9, 0.2
"""Of an int8 graph: the share of images to which it gives the weights' class, and the root mean square of its error as
part of that of the logits (less their mean over the classes). The bundled models have 0.95 or more and 0.02."""
CHOSEN_EXIT_IMAGES = 8
"""Images that verification sends through each exit of a graph that stops early."""
DRAWN_PATHS = 8
"""Random paths along which a gated graph is asked, beside those that take one candidate everywhere."""
_EARLY = f"{EARLY_EXIT_FILE} answers as its weights"
_VOTES = "ensemble.onnx counts votes as its weights"

Answers = Callable[[Tensor], tuple[np.ndarray, ...]]
Asked = tuple[dict[str, np.ndarray], str, Callable[[Tensor], Tensor]]
"""What a graph takes beside images, the path in words, and the network that answers alike."""


def verify_graphs(bundle: Bundle) -> list[Check]:
    """Compare every graph of a bundle with its weights: answers, argmax, and what the graph holds.

    Real test images are used where the data set is on this machine, else seeded random ones; each check says which.
    """
    images, origin = sample_images(bundle.card, max(BATCH_SIZES))
    weights = Weights.of(bundle)
    checks = [_check_card(bundle, weights)]
    for variant in bundle.card.variants:
        checks += _unless_broken(_answers(variant), partial(_check_variant, bundle, variant, weights, images, origin))
    for variant in () if bundle.card.int8 is None else bundle.card.int8.variants:
        name = _answers(f"{variant}.int8")
        checks += _unless_broken(name, partial(_check_int8, bundle, variant, weights, images, origin))
    network = weights.networks[0]
    if bundle.card.exits and num_exits(network) > 1:
        checks += _unless_broken(_EARLY, lambda: [_check_early_exit(bundle, network, images, origin)])
    return checks


def sample_images(card: Card, number: int) -> tuple[Tensor, str]:
    """Return `number` images of the model's data set and where they come from; random ones where it is absent."""
    try:
        images = datasets.load(card.dataset, "test", fetch=False, number=number)
        return datasets.as_float(images.pixels), f"{number} real {card.dataset} test images"
    except DataMissing:
        shape = (number, card.input.channels, card.input.height, card.input.width)
        generator = torch.Generator().manual_seed(0)
        return torch.rand(shape, generator=generator), f"{number} random images ({card.dataset} is not on this machine)"


def _answering(weights: Weights, variant: str) -> list[Asked]:
    """Return what a variant computes: for a gated one along several paths."""
    if variant != "gated":
        members = weights.members(variant)
        return [({}, "", members[0] if variant == "single" else Ensemble(members).eval())]
    rgn, rng = weights.rgn, random.Random(0)  # noqa: S311 - repeatable
    assert rgn is not None
    chosen = [(gate,) * rgn.num_gates for gate in range(rgn.candidates)]  # every candidate of every layer runs
    chosen += [paths.sample(rgn.num_gates, rgn.candidates, rng) for _ in range(DRAWN_PATHS)]
    return [
        ({GATES: np.array(path, np.int64)}, f"path {paths.format_path(path)}", partial(rgn, path=path))
        for path in chosen
    ]


def summary_of(networks: Sequence[nn.Module], architecture: Architecture) -> NetworkSummary:
    """Return what a card says of one random gated network, or of plain networks of one architecture."""
    rgn = networks[0] if isinstance(networks[0], RandomGatedNetwork) else None
    one = networks[0] if rgn is None else derive(rgn, [0] * rgn.num_gates)
    return NetworkSummary(
        name=architecture.network,
        options=architecture.options,
        gated_layers=() if rgn is None else tuple(layer.conv for layer in rgn.layers),
        candidates=1 if rgn is None else rgn.candidates,
        sharing=None if rgn is None else rgn.sharing,
        parameters=sum(map(count_parameters, networks)),
        single_path_parameters=count_parameters(one),
    )


def exits_of(network: nn.Module) -> tuple[Exit, ...]:
    """Return what a card says of a network's exits: nothing if it has one."""
    return tuple(Exit(macs=cost) for cost in macs(network)) if num_exits(network) > 1 else ()


def count_parameters(network: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def _answers(variant: str) -> str:
    return f"{variant}.onnx answers as its weights"


def _unless_broken(name: str, checks: Callable[[], list[Check]]) -> list[Check]:
    """Return checks, or one of this name that does not hold where a graph cannot be loaded or run."""
    try:
        return checks()
    except GraphError as error:
        return [Check(name=name, held=False, detail=str(error))]


def _run(
    opened: Any, images: Tensor, *more: str, feeds: Mapping[str, np.ndarray] = MappingProxyType({})
) -> tuple[np.ndarray, ...]:
    """Return logits, probabilities, and whatever else is named; `feeds` are the inputs beside the images."""
    return run(opened, {IMAGES: onnx_graphs.as_numpy(images), **feeds}, LOGITS, PROBABILITIES, *more)


def _check_variant(bundle: Bundle, variant: str, weights: Weights, images: Tensor, origin: str) -> list[Check]:
    opened = session(content := bundle.read(f"{variant}.onnx"))
    checks = [_check_answers(variant, opened, weights, images, origin)]
    if variant == "ensemble":
        counted = partial(_check_agreement, opened, weights.members(variant), images, origin)
        checks += _unless_broken(_VOTES, lambda: [counted()])
    if variant == "single":
        (network,) = weights.members(variant)
        if isinstance(network, AtExit):
            network = network.network
            checks.append(_check_exit_logits(opened, network, images, origin))
        checks.append(_check_pruned(content, network))
    return checks


def _check_card(bundle: Bundle, weights: Weights) -> Check:
    """Compare what the card says of the network and its classes with the weights and the data set."""
    card, architecture = bundle.card, weights.architecture
    network, dataset = summary_of(weights.networks, architecture), datasets.source(architecture.dataset)
    images = {**asdict(dataset.format), "range": (0.0, 1.0)}
    pairs: dict[str, tuple[object, object]] = {
        "dataset": (card.dataset, architecture.dataset),
        "classes": (card.classes, dataset.classes),
        "exits": (card.exits, exits_of(weights.networks[0])),
    }
    for name in (field.name for field in fields(network)):
        pairs[f"architecture.{name}"] = getattr(card.architecture, name), getattr(network, name)
    for name, found in images.items():
        pairs[f"input.{name}"] = getattr(card.input, name), found
    wrong = [f"{key} is {said!r}, the weights say {found!r}" for key, (said, found) in pairs.items() if said != found]
    detail = "; ".join(wrong) or f"{len(pairs)} entries, {network.parameters} parameters"
    return Check(name="the card describes its weights", held=not wrong, detail=detail)


def _check_answers(variant: str, opened: Any, weights: Weights, images: Tensor, origin: str) -> Check:
    """Compare a graph with the weights; a gated one along several paths, of which the first that differs is told."""
    chosen = _answering(weights, variant)
    for feeds, path, network in chosen:
        check = _compare(_answers(variant), partial(_run, opened, feeds=feeds), network, images, origin)
        if path and not check.held:
            return replace(check, detail=f"{path}: {check.detail}")
    return replace(check, detail=f"{len(chosen)} paths; the last: {check.detail}") if len(chosen) > 1 else check


@torch.no_grad()
def _check_agreement(opened: Any, members: Sequence[nn.Module], images: Tensor, origin: str) -> Check:
    """Count the members' votes again.

    An image on which two classes are so near to each other that rounding decides a vote is left out.
    """
    worst, judged, unanimous = 0.0, 0, 0
    for size in BATCH_SIZES:
        batch = images[:size]
        log_prob = torch.stack([member(batch).log_softmax(1) for member in members])  # (member, batch, class)
        mean = log_prob.exp().mean(0)
        top = torch.cat([log_prob, mean.log()[None]]).topk(2, dim=2).values
        clear = (top[..., 0] - top[..., 1]).amin(0) > CLOSE_CALL
        expected = agreement(log_prob)
        (counted,) = _run(opened, batch, AGREEMENT)[2:]
        if counted.shape != tuple(expected.shape):
            raise GraphError(f"its agreement has shape {counted.shape}, expected {tuple(expected.shape)}; export again")
        difference = (torch.from_numpy(counted) - expected)[clear].abs()
        worst = max(worst, float(difference.max()) if len(difference) else 0.0)
        judged, unanimous = int(clear.sum()), int((expected == 1)[clear].sum())
    return Check(
        name=_VOTES,
        held=judged > 0 and worst == 0,
        detail=f"largest difference {worst:.1e} (allowed 0), {len(members)} members agree on {unanimous} of "
        f"{judged} images judged, {origin}",
    )


def _check_exit_logits(opened: Any, network: nn.Module, images: Tensor, origin: str) -> Check:
    """Compare every exit of the graph with that of the weights."""
    for exit_index in range(num_exits(network)):

        def graph(batch: Tensor, exit_index: int = exit_index) -> tuple[np.ndarray, ...]:
            _, _, every = _run(opened, batch, EXIT_LOGITS)
            logits = np.ascontiguousarray(every[:, exit_index])
            return logits, torch.from_numpy(logits).softmax(1).numpy()

        name = "single.onnx answers at every exit as its weights"
        check = _compare(name, graph, AtExit(network, exit_index), images, origin)
        if not check.held:
            return replace(check, detail=f"exit {exit_index + 1}: {check.detail}")
    return replace(check, detail=f"{num_exits(network)} exits; the last: {check.detail}")


@torch.no_grad()
def _check_early_exit(bundle: Bundle, network: nn.Module, images: Tensor, origin: str) -> Check:
    """Compare the graph that stops early with the weights: with limits that choose each exit, and with some between.

    Those between lie in the widest gap among the confidences of these images at each exit. An image whose confidence is
    so near to a limit that rounding decides is left out.
    """
    opened = session(bundle.read(EARLY_EXIT_FILE))
    answers = torch.stack(network(images), dim=1)  # (image, exit, class)
    confidence = answers.softmax(2).amax(2)
    last = answers.shape[1] - 1
    chosen = [[float("inf")] * exit_index + [0.0] * (last - exit_index) for exit_index in range(last + 1)]
    between = [_widest_gap(confidence[:, exit_index]) for exit_index in range(last)]
    worst, wrong, judged, taken = 0.0, 0, 0, [0] * (last + 1)
    for limits, number in [*((limits, CHOSEN_EXIT_IMAGES) for limits in chosen), (between, len(images))]:
        expected = leaving(confidence, limits)
        for image in range(min(number, len(images))):
            exit_index = int(expected[image])
            asked = range(min(exit_index + 1, last))
            if any(abs(float(confidence[image, index]) - limits[index]) < CLOSE_CALL for index in asked):
                continue
            given = np.array(limits, np.float32)
            logits, probabilities, left = _run(opened, images[image : image + 1], EXIT, feeds={LIMITS: given})
            wanted = answers[image, exit_index]
            differences = (logits[0] - wanted.numpy(), probabilities[0] - wanted.softmax(0).numpy())
            judged += 1
            taken[exit_index] += 1
            wrong += int(left[0]) != exit_index
            worst = max(worst, *(float(np.abs(np.nan_to_num(found, nan=np.inf)).max()) for found in differences))
    held = worst <= TOLERANCE and not wrong and all(taken)
    left_at = ", ".join(str(times) for times in taken)
    detail = f"{judged} answers, which left {left_at} times at the exits in turn, {wrong} of them at another exit than "
    detail += f"the weights say; largest difference {worst:.1e} (allowed {TOLERANCE:.0e}), "
    return Check(name=_EARLY, held=held, detail=f"{detail}limits {_written(between)} and those of each exit, {origin}")


def _widest_gap(confidence: Tensor) -> float:
    """Return the middle of the widest gap between any two neighbouring confidences."""
    ordered = confidence.sort().values
    gaps = ordered.diff()
    place = int(gaps.argmax())
    return float(ordered[place] + gaps[place] / 2)


def _written(limits: Sequence[float]) -> str:
    return "(" + ", ".join(f"{limit:.4f}" for limit in limits) + ")"


@torch.no_grad()
def _compare(name: str, graph: Answers, network: Callable[[Tensor], Tensor], images: Tensor, origin: str) -> Check:
    worst, scale, agree, finite = 0.0, 1.0, True, True
    for size in BATCH_SIZES:
        batch = images[:size]
        expected = network(batch)
        logits, probabilities = graph(batch)
        finite = finite and all(np.isfinite(values).all() for values in (expected.numpy(), logits, probabilities))
        scale = max(scale, float(expected.abs().max()))
        worst = max(worst, float(np.abs(logits - expected.numpy()).max()))
        worst = max(worst, float(np.abs(probabilities - expected.softmax(1).numpy()).max()))
        agree = agree and bool((logits.argmax(1) == expected.argmax(1).numpy()).all())
    allowed = TOLERANCE * max(1.0, scale / 100)
    held = finite and worst <= allowed and agree
    detail = f"largest difference {worst:.1e} (allowed {allowed:.0e}), largest logit {scale:.1f}, "
    detail += "" if finite else "NOT FINITE, "
    detail += f"argmax {'equal' if agree else 'DIFFERS'}, batches of {', '.join(map(str, BATCH_SIZES))}, {origin}"
    return Check(name=name, held=held, detail=detail)


def _check_int8(bundle: Bundle, variant: str, weights: Weights, images: Tensor, origin: str) -> list[Check]:
    """Compare an int8 graph with its float32 twin, what it takes and holds, and with the weights, what it answers."""
    file, twin = int8_file(variant), f"{variant}.onnx"
    content, original = bundle.read(file), bundle.read(twin)
    opened = session(content)
    ours, theirs = _signature(opened), _signature(session(original))
    unknown = strangers(content, original)
    name = _answers(f"{variant}.int8")
    answers = _unless_broken(name, lambda: [_check_rounded(name, opened, _answering(weights, variant), images, origin)])
    return [
        Check(
            name=f"{file} has the signature of {twin}",
            held=ours == theirs,
            detail=ours if ours == theirs else f"{ours}, expected {theirs}",
        ),
        Check(
            name=f"{file} holds the numbers of {twin} and no others",
            held=not unknown,
            detail=f"not among them: {', '.join(unknown[:3])}" if unknown else "each is within half of its scale",
        ),
        *answers,
    ]


def _signature(opened: Any) -> str:
    sides = (opened.get_inputs(), opened.get_outputs())
    return " -> ".join(", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in side) for side in sides)


@torch.no_grad()
def _check_rounded(name: str, opened: Any, chosen: Sequence[Asked], images: Tensor, origin: str) -> Check:
    least, most = 1.0, 0.0
    for feeds, _, network in chosen:
        expected = network(images)
        logits, _ = _run(opened, images, feeds=feeds)
        error = torch.from_numpy(logits) - expected
        sizes = [(values - values.mean(1, keepdim=True)).square().mean().sqrt() for values in (error, expected)]
        least = min(least, float((torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean()))
        most = max(most, float((sizes[0] / sizes[1]).nan_to_num(nan=torch.inf)))
    along = f" along each of {len(chosen)} paths" if len(chosen) > 1 else ""
    return Check(
        name=name,
        held=least >= LEAST_AGREEMENT and most <= MOST_ROUNDING,
        detail=f"same class on {least:.3f} of the images{along} (at least {LEAST_AGREEMENT}), error {most:.3f} of the "
        f"logits (at most {MOST_ROUNDING}), {origin}",
    )


def _check_pruned(content: bytes, network: nn.Module) -> Check:
    """Count the graph's numbers: those of the plain network with its BatchNorms folded, and none more."""
    folded = folded_copy(network)
    constants = sum(buffer.numel() for buffer in folded.buffers() if buffer.is_floating_point())
    most = count_parameters(cast(nn.Module, folded)) + constants
    found = onnx_graphs.count_parameters(content)
    return Check(
        name="single.onnx holds one path only",
        held=found <= most,
        detail=f"{found} numbers in the graph, {most} in the plain network with BatchNorm folded",
    )


# --- what an int8 graph holds ---


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
