"""Free adversarial training (Shafahi et al. 2019, arXiv:1904.12843, algorithm 1).

A batch is shown m times in a row. Each backward pass gives both the gradient of the weights, for the optimiser's step,
and that of the images, for one step of a perturbation that is never reset, not even for the next batch:

    d <- clip(d + eps sign(grad_x CE(f_w(x + d), y)))        the perturbation of the next replay

A weight step costs no more than a standard one; ten passes over the data with m = 8 are as many steps as 80 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from training.objectives.base import Batch
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective, View
from zoo.attacks import LinfBudget
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class FreeAt(NetworkObjective):
    """Mean cross-entropy on images moved by what earlier replays and batches left.

    Row i of the perturbation belongs to image i of whatever batch comes. A shorter batch uses and moves the first rows;
    rows that a longer batch is the first to need start at 0. Each member of an ensemble has a perturbation of its own.
    """

    method: ClassVar[str] = "free_at"
    published: ClassVar[str] = "Shafahi et al., NeurIPS 2019"
    per_image_memory: ClassVar[bool] = True

    eps: float = 8 / 255
    step_size: float | None = None
    """Length of the perturbation's step; eps if None, so that one step reaches from one side of 0 to the bound."""
    replays: int = 8
    """Consecutive weight steps on the same images, m."""

    def __post_init__(self) -> None:
        LinfBudget(eps=self.eps, step_size=self.step_size)  # checks the numbers
        if self.replays < 1:
            raise BadInput(f"need at least 1 replay, got {self.replays}; the paper's is 8")
        super().__post_init__()

    def forwards(self, networks: int = 1, exits: int = 1) -> float:
        """See `Objective.forwards`; of one replay."""
        return 3.0 * networks

    def inputs(self, network: Network, batch: Batch) -> Tensor:
        """Return the images, moved: a leaf whose gradient the loss' backward pass turns into the next perturbation.

        A hook does that, so it happens in whatever backward pass the loss takes part in, and only there.
        """
        images, memory, name = batch.images, network.step.memory.tensors, f"free_at/delta/{network.index}"
        budget = LinfBudget(eps=self.eps)
        length = self.eps if self.step_size is None else self.step_size
        stored = memory.get(name)
        delta = torch.zeros_like(images)
        if stored is not None and stored.shape[1:] == images.shape[1:]:
            delta[: len(stored)] = stored[: len(images)]
        else:
            stored = None
        examples = budget.project(images + delta, images).requires_grad_()

        def move(examples: Tensor) -> None:
            assert examples.grad is not None
            moved = budget.project(examples.detach() + length * examples.grad.sign(), images) - images
            examples.grad = None
            rest = [] if stored is None else [stored[len(images) :].to(images.device)]
            memory[name] = torch.cat([moved, *rest])

        examples.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        return examples

    def loss(self, network: Network, inputs: Tensor, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`; one forward pass."""
        logits = network(inputs)
        value = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        # detached: terms that a wrapper adds per view train the weights and leave the perturbation alone
        return Loss(value, (View(inputs.detach(), logits),))
