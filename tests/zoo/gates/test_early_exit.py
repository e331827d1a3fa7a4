from __future__ import annotations

import pytest
import torch

from zoo.errors import BadInput
from zoo.gates.early_exit import geometric_quotas, leaving, thresholds

INFINITE = float("inf")


def test_an_image_leaves_at_the_first_exit_whose_confidence_reaches_its_limit() -> None:
    confidence = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.2, 0.1, 0.5], [0.5, 0.9, 0.5], [0.4, 0.6, 0.9]])
    assert leaving(confidence, [0.5, 0.6]).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_limits_of_infinity_before_an_exit_and_zero_at_it_choose_it(chosen: int) -> None:
    limits = [INFINITE if index < chosen else 0.0 for index in range(2)]
    assert leaving(torch.rand(20, 3), limits).tolist() == [chosen] * 20


def test_a_confidence_that_is_no_number_never_suffices() -> None:
    assert leaving(torch.tensor([[float("nan"), 0.3]]), [0.0]).tolist() == [1]


def test_thresholds_give_each_exit_its_quota_and_the_last_the_rest() -> None:
    confidence = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    left_at = leaving(confidence, thresholds(confidence, [0.5, 0.3, 0.2]))
    assert left_at.bincount().tolist() == [50, 30, 20]


def test_geometric_quotas_grow_by_their_ratio_and_sum_to_one() -> None:
    assert geometric_quotas(1.0, 4) == [0.25] * 4
    assert geometric_quotas(2.0, 3) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert geometric_quotas(0.5, 2) == pytest.approx([2 / 3, 1 / 3])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadInput, match=r"need 3 shares that sum to 1, one per exit, got \[0.5, 0.6, 0.1\]"):
        thresholds(torch.rand(4, 3), [0.5, 0.6, 0.1])
    with pytest.raises(BadInput, match="need 2 limits, one per exit but the last, got 3"):
        leaving(torch.rand(4, 3), [0.1, 0.2, 0.3])
