"""Square and RayS. Linear models have known optima: the radius is margin / |w|_1, the direction is the sign of w."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from bumpy import Bumpy, generator
from torch import Tensor, nn

from zoo.attacks import L2Budget, LinfBudget
from zoo.attacks.losses import margin
from zoo.attacks.rays import Rays, rays, shortest_rays
from zoo.attacks.square import side_of_square, square
from zoo.errors import BadInput, UnknownName

EPS = 0.05
RADIUS = 0.1
Attack = Callable[..., Tensor]
ATTACKS: dict[str, Attack] = {"square": square, "rays": rays}


class HalfSpace(nn.Module):
    """Two classes: class 1 where weight . image > boundary."""

    def __init__(self, weight: Tensor, boundary: float) -> None:
        super().__init__()
        self.weight, self.boundary = nn.Parameter(weight), boundary

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight - self.boundary
        return torch.stack([torch.zeros_like(score), score], 1)


class Counted:
    """A model that counts how often it is asked, and about how many images."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.calls = 0
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.images += len(images)
        return self.model(images)


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


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


@pytest.fixture
def half_space() -> tuple[HalfSpace, Tensor, Tensor]:
    """A linear model, one image of class 0 that is `RADIUS` away from class 1 and far from 0 and 1, and its label."""
    weight = torch.randn(48, generator=generator(1), dtype=torch.float64)
    image = 0.4 + 0.2 * torch.rand(1, 3, 4, 4, generator=generator(2), dtype=torch.float64)
    boundary = float(image.flatten() @ weight) + RADIUS * float(weight.abs().sum())
    return HalfSpace(weight, boundary), image, torch.zeros(1, dtype=torch.int64)


# --- both ---


@pytest.mark.parametrize(("share", "flips"), [(0.5, False), (0.99, False), (1.02, True), (2.0, True)])
def test_a_half_space_flips_exactly_when_the_budget_reaches_the_boundary(
    attack: Attack, half_space: tuple[HalfSpace, Tensor, Tensor], share: float, flips: bool
) -> None:
    model, image, label = half_space
    adversarial = attack(model, image, label, LinfBudget(eps=share * RADIUS), queries=2000, generator=generator())
    assert int(model(image).argmax()) == 0
    assert bool(model(adversarial).argmax() == 1) == flips


