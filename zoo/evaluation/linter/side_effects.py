"""What a model does besides answering: what it changes, which random numbers it draws, whether it differentiates."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class State:
    """What an attack may not change."""

    tensors: dict[str, Tensor]
    """Weights and buffers of the model's module, by name; none if the model is a function."""
    gradients: dict[str, float]
    """Sums of the gradients that lie on parameters."""
    modes: dict[str, bool]
    """Which modules are in training mode."""
    random: dict[str, object]
    """The global random states of torch, Python and numpy."""

    def same(self, name: str, other: State) -> bool:
        """Whether a tensor is in both states, and alike."""
        one, another = self.tensors.get(name), other.tensors.get(name)
        return one is not None and another is not None and torch.equal(one.nan_to_num(), another.nan_to_num())


def state_of(model: object, device: torch.device) -> State:
    """Return the state of a model, of the module that a method belongs to, or of random numbers alone."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    if not isinstance(module, nn.Module):
        return State(tensors={}, gradients={}, modes={}, random=states)
    named = [*module.named_parameters(), *module.named_buffers()]
    return State(
        tensors={name: tensor.detach().clone() for name, tensor in named},
        gradients={name: float(p.grad.double().sum()) for name, p in module.named_parameters() if p.grad is not None},
        modes={name: part.training for name, part in module.named_modules()},
        random=states,
    )


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Set the global random states from a seed, and put back what was there."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


_BACKWARD = "_engine_run_backward"


@contextmanager
def backward_passes() -> Iterator[list[int]]:
    """Count backward passes of this thread, in a list of one number.

    All of torch's ways there (backward, autograd.grad, torch.func) end in one private function. It is watched because a
    forward may hold the public ones under names of its own.
    """
    passes, thread = [0], threading.get_ident()
    original = getattr(torch.autograd, _BACKWARD)

    def counted(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            passes[0] += 1
        return original(*arguments, **options)

    setattr(torch.autograd, _BACKWARD, counted)
    try:
        yield passes
    finally:
        setattr(torch.autograd, _BACKWARD, original)
