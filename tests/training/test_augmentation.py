"""torchvision itself is the judge: its private tables and methods are read here, never by the library."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from training.augmentation import (
    AUGMENTATIONS,
    AUGMIX_DEPTH,
    AUGMIX_OPERATIONS,
    AUGMIX_REACH,
    AUGMIX_WIDTH,
    AUTOAUGMENT_REACH,
    CIFAR10_POLICY,
    NUM_LEVELS,
    AugMixDraws,
    AutoAugmentDraws,
    apply_each,
    at_level,
    augmented,
    augmix,
    autoaugment,
    check_augmentation,
    draw_augmix,
    draw_autoaugment,
)
from zoo.data import datasets
from zoo.data.vision import transforms
from zoo.errors import BadInput, UnknownName

METHODS = {"autoaugment": AUTOAUGMENT_REACH, "augmix": AUGMIX_REACH}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(number: int, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (number, channels, height, width), dtype=torch.uint8, generator=generator(seed))


def varied(channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Noise, a faint slope and a plain image: what histograms and contrasts treat differently."""
    slope = (100 + torch.arange(height)[:, None] + torch.arange(width)).to(torch.uint8)
    plain = torch.full((height, width), 77, dtype=torch.uint8)
    rest = torch.stack([slope, plain])[:, None].expand(-1, channels, -1, -1)
    return torch.cat([noise(2, channels, height, width), rest])


def judge(method: str, severity: int = 5) -> Any:
    """Return torchvision's transform."""
    v2 = transforms()
    if method == "autoaugment":
        return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    return v2.AugMix(severity=severity, all_ops=False)


def judged_magnitude(transform: Any, name: str, level: int, negative: bool, height: int, width: int) -> float:
    levels, signed = transform._AUGMENTATION_SPACE[name]
    magnitudes = levels(NUM_LEVELS, height, width)
    if magnitudes is None:
        return 0.0
    return float(magnitudes[level]) * (-1 if signed and negative else 1)


def judged(transform: Any, image: Tensor, name: str, magnitude: float) -> Tensor:
    """Return one image changed by torchvision."""
    changed = transform._apply_image_or_video_transform(
        image, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
    )
    assert isinstance(changed, Tensor)
    return changed


class Scripted:
    """The module torch, but that `rand` and `randint` return what a script says."""

    def __init__(self, script: list[float]) -> None:
        self.script = script

    def draw(self, *_: object, **__: object) -> Tensor:
        return torch.tensor(self.script.pop(0))

    rand = randint = draw

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


YES, NO = -1.0, 2.0  # what torchvision compares with a probability


def torchvisions_module() -> ModuleType:
    return importlib.import_module(transforms().AutoAugment.__module__)


