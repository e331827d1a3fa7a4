"""Export: from networks to a bundle whose graphs were checked against the weights they came from."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from zoo import paths
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle, int8_file, write_bundle
from zoo.bundle.card import Calibration, Card, Check, Exit, Int8, Lint, NetworkSummary, Paths, Result, Training
from zoo.data import datasets
from zoo.errors import BadInput, BundleError, DataMissing
from zoo.export import onnx_graphs, quantize
from zoo.gates.cost import macs
from zoo.gates.derive import Ensemble, agreement, derive, folded_copy
from zoo.gates.early_exit import leaving
from zoo.gates.rgn import RandomGatedNetwork
from zoo.input_format import InputFormat
from zoo.networks import num_exits
from zoo.runtime import GraphError, run, runtime, session
from zoo.vocabulary import INT8
from zoo.weights.checkpoint import Architecture, load_network, save_network
from zoo.weights.models import (
    PLAIN_WEIGHTS,
    RGN_WEIGHTS,
    AtExit,
    load_exits,
    load_members,
    load_rgn,
    member_networks,
    save_members,
    weights_file,
)

TOLERANCE = 1e-4
"""How far logits below 100 may differ; larger ones by a millionth of the largest, about what float32 rounds away."""
CLOSE_CALL = 1e-4
"""A probability so near to its limit may fall on either side in the graph and in the weights."""
BATCH_SIZES = (1, 3, 64)
CALIBRATION_IMAGES = 1024
LEAST_AGREEMENT, MOST_ROUNDING = 0.9, 0.2
"""Of an int8 graph: the share of images to which it gives the weights' class, and the root mean square of its error as
part of that of the logits (less their mean over the classes). The bundled models have 0.95 or more and 0.02."""
CHOSEN_EXIT_IMAGES = 8
"""Images that verification sends through each exit of a graph that stops early."""
LICENSE = "apache-2.0"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a card says that the weights do not."""

    name: str
    description: str
    method: str
    training: Training
    license: str = LICENSE
    results: tuple[Result, ...] = ()
    """What was measured on these very weights and paths before."""
    lint: tuple[Lint, ...] = ()
    """What the linter found on them."""


def export_rgn(
    folder: Path,
    rgn: RandomGatedNetwork,
    architecture: Architecture,
    description: Description,
    *,
    single: paths.Path,
    ensemble: Sequence[paths.Path],
) -> Bundle:
    """Write the bundle of a random gated network: the bank and the graphs single, ensemble and gated.

    Raises:
        BundleError: a graph disagrees with the weights; nothing is written then.
    """
    rgn.eval()
    graphs = onnx_graphs.rgn_graphs(rgn, rgn.check(single), [rgn.check(path) for path in ensemble], gated=True)
    one = derive(rgn, single)
    card = _card(
        description,
        architecture,
        NetworkSummary(
            name=architecture.network,
            options=architecture.options,
            gated_layers=tuple(layer.conv for layer in rgn.layers),
            candidates=rgn.candidates,
            sharing=rgn.sharing,
            parameters=_parameters(rgn),
            single_path_parameters=_parameters(one),
        ),
        Paths(single=paths.format_path(single), ensemble=tuple(paths.format_path(path) for path in ensemble)),
        tuple(graphs),
    )
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / RGN_WEIGHTS
        save_network(weights, rgn, architecture)
        return _write(folder, card, graphs, weights)


def export_members(
    folder: Path, members: Sequence[nn.Module], architecture: Architecture, description: Description
) -> Bundle:
    """Write the bundle of one plain network, or of an ensemble of several (variant single is then the first).

    The bundle of a network with several exits also holds early_exit.onnx, and its card what each exit costs.

    Raises:
        BadInput: no network, or several with several exits each.
        BundleError: a graph disagrees with the weights; nothing is written then.
    """
    if not members:
        raise BadInput("a bundle needs at least one network, got none")
    exits = num_exits(members[0])
    if exits > 1 and len(members) > 1:
        raise BadInput(
            f"{len(members)} networks with {exits} exits each make no ensemble: members may leave at different exits, "
            "so there is nothing to average; export one of them"
        )
    architecture = architecture.member
    for member in members:
        member.eval()
    graphs = onnx_graphs.plain_graphs(members)
    variants = tuple(name for name in graphs if f"{name}.onnx" != EARLY_EXIT_FILE)
    card = _card(
        description,
        architecture,
        NetworkSummary(
            name=architecture.network,
            options=architecture.options,
            gated_layers=(),
            candidates=1,
            sharing=None,
            parameters=sum(_parameters(member) for member in members),
            single_path_parameters=_parameters(members[0]),
        ),
        Paths(single=None, ensemble=()),
        variants,
        _exits_of(members[0]),
    )
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / PLAIN_WEIGHTS
        save_members(weights, members, architecture)
        return _write(folder, card, graphs, weights)


