import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from serving.answers import Plan, Prediction, Predictor
from serving.protocol.choices import Asked
from serving.scheduling.queue import Draining, Outcome, Queue, QueueFull, Ticket
from serving.scheduling.scheduler import (
    DeadlineExceeded,
    PredictionFailed,
    Scheduler,
    WaitedTooLong,
)


class Line(Queue):
    """A queue and the scheduler that answers it."""

    def __init__(self, scheduler: Scheduler, predictor: Predictor, **options: Any) -> None:
        super().__init__(predictor, **options)
        self.scheduler = scheduler

    def enter(self, images: np.ndarray, done: Callable[[Outcome], None], **options: Any) -> Ticket:
        return self.scheduler.enter(self, images, done, None, Asked(**options))

    async def submit(self, images: np.ndarray, **options: Any) -> Prediction:
        return await self.scheduler.submit(self, images, None, Asked(**options))

    async def close(self, timeout: float) -> None:
        await self.scheduler.close(self, timeout)


class Echo(Predictor):
    """Answers each image with its own first pixel, and remembers the batches."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.batches: list[list[float]] = []

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        time.sleep(self.pause)
        marks = images[:, 0, 0, 0]
        self.batches.append(marks.tolist())
        return Prediction(np.stack([marks, marks + 0.5], axis=1), np.stack([-marks, -marks], axis=1))


class Gate(Echo):
    """An echo that waits until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.entered = threading.Event()

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        self.entered.set()
        assert self.opened.wait(10)
        return super().predict(images)


class Broken(Predictor):
    """Fails on any batch that holds a 13."""

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        if 13 in images:
            raise RuntimeError("thirteen")
        return Echo().predict(images)


def marked(*marks: float) -> np.ndarray:
    return np.array(marks, dtype=np.float32).reshape(-1, 1, 1, 1)


@asynccontextmanager
async def running(*queues: Line, scheduler: Scheduler) -> Any:
    """Take requests inside the block, for at most 20 seconds; afterwards nothing may be left of any of them."""
    scheduler.start()
    for queue in queues:
        scheduler.open(queue)
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        for queue in queues:
            await queue.close(5)
        while scheduler.in_flight:  # of callers who left
            await asyncio.sleep(0.001)
        scheduler.stop()
    for queue in queues:
        assert queue.waiting == 0
        assert queue.idle
        assert queue.unanswered() == []


def run(predictor: Any, body: Callable[[Line], Awaitable[None]], *, workers: int = 2, **options: Any) -> None:
    async def main() -> None:
        scheduler = Scheduler(workers)
        queue = Line(scheduler, predictor, **{"max_batch": 8, "max_queue": 10_000, **options})
        async with running(queue, scheduler=scheduler):
            await body(queue)

    asyncio.run(main())


def soon(queue: Line, *marks: float, **options: Any) -> "asyncio.Task[Prediction]":
    return asyncio.create_task(queue.submit(marked(*marks), **options))


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_requests_each_get_exactly_their_own_rows(seed: int) -> None:
    rng = random.Random(seed)
    echo = Echo(pause=0.0005)

    async def one(queue: Line, first: int, rows: int) -> None:
        await asyncio.sleep(rng.random() * 0.02)
        marks = np.arange(first, first + rows, dtype=np.float32)
        answer = await queue.submit(marked(*marks))
        assert answer.probabilities.tolist() == np.stack([marks, marks + 0.5], axis=1).tolist()
        assert answer.logits.tolist() == np.stack([-marks, -marks], axis=1).tolist()

    async def body(queue: Line) -> None:
        sizes = [rng.choice([1, 1, 1, 2, 3, 8, 9, 30]) for _ in range(120)]
        firsts = np.cumsum([0, *sizes]).tolist()
        await asyncio.gather(*(one(queue, first, rows) for first, rows in zip(firsts, sizes, strict=False)))
        assert queue.waiting == 0
        assert sorted(mark for batch in echo.batches for mark in batch) == list(range(sum(sizes)))

    run(echo, body, workers=rng.choice([1, 2, 3]), max_batch=rng.choice([1, 4, 8]))
    assert max(map(len, echo.batches)) <= 8


