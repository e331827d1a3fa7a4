"""The engine: ONNX Runtime sessions over one bundle, in one of three modes.

`single` runs one derived path, `ensemble` the mean over several, and `random` a fresh path for every image, drawn from
the operating system's entropy. The drawn gates stay inside this module: they are not returned, logged or counted apart,
because an attacker who learns them faces a fixed network.

A multi-exit network in mode `single` answers with its last exit, in batches like any other, or with an earlier one: see
`serving.exits`. Then each image runs alone, because images that leave at different exits share no later stage.
"""

import os
import re
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.exits import LAST_EXIT, ExitChoice, always_last, choose_exit, num_exits
from zoo.bundle import EARLY_EXIT_FILE, Bundle
from zoo.card import Card
from zoo.errors import BadInput, BundleError, UnknownName

Mode = Literal["single", "ensemble", "random"]
Device = Literal["cpu", "cuda"]
GateSource = Callable[[int], NDArray[np.int64]]
"""Number of images -> their gates, int64 (image, gate)."""

VARIANT_OF_MODE: dict[str, str] = {"single": "single", "ensemble": "ensemble", "random": "gated"}
_runtime: Any = onnxruntime  # it re-exports its names without saying so, which strict typing refuses
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_MAX_CANDIDATES = 1024
_INPUT, _GATES, _LIMITS, _OUTPUTS, _EXIT = "images", "gates", "limits", ["probabilities", "logits"], "exit"


class Prediction(NamedTuple):
    """What a model says about some images, row by row."""

    probabilities: NDArray[np.float32]
    """(image, class); each row sums to 1."""
    logits: NDArray[np.float32]
    """(image, class)."""
    exits: NDArray[np.int64] | None = None
    """(image,): which exit answered, counted from 1; None where the model has only one."""


class Predictor(Protocol):
    """Anything that answers images; called from several threads at once."""

    def predict(self, images: NDArray[np.float32], limits: NDArray[np.float32] | None = None) -> Prediction:
        """Answer float32 (image, channel, height, width) in [0, 1] with one row per image, in the same order.

        `limits`, float32 (image, exit - 1), is given only where requests may choose their exit.
        """
        ...


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


