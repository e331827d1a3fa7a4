"""The attacks by name, for the command line: one function and one dictionary line each (docs/adding-an-attack.md).

All take the same arguments, (model, images, labels, settings); what an attack does not need it does not read. Python
code calls the attacks themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.attacks.apgd import apgd, apgd_targeted
from zoo.attacks.budget import Budget, LinfBudget, check_budget
from zoo.attacks.gradient import InputDiversity, fgsm, pgd
from zoo.attacks.outputs import Model
from zoo.attacks.random_gates import eot_pgd
from zoo.attacks.rays import rays
from zoo.attacks.square import square
from zoo.errors import BadInput, UnknownName

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a named attack may read."""

    budget: Budget
    generator: torch.Generator
    loss: str | None = None
    """One of `LOSSES`; the attack's own (`Named.loss`) if None."""
    targets: Tensor | None = None
    """The class to be reached (batch,), for a targeted attack."""
    queries: int = 1000
    """Of black-box attacks, per image."""
    draws: int = 1
    """Forwards of a random model that one step averages over."""


Attack = Callable[[Model, Tensor, Tensor, Settings], Tensor]


@dataclass(frozen=True, kw_only=True)
class Named:
    """An attack and what it needs."""

    run: Attack
    needs: str = "gradients"
    """"gradients", "scores" or "labels"; the last two run against a server."""
    summary: str
    targeted: bool = True
    """Can be asked for a class to be reached."""
    random: bool = False
    """Can average over the draws of a random model."""
    loss: str | None = CROSS_ENTROPY
    """The loss it maximises if no other is named; None if it has none and takes none."""

    def settled(self, settings: Settings, name: str) -> Settings:
        """Return settings with the loss resolved.

        Raises:
            BadInput: a loss is named, and the attack called `name` maximises none.
        """
        if settings.loss is not None and self.loss is None:
            raise BadInput(f"{name} sees no scores, so it has no loss to maximise, got {settings.loss!r}; leave it out")
        return replace(settings, loss=settings.loss or self.loss)


def _fgsm(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    return fgsm(model, images, labels, settings.budget, loss=settings.loss or CROSS_ENTROPY, targets=settings.targets)


def _pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    momentum: float = 0.0,
    diversity: InputDiversity | None = None,
) -> Tensor:
    if settings.draws > 1:
        if diversity is not None:
            raise BadInput("input diversity and several draws cannot be combined; use pgd or mi-fgsm with --draws")
        return eot_pgd(
            lambda: model,  # each call of a random model draws afresh
            images,
            labels,
            settings.budget,
            draws=settings.draws,
            loss=settings.loss or CROSS_ENTROPY,
            targets=settings.targets,
            momentum=momentum,
            generator=settings.generator,
        )
    return pgd(
        model,
        images,
        labels,
        settings.budget,
        loss=settings.loss or CROSS_ENTROPY,
        targets=settings.targets,
        momentum=momentum,
        diversity=diversity,
        generator=settings.generator,
    )


def _momentum(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    return _pgd(model, images, labels, settings, momentum=1.0)


def _diverse(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    return _pgd(model, images, labels, settings, momentum=1.0, diversity=InputDiversity())


def _apgd(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    budget = linf_of(settings.budget, "apgd")
    return apgd(
        model,
        images,
        labels,
        budget,
        loss=settings.loss or CROSS_ENTROPY,
        targets=settings.targets,
        generator=settings.generator,
    )


def _apgd_targeted(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    budget = linf_of(settings.budget, "apgd-t")
    return apgd_targeted(model, images, labels, budget, loss=settings.loss or "dlr", generator=settings.generator)


def _square(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    return square(
        model,
        images,
        labels,
        linf_of(settings.budget, "square"),
        queries=settings.queries,
        loss=settings.loss or "margin",
        targets=settings.targets,
        draws=settings.draws,
        early_stop=settings.draws == 1,
        generator=settings.generator,
    )


def _rays(model: Model, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    budget = linf_of(settings.budget, "rays")
    return rays(model, images, labels, budget, queries=settings.queries, generator=settings.generator)


ATTACKS: dict[str, Named] = {
    "fgsm": Named(run=_fgsm, summary="one step of length eps"),
    "pgd": Named(
        run=_pgd, summary="projected gradient ascent with restarts; with --draws over random gates (EOT)", random=True
    ),
    "mi-fgsm": Named(run=_momentum, summary="PGD with momentum 1", random=True),
    "m-di2-fgsm": Named(run=_diverse, summary="momentum and input diversity, for transfer"),
    "apgd": Named(run=_apgd, summary="Auto-PGD, which sets its own steps"),
    "apgd-t": Named(
        run=_apgd_targeted,
        summary="Auto-PGD, by default on DLR, towards nine classes in turn",
        targeted=False,
        loss="dlr",
    ),
    "square": Named(
        run=_square, needs="scores", summary="random search by the scores alone", random=True, loss="margin"
    ),
    "rays": Named(run=_rays, needs="labels", summary="search by the answered class alone", targeted=False, loss=None),
}


def attack_named(name: str) -> Named:
    """Return the attack of a name.

    Raises:
        UnknownName: the message lists the known attacks.
    """
    if name not in ATTACKS:
        raise UnknownName(name, ATTACKS, kind="attack")
    return ATTACKS[name]


def linf_of(budget: Budget, name: str) -> LinfBudget:
    """Return the budget if it is an l_inf one.

    Raises:
        BadInput: it is not, and the attack knows no other.
    """
    check_budget(budget)
    if not isinstance(budget, LinfBudget):
        raise BadInput(f"{name} searches the l_inf ball, got a budget in {budget.norm}; use pgd for others")
    return replace(budget)