def replay_autoaugment(image: Tensor, draws: AutoAugmentDraws, number: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Run torchvision's AutoAugment on one image with the draws of a batch's image `number`."""
    transform = judge("autoaugment")
    policy = int(draws.subpolicy[number])
    script: list[float] = [policy]
    for step, (name, _, _) in enumerate(CIFAR10_POLICY[policy]):
        applied = bool(draws.applied[step, number])
        script.append(YES if applied else NO)
        if applied and transform._AUGMENTATION_SPACE[name][1]:
            script.append(YES if draws.negative[step, number] else NO)
    with monkeypatch.context() as patch:
        patch.setattr(torchvisions_module(), "torch", Scripted(script))
        changed = transform(image)
    assert not script
    assert isinstance(changed, Tensor)
    return changed


def replay_augmix(image: Tensor, draws: AugMixDraws, number: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Run torchvision's AugMix on one image with the draws of a batch's image `number`."""
    transform = judge("augmix", severity=NUM_LEVELS)
    space = transform._PARTIAL_AUGMENTATION_SPACE
    script: list[float] = []
    for chain in range(AUGMIX_WIDTH):
        depth = int(draws.depth[chain, number])
        script.append(depth)
        for step in range(depth):
            name = AUGMIX_OPERATIONS[int(draws.kind[step, chain, number])]
            script.append(list(space).index(name))
            if name not in ("AutoContrast", "Equalize"):
                script.append(int(draws.level[step, chain, number]))
            if space[name][1]:
                script.append(YES if draws.negative[step, chain, number] else NO)
    original = draws.original[number]
    dirichlet = iter([torch.stack([original, 1 - original])[None], draws.weight[:, number][None]])
    with monkeypatch.context() as patch:
        patch.setattr(torchvisions_module(), "torch", Scripted(script))
        patch.setattr(transform, "_sample_dirichlet", lambda _: next(dirichlet))
        changed = transform(image)
    assert not script
    assert isinstance(changed, Tensor)
    return changed


def assert_agree(found: Tensor, expected: Tensor) -> None:
    """Assert equality, but for rare pixels: sums over a batch may be rounded otherwise than over one image."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.uint8
    assert float((found != expected).double().mean()) <= 1e-3


def assert_frequencies(counts: Tensor, probabilities: Tensor) -> None:
    """Assert that counts are within five standard deviations of what is expected."""
    total = counts.sum()
    deviations = (counts - total * probabilities).abs() / (total * probabilities * (1 - probabilities)).sqrt()
    assert float(deviations.max()) < 5


def uniform(number: int) -> Tensor:
    return torch.full((number,), 1 / number)


# What is drawn from


def test_the_sub_policies_are_torchvisions() -> None:
    theirs = judge("autoaugment")._policies
    assert [[(name, p, level or 0) for name, p, level in steps] for steps in theirs] == [
        list(steps) for steps in CIFAR10_POLICY
    ]


def test_augmix_draws_from_torchvisions_nine_operations_without_colour() -> None:
    assert set(AUGMIX_OPERATIONS) == set(judge("augmix")._PARTIAL_AUGMENTATION_SPACE)
    assert len(AUGMIX_OPERATIONS) == 9


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 20, 30)])
@pytest.mark.parametrize("method", METHODS)
def test_each_operation_at_each_level_is_torchvisions_image_by_image(
    method: str, channels: int, height: int, width: int
) -> None:
    images = varied(channels, height, width)
    transform, reach = judge(method), METHODS[method]
    for name in transform._AUGMENTATION_SPACE:
        for level in range(NUM_LEVELS):
            for negative in (False, True):
                magnitude = judged_magnitude(transform, name, level, negative, height, width)
                found = at_level(name, level, negative, reach, height, width)(images)
                expected = torch.stack([judged(transform, image, name, magnitude) for image in images])
                furthest = int((found.int() - expected.int()).abs().max())
                assert furthest <= (name in ("Contrast", "Sharpness")), (name, level, negative)


def test_an_operation_depends_on_no_other_image() -> None:
    images = noise(60)
    operations = tuple(
        at_level(name, level, False, AUGMIX_REACH, 32, 32) for name in AUGMIX_OPERATIONS for level in (1, 8)
    )
    numbers = torch.randint(len(operations), (60,), generator=generator())
    before = images.clone()
    together = apply_each(images, operations, numbers)
    alone = [operations[number](image[None])[0] for number, image in zip(numbers.tolist(), images, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(images, before)


# What is drawn


def test_autoaugment_draws_sub_policies_steps_and_signs_at_their_frequencies() -> None:
    draws = draw_autoaugment(100_000, generator())
    assert_frequencies(draws.subpolicy.bincount(minlength=25), uniform(25))
    for number, steps in enumerate(CIFAR10_POLICY):
        chosen = draws.applied[:, draws.subpolicy == number].double()
        joint = {(first, second): 0 for first in (0, 1) for second in (0, 1)}
        joint.update(Counter(zip(*chosen.int().tolist(), strict=True)))
        (_, first, _), (_, second, _) = steps
        for (one, two), count in joint.items():
            expected = (first if one else 1 - first) * (second if two else 1 - second)
            assert abs(count / chosen.shape[1] - expected) < 0.045, (number, one, two)
    for negative in draws.negative:
        assert_frequencies(negative.long().bincount(minlength=2), uniform(2))


def test_a_step_of_probability_zero_is_never_taken() -> None:
    draws = draw_autoaugment(100_000, generator())
    (number,) = [number for number, (_, (_, second, _)) in enumerate(CIFAR10_POLICY) if second == 0]
    assert not draws.applied[1, draws.subpolicy == number].any()


@pytest.mark.parametrize("severity", [1, 3, 5, 10])
def test_augmix_draws_operations_depths_levels_and_signs_uniformly(severity: int) -> None:
    draws = draw_augmix(20_000, generator(), severity=severity)
    assert_frequencies(draws.depth.flatten().bincount(minlength=4)[1:], uniform(3))
    assert int(draws.depth.min()) == 1
    assert draws.kind.shape == draws.level.shape == draws.negative.shape == (AUGMIX_DEPTH, AUGMIX_WIDTH, 20_000)
    assert_frequencies(draws.kind.flatten().bincount(), uniform(9))
    assert int(draws.level.max()) == severity - 1
    pairs = (draws.kind * severity + draws.level).flatten().bincount(minlength=9 * severity)
    assert_frequencies(pairs, uniform(9 * severity))
    assert_frequencies(draws.negative.long().flatten().bincount(), uniform(2))


def test_augmix_mixes_chains_by_dirichlet_and_the_image_by_beta() -> None:
    draws = draw_augmix(100_000, generator())
    weight, original = draws.weight.double(), draws.original.double()
    torch.testing.assert_close(weight.sum(0), torch.ones(100_000).double(), rtol=0, atol=1e-6)
    assert float(weight.min()) >= 0
    # Dirichlet(1, 1, 1): mean 1/3, variance 1/18, covariance -1/36, P(w > t) = (1 - t)**2.
    torch.testing.assert_close(weight.mean(1), torch.full((3,), 1 / 3).double(), rtol=0, atol=0.004)
    covariance = torch.full((3, 3), -1 / 36).double().fill_diagonal_(1 / 18)
    torch.testing.assert_close(weight.cov(), covariance, rtol=0, atol=0.001)
    for threshold in (0.1, 0.5, 0.9):
        for values in weight:
            assert abs(float((values > threshold).double().mean()) - (1 - threshold) ** 2) < 0.008
        assert abs(float((original > threshold).double().mean()) - (1 - threshold)) < 0.008
    assert abs(float(torch.corrcoef(torch.stack([original, weight[0]]))[0, 1])) < 0.02


# What comes of it


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 20, 30)])
def test_autoaugment_is_torchvisions_for_the_same_draws(
    channels: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = varied(channels, height, width).repeat(50, 1, 1, 1)
    draws = draw_autoaugment(len(images), generator())
    assert set(draws.subpolicy.tolist()) == set(range(25))
    expected = [replay_autoaugment(image, draws, number, monkeypatch) for number, image in enumerate(images)]
    assert_agree(autoaugment(images, draws), torch.stack(expected))


@pytest.mark.parametrize("severity", [3, 5, 10])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 20, 30)])
def test_augmix_is_torchvisions_for_the_same_draws(
    channels: int, height: int, width: int, severity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = varied(channels, height, width).repeat(12, 1, 1, 1)
    draws = draw_augmix(len(images), generator(), severity=severity)
    expected = [replay_augmix(image, draws, number, monkeypatch) for number, image in enumerate(images)]
    assert_agree(augmix(images, draws), torch.stack(expected))


def outcomes_of_torchvision(image: Tensor) -> Iterator[tuple[bytes, float]]:
    """Yield what AutoAugment can make of an image and how probable each way to it is."""
    transform = judge("autoaugment")

    def ways(name: str, probability: float, level: int) -> list[tuple[float, str, float]]:
        signed = transform._AUGMENTATION_SPACE[name][1]
        signs = (False, True) if signed else (False,)
        magnitudes = [judged_magnitude(transform, name, level, negative, *image.shape[1:]) for negative in signs]
        return [(1 - probability, "Identity", 0.0), *((probability / len(signs), name, each) for each in magnitudes)]

    for first, second in transform._policies:
        for one, name, magnitude in ways(*first):
            halfway = judged(transform, image, name, magnitude)
            for two, other, its_magnitude in ways(*second):
                yield judged(transform, halfway, other, its_magnitude).numpy().tobytes(), one * two / 25


def test_autoaugment_makes_of_an_image_what_torchvision_does_and_as_often() -> None:
    image = noise(1, height=8, width=8)[0]
    probability: Counter[bytes] = Counter()
    for outcome, share in outcomes_of_torchvision(image):
        probability[outcome] += share  # type: ignore[assignment]
    assert sum(probability.values()) == pytest.approx(1)
    number = 40_000
    made = autoaugment(image.expand(number, -1, -1, -1), draw_autoaugment(number, generator()))
    counts = Counter(each.tobytes() for each in made.numpy())
    assert len(probability) > 80
    assert set(counts) <= {outcome for outcome, share in probability.items() if share > 0}
    kinds = list(probability)
    assert_frequencies(
        torch.tensor([counts[kind] for kind in kinds if probability[kind] > 0]),
        torch.tensor([probability[kind] for kind in kinds if probability[kind] > 0]),
    )


def still(batch: int, original: float) -> AugMixDraws:
    """Draws whose chains move every image by nothing."""
    steps = (AUGMIX_DEPTH, AUGMIX_WIDTH, batch)
    nothing = torch.full(steps, AUGMIX_OPERATIONS.index("TranslateX"))
    depth = torch.full(steps[1:], AUGMIX_DEPTH)
    weight = draw_augmix(batch, generator()).weight
    zero = torch.zeros(steps, dtype=torch.int64)
    return AugMixDraws(depth, nothing, zero, zero.bool(), weight, torch.full((batch,), original))


def test_augmix_with_all_weight_on_the_image_returns_it() -> None:
    images = noise(20)
    draws = draw_augmix(20, generator())
    alone = AugMixDraws(draws.depth, draws.kind, draws.level, draws.negative, draws.weight, torch.ones(20))
    assert torch.equal(augmix(images, alone), images)


def test_augmix_of_chains_that_do_nothing_is_the_image_but_for_truncation() -> None:
    images = noise(20)
    lost = images.int() - augmix(images, still(20, 0.3)).int()
    assert int(lost.min()) >= 0
    assert int(lost.max()) <= 1


def test_a_chain_goes_no_deeper_than_drawn() -> None:
    images = noise(10)
    solarize = torch.full((AUGMIX_DEPTH, AUGMIX_WIDTH, 10), AUGMIX_OPERATIONS.index("Solarize"))
    level = torch.full_like(solarize, NUM_LEVELS - 1)  # inverts everything
    weight = torch.eye(AUGMIX_WIDTH)[0][:, None].expand(-1, 10)
    for depth in (1, 2, 3):
        draws = AugMixDraws(torch.full((AUGMIX_WIDTH, 10), depth), solarize, level, level < 0, weight, torch.zeros(10))
        assert torch.equal(augmix(images, draws), images if depth == 2 else 255 - images)


# augmented


def test_none_returns_the_images_and_draws_nothing() -> None:
    pixels, drawn = noise(5), generator()
    (same,) = augmented("none", pixels, drawn, flip=True)
    assert torch.equal(same, pixels)
    assert torch.equal(drawn.get_state(), generator().get_state())


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_is_what_it_always_was(flip: bool) -> None:
    pixels = noise(16)
    (cropped,) = augmented("crop_flip", pixels, generator(), flip=flip)
    assert torch.equal(cropped, datasets.augment(pixels, generator(), flip=flip))


def cases() -> list[tuple[str, int]]:
    return [(name, views) for name, able in AUGMENTATIONS.items() for views in able]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "views"), cases())
def test_every_view_has_the_shape_and_type_of_the_images(name: str, views: int, channels: int) -> None:
    for number in (1, 7):
        pixels = noise(number, channels, 12, 16)
        batches = augmented(name, pixels, generator(), flip=True, views=views)
        assert len(batches) == views
        assert all(batch.shape == pixels.shape and batch.dtype == torch.uint8 for batch in batches)


@pytest.mark.parametrize(("name", "views"), cases())
def test_augmentation_is_a_function_of_the_generator_and_leaves_the_rest_alone(name: str, views: int) -> None:
    pixels = noise(24)
    before, state = pixels.clone(), torch.get_rng_state()
    torch.manual_seed(1)
    first = augmented(name, pixels, generator(3), flip=True, views=views)
    torch.manual_seed(2)
    second = augmented(name, pixels, generator(3), flip=True, views=views)
    other = augmented(name, pixels, generator(4), flip=True, views=views)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(2).get_state())
    torch.set_rng_state(state)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert name == "none" or not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("flip", [False, True])
def test_autoaugment_and_augmix_start_from_the_crop_that_crop_flip_draws(flip: bool) -> None:
    pixels, drawn = noise(40), generator()
    cropped = datasets.augment(pixels, drawn, flip=flip)
    expected = autoaugment(cropped, draw_autoaugment(40, drawn))
    assert torch.equal(augmented("autoaugment", pixels, generator(), flip=flip)[0], expected)
    clean, first, second = augmented("augmix", pixels, generator(), flip=flip, views=3)
    assert torch.equal(clean, cropped)
    drawn = generator()
    datasets.augment(pixels, drawn, flip=flip)
    draws = draw_augmix(80, drawn)
    assert torch.equal(torch.cat([first, second]), augmix(cropped.repeat(2, 1, 1, 1), draws))
    differ = [(one != two).flatten(1).any(1) for one, two in ((clean, first), (clean, second), (first, second))]
    assert all(int(each.sum()) > 30 for each in differ)


def test_augmix_severity_limits_how_far_an_image_changes() -> None:
    pixels = varied().repeat(30, 1, 1, 1)
    changes = []
    for severity in (1, 5, 10):
        clean, mixed, _ = augmented("augmix", pixels, generator(), flip=False, views=3, severity=severity)
        changes.append(float((clean.double() - mixed.double()).abs().mean()))
    assert changes[0] < changes[1] < changes[2]


def test_autoaugments_colour_leaves_grey_images_as_they_are() -> None:
    grey = noise(4, channels=1)
    assert torch.equal(at_level("Color", 9, False, AUTOAUGMENT_REACH, 32, 32)(grey), grey)


# Refusals


def test_an_unknown_augmentation_is_refused_with_the_known_ones() -> None:
    expected = r"augmentation 'augmax'; did you mean 'augmix'\? \(known: augmix, autoaugment, crop_flip, none\)"
    with pytest.raises(UnknownName, match=expected):
        augmented("augmax", noise(1), generator(), flip=True)


@pytest.mark.parametrize(("name", "views", "able"), [("crop_flip", 3, "1"), ("autoaugment", 3, "1"), ("none", 3, "1")])
def test_views_that_an_augmentation_cannot_make_are_refused_with_one_that_can(name: str, views: int, able: str) -> None:
    with pytest.raises(BadInput, match=f"{name} makes {able} views of an image, not {views}; 3 views come from augmix"):
        check_augmentation(name, views=views)


@pytest.mark.parametrize("views", [0, 2, 4])
def test_augmix_makes_one_view_or_three(views: int) -> None:
    with pytest.raises(BadInput, match=f"augmix makes 1 or 3 views of an image, not {views}$"):
        augmented("augmix", noise(1), generator(), flip=True, views=views)


@pytest.mark.parametrize("severity", [0, 11])
def test_a_severity_out_of_range_is_refused(severity: int) -> None:
    with pytest.raises(BadInput, match=f"severity is 1 to 10, got {severity}"):
        augmented("augmix", noise(1), generator(), flip=True, severity=severity)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pixels_that_are_not_bytes_in_a_batch_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"takes uint8 pixels .*, got torch.float32 of shape \(2, 3, 8, 8\)"):
        augmented(name, torch.rand(2, 3, 8, 8), generator(), flip=True)
    with pytest.raises(BadInput, match=r"got torch.uint8 of shape \(3, 32, 32\)"):
        augmented(name, noise(1)[0], generator(), flip=True)


@pytest.mark.parametrize("name", ["autoaugment", "augmix"])
def test_images_that_are_neither_grey_nor_in_colour_are_refused_where_it_matters(name: str) -> None:
    with pytest.raises(BadInput, match=f"{name} takes grey or colour images of 1 or 3 channels, got 4"):
        augmented(name, noise(1, channels=4), generator(), flip=True)
    assert augmented("crop_flip", noise(1, channels=4), generator(), flip=True)[0].shape[1] == 4


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "views"), cases())
def test_a_gpu_makes_the_same_of_the_same_draws(name: str, views: int) -> None:
    pixels = noise(64)
    expected = augmented(name, pixels, generator(), flip=True, views=views)
    found = augmented(name, pixels.cuda(), generator(), flip=True, views=views)
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda
        assert float(((one.cpu().int() - other.int()).abs() <= 1).double().mean()) > 0.99
