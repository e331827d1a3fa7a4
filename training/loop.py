"""The one training loop.

A run is a folder:

    recipe.json        the resolved recipe
    provenance.json    seed, commit, library versions, hardware, date
    log.csv            a line per epoch; the same numbers as TensorBoard events under events/
    last.safetensors   weights, their moving average, optimiser, the objective's memory and position, to resume from
    best.safetensors   weights that were best on the held-out training images

Resuming is bit-exact on the CPU: the checkpoint holds the position, and every draw is a function of it
(`training.randomness`).
"""

from __future__ import annotations

import copy
import csv
import importlib.metadata
import io
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from training.augmentation import augmented
from training.distributed import World
from training.objectives import Batch, Memory, Step
from training.randomness import gate_generator, seed_for, tensor_generator
from training.recipes import Phase, Recipe, from_resolved, resolved
from zoo import paths
from zoo.attacks import LinfBudget, average_exits, pgd
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Table
from zoo.data import datasets
from zoo.errors import BadInput, CheckpointError, UnknownName
from zoo.files import replace_directory, write_json_atomic, write_text_atomic
from zoo.gates.derive import Ensemble, derive, folded_copy
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.hub.source import open_model
from zoo.networks import num_exits
from zoo.weights.checkpoint import (
    Architecture,
    assembled,
    load,
    load_network_state,
    network_state,
    read_architecture,
    save,
)
from zoo.weights.models import PLAIN_WEIGHTS, load_members

LAST, BEST, RECIPE, PROVENANCE, LOG = (
    "last.safetensors",
    "best.safetensors",
    "recipe.json",
    "provenance.json",
    "log.csv",
)
VALIDATION_PATHS = 4
ADAM_EPS = 1e-7
OPTIMIZER_SLOTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")
COLUMNS = (
    "epoch",
    "objective",
    "steps",
    "learning_rate",
    "loss",
    "accuracy",
    "held_out_clean",
    "held_out_robust",
    "seconds",
)


@dataclass
class Position:
    """How far a run is; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    best_robust: float = -1.0
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether the run ended before its last epoch."""
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float | int | str]] = field(default_factory=list)


def architecture_of(recipe: Recipe) -> Architecture:
    """Return what a recipe trains."""
    return Architecture(
        network=recipe.network,
        options=recipe.network_options,
        dataset=recipe.dataset,
        candidates=recipe.candidates,
        sharing=recipe.sharing if recipe.candidates > 1 else None,
        members=recipe.members,
    )


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    checkpoint_seconds: float = 60.0,
    start: nn.Module | None = None,
) -> nn.Module:
    """Train what `recipe` says into `run_dir`, or go on where a stopped run was.

    Args:
        recipe: what to do.
        run_dir: the run's folder; made if absent.
        resume: continue from its last checkpoint; without one the run starts from the beginning.
        device: "cpu", "cuda"; the first CUDA device if there is one, else the CPU, if None.
        checkpoint_seconds: at most this much work is lost when the process is killed.
        start: a network of the recipe's architecture to start from (fine-tuning), instead of fresh weights.

    Returns:
        The trained network (the moving average of its weights where the recipe keeps one), in evaluation mode; an
        `Ensemble` if the recipe has several members.

    Raises:
        BadInput: the folder holds another run, or one that `resume` was not asked to go on with.
        DataMissing: the data set is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = World.join(kind)
    try:
        place = torch.device(f"cuda:{world.local_rank}" if kind == "cuda" else kind)
        _check_folder(recipe, run_dir, resume)
        world.wait()  # no rank may meet the files of the leading one in its own check
        loop = _Loop(recipe, run_dir, world, place, checkpoint_seconds)
        loop.try_step()
        if world.leads:
            _prepare_folder(recipe, run_dir)
        world.wait()
        if resume and (run_dir / LAST).exists():
            loop.restore()
        elif start is not None:
            load_network_state(loop.model, network_state(start))
        if world.leads and not loop.finished:
            _record_start(recipe, run_dir, loop.position.step, world.size)
        loop.run()
    finally:
        world.leave()
    return loop.deployed.eval()


def _prepare_folder(recipe: Recipe, run_dir: Path) -> None:
    """Make the run's folder in one rename, or clear what a killed process left half written in it."""
    if not (run_dir / RECIPE).exists():
        with replace_directory(run_dir) as new_dir:
            write_json_atomic(new_dir / PROVENANCE, {"seed": recipe.seed, "starts": []})
            write_json_atomic(new_dir / RECIPE, resolved(recipe))
    for name in (LAST, BEST, LOG):
        for half_written in run_dir.glob(f".{name}.*"):
            half_written.unlink()


