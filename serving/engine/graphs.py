"""The graphs of a bundle: which files a mode runs, how a session on one is opened, and whether it fits its card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from serving.engine.exits import LAST_EXIT, ExitChoice, always_last, choose_exit, num_exits
from zoo.bundle.bundle import EARLY_EXIT_FILE
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, UnknownName
from zoo.runtime import CPU, GraphError, runtime, session
from zoo.vocabulary import VARIANT_OF_MODE, Device, Mode, Precision

PROVIDERS: Final = {"cpu": CPU, "cuda": "CUDAExecutionProvider"}
INPUT: Final = "images"
GATES: Final = "gates"
LIMITS: Final = "limits"
OUTPUTS: Final = ("probabilities", "logits")
EXIT: Final = "exit"
AGREEMENT: Final = "agreement"
_FALLBACK_HINT: Final = "install the CUDA libraries it names, or allow the fall-back to the processor"


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


@dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens sessions of one model: where they compute and how their threads behave."""

    device: Device = "cpu"
    allow_cpu_fallback: bool = False
    """With `cuda`, compute on the processor where the GPU cannot be used; otherwise that is an error."""
    allow_spinning: bool = False
    """Let idle threads spin: a little less latency for cores that are never idle."""

    def __call__(self, graph: bytes, name: str, *, threads: int, silent: bool = False, optimise: bool = True) -> Any:
        """Open a session on the content of a file, which errors call `name`.

        Args:
            threads: how many cores one call uses.
            silent: log nothing; for gated graphs, whose errors name the gates. They are raised all the same.
            optimise: False runs the graph as it is.

        Raises:
            BadInput: the device cannot be used.
            BundleError: ONNX Runtime cannot load the graph.
        """

        def configure(options: Any) -> None:
            if not optimise:
                options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.inter_op_num_threads = 1
            if silent:
                options.log_severity_level = 4  # only what ends the process
            # batch sizes vary, so a memory plan per shape is rarely used again; a compiled graph takes one image
            options.enable_mem_pattern = not optimise
            # threads of a wide session wait for each other some hundred times an image: they spin, and stop with it
            spinning = self.allow_spinning or threads > 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
            options.add_session_config_entry("session.force_spinning_stop", "0" if self.allow_spinning else "1")

        try:
            opened = session(graph, threads=threads, providers=self._providers(), configure=configure)
        except GraphError as error:
            raise BundleError(f"{name}: {error}") from error
        found = opened.get_providers()
        if PROVIDERS[self.device] not in found and not self.allow_cpu_fallback:
            raise BadInput(
                f"{PROVIDERS[self.device]} could not be started, ONNX Runtime fell back to {', '.join(found)}; "
                f"{_FALLBACK_HINT}"
            )
        return opened

    def _providers(self) -> list[str]:
        wanted = PROVIDERS[self.device]
        if self.device == "cuda" and hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()  # those that pip installed, which no loader would find
        available = runtime.get_available_providers()
        if wanted in available:
            return list(dict.fromkeys([wanted, PROVIDERS["cpu"]]))
        if not self.allow_cpu_fallback:
            raise BadInput(f"{wanted} is not in this ONNX Runtime (only {', '.join(available)}); {_FALLBACK_HINT}")
        return [PROVIDERS["cpu"]]


def check_signature(opened: Any, card: Card, file: str, name: str) -> None:
    """Refuse, with BundleError, a graph whose inputs or outputs are not those of its kind with the card's sizes.

    `file` is its name in the bundle, which says what kind it is; `name` is what errors call it.
    """
    gated, early = file.startswith(VARIANT_OF_MODE["random"]), file == EARLY_EXIT_FILE
    _check_inputs(opened, card, name, gated=gated, early=early)
    outputs = {entry.name: entry.type for entry in opened.get_outputs()}
    expected = {*OUTPUTS, EXIT} if early else {*OUTPUTS}
    if not outputs.keys() >= expected or (early and outputs[EXIT] != "tensor(int64)"):
        raise BundleError(
            f"{name} has the outputs {sorted(outputs)}, expected {sorted(expected)} (exit as int64); export it again"
        )
    if gated:
        # a graph takes any gate, so a card that counts other candidates would leave some out or prefer the last one
        said = opened.get_modelmeta().custom_metadata_map
        counts = {"gates": len(card.architecture.gated_layers), "candidates": card.architecture.candidates}
        for key, number in counts.items():
            if key in said and said[key] != str(number):
                raise BundleError(f"{name} has {said[key]!r} {key}, its card says {number}; export it again")


def _check_inputs(opened: Any, card: Card, name: str, *, gated: bool, early: bool) -> None:
    images = card.input
    wanted: dict[str, tuple[str, list[int | None]]] = {
        INPUT: ("tensor(float)", [1 if early else None, images.channels, images.height, images.width])
    }
    if early:
        wanted[LIMITS] = ("tensor(float)", [num_exits(card) - 1])
    if gated:
        wanted[GATES] = ("tensor(int64)", [len(card.architecture.gated_layers)])
    found = {entry.name: (entry.type, entry.shape) for entry in opened.get_inputs()}
    if found.keys() != wanted.keys():
        raise BundleError(f"{name} has the inputs {sorted(found)}, expected {sorted(wanted)}; export it again")
    for key, (kind, shape) in wanted.items():
        found_kind, found_shape = found[key]
        fits = len(found_shape) == len(shape) and all(
            expected is None or size == expected or not isinstance(size, int)
            for size, expected in zip(found_shape, shape, strict=True)
        )
        if found_kind != kind or not fits or (key == INPUT and not early and isinstance(found_shape[0], int)):
            raise BundleError(
                f"{name}: the input {key!r} is {found_kind} {found_shape}, expected {kind} "
                f"{['batch' if size is None else size for size in shape]}; export it again"
            )
