"""What is deployed: plain networks derived from a random gated one, alone or as an ensemble."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from zoo.errors import BadInput
from zoo.gates import graphs, self_check
from zoo.gates.rgn import RandomGatedNetwork, fold


def derive(rgn: RandomGatedNetwork, path: Sequence[int]) -> nn.Module:
    """Return the plain network of `path`, in evaluation mode, with copies of its tensors.

    It has the template's class, parameter names and parameter count, and equals `rgn(images, path)` bit for bit.

    Raises:
        BadPath: the path does not fit the network.
    """
    network = graphs.copied(rgn.template)
    for name, tensor in rgn.select(path).items():
        value = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        graphs.put(network, name, value)
    return network.eval()


class Ensemble(nn.Module):
    """Networks that answer together: logits are the log of the mean of the members' probabilities.

    The mean is taken in log space, so it does not saturate. One member answers with its own logits.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise BadInput("an ensemble needs at least one member, got none")

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities (batch, class); for one member its logits."""
        # a copy each: a member that normalises in place would change what the next one sees; none alone, none in graphs
        several = len(self.members) > 1 and not torch.compiler.is_compiling()
        logits = [member(images.clone() if several else images) for member in self.members]
        return logits[0] if len(logits) == 1 else mean_probability(torch.stack(logits))


def mean_probability(logits: Tensor) -> Tensor:
    """Return the log of the mean probability over the first dimension of logits (member, batch, class)."""
    log_prob = logits.log_softmax(-1)
    return log_prob.logsumexp(0) - torch.tensor(float(len(logits)), device=logits.device).log()


def agreement(logits: Tensor) -> Tensor:
    """Return the share of members (or draws) whose class is that of their mean probability, float32 (batch).

    Logits are (member, batch, class); log-probabilities do as well.
    """
    winner = logits.softmax(-1).mean(0).argmax(-1)
    return (logits.argmax(-1) == winner).sum(0).float() / len(logits)


def folded_copy(network: nn.Module) -> fx.GraphModule:
    """Return `network` with its BatchNorms folded into its convolutions: the same function in evaluation mode, faster.

    What no answer depends on is left out; `num_exits` is kept.

    Raises:
        BadInput: the network is in training mode, where BatchNorm is not affine, or its graph is not what it runs.
    """
    graphs.check_evaluating(network, "folding")
    original, network = network, graphs.copied(network)
    graph = graphs.trace(network)
    graphs.prune(graph)
    layers = [layer for layer in graphs.convolutions(graph) if layer.foldable]
    tensors = fold(network, layers, {})
    folded = graphs.without_norms(graph, layers)
    for layer in layers:
        conv = cast(nn.Conv2d, folded.get_submodule(layer.conv))
        learns = conv.weight.requires_grad
        conv.weight = nn.Parameter(tensors[f"{layer.conv}.weight"], requires_grad=learns)
        conv.bias = nn.Parameter(tensors[f"{layer.conv}.bias"], requires_grad=learns)
    folded.num_exits = len(graphs.answers(folded))  # type: ignore[assignment]
    what = f"{type(original).__name__} with its BatchNorms folded"
    self_check.check_same(original, original, {what: folded.eval()}, self_check.probes(original))
    return folded


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the BatchNorm statistics of a derived network, in place: the plain mean over `batches`.

    Use training images *with the training augmentation*: without its zero-padded crop the statistics belong to other
    images (batch, channel, height, width), which costs several points of accuracy. The weights stay as they are, and
    the network comes back in evaluation mode.

    Raises:
        BadInput: no batch at all; the statistics stay as they were.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise BadInput("re-calibration needs at least one batch of training images, got none")
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images in itertools.chain([first], remaining):
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
