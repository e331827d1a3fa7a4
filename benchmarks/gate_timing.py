"""Does the time of an answer tell its path?

    python benchmarks/gate_timing.py [MODEL] [--calls 4000] [--batches 1 8] [--precision fp32|int8]

The engine of a server in mode `random` answers the same images along the first candidate everywhere (`first`), the
last one everywhere (`last`), the first one again (`again`, which shows what noise alone does), and along a fresh path
(`random`), in rounds that take each way once in random order. A call runs on one thread; its processor time is what
counts, for it says the same as the clock on a quiet machine and more on a busy one, and `--clock` takes the clock
instead. No client sees these times better: what lies between it and the engine adds noise, and so do the others.

Two questions are asked of them:

    pairs   how much longer a way took than `first` in the same round, as a share: the median of the differences, its
            interval (95 %, from order statistics), and how often chance alone gives such signed ranks (Wilcoxon).
    gates   by how much each single gate lengthens a random call (least squares over the calls, the fastest and slowest
            twentieth left out; with one image only); the largest of their t-values, and how often chance alone gives
            one as large (Bonferroni).

Other processes spoil it; `foreign_cores` says how much. The last line on standard output is JSON.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # first, or `serving` would be the benchmark of that name

from serving.engine.engine import Engine  # noqa: E402
from serving.engine.gates import SystemGates  # noqa: E402
from zoo.hub.source import open_model  # noqa: E402

sys.path.append(str(HERE))

import machine  # noqa: E402

WAYS = ("first", "last", "again", "random")
TRIMMED = 0.05


def main() -> None:
    """Measure, and print JSON last."""
    parser = argparse.ArgumentParser(description="Whether the time of an answer depends on its path.")
    parser.add_argument("model", nargs="?", default="eio-resnet20-cifar10")
    parser.add_argument("--calls", type=int, default=4000, help="rounds, each of one call per way")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--clock", action="store_true", help="measure the clock's time, not the processor's")
    options = parser.parse_args()
    bench = Bench(options.model, options.precision, time.perf_counter if options.clock else time.thread_time)
    results = [bench.measure(batch, options.calls) for batch in options.batches]
    print(
        json.dumps(
            {
                "benchmark": "gate_timing",
                "model": options.model,
                "precision": options.precision,
                "calls": options.calls,
                "time": "clock" if options.clock else "processor",
                "form": bench.form,
                "results": results,
                "machine": machine.machine(),
                "versions": machine.versions("onnxruntime-gpu", "onnxruntime", "numpy"),
                "date": machine.today(),
            }
        )
    )


class Bench:
    """An engine whose gates are ours to choose."""

    def __init__(self, model: str, precision: Any, now: Callable[[], float]) -> None:
        self._now = now
        bundle = open_model(model)
        architecture = bundle.card.architecture
        self._num_gates = len(architecture.gated_layers)
        self._last = architecture.candidates - 1
        self._system = SystemGates(self._num_gates, architecture.candidates)
        self._gates = np.zeros((1, self._num_gates), np.int64)
        self._engine = Engine(bundle, "random", precision=precision, gate_source=lambda images: self._gates)
        self.form = next(iter(self._engine.forms.values()))

    def measure(self, batch: int, calls: int) -> dict[str, Any]:
        """Return what the times of one batch size say."""
        format = self._engine.card.input
        rng = np.random.default_rng(0)
        images = rng.random((batch, format.channels, format.height, format.width), dtype=np.float32)
        seconds = np.empty((calls, len(WAYS)))
        drawn = np.empty((calls, batch, self._num_gates), np.int64)
        self._gates = self._system(batch)
        for _ in range(50):
            self._engine.predict(images)
        busy, began, ours = machine.busy_seconds(), time.perf_counter(), time.process_time()
        for call in range(calls):
            for way in rng.permutation(len(WAYS)):
                # whatever the way, gates are drawn and copied: only their values differ
                gates = self._system(batch)
                if WAYS[way] == "random":
                    drawn[call] = gates
                else:
                    gates = np.full_like(gates, self._last if WAYS[way] == "last" else 0)
                self._gates = gates
                started = self._now()
                self._engine.predict(images)
                seconds[call, way] = self._now() - started
        foreign = machine.foreign(busy, began, time.process_time() - ours)
        result: dict[str, Any] = {
            "batch": batch,
            "median_milliseconds": {
                way: round(float(np.median(seconds[:, place])) * 1e3, 4) for place, way in enumerate(WAYS)
            },
            "pairs": {
                way: paired(seconds[:, place], seconds[:, 0]) for place, way in enumerate(WAYS) if way != "first"
            },
            "foreign_cores": foreign,
        }
        if batch == 1:
            result["gates"] = by_gate(drawn[:, 0], seconds[:, WAYS.index("random")])
        print(result, file=sys.stderr, flush=True)
        return result


def paired(times: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Return by what share the times exceed those of the same rounds, and whether chance alone explains it."""
    differences = np.sort(times - baseline)
    number = len(differences)
    unit = float(np.median(baseline))
    reach = 0.98 * math.sqrt(number)  # half of 1.96 standard deviations of a fair coin
    bounds = [differences[int(number / 2 - reach)], differences[min(number - 1, math.ceil(number / 2 + reach))]]
    apart = differences[differences != 0]
    ranks = np.empty(len(apart))
    ranks[np.abs(apart).argsort()] = np.arange(1, len(apart) + 1)
    signed = float((ranks * np.sign(apart)).sum())
    spread = math.sqrt(float((ranks**2).sum()))
    return {
        "longer": round(float(np.median(differences)) / unit, 5),
        "interval": [round(float(bound) / unit, 5) for bound in bounds],
        "p": round(math.erfc(abs(signed) / spread / math.sqrt(2)), 5),
    }


def by_gate(gates: np.ndarray, times: np.ndarray) -> dict[str, Any]:
    """Return which gate's value lengthens a call most, and how likely chance alone does that to any of them."""
    low, high = np.quantile(times, [TRIMMED, 1 - TRIMMED])
    kept = (times >= low) & (times <= high)
    design = np.column_stack([np.ones(kept.sum()), gates[kept]])
    wanted = times[kept]
    fit, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    left = wanted - design @ fit
    variance = float(left @ left) / (len(wanted) - design.shape[1])
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    values = (fit / errors)[1:]
    largest = int(np.abs(values).argmax())
    chance = math.erfc(abs(float(values[largest])) / math.sqrt(2))
    return {
        "largest": largest,
        "longer": round(float(fit[1 + largest]) / float(np.median(wanted)), 5),
        "t": round(float(values[largest]), 2),
        "p": round(min(1.0, chance * len(values)), 5),
        "explained": round(1 - float(left @ left) / float(((wanted - wanted.mean()) ** 2).sum()), 5),
    }


if __name__ == "__main__":
    main()
