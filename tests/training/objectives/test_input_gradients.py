from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Step
from training.objectives.input_gradients import Smoothness, cosines, input_gradients
from training.objectives.network import Network
from zoo.errors import BadInput
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)


class Linear(nn.Module):
    """Logits are a matrix times the pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def some_batch(size: int = 6, side: int = 16, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, side, side, generator=generator)
    return images, torch.randint(0, classes, (size,), generator=generator)


def some_network(name: str, **options: Any) -> Network:
    return Network(build(name, images=SMALL, **options).train(), STEP)


def fitted(network: Network) -> Network:
    """Learn a batch a little: a piecewise linear network has no curvature but that of its softmax."""
    images, labels = some_batch(7)
    optimizer = torch.optim.Adam(network.module.parameters(), lr=2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


NETWORKS = {
    "BatchNorm in training mode": lambda: some_network("resnet8", width=4),
    "max pooling": lambda: fitted(some_network("lenet")),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]()


# ---- gradients and cosines -------------------------------------------------------------------------------------------


def test_the_gradients_of_a_linear_model_are_its_weights_times_what_it_got_wrong() -> None:
    weight, (images, labels) = torch.randn(4, 48), some_batch(5, side=4, classes=4)
    logits, gradients = input_gradients(Network(Linear(weight), STEP), images, labels)
    wrong = (images.flatten(1) @ weight.T).softmax(1) - F.one_hot(labels, 4)
    torch.testing.assert_close(gradients, wrong @ weight)
    assert torch.equal(logits, images.flatten(1) @ weight.T)


def test_a_gradient_belongs_to_its_image_whatever_the_batch() -> None:
    network, (images, labels) = some_network("lenet"), some_batch(6)
    _, together = input_gradients(network, images, labels)
    _, alone = input_gradients(network, images[:1], labels[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-7)


def test_cosines_are_those_of_every_pair_in_order() -> None:
    gradients = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[-2.0, 2.0]])]
    torch.testing.assert_close(cosines(gradients), torch.tensor([[1.0], [-(0.5**0.5)], [-(0.5**0.5)]]))


def test_an_image_without_gradient_has_cosine_0_and_passes_none_on() -> None:
    first, second = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4)
    found = cosines([first, second]).sum()
    found.backward()
    assert float(found.detach()) == 0
    assert first.grad is not None
    assert bool(torch.isfinite(first.grad).all())


# ---- the perturbed half ----------------------------------------------------------------------------------------------


def test_half_of_the_batch_stays_and_half_moves_within_the_radius_to_longer_gradients(network: Network) -> None:
    images, labels = some_batch(7)
    smoothness = Smoothness(eps_start=0.05, eps_end=0.05)
    moved = smoothness.images([network], images, labels, STEP)
    assert torch.equal(moved[:3], images[:3])
    assert 0.049 < float((moved[3:] - images[3:]).abs().max()) <= 0.05 + 1e-6
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert not moved.requires_grad

    def total(pixels: Tensor) -> float:
        return float(smoothness.lengths(input_gradients(network, pixels, labels[3:], differentiable=False)[1]).sum())

    assert total(moved[3:]) > 1.05 * total(images[3:])


@pytest.mark.parametrize("squared", [True, False])
def test_on_a_linear_model_of_two_classes_the_perturbation_is_the_corner_towards_the_wrong_class(squared: bool) -> None:
    # the gradient is p_wrong (w_wrong - w_true), longest where p_wrong is largest; 6 steps of eps / 3 reach it anyway
    weight, (images, labels) = torch.randn(2, 48), some_batch(8, side=4, classes=2)
    smoothness = Smoothness(eps_start=0.1, eps_end=0.1, perturbed="all", squared=squared)
    moved = smoothness.images([Network(Linear(weight), STEP)], images, labels, STEP)
    towards = (weight[1 - labels] - weight[labels]).sign().view_as(images)
    torch.testing.assert_close(moved, (images + 0.1 * towards).clamp(0, 1))


@pytest.mark.parametrize("scales", [(1, -10), (-10, 1)])
def test_several_networks_are_perturbed_for_together(scales: tuple[float, float]) -> None:
    # opposite models, one with weights 10 times as long: its gradients decide
    weight, (images, labels) = 0.01 * torch.randn(2, 48), some_batch(8, side=4, classes=2)
    networks = [Network(Linear(scale * weight), STEP, index) for index, scale in enumerate(scales)]
    moved = Smoothness(eps_start=0.1, eps_end=0.1, perturbed="all").images(networks, images, labels, STEP)
    towards = (weight[1 - labels] - weight[labels]).sign().view_as(images)
    torch.testing.assert_close(moved, (images - 0.1 * towards).clamp(0, 1))


@pytest.mark.parametrize(("accumulate", "expected"), [(False, -0.01), (True, 0.03)])
def test_the_release_steps_along_the_sum_of_its_gradients(accumulate: bool, expected: float) -> None:
    class Scripted(Smoothness):
        def _uphill(self, networks: Sequence[Network], images: Tensor, labels: Tensor) -> Tensor:
            return next(script) * torch.ones_like(images)

    # one long gradient, then eleven short ones against it: their sum keeps its sign to the end
    script = iter([10.0] + [-0.5] * 11)
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    radius = abs(expected)
    smoothness = Scripted(eps_start=radius, eps_end=radius, steps=12, perturbed="all", accumulate_gradients=accumulate)
    moved = smoothness.images([some_network("lenet")], images, labels, STEP)
    torch.testing.assert_close(moved - images, torch.full_like(images, expected), rtol=1e-5, atol=1e-7)


def test_without_perturbation_the_images_are_the_batch_itself() -> None:
    images, labels = some_batch()
    assert Smoothness(perturbed="none").images([some_network("lenet")], images, labels, STEP) is images


def test_the_perturbation_fills_no_gradient_and_keeps_modes(network: Network) -> None:
    images, labels = some_batch()
    Smoothness(batch_norm="eval").images([network], images, labels, STEP)
    assert all(parameter.grad is None for parameter in network.module.parameters())
    assert all(module.training for module in network.module.modules())


@pytest.mark.parametrize(("mode", "still"), [("train", False), ("train_frozen", True), ("eval", True)])
def test_running_statistics_move_only_where_batch_norm_says_so(mode: Any, still: bool) -> None:
    network, (images, labels) = some_network("resnet8", width=4), some_batch()
    before = {name: buffer.clone() for name, buffer in network.module.named_buffers()}
    Smoothness(batch_norm=mode).images([network], images, labels, STEP)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.module.named_buffers()) == still


def test_the_radius_grows_from_its_start_to_its_end_in_equal_parts() -> None:
    smoothness = Smoothness(eps_start=0.01, eps_end=0.03)
    radii = [smoothness.eps(Step(seed=0, number=0, epoch=epoch, epochs=5)) for epoch in range(5)]
    assert radii == pytest.approx([0.01, 0.015, 0.02, 0.025, 0.03])
    assert smoothness.eps(Step(seed=0, number=0, epoch=0, epochs=1)) == 0.01


def test_a_radius_of_0_leaves_the_images_where_they_are() -> None:
    images, labels = some_batch()
    moved = Smoothness(eps_start=0, eps_end=0).images([some_network("lenet")], images, labels, STEP)
    torch.testing.assert_close(moved, images)


# ---- the penalty -----------------------------------------------------------------------------------------------------


def test_the_penalty_of_a_linear_model_of_two_classes_by_hand() -> None:
    # w_1 - w_0 = (3, 4, 0, ...), of length 5, and logits 0: p_wrong = 1/2, so ||g|| = 5/2 for every image
    weight = torch.zeros(2, 48)
    weight[0, :2], weight[1, :2] = torch.tensor([-1.5, -2.0]), torch.tensor([1.5, 2.0])
    images, labels = torch.zeros(4, 3, 4, 4), torch.tensor([0, 1, 1, 0])
    _, gradients = input_gradients(Network(Linear(weight), STEP), images, labels, differentiable=False)
    assert float(Smoothness(squared=True).penalty(gradients)) == pytest.approx(2 * 2.5**2)
    assert float(Smoothness(squared=False).penalty(gradients)) == pytest.approx(2 * 2.5)


def test_the_factor_2_is_the_mean_over_pairs_of_both_members_penalties() -> None:
    lengths = [0.3, 1.7, 0.9]
    pairs = [first + second for first, second in itertools.combinations(lengths, 2)]
    mean = sum(2 * length for length in lengths) / len(lengths)
    assert sum(pairs) / len(pairs) == pytest.approx(mean)


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty_does_not_depend_on_the_size_of_the_batch(squared: bool) -> None:
    network, (images, labels) = some_network("lenet"), some_batch()
    smoothness = Smoothness(squared=squared)
    _, once = input_gradients(network, images, labels)
    _, thrice = input_gradients(network, images.repeat(3, 1, 1, 1), labels.repeat(3))
    torch.testing.assert_close(smoothness.penalty(once), smoothness.penalty(thrice))


def test_the_gradient_of_the_penalty_for_the_weights_is_that_of_float64(network: Network) -> None:
    images, labels = some_batch()
    Smoothness().penalty(input_gradients(network, images, labels)[1]).backward()
    found = {name: p.grad.clone() for name, p in network.module.named_parameters() if p.grad is not None}
    assert found
    twin = network.module.double().train()
    twin.zero_grad()
    pixels = images.double().requires_grad_(True)
    losses = F.cross_entropy(twin(pixels), labels, reduction="none")
    (gradients,) = torch.autograd.grad(losses.sum(), pixels, create_graph=True)
    (2 * gradients.flatten(1).norm(dim=1).square().mean()).backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-3, atol=1e-3 * scale + 1e-9)


def test_bfloat16_forward_passes_give_nearly_the_same_gradients_in_float32(network: Network) -> None:
    images, labels = some_batch()
    half = dataclasses.replace(network, step=dataclasses.replace(STEP, precision=torch.bfloat16))
    parameters = list(network.module.parameters())
    found = []
    for one in (network, half):
        _, gradients = input_gradients(one, images, labels)
        assert gradients.dtype == torch.float32
        penalty = Smoothness().penalty(gradients)
        flat = torch.autograd.grad(penalty, parameters, allow_unused=True)
        found.append(torch.cat([part.flatten() for part in flat if part is not None]))
    assert float(F.cosine_similarity(*found, dim=0)) > 0.95


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps_start": 8}, "got 8 and 0.03; .*write 0.03, not 8"),
        ({"eps_end": -0.1}, "got 0.01 and -0.1"),
        ({"steps": 0}, "at least 1 step, got 0; set perturbed='none'"),
        ({"perturbed": "most"}, "one of half, all, none, got 'most'"),
        ({"batch_norm": "frozen"}, "one of train, train_frozen, eval, got 'frozen'"),
    ],
)
def test_a_smoothness_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Smoothness(**options)
