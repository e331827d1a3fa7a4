"""RayS (Chen and Gu 2020, arXiv:2006.12792): an attack that sees nothing but the class a model answers.

It looks along a direction of signs for the radius at which the answer changes. It then flips the signs of smaller and
smaller blocks of pixels, and keeps a flip if the answer still changes within that radius. The attack estimates no
gradient, so it can check models whose gradients or scores cannot be trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from zoo.attacks.budget import Budget, check_generator, linf_of, number, whole
from zoo.attacks.images import check_batch, check_images
from zoo.attacks.losses import succeeded
from zoo.attacks.models import checked_model, first_logits
from zoo.attacks.outputs import Model, Output
from zoo.errors import BadInput

HOPELESS_AFTER: Final = 2
"""The level of blocks (quarters) after which a direction that never broke the image is given up."""


@dataclass(frozen=True, kw_only=True)
class Rays:
    """Where a search ended, image by image."""

    direction: Tensor
    """Signs +1 and -1, shaped like the images: the best direction."""
    radius: Tensor
    """(batch,): a radius along it at which the model answers wrongly; 0 if it did before the attack, infinite if no
    wrong answer was found. An upper bound on the image's distance to the decision boundary, in pixel units."""
    queries: Tensor
    """int64 (batch,): how often the model was asked about the image."""


