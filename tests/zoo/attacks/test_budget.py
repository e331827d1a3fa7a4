from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.attacks import L2Budget, LinfBudget, fgsm, pgd
from zoo.attacks.budget import Budget
from zoo.errors import BadInput

Inside = Callable[[Tensor, Tensor, Budget], None]
PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-4, 0.01, 2 / 255, 8 / 255, 0.3, 1.0])
def test_every_half_precision_pixel_stays_in_its_ball(dtype: torch.dtype, eps: float, assert_inside: Inside) -> None:
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[(every >= 0) & (every <= 1)].reshape(1, 1, 1, -1)
    for far in (torch.zeros_like(every), torch.ones_like(every), every + eps, every - eps):
        assert_inside(LinfBudget(eps=eps).project(far, every), every, LinfBudget(eps=eps))


@settings(max_examples=300, deadline=None)
@given(
    pixel=st.floats(0, 1, width=32),
    eps=st.floats(0, 1),
    dtype=st.sampled_from(PRECISIONS),
    end=st.sampled_from([-1.0, 1.0]),
)
def test_any_pixel_stays_in_any_ball(
    pixel: float, eps: float, dtype: torch.dtype, end: float, assert_inside: Inside
) -> None:
    images = torch.full((1, 1, 1, 1), pixel, dtype=dtype)
    budget = LinfBudget(eps=eps)
    found = budget.project(images + end * eps, images)
    assert_inside(found, images, budget)
    # and no further in than one number of the type and the rounding of eps
    reach = min(eps, 1 - float(images) if end > 0 else float(images))
    assert abs(float(found) - float(images)) >= reach - 2 * torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(1e-3, 3),
    dtype=st.sampled_from(PRECISIONS),
    side=st.sampled_from([1, 8, 64]),
    even=st.booleans(),
)
def test_any_image_stays_in_any_euclidean_ball(
    seed: int, eps: float, dtype: torch.dtype, side: int, even: bool, assert_inside: Inside
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, side, side, generator=generator).to(dtype)
    if even:  # where rounding does the same to every pixel
        images = images[:, :1, :1, :1].expand(images.shape).contiguous()
    budget = L2Budget(eps=eps)
    far = torch.full_like(images, eps) if even else torch.randn(images.shape, generator=generator).to(dtype)
    assert_inside(budget.project(images + far, images), images, budget)
    assert_inside(budget.start(images, generator), images, budget)


@pytest.mark.parametrize(
    "eps", [Fraction(8, 255), "8/255", np.float64(8 / 255), torch.tensor(8 / 255, dtype=torch.float64)]
)
def test_a_radius_may_be_written_as_people_write_it(eps: Any) -> None:
    assert LinfBudget(eps=eps, step_size=eps) == LinfBudget(eps=8 / 255, step_size=8 / 255)
    assert type(LinfBudget(eps=eps).eps) is float or isinstance(eps, np.floating)


@pytest.mark.parametrize(
    "options", [{"eps": "8%"}, {"eps": None}, {"eps": [0.1]}, {"eps": "1/0"}, {"steps": 2.5}, {"restarts": "3"}]
)
def test_a_budget_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    for budget in (LinfBudget, L2Budget):
        with pytest.raises(BadInput):
            budget(**options)
