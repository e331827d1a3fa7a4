"""Our attacks against independent implementations of the same attacks: same model, same images, same budget."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from bumpy import generator
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import paths
from zoo.attacks import LinfBudget, fgsm, pgd
from zoo.attacks.apgd import apgd, apgd_eot, apgd_targeted
from zoo.attacks.autoattack import autoattack, recheck
from zoo.attacks.outputs import Model
from zoo.attacks.random_gates import path_sampler
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate

CLASSES, IMAGES = 10, 200
EPS = 0.04


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def batch(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images whose class is a faint pattern under noise."""
    patterns = F.interpolate(torch.rand(CLASSES, 3, 4, 4, generator=generator(0)), size=16, mode="bilinear")
    draw = generator(seed)
    labels = torch.randint(CLASSES, (number,), generator=draw)
    noise = torch.rand(number, 3, 16, 16, generator=draw)
    return (0.35 * patterns[labels] + 0.65 * noise).clamp(0, 1), labels


def correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) == labels


def well_answered(model: Model) -> tuple[Tensor, Tensor]:
    """Return images that the model answers correctly."""
    images, labels = batch(4 * IMAGES, seed=99)
    right = correct(model, images, labels)
    assert int(right.sum()) >= IMAGES
    return images[right][:IMAGES], labels[right][:IMAGES]


