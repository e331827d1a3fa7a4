"""The requests that wait for one model, and whose turn it is.

This is state and rules alone: it starts no thread and calls no model. `serving.scheduling.scheduler` owns it on the
event loop. A request of many rows is cut into several batches, and a batch may hold parts of several requests.

Small requests come before bulk ones, but every fourth batch is bulk if any waits; among requests of one kind the oldest
is next.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.answers import Plan, Prediction, Predictor
from serving.operations.log import logger
from serving.operations.metrics import ModelMetrics

_BULK_EVERY: Final = 4
_GUESS_SECONDS: Final = 0.001
"""The assumed cost of an image before any was measured."""


class QueueFull(Exception):  # noqa: N818 -- says what happened
    """The queue holds as many images as it may; try again soon."""


class Draining(Exception):  # noqa: N818 -- says what happened
    """The queue has not started, or finishes its last requests."""


Outcome = Prediction | Exception
Done = Callable[[Outcome], None]


@dataclass(slots=True, eq=False)
class Ticket:
    """One caller's images in a queue, and how far they have got."""

    queue: "Queue"
    images: NDArray[Any]
    limits: NDArray[np.float32] | None
    done: Done | None
    lane: "deque[Ticket]"
    arrived: float
    started: float
    open_rows: int
    next_row: int = 0
    answer: Prediction | None = None
    timer: asyncio.TimerHandle | None = None

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


class Part(NamedTuple):
    """Some rows of one request, within a batch."""

    ticket: Ticket
    start: int
    stop: int


class Batch(NamedTuple):
    """Rows of one plan that are computed together."""

    queue: "Queue"
    parts: list[Part]
    plan: Plan | None
    wide: bool
    """Whether it may use every core."""
    guess: float
    """How many seconds of one core it is expected to take."""


class _Lanes(NamedTuple):
    """What waits for one plan."""

    small: deque[Ticket]
    bulk: deque[Ticket]


