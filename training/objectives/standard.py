"""Cross-entropy on clean images; of a random gated network, along one random path per batch.

For a random gated network this is the pre-training of Ensemble-in-One (algorithm 1, lines 1 to 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives.base import Batch, Objective, Step
from training.randomness import gate_generator
from zoo import paths
from zoo.errors import BadInput
from zoo.rgn import RandomGatedNetwork


@dataclass(frozen=True, kw_only=True)
class Standard(Objective):
    """Mean cross-entropy."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"need 0 <= label_smoothing < 1, got {self.label_smoothing}")

    def accumulate(self, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
        """See `Objective.accumulate`; one forward and one backward pass."""
        (batch,) = batches
        with step.autocast(batch.images.device):
            if isinstance(model, RandomGatedNetwork):
                path = paths.sample(model.num_gates, model.candidates, gate_generator(step.seed, "gates", step.number))
                logits = model(batch.images, path)
            else:
                logits = model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return {"loss": loss.detach(), "accuracy": accuracy}
