from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, FreeAt, Memory, Standard, Step
from training.objectives.network import networks_of
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

EPS = 8 / 255
KEY = "free_at/delta/0"
SMALL = ImageFormat(height=16, width=16)


@pytest.fixture
def network() -> nn.Module:
    return build("resnet8", images=SMALL, width=4).train()


def some_batch(size: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 16, 16, generator=generator)
    images[0], images[1] = 0, 1
    return Batch(images, torch.randint(0, 10, (size,), generator=generator))


def replay(objective: FreeAt, model: nn.Module, batches: list[Batch], memory: Memory | None = None) -> list[Tensor]:
    """Train on each batch `replays` times as the loop does; return the perturbation after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    memory, deltas = memory or Memory(), []
    for batch in batches:
        for _ in range(objective.replays):
            optimizer.zero_grad(set_to_none=True)
            objective.accumulate(model, [batch], Step(seed=0, number=len(deltas), memory=memory))
            optimizer.step()
            deltas.append(memory.tensors[KEY].clone())
    return deltas


def by_hand(model: nn.Module, batches: list[Batch], replays: int) -> list[Tensor]:
    """Follow the algorithm by its text: one delta, as wide as a batch, its `.grad` from the same backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    delta, deltas = torch.zeros_like(batches[0].images), []
    for batch in batches:
        for _ in range(replays):
            delta = ((batch.images + delta).clamp(0, 1) - batch.images).requires_grad_()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(batch.images + delta), batch.labels).backward()
            assert delta.grad is not None
            delta = (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)
            delta = (batch.images + delta).clamp(0, 1) - batch.images
            deltas.append(delta)
            optimizer.step()
    return deltas


def test_replays_over_two_batches_equal_a_loop_by_hand(network: nn.Module) -> None:
    twin = copy.deepcopy(network)
    batches = [some_batch(), some_batch(seed=2)]
    found, expected = replay(FreeAt(replays=3), network, batches), by_hand(twin, batches, 3)
    for number, (delta, wanted) in enumerate(zip(found, expected, strict=True)):
        # rounding decides the sign of a gradient that is almost 0, and that pixel then goes another way
        assert float(((delta - wanted).abs() > 1e-6).float().mean()) < 0.002, number
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, twin.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_the_perturbation_stays_in_the_ball_and_in_pixels(network: nn.Module) -> None:
    batches = [some_batch(), some_batch(seed=2)]
    for number, delta in enumerate(replay(FreeAt(), network, batches)):
        images = batches[number // 8].images
        assert float(delta.abs().max()) <= EPS + 1e-6
        assert float((images + delta).min()) >= -1e-7
        assert float((images + delta).max()) <= 1 + 1e-7
    assert float(delta.abs().max()) > 0.9 * EPS


def test_a_new_memory_starts_on_the_clean_images(network: nn.Module) -> None:
    twin, batch = copy.deepcopy(network), some_batch()
    first = FreeAt().accumulate(network, [batch], Step(seed=0, number=0))
    clean = Standard().accumulate(twin, [batch], Step(seed=0, number=0))
    assert torch.equal(first["loss"], clean["loss"])
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_on_a_half_space_one_step_reaches_the_corner_and_stays() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), some_batch()
    batch = Batch(batch.images, batch.labels % 2)
    weight, memory = model[1].weight.detach(), Memory()
    uphill = (weight[1 - batch.labels] - weight[batch.labels]).sign().reshape(batch.images.shape)
    corner = (batch.images + EPS * uphill).clamp(0, 1)
    for number in range(3):  # the weights are not stepped
        FreeAt().accumulate(model, [batch], Step(seed=0, number=number, memory=memory))
        torch.testing.assert_close(batch.images + memory.tensors[KEY], corner, rtol=0, atol=1e-6)


def test_a_shorter_step_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    model, memory = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), Memory()
    batch = Batch(some_batch().images.clamp(0.2, 0.8), some_batch().labels % 2)
    for number in range(3):
        FreeAt(step_size=2 / 255).accumulate(model, [batch], Step(seed=0, number=number, memory=memory))
    assert torch.allclose(memory.tensors[KEY].abs(), torch.tensor(6 / 255), atol=1e-6)


def test_a_shorter_batch_uses_and_moves_the_first_rows(network: nn.Module) -> None:
    memory = Memory()
    (before,) = replay(FreeAt(replays=1), network, [some_batch(6)], memory)
    (after,) = replay(FreeAt(replays=1), network, [some_batch(4, seed=2)], memory)
    assert after.shape == before.shape
    assert torch.equal(after[4:], before[4:])
    assert not torch.equal(after[:4], before[:4])


