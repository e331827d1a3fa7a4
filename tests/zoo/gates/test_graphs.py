from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import BadInput
from zoo.gates import graphs
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)


class Forward(nn.Module):
    """Two convolutions and a norm, wired by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)


class ReadTwice(Forward):
    def forward(self, images: Tensor) -> Tensor:
        features = self.conv1(images)
        return self.norm(features) + self.conv2(features)


class OneNormForTwo(Forward):
    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv1(images))))


class CalledTwice(Forward):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv2(self.conv2(self.conv1(images)))


class EqualBranches(Forward):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv1(images) + self.conv2(images)


class Branching(Forward):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv1(images) if images.sum() > 0 else self.conv2(images)


class Counting(Forward):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.conv1(images) for _ in range(int(images.mean()))])


def test_a_resnet_has_a_projection_wherever_its_shape_changes() -> None:
    layers = graphs.convolutions(graphs.trace(build("resnet20")))
    assert len(layers) == 21
    projections = [(layer.conv, layer.norm) for layer in layers if layer.projection]
    assert projections == [(f"stages.{stage}.0.shortcut.0", f"stages.{stage}.0.shortcut.1") for stage in (1, 2)]
    main = [(layer.conv, layer.norm) for layer in layers if not layer.projection]
    expected = [("conv1", "norm1")]
    for stage in range(3):
        for block in range(3):
            expected += [(f"stages.{stage}.{block}.{conv}", f"stages.{stage}.{block}.norm{conv[-1]}")
                         for conv in ("conv1", "conv2")]  # fmt: skip
    assert main == expected


def test_projections_are_found_where_they_have_no_norm_too() -> None:
    layers = graphs.convolutions(graphs.trace(build("preact_resnet18", width=4)))
    assert [layer.conv for layer in layers if layer.projection] == [f"stages.{stage}.0.shortcut" for stage in (1, 2, 3)]
    # A pre-activation block's second convolution ends in a sum, not in a norm of its own.
    assert {layer.norm for layer in layers if layer.conv.endswith("conv2")} == {None}


def test_a_chain_has_no_projections() -> None:
    assert not any(layer.projection for layer in graphs.convolutions(graphs.trace(build("vgg16", width=0.1))))


def test_branches_of_equal_length_are_both_main() -> None:
    assert not any(layer.projection for layer in graphs.convolutions(graphs.trace(EqualBranches())))


@pytest.mark.parametrize("network", [ReadTwice(), OneNormForTwo()])
def test_a_norm_that_is_not_the_convolutions_own_is_not_taken_for_it(network: nn.Module) -> None:
    assert [layer.norm for layer in graphs.convolutions(graphs.trace(network))] == [None, None]


def test_a_convolution_called_twice_is_one_layer_with_one_gate() -> None:
    layers = graphs.convolutions(graphs.trace(CalledTwice()))
    assert [(layer.conv, layer.norm, layer.main) for layer in layers] == [("conv1", None, True), ("conv2", None, True)]


@pytest.mark.parametrize("network", [Branching(), Counting()])
def test_a_forward_that_depends_on_the_images_is_refused_with_the_reason(network: nn.Module) -> None:
    with pytest.raises(BadInput, match=rf"{type(network).__name__} cannot be traced .*depend on the images"):
        graphs.trace(network)


def test_tracing_shares_the_layers() -> None:
    network = build("resnet8", images=SMALL)
    traced = graphs.trace(network)
    assert traced.get_submodule("conv1") is network.get_submodule("conv1")


def test_a_cut_graph_computes_the_node_and_needs_no_later_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    traced = graphs.trace(network)
    layers = graphs.convolutions(traced)
    images = torch.rand(2, 3, 8, 8)
    plain, activated = (graphs.feature_nodes(traced, layers[:1], activated=flag)[0] for flag in (False, True))
    assert torch.equal(graphs.cut(traced, plain)(images), network[:2](images))
    assert torch.equal(graphs.cut(traced, activated)(images), network[:3](images))
    assert dict(graphs.cut(traced, activated).named_modules()).keys() == {"", "0", "1", "2"}


def test_the_feature_of_a_blocks_last_convolution_is_the_blocks_sum() -> None:
    network = build("resnet8", images=SMALL).eval()
    traced = graphs.trace(network)
    layers = [layer for layer in graphs.convolutions(traced) if not layer.projection]
    images = torch.rand(2, 3, 16, 16)
    block = network.get_submodule("stages.1.0")
    sums: list[Tensor] = []
    block.get_submodule("activation2").register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0]))
    network(images)
    name = graphs.feature_nodes(traced, layers, activated=False)[4]
    assert layers[4].conv == "stages.1.0.conv2"
    assert torch.equal(graphs.cut(traced, name)(images), sums[0])


def test_a_functional_activation_is_followed_like_a_module() -> None:
    class Functional(Forward):
        def forward(self, images: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv1(images)))

    traced = graphs.trace(Functional())
    layers = graphs.convolutions(traced)
    before, behind = (graphs.feature_nodes(traced, layers, activated=flag) for flag in (False, True))
    assert (before, behind) == (["norm"], ["relu"])


def test_an_unknown_node_is_refused_with_the_known_ones() -> None:
    traced = graphs.trace(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(BadInput, match="no node 'nowhere'; known: "):
        graphs.cut(traced, "nowhere")


def test_leaving_out_norms_that_do_nothing_changes_nothing() -> None:
    network = build("resnet8", images=SMALL).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # mean 0, variance 1, scale 1, shift 0: the identity
    traced = graphs.trace(network)
    without = graphs.without_norms(traced, graphs.convolutions(traced))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(without(images), network(images))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in without.modules())


class InPlace(nn.Module):
    """Rectifies its features in three ways whose outputs nobody reads, and computes something in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.in_vain = nn.Conv2d(3, 3, 1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        self.in_vain(features)
        self.activation(features)
        shifted = features - 0.5
        F.relu(shifted, inplace=True)
        shifted -= 0.1
        shifted.relu_()
        return shifted


def test_pruning_takes_out_what_no_answer_needs_and_leaves_what_changes_in_place() -> None:
    network = InPlace().eval()
    images = torch.rand(2, 3, 4, 4)
    traced = graphs.trace(network)
    graphs.prune(traced)
    assert "in_vain" not in {str(node.target) for node in traced.graph.nodes}
    assert torch.equal(traced(images), network(images))


def test_the_answers_of_a_graph_are_its_exits_in_order() -> None:
    several = graphs.trace(build("msdnet", images=SMALL, exits=3, base=1, step=1))
    assert [node.name for node in graphs.answers(several)] == [f"exits_{index}_classifier" for index in range(3)]
    assert len(graphs.answers(graphs.trace(build("resnet8", images=SMALL, width=2)))) == 1
