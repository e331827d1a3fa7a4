"""Images, labels and options as people write them are taken, or refused; every attack stays in its ball."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo.attacks import (
    InputDiversity,
    LinfBudget,
    apgd_eot,
    apgd_targeted,
    arc,
    eot_pgd,
    pgd,
    rays,
    square,
)
from zoo.attacks.budget import Budget
from zoo.attacks.distillation import distil
from zoo.errors import BadInput, UnknownName

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]
Inside = Callable[[Tensor, Tensor, Budget], None]


PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("pixels", "classes"),
    [
        (torch.rand(2, 3, 8, 8), [0.5, 1.0]),
        (torch.rand(2, 3, 8, 8), ["cat", "dog"]),
        (torch.rand(2, 3, 8, 8), [[0], 1]),
        (torch.rand(2, 3, 8, 8), [0, 1, 2]),
        (torch.rand(2, 3, 8, 8), None),
        ([[0.5]], [0]),
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 1]),
        (torch.rand(2, 3, 0, 8), [0, 1]),
        (torch.full((2, 3, 8, 8), torch.nan), [0, 1]),
    ],
)
def test_other_images_and_labels_are_refused_in_a_sentence(pixels: Any, classes: Any, model: nn.Module) -> None:
    with pytest.raises(BadInput):
        pgd(model, pixels, classes, LINF)


@pytest.mark.parametrize("budget", [8 / 255, "8/255", Fraction(8, 255), None, {"eps": 0.1}, LinfBudget])
def test_a_bare_number_is_no_budget(budget: Any, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="LinfBudget"):
        pgd(model, images, labels, budget)


@pytest.mark.parametrize("number", [2.5, "many", None, torch.tensor(1.5)])
def test_counts_are_whole_numbers(number: Any, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    given = (images, labels, LINF)
    asked: list[Callable[[], object]] = [
        lambda: square(model, *given, queries=number),
        lambda: square(model, *given, queries=9, draws=number),
        lambda: rays(model, *given, queries=number),
        lambda: apgd_targeted(model, *given, num_targets=number),
        lambda: apgd_eot(lambda: model, *given, draws=number),
        lambda: eot_pgd(lambda: model, *given, draws=number),
    ]
    for attack in asked:
        with pytest.raises(BadInput, match="whole number"):
            attack()


@pytest.mark.parametrize("momentum", [torch.nan, torch.inf, -torch.inf, -0.5, "fast", None])
def test_a_momentum_is_finite_and_not_negative(momentum: Any, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="momentum"):
        pgd(model, images, labels, LINF, momentum=momentum)
    with pytest.raises(BadInput, match="momentum"):
        eot_pgd(lambda: model, images, labels, LINF, draws=2, momentum=momentum)
    with pytest.raises(BadInput, match="momentum"):
        distil(model, images, images, LINF, momentum=momentum)


@pytest.mark.parametrize("weights", [[torch.nan, 1], [1, torch.inf], [1, 0], [1, -1], [1e308, 1e308], ["a", 1]])
def test_weights_of_members_are_positive_and_finite(
    weights: list[Any], model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="weight"):
        arc([model, model], images, labels, LINF, weights=weights)


def test_keep_is_one_of_the_known_words_and_not_for_input_diversity(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UnknownName, match="first broken"):
        pgd(model, images, labels, LINF, keep="first_broken")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="diversity"):
        pgd(model, images, labels, LINF, keep="first broken", diversity=InputDiversity())
