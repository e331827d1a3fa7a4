"""A model as attacks ask it.

`checked_model` wraps a model for an attack. The model gets a copy of the images, so it may change them in place. Its
answer is checked at every call, because NaN is no class and would pass for robustness. No part of it may be in training
mode, where answers are random and statistics move. `unchecked` leaves all of this out, for training.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attacks.images import full_precision
from zoo.attacks.outputs import Model, Output, check_logits, check_not_nan, explained_errors, find_logits
from zoo.attacks.training_mode import RANDOM_SOURCES, Buffers, Unchecked, check_mode, parts_held, unchecked
from zoo.errors import BadInput
from zoo.gates.rgn import RandomGatedNetwork

Randomness = Literal["warn", "allow", "expect"]
"""What an attack does with a model that answers at random: warn of it, allow it without a word, or expect it.

Dropout is refused unless it is expected.
"""
PROBED_IMAGES: Final = 2
PROBES: Final = 8
"""A model that holds a source of random numbers is asked about these few images this often, to see whether it answers
alike each time."""


class RandomModel(UserWarning):
    """A random model was given to an attack on deterministic ones, which attacks its draws one by one."""


def checked_model(
    model: Callable[[Tensor], Any],
    output: Output | None = None,
    *,
    randomness: Randomness = "warn",
    operations_checked: bool = False,
    may_move_buffers: bool = False,
) -> CheckedModel:
    """Return a model whose every answer is checked; one that was returned from here is returned as it is.

    Args:
        model: images (batch, channel, height, width) -> logits (batch, class), or something that holds them.
        output: where in it they are; see `Output`.
        randomness: what to do if the model answers at random.
        operations_checked: the operations of another draw of the same model were checked, so those of this one are not.
        may_move_buffers: take a model in training mode whose buffers move; the linter reports it.

    Raises:
        BadInput: the model is no function, is a random gated network without a path, or has a part in training mode.
    """
    if isinstance(model, CheckedModel) and output is None:
        return model
    return CheckedModel(
        model, output, randomness=randomness, operations_checked=operations_checked, may_move_buffers=may_move_buffers
    )


class CheckedModel:
    """A model as attacks ask it: a copy of the images goes in; checked logits (batch, class), never in half, come out.

    Attributes:
        model: what was given.
        trusted: whether that is `unchecked`, so that nothing is checked here either.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        output: Output | None,
        *,
        randomness: Randomness,
        operations_checked: bool = False,
        may_move_buffers: bool = False,
    ) -> None:
        if not callable(model):
            raise BadInput(f"a model must be a function of images, got {type(model).__name__}")
        if isinstance(model, RandomGatedNetwork):
            raise BadInput(
                "a random gated network answers along a path, and got none; attack path_sampler(rgn, rng) by eot_pgd "
                "or apgd_eot, or one path, path_model(rgn, path)"
            )
        check_mode(model)
        self.model = model
        self.trusted = isinstance(model, Unchecked)
        self._output = output
        self._randomness = randomness
        self._operations_checked = operations_checked
        self._may_move_buffers = may_move_buffers

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (batch, class).

        Raises:
            BadInput: see `answer`, or an answer that is NaN.
        """
        logits = self.answer(images)
        if not self.trusted:
            check_not_nan(logits)
        return logits

    def answer(self, images: Tensor) -> Tensor:
        """Return logits (batch, class) that may be NaN, for callers that check for NaN themselves.

        Raises:
            BadInput: the model fails, returns no logits, or computes in training mode.
        """
        if self.trusted:
            return full_precision(find_logits(self.model(images), self._output, len(images)))
        raw = self._ask(images) if self._operations_checked else self._first_answer(images)
        return full_precision(find_logits(raw, self._output, len(images)))

    def explained_errors(self, images: Tensor) -> AbstractContextManager[None]:
        """Return the context that explains errors of the model; see `outputs.explained_errors`."""
        return nullcontext() if self.trusted else explained_errors(images)

    def preceded_by(self, change: Callable[[Tensor], Tensor]) -> CheckedModel:
        """Return the model that sees changed images; the change may draw at random."""

        def changed(images: Tensor) -> Tensor:
            return self.answer(change(images))

        return CheckedModel(
            unchecked(changed) if self.trusted else changed, None, randomness="expect", operations_checked=True
        )

    def _first_answer(self, images: Tensor) -> Any:
        """Ask for the first time: check the operations for training mode, and for randomness where it is warned of."""
        check = _OperationCheck(dropout=self._randomness == "expect")
        before, buffers = _drawn_so_far(), Buffers(None if self._may_move_buffers else self.model)
        moved = ""
        try:
            with check:
                raw = self._ask(images)
        except BadInput:
            if check.refused:  # raised once more, because TorchScript wraps what is raised inside it
                raise BadInput(check.refused) from None
            raise
        finally:
            moved = buffers.restore()
        if moved:
            raise BadInput(
                f"the model moves a buffer when it is asked, {moved}, and has a part in training mode; call .eval() on "
                "its module first"
            )
        self._operations_checked = True
        if self._randomness == "warn":
            drew = check.drew or _drawn_so_far() != before
            if drew or any(isinstance(held, RANDOM_SOURCES) for held in parts_held(self.model)):
                self._probe(images[:PROBED_IMAGES])
        return raw

    def _probe(self, images: Tensor) -> None:
        """Warn if the model answers the same images differently."""
        try:
            with torch.no_grad():
                first, *others = [find_logits(self._ask(images), self._output, len(images)) for _ in range(PROBES)]
        except BadInput:
            return  # it may need the whole batch
        size = float(first.nan_to_num(0, 0, 0).abs().mean())
        gaps = [float((other - first).nan_to_num(0, 0, 0).abs().max()) for other in others]
        if max(gaps) > 1e-4 * size:  # sums on a GPU vary by 1e-6
            warnings.warn(
                "the model answers the same images differently, so it is random, and this attack takes each answer for "
                "the whole model; use eot_pgd or apgd_eot, with path_sampler for random gates, or square with draws",
                RandomModel,
                stacklevel=2,  # one place, so that Python says it once
            )

    def _ask(self, images: Tensor) -> Any:
        with explained_errors(images):
            # always a copy: a model that normalises in place would move the images that the ball is around
            return self.model(images.clone())


@torch.no_grad()
def first_logits(model: Model, images: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the model's logits (batch, class), after the checks of `outputs.check_logits`."""
    logits = checked_model(model)(images)
    check_logits(logits, labels, targets)
    return logits


