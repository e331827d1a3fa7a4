"""Attacks on networks with several exits, as Triple Wins and NEO-KD use them (Hu et al. 2020, arXiv:2002.10025).

A multi-exit network returns the logits of all its exits, first exit first. The single attack maximises the loss of one
exit, the average attack the mean loss of all; the max-average attack makes the single attack on every exit and keeps,
for each image, the one with the largest loss summed over all exits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from zoo.attacks.budget import Budget, check_budget
from zoo.attacks.gradient import pgd
from zoo.attacks.images import check_batch
from zoo.attacks.losses import Loss, cross_entropy, loss_named
from zoo.attacks.outputs import Model, explained_errors
from zoo.attacks.training_mode import Unchecked, check_mode, unchecked
from zoo.errors import BadInput

MultiExit = Callable[[Tensor], Any]
"""images -> the logits of every exit: a sequence of (batch, class), or (exit, batch, class)."""


def exits_of(model: MultiExit, images: Tensor) -> list[Tensor]:
    """Return the logits of every exit, each (batch, class).

    Raises:
        BadInput: the model returns one tensor of logits, so it has a single exit, or no logits at all.
    """
    with nullcontext() if isinstance(model, Unchecked) else explained_errors(images):
        outputs = model(images.clone())  # it may change them in place
    if isinstance(outputs, Tensor) and outputs.dim() != 3:
        raise BadInput(
            f"the model returns logits of shape {tuple(outputs.shape)}, so it has one exit; expected the logits of "
            "several, (exit, batch, class) or a list"
        )
    if not isinstance(outputs, Tensor | list | tuple) or not len(outputs):
        raise BadInput(
            f"the model returns a {type(outputs).__name__}, expected the logits of every exit, (exit, batch, class) or "
            "a list; give a function that picks them"
        )
    return list(outputs)


def single_exit(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    exit_index: int,
    *,
    loss: str | Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD on the loss of one exit; see `pgd`.

    Raises:
        BadInput: no such exit.
    """

    def one(pixels: Tensor) -> Tensor:
        outputs = exits_of(model, pixels)
        if not 0 <= exit_index < len(outputs):
            raise BadInput(f"exit {exit_index} is out of range, expected 0 to {len(outputs) - 1}")
        return outputs[exit_index]

    return pgd(_answering(model, one), images, labels, budget, loss=loss, generator=generator)


def average_exits(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    loss: str | Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD on the mean loss of all exits; an image counts as broken when the last exit is wrong."""
    chosen = loss_named(loss)
    outputs_of_exits: list[Tensor] = []

    def last(pixels: Tensor) -> Tensor:
        outputs_of_exits[:] = exits_of(model, pixels)
        return outputs_of_exits[-1]

    def mean_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        return torch.stack([chosen(outputs, labels, targets) for outputs in outputs_of_exits]).mean(0)

    return pgd(_answering(model, last), images, labels, budget, loss=mean_loss, generator=generator)


def max_average_exits(
    model: MultiExit,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    loss: str | Loss = "cross_entropy",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return, per image, the single-exit attack that does most harm to all exits together, in cross-entropy."""
    check_budget(budget)
    check_mode(model)
    images, labels, _ = check_batch(images, labels)
    best = images.clone()
    if not len(images):
        return best
    with torch.no_grad():
        number = len(exits_of(model, images))
    most = torch.full((len(images),), -torch.inf, device=images.device)
    for index in range(number):
        adversarial = single_exit(model, images, labels, budget, index, loss=loss, generator=generator)
        with torch.no_grad():
            harm = torch.stack([cross_entropy(outputs, labels) for outputs in exits_of(model, adversarial)]).sum(0)
        worse = harm > most
        best = torch.where(worse[:, None, None, None], adversarial, best)
        most = torch.where(worse, harm.to(most.dtype), most)
    return best


def _answering(model: MultiExit, answer: Model) -> Model:
    """Return a function of the model, to be taken as it is if the model is."""
    return unchecked(answer) if isinstance(model, Unchecked) else answer
