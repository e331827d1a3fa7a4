"""What every protocol shares: which models there are, how a request is answered, and when the server is ready.

REST, gRPC and whatever comes next read requests in their own form and ask here. Everything runs on one event loop.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan, Prediction, Predictor
from serving.engine.exits import num_exits
from serving.engine.gate_compiler import Scope
from serving.engine.gates import give_memory_back
from serving.errors import RequestError, busy, defect, not_ready
from serving.operations.metrics import Metrics, ModelMetrics
from serving.operations.settings import Settings
from serving.operations.tracing import RequestNotes
from serving.protocol.choices import NOTHING_ASKED, Asked, Choices
from serving.protocol.open_inference import VERSION, Codec
from serving.scheduling.queue import Done, Draining, Queue, QueueFull, Ticket
from serving.scheduling.scheduler import GONE, DeadlineExceeded, PredictionFailed, Scheduler, WaitedTooLong
from zoo import vocabulary
from zoo.bundle.card import Card
from zoo.errors import BadInput, UnknownName
from zoo.vocabulary import Mode

MAX_DRAWS: Final = 64
_EXTENSIONS: Final = ("binary_tensor_data", "model_repository", "model_configuration", "schedule_policy", "statistics")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be served: a card, how it answers, and what answers."""

    card: Card
    mode: Mode
    predictor: Predictor
    draws: int = 1
    """Paths per image in mode `random`."""
    limits: NDArray[np.float32] | None = None
    """Where requests may choose the exit: the limits, float32 (exit - 1), of those that do not."""
    modes: tuple[Mode, ...] = ()
    """What requests may choose; empty where they may not."""
    voting: tuple[Mode, ...] = ()
    """The modes that can tell their agreement."""
    gate_scope: Scope = "image"
    version: str = VERSION
    weight: float = 1.0
    """Its share of the workers, relative to the other models'."""
    details: tuple[tuple[str, str], ...] = ()
    """What metadata and metrics tell: precision, provider, how the gated graph runs."""

    @property
    def plan(self) -> Plan:
        """How a request is answered that chooses nothing."""
        return Plan(self.mode, self.draws if self.mode == "random" else 1)


class Served:
    """A model that takes requests."""

    def __init__(self, model: Model, service: "Service") -> None:
        settings = service.settings
        self.model = model
        self.name = model.card.name
        self.version = model.version
        self.metrics = ModelMetrics(
            self.name,
            self.version,
            plan=model.plan,
            shared_gates=model.gate_scope == "batch",
            num_exits=num_exits(model.card),
            waiting=lambda: self.queue.waiting,
            ready=lambda: self.ready,
            info={"modes": " ".join(model.modes), **dict(model.details)},
        )
        self.queue = Queue(
            model.predictor,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            bulk_images=settings.bulk_images,
            queue_timeout=settings.queue_timeout,
            weight=model.weight,
            observer=self.metrics,
        )
        choices = Choices(
            model.card,
            plan=model.plan,
            modes=model.modes,
            voting=model.voting,
            max_draws=max(MAX_DRAWS, model.draws),
            may_choose_exit=model.limits is not None,
        )
        self.codec = Codec(
            model.card,
            choices,
            max_rows=settings.max_queue,
            version=model.version,
            details={"mode": model.mode, **dict(model.details)},
        )
        self._max_batch = settings.max_batch
        self._service = service
        self.replaced = False
        """Whether it was loaded again, so that another takes its requests."""

    @property
    def ready(self) -> bool:
        """Whether this model takes requests, and will for a while, whatever becomes of the others."""
        return self._service.running and self.queue.accepting

    @property
    def latest(self) -> "Served":
        """What a request is to be answered by whose body has come only now."""
        return self._service.current(self) if self.replaced else self

    def release(self) -> None:
        """Let go of the model once it is closed, however long a quiet connection remembers what it asked last."""
        self.queue.predictor = GONE
        self.model = dataclasses.replace(self.model, predictor=GONE)

    def configuration(self) -> dict[str, Any]:
        """Return what the protocol's extension calls the model's configuration: how it is batched and run."""
        metadata = self.codec.metadata()
        return {
            "name": self.name,
            "platform": metadata["platform"],
            "backend": "onnxruntime",
            "max_batch_size": self._max_batch,
            "input": [_configured(tensor) for tensor in metadata["inputs"]],
            "output": [_configured(tensor) for tensor in metadata["outputs"]],
            "dynamic_batching": {"max_queue_delay_microseconds": 0, "priority_levels": 2},
            "parameters": {name: {"string_value": value} for name, value in metadata.get("parameters", {}).items()},
        }


