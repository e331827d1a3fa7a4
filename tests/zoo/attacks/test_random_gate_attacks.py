from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from bumpy import generator
from torch import Tensor, nn

from zoo import paths
from zoo.attacks import LinfBudget, pgd
from zoo.attacks.outputs import Model
from zoo.attacks.random_gates import arc, eot_pgd, path_model, path_sampler, relaxed_model
from zoo.errors import BadInput, UnknownName
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build

pytestmark = pytest.mark.filterwarnings("ignore:.*single gated layer:zoo.errors.GatingWarning")

EPS = 0.1


class Half(nn.Module):
    """Two classes of a plane: class 1 where weight . (first two pixels) > boundary."""

    def __init__(self, weight: tuple[float, float], boundary: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.boundary = boundary

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1)[:, :2] @ self.weight - self.boundary
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def rgn() -> RandomGatedNetwork:
    network = build("lenet", images=ImageFormat(height=16, width=16)).eval()
    return randomly_gate(network, candidates=2, generator=generator(5)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=generator(1))


@pytest.fixture
def labels(rgn: RandomGatedNetwork, images: Tensor) -> Tensor:
    return rgn(images, [0] * rgn.num_gates).argmax(1)


def alternating(*models: Model) -> Callable[[], Model]:
    turn = itertools.cycle(models)
    return lambda: next(turn)


def test_one_draw_of_a_network_with_one_candidate_is_pgd(images: Tensor) -> None:
    network = build("lenet", images=ImageFormat(height=16, width=16)).eval()
    rgn = RandomGatedNetwork(network, candidates=1).eval()
    labels = rgn(images, [0] * rgn.num_gates).argmax(1)
    budget = LinfBudget(eps=0.02, steps=7)
    sampler = path_sampler(rgn, random.Random(0), folded=False)
    found = eot_pgd(sampler, images, labels, budget, draws=1, generator=generator(3))
    plain = pgd(path_model(rgn, [0] * rgn.num_gates, folded=False), images, labels, budget, generator=generator(3))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("average", ["gradient", "loss", "probability", "sign"])
@pytest.mark.parametrize("draws", [1, 4])
def test_on_a_random_linear_model_eot_reaches_the_optimum_of_the_mean(average: str, draws: int) -> None:
    """Both draws rise along the first pixel; they disagree about the second, the first of them more strongly."""
    images = torch.full((3, 1, 1, 2), 0.5)
    models = (Half((1.0, 0.5), 3.0), Half((1.0, -0.2), 3.0))
    labels = torch.zeros(3, dtype=torch.int64)
    found = eot_pgd(
        alternating(*models),
        images,
        labels,
        LinfBudget(eps=EPS, steps=20),
        draws=2 * draws,
        average=average,  # type: ignore[arg-type]
        generator=generator(),
    )
    moved = (found - images).flatten(1)
    torch.testing.assert_close(moved[:, 0], torch.full((3,), EPS))
    if average != "sign":  # signs of 0.5 and -0.2 cancel
        torch.testing.assert_close(moved[:, 1], torch.full((3,), EPS))


def test_arc_fools_a_member_where_pgd_on_the_expected_loss_provably_fools_none() -> None:
    """The members' gradients are opposite, and the steeper one belongs to the member that is out of reach.

    The expected loss so rises away from the boundary that can be reached. ARC steps to it, since it asks each member
    for its nearest boundary: one of two members is fooled, and the expected accuracy falls from 1 to 1/2.
    """
    images = torch.full((1, 1, 1, 2), 0.5)
    near = Half((1.0, 0.0), 0.55)  # class 1 for a first pixel above 0.55
    far = Half((-20.0, 0.0), -7.0)  # class 1 for a first pixel below 0.35
    models, labels = [near, far], torch.tensor([0])

    def expected(adversarial: Tensor) -> float:
        return sum(float((model(adversarial).argmax(1) == labels).float().mean()) for model in models) / 2

    budget = LinfBudget(eps=EPS, steps=20, random_start=False)
    for average in ("gradient", "loss"):
        averaged = eot_pgd(alternating(*models), images, labels, budget, draws=2, average=average)  # type: ignore[arg-type]
        assert expected(averaged) == 1.0
    picked = arc(models, images, labels, budget)
    assert expected(picked) == 0.5
    assert float((picked - images).abs().max()) <= EPS + 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_arc_never_raises_the_expected_accuracy_of_random_members(seed: int) -> None:
    draw = generator(seed)
    models = [Half(tuple(torch.randn(2, generator=draw).tolist()), 0.0) for _ in range(5)]  # type: ignore[arg-type]
    images = torch.rand(20, 1, 1, 2, generator=draw)
    labels = torch.randint(0, 2, (20,), generator=draw)

    def expected(adversarial: Tensor) -> Tensor:
        return torch.stack([(model(adversarial).argmax(1) == labels).float() for model in models]).mean(0)

    before = expected(images)
    adversarial = arc(models, images, labels, LinfBudget(eps=EPS, steps=5), generator=draw)
    assert bool((expected(adversarial) <= before).all())
    assert bool((expected(adversarial) < before).any())


