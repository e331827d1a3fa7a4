"""Random gates: where they are drawn, and the graph that takes them.

The gates of an image stay inside this module and its caller: they are not returned, logged or counted apart, because an
attacker who learns them faces a fixed network.

A gated graph is compiled when it is opened (`serving.engine.gate_compiler`), and the compiled form is compared with the
portable one before it is used. Where anything is unexpected the portable form runs instead, and `reason` says why.
"""

import contextlib
import ctypes
import gc
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.engine import gate_compiler
from serving.engine.gate_compiler import Answer, CannotCompileError, Scope
from serving.engine.graphs import GATES, INPUT, OUTPUTS
from zoo.bundle.card import Card
from zoo.errors import BadInput
from zoo.runtime import CPU

GateSource = Callable[[int], NDArray[np.int64]]
"""Number of images -> their gates, int64 (image, gate)."""
OpenSession = Callable[[bytes, bool], Any]
"""A graph, and whether ONNX Runtime is to optimise it -> an opened session."""
Form = Literal["blocked", "portable"]

_MAX_CANDIDATES = 1024
_TOLERANCE = 1e-4
"""How far compiled logits may be from the portable ones, relative to the largest; rounding alone makes 1e-6."""
_VERIFIED_PATHS = 8
"""On how many random paths the compiled form is compared, besides the constant ones."""
_PROCESSORS = ("x86_64", "amd64")

FloatArray = NDArray[np.float32]


class SystemGates:
    """Uniform gates from the operating system's entropy (`os.urandom`)."""

    def __init__(self, num_gates: int, candidates: int) -> None:
        if not 1 <= candidates <= _MAX_CANDIDATES:
            raise BadInput(
                f"{candidates} candidates per gate, expected 1 to {_MAX_CANDIDATES}; look at the model's card"
            )
        self._num_gates = num_gates
        self._candidates = candidates
        # below this bound every candidate is hit by equally many 32-bit words; the few words above are drawn again
        self._bound = 2**32 - 2**32 % candidates

    def __call__(self, num_images: int) -> NDArray[np.int64]:
        """Return fresh gates, int64 (image, gate)."""
        wanted = num_images * self._num_gates
        words = np.empty(0, dtype=np.uint32)
        while len(words) < wanted:
            drawn = np.frombuffer(os.urandom(4 * (wanted - len(words))), dtype=np.uint32)
            words = np.concatenate([words, drawn[drawn < self._bound]])
        return (words % np.uint32(self._candidates)).astype(np.int64).reshape(num_images, self._num_gates)


