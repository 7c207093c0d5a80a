"""Group commit: one thread applies operations in batches, and each batch is one transaction with one fsync.

Whatever is submitted while a batch is being committed forms the next one, so a busy relay shares each fsync among many messages and
an idle one waits for nobody. Operations that can wait a moment (settles) ride along with the next that cannot.

State: the operations not yet taken by the thread, and whether the thread sleeps; both under one lock.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from relay.spool.base import SpoolError

#: How long an operation that rides waits for company. A settle that is lost in a crash costs a duplicate, not a message.
RIDE_SECONDS = 0.05

#: After this long without work the thread does its housekeeping (checkpoint, old log rows).
IDLE_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Operation:
    """One request to the writer thread; its result or error goes to `future`.

    `run` takes the arguments of all operations of its kind in a batch and gives their results: so a kind can use one statement for
    many, and each statement less is one hand-over of the interpreter less between the writer and the loop.
    """

    run: Callable[[list[Any]], list[Any]]
    argument: Any
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class GroupCommit:
    """Runs `commit(batch)` in a thread of its own for every batch, and `housekeep()` when there is nothing to do.

    `commit` must give every operation a result or an error and must not raise.
    """

    def __init__(self, commit: Callable[[list[Operation]], None], housekeep: Callable[[], None]) -> None:
        self._commit = commit
        self._housekeep = housekeep
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._waiting: list[Operation] = []
        self._urgent = False
        self._sleeping = False
        self._stopping = False
        self._ride_timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._work, name="spool-writer", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[list[Any]], list[Any]], argument: Any) -> asyncio.Future[Any]:
        """Have the operation committed as soon as the thread is free."""
        operation = Operation(run, argument, self._loop.create_future())
        with self._lock:
            self._admit(operation)
            self._urgent = True
            wake, self._sleeping = self._sleeping, False
        if wake:
            self._wake.release()
        return operation.future

    def ride(self, run: Callable[[list[Any]], list[Any]], argument: Any) -> asyncio.Future[Any]:
        """Have the operation committed with the next that is submitted, or alone after RIDE_SECONDS."""
        operation = Operation(run, argument, self._loop.create_future())
        with self._lock:
            self._admit(operation)
        if self._ride_timer is None:
            self._ride_timer = self._loop.call_later(RIDE_SECONDS, self._depart)
        return operation.future

    async def stop(self) -> None:
        """Commit what waits, then end the thread."""
        if self._ride_timer is not None:
            self._ride_timer.cancel()
        with self._lock:
            self._stopping = True
            self._sleeping = False
        self._wake.release()
        await asyncio.to_thread(self._thread.join)

    def _admit(self, operation: Operation) -> None:
        if self._stopping:
            raise SpoolError("the spool is closed")
        self._waiting.append(operation)

    def _depart(self) -> None:
        self._ride_timer = None
        with self._lock:
            if not self._waiting:
                return
            self._urgent = True
            wake, self._sleeping = self._sleeping, False
        if wake:
            self._wake.release()

    def _work(self) -> None:
        while True:
            with self._lock:
                batch: list[Operation] = []
                if self._urgent or self._stopping:
                    batch, self._waiting = self._waiting, []
                    self._urgent = False
                self._sleeping = not batch
                stopping = self._stopping
            if batch:
                self._commit(batch)
                self._loop.call_soon_threadsafe(_resolve, batch)
            elif stopping:
                return
            elif not self._wake.acquire(timeout=IDLE_SECONDS):
                self._housekeep()


def _resolve(batch: list[Operation]) -> None:
    for operation in batch:
        if not operation.future.done():
            if operation.error is not None:
                operation.future.set_exception(operation.error)
            else:
                operation.future.set_result(operation.result)