def test_arc_on_one_linear_member_breaks_exactly_what_is_within_reach() -> None:
    weight = (0.6, 0.4)
    images = torch.full((2, 1, 1, 2), 0.5)
    distance = [0.09, 0.11]  # in l_inf: (boundary - score) / |weight|_1
    for index, eps_needed in enumerate(distance):
        model = Half(weight, 0.5 + eps_needed)
        adversarial = arc([model], images[index : index + 1], torch.tensor([0]), LinfBudget(eps=EPS, steps=3))
        assert bool(model(adversarial).argmax(1) == 1) == (eps_needed < EPS)


def test_relaxed_gates_average_the_outputs_of_the_candidates(images: Tensor) -> None:
    """With one gated layer that is linear in its weights, and all else shared, that is checkable by hand."""
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.conv(pixels).mean((2, 3))

    gated = randomly_gate(Linear(), candidates=3, generator=generator(1)).eval()
    answers = torch.stack([gated(images, [candidate]) for candidate in range(3)])
    torch.testing.assert_close(relaxed_model(gated)(images), answers.mean(0))
    equal = randomly_gate(Linear(), candidates=2, start="copy")
    torch.testing.assert_close(relaxed_model(equal.eval())(images), equal(images, [1]))


def test_an_attack_on_gates_leaves_the_network_as_it_was(
    rgn: RandomGatedNetwork, images: Tensor, labels: Tensor
) -> None:
    state = {name: tensor.clone() for name, tensor in rgn.state_dict().items()}
    before = torch.get_rng_state()
    sampler = path_sampler(rgn, random.Random(0))
    results = [
        eot_pgd(sampler, images, labels, LinfBudget(eps=EPS, steps=3), draws=2, generator=generator()),
        arc([sampler(), sampler()], images, labels, LinfBudget(eps=EPS, steps=2), generator=generator()),
    ]
    for result in results:
        assert float((result - images).abs().max()) <= EPS + 1e-6
        assert 0 <= float(result.min()) <= float(result.max()) <= 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in rgn.state_dict().items())
    assert all(parameter.grad is None for parameter in rgn.parameters())
    assert not any(module.training for module in rgn.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_at_eps_zero_the_images_come_back(rgn: RandomGatedNetwork, images: Tensor, labels: Tensor) -> None:
    sampler = path_sampler(rgn, random.Random(0))
    still = LinfBudget(eps=0.0, steps=2)
    assert torch.equal(eot_pgd(sampler, images, labels, still, draws=2), images)
    assert torch.equal(arc([sampler()], images, labels, still), images)


def test_a_folded_path_answers_like_the_network_along_it(rgn: RandomGatedNetwork, images: Tensor) -> None:
    path = paths.sample(rgn.num_gates, rgn.candidates, random.Random(3))
    torch.testing.assert_close(path_model(rgn, path)(images), rgn(images, path), rtol=1e-4, atol=1e-5)


def test_requests_that_make_no_sense_are_refused(rgn: RandomGatedNetwork, images: Tensor, labels: Tensor) -> None:
    sampler = path_sampler(rgn, random.Random(0))
    with pytest.raises(BadInput, match="at least 1 draw per step, got 0"):
        eot_pgd(sampler, images, labels, LinfBudget(), draws=0)
    with pytest.raises(UnknownName, match="average 'mean'"):
        eot_pgd(sampler, images, labels, LinfBudget(), average="mean")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="at least one member, got none"):
        arc([], images, labels, LinfBudget())
    with pytest.raises(BadInput, match=r"one positive weight per member, got \[1.0\] for 2 members"):
        arc([sampler(), sampler()], images, labels, LinfBudget(), weights=[1.0])
