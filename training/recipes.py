"""Recipes: a training run is a Python function that returns a `Recipe`; a variant is `replace(base(), field=...)`.

Each function's docstring says command, hardware, time and what to expect; "not run" where nobody has run it yet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from training.objectives import OBJECTIVES, EnsembleInOne, Objective, Standard
from zoo.errors import BadInput, UnknownName
from zoo.rgn import Sharing

Schedule = Literal["step", "cosine"]
Precision = Literal["fp32", "bf16"]
Selection = Literal["clean", "robust"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run with one objective and an optimiser of its own (SGD)."""

    objective: Objective
    epochs: int
    learning_rate: float = 0.1
    schedule: Schedule = "step"
    """"step" multiplies by 0.1 at each milestone; "cosine" warms up over 1/20 of the phase and falls to 0."""
    milestones: tuple[int, ...] = (100, 150)
    """Epochs at which "step" lowers the learning rate."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.learning_rate < math.inf:
            raise BadInput(
                f"a phase needs epochs >= 1 and learning_rate > 0, got {self.epochs} and {self.learning_rate}"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise BadInput(f"need 0 <= momentum < 1 and weight_decay >= 0, got {self.momentum} and {self.weight_decay}")
        if self.nesterov and not self.momentum:
            raise BadInput("nesterov needs momentum > 0, got 0; set momentum=0.9 or nesterov=false")
        if self.schedule not in get_args(Schedule):
            raise BadInput(f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a trained model."""

    name: str
    description: str
    network: str = "resnet20"
    network_options: dict[str, Any] = field(default_factory=dict)
    dataset: str = "cifar10"
    candidates: int = 1
    """Alternatives per gated layer; 1 trains the plain network."""
    sharing: Sharing = "independent"
    start_from: str | None = None
    """A trained plain model (MODEL) of the same network to copy into every candidate; fresh weights if None."""
    start_noise: float = 0.1
    """Relative noise on each copy, so that candidates differ from the first step on."""
    phases: tuple[Phase, ...]
    batch_size: int = 128
    """Images per step, over all ranks."""
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
    """What the best checkpoint is best at, on held-out images: clean accuracy, or PGD-10 accuracy at eps 0.01."""
    ensemble_paths: int = 3
    """Paths of the ensemble variant that is exported from this run."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise BadInput(f"recipe {self.name} has no phase; it needs at least one")
        if self.batch_size < 2 or self.candidates < 1 or self.ensemble_paths < 1:
            raise BadInput(
                f"need batch_size >= 2, candidates >= 1 and ensemble_paths >= 1, got {self.batch_size}, "
                f"{self.candidates} and {self.ensemble_paths}"
            )
        if self.validate_every < 1 or self.held_out < 0 or self.start_noise < 0:
            raise BadInput(
                f"need validate_every >= 1, held_out >= 0 and start_noise >= 0, got {self.validate_every}, "
                f"{self.held_out} and {self.start_noise}"
            )
        gated = [phase.objective for phase in self.phases if isinstance(phase.objective, EnsembleInOne)]
        if gated and self.candidates < 2:
            raise BadInput(f"ensemble_in_one needs candidates >= 2 per gated layer, got {self.candidates}")
        for name, kind in (("precision", Precision), ("sharing", Sharing), ("selection", Selection)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    @property
    def method(self) -> str:
        """The method's name: that of the last phase's objective."""
        return method_name(self.phases[-1].objective)

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)


def eio_resnet20_cifar10() -> Recipe:
    """Ensemble-in-One at the scale of the paper: 200 + 200 epochs, independent candidates.

    Distillation is the released code's; `eio-resnet20-cifar10-paper` and `-release` are the two pure readings.

    manygates train eio-resnet20-cifar10 --out RUN        one GPU; not run
    Expect (published): above DVERGE's 53-64 % under transfer at eps 0.03 and 40-58 % white-box at 0.01.
    """
    return Recipe(
        name="eio-resnet20-cifar10",
        description="Ensemble-in-One random gated ResNet-20, 200 + 200 epochs as published",
        candidates=2,
        phases=(
            Phase(objective=Standard(), epochs=200),
            Phase(objective=EnsembleInOne.release(), epochs=200),
        ),
        selection="robust",
    )


def eio_resnet20_cifar10_paper() -> Recipe:
    """Ensemble-in-One as the paper's text reads: DVERGE's distillation rules, losses not divided by p.

    manygates train eio-resnet20-cifar10-paper --out RUN        one GPU; not run
    """
    return replace(
        eio_resnet20_cifar10(),
        name="eio-resnet20-cifar10-paper",
        description="Ensemble-in-One random gated ResNet-20, the paper's reading of every disputed detail",
        phases=(
            Phase(objective=Standard(), epochs=200),
            Phase(objective=EnsembleInOne.paper(), epochs=200),
        ),
    )


def eio_resnet20_cifar10_release() -> Recipe:
    """Ensemble-in-One as the authors' released code trains it: candidates share the convolution, Nesterov momentum.

    manygates train eio-resnet20-cifar10-release --out RUN        one GPU; not run
    Expect (their checkpoint, measured by others): 85.8 % clean, 63.6 % white-box at eps 0.01 on 500 images. One quirk
    is not copied: the release takes the first layer's feature before its activation, all others behind it.
    """
    return replace(
        eio_resnet20_cifar10(),
        name="eio-resnet20-cifar10-release",
        description="Ensemble-in-One random gated ResNet-20, the released code's reading of every disputed detail",
        sharing="shared_conv",
        phases=(
            Phase(objective=Standard(), epochs=200, nesterov=True),
            Phase(objective=EnsembleInOne.release(), epochs=200, nesterov=True),
        ),
    )


def eio_resnet20_cifar10_cpu() -> Recipe:
    """Ensemble-in-One in about an hour and a quarter on two CPU cores (measured: 4,516 s, other work beside it).

    manygates train eio-resnet20-cifar10-cpu --out RUN        2 cores of an AMD EPYC (Zen 4)

    Instead of 200 epochs of pre-training every candidate is a copy of the bundled standard model with 10 % of noise,
    and diversity training takes 2 paths and 5 distillation steps. What came out is in the card of the bundled model
    `eio-resnet20-cifar10`; what was tried before in docs/experiments.md.
    """
    return replace(
        eio_resnet20_cifar10(),
        name="eio-resnet20-cifar10-cpu",
        description="Ensemble-in-One random gated ResNet-20, trained on two CPU cores from a standard model",
        start_from="standard-resnet20-cifar10",
        phases=(
            Phase(objective=Standard(), epochs=1, learning_rate=0.05, schedule="cosine"),
            Phase(objective=EnsembleInOne.release(paths=2, distillation_steps=5), epochs=18, schedule="cosine"),
        ),
    )


def standard_resnet20_cifar10() -> Recipe:
    """A plain ResNet-20 at the published scale: 200 epochs.

    manygates train standard-resnet20-cifar10 --out RUN        one GPU; not run
    """
    return Recipe(
        name="standard-resnet20-cifar10",
        description="Plain ResNet-20, cross-entropy on clean images, 200 epochs",
        phases=(Phase(objective=Standard(), epochs=200),),
    )


def standard_resnet20_cifar10_cpu() -> Recipe:
    """A plain ResNet-20 in about a quarter of an hour on two CPU cores (measured: 856 s, log.csv).

    manygates train standard-resnet20-cifar10-cpu --out RUN        2 cores of an AMD EPYC (Zen 4)
    What came out is in the card of the bundled model `standard-resnet20-cifar10`.
    """
    return replace(
        standard_resnet20_cifar10(),
        name="standard-resnet20-cifar10-cpu",
        description="Plain ResNet-20, cross-entropy on clean images, trained on two CPU cores",
        phases=(Phase(objective=Standard(), epochs=24, schedule="cosine"),),
        validate_every=2,
    )


def smoke() -> Recipe:
    """The whole chain within a minute on two cores: a small random gated ResNet-8 on 4,096 images.

    manygates train smoke --out RUN        2 cores, 25 to 56 s as measured; not a model to use
    """
    return Recipe(
        name="smoke",
        description="A trial of the whole chain: random gated ResNet-8 on 4,096 images; not a model to use",
        network="resnet8",
        candidates=2,
        phases=(
            Phase(objective=Standard(), epochs=4, schedule="cosine"),
            Phase(objective=EnsembleInOne.release(paths=2, distillation_steps=3), epochs=2, schedule="cosine"),
        ),
        train_images=4096,
        held_out=256,
        selection="robust",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "eio-resnet20-cifar10": eio_resnet20_cifar10,
    "eio-resnet20-cifar10-paper": eio_resnet20_cifar10_paper,
    "eio-resnet20-cifar10-release": eio_resnet20_cifar10_release,
    "eio-resnet20-cifar10-cpu": eio_resnet20_cifar10_cpu,
    "standard-resnet20-cifar10": standard_resnet20_cifar10,
    "standard-resnet20-cifar10-cpu": standard_resnet20_cifar10_cpu,
    "smoke": smoke,
}


def recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UnknownName: the message lists the known recipes.
    """
    if name not in RECIPES:
        raise UnknownName(name, RECIPES, kind="recipe")
    return RECIPES[name]()


