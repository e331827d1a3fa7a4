from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as grad_by_another_name
from torch.nn import functional as F

from zoo.attacks import LinfBudget, pgd
from zoo.attacks.inputs import Model
from zoo.card import Finding
from zoo.errors import BadInput
from zoo.evaluation import lint
from zoo.evaluation.lint import CHECKS, lint_model, passed, render

EPS = 8 / 255
QUERIES = 100
MASKING = {"G1", "S5", "W1", "G3", "X1"}


def task(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four smooth patterns in noise, on the 8-bit grid; at eps 8/255 a plain network loses nearly all of them."""
    patterns = F.interpolate(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(7)), 8, mode="bilinear")
    labels = torch.arange(number) % 4
    noise = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ((0.5 + 0.06 * patterns[labels] + 0.07 * noise).clamp(0, 1) * 255).round() / 255, labels


def trained(seed: int, *, adversarially: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )
        images, labels = task(512, seed + 100)
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for start in list(range(0, 512, 128)) * 20:
            batch, wanted = images[start : start + 128], labels[start : start + 128]
            if adversarially:
                batch = pgd(network, batch, wanted, LinfBudget(eps=EPS, steps=3, step_size=EPS / 2))
            optimiser.zero_grad()
            F.cross_entropy(network(batch), wanted).backward()
            optimiser.step()
    optimiser.zero_grad()
    return network.eval()


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    return {"plain": trained(0, adversarially=False), "robust": trained(1, adversarially=True)}


@pytest.fixture(scope="session")
def plain(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["plain"]


@pytest.fixture(scope="session")
def robust(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["robust"]


IMAGES, LABELS = task(60, 1)


def linted(model: Model, **options: object) -> dict[str, Finding]:
    findings = lint_model(model, IMAGES, LABELS, **{"eps": EPS, "queries": QUERIES, **options})  # type: ignore[arg-type]
    return {finding.code: finding for finding in findings}


def alarms(findings: dict[str, Finding]) -> set[str]:
    return {code for code, finding in findings.items() if finding.verdict == "alarm"}


# --- planted defects: each wraps a trained network ---


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Scaled(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return 1000 * self.network(images)


class Softmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)


class SaturatedSoftmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return (1000 * self.network(images)).softmax(1)


class LogOfSaturatedSoftmax(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return (1000 * self.network(images)).softmax(1).log()


class Quantised(Wrapped):
    levels = 8

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * (self.levels - 1)).round() / (self.levels - 1))


class Rounded(Quantised):
    levels = 256


class Detached(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.detach())


class WithNaNGradient(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + (images - images).sqrt().flatten(1).sum(1, keepdim=True)


class _FalseGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))


class Lying(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(_FalseGradient.apply(images))


class BatchStatistics(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(0.5 + 0.1 * F.batch_norm(images, None, None, training=True))


class Noisy(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images + 0.1 * torch.randn(images.shape))


class SeededNoise(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(3)
        return self.network(images + 0.02 * torch.randn(images.shape[1:]))


class Counting(Wrapped):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return self.network(images)


class SwitchesModes(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        self.network.train()
        return self.network(images)


def by_grad(loss: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(loss, images)[0]


def by_another_name(loss: Tensor, images: Tensor) -> Tensor:
    return grad_by_another_name(loss, images)[0]


def by_backward(loss: Tensor, images: Tensor) -> Tensor:
    loss.backward(inputs=[images])
    assert images.grad is not None
    return images.grad


class Purified(Wrapped):
    """Sharpens the answer by a gradient step on the image before it answers."""

    differentiate: Callable[[Tensor, Tensor], Tensor] = staticmethod(by_grad)

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            copy = images.detach().requires_grad_(True)
            gradient = self.differentiate(self.network(copy).logsumexp(1).sum(), copy)
        return self.network(images + 0.01 * gradient.sign())


class PurifiedWithoutCare(Wrapped):
    """The same, and it fails where gradients are switched off."""

    def forward(self, images: Tensor) -> Tensor:
        copy = images.detach().requires_grad_(True)
        gradient = by_grad(self.network(copy).logsumexp(1).sum(), copy)
        return self.network(images + 0.01 * gradient.sign())


@dataclass(frozen=True, kw_only=True)
class Defect:
    plant: Callable[[nn.Module], Model]
    raises: set[str]
    leaves: Sequence[str] = ()
    """Checks that stay silent: the defect is another one."""


DEFECTS = {
    "logits x 1000": Defect(plant=Scaled, raises={"G1", "G2"}, leaves=("O1", "R1", "G3", "W1")),
    "softmax": Defect(plant=Softmax, raises={"O1"}, leaves=("G1", "G2", "R1")),
    "saturated softmax": Defect(plant=SaturatedSoftmax, raises={"O1", "G1"}, leaves=("R1",)),
    "log of a saturated softmax": Defect(plant=LogOfSaturatedSoftmax, raises={"O1", "G1"}, leaves=("R1",)),
    "8 levels": Defect(plant=Quantised, raises=MASKING, leaves=("O1", "R1", "B1", "M1", "D1")),
    "8-bit rounding": Defect(plant=Rounded, raises=MASKING, leaves=("O1", "R1", "B1", "M1", "D1")),
    "detached": Defect(plant=Detached, raises=MASKING, leaves=("O1", "R1")),
    "NaN gradient": Defect(plant=WithNaNGradient, raises={"G1", "S5"}, leaves=("O1", "R1", "B1")),
    "false gradient": Defect(plant=Lying, raises={"G3", "W1", "X1"}, leaves=("G1", "O1", "R1", "B1")),
    "batch statistics": Defect(plant=BatchStatistics, raises={"B1"}, leaves=("O1", "R1", "G1")),
    "noise": Defect(plant=Noisy, raises={"R1"}, leaves=("O1", "G1")),
    "noise from a fixed seed": Defect(plant=SeededNoise, raises={"M1"}, leaves=("R1", "O1")),
    "a counting forward": Defect(plant=Counting, raises={"M1"}, leaves=("R1", "G1", "W1")),
    "a forward that switches modes": Defect(plant=SwitchesModes, raises={"M1"}, leaves=("R1", "G1", "W1")),
    "optimises at test time": Defect(plant=Purified, raises={"D1"}, leaves=("R1", "O1")),
    "optimises without care": Defect(plant=PurifiedWithoutCare, raises={"D1"}, leaves=("R1", "O1")),
}


@pytest.mark.parametrize("name", ["plain", "robust"])
def test_an_honest_network_raises_no_alarm(networks: dict[str, nn.Module], name: str) -> None:
    findings = linted(networks[name], surrogate=networks["plain"], served=lambda pixels: served(networks[name], pixels))
    assert alarms(findings) == set(), render(list(findings.values()))
    assert passed(list(findings.values()))
    assert {code for code, finding in findings.items() if finding.verdict == "skipped"} == {"E1", "E2", "E3"}


def served(network: nn.Module, pixels: np.ndarray) -> np.ndarray:
    assert pixels.dtype == np.float32
    with torch.no_grad():
        return network(torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_raises_its_alarm_and_not_that_of_others(plain: nn.Module, name: str) -> None:
    defect = DEFECTS[name]
    findings = linted(defect.plant(copy.deepcopy(plain)))
    assert defect.raises <= alarms(findings), render(list(findings.values()))
    assert not alarms(findings) & set(defect.leaves), render(list(findings.values()))
    assert not passed(list(findings.values()))
