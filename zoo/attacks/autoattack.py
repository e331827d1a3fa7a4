"""AutoAttack (Croce and Hein 2020, arXiv:2003.01690) and FAB, by the authors' implementation: the package pyautoattack.

The attacks and the checks are the library's; the loop over them is ours, because the library reseeds the global random
numbers, fills the gradients of parameters, only logs what it warns of, and does not say which attack broke which image.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget, linf_of, whole
from zoo.attacks.images import check_batch, differentiable
from zoo.attacks.models import CheckedModel, checked_model, first_logits
from zoo.attacks.outputs import Model, Output, check_numbers, explained_errors, gradient_of
from zoo.attacks.random_gates import Sampler, checked_draws
from zoo.errors import BadInput, UnknownName

Version = Literal["standard", "rand"]

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of the version "standard", each on what the ones before have left."""
RANDOM_ATTACKS = ("apgd-ce", "apgd-dlr")
"""The attacks of the version "rand", with 20 draws per gradient."""
TARGETS = 9
CLASSES_NEEDED = {"standard": 4, "rand": 3}


@dataclass(frozen=True, kw_only=True)
class AutoAttackResult:
    """What AutoAttack found."""

    adversarial: Tensor
    """The images, moved where an attack broke them, else as they were; in the ball and in [0, 1]."""
    clean: Tensor
    """Where the model answered correctly before any attack (batch,) bool."""
    robust: Mapping[str, Tensor]
    """For each attack, in their order, where the model still answered correctly after it and those before it."""
    flags: tuple[str, ...]
    """What the library warns of, each once: the result may claim too much robustness."""

    @property
    def broken_by(self) -> tuple[str, ...]:
        """For each image the attack that broke it, "clean" if it was wrong without one, "" if it is robust."""
        names = ["" if right else "clean" for right in self.clean.tolist()]
        for attack, robust in self.robust.items():
            for row, right in enumerate(robust.tolist()):
                if not right and not names[row]:
                    names[row] = attack
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """How a random model answers to adversarial images on draws that no attack has seen."""

    accuracy: float
    """Mean over images and draws."""
    always_right: float
    """Share of the images that every draw answers correctly: what is left of them by an attacker who retries."""


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    version: Version = "standard",
    seed: int = 0,
    batch: int = 250,
    log: Callable[[str], None] | None = None,
    output: Output | None = None,
) -> AutoAttackResult:
    """Run AutoAttack; with the same seed and batch, on a deterministic model, it breaks the images the library breaks.

    Args:
        model: images -> logits; a module must be in evaluation mode. Its parameters collect no gradient.
        images: float32 (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: only `eps` is read; the attacks bring their own steps.
        version: "standard" for a deterministic model. "rand" for a random one; its verdict counts an image as broken
            after one unlucky draw, so judge `adversarial` by `recheck`.
        seed: every attack begins each of its batches with it. The global random numbers are as before afterwards.
        batch: images attacked at once.
        log: called with a line after each attack.
        output: where the logits are in what the model returns; see `outputs.Output`.

    Raises:
        BadInput: pyautoattack is not installed; images that are not float32; fewer than 4 classes (rand: 3), or so few
            logits that are not -inf, which the DLR loss needs; see `images.check_batch` and `losses.ascent`.
        UnknownName: no such version.
    """
    if version not in get_args(Version):
        raise UnknownName(version, get_args(Version), kind="AutoAttack version")
    budget = linf_of(budget, "AutoAttack")
    seed, batch = whole(seed, "seed"), whole(batch, "batch")
    names = ATTACKS if version == "standard" else RANDOM_ATTACKS
    package = _authors_package()
    model = checked_model(model, output, randomness="allow" if version == "standard" else "expect")
    images, labels = _ready(model, images, labels, batch)
    robust: dict[str, Tensor] = {}
    adversarial = images.clone()
    with _guarded():
        classes = _classes(model, images, labels, batch)
        if classes < CLASSES_NEEDED[version]:
            raise BadInput(
                f"AutoAttack {version!r} needs at least {CLASSES_NEEDED[version]} classes for its DLR loss, got "
                f"{classes}; use apgd with the margin loss"
            )
        warned = _Warnings()
        checked = _input_gradients_only(model, CLASSES_NEEDED[version])
        attacks = package.AutoAttack(checked, eps=budget.eps, seed=seed, version=version, device=images.device)
        attacks.apgd.logger = attacks.apgd_targeted.logger = warned.logger
        attacks.apgd_targeted.n_target_classes = attacks.fab.n_target_classes = min(TARGETS, classes - 1)
        clean = _correct(checked, images, labels, batch)
        if budget.eps and len(images):
            _check_model(checked, images[:batch], labels[:batch], batch, version, warned)
        left = clean.clone()
        for name in names:
            for rows in _batches(left, batch) if budget.eps else ():
                attack = _prepared(attacks, name)
                with torch.no_grad():
                    found = attack.perturb(images[rows].clone(), labels[rows].clone()).to(images.dtype)
                    found = budget.project(found, images[rows])
                    broken = checked(found).argmax(1) != labels[rows]
                adversarial[rows[broken]] = found[broken]
                left[rows[broken]] = False
            robust[name] = left.clone()
            if log is not None:
                log(f"{name}: {int(left.sum())} of {len(images)} images are still answered correctly")
        if len(images):
            _check_square({"clean": clean, **robust}, warned)
    return AutoAttackResult(adversarial=adversarial, clean=clean, robust=robust, flags=warned.messages)


