"""What a check of the linter is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zoo.evaluation.linter.evidence import Evidence

Answer = tuple["bool | None", str]
"""Whether a check raises its alarm (None: it does not apply) and its figure or, if it does not apply, the reason."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to a model."""

    code: str
    name: str
    """What holds of an honest number."""
    meaning: str
    """What an alarm usually means, and what to do."""
    ask: Callable[[Evidence], Answer]


def check(code: str, name: str, meaning: str) -> Callable[[Callable[[Evidence], Answer]], Check]:
    """Return a decorator that makes a check of a function of the evidence."""
    return lambda ask: Check(code=code, name=name, meaning=meaning, ask=ask)
