"""The black-box protocol of DVERGE and Ensemble-in-One: adversarial images made on surrogates, judged on the target.

Surrogates are ensembles of networks that the target has nothing to do with. On each, 5 attacks (momentum PGD from three
random starts, M-DI2-FGSM, and the skip gradient method) maximise 2 losses (cross-entropy, margin): 30 versions of every
image for three surrogates. An image counts as robust only if the target answers *all* versions correctly.

The adversarial images are made once and stored, so that every target is judged on the same ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import InputDiversity, pgd
from zoo.attacks.skip_gradient import skip_gradient
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Result
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.errors import BadInput, ChecksumMismatch, ManygatesError, MissingFile
from zoo.evaluation.ledger import digest_of
from zoo.evaluation.run import BATCH, Run, ready, share, table
from zoo.files import cache_dir, sha256_of, write_bytes_atomic, write_json_atomic
from zoo.gates.derive import Ensemble
from zoo.hub.source import open_model
from zoo.weights.models import member_networks, weights_file

SET_FILE = "set.json"
SET_SCHEMA = 1
LEVELS = 127
"""A stored image is clean + eps * k / LEVELS with a signed byte k per pixel: in the ball by construction."""

STEPS = 100
STARTS = 3
ATTACKS = (*(f"MI-PGD, start {start + 1}" for start in range(STARTS)), "M-DI2-FGSM", "SGM")
LOSSES = {"cross_entropy": "cross_entropy", "margin": "margin-0.1"}
VERSIONS = tuple(f"{attack}, {loss}" for attack in ATTACKS for loss in LOSSES)


@dataclass(frozen=True)
class Surrogate:
    """A model on which transfer attacks are made."""

    name: str
    weights: str
    """SHA-256 of its weights."""
    bundle: Bundle

    @cached_property
    def plain(self) -> bool:
        """Whether it has no residual block, so that the skip gradient method is momentum PGD."""
        try:
            skip_gradient(self.members()[0])
        except BadInput:
            return True
        return False

    def members(self) -> list[nn.Module]:
        """Return its plain networks: the ensemble's if it has one."""
        return member_networks(self.bundle, "ensemble" if self.bundle.has_variant("ensemble") else "single")

    def deployed(self, device: torch.device) -> Ensemble:
        """Return it as it is attacked: members folded, probabilities averaged."""
        return Ensemble([ready(member, device) for member in self.members()]).eval()


def blackbox(run: Run) -> list[Result]:
    """Transfer attacks: 100 steps of eps / 5 on each surrogate, 10 versions each, 1,000 images, all-or-nothing.

    `request.surrogates` names the surrogates (three ensembles of 3, 5 and 8 members in the papers), `restarts` is not
    read: momentum PGD always has three starts. Clean correctness is part of the "and", as in TRS; the note holds the
    number without it, as in DVERGE's evaluator.
    """
    images = run.images(1000)
    surrogates = [open_surrogate(name) for name in run.request.surrogates]
    adversarial = adversarial_set(run, images, surrogates, run.request.steps or STEPS)
    if run.request.variant != "gated":
        first = images[slice(0, BATCH)]
        run.check_deterministic(datasets.as_float(first.pixels), first.labels)
    clean = _judged(run, "clean", images, datasets.as_float(images.pixels))
    results = []
    for eps in run.request.eps:
        rows = []
        for surrogate in surrogates:
            versions = adversarial.versions(surrogate, eps, run.device)
            rows.append(
                torch.stack(
                    [
                        _judged(run, f"{surrogate.name}, {version}, eps {eps}", images, pixels)
                        for version, pixels in zip(VERSIONS, versions, strict=True)
                    ]
                )
            )
        right = torch.stack(rows)  # (surrogate, version, image), correct on every draw
        every = right.all(1).all(0)
        values = torch.cat([right.double().mean(2), right.all(1).double().mean(1, keepdim=True)], dim=1)
        results.append(
            run.result(
                attack=f"transfer, set {adversarial.digest[:12]}",
                accuracy=share(every & clean),
                images=len(images),
                eps=eps,
                steps=adversarial.steps,
                step_size=float(eps) / 5,
                restarts=STARTS,
                draws=1 if run.request.variant == "gated" else 0,
                note=f"{len(surrogates)} surrogates x {len(VERSIONS)} versions, all-or-nothing; {share(every):.4f} "
                f"where clean errors are not counted{_without_skips(surrogates)}",
                tables=[
                    table("sources", ("surrogate", "version"), [s.name for s in surrogates], [*VERSIONS, "all"], values)
                ],
            )
        )
    return results