def load_run(run_dir: Path, *, which: str = "last") -> tuple[nn.Module, Architecture, Recipe]:
    """Load what a run trained, in evaluation mode, with its architecture and recipe.

    Args:
        run_dir: a folder that `train` wrote.
        which: "last" or "best".

    Raises:
        CheckpointError: not a run, or one without such a checkpoint yet.
    """
    if which not in ("last", "best"):
        raise BadInput(f"which must be 'last' or 'best', got {which!r}")
    if not (run_dir / RECIPE).is_file():
        raise CheckpointError(f"{run_dir} is not a training run: it holds no {RECIPE}")
    file = run_dir / (LAST if which == "last" else BEST)
    if not file.is_file():
        raise CheckpointError(f"{run_dir} has no {file.name} yet; train for longer, or pick another checkpoint")
    tensors, header = load(file)
    architecture = read_architecture(header, file)
    network = assembled(architecture, _under("ema/", tensors) or _under("model/", tensors))
    return network, architecture, from_resolved(_read_json(run_dir / RECIPE, "name"))


def epochs_done(run_dir: Path) -> int:
    """Return how many epochs of all phases together a run has ended; fewer than its recipe's while it goes on.

    Raises:
        CheckpointError: the run has no checkpoint, or one that does not say it.
    """
    _, header = load(run_dir / LAST)
    try:
        return Position(**header["position"]).epoch
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir / LAST} does not say how far the run is ({error})") from error


