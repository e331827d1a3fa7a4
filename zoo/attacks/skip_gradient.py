"""The Skip Gradient Method (Wu et al. 2020, arXiv:2002.05990): a surrogate whose gradients prefer the skip connections.

Every residual branch passes only a share gamma of its gradient back, so adversarial images made on the surrogate
transfer better. Residual additions are found in the traced graph, not by the names of layers or classes, so none is
left out silently. A network without any is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from zoo.errors import BadInput
from zoo.gates import graphs, self_check
from zoo.gates.derive import Ensemble


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, branch: Tensor, gamma: float) -> Tensor:
        context.gamma = gamma
        return branch.view_as(branch)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * context.gamma, None


def _scaled_gradient(branch: Tensor, gamma: float) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(branch, gamma)  # type: ignore[no-untyped-call]
    return scaled


def skip_gradient(network: nn.Module, gamma: float = 0.2, *, projections: bool = False) -> nn.Module:
    """Return `network` as a surrogate: the same answers, the gradient of each residual branch multiplied by gamma.

    Args:
        network: any network that `torch.fx` can trace, or an `Ensemble` of them; untouched, its weights are shared.
        gamma: the share that a branch passes back; 0.2 in the DVERGE protocol, 1 is the plain gradient.
        projections: scale also the blocks whose shortcut is a convolution. The original leaves out the first block of
            each stage, which in its networks are those.

    Raises:
        BadInput: gamma outside [0, 1], or no residual addition in the graph (VGG has none).
    """
    if not 0 <= gamma <= 1:
        raise BadInput(f"need 0 <= gamma <= 1, got {gamma}; 0.2 is usual")
    if isinstance(network, Ensemble):
        members = [skip_gradient(member, gamma, projections=projections) for member in network.members]
        return Ensemble(members).train(network.training)
    training = network.training
    graph_module = self_check.trace(network)
    branches = graphs.residual_branches(graph_module, projections=projections)
    if not branches:
        raise BadInput(
            f"{type(network).__name__} has no residual addition"
            f"{'' if projections else ' with an identity shortcut'}, so the skip gradient method means nothing here; "
            "use plain PGD"
        )
    for addition, branch in branches:
        with graph_module.graph.inserting_before(addition):
            scaled = graph_module.graph.call_function(_scaled_gradient, (branch, gamma))
        addition.replace_input_with(branch, scaled)
    graph_module.recompile()
    surrogate: fx.GraphModule = graph_module
    return surrogate.train(training)
