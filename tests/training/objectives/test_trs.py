from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, Step, Trs
from training.objectives.input_gradients import Smoothness
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)
CLEAN = Smoothness(perturbed="none")


class Linear(nn.Module):
    """Logits of two classes: 0 and `direction` times the first pixels, plus a bias that no gradient sees."""

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


def make_members(network: str = "resnet8", number: int = 2) -> Ensemble:
    options = {"width": 4} if network == "resnet8" else {}
    return Ensemble([build(network, images=SMALL, **options) for _ in range(number)]).train()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


# ---- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "similarity"),
    [
        ([(1, 0), (2, 0)], 1.0),
        ([(1, 0), (-3, 0)], 1.0),  # opposite gradients count as alike
        ([(1, 0), (0, 5)], 0.0),
        ([(3, 4), (-1, 0)], 0.6),
        ([(3, 4), (1, 0), (0, 2)], (0.6 + 0.8 + 0) / 3),
    ],
)
def test_the_similarity_of_linear_members_is_that_of_their_weights(
    members: list[tuple[float, ...]], similarity: float
) -> None:
    model = Ensemble([Linear(*direction) for direction in members])
    measured = Trs().accumulate(model, [linear_batch()], STEP)
    assert float(measured["similarity"]) == pytest.approx(similarity, abs=1e-6)


def test_the_loss_of_two_linear_members_by_hand() -> None:
    # pixels 0, so p_wrong = 1/2 and CE = log 2; weights (3, 4) and (1, 0): ||g|| = 5/2 and 1/2, cosine 0.6
    model = Ensemble([Linear(3, 4), Linear(1, 0)])
    batch = Batch(torch.zeros(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]))
    measured = Trs(lambda_a=7, lambda_b=0.5, smoothness=CLEAN).accumulate(model, [batch], STEP)
    smoothness = (2 * 2.5**2 + 2 * 0.5**2) / 2
    assert float(measured["smoothness"]) == pytest.approx(smoothness)
    assert float(measured["cross_entropy"]) == pytest.approx(math.log(2))
    assert float(measured["loss"]) == pytest.approx(2 * math.log(2) + 7 * 0.6 + 0.5 * smoothness)
    averaged = Trs(lambda_a=7, lambda_b=0.5, smoothness=CLEAN, average_members=True)
    assert float(averaged.accumulate(model, [batch], STEP)["loss"]) == pytest.approx(
        math.log(2) + 7 * 0.6 + 0.5 * smoothness
    )


def test_the_default_weights_are_the_published_ones_on_batch_mean_gradients_of_128_images() -> None:
    model, batch = Ensemble([Linear(3, 4), Linear(1, 0), Linear(0, 2)]), linear_batch(128)
    measured = Trs(smoothness=CLEAN).accumulate(model, [batch], STEP)
    images = batch.images.clone().requires_grad_()
    total = 0.0
    for member in model.members:
        (gradient,) = torch.autograd.grad(F.cross_entropy(member(images), batch.labels), images)
        total += float(2 * gradient.flatten(1).square().sum(1).mean()) / 3
    assert Trs().lambda_b * float(measured["smoothness"]) == pytest.approx(2.5 * total, rel=1e-4)
    assert Trs.mnist().lambda_b * float(measured["smoothness"]) == pytest.approx(5 * 2 * total, rel=1e-4)
    assert (Trs().lambda_a, Trs.mnist().lambda_a) == (40, 10)


