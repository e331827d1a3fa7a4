"""Attacks: pure functions from a model, images and labels to adversarial images, on pixels in [0, 1]."""

from zoo.attacks.budget import Budget, L2Budget, LinfBudget
from zoo.attacks.gradient import InputDiversity, fgsm, pgd
from zoo.attacks.grid import to_grid
from zoo.attacks.losses import LOSSES

__all__ = ["LOSSES", "Budget", "InputDiversity", "L2Budget", "LinfBudget", "fgsm", "pgd", "to_grid"]
