"""What train and export begin with: a trained network with its origin, of a training run or of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manygates.arguments import is_run
from zoo.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from torch import nn

    from zoo.bundle.card import Card, Training
    from zoo.weights.checkpoint import Architecture


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network, and what a card says of where it comes from."""

    name: str
    network: nn.Module
    """A random gated network; otherwise the first of the members."""
    members: Sequence[nn.Module]
    """Plain networks that answer together, one or more; none of a random gated network."""
    architecture: Architecture
    method: str
    training: Training
    card: Card | None
    """Of a model; None of a run, which has none yet."""


def load_source(source: str, checkpoint: str = "last") -> Trained:
    """Load a training run (a folder with a recipe.json) or a model.

    Args:
        source: RUN or MODEL.
        checkpoint: of a run, "last" or "best".

    Raises:
        BadInput: it is neither.
        ManygatesError: it cannot be read.
    """
    return _load_run(Path(source), checkpoint) if is_run(source) else _load_model(source)


def _load_run(run_dir: Path, checkpoint: str) -> Trained:
    from training.known_recipes import overrides_of, published_scale
    from training.recipes import resolved
    from training.run import epochs_done, load_run, log, provenance
    from zoo.bundle.card import Training
    from zoo.gates.derive import Ensemble
    from zoo.gates.rgn import RandomGatedNetwork

    network, architecture, recipe = load_run(run_dir, which=checkpoint)
    starts = provenance(run_dir)["starts"]
    phases = " + ".join(str(phase.epochs) for phase in recipe.phases)
    if (done := epochs_done(run_dir)) < recipe.epochs:
        phases = f"{done} of {phases}"
    places = ", then ".join(dict.fromkeys(start["hardware"] for start in starts))
    origin = f", from {recipe.start_from}" if recipe.start_from else ""
    document = resolved(recipe)
    training = Training(
        recipe={**document, "method": recipe.method, "starts": starts},
        overrides=overrides_of(document),
        published=published_scale(document),
        seed=recipe.seed,
        commit=", ".join(dict.fromkeys(start["commit"] for start in starts)),
        versions=starts[-1]["versions"],
        date=starts[-1]["date"],
        summary=f"{phases} epochs{origin} on {places} ({checkpoint} checkpoint)",
        logs=log(run_dir),
    )
    members = list(network.members) if isinstance(network, Ensemble) else [network]
    return Trained(
        name=recipe.name,
        network=network,
        members=[] if isinstance(network, RandomGatedNetwork) else members,
        architecture=architecture,
        method=recipe.method,
        training=training,
        card=None,
    )


def _load_model(source: str) -> Trained:
    from zoo.hub.source import resolve
    from zoo.weights.checkpoint import load_network
    from zoo.weights.models import load_members, weights_file

    try:
        bundle = resolve(source).open(lambda card: (weights_file(card),))
    except (BadInput, UnknownName) as error:
        message = f"{source!r} is neither a training run (a folder with a recipe.json) nor a model: {error}"
        raise BadInput(message) from error
    card = bundle.card
    file = bundle.file(weights_file(card))
    if card.architecture.gated_layers:
        network, architecture = load_network(file)
        members: list[nn.Module] = []
    else:
        members, architecture = load_members(file)
        network = members[0]
    return Trained(
        name=card.name,
        network=network,
        members=members,
        architecture=architecture,
        method=card.method,
        training=card.training,
        card=card,
    )
