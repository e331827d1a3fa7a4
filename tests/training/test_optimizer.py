from __future__ import annotations

import math

import pytest
from torch import nn

from training.objectives import EnsembleInOne, Standard
from training.optimizer import learning_rate, optimizer_of
from training.recipes import Phase


def test_the_step_schedule_falls_by_ten_at_each_milestone() -> None:
    phase = Phase(objective=Standard(), epochs=200, learning_rate=0.1, milestones=(100, 150))
    for epoch, expected in [(0, 0.1), (99.99, 0.1), (100, 0.01), (149.5, 0.01), (150, 0.001), (199.99, 0.001)]:
        assert learning_rate(phase, epoch) == pytest.approx(expected)


def test_the_cosine_schedule_warms_up_and_falls_to_nothing() -> None:
    phase = Phase(objective=EnsembleInOne(), epochs=20, learning_rate=0.1, schedule="cosine")
    rates = [learning_rate(phase, step / 100) for step in range(2001)]
    assert 0 < rates[0] < 0.001
    assert max(rates) == rates[100] == pytest.approx(0.1)
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[1050] == pytest.approx(0.05)
    assert math.isclose(rates[-1], 0, abs_tol=1e-12)


def test_the_cyclic_schedule_is_a_triangle() -> None:
    phase = Phase(objective=Standard(), epochs=10, learning_rate=0.2, schedule="cyclic")
    for epoch, expected in [(0, 0.0), (2.5, 0.1), (5, 0.2), (7.5, 0.1), (10, 0.0)]:
        assert learning_rate(phase, epoch) == pytest.approx(expected)


def test_adam_is_adam_with_the_eps_of_the_published_codes() -> None:
    phase = Phase(objective=Standard(), epochs=1, optimizer="adam", learning_rate=0.001)
    (group,) = optimizer_of(phase, nn.Linear(2, 2).parameters()).param_groups
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (0.001, 1e-7, (0.9, 0.999), 1e-4)
