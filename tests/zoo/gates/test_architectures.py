"""Public architectures: the number of their gates, and equal answers of a path, its derived network and its graphs."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass

import architectures
import numpy as np
import pytest
import torch
from architectures import CASES, Case
from torch import nn
from unsettled import unsettle

from zoo import paths
from zoo.data.vision import torchvision
from zoo.errors import GatingWarning
from zoo.export import onnx_graphs
from zoo.gates import self_check
from zoo.gates.derive import derive
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.runtime import session


def built(case: Case) -> nn.Module:
    """The architecture with random weights and unequal BatchNorms, in evaluation mode."""
    vision = torchvision()
    torch.manual_seed(0)
    if case.library == "timm":
        network = pytest.importorskip("timm").create_model(case.name, pretrained=False, num_classes=10, **case.options)
    else:
        network = vision.models.get_model(case.name, weights=None, num_classes=10, **case.options)
    network.image_shape = (3, case.size, case.size)
    last = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    nn.init.normal_(last.weight, 0, 0.1)  # some start at zero
    return unsettle(network).eval()


@dataclass(frozen=True)
class Gated:
    """An architecture with gates and a path of it."""

    case: Case
    rgn: RandomGatedNetwork
    path: paths.Path
    said: list[str]  # warnings of `randomly_gate`
    parameters: int  # of the architecture itself


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def gated(request: pytest.FixtureRequest) -> Gated:
    case: Case = request.param
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network = built(case)
        rgn = randomly_gate(network).eval()
    said = [str(warning.message) for warning in caught if warning.category is GatingWarning]
    path = paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))
    return Gated(case, rgn, path, said, count(network))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.slow
def test_a_public_architecture_has_its_gates_and_says_what_has_none(gated: Gated) -> None:
    case, said = gated.case, gated.said
    assert (len(gated.rgn.convolutions), gated.rgn.num_gates) == (case.convolutions, case.gates)
    assert len(said) == (case.ungated > 0) + (case.gates == 1)
    assert not case.ungated or f" {case.ungated} convolutions " in said[0]


@pytest.mark.slow
@torch.no_grad()
def test_a_derived_path_of_a_public_architecture_equals_it_bit_for_bit(gated: Gated) -> None:
    images = self_check.images((2, 3, gated.case.size, gated.case.size))
    expected = gated.rgn(images, gated.path)
    derived = derive(gated.rgn, gated.path)
    assert torch.equal(derived(images), expected)
    assert (type(derived), count(derived)) == (type(gated.rgn.template), gated.parameters)
    assert not torch.allclose(gated.rgn(images, [0] * gated.rgn.num_gates), expected)


@pytest.mark.slow
@torch.no_grad()
def test_the_graphs_of_a_public_architecture_answer_as_torch(gated: Gated, pytestconfig: pytest.Config) -> None:
    if not (gated.case.exported or pytestconfig.getoption("--exhaustive")):
        pytest.skip("of this family another architecture is exported; --exhaustive exports all")
    images = self_check.images((5, 3, gated.case.size, gated.case.size))
    expected = gated.rgn(images, gated.path)
    exported = onnx_graphs.rgn_graphs(gated.rgn, gated.path, [], gated=True)
    for variant, feeds in (("single", {}), ("gated", {"gates": np.array(gated.path, np.int64)})):
        opened = session(exported[variant])
        for batch in (1, 2, 5):
            (logits,) = opened.run(["logits"], {"images": images[:batch].numpy(), **feeds})
            worst = float((torch.from_numpy(logits) - expected[:batch]).abs().max())
            assert worst <= 1e-4 * float(expected.abs().max()), (variant, batch)


def test_the_page_is_the_table() -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page()
