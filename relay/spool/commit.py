"""Group commit: operations are applied in batches, and each batch is one transaction with one fsync.

Whatever is submitted while a batch is being committed forms the next one, so a busy relay shares each fsync among many messages and
an idle one waits for nobody. Operations that can wait a moment (settles) ride along with the next that cannot.

A batch is prepared on the loop and committed by a thread of its own, which alone waits for the disk. Statements in the thread would
have to win the interpreter back from the loop one by one: measured, that made a commit five times as long as its work.

State: the operations that wait, and the batch that is under way. All of it belongs to the loop; the thread only gets and answers.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from relay.spool.base import SpoolError

#: How long an operation that rides waits for company. A settle that is lost in a crash costs a duplicate, not a message.
RIDE_SECONDS = 0.05

#: After this long without work the thread does its housekeeping (checkpoint, old log rows).
IDLE_SECONDS = 1.0

#: Behind a batch of at least CROWD operations the next one leaves so long after it at the earliest: on a disk that answers at once
#: batches would otherwise shrink until each message pays for a transaction of its own. Who is alone never waits.
GATHER_SECONDS = 0.0015
CROWD = 8


#: Takes the arguments of all operations of its kind in a batch and gives their results, so that a kind can share what is common.
Kind = Callable[[list[Any]], list[Any]]


@dataclass(slots=True, eq=False)
class Operations:
    """Those of one kind in a batch. What became of each, its result or its error, is put into `ends` and goes to its future."""

    run: Kind
    arguments: list[Any] = field(default_factory=list)
    futures: list[asyncio.Future[Any]] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)


Batch = list[Operations]


class GroupCommit:
    """Has `prepare(batch)` called on the loop and then `commit(batch)` in the thread for every batch; `housekeep()` in the thread when
    there is nothing to do. Never two of them at once.

    `commit` must give every operation its end. None of the three may raise; where `commit` does, its batch has failed.
    """

    def __init__(self, prepare: Callable[[Batch], None], commit: Callable[[Batch], None], housekeep: Callable[[], None]) -> None:
        self._prepare = prepare
        self._commit = commit
        self._housekeep = housekeep
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Kind, Operations] = {}
        self._urgent = False
        self._busy = False
        self._departed = 0.0
        self._crowd = 0
        self._departure: asyncio.Handle | None = None
        self._ride_timer: asyncio.TimerHandle | None = None
        self._idle_timer = self._loop.call_later(IDLE_SECONDS, self._rest)
        self._stopping = False
        self._arrival: asyncio.Future[None] | None = None
        self._work: queue.SimpleQueue[tuple[Callable[[], None], Batch] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="spool-writer", daemon=True)
        self._thread.start()

    def submit(self, run: Kind, argument: Any) -> asyncio.Future[Any]:
        """Have the operation committed as soon as the thread is free."""
        future = self._admit(run, argument)
        self._urgent = True
        self._arrange()
        return future

    def ride(self, run: Kind, argument: Any) -> asyncio.Future[Any]:
        """Have the operation committed with the next that is submitted, or alone after RIDE_SECONDS."""
        future = self._admit(run, argument)
        if self._ride_timer is None:
            self._ride_timer = self._loop.call_later(RIDE_SECONDS, self._hurry)
        return future

    async def stop(self) -> None:
        """Commit what waits, then end the thread."""
        self._stopping = True
        self._idle_timer.cancel()
        self._hurry()
        while self._waiting or self._busy:
            self._arrival = self._loop.create_future()
            await self._arrival
        self._work.put(None)
        await asyncio.to_thread(self._thread.join)

    def _admit(self, run: Kind, argument: Any) -> asyncio.Future[Any]:
        if self._stopping:
            raise SpoolError("the spool is closed")
        operations = self._waiting.get(run)
        if operations is None:
            operations = self._waiting[run] = Operations(run)
        future = self._loop.create_future()
        operations.arguments.append(argument)
        operations.futures.append(future)
        return future

    def _hurry(self) -> None:
        """What rides has waited long enough."""
        if self._ride_timer is not None:
            self._ride_timer.cancel()
            self._ride_timer = None
        if self._waiting:
            self._urgent = True
            self._arrange()

    def _arrange(self) -> None:
        """Set the next batch's departure, unless one is under way or nobody is in a hurry."""
        if self._busy or self._departure is not None or not self._urgent:
            return
        pause = self._departed + GATHER_SECONDS - self._loop.time() if self._crowd >= CROWD else 0.0
        self._departure = self._loop.call_later(pause, self._depart) if pause > 0 else self._loop.call_soon(self._depart)

    def _depart(self) -> None:
        self._departure = None
        batch, self._waiting = list(self._waiting.values()), {}
        self._urgent, self._busy, self._departed = False, True, self._loop.time()
        self._crowd = sum([len(operations.futures) for operations in batch])
        self._prepare(batch)
        self._work.put((partial(self._commit, batch), batch))

    def _rest(self) -> None:
        self._idle_timer = self._loop.call_later(IDLE_SECONDS, self._rest)
        if not self._busy and self._departure is None and self._loop.time() - self._departed >= IDLE_SECONDS:
            self._busy = True
            self._work.put((self._housekeep, []))

    def _arrive(self, batch: Batch) -> None:
        self._busy = False
        for operations in batch:
            for future, end in zip(operations.futures, operations.ends, strict=True):
                if future.done():
                    continue  # cancelled
                if isinstance(end, Exception):
                    future.set_exception(end)
                else:
                    future.set_result(end)
        self._arrange()
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _serve(self) -> None:
        while (order := self._work.get()) is not None:
            work, batch = order
            try:
                work()
            except Exception as error:  # without this thread every client would wait for ever; what is not known to be stored is not
                self._loop.call_soon_threadsafe(self._loop.call_exception_handler, {"message": "the spool's writer", "exception": error})
                for operations in batch:
                    operations.ends = [SpoolError(f"local error in the spool: {error}") for _ in operations.futures]
            self._loop.call_soon_threadsafe(self._arrive, batch)