class _OperationCheck(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's has no annotations
    """Sees every operation of a forward, scripted ones too, and stops before one that shows training mode."""

    def __init__(self, *, dropout: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # likewise
        self._dropout = dropout
        """Whether the model may drop values at random."""
        self.refused = ""
        self.drew = ""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, draws = str(operation), torch.Tag.nondeterministic_seeded in operation.tags
        if not draws and "batch_norm" not in name:
            return operation(*args, **kwargs)
        arguments = operation._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        mode = given.get("training", given.get("train"))
        moves = mode or "with_update" in name
        if "batch_norm" in name and moves and given.get("running_mean") is not None:
            self.refused = (
                f"the model computes a BatchNorm in training mode ({name}), where every forward moves its statistics; "
                "call .eval() on the module"
            )
        elif draws:
            # attention and rectifiers carry the tag even where they drop nothing
            draws = given.get("dropout_p", given.get("p")) != 0 and mode is not False
            self.drew = self.drew or (name if draws else "")
            dropout = "dropout" in name or "bernoulli" in name or "scaled_dot_product" in name
            if draws and dropout and not self._dropout:
                self.refused = (
                    f"the model drops values at random ({name}), as dropout does in training mode; call .eval(), and "
                    "give F.dropout and attention training=self.training, since they drop by default. If it is meant, "
                    "attack it with eot_pgd(lambda: model, ...)"
                )
        if self.refused:
            raise BadInput(self.refused)
        return operation(*args, **kwargs)


def _drawn_so_far() -> bytes:
    """Return the state of the global random numbers of Python and numpy."""
    return pickle.dumps((random.getstate(), np.random.get_state(legacy=False)))
