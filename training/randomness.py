"""Counter-based randomness: every draw of a run is a function of (seed, purpose, position).

Nothing has to be saved to resume bit for bit, and every rank of a distributed run draws the same gates.
"""

from __future__ import annotations

import hashlib
import random

import torch


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def tensor_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator for tensors."""
    return torch.Generator().manual_seed(seed_for(*parts))


def gate_generator(*parts: int | str) -> random.Random:
    """Return a generator for gates and layers."""
    return random.Random(seed_for(*parts))  # noqa: S311 -- drawn to be repeated, not to be secret
