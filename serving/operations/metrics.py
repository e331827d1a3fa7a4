"""What `/metrics` tells Prometheus.

Requests are counted in plain integers, which costs a tenth of what the library's thread-safe counters do, and become
its metric families when somebody asks. That is safe because everything here runs on the event loop's thread.

Nothing here says which path answered a request: `path_draws` counts draws, all alike.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine.engine import Plan, Prediction

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_BATCHES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Distribution:
    """A histogram: how many values fell into which bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, values up to it) as Prometheus wants them: cumulative, and the last without bound."""
        names = [*(str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, np.cumsum(self.counts).tolist(), strict=True))


class ModelMetrics:
    """What one version of a model has done; a `BatchObserver`."""

    def __init__(
        self,
        model: str,
        version: str,
        *,
        plan: Plan,
        shared_gates: bool = False,
        num_exits: int = 1,
        waiting: Callable[[], int],
        ready: Callable[[], bool],
        info: dict[str, str] | None = None,
    ) -> None:
        """Begin to count.

        Args:
            model: its name, a label.
            version: of the model, a label.
            plan: how requests are answered that choose nothing.
            shared_gates: whether all images of a batch take the same path.
            num_exits: how many exits it has; 1 is not counted by exit.
            waiting: tells how many images wait.
            ready: tells whether it takes requests.
            info: what else is told of it, such as the provider that computes.
        """
        self.model = model
        self.version = version
        self.plan = plan
        self.shared_gates = shared_gates
        self.num_exits = num_exits
        self.waiting = waiting
        self.ready = ready
        self.info = info or {}
        self.requests: Counter[tuple[str, str]] = Counter()
        """By endpoint and mode."""
        self.totals: Counter[str] = Counter()
        """`failures` of requests and `draws` of paths."""
        self.images: Counter[str] = Counter()
        """By mode."""
        self.exits: Counter[int] = Counter()
        self.request_seconds = Distribution(_SECONDS)
        self.queue_seconds = Distribution(_SECONDS)
        self.compute_seconds: dict[str, Distribution] = {}
        self.batch_images: dict[str, Distribution] = {}

    def answered(self, endpoint: str, plan: Plan | None, seconds: float) -> None:
        """A request was answered with success."""
        self.requests[endpoint, (plan or self.plan).mode] += 1
        self.request_seconds.observe(seconds)

    def request_started(self, queue_seconds: float) -> None:
        """A request's first row left the queue."""
        self.queue_seconds.observe(queue_seconds)

    def batch_finished(self, answer: Prediction, compute_seconds: float, plan: Plan | None = None) -> None:
        """A batch of images was answered."""
        rows = len(answer.probabilities)
        plan = plan or self.plan
        mode = plan.mode
        if mode not in self.compute_seconds:
            self.compute_seconds[mode] = Distribution(_SECONDS)
            self.batch_images[mode] = Distribution(_BATCHES)
        self.compute_seconds[mode].observe(compute_seconds)
        self.batch_images[mode].observe(rows)
        self.images[mode] += rows
        if mode == "random":
            self.totals["draws"] += plan.draws * (1 if self.shared_gates else rows)
        if answer.exits is not None:
            self.exits.update(answer.exits.tolist())

    def statistics(self) -> dict[str, object]:
        """Return what the protocol's statistics extension tells of a model; times in nanoseconds."""
        success = sum(self.requests.values())
        computed = list(self.compute_seconds.values())
        batches = sum(sum(distribution.counts) for distribution in computed)
        compute = int(1e9 * sum(distribution.total for distribution in computed))
        nothing = {"count": 0, "ns": 0}
        return {
            "name": self.model,
            "version": self.version,
            "inference_count": sum(self.images.values()),
            "execution_count": batches,
            "inference_stats": {
                "success": {"count": success, "ns": int(1e9 * self.request_seconds.total)},
                "fail": {"count": self.totals["failures"], "ns": 0},
                "queue": {"count": sum(self.queue_seconds.counts), "ns": int(1e9 * self.queue_seconds.total)},
                "compute_input": nothing,
                "compute_infer": {"count": batches, "ns": compute},
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }

    @property
    def labels(self) -> list[str]:
        """The values of the labels that every metric has."""
        return [self.model, self.version]


class Metrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._models: list[ModelMetrics] = []
        self._failures: Counter[tuple[str, str]] = Counter()
        """Of requests that no version of a model can be blamed for, by model and reason."""
        self._loads: Counter[tuple[str, str]] = Counter()
        """By model and outcome."""

    def add(self, model: ModelMetrics) -> None:
        """Tell of one more model; in place of an older one of this name and version, whose counts go on."""
        for old in self._models:
            if old.labels == model.labels:
                # the same objects: the older one still answers what it has taken
                for name in ("requests", "totals", "images", "exits"):
                    setattr(model, name, getattr(old, name))
                for name in ("request_seconds", "queue_seconds", "compute_seconds", "batch_images"):
                    setattr(model, name, getattr(old, name))
        self._models = [old for old in self._models if old.labels != model.labels]
        self._models.append(model)

    def remove(self, model: ModelMetrics) -> None:
        """Tell no more of a model that was unloaded."""
        if model in self._models:
            self._models.remove(model)

    def failed(self, model: str, reason: str) -> None:
        """Count an error; `model` is empty where the request named none that is known."""
        self._failures[model, reason] += 1
        for known in self._models:
            if known.model == model:
                known.totals["failures"] += 1
                break

    def loaded(self, model: str, outcome: str) -> None:
        """Count a model that was loaded, reloaded or unloaded while the server runs, or failed to be."""
        self._loads[model, outcome] += 1

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families, as the library's registry asks for them."""
        yield self._counter(
            "requests",
            "Requests answered with success.",
            ("endpoint", "mode"),
            (([*model.labels, *key], count) for model in self._models for key, count in model.requests.items()),
        )
        failures = CounterMetricFamily(
            "manygates_request_failures", "Requests answered with an error.", labels=["model", "reason"]
        )
        for key, count in self._failures.items():
            failures.add_metric(list(key), count)
        yield failures
        yield self._counter("images", "Images answered.", ("mode",), self._by_mode("images"))
        yield self._counter(
            "path_draws",
            "Random paths drawn.",
            (),
            (
                (model.labels, model.totals["draws"])
                for model in self._models
                if "random" in (model.plan.mode, *model.images)
            ),
        )
        yield self._counter(
            "exit_answers",
            "Images that an exit of a multi-exit model answered.",
            ("exit",),
            (
                ([*model.labels, str(number)], model.exits[number])
                for model in self._models
                for number in range(1, model.num_exits + 1)
                if model.num_exits > 1
            ),
        )
        yield self._histogram(
            "request_seconds",
            "From the whole body to the answer.",
            (),
            ((model.labels, model.request_seconds) for model in self._models),
        )
        yield self._histogram(
            "queue_seconds",
            "A request's wait for its first batch.",
            (),
            ((model.labels, model.queue_seconds) for model in self._models),
        )
        yield self._histogram(
            "compute_seconds", "A batch's time in the model.", ("mode",), self._spread("compute_seconds")
        )
        yield self._histogram("batch_images", "Images in a batch.", ("mode",), self._spread("batch_images"))
        yield self._gauge("queue_images", "Images waiting now.", lambda model: model.waiting())
        yield self._gauge("model_ready", "1 if the model takes requests.", lambda model: float(model.ready()))
        information = GaugeMetricFamily(
            "manygates_model_info",
            "What serves a model: always 1.",
            labels=["model", "version", "mode", "modes", "precision", "provider", "gated"],
        )
        for model in self._models:
            told = [model.info.get(name, "") for name in ("modes", "precision", "provider", "gated")]
            information.add_metric([*model.labels, model.plan.mode, *told], 1)
        yield information
        loads = CounterMetricFamily(
            "manygates_model_loads", "Models loaded while the server runs, by outcome.", labels=["model", "outcome"]
        )
        for key, count in self._loads.items():
            loads.add_metric(list(key), count)
        yield loads

    def _by_mode(self, name: str) -> Iterator[tuple[list[str], float]]:
        for model in self._models:
            for mode, count in getattr(model, name).items():
                yield [*model.labels, mode], count

    def _spread(self, name: str) -> Iterator[tuple[list[str], Distribution]]:
        for model in self._models:
            for mode, distribution in getattr(model, name).items():
                yield [*model.labels, mode], distribution

    @staticmethod
    def _counter(
        name: str, help_text: str, labels: tuple[str, ...], values: Iterable[tuple[list[str], float]]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"manygates_{name}", help_text, labels=["model", "version", *labels])
        for key, count in values:
            family.add_metric(key, count)
        return family

    @staticmethod
    def _histogram(
        name: str, help_text: str, labels: tuple[str, ...], values: Iterable[tuple[list[str], Distribution]]
    ) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"manygates_{name}", help_text, labels=["model", "version", *labels])
        for key, distribution in values:
            family.add_metric(key, distribution.buckets(), distribution.total)
        return family

    def _gauge(self, name: str, help_text: str, value: Callable[[ModelMetrics], float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"manygates_{name}", help_text, labels=["model", "version"])
        for model in self._models:
            family.add_metric(model.labels, value(model))
        return family