def add_int8(folder: Path, *, images: int = CALIBRATION_IMAGES, seed: int = 0, earlier: Card | None = None) -> Bundle:
    """Add the int8 twin of every graph to a bundle, calibrated on training images; one that was there is replaced.

    Args:
        folder: a bundle.
        images: how many training images; all that there are if fewer.
        seed: which ones, and along which paths of a gated graph.
        earlier: a card of the same weights and paths. What it says of int8 graphs is kept if they were calibrated
            alike, and so are the same; the bundle's own card by default.

    Raises:
        BadInput: fewer than one image, or nothing to round.
        BundleError: an int8 graph is not what `verify_graphs` expects of it; the bundle is as before then.
        DataMissing: the data set is not there.
    """
    bundle = Bundle.open(folder)
    card = bundle.card
    chosen = datasets.drawn(datasets.load(card.dataset, "train"), images, seed)
    pixels = onnx_graphs.as_numpy(datasets.as_float(chosen.pixels))
    files: dict[str, bytes | Path | str] = {name: bundle.read(name) for name in card.files}
    for variant in card.variants:
        files[int8_file(variant)] = quantize.quantised(bundle.read(f"{variant}.onnx"), pixels, seed=seed)
    tool = f"onnxruntime {runtime.__version__}"
    calibration = Calibration(images=len(pixels), seed=seed, method=quantize.METHOD, tool=tool)
    card = without_int8(card)
    known = bundle.card if earlier is None else earlier
    int8 = Int8(variants=card.variants, calibration=calibration)
    if known.int8 is not None and known.int8.calibration == calibration:
        results = [entry for entry in known.results if _measured_on(entry.variant, card.variants)]
        found = [entry for entry in known.lint if _measured_on(entry.variant, card.variants)]
        card = replace(card, int8=int8, results=(*card.results, *results), lint=(*card.lint, *found))
    return _write_checked(folder, replace(card, int8=int8), files)


def _measured_on(variant: str, variants: Sequence[str]) -> bool:
    """Whether something was measured on the int8 graph of one of these variants."""
    return variant.endswith(INT8) and variant.removesuffix(INT8) in variants


def without_int8(card: Card) -> Card:
    """Return the card without int8 graphs and all that was measured on them."""
    return replace(
        card,
        int8=None,
        results=tuple(entry for entry in card.results if not entry.variant.endswith(INT8)),
        lint=tuple(entry for entry in card.lint if not entry.variant.endswith(INT8)),
    )


def verify_graphs(bundle: Bundle) -> list[Check]:
    """Compare every graph of a bundle with its weights: answers, argmax, and what the graph holds.

    Real test images are used where the data set is on this machine, else seeded random ones; each check says which.
    """
    images, origin = sample_images(bundle.card, max(BATCH_SIZES))
    checks = [_check_card(bundle)]
    for variant in bundle.card.variants:
        try:
            checks += _check_variant(bundle, variant, images, origin)
        except GraphError as error:
            checks.append(Check(name=_answers(variant), held=False, detail=str(error)))
    for variant in () if bundle.card.int8 is None else bundle.card.int8.variants:
        try:
            checks += _check_int8(bundle, variant, images, origin)
        except GraphError as error:
            checks.append(Check(name=_answers(f"{variant}.int8"), held=False, detail=str(error)))
    if bundle.card.exits:
        try:
            checks.append(_check_early_exit(bundle.read(EARLY_EXIT_FILE), load_exits(bundle), images, origin))
        except GraphError as error:
            checks.append(Check(name=_EARLY, held=False, detail=str(error)))
    return checks


def sample_images(card: Card, number: int) -> tuple[Tensor, str]:
    """Return `number` images of the model's data set and where they come from; random ones where it is absent."""
    try:
        images = datasets.evaluation_subset(datasets.load(card.dataset, "test", fetch=False), number)
        return datasets.as_float(images.pixels), f"{number} real {card.dataset} test images"
    except DataMissing:
        shape = (number, card.input.channels, card.input.height, card.input.width)
        generator = torch.Generator().manual_seed(0)
        return torch.rand(shape, generator=generator), f"{number} random images ({card.dataset} is not on this machine)"


