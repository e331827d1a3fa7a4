from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, PgdAt, Standard, Step, TrainingAttack
from training.objectives.network import Network, networks_of
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)


def half_space(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def uphill(model: nn.Module, labels: Tensor) -> Tensor:
    """Return the sign of the loss' gradient on a linear network of two classes, the same at every image of a class."""
    weight = model[1].weight.detach()
    return (weight[1 - labels] - weight[labels]).sign().reshape(-1, 3, 4, 4)


def some_batch(size: int = 6, side: int = 4, classes: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, side, side, generator=generator)
    images[0], images[1] = 0, 1
    return Batch(images, torch.randint(0, classes, (size,), generator=generator))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counters(model: nn.Module) -> list[int]:
    return [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]


def prepared(objective: PgdAt, model: nn.Module, batch: Batch, step: Step = STEP) -> list[Tensor]:
    return objective.prepare(networks_of(model, step), batch)


def test_on_a_half_space_the_examples_are_at_the_corner_of_the_ball() -> None:
    model, batch = half_space(), some_batch()
    # 10 steps of 2/255 cross a ball of radius 8/255 from any start
    (examples,) = prepared(PgdAt(), model, batch)
    corner = (batch.images + 8 / 255 * uphill(model, batch.labels)).clamp(0, 1)
    torch.testing.assert_close(examples, corner, rtol=0, atol=1e-6)


def test_too_short_a_walk_ends_where_its_steps_add_up_to() -> None:
    model, batch = half_space(), some_batch()
    attack = TrainingAttack(eps=8 / 255, steps=3, step_size=1 / 255, random_start=False)
    (examples,) = prepared(PgdAt(attack=attack), model, batch)
    reached = (batch.images + 3 / 255 * uphill(model, batch.labels)).clamp(0, 1)
    torch.testing.assert_close(examples, reached, rtol=0, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_the_cross_entropy_at_the_corner(label_smoothing: float) -> None:
    model, batch = half_space(), some_batch()
    measured = PgdAt(label_smoothing=label_smoothing).accumulate(model, [batch], STEP)
    found = gradients(model)
    model.zero_grad()
    corner = (batch.images + 8 / 255 * uphill(model, batch.labels)).clamp(0, 1)
    logits = model(corner)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    loss.backward()
    torch.testing.assert_close(measured["loss"], loss.detach())
    assert float(measured["accuracy"]) == float((logits.argmax(1) == batch.labels).float().mean())
    torch.testing.assert_close(found, gradients(model))


def test_at_radius_0_it_is_standard_training() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    twin = copy.deepcopy(model)
    still = PgdAt(attack=TrainingAttack(eps=0.0, steps=1, batch_norm="eval"))
    measured, expected = still.accumulate(model, [batch], STEP), Standard().accumulate(twin, [batch], STEP)
    assert torch.equal(measured["loss"], expected["loss"])
    assert all(torch.equal(gradient, gradients(twin)[name]) for name, gradient in gradients(model).items())


def test_its_loss_is_above_the_one_on_clean_images() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    attacked = PgdAt().accumulate(copy.deepcopy(model), [batch], STEP)["loss"]
    assert float(attacked) > float(Standard().accumulate(copy.deepcopy(model), [batch], STEP)["loss"]) + 0.01


def test_making_examples_leaves_no_gradient_and_the_images_as_they_are() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    before = batch.images.clone()
    (examples,) = prepared(PgdAt(), model, batch)
    assert gradients(model) == {}
    assert batch.images.grad is None
    assert torch.equal(batch.images, before)
    assert not examples.requires_grad
    assert float((examples - before).abs().max()) <= 8 / 255 + 1e-6
    assert float(examples.min()) >= 0
    assert float(examples.max()) <= 1


@pytest.mark.parametrize(("batch_norm", "moves"), [("train", 10), ("train_frozen", 0), ("eval", 0)])
def test_running_statistics_move_with_every_step_of_the_attack_or_not_at_all(batch_norm: Any, moves: int) -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    prepared(PgdAt(attack=TrainingAttack(batch_norm=batch_norm)), model, batch)
    assert set(counters(model)) == {moves}
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(buffer, before[name]) == (moves == 0), name
    assert all(module.training for module in model.modules())


def test_an_attack_on_frozen_statistics_sees_those_of_the_batch_and_one_in_evaluation_does_not() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    made = {
        mode: prepared(PgdAt(attack=TrainingAttack(batch_norm=mode)), copy.deepcopy(model), batch)[0]
        for mode in ("train", "train_frozen", "eval")
    }
    assert torch.equal(made["train"], made["train_frozen"])
    assert not torch.equal(made["train"], made["eval"])


def test_the_loss_itself_moves_the_running_statistics_once() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    PgdAt(attack=TrainingAttack(batch_norm="eval")).accumulate(model, [batch], STEP)
    assert set(counters(model)) == {1}


def test_starts_differ_between_steps_and_ranks() -> None:
    model, batch = half_space(), some_batch()
    short = PgdAt(attack=TrainingAttack(steps=1, step_size=1e-4))
    steps = [STEP, Step(seed=0, number=4), Step(seed=1, number=3), Step(seed=0, number=3, rank=1)]
    made = [prepared(short, model, batch, step)[0] for step in steps]
    assert not any(torch.equal(made[i], made[j]) for i in range(4) for j in range(i))
    assert torch.equal(made[0], prepared(short, model, batch, Step(seed=0, number=3))[0])


def test_an_ensemble_is_attacked_as_a_whole_and_its_members_learn_the_same_examples() -> None:
    model, batch = Ensemble([half_space(seed) for seed in (1, 2)]), some_batch()
    first, second = prepared(PgdAt(attack=TrainingAttack(random_start=False, steps=1)), model, batch)
    assert first is second
    images = batch.images.clone().requires_grad_()
    mean = torch.stack([member(images).softmax(1) for member in model.members]).mean(0)
    (uphill,) = torch.autograd.grad(F.nll_loss(mean.log(), batch.labels, reduction="sum"), images)
    expected = (batch.images + 2 / 255 * uphill.sign()).clamp(0, 1)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)


def test_members_attacked_by_themselves_learn_their_own_examples() -> None:
    model, batch = Ensemble([half_space(seed) for seed in (1, 2)]), some_batch()
    made = prepared(PgdAt(attacked="member"), model, batch)
    for member, examples in zip(model.members, made, strict=True):
        corner = (batch.images + 8 / 255 * uphill(member, batch.labels)).clamp(0, 1)
        torch.testing.assert_close(examples, corner, rtol=0, atol=1e-6)


def test_of_a_gated_network_the_path_that_is_attacked_is_the_one_that_learns() -> None:
    model = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    batch = some_batch(side=16, classes=10)
    PgdAt().accumulate(model, [batch], STEP)
    (network,) = networks_of(model, STEP)
    assert isinstance(network, Network)
    assert network.path is not None
    for layer, gate in enumerate(network.path):
        chosen, other = model.bank[layer][gate], model.bank[layer][1 - gate]
        assert all(parameter.grad is not None for parameter in chosen.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())
        assert (counters(chosen), counters(other)) == ([11], [0])


def test_in_bfloat16_the_examples_keep_their_ball_and_precision() -> None:
    model, batch = build("resnet8", images=SMALL, width=4).train(), some_batch(side=16, classes=10)
    (examples,) = prepared(PgdAt(), model, batch, Step(seed=0, number=0, precision=torch.bfloat16))
    assert examples.dtype == torch.float32
    assert float((examples - batch.images).abs().max()) <= 8 / 255 + 1e-6


def test_its_cost_is_two_forwards_a_step_and_three_for_the_weights() -> None:
    assert PgdAt().forwards() == 23
    assert PgdAt(attack=TrainingAttack(steps=7)).forwards(networks=3) == 3 * 17


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PgdAt(label_smoothing=1.0), "need 0 <= label_smoothing < 1, got 1.0"),
        (lambda: PgdAt(attacked="path"), "attacked must be one of ensemble, member, got 'path'"),
        (lambda: TrainingAttack(eps=8), "need 0 <= eps <= 1, got 8; .*write 8/255, not 8"),
        (lambda: TrainingAttack(steps=0), "at least 1"),
        (lambda: TrainingAttack(step_size=2), "need 0 < step_size <= 1, got 2"),
        (
            lambda: TrainingAttack(batch_norm="frozen"),
            "batch_norm must be one of train, train_frozen, eval, got 'frozen'",
        ),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def test_a_network_with_several_exits_is_refused() -> None:
    with pytest.raises(BadInput, match="pgd_at trains networks with one exit"):
        PgdAt().check(build("small_cnn3"))
