"""Recipes: a training run is a Python function that returns a `Recipe`; a variant is `replace(base(), field=...)`.

Each function's docstring says command, hardware, time and what to expect; "not run" where nobody has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable

from training.recipes import adversarial, ensemble_in_one, ensembles, exits, standard, subnets
from training.recipes.documents import from_resolved, override, resolved
from training.recipes.recipe import Phase, Recipe
from zoo.errors import UnknownName

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        ensemble_in_one.eio_resnet20_cifar10,
        ensemble_in_one.eio_resnet20_cifar10_paper,
        ensemble_in_one.eio_resnet20_cifar10_release,
        ensemble_in_one.eio_adv_resnet20_cifar10,
        ensemble_in_one.eio_resnet20_cifar10_cpu,
        ensemble_in_one.eio_adv_resnet20_cifar10_cpu,
        standard.standard_resnet20_cifar10,
        standard.standard_resnet20_cifar10_cpu,
        standard.baseline3_resnet20_cifar10,
        standard.baseline3_resnet20_cifar10_cpu,
        adversarial.pgd_at_preact18_cifar10,
        adversarial.pgd_at_resnet20_cifar10_cpu,
        adversarial.pgd_at_eps4_resnet20_cifar10_cpu,
        adversarial.pgd_at_lenet_mnist_cpu,
        adversarial.fast_at_preact18_cifar10,
        adversarial.fast_at_resnet20_cifar10_cpu,
        adversarial.free_at_preact18_cifar10,
        adversarial.free_at_resnet20_cifar10_cpu,
        adversarial.trades_wrn34_cifar10,
        adversarial.trades_resnet20_cifar10_cpu,
        adversarial.at_awp_preact18_cifar10,
        adversarial.at_awp_resnet20_cifar10_cpu,
        adversarial.trades_awp_preact18_cifar10,
        ensembles.advt3_resnet20_cifar10,
        ensembles.dverge3_resnet20_cifar10,
        ensembles.dverge3_resnet20_cifar10_cpu,
        ensembles.adp3_resnet20_cifar10,
        ensembles.adp3_resnet20_cifar10_cpu,
        ensembles.gal3_resnet20_cifar10,
        ensembles.gal3_resnet20_cifar10_cpu,
        ensembles.trs3_resnet20_cifar10,
        ensembles.trs3_resnet20_cifar10_cpu,
        ensembles.baseline3_lenet_mnist_cpu,
        ensembles.adp3_lenet_mnist_cpu,
        ensembles.gal3_lenet_mnist_cpu,
        ensembles.trs3_lenet_mnist_cpu,
        ensembles.dropen_lenet_mnist,
        ensembles.dropen_lenet_mnist_cpu,
        ensembles.dropen_two_layer_cifar10,
        subnets.ews_resnet50_cifar10,
        subnets.ews_autoaugment_resnet50_cifar10,
        subnets.ews_augmix_resnet50_cifar10,
        subnets.ews_at_preact18_cifar10,
        subnets.ews_trades_awp_preact18_cifar10,
        subnets.ews_resnet20_cifar10_cpu,
        subnets.ews_at_resnet20_cifar10_cpu,
        exits.multi_exit_msdnet3_cifar10,
        exits.multi_exit_adv_msdnet3_cifar10,
        exits.multi_exit_msdnet3_cifar10_cpu,
        exits.neo_kd_msdnet3_cifar10,
        exits.neo_kd_msdnet3_cifar10_cpu,
        exits.neo_kd_small_cnn3_mnist,
        exits.neo_kd_small_cnn3_mnist_cpu,
        ensemble_in_one.smoke,
    )
}


def recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UnknownName: the message lists the known recipes.
    """
    if name not in RECIPES:
        raise UnknownName(name, RECIPES, kind="recipe")
    return RECIPES[name]()


__all__ = ["RECIPES", "Phase", "Recipe", "from_resolved", "override", "recipe", "resolved"]
