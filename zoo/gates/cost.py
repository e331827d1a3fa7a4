"""What an answer costs: multiply-accumulates of convolutions and linear layers, counted on the traced graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from zoo.errors import BadInput
from zoo.gates import graphs


def macs(network: nn.Module, image_shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the multiply-accumulates of one image up to each exit's answer, first exit first; one number for one exit.

    Counted is what the forward pass has run when the answer is there, in its own order, so with the classifiers of the
    exits before. That is how budgets are published; `early_exit.onnx` also puts off what only later answers need, so it
    does a little less. Biases, norms, activations and pooling do not count. `image_shape` is (channel, height, width);
    None is the network's own attribute of that name.

    Raises:
        BadInput: the network does not say the shape of its images, or cannot be traced.
    """
    shape = image_shape or getattr(network, "image_shape", None)
    if shape is None:
        raise BadInput(
            f"{type(network).__name__} does not say the shape of its images; pass image_shape=(channel, height, width)"
        )
    graph_module = graphs.trace(copy.deepcopy(network).to("meta").eval())
    ShapeProp(graph_module).propagate(torch.zeros(1, *shape, device="meta"))
    modules = dict(graph_module.named_modules())
    spent, total = {}, 0
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            total += _of(modules[str(node.target)], node)
        spent[node] = total
    costs: list[int] = []
    for answer in graphs.answers(graph_module):
        costs.append(max(spent[answer], *costs[-1:]) if costs else spent[answer])
    return tuple(costs)


def _of(layer: nn.Module, node: fx.Node) -> int:
    """Return what one call costs: every number of its output takes each weight of that number's channel once."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return 0
    numbers: int = math.prod(node.meta["tensor_meta"].shape)
    return numbers * (layer.weight.numel() // layer.weight.shape[0])
