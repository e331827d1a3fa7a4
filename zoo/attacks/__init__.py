"""Attacks: pure functions from a model, images and labels to adversarial images, on pixels in [0, 1].

one known network   fgsm, pgd, apgd, apgd_targeted; on a surrogate: skip_gradient, InputDiversity, distil
random gates        eot_pgd, apgd_eot, arc, with path_sampler; relaxed_model as a surrogate
several exits       single_exit, average_exits, max_average_exits
scores or labels    square, rays; RemoteModel is a server as a model
the authors' code   autoattack, fab (the extra `[autoattack]`)
"""

from zoo.attacks.apgd import apgd, apgd_eot, apgd_targeted
from zoo.attacks.autoattack import autoattack, fab
from zoo.attacks.budget import Budget, L2Budget, LinfBudget
from zoo.attacks.distillation import distil
from zoo.attacks.exits import average_exits, max_average_exits, single_exit
from zoo.attacks.gradient import InputDiversity, fgsm, pgd
from zoo.attacks.losses import LOSSES
from zoo.attacks.models import RandomModel
from zoo.attacks.pixel_grid import to_grid
from zoo.attacks.random_gates import arc, eot_pgd, path_model, path_sampler, relaxed_model
from zoo.attacks.rays import rays
from zoo.attacks.remote import RemoteModel, eight_bit
from zoo.attacks.skip_gradient import skip_gradient
from zoo.attacks.square import square
from zoo.attacks.training_mode import unchecked

__all__ = [
    "LOSSES",
    "Budget",
    "InputDiversity",
    "L2Budget",
    "LinfBudget",
    "RandomModel",
    "RemoteModel",
    "apgd",
    "apgd_eot",
    "apgd_targeted",
    "arc",
    "autoattack",
    "average_exits",
    "distil",
    "eight_bit",
    "eot_pgd",
    "fab",
    "fgsm",
    "max_average_exits",
    "path_model",
    "path_sampler",
    "pgd",
    "rays",
    "relaxed_model",
    "single_exit",
    "skip_gradient",
    "square",
    "to_grid",
    "unchecked",
]
