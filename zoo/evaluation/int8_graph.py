"""The int8 graph under attack: it answers, and the float32 weights that it rounds give the gradient.

Rounding has no useful gradient of its own, so an attack that asks the graph for one finds nothing, which looks like
robustness and is none (Athalye et al. 2018, arXiv:1802.00420). Two attackers are measured: one who has the weights only
and shows the graph what fools them, and one who has both and takes rounding for the identity on the way back (BPDA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.attacks.outputs import Model, logits_of
from zoo.bundle.bundle import Bundle, int8_file
from zoo.errors import BadInput
from zoo.export.onnx_graphs import as_numpy
from zoo.export.stencil import GATES, IMAGES, LOGITS
from zoo.runtime import session

Graph = Callable[[Tensor, Sequence[int] | None], Tensor]
"""Images (batch, channel, height, width) in [0, 1], and the path of a gated graph -> logits (batch, class)."""


class Int8Network(nn.Module):
    """Answers as the int8 graph does; its gradient is that of the weights, at the same image.

    Args:
        weights: what the graph rounds, images -> logits, differentiable.
        graph: see `Graph`.
        path: of a gated graph.
    """

    def __init__(self, weights: Model, graph: Graph, path: Sequence[int] | None = None) -> None:
        super().__init__()
        self.weights = weights  # a module is registered, a function is kept
        self.graph = graph
        self.path = path
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the graph's logits (batch, class)."""
        logits = self.graph(images, self.path)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return logits
        differentiable: Tensor = _StraightThrough.apply(self.weights(images), logits)  # type: ignore[no-untyped-call]
        return differentiable


class _StraightThrough(torch.autograd.Function):
    """Forward the second argument; backward the identity on the first."""

    @staticmethod
    def forward(context: Any, differentiable: Tensor, answer: Tensor) -> Tensor:
        return answer.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def int8_graph(bundle: Bundle, variant: str) -> Graph:
    """Open the int8 graph of a variant.

    Raises:
        BadInput: the bundle has none.
        BundleError: ONNX Runtime cannot load it.
    """
    check_int8(bundle, variant)
    opened = session(bundle.read(int8_file(variant)), threads=torch.get_num_threads())

    def answer(images: Tensor, path: Sequence[int] | None = None) -> Tensor:
        feeds = {IMAGES: as_numpy(images)}
        if path is not None:
            feeds[GATES] = np.array(path, np.int64)
        (logits,) = opened.run([LOGITS], feeds)
        return torch.from_numpy(logits).to(images.device)

    return answer


def check_int8(bundle: Bundle, variant: str) -> None:
    """Raise BadInput if the bundle has no int8 graph of the variant."""
    if not bundle.has_int8(variant):
        listed = () if bundle.card.int8 is None else bundle.card.int8.variants
        raise BadInput(
            f"{bundle.card.name} has no int8 graph of {variant!r}, only of {', '.join(listed) or 'none'}; "
            f"`manygates export MODEL --int8` adds them to a bundle of yours"
        )


def attack_weights(
    weights: Model,
    deployed: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack the weights by PGD on cross-entropy, and show every iterate of every start to the graph as well.

    No image is left out when the weights lose it: what lies just across their border need not lie across the graph's.

    Args:
        weights: the float32 network, images -> logits (batch, class).
        deployed: the graph that rounds it (`Int8Network`).
        images: (image, channel, height, width) in [0, 1].
        labels: (image,).
        budget: of the attack.
        generator: of the starts.

    Returns:
        Where the weights, and where the graph, answered every iterate correctly (image,) bool, the image itself
        included, and the last iterates of the first start (image, channel, height, width).
    """
    kept = torch.stack([logits_of(model, images).argmax(1) == labels for model in (weights, deployed)])
    last_of_first = images
    once = LinfBudget(eps=budget.eps, steps=budget.steps, step_size=budget.step_size)
    for attempt in range(budget.restarts):
        starts = budget.start(images, generator)
        rows = torch.arange(len(images), device=images.device) if attempt == 0 else kept.any(0).nonzero()[:, 0]
        if not len(rows):
            break

        def watch(_: int, iterate: Tensor, __: Tensor, rows: Tensor = rows) -> None:
            kept[1, rows] &= logits_of(deployed, iterate).argmax(1) == labels[rows]

        def judged_weights(pixels: Tensor, rows: Tensor = rows) -> Tensor:
            logits = weights(pixels)
            kept[0, rows] &= logits.detach().argmax(1) == labels[rows]
            return logits

        last = pgd(judged_weights, images[rows], labels[rows], once, start=starts[rows], watch=watch)
        kept[0, rows] &= logits_of(weights, last).argmax(1) == labels[rows]
        last_of_first = last if attempt == 0 else last_of_first
    return kept[0], kept[1], last_of_first
