from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bumpy import Bumpy, generator
from torch import Tensor, nn

from zoo.attacks import InputDiversity, LinfBudget, fgsm, pgd
from zoo.errors import BadInput
from zoo.networks import ImageFormat, build

EPS = 0.05
Attack = Callable[..., Tensor]


class HalfSpace(nn.Module):
    """Class 1 where weight . image > boundary, else class 0; a third class is far away."""

    def __init__(self, weight: Tensor, boundary: float) -> None:
        super().__init__()
        self.weight, self.boundary = nn.Parameter(weight), boundary

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight - self.boundary
        return torch.stack([torch.zeros_like(score), score, torch.full_like(score, -1e3)], 1)


@pytest.fixture
def bumpy() -> Bumpy:
    return Bumpy(classes=5).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 3, 8, 8, generator=generator(3), dtype=torch.float64)


@pytest.fixture
def labels(bumpy: Bumpy, images: Tensor) -> Tensor:
    """What the network answers before any attack: every image starts out correct."""
    return bumpy(images).argmax(1)


def pgd_of(**options: object) -> Attack:
    fields = {
        name: options.pop(name) for name in ("eps", "steps", "step_size", "restarts", "random_start") if name in options
    }
    budget = LinfBudget(**{"eps": EPS, **fields})  # type: ignore[arg-type]
    return lambda model, images, labels: pgd(model, images, labels, budget, generator=generator(), **options)  # type: ignore[arg-type]


def fgsm_of(eps: float = EPS) -> Attack:
    return lambda model, images, labels: fgsm(model, images, labels, LinfBudget(eps=eps))


