from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.objectives import Memory
from training.objectives.ews import Controller, LogProb, draw, plackett_luce
from training.objectives.subnets import Block, Choice, Space, space_of
from zoo.errors import BadInput, CheckpointError
from zoo.networks import build


def block(*channels: int) -> Block:
    return Block(
        "block", tuple(f"block.conv{n + 2}" for n in range(len(channels))), channels, "block.end", "block.skip"
    )


CHANNELS = Space((block(5), block(5)), 2, ((2,), (2,)))
"""Two blocks that keep both paths and 2 of 5 channels."""
PATHS = Space((block(5),), 1, ((5,),))
"""One block that keeps one of its paths and every channel."""
BOTH = Space((block(6), block(4, 8)), 1, ((3,), (2, 4)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    space: Space = BOTH, seed: int = 0, learning_rate: float = 3e-4, log_prob: LogProb = "plackett_luce"
) -> Controller:
    return Controller(space, seeded(seed), learning_rate=learning_rate, log_prob=log_prob)


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "number"), [(4, 1), (4, 2), (4, 3), (4, 4), (1, 1)])
def test_the_probabilities_of_all_ordered_draws_add_up_to_one(count: int, number: int) -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7])[:count].double()
    orders = itertools.permutations(range(count), number)
    total = sum(float(plackett_luce(scores, torch.tensor(order)).exp()) for order in orders)
    assert total == pytest.approx(1.0, abs=1e-12)


def test_the_probability_of_an_ordered_draw_is_a_product_over_what_is_left() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = plackett_luce(p.log() + 5.0, torch.tensor([2, 0]))
    assert float(found) == pytest.approx(math.log(0.3 * 0.1 / 0.7), abs=1e-12)


def test_its_gradient_is_that_of_the_loop_over_draws() -> None:
    drawn = torch.tensor([3, 0, 4])
    scores = torch.randn(6, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(plackett_luce(scores, drawn), scores)
    total, left = torch.zeros((), dtype=torch.float64), list(range(6))
    for index in drawn.tolist():
        total = total + scores[index] - scores[left].logsumexp(0)
        left.remove(index)
    (expected,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(found, expected)


def test_draws_come_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0])
    generator, number = seeded(0), 4000
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(number):
        order = tuple(draw(scores, 2, generator).tolist())
        counts[order] = counts.get(order, 0) + 1
    for order in itertools.permutations(range(3), 2):
        p = float(plackett_luce(scores, torch.tensor(order)).exp())
        assert abs(counts.get(order, 0) / number - p) < 5 * math.sqrt(p * (1 - p) / number), order


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [CHANNELS, PATHS, BOTH, space_of(build("resnet8", width=4), 0.7, "round")])
def test_samples_have_the_sizes_of_the_space(space: Space) -> None:
    controller = make(space)
    generator = seeded(1)
    for _ in range(20):
        choice = controller.sample(generator).choice
        for kept, numbers, one in zip(choice, space.channels, space.blocks, strict=True):
            assert kept.branch + kept.skip == space.paths
            expected = numbers if kept.branch else one.channels
            assert tuple(len(channels) for channels in kept.channels) == expected


def test_a_sample_is_a_function_of_its_generator_with_gradients_or_without() -> None:
    controller = make()
    with torch.no_grad():
        first = controller.sample(seeded(1)).choice
    assert controller.sample(seeded(1)).choice == first
    assert any(controller.sample(seeded(seed)).choice != first for seed in range(2, 6))


@pytest.mark.parametrize("log_prob", ["plackett_luce", "sum"])
def test_an_indifferent_controllers_sample_has_the_probability_of_the_draws(log_prob: LogProb) -> None:
    controller = make(CHANNELS, log_prob=log_prob)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.zero_()
    sample = controller.sample(seeded(0))
    log_probability, entropy = float(sample.log_prob.detach()), float(sample.entropy.detach())
    uniform = math.log(5)
    expected = {"plackett_luce": (-2 * math.log(5 * 4), 2 * uniform), "sum": (-4 * uniform, 2 * 2 * uniform / 5)}
    assert log_probability == pytest.approx(expected[log_prob][0], rel=1e-6)
    assert entropy == pytest.approx(expected[log_prob][1], rel=1e-6)


def test_what_leaves_no_choice_costs_no_step_and_has_probability_one() -> None:
    controller = make(Space((block(4), block(4)), 2, ((4,), (4,))))
    assert [name for name, _ in controller.named_parameters() if not name.startswith("cell.")] == []
    sample = controller.sample(seeded(0))
    assert float(sample.log_prob) == 0
    controller.update(sample, 0.5)
    assert float(controller.baseline) == pytest.approx(-0.005)


def test_later_decisions_depend_on_earlier_ones() -> None:
    controller = make(CHANNELS)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(20)
        second: dict[tuple[int, ...], list[float]] = {}
        for seed in range(200):
            first, last = (kept.channels[0] for kept in controller.sample(seeded(seed)).choice)
            second.setdefault(first, []).append(float(0 in last))
    rates = [sum(found) / len(found) for found in second.values() if len(found) > 15]
    assert max(rates) - min(rates) > 0.2


# ---- learning --------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_error_against_a_moving_baseline() -> None:
    controller = make()
    rewards = [controller.update(controller.sample(seeded(n)), accuracy) for n, accuracy in enumerate((0.5, 0.2, 1.0))]
    baselines = [0.0, -0.005, -0.99 * 0.005 - 0.002]
    assert rewards == pytest.approx([-0.5 - baselines[0], -0.2 - baselines[1], -1.0 - baselines[2]], abs=1e-6)
    assert float(controller.baseline) == pytest.approx(0.99 * baselines[2] - 0.01, abs=1e-6)


