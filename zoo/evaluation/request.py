"""What to measure: the request, and how radii are written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from zoo.errors import BadInput, UnknownName
from zoo.vocabulary import INT8, PRECISIONS

DEFAULT_EPS = {"blackbox": tuple(Fraction(number, 100) for number in range(1, 8))}
"""Radii of the protocols whose papers use others than 0.01 and 0.03."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. None stands for the protocol's own default, which its docstring gives."""

    protocol: str
    variant: str = "single"
    eps: tuple[Fraction, ...] = ()
    """Radii of the l_inf ball, exact, in pixel units; none stands for the protocol's own (`DEFAULT_EPS`)."""
    images: int | None = None
    """Test images; all 10,000 without an attack and 1,000 under one if None."""
    steps: int | None = None
    restarts: int | None = None
    draws: int | None = None
    """Fresh draws of the gates on which a random model is judged."""
    paths: int = 5
    """Paths of a random gated network that a matrix compares."""
    surrogates: tuple[str, ...] = ()
    """Models (MODEL) on which transfer attacks are made."""
    adversarial_set: Path | None = None
    """Folder of a stored adversarial set: made there if it is empty, reused if it fits; the cache's if None."""
    corrupted: Path | None = None
    """Folder with the official CIFAR-10-C files; images are corrupted here if None and none are found."""
    precision: str = "fp32"
    """"int8" judges the variant's int8 graph in the place of its weights."""
    queries: int | None = None
    """Queries per image of the attacks that only ask."""
    seed: int = 0
    command: str = ""
    """The command that repeats this, for the record."""

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "draws", "queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                one = {"queries": "query"}.get(name, name.removesuffix("s"))
                raise BadInput(f"need at least 1 {one}, got {name}={value}")
        if self.precision not in PRECISIONS:
            raise UnknownName(self.precision, PRECISIONS, kind="precision")
        if self.paths < 2:
            raise BadInput(f"a matrix compares at least 2 paths, got {self.paths}")

    @property
    def measured_variant(self) -> str:
        """The variant as results name it: "single", or "single-int8" where the int8 graph is judged."""
        return f"{self.variant}{INT8}" if self.precision == "int8" else self.variant

    def resolved(self) -> Request:
        """Return the request with its radii filled in."""
        return (
            self
            if self.eps
            else replace(self, eps=DEFAULT_EPS.get(self.protocol, (Fraction(1, 100), Fraction(3, 100))))
        )


def parse_eps(text: str, norm: str = "linf") -> Fraction:
    """Read eps exactly, written as `8/255` or `0.03`.

    Raises:
        BadInput: not a number, or outside [0, 1]; for "l2", outside [0, 1000].
    """
    try:
        # the exponent first: Fraction would spend minutes on "1e300000000"
        eps = Fraction("none" if re.search(r"e[+-]?\d{3}", text.lower()) else text[:64])
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"eps {text[:40]!r} is not a number; write 8/255 or 0.03") from error
    if eps.denominator >= 10**9:
        raise BadInput(f"eps {text} has too many digits; write it as a fraction, such as 8/255")
    if norm == "l2":
        if not 0 <= eps <= 1000:
            raise BadInput(f"eps {text} is no length in l2, expected 0 to 1000; 0.5 is usual for small images")
    elif not 0 <= eps <= 1:
        sign = "a radius is not negative, and " if eps < 0 else ""
        raise BadInput(f"eps {text} is outside [0, 1]; {sign}pixels are in [0, 1], so write 8/255, not 8")
    return eps
