"""The engine: ONNX Runtime sessions over one bundle, in one of three modes.

`single` runs one derived path, `ensemble` the mean over several, and `random` a fresh path for every image, drawn from
the operating system's entropy. The drawn gates stay inside this module: they are not returned, logged or counted apart,
because an attacker who learns them faces a fixed network.

A multi-exit network in mode `single` answers with its last exit, in batches like any other, or with an earlier one: see
`serving.engine.exits`. Then each image runs alone, because images that leave at different exits share no later stage.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.engine.exits import LAST_EXIT, ExitChoice, always_last, choose_exit, num_exits
from serving.engine.gates import GateSource, SystemGates, open_gated
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, UnknownName
from zoo.runtime import runtime as _runtime

Mode = Literal["single", "ensemble", "random"]
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "int8"]
GateScope = Literal["image", "batch"]

VARIANT_OF_MODE: dict[str, str] = {"single": "single", "ensemble": "ensemble", "random": "gated"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INPUT, _GATES, _LIMITS, _OUTPUTS = "images", "gates", "limits", ["probabilities", "logits"]
_EXIT, _AGREEMENT = "exit", "agreement"


class Prediction(NamedTuple):
    """What a model says about some images, row by row."""

    probabilities: NDArray[np.float32]
    """(image, class); each row sums to 1."""
    logits: NDArray[np.float32]
    """(image, class)."""
    exits: NDArray[np.int64] | None = None
    """(image,): which exit answered, counted from 1; None where the model has only one."""
    agreement: NDArray[np.float32] | None = None
    """(image,): the share of draws or members whose largest class is the answer's; None where only one path votes."""


@dataclass(frozen=True)
class Plan:
    """How an image is answered: what all images of one batch have in common."""

    mode: Mode
    draws: int = 1
    """Paths drawn per image in mode `random`, whose probabilities are averaged."""


class Predictor(ABC):
    """Anything that answers images; called from several threads at once."""

    wide: bool = False
    """Whether it can use every core for an image that comes alone."""

    @abstractmethod
    def predict(
        self,
        images: NDArray[np.float32],
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        wide: bool = False,
    ) -> Prediction:
        """Answer float32 (image, channel, height, width) in [0, 1] with one row per image, in the same order.

        Args:
            images: the images.
            limits: float32 (image, exit - 1), where requests may choose their exit; None is the predictor's own choice.
            plan: how to answer; None is the predictor's own plan.
            wide: the image came alone, and every core is free.
        """


