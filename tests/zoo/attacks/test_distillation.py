from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attacks import L2Budget, LinfBudget
from zoo.attacks.distillation import distil
from zoo.errors import BadInput


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 3, 6, 6, generator=generator(0)), torch.rand(4, 3, 6, 6, generator=generator(1))


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_linear_feature_is_imitated_as_far_as_the_ball_allows(pair: tuple[Tensor, Tensor], momentum: float) -> None:
    """The feature is the image, so the nearest image in the ball to the target is the target clamped to it."""
    source, target = pair
    budget = LinfBudget(eps=0.1, steps=200, step_size=0.001, random_start=False)
    found = distil(lambda images: images, source, target, budget, momentum=momentum)
    nearest = torch.minimum(torch.maximum(target, source - 0.1), source + 0.1)
    # momentum overshoots a target that lies inside the ball; where it lies outside, both end on the boundary
    outside = (target - source).abs() > 0.1
    torch.testing.assert_close(found[outside], nearest[outside], atol=1e-6, rtol=0)
    if not momentum:
        torch.testing.assert_close(found, nearest, atol=0.0011, rtol=0)


def test_the_distance_falls_and_the_ball_is_kept(pair: tuple[Tensor, Tensor]) -> None:
    source, target = pair
    weight = torch.randn(8, 108, generator=generator(2))

    def feature(images: Tensor) -> Tensor:
        return torch.relu(images.flatten(1) @ weight.T)

    def distance(images: Tensor) -> Tensor:
        return (feature(images) - feature(target)).square().sum(1)

    for budget in (LinfBudget(eps=0.05), L2Budget(eps=0.5)):
        found = distil(feature, source, target, budget, generator=generator(3))
        assert bool((distance(found) < distance(source)).all())
        assert float(budget.distance(found, source).max()) <= budget.eps + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_a_feature_that_moves_is_asked_for_again_at_every_step(pair: tuple[Tensor, Tensor]) -> None:
    source, target = pair
    asked: list[bool] = []

    def feature(images: Tensor) -> Tensor:
        asked.append(images is target or torch.equal(images, target))
        return images

    budget = LinfBudget(steps=4)
    distil(feature, source, target, budget)
    assert sum(asked) == 1
    asked.clear()
    distil(feature, source, target, budget, fixed=False)
    assert sum(asked) == 4


def test_pairs_that_do_not_match_are_refused(pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(BadInput, match="source and target must be alike"):
        distil(lambda images: images, pair[0], pair[1][:2], LinfBudget())
