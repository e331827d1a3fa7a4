"""Random gated networks: a template and a bank of candidates (Ensemble-in-One, AAAI 2023, section 3.1).

The template is any plain network that `torch.fx` can trace. Each convolution of its main branch, with the BatchNorm
that alone reads it, is a *gated layer*: the bank holds n candidates of it, each with all its tensors, those of a
parametrisation (weight_norm, spectral_norm) included. Everything else (shortcut projections, layers that share a
tensor, the classifier) is shared by all paths. A path picks one candidate per gated layer and is an argument of every
call, never state of the network:

    rgn = randomly_gate(build("resnet20"), candidates=2)      # 19 gated layers, 2^19 paths
    logits = rgn(images, path)

Candidates are separate leaf parameters, so that an optimiser skips those that a step did not use
(docs/adr/0003-candidates-are-leaves.md).
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zoo import paths
from zoo.errors import BadInput, GatingWarning, check_count
from zoo.gates import graphs, self_check
from zoo.gates.graphs import Convolution

Sharing = Literal["independent", "shared_conv"]
Start = Literal["redraw", "copy"]


class RandomGatedNetwork(nn.Module):
    """A template whose gated layers have `candidates` alternatives each.

    Args:
        template: a plain network; taken over, not copied. Its gated tensors move into the bank.
        candidates: alternatives per gated layer, n.
        sharing: "independent" gives every candidate its own convolution and BatchNorm (the paper); "shared_conv" shares
            the convolution, and only the BatchNorm differs (the authors' released code).

    All candidates start equal to the template's own layer; `randomly_gate` makes them differ.

    Raises:
        BadInput: no layer to gate, several exits, or fewer than one candidate.
    """

    def __init__(self, template: nn.Module, *, candidates: int = 2, sharing: Sharing = "independent") -> None:
        check_count("candidates", candidates)
        if sharing not in get_args(Sharing):
            raise BadInput(f"sharing must be one of {', '.join(get_args(Sharing))}, got {sharing!r}")
        super().__init__()
        if isinstance(template, RandomGatedNetwork):
            raise BadInput("this network is gated already; gate the plain network, or one derived from it")
        graph = graphs.trace(template)
        if (exits := len(graphs.answers(graph))) > 1:
            raise BadInput(
                f"{type(template).__name__} answers at {exits} exits; gates and exits are not combined, so gate a "
                "network with one answer"
            )
        self.convolutions = graphs.convolutions(graph)
        self.layers = [
            layer for layer in self.convolutions if layer.main and (sharing == "independent" or layer.norm is not None)
        ]
        if not self.layers:
            raise BadInput(_nothing_to_gate(template, self.convolutions, graphs.others(graph, self.convolutions)))
        self.candidates = candidates
        self.sharing: Sharing = sharing
        self.template = template
        self.bank = nn.ModuleList()
        for layer in self.layers:
            parts = self.parts(layer)
            alternatives = [
                nn.ModuleDict({role: graphs.copied(template.get_submodule(name)) for role, name in parts.items()})
                for _ in range(candidates)
            ]
            self.bank.append(nn.ModuleList(alternatives))
            for name in parts.values():
                _empty(template.get_submodule(name))
        self._trace: tuple[fx.GraphModule, ...] = ()
        self._prefixes: dict[tuple[int, bool, bool], fx.GraphModule] = {}

    def parts(self, layer: Convolution) -> dict[str, str]:
        """Return the names of the modules of a gated layer that have candidates, by role: "conv" and "norm"."""
        parts = {"conv": layer.conv} if self.sharing == "independent" else {}
        return parts if layer.norm is None else {**parts, "norm": layer.norm}

    @property
    def num_gates(self) -> int:
        """Number of gated layers, L; a path has this many gates."""
        return len(self.layers)

    @property
    def num_features(self) -> int:
        """Number of layers that distillation may compare: the gated layers and the logits."""
        return len(self.layers) + 1

    def forward(self, images: Tensor, path: Sequence[int]) -> Tensor:
        """Return the logits (batch, class) of images (batch, channel, height, width) in [0, 1] along `path`.

        In training mode the BatchNorm statistics of the chosen candidates, and of no others, are updated.
        """
        return cast(Tensor, functional_call(self.template, self.select(path), (images,)))

    def select(self, path: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of `path` under their names in the template; they are the bank's own, not copies.

        Raises:
            BadPath: the path does not fit this network.
        """
        selected: dict[str, Tensor] = {}
        for layer, alternatives, gate in zip(self.layers, self.bank, self.check(path), strict=True):
            parts = self.parts(layer)
            for role, module in cast(nn.ModuleDict, cast(nn.ModuleList, alternatives)[gate]).items():
                selected.update((f"{parts[role]}.{name}", tensor) for name, tensor in graphs.tensors(module))
        return selected

    def check(self, path: Sequence[int]) -> paths.Path:
        """Return `path` as a tuple if it fits this network, else raise BadPath."""
        return paths.check(path, self.num_gates, self.candidates)

    def folded(self, path: Sequence[int], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the weights of `path` with every private BatchNorm folded into its convolution, detached.

        Valid for evaluation mode, where BatchNorm is affine: w' = w * gamma / sqrt(var + eps). They belong to
        `prefix(..., folded=True)`. `dtype` casts them once, instead of autocast at every call.
        """
        return fold(self.template, self.convolutions, self.select(path), dtype=dtype)

    def prefix(self, layer: int, *, activated: bool = False, folded: bool = False) -> fx.GraphModule:
        """Return the network cut off at feature `layer`, sharing its layers; call it through `functional_call`.

        Layers are 1 to `num_features`, of which the last is the logits. A feature is taken behind the activation if
        `activated` (the released Ensemble-in-One), else before it (DVERGE). `folded` leaves the BatchNorms out, for the
        tensors of `folded`.

        Raises:
            BadInput: a layer out of range.
        """
        key = (layer, activated, folded)
        if key not in self._prefixes:
            left_out = self.convolutions if folded else ()
            self._prefixes[key] = graphs.prefix(self._graph(), self.layers, layer, activated=activated, folded=left_out)
        return self._prefixes[key]

    def runner(
        self, layer: int, tensors: dict[str, Tensor], *, activated: bool = False, folded: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return the prefix up to `layer` as a function of images, with the tensors of `select` or `folded` bound."""
        return graphs.bound(self.prefix(layer, activated=activated, folded=folded), tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomGatedNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # graphs hold tensors of the network itself, which a move to another device or type replaces
        self._trace = ()
        self._prefixes.clear()
        return self

    def _graph(self) -> fx.GraphModule:
        """Return the template's graph, traced when first asked for; a forward that reads gated weights is lent some."""
        if not self._trace:
            lent = self.select([0] * self.num_gates)
            for name, tensor in lent.items():
                graphs.put(self.template, name, tensor)
            try:
                graph = graphs.trace(self.template)
            finally:
                for layer in self.layers:
                    for part in self.parts(layer).values():
                        _empty(self.template.get_submodule(part))
            self._trace = (graph,)  # in a tuple, or its copies of our layers would be registered as ours once more
        return self._trace[0]

    def check_itself(self) -> None:
        """Compare the graph of several paths with the network, and look for candidates that change nothing.

        Raises:
            BadInput: the forward is traced otherwise than it runs, or a candidate reaches no answer.
        """
        draws = random.Random(0)  # noqa: S311 - repeatable
        chosen = [(gate,) * self.num_gates for gate in range(self.candidates)]
        images = self_check.probes(self, run=lambda batch: self(batch, chosen[0]))
        name, last = type(self.template).__name__, self.num_features
        for path in (chosen[-1], paths.sample(self.num_gates, self.candidates, draws)):
            ways = {
                f"the torch.fx graph of {name}": self.runner(last, self.select(path)),
                f"{name} with its BatchNorms folded": self.runner(last, self.folded(path), folded=True),
            }
            self_check.check_same(self.template, partial(self, path=path), ways, images)
        parts = [part for layer in self.layers for part in self.parts(layer).values()]
        for gate, path in enumerate(chosen):
            self_check.check_reach(self.template, self.select(path), parts, images[:2], gate)

    def extra_repr(self) -> str:
        """Say how many gates and candidates there are."""
        return f"gates={self.num_gates}, candidates={self.candidates}, sharing={self.sharing!r}"


def randomly_gate(
    network: nn.Module,
    *,
    candidates: int = 2,
    sharing: Sharing = "independent",
    start: Start = "redraw",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> RandomGatedNetwork:
    """Make a random gated network of any convolutional network that `torch.fx` can trace.

    Args:
        network: the template; left untouched (a copy is gated).
        candidates: alternatives per gated layer, n.
        sharing: see `RandomGatedNetwork`.
        start: "redraw" keeps the network's own layer as candidate 0 and draws the others from a normal distribution of
            the same standard deviation, biases and BatchNorms kept; where the network is fresh and initialised so, as
            our residual ones are, candidates are independent draws of one initialiser (with "shared_conv"
            there is no convolution to draw, and all candidates start equal, as in the released code). "copy" starts all
            candidates from the network's (trained) layer, each multiplied by 1 + `noise` * N(0, 1) elementwise.
        noise: relative noise of "copy"; at 0 all candidates stay equal until training tells them apart.
        generator: where the draws come from; torch's global generator if None.

    Raises:
        BadInput: nothing to gate, several exits, or a forward that cannot be traced.
    """
    if start not in get_args(Start):
        raise BadInput(f"start must be one of {', '.join(get_args(Start))}, got {start!r}")
    if not 0 <= noise < math.inf:
        raise BadInput(f"noise must be a finite number of at least 0, got {noise!r}")
    rgn = RandomGatedNetwork(graphs.copied(network), candidates=candidates, sharing=sharing)
    with torch.no_grad():
        for layer, alternatives in zip(rgn.layers, rgn.bank, strict=True):
            for index, alternative in enumerate(cast(nn.ModuleList, alternatives)):
                for role, module in cast(nn.ModuleDict, alternative).items():
                    if start == "copy" and noise:
                        for weight, put in _weights(module, rgn.parts(layer)[role], least_dim=1):
                            put(weight * (1 + noise * _normal(weight, generator)))
                    elif start == "redraw" and role == "conv" and index > 0:
                        for weight, put in _weights(module, rgn.parts(layer)[role], least_dim=2):
                            put(weight.std() * _normal(weight, generator))
    rgn.check_itself()
    _warn(rgn, drawn=noise > 0 if start == "copy" else sharing == "independent")
    return rgn


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).normal_(generator=generator)


def _weights(module: nn.Module, name: str, *, least_dim: int) -> Iterator[tuple[Tensor, Callable[[Tensor], object]]]:
    """Yield each weight of the convolution or norm `name`, and the function that puts another there.

    That is `weight`, through its parametrisation if it has one. A subclass may have weights of other names: all
    parameters of so many dimensions count there, but for biases.
    """
    if parametrize.is_parametrized(module, "weight"):

        def put(weight: Tensor) -> None:
            try:
                module.weight = weight
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise BadInput(
                    f"{name} has a parametrised weight that cannot be set ({type(error).__name__}: {error}); "
                    'give its parametrisation a right_inverse, or gate the network with start="copy" and no noise'
                ) from error

        yield cast(Tensor, module.weight), put
        return
    own = {leaf: tensor for leaf, tensor in module.named_parameters() if leaf.rpartition(".")[2] != "bias"}
    for leaf, tensor in own.items():
        if leaf != "weight" and tensor.dim() < max(2, least_dim):
            continue
        if least_dim > 1 and tensor.numel() < 2:
            raise BadInput(
                f"{name} has a single weight, which has no standard deviation to draw others with; gate the "
                'network with start="copy" and noise'
            )
        yield tensor, tensor.copy_


def _nothing_to_gate(template: nn.Module, convolutions: Sequence[Convolution], others: Sequence[str]) -> str:
    name = type(template).__name__
    if others:
        return (
            f"{name} has no convolution that can be gated: {len(others)} are not nn.Conv2d or share a tensor with "
            f"another layer ({_listed(others)}); expected nn.Conv2d layers with tensors of their own"
        )
    if any(layer.main for layer in convolutions):  # so it is the norms that are missing
        return (
            f"{name} has no 2-d convolution with a BatchNorm of its own on its main branch, so there is nothing to "
            "gate where convolutions are shared; gate it with sharing='independent'"
        )
    return (
        f"{name} has no 2-d convolution on its main branch, so there is nothing to gate; expected a convolutional "
        "network"
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _equal(alternatives: nn.Module) -> bool:
    """Whether several candidates of a layer have the same tensors."""
    states = [dict(graphs.tensors(one)) for one in cast(nn.ModuleList, alternatives)]
    return len(states) > 1 and all(
        torch.equal(tensor, other[name]) for other in states[1:] for name, tensor in states[0].items()
    )


def _warn(rgn: RandomGatedNetwork, *, drawn: bool) -> None:
    """Say what a user would not expect: convolutions without gates, a single gate, or equal candidates if `drawn`."""
    said = []
    equal = [layer.conv for layer, bank in zip(rgn.layers, rgn.bank, strict=True) if drawn and _equal(bank)]
    if equal:
        said.append(
            f": all candidates of {_listed(equal)} start equal, because the weights there are all zero or cannot be "
            "drawn; training has to tell them apart"
        )
    if others := graphs.others(rgn._graph(), rgn.convolutions):
        counted = "1 convolution" if len(others) == 1 else f"{len(others)} convolutions"
        said.append(
            f" has {counted} without a gate, shared by all paths, because only nn.Conv2d layers with tensors of their "
            f"own can have one: {_listed(others)}"
        )
    if rgn.num_gates == 1:
        said.append(
            f" has a single gated layer, {rgn.layers[0].conv}, so its {rgn.candidates} paths share all other layers "
            "and hardly make an ensemble"
        )
    for text in said:
        warnings.warn(type(rgn.template).__name__ + text, GatingWarning, stacklevel=3)


def fold(
    network: nn.Module,
    convolutions: Sequence[Convolution],
    replaced: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Fold the private BatchNorms of `network` into its convolutions, where `Convolution.foldable` allows it.

    Tensors in `replaced` stand in for the network's own. Returns every tensor that the network without those norms
    needs, detached, by name; biases included.
    """
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: tensor.detach() for name, tensor in {**own, **replaced}.items()}
    for layer in convolutions:
        if layer.norm is None or not layer.foldable:
            continue
        norm = cast(nn.BatchNorm2d, network.get_submodule(layer.norm))
        weight, bias = fuse_conv_bn_weights(
            tensors[f"{layer.conv}.weight"],
            tensors.get(f"{layer.conv}.bias"),
            tensors.pop(f"{layer.norm}.running_mean"),
            tensors.pop(f"{layer.norm}.running_var"),
            norm.eps,
            tensors.pop(f"{layer.norm}.weight", None),
            tensors.pop(f"{layer.norm}.bias", None),
        )
        tensors.pop(f"{layer.norm}.num_batches_tracked", None)
        tensors[f"{layer.conv}.weight"], tensors[f"{layer.conv}.bias"] = weight.detach(), bias.detach()
    if dtype is not None:
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return tensors


def _empty(module: nn.Module) -> None:
    """Take the tensors out of a layer of the template; a call must bring them."""
    for owner in module.modules():
        for name in [name for name, tensor in owner._parameters.items() if tensor is not None]:
            owner.register_parameter(name, None)
        for name in owner._buffers:
            owner._buffers[name] = None
