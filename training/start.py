"""What a run starts from: its images and its network, fresh or trained before (`Recipe.start_from`)."""

from __future__ import annotations

from torch import nn

from training.recipes import Recipe
from zoo.bundle.bundle import Bundle
from zoo.data import datasets
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.hub.source import open_model
from zoo.weights.models import PLAIN_WEIGHTS, load_members


def images_of(recipe: Recipe) -> tuple[datasets.Images, datasets.Images]:
    """Return the images that a recipe trains on and those that it holds out.

    Where a recipe takes all training images, those held out do not depend on its seed.

    Raises:
        BadInput: There is less than one batch to train on.
        DataMissing: The data set is not there.
    """
    images = datasets.load(recipe.dataset, "train")
    if recipe.train_images is not None:
        images = datasets.drawn(images, recipe.train_images, recipe.seed)
    rest, held_out = datasets.hold_out(images, recipe.held_out, datasets.HOLD_OUT_SEED)
    if len(rest) < recipe.batch_size:
        raise BadInput(f"{len(rest)} training images are less than one batch of {recipe.batch_size}; lower batch_size")
    return rest, held_out


def initial_network(recipe: Recipe) -> nn.Module:
    """Build the network to train, with draws from torch's global generator.

    Raises:
        BadInput: The network cannot take the images, or `start_from` names a model of another network or data set, of
            another number of members, or a random gated one.
    """
    architecture = recipe.architecture
    if recipe.start_from is None:
        try:
            return architecture.build()
        except BadInput as error:  # gating runs the network on images of the recipe's shape
            raise BadInput(f"recipe {recipe.name} cannot be trained: {error}") from error
    members, found = load_members(_weights_of(recipe.start_from).file(PLAIN_WEIGHTS))
    if found != architecture.member:
        raise BadInput(f"start_from={recipe.start_from!r} is {found}, expected {architecture.member}")
    if len(members) != recipe.members:
        raise BadInput(
            f"start_from={recipe.start_from!r} has {len(members)} members, expected members={recipe.members}; copies "
            "of one network would stay equal"
        )
    if recipe.members > 1:
        return Ensemble(members)
    (plain,) = members
    if architecture.sharing is None:
        return plain
    return randomly_gate(
        plain, candidates=architecture.candidates, sharing=architecture.sharing, start="copy", noise=recipe.start_noise
    )


def checksum_of_start(recipe: Recipe) -> str | None:
    """Return the SHA-256 of the weights that a recipe starts from; None for fresh ones."""
    return None if recipe.start_from is None else _weights_of(recipe.start_from).card.files[PLAIN_WEIGHTS].sha256


def _weights_of(model: str) -> Bundle:
    """Open a plain model's weights.

    Raises:
        BadInput: It is a random gated network.
    """
    if open_model(model, only=()).card.architecture.gated_layers:
        raise BadInput(f"start_from={model!r} is a random gated network, expected a plain one")
    return open_model(model, only=(PLAIN_WEIGHTS,))