def test_the_penalty_is_taken_on_the_half_perturbed_batch() -> None:
    model, batch = make_members("lenet"), some_batch()
    seen: list[Tensor] = []
    model.members[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    objective = Trs(smoothness=Smoothness(eps_start=0.05, eps_end=0.05))
    objective.accumulate(model, [batch], STEP)
    *attacked, clean, last = seen
    assert [len(images) for images in attacked] == [3] * 6
    assert torch.equal(clean, batch.images)
    assert torch.equal(last[:3], batch.images[:3])
    assert 0.049 < float((last[3:] - batch.images[3:]).abs().max()) <= 0.05 + 1e-6


def test_the_radius_follows_the_epoch() -> None:
    model, batch, moved = make_members("lenet"), some_batch(), []
    model.members[0].register_forward_pre_hook(
        lambda _, inputs: (
            moved.append(float((inputs[0].detach()[3:] - batch.images[3:]).abs().max()))
            if len(inputs[0]) == 6
            else None
        )
    )
    for epoch in (0, 1, 2):
        Trs().accumulate(model, [batch], Step(seed=0, number=0, epoch=epoch, epochs=3))
    assert moved == pytest.approx([0, 0.01, 0, 0.02, 0, 0.03], abs=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbed", ["none", "half"])
@pytest.mark.parametrize("network", ["resnet8", "lenet"])
def test_its_gradients_are_those_of_float64_by_hand(network: str, perturbed: Any) -> None:
    """BatchNorm in training mode and max pooling, through the second derivative."""
    model, batch = make_members(network), some_batch()
    objective = Trs(lambda_a=3, lambda_b=0.2, smoothness=Smoothness(perturbed=perturbed))
    penalised = batch.images
    for member in model.members:
        if perturbed == "half":
            member.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    seen: list[Tensor] = []
    objective.accumulate(model, [batch], STEP)
    if perturbed == "half":
        penalised = seen[-1]
    found = gradients(model)
    model.double().zero_grad()

    def gradient(member: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels.double().requires_grad_()
        losses = F.cross_entropy(member(pixels), batch.labels, reduction="none")
        return losses.mean(), torch.autograd.grad(losses.sum(), pixels, create_graph=True)[0].flatten(1)

    (one, first), (two, second) = (gradient(member, batch.images) for member in model.members)
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    lengths = [gradient(member, penalised)[1].square().sum(1).mean() for member in model.members]
    loss = one + two + 3 * cosine.abs().mean() + 0.2 * (lengths[0] + lengths[1])
    loss.backward()
    assert len(found) == len(list(model.parameters()))
    for gained, parameter in zip(found, model.parameters(), strict=True):
        assert parameter.grad is not None
        atol = 2e-3 * float(parameter.grad.abs().max()) + 1e-6
        torch.testing.assert_close(gained.double(), parameter.grad, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("perturbed", ["none", "half", "all"])
def test_the_loss_reported_is_the_sum_of_the_terms_reported(perturbed: Any) -> None:
    objective = Trs(lambda_a=3, lambda_b=0.2, smoothness=Smoothness(perturbed=perturbed, squared=False))
    measured = objective.accumulate(make_members(number=3), [some_batch()], STEP)
    expected = 3 * measured["cross_entropy"] + 3 * measured["similarity"] + 0.2 * measured["smoothness"]
    assert float(measured["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_loss_and_gradients_do_not_depend_on_the_size_of_the_batch() -> None:
    model, batch = make_members("lenet"), some_batch()
    objective = Trs(lambda_b=0.1, smoothness=CLEAN)
    once = objective.accumulate(model, [batch], STEP)
    expected = gradients(model)
    model.zero_grad()
    thrice = Batch(batch.images.repeat(3, 1, 1, 1), batch.labels.repeat(3))
    again = objective.accumulate(model, [thrice], STEP)
    assert all(float(once[name]) == pytest.approx(float(again[name]), rel=1e-4) for name in once)
    for gradient, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["resnet8", "lenet"])
def test_every_parameter_gets_a_finite_gradient(network: str, precision: torch.dtype) -> None:
    model = make_members(network)
    Trs().accumulate(model, [some_batch()], Step(seed=0, number=3, precision=precision))
    assert len(gradients(model)) == len(list(model.parameters()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(model))


def test_training_makes_gradients_orthogonal_and_short() -> None:
    model, batch = Ensemble([Linear(3, 4), Linear(3, 3)]), linear_batch(16)
    objective = Trs(lambda_a=10, lambda_b=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    similarity, smoothness = [], []
    for number in range(60):
        optimizer.zero_grad()
        measured = objective.accumulate(model, [batch], Step(seed=0, number=number))
        similarity.append(float(measured["similarity"]))
        smoothness.append(float(measured["smoothness"]))
        optimizer.step()
    assert similarity[-1] < 0.2 * similarity[0]
    assert smoothness[-1] < 0.5 * smoothness[0]


# ---- paths, cost, bad input ------------------------------------------------------------------------------------------


def test_random_paths_of_a_gated_network_stand_for_members() -> None:
    rgn = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    Trs(paths=2).accumulate(rgn, [some_batch()], STEP)
    assert all(any(p.grad is not None for p in alternatives.parameters()) for alternatives in rgn.bank)
    untouched = [p for p in rgn.bank.parameters() if p.grad is None]
    measured = Trs(paths=2**3, smoothness=CLEAN).accumulate(rgn, [some_batch()], STEP)
    assert 0 < float(measured["similarity"]) < 1
    assert untouched
    assert all(parameter.grad is not None for parameter in untouched)


def test_its_cost_is_what_the_code_runs() -> None:
    assert Trs().forwards(networks=3) == 3 * (6 + 6 * 2 + 6)  # 6 second-order steps on half of the batch, 4 each
    assert Trs(smoothness=Smoothness(perturbed="all", steps=3)).forwards(networks=2) == 2 * (6 + 3 * 4 + 6)
    assert Trs(smoothness=CLEAN).forwards(networks=3) == 18
    assert Trs(paths=2).forwards() == 48


@pytest.mark.parametrize(
    "model", [lambda: build("resnet8", images=SMALL), lambda: Ensemble([build("resnet8", images=SMALL)])]
)
def test_one_member_is_refused(model: Any) -> None:
    with pytest.raises(BadInput, match="trs trains several networks against each other, got 1; set members=3"):
        Trs().check(model())


def test_several_exits_are_refused() -> None:
    with pytest.raises(BadInput, match="trs trains networks with one exit, and SmallCNN has 3"):
        Trs().check(Ensemble([build("small_cnn3", images=SMALL)] * 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_a": -1}, "finite lambda_a >= 0, got -1"),
        ({"lambda_b": math.nan}, "finite lambda_b >= 0, got nan"),
        ({"paths": 1}, "at least 2 paths, got 1"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Trs(**options)