def test_a_lone_request_does_not_wait_for_company() -> None:
    async def body(queue: Line) -> None:
        await queue.submit(marked(0))
        started = time.perf_counter()
        for mark in range(20):
            await queue.submit(marked(mark))
        assert time.perf_counter() - started < 1.0

    run(Echo(), body)


def test_what_waits_is_run_together_up_to_the_cap() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        first = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(queue.submit(marked(mark))) for mark in range(1, 12)]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(first, *waiting)

    run(gate, body, workers=1)
    assert [len(batch) for batch in gate.batches] == [1, 8, 3]


def test_idle_workers_share_a_burst() -> None:
    echo = Echo(pause=0.01)

    async def body(queue: Line) -> None:
        await asyncio.gather(*(queue.submit(marked(mark)) for mark in range(8)))

    run(echo, body, workers=2)
    assert [len(batch) for batch in echo.batches] == [4, 4]


def test_a_busy_worker_has_its_next_full_batch_at_hand_but_never_a_part_of_one() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [asyncio.create_task(queue.submit(marked(0)))]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for waiting, marks in ((3, range(1, 4)), (0, range(4, 5)), (4, range(5, 9))):
            tasks += [asyncio.create_task(queue.submit(marked(mark))) for mark in marks]
            await asyncio.sleep(0.01)
            assert queue.waiting == waiting
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1, max_batch=4)
    assert [len(batch) for batch in gate.batches] == [1, 4, 4]


def test_a_request_larger_than_a_batch_is_cut_and_put_together_again() -> None:
    echo = Echo()

    async def body(queue: Line) -> None:
        answer = await queue.submit(marked(*range(50)))
        assert answer.probabilities[:, 0].tolist() == list(range(50))

    run(echo, body)
    assert max(map(len, echo.batches)) <= 8


def test_a_full_queue_refuses_and_recovers() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(queue.submit(marked(1, 2, 3)))
        await asyncio.sleep(0)
        assert queue.waiting == 3
        with pytest.raises(QueueFull):
            await queue.submit(marked(4, 5))
        fits = asyncio.create_task(queue.submit(marked(6)))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, waiting, fits)
        await queue.submit(marked(7, 8, 9, 10))

    run(gate, body, workers=1, max_queue=4)


def test_a_failing_batch_fails_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    async def body(queue: Line) -> None:
        outcomes = await asyncio.gather(*(queue.submit(marked(mark)) for mark in (1, 13, 2)), return_exceptions=True)
        assert isinstance(outcomes[1], PredictionFailed)
        assert isinstance(outcomes[1].__cause__, RuntimeError)
        assert isinstance(outcomes[0], Prediction)
        assert isinstance(outcomes[2], Prediction)
        with pytest.raises(PredictionFailed):
            await queue.submit(marked(*range(40)))  # of its five batches one fails
        assert (await queue.submit(marked(3))).probabilities[0, 0] == 3
        assert queue.waiting == 0

    with caplog.at_level(logging.CRITICAL, logger="manygates.serving"):
        run(Broken(), body, max_batch=1)


def test_a_predictor_that_answers_too_few_rows_fails_rather_than_mixing_them_up() -> None:
    class Short:
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            return Echo().predict(images[1:])

    async def body(queue: Line) -> None:
        with pytest.raises(PredictionFailed) as failure:
            await queue.submit(marked(1, 2))
        assert "answered 0 rows, expected 1" in str(failure.value.__cause__)

    run(Short(), body)


def test_a_cancelled_request_gives_up_its_place() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        cancelled = asyncio.create_task(queue.submit(marked(1, 2)))
        kept = asyncio.create_task(queue.submit(marked(3)))
        await asyncio.sleep(0)
        cancelled.cancel()
        running.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert queue.waiting == 1
        gate.opened.set()
        assert (await kept).probabilities[0, 0] == 3

    run(gate, body, workers=1)
    assert gate.batches == [[0.0], [3.0]]


