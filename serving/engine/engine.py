"""The engine: ONNX Runtime sessions over one bundle, in one of three modes.

`single` runs one derived path, `ensemble` the mean over several, and `random` a fresh path for every image, drawn from
the operating system's entropy. The drawn gates never leave this room (`serving.engine.gates`).

A multi-exit network in mode `single` answers with its last exit, in batches like any other, or with an earlier one: see
`serving.engine.exits`. Then each image runs alone, because images that leave at different exits share no later stage.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan, Prediction, Predictor
from serving.engine.exits import LAST_EXIT, ExitChoice, always_last, choose_exit, num_exits
from serving.engine.gate_compiler import Scope
from serving.engine.gates import GateSource, SystemGates, open_gated
from serving.engine.graphs import (
    AGREEMENT,
    EXIT,
    INPUT,
    LIMITS,
    OUTPUTS,
    PROVIDERS,
    Opener,
    check_signature,
    choose_mode,
    graph_file,
    graph_files,
)
from zoo.bundle.bundle import EARLY_EXIT_FILE, Bundle
from zoo.errors import BadInput, BundleError
from zoo.vocabulary import Device, Mode, Precision


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
        gate_scope: Scope = "image",
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
            device, allow_cpu_fallback, allow_spinning: as `Opener`.
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
        chosen = (self.mode, *(choose_mode(self.card, each) for each in more_modes))
        self.modes: tuple[Mode, ...] = tuple(dict.fromkeys(chosen))
        self.plan = Plan(self.mode, draws if self.mode == "random" else 1)
        self.draws = draws
        self.precision: Precision = precision
        self.gate_scope: Scope = gate_scope
        self.wide = wide > 1 and device == "cpu"
        """Whether `predict` may be told to use every core for one image."""
        self.provider = PROVIDERS[device]
        """What computes: after a fall-back not what was asked for."""
        self._num_gates = len(self.card.architecture.gated_layers)
        self.num_exits = num_exits(self.card)
        self.limits = choose_exit(self.card, exit_choice)
        """By which images are answered that come without limits, float32 (exit - 1); None with one exit."""
        self._draw_gates = gate_source or SystemGates(self._num_gates, self.card.architecture.candidates)
        if self.card.input.range != (0.0, 1.0):
            raise BundleError(f"{self.card.name}: pixels are in {self.card.input.range}, the server needs [0.0, 1.0]")
        self._open = Opener(device=device, allow_cpu_fallback=allow_cpu_fallback, allow_spinning=allow_spinning)
        self._threads, self._wide_threads = intra_op, wide
        self._whole: dict[Mode, _Graph] = {}
        self._early: Any = None
        self.forms: dict[str, str] = {}
        """How the gated graph runs, by its file: `blocked`, or `portable` and why."""
        for name in graph_files(self.card, self.modes, exit_choice, any_exit=any_exit, precision=precision):
            graph = bundle.read(name)
            if name == EARLY_EXIT_FILE:
                self._early = self._checked(graph, name)
            elif name == graph_file("random", precision):
                self._whole["random"] = self._gated(graph, name)
            else:
                mode_of_graph: Mode = "ensemble" if name == graph_file("ensemble", precision) else "single"
                self._whole[mode_of_graph] = self._plain(graph, name)

    @property
    def agreement_modes(self) -> tuple[Mode, ...]:
        """The modes in which several paths vote, so that their agreement can be told."""
        return tuple(mode for mode, graph in self._whole.items() if graph.votes)

    def predict(
        self,
        images: NDArray[np.float32],
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        wide: bool = False,
    ) -> Prediction:
        """Answer images as `Predictor` says; in mode `random` each gets its own path.

        An image is answered by the first exit whose largest probability is at least its limit, else by the last. If no
        limits are given, `self.limits` hold for all; others than +inf need an engine that was loaded with `any_exit`.
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
            BundleError: if an answer has the wrong shape, its probabilities are none, or the wrong exit answers.
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
                file = f"{self.card.name}/{EARLY_EXIT_FILE}"
                raise BundleError(f"{file}: exit {answer.exits} answers where {chosen} was asked; export it again")

    def _checked(self, graph: bytes, name: str, *, silent: bool = False) -> Any:
        """Open a graph on the cores of one batch, and compare its signature with the card."""
        shown = f"{self.card.name}/{name}"
        opened = self._open(graph, shown, threads=self._threads, silent=silent)
        check_signature(opened, self.card, name, shown)
        self.provider = opened.get_providers()[0]
        return opened

    def _plain(self, graph: bytes, name: str) -> "_Graph":
        narrow = self._checked(graph, name)
        broad = narrow
        if self.wide:
            broad = self._open(graph, f"{self.card.name}/{name}", threads=self._wide_threads)
        votes = any(entry.name == AGREEMENT for entry in narrow.get_outputs())
        outputs = [*OUTPUTS, AGREEMENT] if votes else [*OUTPUTS]
        return _Graph(_runner(narrow, outputs), _runner(broad, outputs), votes)

    def _gated(self, graph: bytes, name: str) -> "_Graph":
        def opener(content: bytes, optimise: bool = True) -> Any:
            if content is graph:
                return self._checked(graph, name, silent=True)
            shown = f"{self.card.name}/{name}"
            return self._open(content, shown, threads=self._threads, silent=True, optimise=optimise)

        opened = open_gated(graph, self.card, open_session=opener, scope=self.gate_scope)
        self.forms[name] = opened.form if not opened.reason else f"{opened.form}: {opened.reason}"
        # a lone image gains nothing from more cores where weights are gathered, so it takes the same graph
        return _Graph(opened.run, opened.run, votes=True)

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
        probabilities, logits, exits = self._early.run([*OUTPUTS, EXIT], {INPUT: image, LIMITS: limits})
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
        for name, values in zip(OUTPUTS, answer[:2], strict=True):
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
    votes: bool
    """Whether it can tell the agreement of several paths."""


def _runner(opened: Any, outputs: list[str]) -> Any:
    def run(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return opened.run(outputs, {INPUT: images})  # type: ignore[no-any-return]

    return run
