"""Dynamic batching for several models on one set of worker threads: nobody ever waits for company.

Requests that wait are run together. A worker that is idle takes its share of what there is at once, so an idle server
adds no wait, and under load batches fill by themselves. The event loop owns every data structure here. A batch goes to
a worker thread through a queue and comes back with one `call_soon_threadsafe`, however many requests it holds. Rows are
accounted per request: a request of many rows is cut into several batches, and a batch may hold parts of several.

Who comes next: among models the one that has had the least processor time for its weight (start-time fair queueing,
Goyal et al. 1996); within a model small requests before bulk ones, but every fourth batch is bulk if any waits; among
requests of one kind the oldest.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.engine.engine import Plan, Prediction, Predictor

logger = logging.getLogger("manygates.serving")

_BULK_EVERY: Final = 4
_GUESS_SECONDS: Final = 0.001
"""What an image is thought to cost before any was measured."""
_LAST_BATCH_SECONDS: Final = 3.0
"""How long the end waits for a batch that is in a model."""


class QueueFull(Exception):  # noqa: N818 -- says what happened
    """There are as many images waiting as may; try again soon."""


class Draining(Exception):  # noqa: N818 -- says what happened
    """The queue is not started yet, or is finishing its last requests."""


class WaitedTooLong(Exception):  # noqa: N818 -- says what happened
    """The request's turn did not come within the queue timeout."""


class DeadlineExceeded(Exception):  # noqa: N818 -- says what happened
    """The answer was not there by the time that the client itself had set."""


class PredictionFailed(Exception):  # noqa: N818 -- says what happened
    """The model failed on the batch that the request was in; the cause is logged and chained."""


class _Gone:
    """Stands for a model that was replaced."""

    def predict(self, *_: Any, **__: Any) -> Prediction:
        """Answer nothing: whoever waited for this batch has been told already."""
        raise Draining


GONE: Final = _Gone()

Outcome = Prediction | Exception
Done = Callable[[Outcome], None]


class BatchObserver(Protocol):
    """Is told what happened to batches; on the event loop's thread."""

    def request_started(self, queue_seconds: float) -> None:
        """A request's first row left the queue."""
        ...

    def batch_finished(self, answer: Prediction, compute_seconds: float, plan: Plan | None) -> None:
        """A batch of images was answered."""
        ...


class Timings(Protocol):
    """Is told how long a request took."""

    queue_seconds: float | None
    compute_seconds: float | None


class Ticket:
    """One caller's images in a queue, and how far they have got."""

    __slots__ = ("answer", "arrived", "done", "images", "lane", "limits", "next_row", "open_rows", "started", "timer")

    def __init__(
        self,
        images: NDArray[Any],
        limits: NDArray[np.float32] | None,
        done: Done,
        lane: "deque[Ticket]",
        arrived: float,
    ) -> None:
        self.images = images
        self.limits = limits
        self.done: Done | None = done
        self.lane = lane
        self.arrived = arrived
        self.started = arrived
        self.next_row = 0
        self.open_rows = len(images)
        self.answer: Prediction | None = None
        self.timer: asyncio.TimerHandle | None = None

    def settle(self, outcome: Outcome) -> None:
        """Tell the caller, once."""
        done, self.done = self.done, None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if done is not None:
            try:
                done(outcome)
            except Exception:
                logger.exception("an answer could not be handed over")  # the others of its batch still get theirs


class _Part(NamedTuple):
    """Some rows of one request, within a batch."""

    ticket: Ticket
    start: int
    stop: int


class _Job(NamedTuple):
    """A batch on its way to a worker and back."""

    queue: "Queue"
    parts: list[_Part]
    plan: Plan | None
    wide: bool
    guess: float


class _Lanes(NamedTuple):
    """What waits for one plan."""

    small: "deque[Ticket]"
    bulk: "deque[Ticket]"


