"""Attacks: pure functions from a model, images and labels to adversarial images, on pixels in [0, 1]."""

from zoo.attacks.gradient import LinfBudget, fgsm, pgd
from zoo.attacks.grid import to_grid

__all__ = ["LinfBudget", "fgsm", "pgd", "to_grid"]
