from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from zoo.attacks import LinfBudget, pgd, to_grid


@pytest.fixture
def clean() -> Tensor:
    """Every level there is, black and white included."""
    return torch.arange(256).repeat(3).view(1, 3, 16, 16) / 255


def levels(images: Tensor) -> Tensor:
    return (images.double() * 255).round().long()


@pytest.mark.parametrize("eps", [0.0, 0.001, 0.01, 0.03, 0.1, 1 / 255, 8 / 255, 16 / 255, 0.5, 1.0])
def test_pixels_stay_on_the_grid_and_in_the_ball(eps: float, clean: Tensor) -> None:
    wild = clean + eps * (2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) - 1).sign()
    snapped = to_grid(wild.clamp(0, 1), clean, eps)
    torch.testing.assert_close(snapped, levels(snapped).float() / 255, atol=1e-7, rtol=0)
    assert 0 <= float(snapped.min()) <= float(snapped.max()) <= 1
    steps = (levels(snapped) - levels(clean)).abs()
    most = math.floor(255 * Fraction(str(eps)).limit_denominator(10_000))
    assert int(steps.max()) == min(most, 255)
    assert int(steps.max()) <= 255 * eps + 1e-6


@pytest.mark.parametrize(("eps", "steps"), [(0.1, 25), (0.03, 7), (0.01, 2), (1 / 255, 1), (8 / 255, 8), (0.001, 0)])
def test_a_radius_between_two_levels_is_rounded_down(eps: float, steps: int) -> None:
    grey = torch.full((1, 1, 2, 2), 100 / 255)
    assert levels(to_grid(grey + eps, grey, eps)).unique().tolist() == [100 + steps]
    assert levels(to_grid(grey - eps, grey, eps)).unique().tolist() == [100 - steps]


@pytest.mark.parametrize("k", range(0, 256, 5))
def test_a_whole_number_of_levels_survives_floating_point(k: int) -> None:
    black, eps = torch.zeros(1, 1, 1, 1), float(Fraction(k, 255))
    assert levels(to_grid(black + eps, black, eps)).item() == k


def test_pixels_that_were_not_moved_stay_what_they_were(clean: Tensor) -> None:
    assert torch.equal(to_grid(clean, clean, 0.1), clean)


def test_a_pixel_leaves_neither_black_nor_white(clean: Tensor) -> None:
    assert levels(to_grid(clean + 0.5, clean, 0.5)).max() == 255
    assert levels(to_grid(clean - 0.5, clean, 0.5)).min() == 0


def test_what_pgd_returns_survives_as_a_picture(clean: Tensor) -> None:
    """A linear model's adversarial image sits on the corner of the ball; rounded, it keeps its direction."""
    adversarial = pgd(lambda images: images.flatten(1)[:, :2], clean, torch.tensor([0]), LinfBudget(eps=0.1, steps=10))
    snapped = to_grid(adversarial, clean, 0.1)
    assert levels(snapped).flatten()[:2].tolist() == [0, 26]  # from 0 and 1: down, held at black, and up by 25
