"""Checks of hyper-parameters that many dataclasses share."""

from __future__ import annotations

import math
from typing import Any, get_args

from zoo.errors import BadInput


def check_choice(name: str, value: object, literal: Any) -> None:
    """Check that a value is one of a `Literal`'s.

    Raises:
        BadInput: It is not; the message lists them.
    """
    if value not in get_args(literal):
        raise BadInput(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")


def check_weights(**weights: float) -> None:
    """Check that the weights of a loss's terms are finite and not negative.

    Raises:
        BadInput: One is not; the message names it.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise BadInput(f"need a finite {name} >= 0, got {weight}")


def check_positive(**numbers: float) -> None:
    """Check that numbers are finite and greater than 0.

    Raises:
        BadInput: One is not; the message names it.
    """
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise BadInput(f"need a finite {name} > 0, got {number}")