def test_rows_that_a_longer_batch_is_the_first_to_need_start_at_0(network: nn.Module) -> None:
    memory = Memory()
    (before,) = replay(FreeAt(replays=1), network, [some_batch(4)], memory)
    longer = some_batch(6, seed=2)
    (examples,) = FreeAt().prepare(networks_of(network, Step(seed=0, number=1, memory=memory)), longer)
    torch.testing.assert_close(examples.detach()[:4], (longer.images[:4] + before).clamp(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(examples[4:], longer.images[4:])
    (after,) = replay(FreeAt(replays=1), network, [longer], memory)
    assert after.shape == longer.images.shape


def test_images_of_another_size_start_anew() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))
    memory = Memory()
    replay(FreeAt(replays=1), model, [some_batch()], memory)
    larger = Batch(torch.rand(5, 3, 20, 20), torch.zeros(5, dtype=torch.int64))
    (after,) = replay(FreeAt(replays=1), model, [larger], memory)
    assert after.shape == larger.images.shape


def test_with_the_memory_of_a_checkpoint_it_goes_on_bit_for_bit(network: nn.Module) -> None:
    batch, memory = some_batch(), Memory()
    replay(FreeAt(replays=3), network, [batch], memory)
    copied = {name: tensor.clone() for name, tensor in memory.state().items()}
    twin = copy.deepcopy(network)
    going_on = replay(FreeAt(replays=2), network, [batch], memory)
    resumed = replay(FreeAt(replays=2), twin, [batch], Memory(copied))
    assert all(torch.equal(one, other) for one, other in zip(going_on, resumed, strict=True))
    assert all(torch.equal(one, twin.state_dict()[name]) for name, one in network.state_dict().items())


def test_the_images_are_left_alone_and_the_memory_keeps_no_graph(network: nn.Module) -> None:
    batch, memory = some_batch(), Memory()
    before = batch.images.clone()
    replay(FreeAt(replays=2), network, [batch], memory)
    assert torch.equal(batch.images, before)
    assert batch.images.grad is None
    assert list(memory.tensors) == [KEY]
    assert not memory.tensors[KEY].requires_grad
    assert memory.tensors[KEY].grad_fn is None


def test_a_step_is_one_forward_pass_in_training_mode(network: nn.Module) -> None:
    FreeAt().accumulate(network, [some_batch()], Step(seed=0, number=0))
    counters = {int(b) for name, b in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counters == {1}
    assert FreeAt().forwards() == 3
    assert FreeAt().forwards(networks=2) == 6


def test_each_member_of_an_ensemble_has_a_perturbation_of_its_own() -> None:
    torch.manual_seed(0)
    model = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(768, 10)) for _ in range(2)])
    memory = Memory()
    replay(FreeAt(replays=2), model, [some_batch()], memory)
    assert sorted(memory.tensors) == ["free_at/delta/0", "free_at/delta/1"]
    assert not torch.equal(*memory.tensors.values())


def test_paths_of_a_gated_network_hand_the_perturbation_on() -> None:
    model = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    deltas = replay(FreeAt(replays=4), model, [some_batch()])
    assert all(float(delta.abs().max()) <= EPS + 1e-6 for delta in deltas)


def test_terms_added_on_its_views_do_not_move_the_perturbation(network: nn.Module) -> None:
    batch = some_batch()
    perturbations = []
    for weight in (0.0, 100.0):
        model, step = copy.deepcopy(network), Step(seed=0, number=0)
        (one,) = networks_of(model, step)
        (inputs,) = FreeAt().prepare([one], batch)
        loss = FreeAt().loss(one, inputs, batch)
        (loss.value + weight * one(1 - loss.views[0].images).square().mean()).backward()
        perturbations.append(step.memory.tensors[KEY])
    assert torch.equal(*perturbations)


def test_it_asks_for_its_replays_and_for_one_process() -> None:
    assert (FreeAt().replays, FreeAt(replays=4).replays, Standard().replays) == (8, 4, 1)
    assert FreeAt().per_image_memory
    assert dataclasses.replace(FreeAt(), eps=0.1).replays == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, "need 0 <= eps <= 1, got 8; .*write 8/255, not 8"),
        ({"step_size": 8}, "need 0 < step_size <= 1, got 8"),
        ({"replays": 0}, "need at least 1 replay, got 0"),
        ({"label_smoothing": 1.5}, "need 0 <= label_smoothing < 1, got 1.5"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        FreeAt(**options)
