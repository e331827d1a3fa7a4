"""Adversarial training of single networks: PGD, fast, free, TRADES, and weight perturbation on top (AWP)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from training.objectives import Awp, FastAt, FreeAt, Objective, PgdAt, Standard, Trades, TrainingAttack
from training.recipes.recipe import Phase, Recipe

# Five steps instead of ten: what two cores can pay for. A step of eps / 3.2 still reaches every corner of the ball.
SHORT_ATTACK = TrainingAttack(steps=5, step_size=2.5 / 255)

# How recipes for two CPU cores differ from those of PreAct-ResNet-18, besides training for fewer epochs.
TWO_CORES: dict[str, Any] = {"network": "resnet20", "held_out": 1000, "validation_attacked": 256}


def _sgd(objective: Objective, epochs: int, **options: Any) -> Phase:
    return Phase(objective=objective, epochs=epochs, weight_decay=5e-4, **options)


def pgd_at_preact18_cifar10() -> Recipe:
    """PGD adversarial training as Rice et al. 2020: PreAct-ResNet-18, 200 epochs, the best by held-out robustness kept.

    manygates train pgd-at-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published, AWP's logs): 52.8 % under PGD-20 at 8/255 at the best epoch, 43.8 % at the last: robustness
    overfits. Export it with --checkpoint best.
    """
    return Recipe(
        description="PreAct-ResNet-18, PGD adversarial training at 8/255, 200 epochs",
        network="preact_resnet18",
        phases=(_sgd(PgdAt(), 200),),
        held_out=5000,
        selection="robust",
        validation_eps=8 / 255,
        validation_attacked=1000,
    )


def pgd_at_resnet20_cifar10_cpu() -> Recipe:
    """PGD adversarial training of a ResNet-20 in an estimated fifty minutes on two CPU cores: PGD-5, 25 epochs.

    manygates train pgd-at-resnet20-cifar10-cpu --out RUN        not run
    """
    return pgd_at_preact18_cifar10().variant(
        description="ResNet-20, PGD adversarial training at 8/255, trained on two CPU cores",
        phases=(_sgd(PgdAt(attack=SHORT_ATTACK), 25, schedule="cosine"),),
        validate_every=5,
        **TWO_CORES,
    )


def pgd_at_eps4_resnet20_cifar10_cpu() -> Recipe:
    """The same at half the radius, 4/255: more accurate, less robust.

    manygates train pgd-at-eps4-resnet20-cifar10-cpu --out RUN        not run
    """
    attack = TrainingAttack(eps=4 / 255, steps=5, step_size=1.25 / 255)
    return pgd_at_resnet20_cifar10_cpu().variant(
        description="ResNet-20, PGD adversarial training at 4/255, trained on two CPU cores",
        phases=(_sgd(PgdAt(attack=attack), 25, schedule="cosine"),),
        validation_eps=4 / 255,
    )


def pgd_at_lenet_mnist_cpu() -> Recipe:
    """PGD adversarial training of a LeNet on MNIST at 0.3 (Madry et al. 2018), for two CPU cores.

    One epoch on clean digits, because fresh weights learn nothing at that radius, then 10 with PGD-10, not PGD-40.

    manygates train pgd-at-lenet-mnist-cpu --out RUN        one core of an AMD EPYC (Zen 4), other work beside it:
    2,535 s. What came out is in the card of the model `pgd-at-lenet-mnist`.
    """
    clean = Phase(objective=Standard(), epochs=1, optimizer="adam", learning_rate=1e-3, weight_decay=0)
    attack = TrainingAttack(eps=0.3, steps=10, step_size=0.05)
    return Recipe(
        description="LeNet on MNIST, PGD adversarial training at 0.3, trained on two CPU cores",
        network="lenet",
        dataset="mnist",
        phases=(clean, replace(clean, objective=PgdAt(attack=attack), epochs=10, schedule="cosine")),
        augmentation="none",
        selection="robust",
        validation_eps=0.3,
        validate_every=2,
        channels_last=False,
    )


def fast_at_preact18_cifar10() -> Recipe:
    """Fast adversarial training (Wong et al. 2020): one FGSM step from a random start, 15 epochs, cyclic rate.

    manygates train fast-at-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published, the authors' repository): 86.1 % clean, 46.1 % under PGD-50-10 at 8/255. Training stops when
    robustness collapses; export it with --checkpoint best, which is from before.
    """
    return pgd_at_preact18_cifar10().variant(
        description="PreAct-ResNet-18, FGSM adversarial training from a random start at 8/255, 15 epochs",
        phases=(_sgd(FastAt(), 15, learning_rate=0.2, schedule="cyclic"),),
        collapse=0.2,
    )


def fast_at_resnet20_cifar10_cpu() -> Recipe:
    """Fast adversarial training of a ResNet-20 within the hour on two CPU cores, 30 epochs.

    manygates train fast-at-resnet20-cifar10-cpu --out RUN        one core of an AMD EPYC (Zen 4), other work beside it:
    measured, 5,341 s. Came out (best checkpoint, one seed): 74.6 % clean (10,000 images), 40.8 % [36.6, 45.2] under
    PGD-50 from 5 starts at 8/255 (500 images); every check of that protocol held, and it did not collapse.
    """
    return fast_at_preact18_cifar10().variant(
        description="ResNet-20, FGSM adversarial training from a random start at 8/255, trained on two CPU cores",
        phases=(_sgd(FastAt(), 30, learning_rate=0.2, schedule="cyclic"),),
        validate_every=2,
        **TWO_CORES,
    )


def free_at_preact18_cifar10() -> Recipe:
    """Free adversarial training (Shafahi et al. 2019): every batch eight times, 10 epochs of replays, cyclic rate .04.

    manygates train free-at-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published, the code of Fast AT): 86.0 % clean, 46.3 % under PGD-50-10 at 8/255.
    """
    return pgd_at_preact18_cifar10().variant(
        description="PreAct-ResNet-18, free adversarial training at 8/255 with 8 replays, 10 epochs",
        phases=(_sgd(FreeAt(), 10, learning_rate=0.04, schedule="cyclic"),),
    )


def free_at_resnet20_cifar10_cpu() -> Recipe:
    """Free adversarial training of a ResNet-20 in an estimated forty minutes on two CPU cores: 4 replays, 24 epochs.

    manygates train free-at-resnet20-cifar10-cpu --out RUN        not run
    """
    return free_at_preact18_cifar10().variant(
        description="ResNet-20, free adversarial training at 8/255 with 4 replays, trained on two CPU cores",
        phases=(_sgd(FreeAt(replays=4), 24, schedule="cyclic"),),
        validate_every=4,
        **TWO_CORES,
    )


def trades_wrn34_cifar10() -> Recipe:
    """TRADES (Zhang et al. 2019): WRN-34-10, beta 6, 76 epochs, x0.1 in the last two.

    manygates train trades-wrn34-cifar10 --out RUN        one GPU; not run
    Expect (RobustBench): 84.9 % clean, 53.1 % under AutoAttack at 0.031. The published network does not normalise its
    input; ours does, inside.
    """
    return Recipe(
        description="WRN-34-10, TRADES at 0.031 with beta 6, 76 epochs",
        network="wide_resnet34_10",
        phases=(Phase(objective=Trades(), epochs=76, milestones=(74,), weight_decay=2e-4),),
        selection="robust",
        validation_eps=8 / 255,
    )


def trades_resnet20_cifar10_cpu() -> Recipe:
    """TRADES of a ResNet-20 for two CPU cores: 5 attack steps, 6 epochs.

    It goes on from the bundled model of fast adversarial training, which has the radius but neither the trade-off nor
    several attack steps.

    manygates train trades-resnet20-cifar10-cpu --out RUN        one core of an AMD EPYC (Zen 4), other work beside it:
    4,723 s. What came out is in the card of the model `trades-resnet20-cifar10`.
    """
    attack = replace(Trades().attack, steps=5, step_size=0.01)
    return trades_wrn34_cifar10().variant(
        description="ResNet-20, TRADES at 0.031 with beta 6 behind fast adversarial training, on two CPU cores",
        network="resnet20",
        start_from="fast-at-resnet20-cifar10",
        phases=(_sgd(Trades(attack=attack), 6, learning_rate=0.05, schedule="cosine"),),
        validate_every=2,
    )


def at_awp_preact18_cifar10() -> Recipe:
    """PGD adversarial training with weight perturbation (AT-AWP, Wu et al. 2020), gamma 0.01, 200 epochs.

    manygates train at-awp-preact18-cifar10 --out RUN        one GPU; not run
    Expect (published logs): 81.7 % clean, 54.3 % under PGD-20 at 8/255 at the last epoch.
    """
    return pgd_at_preact18_cifar10().variant(
        description="PreAct-ResNet-18, PGD adversarial training at 8/255 with weight perturbation, 200 epochs",
        phases=(_sgd(Awp(inner=PgdAt()), 200),),
    )


def at_awp_resnet20_cifar10_cpu() -> Recipe:
    """AT-AWP of a ResNet-20 in an estimated fifty minutes on two CPU cores: PGD-5, 20 epochs.

    manygates train at-awp-resnet20-cifar10-cpu --out RUN        not run
    """
    objective = Awp(inner=PgdAt(attack=SHORT_ATTACK), gamma=0.005)
    return pgd_at_resnet20_cifar10_cpu().variant(
        description="ResNet-20, PGD adversarial training at 8/255 with weight perturbation, trained on two CPU cores",
        phases=(_sgd(objective, 20, schedule="cosine"),),
    )


def trades_awp_preact18_cifar10() -> Recipe:
    """TRADES with weight perturbation (TRADES-AWP), gamma 0.005 after 10 epochs, steps of 2/255, 200 epochs.

    The radius is that of TRADES, 0.031; the authors' script has 8/255, which is 0.0314.

    manygates train trades-awp-preact18-cifar10 --out RUN        one GPU; not run
    """
    inner = Trades(attack=replace(Trades().attack, step_size=2 / 255))
    return pgd_at_preact18_cifar10().variant(
        description="PreAct-ResNet-18, TRADES at 0.031 with weight perturbation, 200 epochs",
        phases=(_sgd(Awp(inner=inner, gamma=0.005, warm_up=10), 200),),
    )
