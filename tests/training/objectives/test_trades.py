from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, Standard, Step, Trades, TrainingAttack
from training.objectives.network import networks_of
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)


@pytest.fixture
def network() -> nn.Module:
    model = build("resnet8", images=SMALL, width=4).train()
    for _ in range(3):  # statistics that belong to images
        model(torch.rand(8, 3, 16, 16))
    return model


def some_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator)
    images[0], images[1] = 0, 1
    return Batch(images, torch.randint(0, 10, (size,), generator=generator))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counters(model: nn.Module) -> set[int]:
    return {int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """Return sum over classes of p log(p / q) per image, written out."""
    p, q = clean.exp() / clean.exp().sum(1, keepdim=True), moved.exp() / moved.exp().sum(1, keepdim=True)
    return (p * (p / q).log()).sum(1)


def noisy(images: Tensor, step: Step = STEP) -> Tensor:
    return (images + 0.001 * torch.randn(images.shape, generator=step.generator("attack", 0))).clamp(0, 1)


def examples_by_hand(model: nn.Module, images: Tensor) -> Tensor:
    moved = noisy(images)
    for _ in range(10):
        moved = moved.detach().requires_grad_()
        (uphill,) = torch.autograd.grad(divergence(model(images).detach(), model(moved)).sum(), moved)
        moved = moved.detach() + 0.007 * uphill.sign()
        moved = torch.minimum(torch.maximum(moved, images - 0.031), images + 0.031).clamp(0, 1)
    return moved


def test_its_examples_are_those_of_a_loop_by_hand_on_running_statistics(network: nn.Module) -> None:
    batch, twin = some_batch(), copy.deepcopy(network).eval()
    (examples,) = Trades().prepare(networks_of(network, STEP), batch)
    expected = examples_by_hand(twin, batch.images)
    # rounding decides the sign of a gradient that is almost 0, and that pixel then goes another way
    assert float(((examples - expected).abs() > 1e-5).float().mean()) < 0.005


def test_its_examples_do_not_depend_on_the_labels(network: nn.Module) -> None:
    batch = some_batch()
    other = Batch(batch.images, (batch.labels + 1) % 10)
    made = [Trades().prepare(networks_of(network, STEP), one)[0] for one in (batch, other)]
    assert torch.equal(*made)


def test_its_examples_move_the_answer_more_than_noise_of_the_same_size(network: nn.Module) -> None:
    batch = some_batch()
    (examples,) = Trades().prepare(networks_of(network, STEP), batch)
    network.eval()
    random = (batch.images + 0.031 * (2 * torch.randint(0, 2, batch.images.shape) - 1)).clamp(0, 1)
    found, noise = (divergence(network(batch.images), network(moved)) for moved in (examples, random))
    assert bool((found > 3 * noise).all())


def test_making_examples_leaves_no_gradient_and_no_trace_in_batch_norm(network: nn.Module) -> None:
    batch, before = some_batch(), copy.deepcopy(network.state_dict())
    (examples,) = Trades().prepare(networks_of(network, STEP), batch)
    assert gradients(network) == {}
    assert not examples.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert float((examples - batch.images).abs().max()) <= 0.031 + 1e-6
    assert float(examples.min()) >= 0
    assert float(examples.max()) <= 1


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_those_of_an_independent_computation(
    network: nn.Module, label_smoothing: float
) -> None:
    batch, twin = some_batch(), copy.deepcopy(network)
    (examples,) = Trades().prepare(networks_of(network, STEP), batch)
    measured = Trades(label_smoothing=label_smoothing).accumulate(network, [batch], STEP)

    clean, moved = twin(batch.images), twin(examples)
    targets = F.one_hot(batch.labels, 10) * (1 - label_smoothing) + label_smoothing / 10
    cross_entropy = -(targets * (clean - clean.logsumexp(1, keepdim=True))).sum(1)
    loss = cross_entropy.mean() + 6 * divergence(clean, moved).mean()
    loss.backward()
    torch.testing.assert_close(measured["loss"], loss.detach())
    assert float(measured["accuracy"]) == float((clean.argmax(1) == batch.labels).float().mean())
    expected = gradients(twin)
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_at_beta_0_it_is_standard_training_gradient_for_gradient(network: nn.Module) -> None:
    batch, twin = some_batch(), copy.deepcopy(network)
    measured = Trades(beta=0.0).accumulate(network, [batch], STEP)
    expected = Standard().accumulate(twin, [batch], STEP)
    assert torch.equal(measured["loss"], expected["loss"])
    found, wanted = gradients(network), gradients(twin)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_divergence_teaches_the_clean_side_too() -> None:
    # logits = w x for two classes (w, 0): p = sigmoid(w x), so KL(p || q) with clean x and moved x' is a function of w
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].weight[0] = 1.5
    batch = Batch(torch.full((1, 1, 1, 1), 0.4), torch.zeros(1, dtype=torch.int64))
    objective = Trades(beta=6.0)
    (examples,) = objective.prepare(networks_of(model, STEP), batch)
    objective.accumulate(model, [batch], STEP)
    x, moved = 0.4, float(examples)
    assert abs(moved - x) == pytest.approx(0.031, abs=1e-6)

    def loss(w: float) -> float:
        p, q = 1 / (1 + math.exp(-w * x)), 1 / (1 + math.exp(-w * moved))
        return -math.log(p) + 6 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))

    slope = (loss(1.5 + 1e-4) - loss(1.5 - 1e-4)) / 2e-4
    assert model[1].weight.grad is not None
    assert float(model[1].weight.grad[0]) == pytest.approx(slope, rel=1e-4)

    # with the clean side held fixed the slope is another one
    p, q = 1 / (1 + math.exp(-1.5 * x)), 1 / (1 + math.exp(-1.5 * moved))
    detached = -(1 - p) * x + 6 * (q - p) * moved
    assert abs(detached - slope) > 100 * abs(float(model[1].weight.grad[0]) - slope)