class Scheduler:
    """Worker threads, and the queues that share them."""

    def __init__(self, workers: int) -> None:
        """Prepare; `start` begins to work. `workers` is how many batches run at a time, over all queues."""
        if workers < 1:
            raise ValueError(f"{workers} workers, expected at least 1")
        self._workers = workers
        self._queues: list[Queue] = []
        self._in_flight = 0
        self._dispatch_scheduled = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._clock = 0.0
        """The virtual time: of the queue that was served last."""
        self.stuck = False
        """Whether a worker was still in a model when `stop` gave it up: the interpreter cannot end in peace."""

    @property
    def running(self) -> bool:
        """Whether the workers run."""
        return self._loop is not None

    def start(self) -> None:
        """Start the worker threads; must be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._in_flight, self.stuck = 0, False
        for number in range(self._workers):
            thread = threading.Thread(target=self._work, name=f"predict-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop the threads; every queue must have been closed before. A batch in a model is waited for, not long."""
        with suppress(Empty):
            while True:  # what no worker has begun is for nobody any more
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.perf_counter() + _LAST_BATCH_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        self.stuck = any(thread.is_alive() for thread in self._threads)
        self._threads.clear()
        self._loop = None

    def wake(self) -> None:
        """Look for work at the end of this turn of the event loop.

        Not at once: whatever else arrives in this turn joins the batch, and it costs no waiting.
        """
        if not self._dispatch_scheduled and self._in_flight < 2 * self._workers:
            assert self._loop is not None
            self._dispatch_scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give every idle worker its share of what waits, and every busy one a full batch to go on with.

        A batch that is full gains nothing by waiting here, and a worker that finds it at once does not wait for us.
        """
        self._dispatch_scheduled = False
        all_idle = not self._in_flight
        while self._in_flight < 2 * self._workers:
            queue = self._next_queue()
            if queue is None:
                return
            idle = self._workers - self._in_flight
            if idle > 0:
                waiting = queue.waiting
                wide = waiting == 1 and self._in_flight == 0 and queue.wide and self._workers > 1
                # while another worker is busy, it will soon want its share as well, unless there is enough for both
                enough = waiting >= queue.max_batch and not all_idle
                share = waiting if enough else -(-waiting // (idle if all_idle else self._workers))
                job = queue.take(min(queue.max_batch, share), wide)
            elif queue.waiting >= queue.max_batch:
                job = queue.take(queue.max_batch, False, full=True)
                if job is None:
                    return
            else:
                return
            if job is not None:
                self._in_flight += self._workers if job.wide else 1
                self._clock = queue.virtual_time
                queue.virtual_time += job.guess / queue.weight
                self._jobs.put(job)

    def _next_queue(self) -> "Queue | None":
        if len(self._queues) == 1:
            return self._queues[0] if self._queues[0].waiting else None
        waiting = [queue for queue in self._queues if queue.waiting]
        return min(waiting, key=lambda queue: queue.virtual_time) if waiting else None

    def _work(self) -> None:
        """Run batches until told to stop; on a worker thread."""
        loop = self._loop
        assert loop is not None
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            outcome: Prediction | BaseException
            try:
                outcome = job.queue.predict(job)
            except BaseException as error:  # noqa: BLE001 -- whatever it was, callers wait for an answer
                outcome = error
            seconds = time.perf_counter() - started
            try:
                loop.call_soon_threadsafe(self._finish, job, outcome, seconds)
            except RuntimeError:  # the loop was closed under us; nobody waits any more
                return

    def _finish(self, job: _Job, outcome: Prediction | BaseException, seconds: float) -> None:
        """Hand a batch's answers to their requests; on the loop."""
        self._in_flight -= self._workers if job.wide else 1
        queue = job.queue
        charged = seconds * self._workers if job.wide else seconds
        queue.virtual_time += (charged - job.guess) / queue.weight
        if not self._dispatch_scheduled:
            self._dispatch()  # first, so that the worker is busy while we answer
        queue.finish(job, outcome, seconds)

    def add(self, queue: "Queue") -> None:
        """Let a queue take part."""
        queue.virtual_time = self._clock
        self._queues.append(queue)

    def remove(self, queue: "Queue") -> None:
        """Forget a queue that is empty."""
        if queue in self._queues:
            self._queues.remove(queue)

    def activate(self, queue: "Queue") -> None:
        """Note that an idle queue has work: time in which it asked for nothing gives it no claim."""
        queue.virtual_time = max(queue.virtual_time, self._clock)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that everything runs on."""
        assert self._loop is not None
        return self._loop


class Queue:
    """The requests that wait for one model."""

    def __init__(
        self,
        scheduler: Scheduler,
        predictor: Predictor,
        *,
        max_batch: int,
        max_queue: int,
        bulk_images: int = 0,
        queue_timeout: float = 30.0,
        weight: float = 1.0,
        observer: BatchObserver | None = None,
    ) -> None:
        """Prepare; `open` begins to take requests.

        Args:
            scheduler: whose workers answer.
            predictor: is called from several threads.
            max_batch: images in a batch, at most.
            max_queue: images waiting, at most; a request beyond that is refused.
            bulk_images: requests of more images than this yield to the others; 0 is `max_batch`.
            queue_timeout: seconds after which a request that is still waiting is refused.
            weight: the model's share of the workers, relative to the other models'.
            observer: is told about requests and batches.
        """
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.weight = weight
        self.virtual_time = 0.0
        self.waiting = 0
        """How many images wait for their turn."""
        self.wide = bool(getattr(predictor, "wide", False))
        self.accepting = False
        """Whether a request would be taken now."""
        self._told_plan = hasattr(predictor, "modes")
        self._scheduler = scheduler
        self._predictor: Any = predictor
        self._bulk_images = bulk_images or max_batch
        self._queue_timeout = queue_timeout
        self._observer = observer
        self._lanes: dict[Hashable, _Lanes] = {}
        self._computing: dict[int, _Job] = {}
        """By their identity."""
        self._open_tickets = 0
        self._batches = 0
        self._seconds_per_image = _GUESS_SECONDS
        self._settled = asyncio.Event()
        self._sweep_timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Take requests from now on; on the event loop, after the scheduler's start."""
        self._scheduler.add(self)
        self.accepting = True

    def enter(
        self,
        images: NDArray[Any],
        done: Done,
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        *,
        timeout: float | None = None,
        bulk: bool = False,
    ) -> Ticket:
        """Queue validated images, (image, channel, height, width) as float32 in [0, 1] or uint8 levels.

        Args:
            images: the request's.
            done: is called on the event loop, once, with the answer in the images' order or with the failure.
            limits: float32 (image, exit - 1), go to the predictor with the images; either every request of a plan
                brings its own or none does.
            plan: how to answer; requests of one plan share batches.
            timeout: seconds by which the answer must be there; None leaves it at the queue's own timeout.
            bulk: yield to others whatever the number of images.

        Raises:
            QueueFull: if `max_queue` images would be exceeded.
            Draining: before `open` and from `close` on.
        """
        if not self.accepting:
            raise Draining
        rows = len(images)
        if self.waiting + rows > self.max_queue:
            raise QueueFull
        lanes = self._lanes.get(plan)
        if lanes is None:
            lanes = self._lanes[plan] = _Lanes(deque(), deque())
        lane = lanes.bulk if bulk or rows * (1 if plan is None else plan.draws) > self._bulk_images else lanes.small
        ticket = Ticket(images, limits, done, lane, time.perf_counter())
        lane.append(ticket)
        if not self.waiting:
            self._scheduler.activate(self)
        self.waiting += rows
        self._open_tickets += 1
        self._scheduler.wake()
        if timeout is not None:
            ticket.timer = self._scheduler.loop.call_later(timeout, self._fail, ticket, DeadlineExceeded())
        if self._sweep_timer is None:
            self._sweep_timer = self._scheduler.loop.call_later(self._queue_timeout, self._sweep)
        return ticket

    async def submit(
        self,
        images: NDArray[Any],
        limits: NDArray[np.float32] | None = None,
        plan: Plan | None = None,
        *,
        timeout: float | None = None,
        bulk: bool = False,
        timings: Timings | None = None,
    ) -> Prediction:
        """Answer images; see `enter`. A caller that is cancelled gives up its place, and its answer is thrown away.

        `timings` is told how long the images waited and were computed.

        Raises:
            QueueFull: if `max_queue` images would be exceeded.
            WaitedTooLong: if its turn did not come in time.
            DeadlineExceeded: if the answer was not there within `timeout`.
            PredictionFailed: if the model failed on it.
            Draining: before `open` and from `close` on.
        """
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        ticket = self.enter(images, done, limits, plan, timeout=timeout, bulk=bulk)
        try:
            answer = await future
        except asyncio.CancelledError:
            self.leave(ticket)
            raise
        if timings is not None:
            timings.queue_seconds = ticket.started - ticket.arrived
            timings.compute_seconds = time.perf_counter() - ticket.started
        return answer

    def leave(self, ticket: Ticket) -> None:
        """Give up a place in the queue; the caller hears nothing more."""
        if ticket.done is not None:
            ticket.done = None
            self._forget(ticket)
            ticket.settle(Draining())  # tells nobody, but stops its timer

    async def close(self, timeout: float) -> None:
        """Refuse new requests and finish the others for at most `timeout` seconds; then tell whoever still waits."""
        self.accepting = False
        try:
            async with asyncio.timeout(timeout):
                while self._open_tickets:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            logger.warning("%d images were still waiting when the time to drain was over", self.waiting)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        self.abandon()
        self._scheduler.remove(self)

    def abandon(self) -> None:
        """Tell whoever still waits that no answer will come."""
        for lanes in list(self._lanes.values()):
            for lane in lanes:
                while lane:
                    self._fail(lane[0], Draining())
        for job in list(self._computing.values()):
            for part in job.parts:
                self._fail(part.ticket, Draining())

    def release(self) -> None:
        """Let go of the predictor of a closed queue, however long somebody keeps the queue itself."""
        self._predictor = GONE

    def take(self, max_rows: int, wide: bool, *, full: bool = False) -> "_Job | None":
        """Take up to `max_rows` rows of one plan off the queue, oldest first; None if all turned out to be late.

        With `full` also None if there are fewer of the plan whose turn it is.
        """
        plan, lane = self._choose()
        if full and not _holds(lane, max_rows):
            return None
        self._batches += 1
        now = time.perf_counter()
        parts: list[_Part] = []
        rows = 0
        while rows < max_rows and lane:
            ticket = lane[0]
            start = ticket.next_row
            if start == 0:
                waited = now - ticket.arrived
                if waited > self._queue_timeout:
                    self._fail(ticket, WaitedTooLong())
                    continue
                ticket.started = now
                if self._observer is not None:
                    self._observer.request_started(waited)
            stop = min(start + max_rows - rows, len(ticket.images))
            parts.append(_Part(ticket, start, stop))
            ticket.next_row = stop
            rows += stop - start
            if stop == len(ticket.images):
                lane.popleft()
        self.waiting -= rows
        if not parts:
            return None
        job = _Job(self, parts, plan, wide and rows == 1, rows * self._seconds_per_image)
        self._computing[id(job)] = job
        return job

    def predict(self, job: _Job) -> Prediction:
        """Run a batch; on a worker thread."""
        parts = job.parts
        if len(parts) == 1:
            ticket, start, stop = parts[0]
            images = _as_float(ticket.images[start:stop])
        else:
            pieces = [ticket.images[start:stop] for ticket, start, stop in parts]
            if len({piece.dtype for piece in pieces}) > 1:
                pieces = [_as_float(piece) for piece in pieces]
            images = _as_float(np.concatenate(pieces))
        options: dict[str, Any] = {}
        if job.plan is not None and self._told_plan:
            options["plan"] = job.plan
        if job.wide:
            options["wide"] = True
        limits = [ticket.limits[start:stop] for ticket, start, stop in parts if ticket.limits is not None]
        if limits:
            answer = self._predictor.predict(images, np.concatenate(limits), **options)
        else:
            answer = self._predictor.predict(images, **options)
        for values in answer:
            if values is not None and len(values) != len(images):
                raise RuntimeError(f"the model answered {len(values)} rows, expected {len(images)}")
        return answer  # type: ignore[no-any-return]

    def finish(self, job: _Job, outcome: Prediction | BaseException, seconds: float) -> None:
        """Hand a batch's answers to their requests; on the loop."""
        self._computing.pop(id(job), None)
        if isinstance(outcome, Draining):
            return
        if isinstance(outcome, BaseException):
            logger.error("a batch of %d requests failed", len(job.parts), exc_info=outcome)
            for part in job.parts:
                failure = PredictionFailed("the model failed on this batch")
                failure.__cause__ = outcome
                self._fail(part.ticket, failure)
            return
        rows = len(outcome.probabilities)
        self._seconds_per_image += 0.1 * (seconds / rows - self._seconds_per_image)
        self._deliver(job.parts, outcome)
        if self._observer is not None:
            self._observer.batch_finished(outcome, seconds, job.plan)

    def _choose(self) -> tuple[Plan | None, "deque[Ticket]"]:
        """Return the lane whose turn it is, and its plan."""
        bulk_turn = (self._batches + 1) % _BULK_EVERY == 0
        best: tuple[bool, float] = (True, math.inf)
        chosen: tuple[Any, deque[Ticket]] | None = None
        for plan, lanes in self._lanes.items():
            for is_bulk, lane in ((False, lanes.small), (True, lanes.bulk)):
                if lane and (rank := (is_bulk != bulk_turn, lane[0].arrived)) < best:
                    best, chosen = rank, (plan, lane)
        assert chosen is not None  # it is called only while something waits
        return chosen

    def _deliver(self, parts: list[_Part], answer: Prediction) -> None:
        row = 0
        for ticket, start, stop in parts:
            rows = stop - start
            if len(parts) == 1:
                own = answer
            else:
                end = row + rows
                own = Prediction(*(None if values is None else values[row:end] for values in answer))  # type: ignore[arg-type]
            row += rows
            if rows != len(ticket.images):
                own = self._collect(ticket, start, own)
            ticket.open_rows -= rows
            if ticket.open_rows == 0 and ticket.done is not None:
                self._closed()
                ticket.settle(own)

    @staticmethod
    def _collect(ticket: Ticket, start: int, part: Prediction) -> Prediction:
        """Put a part of a request's answer in its place."""
        if ticket.answer is None:
            rows = len(ticket.images)
            empty = (None if each is None else np.empty((rows, *each.shape[1:]), each.dtype) for each in part)
            ticket.answer = Prediction(*empty)  # type: ignore[arg-type]
        for whole, values in zip(ticket.answer, part, strict=True):
            if whole is not None and values is not None:
                whole[start : start + len(values)] = values
        return ticket.answer

    def _sweep(self) -> None:
        """Refuse what has waited too long, even while no worker comes to fetch anything."""
        latest = time.perf_counter() - self._queue_timeout
        oldest = math.inf
        for lanes in list(self._lanes.values()):
            for lane in lanes:
                for ticket in list(lane):
                    if ticket.arrived > latest:
                        oldest = min(oldest, ticket.arrived)
                        break
                    if ticket.next_row == 0:
                        self._fail(ticket, WaitedTooLong())
        # one timer for all: the next look is when the oldest of those that are left will be late, but not at once again
        pause = self._queue_timeout if oldest == math.inf else max(oldest - latest, 0.001)
        self._sweep_timer = self._scheduler.loop.call_later(pause, self._sweep) if self.waiting else None

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._forget(ticket)
        ticket.settle(error)

    def _forget(self, ticket: Ticket) -> None:
        """Take what is left of a request off the queue."""
        if ticket.next_row < len(ticket.images):
            ticket.lane.remove(ticket)
            self.waiting -= len(ticket.images) - ticket.next_row
            ticket.next_row = len(ticket.images)
        if ticket.open_rows >= 0:
            ticket.open_rows = -len(ticket.images)  # parts of it that are still being computed are not delivered
            self._closed()

    def _closed(self) -> None:
        self._open_tickets -= 1
        if not self._open_tickets:
            self._settled.set()


def _holds(lane: "deque[Ticket]", rows: int) -> bool:
    """Whether requests of at least so many rows wait in a lane."""
    for ticket in lane:
        rows -= len(ticket.images) - ticket.next_row
        if rows <= 0:
            return True
    return False


def _as_float(images: NDArray[Any]) -> NDArray[np.float32]:
    return np.divide(images, np.float32(255), dtype=np.float32) if images.dtype == np.uint8 else images
