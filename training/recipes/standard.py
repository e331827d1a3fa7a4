"""Plain training on clean images: one network, or several side by side, the baseline of every ensemble defence."""

from __future__ import annotations

from training.objectives import Standard
from training.recipes.recipe import Phase, Recipe


def standard_resnet20_cifar10() -> Recipe:
    """A plain ResNet-20 at the published scale: 200 epochs.

    manygates train standard-resnet20-cifar10 --out RUN        one GPU; not run
    """
    return Recipe(
        description="Plain ResNet-20, cross-entropy on clean images, 200 epochs",
        phases=(Phase(objective=Standard(), epochs=200),),
    )


def standard_resnet20_cifar10_cpu() -> Recipe:
    """A plain ResNet-20 in about a quarter of an hour on two CPU cores (measured: 856 s, log.csv).

    manygates train standard-resnet20-cifar10-cpu --out RUN        2 cores of an AMD EPYC (Zen 4)
    What came out is in the card of the bundled model `standard-resnet20-cifar10`.
    """
    return standard_resnet20_cifar10().variant(
        description="Plain ResNet-20, cross-entropy on clean images, trained on two CPU cores",
        phases=(Phase(objective=Standard(), epochs=24, schedule="cosine"),),
        validate_every=2,
    )


def baseline3_resnet20_cifar10() -> Recipe:
    """Three plain ResNet-20 side by side: the baseline ensemble of DVERGE, 200 epochs (SGD, x0.1 at 100 and 150).

    manygates train baseline3-resnet20-cifar10 --out RUN        one GPU; not run
    Expect (published, EIO table 1): 0.0 % under transfer at eps 0.03 and 1.5 % white-box at 0.01.
    """
    return standard_resnet20_cifar10().variant(
        description="Three plain ResNet-20 trained side by side, averaged",
        members=3,
    )


def baseline3_resnet20_cifar10_cpu() -> Recipe:
    """Three plain ResNet-20 in an estimated three quarters of an hour on two CPU cores.

    manygates train baseline3-resnet20-cifar10-cpu --out RUN        not run; three times the standard recipe
    """
    return baseline3_resnet20_cifar10().variant(
        description="Three plain ResNet-20 trained side by side on two CPU cores, averaged",
        phases=(Phase(objective=Standard(), epochs=24, schedule="cosine"),),
        validate_every=4,
    )
