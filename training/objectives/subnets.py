"""Subnets of a residual network: some paths of each block, and some channels inside it (EWS: Guo et al. 2022).

A block offers two paths, its residual branch and its skip, and channels: the input channels of the convolutions inside
the branch. A `Choice` says what is kept; `applied` makes a network answer as that subnet for a while, by hooks that put
zeros where something is left out. Nothing is rescaled. The weights are the network's own, so gradients reach them, and
a random gated network's template answers as a subnet of whatever path it is called with.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.objectives.base import check_choice
from zoo.errors import BadInput
from zoo.networks.resnet import BasicBlock, Bottleneck
from zoo.networks.wide_resnet import WideBlock

Rounding = Literal["ceil", "round"]

PATHS = 2
"""Of a block: the residual branch (0) and the skip (1)."""

# kind of block -> the convolutions whose input channels may be left out, and the layer that ends the residual branch
BLOCKS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    BasicBlock: (("conv2",), "norm2"),
    WideBlock: (("conv2",), "conv2"),
    Bottleneck: (("conv2", "conv3"), "norm3"),
}


@dataclass(frozen=True)
class Block:
    """A residual block: its name in the network, its convolutions and how many input channels each of them has."""

    name: str
    convolutions: tuple[str, ...]
    channels: tuple[int, ...]
    end: str
    """The layer whose output is the residual branch's."""
    skip: str
    """The layer whose output is the skip's."""


@dataclass(frozen=True)
class Kept:
    """What is kept of one block."""

    branch: bool
    skip: bool
    channels: tuple[tuple[int, ...], ...]
    """Per convolution the indices of its input channels, ascending; all of them where the branch is left out."""


Choice = tuple[Kept, ...]
"""A subnet: what is kept of each block, in the order of `residual_blocks`."""


def residual_blocks(network: nn.Module) -> tuple[Block, ...]:
    """Return the residual blocks of a network in the order of their names; empty if it has none."""
    found = []
    for name, module in network.named_modules():
        for kind, (convolutions, end) in BLOCKS.items():
            if isinstance(module, kind):
                names = tuple(f"{name}.{convolution}" for convolution in convolutions)
                channels = tuple(int(network.get_submodule(each).in_channels) for each in names)  # type: ignore[arg-type]
                found.append(Block(name, names, channels, f"{name}.{end}", f"{name}.shortcut"))
    return tuple(found)


def num_kept(count: int, keep: float, rounding: Rounding = "ceil") -> int:
    """Return how many of `count` paths or channels a share of `keep` is, at least 1."""
    # 0.55 * 100 is 55.00000000000001, which should be 55
    share = math.ceil(keep * count - 1e-9) if rounding == "ceil" else round(keep * count)
    return max(1, share)


@dataclass(frozen=True)
class Space:
    """The subnets to choose from: `paths` of 2 paths per block, and so many channels per convolution."""

    blocks: tuple[Block, ...]
    paths: int
    channels: tuple[tuple[int, ...], ...]


def space_of(network: nn.Module, keep: float, paths: Rounding = "ceil") -> Space:
    """Return the subnets of a network that keep a share of its paths and of its channels.

    Args:
        network: a plain network, or the template of a random gated one.
        keep: the share, in (0, 1]; the paper's rho.
        paths: how a share of the paths becomes a number. "ceil" keeps both of 2 for every share above 1/2; "round"
            keeps one below 3/4. Channels are always rounded up.

    Raises:
        BadInput: a network without residual blocks, or a share out of range.
    """
    if not 0 < keep <= 1:
        raise BadInput(f"need 0 < keep <= 1, got {keep}; it is the share of channels that a subnet keeps")
    check_choice("paths", paths, Rounding)
    blocks = residual_blocks(network)
    if not blocks:
        known = ", ".join(kind.__name__ for kind in BLOCKS)
        raise BadInput(
            f"ews takes subnets of residual blocks, and {type(network).__name__} has none (known are {known}); "
            "train a ResNet, a pre-activation ResNet or a wide ResNet"
        )
    channels = tuple(tuple(num_kept(count, keep) for count in block.channels) for block in blocks)
    return Space(blocks, num_kept(PATHS, keep, paths), channels)


def kept_of(block: Block, paths: Sequence[int], channels: Sequence[Sequence[int]]) -> Kept:
    """Return what is kept of a block: some of its `PATHS`, and per convolution the indices of some channels, all in any
    order; channels are ignored without the residual branch.
    """
    branch = 0 in paths
    everything = [range(count) for count in block.channels]
    return Kept(branch, 1 in paths, tuple(tuple(sorted(kept)) for kept in (channels if branch else everything)))