_EARLY = f"{EARLY_EXIT_FILE} answers as its weights"


def _run(opened: Any, feeds: dict[str, np.ndarray], *more: str) -> tuple[np.ndarray, ...]:
    """Return logits, probabilities, and whatever else is named."""
    return run(opened, feeds, "logits", "probabilities", *more)


def _answers(variant: str) -> str:
    return f"{variant}.onnx answers as its weights"


def _check_variant(bundle: Bundle, variant: str, images: Tensor, origin: str) -> list[Check]:
    content = bundle.read(f"{variant}.onnx")
    if variant == "gated":
        return [_check_gated(content, load_rgn(bundle), images, origin)]
    members = member_networks(bundle, variant)
    network = members[0] if variant == "single" else Ensemble(members).eval()
    checks = [_check_answers(variant, content, network, images, origin)]
    if variant == "ensemble":
        checks += _check_agreement(content, members, images, origin)
    whole = network.network if isinstance(network, AtExit) else network
    if whole is not network:
        checks.append(_check_exit_logits(content, whole, images, origin))
    if variant == "single":
        checks.append(_check_pruned(content, whole))
    return checks


def _card(
    description: Description,
    architecture: Architecture,
    network: NetworkSummary,
    chosen: Paths,
    variants: tuple[str, ...],
    exits: tuple[Exit, ...] = (),
) -> Card:
    dataset = datasets.source(architecture.dataset)
    image = dataset.format
    return Card(
        name=description.name,
        description=description.description,
        method=description.method,
        license=description.license,
        dataset=architecture.dataset,
        architecture=network,
        input=InputFormat(
            channels=image.channels,
            height=image.height,
            width=image.width,
            range=(0.0, 1.0),
            mean=image.mean,
            std=image.std,
            resize="bicubic",
        ),
        classes=dataset.classes,
        paths=chosen,
        exits=exits,
        variants=variants,
        training=description.training,
        results=description.results,
        lint=description.lint,
        files={},
    )


def _exits_of(network: nn.Module) -> tuple[Exit, ...]:
    """Return what the card says of a network's exits: nothing if it has one."""
    return tuple(Exit(macs=cost) for cost in macs(network)) if num_exits(network) > 1 else ()


def _write(folder: Path, card: Card, graphs: dict[str, bytes], weights: Path) -> Bundle:
    """Write to a scratch folder, check every graph there, and only then to where it belongs."""
    files: dict[str, bytes | Path | str] = {f"{name}.onnx": content for name, content in graphs.items()}
    files[weights.name] = weights.read_bytes()
    return _write_checked(folder, card, files)


def _write_checked(folder: Path, card: Card, files: dict[str, bytes | Path | str]) -> Bundle:
    with tempfile.TemporaryDirectory() as scratch:
        failed = [
            check for check in verify_graphs(write_bundle(Path(scratch) / "bundle", card, files)) if not check.held
        ]
    if failed:
        raise BundleError(
            "the export does not agree with the weights, so nothing was written: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
        )
    return write_bundle(folder, card, files)


def _check_card(bundle: Bundle) -> Check:
    """Compare what the card says of the network and its classes with the weights and the data set."""
    card = bundle.card
    file = bundle.file(weights_file(card))
    if card.architecture.gated_layers:
        network, architecture = load_network(file)
        assert isinstance(network, RandomGatedNetwork)
        layers, one = tuple(layer.conv for layer in network.layers), derive(network, [0] * network.num_gates)
        total = _parameters(network)
    else:
        members, architecture = load_members(file)
        layers, one, total = (), members[0], sum(_parameters(member) for member in members)
    dataset = datasets.source(architecture.dataset)
    pairs = {
        "architecture.name": (card.architecture.name, architecture.network),
        "architecture.options": (card.architecture.options, architecture.options),
        "architecture.gated_layers": (card.architecture.gated_layers, layers),
        "architecture.candidates": (card.architecture.candidates, architecture.candidates),
        "architecture.sharing": (card.architecture.sharing, architecture.sharing),
        "architecture.parameters": (card.architecture.parameters, total),
        "architecture.single_path_parameters": (card.architecture.single_path_parameters, _parameters(one)),
        "dataset": (card.dataset, architecture.dataset),
        "classes": (card.classes, dataset.classes),
        "input.channels": (card.input.channels, dataset.format.channels),
        "input.height": (card.input.height, dataset.format.height),
        "input.width": (card.input.width, dataset.format.width),
        "input.range": (card.input.range, (0.0, 1.0)),
        "input.mean": (card.input.mean, dataset.format.mean),
        "input.std": (card.input.std, dataset.format.std),
        "exits": (card.exits, _exits_of(one)),
    }
    wrong = [f"{key} is {said!r}, the weights say {found!r}" for key, (said, found) in pairs.items() if said != found]
    return Check(
        name="the card describes its weights",
        held=not wrong,
        detail="; ".join(wrong) or f"{len(pairs)} entries, {total} parameters",
    )