class Engine:
    """A bundle loaded into ONNX Runtime; a `Predictor`.

    There is one session per thread, each with its own copy of the weights, because a session of its own that uses one
    core is the fastest arrangement on a processor; `predict` takes a session that is free and waits if none is.
    """

    def __init__(
        self,
        bundle: Bundle,
        mode: Mode | None = None,
        *,
        threads: int | None = None,
        intra_op: int = 1,
        device: Device = "cpu",
        allow_cpu_fallback: bool = False,
        allow_spinning: bool = False,
        gate_source: GateSource | None = None,
        exit_choice: ExitChoice = LAST_EXIT,
        any_exit: bool = False,
    ) -> None:
        """Load the graph of `mode`, and where an early exit may answer also, or only, the one that stops there.

        Args:
            bundle: where the graph is read from; its checksum is checked.
            mode: None takes `single`, or what else there is.
            threads: how many sessions; None is one per usable core (one in all on a GPU).
            intra_op: how many cores one session uses.
            device: `cuda` needs ONNX Runtime's CUDA provider and its libraries.
            allow_cpu_fallback: with `cuda`, run on the processor where the GPU cannot be used; otherwise that is an
                error.
            allow_spinning: let idle sessions spin: a little less latency for cores that are never idle.
            gate_source: where `random` draws its gates from; None is the operating system's entropy.
            exit_choice: which exit of a multi-exit model answers.
            any_exit: let `predict` be told for each image, on a multi-exit model; other models have nothing to tell.

        Raises:
            UnknownName: if `mode` is no mode.
            BadInput: if the model lacks the mode or the exit, or the device cannot be used.
            BundleError: if the graph is damaged or is not of the form that `zoo` exports.
        """
        self.card = bundle.card
        self.mode: Mode = choose_mode(bundle.card, mode)
        self.threads = threads or (usable_cores() if device == "cpu" else 1)
        self._num_gates = len(self.card.architecture.gated_layers)
        self.num_exits = num_exits(self.card)
        self.limits = choose_exit(self.card, exit_choice)
        """By which images are answered that come without limits, float32 (exit - 1); None with one exit."""
        self._draw_gates = gate_source or SystemGates(self._num_gates, self.card.architecture.candidates)
        if self.card.input.range != (0.0, 1.0):
            raise BundleError(f"{self.card.name}: pixels are in {self.card.input.range}, the server needs [0.0, 1.0]")
        options = _session_options(intra_op=intra_op, allow_spinning=allow_spinning, silent=self.mode == "random")
        graphs = {name: bundle.read(name) for name in graph_files(self.card, self.mode, exit_choice, any_exit=any_exit)}
        self._sessions: list[_Sessions] = []
        self._free: SimpleQueue[_Sessions] = SimpleQueue()
        for _ in range(self.threads):
            opened: dict[str, Any] = {}
            for graph_name, graph in graphs.items():
                name = f"{self.card.name}/{graph_name}"
                opened[graph_name] = _open_session(graph, options, device, allow_cpu_fallback, name)
                _check_signature(opened[graph_name], self.card, graph_name, name)
            sessions = _Sessions(opened.get(graph_file(self.mode)), opened.get(EARLY_EXIT_FILE))
            self._sessions.append(sessions)
            self._free.put(sessions)

    def predict(self, images: NDArray[np.float32], limits: NDArray[np.float32] | None = None) -> Prediction:
        """Answer float32 (image, channel, height, width) in [0, 1]; in mode `random` each image gets its own path.

        Args:
            images: the images.
            limits: float32 (image, exit - 1): an image is answered by the first exit whose largest probability is at
                least its limit, else by the last. None takes `self.limits` for all of them. Others than +inf need an
                engine that was loaded with `any_exit`.
        """
        sessions = self._free.get()
        try:
            return self._run(sessions, images, limits)
        finally:
            self._free.put(sessions)

    def warm_up(self, max_batch: int) -> None:
        """Run every session at every batch size up to `max_batch` once, and check what comes back.

        Raises:
            BundleError: if an answer has the wrong shape, its probabilities are none, or another exit answers than was
                asked.
        """
        shape = (self.card.input.channels, self.card.input.height, self.card.input.width)
        sizes = [size for size in range(1, max_batch + 1) if size <= 8 or size == max_batch or size & (size - 1) == 0]
        for sessions in self._sessions:
            for size in sizes if sessions.whole is not None else []:
                images = np.zeros((size, *shape), dtype=np.float32)
                self._check_answer(self._run_whole(sessions.whole, images), size)
            for chosen in range(1, self.num_exits + 1) if sessions.early is not None else []:
                limits = ExitChoice(exit=chosen).limits(self.card.name, self.num_exits)
                answer = self._run_early(sessions.early, np.zeros((1, *shape), dtype=np.float32), limits)
                self._check_answer(answer, 1)
                if answer.exits is None or answer.exits.tolist() != [chosen]:
                    raise BundleError(
                        f"{self.card.name}/{EARLY_EXIT_FILE}: exit {answer.exits} answers where {chosen} was asked; "
                        "export it again"
                    )

    def _run(
        self, sessions: "_Sessions", images: NDArray[np.float32], limits: NDArray[np.float32] | None
    ) -> Prediction:
        if sessions.early is None:
            if limits is not None and not always_last(limits).all():
                raise BadInput(f"{self.card.name} was loaded for its last exit only; load it with any_exit=True")
            return self._run_whole(sessions.whole, images)
        if limits is None:
            assert self.limits is not None  # nothing else loads the graph that stops early
            limits = np.broadcast_to(self.limits, (len(images), self.num_exits - 1))
        late = always_last(limits) if sessions.whole is not None else np.zeros(len(images), dtype=np.bool_)
        if late.all():
            return self._run_whole(sessions.whole, images)
        rows = [self._run_early(sessions.early, images[row : row + 1], limits[row]) for row in np.flatnonzero(~late)]
        if late.any():
            rows.append(self._run_whole(sessions.whole, images[late]))
        # those that leave early were run first
        back = np.argsort(np.argsort(late, kind="stable"))
        return Prediction(*(np.concatenate(column)[back] for column in zip(*rows, strict=True)))

    def _run_whole(self, session: Any, images: NDArray[np.float32]) -> Prediction:
        if self.mode == "random":
            return self._run_randomly(session, images)
        probabilities, logits = session.run(_OUTPUTS, {_INPUT: images})
        if self.num_exits == 1:
            return Prediction(probabilities, logits)
        return Prediction(probabilities, logits, np.full(len(images), self.num_exits, dtype=np.int64))

    @staticmethod
    def _run_early(session: Any, image: NDArray[np.float32], limits: NDArray[np.float32]) -> Prediction:
        probabilities, logits, exits = session.run([*_OUTPUTS, _EXIT], {_INPUT: image, _LIMITS: limits})
        return Prediction(probabilities, logits, exits + 1)

    def _run_randomly(self, session: Any, images: NDArray[np.float32]) -> Prediction:
        paths = self._draw_gates(len(images))
        failure = None
        try:
            rows = [
                session.run(_OUTPUTS, {_INPUT: images[row : row + 1], _GATES: path}) for row, path in enumerate(paths)
            ]
        except Exception as error:  # noqa: BLE001 -- ONNX Runtime's exceptions have no common base of their own
            # its words name the node that failed, and so the path
            failure = re.sub(r"\d+", "#", f"{type(error).__name__}: {error}")
        if failure is not None:
            raise RuntimeError(f"the gated graph failed (numbers are hidden, they may be gates): {failure}")
        if len(rows) == 1:
            return Prediction(*rows[0])
        return Prediction(*(np.concatenate(column) for column in zip(*rows, strict=True)))

    def _check_answer(self, answer: Prediction, size: int) -> None:
        expected = (size, len(self.card.classes))
        for name, values in zip(_OUTPUTS, answer[:2], strict=True):
            if values.shape != expected:
                raise BundleError(
                    f"{self.card.name}: {name} of {size} images have shape {values.shape}, expected {expected}; the "
                    "graph does not fit its card, so export it again"
                )
        if not np.allclose(answer.probabilities.sum(axis=1), 1, atol=1e-3):
            raise BundleError(f"{self.card.name}: the probabilities of an image do not sum to 1; export it again")


