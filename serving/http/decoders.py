"""A few threads that decode image files beside the event loop.

`concurrent.futures` would do, but for one thing: the interpreter waits for its threads when it exits, so one file that
takes long would hold up a server that was told to stop. These are daemons.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

Work = Callable[[], NDArray[np.float32]]


@dataclass(slots=True)
class _Job:
    """One file to decode, and who waits for it."""

    work: Work | None
    """None once nobody waits: the file is not held until a thread is free."""
    future: "asyncio.Future[NDArray[np.float32]]"


class Decoders:
    """Runs work on threads for callers on one event loop, in the order it came."""

    def __init__(self, threads: int) -> None:
        """Start `threads` threads; must be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._waiting: set[asyncio.Future[NDArray[np.float32]]] = set()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._run, name=f"decode-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many callers wait for an answer."""
        return len(self._waiting)

    async def run(self, work: Work) -> NDArray[np.float32]:
        """Return or raise what `work` does. A caller that is cancelled gives up its place."""
        future: asyncio.Future[NDArray[np.float32]] = self._loop.create_future()
        self._waiting.add(future)
        job = _Job(work, future)
        self._jobs.put(job)
        try:
            return await future
        finally:
            job.work = None
            self._waiting.discard(future)

    def stop(self) -> None:
        """Cancel whoever still waits, and let the threads end after what they are doing; waits for nothing."""
        for future in self._waiting:
            future.cancel()
        for _ in range(self._threads):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work = job.work
            if work is None or job.future.cancelled():
                continue
            answer: Any = None
            failure: BaseException | None = None
            try:
                answer = work()
            except BaseException as error:  # noqa: BLE001 -- whatever it was, the caller gets it
                failure = error
            try:
                self._loop.call_soon_threadsafe(_settle, job.future, answer, failure)
            except RuntimeError:  # the loop was closed under us; nobody waits any more
                return


def _settle(future: "asyncio.Future[Any]", answer: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(answer)
    else:
        future.set_exception(failure)
