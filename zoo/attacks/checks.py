"""The door of every attack: how images, labels and a model as people write it are taken, or refused in one sentence.

`see` gives an attack its view of a model. The model gets a copy of the images, so it may change them in place; its
answer is checked at every call, because NaN is no class and would pass for robustness; nothing in it may be in training
mode, where answers are random and statistics move. `as_it_is` leaves all of this out, for training.
"""

from __future__ import annotations

import functools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.errors import BadInput, ManygatesError
from zoo.gates.rgn import RandomGatedNetwork

Model = Callable[[Tensor], Tensor]
"""images (batch, channel, height, width) in [0, 1] -> logits (batch, class)."""
Output = str | int | Callable[[Any], Tensor]
"""Where the logits are in what a model returns: a key or an attribute, a position, or a function of it."""

Chance = Literal["warned of", "tolerated", "expected"]
"""How an attack takes a model that answers at random. Dropout is refused unless chance is expected."""

PROBED_IMAGES: Final = 2
PROBES: Final = 8
"""A model with a source of random numbers is asked so often about so few images whether it answers alike each time."""
_MOST_WALKED: Final = 10_000
"""Objects that are looked into for parts in training mode."""
_CONTAINERS = (list, tuple, set, dict)
_SOURCES = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
PASSED: Final = (ManygatesError, torch.OutOfMemoryError, MemoryError, Warning)
"""What a model may raise that is said already, or that no other model would help with."""


class RandomModel(UserWarning):
    """A random model was given to an attack on deterministic ones, which attacks its draws one by one."""


class AsItIs:
    """See `as_it_is`."""

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Any:
        """Return what the model answers."""
        return self.model(images)


def as_it_is(model: Callable[[Tensor], Any]) -> AsItIs:
    """Return the model as one that attacks take without a look at its mode, its randomness or NaN in its answers.

    Training needs it: it attacks the network that it trains, in training mode, and watches over NaN itself.
    """
    return AsItIs(model)