def random_choice(space: Space, generator: torch.Generator) -> Choice:
    """Draw a subnet uniformly; `generator` is a CPU one."""

    def draw(count: int, number: int) -> list[int]:
        return torch.randperm(count, generator=generator)[:number].tolist()

    return tuple(
        kept_of(block, draw(PATHS, space.paths), [draw(*pair) for pair in zip(block.channels, numbers, strict=True)])
        for block, numbers in zip(space.blocks, space.channels, strict=True)
    )


def lowest_norm_choice(space: Space, weights: Mapping[str, Tensor]) -> Choice:
    """Return the subnet of the channels, and paths, whose weights have the lowest L1 norms.

    The norm of a channel is that of the weights that read it; of a path, that of its convolutions. A skip without a
    convolution counts as the 1x1 convolution with ones on its diagonal that it is. `weights` are the network's
    parameters by name; of a random gated network those of the chosen path.
    """
    found = []
    for block, numbers in zip(space.blocks, space.channels, strict=True):
        norms = [weights[f"{name}.weight"].detach().float().abs().sum((0, 2, 3)) for name in block.convolutions]
        channels = [_lowest(norm, number) for norm, number in zip(norms, numbers, strict=True)]
        paths = [0, 1]
        if space.paths < PATHS:
            paths = _lowest(torch.stack([_path_norm(block, weights, skip=skip) for skip in (False, True)]), space.paths)
        found.append(kept_of(block, paths, channels))
    return tuple(found)


def _lowest(norms: Tensor, number: int) -> list[int]:
    return norms.argsort(stable=True)[:number].tolist()


def _path_norm(block: Block, weights: Mapping[str, Tensor], *, skip: bool) -> Tensor:
    own = {name: weight for name, weight in weights.items() if name.startswith(f"{block.name}.") and weight.ndim == 4}
    norms = [
        weight.detach().float().abs().sum() for name, weight in own.items() if name.startswith(f"{block.skip}.") == skip
    ]
    if norms:
        return torch.stack(norms).sum()
    first = own[f"{block.name}.conv1.weight"]
    return torch.tensor(float(first.shape[1]), device=first.device)


@contextlib.contextmanager
def applied(network: nn.Module, choice: Choice) -> Iterator[None]:
    """Let a network answer as the subnet `choice`; it is itself again afterwards, whatever happens.

    What keeps everything is left untouched, so a subnet that keeps all equals the network bit for bit.

    The network is a plain one, or the template of a random gated one.

    Raises:
        BadInput: the choice does not fit the network's blocks.
    """
    blocks = residual_blocks(network)
    _check(network, blocks, choice)
    masks = _masks(network, blocks, choice)
    with contextlib.ExitStack() as hooks:
        for block, kept in zip(blocks, choice, strict=True):
            for layer, stays in ((block.end, kept.branch), (block.skip, kept.skip)):
                if not stays:
                    hooks.callback(network.get_submodule(layer).register_forward_hook(_nothing).remove)
        for name, mask in masks.items():
            hooks.callback(network.get_submodule(name).register_forward_pre_hook(partial(_keep, mask)).remove)
        yield


def _check(network: nn.Module, blocks: tuple[Block, ...], choice: Choice) -> None:
    if len(choice) != len(blocks):
        its = f"{type(network).__name__}, which has {len(blocks)}"
        raise BadInput(f"a choice for {len(choice)} residual blocks does not fit {its}")
    for block, kept in zip(blocks, choice, strict=True):
        if not (kept.branch or kept.skip):
            raise BadInput(f"{block.name} must keep a path, got neither its residual branch nor its skip")
        expected, got = len(block.channels), len(kept.channels)
        if got != expected:
            raise BadInput(f"{block.name} has {expected} convolutions to choose channels of, got {got}")
        for name, count, channels in zip(block.convolutions, block.channels, kept.channels, strict=True):
            if not channels or len(set(channels)) < len(channels) or min(channels) < 0 or max(channels) >= count:
                inputs = f"some of its input channels 0 to {count - 1}"
                raise BadInput(f"{name} must keep {inputs}, once each, got {channels}")


def _masks(network: nn.Module, blocks: tuple[Block, ...], choice: Choice) -> dict[str, Tensor]:
    """Return, per convolution that loses channels, a tensor (1, channel, 1, 1) of ones and zeros on its device."""
    masks: dict[str, Tensor] = {}
    for block, kept in zip(blocks, choice, strict=True):
        for name, count, channels in zip(block.convolutions, block.channels, kept.channels, strict=True):
            if kept.branch and len(channels) < count:
                masks[name] = torch.zeros(count).index_fill_(0, torch.tensor(channels), 1.0)
    if not masks:
        return {}
    device = next(itertools.chain(network.parameters(), network.buffers())).device
    sent = torch.cat(list(masks.values())).to(device)  # one transfer for all of them
    parts = torch.split(sent, [len(mask) for mask in masks.values()])
    return {name: part.view(1, -1, 1, 1) for name, part in zip(masks, parts, strict=True)}


def _keep(mask: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * mask.to(inputs[0].dtype),)


def _nothing(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)