@dataclass(frozen=True)
class GatedGraph:
    """A graph whose gates are an input, opened; may be run from several threads at once."""

    session: Any
    scope: Scope
    form: Form
    reason: str = ""
    """Why the form is portable, in one sentence; empty if it is blocked."""
    one_by_one: bool = False

    def run(self, images: FloatArray, gates: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Answer images along their paths.

        Args:
            images: float32 (image, channel, height, width) in [0, 1], at least one.
            gates: int64 (image, gate), or (gate) with scope `batch`; each at least 0 and below the number of
                candidates, which is not checked.

        Returns:
            Probabilities and logits, both float32 (image, class).

        Raises:
            RuntimeError: if ONNX Runtime fails; its words with the digits hidden.
        """
        failure = None
        try:
            if not self.one_by_one:
                probabilities, logits = self.session.run(OUTPUTS, {INPUT: images, GATES: gates})
                return probabilities, logits
            rows = [
                self.session.run(OUTPUTS, {INPUT: images[row : row + 1], GATES: path}) for row, path in enumerate(gates)
            ]
            probabilities, logits = (np.concatenate(column) for column in zip(*rows, strict=True))
            return probabilities, logits
        except Exception as error:  # noqa: BLE001 -- ONNX Runtime's exceptions have no common base of their own
            # its words name the node that failed, and so the path
            failure = re.sub(r"\d+", "#", f"{type(error).__name__}: {error}")
        # outside of the handler, or the error would carry the original with it
        raise RuntimeError(f"the gated graph failed (numbers are hidden, they may be gates): {failure}")


def open_gated(
    graph: bytes, card: Card, *, open_session: OpenSession, scope: Scope, compiled: bool = True
) -> GatedGraph:
    """Open a gated graph in the fastest form that answers like the portable one.

    Args:
        graph: the file of the bundle: images float32 (image, channel, height, width), gates int64 (gate).
        card: its card; the numbers of gates and candidates are taken from it.
        open_session: opens a session. The first call is for `graph` itself, to be optimised.
        scope: `image` if every image brings gates of its own, `batch` if all of a call share theirs.
        compiled: False keeps the portable form.

    Raises:
        Exception: only what `open_session` raises for `graph` itself; whatever goes wrong later ends in the portable
            form.
    """
    portable = open_session(graph, True)
    blocked, reason = None, _obstacle(portable) if compiled else "compiling is switched off"
    if not reason:
        blocked, reason = _compile(graph, card, portable, open_session, scope)
    if blocked is None:
        return _open_portable(graph, card, portable, open_session, scope, reason)
    del portable
    give_memory_back()
    return GatedGraph(blocked, scope=scope, form="blocked")


def _obstacle(session: Any) -> str:
    """Say why there is no sense in compiling here; empty if there is."""
    if platform.machine().lower() not in _PROCESSORS:
        return f"the compiled form is for x86-64 processors, this is {platform.machine() or 'unknown'}"
    if session.get_providers() != [CPU]:
        return f"the compiled form is for the processor, the graph runs on {session.get_providers()[0]}"
    return ""


def _compile(graph: bytes, card: Card, portable: Any, open_session: OpenSession, scope: Scope) -> tuple[Any, str]:
    """Return a session of the compiled form and "", or None and why there is none."""
    candidates = card.architecture.candidates
    try:
        shape = (card.input.channels, card.input.height, card.input.width)
        compiled = gate_compiler.compile_gates(graph, candidates=candidates, scope=scope, image_shape=shape)
        session = open_session(compiled.graph, False)
        # integers are rounded as on a fixed path, but not as in the portable graph
        examples = compiled.answers if compiled.quantised else _examples(card, portable, _VERIFIED_PATHS)
        differs = _differs(session, scope, examples)
    except ImportError:
        return None, "compiling needs the package onnx, which is not installed"
    except CannotCompileError as error:
        return None, f"the graph cannot be compiled: {error}"
    except OSError as error:
        return None, f"compiling needs a temporary folder to write to ({error.strerror or type(error).__name__})"
    except Exception as error:  # noqa: BLE001 -- whatever it is, the portable form still answers
        return None, f"compiling failed: {_first_line(error)}"
    return (None, "the compiled form answers differently") if differs else (session, "")


def _open_portable(
    graph: bytes, card: Card, portable: Any, open_session: OpenSession, scope: Scope, reason: str
) -> GatedGraph:
    """Open the portable form; with a path per image in one call per batch, if that can be had."""
    if scope == "batch":
        return GatedGraph(portable, scope=scope, form="portable", reason=reason)
    try:
        session = open_session(gate_compiler.loop_over_images(graph), True)
        if not _differs(session, scope, _examples(card, portable, random_paths=1)):
            return GatedGraph(session, scope=scope, form="portable", reason=reason)
    except Exception as error:  # noqa: BLE001 -- whatever it is, image by image it still works
        reason = reason or _first_line(error)
    return GatedGraph(portable, scope=scope, form="portable", reason=reason, one_by_one=True)


def give_memory_back() -> None:
    """Return to the system what compiling needed; glibc would keep most of it."""
    gc.collect()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library has its own ways
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]}…"


# --- comparing two forms ---


def _examples(card: Card, portable: Any, random_paths: int) -> list[Answer]:
    """Return what the portable graph answers along each constant path and some random ones."""
    rng = np.random.default_rng(0)  # nothing secret: these paths answer nobody
    num_gates, candidates = len(card.architecture.gated_layers), card.architecture.candidates
    constant = np.repeat(np.arange(candidates)[:, None], num_gates, axis=1)
    paths = np.concatenate([constant, rng.integers(0, candidates, (random_paths, num_gates))]).astype(np.int64)
    shape = (gate_compiler.EXAMPLE_IMAGES, card.input.channels, card.input.height, card.input.width)
    examples = []
    for path in paths:
        images = rng.random(shape, dtype=np.float32)
        examples.append(Answer(path, images, portable.run(OUTPUTS, {INPUT: images, GATES: path})))
    return examples


def _differs(session: Any, scope: Scope, examples: list[Answer]) -> bool:
    """Whether a session answers the examples otherwise, alone or in a batch."""
    images = np.concatenate([example.images for example in examples])
    expected = [np.concatenate(column) for column in zip(*(example.outputs for example in examples), strict=True)]
    owners = [number for number, example in enumerate(examples) for _ in example.images]
    batches = [slice(0, size) for size in sorted({1, 3, len(images)})]
    if scope == "batch":
        batches = [slice(row, row + 1) for row in range(len(images))]
        batches += [slice(owners.index(number), owners.index(number) + owners.count(number)) for number in {*owners}]
    for batch in batches:
        paths = np.stack([examples[number].path for number in owners[batch]])
        gates = paths if scope == "image" else paths[0]
        answer = session.run(OUTPUTS, {INPUT: images[batch], GATES: gates})
        for found, wanted in zip(answer, (column[batch] for column in expected), strict=True):
            bound = _TOLERANCE * float(np.abs(wanted).max()) + 1e-6
            # NaN differs
            if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=0, atol=bound):
                return True
    return False
