from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.attacks import LinfBudget, pgd
from zoo.attacks.exits import average_exits, exits_of, max_average_exits, single_exit
from zoo.errors import BadInput
from zoo.evaluation.exits import budgeted, thresholds

EPS = 0.1


class TwoExits(nn.Module):
    """Exit i answers class 1 where the mean of pixel column i is above its boundary."""

    def __init__(self, *boundaries: float) -> None:
        super().__init__()
        self.boundaries = boundaries
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> list[Tensor]:
        columns = images.mean((1, 2))
        scores = [self.scale * (columns[:, index] - boundary) for index, boundary in enumerate(self.boundaries)]
        return [torch.stack([torch.zeros_like(score), score], 1) for score in scores]


@pytest.fixture
def images() -> Tensor:
    return torch.full((2, 1, 3, 2), 0.5)


LABELS = torch.tensor([0, 0])


def broken(network: nn.Module, images: Tensor) -> list[bool]:
    return [bool((outputs.argmax(1) == 1).all()) for outputs in exits_of(network, images)]


def test_the_single_attack_breaks_its_exit_and_leaves_the_others(images: Tensor) -> None:
    network = TwoExits(0.55, 0.55)
    budget = LinfBudget(eps=EPS, random_start=False)
    assert broken(network, single_exit(network, images, LABELS, budget, 0)) == [True, False]
    assert broken(network, single_exit(network, images, LABELS, budget, 1)) == [False, True]


def test_the_average_attack_breaks_every_exit_within_reach(images: Tensor) -> None:
    network = TwoExits(0.55, 0.55)
    found = average_exits(network, images, LABELS, LinfBudget(eps=EPS, random_start=False))
    assert broken(network, found) == [True, True]
    torch.testing.assert_close(found, images + EPS)


def test_the_max_average_attack_harms_all_exits_together_at_least_as_much_as_any_single_one(images: Tensor) -> None:
    torch.manual_seed(0)
    network = TwoExits(0.52, 0.7)
    budget = LinfBudget(eps=EPS, random_start=False)

    def harm(adversarial: Tensor) -> Tensor:
        losses = [nn.functional.cross_entropy(o, LABELS, reduction="none") for o in exits_of(network, adversarial)]
        return torch.stack(losses).sum(0)

    most = harm(max_average_exits(network, images, LABELS, budget))
    singles = torch.stack([harm(single_exit(network, images, LABELS, budget, index)) for index in range(2)])
    torch.testing.assert_close(most, singles.amax(0))


def test_with_one_exit_all_attacks_are_pgd(images: Tensor) -> None:
    network = TwoExits(0.7)
    budget = LinfBudget(eps=EPS, restarts=2)
    make = [
        lambda g: single_exit(network, images, LABELS, budget, 0, generator=g),
        lambda g: average_exits(network, images, LABELS, budget, generator=g),
        lambda g: max_average_exits(network, images, LABELS, budget, generator=g),
        lambda g: pgd(lambda x: network(x)[0], images, LABELS, budget, generator=g),
    ]
    found = [attack(torch.Generator().manual_seed(1)) for attack in make]
    assert all(torch.equal(one, found[0]) for one in found)


def test_thresholds_give_each_exit_its_quota_and_the_last_the_rest() -> None:
    confidence = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    limits = thresholds(confidence, [0.5, 0.3, 0.2])
    first = confidence[:, 0] >= limits[0]
    second = ~first & (confidence[:, 1] >= limits[1])
    assert (int(first.sum()), int(second.sum())) == (50, 30)
    assert limits[2] == float("-inf")


def test_a_budget_of_one_exit_is_that_exit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 4, generator=generator) for _ in range(3)]
    labels = torch.randint(0, 4, (50,), generator=generator)
    costs = [1.0, 2.0, 5.0]
    confidence = torch.stack([outputs.softmax(1).amax(1) for outputs in logits], 1)
    for index in range(3):
        quotas = [float(index == other) for other in range(3)]
        accuracy, cost = budgeted(logits, labels, thresholds(confidence, quotas), costs)
        assert accuracy == pytest.approx(float((logits[index].argmax(1) == labels).double().mean()))
        assert cost == costs[index]


def test_what_makes_no_sense_is_refused(images: Tensor) -> None:
    network = TwoExits(0.5, 0.5)
    with pytest.raises(BadInput, match="exit 2 is out of range, expected 0 to 1"):
        single_exit(network, images, LABELS, LinfBudget(), 2)
    with pytest.raises(BadInput, match="so it has one exit"):
        average_exits(lambda x: x.mean((1, 2)), images, LABELS, LinfBudget())
    with pytest.raises(BadInput, match=r"need 3 shares that sum to 1, one per exit, got \[0.5, 0.6, 0.1\]"):
        thresholds(torch.rand(4, 3), [0.5, 0.6, 0.1])