def test_its_views_are_the_clean_images_and_the_examples_weighted_by_beta(network: nn.Module) -> None:
    batch, objective = some_batch(), Trades(beta=3.0)
    (one,) = networks_of(network, STEP)
    (examples,) = objective.prepare([one], batch)
    clean, moved = objective.loss(one, examples, batch).views
    assert (clean.weight, moved.weight) == (1.0, 3.0)
    assert torch.equal(clean.images, batch.images)
    assert torch.equal(moved.images, examples)
    # apart, each with the statistics of its own batch
    assert torch.equal(clean.logits, network(batch.images))
    assert torch.equal(moved.logits, network(examples))


def test_a_step_runs_two_forward_passes_in_training_mode(network: nn.Module) -> None:
    (before,) = counters(network)
    Trades().accumulate(network, [some_batch()], STEP)
    assert counters(network) == {before + 2}
    assert Trades().forwards() == 27
    assert Trades().forwards(networks=3) == 81


def test_it_can_start_uniformly_in_the_ball_instead(network: nn.Module) -> None:
    batch = some_batch()
    attack = TrainingAttack(eps=0.031, steps=1, step_size=1e-6, random_start=True, batch_norm="eval")
    (examples,) = Trades(attack=attack).prepare(networks_of(network, STEP), batch)
    assert float((examples - batch.images).abs().max()) > 0.03
    attack = TrainingAttack(eps=0.031, steps=1, step_size=1e-6, random_start=False, batch_norm="eval")
    (examples,) = Trades(attack=attack).prepare(networks_of(network, STEP), batch)
    assert float((examples - batch.images).abs().max()) < 0.006
    torch.testing.assert_close(examples, noisy(batch.images), rtol=0, atol=2e-6)


def test_starts_differ_between_steps_and_ranks(network: nn.Module) -> None:
    batch = some_batch()
    steps = [STEP, Step(seed=0, number=4), Step(seed=1, number=3), Step(seed=0, number=3, rank=1)]
    made = [Trades().prepare(networks_of(network, step), batch)[0] for step in steps]
    assert not any(torch.equal(made[i], made[j]) for i in range(4) for j in range(i))


def test_an_ensemble_is_attacked_as_a_whole_or_member_by_member() -> None:
    torch.manual_seed(0)
    model = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(768, 10)) for _ in range(2)])
    batch = some_batch()
    first, second = Trades().prepare(networks_of(model, STEP), batch)
    assert first is second
    apart = Trades(attacked="member").prepare(networks_of(model, STEP), batch)
    assert not torch.equal(apart[0], apart[1])
    alone = Trades().prepare(networks_of(model.members[0], STEP), batch)[0]
    assert torch.equal(apart[0], alone)
    for answers, examples in (((model,), first), ((model.members[0],), apart[0])):
        (answer,) = answers
        with torch.no_grad():
            ahead, behind = (divergence(answer(batch.images), answer(at)) for at in (examples, noisy(batch.images)))
        assert bool((ahead > behind).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "need a finite beta >= 0, got -1.0"),
        ({"beta": math.inf}, "need a finite beta >= 0, got inf"),
        ({"start_noise": 0.0}, "need start_noise > 0, got 0.0; at the image itself the divergence has no gradient"),
        ({"label_smoothing": 1.0}, "need 0 <= label_smoothing < 1, got 1.0"),
        ({"attacked": "all"}, "attacked must be one of ensemble, member, got 'all'"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Trades(**options)