def test_a_request_that_waited_too_long_is_refused_when_its_turn_comes() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        late = asyncio.create_task(queue.submit(marked(1)))
        await asyncio.sleep(0.05)
        gate.opened.set()
        await running
        with pytest.raises(WaitedTooLong):
            await late

    run(gate, body, workers=1, queue_timeout=0.01)


def test_requests_that_wait_for_a_predictor_that_hangs_are_refused_in_time() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for _ in range(2):
            late = [asyncio.create_task(queue.submit(marked(mark))) for mark in (1, 2)]
            for task in late:
                with pytest.raises(WaitedTooLong):
                    await task
            assert queue.waiting == 0
        gate.opened.set()
        await running
        assert (await queue.submit(marked(3))).probabilities[0, 0] == 3

    run(gate, body, workers=1, queue_timeout=0.02)


def test_a_request_in_its_time_is_not_refused_with_the_late_ones() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = asyncio.create_task(queue.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        late = asyncio.create_task(queue.submit(marked(1)))
        await asyncio.sleep(0.5)
        fresh = asyncio.create_task(queue.submit(marked(2)))
        with pytest.raises(WaitedTooLong):
            await late
        assert queue.waiting == 1
        gate.opened.set()
        await running
        assert (await fresh).probabilities[0, 0] == 2

    run(gate, body, workers=1, queue_timeout=1.0)


def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    echo = Echo(pause=0.01)

    async def main() -> None:
        scheduler = Scheduler(1)
        queue = Line(scheduler, echo, max_batch=2, max_queue=100)
        with pytest.raises(Draining):
            await queue.submit(marked(0))
        scheduler.start()
        with pytest.raises(Draining):
            await queue.submit(marked(0))
        scheduler.open(queue)
        waiting = [asyncio.create_task(queue.submit(marked(mark))) for mark in range(7)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(queue.close(10))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await queue.submit(marked(99))
        answers = await asyncio.gather(*waiting)
        await closing
        scheduler.stop()
        assert [answer.probabilities[0, 0] for answer in answers] == list(range(7))
        assert not any(thread.name.startswith("predict-") for thread in threading.enumerate())

    asyncio.run(main())


def test_closing_gives_up_after_its_timeout_and_tells_everybody() -> None:
    gate = Gate()

    async def main() -> None:
        scheduler = Scheduler(1)
        queue = Line(scheduler, gate, max_batch=8, max_queue=100)
        scheduler.start()
        scheduler.open(queue)
        waiting = [asyncio.create_task(queue.submit(marked(0)))]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting.append(asyncio.create_task(queue.submit(marked(1))))
        await asyncio.sleep(0)
        await queue.close(0.05)
        for task in waiting:
            with pytest.raises(Draining):
                await task
        scheduler.stop()
        gate.opened.set()
        while scheduler.in_flight:
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_closing_one_queue_leaves_the_others_to_go_on() -> None:
    async def main() -> None:
        scheduler, gate = Scheduler(1), Gate()
        going, kept = (Line(scheduler, predictor, max_batch=4, max_queue=100) for predictor in (gate, Echo()))
        async with running(going, kept, scheduler=scheduler):
            tasks = [soon(going, mark) for mark in range(6)]
            await until(gate.entered)
            others = [soon(kept, 10), soon(kept, 11)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(going.close(10))
            await asyncio.sleep(0)
            with pytest.raises(Draining):
                await going.submit(marked(7))
            others.append(soon(kept, 12))
            gate.opened.set()
            await closing
            assert [task.result().probabilities[0, 0] for task in tasks] == [0, 1, 2, 3, 4, 5]
            assert [(await task).probabilities[0, 0] for task in others] == [10, 11, 12]
            assert (await kept.submit(marked(13))).probabilities[0, 0] == 13

    asyncio.run(main())


def test_levels_are_divided_by_255_also_when_they_share_a_batch_with_floats() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0.0)]
        await until(gate.entered)
        levels = [np.full((2, 1, 1, 1), level, dtype=np.uint8) for level in (255, 51)]
        tasks += [asyncio.create_task(queue.submit(images)) for images in levels]
        tasks.append(soon(queue, 0.5))
        await asyncio.sleep(0)
        gate.opened.set()
        answers = [(await task).probabilities[:, 0] for task in tasks]
        assert [answer.dtype for answer in answers] == [np.float32] * 4
        expected = [0.0, 1.0, 1.0, np.float32(51) / np.float32(255), np.float32(51) / np.float32(255), 0.5]
        assert np.concatenate(answers).tolist() == expected

    run(gate, body, workers=1)
    assert [len(batch) for batch in gate.batches] == [1, 5]


def test_a_caller_whose_answer_cannot_be_taken_costs_no_one_else_theirs(caplog: pytest.LogCaptureFixture) -> None:
    def broken(outcome: Outcome) -> None:
        raise KeyError("a defect of ours")

    gate = Gate()

    async def body(queue: Line) -> None:
        first = soon(queue, 0)
        await until(gate.entered)
        tasks = [soon(queue, 1)]
        await asyncio.sleep(0)
        queue.enter(marked(2), broken)
        queue.enter(marked(2), broken, timeout=0.01)
        tasks.append(soon(queue, 3))
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert [(await task).probabilities[0, 0] for task in (first, *tasks)] == [0, 1, 3]

    with caplog.at_level(logging.ERROR, logger="manygates.serving"):
        run(gate, body, workers=1)
    assert gate.batches == [[0], [1, 2, 3]]
    assert caplog.text.count("an answer could not be handed over") == 2


# --- who comes first ---


def test_a_small_request_overtakes_bulk_ones_that_came_before_it() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(gate.entered)
        tasks += [soon(queue, *[100] * 24), soon(queue, *[200] * 24)]
        tasks += [soon(queue, mark) for mark in (1, 2)]
        tasks.append(soon(queue, *[3] * 8))  # as many as a batch holds is small still
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1)
    assert gate.batches[:3] == [[0], [1, 2, 3, 3, 3, 3, 3, 3], [3, 3]]
    assert [batch[0] for batch in gate.batches[3:]] == [100] * 3 + [200] * 3


