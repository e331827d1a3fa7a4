from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.attacks.skip_gradient import skip_gradient
from zoo.data.vision import torchvision
from zoo.errors import BadInput
from zoo.gates import graphs
from zoo.gates.derive import Ensemble, folded_copy
from zoo.networks import build


class LinearResidual(nn.Module):
    """x <- x + A_l x with 1x1 convolutions, then a linear read-out: every Jacobian is a product of matrices."""

    def __init__(self, depth: int = 3, *, projected: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(depth))
        self.deeper = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(depth))
        self.shortcut = nn.Conv2d(3, 3, 1, bias=False) if projected else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        out = images
        for index, (branch, deeper) in enumerate(zip(self.branches, self.deeper, strict=True)):
            skipped = self.shortcut(out) if index == 0 else out
            out = skipped + deeper(branch(out))
        return out.mean((2, 3))


def gradient(network: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_(True)
    weight = torch.arange(1.0, 1 + network(images).shape[1])
    (found,) = torch.autograd.grad((network(images) * weight).sum(), images)
    return found


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_on_a_linear_residual_network_the_gradient_is_the_product_of_identity_plus_gamma_a(
    gamma: float, images: Tensor
) -> None:
    torch.manual_seed(1)
    network = LinearResidual().eval()
    with torch.no_grad():
        product = torch.eye(3)
        for branch, deeper in zip(network.branches, network.deeper, strict=True):
            product = (torch.eye(3) + gamma * deeper.weight[:, :, 0, 0] @ branch.weight[:, :, 0, 0]) @ product
    expected = (torch.arange(1.0, 4.0) @ product / 1024)[None, :, None, None].expand_as(images)
    torch.testing.assert_close(gradient(skip_gradient(network, gamma), images), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "wide_resnet16_4"])
def test_the_answers_stay_the_same_and_gamma_one_is_the_plain_gradient(name: str, images: Tensor) -> None:
    network = build(name).eval()
    with torch.no_grad():
        assert torch.equal(skip_gradient(network)(images), network(images))
    torch.testing.assert_close(gradient(skip_gradient(network, 1.0), images), gradient(network, images))
    assert not torch.allclose(gradient(skip_gradient(network, 0.2), images), gradient(network, images))


def test_blocks_with_a_projection_are_scaled_only_when_asked(images: Tensor) -> None:
    """ResNet-20 has nine blocks, two of them with a 1x1 convolution in the shortcut."""
    graph = graphs.trace(build("resnet20").eval())
    assert len(graphs.residual_branches(graph, projections=False)) == 7
    assert len(graphs.residual_branches(graph, projections=True)) == 9


def test_a_folded_ensemble_is_a_surrogate_too_and_stays_as_it_was(images: Tensor) -> None:
    ensemble = Ensemble([folded_copy(build("resnet8").eval()) for _ in range(2)]).eval()
    before = gradient(ensemble, images)
    surrogate = skip_gradient(ensemble, 0.2)
    assert isinstance(surrogate, Ensemble)
    with torch.no_grad():
        assert torch.equal(surrogate(images), ensemble(images))
    assert not torch.allclose(gradient(surrogate, images), before)
    assert torch.equal(gradient(ensemble, images), before)
    assert not any(module.training for module in surrogate.modules())


def test_residual_additions_are_found_whatever_the_layers_are_called() -> None:
    network = torchvision().models.resnet18(num_classes=10).eval()
    found = graphs.residual_branches(graphs.trace(network), projections=False)
    assert len(found) == 5  # eight blocks, three of them with a projection


@pytest.mark.parametrize("name", ["vgg16", "lenet"])
def test_a_network_without_residual_blocks_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no residual addition with an identity shortcut"):
        skip_gradient(build(name).eval())


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(BadInput, match="need 0 <= gamma <= 1, got 2"):
        skip_gradient(LinearResidual(), 2)