def _configured(tensor: dict[str, Any]) -> dict[str, Any]:
    return {"name": tensor["name"], "data_type": f"TYPE_{tensor['datatype']}", "dims": tensor["shape"][1:] or [1]}


class Service:
    """The models that are served, their queues, and the workers that answer."""

    def __init__(self, models: Sequence[Model], settings: Settings) -> None:
        """Prepare to serve `models`, the first as the default; BadInput if two have the same name and version."""
        self.settings = settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(settings.workers)
        self.complete: Callable[[], bool] = lambda: True
        """Tells whether all is served that should be; where models may be missing, a repository knows."""
        self.generation = 0
        """Grows whenever what is served changes, so that nobody remembers a model for longer."""
        self._served: dict[str, dict[str, Served]] = {}
        self.draining = False
        """Whether we are about to stop."""
        self._started = False
        self._deadline: float | None = None
        self.hurried = asyncio.Event()
        """Set when nobody wants to wait for the requests in flight any more."""
        self._closing: dict[asyncio.Task[None], Served] = {}
        for model in models:
            if model.version in self._served.get(model.card.name, {}):
                raise BadInput(f"{model.card.name!r} is to be served twice; name each model once")
            self._put(Served(model, self))

    @property
    def names(self) -> list[str]:
        """The names of the models, the default first."""
        return list(self._served)

    @property
    def running(self) -> bool:
        """Whether requests are taken, and will be for a while."""
        return self._started and not self.draining

    @property
    def healthy(self) -> bool:
        """Whether every model that is served takes requests, and will for a while."""
        return self.running and all(served.queue.accepting for served in self.everything())

    @property
    def ready(self) -> bool:
        """Whether all is served that should be, and every model takes requests, and will for a while."""
        return self.healthy and self.complete()

    def begin_drain(self) -> None:
        """Say that we are not ready any more, so that no new clients are sent here; requests are still answered."""
        self.draining = True

    def close_by(self, deadline: float) -> None:
        """Give the requests in flight until `deadline` (of `time.monotonic`), on whatever protocol they came."""
        self.draining = True
        self._deadline = deadline

    @property
    def closing(self) -> bool:
        """Whether only requests in flight are still answered."""
        return self._deadline is not None

    @property
    def time_to_drain(self) -> float:
        """How many seconds requests in flight still have once they are to end."""
        return self.settings.drain_timeout if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def hurry(self) -> None:
        """Answer nothing any more: whoever waits is told so now; on the event loop."""
        self.close_by(time.monotonic())
        self.hurried.set()
        for served in (*self.everything(), *self._closing.values()):
            self.scheduler.abandon(served.queue)

    def current(self, served: Served) -> Served:
        """Return what is served under this model's name and version now; itself if nothing is."""
        return self._served.get(served.name, {}).get(served.version, served)

    def description(self) -> dict[str, Any]:
        """Return what the protocol calls the server's metadata."""
        return {"name": "manygates", "version": vocabulary.VERSION, "extensions": [*_EXTENSIONS]}

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are served, oldest first."""
        return sorted(self._served.get(name, {}), key=_age)

    def find(self, name: str | None, version: str | None = None) -> Served:
        """Return a model; without a name the default, without a version the latest. 404 if it is not served."""
        if name is None and self._served:
            name = next(iter(self._served))
        versions = self._served.get(name or "")
        if versions is None:
            unknown = UnknownName((name or "")[:128], self._served, kind="model")
            raise RequestError(404, "unknown_model", str(unknown))
        if not version:
            return versions[max(versions, key=_age)]
        if version not in versions:
            known = ", ".join(repr(known) for known in self.versions(name or ""))
            raise RequestError(404, "unknown_version", f"{name} has no version {version[:40]!r}, only {known}")
        return versions[version]

    def is_ready(self, name: str, version: str = "") -> bool:
        """Tell whether a model takes requests; one that there is not does not, so that clients can wait for it."""
        try:
            served = self.find(name, version)
        except RequestError:
            return False
        return served.ready

    def everything(self) -> list[Served]:
        """Return every version of every model."""
        return [self._served[name][version] for name in self._served for version in self.versions(name)]

    def start(self) -> None:
        """Take requests from now on; on the event loop."""
        self.scheduler.start()
        self._started = True
        for served in self.everything():
            self.scheduler.open(served.queue)

    async def stop(self) -> None:
        """Finish the requests in flight for at most the settings' time to drain, and stop the workers."""
        self.draining = True
        seconds = self.time_to_drain
        await asyncio.gather(*(self.scheduler.close(served.queue, seconds) for served in self.everything()))
        if self._closing:
            await asyncio.gather(*self._closing)
        self.scheduler.stop()
        self._started = False
        self._deadline = None
        self.hurried.clear()

    def put(self, model: Model) -> None:
        """Serve a model from now on; in place of one of this name and version, which answers what it has taken."""
        old = self._served.get(model.card.name, {}).get(model.version)
        served = Served(model, self)
        if self._started:
            self.scheduler.open(served.queue)
        self._put(served)
        if old is not None:
            old.replaced = True
            if self._started:
                self._close(old)

    def drop(self, name: str, version: str | None = None) -> None:
        """Serve a model, or one version of it, no longer; what it has taken is answered. 404 if it is not served."""
        self.find(name, version)
        for gone in [version] if version else self.versions(name):
            served = self._served[name].pop(gone)
            self.metrics.remove(served.metrics)
            if self._started:
                self._close(served)
        if not self._served[name]:
            del self._served[name]
        self.generation += 1

    def enter(self, served: Served, images: NDArray[Any], asked: Asked, done: Done) -> Ticket:
        """Queue checked images; `done` is called once, with the answer or with what `failure` understands.

        Raises:
            QueueFull: if there are too many images waiting.
            Draining: if the model takes no requests.
        """
        return self.scheduler.enter(served.queue, images, done, _limits(served, images, asked), asked)

    async def predict(
        self, served: Served, images: NDArray[Any], asked: Asked = NOTHING_ASKED, timings: RequestNotes | None = None
    ) -> Prediction:
        """Answer checked images; `timings` is told how long they waited and were computed.

        Raises:
            RequestError: 429 if the queue is full, 503 if the turn did not come or we are stopping, 504 if the
                request's own time was over, 500 if the model failed.
        """
        limits = _limits(served, images, asked)
        try:
            return await self.scheduler.submit(served.queue, images, limits, asked, timings)
        except (QueueFull, WaitedTooLong, DeadlineExceeded, Draining, PredictionFailed) as error:
            raise self.failure(served, error) from error

    def failure(self, served: Served, error: Exception) -> RequestError:
        """Return what a request is answered with that failed with `error`."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, QueueFull):
            limit = served.queue.max_queue
            return busy(429, "queue_full", f"the queue is full ({limit} images); try again in a second")
        if isinstance(error, WaitedTooLong):
            seconds = self.settings.queue_timeout
            return busy(503, "queue_timeout", f"no turn within {seconds:g} seconds; try again later")
        if isinstance(error, DeadlineExceeded):
            return RequestError(504, "deadline", "the request's own timeout is over; allow more, or try again later")
        if isinstance(error, Draining):
            return not_ready()
        if isinstance(error, PredictionFailed):
            return RequestError(500, "model_failed", "the model failed on this batch; the server's log says more")
        return defect(error)

    def _put(self, served: Served) -> None:
        self._served.setdefault(served.name, {})[served.version] = served
        self.metrics.add(served.metrics)
        self.generation += 1

    def _close(self, served: Served) -> None:
        task = asyncio.get_running_loop().create_task(self._retire(served))
        self._closing[task] = served
        task.add_done_callback(self._closed)

    async def _retire(self, served: Served) -> None:
        await self.scheduler.close(served.queue, self.settings.drain_timeout)
        served.release()

    def _closed(self, task: asyncio.Task[None]) -> None:
        del self._closing[task]
        # soon, when the batches in flight have let go of it
        asyncio.get_running_loop().call_later(1.0, give_memory_back)


def _limits(served: Served, images: NDArray[Any], asked: Asked) -> NDArray[np.float32] | None:
    """Return the limits of the exits for each image, float32 (image, exit - 1); None leaves them to the predictor."""
    limits = served.model.limits if asked.limits is None else asked.limits
    return None if limits is None else np.broadcast_to(limits, (len(images), len(limits)))


def _age(version: str) -> tuple[int, int, str]:
    return (1, int(version), "") if version.isascii() and version.isdigit() else (0, 0, version)