def adversarial_set(run: Run, images: Images, surrogates: Sequence[Surrogate], steps: int) -> AdversarialSet:
    """Return the adversarial set that an evaluation uses: `request.adversarial_set`, or the cache's.

    Raises:
        BadInput: surrogates that are no black box (`check_surrogates`), or a stored set that does not fit.
    """
    check_surrogates(run, surrogates)
    dataset = run.bundle.card.dataset
    return AdversarialSet(
        folder=run.request.adversarial_set,
        dataset=dataset,
        images=images,
        index=datasets.evaluation_index(datasets.source(dataset).sizes["test"], len(images)),
        surrogates=surrogates,
        steps=steps,
        seed=run.request.seed,
    )


class AdversarialSet:
    """Adversarial images of several surrogates in a folder: made on demand, one file per surrogate and eps, checked.

    Args:
        folder: where they are kept; a folder of the cache named by all of the below if None.
        dataset: name of the data set.
        images: the clean images, bytes.
        index: their positions in the test set.
        surrogates: on which they are made.
        steps: gradient steps.
        seed: of the random starts.

    Raises:
        BadInput: the folder holds a set made from other images, surrogates, steps or seed.
    """

    def __init__(
        self,
        *,
        folder: Path | None,
        dataset: str,
        images: Images,
        index: Tensor,
        surrogates: Sequence[Surrogate],
        steps: int,
        seed: int,
    ) -> None:
        self.images = images
        self.steps = steps
        self.seed = seed
        self.terms: dict[str, Any] = {
            "schema": SET_SCHEMA,
            "dataset": dataset,
            "index": index.tolist(),
            "labels": images.labels.tolist(),
            "surrogates": [{"name": surrogate.name, "weights": surrogate.weights} for surrogate in surrogates],
            "versions": list(VERSIONS),
            "steps": steps,
            "seed": seed,
        }
        # the name of a surrogate is for the reader; its weights decide
        identity = {**self.terms, "surrogates": [surrogate.weights for surrogate in surrogates]}
        self.digest = digest_of(identity)
        self.folder = folder or cache_dir() / "transfer" / self.digest[:24]
        self.files: dict[str, dict[str, Any]] = {}
        if (self.folder / SET_FILE).is_file():
            self._read()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise BadInput(
                f"{self.folder} is not empty and holds no {SET_FILE}, so it is no adversarial set; name an empty folder"
            )

    def versions(self, surrogate: Surrogate, eps: Fraction, device: torch.device) -> Iterator[Tensor]:
        """Yield the images of each version, float in [0, 1] (image, channel, height, width); made now if need be.

        Raises:
            MissingFile: a stored file is gone.
            ChecksumMismatch: a stored file is not what was written.
        """
        name = f"{surrogate.weights[:12]}-eps-{str(eps).replace('/', '-')}.safetensors"
        if name not in self.files:
            self._make(name, surrogate, eps, device)
        file = self.folder / name
        if not file.is_file():
            raise MissingFile(f"{file} is listed in {SET_FILE} and not there; delete the folder to make the set again")
        if sha256_of(file) != self.files[name]["sha256"]:
            raise ChecksumMismatch(
                f"{file} is not what {SET_FILE} describes; damaged or changed; delete the folder to make it again"
            )
        stored = load_file(file)
        clean = datasets.as_float(self.images.pixels)
        for version in VERSIONS:
            yield (clean + float(eps) * stored[version].to(device).float() / LEVELS).clamp_(0, 1)

    def _read(self) -> None:
        file = self.folder / SET_FILE
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            files, found = dict(document["files"]), dict(document["terms"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file} is not the description of an adversarial set ({error}); name another folder"
            ) from error
        for key, expected in self.terms.items():
            value = found.get(key)
            if key == "surrogates" and isinstance(value, list):
                value = [entry.get("weights") for entry in value]
                expected = [entry["weights"] for entry in expected]
            if value != expected:
                raise BadInput(
                    f"the adversarial set in {self.folder} was made with another {key}: {_short(value)}, this "
                    f"evaluation has {_short(expected)}; name another folder, or evaluate with the same {key}"
                )
        self.files = files

    def _make(self, name: str, surrogate: Surrogate, eps: Fraction, device: torch.device) -> None:
        network = surrogate.deployed(device)
        skipping = network if surrogate.plain else skip_gradient(network)
        budget = LinfBudget(eps=float(eps), steps=self.steps)
        made: dict[str, list[Tensor]] = {version: [] for version in VERSIONS}
        part_file = self.folder / f".{name}.part"  # batches that are done, so that making it can be interrupted
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (
            self.folder / SET_FILE
        ).is_file():  # first of all, so that what is half made can be told and gone on with
            write_json_atomic(self.folder / SET_FILE, {"terms": self.terms, "files": self.files})
        done = load_file(part_file) if part_file.is_file() else {}
        size = 50
        batches = list(self.images.batches(size))
        label = f"making transfer attacks on {surrogate.name}, eps {eps}"
        progress = tqdm(total=len(batches) * len(VERSIONS), desc=label, disable=not sys.stderr.isatty(), leave=False)
        for number, (pixels, labels) in enumerate(batches):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            for version in VERSIONS:
                key = f"{number}/{version}"
                if key not in done:
                    attack, loss = version.rsplit(", ", 1)
                    seed = int(
                        digest_of({"seed": self.seed, "key": key, "eps": str(eps), "on": surrogate.weights})[:15], 16
                    )
                    adversarial = pgd(
                        skipping if attack == "SGM" else network,
                        pixels,
                        labels,
                        budget,
                        loss=LOSSES[loss],
                        momentum=1.0,
                        diversity=InputDiversity() if attack == "M-DI2-FGSM" else None,
                        generator=torch.Generator().manual_seed(seed),
                    )
                    change = (adversarial - pixels) / (float(eps) or 1.0) * LEVELS
                    done[key] = change.round().clamp(-LEVELS, LEVELS).to(torch.int8).cpu().contiguous()
                made[version].append(done[key])
                progress.update()
            write_bytes_atomic(part_file, save(done))
        progress.close()
        stored = {version: torch.cat(parts) for version, parts in made.items()}
        write_bytes_atomic(self.folder / name, save(stored))
        part_file.unlink(missing_ok=True)
        self.files[name] = {
            "surrogate": surrogate.name,
            "eps": str(eps),
            "sha256": sha256_of(self.folder / name),
            "size": (self.folder / name).stat().st_size,
        }
        if (self.folder / SET_FILE).is_file():  # another process may have added files of its own
            entry = self.files[name]
            self._read()
            self.files[name] = entry
        write_json_atomic(self.folder / SET_FILE, {"terms": self.terms, "files": self.files})


