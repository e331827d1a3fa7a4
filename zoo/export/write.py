"""Export: from networks to a bundle whose graphs were checked against the weights they came from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from zoo import paths
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle, int8_file, write_bundle
from zoo.bundle.card import Calibration, Card, Int8, Lint, NetworkSummary, Paths, Result, Training
from zoo.data import datasets
from zoo.errors import BadInput, BundleError
from zoo.export import onnx_graphs, quantize
from zoo.export.verify import exits_of, summary_of, verify_graphs
from zoo.gates.rgn import RandomGatedNetwork
from zoo.input_format import InputFormat
from zoo.networks import num_exits
from zoo.runtime import runtime
from zoo.vocabulary import INT8
from zoo.weights.checkpoint import Architecture, save_network
from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS, save_members

CALIBRATION_IMAGES = 1024
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
    card = _card(
        description,
        architecture,
        summary_of([rgn], architecture),
        paths=Paths(single=paths.format_path(single), ensemble=tuple(map(paths.format_path, ensemble))),
        variants=tuple(graphs),
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
        summary_of(members, architecture),
        paths=Paths(single=None, ensemble=()),
        variants=variants,
        exits=exits_of(members[0]),
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
        rounded = [f"{variant}{INT8}" for variant in card.variants]
        results = [entry for entry in known.results if entry.variant in rounded]
        found = [entry for entry in known.lint if entry.variant in rounded]
        card = replace(card, int8=int8, results=(*card.results, *results), lint=(*card.lint, *found))
    return _write_checked(folder, replace(card, int8=int8), files)


def without_int8(card: Card) -> Card:
    """Return the card without int8 graphs and all that was measured on them."""
    return replace(
        card,
        int8=None,
        results=tuple(entry for entry in card.results if not entry.variant.endswith(INT8)),
        lint=tuple(entry for entry in card.lint if not entry.variant.endswith(INT8)),
    )


def _card(description: Description, architecture: Architecture, network: NetworkSummary, **own: Any) -> Card:
    """Return a card without files; `own` are the fields of this kind of bundle."""
    dataset = datasets.source(architecture.dataset)
    said = {each.name: getattr(description, each.name) for each in fields(description)}
    return Card(
        dataset=architecture.dataset,
        architecture=network,
        input=InputFormat(range=(0.0, 1.0), resize="bicubic", **asdict(dataset.format)),
        classes=dataset.classes,
        files={},
        **said,
        **own,
    )


def _write(folder: Path, card: Card, graphs: dict[str, bytes], weights: Path) -> Bundle:
    """Write to a scratch folder, check every graph there, and only then to where it belongs."""
    files: dict[str, bytes | Path | str] = {f"{name}.onnx": content for name, content in graphs.items()}
    files[weights.name] = weights.read_bytes()
    return _write_checked(folder, card, files)


def _write_checked(folder: Path, card: Card, files: dict[str, bytes | Path | str]) -> Bundle:
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_bundle(Path(scratch) / "bundle", card, files)
        failed = [check for check in verify_graphs(bundle) if not check.held]
    if failed:
        raise BundleError(
            "the export does not agree with the weights, so nothing was written: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
        )
    return write_bundle(folder, card, files)
