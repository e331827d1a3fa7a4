"""One adversarial image for one model."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from serving.demo.pictures import Levels, batch_of, levels_in_the_ball
from serving.demo.shelf import Contestant
from zoo.attacks import LinfBudget, fgsm, pgd
from zoo.errors import BadInput, UnknownName, check_count

Method = Literal["PGD", "FGSM"]

SELECTION_DRAWS = 16
"""Fresh paths on which the attacker compares attempts. The vote is on others, which the attacker never saw."""

MAX_STEPS = 50
MAX_RESTARTS = 5
MAX_SEED = 2**31 - 1


def check_choice(what: str, value: object, known: Collection[str] = ()) -> None:
    """Refuse what was not chosen, or is not among `known` where that is given.

    Raises:
        BadInput: nothing was chosen.
        UnknownName: it is not among `known`.
    """
    if not value:
        raise BadInput(f"no {what} is chosen; choose one")
    if known and value not in known:
        raise UnknownName(str(value), known, kind=what)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the attacker does: FGSM is one step of length eps; PGD takes steps of eps / 5 from random starts.

    Raises:
        BadInput: a number is not whole or out of range.
        UnknownName: the method is neither.
    """

    method: Method = "PGD"
    eps_levels: int = 2
    """Radius of the ball in levels of 1/255, 0 to 255; whole because an 8-bit file holds whole levels."""
    steps: int = 20
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("attack", self.method, get_args(Method))
        check_count("eps_levels", self.eps_levels, 0, 255)
        check_count("steps", self.steps, 1, MAX_STEPS)
        check_count("restarts", self.restarts, 1, MAX_RESTARTS)
        check_count("seed", self.seed, 0, MAX_SEED)

    @property
    def iterated(self) -> bool:
        """Whether steps and restarts count."""
        return self.method == "PGD"


@dataclass(frozen=True, kw_only=True)
class Crafted:
    """An adversarial image and what it cost."""

    levels: Levels
    gradients: int
    """Networks that were differentiated, over all steps, paths, members and attempts."""
    attempts: int
    seconds: float
    trace: list[list[float]] = field(default_factory=list)
    """For each attempt of PGD the probability of the attacked label before each step, as the attacker saw it."""


def craft(contestant: Contestant, clean: Levels, label: int, attack: Attack) -> Crafted:
    """Attack one image of one model; the result is on the 8-bit grid and within `attack.eps_levels` of `clean`.

    Every attempt is first rounded to 8 bits and then judged. The first that changes the answer is returned, else the
    one that leaves the label the lowest probability. For random gates the judge is the mean over `SELECTION_DRAWS`
    fresh paths, never one lucky draw.
    """
    started = time.perf_counter()
    rng = random.Random(f"{attack.seed} attack")  # noqa: S311 -- repeatable on purpose
    generator = torch.Generator().manual_seed(attack.seed)
    images, labels = batch_of(clean), torch.tensor([label])
    model = contestant.differentiable(rng)
    budget = LinfBudget(eps=attack.eps_levels / 255, steps=attack.steps)
    trace: list[list[float]] = []
    best, lowest = clean, float("inf")

    for _ in range(attack.restarts if attack.iterated else 1):
        seen: list[float] = []

        def watch(step: int, iterate: Tensor, logits: Tensor, seen: list[float] = seen) -> None:
            seen.append(float(logits.softmax(1)[0, label]))

        if attack.iterated:
            adversarial = pgd(model, images, labels, budget, generator=generator, watch=watch)
        else:
            adversarial = fgsm(model, images, labels, budget)
        levels = levels_in_the_ball(adversarial, clean, attack.eps_levels)
        answer = contestant.probabilities(batch_of(levels), rng, SELECTION_DRAWS).mean(0)[0]
        trace.append(seen)
        broken = int(answer.argmax()) != label
        if broken or float(answer[label]) < lowest:
            best, lowest = levels, float(answer[label])
        if broken:
            break

    steps = sum(map(len, trace)) if attack.iterated else 1
    return Crafted(
        levels=best,
        gradients=steps * contestant.passes,
        attempts=len(trace),
        seconds=time.perf_counter() - started,
        trace=trace if attack.iterated else [],
    )