def check_surrogates(run: Run, surrogates: Sequence[Surrogate]) -> None:
    """Check that the surrogates are others than the target.

    Raises:
        BadInput: none is named, one is the target, shares a member with it or is what it was trained from, or one was
            trained on another data set.
    """
    card = run.bundle.card
    if not surrogates:
        raise BadInput(
            "the blackbox protocol needs surrogates, got none; name models with --surrogates, for instance ensembles "
            "of standard networks of other seeds"
        )
    twice = [surrogate.name for surrogate in surrogates if [s.weights for s in surrogates].count(surrogate.weights) > 1]
    if twice:
        raise BadInput(f"surrogate {twice[0]} is named twice, expected different models")
    own = {_fingerprint(member) for member in _target_members(run)}
    start = card.training.recipe.get("start_from")
    starts = card.training.recipe.get("starts")
    digests = (
        {entry.get("start_from") for entry in starts if isinstance(entry, dict)} if isinstance(starts, list) else set()
    )
    for surrogate in surrogates:
        theirs = surrogate.bundle.card
        if theirs.dataset != card.dataset:
            raise BadInput(f"surrogate {surrogate.name} was trained on {theirs.dataset}, the target on {card.dataset}")
        if surrogate.weights == card.files[weights_file(card)].sha256 or any(
            _fingerprint(member) in own for member in surrogate.members()
        ):
            raise BadInput(
                f"surrogate {surrogate.name} is the target itself or shares a member with it, which is a white-box "
                "attack; name models of other seeds"
            )
        if surrogate.weights in digests or (start is not None and theirs.name == start):
            raise BadInput(
                f"surrogate {surrogate.name} is what {card.name} was trained from, so it knows more than a black-box "
                "attacker; name models of other seeds"
            )


def _without_skips(surrogates: Sequence[Surrogate]) -> str:
    plain = [surrogate.name for surrogate in surrogates if surrogate.plain]
    return f"; SGM is momentum PGD on {', '.join(plain)}, which has no residual block" if plain else ""


def _target_members(run: Run) -> list[nn.Module]:
    variants = [variant for variant in ("single", "ensemble") if run.bundle.has_variant(variant)]
    return [member for variant in variants for member in member_networks(run.bundle, variant)]


def _fingerprint(network: nn.Module) -> str:
    sums = {
        name: [float(tensor.double().sum()), float(tensor.double().square().sum())]
        for name, tensor in network.state_dict().items()
    }
    return digest_of(sums)


def open_surrogate(name: str) -> Surrogate:
    """Open a model as a surrogate.

    Raises:
        BadInput: there is no such model, or it is broken.
    """
    try:
        card = open_model(name, only=()).card
        bundle = open_model(name, only=(weights_file(card),))
    except ManygatesError as error:
        raise BadInput(f"surrogate {name}: {error}") from error
    return Surrogate(f"{card.name}", card.files[weights_file(card)].sha256, bundle)


def _judged(run: Run, stage: str, images: Images, pixels: Tensor) -> Tensor:
    """Return where the deployed variant answers these versions of the images correctly (image,)."""
    judge, size = run.answers(stage)
    parts = zip(torch.split(pixels, size), torch.split(images.labels, size), strict=True)
    return torch.cat(
        [
            judge(part.contiguous(memory_format=torch.channels_last), labels, number)
            for number, (part, labels) in enumerate(parts)
        ]
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
