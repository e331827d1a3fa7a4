"""Dynamic batching: requests that wait are run together, and nobody ever waits for company.

The event loop owns every data structure here. A batch goes to a worker thread through a queue and comes back with one
`call_soon_threadsafe`, however many requests it holds. Rows are accounted per request: a request of many rows is cut
into several batches, and a batch may hold parts of several requests.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.engine import Prediction, Predictor

logger = logging.getLogger("manygates.serving")


class QueueFull(Exception):  # noqa: N818 -- says what happened
    """There are as many images waiting as may; try again soon."""


class Draining(Exception):  # noqa: N818 -- says what happened
    """The batcher is not started yet, or is finishing its last requests."""


class WaitedTooLong(Exception):  # noqa: N818 -- says what happened
    """The request's turn did not come within the queue timeout."""


class PredictionFailed(Exception):  # noqa: N818 -- says what happened
    """The model failed on the batch that the request was in; the cause is logged and chained."""


class BatchObserver(Protocol):
    """Is told what happened to batches; on the event loop's thread."""

    def request_started(self, queue_seconds: float) -> None:
        """A request's first row left the queue."""
        ...

    def batch_finished(self, answer: Prediction, compute_seconds: float) -> None:
        """A batch of images was answered."""
        ...


class _Request:
    """One caller's images, and how far they have got."""

    __slots__ = ("answer", "arrived", "future", "images", "limits", "next_row", "open_rows")

    def __init__(
        self, images: NDArray[np.float32], limits: NDArray[np.float32] | None, future: "asyncio.Future[Prediction]"
    ) -> None:
        self.images = images
        self.limits = limits
        self.future = future
        self.arrived = time.perf_counter()
        self.next_row = 0
        self.open_rows = len(images)
        self.answer: Prediction | None = None


class _Part(NamedTuple):
    """Some rows of one request, within a batch."""

    request: _Request
    start: int
    stop: int


