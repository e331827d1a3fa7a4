"""Random gated networks: a template and a bank of candidates (Ensemble-in-One, AAAI 2023, section 3.1).

The template is any plain network that `torch.fx` can trace. Each convolution of its main branch, with the BatchNorm
that alone reads it, is a *gated layer*: the bank holds n candidates of it. Everything else (shortcut projections, the
classifier) is shared by all paths. A path picks one candidate per gated layer and is an argument of every call, never
state of the network:

    rgn = randomly_gate(build("resnet20"), candidates=2)      # 19 gated layers, 2^19 paths
    logits = rgn(images, path)

Candidates are separate leaf parameters, so that an optimiser skips those that a step did not use
(docs/adr/0003-candidates-are-leaves.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zoo import graphs, paths
from zoo.errors import BadInput
from zoo.graphs import Convolution

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
        if candidates < 1:
            raise BadInput(f"a gated layer needs at least 1 candidate, got {candidates}")
        if sharing not in get_args(Sharing):
            raise BadInput(f"sharing must be one of {', '.join(get_args(Sharing))}, got {sharing!r}")
        super().__init__()
        graph = graphs.trace(template)
        if (exits := len(graphs.answers(graph))) > 1:
            raise BadInput(
                f"{type(template).__name__} answers at {exits} exits; gates and exits are not combined, so gate a "
                "network with one answer"
            )
        self.convolutions = graphs.convolutions(graph)
        self.layers = [
            layer
            for layer in self.convolutions
            if not layer.projection and (sharing == "independent" or layer.norm is not None)
        ]
        if not self.layers:
            wanted = "2-d convolution" if sharing == "independent" else "2-d convolution with a BatchNorm of its own"
            raise BadInput(
                f"{type(template).__name__} has no {wanted} on its main branch, so there is nothing to gate; "
                "expected a convolutional network"
            )
        self.candidates = candidates
        self.sharing: Sharing = sharing
        self.template = template
        self.bank = nn.ModuleList()
        for layer in self.layers:
            parts = [layer.conv] if sharing == "independent" else []
            parts += [layer.norm] if layer.norm is not None else []
            alternatives = [
                nn.ModuleDict({self._role(layer, part): copy.deepcopy(template.get_submodule(part)) for part in parts})
                for _ in range(candidates)
            ]
            self.bank.append(nn.ModuleList(alternatives))
            for part in parts:
                _empty(template.get_submodule(part))
        self._trace = (graph,)  # in a tuple, or its copies of our layers would be registered as ours once more
        self._prefixes: dict[tuple[int, bool, bool], fx.GraphModule] = {}

    @staticmethod
    def _role(layer: Convolution, part: str) -> str:
        return "conv" if part == layer.conv else "norm"

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
            for role, module in cast(nn.ModuleDict, cast(nn.ModuleList, alternatives)[gate]).items():
                owner = layer.conv if role == "conv" else layer.norm
                for name, tensor in _tensors(module):
                    selected[f"{owner}.{name}"] = tensor
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

        Args:
            layer: 1 to `num_features`; the last is the logits.
            activated: take the feature behind the activation (the released Ensemble-in-One) or before it (DVERGE).
            folded: leave the BatchNorms out, for the tensors of `folded`.

        Raises:
            BadInput: a layer out of range.
        """
        if not 1 <= layer <= self.num_features:
            raise BadInput(f"layer {layer} is out of range, expected 1 to {self.num_features}")
        key = (layer, activated, folded)
        if key not in self._prefixes:
            self._prefixes[key] = graphs.prefix(
                self._trace[0],
                self.layers,
                layer,
                activated=activated,
                folded=self.convolutions if folded else (),
            )
        return self._prefixes[key]

    def features(
        self, images: Tensor, layer: int, tensors: dict[str, Tensor], *, activated: bool = False, folded: bool = False
    ) -> Tensor:
        """Run only the prefix up to `layer` with the tensors of `select` or `folded`."""
        return self.runner(layer, tensors, activated=activated, folded=folded)(images)

    def runner(
        self, layer: int, tensors: dict[str, Tensor], *, activated: bool = False, folded: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return the prefix up to `layer` as a function of images, with the tensors of `select` or `folded` bound."""
        return graphs.bound(self.prefix(layer, activated=activated, folded=folded), tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomGatedNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # graphs hold buffers, which a move to another device or type replaces
        self._trace = (graphs.trace(self.template),)
        self._prefixes.clear()
        return self

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
    rgn = RandomGatedNetwork(copy.deepcopy(network), candidates=candidates, sharing=sharing)
    with torch.no_grad():
        for alternatives in rgn.bank:
            for index, alternative in enumerate(cast(nn.ModuleList, alternatives)):
                for role, module in cast(nn.ModuleDict, alternative).items():
                    weight = cast(Tensor | None, module.weight)
                    if weight is None:  # a BatchNorm without an affine map
                        continue
                    draw = torch.empty_like(weight)
                    if start == "copy" and noise:
                        weight.mul_(1 + noise * draw.normal_(generator=generator))
                    elif start == "redraw" and role == "conv" and index > 0:
                        weight.copy_(draw.normal_(0.0, float(weight.std()), generator=generator))
    return rgn


def fold(
    network: nn.Module,
    convolutions: Sequence[Convolution],
    replaced: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Fold the private BatchNorms of `network` into its convolutions; tensors in `replaced` stand in for its own.

    Returns every tensor that the network without those norms needs, detached, by name; biases included.
    """
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: tensor.detach() for name, tensor in {**own, **replaced}.items()}
    for layer in convolutions:
        if layer.norm is None:
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


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is not None:
                yield name, tensor


def _empty(module: nn.Module) -> None:
    """Take the tensors out of a layer of the template; a call must bring them."""
    for name in [name for name, _ in _tensors(module)]:
        if name in module._parameters:
            module.register_parameter(name, None)
        else:
            module._buffers[name] = None
