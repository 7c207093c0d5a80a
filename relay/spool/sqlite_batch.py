"""How a batch of operations becomes a transaction of the embedded spool, and whose fault it is when it does not.

A batch is prepared on the loop and committed in the writer thread (`spool.commit`): what is quick, adding and removing rows of pages
at hand, is done while preparing; what may wait for the disk is the thread's. When anything fails, everything is undone and each
operation gets a transaction of its own, kind by kind, so that only the culprit has the error.

A commit whose fsync fails is sound to repeat: SQLite forgets its frames and writes them again at the same place, so nothing depends on
pages that the system has marked clean without writing them.

State: whether the batch under way is prepared, and how much had been changed when the last fault was met.
"""

import contextlib
import time
from typing import Any

import apsw

from relay.spool.base import SpoolError, SpoolFull
from relay.spool.commit import Batch, Kind, Operations
from relay.spool.room import Room

#: What says that the disk, and not the operation, is at fault. A damaged page is neither: the others can be written.
_FAULTS = (apsw.FullError, apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.NoMemError, apsw.BusyError, apsw.LockedError)

#: Another process may hold the database for a moment: a reader that recovers the log after a crash, a person with a shell.
_PATIENCE_SECONDS = 5.0

#: The part of the spool that this is, to `Room`.
DATABASE = "database"


class Batches:
    """The transactions of one connection. `quick`: the kinds of operations that are applied while preparing.

    `room` is told when the database cannot be written, and when it can again.
    """

    def __init__(self, database: apsw.Connection, room: Room, *, quick: tuple[Kind, ...]) -> None:
        self._database = database
        self._cursor = database.cursor()
        self._room = room
        self._quick = quick
        self._prepared = False
        self._changes = 0
        database.set_busy_timeout(0)  # the loop waits for nobody
        room.watch(DATABASE, self.probe)

    def prepare(self, batch: Batch) -> None:
        """On the loop, while the thread rests."""
        try:
            self._cursor.execute("BEGIN IMMEDIATE")
            for operations in batch:
                if operations.run in self._quick:
                    _apply(operations)
            self._prepared = True
        except Exception:  # the thread finds out whose fault it is
            self._prepared = False

    def commit(self, batch: Batch) -> None:
        """In the thread. Gives every operation its end."""
        try:
            if self._prepared:
                for operations in batch:
                    if operations.run not in self._quick:
                        _apply(operations)
                self._cursor.execute("COMMIT")
                self._worked()
                return
        except Exception:
            self._prepared = False
        self._roll_back()
        patience = time.monotonic() + _PATIENCE_SECONDS
        for operations in batch:
            operations.ends = [self._commit_alone(operations.run, argument, patience) for argument in operations.arguments]
        self._database.set_busy_timeout(0)

    def probe(self) -> None:
        """In the thread, between batches: write something, and sync it."""
        try:
            version = self._database.pragma("user_version")
            self._database.execute("BEGIN IMMEDIATE")
            self._database.pragma("user_version", version)  # a page is written even where it says the same
            self._database.execute("COMMIT")
            self._room.works(DATABASE)
        except apsw.Error as error:
            self._failed(error)

    def _commit_alone(self, run: Kind, argument: Any, patience: float) -> Any:
        """Answers with the result or the error. `patience`: until when (monotonic seconds)."""
        self._database.set_busy_timeout(max(0, int(1000 * (patience - time.monotonic()))))
        try:
            self._database.execute("BEGIN IMMEDIATE")
            (result,) = run([argument])
            self._database.execute("COMMIT")
            self._worked()
        except Exception as error:
            self._failed(error)
            return spool_error(error)
        return result

    def _worked(self) -> None:
        """A commit that had nothing to write, such as a look for due mail that found none, proves nothing."""
        if self._room.faulty(DATABASE) and self._database.total_changes() > self._changes:
            self._room.works(DATABASE)

    def _failed(self, error: Exception) -> None:
        self._roll_back()
        if isinstance(error, _FAULTS):
            self._changes = self._database.total_changes()
            self._room.measure()
            self._room.failed(DATABASE, storage_fault(error))

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            with contextlib.suppress(apsw.Error):  # it may have to read; the next BEGIN says what is wrong
                self._database.execute("ROLLBACK")


def _apply(operations: Operations) -> None:
    """Inside the open transaction."""
    operations.ends = operations.run(operations.arguments)
    if len(operations.ends) != len(operations.arguments):  # before the commit: somebody would wait for ever
        raise RuntimeError(f"{len(operations.arguments)} operations have {len(operations.ends)} ends")


def spool_error(error: Exception) -> Exception:
    """The driver's error in the spool's words; anything else is a fault of ours and stays what it is."""
    return storage_fault(error) if isinstance(error, apsw.Error) else error


def storage_fault(error: apsw.Error) -> SpoolError:
    match error:
        case apsw.FullError():
            return SpoolFull("no space left for the spool: the disk is full")
        case apsw.ReadOnlyError():
            return SpoolError("the spool cannot be written: its database is read-only")
        case apsw.CorruptError() | apsw.NotADBError():
            return SpoolError(f"the spool's database is damaged: {error}")
        case apsw.BusyError() | apsw.LockedError():
            return SpoolError("the spool cannot be written: another process holds its database")
        case _:
            return SpoolError(f"the spool cannot be written: {error}")
