"""Fine-tuning of a derived network on clean images (Ensemble-in-One, section 3.4): it trades robustness for accuracy.

Always state the number of epochs beside the result.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from training.loop import train
from training.objectives import MultiExit, Standard
from training.recipes import Phase, Recipe
from zoo.networks import num_exits
from zoo.weights.checkpoint import Architecture


def finetune_recipe(architecture: Architecture, epochs: int, seed: int, *, exits: int = 1) -> Recipe:
    """Return the recipe of the released code: SGD at 0.001, momentum 0.9, weight decay 1e-4, batches of 128.

    No image is held out: the last epoch is kept, so nothing is chosen. Of a network with several `exits` all are tuned.
    """
    objective = Standard() if exits == 1 else MultiExit()
    return Recipe(
        name=f"finetune-{architecture.network}",
        description=f"{epochs} epochs of fine-tuning on clean images",
        network=architecture.network,
        network_options=architecture.options,
        dataset=architecture.dataset,
        phases=(Phase(objective=objective, epochs=epochs, learning_rate=1e-3, milestones=()),),
        held_out=0,
        seed=seed,
        precision="fp32",
    )


def finetune(network: nn.Module, architecture: Architecture, epochs: int, *, seed: int = 0) -> nn.Module:
    """Return a copy of `network` trained on for `epochs`, in evaluation mode on the CPU; the last epoch is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = finetune_recipe(architecture, epochs, seed, exits=num_exits(network))
        trained = train(recipe, Path(scratch) / "run", start=network)
    return trained.cpu()  # it trains on a GPU where there is one, and what comes next does not
