"""Dynamic batching for several models on one set of worker threads: nobody ever waits for company.

Requests that wait are run together. A worker that is idle takes its share of what there is at once, so an idle server
adds no wait, and under load batches fill by themselves. The event loop owns every data structure here and in the
queues. A batch goes to a worker thread and comes back with one `call_soon_threadsafe`, however many requests it holds.

Among models the next is the one that has had the least processor time for its weight (start-time fair queueing, Goyal
et al. 1996); within a model `serving.scheduling.queue` decides.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serving.answers import Prediction, Predictor
from serving.operations.log import logger
from serving.operations.tracing import RequestNotes
from serving.protocol.choices import NOTHING_ASKED, Asked
from serving.scheduling.queue import Batch, Done, Draining, Outcome, Queue, Ticket

_LAST_BATCH_SECONDS: Final = 3.0
"""How long the end waits for a batch that is in a model."""


class WaitedTooLong(Exception):  # noqa: N818 -- says what happened
    """The request's turn did not come within the queue timeout."""


class DeadlineExceeded(Exception):  # noqa: N818 -- says what happened
    """The answer was not there by the time that the client itself had set."""


class PredictionFailed(Exception):  # noqa: N818 -- says what happened
    """The model failed on the batch that the request was in; the cause is logged and chained."""


class _Gone(Predictor):
    """Stands for a model that was replaced."""

    def predict(self, images: NDArray[np.float32], *_: Any, **__: Any) -> Prediction:
        """Answer nothing: whoever waited for this batch has been told already."""
        raise Draining


GONE: Final = _Gone()


