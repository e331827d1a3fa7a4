from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, Gal, Step
from training.objectives.members import alignment
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)


class Linear(nn.Module):
    """Logits of two classes; the gradient for an image of class 0 points along `direction`, for class 1 against it."""

    def __init__(self, *direction: float) -> None:
        super().__init__()
        weight = torch.zeros(2, 48)
        weight[1, : len(direction)] = torch.tensor(direction)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def linear_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(size, 3, 4, 4, generator=generator), torch.randint(0, 2, (size,), generator=generator))


def some_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator))


def make_members(number: int = 3, **options: Any) -> Ensemble:
    return Ensemble([build("resnet8", images=SMALL, width=4, **options) for _ in range(number)]).train()


# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "cosine", "expected"),
    [
        ([(1, 0), (2, 0)], 1.0, 1.0),
        ([(1, 0), (0, 5)], 0.0, 0.0),
        ([(1, 0), (-3, 0)], -1.0, -1.0),
        ([(3, 4), (1, 0)], 0.6, 0.6),
        ([(1, 0)] * 3, 1.0, 1 + math.log(3)),
        ([(1, 0, 0), (0, 1, 0), (0, 0, 1)], 0.0, math.log(3)),
        # cosines 0.6, 0 and 0.8
        ([(3, 4), (1, 0), (0, 2)], (0.6 + 0.8) / 3, math.log(math.exp(0.6) + 1 + math.exp(0.8))),
    ],
)
def test_the_alignment_of_linear_members_is_that_of_their_weights(
    members: list[tuple[float, ...]], cosine: float, expected: float
) -> None:
    model, batch = Ensemble([Linear(*direction) for direction in members]), linear_batch()
    measured = Gal(noise=0).accumulate(model, [batch], STEP)
    assert float(measured["cosine"]) == pytest.approx(cosine, abs=1e-6)
    losses = [float(F.cross_entropy(member(batch.images), batch.labels).detach()) for member in model.members]
    assert float(measured["cross_entropy"]) == pytest.approx(sum(losses) / len(losses))
    assert float(measured["loss"]) == pytest.approx(sum(losses) / len(losses) + 0.5 * expected, abs=1e-6)


def test_alignment_is_the_mean_over_images_of_a_log_sum_over_pairs() -> None:
    similar = torch.tensor([[0.5, -1.0], [0.25, 1.0]])  # (pair, image)
    expected = (math.log(math.exp(0.5) + math.exp(0.25)) + math.log(math.exp(-1) + math.exp(1))) / 2
    assert float(alignment(similar)) == pytest.approx(expected)


def test_a_step_turns_two_linear_members_away_from_each_other() -> None:
    model, batch = Ensemble([Linear(1, 0), Linear(1, 0.5)]), linear_batch()
    objective, cosines = Gal(noise=0, weight=5.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        cosines.append(float(objective.accumulate(model, [batch], STEP)["cosine"]))
        optimizer.step()
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] < cosines[0] - 0.3


def test_its_gradients_are_those_of_float64_by_hand() -> None:
    """BatchNorm in training mode and leaky activations, through the second derivative."""
    model, batch = make_members(2, negative_slope=0.1), some_batch()
    Gal(noise=0).accumulate(model, [batch], STEP)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.double().zero_grad()
    images = batch.images.double().requires_grad_()
    losses = [F.cross_entropy(member(images), batch.labels) for member in model.members]
    first, second = (torch.autograd.grad(loss, images, create_graph=True)[0].flatten(1) for loss in losses)
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    (sum(losses) / 2 + 0.5 * cosine.mean()).backward()
    assert len(found) == len(list(model.parameters()))
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        atol = 1e-3 * float(parameter.grad.abs().max()) + 1e-8
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["resnet8", "lenet"])
def test_every_parameter_gets_a_finite_gradient(network: str, precision: torch.dtype) -> None:
    model = Ensemble([build(network, images=SMALL) for _ in range(2)]).train()
    Gal().accumulate(model, [some_batch()], Step(seed=0, number=3, precision=precision))
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_the_alignment_does_not_depend_on_the_size_of_the_batch() -> None:
    model, batch = Ensemble([build("lenet", images=SMALL) for _ in range(2)]).train(), some_batch()
    thrice = Batch(batch.images.repeat(3, 1, 1, 1), batch.labels.repeat(3))
    once, again = (Gal(noise=0).accumulate(model, [one], STEP) for one in (batch, thrice))
    assert float(once["loss"]) == pytest.approx(float(again["loss"]), rel=1e-5)


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_about_half_of_the_images_get_noise_of_the_published_size() -> None:
    images = torch.full((400, 3, 8, 8), 0.5)
    noise = Gal().noisy(images, STEP) - images
    moved = noise.flatten(1).abs().amax(1) > 0
    assert 160 < int(moved.sum()) < 240
    assert float(noise[moved].std()) == pytest.approx(0.045, rel=0.02)
    assert float(noise[moved].mean()) == pytest.approx(0, abs=1e-3)


def test_noise_is_clipped_unless_asked_otherwise() -> None:
    images = torch.cat([torch.zeros(8, 3, 8, 8), torch.ones(8, 3, 8, 8)])
    clipped, open_ended = (Gal(clip_noise=clip).noisy(images, STEP) for clip in (True, False))
    assert 0 <= float(clipped.min()) <= float(clipped.max()) <= 1
    assert float(open_ended.min()) < 0
    assert float(open_ended.max()) > 1
    assert torch.equal(open_ended.clamp(0, 1), clipped)


def test_all_members_see_the_same_noise_and_every_step_draws_its_own() -> None:
    seen: list[Tensor] = []
    model = make_members(2)
    for member in model.members:
        member.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    for number in (1, 1, 2):
        Gal().accumulate(model, [some_batch()], Step(seed=0, number=number))
    assert len(seen) == 6
    assert all(torch.equal(seen[0], images) for images in seen[:4])
    assert torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[0], seen[4])


# ---- paths, cost, bad input ------------------------------------------------------------------------------------------


def test_random_paths_of_a_gated_network_stand_for_members() -> None:
    rgn = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    measured = Gal(paths=2).accumulate(rgn, [some_batch()], STEP)
    assert -1 < float(measured["cosine"]) < 1
    assert all(any(p.grad is not None for p in alternatives.parameters()) for alternatives in rgn.bank)


def test_one_forward_pass_per_member_serves_both_terms() -> None:
    model, calls = make_members(3), []
    for member in model.members:
        member.register_forward_hook(lambda *_: calls.append(1))
    Gal().accumulate(model, [some_batch()], STEP)
    assert len(calls) == 3
    assert Gal().forwards(networks=3) == 18
    assert Gal(paths=2).forwards() == 12


def test_one_network_is_refused_and_any_activation_accepted() -> None:
    with pytest.raises(BadInput, match="gal trains several networks against each other, got 1"):
        Gal().check(build("lenet", images=SMALL))
    Gal().check(make_members(2))
    Gal().check(make_members(2, negative_slope=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "finite weight >= 0, got -1"),
        ({"noise": -0.1}, "noise >= 0 and 0 <= noisy_share <= 1, got -0.1 and 0.5"),
        ({"noisy_share": 2}, "got 0.045 and 2"),
        ({"paths": 0}, "at least 2 paths, got 0"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Gal(**options)