def fab(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    num_targets: int = TARGETS,
    seed: int = 0,
    batch: int = 250,
    output: Output | None = None,
) -> Tensor:
    """Run targeted FAB (Croce and Hein 2020, arXiv:1907.02044), which looks for the nearest wrong image.

    Args, guarantees and raises as `autoattack`, and
        budget: `eps`, `steps` (100 in AutoAttack) and `restarts` for each target; the first begins at the image.
        num_targets: how many wrong classes it moves towards, in the order of their logits on the image.

    Returns:
        For each image the nearest wrong image found, if it lies within `budget.eps`, else the image.
    """
    budget = linf_of(budget, "FAB")
    seed, batch, num_targets = whole(seed, "seed"), whole(batch, "batch"), whole(num_targets, "num_targets")
    if num_targets < 1:
        raise BadInput(f"need at least 1 target class, got num_targets={num_targets}; 9 is usual with 10 classes")
    package = _authors_package()
    model = checked_model(model, output)
    images, labels = _ready(model, images, labels, batch)
    adversarial = images.clone()
    if not budget.eps:
        return adversarial
    with _guarded(), torch.no_grad():
        classes = _classes(model, images, labels, batch)
        attack = package.fab_pt.FABAttack_PT(
            _input_gradients_only(model, 2),
            n_restarts=budget.restarts,
            n_iter=budget.steps,
            eps=budget.eps,
            seed=seed,
            targeted=True,
            device=images.device,
            n_target_classes=min(num_targets, classes - 1),
        )
        for rows in _batches(torch.ones_like(labels), batch):
            found = attack.perturb(images[rows].clone(), labels[rows].clone())
            adversarial[rows] = budget.project(found, images[rows])
    return adversarial


@torch.no_grad()
def recheck(sampler: Sampler, adversarial: Tensor, labels: Tensor, draws: int = 40) -> Recheck:
    """Judge adversarial images on fresh draws of a random model.

    Args:
        sampler: returns one fresh deterministic draw of the model at each call.
        adversarial: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        draws: how many models answer.

    Raises:
        BadInput: no draw, or no image.
    """
    draws = whole(draws, "draws")
    if draws < 1 or not len(adversarial):
        raise BadInput(f"need at least 1 draw and 1 image, got draws={draws} and {len(adversarial)} images")
    adversarial, labels, _ = check_batch(adversarial, labels)
    draw = checked_draws(sampler)
    right = torch.stack([draw()(adversarial).argmax(1) == labels for _ in range(draws)])
    return Recheck(accuracy=float(right.double().mean()), always_right=float(right.all(0).double().mean()))


def _authors_package() -> Any:
    """Return pyautoattack.

    Raises:
        BadInput: it is not installed.
    """
    try:
        import pyautoattack.checks
        import pyautoattack.fab_pt
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise BadInput(
            "AutoAttack and FAB need the package pyautoattack, which is not installed; "
            "run: pip install 'manygates[autoattack]'"
        ) from error
    return pyautoattack


