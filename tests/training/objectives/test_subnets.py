from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.subnets import (
    Choice,
    Kept,
    Space,
    applied,
    lowest_norm_choice,
    num_kept,
    random_choice,
    residual_blocks,
    space_of,
)
from zoo.errors import BadInput
from zoo.gates.derive import derive
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build
from zoo.networks.wide_resnet import WideResNet

SMALL = ImageFormat(height=16, width=16)
KINDS: dict[str, dict[str, Any]] = {
    "resnet8": {"width": 4},
    "wide_resnet10_1": {},
    "preact_resnet18": {"width": 4},
    "resnet50_cifar": {"width": 2},
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "wide_resnet10_1":
        network: nn.Module = WideResNet(10, 1, SMALL)
    else:
        network = build(name, images=SMALL, **KINDS[name])
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):  # gains and shifts that tell the channels apart
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)
    return network


def images(size: int = 6) -> Tensor:
    return torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hooks(network: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules())


def everything(network: nn.Module) -> Choice:
    blocks = residual_blocks(network)
    return tuple(Kept(True, True, tuple(tuple(range(count)) for count in block.channels)) for block in blocks)


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


# ---- which blocks there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "first"),
    [
        ("resnet20", 9, (16,)),
        ("wide_resnet28_10", 12, (160,)),
        ("preact_resnet18", 8, (64,)),
        ("resnet50_cifar", 16, (64, 64)),
    ],
)
def test_the_blocks_and_channels_of_each_network_are_found(name: str, number: int, first: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network = build(name)
    blocks = residual_blocks(network)
    assert len(blocks) == number
    assert blocks[0].channels == first
    assert len({block.name for block in blocks}) == number
    for block in blocks:
        for convolution, channels in zip(block.convolutions, block.channels, strict=True):
            assert network.get_submodule(convolution).in_channels == channels


def test_a_gated_networks_template_has_the_blocks_of_the_plain_one() -> None:
    plain = make("resnet8")
    assert residual_blocks(randomly_gate(plain, candidates=2).template) == residual_blocks(plain)


@pytest.mark.parametrize(
    ("count", "keep", "up", "nearest"),
    [
        (2, 0.7, 2, 1),
        (2, 0.9, 2, 2),
        (2, 0.5, 1, 1),
        (2, 0.1, 1, 1),
        (16, 0.7, 12, 11),
        (64, 0.9, 58, 58),
        (5, 1, 5, 5),
    ],
)
def test_shares_become_numbers_as_the_release_or_the_papers_figure_has_it(
    count: int, keep: float, up: int, nearest: int
) -> None:
    assert num_kept(count, keep, "ceil") == up
    assert num_kept(count, keep, "round") == nearest


def test_rounding_up_is_not_misled_by_the_last_bit() -> None:
    assert 0.55 * 100 > 55
    assert num_kept(100, 0.55) == 55


def test_a_space_keeps_channels_by_rounding_up_and_paths_as_asked() -> None:
    network = make("resnet8")
    assert space_of(network, 0.7).paths == 2
    space = space_of(network, 0.7, "round")
    assert space.paths == 1
    assert space.channels == ((3,), (6,), (12,))


# ---- what a subnet computes ------------------------------------------------------------------------------------------


def test_a_subnet_that_keeps_everything_is_the_network_bit_for_bit(network: nn.Module) -> None:
    network.eval()
    assert space_of(network, 1.0).paths == 2
    choice = random_choice(space_of(network, 1.0), torch.Generator().manual_seed(0))
    assert choice == everything(network)
    whole = network(images())
    with applied(network, choice):
        assert hooks(network) == 0
        assert torch.equal(network(images()), whole)


@pytest.mark.parametrize("training", [False, True])
def test_masking_equals_really_removing_the_channels(network: nn.Module, training: bool) -> None:
    # one convolution of the third block, its input and weight cut by index_select
    block = residual_blocks(network)[2]
    for position, (name, count) in enumerate(zip(block.convolutions, block.channels, strict=True)):
        kept = tuple(range(0, count, 2))
        channels = [tuple(range(other)) for other in block.channels]
        channels[position] = kept
        choice = list(everything(network))
        choice[2] = Kept(True, True, tuple(channels))
        network.train(training)
        cut = copy.deepcopy(network)
        layer = cut.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)

        def removed(features: Tensor, layer: nn.Conv2d = layer, kept: tuple[int, ...] = kept) -> Tensor:
            index = torch.tensor(kept)
            weight = layer.weight.index_select(1, index)
            return F.conv2d(features.index_select(1, index), weight, layer.bias, layer.stride, layer.padding)

        layer.forward = removed  # type: ignore[method-assign]
        with applied(network, tuple(choice)):
            found = network(images())
        assert not torch.allclose(found, network(images()), atol=1e-3)
        torch.testing.assert_close(found, cut(images()), rtol=1e-4, atol=1e-5)