def test_bulk_gets_every_fourth_batch_however_many_small_ones_wait() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(gate.entered)
        tasks += [soon(queue, 1) for _ in range(80)]
        tasks.append(soon(queue, *[100] * 16))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1, max_batch=4, bulk_images=8)
    kinds = ["bulk" if 100 in batch else "small" for batch in gate.batches]
    turns = [turn for turn, kind in enumerate(kinds) if kind == "bulk"]
    assert len(turns) == 4
    assert turns[0] < 4
    assert np.diff(turns).tolist() == [4, 4, 4]
    assert len(kinds) == 1 + 20 + 4, "no batch was given away half empty"


def test_what_says_itself_that_it_is_bulk_yields_however_small_it_is() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(gate.entered)
        tasks += [soon(queue, 1, bulk=True), soon(queue, 2, bulk=True), soon(queue, 3), soon(queue, 4)]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1, max_batch=2)
    assert gate.batches == [[0], [3, 4], [1, 2]]


class Planner(Echo):
    """Answers by the plan that it is told, and remembers which batch had which; or does not know of plans."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(pause)
        self.modes = ("single", "random")
        self.plans: list[tuple[Plan | None, list[float]]] = []

    def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
        answer = super().predict(images)
        self.plans.append((plan, images[:, 0, 0, 0].tolist()))
        return answer._replace(logits=np.full_like(answer.logits, number_of(plan)))


def number_of(plan: Plan | None) -> int:
    return {None: -1, "single": 0, "ensemble": 100, "random": 200}[plan and plan.mode] + (plan.draws if plan else 0)


def test_requests_of_different_plans_never_share_a_batch() -> None:
    planner = Planner(pause=0.001)
    plans = [None, Plan("single"), Plan("random"), Plan("random", 3)]

    async def body(queue: Line) -> None:
        tasks = [(mark, soon(queue, mark, mark, plan=plans[mark % 4])) for mark in range(80)]
        for mark, task in tasks:
            answer = await task
            assert answer.probabilities[:, 0].tolist() == [mark, mark]
            assert set(answer.logits.ravel()) == {number_of(plans[mark % 4])}

    run(planner, body)
    for plan, marks in planner.plans:
        assert {plans[int(mark) % 4] for mark in marks} == {plan}
    assert max(len(marks) for _, marks in planner.plans) == 8, "requests of one plan did not share batches"


def test_plans_take_turns_by_their_oldest_request_and_none_is_run_before_its_batch_is_full_or_its_turn_comes() -> None:
    opened, entered, batches = threading.Event(), threading.Event(), []

    class Waiting(Planner):
        def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
            entered.set()
            assert opened.wait(10)
            batches.append(images[:, 0, 0, 0].tolist())
            return super().predict(images, plan=plan)

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(entered)
        for mark in range(1, 8):
            tasks.append(soon(queue, mark, plan=Plan("random", 1 + mark % 3)))
            await asyncio.sleep(0.002)
        assert queue.waiting == 5, "the first of them that made up a batch is at hand"
        opened.set()
        await asyncio.gather(*tasks)

    run(Waiting(), body, workers=1, max_batch=2, bulk_images=8)
    assert batches == [[0], [1, 4], [2, 5], [3, 6], [7]]


# --- deadlines ---


def test_a_deadline_in_the_queue_frees_its_place_at_its_time() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = soon(queue, 0)
        await until(gate.entered)
        started = time.perf_counter()
        late = soon(queue, 1, 2, timeout=0.05)
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await queue.submit(marked(3))
        with pytest.raises(DeadlineExceeded):
            await late
        assert 0.045 < time.perf_counter() - started < 2
        assert queue.waiting == 0
        fits = soon(queue, 3, 4)
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, fits)

    run(gate, body, workers=1, max_queue=2)
    assert gate.batches == [[0], [3, 4]]


def test_a_deadline_while_it_is_computed_is_kept_and_the_answer_thrown_away() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        beside = soon(queue, 1)
        late = soon(queue, 0, timeout=0.05)
        await until(gate.entered)
        with pytest.raises(DeadlineExceeded):
            await late
        assert not gate.opened.is_set()
        gate.opened.set()
        assert (await beside).probabilities[0, 0] == 1
        assert (await queue.submit(marked(2))).probabilities[0, 0] == 2

    run(gate, body, workers=1)
    assert gate.batches == [[1, 0], [2]]


def test_what_is_left_of_a_large_request_after_its_deadline_is_not_computed() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        late = soon(queue, *range(100), timeout=0.05)
        with pytest.raises(DeadlineExceeded):
            await late
        assert queue.waiting == 0
        gate.opened.set()
        assert (await queue.submit(marked(200))).probabilities[0, 0] == 200

    run(gate, body, workers=1, max_batch=4)
    assert gate.batches[-1] == [200]
    assert len(gate.batches) <= 3, "one that was computed, and one at hand"


def test_an_answer_in_time_leaves_no_timer_behind() -> None:
    async def body(queue: Line) -> None:
        outcomes: list[Outcome] = []
        ticket = queue.enter(marked(1), outcomes.append, timeout=0.05)
        timer = ticket.timer
        assert timer is not None
        while not outcomes:
            await asyncio.sleep(0.001)
        assert timer.cancelled()
        await asyncio.sleep(0.06)
        assert len(outcomes) == 1
        assert isinstance(outcomes[0], Prediction)

    run(Echo(), body)


def test_a_caller_that_left_hears_nothing_more() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        running = soon(queue, 0)
        await until(gate.entered)
        outcomes: list[Outcome] = []
        ticket = queue.enter(marked(1), outcomes.append, timeout=0.01)
        queue.scheduler.leave(ticket)
        queue.scheduler.leave(ticket)
        assert queue.waiting == 0
        await asyncio.sleep(0.02)
        gate.opened.set()
        await running
        queue.scheduler.leave(ticket)
        assert outcomes == []

    run(gate, body, workers=1)


# --- several models ---


class Clock(threading.local):
    """What the scheduler takes for the time: computing takes as long as a model says, on its thread alone."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Busy(Echo):
    """Takes a while by the clock, and remembers for how long."""

    def __init__(self, name: str, seconds: float, clock: Clock, log: list[tuple[str, float]]) -> None:
        super().__init__()
        self.name, self.seconds, self.clock, self.log = name, seconds, clock, log

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        self.clock.now += self.seconds
        self.log.append((self.name, self.seconds))
        return super().predict(images)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("serving.scheduling.scheduler.time", clock)
    return clock


