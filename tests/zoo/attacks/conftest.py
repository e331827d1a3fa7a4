"""What tests of attacks share: every attack in one table, a small network, images and its answers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo.attacks import (
    InputDiversity,
    apgd,
    apgd_eot,
    apgd_targeted,
    arc,
    average_exits,
    eot_pgd,
    fgsm,
    max_average_exits,
    pgd,
    rays,
    square,
)
from zoo.attacks.budget import Budget
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build

Attack = Callable[..., Tensor]

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "pgd, first broken": functools.partial(pgd, keep="first broken"),
    "pgd, momentum": functools.partial(pgd, momentum=1.0),
    "m-di2": functools.partial(pgd, momentum=1.0, diversity=InputDiversity()),
    "apgd": apgd,
    "apgd-t": functools.partial(apgd_targeted, loss="margin"),
    "square": functools.partial(square, queries=40),
    "rays": functools.partial(rays, queries=40),
    "eot": lambda model, *rest, **more: eot_pgd(lambda: model, *rest, draws=2, momentum=1.0, **more),
    "eot, probability": lambda model, *rest, **more: eot_pgd(
        lambda: model, *rest, draws=2, average="probability", **more
    ),
    "apgd-eot": lambda model, *rest, **more: apgd_eot(lambda: model, *rest, draws=2, **more),
    "arc": lambda model, *rest, **more: arc([model, model], *rest, **more),
}
GRADIENTS = [name for name in ATTACKS if name not in ("square", "rays")]
EXITS: dict[str, Attack] = {
    "average": lambda model, *rest: average_exits(lambda pixels: [model(pixels)], *rest),
    "max-average": lambda model, *rest: max_average_exits(lambda pixels: [model(pixels)], *rest),
}


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    """Each attack on logits; with `indirect=True` those of the given names."""
    return ATTACKS[request.param]


@pytest.fixture(params=GRADIENTS)
def gradient_attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


@pytest.fixture(params=[*ATTACKS, *EXITS])
def every_attack(request: pytest.FixtureRequest) -> Attack:
    """Each attack on logits or on several exits."""
    return (ATTACKS | EXITS)[request.param]


class Small(nn.Module):
    """Five classes; BatchNorm and dropout depend on the mode."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.linear = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.linear(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))
        return hidden


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels(model: Small, images: Tensor) -> Tensor:
    return model(images).argmax(1)


@pytest.fixture
def rgn() -> RandomGatedNetwork:
    torch.manual_seed(0)
    network = build("resnet8", images=ImageFormat(height=8, width=8)).eval()
    return randomly_gate(network, candidates=3, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="session")
def assert_inside() -> Callable[[Tensor, Tensor, Budget], None]:
    """Assert that images are in their balls and in [0, 1], in their own arithmetic and in float64."""
    return _assert_inside


def _assert_inside(found: Tensor, images: Tensor, budget: Budget) -> None:
    """Assert it in the arithmetic of the images and in float64."""
    assert found.dtype == images.dtype
    assert bool(found.isfinite().all())
    for one, other in ((found, images), (found.double(), images.double())):
        difference = (one - other).flatten(1)
        order = torch.inf if budget.norm == "linf" else 2
        assert float(torch.linalg.vector_norm(difference, order, dim=1).max()) <= budget.eps
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