def test_without_its_branch_a_block_passes_on_the_skip_and_without_its_skip_the_branch(network: nn.Module) -> None:
    network.eval()
    for position in (0, 1, 3) if len(residual_blocks(network)) > 3 else (0, 1):
        block = residual_blocks(network)[position]
        module = network.get_submodule(block.name)
        caught: dict[str, Tensor] = {}
        watched = [
            network.get_submodule(layer).register_forward_hook(
                lambda _, inputs, output, layer=layer, caught=caught: caught.setdefault(layer, output)
            )
            for layer in (block.end, block.skip, block.name)
        ]
        network(images())
        for handle in watched:
            handle.remove()
        last = getattr(module, "activation3", None) or getattr(module, "activation2", None)
        behind = nn.Identity() if block.end.endswith("conv2") else last
        assert behind is not None
        torch.testing.assert_close(behind(caught[block.end] + caught[block.skip]), caught[block.name])
        for branch, only in ((False, block.skip), (True, block.end)):
            choice = list(everything(network))
            choice[position] = Kept(branch, not branch, choice[position].channels)
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
            with applied(network, tuple(choice)):
                network(images())
            handle.remove()
            torch.testing.assert_close(seen[0], behind(caught[only]))


def test_a_gated_networks_template_answers_as_the_same_subnet_of_the_derived_path() -> None:
    rgn = randomly_gate(make("resnet8"), candidates=2).eval()
    path = [0, 1] * (rgn.num_gates // 2) + [1] * (rgn.num_gates % 2)
    choice = random_choice(space_of(rgn.template, 0.5, "round"), torch.Generator().manual_seed(3))
    plain = derive(rgn, path)
    with applied(rgn.template, choice):
        found = rgn(images(), path)
    assert not torch.allclose(found, rgn(images(), path), atol=1e-3)
    with applied(plain, choice):
        assert torch.equal(found, plain(images()))


def test_gradients_reach_the_kept_channels_alone() -> None:
    network = make("resnet8").train()
    choice = random_choice(replace(space_of(network, 0.5), paths=2), torch.Generator().manual_seed(0))
    with applied(network, choice):
        network(images()).square().sum().backward()
    for block, kept in zip(residual_blocks(network), choice, strict=True):
        weight = network.get_submodule(block.convolutions[0]).weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        touched = weight.grad.abs().sum((0, 2, 3)) > 0
        assert set(touched.nonzero().flatten().tolist()) <= set(kept.channels[0])
        assert touched.any()


def test_half_precision_stays_half_precision() -> None:
    network = make("resnet8").eval().bfloat16()
    with applied(network, random_choice(space_of(network, 0.5, "round"), torch.Generator().manual_seed(0))):
        assert network(images().bfloat16()).dtype == torch.bfloat16


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_gone_afterwards_also_after_an_exception(network: nn.Module) -> None:
    network.eval()
    whole = network(images())
    choice = random_choice(space_of(network, 0.5, "round"), torch.Generator().manual_seed(0))
    with applied(network, choice):
        assert hooks(network) > 0
    assert hooks(network) == 0
    with pytest.raises(RuntimeError), applied(network, choice):
        network(torch.rand(2, 5, 16, 16))
    assert hooks(network) == 0
    assert torch.equal(network(images()), whole)


def test_hooks_are_gone_when_one_of_them_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make("resnet8")
    last = network.get_submodule(residual_blocks(network)[-1].convolutions[0])

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr(last, "register_forward_pre_hook", refuse)
    choice = random_choice(space_of(network, 0.5), torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="no hook here"), applied(network, choice):
        pass
    assert hooks(network) == 0


# ---- how a subnet is chosen ------------------------------------------------------------------------------------------


def test_random_subnets_are_uniform_over_channels_and_paths() -> None:
    space = space_of(make("resnet8"), 0.5, "round")
    generator = torch.Generator().manual_seed(0)
    drawn = [random_choice(space, generator) for _ in range(600)]
    branches = sum(choice[1].branch for choice in drawn)
    assert abs(branches - 300) < 75  # six standard deviations
    kept = [choice[0].channels[0] for choice in drawn if choice[0].branch]
    assert all(len(channels) == 2 for channels in kept)
    for channel in range(4):
        assert abs(sum(channel in channels for channels in kept) / len(kept) - 0.5) < 0.15
    assert all(choice[0].branch != choice[0].skip for choice in drawn)


def test_l1_keeps_the_channels_whose_weights_are_smallest() -> None:
    network = make("resnet8")
    wanted = {0: (1, 3), 1: (0, 2, 5, 7), 2: (0, 1, 2, 3, 4, 5, 6, 7)}
    with torch.no_grad():
        for position, block in enumerate(residual_blocks(network)):
            weight = network.get_submodule(block.convolutions[0]).weight
            assert isinstance(weight, Tensor)
            weight.fill_(-2.0)  # large in size, if not in sign
            weight[:, list(wanted[position])] = 1.0
    choice = lowest_norm_choice(replace(space_of(network, 0.5), paths=2), dict(network.named_parameters()))
    assert {position: kept.channels[0] for position, kept in enumerate(choice)} == wanted
    assert all(kept.branch and kept.skip for kept in choice)


def test_l1_keeps_the_path_whose_weights_are_smaller() -> None:
    network = make("resnet8")
    space = space_of(network, 0.5, "round")
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.ndim == 4:
                weight.fill_(1e-6 if ".conv" in name else 1.0)
    assert [kept.branch for kept in lowest_norm_choice(space, weights)] == [True, True, True]
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.ndim == 4:
                weight.fill_(1.0 if ".conv" in name else 1e-6)
    assert [kept.skip for kept in lowest_norm_choice(space, weights)] == [True, True, True]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_network_without_residual_blocks_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"residual blocks, and LeNet has none .* train a ResNet"):
        space_of(build("lenet"), 0.7)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(BadInput, match=r"need 0 < keep <= 1, got"):
        space_of(make("resnet8"), keep)


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(BadInput, match="paths must be one of ceil, round, got 'floor'"):
        space_of(make("resnet8"), 0.7, "floor")  # type: ignore[arg-type]


def test_a_choice_that_does_not_fit_is_refused() -> None:
    network = make("resnet8")
    whole = everything(network)
    first = whole[0]
    wrong = {
        r"a choice for 2 residual blocks does not fit CifarResNet, which has 3": whole[:2],
        r"stages.0.0 must keep a path": (Kept(False, False, first.channels), *whole[1:]),
        r"stages.0.0 has 1 convolutions to choose channels of, got 0": (Kept(True, True, ()), *whole[1:]),
        r"channels 0 to 3, once each, got \(0, 4\)": (Kept(True, True, ((0, 4),)), *whole[1:]),
        r"channels 0 to 3, once each, got \(1, 1\)": (Kept(True, True, ((1, 1),)), *whole[1:]),
        r"channels 0 to 3, once each, got \(\)": (Kept(True, True, ((),)), *whole[1:]),
    }
    for message, choice in wrong.items():
        with pytest.raises(BadInput, match=message), applied(network, choice):
            pass
        assert hooks(network) == 0


def test_a_space_says_what_it_chooses_from() -> None:
    space = space_of(make("resnet50_cifar"), 0.7)
    assert isinstance(space, Space)
    assert space.channels[0] == (2, 2)
    assert space.channels[-1] == (12, 12)