def seconds_of(log: list[tuple[str, float]], name: str) -> float:
    return sum(seconds for named, seconds in log if named == name)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(
    ("weights", "seconds"),
    [
        ((1.0, 1.0), (0.002, 0.002)),
        ((3.0, 1.0), (0.002, 0.002)),
        ((0.1, 1.0), (0.002, 0.002)),
        ((1.0, 1.0), (0.08, 0.01)),
        ((1.0, 2.0), (0.01, 0.05)),
    ],
)
def test_two_busy_models_share_the_computing_time_by_their_weights(
    clock: Clock, weights: tuple[float, float], seconds: tuple[float, float], workers: int
) -> None:
    log: list[tuple[str, float]] = []

    async def main() -> None:
        scheduler = Scheduler(workers)
        queues = [
            Line(scheduler, Busy(name, each, clock, log), max_batch=4, max_queue=10_000, weight=weight)
            for name, each, weight in zip("ab", seconds, weights, strict=True)
        ]
        async with running(*queues, scheduler=scheduler):
            tasks = [soon(queue, mark) for queue in queues for mark in range(2000)]
            await asyncio.sleep(0)
            while all(queue.waiting for queue in queues):
                both_busy = len(log)
                await asyncio.sleep(0)
            del log[both_busy:]
            for task in tasks:
                task.cancel()

    asyncio.run(main())
    assert len(log) > 400
    shares = [seconds_of(log, name) / weight for name, weight in zip("ab", weights, strict=True)]
    # in no share more than the batches that a worker computes and has at hand, whose time was not known yet
    slack = 2 * (workers + 1) * max(each / weight for each, weight in zip(seconds, weights, strict=True))
    assert abs(shares[0] - shares[1]) <= slack
    assert slack < 0.25 * max(shares)


