from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from bumpy import Bumpy, generator
from torch import Tensor, nn

from zoo.attacks import LinfBudget, pgd
from zoo.attacks.apgd import apgd, apgd_eot, apgd_targeted, checkpoints
from zoo.attacks.losses import cross_entropy, dlr, margin
from zoo.attacks.outputs import Model
from zoo.errors import BadInput, UnknownName

EPS = 0.06
Attack = Callable[..., Tensor]


class Linear(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, classes, generator=generator(7)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


@pytest.fixture
def bumpy() -> Bumpy:
    return Bumpy().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(24, 3, 8, 8, generator=generator(3))


@pytest.fixture
def labels(bumpy: Bumpy, images: Tensor) -> Tensor:
    """What the network answers before any attack: every image starts out correct."""
    with torch.no_grad():
        return bumpy(images).argmax(1)


def own(**options: object) -> Attack:
    budget = LinfBudget(**{"eps": EPS, "steps": 20, **options})  # type: ignore[arg-type]
    return lambda model, images, labels: apgd(model, images, labels, budget, generator=generator())


def targeted(**options: object) -> Attack:
    budget = LinfBudget(**{"eps": EPS, "steps": 10, **options})  # type: ignore[arg-type]
    return lambda model, images, labels: apgd_targeted(model, images, labels, budget, generator=generator())


def expected(**options: object) -> Attack:
    budget = LinfBudget(**{"eps": EPS, "steps": 10, **options})  # type: ignore[arg-type]
    return lambda model, images, labels: apgd_eot(lambda: model, images, labels, budget, draws=2, generator=generator())


ATTACKS = {"apgd": own, "targeted": targeted, "eot": expected}


@pytest.fixture(params=ATTACKS)
def attack_of(request: pytest.FixtureRequest) -> Callable[..., Attack]:
    return ATTACKS[request.param]


# --- what holds of every variant ---


def test_the_model_and_the_global_random_numbers_are_left_as_they_were(
    attack_of: Callable[..., Attack], bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    bumpy.layers[0].weight.grad = marker = torch.ones_like(bumpy.layers[0].weight)
    state = {name: tensor.clone() for name, tensor in bumpy.state_dict().items()}
    given, random_numbers = images.clone(), torch.get_rng_state()
    attack_of()(bumpy, images, labels)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch.equal(images, given)
    assert not images.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in bumpy.state_dict().items())
    assert not any(part.training for part in bumpy.modules())
    assert bumpy.layers[0].weight.grad is marker
    assert torch.equal(marker, torch.ones_like(marker))
    assert all(parameter.grad is None for parameter in list(bumpy.parameters())[1:])


def test_the_same_generator_gives_the_same_images(
    attack_of: Callable[..., Attack], bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    attack = attack_of(restarts=2)
    assert torch.equal(attack(bumpy, images, labels), attack(bumpy, images, labels))


def test_an_image_is_attacked_alike_whatever_its_companions(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    attack = own(random_start=False, restarts=1)
    alone = torch.cat([attack(bumpy, images[row : row + 1], labels[row : row + 1]) for row in range(6)])
    assert torch.allclose(attack(bumpy, images, labels)[:6], alone, atol=1e-6)


def test_wrong_settings_are_refused_by_name(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS, steps=5)
    with pytest.raises(UnknownName, match="unknown loss 'drl'; did you mean 'dlr'"):
        apgd(bumpy, images, labels, budget, loss="drl")
    with pytest.raises(UnknownName, match="unknown keep 'last'"):
        apgd(bumpy, images, labels, budget, keep="last")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="num_targets=0; 9 is usual"):
        apgd_targeted(bumpy, images, labels, budget, num_targets=0)
    with pytest.raises(BadInput, match="at least 1 draw at every point, got 0"):
        apgd_eot(lambda: bumpy, images, labels, budget, draws=0)
    with pytest.raises(BadInput, match="its label"):
        apgd(bumpy, images, labels, budget, targets=labels)
    with pytest.raises(BadInput, match="at least 3 classes, got 2; use the margin loss"):
        apgd(
            Linear(2),
            torch.rand(3, 3, 2, 2),
            torch.zeros(3, dtype=torch.int64),
            budget,
            loss="dlr",
            keep="highest loss",
        )


# --- what it finds ---


def two_classes(images: Tensor) -> tuple[Linear, Tensor, Tensor]:
    """Return a linear model of two classes, its labels, and the margin that the best attack leaves them."""
    model = Linear(2)
    with torch.no_grad():
        logits = model(images)
        labels = logits.argmax(1)
        slope = (model.weight[:, 1] - model.weight[:, 0]).reshape(1, 3, 2, 2)
        slope = torch.where((labels == 0)[:, None, None, None], slope, -slope)
        # the optimum within the ball and the pixel range: every pixel at its end
        best = torch.where(slope > 0, (images + EPS).clamp_max(1), (images - EPS).clamp_min(0))
    return model, labels, best


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_on_a_linear_model_it_reaches_the_optimum_in_closed_form(loss: str) -> None:
    images = torch.rand(50, 3, 2, 2, generator=generator(5))
    model, labels, best = two_classes(images)
    budget = LinfBudget(eps=EPS, steps=10)
    found = apgd(model, images, labels, budget, loss=loss, keep="highest loss", generator=generator())
    assert torch.allclose(found, best, atol=1e-6)
    expected_found = apgd_eot(lambda: model, images, labels, budget, draws=1, loss=loss, generator=generator())
    assert torch.allclose(expected_found, best, atol=1e-6)


def test_on_a_linear_model_it_breaks_what_can_be_broken_and_nothing_else() -> None:
    images = torch.rand(300, 3, 2, 2, generator=generator(5))
    model, labels, best = two_classes(images)
    with torch.no_grad():
        possible = model(best).argmax(1) != labels
        assert 10 < int(possible.sum()) < 290
        found = apgd(model, images, labels, LinfBudget(eps=EPS, steps=10), generator=generator())
        assert torch.equal(model(found).argmax(1) != labels, possible)


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_the_highest_loss_never_falls_and_is_that_of_its_point(
    loss: Callable[..., Tensor], bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    budget = LinfBudget(eps=EPS, steps=30)
    found = apgd(
        bumpy,
        images,
        labels,
        budget,
        loss=loss,
        keep="highest loss",
        generator=generator(),
        watch=lambda step, points, losses: seen.append((step, points, losses)),
    )
    assert [step for step, _, _ in seen] == list(range(31))
    for (_, _, before), (_, points, losses) in itertools.pairwise(seen):
        assert bool((losses >= before).all())
        with torch.no_grad():
            assert torch.allclose(loss(bumpy(points), labels), losses, atol=1e-4)
    assert torch.equal(found, seen[-1][1])
    assert bool((seen[-1][2] > seen[0][2]).all())


def test_more_restarts_find_no_lower_loss(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    def reached(restarts: int) -> Tensor:
        budget = LinfBudget(eps=EPS, steps=8, restarts=restarts)
        found = apgd(bumpy, images, labels, budget, keep="highest loss", generator=generator())
        with torch.no_grad():
            return cross_entropy(bumpy(found), labels)

    assert bool((reached(4) >= reached(1) - 1e-5).all())
    assert bool((reached(4) > reached(1)).any())


def test_it_climbs_no_less_than_pgd_with_as_many_steps(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS, steps=50)
    with torch.no_grad():
        plain = cross_entropy(bumpy(pgd(bumpy, images, labels, budget, generator=generator())), labels)
        found = apgd(bumpy, images, labels, budget, keep="highest loss", generator=generator())
        assert float(cross_entropy(bumpy(found), labels).mean()) >= float(plain.mean())


def test_it_stops_at_the_first_success_and_leaves_what_is_wrong_already(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    wrong = labels.clone()
    wrong[:4] = (labels[:4] + 1) % 6
    calls: list[int] = []

    def counted(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return bumpy(pixels)

    found = apgd(counted, images, wrong, LinfBudget(eps=0.3, steps=40), generator=generator())
    assert torch.equal(found[:4], images[:4])
    with torch.no_grad():
        assert bool((bumpy(found).argmax(1) != wrong).all())
    assert calls[:2] == [24, 20]
    assert sum(calls) < 24 * 15


def test_a_target_is_reached_or_not_claimed(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    targets = (labels + 2) % 6
    budget = LinfBudget(eps=0.3, steps=40)
    found = apgd(bumpy, images, labels, budget, loss="margin", targets=targets, generator=generator())
    with torch.no_grad():
        assert float((bumpy(found).argmax(1) == targets).float().mean()) > 0.9


def test_the_targeted_attack_tries_the_likeliest_classes_first_and_only_survivors(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    aims: list[Tensor] = []

    def spying(logits: Tensor, truth: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        aims.append(targets)
        return dlr(logits, truth, targets)

    budget = LinfBudget(eps=0.01, steps=1, random_start=False)
    found = apgd_targeted(bumpy, images, labels, budget, loss=spying, num_targets=3)
    with torch.no_grad():
        ranked = bumpy(images).argsort(dim=1, descending=True)
        robust = bumpy(found).argmax(1) == labels
    assert bool(robust.any())
    assert torch.equal(aims[0], ranked[:, 1])
    starts = aims[::2]  # of each attempt, the start and one step
    assert len(starts) == 3
    assert [len(start) for start in starts] == sorted((len(start) for start in starts), reverse=True)
    if len(starts[2]) == int(robust.sum()):
        assert torch.equal(starts[2], ranked[robust, 3])


def test_the_targeted_attack_breaks_no_fewer_images_than_the_untargeted_one(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    def robust(adversarial: Tensor) -> float:
        with torch.no_grad():
            return float((bumpy(adversarial).argmax(1) == labels).float().mean())

    assert robust(targeted(eps=0.02, steps=30)(bumpy, images, labels)) <= robust(
        own(eps=0.02, steps=30)(bumpy, images, labels)
    )


@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_saturated_logits_stop_cross_entropy_and_no_scale_free_loss(loss: str) -> None:
    """Logits a thousand times too large: the probability of the label is 1, its gradient 0, and nothing is safer."""
    images = torch.rand(24, 3, 8, 8, generator=generator(3))
    saturated = Bumpy(scale=20_000).eval()
    budget = LinfBudget(eps=EPS, steps=20, random_start=False)
    with torch.no_grad():
        labels = saturated(images).argmax(1)

        def robust(loss: str) -> float:
            found = apgd(saturated, images, labels, budget, loss=loss)
            return float((saturated(found).argmax(1) == labels).float().mean())

        assert robust("cross_entropy") > 0.9
        assert robust(loss) < 0.3


# --- the schedule ---


def test_thecheckpoints_are_those_of_the_paper() -> None:
    found = [(step + 1, length) for step, length in enumerate(checkpoints(100)) if length]
    assert found == [(22, 22), (41, 19), (57, 16), (70, 13), (80, 10), (87, 7), (93, 6), (99, 6)]
    assert len(checkpoints(100)) == 101


@pytest.mark.parametrize("steps", [1, 2, 5, 13])
def test_few_steps_havecheckpoints_too(steps: int) -> None:
    assert len(checkpoints(steps)) == steps + 1
    assert checkpoints(steps)[-1] == 0
    assert sum(checkpoints(steps)) <= steps


def test_an_attempt_costs_one_gradient_per_step_and_one_for_its_start(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    calls: list[int] = []

    def counted(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return bumpy(pixels)

    apgd(counted, images, labels, LinfBudget(eps=1e-4, steps=7, restarts=2), generator=generator())
    assert calls == [24] * (1 + 2 * 8)


# --- random models ---


class Pair:
    """A sampler of two linear models that agree about the first pixel and quarrel about the second."""

    def __init__(self, first: tuple[float, float], second: tuple[float, float]) -> None:
        self.models = [self.model(first), self.model(second)]
        self.drawn = 0

    @staticmethod
    def model(slope: tuple[float, float]) -> Model:
        weight = torch.tensor(slope)
        return lambda images: torch.stack([torch.zeros(len(images)), images.flatten(1) @ weight - 1.0], 1)

    def __call__(self) -> Model:
        self.drawn += 1
        return self.models[self.drawn % 2]


def test_eot_climbs_the_mean_loss_and_not_a_lucky_draw() -> None:
    """The mean slope of the second pixel is -0.4; one of the two draws rises along it all the more steeply."""
    images, labels = torch.full((4, 1, 1, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    sampler = Pair((1.0, 1.0), (1.0, -1.8))
    budget = LinfBudget(eps=0.1, steps=9)
    found = apgd_eot(sampler, images, labels, budget, draws=2, loss="margin", generator=generator())
    assert torch.allclose(found, torch.tensor([0.6, 0.4]).expand(4, 1, 1, 2), atol=1e-6)
    assert sampler.drawn == 2 * 10


def test_eot_never_stops_at_a_draw_that_it_fools(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    drawn: list[int] = []

    def sampler() -> Model:
        drawn.append(1)
        return bumpy

    budget = LinfBudget(eps=0.5, steps=6, restarts=2)
    apgd_eot(sampler, images, labels, budget, draws=3, generator=generator())
    assert len(drawn) == 2 * 7 * 3


def test_eot_on_a_model_that_is_not_random_is_apgd(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS, steps=15, restarts=2)
    found = apgd_eot(lambda: bumpy, images, labels, budget, draws=2, generator=generator(4))
    plain = apgd(bumpy, images, labels, budget, keep="highest loss", generator=generator(4))
    assert torch.equal(found, plain)


def test_eots_mean_loss_never_falls(images: Tensor, labels: Tensor) -> None:
    turn = itertools.cycle([Bumpy(seed).eval() for seed in range(4)])
    seen: list[Tensor] = []
    apgd_eot(
        lambda: next(turn),
        images,
        labels,
        LinfBudget(eps=EPS, steps=12),
        draws=3,
        generator=generator(),
        watch=lambda step, points, losses: seen.append(losses),
    )
    assert all(bool((after >= before).all()) for before, after in itertools.pairwise(seen))