def test_an_update_is_one_step_of_adam_on_the_policy_gradient() -> None:
    controller, twin = make(), make()
    sample = twin.sample(seeded(5))
    loss = 0.4 * sample.log_prob - 0.005 * sample.entropy
    parameters = list(twin.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    controller.update(controller.sample(seeded(5)), 0.4)
    for parameter, before, gradient in zip(controller.parameters(), parameters, gradients, strict=True):
        # the first step of Adam is the sign of the gradient, times the rate
        moved = torch.zeros_like(before) if gradient is None else gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), before.detach() - 3e-4 * moved, rtol=0, atol=2e-5)


def test_long_gradients_are_clipped() -> None:
    controller = make()
    sample = controller.sample(seeded(0))
    controller.entropy_weight = 1e6
    controller.update(sample, 0.5)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in controller.parameters() if p.grad is not None]))
    assert float(norm) == pytest.approx(3.0, rel=1e-3)


Bad = Callable[[Choice], bool]
BANDITS: dict[str, tuple[Space, Bad]] = {
    "channel": (CHANNELS, lambda choice: 3 in choice[1].channels[0]),
    "path": (PATHS, lambda choice: not choice[0].branch),
}


def play(controller: Controller, bad: Bad, updates: int, seed: int) -> None:
    generator = seeded(1000 + seed)
    for _ in range(updates):
        sample = controller.sample(generator)
        controller.update(sample, 0.3 if bad(sample.choice) else 0.9)


@torch.no_grad()
def share(controller: Controller, bad: Bad) -> float:
    generator = seeded(7)
    return sum(bad(controller.sample(generator).choice) for _ in range(200)) / 200


@pytest.mark.parametrize("bandit", BANDITS)
@pytest.mark.parametrize("log_prob", ["plackett_luce", "sum"])
def test_a_bandits_bad_arm_is_found_and_accuracy_falls(bandit: str, log_prob: LogProb) -> None:
    space, bad = BANDITS[bandit]
    for seed in range(2):
        controller = make(space, seed, learning_rate=0.003, log_prob=log_prob)
        before = share(controller, bad)
        assert before < 0.65
        play(controller, bad, 250, seed)
        assert share(controller, bad) > 0.9, (seed, before)


@pytest.mark.slow
def test_a_bandits_bad_arm_is_found_at_the_papers_learning_rate() -> None:
    space, bad = BANDITS["path"]
    controller = make(space)
    play(controller, bad, 2000, seed=0)
    assert share(controller, bad) > 0.9


def test_without_a_bad_arm_the_draw_stays_near_uniform() -> None:
    _, bad = BANDITS["channel"]
    shares = []
    for seed in range(2):
        controller = make(CHANNELS, seed, learning_rate=0.003)
        generator = seeded(2000 + seed)
        for _ in range(200):
            controller.update(controller.sample(generator), 0.5)
        shares.append(share(controller, bad))
    assert all(0.2 < found < 0.6 for found in shares), shares  # 2 of 5 draws: 0.4


# ---- state -----------------------------------------------------------------------------------------------------------


def learn(controller: Controller, numbers: range) -> list[tuple[Choice, float]]:
    return [
        (sample.choice, controller.update(sample, 0.1 * (number % 7)))
        for number in numbers
        for sample in [controller.sample(seeded(number))]
    ]


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    straight = make()
    learn(straight, range(5))
    kept = straight.state()
    through = Memory(Memory({f"ews/{key}": tensor for key, tensor in kept.items()}).state())
    resumed = through.part("ews", lambda: make(seed=99))
    assert learn(resumed, range(5, 12)) == learn(straight, range(5, 12))
    for name, tensor in straight.state().items():
        assert torch.equal(resumed.state()[name], tensor), name
    assert straight.state().keys() == resumed.state().keys()
    assert any(key.startswith("adam/exp_avg_sq/") for key in kept)


def test_a_state_is_a_copy() -> None:
    controller = make()
    learn(controller, range(2))
    kept = controller.state()
    frozen = {name: tensor.clone() for name, tensor in kept.items()}
    learn(controller, range(2, 4))
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())
    other = make(seed=9)
    other.load(kept)
    learn(other, range(2, 4))
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())


def test_an_untrained_state_resumes_too() -> None:
    fresh, other = make(), make(seed=9)
    learn(other, range(3))
    other.load(fresh.state())
    assert learn(other, range(4)) == learn(fresh, range(4))


@pytest.mark.parametrize("damage", ["other sizes", "no baseline", "nothing"])
def test_a_state_of_other_subnets_is_refused(damage: str) -> None:
    states: dict[str, dict[str, Tensor]] = {
        "other sizes": make(CHANNELS).state(),
        "no baseline": {key: tensor for key, tensor in make().state().items() if key != "baseline"},
        "nothing": {},
    }
    with pytest.raises(CheckpointError, match="chooses among other subnets than this recipe's"):
        make().load(states[damage])


def test_an_unknown_log_probability_is_refused() -> None:
    with pytest.raises(BadInput, match="log_prob must be one of plackett_luce, sum, got 'exact'"):
        make(log_prob="exact")  # type: ignore[arg-type]