def test_a_model_that_was_idle_has_no_claim_on_the_past_and_need_not_wait_for_it_either(clock: Clock) -> None:
    log: list[tuple[str, float]] = []

    async def main() -> None:
        scheduler = Scheduler(1)
        first, second = (Line(scheduler, Busy(n, 0.01, clock, log), max_batch=4, max_queue=10_000) for n in "ab")
        async with running(first, second, scheduler=scheduler):
            await second.submit(marked(0))
            tasks = [soon(first, mark) for mark in range(2000)]
            while len(log) < 100:
                await asyncio.sleep(0)
            woken = len(log)
            tasks += [soon(second, mark) for mark in range(400)]
            while second.waiting or len(log) < woken + 50:
                await asyncio.sleep(0)
            assert first.waiting
            names = [name for name, _ in log[woken:]]
            start = names.index("b")
            assert start < 20
            assert 18 <= names[start : start + 40].count("b") <= 22
            for task in tasks:
                task.cancel()

    asyncio.run(main())


# --- lone images ---


class Broad(Echo):
    """Can use every core for one image, and remembers when it was told to."""

    wide = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, bool]] = []

    def predict(self, images: np.ndarray, *_: Any, wide: bool = False, **__: Any) -> Prediction:
        self.told.append((len(images), wide))
        return super().predict(images)


def test_a_lone_image_is_run_wide_and_two_are_not() -> None:
    broad = Broad()

    async def body(queue: Line) -> None:
        await queue.submit(marked(0))
        await asyncio.gather(queue.submit(marked(1)), queue.submit(marked(2)))
        await queue.submit(marked(3, 4))
        await queue.submit(marked(5))

    run(broad, body)
    assert broad.told[0] == (1, True)
    assert sorted(broad.told[1:3]) == [(1, False), (1, False)]
    assert sorted(broad.told[3:5]) == [(1, False), (1, False)]
    assert broad.told[5] == (1, True)


