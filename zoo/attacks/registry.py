"""The attacks by name, for the command line: one function and one dictionary line each (docs/adding-an-attack.md).

All take the same arguments, (model, images, labels, options). An attack ignores the options that it does not need.
Python code calls the attacks themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from zoo.attacks.apgd import apgd, apgd_targeted
from zoo.attacks.budget import Budget, linf_of
from zoo.attacks.gradient import InputDiversity, fgsm, pgd
from zoo.attacks.outputs import Model
from zoo.attacks.random_gates import eot_pgd
from zoo.attacks.rays import rays
from zoo.attacks.square import square
from zoo.errors import BadInput, UnknownName

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """What an attack may read when it is called by its name."""

    budget: Budget
    generator: torch.Generator
    loss: str | None = None
    """One of `LOSSES`; the attack's own (`Attack.loss`) if None."""
    targets: Tensor | None = None
    """The class to be reached, int64 (batch,), for a targeted attack."""
    queries: int = 1000
    """The most queries per image, of attacks on scores or labels."""
    draws: int = 1
    """Forwards of a random model that one step averages over."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack that the command line knows by name, and what it needs."""

    run: Callable[[Model, Tensor, Tensor, AttackOptions], Tensor]
    """(model, images, labels, options) -> adversarial images."""
    needs: Literal["gradients", "scores", "labels"] = "gradients"
    """What it needs of the model; attacks on scores or labels also run against a server."""
    summary: str
    targeted: bool = True
    """Can be asked for a class to be reached."""
    random: bool = False
    """Can average over the draws of a random model."""
    loss: str | None = CROSS_ENTROPY
    """The loss it maximises if no other is named; None if it has none and takes none."""

    def with_loss(self, options: AttackOptions, name: str) -> AttackOptions:
        """Return the options with the loss that the attack called `name` will maximise.

        Raises:
            BadInput: the options name a loss, and the attack maximises none.
        """
        if options.loss is not None and self.loss is None:
            raise BadInput(f"{name} sees no scores, so it has no loss to maximise, got {options.loss!r}; leave it out")
        return replace(options, loss=options.loss or self.loss)


def _fgsm(model: Model, images: Tensor, labels: Tensor, options: AttackOptions) -> Tensor:
    return fgsm(model, images, labels, options.budget, loss=options.loss or CROSS_ENTROPY, targets=options.targets)


def _pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    options: AttackOptions,
    momentum: float = 0.0,
    diversity: InputDiversity | None = None,
) -> Tensor:
    if options.draws > 1:
        if diversity is not None:
            raise BadInput("input diversity and several draws cannot be combined; use pgd or mi-fgsm with --draws")
        return eot_pgd(
            lambda: model,  # each call of a random model draws afresh
            images,
            labels,
            options.budget,
            draws=options.draws,
            loss=options.loss or CROSS_ENTROPY,
            targets=options.targets,
            momentum=momentum,
            generator=options.generator,
        )
    return pgd(
        model,
        images,
        labels,
        options.budget,
        loss=options.loss or CROSS_ENTROPY,
        targets=options.targets,
        momentum=momentum,
        diversity=diversity,
        generator=options.generator,
    )


def _apgd(model: Model, images: Tensor, labels: Tensor, options: AttackOptions) -> Tensor:
    budget = linf_of(options.budget, "apgd")
    return apgd(
        model,
        images,
        labels,
        budget,
        loss=options.loss or CROSS_ENTROPY,
        targets=options.targets,
        generator=options.generator,
    )


def _apgd_targeted(model: Model, images: Tensor, labels: Tensor, options: AttackOptions) -> Tensor:
    budget = linf_of(options.budget, "apgd-t")
    return apgd_targeted(model, images, labels, budget, loss=options.loss or "dlr", generator=options.generator)


def _square(model: Model, images: Tensor, labels: Tensor, options: AttackOptions) -> Tensor:
    return square(
        model,
        images,
        labels,
        linf_of(options.budget, "square"),
        queries=options.queries,
        loss=options.loss or "margin",
        targets=options.targets,
        draws=options.draws,
        early_stop=options.draws == 1,
        generator=options.generator,
    )


def _rays(model: Model, images: Tensor, labels: Tensor, options: AttackOptions) -> Tensor:
    budget = linf_of(options.budget, "rays")
    return rays(model, images, labels, budget, queries=options.queries, generator=options.generator)


ATTACKS: dict[str, Attack] = {
    "fgsm": Attack(run=_fgsm, summary="one step of length eps"),
    "pgd": Attack(
        run=_pgd, summary="projected gradient ascent with restarts; with --draws over random gates (EOT)", random=True
    ),
    "mi-fgsm": Attack(run=partial(_pgd, momentum=1.0), summary="PGD with momentum 1", random=True),
    "m-di2-fgsm": Attack(
        run=partial(_pgd, momentum=1.0, diversity=InputDiversity()),
        summary="momentum and input diversity, for transfer",
    ),
    "apgd": Attack(run=_apgd, summary="Auto-PGD, which sets its own steps"),
    "apgd-t": Attack(
        run=_apgd_targeted,
        summary="Auto-PGD, by default on DLR, towards nine classes in turn",
        targeted=False,
        loss="dlr",
    ),
    "square": Attack(
        run=_square, needs="scores", summary="random search by the scores alone", random=True, loss="margin"
    ),
    "rays": Attack(run=_rays, needs="labels", summary="search by the answered class alone", targeted=False, loss=None),
}


def attack_named(name: str) -> Attack:
    """Return the attack of a name.

    Raises:
        UnknownName: the message lists the known attacks.
    """
    if name not in ATTACKS:
        raise UnknownName(name, ATTACKS, kind="attack")
    return ATTACKS[name]