class Engine(Predictor):
    """A bundle loaded into ONNX Runtime; a `Predictor`.

    One session per graph, shared by all threads, each of which computes on one core: that is as fast as a session per
    thread and holds the weights once. A second, wide session over all cores answers an image that comes alone, in about
    half the time.
    """

    def __init__(
        self,
        bundle: Bundle,
        mode: Mode | None = None,
        *,
        more_modes: Sequence[Mode] = (),
        draws: int = 1,
        gate_scope: GateScope = "image",
        precision: Precision = "fp32",
        intra_op: int = 1,
        wide: int = 1,
        device: Device = "cpu",
        allow_cpu_fallback: bool = False,
        allow_spinning: bool = False,
        gate_source: GateSource | None = None,
        exit_choice: ExitChoice = LAST_EXIT,
        any_exit: bool = False,
    ) -> None:
        """Load the graph of `mode`, and where an early exit may answer also, or only, the one that stops there.

        Args:
            bundle: where the graphs are read from; their checksums are checked.
            mode: None takes `single`, or what else there is.
            more_modes: further modes that `predict` may be asked for.
            draws: paths per image in mode `random`, unless `predict` is told otherwise.
            gate_scope: a fresh path for every image, or one for all images of a batch.
            precision: `int8` takes the quantised graphs.
            intra_op: how many cores one batch uses.
            wide: how many cores an image that comes alone uses; 1 needs no further session.
            device: `cuda` needs ONNX Runtime's CUDA provider and its libraries.
            allow_cpu_fallback: with `cuda`, run on the processor where the GPU cannot be used; otherwise that is an
                error.
            allow_spinning: let idle threads spin: a little less latency for cores that are never idle.
            gate_source: where `random` draws its gates from; None is the operating system's entropy.
            exit_choice: which exit of a multi-exit model answers.
            any_exit: let `predict` be told for each image, on a multi-exit model; other models have nothing to tell.

        Raises:
            UnknownName: if a mode is no mode.
            BadInput: if the model lacks a mode, the precision or the exit, the device cannot be used, or int8 was asked
                for on a GPU.
            BundleError: if a graph is damaged or is not of the form that `zoo` exports.
        """
        if precision == "int8" and device == "cuda":
            raise BadInput(
                "precision int8 was asked for on device cuda, whose provider has no int8 convolutions and would round "
                "without gaining anything; serve fp32 there, or int8 with device cpu"
            )
        self.card = bundle.card
        self.mode: Mode = choose_mode(bundle.card, mode)
        self.modes: tuple[Mode, ...] = tuple(
            dict.fromkeys((self.mode, *(choose_mode(self.card, m) for m in more_modes)))
        )
        self.plan = Plan(self.mode, draws if self.mode == "random" else 1)
        self.draws = draws
        self.precision: Precision = precision
        self.gate_scope: GateScope = gate_scope
        self.wide = wide > 1 and device == "cpu"
        """Whether `predict` may be told to use every core for one image."""
        self.provider = _PROVIDERS[device]
        """What computes: after a fall-back not what was asked for."""
        self._num_gates = len(self.card.architecture.gated_layers)
        self.num_exits = num_exits(self.card)
        self.limits = choose_exit(self.card, exit_choice)
        """By which images are answered that come without limits, float32 (exit - 1); None with one exit."""
        self._draw_gates = gate_source or SystemGates(self._num_gates, self.card.architecture.candidates)
        if self.card.input.range != (0.0, 1.0):
            raise BundleError(f"{self.card.name}: pixels are in {self.card.input.range}, the server needs [0.0, 1.0]")
        names = graph_files(self.card, self.modes, exit_choice, any_exit=any_exit, precision=precision)
        self._whole: dict[Mode, _Graph] = {}
        self._early: Any = None
        self.forms: dict[str, str] = {}
        """How the gated graph runs, by its file: `blocked`, or `portable` and why."""
        for name in names:
            graph = bundle.read(name)
            shown = f"{self.card.name}/{name}"

            def opener(threads: int, silent: bool, shown: str = shown) -> Callable[[bytes, bool], Any]:
                def opened(content: bytes, optimise: bool = True) -> Any:
                    options = _session_options(
                        intra_op=threads, allow_spinning=allow_spinning, silent=silent, optimise=optimise
                    )
                    session = _open_session(content, options, device, allow_cpu_fallback, shown)
                    self.provider = session.get_providers()[0]
                    return session

                return opened

            if name == EARLY_EXIT_FILE:
                self._early = opener(intra_op, False)(graph, True)
                _check_signature(self._early, self.card, name, shown)
            elif name == graph_file("random", precision):
                self._whole["random"] = self._gated(graph, name, opener(intra_op, True))
            else:
                narrow = opener(intra_op, False)(graph, True)
                _check_signature(narrow, self.card, name, shown)
                broad = opener(wide, False)(graph, True) if self.wide else narrow
                outputs = [*_OUTPUTS, _AGREEMENT] if _has_output(narrow, _AGREEMENT) else _OUTPUTS
                chosen: Mode = "ensemble" if name == graph_file("ensemble", precision) else "single"
                self._whole[chosen] = _Graph(_runner(narrow, outputs), _runner(broad, outputs))

    @property
    def agreement_modes(self) -> tuple[Mode, ...]:
        """The modes in which several paths vote, so that their agreement can be told."""
        told: list[Mode] = []
        if "ensemble" in self._whole and self._whole["ensemble"].votes:
            told.append("ensemble")
        return (*told, "random") if "random" in self._whole else tuple(told)

    def predict(
        self,
        images: NDArray[np.float32],
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        wide: bool = False,
    ) -> Prediction:
        """Answer float32 (image, channel, height, width) in [0, 1]; in mode `random` each image gets its own path.

        Args:
            images: the images.
            limits: float32 (image, exit - 1): an image is answered by the first exit whose largest probability is at
                least its limit, else by the last. None takes `self.limits` for all of them. Others than +inf need an
                engine that was loaded with `any_exit`.
            plan: how to answer; None is `self.plan`. Its mode is one of `self.modes`.
            wide: use every core, which is for an image that comes alone.
        """
        plan = plan or self.plan
        if self._early is None:
            if limits is not None and not always_last(limits).all():
                raise BadInput(f"{self.card.name} was loaded for its last exit only; load it with any_exit=True")
            return self._run_whole(images, plan, wide)
        if limits is None:
            assert self.limits is not None  # nothing else loads the graph that stops early
            limits = np.broadcast_to(self.limits, (len(images), self.num_exits - 1))
        late = always_last(limits) if plan.mode in self._whole else np.zeros(len(images), dtype=np.bool_)
        if late.all():
            return self._run_whole(images, plan, wide)
        rows = [self._run_early(images[row : row + 1], limits[row]) for row in np.flatnonzero(~late)]
        if late.any():
            rows.append(self._run_whole(images[late], plan, wide))
        # those that leave early were run first
        back = np.argsort(np.argsort(late, kind="stable"))
        probabilities, logits, exits = (
            np.concatenate(column)[back] for column in zip(*(row[:3] for row in rows), strict=True)
        )
        return Prediction(probabilities, logits, exits)

    def warm_up(self, max_batch: int) -> None:
        """Run every graph at every batch size up to `max_batch` once, and check what comes back.

        Raises:
            BundleError: if an answer has the wrong shape, its probabilities are none, or another exit answers than was
                asked.
        """
        shape = (self.card.input.channels, self.card.input.height, self.card.input.width)
        sizes = [size for size in range(1, max_batch + 1) if size <= 8 or size == max_batch or size & (size - 1) == 0]
        for mode in self._whole:
            plan = Plan(mode, self.draws if mode == "random" else 1)
            for size in sizes:
                images = np.zeros((size, *shape), dtype=np.float32)
                self._check_answer(self._run_whole(images, plan, wide=False), size)
            if self.wide:
                self._check_answer(self._run_whole(np.zeros((1, *shape), np.float32), plan, wide=True), 1)
        for chosen in range(1, self.num_exits + 1) if self._early is not None else []:
            limits = ExitChoice(exit=chosen).limits(self.card.name, self.num_exits)
            answer = self._run_early(np.zeros((1, *shape), dtype=np.float32), limits)
            self._check_answer(answer, 1)
            if answer.exits is None or answer.exits.tolist() != [chosen]:
                raise BundleError(
                    f"{self.card.name}/{EARLY_EXIT_FILE}: exit {answer.exits} answers where {chosen} was asked; "
                    "export it again"
                )

    def _gated(self, graph: bytes, name: str, narrow: Callable[[bytes, bool], Any]) -> "_Graph":
        shown = f"{self.card.name}/{name}"

        def checked(content: bytes, optimise: bool = True) -> Any:
            session = narrow(content, optimise)
            if content is graph:
                _check_signature(session, self.card, name, shown)
            return session

        opened = open_gated(graph, self.card, open_session=checked, scope=self.gate_scope)
        self.forms[name] = opened.form if not opened.reason else f"{opened.form}: {opened.reason}"
        # a lone image gains nothing from more cores where weights are gathered, so it takes the same graph
        return _Graph(opened.run, opened.run)

    def _run_whole(self, images: NDArray[np.float32], plan: Plan, wide: bool) -> Prediction:
        graph = self._whole[plan.mode]
        run = graph.broad if wide else graph.narrow
        if plan.mode == "random":
            return self._run_randomly(run, images, plan.draws)
        answers = run(images)
        if self.num_exits == 1:
            return Prediction(answers[0], answers[1], None, answers[2] if len(answers) > 2 else None)
        return Prediction(answers[0], answers[1], np.full(len(images), self.num_exits, dtype=np.int64))

    def _run_early(self, image: NDArray[np.float32], limits: NDArray[np.float32]) -> Prediction:
        probabilities, logits, exits = self._early.run([*_OUTPUTS, _EXIT], {_INPUT: image, _LIMITS: limits})
        return Prediction(probabilities, logits, exits + 1)

    def _run_randomly(self, run: Any, images: NDArray[np.float32], draws: int) -> Prediction:
        number = len(images)
        if self.gate_scope == "batch":
            answers = [run(images, self._draw_gates(1)[0]) for _ in range(draws)]
            if draws == 1:
                return Prediction(*answers[0])
            logits = np.stack([answer[1] for answer in answers])
        else:
            repeated = images if draws == 1 else np.tile(images, (draws, 1, 1, 1))
            probabilities, logits = run(repeated, self._draw_gates(number * draws))
            if draws == 1:
                return Prediction(probabilities, logits)
            logits = logits.reshape(draws, number, -1)
        return averaged(logits)

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


