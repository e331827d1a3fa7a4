"""What `/metrics` tells Prometheus.

Nothing here says which path answered a request: `path_draws` counts draws, all alike.
"""

from collections import Counter as Tally
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from serving.answers import Plan, Prediction

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_BATCHES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TOLD: Final = ("modes", "precision", "provider", "gated")

_Family = TypeVar("_Family", Counter, Histogram)

# a second series for each of ours, which says when it began
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        model = ("model", "version")
        per_mode = (*model, "mode")
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        counter = partial(Counter, namespace="manygates", registry=registry)
        gauge = partial(Gauge, namespace="manygates", registry=registry)
        histogram = partial(Histogram, namespace="manygates", registry=registry)
        times = partial(histogram, buckets=_SECONDS)
        self.requests = counter("requests", "Requests answered with success.", (*model, "endpoint", "mode"))
        self.images = counter("images", "Images answered.", per_mode)
        self.draws = counter("path_draws", "Random paths drawn.", model)
        self.exits = counter("exit_answers", "Images that an exit of a multi-exit model answered.", (*model, "exit"))
        self.request_seconds = times("request_seconds", "From the whole body to the answer.", model)
        self.queue_seconds = times("queue_seconds", "A request's wait for its first batch.", model)
        self.compute_seconds = times("compute_seconds", "A batch's time in the model.", per_mode)
        self.batch_images = histogram("batch_images", "Images in a batch.", per_mode, buckets=_BATCHES)
        self.waiting = gauge("queue_images", "Images waiting now.", model)
        self.ready = gauge("model_ready", "1 if the model takes requests.", model)
        self.info = gauge("model_info", "What serves a model: always 1.", (*per_mode, *_TOLD))
        self._failures = counter("request_failures", "Requests answered with an error.", ("model", "reason"))
        self._loads = counter("model_loads", "Models loaded while the server runs, by outcome.", ("model", "outcome"))
        self._of_models = (
            *(self.requests, self.images, self.draws, self.exits, self.waiting, self.ready, self.info),
            *(self.request_seconds, self.queue_seconds, self.compute_seconds, self.batch_images),
        )
        self._registry = registry
        self._models: dict[tuple[str, str], ModelMetrics] = {}

    def add(self, model: "ModelMetrics") -> None:
        """Tell of one more model; in place of an older one of this name and version, whose counts go on."""
        if model.labels in self._models:
            model.failures = self._models[model.labels].failures
            self._forget(model, self.info)
        self._models[model.labels] = model
        model.attach(self)

    def remove(self, model: "ModelMetrics") -> None:
        """Tell no more of a model that was unloaded."""
        if self._models.get(model.labels) is model:
            del self._models[model.labels]
            self._forget(model, *self._of_models)

    def failed(self, model: str, reason: str) -> None:
        """Count an error; `model` is empty where the request named none that is known."""
        self._failures.labels(model, reason).inc()
        for known in self._models.values():
            if known.labels[0] == model:
                known.failures += 1
                break

    def loaded(self, model: str, outcome: str) -> None:
        """Count a model that was loaded, reloaded or unloaded while the server runs, or failed to be."""
        self._loads.labels(model, outcome).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)

    @staticmethod
    def _forget(model: "ModelMetrics", *families: Counter | Gauge | Histogram) -> None:
        name, version = model.labels
        for family in families:
            family.remove_by_labels({"model": name, "version": version})


