"""The attacks on random gates that the protocol random-gates runs, in the order of methods that average ever more."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.apgd import apgd_eot
from zoo.attacks.autoattack import CLASSES_NEEDED, autoattack
from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import fgsm, pgd
from zoo.attacks.random_gates import Sampler, arc, eot_pgd, path_model, relaxed_model
from zoo.attacks.square import square
from zoo.evaluation.run import Run
from zoo.gates.rgn import RandomGatedNetwork

FIXED_PATHS = 3
ARC_PATHS = 8
SQUARE_QUERIES, SQUARE_DRAWS = 200, 10

ONE_STEP = "FGSM on the relaxed gates"
EOT = {draws: f"EOT-{draws}" for draws in (5, 20, 50)}
"""The attacks that average over ever more draws, by their number."""
AUTOATTACK = "AutoAttack on a fixed path"


@dataclass(frozen=True)
class Attempt:
    """What an attack on random gates may use: the network, samplers of fresh paths and a generator of its own."""

    rgn: RandomGatedNetwork
    weights: Sampler
    """Of the float32 weights along fresh paths."""
    deployed: Sampler
    """Of what is deployed along the same paths: the weights, or an int8 graph, which has no gradients of its own."""
    generator: torch.Generator
    images: Tensor
    labels: Tensor
    budget: LinfBudget

    def with_steps(self, steps: int) -> LinfBudget:
        """Return the budget of an attack that has a number of steps of its own."""
        return LinfBudget(eps=self.budget.eps, steps=steps)


GateAttack = Callable[[Attempt], Tensor]


def _one_step(on: Attempt) -> Tensor:
    return fgsm(relaxed_model(on.rgn), on.images, on.labels, on.budget)


def _relaxed(on: Attempt) -> Tensor:
    return pgd(relaxed_model(on.rgn), on.images, on.labels, on.budget, generator=on.generator)


def _fixed(on: Attempt, *, path: paths.Path) -> Tensor:
    return pgd(path_model(on.rgn, path), on.images, on.labels, on.budget, generator=on.generator)


def _expected(on: Attempt, **options: Any) -> Tensor:
    return eot_pgd(on.weights, on.images, on.labels, on.budget, generator=on.generator, **options)


def _auto_pgd(on: Attempt, *, loss: str) -> Tensor:
    budget = on.with_steps(50)
    return apgd_eot(on.weights, on.images, on.labels, budget, draws=20, loss=loss, generator=on.generator)


def _members(on: Attempt) -> Tensor:
    models = [on.weights() for _ in range(ARC_PATHS)]
    return arc(models, on.images, on.labels, on.with_steps(10), generator=on.generator)


def _square(on: Attempt) -> Tensor:
    return square(
        lambda pixels: on.deployed()(pixels),
        on.images,
        on.labels,
        on.budget,
        queries=SQUARE_QUERIES,
        draws=SQUARE_DRAWS,
        early_stop=False,
        generator=on.generator,
    )


def _standard(on: Attempt, *, path: paths.Path) -> Tensor:
    seed = on.generator.initial_seed() % 2**31
    found = autoattack(path_model(on.rgn, path), on.images, on.labels, on.budget, seed=seed)
    return found.adversarial


def attacks_on(run: Run) -> dict[str, GateAttack]:
    """Return the attacks by name, in the order of methods that average ever more."""
    rng, classes = run.rng("fixed paths", 0), len(run.bundle.card.classes)
    fixed = [paths.sample(run.rgn.num_gates, run.rgn.candidates, rng) for _ in range(FIXED_PATHS)]
    found: dict[str, GateAttack] = {ONE_STEP: _one_step}
    for number, path in enumerate(fixed):
        found[f"PGD on fixed path {number + 1}"] = partial(_fixed, path=path)
    found["PGD, fresh gates per step"] = partial(_expected, draws=1)
    for draws, name in EOT.items():
        found[name] = partial(_expected, draws=draws)
    found["EOT-5, loss of the mean probability"] = partial(_expected, draws=5, average="probability")
    found["EOT-20, margin, momentum"] = partial(_expected, draws=20, loss="margin", momentum=0.75)
    found["PGD on the relaxed gates"] = _relaxed
    found[f"ARC on {ARC_PATHS} paths"] = _members
    found["APGD-CE, EOT-20"] = partial(_auto_pgd, loss="cross_entropy")
    if classes >= 3:
        found["APGD-DLR, EOT-20"] = partial(_auto_pgd, loss="dlr")
    found[f"Square, {SQUARE_QUERIES} queries of {SQUARE_DRAWS} draws"] = _square
    if importlib.util.find_spec("pyautoattack") is not None and classes >= CLASSES_NEEDED["standard"]:
        found[AUTOATTACK] = partial(_standard, path=fixed[0])
    return found
