"""What `/metrics` tells Prometheus.

Nothing here says which path answered a request: `path_draws` counts draws, all alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serving.engine import Prediction

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests answered with success.", "model", "endpoint")
        self._failures = self._counter("request_failures", "Requests answered with an error.", "model", "reason")
        self._images = self._counter("images", "Images answered.", "model")
        self._draws = self._counter("path_draws", "Random paths drawn.", "model")
        self._exits = self._counter(
            "exit_answers", "Images that an exit of a multi-exit model answered.", "model", "exit"
        )
        self._request_seconds = self._histogram("request_seconds", "From the whole body to the answer.", _SECONDS)
        self._queue_seconds = self._histogram("queue_seconds", "A request's wait for its first batch.", _SECONDS)
        self._compute_seconds = self._histogram("compute_seconds", "A batch's time in the model.", _SECONDS)
        self._batch_images = self._histogram("batch_images", "Images in a batch.", _BATCHES)
        self._queue_images = self._gauge("queue_images", "Images waiting now.")
        self._ready = self._gauge("model_ready", "1 if the model takes requests.")

    def of_model(
        self, model: str, *, random: bool, num_exits: int, waiting: Callable[[], int], ready: Callable[[], bool]
    ) -> "ModelMetrics":
        """Return the metrics of one model.

        Args:
            model: its name, the label.
            random: whether every image draws a path.
            num_exits: how many exits it has; 1 is not counted by exit.
            waiting: tells how many images wait.
            ready: tells whether it takes requests.
        """
        self._queue_images.labels(model).set_function(waiting)
        self._ready.labels(model).set_function(lambda: float(ready()))
        return ModelMetrics(
            infer_requests=self._requests.labels(model, "infer"),
            classify_requests=self._requests.labels(model, "classify"),
            images=self._images.labels(model),
            draws=self._draws.labels(model) if random else None,
            exits=tuple(self._exits.labels(model, str(exit)) for exit in range(1, num_exits + 1) if num_exits > 1),
            request_seconds=self._request_seconds.labels(model),
            queue_seconds=self._queue_seconds.labels(model),
            compute_seconds=self._compute_seconds.labels(model),
            batch_images=self._batch_images.labels(model),
        )

    def failed(self, model: str, reason: str) -> None:
        """Count an error; `model` is empty where the request named none that is known."""
        self._failures.labels(model, reason).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"manygates_{name}", help_text, labels, registry=self._registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"manygates_{name}", help_text, ["model"], registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"manygates_{name}", help_text, ["model"], buckets=buckets, registry=self._registry)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMetrics:
    """One model's metrics, with the label looked up once; a `BatchObserver`."""

    infer_requests: Counter
    classify_requests: Counter
    images: Counter
    draws: Counter | None
    exits: tuple[Counter, ...]
    request_seconds: Histogram
    queue_seconds: Histogram
    compute_seconds: Histogram
    batch_images: Histogram

    def request_started(self, queue_seconds: float) -> None:
        """A request's first row left the queue."""
        self.queue_seconds.observe(queue_seconds)

    def batch_finished(self, answer: Prediction, compute_seconds: float) -> None:
        """A batch of images was answered."""
        rows = len(answer.probabilities)
        self.compute_seconds.observe(compute_seconds)
        self.batch_images.observe(rows)
        self.images.inc(rows)
        if self.draws is not None:
            self.draws.inc(rows)
        if self.exits and answer.exits is not None:
            answered = np.bincount(answer.exits - 1, minlength=len(self.exits)).tolist()
            for counter, images in zip(self.exits, answered, strict=True):
                counter.inc(images)
