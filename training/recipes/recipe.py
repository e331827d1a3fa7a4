"""What determines a trained model: a `Recipe`, made of phases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from training.augmentation import check_augmentation
from training.objectives import EnsembleInOne, Objective
from training.objectives.base import check_choice, check_positive, check_weights
from zoo.errors import BadInput, check_count
from zoo.gates.rgn import Sharing
from zoo.weights.checkpoint import Architecture

Schedule = Literal["step", "cosine", "cyclic"]
Optimizer = Literal["sgd", "adam"]
Precision = Literal["fp32", "bf16"]
Selection = Literal["clean", "robust"]

# The lowest value of each field of a recipe that counts something; some may also be None.
LOWEST = {"batch_size": 2, "held_out": 0} | dict.fromkeys(
    ("candidates", "members", "ensemble_paths", "validate_every", "validation_attacked", "train_images", "patience"), 1
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run with one objective and an optimiser of its own."""

    objective: Objective
    epochs: int
    optimizer: Optimizer = "sgd"
    """"adam" has betas (0.9, 0.999) and eps 1e-7, as ADP, GAL, TRS and Dropen are trained."""
    learning_rate: float = 0.1
    schedule: Schedule = "step"
    """"step" multiplies by 0.1 at each milestone; "cosine" warms up over 1/20 of the phase and falls to 0; "cyclic"
    rises from 0 to `learning_rate` in a straight line until the middle of the phase and falls back to 0."""
    milestones: tuple[int, ...] = (100, 150)
    """Epochs at which "step" lowers the learning rate."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip: float | None = None
    """Scale the gradient of a step down to this Euclidean norm where it is longer; never if None."""

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_positive(learning_rate=self.learning_rate)
        check_weights(weight_decay=self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise BadInput(f"need 0 <= momentum < 1, got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise BadInput("nesterov needs momentum > 0, got 0; set momentum=0.9 or nesterov=false")
        for milestone in self.milestones:
            check_count("a milestone", milestone, 0)
        for name, kind in (("schedule", Schedule), ("optimizer", Optimizer)):
            check_choice(name, getattr(self, name), kind)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise BadInput(f"need clip > 0, got {self.clip}; leave it out (none) to clip nothing")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a trained model."""

    name: str = "unnamed"
    """Recipes of `RECIPES` are called like their functions."""
    description: str
    network: str = "resnet20"
    network_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "cifar10"
    candidates: int = 1
    """Alternatives per gated layer; 1 trains the plain network."""
    sharing: Sharing = "independent"
    members: int = 1
    """Separate networks trained together; more than 1 makes an ensemble."""
    start_from: str | None = None
    """A trained plain model (MODEL) of the same network to go on from, copied into every candidate of a random gated
    one; for several members an ensemble of as many. Fresh weights if None."""
    start_noise: float = 0.1
    """Relative noise on each copy, so that candidates differ from the first step on."""
    phases: tuple[Phase, ...]
    batch_size: int = 128
    """Images per step, over all ranks."""
    augmentation: str = "crop_flip"
    """One of `training.augmentation.AUGMENTATIONS`; digits are never mirrored."""
    augmix_severity: int = 5
    """Strength of AugMix's operations, 1 to 10: 5 in EWS, 3 in AugMix's own code."""
    train_images: int | None = None
    """Use only this many training images (a trial); all if None."""
    held_out: int = 1000
    """Training images kept back to choose the best checkpoint; the test set is never looked at."""
    seed: int = 0
    precision: Precision = "bf16"
    channels_last: bool = True
    validate_every: int = 1
    """Epochs between validations on the held-out images."""
    selection: Selection = "clean"
    """What the best checkpoint is best at, on held-out images: clean accuracy, or PGD-10 accuracy."""
    validation_eps: float = 0.01
    """Radius of that PGD-10, in pixel units."""
    validation_attacked: int = 256
    """How many of the held-out images it attacks."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is validated, kept as best
    and exported; the weights themselves if None."""
    patience: int | None = None
    """Stop after this many validations without a better one; train to the end if None."""
    collapse: float | None = None
    """Stop when held-out robust accuracy lies this far below its best: single-step training can collapse within an
    epoch (catastrophic overfitting). The best checkpoint is from before."""
    ensemble_paths: int = 3
    """Paths of the ensemble variant that is exported from this run."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise BadInput(f"recipe {self.name} has no phase; it needs at least one")
        for name, lowest in LOWEST.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), lowest)
        check_weights(start_noise=self.start_noise)
        gated = [phase.objective for phase in self.phases if isinstance(phase.objective, EnsembleInOne)]
        if gated and self.candidates < 2:
            raise BadInput(f"ensemble_in_one needs candidates >= 2 per gated layer, got {self.candidates}")
        if self.members > 1 and self.candidates > 1:
            raise BadInput(
                f"got members={self.members} and candidates={self.candidates}: an ensemble has several plain members, "
                "a random gated network several candidates per layer; set one of them to 1"
            )
        for phase in self.phases:
            check_augmentation(self.augmentation, views=phase.objective.views, severity=self.augmix_severity)
        if not 0 <= self.validation_eps <= 1:
            raise BadInput(f"need 0 <= validation_eps <= 1, got {self.validation_eps}; pixels are in [0, 1]")
        if self.ema is not None and not 0 < self.ema < 1:
            raise BadInput(f"need 0 < ema < 1, got {self.ema}; 0.999 is usual, none keeps the weights themselves")
        if self.collapse is not None and not 0 < self.collapse < 1:
            raise BadInput(f"need 0 < collapse < 1, got {self.collapse}; 0.2 is 20 points of accuracy")
        if (self.patience is not None or self.collapse is not None) and not self.held_out:
            raise BadInput("stopping early needs held-out images to judge by; set held_out=1000")
        for name, kind in (("precision", Precision), ("sharing", Sharing), ("selection", Selection)):
            check_choice(name, getattr(self, name), kind)

    def variant(self, **changes: Any) -> Recipe:
        """Return this recipe with other values of some fields."""
        return replace(self, **changes)

    @property
    def method(self) -> str:
        """The method's name: that of the last phase's objective."""
        return self.phases[-1].objective.name

    @property
    def architecture(self) -> Architecture:
        """What is trained."""
        return Architecture(
            network=self.network,
            options=self.network_options,
            dataset=self.dataset,
            candidates=self.candidates,
            sharing=self.sharing if self.candidates > 1 else None,
            members=self.members,
        )

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)