def averaged(logits: NDArray[np.float32]) -> Prediction:
    """Average the probabilities of several draws, float32 (draw, image, class) logits.

    The answer's logits are the logarithm of the mean probabilities, as an exported ensemble's are; its agreement is the
    share of draws whose largest class is that of the mean.
    """
    shifted = logits - logits.max(axis=2, keepdims=True)
    log_each = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    highest = log_each.max(axis=0)
    log_mean = highest + np.log(np.exp(log_each - highest).mean(axis=0))
    winner = log_mean.argmax(axis=1)
    agreement = (logits.argmax(axis=2) == winner).mean(axis=0, dtype=np.float32)
    return Prediction(np.exp(log_mean), log_mean, None, agreement)


class _Graph(NamedTuple):
    """What runs the graph of one mode, on one core and on all of them."""

    narrow: Any
    broad: Any

    @property
    def votes(self) -> bool:
        """Whether it tells its members' agreement."""
        return bool(getattr(self.narrow, "votes", False))


def _runner(session: Any, outputs: list[str]) -> Any:
    def run(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return session.run(outputs, {_INPUT: images})  # type: ignore[no-any-return]

    run.votes = _AGREEMENT in outputs  # type: ignore[attr-defined]
    return run


def _has_output(session: Any, name: str) -> bool:
    return any(entry.name == name for entry in session.get_outputs())


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


def graph_file(mode: Mode, precision: Precision = "fp32") -> str:
    """Return the name of the file that `mode` runs."""
    return f"{VARIANT_OF_MODE[mode]}.onnx" if precision == "fp32" else f"{VARIANT_OF_MODE[mode]}.int8.onnx"


def graph_files(
    card: Card,
    modes: Sequence[Mode],
    exit_choice: ExitChoice = LAST_EXIT,
    *,
    any_exit: bool = False,
    precision: Precision = "fp32",
) -> list[str]:
    """Return the names of the files that are run: the modes', and the one that stops at an exit if one may answer.

    Raises:
        BadInput: if the model has no such exit, or no graph of that precision.
    """
    whole = [graph_file(mode, precision) for mode in modes]
    missing = [name for name in whole if precision == "int8" and name not in card.files]
    if missing:
        raise BadInput(
            f"{card.name} has no {missing[0]}; add it with `manygates export --int8`, or serve it with precision fp32"
        )
    limits = choose_exit(card, exit_choice)
    if limits is None:
        return whole
    late = bool(always_last(limits))
    return (whole if late or any_exit else []) + ([] if late and not any_exit else [EARLY_EXIT_FILE])


def _session_options(*, intra_op: int, allow_spinning: bool, silent: bool, optimise: bool) -> Any:
    options = _runtime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = _runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = intra_op
    options.inter_op_num_threads = 1
    # 3 is errors, 4 only what ends the process: errors of a gated graph name the gates; they are raised as well
    options.log_severity_level = 4 if silent else 3
    # batch sizes vary, so a memory plan per shape is rarely used again; a compiled graph takes its images one by one
    options.enable_mem_pattern = not optimise
    # a graph may name files to read its weights from; in this "folder" there can be none, inside it or above it
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    # threads of a wide session wait for each other some hundred times an image: they spin then, and stop with the image
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning or intra_op > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "0" if allow_spinning else "1")
    return options


def _open_session(graph: bytes, options: Any, device: Device, allow_cpu_fallback: bool, name: str) -> Any:
    wanted = _PROVIDERS[device]
    providers = [wanted] if device == "cpu" else [wanted, _PROVIDERS["cpu"]]
    if device == "cuda" and hasattr(_runtime, "preload_dlls"):
        _runtime.preload_dlls()  # those that pip installed, which no loader would find
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
    gated, early = graph_name.startswith(VARIANT_OF_MODE["random"]), graph_name == EARLY_EXIT_FILE
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