def test_the_only_worker_runs_nothing_wide() -> None:
    broad = Broad()

    async def body(queue: Line) -> None:
        await queue.submit(marked(0))

    run(broad, body, workers=1)
    assert broad.told == [(1, False)]


def test_what_comes_while_a_wide_one_runs_does_not_compete_with_it() -> None:
    entered, opened, beside = threading.Event(), threading.Event(), []

    class Slow(Broad):
        def predict(self, images: np.ndarray, *_: Any, wide: bool = False, **__: Any) -> Prediction:
            if wide and not entered.is_set():
                entered.set()
                assert opened.wait(10)
            elif not opened.is_set():
                beside.append(len(images))
            return super().predict(images, wide)

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(entered)
        tasks += [soon(queue, mark) for mark in (1, 2, 3)]
        await asyncio.sleep(0.02)
        assert queue.waiting == 3
        opened.set()
        await asyncio.gather(*tasks)

    run(Slow(), body)
    assert beside == []


# --- everything at once ---


class Fickle(Planner):
    """Fails on any batch that holds a 13."""

    def predict(self, images: np.ndarray, *_: Any, plan: Plan | None = None, **__: Any) -> Prediction:
        if 13 in images:
            raise RuntimeError("thirteen")
        return super().predict(images, plan=plan)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_everybody_gets_their_own_rows_or_one_failure_and_nothing_is_left(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    plans = [None, Plan("single"), Plan("random", 2)]
    heard: Counter[int] = Counter()
    left: set[int] = set()
    answered = 0

    async def one(queue: Line, number: int) -> None:
        nonlocal answered
        await asyncio.sleep(rng.random() * 0.1)
        rows, plan = rng.choice([1, 1, 1, 2, 5, 8, 9, 40]), rng.choice(plans)
        marks = [13.0] if rng.random() < 0.02 else [1000.0 * number + row for row in range(rows)]
        timeout = rng.choice([None, None, None, 10.0, 0.02, 0.002])
        finished = asyncio.Event()
        outcomes: list[Outcome] = []

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            heard[number] += 1
            finished.set()

        try:
            ticket = queue.enter(marked(*marks), done, plan=plan, timeout=timeout, bulk=rng.random() < 0.2)
        except QueueFull:
            heard[number] += 1
            return
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.02)
            if not outcomes:
                left.add(number)
                queue.scheduler.leave(ticket)
                return
        await finished.wait()
        assert ticket.timer is None
        [outcome] = outcomes
        if isinstance(outcome, Exception):
            assert isinstance(outcome, (PredictionFailed, DeadlineExceeded, WaitedTooLong))
            assert not isinstance(outcome, DeadlineExceeded) or timeout is not None
            return
        answered += 1
        assert outcome.probabilities[:, 0].tolist() == marks
        assert set(outcome.logits.ravel()) == {number_of(plan)}

    async def main() -> None:
        scheduler = Scheduler(rng.choice([1, 2, 3]))
        queues = [
            Line(scheduler, Fickle(pause=0.0005), max_batch=rng.choice([1, 4, 8]), max_queue=200, weight=weight)
            for weight in (1.0, 2.0)
        ]
        async with running(*queues, scheduler=scheduler):
            await asyncio.gather(*(one(rng.choice(queues), number) for number in range(200)))
            assert [queue.waiting for queue in queues] == [0, 0]

    with caplog.at_level(logging.CRITICAL, logger="manygates.serving"):
        asyncio.run(main())
    assert {number: heard[number] for number in range(200)} == {
        number: int(number not in left) for number in range(200)
    }
    assert answered > 40


def test_draws_that_a_request_chose_count_as_images_and_those_of_the_operator_do_not() -> None:
    gate = Gate()

    async def body(queue: Line) -> None:
        tasks = [soon(queue, 0)]
        await until(gate.entered)
        tasks += [soon(queue, *[100] * 2, plan=Plan("random", 64)), soon(queue, *[1] * 8)]
        tasks += [soon(queue, 2, plan=Plan("random", 8))]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1)
    assert [batch[0] for batch in gate.batches] == [0, 1, 2, 100]
