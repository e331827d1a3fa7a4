import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from serving.batcher import Batcher, Draining, PredictionFailed, QueueFull, WaitedTooLong
from serving.engine import Prediction


class Echo:
    """Answers each image with its own first pixel, and remembers the batches."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.batches: list[list[float]] = []

    def predict(self, images: np.ndarray) -> Prediction:
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

    def predict(self, images: np.ndarray) -> Prediction:
        self.entered.set()
        assert self.opened.wait(10)
        return super().predict(images)


class Broken:
    """Fails on any batch that holds a 13."""

    def predict(self, images: np.ndarray) -> Prediction:
        if 13 in images:
            raise RuntimeError("thirteen")
        return Echo().predict(images)


def marked(*marks: float) -> np.ndarray:
    return np.array(marks, dtype=np.float32).reshape(-1, 1, 1, 1)


def run(predictor: Any, body: Callable[[Batcher], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        batcher = Batcher(predictor, **{"workers": 2, "max_batch": 8, "max_queue": 10_000, **options})
        batcher.start()
        try:
            async with asyncio.timeout(20):
                await body(batcher)
        finally:
            await batcher.stop(5)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_requests_each_get_exactly_their_own_rows(seed: int) -> None:
    rng = random.Random(seed)
    echo = Echo(pause=0.0005)

    async def one(batcher: Batcher, first: int, rows: int) -> None:
        await asyncio.sleep(rng.random() * 0.02)
        marks = np.arange(first, first + rows, dtype=np.float32)
        answer = await batcher.submit(marked(*marks))
        assert answer.probabilities.tolist() == np.stack([marks, marks + 0.5], axis=1).tolist()
        assert answer.logits.tolist() == np.stack([-marks, -marks], axis=1).tolist()

    async def body(batcher: Batcher) -> None:
        sizes = [rng.choice([1, 1, 1, 2, 3, 8, 9, 30]) for _ in range(120)]
        firsts = np.cumsum([0, *sizes]).tolist()
        await asyncio.gather(*(one(batcher, first, rows) for first, rows in zip(firsts, sizes, strict=False)))
        assert batcher.waiting == 0
        assert sorted(mark for batch in echo.batches for mark in batch) == list(range(sum(sizes)))

    run(echo, body, workers=rng.choice([1, 2, 3]), max_batch=rng.choice([1, 4, 8]))
    assert max(map(len, echo.batches)) <= 8


def test_a_lone_request_does_not_wait_for_company() -> None:
    async def body(batcher: Batcher) -> None:
        await batcher.submit(marked(0))
        started = time.perf_counter()
        for mark in range(20):
            await batcher.submit(marked(mark))
        assert time.perf_counter() - started < 1.0

    run(Echo(), body)


def test_what_waits_is_run_together_up_to_the_cap() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(batcher.submit(marked(mark))) for mark in range(1, 12)]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(first, *waiting)

    run(gate, body, workers=1)
    assert [len(batch) for batch in gate.batches] == [1, 8, 3]


def test_idle_workers_share_a_burst() -> None:
    echo = Echo(pause=0.01)

    async def body(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.submit(marked(mark)) for mark in range(8)))

    run(echo, body, workers=2)
    assert [len(batch) for batch in echo.batches] == [4, 4]


def test_a_busy_worker_has_its_next_full_batch_at_hand_but_never_a_part_of_one() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        tasks = [asyncio.create_task(batcher.submit(marked(0)))]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for waiting, marks in ((3, range(1, 4)), (0, range(4, 5)), (4, range(5, 9))):
            tasks += [asyncio.create_task(batcher.submit(marked(mark))) for mark in marks]
            await asyncio.sleep(0.01)
            assert batcher.waiting == waiting
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(gate, body, workers=1, max_batch=4)
    assert [len(batch) for batch in gate.batches] == [1, 4, 4]


def test_a_request_larger_than_a_batch_is_cut_and_put_together_again() -> None:
    echo = Echo()

    async def body(batcher: Batcher) -> None:
        answer = await batcher.submit(marked(*range(50)))
        assert answer.probabilities[:, 0].tolist() == list(range(50))

    run(echo, body)
    assert max(map(len, echo.batches)) <= 8


def test_a_full_queue_refuses_and_recovers() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(batcher.submit(marked(1, 2, 3)))
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(QueueFull):
            await batcher.submit(marked(4, 5))
        fits = asyncio.create_task(batcher.submit(marked(6)))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, waiting, fits)
        await batcher.submit(marked(7, 8, 9, 10))

    run(gate, body, workers=1, max_queue=4)


def test_a_failing_batch_fails_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    async def body(batcher: Batcher) -> None:
        outcomes = await asyncio.gather(*(batcher.submit(marked(mark)) for mark in (1, 13, 2)), return_exceptions=True)
        assert isinstance(outcomes[1], PredictionFailed)
        assert isinstance(outcomes[1].__cause__, RuntimeError)
        assert isinstance(outcomes[0], Prediction)
        assert isinstance(outcomes[2], Prediction)
        with pytest.raises(PredictionFailed):
            await batcher.submit(marked(*range(40)))  # of its five batches one fails
        assert (await batcher.submit(marked(3))).probabilities[0, 0] == 3
        assert batcher.waiting == 0

    with caplog.at_level(logging.CRITICAL, logger="manygates.serving"):
        run(Broken(), body, max_batch=1)


def test_a_predictor_that_answers_too_few_rows_fails_rather_than_mixing_them_up() -> None:
    class Short:
        def predict(self, images: np.ndarray) -> Prediction:
            return Echo().predict(images[1:])

    async def body(batcher: Batcher) -> None:
        with pytest.raises(PredictionFailed) as failure:
            await batcher.submit(marked(1, 2))
        assert "answered 0 rows, expected 1" in str(failure.value.__cause__)

    run(Short(), body)


def test_a_cancelled_request_gives_up_its_place() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        cancelled = asyncio.create_task(batcher.submit(marked(1, 2)))
        kept = asyncio.create_task(batcher.submit(marked(3)))
        await asyncio.sleep(0)
        cancelled.cancel()
        running.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        gate.opened.set()
        assert (await kept).probabilities[0, 0] == 3

    run(gate, body, workers=1)
    assert gate.batches == [[0.0], [3.0]]


def test_a_request_that_waited_too_long_is_refused_when_its_turn_comes() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        late = asyncio.create_task(batcher.submit(marked(1)))
        await asyncio.sleep(0.05)
        gate.opened.set()
        await running
        with pytest.raises(WaitedTooLong):
            await late

    run(gate, body, workers=1, queue_timeout=0.01)


def test_requests_that_wait_for_a_predictor_that_hangs_are_refused_in_time() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for _ in range(2):
            late = [asyncio.create_task(batcher.submit(marked(mark))) for mark in (1, 2)]
            for task in late:
                with pytest.raises(WaitedTooLong):
                    await task
            assert batcher.waiting == 0
        gate.opened.set()
        await running
        assert (await batcher.submit(marked(3))).probabilities[0, 0] == 3

    run(gate, body, workers=1, queue_timeout=0.02)


def test_a_request_in_its_time_is_not_refused_with_the_late_ones() -> None:
    gate = Gate()

    async def body(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(marked(0)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        late = asyncio.create_task(batcher.submit(marked(1)))
        await asyncio.sleep(0)
        batcher._requests[-1].arrived -= 3000
        fresh = asyncio.create_task(batcher.submit(marked(2)))
        await asyncio.sleep(0)
        batcher._sweep()
        with pytest.raises(WaitedTooLong):
            await late
        assert batcher.waiting == 1
        gate.opened.set()
        await running
        assert (await fresh).probabilities[0, 0] == 2

    run(gate, body, workers=1, queue_timeout=2000.0)


def test_stopping_finishes_what_waits_and_refuses_what_comes() -> None:
    echo = Echo(pause=0.01)

    async def main() -> None:
        batcher = Batcher(echo, workers=1, max_batch=2, max_queue=100)
        with pytest.raises(Draining):
            await batcher.submit(marked(0))
        batcher.start()
        waiting = [asyncio.create_task(batcher.submit(marked(mark))) for mark in range(7)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop(10))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await batcher.submit(marked(99))
        answers = await asyncio.gather(*waiting)
        await stopping
        assert [answer.probabilities[0, 0] for answer in answers] == list(range(7))
        assert not any(thread.name.startswith("predict-") for thread in threading.enumerate())

    asyncio.run(main())


def test_stopping_gives_up_after_its_timeout() -> None:
    gate = Gate()

    async def main() -> None:
        batcher = Batcher(gate, workers=1, max_batch=8, max_queue=100)
        batcher.start()
        waiting = [asyncio.create_task(batcher.submit(marked(0)))]
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        waiting.append(asyncio.create_task(batcher.submit(marked(1))))
        await asyncio.sleep(0)
        await batcher.stop(0.05)
        with pytest.raises(Draining):
            await waiting[1]
        gate.opened.set()
        await waiting[0]

    asyncio.run(main())
