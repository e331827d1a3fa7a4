"""Public architectures: the number of their gates, and equal answers of a path, its derived network and its graphs."""

from __future__ import annotations

import importlib.util
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zoo import paths
from zoo.data.vision import torchvision
from zoo.errors import GatingWarning
from zoo.export import onnx_graphs
from zoo.gates import graphs, self_check
from zoo.gates.derive import derive
from zoo.gates.rgn import randomly_gate
from zoo.runtime import session


def _table() -> Any:
    """The table beside this file; tests are no package."""
    name = "manygates_architectures"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("architectures.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


table = _table()


def built(case: Any) -> nn.Module:
    """The architecture with random weights and unequal BatchNorms, in evaluation mode."""
    vision = torchvision()
    torch.manual_seed(0)
    if case.library == "timm":
        network = pytest.importorskip("timm").create_model(case.name, pretrained=False, num_classes=10, **case.options)
    else:
        network = vision.models.get_model(case.name, weights=None, num_classes=10, **case.options)
    network.image_shape = (3, case.size, case.size)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    last = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    nn.init.normal_(last.weight, 0, 0.1)  # some start at zero
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("case", table.CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_a_public_architecture_is_gated_derived_and_exported(case: Any) -> None:
    network = built(case)
    assert len(graphs.convolutions(graphs.trace(network))) == case.convolutions
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rgn = randomly_gate(network).eval()
    said = [str(warning.message) for warning in caught if warning.category is GatingWarning]
    assert rgn.num_gates == case.gates
    assert len(said) == (case.ungated > 0) + (case.gates == 1)
    assert not case.ungated or f" {case.ungated} convolutions " in said[0]

    path = paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))
    images = self_check.images((5, 3, case.size, case.size))
    expected, derived = rgn(images, path), derive(rgn, path)
    assert torch.equal(derived(images), expected)
    assert not torch.allclose(network(images), expected)

    exported = onnx_graphs.rgn_graphs(rgn, path, [], gated=True)
    for variant, feeds in (("single", {}), ("gated", {"gates": np.array(path, np.int64)})):
        opened = session(exported[variant])
        for batch in (1, 2, 5):
            (logits,) = opened.run(["logits"], {"images": images[:batch].numpy(), **feeds})
            worst = float((torch.from_numpy(logits) - expected[:batch]).abs().max())
            assert worst <= 1e-4 * float(expected.abs().max()), (variant, batch)


def test_the_page_is_the_table() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page()