def test_no_image_and_a_broken_image_need_no_search(
    attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    budget = LinfBudget(eps=EPS)
    assert attack(bumpy, images[:0], labels[:0], budget).shape == (0, 3, 8, 8)
    counted = Counted(bumpy)
    assert torch.equal(attack(counted, images, (labels + 1) % 5, budget), images)
    assert counted.images == 12


@pytest.mark.parametrize("training", [False, True])
def test_an_attack_leaves_no_gradient_and_switches_no_mode(
    training: bool, attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    bumpy.train(training)
    for module in bumpy.layers:
        module.train(training and not isinstance(module, nn.BatchNorm2d))  # which attacks refuse in training mode
    modes = [module.training for module in bumpy.modules()]
    before = {name: buffer.clone() for name, buffer in bumpy.named_buffers()}
    given = images.clone().requires_grad_(True)
    attack(bumpy, given, labels, LinfBudget(eps=EPS), queries=20)
    assert given.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bumpy.parameters())
    assert [module.training for module in bumpy.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in bumpy.named_buffers())


def test_no_attack_records_a_graph(attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    recorded = []

    def model(pixels: Tensor) -> Tensor:
        recorded.append(bumpy(pixels).requires_grad)
        return bumpy(pixels)

    attack(model, images, labels, LinfBudget(eps=EPS), queries=20)
    assert not any(recorded)


def test_an_attack_is_repeatable_from_its_generator_and_touches_no_other(
    attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    budget = LinfBudget(eps=0.02)
    state = torch.get_rng_state()
    first, again, other = (
        attack(bumpy, images, labels, budget, queries=40, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_queries_never_help_the_defender_and_a_large_budget_beats_the_network(
    attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    broken, numbers = torch.zeros(len(images), dtype=torch.bool), []
    for queries in (2, 10, 60, 400):
        adversarial = attack(bumpy, images, labels, LinfBudget(eps=EPS), queries=queries, generator=generator(7))
        now = bumpy(adversarial).argmax(1) != labels
        assert (now | ~broken).all(), "an image that fewer queries broke must stay broken"
        broken = now
        numbers.append(int(now.sum()))
    assert numbers[0] < numbers[-1], "the budget must be one at which queries matter"
    adversarial = attack(bumpy, images, labels, LinfBudget(eps=0.5), queries=400, generator=generator(7))
    assert (bumpy(adversarial).argmax(1) != labels).all()


def test_every_unbroken_image_gets_all_its_queries_and_a_broken_one_no_more(
    attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    counted = Counted(bumpy)
    adversarial = attack(counted, images, labels, LinfBudget(eps=EPS), queries=50, generator=generator())
    broken = bumpy(adversarial).argmax(1) != labels
    assert 0 < int(broken.sum()) < len(images)
    assert counted.calls == 50
    assert 50 * int((~broken).sum()) < counted.images < 50 * len(images)


@pytest.mark.parametrize("queries", [1, 2, 3, 7])
def test_queries_are_not_exceeded(attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor, queries: int) -> None:
    counted = Counted(bumpy)
    attack(counted, images, labels, LinfBudget(eps=1e-4), queries=queries)
    assert counted.images == queries * 12


def test_what_cannot_be_attacked_is_refused(attack: Attack, bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS)
    with pytest.raises(BadInput, match="l2"):
        attack(bumpy, images, labels, L2Budget())
    with pytest.raises(BadInput, match="at least 1 query"):
        attack(bumpy, images, labels, budget, queries=0)


# --- Square ---


def test_square_paints_every_pixel_at_an_end_of_its_range_and_reaches_the_optimum_of_a_linear_model(
    half_space: tuple[HalfSpace, Tensor, Tensor],
) -> None:
    model, image, label = half_space
    model.boundary += 100.0  # out of reach
    optimum = image + EPS * model.weight.detach().sign().view(1, 3, 4, 4)
    adversarial = square(model, image, label, LinfBudget(eps=EPS), queries=2500, generator=generator())
    torch.testing.assert_close(adversarial, optimum, rtol=0, atol=1e-12)


def test_squares_reach_the_last_row_and_the_last_column() -> None:
    """Only the last pixel counts, and it starts out wrong for the attack unless a square covers it."""
    weight = torch.zeros(1, 6, 6, dtype=torch.float64)
    weight[0, 5, 5] = 1
    model = HalfSpace(weight.flatten(), boundary=0.5 + 0.9 * EPS)
    images = torch.full((64, 1, 6, 6), 0.5, dtype=torch.float64)
    labels = torch.zeros(64, dtype=torch.int64)
    # p = 0.02 is one pixel: the start gets half of the images right, a square elsewhere none
    adversarial = square(model, images, labels, LinfBudget(eps=EPS), queries=300, share=0.02, generator=generator())
    assert (model(adversarial).argmax(1) == 1).all()


@pytest.mark.parametrize(
    ("number", "side"), [(0, 29), (10, 29), (11, 20), (50, 20), (51, 14), (201, 10), (501, 7), (1001, 5), (8001, 1)]
)
def test_squares_shrink_by_the_published_schedule(number: int, side: int) -> None:
    assert side_of_square(number, 0.8, 32, 32) == side


def test_a_square_fits_into_a_narrow_image() -> None:
    assert side_of_square(0, 1.0, 4, 64) == 4
    model = HalfSpace(torch.ones(3 * 4 * 64), boundary=1e6)
    images = torch.rand(2, 3, 4, 64, generator=generator())
    adversarial = square(
        model, images, torch.zeros(2, dtype=torch.int64), LinfBudget(eps=EPS), queries=80, generator=generator()
    )
    assert float((adversarial > images).float().mean()) > 0.7


def test_the_loss_of_the_incumbents_never_falls(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    result = square(
        bumpy,
        images,
        labels,
        LinfBudget(eps=EPS),
        queries=40,
        early_stop=False,
        generator=generator(),
        watch=lambda *square: seen.append(square),
    )
    assert [number for number, _, _ in seen] == list(range(39))  # the first query is the start's
    for (_, _, before), (_, incumbents, losses) in itertools.pairwise(seen):
        assert (losses >= before).all()
        torch.testing.assert_close(losses, margin(bumpy(incumbents), labels), check_dtype=False)
    assert torch.equal(seen[-1][1], result)


def test_without_early_stopping_the_loss_goes_on_rising(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    stopped, further = (
        square(bumpy, images, labels, LinfBudget(eps=EPS), queries=300, early_stop=early_stop, generator=generator())
        for early_stop in (True, False)
    )
    broken = bumpy(stopped).argmax(1) != labels
    assert broken.any()
    assert (margin(bumpy(further), labels) >= margin(bumpy(stopped), labels))[broken].all()
    assert (margin(bumpy(further), labels) > margin(bumpy(stopped), labels) + 1)[broken].any()


def test_an_images_search_does_not_depend_on_which_others_are_broken(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    budget = LinfBudget(eps=0.03)
    together = square(bumpy, images, labels, budget, queries=80, generator=generator())
    wrong = labels.clone()
    wrong[::2] = (labels[::2] + 1) % 5  # every other image is broken from the start
    among_broken = square(bumpy, images, wrong, budget, queries=80, generator=generator())
    assert torch.equal(among_broken[1::2], together[1::2])
    assert torch.equal(among_broken[::2], images[::2])


def test_a_targeted_square_attack_reaches_its_target(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    targets = (labels + 2) % 5
    for loss in ("margin", "cross_entropy"):
        adversarial = square(
            bumpy, images, labels, LinfBudget(eps=0.3), queries=600, loss=loss, targets=targets, generator=generator()
        )
        assert (bumpy(adversarial).argmax(1) == targets).float().mean() > 0.9


def test_square_does_not_care_about_masked_gradients(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    """The same answers to the same pixels, with no gradient at all, give the same attack."""
    plain = square(bumpy, images, labels, LinfBudget(eps=EPS), queries=60, generator=generator())
    masked = square(
        lambda pixels: bumpy(pixels).detach() * 1000, images, labels, LinfBudget(eps=EPS), queries=60,
        generator=generator(),
    )  # fmt: skip
    assert torch.equal(plain, masked)


def test_square_refuses_what_makes_no_sense(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    budget = LinfBudget(eps=EPS)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(BadInput, match="share of pixels"):
            square(bumpy, images, labels, budget, share=share)
    with pytest.raises(BadInput, match="1 draw"):
        square(bumpy, images, labels, budget, draws=0)
    with pytest.raises(UnknownName, match="margin"):
        square(bumpy, images, labels, budget, loss="margins")


# --- Square on a random model ---


class Lucky:
    """A half space whose score jumps by `luck` in one forward of a hundred, for each image by itself."""

    def __init__(self, model: HalfSpace, luck: float = 1000.0) -> None:
        self.model, self.luck, self.generator = model, luck, generator(5)

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        lucky = torch.rand(len(images), generator=self.generator) < 0.01
        return logits + self.luck * torch.stack([torch.zeros(len(images)), lucky], 1)


@pytest.mark.slow
def test_one_lucky_draw_does_not_stop_the_search_of_a_random_model(
    half_space: tuple[HalfSpace, Tensor, Tensor],
) -> None:
    """Accept-if-better against a score of the past would freeze at the first lucky draw; a half space tells."""
    model, image, label = half_space
    model.boundary += 100.0  # only luck is ever wrong
    weight = model.weight.detach()

    def gain(adversarial: Tensor) -> float:
        """How much of the possible rise of the score was found, -1 to 1."""
        return float((adversarial - image).flatten() @ weight) / (EPS * float(weight.abs().sum()))

    images, labels = image.expand(8, -1, -1, -1), label.expand(8)
    budget = LinfBudget(eps=EPS)
    deceived = square(Lucky(model), images, labels, budget, queries=1500, early_stop=False, generator=generator())
    stopped = square(Lucky(model), images, labels, budget, queries=1500, generator=generator())
    honest = square(Lucky(model), images, labels, budget, queries=1500, draws=2, generator=generator())
    gains = {
        name: torch.tensor([gain(one[None]) for one in adversarial])
        for name, adversarial in {"deceived": deceived, "stopped": stopped, "honest": honest}.items()
    }
    assert float(gains["deceived"].mean()) < 0.7
    assert float(gains["stopped"].mean()) < 0.7
    assert float(gains["honest"].mean()) > 0.9


@pytest.mark.slow
def test_against_noise_draws_are_worth_more_than_more_squares(half_space: tuple[HalfSpace, Tensor, Tensor]) -> None:
    model, image, label = half_space
    weight = model.weight.detach()
    optimum = EPS * float(weight.abs().sum())
    noise = generator(6)

    def noisy(images: Tensor) -> Tensor:
        # a square of one pixel changes the margin by an eighth of the optimum, this by half as much again
        return model(images) + optimum * 0.15 * torch.randn(len(images), 2, generator=noise, dtype=torch.float64)

    images, labels = image.expand(8, -1, -1, -1), label.expand(8)
    gains = []
    for draws, queries in ((1, 8000), (16, 500)):  # as many forwards
        found = square(
            noisy,
            images,
            labels,
            LinfBudget(eps=EPS),
            queries=queries,
            draws=draws,
            early_stop=False,
            generator=generator(),
        )
        gains.append(float(((found - images).flatten(1) @ weight).mean()) / optimum)
    assert gains[0] + 0.1 < gains[1]
    assert gains[1] > 0.65


def test_a_random_model_is_asked_about_candidate_and_incumbent_in_the_same_forwards_and_again_if_it_gains(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    sizes: list[int] = []

    def model(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return bumpy(pixels)

    square(model, images, labels, LinfBudget(eps=EPS), queries=21, draws=3, generator=generator())
    assert all(size % 2 == 0 for size in sizes)
    assert sizes[:3] == [24] * 3  # all twelve, twice: with and without the square
    assert sizes[3] == sizes[4] == sizes[5] < 24  # those that gained by it
    assert 12 * 18 * 3 <= sum(sizes) <= 12 * 21 * 3  # nobody was stopped early


def test_draws_of_a_deterministic_model_change_nothing_but_the_price(
    bumpy: Bumpy, images: Tensor, labels: Tensor
) -> None:
    once, twice = [], []
    for seen, draws, queries in ((once, 1, 31), (twice, 2, 4 * 30)):
        square(
            bumpy,
            images,
            labels,
            LinfBudget(eps=EPS),
            queries=queries,
            draws=draws,
            early_stop=False,
            generator=generator(),
            watch=lambda number, incumbents, losses, seen=seen: seen.append(incumbents),
        )
    assert torch.equal(once[29], twice[29])


# --- parity ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pyautoattack")
def test_square_is_as_strong_as_autoattacks() -> None:
    package = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed; it is an optional peer")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    ).eval()
    images = torch.rand(300, 3, 12, 12, generator=generator(3))
    with torch.no_grad():
        logits = model(images)
        # centred, or an untrained network answers nearly the same to every image
        model[-1].bias -= logits.mean(0)
        labels = model(images).argmax(1)
        confident = model(images).softmax(1).amax(1).topk(200).indices
    images, labels = images[confident], labels[confident]
    eps, queries = 0.04, 300

    def robust(adversarial: Tensor) -> float:
        assert float((adversarial - images).abs().max()) <= eps + 1e-6
        with torch.no_grad():
            return float((model(adversarial).argmax(1) == labels).double().mean())

    own = [
        robust(square(model, images, labels, LinfBudget(eps=eps), queries=queries, generator=generator(seed)))
        for seed in range(2)
    ]
    state = torch.get_rng_state()
    peers = []
    for seed in range(2):
        peer = package.SquareAttack(
            model, norm="Linf", n_queries=queries, eps=eps, p_init=0.8, seed=seed, resc_schedule=False, device="cpu"
        )
        peers.append(robust(peer.perturb(images, labels)))
    torch.set_rng_state(state)
    assert 0.1 < sum(peers) / 2 < 0.9, "the budget must be one that tells the attacks apart"
    assert sum(own) / 2 <= sum(peers) / 2 + 0.03
    assert sum(own) / 2 >= sum(peers) / 2 - 0.10  # stronger is welcome: squares that change nothing are turned over


# --- RayS ---


def test_rays_finds_the_distance_of_a_half_space_and_its_direction(
    half_space: tuple[HalfSpace, Tensor, Tensor],
) -> None:
    model, image, label = half_space
    found = shortest_rays(model, image, label, queries=2000)
    assert float(found.radius) == pytest.approx(RADIUS, abs=1e-3 / math.sqrt(48) * 2)
    assert float(found.radius) >= RADIUS  # a bound from above
    weight = model.weight.detach()
    agreement = float(found.direction.flatten() @ weight) / float(weight.abs().sum())
    assert agreement > 0.999
    assert found.queries.tolist() == [2000]


def test_rays_needs_no_more_queries_than_it_says_until_it_is_close(
    half_space: tuple[HalfSpace, Tensor, Tensor],
) -> None:
    model, image, label = half_space
    found = shortest_rays(model, image, label, queries=5000, enough=1.02 * RADIUS)
    assert RADIUS <= float(found.radius) <= 1.02 * RADIUS
    assert int(found.queries) < 600


def test_rays_looks_at_nothing_but_the_label(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    def labels_only(pixels: Tensor) -> Tensor:
        return nn.functional.one_hot(bumpy(pixels).argmax(1), 5).double() - 1

    budget = LinfBudget(eps=EPS)
    assert torch.equal(
        rays(bumpy, images, labels, budget, queries=80), rays(labels_only, images, labels, budget, queries=80)
    )


def test_rays_without_a_generator_draws_nothing_and_starts_with_all_pixels_brighter() -> None:
    state = torch.get_rng_state()
    model = HalfSpace(torch.ones(12), boundary=6.6)
    image = torch.full((1, 3, 2, 2), 0.5)
    found = shortest_rays(model, image, torch.zeros(1, dtype=torch.int64), queries=14)
    assert torch.equal(found.direction, torch.ones(1, 3, 2, 2))
    assert float(found.radius) == pytest.approx(0.05, abs=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_rays_returns_is_what_it_asked_about(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    asked: list[Tensor] = []

    def model(pixels: Tensor) -> Tensor:
        asked.extend(pixels)
        return bumpy(pixels)

    adversarial = rays(model, images, labels, LinfBudget(eps=EPS), queries=300)
    broken = bumpy(adversarial).argmax(1) != labels
    assert broken.any()
    for image in adversarial[broken]:
        assert any(torch.equal(image, query) for query in asked)


@pytest.mark.parametrize("seed", [None, 4])
def test_every_radius_is_confirmed_and_an_image_is_searched_alike_in_any_batch(
    bumpy: Bumpy, images: Tensor, labels: Tensor, seed: int | None
) -> None:
    def search(rows: slice) -> Rays:
        drawn = None if seed is None else generator(seed)
        return shortest_rays(bumpy, images[rows], labels[rows], queries=100, generator=drawn)

    found = search(slice(None))
    assert found.radius.isfinite().all()
    at_radius = (images + found.radius[:, None, None, None] * found.direction).clamp(0, 1)
    assert (bumpy(at_radius).argmax(1) != labels).all()
    for index in range(len(images)):
        alone = search(slice(index, index + 1))
        assert torch.equal(alone.radius[0], found.radius[index])
        assert torch.equal(alone.direction[0], found.direction[index])


def test_a_direction_that_leads_nowhere_is_replaced() -> None:
    """Class 1 is one corner of the cube: neither all pixels brighter nor a half or a quarter of them lead there."""
    corner = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1])
    model = HalfSpace(corner, boundary=3.5)  # of at most 4, at the corner
    image, label = torch.full((1, 2, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    found = shortest_rays(model, image, label, queries=2500)
    assert torch.equal(found.direction.flatten(), corner)
    assert float(found.radius) == pytest.approx(3.5 / 8, abs=1e-3)


def test_a_model_that_always_answers_the_same_has_an_infinite_radius() -> None:
    images, labels = torch.rand(2, 3, 4, 4, generator=generator()), torch.zeros(2, dtype=torch.int64)

    def constant(pixels: Tensor) -> Tensor:
        return torch.tensor([[1.0, -1.0]]).expand(len(pixels), -1)

    found = shortest_rays(constant, images, labels, queries=200)
    assert found.radius.tolist() == [math.inf] * 2
    assert found.queries.tolist() == [200] * 2
    adversarial = rays(constant, images, labels, LinfBudget(eps=EPS), queries=200)
    assert float((adversarial - images).abs().max()) <= EPS + 1e-6
    assert ((adversarial != images) | (images == 0) | (images == 1)).all()


def test_a_search_that_is_not_done_returns_its_best_direction_at_the_edge_of_the_ball(
    half_space: tuple[HalfSpace, Tensor, Tensor],
) -> None:
    model, image, label = half_space
    budget = LinfBudget(eps=0.9 * RADIUS)
    found = shortest_rays(model, image, label, queries=1000, enough=budget.eps)
    adversarial = rays(model, image, label, budget, queries=1000)
    torch.testing.assert_close(adversarial, image + budget.eps * found.direction)


def test_rays_refuses_what_makes_no_sense(bumpy: Bumpy, images: Tensor, labels: Tensor) -> None:
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="tolerance"):
            shortest_rays(bumpy, images, labels, tolerance=tolerance)