class Batcher:
    """Runs a predictor on worker threads for callers on one event loop."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        workers: int,
        max_batch: int,
        max_queue: int,
        queue_timeout: float = 30.0,
        observer: BatchObserver | None = None,
    ) -> None:
        """Prepare; `start` begins to work.

        Args:
            predictor: is called from `workers` threads.
            workers: how many batches run at a time.
            max_batch: images in a batch, at most.
            max_queue: images waiting, at most; a request beyond that is refused.
            queue_timeout: seconds after which a request that is still waiting is refused.
            observer: is told about requests and batches.
        """
        self.max_queue = max_queue
        self._predictor = predictor
        self._max_batch = max_batch
        self._queue_timeout = queue_timeout
        self._observer = observer
        self._requests: deque[_Request] = deque()
        self._waiting_rows = 0
        self._workers = workers
        self._in_flight = 0
        self._dispatch_scheduled = False
        self._jobs: SimpleQueue[list[_Part] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._settled = asyncio.Event()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._threads: list[threading.Thread] = []

    @property
    def waiting(self) -> int:
        """How many images wait for their turn."""
        return self._waiting_rows

    @property
    def accepting(self) -> bool:
        """Whether a request would be taken now."""
        return self._accepting

    def start(self) -> None:
        """Start the worker threads; must be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._accepting = True
        for number in range(self._workers):
            thread = threading.Thread(target=self._work, name=f"predict-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    async def submit(self, images: NDArray[np.float32], limits: NDArray[np.float32] | None = None) -> Prediction:
        """Answer validated images, float32 (image, channel, height, width), in their order.

        A caller that is cancelled gives up its place, and its answer is thrown away. `limits`, float32 (image,
        exit - 1), goes to the predictor with the images; either every request brings its own or none does.

        Raises:
            QueueFull: if `max_queue` images would be exceeded.
            WaitedTooLong: if its turn did not come in time.
            PredictionFailed: if the model failed on it.
            Draining: before `start` and from `stop` on.
        """
        if not self._accepting:
            raise Draining
        rows = len(images)
        if self._waiting_rows + rows > self.max_queue:
            raise QueueFull
        assert self._loop is not None
        request = _Request(images, limits, self._loop.create_future())
        self._requests.append(request)
        self._waiting_rows += rows
        if self._in_flight < 2 * self._workers and not self._dispatch_scheduled:
            # not at once: whatever else arrived in this turn of the loop joins the batch, and it costs no waiting
            self._dispatch_scheduled = True
            self._loop.call_soon(self._dispatch)
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(self._queue_timeout, self._sweep)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._forget(request)
            raise

    async def stop(self, timeout: float) -> None:
        """Refuse new requests, finish the waiting ones for at most `timeout` seconds, and stop the threads."""
        self._accepting = False
        try:
            async with asyncio.timeout(timeout):
                while self._requests or self._in_flight:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            logger.warning("%d images were still waiting when the time to drain was over", self._waiting_rows)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        while self._requests:
            self._fail(self._requests[0], Draining())
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads if not self._in_flight else []:
            thread.join()
        self._threads.clear()

    def _dispatch(self) -> None:
        """Give every idle worker its share of what waits, and every busy one a full batch to go on with.

        A batch that is full gains nothing by waiting here, and a worker that finds it at once does not wait for us.
        """
        self._dispatch_scheduled = False
        while self._requests:
            idle = self._workers - self._in_flight
            if idle > 0:
                batch = self._take(min(self._max_batch, -(-self._waiting_rows // idle)))
            elif self._in_flight < 2 * self._workers and self._waiting_rows >= self._max_batch:
                batch = self._take(self._max_batch)
            else:
                return
            if batch:
                self._in_flight += 1
                self._jobs.put(batch)

    def _sweep(self) -> None:
        """Refuse what has waited too long, even while no worker comes to fetch anything."""
        assert self._loop is not None
        latest = time.perf_counter() - self._queue_timeout
        for request in list(self._requests):
            if request.arrived > latest:
                break
            if request.next_row == 0:
                self._fail(request, WaitedTooLong())
        # one timer for all: the next look is when the oldest of those that are left will be late, but not at once again
        oldest = next((request.arrived for request in self._requests if request.next_row == 0), None)
        pause = self._queue_timeout if oldest is None else max(oldest - latest, 0.001)
        self._sweep_timer = self._loop.call_later(pause, self._sweep) if self._requests else None

    def _take(self, max_rows: int) -> list[_Part]:
        """Take up to `max_rows` rows off the queue, oldest first."""
        batch: list[_Part] = []
        now = time.perf_counter()
        while max_rows and self._requests:
            request = self._requests[0]
            if request.next_row == 0:
                waited = now - request.arrived
                if waited > self._queue_timeout:
                    self._fail(request, WaitedTooLong())
                    continue
                if self._observer is not None:
                    self._observer.request_started(waited)
            start = request.next_row
            stop = min(start + max_rows, len(request.images))
            batch.append(_Part(request, start, stop))
            request.next_row = stop
            max_rows -= stop - start
            self._waiting_rows -= stop - start
            if stop == len(request.images):
                self._requests.popleft()
        return batch

    def _work(self) -> None:
        """Run batches until told to stop; on a worker thread."""
        assert self._loop is not None
        while (batch := self._jobs.get()) is not None:
            started = time.perf_counter()
            outcome: Prediction | BaseException
            try:
                outcome = self._predict(batch)
            except BaseException as error:  # noqa: BLE001 -- whatever it was, callers wait for an answer
                outcome = error
            seconds = time.perf_counter() - started
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, outcome, seconds)
            except RuntimeError:  # the loop was closed under us; nobody waits any more
                return

    def _predict(self, batch: list[_Part]) -> Prediction:
        limits = [request.limits[start:stop] for request, start, stop in batch if request.limits is not None]
        if len(batch) == 1:
            request, start, stop = batch[0]
            images = request.images[start:stop]
        else:
            images = np.concatenate([request.images[start:stop] for request, start, stop in batch])
        answer = self._predictor.predict(images, np.concatenate(limits)) if limits else self._predictor.predict(images)
        for values in answer:
            if values is not None and len(values) != len(images):
                raise RuntimeError(f"the model answered {len(values)} rows, expected {len(images)}")
        return answer

    def _finish(self, batch: list[_Part], outcome: Prediction | BaseException, seconds: float) -> None:
        """Hand a batch's answers to their requests; on the loop."""
        self._in_flight -= 1
        self._dispatch()  # first, so that the worker is busy while we answer
        if isinstance(outcome, BaseException):
            logger.error("a batch of %d requests failed", len(batch), exc_info=outcome)
            for part in batch:
                failure = PredictionFailed("the model failed on this batch")
                failure.__cause__ = outcome
                self._fail(part.request, failure)
        else:
            self._deliver(batch, outcome)
            if self._observer is not None:
                self._observer.batch_finished(outcome, seconds)
        self._settled.set()

    def _deliver(self, batch: list[_Part], answer: Prediction) -> None:
        row = 0
        for request, start, stop in batch:
            rows = stop - start
            own = Prediction(answer.probabilities[row : row + rows], answer.logits[row : row + rows])
            if answer.exits is not None:
                own = own._replace(exits=answer.exits[row : row + rows])
            row += rows
            if rows != len(request.images):
                own = self._collect(request, start, own)
            request.open_rows -= rows
            if request.open_rows == 0 and not request.future.done():
                request.future.set_result(own)

    @staticmethod
    def _collect(request: _Request, start: int, part: Prediction) -> Prediction:
        """Put a part of a request's answer in its place."""
        if request.answer is None:
            rows = len(request.images)
            kept = [values for values in part if values is not None]
            request.answer = Prediction(*(np.empty((rows, *values.shape[1:]), values.dtype) for values in kept))
        for whole, values in zip(request.answer, part, strict=True):
            if whole is not None and values is not None:
                whole[start : start + len(values)] = values
        return request.answer

    def _fail(self, request: _Request, error: Exception) -> None:
        self._forget(request)
        if not request.future.done():
            request.future.set_exception(error)

    def _forget(self, request: _Request) -> None:
        """Take what is left of a request off the queue."""
        if request.next_row < len(request.images):
            self._requests.remove(request)
            self._waiting_rows -= len(request.images) - request.next_row
            request.next_row = len(request.images)
            self._settled.set()
