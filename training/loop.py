"""The one training loop. What it leaves on disk is `training.run`.

Resuming is bit-exact on the CPU: the checkpoint holds the position, and every draw is a function of it
(`training.randomness`).
"""

from __future__ import annotations

import copy
import math
import sys
import time
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
from training.optimizer import learning_rate, optimizer_of
from training.randomness import seed_for, tensor_generator
from training.recipes import Phase, Recipe
from training.run import BEST, LAST, Checkpoint, Position, Row, check_folder, prepare_folder, record_start, write_log
from training.start import checksum_of_start, images_of, initial_network
from training.validation import held_out_accuracy
from zoo.data import datasets
from zoo.errors import BadInput, CheckpointError
from zoo.weights.checkpoint import load_network_state, network_state

OPTIMIZER_SLOTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")


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
        check_folder(recipe, run_dir, resume=resume)
        world.wait()  # no rank may meet the files of the leading one in its own check
        loop = _Loop(recipe, run_dir, world, place, checkpoint_seconds)
        loop.try_step()
        if world.leads:
            prepare_folder(recipe, run_dir)
        world.wait()
        if resume and (run_dir / LAST).exists():
            loop.restore()
        elif start is not None:
            load_network_state(loop.model, network_state(start))
        if world.leads and not loop.finished:
            start_from = checksum_of_start(recipe)
            record_start(run_dir, step=loop.position.step, ranks=world.size, start_from=start_from)
        loop.run()
    finally:
        world.leave()
    return loop.deployed.eval()


class _Loop:
    """A run in memory: model, data, optimiser and position."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, world: World, device: torch.device, checkpoint_seconds: float
    ) -> None:
        self.recipe, self.run_dir, self.world, self.device = recipe, run_dir, world, device
        self.checkpoint_seconds = checkpoint_seconds
        torch.manual_seed(seed_for(recipe.seed, "initialise"))
        self.model = initial_network(recipe).to(device)
        self.layout = (
            torch.channels_last if recipe.channels_last and not _narrow(self.model) else torch.contiguous_format
        )
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        images, held_out = images_of(recipe)
        self.images, self.held_out = images.to(device), held_out.to(device)
        self.batches = len(self.images) // recipe.batch_size
        self.flip = datasets.source(recipe.dataset).flips
        self.share = world.share(recipe.batch_size)
        self.precision = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.position = Position()
        self.optimizer = optimizer_of(recipe.phases[0], self.model.parameters())
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
                self.optimizer, self.memory = optimizer_of(phase, self.model.parameters()), Memory()
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

    def _epoch(self, phase: Phase, epoch: int) -> None:
        self.model.train()
        place, seed, objective = self.position, self.recipe.seed, phase.objective
        orders = [
            torch.randperm(len(self.images), generator=tensor_generator(seed, "order", place.epoch, stream))
            for stream in range(objective.streams)
        ]
        steps = self._steps(phase)
        label = f"epoch {place.epoch + 1}/{self.recipe.epochs} {objective.name}"
        hidden = not self.world.leads or not sys.stderr.isatty()
        left = range(place.batch, steps)
        for batch in tqdm(left, desc=label, initial=left.start, total=steps, disable=hidden, leave=False):
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
        """Run each phase's objective once and discard the result: what cannot work fails before a folder is made."""
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
                optimizer_of(phase, self.model.parameters())
            except (RuntimeError, ValueError) as error:
                if isinstance(error, BadInput) and str(error).startswith(objective.name):
                    raise
                raise BadInput(f"recipe {self.recipe.name} cannot be trained: {error}") from error
        self.memory = Memory()
        self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(kept)

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
        # a copy of the bytes: images of one channel are in both layouts as they are, and torch may take the other
        images, *others = (datasets.as_float(pixels[share].clone(memory_format=self.layout)) for pixels in made)
        return Batch(images, self.images.labels[index][share], tuple(others))

    def _finish_epoch(self, phase: Phase, epoch: int, writer: Any) -> None:
        place = self.position
        row: Row = {
            "epoch": place.epoch + 1,
            "objective": phase.objective.name,
            "steps": place.step,
            "learning_rate": learning_rate(phase, epoch + 1 - 1 / self._steps(phase)),
        }
        row |= {name: round(total / self._steps(phase), 6) for name, total in place.sums.items()}
        if (place.epoch + 1) % self.recipe.validate_every == 0 or place.epoch + 1 == self.recipe.epochs:
            # ranks must agree on what was found, since it decides on stopping
            row |= {
                name: self.world.agreed(value)
                for name, value in held_out_accuracy(self.deployed, self.held_out, self.recipe).items()
            }
        place.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        row["seconds"] = round(place.seconds, 1)
        place.rows.append(row)
        place.epoch, place.batch, place.sums = place.epoch + 1, 0, {}
        last = place.epoch > self.recipe.epochs - self.recipe.phases[-1].epochs
        better = last and self._judge(row)
        if self.world.leads:
            if better:
                weights = network_state(self.deployed)
                best = Checkpoint(architecture=self.recipe.architecture, position=place, model=weights)
                best.write(self.run_dir / BEST)
            write_log(self.run_dir, place.rows)
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

    def _judge(self, row: Row) -> bool:
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

    def checkpoint(self) -> None:
        """Write the last checkpoint: one file, one rename."""
        if not self.world.leads:
            return
        stored = {
            f"{slot}/{name}": value
            for name, parameter in self.model.named_parameters()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        last = Checkpoint(
            architecture=self.recipe.architecture,
            position=self.position,
            model=network_state(self.model),
            average={} if self.average is None else network_state(self.deployed),
            optimizer=stored,
            memory=self.memory.state(),
        )
        last.write(self.run_dir / LAST)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Take up the last checkpoint."""
        stored = Checkpoint.read(self.run_dir / LAST)
        load_network_state(self.model, stored.model)
        self.position = stored.position
        if self.average is not None:
            load_network_state(self.deployed, stored.average)
            self.average.n_averaged.fill_(self.position.step)
        if self.finished:
            return
        self.optimizer = optimizer_of(self._phase()[0], self.model.parameters())
        for name, parameter in self.model.named_parameters():
            for slot in OPTIMIZER_SLOTS:
                value = stored.optimizer.get(f"{slot}/{name}")
                if value is not None:
                    # in the memory format of the parameter, on its device; a counter of steps stays where Adam keeps it
                    like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                    self.optimizer.state[parameter][slot] = like
        self.memory = Memory({name: value.to(self.device) for name, value in stored.memory.items()})

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
