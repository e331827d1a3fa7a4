"""One evaluation in progress: what is deployed, the images it is judged on, progress, and what is done already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.outputs import Model, check_logits, logits_of
from zoo.attacks.random_gates import Sampler, path_model
from zoo.bundle.bundle import Bundle, int8_file
from zoo.bundle.card import Agreement, Check, Result, Table
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.int8_graph import Graph, Int8Network, int8_graph
from zoo.evaluation.intervals import rounded_interval, share
from zoo.evaluation.ledger import Ledger
from zoo.evaluation.request import Request
from zoo.gates.derive import Ensemble, folded_copy
from zoo.gates.rgn import RandomGatedNetwork
from zoo.weights.models import load_rgn, member_networks, weights_file

BATCH = 250
GROUP = 50
"""Images that share a path where random gates are judged. The mean over draws is the same, and it takes less time."""

Judge = Callable[[Tensor, Tensor, int], Tensor]
"""(images in [0, 1], labels, number of the batch) -> values with the images as their first dimension."""


@dataclass(kw_only=True)
class Run:
    """An evaluation of one variant of a bundle."""

    bundle: Bundle
    request: Request
    device: torch.device
    ledger: Ledger
    """What is measured already."""

    def images(self, default: int | None) -> Images:
        """Return the fixed subset of the test set: `request.images`, else `default`, at most all."""
        images = datasets.load(self.bundle.card.dataset, "test")
        number = self.request.images if self.request.images is not None else min(default or len(images), len(images))
        return datasets.evaluation_subset(images, number).to(self.device)

    @cached_property
    def members(self) -> list[nn.Module]:
        """The deployed plain networks, as `ready` returns them."""
        return [ready(member, self.device) for member in member_networks(self.bundle, self.request.variant)]

    @cached_property
    def network(self) -> nn.Module:
        """The deployed network of a deterministic variant, float32 weights or int8 graph; of several exits the last.

        Raises:
            BadInput: random gates.
        """
        return Int8Network(self.weights, self.graph) if self.int8 else self.weights

    @property
    def int8(self) -> bool:
        """Whether the int8 graph is judged."""
        return self.request.precision == "int8"

    @cached_property
    def graph(self) -> Graph:
        """The int8 graph of the variant."""
        return int8_graph(self.bundle, self.request.variant)

    @cached_property
    def weights(self) -> nn.Module:
        """The float32 network of a deterministic variant.

        Raises:
            BadInput: random gates.
        """
        if self.request.variant == "gated":
            raise BadInput(
                f"random gates answer differently every time, and the protocol {self.request.protocol} attacks one "
                "deterministic network, so it says nothing about random gates; measure the variants single and "
                "ensemble, or random gates by --protocol random-gates"
            )
        if len(self.members) == 1:
            return self.members[0]
        return Ensemble(self.members).eval().requires_grad_(False)

    @cached_property
    def rgn(self) -> RandomGatedNetwork:
        """The random gated network behind the bundle."""
        rgn = load_rgn(self.bundle).to(self.device)
        return rgn.requires_grad_(False)

    def along(self, path: Sequence[int]) -> Model:
        """Return what random gates deploy along a path, as float32 weights or as int8 graph."""
        weights = path_model(self.rgn, path)
        return Int8Network(weights, self.graph, path) if self.int8 else weights

    def fresh_paths(self, rng: random.Random) -> Sampler:
        """Return a sampler of what random gates deploy along fresh paths."""
        return lambda: self.along(paths.sample(self.rgn.num_gates, self.rgn.candidates, rng))

    def path_models(self, number: int) -> tuple[list[str], list[Model]]:
        """Return several deployed networks to compare: members of an ensemble, or distinct paths, published first.

        Raises:
            BadInput: a single plain network.
        """
        card = self.bundle.card
        if not card.architecture.gated_layers:
            members = self.members if self.request.variant == "ensemble" else []
            if len(members) < 2:
                raise BadInput(
                    f"{card.name} ({self.request.variant}) is one plain network; this protocol compares several paths "
                    "or members, so name a random gated network or --variant ensemble"
                )
            return [f"member {index + 1}" for index in range(len(members))], list(members)
        if self.request.variant != "gated":
            raise BadInput(
                f"{card.name} is a random gated network, whose paths are compared as its variant gated, got "
                f"{self.request.variant!r}; add --variant gated"
            )
        texts = [card.paths.single, *card.paths.ensemble]
        chosen = [self.rgn.check(paths.parse(text, self.rgn.num_gates, self.rgn.candidates)) for text in texts if text]
        rng = random.Random(self.request.seed)  # noqa: S311 - which paths are compared is no secret
        wanted = min(number, self.rgn.candidates**self.rgn.num_gates)
        chosen += paths.sample_distinct(wanted, self.rgn.num_gates, self.rgn.candidates, rng)
        distinct = list(dict.fromkeys(chosen))[:wanted]
        return [paths.format_path(path) for path in distinct], [path_model(self.rgn, path) for path in distinct]

    def check_deterministic(self, images: Images) -> None:
        """Check that the deployed network answers alike twice, and with logits.

        Raises:
            BadInput: it does not, so that a deterministic protocol would mistake luck for robustness.
        """
        pixels = datasets.as_float(images.pixels)
        first, second = (logits_of(self.network, pixels) for _ in range(2))
        if not torch.equal(first, second):
            raise BadInput(
                f"{self.bundle.card.name} answers the same image differently (by up to "
                f"{float((first - second).abs().max()):.2g}), so it is random; {self.request.protocol} is for "
                "deterministic models, use --protocol random-gates"
            )
        check_logits(first, images.labels)

    def judged(self, stage: str, images: Images, judge: Judge, *, size: int | None = None) -> Tensor:
        """Judge all images in batches, with a progress bar; a batch that is in the ledger is not judged again.

        Args:
            stage: what is being done; unique within the evaluation, and part of every generator's seed.
            images: what to judge.
            judge: see `Judge`; it draws from `generator(stage, batch)` alone, so that resuming changes nothing.
            size: images per batch, `BATCH` if None.
        """
        parts = []
        batches = list(images.batches(size or BATCH))
        for number, (pixels, labels) in enumerate(
            tqdm(batches, desc=stage, disable=not sys.stderr.isatty(), leave=False)
        ):
            known = self.ledger.get(f"{stage}/{number}")
            if known is None:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                known = judge(pixels, labels, number).detach().cpu()
                self.ledger.put(f"{stage}/{number}", known)
            parts.append(known)
        return torch.cat(parts)

    def answers(self, stage: str) -> tuple[Judge, int]:
        """Return a judge of whether the deployed variant answers images correctly, and the size of its batches.

        Random gates answer each batch along one fresh path.
        """
        if self.request.variant != "gated":
            network = self.network
            return lambda pixels, labels, _: correct(network, pixels, labels), BATCH

        def along_a_path(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
            return correct(self.fresh_paths(self.rng(stage, batch))(), pixels, labels)

        return along_a_path, GROUP

    def generator(self, stage: str, batch: int) -> torch.Generator:
        """Return the generator of one batch of one stage, on the CPU."""
        return torch.Generator().manual_seed(self._number(stage, batch))

    def rng(self, stage: str, batch: int) -> random.Random:
        """Return the source of gates of one batch of one stage."""
        return random.Random(self._number(stage, batch))  # noqa: S311 - repeatable, unlike a deployed model's gates

    def _number(self, stage: str, batch: int) -> int:
        text = f"{self.request.seed}/{stage}/{batch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def result(
        self,
        *,
        attack: str,
        accuracy: float,
        images: int,
        eps: Fraction = Fraction(0),
        steps: int = 0,
        step_size: float = 0.0,
        restarts: int = 0,
        draws: int = 0,
        note: str = "",
        checks: Sequence[Check] = (),
        tables: Sequence[Table] = (),
        agreement: Agreement | None = None,
    ) -> Result:
        """Return the result as the card keeps it, with its 95 % interval; of several exits it says which was judged."""
        if (number := len(self.bundle.card.exits)) and self.request.protocol != "exits":
            note = "; ".join(filter(None, (note, f"the last of {number} exits")))
        return Result(
            protocol=self.request.protocol,
            variant=self.request.measured_variant,
            attack=attack,
            norm=LinfBudget.norm,
            eps=float(eps),
            eps_fraction=str(eps),
            steps=steps,
            step_size=round(step_size, 9),
            restarts=restarts,
            draws=draws,
            images=images,
            seed=self.request.seed,
            accuracy=round(accuracy, 6),
            interval=rounded_interval(accuracy, images),
            agreement=agreement,
            note=note,
            checks=tuple(checks),
            tables=tuple(tables),
            date=datetime.now(UTC).date().isoformat(),
            command=self.request.command,
        )


def terms_of(bundle: Bundle, request: Request, device: torch.device) -> dict[str, object]:
    """Return everything that determines the numbers of an evaluation, for its ledger."""
    card = bundle.card
    terms = {key: value for key, value in asdict(request).items() if key != "command"}
    terms["eps"] = [str(eps) for eps in request.eps]
    for key in ("adversarial_set", "corrupted"):
        terms[key] = str(terms[key])
    return {
        "request": terms,
        "weights": card.files[weights_file(card)].sha256,
        "graph": card.files[int8_file(request.variant)].sha256 if request.precision == "int8" else None,
        "paths": [card.paths.single, *card.paths.ensemble],
        "device": device.type,
        "versions": {name: _version(name) for name in ("manygates", "torch", "pyautoattack", "numpy", "onnxruntime")},
        "batches": [BATCH, GROUP],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ready(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a plain network as it is attacked: folded, in evaluation mode, no parameter gradients, channels last."""
    folded = folded_copy(network).to(device)
    folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return folded.requires_grad_(False)


def correct(model: Model, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return where the model answers with the label (batch,) bool.

    Raises:
        BadInput: it answers NaN; see `zoo.attacks.outputs.logits_of`.
    """
    return logits_of(model, pixels).argmax(1) == labels


def agreement(equal: Tensor) -> Agreement:
    """Return on how many images (image,) bool the int8 graph gives the class of the weights."""
    found = share(equal)
    return Agreement(share=round(found, 6), interval=rounded_interval(found, len(equal)))


def table(name: str, axes: tuple[str, str], rows: Sequence[str], columns: Sequence[str], values: Tensor) -> Table:
    """Return a table of a (rows, columns) tensor, rounded to six digits; NaN is "nothing was measured"."""
    numbers = [[None if math.isnan(value) else round(value, 6) for value in row] for row in values.double().tolist()]
    return Table(
        name=name,
        row_axis=axes[0],
        column_axis=axes[1],
        rows=tuple(rows),
        columns=tuple(columns),
        values=tuple(tuple(row) for row in numbers),
    )
