"""How good a network in training is on the images that its recipe holds out; the test set is never looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.randomness import gate_generator
from training.recipes import Recipe
from zoo import paths
from zoo.attacks import LinfBudget, average_exits, pgd
from zoo.data import datasets
from zoo.gates.derive import Ensemble, derive, folded_copy
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import num_exits

VALIDATION_PATHS = 4
"""Paths of a random gated network whose clean accuracy is averaged; the first of them is attacked."""


def held_out_accuracy(model: nn.Module, held_out: datasets.Images, recipe: Recipe) -> dict[str, float]:
    """Measure a network, an ensemble, or a few fixed paths of a random gated network, as they would be deployed.

    Of a multi-exit network the figures are means over its exits, and the attack is on the mean loss of all.

    Args:
        model: On the device of the images; it is put in evaluation mode.
        held_out: The images, possibly none.
        recipe: Says the attack's radius and how many images it is run on.

    Returns:
        "held_out_clean" and "held_out_robust" (PGD-10), shares of 1; nothing if there are no images.
    """
    if not len(held_out):
        return {}
    networks = _deployed(model.eval(), recipe.seed)
    clean = [
        sum(_share_right(network, *batch) * len(batch[1]) for batch in held_out.batches(recipe.batch_size))
        / len(held_out)
        for network in networks
    ]
    attacked = held_out[slice(0, recipe.validation_attacked)]
    attack = pgd if num_exits(model) == 1 else average_exits
    budget = LinfBudget(eps=recipe.validation_eps, steps=10, random_start=False)
    images = attack(networks[0], datasets.as_float(attacked.pixels), attacked.labels, budget)
    return {
        "held_out_clean": sum(clean) / len(clean),
        "held_out_robust": _share_right(networks[0], images, attacked.labels),
    }


def _deployed(model: nn.Module, seed: int) -> list[nn.Module]:
    """Return copies with folded BatchNorms: of the network, the whole ensemble, or each of the fixed paths."""
    if isinstance(model, RandomGatedNetwork):
        rng = gate_generator(seed, "validation")
        chosen = [paths.sample(model.num_gates, model.candidates, rng) for _ in range(VALIDATION_PATHS)]
        return [folded_copy(derive(model, path)) for path in chosen]
    if isinstance(model, Ensemble):
        return [Ensemble(folded_copy(member) for member in model.members).eval()]
    return [folded_copy(model)]


@torch.no_grad()
def _share_right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network classifies as labelled, over all its exits."""
    said = network(images)
    exits = [said] if isinstance(said, Tensor) else list(said)
    return float(torch.stack([logits.argmax(1) == labels for logits in exits]).float().mean())
