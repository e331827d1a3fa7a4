"""Adversarial images of several surrogates, made once and stored, so that every target is judged on the same ones.

On each surrogate, 5 attacks (momentum PGD from three random starts, M-DI2-FGSM, and the skip gradient method) maximise
2 losses (cross-entropy, margin): 10 versions of every image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import InputDiversity, pgd
from zoo.attacks.skip_gradient import skip_gradient
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.errors import BadInput, ChecksumMismatch, MissingFile
from zoo.evaluation.ledger import digest_of
from zoo.evaluation.run import Run
from zoo.evaluation.surrogates import Surrogate, check_surrogates
from zoo.files import cache_dir, sha256_of, write_bytes_atomic, write_json_atomic

SET_FILE = "set.json"
SET_SCHEMA = 1
LEVELS = 127
"""A stored image is clean + eps * k / LEVELS with a signed byte k per pixel: in the ball by construction."""

BATCH = 50
"""Images that are attacked, and kept when making the set is interrupted, at a time."""
STEPS = 100
STARTS = 3
ATTACKS = (*(f"MI-PGD, start {start + 1}" for start in range(STARTS)), "M-DI2-FGSM", "SGM")
LOSSES = {"cross_entropy": "cross_entropy", "margin": "margin-0.1"}
VERSIONS = tuple(f"{attack}, {loss}" for attack in ATTACKS for loss in LOSSES)


def adversarial_set(run: Run, images: Images, surrogates: Sequence[Surrogate], steps: int) -> AdversarialSet:
    """Return the adversarial set that an evaluation uses: `request.adversarial_set`, or the cache's.

    Raises:
        BadInput: surrogates that are no black box (`check_surrogates`), or a stored set that does not fit.
    """
    check_surrogates(run.bundle, surrogates)
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
        # the weights of a surrogate decide; its name is for the reader
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
        """Make the file of a surrogate and eps, batch by batch, so that making it can be interrupted."""
        attack = _Attack(surrogate, eps, self.steps, self.seed, device)
        part_file = self.folder / f".{name}.part"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SET_FILE).is_file():  # first of all, so that what is half made can be told
            self._write()
        done = load_file(part_file) if part_file.is_file() else {}
        made: dict[str, list[Tensor]] = {version: [] for version in VERSIONS}
        batches = list(self.images.batches(BATCH))
        label = f"making transfer attacks on {surrogate.name}, eps {eps}"
        progress = tqdm(total=len(batches) * len(VERSIONS), desc=label, disable=not sys.stderr.isatty(), leave=False)
        for number, (pixels, labels) in enumerate(batches):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            for version in VERSIONS:
                key = f"{number}/{version}"
                if key not in done:
                    done[key] = attack.levels(key, version, pixels, labels)
                made[version].append(done[key])
                progress.update()
            write_bytes_atomic(part_file, save(done))
        progress.close()
        file = self.folder / name
        write_bytes_atomic(file, save({version: torch.cat(parts) for version, parts in made.items()}))
        part_file.unlink(missing_ok=True)
        if (self.folder / SET_FILE).is_file():  # another process may have added files of its own
            self._read()
        self.files[name] = {
            "surrogate": surrogate.name,
            "eps": str(eps),
            "sha256": sha256_of(file),
            "size": file.stat().st_size,
        }
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.folder / SET_FILE, {"terms": self.terms, "files": self.files})


class _Attack:
    """The attacks of one surrogate at one eps."""

    def __init__(self, surrogate: Surrogate, eps: Fraction, steps: int, seed: int, device: torch.device) -> None:
        self.network = surrogate.deployed(device)
        self.skipping = self.network if surrogate.plain else skip_gradient(self.network)
        self.budget = LinfBudget(eps=float(eps), steps=steps)
        self.terms = {"seed": seed, "eps": str(eps), "on": surrogate.weights}

    def levels(self, key: str, version: str, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return what a version of the attack adds to the pixels, in signed bytes of eps / `LEVELS`.

        `key` names the batch and the version, and seeds the start.
        """
        attack, loss = version.rsplit(", ", 1)
        seed = int(digest_of({**self.terms, "key": key})[:15], 16)
        adversarial = pgd(
            self.skipping if attack == "SGM" else self.network,
            pixels,
            labels,
            self.budget,
            loss=LOSSES[loss],
            momentum=1.0,
            diversity=InputDiversity() if attack == "M-DI2-FGSM" else None,
            generator=torch.Generator().manual_seed(seed),
        )
        change = (adversarial - pixels) / (self.budget.eps or 1.0) * LEVELS
        return change.round().clamp(-LEVELS, LEVELS).to(torch.int8).cpu().contiguous()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