class _Sessions(NamedTuple):
    """What one thread computes with; either may be None if it is never needed."""

    whole: Any
    """The graph of the mode, which takes batches."""
    early: Any
    """The graph that stops at an exit, which takes one image."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def modes_of(card: Card) -> list[str]:
    """Return the modes that a model can be served in."""
    return [mode for mode, variant in VARIANT_OF_MODE.items() if variant in card.variants]


def choose_mode(card: Card, mode: str | None) -> Mode:
    """Return `mode` if the model has it; None takes `single`, or the first there is.

    Raises:
        UnknownName: if it is no mode.
        BadInput: if the model lacks the variant for it, or has no graph at all.
    """
    available = modes_of(card)
    if mode is not None and mode not in VARIANT_OF_MODE:
        raise UnknownName(mode, VARIANT_OF_MODE, kind="mode")
    if not available:
        raise BadInput(f"{card.name} has no graph to serve (no variants); run `manygates export` on it first")
    if mode is not None and mode not in available:
        raise BadInput(
            f"{card.name} cannot be served in mode {mode!r}: it has no variant {VARIANT_OF_MODE[mode]!r}, "
            f"only the modes {', '.join(available)}"
        )
    return mode or available[0]  # type: ignore[return-value]  # both are keys of VARIANT_OF_MODE


def graph_file(mode: Mode) -> str:
    """Return the name of the file that `mode` runs."""
    return f"{VARIANT_OF_MODE[mode]}.onnx"


def graph_files(card: Card, mode: Mode, exit_choice: ExitChoice = LAST_EXIT, *, any_exit: bool = False) -> list[str]:
    """Return the names of the files that are run: the mode's, and the one that stops at an exit if one may answer.

    Raises:
        BadInput: if the model has no such exit.
    """
    limits = choose_exit(card, exit_choice)
    if limits is None:
        return [graph_file(mode)]
    late = bool(always_last(limits))
    whole = [graph_file(mode)] if late or any_exit else []
    return whole + ([] if late and not any_exit else [EARLY_EXIT_FILE])


def _session_options(*, intra_op: int, allow_spinning: bool, silent: bool) -> Any:
    options = _runtime.SessionOptions()
    options.intra_op_num_threads = intra_op
    options.inter_op_num_threads = 1
    # 3 is errors, 4 only what ends the process: errors of a gated graph name the gates; they are raised as well
    options.log_severity_level = 4 if silent else 3
    # batch sizes vary, so a memory plan per shape is rarely used again
    options.enable_mem_pattern = False
    # a graph may name files to read its weights from; in this "folder" there can be none, inside it or above it
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    return options


def _open_session(graph: bytes, options: Any, device: Device, allow_cpu_fallback: bool, name: str) -> Any:
    wanted = _PROVIDERS[device]
    providers = [wanted] if device == "cpu" else [wanted, _PROVIDERS["cpu"]]
    available = _runtime.get_available_providers()
    if wanted not in available:
        if not allow_cpu_fallback:
            raise BadInput(f"{wanted} is not in this ONNX Runtime (only {', '.join(available)}); {_FALLBACK_HINT}")
        providers = [_PROVIDERS["cpu"]]
    try:
        session = _runtime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise BundleError(f"{name} cannot be loaded by ONNX Runtime ({error}); export it again") from error
    if wanted not in session.get_providers() and not allow_cpu_fallback:
        raise BadInput(
            f"{wanted} could not be started, ONNX Runtime fell back to {', '.join(session.get_providers())}; "
            f"{_FALLBACK_HINT}"
        )
    return session


_FALLBACK_HINT = "install the CUDA libraries it names, or allow the fall-back to the processor"


def _check_signature(session: Any, card: Card, graph_name: str, name: str) -> None:
    """The graph has the inputs and outputs that every exported graph has, with the card's sizes."""
    images = card.input
    gated, early = graph_name == graph_file("random"), graph_name == EARLY_EXIT_FILE
    wanted: dict[str, tuple[str, list[int | None]]] = {
        _INPUT: ("tensor(float)", [1 if early else None, images.channels, images.height, images.width])
    }
    if early:
        wanted[_LIMITS] = ("tensor(float)", [num_exits(card) - 1])
    if gated:
        wanted[_GATES] = ("tensor(int64)", [len(card.architecture.gated_layers)])
    found = {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()}
    if found.keys() != wanted.keys():
        raise BundleError(f"{name} has the inputs {sorted(found)}, expected {sorted(wanted)}; export it again")
    for key, (kind, shape) in wanted.items():
        found_kind, found_shape = found[key]
        fits = len(found_shape) == len(shape) and all(
            expected is None or size == expected or not isinstance(size, int)
            for size, expected in zip(found_shape, shape, strict=True)
        )
        if found_kind != kind or not fits or (key == _INPUT and not early and isinstance(found_shape[0], int)):
            raise BundleError(
                f"{name}: the input {key!r} is {found_kind} {found_shape}, expected {kind} "
                f"{['batch' if size is None else size for size in shape]}; export it again"
            )
    outputs = {entry.name: entry.type for entry in session.get_outputs()}
    expected_outputs = {*_OUTPUTS, _EXIT} if early else {*_OUTPUTS}
    if not outputs.keys() >= expected_outputs or (early and outputs[_EXIT] != "tensor(int64)"):
        raise BundleError(
            f"{name} has the outputs {sorted(outputs)}, expected {sorted(expected_outputs)} (exit as int64); "
            "export it again"
        )
    if gated:
        # a graph takes any gate, so a card that counts other candidates would leave some out or prefer the last one
        said = session.get_modelmeta().custom_metadata_map
        expected = {"gates": len(card.architecture.gated_layers), "candidates": card.architecture.candidates}
        for key, number in expected.items():
            if key in said and said[key] != str(number):
                raise BundleError(f"{name} has {said[key]!r} {key}, its card says {number}; export it again")