ATTACKS = {
    "fgsm": fgsm_of(),
    "pgd": pgd_of(),
    "pgd from the image": pgd_of(random_start=False),
    "pgd with restarts": pgd_of(restarts=3),
    "pgd with long steps": pgd_of(step_size=4 * EPS),
    "pgd on the margin": pgd_of(loss="margin"),
    "pgd on the ratio of differences": pgd_of(loss="dlr"),
    "pgd that keeps the first broken": pgd_of(keep="first broken", restarts=2),
    "pgd with momentum": pgd_of(momentum=1.0),
    "pgd with input diversity": pgd_of(momentum=1.0, diversity=InputDiversity(smallest=0.75)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_on_a_half_space_every_attack_reaches_the_closed_form_optimum(name: str) -> None:
    """Exactly; with input diversity, whose gradients belong to shrunk images, four fifths of the way."""
    weight = torch.randn(48, generator=generator(1))
    images = torch.rand(6, 3, 4, 4, generator=generator(2))
    optimum = (images + EPS * weight.sign().view(3, 4, 4)).clamp(0, 1)
    model = HalfSpace(weight, float((optimum.flatten(1) @ weight).max()) + 1)  # out of reach: no attempt ends early
    adversarial = ATTACKS[name](model, images, torch.zeros(6, dtype=torch.int64))
    if name == "pgd with input diversity":
        gained, most = (((found - images).flatten(1) @ weight) for found in (adversarial, optimum))
        assert bool((gained >= 0.8 * most).all())
    else:
        torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make", [fgsm_of, lambda eps: pgd_of(eps=eps), lambda eps: pgd_of(eps=eps, random_start=False)]
)
@pytest.mark.parametrize(("share", "flips"), [(0.5, False), (0.99, False), (1.01, True), (2.0, True)])
def test_a_half_space_flips_exactly_when_the_budget_reaches_the_boundary(
    make: Callable[[float], Attack], share: float, flips: bool
) -> None:
    weight = torch.randn(48, generator=generator(1))
    images = 0.4 + 0.2 * torch.rand(1, 3, 4, 4, generator=generator(2))  # too far from 0 and 1 to be clipped
    distance = 0.1
    boundary = float(images.flatten() @ weight) + distance * float(weight.abs().sum())
    model = HalfSpace(weight, boundary)
    adversarial = make(share * distance)(model, images, torch.zeros(1, dtype=torch.int64))
    assert int(model(images).argmax()) == 0
    assert bool(model(adversarial).argmax() == 1) == flips


def test_a_layer_in_training_mode_is_refused_by_its_name(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    bumpy.train()
    with pytest.raises(BadInput, match=r"BatchNorm2d 'layers\.1'"):
        fgsm_of()(bumpy, images, labels)


def test_restarts_are_repeatable_from_the_generator(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS, steps=3, restarts=3)
    state = torch.get_rng_state()
    first, again, other = (pgd(bumpy, images, labels, budget, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def test_restarts_never_help_the_defender(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    accuracies, broken = [], torch.zeros(len(images), dtype=torch.bool)
    for restarts in (1, 2, 4, 8):
        adversarial = pgd(
            bumpy, images, labels, LinfBudget(eps=0.1, steps=1, restarts=restarts), generator=generator(7)
        )
        now = bumpy(adversarial).argmax(1) != labels
        assert (now | ~broken).all(), "an image that fewer restarts broke must stay broken"
        broken = now
        accuracies.append(accuracy(bumpy, adversarial, labels))
    assert accuracies == sorted(accuracies, reverse=True)
    assert 0 < accuracies[-1] < accuracies[0], "the budget must be one at which restarts matter"


def test_many_steps_are_no_weaker_than_one_and_a_large_budget_beats_the_network(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    one, many = (accuracy(bumpy, make(eps=0.02)(bumpy, images, labels), labels) for make in (fgsm_of, pgd_of))
    assert many <= one < 1
    assert accuracy(bumpy, pgd_of(eps=0.5)(bumpy, images, labels), labels) == 0.0


@pytest.mark.parametrize("attack", [fgsm_of(), pgd_of(random_start=False), pgd_of(random_start=False, restarts=2)])
def test_an_image_is_attacked_alike_in_any_batch(attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    together = attack(bumpy, images, labels)
    for index in range(len(images)):
        alone = attack(bumpy, images[index : index + 1], labels[index : index + 1])
        torch.testing.assert_close(alone, together[index : index + 1])


def test_a_confident_network_still_gives_a_gradient_to_every_image() -> None:
    torch.manual_seed(0)
    model = build("lenet", images=ImageFormat(height=16, width=16)).eval()
    images = torch.rand(200, 3, 16, 16)
    labels = model(images).argmax(1)
    adversarial = fgsm(lambda batch: model(batch) * 200, images, labels, LinfBudget(eps=EPS))
    assert ((adversarial - images).abs().amax((1, 2, 3)) > 0).float().mean() > 0.5


def test_every_step_can_be_watched(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    budget = LinfBudget(eps=EPS, steps=4, random_start=False)
    result = pgd(bumpy, images, labels, budget, watch=lambda *step: seen.append(step))
    assert [number for number, _, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(seen[0][2], bumpy(images).detach())
    torch.testing.assert_close(seen[3][2], bumpy(seen[2][1]).detach())
    assert torch.equal(seen[3][1], result)


@pytest.mark.parametrize("pixel", [-0.01, 1.01, 255.0, math.nan])
def test_pixels_outside_the_range_are_refused_with_the_range_found(pixel: float, bumpy: Bumpy) -> None:
    images = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    images[0, 0, 0, 0] = pixel
    with pytest.raises(BadInput, match=f"{pixel:g}"):
        fgsm_of()(bumpy, images, torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, "need 0 <= eps <= 1, got 8; .*write 8/255, not 8"),
        ({"eps": -0.1}, "need 0 <= eps <= 1"),
        ({"eps": math.nan}, "need 0 <= eps <= 1"),
        ({"step_size": 2}, "need 0 < step_size <= 1, got 2; .*write 2/255, not 2"),
        ({"step_size": 0}, "need 0 < step_size"),
        ({"steps": 0}, "at least 1 step and 1 restart, got steps=0"),
        ({"restarts": 0}, "at least 1 step and 1 restart, got .*restarts=0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        LinfBudget(**options)  # type: ignore[arg-type]


def test_a_step_is_a_fifth_of_the_radius_unless_given() -> None:
    assert LinfBudget(eps=0.05).step == pytest.approx(0.01)
    assert LinfBudget(eps=0.05, step_size=0.002).step == 0.002


def test_first_broken_goes_on_without_the_images_that_are_broken(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    sizes: list[int] = []

    def counted(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return bumpy(pixels)

    budget = LinfBudget(eps=0.5, steps=20, restarts=2)
    found = pgd(counted, images, labels, budget, keep="first broken", generator=generator())
    assert accuracy(bumpy, found, labels) == 0.0
    assert sizes[0] == len(images)
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 20 * len(images)


def test_a_start_is_brought_into_the_ball_and_must_be_shaped_like_the_images(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    budget = LinfBudget(eps=EPS, steps=1)
    found = pgd(bumpy, images, labels, budget, start=torch.ones_like(images))
    assert float((found - images).abs().max()) <= EPS
    with pytest.raises(BadInput, match=r"\(1, 3, 8, 8\)"):
        pgd(bumpy, images, labels, budget, start=images[:1])


def test_input_diversity_that_never_shrinks_is_plain_pgd(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS, random_start=False)
    found = pgd(bumpy, images, labels, budget, diversity=InputDiversity(probability=0))
    assert torch.equal(found, pgd(bumpy, images, labels, budget))


@pytest.mark.parametrize("options", [{"probability": 1.5}, {"probability": -0.1}, {"smallest": 0}, {"smallest": 1.1}])
def test_shares_of_input_diversity_are_in_their_range(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=str(next(iter(options.values())))):
        InputDiversity(**options)