def _check_answers(variant: str, content: bytes, network: nn.Module, images: Tensor, origin: str) -> Check:
    opened = session(content)

    def graph(batch: Tensor) -> tuple[np.ndarray, ...]:
        return _run(opened, {"images": onnx_graphs.as_numpy(batch)})

    return _compare(_answers(variant), graph, network, images, origin)


@torch.no_grad()
def _check_agreement(content: bytes, members: Sequence[nn.Module], images: Tensor, origin: str) -> list[Check]:
    """Count the members' votes again.

    An image on which two classes are so near to each other that rounding decides a vote is left out.
    """
    opened = session(content)
    worst, judged, unanimous = 0.0, 0, 0
    for size in BATCH_SIZES:
        batch = images[:size]
        log_prob = torch.stack([member(batch).log_softmax(1) for member in members])  # (member, batch, class)
        mean = log_prob.exp().mean(0)
        top = torch.cat([log_prob, mean.log()[None]]).topk(2, dim=2).values
        clear = (top[..., 0] - top[..., 1]).amin(0) > CLOSE_CALL
        expected = agreement(log_prob)
        (counted,) = _run(opened, {"images": onnx_graphs.as_numpy(batch)}, onnx_graphs.AGREEMENT)[2:]
        if counted.shape != tuple(expected.shape):
            raise GraphError(f"its agreement has shape {counted.shape}, expected {tuple(expected.shape)}; export again")
        difference = (torch.from_numpy(counted) - expected)[clear].abs()
        worst = max(worst, float(difference.max()) if len(difference) else 0.0)
        judged, unanimous = int(clear.sum()), int((expected == 1)[clear].sum())
    return [
        Check(
            name="ensemble.onnx counts votes as its weights",
            held=judged > 0 and worst == 0,
            detail=f"largest difference {worst:.1e} (allowed 0), {len(members)} members agree on {unanimous} of "
            f"{judged} images judged, {origin}",
        )
    ]


def _check_exit_logits(content: bytes, network: nn.Module, images: Tensor, origin: str) -> Check:
    """Compare every exit of the graph with that of the weights."""
    opened = session(content)
    for exit_index in range(num_exits(network)):

        def graph(batch: Tensor, exit_index: int = exit_index) -> tuple[np.ndarray, ...]:
            _, _, every = _run(opened, {"images": onnx_graphs.as_numpy(batch)}, onnx_graphs.EXIT_LOGITS)
            logits = np.ascontiguousarray(every[:, exit_index])
            return logits, torch.from_numpy(logits).softmax(1).numpy()

        name = "single.onnx answers at every exit as its weights"
        check = _compare(name, graph, AtExit(network, exit_index), images, origin)
        if not check.held:
            return replace(check, detail=f"exit {exit_index + 1}: {check.detail}")
    return replace(check, detail=f"{num_exits(network)} exits; the last: {check.detail}")


@torch.no_grad()
def _check_early_exit(content: bytes, network: nn.Module, images: Tensor, origin: str) -> Check:
    """Compare the graph that stops early with the weights: with limits that choose each exit, and with some between.

    Those between lie in the widest gap among the confidences of these images at each exit. An image whose confidence is
    so near to a limit that rounding decides is left out.
    """
    opened = session(content)
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
            feeds = {"images": onnx_graphs.as_numpy(images[image : image + 1]), "limits": np.array(limits, np.float32)}
            logits, probabilities, left = _run(opened, feeds, onnx_graphs.EXIT)
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


