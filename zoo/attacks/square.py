"""The Square attack (Andriushchenko et al. 2020, arXiv:1912.00049): random search that needs only a model's scores.

Every pixel stands at one of the two ends of its range. A query repaints one square of the image, in each channel with
one end or the other, and the repainted image is kept if its loss is higher. No gradient is used, so masked gradients do
not help. A model that withstands PGD but not this attack is only hard to differentiate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.attacks.budget import Budget, check_generator, linf_of, number, whole
from zoo.attacks.gradient import Watch
from zoo.attacks.images import check_batch
from zoo.attacks.losses import Loss, loss_named, succeeded
from zoo.attacks.models import CheckedModel, checked_model
from zoo.attacks.outputs import Model, Output, check_logits, check_numbers
from zoo.errors import BadInput

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The squares after which the share of pixels in one is halved: the published schedule for 10,000 queries."""


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    queries: int = 5000,
    share: float = 0.8,
    loss: str | Loss = "margin",
    targets: Tensor | None = None,
    draws: int = 1,
    early_stop: bool = True,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    output: Output | None = None,
) -> Tensor:
    """Search at random, square by square, for an image in the l_inf ball with a high loss.

    The search starts with vertical stripes: each column of each channel is at +eps or -eps. Then come squares, drawn
    for each image separately, which get smaller by `HALVED_AFTER`. As in AutoAttack, the schedule is not rescaled to
    `queries`.

    Two things differ from the authors' code. Squares may touch the last row and the last column. A square that would
    change nothing is turned over, because its query would be wasted.

    A query scores one image once, which takes `draws` forwards. With early stopping the first query asks about the
    image itself, and no more queries are spent on an image that is broken.

    A random model needs `draws` > 1. Its score is then the mean loss over `draws` forwards. A candidate must beat the
    incumbent twice, each time on fresh draws that both share, so one lucky draw neither makes nor protects an
    incumbent. That costs two or four queries per square. No image stops early, because one fooled draw proves nothing.

    Args:
        model: images -> logits (log-probabilities serve as well); a module must be in evaluation mode. It is called
            without gradients and with at most twice as many images as are given.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: an `LinfBudget`, of which only `eps` is read.
        queries: the most queries for an image.
        share: the share of the pixels in the first squares, p in the paper.
        loss: one of `LOSSES` or a function like them; with early stopping an image that reaches the goal is kept
            whatever its loss.
        targets: int64 (batch,) for a targeted attack: the class to be reached. The paper uses "cross_entropy" then.
        draws: forwards per query; 1 for a deterministic model.
        early_stop: False goes on with images that are broken already, for the highest loss. Ignored if `draws` > 1.
        generator: draws stripes and squares, on the CPU; torch's global generator if None. An image's squares do not
            depend on which others are broken.
        watch: called after each square with (its number from 0, incumbents of all images, their last losses (batch,)).
        output: where the logits are in what the model returns; see `outputs.Output`.

    Returns:
        The incumbents, within `budget.eps` of the images and in [0, 1], broken or not. An image that the model gets
        wrong before the attack is returned as it is (with early stopping).

    Raises:
        BadInput: an `L2Budget`, no query or draw, a share outside (0, 1]; see `images.check_batch` and
            `outputs.check_logits`.
    """
    budget = linf_of(budget, "the Square attack")
    check_generator(generator)
    queries, draws, share = whole(queries, "queries"), whole(draws, "draws"), number(share, "share")
    if queries < 1 or draws < 1:
        raise BadInput(f"need at least 1 query and 1 draw, got queries={queries} draws={draws}")
    if not 0 < share <= 1:
        raise BadInput(f"the share of pixels in a square must be in (0, 1], got {share}; 0.8 is usual")
    checked = checked_model(model, output, randomness="allow" if draws == 1 else "expect")
    images, labels, targets = check_batch(images, labels, targets)
    if not len(images):
        return images.clone()
    search = _Search(
        ask=_Scorer(checked, loss_named(loss), labels, targets, draws),
        images=images,
        ends=torch.stack([budget.project(images - budget.eps, images), budget.project(images + budget.eps, images)]),
        queries=queries,
        share=share,
        generator=generator,
        watch=watch,
    )
    return search.by_scores(early_stop=early_stop) if draws == 1 else search.by_repeated_comparison()