def checked(
    model: object, images: object, labels: object, targets: object = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return images, labels and targets as tensors of the attack's own, if an attack can begin with them.

    Images may be numpy's. Labels and targets may be lists, or numpy's of any integer type.

    Raises:
        BadInput: pixels outside [0, 1], labels or targets that do not fit the images or are negative, a target that is
            the label, or a part of the model in training mode.
    """
    check_mode(model)
    pixels = checked_images(images)
    right = _checked_classes(labels, pixels, "labels")
    wanted = None if targets is None else _checked_classes(targets, pixels, "targets")
    if wanted is not None and bool((wanted == right).any()):
        position = int((wanted == right).nonzero()[0, 0])
        raise BadInput(
            f"the target of image {position} is its label, {int(right[position])}; a targeted attack needs another"
        )
    return pixels, right, wanted


def _checked_classes(classes: object, images: Tensor, name: str) -> Tensor:
    if not isinstance(classes, Tensor):
        try:
            array = np.asarray(classes)
        except ValueError as error:
            raise BadInput(f"{name} must be one class per image, got {classes!r:.80}") from error
        kinds = "iuf" if array.size == 0 else "iu"  # numpy takes an empty list for floats
        if array.dtype.kind not in kinds:
            raise BadInput(f"{name} must be whole numbers, one class per image, got {classes!r:.80}")
        classes = torch.tensor(array.astype(np.int64))
    if classes.shape != images.shape[:1] or classes.dtype != torch.int64:
        raise BadInput(
            f"{name} must be int64 of shape ({len(images)},), one per image, got {classes.dtype} of shape "
            f"{tuple(classes.shape)}"
        )
    classes = _own(classes).to(images.device)
    if len(classes) and int(classes.min()) < 0:
        raise BadInput(f"{name} must be classes from 0 on, got {int(classes.min())}")
    return classes


def checked_images(images: object) -> Tensor:
    """Return images, detached, if all pixels are in [0, 1]; NaN is not. A numpy array becomes a tensor."""
    if isinstance(images, np.ndarray):
        images = torch.tensor(images)
    if not isinstance(images, Tensor):
        raise BadInput(f"images must be a tensor (batch, channel, height, width), got {type(images).__name__}")
    if not images.is_floating_point() or images.dim() != 4:
        raise BadInput(
            f"images must be float (batch, channel, height, width), got {images.dtype} of shape {tuple(images.shape)}; "
            "divide bytes by 255"
        )
    if len(images) and not images.numel():
        raise BadInput(f"images of shape {tuple(images.shape)} have no pixels")
    images = _own(images.detach())
    low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise BadInput(f"pixels must be in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and do not normalise")
    return images


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor that gradients can be asked of, also where the caller made it in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def differentiable(images: Tensor) -> Tensor:
    """Return images that collect a gradient, without the history of `images`.

    Raises:
        BadInput: inside `torch.inference_mode()`, where nothing does.
    """
    if torch.is_inference_mode_enabled():
        raise BadInput(
            "an attack by gradients cannot run inside torch.inference_mode(), where nothing has a gradient; call it "
            "outside, or use torch.no_grad(), which attacks lift where they need to"
        )
    return images.detach().requires_grad_(True)


# --- the mode of a model ---


def check_mode(model: object) -> None:
    """Check that nothing in the model depends on its training mode, as far as modules can be found in it.

    Found are modules, scripted ones too, what a bound method or a partial belongs to, and what a function or a callable
    object keeps. What stays hidden shows when the model is asked (`see`).

    Raises:
        BadInput: a part in training mode that reads its mode, such as BatchNorm, dropout or stochastic depth.
    """
    if isinstance(model, Seen):  # it was checked when it was made
        return
    roots = (held for held in _kept_by(model) if isinstance(held, nn.Module))
    for root in roots:
        for name, part in root.named_modules():
            if part.training and _reads_mode(part):
                kind = getattr(part, "original_name", type(part).__name__)
                raise BadInput(
                    (f"the model's {kind} {name!r}" if name else f"the model, a {kind},")
                    + " is in training mode, where every forward of an attack moves its statistics or draws at random; "
                    "call .eval() first"
                )


def _kept_by(model: object) -> Iterator[object]:
    """Yield the modules that a callable keeps, without those that a yielded one registers, and its random sources."""
    waiting, met = [model], set[int]()
    while waiting and len(met) < _MOST_WALKED:
        thing = waiting.pop()
        if id(thing) in met or isinstance(thing, AsItIs | type | Tensor):
            continue
        met.add(id(thing))
        if isinstance(thing, _SOURCES):
            yield thing
        elif isinstance(thing, nn.Module):
            yield thing
            # a list of modules in an attribute is not registered, and .eval() does not reach it
            for part in () if isinstance(thing, torch.jit.ScriptModule) else thing.modules():
                met.add(id(part))
                waiting += [held for name, held in vars(part).items() if not name.startswith("_")]
        elif isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, MethodType | BuiltinMethodType):
            owner = thing.__self__
            waiting += [owner, *(() if isinstance(owner, nn.Module) else _attributes(owner).values())]
        elif isinstance(thing, FunctionType):
            names = _names_in(thing.__code__)
            enclosed = [_content(cell) for cell in thing.__closure__ or ()]
            outer = [thing.__globals__[name] for name in names if name in thing.__globals__]
            waiting += [*enclosed, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
            # no functions, which would lead through whole libraries
            waiting += [held for held in outer if isinstance(held, (nn.Module, *_CONTAINERS, *_SOURCES))]
            # of an object only what is named: a trainer may hold another network in training mode
            for held in (*enclosed, *outer):
                if not isinstance(held, nn.Module | ModuleType | type):
                    waiting += [part for name, part in _attributes(held).items() if name in names]
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        elif callable(thing):
            waiting += _attributes(thing).values()


def _attributes(thing: object) -> dict[str, object]:
    """Return what an object keeps under names of its own."""
    kept = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        for name, slot in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType):
                try:
                    kept[name] = slot.__get__(thing)
                except AttributeError:  # it is empty
                    continue
    return kept


def _reads_mode(part: nn.Module) -> bool:
    """Whether a method or a hook of a module, other than those that set its mode, reads `training`."""
    if isinstance(part, torch.jit.ScriptModule):
        return "training" in str(getattr(part, "code", ""))
    own = (vars(part).get("forward"), *part._forward_pre_hooks.values(), *part._forward_hooks.values())
    methods = [*own, *(method for thing in (part, *own) for method in _methods_of(thing))]
    return any("training" in _names_in(code) for method in methods for code in _codes_of(method))


def _methods_of(thing: object) -> list[object]:
    """Return the methods and properties of an object's class, without those that set a mode and those of torch."""
    return [
        method
        for kind in type(thing).__mro__
        if kind not in (nn.Module, object)
        for name, method in vars(kind).items()
        if name not in ("__init__", "train", "eval", "training")
    ]


def _codes_of(method: object) -> Iterator[CodeType]:
    """Yield the code of what a class or an object keeps as a method, decorated or not."""
    while method is not None:
        if isinstance(method, property):
            method = method.fget
        elif isinstance(method, functools.partial):
            method = method.func
        elif isinstance(method, staticmethod | classmethod | MethodType):
            method = method.__func__
        else:
            if isinstance(method, FunctionType):
                yield method.__code__
            method = vars(method).get("__wrapped__") if isinstance(method, FunctionType) else None


def _names_in(code: CodeType) -> set[str]:
    """Return the globals and attributes that a function names, in a `getattr` and in the functions inside of it too."""
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union({"training"}.intersection(code.co_consts), *inner)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


class _Buffers:
    """The buffers of a model's modules with a part in training mode, as they were before it was asked."""

    def __init__(self, model: object) -> None:
        roots = (held for held in _kept_by(model) if isinstance(held, nn.Module))
        parts = (part for root in roots if any(part.training for part in root.modules()) for part in root.modules())
        self._before = [
            (part, name, buffer, buffer.clone())
            for part in parts
            for name, buffer in part.named_buffers(recurse=False)
            if buffer.layout == torch.strided and not buffer.is_meta and not buffer.is_quantized
        ]

    def give_back(self) -> str:
        """Put back what moved; return the name of a buffer that did, else nothing."""
        moved = ""
        for part, name, buffer, before in self._before:
            now = getattr(part, name, None)
            if isinstance(now, Tensor) and torch.equal(now, before):
                continue
            if buffer.is_floating_point() and now is buffer and torch.equal(now.nan_to_num(), before.nan_to_num()):
                continue
            with torch.no_grad():
                buffer.copy_(before)
            setattr(part, name, buffer)
            moved = moved or f"{type(part).__name__}.{name}"
        return moved


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's has no annotations
    """Sees every operation of a forward, scripted ones too; ends it before one that shows training mode."""

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


# --- asking a model ---


def see(
    model: Callable[[Tensor], Any],
    output: Output | None = None,
    *,
    chance: Chance = "warned of",
    watched: bool = False,
    moving: bool = False,
) -> Seen:
    """Return a model as attacks see it; one that is seen already is returned as it is.

    Args:
        model: images -> logits (batch, class), or something that has them in it.
        output: where; see `Output`.
        chance: what to do if it answers at random.
        watched: leave the look at its operations out, because another draw of the same model had it.
        moving: take a model in training mode whose buffers move, for who reports that.

    Raises:
        BadInput: no function, a random gated network without a path, or a part in training mode.
    """
    if isinstance(model, Seen) and output is None:
        return model
    return Seen(model, output, chance=chance, watched=watched, moving=moving)


class Seen:
    """A model as attacks see it: a copy of the images goes in, checked logits (batch, class) come out, never in half.

    Attributes:
        model: what was given.
        trusted: whether that is `as_it_is`.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        output: Output | None,
        *,
        chance: Chance,
        watched: bool = False,
        moving: bool = False,
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
        self.trusted = isinstance(model, AsItIs)
        self._output = output
        self._chance = chance
        self._watched = watched
        self._moving = moving

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (batch, class).

        Raises:
            BadInput: see `answer`, or an answer that is NaN.
        """
        logits = self.answer(images)
        if not self.trusted and bool(logits.isnan().any()):
            raise BadInput(_not_a_number(logits))
        return logits

    def answer(self, images: Tensor) -> Tensor:
        """Return logits (batch, class), NaN among them if so it is: for who looks for it along with other things.

        Raises:
            BadInput: the model fails, returns no logits, or computes in training mode.
        """
        if self.trusted:
            return full_precision(picked(self.model(images), self._output, len(images)))
        raw = self._asked(images) if self._watched else self._asked_at_first(images)
        return full_precision(picked(raw, self._output, len(images)))

    def errors(self, images: Tensor) -> AbstractContextManager[None]:
        """Return the context that turns what fails in the model into a sentence; see `said_of_model`."""
        return nullcontext() if self.trusted else said_of_model(images)

    def behind(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """Return the model behind a change of its images, which may draw at random."""

        def changed(images: Tensor) -> Tensor:
            return self.answer(change(images))

        return Seen(as_it_is(changed) if self.trusted else changed, None, chance="expected", watched=True)

    def _asked_at_first(self, images: Tensor) -> Any:
        """Ask, and look at the operations for training mode, and for chance where it is to be warned of."""
        watch = _Watch(dropout=self._chance == "expected")
        before, buffers = _drawn_so_far(), _Buffers(None if self._moving else self.model)
        moved = ""
        try:
            with watch:
                raw = self._asked(images)
        except BadInput:
            if watch.refused:  # once more, because TorchScript wraps what is raised inside of it
                raise BadInput(watch.refused) from None
            raise
        finally:
            moved = buffers.give_back()
        if moved:
            raise BadInput(
                f"the model moves a buffer when it is asked, {moved}, and has a part in training mode; call .eval() on "
                "its module first"
            )
        self._watched = True
        if self._chance == "warned of":
            drew = watch.drew or _drawn_so_far() != before
            if drew or any(isinstance(held, _SOURCES) for held in _kept_by(self.model)):
                self._probe(images[:PROBED_IMAGES])
        return raw

    def _probe(self, images: Tensor) -> None:
        """Warn if the model answers the same images differently."""
        try:
            with torch.no_grad():
                first, *others = [picked(self._asked(images), self._output, len(images)) for _ in range(PROBES)]
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

    def _asked(self, images: Tensor) -> Any:
        with said_of_model(images):
            # always a copy: a model that normalises in place would move the images that the ball is around
            return self.model(images.clone())


@contextmanager
def said_of_model(images: Tensor) -> Iterator[None]:
    """Turn an error inside of a model, forward or backward, into a sentence that says what it was asked about."""
    try:
        yield
    except PASSED:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        hint = ""
        if "type" in str(error):
            hint = f"; images are {images.dtype}, and images and weights must be of one type"
        elif len(images) == 1:
            hint = "; if it fails on single images only, it may drop the batch: write squeeze(-1) or flatten(1)"
        raise BadInput(
            f"the model fails on images of shape {tuple(images.shape)}: {type(error).__name__}: "
            f"{lines[-1] if lines else 'no reason given'}{hint}"
        ) from error


def picked(raw: Any, output: Output | None, batch: int) -> Tensor:
    """Return the logits in what a model returned.

    Raises:
        BadInput: they are not where `output` says, or are no floating-point tensor (batch, class).
    """
    found = raw
    if output is not None:
        try:
            if callable(output):
                return picked(output(raw), None, batch)
            by_name = isinstance(output, str) and not isinstance(raw, Mapping)
            found = getattr(raw, str(output)) if by_name else raw[output]
        except PASSED:
            raise
        except Exception as error:
            said = getattr(output, "__name__", repr(output))
            raise BadInput(f"output={said} finds no logits in what the model returns, {_described(raw)}") from error
    if not isinstance(found, Tensor):
        raise BadInput(
            f"a model must return logits as one tensor, got {_described(found)}"
            + (_how_to_pick(found) if output is None else "")
        )
    if found.layout != torch.strided or found.is_nested or found.is_meta:
        raise BadInput(
            f"a model must return logits as a dense tensor, got one of layout {found.layout} on {found.device}; "
            "call .to_dense(), and keep the model off the meta device"
        )
    if not found.is_floating_point():
        raise BadInput(
            f"a model must return logits, which are floating-point, got {found.dtype}; classes alone cannot be "
            "attacked by scores or gradients"
        )
    if found.dim() != 2 or found.shape[1] < 2 or found.shape[0] != batch:
        raise BadInput(
            f"a model must return logits (batch, class), got shape {tuple(found.shape)} for {batch} "
            f"image{'' if batch == 1 else 's'}" + (_dropped(found) if batch == 1 else "")
        )
    return found


def _described(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} with {', '.join(map(repr, list(raw)[:8])) or 'nothing in it'}"
    if isinstance(raw, list | tuple):
        parts = (str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in raw[:8])
        return f"a {type(raw).__name__} of {len(raw)}: {', '.join(parts)}"
    if isinstance(raw, Tensor):
        return f"a tensor of shape {tuple(raw.shape)}"
    return f"{raw!r}" if raw is None else f"a {type(raw).__module__}.{type(raw).__name__}"


def _how_to_pick(raw: Any) -> str:
    if raw is None:
        return "; does it end without a return?"
    if isinstance(raw, np.ndarray):
        return "; numpy keeps no gradient: return the torch tensor, or torch.from_numpy(...) for square and rays"
    if isinstance(raw, Mapping):
        return f"; pick them with output={'logits' if 'logits' in raw else next(iter(raw), 'KEY')!r}"
    if isinstance(raw, list | tuple) and not hasattr(raw, "logits"):
        return "; pick them with output=0"
    return "; pick them with output='logits', or a function of it"


def _dropped(logits: Tensor) -> str:
    if logits.dim() == 1:
        return "; does it squeeze() the batch away? Write squeeze(-1) or flatten(1)"
    return ""


def _not_a_number(logits: Tensor) -> str:
    rows = logits.isnan().any(1)
    return (
        f"the model answers NaN to {int(rows.sum())} of {len(rows)} images, the first of them image "
        f"{int(rows.nonzero()[0, 0])}; NaN is no class, and an attack cannot tell what it did. Look for a weight that "
        "is NaN, or for a division by 0, a root or a logarithm in the forward"
    )


def gradient_of(total: Tensor, images: Tensor, *, weights: Tensor | None = None, retain_graph: bool = False) -> Tensor:
    """Return the gradient of a sum (or of values, weighted) in the images, in full precision.

    Raises:
        BadInput: it does not depend on them.
    """
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, images, weights, allow_unused=True, retain_graph=retain_graph)
    if gradient is None:
        raise BadInput(
            "the model's answer has no gradient in the images: something detaches it, such as no_grad, .detach(), "
            ".data or numpy; take that out, or use square or rays, which need no gradient"
        )
    return full_precision(gradient)


def check_numbers(logits: Tensor, losses: Tensor, gradient: Tensor | None = None) -> None:
    """Check that an answer, its loss and its gradient, if there is one, are numbers.

    Raises:
        BadInput: one is NaN, or the gradient infinite. Minus infinity is a logit (of probability 0).
    """
    # one value to wait for where a GPU computes; a NaN or an infinity survives the sum
    gradient = losses[:0, None] if gradient is None else gradient
    if not bool(logits.isnan().any() | losses.isnan().any() | ~gradient.sum().isfinite()):
        return
    if bool(logits.isnan().any()):
        raise BadInput(_not_a_number(logits))
    for name, rows in (("loss", losses.isnan()), ("gradient", ~gradient.flatten(1).isfinite().all(1))):
        if not bool(rows.any()):
            continue
        position = int(rows.nonzero()[0, 0])
        answer = logits[position]
        why = "look for a root, a logarithm or a division at 0 in the forward"
        if bool((answer == torch.inf).any()):
            why = "a logit is infinite; in half precision that is one above 65,504"
        elif name == "loss" and bool(answer.isneginf().any()):
            why = "most of its logits are -inf, and DLR needs 3 that are not (targeted: 4); use the margin loss"
        raise BadInput(
            f"the {name} of {int(rows.sum())} of {len(rows)} images is NaN or infinite, the first of them image "
            f"{position}, so the attack cannot move, which is no robustness: {why}"
        )


def check_logits(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> None:
    """Check the first answer of a model.

    Raises:
        BadInput: a label or target that is no class of the model, or probabilities instead of logits.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise BadInput(f"a model must return logits (batch, class), got shape {tuple(logits.shape)}")
    for name, classes in (("label", labels), ("target", targets)):
        if classes is not None and len(classes) and int(classes.max()) >= logits.shape[1]:
            raise BadInput(
                f"{name} {int(classes.max())} is out of range, expected 0 to {logits.shape[1] - 1}: "
                f"the model has {logits.shape[1]} classes"
            )
    if are_probabilities(logits):
        raise BadInput(
            "the model returns probabilities (rows are non-negative and sum to 1), expected logits: a softmax in the "
            "way hides gradients; give the model without its softmax, or with a log behind it"
        )


def are_probabilities(outputs: Tensor) -> bool:
    """Whether every row is non-negative and sums to 1, as logits hardly ever do."""
    if not len(outputs):
        return False
    rows = outputs.float()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all())


@torch.no_grad()
def first_logits(model: Model, images: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the model's checked logits on `images`; for attacks that begin by asking."""
    logits = see(model)(images)
    check_logits(logits, labels, targets)
    return logits


@torch.no_grad()
def asked(model: Model, images: Tensor) -> Tensor:
    """Return checked logits of a deployed model, to judge it by: from a copy of the images, and never NaN.

    Raises:
        BadInput: see `picked`, or an answer that is NaN.
    """
    logits = picked(model(images.clone()), None, len(images))
    if bool(logits.isnan().any()):
        raise BadInput(_not_a_number(logits))
    return logits


def full_precision(tensor: Tensor) -> Tensor:
    """Return half precision as float32, others as they are: losses, comparisons and steps need the digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _drawn_so_far() -> bytes:
    """Return the state of the global random numbers of Python and numpy."""
    return pickle.dumps((random.getstate(), np.random.get_state(legacy=False)))
