from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from bumpy import generator
from torch import Tensor, nn

from zoo.attacks import L2Budget, LinfBudget
from zoo.attacks.autoattack import ATTACKS, RANDOM_ATTACKS, AutoAttackResult, Version, autoattack, fab, recheck
from zoo.errors import BadInput, UnknownName

EPS = 0.03
BUDGET = LinfBudget(eps=EPS, steps=20)
needs_library = pytest.mark.usefixtures("library")


class Small(nn.Module):
    """A network whose answers some attacks change at EPS and others do not."""

    def __init__(self, classes: int = 6, scale: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(72, classes)
        )
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) * self.scale


@pytest.fixture
def library() -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed; it is the optional extra [autoattack]")


@pytest.fixture
def quick(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library with short attacks: what is tested here does not depend on their strength."""
    import pyautoattack

    class Quick(pyautoattack.AutoAttack):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 5
            self.square.n_queries = 20

    monkeypatch.setattr(pyautoattack, "AutoAttack", Quick)


@pytest.fixture
def model() -> Small:
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(20, 3, 8, 8, generator=generator(3))


@pytest.fixture
def labels(model: Small, images: Tensor) -> Tensor:
    """What the network answers, but for the first two images, which it gets wrong."""
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 6
    return labels


@pytest.fixture
def unchanged(model: Small) -> Iterator[None]:
    """The model and all global random numbers are the same before and after the test."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part.training for part in model.modules())


@pytest.mark.usefixtures("quick", "unchanged")
@pytest.mark.parametrize(("version", "names"), [("standard", ATTACKS), ("rand", RANDOM_ATTACKS)])
def test_it_says_which_attack_broke_which_image_and_leaves_no_trace(
    version: Version, names: tuple[str, ...], model: Small, images: Tensor, labels: Tensor
) -> None:
    lines: list[str] = []
    given = images.clone()
    found = autoattack(model, images, labels, BUDGET, version=version, log=lines.append)
    assert torch.equal(images, given)
    assert tuple(found.robust) == names
    left = found.clean
    assert left.tolist() == [False] * 2 + [True] * 18
    for robust in found.robust.values():
        assert not bool((robust & ~left).any())
        left = robust
    assert 0 < int(left.sum()) < 18
    assert len(lines) == len(names)
    assert lines[-1] == f"{names[-1]}: {int(left.sum())} of 20 images are still answered correctly"

    broken_by = found.broken_by
    assert broken_by[:2] == ("clean", "clean")
    assert set(broken_by[2:]) <= {"", *names}
    assert [name == "" for name in broken_by] == left.tolist()

    with torch.no_grad():
        right = model(found.adversarial).argmax(1) == labels
    assert torch.equal(right, left)
    moved = (found.adversarial - images).flatten(1).abs().amax(1)
    assert torch.equal(moved > 0, found.clean & ~left)
    assert float(moved.max()) <= EPS + 1e-6
    assert float(found.adversarial.min()) >= 0
    assert float(found.adversarial.max()) <= 1


def test_the_attack_that_broke_an_image_is_the_first_that_did() -> None:
    masks = {name: torch.tensor(mask) for name, mask in {"a": [False, True, False], "b": [False, False, False]}.items()}
    found = AutoAttackResult(
        adversarial=torch.zeros(3, 1, 1, 1), clean=torch.tensor([True, True, False]), robust=masks, flags=()
    )
    assert found.broken_by == ("a", "b", "clean")


@pytest.mark.usefixtures("quick", "unchanged")
def test_the_verdict_depends_on_the_seed_alone(model: Small, images: Tensor, labels: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        first = autoattack(model, images, labels, BUDGET, seed=3)
        torch.manual_seed(12)
        second = autoattack(model, images, labels, BUDGET, seed=3)
    assert torch.equal(first.adversarial, second.adversarial)
    assert not torch.equal(first.adversarial, autoattack(model, images, labels, BUDGET, seed=4).adversarial)


@pytest.mark.usefixtures("quick", "unchanged")
def test_a_budget_of_zero_breaks_nothing(model: Small, images: Tensor, labels: Tensor) -> None:
    found = autoattack(model, images, labels, LinfBudget(eps=0.0))
    assert torch.equal(found.adversarial, images)
    assert all(torch.equal(robust, found.clean) for robust in found.robust.values())
    assert torch.equal(fab(model, images, labels, LinfBudget(eps=0.0)), images)


@pytest.mark.usefixtures("quick", "unchanged")
def test_no_image_and_a_single_one_are_attacked_too(model: Small, images: Tensor, labels: Tensor) -> None:
    none = autoattack(model, images[:0], labels[:0], BUDGET)
    assert none.adversarial.shape == (0, 3, 8, 8)
    assert none.broken_by == ()
    assert fab(model, images[:0], labels[:0], BUDGET).shape == (0, 3, 8, 8)
    assert len(autoattack(model, images[5:6], labels[5:6], BUDGET).broken_by) == 1


@pytest.mark.usefixtures("quick")
def test_batches_bound_what_the_model_sees_at_once(model: Small, images: Tensor, labels: Tensor) -> None:
    sizes: list[int] = []

    def watched(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return model(pixels)

    autoattack(watched, images, labels, BUDGET, batch=7)
    fab(watched, images, labels, BUDGET, batch=7)
    assert max(sizes) == 7


# --- what the library warns of ---


@pytest.mark.usefixtures("quick")
def test_a_random_model_is_flagged_and_its_warning_shown_nowhere_else(
    model: Small, images: Tensor, labels: Tensor, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(pixels: Tensor) -> Tensor:
        return model(pixels) + 0.1 * torch.randn(len(pixels), 6)

    with caplog.at_level(logging.WARNING):
        flags = autoattack(noisy, images, labels, BUDGET).flags
    assert 'it seems to be a randomized defense! Please use version="rand".' in flags
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    assert not any("randomized" in flag for flag in autoattack(noisy, images, labels, BUDGET, version="rand").flags)


@pytest.mark.usefixtures("quick")
def test_an_honest_model_raises_no_flag_even_after_one_that_did(model: Small, images: Tensor, labels: Tensor) -> None:
    def dynamic(pixels: Tensor) -> Tensor:
        with torch.enable_grad():
            probe = pixels.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(model(probe).amax(1).sum(), probe)
        return model(pixels - 0.0 * gradient)

    assert any("dynamic defense" in flag for flag in autoattack(dynamic, images, labels, BUDGET).flags)
    assert autoattack(model, images, labels, LinfBudget(eps=1e-4)).flags == ()


@pytest.mark.usefixtures("quick")
def test_what_only_square_breaks_is_flagged_as_a_hidden_gradient(images: Tensor, labels: Tensor) -> None:
    model = Small().eval()

    def rounded(pixels: Tensor) -> Tensor:
        return model((pixels * 32).round() / 32)

    with torch.no_grad():
        labels = rounded(images).argmax(1)
    found = autoattack(rounded, images, labels, LinfBudget(eps=0.15))
    assert int(found.robust["square"].sum()) < int(found.robust["fab-t"].sum())
    assert any(flag.startswith("Square Attack has decreased the robust accuracy") for flag in found.flags)
    assert any("points with zero gradient" in flag for flag in found.flags)


@pytest.mark.usefixtures("quick")
def test_a_tracer_such_as_a_debuggers_goes_on_afterwards(model: Small, images: Tensor, labels: Tensor) -> None:
    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        autoattack(model, images, labels, LinfBudget(eps=1e-4))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


# --- what is refused ---


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, model: Small, images: Tensor, labels: Tensor
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for attack in (autoattack, fab):
        with pytest.raises(BadInput, match=r"pip install 'manygates\[autoattack\]'"):
            attack(model, images, labels, BUDGET)


@needs_library
def test_what_it_cannot_attack_is_refused(model: Small, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="training mode"):
        autoattack(Small().train(), images, labels, BUDGET)
    with pytest.raises(BadInput, match="returns probabilities"):
        autoattack(nn.Sequential(model, nn.Softmax(1)).eval(), images, labels, BUDGET)
    with pytest.raises(BadInput, match=r"float32, got images of torch\.float64"):
        autoattack(model, images.double(), labels, BUDGET)
    with pytest.raises(BadInput, match="'standard' needs at least 4 classes for its DLR loss, got 3"):
        autoattack(Small(classes=3).eval(), images, labels % 3, BUDGET)
    with pytest.raises(BadInput, match="batch=0"):
        autoattack(model, images, labels, BUDGET, batch=0)
    with pytest.raises(UnknownName, match="unknown AutoAttack version 'plus'"):
        autoattack(model, images, labels, BUDGET, version="plus")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="num_targets=0"):
        fab(model, images, labels, BUDGET, num_targets=0)


# --- FAB on its own ---


@pytest.mark.usefixtures("library", "unchanged")
def test_fab_finds_the_boundary_of_a_linear_model_and_stays_in_the_ball() -> None:
    weight = torch.randn(12, 4, generator=generator(2))
    images = 0.3 + 0.4 * torch.rand(60, 3, 2, 2, generator=generator(1))
    with torch.no_grad():
        logits = images.flatten(1) @ weight
        labels = logits.argmax(1)
        slopes = (weight[:, None, :] - weight[:, :, None]).abs().sum(0)[labels]
        gaps = logits.gather(1, labels[:, None]) - logits
        distance = (gaps / slopes).scatter(1, labels[:, None], torch.inf).amin(1)
    found = fab(lambda pixels: pixels.flatten(1) @ weight, images, labels, BUDGET)
    moved = (found - images).flatten(1).abs().amax(1)
    reachable = distance < EPS * 0.9
    assert 5 < int(reachable.sum()) < 55
    assert bool(((found.flatten(1) @ weight).argmax(1) != labels)[reachable].all())
    assert not bool(moved[distance > EPS].any())
    assert torch.allclose(moved[reachable], distance[reachable], rtol=0.06, atol=1e-5)  # it overshoots by 5 %
    assert float(moved.max()) <= EPS + 1e-6


# --- random models ---


def test_the_recheck_averages_over_draws_and_counts_what_every_draw_answers() -> None:
    answers = iter([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]])

    def sampler() -> object:
        drawn = torch.tensor(next(answers))
        return lambda images: nn.functional.one_hot(drawn, 2).float() * 5

    found = recheck(sampler, torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 1, 1]), draws=3)  # type: ignore[arg-type]
    assert found.accuracy == pytest.approx(7 / 12)
    assert found.always_right == pytest.approx(1 / 4)