class Scheduler:
    """Worker threads, and the queues that share them: takes batches, calls the models and settles tickets."""

    def __init__(self, workers: int) -> None:
        """Prepare; `start` begins to work. `workers` is how many batches run at a time, over all queues."""
        if workers < 1:
            raise ValueError(f"{workers} workers, expected at least 1")
        self._workers = workers
        self.queues: list[Queue] = []
        """The queues that are open or still finish their requests."""
        self.in_flight = 0
        """How many batches the workers have or will take next; one that uses every core counts for all of them."""
        self._dispatch_scheduled = False
        self._jobs: SimpleQueue[Batch | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._clock = 0.0
        """The virtual time: of the queue that was served last."""
        self.stuck = False
        """Whether a worker was still in a model when `stop` gave it up: the interpreter cannot end in peace."""

    def start(self) -> None:
        """Start the worker threads; must be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self.in_flight, self.stuck = 0, False
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

    def open(self, queue: Queue) -> None:
        """Take requests into a queue from now on; on the event loop, after `start`."""
        queue.virtual_time = self._clock
        self.queues.append(queue)
        queue.accepting = True

    def enter(
        self,
        queue: Queue,
        images: NDArray[Any],
        done: Done,
        limits: NDArray[np.float32] | None = None,
        asked: Asked = NOTHING_ASKED,
    ) -> Ticket:
        """Queue validated images, (image, channel, height, width) as float32 in [0, 1] or uint8 levels.

        Args:
            queue: of the model that is to answer.
            images: the request's.
            done: is called on the event loop, once, with the answer in the images' order or with the failure.
            limits: float32 (image, exit - 1), go to the model with the images; either every request of a plan
                brings its own or none does.
            asked: its plan, timeout and whether it is bulk; requests of one plan share batches. Its limits are for one
                image, and are not looked at.

        Raises:
            QueueFull: if `max_queue` images would be exceeded.
            Draining: before `open` and from `close` on.
        """
        was_idle = not queue.waiting
        ticket = queue.push(images, done, limits, asked.plan, bulk=asked.bulk, now=time.perf_counter())
        if was_idle:
            queue.virtual_time = max(queue.virtual_time, self._clock)  # idle time earns no credit
        self._wake()
        if asked.timeout is not None:
            ticket.timer = self._timer(asked.timeout, self._fail, ticket, DeadlineExceeded())
        if queue.sweep_timer is None:
            queue.sweep_timer = self._timer(queue.queue_timeout, self._sweep, queue)
        return ticket

    async def submit(
        self,
        queue: Queue,
        images: NDArray[Any],
        limits: NDArray[np.float32] | None = None,
        asked: Asked = NOTHING_ASKED,
        timings: RequestNotes | None = None,
    ) -> Prediction:
        """Answer images; see `enter`. A caller that is cancelled gives up its place, and its answer is thrown away.

        `timings` is told how long the images waited and were computed.

        Raises:
            QueueFull: as `enter`; so is `Draining`.
            WaitedTooLong: if its turn did not come in time.
            DeadlineExceeded: if the answer was not there within its own timeout.
            PredictionFailed: if the model failed on it.
        """
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        ticket = self.enter(queue, images, done, limits, asked)
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
            self._fail(ticket, Draining())  # tells nobody, but stops its timer

    async def close(self, queue: Queue, timeout: float) -> None:
        """Refuse new requests and finish the others for at most `timeout` seconds; then tell whoever still waits."""
        queue.accepting = False
        try:
            async with asyncio.timeout(timeout):
                while not queue.idle:
                    queue.settled.clear()
                    await queue.settled.wait()
        except TimeoutError:
            logger.warning("%d images were still waiting when the time to drain was over", queue.waiting)
        if queue.sweep_timer is not None:
            queue.sweep_timer.cancel()
            queue.sweep_timer = None
        self.abandon(queue)
        with suppress(ValueError):  # it was closed before
            self.queues.remove(queue)

    def abandon(self, queue: Queue) -> None:
        """Tell whoever still waits that no answer will come."""
        for ticket in queue.unanswered():
            self._fail(ticket, Draining())

    def _wake(self) -> None:
        """Look for work at the end of this turn of the event loop.

        Not at once: whatever else arrives in this turn joins the batch, and it costs no waiting.
        """
        if not self._dispatch_scheduled and self.in_flight < 2 * self._workers:
            assert self._loop is not None
            self._dispatch_scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give every idle worker its share of what waits, and every busy one a full batch to go on with.

        A batch that is full gains nothing by waiting here, and a worker that finds it at once does not wait for us.
        """
        self._dispatch_scheduled = False
        all_idle = not self.in_flight
        while self.in_flight < 2 * self._workers:
            queue = self._next_queue()
            if queue is None:
                return
            idle = self._workers - self.in_flight
            if idle > 0:
                waiting = queue.waiting
                wide = waiting == 1 and self.in_flight == 0 and queue.predictor.wide and self._workers > 1
                # while another worker is busy, it will soon want its share as well, unless there is enough for both
                enough = waiting >= queue.max_batch and not all_idle
                share = waiting if enough else -(-waiting // (idle if all_idle else self._workers))
                batch = self._take(queue, min(queue.max_batch, share), wide)
            elif queue.waiting >= queue.max_batch:
                batch = self._take(queue, queue.max_batch, False, full=True)
                if batch is None:
                    return
            else:
                return
            if batch is not None:
                self.in_flight += self._workers if batch.wide else 1
                self._clock = queue.virtual_time
                queue.virtual_time += batch.guess / queue.weight
                self._jobs.put(batch)

    def _take(self, queue: Queue, rows: int, wide: bool, *, full: bool = False) -> Batch | None:
        """Take a batch off a queue and tell those who are too late for it."""
        late: list[Ticket] = []
        batch = queue.take(rows, wide, time.perf_counter(), late, full=full)
        for ticket in late:
            ticket.settle(WaitedTooLong())
        if batch is not None and queue.observer is not None:
            for ticket, start, _ in batch.parts:
                if start == 0:
                    queue.observer.request_started(ticket.started - ticket.arrived)
        return batch

    def _next_queue(self) -> Queue | None:
        if len(self.queues) == 1:
            return self.queues[0] if self.queues[0].waiting else None
        waiting = [queue for queue in self.queues if queue.waiting]
        return min(waiting, key=lambda queue: queue.virtual_time) if waiting else None

    def _work(self) -> None:
        """Run batches until told to stop; on a worker thread."""
        loop = self._loop
        assert loop is not None
        while (batch := self._jobs.get()) is not None:
            started = time.perf_counter()
            outcome: Prediction | BaseException
            try:
                outcome = _computed(batch)
            except BaseException as error:  # noqa: BLE001 -- whatever it was, callers wait for an answer
                outcome = error
            seconds = time.perf_counter() - started
            try:
                loop.call_soon_threadsafe(self._finish, batch, outcome, seconds)
            except RuntimeError:  # the loop was closed under us; nobody waits any more
                return

    def _finish(self, batch: Batch, outcome: Prediction | BaseException, seconds: float) -> None:
        """Hand a batch's answers to their requests; on the loop."""
        self.in_flight -= self._workers if batch.wide else 1
        queue = batch.queue
        charged = seconds * self._workers if batch.wide else seconds
        queue.virtual_time += (charged - batch.guess) / queue.weight
        if not self._dispatch_scheduled:
            self._dispatch()  # first, so that the worker is busy while we answer
        queue.computed(batch)
        if isinstance(outcome, Draining):
            return
        if isinstance(outcome, BaseException):
            logger.error("a batch of %d requests failed", len(batch.parts), exc_info=outcome)
            for part in batch.parts:
                failure = PredictionFailed("the model failed on this batch")
                failure.__cause__ = outcome
                self._fail(part.ticket, failure)
            return
        queue.seconds_per_image += 0.1 * (seconds / len(outcome.probabilities) - queue.seconds_per_image)
        for ticket, own in queue.answers(batch.parts, outcome):
            ticket.settle(own)
        if queue.observer is not None:
            queue.observer.batch_finished(outcome, seconds, batch.plan)

    def _sweep(self, queue: Queue) -> None:
        """Refuse what has waited too long, even while no worker comes to fetch anything."""
        late, pause = queue.late(time.perf_counter())
        for ticket in late:
            ticket.settle(WaitedTooLong())
        queue.sweep_timer = None if pause is None else self._timer(pause, self._sweep, queue)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.queue.forget(ticket)
        ticket.settle(error)

    def _timer(self, seconds: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
        assert self._loop is not None
        return self._loop.call_later(seconds, call, *arguments)


def _computed(batch: Batch) -> Prediction:
    """Run a batch; on a worker thread."""
    parts = batch.parts
    if len(parts) == 1:
        ticket, start, stop = parts[0]
        images = _as_float(ticket.images[start:stop])
    else:
        pieces = [ticket.images[start:stop] for ticket, start, stop in parts]
        if len({piece.dtype for piece in pieces}) > 1:
            pieces = [_as_float(piece) for piece in pieces]
        images = _as_float(np.concatenate(pieces))
    limits = [ticket.limits[start:stop] for ticket, start, stop in parts if ticket.limits is not None]
    answer = batch.queue.predictor.predict(
        images, np.concatenate(limits) if limits else None, plan=batch.plan, wide=batch.wide
    )
    for values in answer:
        if values is not None and len(values) != len(images):
            raise RuntimeError(f"the model answered {len(values)} rows, expected {len(images)}")
    return answer


def _as_float(images: NDArray[Any]) -> NDArray[np.float32]:
    return np.divide(images, np.float32(255), dtype=np.float32) if images.dtype == np.uint8 else images