@pytest.fixture(scope="session")
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = network().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        images, labels = batch(64, seed=1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def samples(trained: nn.Sequential) -> tuple[Tensor, Tensor]:
    return well_answered(trained)


def share_alike(ours: Tensor, theirs: Tensor) -> float:
    """Return the share of images that agree in every pixel, rounding aside."""
    return float(((ours - theirs).flatten(1).abs().amax(1) < 1e-5).float().mean())


def agreement(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the difference of two robust accuracies, and the share of images about which they disagree."""
    return abs(float(ours.float().mean()) - float(theirs.float().mean())), float((ours != theirs).float().mean())


# --- the gradient family, pixel by pixel ---


@pytest.fixture(scope="session")
def foolbox() -> Any:
    import warnings

    with warnings.catch_warnings():
        # foolbox 3.3.4 imports a name that SciPy moved
        warnings.filterwarnings("ignore", r"Please import `gaussian_filter`", DeprecationWarning)
        return pytest.importorskip("foolbox", reason="foolbox is not installed; it is an optional peer")


STEPS = 20
BUDGET = LinfBudget(eps=EPS, steps=STEPS, step_size=2.5 * EPS / STEPS, random_start=False)


def by_foolbox(foolbox: Any, attack: Any, model: nn.Module, samples: tuple[Tensor, Tensor]) -> Tensor:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    images, labels = samples
    _, found, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=EPS)
    for name, parameter in model.named_parameters():  # foolbox fills them
        parameter.grad = gradients[name]
    assert isinstance(found, Tensor)
    return found


def test_fgsm_is_foolboxs_pixel_by_pixel(foolbox: Any, trained: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    theirs = by_foolbox(foolbox, foolbox.attacks.FGSM(random_start=False), trained, samples)
    assert share_alike(fgsm(trained, *samples, BUDGET), theirs) >= 0.98


def test_pgd_is_foolboxs_pixel_by_pixel(foolbox: Any, trained: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    attack = foolbox.attacks.LinfPGD(abs_stepsize=BUDGET.step, steps=STEPS, random_start=False)
    theirs = by_foolbox(foolbox, attack, trained, samples)
    assert share_alike(pgd(trained, *samples, BUDGET), theirs) >= 0.98


def test_momentum_is_that_of_the_formula_pixel_by_pixel(trained: nn.Sequential, samples: tuple[Tensor, Tensor]) -> None:
    """Dong et al. 2018, equations 6 and 7, written out; foolbox normalises the gradient otherwise."""
    images, labels = samples
    theirs, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(STEPS):
        theirs.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(trained(theirs), labels, reduction="sum"), theirs)
        velocity = velocity + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        theirs = (theirs + BUDGET.step * velocity.sign()).detach()
        theirs = (images + (theirs - images).clamp(-EPS, EPS)).clamp(0, 1)
    assert share_alike(pgd(trained, images, labels, BUDGET, momentum=1.0), theirs) >= 0.98


# --- AutoAttack's family ---


@pytest.fixture(scope="session")
def pyautoattack() -> Any:
    return pytest.importorskip(
        "pyautoattack", reason="pyautoattack is not installed; it is the optional extra [autoattack]"
    )


@pytest.mark.parametrize(("ours", "theirs"), [("cross_entropy", "ce"), ("dlr", "dlr")])
@pytest.mark.parametrize("seed", [0, 1])
def test_auto_pgd_agrees_with_its_authors(
    pyautoattack: Any, trained: nn.Sequential, samples: tuple[Tensor, Tensor], ours: str, theirs: str, seed: int
) -> None:
    images, labels = samples
    library = pytest.importorskip("pyautoattack.autopgd_base").APGDAttack
    with torch.random.fork_rng():
        found = library(trained, n_iter=100, eps=EPS, seed=0, loss=theirs).perturb(images, labels)
    # with seed 0 from the very same starts, with seed 1 from others
    own = apgd(trained, images, labels, LinfBudget(eps=EPS, steps=100), loss=ours, generator=generator(seed))
    judged = correct(trained, own, labels), correct(trained, found, labels)
    assert 0.1 < float(judged[1].float().mean()) < 0.9
    difference, disagreement = agreement(*judged)
    assert difference <= 0.02
    assert disagreement <= 0.03


def test_targeted_auto_pgd_agrees_with_its_authors(
    pyautoattack: Any, trained: nn.Sequential, samples: tuple[Tensor, Tensor]
) -> None:
    images, labels = samples
    library = pytest.importorskip("pyautoattack.autopgd_base").APGDAttack_targeted
    with torch.random.fork_rng():
        found = library(trained, n_iter=20, eps=EPS, seed=0, n_target_classes=3).perturb(images, labels)
    budget = LinfBudget(eps=EPS, steps=20)
    own = apgd_targeted(trained, images, labels, budget, num_targets=3, generator=generator())
    difference, disagreement = agreement(correct(trained, own, labels), correct(trained, found, labels))
    assert difference <= 0.02
    assert disagreement <= 0.03


def test_the_wrapper_breaks_the_images_that_a_direct_call_breaks(
    pyautoattack: Any, trained: nn.Sequential, samples: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shorter(pyautoattack.AutoAttack):  # type: ignore[misc]
        """As it is in all but the length of its attacks, which take most of the time of the tests otherwise."""

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 5
            self.square.n_queries = 100

    monkeypatch.setattr(pyautoattack, "AutoAttack", Shorter)
    images, labels = (tensor[:40] for tensor in samples)
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % CLASSES

    with torch.random.fork_rng():
        direct = Shorter(trained, eps=EPS, seed=5)
        monkeypatch.setattr(direct.logger, "disabled", True)
        theirs, _ = direct.run_standard_evaluation(images, labels, batch_size=25)
    trained.zero_grad()  # FAB fills the gradients
    ours = autoattack(trained, images, labels, LinfBudget(eps=EPS), seed=5, batch=25)
    robust = ours.robust["square"]
    assert 0 < int(robust.sum()) < 37
    assert torch.equal(robust, correct(trained, theirs, labels))
    assert torch.allclose(ours.adversarial, theirs, atol=1e-6)


# --- random gates ---


@pytest.fixture(scope="session")
def random_gates() -> RandomGatedNetwork:
    torch.manual_seed(0)
    rgn = randomly_gate(network().eval(), candidates=3, generator=generator(5)).train()
    optimizer = torch.optim.Adam(rgn.parameters(), lr=3e-3)
    rng = random.Random(0)
    for step in range(90):
        images, labels = batch(64, seed=1000 + step)
        optimizer.zero_grad()
        path = paths.sample(rgn.num_gates, rgn.candidates, rng)
        F.cross_entropy(rgn(images, path), labels).backward()
        optimizer.step()
    return rgn.eval()


@pytest.mark.parametrize(("ours", "theirs"), [("cross_entropy", "ce"), ("dlr", "dlr")])
def test_on_random_gates_ours_is_no_weaker_on_fresh_draws(
    pyautoattack: Any, random_gates: RandomGatedNetwork, ours: str, theirs: str
) -> None:
    """AutoAttack "rand" stops at one lucky draw; with the same steps and draws, ours must not be the weaker image."""
    steps, draws, number = 25, 8, 60
    sampler = path_sampler(random_gates, random.Random(1))
    images, labels = well_answered(sampler())
    images, labels = images[:number], labels[:number]
    library = pytest.importorskip("pyautoattack.autopgd_base").APGDAttack
    with torch.random.fork_rng():
        attack = library(lambda pixels: sampler()(pixels), n_iter=steps, eps=EPS, eot_iter=draws, seed=0, loss=theirs)
        found = attack.perturb(images, labels)
    budget = LinfBudget(eps=EPS, steps=steps)
    own = apgd_eot(sampler, images, labels, budget, draws=draws, loss=ours, generator=generator())
    judged = [recheck(path_sampler(random_gates, random.Random(2)), each, labels) for each in (images, own, found)]
    clean, ours_left, theirs_left = (each.accuracy for each in judged)
    assert 0.05 < ours_left < clean - 0.2
    assert ours_left <= theirs_left + 0.03
