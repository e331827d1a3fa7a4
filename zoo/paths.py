"""Paths: routes through the gates of a random gated network, without torch so that the server can use them.

A path holds one gate per gated layer, in the order in which a forward pass meets the layers; a gate is the number of
the candidate to run. Written as text a path is one digit per gate (`0110`), or numbers with commas where a layer has
more than ten candidates (`0,11,3`).

Randomness is an argument: `random.Random(seed)` where a draw must be repeatable, `secrets.SystemRandom()` where it
must not be guessed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from zoo.errors import BadPath

Path = tuple[int, ...]

_MAX_PREFIXES = 1 << 16
"""So many are drawn from without repetition; of more, repeated ones are drawn again."""


def check(path: Sequence[int], num_gates: int, candidates: int) -> Path:
    """Return `path` as a tuple if it fits a network of `num_gates` gates with `candidates` each.

    Raises:
        BadPath: wrong length, or a gate outside [0, candidates).
    """
    if len(path) != num_gates:
        raise BadPath(
            f"path {format_path(path)!r} has {len(path)} gates, expected {num_gates}; give one gate per gated layer"
        )
    for position, gate in enumerate(path):
        if not 0 <= gate < candidates:
            raise BadPath(
                f"gate {gate} at position {position} is out of range, expected 0 to {candidates - 1} "
                f"(the network has {candidates} candidates per layer)"
            )
    return tuple(int(gate) for gate in path)


def parse(text: str, num_gates: int, candidates: int) -> Path:
    """Read a path from text such as `0110` or `0,11,3`.

    Raises:
        BadPath: text that is not digits (or numbers between commas), or a path that does not fit the network.
    """
    fields = text.split(",") if "," in text else list(text.strip())
    if not fields or not all(field.strip().isascii() and field.strip().isdigit() for field in fields):
        raise BadPath(f"path {text!r} is not a row of gates; write digits such as 0110, or numbers such as 0,11,3")
    return check([int(field) for field in fields], num_gates, candidates)


def format_path(path: Sequence[int]) -> str:
    """Write a path as text that `parse` reads back."""
    separator = "," if any(gate > 9 for gate in path) else ""
    return separator.join(str(gate) for gate in path)


def sample(num_gates: int, candidates: int, rng: random.Random) -> Path:
    """Draw one path uniformly: every gate independent, as in Ensemble-in-One, section 3.1."""
    return tuple(rng.randrange(candidates) for _ in range(num_gates))


def sample_distinct(
    num_paths: int, num_gates: int, candidates: int, rng: random.Random, *, within: int | None = None
) -> list[Path]:
    """Draw paths whose first `within` gates differ pairwise; their other gates are free.

    Distillation at layer l only sees the gates up to l, so two paths that agree there would be distilled alike
    (Ensemble-in-One, algorithm 1). `within` defaults to all gates.

    Raises:
        BadPath: more paths are asked for than distinct prefixes exist.
    """
    within = num_gates if within is None else within
    if not 0 < within <= num_gates:
        raise BadPath(f"within={within} is out of range, expected 1 to {num_gates}, the number of gates")
    num_prefixes = candidates**within
    if num_paths > num_prefixes:
        raise BadPath(
            f"{num_paths} paths cannot differ within {within} gates of {candidates} candidates: only {num_prefixes} "
            "prefixes exist; ask for fewer paths"
        )
    prefixes: dict[Path, None] = {}
    if num_prefixes <= _MAX_PREFIXES:
        for index in rng.sample(range(num_prefixes), num_paths):
            prefixes[tuple(index // candidates**place % candidates for place in reversed(range(within)))] = None
    while len(prefixes) < num_paths:
        prefixes[sample(within, candidates, rng)] = None
    return [prefix + sample(num_gates - within, candidates, rng) for prefix in prefixes]