class _Search:
    """The incumbents, and the two ways to improve them."""

    def __init__(
        self,
        *,
        ask: _Scorer,
        images: Tensor,
        ends: Tensor,
        queries: int,
        share: float,
        generator: torch.Generator | None,
        watch: Watch | None,
    ) -> None:
        self._ask, self._ends, self._queries, self._share = ask, ends, queries, share
        self._generator, self._watch = generator, watch
        self._incumbents = images.clone()
        self._everybody = torch.arange(len(images), device=images.device)
        self._losses = torch.full((len(images),), -math.inf, device=images.device, dtype=torch.float64)

    def by_scores(self, *, early_stop: bool) -> Tensor:
        """Search a deterministic model: what an incumbent scored once it scores for ever."""
        active, used = self._everybody, 0
        if early_stop:
            self._losses, broken = self._ask(self._incumbents, active)
            active, used = active[~broken], 1
        self._paint_stripes(active)
        if used < self._queries and len(active):
            self._losses[active], broken = self._ask(self._incumbents[active], active)
            active, used = (active[~broken] if early_stop else active), used + 1
        for position in range(self._queries - used):
            if not len(active):
                break
            candidates = self._with_square(position, active)
            losses, broken = self._ask(candidates, active)
            better = losses > self._losses[active]
            if early_stop:
                better = better | broken
            self._accept(active[better], candidates[better], losses[better])
            if early_stop:
                active = active[~broken]
            self._report(position)
        return self._incumbents

    def by_repeated_comparison(self) -> Tensor:
        """Search a random model: a candidate must beat the incumbent twice, each time on fresh draws of both."""
        active = self._everybody
        used = torch.zeros_like(active)
        self._paint_stripes(active)
        number = 0
        while len(active := active[used[active] + 4 <= self._queries]):
            candidates = self._with_square(number, active)
            losses = self._losses[active]
            winning = torch.arange(len(active), device=active.device)
            for _ in range(2):
                if not len(winning):
                    break
                rows = active[winning]
                both = torch.cat([candidates[winning], self._incumbents[rows]])
                losses, incumbent_losses = self._ask(both, torch.cat([rows, rows]))[0].chunk(2)
                used[rows] += 2
                self._losses[rows] = incumbent_losses
                better = losses > incumbent_losses
                winning, losses = winning[better], losses[better]
            self._accept(active[winning], candidates[winning], losses)
            self._report(number)
            number += 1
        return self._incumbents

    def _paint_stripes(self, rows: Tensor) -> None:
        count, channels, _, width = self._incumbents.shape
        high = _either_end(count, channels, 1, width, generator=self._generator).to(rows.device)
        self._incumbents[rows] = torch.where(high, self._ends[1], self._ends[0])[rows]

    def _with_square(self, number: int, rows: Tensor) -> Tensor:
        """Return the incumbents of `rows` with square `number`, turned over where it would change nothing.

        Squares are drawn for all images, so that one's do not depend on which others are still searched.
        """
        count, channels, height, width = self._incumbents.shape
        side = side_of_square(number, self._share, height, width)
        inside = _inside(count, height, width, side, self._generator).to(rows.device)[rows]
        high = _either_end(count, channels, 1, 1, generator=self._generator).to(rows.device)[rows]
        incumbents, (low_end, high_end) = self._incumbents[rows], self._ends[:, rows]
        candidates = torch.where(inside, torch.where(high, high_end, low_end), incumbents)
        same = (candidates == incumbents).flatten(1).all(1)
        if bool(same.any()):
            other_end = torch.where(high[same], low_end[same], high_end[same])
            candidates[same] = torch.where(inside[same], other_end, incumbents[same])
        return candidates

    def _accept(self, rows: Tensor, candidates: Tensor, losses: Tensor) -> None:
        self._incumbents[rows] = candidates
        self._losses[rows] = losses

    def _report(self, number: int) -> None:
        if self._watch is not None:
            self._watch(number, self._incumbents.clone(), self._losses.clone())


class _Scorer:
    """Asks the model about some of the images, and checks its first answer."""

    def __init__(self, model: CheckedModel, loss: Loss, labels: Tensor, targets: Tensor | None, draws: int) -> None:
        self._model, self._loss, self._draws = model, loss, draws
        self._labels, self._targets = labels, targets
        self._checked = False

    @torch.no_grad()
    def __call__(self, candidates: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the draws and where the last draw reached the goal, both (row,)."""
        labels = self._labels[rows]
        targets = None if self._targets is None else self._targets[rows]
        total = torch.zeros(len(rows), device=candidates.device, dtype=torch.float64)
        broken = torch.zeros(len(rows), device=candidates.device, dtype=torch.bool)
        for _ in range(self._draws):
            logits = self._model(candidates)
            if not self._checked:
                check_logits(logits, labels, targets)
                self._checked = True
            losses = self._loss(logits, labels, targets)
            if not self._model.trusted:
                check_numbers(logits, losses)
            total = total + losses
            broken = succeeded(logits, labels, targets)
        return total / self._draws, broken


def side_of_square(number: int, share: float, height: int, width: int) -> int:
    """Return the side of square `number`, from 0, by the published schedule."""
    share = share / 2 ** sum(number > limit for limit in HALVED_AFTER)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _either_end(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Draw which end of its range a pixel takes: True for the upper."""
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.bool)


def _inside(count: int, height: int, width: int, side: int, generator: torch.Generator | None) -> Tensor:
    """Draw a square for each image: (count, 1, height, width), True inside."""
    top = torch.randint(0, height - side + 1, (count, 1), generator=generator)
    left = torch.randint(0, width - side + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
