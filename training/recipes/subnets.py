"""EWS, enhancing weak subnets (Guo et al. 2022), on standard and adversarial training and with its augmentations."""

from __future__ import annotations

from training.objectives import Awp, Ews, Objective, PgdAt, Standard, Trades
from training.recipes.adversarial import SHORT_ATTACK, TWO_CORES, pgd_at_preact18_cifar10
from training.recipes.recipe import Phase, Recipe


def _sgd400(objective: Objective) -> Phase:
    return Phase(objective=objective, epochs=400, milestones=(133, 267), nesterov=True, clip=3.0)


def ews_resnet50_cifar10() -> Recipe:
    """EWS on standard training: ResNet-50, 400 epochs, crop and flip.

    manygates train ews-resnet50-cifar10 --out RUN        one GPU; not run
    Expect (published errors): 4.44 % clean and 24.94 % on CIFAR-10-C, against 5.32 and 26.46 % without EWS.
    Its ablations: --set phases.0.objective.search=random (or l1).
    """
    return Recipe(
        description="EWS on standard training, ResNet-50, 400 epochs as published",
        network="resnet50_cifar",
        phases=(_sgd400(Ews()),),
    )


def ews_autoaugment_resnet50_cifar10() -> Recipe:
    """EWS with AutoAugment.

    manygates train ews-autoaugment-resnet50-cifar10 --out RUN        one GPU; not run
    Expect (published errors): 3.23 % clean and 14.31 % on CIFAR-10-C, against 4.05 and 16.19 % without EWS.
    """
    return ews_resnet50_cifar10().variant(
        description="EWS on standard training with AutoAugment, ResNet-50, 400 epochs as published",
        augmentation="autoaugment",
    )


def ews_augmix_resnet50_cifar10() -> Recipe:
    """EWS with AugMix and its Jensen-Shannon loss.

    manygates train ews-augmix-resnet50-cifar10 --out RUN        one GPU; not run
    Expect (published errors): 3.76 % clean and 10.80 % on CIFAR-10-C, against 4.35 and 13.57 % without EWS.
    """
    return ews_resnet50_cifar10().variant(
        description="EWS on standard training with AugMix, ResNet-50, 400 epochs as published",
        phases=(_sgd400(Ews(inner=Standard(consistency=12.0))),),
        augmentation="augmix",
    )


def ews_at_preact18_cifar10() -> Recipe:
    """EWS on PGD adversarial training: PreAct-ResNet-18, 200 epochs, lambda 0.1, rho 0.9.

    manygates train ews-at-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published errors): 16.85 % clean, 47.99 % under PGD-20 and 51.84 % under AutoAttack at 8/255.
    """
    return pgd_at_preact18_cifar10().variant(
        description="EWS on PGD adversarial training at 8/255, PreAct-ResNet-18, 200 epochs as published",
        phases=(Phase(objective=Ews.adversarial(PgdAt()), epochs=200, weight_decay=5e-4),),
    )


def ews_trades_awp_preact18_cifar10() -> Recipe:
    """EWS on TRADES with weight perturbation: the paper's best without extra data.

    manygates train ews-trades-awp-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published errors): 17.67 % clean, 48.58 % under AutoAttack at 8/255.
    """
    inner = Ews.adversarial(Trades())
    return ews_at_preact18_cifar10().variant(
        description="EWS on TRADES with weight perturbation, PreAct-ResNet-18, 200 epochs as published",
        phases=(Phase(objective=Awp(inner=inner, gamma=0.005, warm_up=10), epochs=200, weight_decay=5e-4),),
    )


def ews_resnet20_cifar10_cpu() -> Recipe:
    """EWS on standard training of a ResNet-20 in about half an hour on two CPU cores, 24 epochs.

    manygates train ews-resnet20-cifar10-cpu --out RUN        not run
    """
    return ews_resnet50_cifar10().variant(
        description="EWS on standard training, ResNet-20, trained on two CPU cores",
        network="resnet20",
        phases=(Phase(objective=Ews(), epochs=24, schedule="cosine", nesterov=True, clip=3.0),),
        validate_every=2,
    )


def ews_at_resnet20_cifar10_cpu() -> Recipe:
    """EWS on PGD adversarial training of a ResNet-20 in about fifty minutes on two CPU cores: PGD-5, 20 epochs.

    manygates train ews-at-resnet20-cifar10-cpu --out RUN        not run
    """
    objective = Ews.adversarial(PgdAt(attack=SHORT_ATTACK))
    return ews_at_preact18_cifar10().variant(
        description="EWS on PGD adversarial training at 8/255, ResNet-20, trained on two CPU cores",
        phases=(Phase(objective=objective, epochs=20, schedule="cosine", weight_decay=5e-4),),
        validate_every=5,
        **TWO_CORES,
    )