def _ready(model: CheckedModel, images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    if batch < 1:
        raise BadInput(f"need at least 1 image per batch, got batch={batch}")
    images, labels, _ = check_batch(images, labels)
    if images.dtype != torch.float32:
        raise BadInput(f"pyautoattack computes in float32, got images of {images.dtype}; convert images and model")
    return images.contiguous(), labels


def _classes(model: Model, images: Tensor, labels: Tensor, batch: int) -> int:
    """Return the number of classes, from one checked answer; 10 where there is no image to ask about."""
    if not len(images):
        return TARGETS + 1
    return first_logits(model, images[:batch], labels).shape[1]


@torch.no_grad()
def _correct(model: Model, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    right = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for rows in _batches(torch.ones_like(labels), batch):
        right[rows] = model(images[rows]).argmax(1) == labels[rows]
    return right


def _batches(chosen: Tensor, batch: int) -> list[Tensor]:
    """Return the positions where `chosen` is not 0, in groups, none of them empty."""
    rows = chosen.nonzero()[:, 0]
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]


def _prepared(attacks: Any, name: str) -> Any:
    """Return one of the library's attacks, set as `AutoAttack.run_standard_evaluation` sets it."""
    if name in ("apgd-ce", "apgd-dlr"):
        attack = attacks.apgd
        attack.loss = name.removeprefix("apgd-")
    elif name == "apgd-t":
        attack = attacks.apgd_targeted
    elif name == "fab-t":
        attack = attacks.fab
        attack.targeted, attack.n_restarts = True, 1
    else:
        attack = attacks.square
    attack.seed = attacks.seed
    return attack


def _check_model(model: Model, images: Tensor, labels: Tensor, batch: int, version: Version, warned: _Warnings) -> None:
    """Run the library's checks of the model; probabilities we refuse ourselves."""
    checks = _authors_package().checks
    with torch.no_grad():
        if version != "rand":
            checks.check_randomized(model, images, labels, bs=batch, logger=warned.logger)
        # the library counts calls in a global that it never resets, and ends any other tracing (a debugger's, coverage)
        tracing = sys.gettrace()
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        try:
            checks.check_dynamic(model, images, False, logger=warned.logger)
        finally:
            sys.settrace(tracing)


def _check_square(right: Mapping[str, Tensor], warned: _Warnings) -> None:
    """Run the library's check of whether Square, which needs no gradient, found more than the attacks before it."""
    _authors_package().checks.check_square_sr(
        {name: float(mask.double().mean()) for name, mask in right.items()}, logger=warned.logger
    )


class _Warnings(logging.Handler):
    """Collects what is logged as a warning, and shows nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: dict[str, None] = {}
        # on purpose outside the global tree of loggers, which belongs to the caller
        self.logger = logging.Logger("autoattack")
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages[record.getMessage().removesuffix(" See flags_doc.md for details.")] = None

    @property
    def messages(self) -> tuple[str, ...]:
        return tuple(self._messages)


@contextmanager
def _guarded() -> Iterator[None]:
    """Give back the global random numbers as they were: the library seeds those of torch."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _input_gradients_only(model: CheckedModel, needed: int) -> Model:
    """Return the model as a function whose backward pass reaches the images and nothing else.

    FAB calls `backward()`, which would fill the gradients of every parameter. Of each image `needed` logits must be
    more than -inf, without which DLR is 0 everywhere.
    """

    def checked_logits(images: Tensor) -> Tensor:
        logits = model(images).to(images.dtype)  # the library writes them into tensors of the images' type
        if bool(((~logits.isneginf()).sum(1) < needed).any()):
            raise BadInput(
                f"AutoAttack needs at least {needed} logits of each image that are not -inf, for its DLR loss; "
                "use apgd with the margin loss"
            )
        return logits

    def call(images: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return checked_logits(images)
        logits: Tensor = _Boundary.apply(images, checked_logits)  # type: ignore[no-untyped-call]
        return logits

    return call


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor, model: Model) -> Tensor:
        with torch.enable_grad():
            context.images = differentiable(images)
            context.logits = model(context.images)
        logits: Tensor = context.logits.detach()
        return logits

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        # retained: the library's untargeted attacks go back once per class
        with explained_errors(context.images):
            gradient = gradient_of(context.logits, context.images, weights=gradients[0], retain_graph=True)
        # one number for each image, NaN where the loss of the library has a gradient that is NaN
        check_numbers(context.logits.detach(), gradients[0].abs().sum(1), gradient)
        return gradient.contiguous(), None  # the library flattens by view, which channels last does not allow
