"""Public architectures: the number of their gates, and equal answers of a path, its derived network and its graphs."""

from __future__ import annotations

import random
import warnings

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


def gated(case: Case) -> RandomGatedNetwork:
    """The architecture with gates, once it warned of what the table says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rgn = randomly_gate(built(case)).eval()
    said = [str(warning.message) for warning in caught if warning.category is GatingWarning]
    assert len(said) == (case.ungated > 0) + (case.gates == 1)
    assert not case.ungated or f" {case.ungated} convolutions " in said[0]
    return rgn


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_a_public_architecture_has_its_gates_and_a_derived_path_equals_it_bit_for_bit(case: Case) -> None:
    rgn = gated(case)
    assert (len(rgn.convolutions), rgn.num_gates) == (case.convolutions, case.gates)
    path = paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))
    images = self_check.images((2, 3, case.size, case.size))
    expected = rgn(images, path)
    assert torch.equal(derive(rgn, path)(images), expected)
    assert not torch.allclose(rgn(images, [0] * rgn.num_gates), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.exported else pytest.mark.exhaustive) for case in CASES],
)
@torch.no_grad()
def test_the_graphs_of_a_public_architecture_answer_as_torch(case: Case) -> None:
    rgn = gated(case)
    path = paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))
    images = self_check.images((5, 3, case.size, case.size))
    expected = rgn(images, path)
    exported = onnx_graphs.rgn_graphs(rgn, path, [], gated=True)
    for variant, feeds in (("single", {}), ("gated", {"gates": np.array(path, np.int64)})):
        opened = session(exported[variant])
        for batch in (1, 2, 5):
            (logits,) = opened.run(["logits"], {"images": images[:batch].numpy(), **feeds})
            worst = float((torch.from_numpy(logits) - expected[:batch]).abs().max())
            assert worst <= 1e-4 * float(expected.abs().max()), (variant, batch)


def test_the_page_is_the_table() -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page()
