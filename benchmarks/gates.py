"""What a random path costs: the forms of a gated graph against the fixed path of the same bundle, in one run.

    python benchmarks/gates.py MODEL [--rounds 25] [--batches 1 8 32] [--precision fp32|int8]

The ways, each in turn within every round:

    single             the fixed path, `single.onnx`
    image/blocked      a fresh path per image, compiled, one call per batch: what the server runs
    image/pattern      the same with ONNX Runtime's memory pattern on
    image/portable     the same of the portable graph, in a loop within one call
    image/one by one   the portable graph, one call per image
    batch/blocked      one fresh path per batch, compiled
    batch/pattern      the same with ONNX Runtime's memory pattern on
    batch/portable     one fresh path per batch, the portable graph

Two arrangements: `alone`, one thread with one session that uses one core; `shared`, two threads that share it, as the
workers of the server do; and for one image also `wide`, a session that uses two cores. The figure is processor time per
image (of all threads; wall-clock time with `wide`), the ratio is that of single in the same round to that of the way in
it, and the median over the rounds counts. Other processes spoil it less than they spoil throughput; `foreign_cores`
says how much they did.

`paths` compares what the candidates cost: the first candidate everywhere, the last one everywhere, and random paths,
each path the same for every image of the batch. Gates are drawn as the server draws them, within the time that is
measured. The answers of every way are compared with the portable graph first. The last line on standard output is JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # first, or `serving` would be the benchmark of that name

from serving.engine.gates import GatedGraph, SystemGates, open_gated  # noqa: E402
from zoo.hub.source import open_model  # noqa: E402

sys.path.append(str(HERE))

import machine  # noqa: E402

OUTPUTS = ["probabilities", "logits"]
THREADS = 2
CALL_SECONDS = 0.03
Work = Callable[[], object]


def main() -> None:
    """Measure, and print JSON last."""
    options = parse_arguments()
    suffix = "" if options.precision == "fp32" else ".int8"
    names = {variant: f"{variant}{suffix}.onnx" for variant in ("single", "gated")}
    bundle = open_model(options.model, only=tuple(names.values()))
    bench = Bench({variant: bundle.read(name) for variant, name in names.items()}, bundle.card, options.rounds)
    results: list[dict[str, Any]] = []
    for batch in options.batches:
        for arrangement in ("alone", "shared", "wide") if batch == 1 else ("alone", "shared"):
            results += bench.compare(batch, arrangement)
    print(
        json.dumps(
            {
                "benchmark": "gates",
                "model": options.model,
                "precision": options.precision,
                "rounds": options.rounds,
                "loading_seconds": bench.loading,
                "results": results,
                "paths": [entry for batch in options.batches for entry in bench.paths(batch)],
                "machine": machine.machine(),
                "versions": machine.versions("onnxruntime-gpu", "onnxruntime", "onnx", "numpy"),
                "date": machine.today(),
            }
        )
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Cost of a random path, against a fixed one.")
    parser.add_argument("model", nargs="?", default="eio-resnet20-cifar10")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    return parser.parse_args()


def opener(*, intra_op: int, pattern: bool) -> Callable[[bytes, bool], Any]:
    """Return how a session is opened: with the server's options, but for those named."""

    def open_session(graph: bytes, optimise: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_mem_pattern = pattern
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    return open_session


class Bench:
    """Every way, opened."""

    def __init__(self, graphs: dict[str, bytes], card: Any, rounds: int) -> None:
        self._card, self._rounds = card, rounds
        self._draw = SystemGates(len(card.architecture.gated_layers), card.architecture.candidates)
        self._single: dict[int, Any] = {}
        self._gated: dict[int, dict[str, GatedGraph]] = {}
        self.loading: dict[str, float] = {}
        for intra_op in (1, THREADS):
            plain = opener(intra_op=intra_op, pattern=False)
            with_pattern = opener(intra_op=intra_op, pattern=True)
            self._single[intra_op] = plain(graphs["single"], True)
            ways: dict[str, GatedGraph] = {}
            for scope in ("image", "batch"):
                for name, opening, compiled in (
                    ("blocked", plain, True),
                    ("pattern", with_pattern, True),
                    ("portable", plain, False),
                ):
                    began = time.process_time()
                    opened = open_gated(graphs["gated"], card, open_session=opening, scope=scope, compiled=compiled)
                    if compiled and opened.form != "blocked":
                        raise SystemExit(f"{scope}/{name} is not what it is called: {opened.reason}")
                    self.loading.setdefault(f"{scope}/{name}", round(time.process_time() - began, 3))
                    ways[f"{scope}/{name}"] = opened
            ways["image/one by one"] = GatedGraph(
                plain(graphs["gated"], True), scope="image", form="portable", one_by_one=True
            )
            self._gated[intra_op] = ways
        if not any("Quant" in kind for kind in _kinds(graphs["gated"])):  # which rounds otherwise than when compiled
            self._check()

    def images(self, batch: int) -> np.ndarray:
        """Return a batch of random pixels."""
        format = self._card.input
        shape = (batch, format.channels, format.height, format.width)
        return np.random.default_rng(batch).random(shape, dtype=np.float32)

    def compare(self, batch: int, arrangement: str) -> list[dict[str, Any]]:
        """Return one entry per way."""
        intra_op = THREADS if arrangement == "wide" else 1
        images = self.images(batch)
        single = self._single[intra_op]
        works: dict[str, Work] = {"single": lambda: single.run(OUTPUTS, {"images": images})}
        for name, way in self._gated[intra_op].items():
            works[name] = self._work(way, images)
        busy, began, ours = machine.busy_seconds(), time.perf_counter(), time.process_time()
        seconds = measure(works, self._rounds, arrangement)
        foreign = machine.foreign(busy, began, time.process_time() - ours)
        entries = []
        for name, times in seconds.items():
            ratios = [alone / way for alone, way in zip(seconds["single"], times, strict=True)]
            entry = {
                "batch": batch,
                "arrangement": arrangement,
                "way": name,
                "milliseconds_per_image": round(statistics.median(times) / batch * 1e3, 4),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
                "foreign_cores": foreign,
            }
            print(f"{entry}", file=sys.stderr, flush=True)
            entries.append(entry)
        return entries

    def paths(self, batch: int) -> list[dict[str, Any]]:
        """Return what paths cost that differ in their candidates, relative to the first candidate everywhere."""
        last = self._card.architecture.candidates - 1
        images = self.images(batch)
        entries = []
        for name in ("image/blocked", "batch/blocked", "image/portable"):
            way = self._gated[1][name]
            one = np.zeros(len(self._card.architecture.gated_layers), dtype=np.int64)

            def along(path: Callable[[], np.ndarray], way: GatedGraph = way) -> Work:
                return lambda: way.run(images, path() if way.scope == "batch" else np.tile(path(), (batch, 1)))

            works = {
                "first": along(lambda one=one: one),
                "last": along(lambda one=one: one + last),
                "random": along(lambda: self._draw(1)[0]),
            }
            seconds = measure(works, self._rounds, "alone")
            ratios = {
                key: statistics.median(a / b for a, b in zip(times, seconds["first"], strict=True))
                for key, times in seconds.items()
            }
            entry = {"batch": batch, "way": name, **{key: round(value, 3) for key, value in ratios.items()}}
            print(f"{entry}", file=sys.stderr, flush=True)
            entries.append(entry)
        return entries

    def _work(self, way: GatedGraph, images: np.ndarray) -> Work:
        if way.scope == "batch":
            return lambda: way.run(images, self._draw(1)[0])
        return lambda: way.run(images, self._draw(len(images)))

    def _check(self) -> None:
        images = self.images(4)
        gates = self._draw(4)
        for ways in self._gated.values():
            rows = [ways["batch/portable"].run(images[row : row + 1], gates[row])[1] for row in range(4)]
            for name, way in ways.items():
                found = way.run(images, gates)[1] if way.scope == "image" else way.run(images[:1], gates[0])[1]
                if not np.allclose(found, np.concatenate(rows)[: len(found)], atol=1e-3):
                    raise SystemExit(f"{name} answers otherwise than the portable graph")


def measure(works: dict[str, Work], rounds: int, arrangement: str) -> dict[str, list[float]]:
    """Return the seconds of a call for each round, by name: of the processor, or with `wide` of the clock."""
    repeats = {}
    for name, work in works.items():
        work()
        began = time.perf_counter()
        work()
        repeats[name] = max(2, round(CALL_SECONDS / (time.perf_counter() - began)))
    number = min(repeats.values())  # the same for all, so that caches are equally warm
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.disable()
    for turn in range(rounds):
        order = list(works) if turn % 2 else list(works)[::-1]
        for name in order:
            seconds[name].append(_timed(works[name], number, arrangement))
    gc.enable()
    return seconds


def _timed(work: Work, number: int, arrangement: str) -> float:
    used: list[float] = []
    clock = time.perf_counter if arrangement == "wide" else time.thread_time

    def repeat() -> None:
        began = clock()
        for _ in range(number):
            work()
        used.append((clock() - began) / number)

    if arrangement != "shared":
        repeat()
        return used[0]
    threads = [threading.Thread(target=repeat) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.fmean(used)


def _kinds(graph: bytes) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load_from_string(graph).graph.node]


if __name__ == "__main__":
    main()
