"""What holds of every attack: an attack in the table of conftest.py is tested here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks import (
    L2Budget,
    LinfBudget,
)
from zoo.attacks.budget import Budget
from zoo.errors import BadInput

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]
Inside = Callable[[Tensor, Tensor, Budget], None]
PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WITH_LOSS = [
    "fgsm", "pgd", "pgd, momentum", "m-di2", "apgd", "apgd-t", "square", "eot", "eot, probability", "apgd-eot"
]  # fmt: skip
"""Attacks that take a loss."""


def linear_of(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a linear model, images and what it answers to them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)).to(dtype)
    images = torch.rand(16, 3, 8, 8).to(dtype)
    images[:2], images[2:4] = 0, 1  # at the end of the range already
    return model, images, model(images).argmax(1)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_attack_ends_in_the_ball_in_every_precision(
    attack: Attack, dtype: torch.dtype, assert_inside: Inside
) -> None:
    model, images, labels = linear_of(dtype)
    for eps in (EPS, 0.3):
        budget = LinfBudget(eps=eps, steps=4)
        assert_inside(attack(model, images, labels, budget), images, budget)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd, momentum", "m-di2", "eot"], indirect=True)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_gradient_attacks_end_in_the_euclidean_ball_in_every_precision(
    attack: Attack, dtype: torch.dtype, assert_inside: Inside
) -> None:
    model, images, labels = linear_of(dtype)
    euclidean = L2Budget(eps=0.5, steps=4)
    assert_inside(attack(model, images, labels, euclidean), images, euclidean)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "pgd, momentum", "eot"], indirect=True)
def test_a_gradient_of_zero_makes_no_nan(attack: Attack, dtype: torch.dtype, assert_inside: Inside) -> None:
    def flat(pixels: Tensor) -> Tensor:
        score = 0 * pixels.flatten(1).sum(1)
        return torch.stack([score, score + 1, score - 2], 1)

    images = torch.rand(4, 3, 6, 6).to(dtype)
    labels = torch.ones(4, dtype=torch.int64)
    for budget in (LINF, L2Budget(steps=3)):
        assert_inside(attack(flat, images, labels, budget), images, budget)


def test_lists_of_labels_numpy_and_no_images_are_taken(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def run(pixels: Any, classes: Any) -> Tensor:
        torch.manual_seed(5)
        return every_attack(model, pixels, classes, LINF)

    expected = run(images, labels)
    assert torch.equal(run(images, labels.tolist()), expected)
    assert torch.equal(run(images.numpy(), labels.numpy().astype(np.int32)), expected)
    assert run(images[:0], labels[:0]).shape == (0, 3, 8, 8)
    assert run(images[:0], []).shape == (0, 3, 8, 8)


def test_float64_images_are_attacked_in_float64_or_refused(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    assert attack(copy.deepcopy(model).double(), images.double(), labels, LINF).dtype == torch.float64
    with pytest.raises(BadInput, match="float64"):
        attack(model, images.double(), labels, LINF)


def test_inference_mode_is_refused_inside_and_taken_outside(
    gradient_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with torch.inference_mode():
        made, right = images.clone(), labels.clone()
        with pytest.raises(BadInput, match="inference_mode"):
            gradient_attack(model, images, labels, LINF)
    assert gradient_attack(model, made, right, LINF).shape == images.shape


def test_every_attack_refuses_a_bare_number_as_a_budget(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="LinfBudget"):
        every_attack(model, images, labels, EPS)


def test_a_budget_of_nothing_returns_the_images(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    for random_start in (False, True):
        budget = LinfBudget(eps=0, steps=2, restarts=2, random_start=random_start)
        assert torch.equal(attack(model, images, labels, budget), images)


def test_model_and_images_are_left_as_they_were(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    first, *others = model.parameters()
    first.grad = marker = torch.ones_like(first)
    others[-1].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = images.clone().requires_grad_(True)
    found = every_attack(model, given, labels, LINF)
    assert not found.requires_grad
    assert given.grad is None
    assert torch.equal(given, images)
    assert first.grad is marker
    assert torch.equal(marker, torch.ones_like(marker))
    assert all(parameter.grad is None for parameter in others)
    assert [parameter.requires_grad for parameter in (first, *others)] == [True] * len(others) + [False]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_an_attack_works_where_gradients_are_switched_off(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    torch.manual_seed(5)
    expected = attack(model, images, labels, LINF)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(attack(model, images, labels, LINF), expected)


def test_pixels_outside_the_range_are_refused(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="255"):
        every_attack(model, images * 255, labels, LINF)


def test_a_label_that_is_no_class_and_probabilities_are_refused(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="label 11"):
        attack(model, images, torch.full_like(labels, 11), LINF)
    with pytest.raises(BadInput, match="probabilities"):
        attack(lambda pixels: model(pixels).softmax(1), images, labels, LINF)


@pytest.mark.parametrize(
    "attack", [name for name in [*WITH_LOSS, "rays", "arc"] if name != "eot, probability"], indirect=True
)
def test_logits_of_probability_0_are_no_nan(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    def masked(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels)
        return logits.index_fill(1, torch.tensor([(int(labels[0]) + 1) % 5]), -torch.inf)

    chosen = labels == labels[0]
    found = attack(masked, images[chosen], labels[chosen], LINF)
    assert bool(found.isfinite().all())


def test_every_attack_refuses_what_is_no_tensor_of_logits(
    every_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput):
        every_attack(lambda pixels: {"logits": model(pixels)}, images, labels, LINF)


def test_every_attack_says_what_a_model_raises(every_attack: Attack, images: Tensor, labels: Tensor) -> None:
    def failing(pixels: Tensor) -> Tensor:
        raise ZeroDivisionError("no")

    with pytest.raises(BadInput, match="ZeroDivisionError"):
        every_attack(failing, images, labels, LINF)


@pytest.mark.parametrize("attack", WITH_LOSS, indirect=True)
def test_every_attack_refuses_a_loss_that_is_a_mean(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="loss"):
        attack(model, images, labels, LINF, loss=F.cross_entropy)


@pytest.mark.parametrize("attack", [*WITH_LOSS[1:], "rays", "arc"], indirect=True)
def test_a_seed_is_no_generator(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="generator"):
        attack(model, images, labels, LINF, generator=3)