def method_name(objective: Objective) -> str:
    """Return the name under which an objective's class stands in `OBJECTIVES`."""
    return next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)


def override(base: Recipe, settings: list[str]) -> Recipe:
    """Return `base` with fields changed by texts: `seed=1`, `phases.1.epochs=5`, `phases.1.objective.eps=0.03`.

    Raises:
        BadInput: a text without `=`, a field that does not exist, or a value of the wrong type.
    """
    changed: Any = base
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise BadInput(f"--set takes field=value, got {setting!r}; for example seed=1 or phases.0.epochs=3")
        changed = _set(changed, name.split("."), text, name)
    return cast(Recipe, changed)


def _set(holder: Any, keys: list[str], text: str, name: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(holder, tuple):
        if not key.isdigit() or int(key) >= len(holder):
            raise BadInput(f"--set {name}: there is no element {key!r}, expected 0 to {len(holder) - 1}")
        changed = list(holder)
        changed[int(key)] = _set(holder[int(key)], rest, text, name) if rest else _parse(text, type(holder[0]), name)
        return tuple(changed)
    if isinstance(holder, dict):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        return {**holder, ".".join(keys): value}
    fields = {entry.name for entry in dataclasses.fields(holder)} if dataclasses.is_dataclass(holder) else set()
    if key not in fields:
        known = ", ".join(sorted(fields)) or "none"
        raise BadInput(f"--set {name}: {type(holder).__name__} has no field {key!r}; its fields: {known}")
    if rest:
        return replace(holder, **{key: _set(getattr(holder, key), rest, text, name)})
    kind = typing.get_type_hints(type(holder))[key]
    return replace(holder, **{key: _parse(text, kind, name)})


def _parse(text: str, kind: Any, name: str) -> Any:
    """Read `text` as a value of the annotated type `kind`."""
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal and text in get_args(option):
            return text
        if option is str:
            return text
        if origin is Literal or option is type(None):
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if option in (int, bool) and type(value) is option:
            return value
        if (option is dict or origin is dict) and isinstance(value, dict):
            return value
        if origin is tuple and isinstance(value, list) and all(type(entry) is get_args(option)[0] for entry in value):
            return tuple(value)
    expected = " or ".join(_described(option) for option in options)
    raise BadInput(f"--set {name}: {text!r} is not a value for it, expected {expected}")


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def resolved(run: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON values, its objectives by method name."""
    document = dataclasses.asdict(run)
    for phase, values in zip(run.phases, document["phases"], strict=True):
        values["objective"] = {"method": method_name(phase.objective), **dataclasses.asdict(phase.objective)}
    return cast(dict[str, Any], json.loads(json.dumps(document)))


def from_resolved(document: dict[str, Any]) -> Recipe:
    """Return the recipe that `resolved` wrote.

    Raises:
        BadInput: a field that this version does not know, or one that is missing.
    """
    try:
        values = json.loads(json.dumps(document))
        phases = []
        for phase in values.pop("phases"):
            objective = phase.pop("objective")
            method = objective.pop("method")
            if method not in OBJECTIVES:
                raise UnknownName(method, OBJECTIVES, kind="method")
            phases.append(
                Phase(objective=OBJECTIVES[method](**objective), milestones=tuple(phase.pop("milestones")), **phase)
            )
        return Recipe(phases=tuple(phases), **values)
    except (KeyError, TypeError) as error:
        raise BadInput(f"not a recipe of this version: {error}") from error
