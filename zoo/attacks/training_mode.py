"""Whether a model computes in training mode, where its answers are random and its statistics move.

A model may be any function of images, so the modules in it are looked for: in bound methods, partials, closures,
globals and attributes. `unchecked` marks a model that nobody looks into.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import BadInput

_MOST_WALKED: Final = 10_000
"""At most so many objects in a model are searched for modules."""
_CONTAINERS = (list, tuple, set, dict)
RANDOM_SOURCES = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class Unchecked:
    """A model that attacks do not check; see `unchecked`."""

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Any:
        """Return what the model answers."""
        return self.model(images)


def unchecked(model: Callable[[Tensor], Any]) -> Unchecked:
    """Mark a model so that attacks check neither its mode nor its randomness nor NaN in its answers.

    Training needs this: it attacks the network that it trains, in training mode, and looks for NaN itself.
    """
    return Unchecked(model)


def check_mode(model: object) -> None:
    """Check that no module in the model is in training mode and depends on it.

    The search finds modules (scripted ones too), the owners of bound methods and partials, and what a function or a
    callable object keeps. A module that it misses shows when the model is asked (`models.checked_model`).

    Raises:
        BadInput: a part in training mode that reads its mode, such as BatchNorm, dropout or stochastic depth.
    """
    roots = (held for held in parts_held(model) if isinstance(held, nn.Module))
    for root in roots:
        for name, part in root.named_modules():
            if part.training and _reads_mode(part):
                kind = getattr(part, "original_name", type(part).__name__)
                raise BadInput(
                    (f"the model's {kind} {name!r}" if name else f"the model, a {kind},")
                    + " is in training mode, where every forward of an attack moves its statistics or draws at random; "
                    "call .eval() first"
                )


def parts_held(model: object) -> Iterator[object]:
    """Yield the modules and sources of random numbers that a callable holds; of nested modules the outermost."""
    waiting, met = [model], set[int]()
    while waiting and len(met) < _MOST_WALKED:
        thing = waiting.pop()
        if id(thing) in met or isinstance(thing, Unchecked | type | Tensor):
            continue
        met.add(id(thing))
        if isinstance(thing, RANDOM_SOURCES):
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
            enclosed = [_cell_content(cell) for cell in thing.__closure__ or ()]
            outer = [thing.__globals__[name] for name in names if name in thing.__globals__]
            waiting += [*enclosed, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
            # no functions, which would lead through whole libraries
            waiting += [held for held in outer if isinstance(held, (nn.Module, *_CONTAINERS, *RANDOM_SOURCES))]
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
    """Return the attributes of an object by name, those in slots too."""
    kept = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        for name, slot in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType):
                try:
                    kept[name] = slot.__get__(thing)
                except AttributeError:  # it is empty
                    continue
    return kept


def _cell_content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


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
    """Yield the code of a method, decorated or not."""
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
    """Return the globals and attributes that a function or one inside it names, and "training" where it is a string."""
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union({"training"}.intersection(code.co_consts), *inner)


class Buffers:
    """Copies of the buffers of a model that has a part in training mode, taken before the model is asked."""

    def __init__(self, model: object) -> None:
        roots = (held for held in parts_held(model) if isinstance(held, nn.Module))
        parts = (part for root in roots if any(part.training for part in root.modules()) for part in root.modules())
        self._before = [
            (part, name, buffer, buffer.clone())
            for part in parts
            for name, buffer in part.named_buffers(recurse=False)
            if buffer.layout == torch.strided and not buffer.is_meta and not buffer.is_quantized
        ]

    def restore(self) -> str:
        """Put back the buffers that moved; return the name of one of them, or an empty text."""
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