def log(run_dir: Path) -> tuple[Table, ...]:
    """Return what a run wrote per epoch, as a card keeps it; nothing if it has ended no epoch.

    Returns:
        One table "log": a row `EPOCH METHOD` per epoch, a column per number with six digits, None where the epoch has
        none, as for held-out accuracy (shares of 1) between validations; `seconds` counts from the beginning.

    Raises:
        CheckpointError: the log cannot be read.
    """
    try:
        lines = list(csv.DictReader(io.StringIO((run_dir / LOG).read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir / LOG} cannot be read ({error}); put it back, or take it away") from error
    columns = tuple(column for column in COLUMNS[2:] if any(line.get(column) for line in lines))
    try:
        rows = tuple(f"{line['epoch']} {line['objective']}" for line in lines)
        values = tuple(
            tuple(float(f"{float(line[column]):.6g}") if line[column] else None for column in columns) for line in lines
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir / LOG} is not what a run writes ({error!r}), expected columns {', '.join(COLUMNS)}; "
            "put it back, or take it away"
        ) from error
    return (
        (Table(name="log", row_axis="epoch", column_axis="", rows=rows, columns=columns, values=values),)
        if rows
        else ()
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_folder(recipe: Recipe, run_dir: Path, resume: bool) -> None:
    document = resolved(recipe)
    if (run_dir / RECIPE).exists():
        stored = _read_json(run_dir / RECIPE, "name")
        if not resume:
            raise BadInput(
                f"{run_dir} already holds a run of {stored.get('name')!r}; add --resume, or choose another folder"
            )
        if stored != document and _meaning(stored) != recipe:
            differing = sorted(key for key in {*stored, *document} if stored.get(key) != document.get(key))
            raise BadInput(
                f"{run_dir} was started with another recipe (different: {', '.join(differing)}); "
                "resume with the same recipe and settings, or choose another folder"
            )
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise BadInput(f"{run_dir} is not empty and holds no run; choose an empty or new folder")


def _meaning(stored: dict[str, Any]) -> Recipe | None:
    """Return the recipe of a document, its missing fields at their defaults; None if this version cannot read it."""
    try:
        return from_resolved(stored)
    except (BadInput, UnknownName):
        return None


def provenance(run_dir: Path) -> dict[str, Any]:
    """Read where a run comes from: its seed, and per start the step, commit, versions, hardware and date.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _read_json(run_dir / PROVENANCE, "seed", "starts")


def _record_start(recipe: Recipe, run_dir: Path, step: int, ranks: int) -> None:
    """Add this start to the provenance: a run may be resumed by other code on another machine."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "manygates"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = f"{torch.get_num_threads()} CPU threads"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    start: dict[str, Any] = {
        "step": step,
        "commit": _commit(),
        "versions": versions,
        "hardware": hardware if ranks == 1 else f"{ranks} x {hardware}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if recipe.start_from is not None:
        start["start_from"] = _weights_of(recipe.start_from).card.files[PLAIN_WEIGHTS].sha256
    document = provenance(run_dir)
    write_json_atomic(run_dir / PROVENANCE, {**document, "starts": [*document["starts"], start]})


def _commit() -> str:
    """Return the commit of this project's checkout, marked if it was changed; "unknown" outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 - fixed arguments
            ["git", *arguments],  # noqa: S607 - the user's git
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return "unknown"  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "zoo", "training", "manygates")
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _read_json(file: Path, *keys: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.parent} holds no readable {file.name} ({error}); put it back, or train again"
        ) from error
    if not isinstance(document, dict) or any(key not in document for key in keys):
        raise CheckpointError(f"{file} is not what a run writes, expected an object with {', '.join(keys)}")
    return document


def _weights_of(model: str) -> Bundle:
    """Open a plain model's weights.

    Raises:
        BadInput: it is a random gated network.
    """
    if open_model(model, only=()).card.architecture.gated_layers:
        raise BadInput(f"start_from={model!r} is a random gated network, expected a plain one")
    return open_model(model, only=(PLAIN_WEIGHTS,))


def _initial_network(recipe: Recipe, architecture: Architecture) -> nn.Module:
    """Build what is trained, drawing from torch's global generator.

    Raises:
        BadInput: The network cannot take the images, or `start_from` names a model of another network or data set, of
            another number of members, or a random gated one.
    """
    if recipe.start_from is None:
        try:
            return architecture.build()
        except BadInput as error:  # gating runs the network on images of the recipe's shape
            raise BadInput(f"recipe {recipe.name} cannot be trained: {error}") from error
    wanted = architecture.member
    members, found = load_members(_weights_of(recipe.start_from).file(PLAIN_WEIGHTS))
    if found != wanted:
        raise BadInput(f"start_from={recipe.start_from!r} is {found}, expected {wanted}")
    if len(members) != recipe.members:
        raise BadInput(
            f"start_from={recipe.start_from!r} has {len(members)} members, expected members={recipe.members}; copies "
            "of one network would stay equal"
        )
    if recipe.members > 1:
        return Ensemble(members)
    (plain,) = members
    if architecture.sharing is None:
        return plain
    return randomly_gate(
        plain,
        candidates=architecture.candidates,
        sharing=architecture.sharing,
        start="copy",
        noise=recipe.start_noise,
    )


class _Loop:
    """A run in memory: model, data, optimiser and position."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, world: World, device: torch.device, checkpoint_seconds: float
    ) -> None:
        self.recipe, self.run_dir, self.world, self.device = recipe, run_dir, world, device
        self.checkpoint_seconds = checkpoint_seconds
        torch.manual_seed(seed_for(recipe.seed, "initialise"))
        self.architecture = architecture_of(recipe)
        self.model = _initial_network(recipe, self.architecture).to(device)
        self.layout = (
            torch.channels_last if recipe.channels_last and not _narrow(self.model) else torch.contiguous_format
        )
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        images = datasets.load(recipe.dataset, "train")
        if recipe.train_images is not None:
            images = datasets.drawn(images, recipe.train_images, recipe.seed)
        rest, held_out = datasets.hold_out(images, recipe.held_out, datasets.HOLD_OUT_SEED)
        self.images, self.held_out = rest.to(device), held_out.to(device)
        self.batches = len(self.images) // recipe.batch_size
        if self.batches == 0:
            raise BadInput(
                f"{len(self.images)} training images are less than one batch of {recipe.batch_size}; lower batch_size"
            )
        self.flip = datasets.source(recipe.dataset).flips
        self.share = world.share(recipe.batch_size)
        self.precision = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.position = Position()
        self.optimizer = self._optimizer(recipe.phases[0])
        self.memory = Memory()
        self.average: AveragedModel | None = None
        if recipe.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)  # type: ignore[no-untyped-call]
        self.started = time.monotonic()
        self.saved = time.monotonic()

    @property
    def deployed(self) -> nn.Module:
        """What is validated, kept and exported: the moving average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.position.stopped or self.position.epoch >= self.recipe.epochs

    def run(self) -> None:
        """Train to the end, or until it is time to stop early."""
        writer = self._writer()
        while not self.finished:
            phase, epoch = self._phase()
            if epoch == 0 and self.position.batch == 0:
                self.optimizer, self.memory = self._optimizer(phase), Memory()
            self._epoch(phase, epoch)
            self._finish_epoch(phase, epoch, writer)
        if writer is not None:
            writer.close()

    def _phase(self) -> tuple[Phase, int]:
        epoch = self.position.epoch
        for phase in self.recipe.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise AssertionError("the position lies behind the last phase")

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        if phase.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, eps=ADAM_EPS)
        return torch.optim.SGD(
            parameters,
            lr=phase.learning_rate,
            momentum=phase.momentum,
            nesterov=phase.nesterov,
            weight_decay=phase.weight_decay,
        )

    def _epoch(self, phase: Phase, epoch: int) -> None:
        self.model.train()
        place, seed, objective = self.position, self.recipe.seed, phase.objective
        orders = [
            torch.randperm(len(self.images), generator=tensor_generator(seed, "order", place.epoch, stream))
            for stream in range(objective.streams)
        ]
        steps = self._steps(phase)
        label = f"epoch {place.epoch + 1}/{self.recipe.epochs} {objective.name}"
        for batch in self._progress(range(place.batch, steps), label):
            rate = learning_rate(phase, epoch + batch / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(seed_for(seed, "layers", place.step, self.world.rank))
            step = self._step(phase, epoch, batch)
            self.optimizer.zero_grad(set_to_none=True)
            measured = objective.accumulate(self.model, self._batches(phase, orders, batch), step)
            self.world.average(self.model)
            self._check_finite(measured["loss"])
            if phase.clip is not None:
                clip_grad_norm_(self.model.parameters(), phase.clip)
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            for name, value in measured.items():
                place.sums[name] = place.sums.get(name, 0.0) + float(value)
            place.step += 1
            place.batch = batch + 1
            if time.monotonic() - self.saved > self.checkpoint_seconds:
                self.checkpoint()

    def _steps(self, phase: Phase) -> int:
        """Return the steps of an epoch: one per batch, or several where an objective replays it."""
        return self.batches * phase.objective.replays

    def _step(self, phase: Phase, epoch: int, batch: int) -> Step:
        return Step(
            seed=self.recipe.seed,
            number=self.position.step,
            precision=self.precision,
            rank=self.world.rank,
            epoch=epoch,
            epochs=phase.epochs,
            batch=batch,
            memory=self.memory,
            average=self.world.mean,
        )

    def _check_finite(self, loss: Tensor) -> None:
        """Stop before the weights are ruined: a loss or a gradient that is not finite on any rank."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if math.isfinite(float(loss)) and math.isfinite(float(get_total_norm(gradients, norm_type=math.inf))):
            return
        kept = self.run_dir / LAST
        last = f"{kept} is from before" if kept.exists() else "nothing was saved yet"
        raise CheckpointError(
            f"loss or gradient stopped being finite at step {self.position.step} (loss {float(loss):g}); {last}; "
            "start again with a lower learning rate in this phase (--set phases.N.learning_rate=…)"
        )

    def try_step(self) -> None:
        """Run each phase's objective once, keeping nothing: what cannot work should fail before a folder is made."""
        kept = copy.deepcopy(self.model.state_dict())
        self.model.train()
        for phase in self.recipe.phases:
            objective = phase.objective
            objective.check(self.model)
            if objective.per_image_memory and self.world.size > 1:
                raise BadInput(
                    f"{objective.name} remembers something for every image of a batch and trains in one process, got "
                    f"{self.world.size}; start it without torchrun"
                )
            try:
                first = torch.arange(2 * self.world.size) % len(self.images)
                batches = [
                    self._batch(first, stream, objective.views, slice(0, 2)) for stream in range(objective.streams)
                ]
                self.memory = Memory()
                objective.accumulate(self.model, batches, self._step(phase, 0, 0))
                self._optimizer(phase)
            except (RuntimeError, ValueError) as error:
                if isinstance(error, BadInput) and str(error).startswith(objective.name):
                    raise
                raise BadInput(f"recipe {self.recipe.name} cannot be trained: {error}") from error
        self.memory = Memory()
        self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(kept)

    def _progress(self, steps: range, label: str) -> Iterator[int]:
        shown = self.world.leads and sys.stderr.isatty()
        yield from tqdm(steps, desc=label, initial=steps.start, total=steps.stop, disable=not shown, leave=False)

    def _batches(self, phase: Phase, orders: list[Tensor], batch: int) -> list[Batch]:
        size, objective = self.recipe.batch_size, phase.objective
        number, replay = divmod(batch, objective.replays)
        rows = slice(number * size, (number + 1) * size)
        return [
            self._batch(order[rows], stream, objective.views, self.share, replay) for stream, order in enumerate(orders)
        ]

    def _batch(self, order: Tensor, stream: int, views: int, share: slice, replay: int = 0) -> Batch:
        """Return the augmented images at `order`, this rank's share of them; a replay gets the very same images."""
        index = order.to(self.device)
        generator = tensor_generator(self.recipe.seed, "augment", self.position.step - replay, stream)
        made = augmented(
            self.recipe.augmentation,
            self.images.pixels[index],
            generator,
            flip=self.flip,
            views=views,
            severity=self.recipe.augmix_severity,
        )
        images, *others = (self._as_images(pixels[share]) for pixels in made)
        return Batch(images, self.images.labels[index][share], tuple(others))

    def _as_images(self, pixels: Tensor) -> Tensor:
        # a copy of the bytes: images of one channel are in both layouts as they are, and torch may take the other
        return datasets.as_float(pixels.clone(memory_format=self.layout))

    def _finish_epoch(self, phase: Phase, epoch: int, writer: Any) -> None:
        place = self.position
        row: dict[str, float | int | str] = {
            "epoch": place.epoch + 1,
            "objective": phase.objective.name,
            "steps": place.step,
            "learning_rate": learning_rate(phase, epoch + 1 - 1 / self._steps(phase)),
        }
        row |= {name: round(total / self._steps(phase), 6) for name, total in place.sums.items()}
        if (place.epoch + 1) % self.recipe.validate_every == 0 or place.epoch + 1 == self.recipe.epochs:
            # ranks must agree on what was found, since it decides on stopping
            row |= {name: self.world.agreed(value) for name, value in self._validate().items()}
        place.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        row["seconds"] = round(place.seconds, 1)
        place.rows.append(row)
        place.epoch, place.batch, place.sums = place.epoch + 1, 0, {}
        last = place.epoch > self.recipe.epochs - self.recipe.phases[-1].epochs
        better = last and self._judge(row)
        if self.world.leads:
            if better:
                self._save(BEST, weights_only=True)
            write_text_atomic(self.run_dir / LOG, _table(place.rows))
            if writer is not None:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(name, value, place.epoch)
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            print("  ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr, flush=True)
            if place.stopped:
                kept = f"best held-out {self.recipe.selection} accuracy {place.best:.4g}"
                print(f"stopped early; {kept} (export it with --checkpoint best)", file=sys.stderr, flush=True)
        self.checkpoint()

    def _judge(self, row: Mapping[str, float | int | str]) -> bool:
        """Note how an epoch of the last phase did: whether it is the best so far, and whether to stop here.

        After a collapse nothing is the best: accuracy on clean images often rises while robustness is lost.
        """
        place, recipe = self.position, self.recipe
        score = row.get(f"held_out_{recipe.selection}")
        if score is None:
            return False
        robust = cast(float, row["held_out_robust"])
        collapsed = recipe.collapse is not None and robust < place.best_robust - recipe.collapse
        better = cast(float, score) > place.best and not collapsed
        place.best = cast(float, score) if better else place.best
        place.stale = 0 if better else place.stale + 1
        place.best_robust = max(place.best_robust, robust)
        impatient = recipe.patience is not None and place.stale >= recipe.patience
        place.stopped = (collapsed or impatient) and place.epoch < recipe.epochs
        return better

    def _validate(self) -> dict[str, float]:
        """Measure on the held-out training images what is deployed: a network, an ensemble, or a few fixed paths.

        Of a multi-exit network the figures are means over its exits, and the attack is on the mean loss of all.
        """
        if not len(self.held_out):
            return {}
        model = self.deployed.eval()
        deployed: list[nn.Module]
        if isinstance(model, RandomGatedNetwork):
            rng = gate_generator(self.recipe.seed, "validation")
            chosen = [paths.sample(model.num_gates, model.candidates, rng) for _ in range(VALIDATION_PATHS)]
            deployed = [folded_copy(derive(model, path)) for path in chosen]
        elif isinstance(model, Ensemble):
            deployed = [Ensemble(folded_copy(member) for member in model.members).eval()]
        else:
            deployed = [folded_copy(model)]
        attack = pgd if num_exits(model) == 1 else average_exits
        clean = [self._accuracy(network, self.held_out) for network in deployed]
        attacked = self.held_out[slice(0, self.recipe.validation_attacked)]
        budget = LinfBudget(eps=self.recipe.validation_eps, steps=10, random_start=False)
        images = attack(deployed[0], datasets.as_float(attacked.pixels), attacked.labels, budget)
        robust = _share_right(deployed[0], images, attacked.labels)
        self.model.train()
        return {"held_out_clean": sum(clean) / len(clean), "held_out_robust": robust}

    def _accuracy(self, network: nn.Module, images: datasets.Images) -> float:
        parts = [_share_right(network, *batch) * len(batch[1]) for batch in images.batches(self.recipe.batch_size)]
        return sum(parts) / len(images)

    def checkpoint(self) -> None:
        """Write the last checkpoint: one file, one rename."""
        if self.world.leads:
            self._save(LAST)
        self.saved = time.monotonic()

    def _save(self, name: str, *, weights_only: bool = False) -> None:
        header: dict[str, Any] = {"architecture": self.architecture.described(), "position": asdict(self.position)}
        if weights_only:
            save(self.run_dir / name, _named("model/", network_state(self.deployed)), header)
            return
        tensors = _named("model/", network_state(self.model))
        if self.average is not None:
            tensors |= _named("ema/", network_state(self.deployed))
        for key, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{slot}/{key}"] = value
        save(self.run_dir / name, tensors | _named("memory/", self.memory.state()), header)

    def restore(self) -> None:
        """Take up the last checkpoint."""
        tensors, header = load(self.run_dir / LAST)
        load_network_state(self.model, _under("model/", tensors))
        try:
            self.position = Position(**header["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.run_dir / LAST} does not say how far the run is ({error})") from error
        if self.average is not None:
            load_network_state(self.deployed, _under("ema/", tensors))
            self.average.n_averaged.fill_(self.position.step)
        if self.finished:
            return
        self.optimizer = self._optimizer(self._phase()[0])
        for key, parameter in self.model.named_parameters():
            for slot in OPTIMIZER_SLOTS:
                stored = tensors.get(f"optimizer/{slot}/{key}")
                if stored is not None:
                    # in the memory format of the parameter, on its device; a counter of steps stays where Adam keeps it
                    like = torch.empty_like(parameter).copy_(stored) if stored.shape == parameter.shape else stored
                    self.optimizer.state[parameter][slot] = like
        self.memory = Memory({key: value.to(self.device) for key, value in _under("memory/", tensors).items()})

    def _writer(self) -> Any:
        if not self.world.leads:
            return None
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        return SummaryWriter(str(self.run_dir / "events"), purge_step=self.position.epoch + 1)


def _narrow(network: nn.Module) -> bool:
    """Whether a 1 x 1 convolution with a stride reads fewer than 8 channels.

    For those oneDNN (3.12, in torch 2.13) computes wrong gradients in the channels-last layout on processors without
    AVX-512, or writes past the end of its memory.
    """
    return any(
        module.in_channels < 8 and module.kernel_size == (1, 1) and module.stride != (1, 1)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    )


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _share_right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network classifies as labelled, over all its exits."""
    said = network(images)
    exits = [said] if isinstance(said, Tensor) else list(said)
    return float(torch.stack([logits.argmax(1) == labels for logits in exits]).float().mean())


def learning_rate(phase: Phase, epoch: float) -> float:
    """Return the learning rate `epoch` epochs into a phase (a fraction within an epoch)."""
    if phase.schedule == "step":
        passed = sum(int(epoch) >= milestone for milestone in phase.milestones)
        return phase.learning_rate * 0.1**passed
    if phase.schedule == "cyclic":
        return phase.learning_rate * (1 - abs(2 * epoch / phase.epochs - 1))
    warm_up = phase.epochs / 20
    if epoch < warm_up:
        return phase.learning_rate * (epoch + 1e-3) / (warm_up + 1e-3)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / (phase.epochs - warm_up)))


def _table(rows: list[dict[str, float | int | str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
