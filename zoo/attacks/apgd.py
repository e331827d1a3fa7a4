"""Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, section 3 and algorithm 1): PGD that sets its own step.

It begins with steps of 2 eps and some momentum and remembers the point of highest loss. At fixed checkpoints it halves
the step of every image that has stopped climbing, and sends it back to that point. `budget.step_size` is not read.

`apgd_eot` climbs the expected loss of a model that answers at random. The authors' implementation averages gradients
only: its step control, its best point and its success belong to the last of the draws, so it stops at the first lucky
one. Here all of them follow the mean loss over the draws.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.attacks.budget import Ball, LinfBudget, check_generator, linf_of, whole
from zoo.attacks.gradient import Watch
from zoo.attacks.images import check_batch
from zoo.attacks.losses import Ascent, Loss, ascent, loss_named, succeeded
from zoo.attacks.models import checked_model, first_logits
from zoo.attacks.outputs import Model, Output, check_logits
from zoo.attacks.random_gates import Sampler, checked_draws
from zoo.errors import BadInput, UnknownName

Keep = Literal["first broken", "highest loss"]

RHO = 0.75
"""An image gets smaller steps if its loss rose in at most this share of the steps since the last checkpoint."""
INERTIA = 0.25
"""The share of the last move in the next one; the paper writes alpha = 1 - INERTIA."""


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    loss: str | Loss = "cross_entropy",
    targets: Tensor | None = None,
    keep: Keep = "first broken",
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    output: Output | None = None,
) -> Tensor:
    """Attack a deterministic model by Auto-PGD.

    Args:
        model: images -> logits; its modules must be in evaluation mode. Its parameters collect no gradient. A random
            model is attacked draw by draw, with a warning; `apgd_eot` is the attack for it.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: `eps`, `steps` (100 in AutoAttack), `restarts`, `random_start`. A start lies on the border of the ball.
        loss: one of `LOSSES` or a function like them.
        targets: int64 (batch,) for a targeted attack: the class to be reached.
        keep: "first broken" returns the first point that reached the goal and goes on without that image; an image that
            the model gets wrong already stays as it is. "highest loss" goes on to the end, for transfer attacks.
        generator: draws the starts, on the CPU; torch's global generator if None.
        watch: called at the start and after each step with (step, points of highest loss so far, their losses), of the
            images that are still attacked.
        output: where the logits are in what the model returns; see `outputs.Output`.

    Returns:
        For each image what `keep` says, and the point of highest loss where the goal was not reached; within
        `budget.eps` of the image and in [0, 1].

    Raises:
        BadInput: see `images.check_batch` and `losses.ascent`; a loss that does not fit the number of classes.
        UnknownName: no such loss, or no such `keep`.
    """
    budget = linf_of(budget, "Auto-PGD")
    check_generator(generator)
    if keep not in get_args(Keep):
        raise UnknownName(keep, get_args(Keep), kind="keep")
    checked = checked_model(model, output)
    images, labels, targets = check_batch(images, labels, targets)
    rise = ascent(checked, loss)
    if not len(images):
        return images.clone()
    logits = first_logits(checked, images, labels, targets)
    search = _Search(rise, images, labels, budget, generator, watch)
    stop = keep == "first broken"
    if stop:
        search.settled |= succeeded(logits, labels, targets)
    for _ in range(budget.restarts):
        search.attempt(targets, goal=targets, stop=stop)
    return search.points


def apgd_targeted(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    loss: str | Loss = "dlr",
    num_targets: int = 9,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    output: Output | None = None,
) -> Tensor:
    """Attack by Auto-PGD towards each of the most likely wrong classes in turn, until any wrong class is reached.

    Args, returns and raises as `apgd`, with `budget.restarts` attempts for each class, and
        loss: a targeted one; with fewer than 4 classes "margin".
        num_targets: how many classes, in the order of their logits on the image; all of them where there are fewer.
    """
    budget = linf_of(budget, "Auto-PGD")
    check_generator(generator)
    num_targets = whole(num_targets, "num_targets")
    if num_targets < 1:
        raise BadInput(f"need at least 1 target class, got num_targets={num_targets}; 9 is usual with 10 classes")
    checked = checked_model(model, output)
    images, labels, _ = check_batch(images, labels)
    rise = ascent(checked, loss)
    if not len(images):
        return images.clone()
    logits = first_logits(checked, images, labels)
    search = _Search(rise, images, labels, budget, generator, watch)
    search.settled |= succeeded(logits, labels)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)[:, :-1]
    for targets in wrong[:, :num_targets].unbind(1):
        search.losses.fill_(-torch.inf)  # losses towards different classes do not compare
        for _ in range(budget.restarts):
            search.attempt(targets, goal=None, stop=True)
    return search.points


def apgd_eot(
    sampler: Sampler,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    draws: int = 20,
    loss: str | Loss = "cross_entropy",
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    output: Output | None = None,
) -> Tensor:
    """Attack a random model by Auto-PGD on its expected loss.

    Args:
        sampler: returns one fresh deterministic draw of the model at each call.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: as in `apgd`; no attempt stops early, because one fooled draw proves nothing.
        draws: fresh draws at every point, over which gradient and loss are averaged.
        loss: one of `LOSSES` or a function like them.
        generator: draws the starts, on the CPU; the sampler draws the models.
        watch: as in `apgd`.
        output: as in `apgd`, of every draw.

    Returns:
        For each image the point of highest mean loss of all attempts. That is no verdict: judge it on draws that the
        attack has not seen.

    Raises:
        BadInput: fewer than one draw; see `apgd` for the rest.
    """
    budget = linf_of(budget, "Auto-PGD")
    check_generator(generator)
    draws = whole(draws, "draws")
    if draws < 1:
        raise BadInput(f"EOT needs at least 1 draw at every point, got {draws}; 20 is usual")
    rise = _expected_ascent(checked_draws(sampler, output), draws, loss_named(loss))
    images, labels, _ = check_batch(images, labels)
    if not len(images):
        return images.clone()
    search = _Search(rise, images, labels, budget, generator, watch)
    for _ in range(budget.restarts):
        search.attempt(None, goal=None, stop=False)
    return search.points


def _expected_ascent(sampler: Sampler, draws: int, loss: Loss) -> Ascent:
    """Return the ascent on the mean loss over fresh draws; its logits are the mean logits."""

    def step(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for _ in range(draws):
            parts.append(ascent(sampler(), loss)(images, labels, targets))
        gradients, losses, logits = zip(*parts, strict=True)
        return _mean(gradients), _mean(losses), _mean(logits)

    return step


def _mean(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(tensors).mean(0)


class _Search:
    """The attempts on a batch, and the best that they have found for each image so far."""

    def __init__(
        self,
        rise: Ascent,
        images: Tensor,
        labels: Tensor,
        budget: LinfBudget,
        generator: torch.Generator | None,
        watch: Watch | None,
    ) -> None:
        self.rise, self.images, self.labels, self.budget = rise, images, labels, budget
        self.ball = budget.around(images)
        self.generator, self.watch = generator, watch
        self.points = images.clone()
        precision = torch.promote_types(images.dtype, torch.float32)
        self.losses = torch.full((len(images),), -torch.inf, dtype=precision, device=images.device)
        self.settled = torch.full((len(images),), budget.eps == 0, device=images.device)

    def attempt(self, targets: Tensor | None, *, goal: Tensor | None, stop: bool) -> None:
        """Make one attempt on the images that are not settled, and keep what is better than before.

        Args:
            targets: the classes that the loss aims at.
            goal: the classes that count as success; any wrong one if None.
            stop: settle an image at its first success.
        """
        images, labels, budget = self.images, self.labels, self.budget
        # drawn for all images, so that a start does not depend on which others are still unbroken
        starts = _starts(images, self.ball, budget.eps, self.generator) if budget.random_start else images
        rows = (~self.settled).nonzero()[:, 0]
        if not len(rows):
            return
        climb = _Climb.begin(
            self.rise,
            self.ball[rows],
            starts[rows],
            labels[rows],
            None if targets is None else targets[rows],
            None if goal is None else goal[rows],
            budget,
        )
        for step, checkpoint in enumerate(checkpoints(budget.steps)):
            if stop:
                broken = succeeded(climb.logits, climb.labels, climb.goal)
                if bool(broken.any()):
                    self.points[rows[broken]] = climb.current[broken]
                    self.settled[rows[broken]] = True
                    rows = rows[~broken]
                    climb.select(~broken)
                    if not len(rows):
                        return
            if self.watch is not None:
                self.watch(step, climb.best, climb.best_loss)
            if step == budget.steps:
                break
            climb.step(self.rise, budget, first=step == 0)
            if checkpoint:
                climb.shrink_steps(checkpoint)
        better = climb.best_loss > self.losses[rows]
        self.points[rows[better]] = climb.best[better]
        self.losses[rows[better]] = climb.best_loss[better].to(self.losses.dtype)


def _starts(images: Tensor, ball: Ball, eps: float, generator: torch.Generator | None) -> Tensor:
    """Return points whose largest change is eps, brought into [0, 1]; the draw is made on the CPU."""
    noise = 2 * torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device) - 1
    largest = noise.flatten(1).abs().amax(1).clamp_min(torch.finfo(noise.dtype).tiny)
    return ball.project(images + eps * (noise / largest[:, None, None, None]))


def checkpoints(steps: int) -> list[int]:
    """Return for each step the length of the interval that a checkpoint ends after it, else 0; the last has none.

    The intervals are 22 % of the steps at first and shrink by 3 % of them to 6 % (equation 3 of the paper, with the
    rounding of the authors' implementation).
    """
    length, shortest, shrinking = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, taken = [], 0
    for _ in range(steps):
        taken += 1
        found.append(length if taken == length else 0)
        if taken == length:
            length, taken = max(length - shrinking, shortest), 0
    return [*found, 0]


@dataclass
class _Climb:
    """The state of one attempt; every field has one row per image, so that images can leave."""

    ball: Ball
    labels: Tensor
    targets: Tensor | None
    goal: Tensor | None
    current: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    logits: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    size: Tensor
    """The step (batch, 1, 1, 1)."""
    rises: Tensor
    """Steps since the last checkpoint that raised the loss."""
    shrunk: Tensor
    """Whether the last checkpoint shrank the step."""
    checked_loss: Tensor
    """The highest loss at the last checkpoint."""

    @classmethod
    def begin(
        cls,
        rise: Ascent,
        ball: Ball,
        starts: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        goal: Tensor | None,
        budget: LinfBudget,
    ) -> _Climb:
        gradient, loss, logits = rise(starts, labels, targets)
        check_logits(logits, labels, targets)
        return cls(
            ball=ball,
            labels=labels,
            targets=targets,
            goal=goal,
            current=starts,
            previous=starts,
            gradient=gradient,
            loss=loss,
            logits=logits,
            best=starts,
            best_gradient=gradient,
            best_loss=loss,
            size=gradient.new_full((len(starts), 1, 1, 1), 2 * budget.eps),
            rises=torch.zeros_like(labels),
            shrunk=torch.ones_like(labels, dtype=torch.bool),
            checked_loss=loss,
        )

    def select(self, rows: Tensor) -> None:
        """Go on with some of the images."""
        for field in fields(self):
            part = getattr(self, field.name)
            if part is not None:
                setattr(self, field.name, part[rows])

    def step(self, rise: Ascent, budget: LinfBudget, *, first: bool) -> None:
        """Move, and note where the loss rose and where it is the highest so far."""
        moved = self.ball.project(self.current + self.size * budget.direction(self.gradient))
        if not first:
            inert = (1 - INERTIA) * (moved - self.current) + INERTIA * (self.current - self.previous)
            moved = self.ball.project(self.current + inert)
        self.previous, self.current = self.current, moved
        before = self.loss
        self.gradient, self.loss, self.logits = rise(moved, self.labels, self.targets)
        self.rises = self.rises + (self.loss > before)
        better = self.loss > self.best_loss
        self.best = _where(better, moved, self.best)
        self.best_gradient = _where(better, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, self.loss, self.best_loss)

    def shrink_steps(self, interval: int) -> None:
        """Halve the step of the images that climb no more, and send them back to their best point."""
        stalled = self.rises <= RHO * interval
        # the step was kept at the last checkpoint, and yet no better point has been found since
        stalled |= ~self.shrunk & (self.best_loss <= self.checked_loss)
        self.size = torch.where(stalled[:, None, None, None], self.size / 2, self.size)
        # `loss` and `previous` stay: the next rise and the next inertia count from the point that is left
        self.current = _where(stalled, self.best, self.current)
        self.gradient = _where(stalled, self.best_gradient, self.gradient)
        self.rises = torch.zeros_like(self.rises)
        self.shrunk, self.checked_loss = stalled, self.best_loss


def _where(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows[:, None, None, None], chosen, other)
