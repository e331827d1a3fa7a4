"""Objectives around the loss of one network: AWP moves the weights that it is taken at, EWS adds a term per view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from training.objectives.base import Batch
from training.objectives.network import Network
from training.objectives.single import Loss, NetworkObjective
from zoo.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Wrapper(NetworkObjective):
    """Passes everything on to the objective within; a subclass adds its own term, and its cost (`forwards`)."""

    inner: NetworkObjective
    """The objective within. It makes the adversarial examples, decides on views and replays, and checks the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, NetworkObjective):
            raise BadInput(
                f"{type(self).__name__} goes around the loss of one network, such as standard, pgd_at or trades, "
                f"got {type(self.inner).__name__}"
            )
        if self.label_smoothing:
            raise BadInput(
                f"label_smoothing={self.label_smoothing} belongs to the loss within; set inner.label_smoothing instead"
            )

    @property
    def name(self) -> str:
        """The name of what is within, then its own: "trades+awp"."""
        return f"{self.inner.name}+{self.method}"

    @property
    def views(self) -> int:
        """See `Objective.views`."""
        return self.inner.views

    @property
    def passes(self) -> int:
        """See `NetworkObjective.passes`."""
        return self.inner.passes

    @property
    def replays(self) -> int:
        """See `Objective.replays`."""
        return self.inner.replays

    @property
    def per_image_memory(self) -> bool:  # type: ignore[override]
        """See `Objective.per_image_memory`; of an object here, not of its class."""
        return self.inner.per_image_memory

    def check(self, model: nn.Module) -> None:
        """See `Objective.check`."""
        self.inner.check(model)

    def prepare(self, networks: Sequence[Network], batch: Batch) -> list[Any]:
        """See `NetworkObjective.prepare`."""
        return self.inner.prepare(networks, batch)

    def inputs(self, network: Network, batch: Batch) -> Any:
        """See `NetworkObjective.inputs`."""
        return self.inner.inputs(network, batch)

    def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        """See `NetworkObjective.loss`."""
        return self.inner.loss(network, inputs, batch)

    def ascended(self, network: Network, inputs: Any, batch: Batch) -> Tensor:
        """See `NetworkObjective.ascended`."""
        return self.inner.ascended(network, inputs, batch)