@dataclass(eq=False)
class ModelMetrics:
    """What one version of a model has done. `Metrics.add` comes before anything is counted."""

    model: str
    version: str
    plan: Plan
    """How requests are answered that choose nothing."""
    waiting: Callable[[], int]
    """Tells how many images wait now."""
    ready: Callable[[], bool]
    """Tells whether requests are taken now."""
    shared_gates: bool = False
    """Whether all images of a batch take the same path."""
    num_exits: int = 1
    """1 is not counted by exit."""
    info: Mapping[str, str] = field(default_factory=dict)
    """What else is told of it, such as the provider that computes."""
    failures: int = 0
    """Requests for this model that were answered with an error."""

    @property
    def labels(self) -> tuple[str, str]:
        """What tells its series from those of others."""
        return (self.model, self.version)

    def attach(self, metrics: Metrics) -> None:
        """Begin to count in a server's metrics, where the counts of an older one of this name and version go on."""
        self._metrics = metrics
        self._requests = _Series(metrics.requests, self.labels)
        self._images = _Series(metrics.images, self.labels)
        self._draws = _Series(metrics.draws, self.labels)
        self._exits = _Series(metrics.exits, self.labels)
        self._compute_seconds = _Series(metrics.compute_seconds, self.labels)
        self._batch_images = _Series(metrics.batch_images, self.labels)
        self._request_seconds = metrics.request_seconds.labels(*self.labels)
        self._queue_seconds = metrics.queue_seconds.labels(*self.labels)
        metrics.waiting.labels(*self.labels).set_function(self.waiting)
        metrics.ready.labels(*self.labels).set_function(self.ready)
        metrics.info.labels(*self.labels, self.plan.mode, *(self.info.get(name, "") for name in _TOLD)).set(1)
        if self.plan.mode == "random":
            self._draws[()].inc(0)
        for number in range(1, self.num_exits + 1) if self.num_exits > 1 else ():
            self._exits[(str(number),)].inc(0)

    def answered(self, endpoint: str, plan: Plan | None, seconds: float) -> None:
        """A request was answered with success."""
        self._requests[endpoint, (plan or self.plan).mode].inc()
        self._request_seconds.observe(seconds)

    def request_started(self, queue_seconds: float) -> None:
        """A request's first row left the queue."""
        self._queue_seconds.observe(queue_seconds)

    def batch_finished(self, answer: Prediction, compute_seconds: float, plan: Plan | None = None) -> None:
        """A batch of images was answered."""
        rows = len(answer.probabilities)
        plan = plan or self.plan
        mode = (plan.mode,)
        self._compute_seconds[mode].observe(compute_seconds)
        self._batch_images[mode].observe(rows)
        self._images[mode].inc(rows)
        if plan.mode == "random":
            self._draws[()].inc(plan.draws * (1 if self.shared_gates else rows))
        if answer.exits is not None:
            for number, images in Tally(answer.exits.tolist()).items():
                self._exits[(str(number),)].inc(images)

    def statistics(self) -> dict[str, object]:
        """Return what the protocol's statistics extension tells of a model; times in nanoseconds."""
        metrics = self._metrics
        nothing = {"count": 0, "ns": 0}
        computed = self._count_and_time(metrics.compute_seconds)
        return {
            "name": self.labels[0],
            "version": self.labels[1],
            "inference_count": int(self._sum(metrics.images, "_total")),
            "execution_count": computed["count"],
            "inference_stats": {
                **dict.fromkeys(("compute_input", "compute_output", "cache_hit", "cache_miss"), nothing),
                "success": self._count_and_time(metrics.request_seconds),
                "fail": {"count": self.failures, "ns": 0},
                "queue": self._count_and_time(metrics.queue_seconds),
                "compute_infer": computed,
            },
            "batch_stats": [],
        }

    def _count_and_time(self, family: Histogram) -> dict[str, int]:
        return {"count": int(self._sum(family, "_count")), "ns": int(1e9 * self._sum(family, "_sum"))}

    def _sum(self, family: Counter | Histogram, suffix: str) -> float:
        samples = (sample for metric in family.collect() for sample in metric.samples if sample.name.endswith(suffix))
        return sum(s.value for s in samples if (s.labels["model"], s.labels["version"]) == self.labels)


class _Series(dict[tuple[str, ...], _Family], Generic[_Family]):
    """One model's series of a family by their further labels; finding one here costs a third of asking the family."""

    def __init__(self, family: _Family, labels: tuple[str, str]) -> None:
        super().__init__()
        self._family: Any = family
        self._labels = labels

    def __missing__(self, key: tuple[str, ...]) -> _Family:
        self[key] = series = self._family.labels(*self._labels, *key)
        return cast(_Family, series)