def test_a_recheck_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="draws=0 and 4 images"):
        recheck(lambda: nn.Identity(), torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), draws=0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("attack", [autoattack, fab])
def test_models_as_people_write_them_are_taken_or_refused(
    attack: Callable[..., AutoAttackResult | Tensor], model: Small, images: Tensor, labels: Tensor
) -> None:
    def found(asked: Callable[[Tensor], object], **options: object) -> Tensor:
        result = attack(asked, images, labels, BUDGET, **options)
        return result if isinstance(result, Tensor) else result.adversarial

    def in_place(pixels: Tensor) -> Tensor:
        return model(pixels.sub_(0.5).div_(0.5))

    def rooted(pixels: Tensor) -> Tensor:
        return model(pixels) + 0 * (pixels - pixels.detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    expected, given = found(lambda pixels: model((pixels - 0.5) / 0.5)), images.clone()
    assert torch.equal(found(in_place), expected)
    assert torch.equal(images, given)
    assert torch.equal(found(lambda pixels: {"logits": model(pixels)}, output="logits"), found(model))
    for broken in (rooted, lambda pixels: model(pixels) * torch.nan, lambda pixels: (model(pixels),)):
        with pytest.raises(BadInput):
            found(broken)


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_two_possible_classes_are_too_few_for_dlr(version: Version, model: Small, images: Tensor) -> None:
    mask = torch.tensor([0.0, 0.0, *[-torch.inf] * 4])
    labels = (model(images) + mask).argmax(1)
    with pytest.raises(BadInput, match="-inf"):
        autoattack(lambda pixels: model(pixels) + mask, images, labels, BUDGET, version=version)


@pytest.mark.usefixtures("quick")
def test_autoattack_takes_float64_logits_of_float32_images(model: Small, images: Tensor, labels: Tensor) -> None:
    found = autoattack(lambda pixels: model(pixels).double(), images[:4], labels[:4], BUDGET)
    assert found.adversarial.dtype == torch.float32


@needs_library
def test_fab_takes_float64_logits_of_float32_images(model: Small, images: Tensor, labels: Tensor) -> None:
    found = fab(lambda pixels: model(pixels).double(), images[:6], labels[:6], BUDGET)
    assert torch.equal(found, fab(model, images[:6], labels[:6], BUDGET))


@needs_library
def test_autoattack_counts_images_and_not_logits(model: Small, images: Tensor) -> None:
    def infinite(pixels: Tensor) -> Tensor:
        return model(pixels).index_fill(1, torch.tensor([1]), torch.inf)  # type: ignore[no-any-return]

    with pytest.raises(BadInput, match="the loss of 20 of 20 images is NaN"):
        autoattack(infinite, images, torch.ones(20, dtype=torch.int64), BUDGET)


@needs_library
def test_autoattack_is_for_l_inf_alone(model: Small, images: Tensor, labels: Tensor) -> None:
    for attack in (autoattack, fab):
        with pytest.raises(BadInput, match="l2"):
            attack(model, images, labels, L2Budget())  # type: ignore[operator]