class Queue:
    """The requests that wait for one model."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_batch: int,
        max_queue: int,
        bulk_images: int = 0,
        queue_timeout: float = 30.0,
        weight: float = 1.0,
        observer: ModelMetrics | None = None,
    ) -> None:
        """Prepare; the scheduler opens it.

        Args:
            predictor: answers; it is called from several threads.
            max_batch: images in a batch, at most.
            max_queue: images waiting, at most.
            bulk_images: requests of more images than this yield to the others; 0 is `max_batch`.
            queue_timeout: seconds after which a request that is still waiting is refused.
            weight: the model's share of the workers, relative to the other models'.
            observer: is told about requests and batches; on the event loop's thread.
        """
        self.predictor = predictor
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.queue_timeout = queue_timeout
        self.weight = weight
        self.observer = observer
        self.virtual_time = 0.0
        """The processor time that it has had, for its weight."""
        self.waiting = 0
        """How many images wait for their turn."""
        self.accepting = False
        """Whether a request would be taken now."""
        self.seconds_per_image = _GUESS_SECONDS
        self.settled = asyncio.Event()
        """Set when the last open request is settled."""
        self.sweep_timer: asyncio.TimerHandle | None = None
        self._bulk_images = bulk_images or max_batch
        self._lanes: dict[Hashable, _Lanes] = {}
        self._computing: dict[int, Batch] = {}
        """By their identity."""
        self._open_tickets = 0
        self._batches = 0

    @property
    def idle(self) -> bool:
        """Whether every request was settled."""
        return self._open_tickets == 0

    def push(
        self,
        images: NDArray[Any],
        done: Done,
        limits: NDArray[np.float32] | None,
        plan: Plan | None,
        *,
        bulk: bool,
        now: float,
    ) -> Ticket:
        """Append a request; see `Scheduler.enter`, also for the errors."""
        if not self.accepting:
            raise Draining
        rows = len(images)
        if self.waiting + rows > self.max_queue:
            raise QueueFull
        lanes = self._lanes.get(plan)
        if lanes is None:
            lanes = self._lanes[plan] = _Lanes(deque(), deque())
        lane = lanes.bulk if bulk or rows * (1 if plan is None else plan.draws) > self._bulk_images else lanes.small
        ticket = Ticket(self, images, limits, done, lane, now, now, rows)
        lane.append(ticket)
        self.waiting += rows
        self._open_tickets += 1
        return ticket

    def take(self, max_rows: int, wide: bool, now: float, late: list[Ticket], *, full: bool = False) -> Batch | None:
        """Take up to `max_rows` rows of one plan, oldest first; None if nothing is left to compute.

        Requests that have waited too long leave the queue and are appended to `late`. With `full` nothing is taken if
        fewer rows wait for the plan whose turn it is.
        """
        plan, lane = self._choose()
        if full and not _holds(lane, max_rows):
            return None
        self._batches += 1
        parts: list[Part] = []
        rows = 0
        while rows < max_rows and lane:
            ticket = lane[0]
            start = ticket.next_row
            if start == 0:
                if now - ticket.arrived > self.queue_timeout:
                    self.forget(ticket)
                    late.append(ticket)
                    continue
                ticket.started = now
            stop = min(start + max_rows - rows, len(ticket.images))
            parts.append(Part(ticket, start, stop))
            ticket.next_row = stop
            rows += stop - start
            if stop == len(ticket.images):
                lane.popleft()
        self.waiting -= rows
        if not parts:
            return None
        batch = Batch(self, parts, plan, wide and rows == 1, rows * self.seconds_per_image)
        self._computing[id(batch)] = batch
        return batch

    def computed(self, batch: Batch) -> None:
        """Note that a batch came back."""
        self._computing.pop(id(batch), None)

    def answers(self, parts: list[Part], answer: Prediction) -> Iterator[tuple[Ticket, Prediction]]:
        """Yield the requests that a batch's answer completes, with their rows of it."""
        row = 0
        for ticket, start, stop in parts:
            rows, own = stop - start, answer
            if len(parts) > 1:
                end = row + rows
                own = Prediction(*(None if values is None else values[row:end] for values in answer))  # type: ignore[arg-type]
            row += rows
            if rows != len(ticket.images):
                own = _collected(ticket, start, own)
            ticket.open_rows -= rows
            if ticket.open_rows == 0 and ticket.done is not None:
                self._close_one()
                yield ticket, own

    def late(self, now: float) -> tuple[list[Ticket], float | None]:
        """Take off what has waited too long; return it, and in how many seconds to look again (None: nothing waits)."""
        latest = now - self.queue_timeout
        oldest = math.inf
        found: list[Ticket] = []
        for lanes in self._lanes.values():
            for lane in lanes:
                for ticket in lane:
                    if ticket.arrived > latest:
                        oldest = min(oldest, ticket.arrived)
                        break
                    if ticket.next_row == 0:
                        found.append(ticket)
        for ticket in found:
            self.forget(ticket)
        if not self.waiting:
            return found, None
        # one timer for all: the next look is when the oldest of those that are left will be late, but not at once again
        return found, self.queue_timeout if oldest == math.inf else max(oldest - latest, 0.001)

    def unanswered(self) -> list[Ticket]:
        """Return every request that waits or is being computed."""
        waiting = [ticket for lanes in self._lanes.values() for lane in lanes for ticket in lane]
        computing = [part.ticket for batch in self._computing.values() for part in batch.parts]
        return list(dict.fromkeys([*waiting, *computing]))

    def forget(self, ticket: Ticket) -> None:
        """Take what is left of a request off the queue; parts that are being computed are not delivered."""
        if ticket.next_row < len(ticket.images):
            ticket.lane.remove(ticket)
            self.waiting -= len(ticket.images) - ticket.next_row
            ticket.next_row = len(ticket.images)
        if ticket.open_rows >= 0:
            ticket.open_rows = -len(ticket.images)
            self._close_one()

    def _choose(self) -> tuple[Plan | None, deque[Ticket]]:
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

    def _close_one(self) -> None:
        self._open_tickets -= 1
        if not self._open_tickets:
            self.settled.set()


def _collected(ticket: Ticket, start: int, part: Prediction) -> Prediction:
    """Put a part of a request's answer in its place, and return the whole as far as it is known."""
    if ticket.answer is None:
        rows = len(ticket.images)
        empty = (None if each is None else np.empty((rows, *each.shape[1:]), each.dtype) for each in part)
        ticket.answer = Prediction(*empty)  # type: ignore[arg-type]
    for whole, values in zip(ticket.answer, part, strict=True):
        if whole is not None and values is not None:
            whole[start : start + len(values)] = values
    return ticket.answer


def _holds(lane: deque[Ticket], rows: int) -> bool:
    """Whether requests of at least so many rows wait in a lane."""
    for ticket in lane:
        rows -= len(ticket.images) - ticket.next_row
        if rows <= 0:
            return True
    return False
