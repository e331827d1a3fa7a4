from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import BadInput
from zoo.gates.cost import macs
from zoo.networks import MNIST_FORMAT, build


class Forked(nn.Module):
    """A trunk of one convolution, an exit, and a convolution that only the second exit reads."""

    num_exits = 2
    image_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 3, padding=1)
        self.early = nn.Linear(4, 5)
        self.deeper = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.late = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        first = self.early(features.mean((2, 3)))
        return first, self.late(self.deeper(features).mean((2, 3)))


TRUNK = 8 * 8 * 4 * 3 * 9
DEEPER = 4 * 4 * 6 * 2 * 9  # two groups of two input channels


def test_every_exit_pays_for_the_trunk_and_for_the_answers_before_it() -> None:
    assert macs(Forked()) == (TRUNK + 4 * 5, TRUNK + 4 * 5 + DEEPER + 6 * 5)


def test_lenet_costs_what_can_be_computed_by_hand() -> None:
    convolutions = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25
    assert macs(build("lenet", images=MNIST_FORMAT)) == (convolutions + 800 * 500 + 500 * 10,)


def test_the_small_network_for_digits_costs_what_can_be_computed_by_hand() -> None:
    first = 26 * 26 * 32 * 9 + 12 * 12 * 16 * 32 * 9 + 576 * 200 + 200 * 200 + 200 * 10
    second = first + 24 * 24 * 32 * 32 * 9 + 10 * 10 * 64 * 32 * 9 + 1600 * 200 + 200 * 200 + 200 * 10
    third = second + 8 * 8 * 64 * 64 * 9 + 1024 * 200 + 200 * 200 + 200 * 10
    assert macs(build("small_cnn3", images=MNIST_FORMAT)) == (first, second, third)


@pytest.mark.parametrize(
    ("options", "classes", "millions"),
    [
        ({"exits": 3, "base": 4, "step": 2}, 10, [14.58, 21.55, 27.43]),
        ({"exits": 3, "base": 2, "step": 2}, 10, [9.25, 16.29, 20.80]),
        ({"exits": 7, "base": 4, "step": 2}, 100, [14.97, 25.26, 36.78, 45.97, 56.93, 66.53, 75.49]),
    ],
)
def test_msdnets_cost_what_the_reference_implementation_does(
    options: dict[str, int], classes: int, millions: list[float]
) -> None:
    with torch.device("meta"):
        network = build("msdnet", classes=classes, **options)
    assert [round(cost / 1e6, 2) for cost in macs(network)] == millions


def test_counting_leaves_the_network_as_it_was() -> None:
    network = build("resnet8", width=4).train()
    before = copy.deepcopy(network.state_dict())
    macs(network)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_larger_images_cost_more_and_no_size_at_all_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False))
    assert macs(network, (3, 4, 4)) == (4 * 4 * 3 * 2,)
    assert macs(network, (3, 8, 4)) == (8 * 4 * 3 * 2,)
    with pytest.raises(BadInput, match=r"Sequential does not say the shape of its images; pass image_shape="):
        macs(network)