def rays(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    queries: int = 2000,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Tensor:
    """Look for a wrong answer in the l_inf ball by the model's labels alone; see `shortest_rays` for the arguments.

    Args:
        budget: an `LinfBudget`, of which only `eps` is read. An image is done once its radius is within it.

    Returns:
        The image at the radius found, where that is within `budget.eps` (the model was asked about exactly these
        pixels, but for rounding at the border of the ball), else at `budget.eps` along the best direction; in [0, 1].

    Raises:
        BadInput: an `L2Budget`; see `shortest_rays` for the rest.
    """
    budget = linf_of(budget, "RayS")
    images = check_images(images)
    found = shortest_rays(model, images, labels, queries=queries, enough=budget.eps, generator=generator, output=output)
    length = found.radius.clamp_max(budget.eps)[:, None, None, None]
    return budget.project(images + length * found.direction, images)


def shortest_rays(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    queries: int = 2000,
    enough: float = 0.0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Rays:
    """Find the direction of signs along which the model's answer changes soonest, and the radius at which it does.

    Every call of the model asks one question about each image that is not done: "wrong at the present radius with this
    block flipped?", or after a yes the next one of the bisection between 0 and that radius. Blocks are the flattened
    image, its halves, its quarters and so on, at last single values, those again and again.

    Two things differ from the authors' code. A flip is kept as soon as the present radius suffices, even where the
    bisection, too coarse, finds none shorter. And where the first direction breaks the image at no radius, nor with any
    half or quarter flipped, another one is drawn: flips of smaller blocks would hardly do better.

    Args:
        model: images -> logits, of which only the largest is looked at; deterministic, because bisection believes every
            answer. A module must be in evaluation mode. Called without gradients.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        queries: the most questions about an image, the first of them about the image itself.
        enough: an image whose radius is within this is done.
        tolerance: where bisection ends, in pixel units; 1e-3 / sqrt(values in an image) if None, as published (there it
            is 1e-3 in Euclidean length). Much less than 1/255 is wasted on a model that sees 8 bits.
        generator: draws the first direction and those that replace it, on the CPU; each is the same for all images. If
            None the first is all +1, as published, others are drawn from a fixed seed, and nothing is random.
        output: where the logits are in what the model returns; see `outputs.Output`.

    Raises:
        BadInput: no query, a tolerance that is not positive; see `images.check_batch` and `outputs.check_logits`.
    """
    check_generator(generator)
    queries, enough = whole(queries, "queries"), number(enough, "enough")
    tolerance = None if tolerance is None else number(tolerance, "tolerance")
    if queries < 1:
        raise BadInput(f"need at least 1 query, got {queries}")
    if tolerance is not None and not tolerance > 0:
        raise BadInput(f"the tolerance must be a positive length in pixel units, got {tolerance}; 1e-5 is fine")
    checked = checked_model(model, output)
    images, labels, _ = check_batch(images, labels)
    count, size = len(images), math.prod(images.shape[1:])
    if tolerance is None:
        tolerance = 1e-3 / math.sqrt(max(size, 1))
    search = _Search(images, _Directions(size, generator))
    asked = torch.zeros(count, dtype=torch.int64, device=images.device)
    if not count:
        return Rays(direction=search.signs.reshape(images.shape), radius=search.radius, queries=asked)

    broken = succeeded(first_logits(checked, images, labels), labels)
    search.radius[broken] = 0
    asked += 1
    active = (search.radius > enough).nonzero()[:, 0]
    for _ in range(queries - 1):
        if not len(active):
            break
        attempt, length = search.question(active)
        pixels = (images[active] + length[:, None, None, None] * attempt.reshape(-1, *images.shape[1:])).clamp_(0, 1)
        with torch.no_grad():
            wrong = succeeded(checked(pixels), labels[active])
        asked[active] += 1
        search.answer(active, attempt, length, wrong, tolerance)
        active = active[search.radius[active] > enough]
    return Rays(direction=search.signs.reshape(images.shape), radius=search.radius, queries=asked)


class _Directions:
    """Directions to begin with, by their number; all images share them."""

    def __init__(self, size: int, generator: torch.Generator | None) -> None:
        self._size = size
        self._drawn = [torch.ones(size)] if generator is None else []
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator

    def __getitem__(self, number: int) -> Tensor:
        while len(self._drawn) <= number:
            self._drawn.append(2.0 * torch.randint(0, 2, (self._size,), generator=self._generator) - 1)
        return self._drawn[number]


class _Search:
    """The state of every image's search; images are at different places of it at the same time.

    Attributes:
        signs: (batch, size): the best direction.
        radius: (batch,): at which it is known to break the image; infinite if it is not.
    """

    def __init__(self, images: Tensor, directions: _Directions) -> None:
        count, device = len(images), images.device
        self._directions = directions
        self.signs = directions[0].to(images).expand(count, -1).clone()
        self.radius = torch.full((count,), math.inf, dtype=images.dtype, device=device)
        self._lower = torch.zeros_like(self.radius)
        """The lower end of the bisection, where there is one."""
        self._bisecting = torch.zeros(count, dtype=torch.bool, device=device)
        self._level = torch.full((count,), -1, device=device)
        """The blocks that are flipped are of size / 2^level; -1 is the direction itself."""
        self._block = torch.zeros(count, dtype=torch.int64, device=device)
        """Which of the blocks of this level."""
        self._direction = torch.zeros(count, dtype=torch.int64, device=device)
        """The number of the direction that the search began with."""

    def question(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the direction (row, size) and the length (row,) that each of these images is asked about next."""
        first, last = self._bounds(rows)
        positions = torch.arange(self.signs.shape[1], device=rows.device)
        flipped = (positions >= first[:, None]) & (positions < last[:, None]) & ~self._bisecting[rows][:, None]
        attempt = torch.where(flipped, -self.signs[rows], self.signs[rows])
        # beyond 1 every pixel is black or white
        radius = self.radius[rows].clamp_max(1)
        return attempt, torch.where(self._bisecting[rows], (self._lower[rows] + radius) / 2, radius)

    def answer(self, rows: Tensor, attempt: Tensor, length: Tensor, wrong: Tensor, tolerance: float) -> None:
        """Take in the model's answers to `question`."""
        bisecting = self._bisecting[rows]
        self.signs[rows] = torch.where((wrong & ~bisecting)[:, None], attempt, self.signs[rows])
        self.radius[rows] = torch.where(wrong, length, self.radius[rows])
        lower = torch.where(bisecting, torch.where(wrong, self._lower[rows], length), 0)
        self._lower[rows] = lower
        goes_on = (bisecting | wrong) & (self.radius[rows] - lower > tolerance)
        self._bisecting[rows] = goes_on
        self._next_block(rows[~goes_on])

    def _next_block(self, rows: Tensor) -> None:
        _, last = self._bounds(rows)
        level = self._level[rows]
        finished = (last >= self.signs.shape[1]) | (level < 0)
        self._block[rows] = torch.where(finished, 0, self._block[rows] + 1)
        finest = (self.signs.shape[1] - 1).bit_length()
        self._level[rows] = (level + finished).clamp_max(finest)
        hopeless = rows[finished & (level >= min(HOPELESS_AFTER, finest)) & self.radius[rows].isinf()]
        self._level[hopeless] = -1
        self._direction[hopeless] += 1
        for row in hopeless.tolist():
            self.signs[row] = self._directions[int(self._direction[row])].to(self.signs)

    def _bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first position of each image's block and the one after its last; an empty block at level -1."""
        size = self.signs.shape[1]
        blocks = 2 ** self._level[rows].clamp_min(0)
        length = (size + blocks - 1) // blocks
        first = self._block[rows] * length
        last = (first + length).clamp_max(size)
        return first, torch.where(self._level[rows] < 0, first, last)
