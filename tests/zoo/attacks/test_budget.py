from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.attacks import L2Budget, LinfBudget, fgsm, pgd
from zoo.attacks.budget import Budget
from zoo.errors import BadInput

BUDGETS = [LinfBudget(eps=0.1), L2Budget(eps=0.7)]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget", BUDGETS, ids=["linf", "l2"])
def test_a_projection_is_in_the_ball_and_in_range_and_moves_nothing_that_was(budget: Budget, images: Tensor) -> None:
    far = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    once = budget.project(far, images)
    assert float(budget.distance(once, images).max()) <= budget.eps + 1e-6
    assert 0 <= float(once.min()) <= float(once.max()) <= 1
    torch.testing.assert_close(budget.project(once, images), once)
    assert torch.equal(budget.project(images, images), images)


@pytest.mark.parametrize("budget", BUDGETS, ids=["linf", "l2"])
def test_starts_fill_the_ball(budget: Budget) -> None:
    """In 12 dimensions nearly all of the volume is near the surface of the Euclidean ball: radius ~ eps * u^(1/12)."""
    images = torch.full((4000, 3, 2, 2), 0.5)
    starts = budget.start(images, torch.Generator().manual_seed(0))
    distance = budget.distance(starts, images) / budget.eps
    assert float(distance.max()) <= 1 + 1e-5
    assert float(distance.mean()) == pytest.approx(12 / 13, abs=0.01)  # for both: the mean of the 12th root of u
    assert float((starts - images).mean()) == pytest.approx(0, abs=0.01)


def test_a_direction_has_unit_norm_however_small_the_gradient() -> None:
    gradient = torch.randn(4, 3, 5, 5) * torch.tensor([1e-30, 1e-10, 1.0, 1e10]).reshape(4, 1, 1, 1)
    length = L2Budget().direction(gradient).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(4))
    assert float(L2Budget().direction(torch.zeros(1, 3, 5, 5)).abs().max()) == 0
    assert bool((LinfBudget().direction(gradient).abs() == 1).all())


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_in_the_euclidean_ball_a_linear_model_gives_way_exactly_at_its_distance(attack: object) -> None:
    weight = torch.randn(3 * 16, generator=torch.Generator().manual_seed(2))
    images = torch.full((1, 3, 4, 4), 0.5)
    distance = 0.3

    def model(pixels: Tensor) -> Tensor:
        score = pixels.flatten(1) @ weight - images.flatten() @ weight - distance * weight.norm()
        return torch.stack([torch.zeros_like(score), score], 1)

    for share, broken in ((0.99, False), (1.01, True)):
        found = attack(model, images, torch.tensor([0]), L2Budget(eps=share * distance, steps=20))  # type: ignore[operator]
        assert bool(model(found).argmax() == 1) == broken


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eps": -1}, "finite eps >= 0, got -1"), ({"eps": math.inf}, "finite eps"), ({"step_size": 0}, "step_size > 0")],
)
def test_a_euclidean_budget_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        L2Budget(**options)  # type: ignore[arg-type]