def _check_gated(content: bytes, rgn: RandomGatedNetwork, images: Tensor, origin: str, draws: int = 8) -> Check:
    """Compare along random paths, and the constant ones, in which every candidate of every layer runs."""
    opened, rng = session(content), random.Random(0)  # noqa: S311 - repeatable
    chosen = [(gate,) * rgn.num_gates for gate in range(rgn.candidates)]
    chosen += [paths.sample(rgn.num_gates, rgn.candidates, rng) for _ in range(draws)]
    for path in chosen:

        def graph(batch: Tensor, path: paths.Path = path) -> tuple[np.ndarray, ...]:
            return _run(opened, {"images": onnx_graphs.as_numpy(batch), "gates": np.array(path, np.int64)})

        check = _compare(_answers("gated"), graph, partial(rgn, path=path), images, origin)
        if not check.held:
            return replace(check, detail=f"path {paths.format_path(path)}: {check.detail}")
    return replace(check, detail=f"{len(chosen)} paths; the last: {check.detail}")


@torch.no_grad()
def _compare(
    name: str,
    graph: Callable[[Tensor], tuple[np.ndarray, ...]],
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    origin: str,
) -> Check:
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


def _check_int8(bundle: Bundle, variant: str, images: Tensor, origin: str) -> list[Check]:
    """Compare an int8 graph with its float32 twin, what it takes and holds, and with the weights, what it answers."""
    file, twin = int8_file(variant), f"{variant}.onnx"
    content, original = bundle.read(file), bundle.read(twin)
    opened = session(content)
    ours, theirs = _signature(opened), _signature(session(original))
    strangers = quantize.strangers(content, original)
    try:
        answers = _check_rounded(file, opened, _answering(bundle, variant), images, origin)
    except GraphError as error:
        answers = Check(name=_answers(f"{variant}.int8"), held=False, detail=str(error))
    return [
        Check(
            name=f"{file} has the signature of {twin}",
            held=ours == theirs,
            detail=ours if ours == theirs else f"{ours}, expected {theirs}",
        ),
        Check(
            name=f"{file} holds the numbers of {twin} and no others",
            held=not strangers,
            detail=f"not among them: {', '.join(strangers[:3])}" if strangers else "each is within half of its scale",
        ),
        answers,
    ]


def _signature(opened: Any) -> str:
    sides = (opened.get_inputs(), opened.get_outputs())
    return " -> ".join(", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in side) for side in sides)


def _answering(bundle: Bundle, variant: str, draws: int = 8) -> list[tuple[dict[str, np.ndarray], Any]]:
    """Return what a variant's weights compute, as functions of images, each with the gates that make a graph do so."""
    if variant != "gated":
        members = member_networks(bundle, variant)
        return [({}, members[0] if variant == "single" else Ensemble(members).eval())]
    rgn, rng = load_rgn(bundle), random.Random(0)  # noqa: S311 - repeatable
    chosen = [(gate,) * rgn.num_gates for gate in range(rgn.candidates)]
    chosen += [paths.sample(rgn.num_gates, rgn.candidates, rng) for _ in range(draws)]
    return [({onnx_graphs.GATES: np.array(path, np.int64)}, partial(rgn, path=path)) for path in chosen]


@torch.no_grad()
def _check_rounded(
    file: str, opened: Any, networks: Sequence[tuple[dict[str, np.ndarray], Any]], images: Tensor, origin: str
) -> Check:
    least, most = 1.0, 0.0
    for gates, network in networks:
        expected = network(images)
        logits, _ = _run(opened, {onnx_graphs.IMAGES: onnx_graphs.as_numpy(images), **gates})
        error = torch.from_numpy(logits) - expected
        sizes = [(values - values.mean(1, keepdim=True)).square().mean().sqrt() for values in (error, expected)]
        least = min(least, float((torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean()))
        most = max(most, float((sizes[0] / sizes[1]).nan_to_num(nan=torch.inf)))
    along = f" along each of {len(networks)} paths" if len(networks) > 1 else ""
    return Check(
        name=f"{file} answers as its weights",
        held=least >= LEAST_AGREEMENT and most <= MOST_ROUNDING,
        detail=f"same class on {least:.3f} of the images{along} (at least {LEAST_AGREEMENT}), error {most:.3f} of the "
        f"logits (at most {MOST_ROUNDING}), {origin}",
    )


def _check_pruned(content: bytes, network: nn.Module) -> Check:
    """Count the graph's numbers: those of the plain network with its BatchNorms folded, and none more."""
    folded = folded_copy(network)
    constants = sum(buffer.numel() for buffer in folded.buffers() if buffer.is_floating_point())
    most = _parameters(cast(nn.Module, folded)) + constants
    found = onnx_graphs.count_parameters(content)
    return Check(
        name="single.onnx holds one path only",
        held=found <= most,
        detail=f"{found} numbers in the graph, {most} in the plain network with BatchNorm folded",
    )


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
