"""How a batch of operations becomes a transaction of the embedded spool, and whose fault it is when it does not.

A batch is prepared on the loop and committed in the writer thread (`spool.commit`): what is quick, adding and removing rows of pages
at hand, is done while preparing; what may wait for the disk is the thread's. When anything fails, everything is undone and each
operation gets a transaction of its own, so that only the culprit has the error.

State: whether the batch under way is prepared, and the last trouble.
"""

from collections.abc import Callable
from typing import Any

import apsw

from relay.spool.base import SpoolError, SpoolFull
from relay.spool.commit import Operation


class Batches:
    """The transactions of one connection. `quick`: the kinds of operations that are applied while preparing.

    `trouble` says in words why the last commit failed, and is None when it did not.
    """

    def __init__(self, database: apsw.Connection, *, quick: tuple[Callable[[list[Any]], list[Any]], ...]) -> None:
        self._database = database
        self._quick = quick
        self._prepared = False
        self.trouble: str | None = None

    def prepare(self, batch: list[Operation]) -> None:
        """On the loop, while the thread rests."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._run([operation for operation in batch if operation.run in self._quick])
            self._prepared = True
        except Exception:  # the thread finds out whose fault it is
            self._prepared = False

    def commit(self, batch: list[Operation]) -> None:
        """In the thread. Gives every operation a result or an error."""
        try:
            if self._prepared:
                self._run([operation for operation in batch if operation.run not in self._quick])
                self._database.execute("COMMIT")
                self.trouble = None
                return
        except Exception:
            self._prepared = False
        self._roll_back()
        for operation in batch:
            self._commit_alone(operation)

    def _commit_alone(self, operation: Operation) -> None:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._run([operation])
            self._database.execute("COMMIT")
            self.trouble = None
        except Exception as error:
            self._roll_back()
            operation.error = spool_error(error)
            if isinstance(error, apsw.Error):
                self.trouble = str(operation.error)

    def _run(self, batch: list[Operation]) -> None:
        """Apply operations inside the open transaction, each kind together."""
        kinds: dict[Callable[[list[Any]], list[Any]], list[Operation]] = {}
        for operation in batch:
            kinds.setdefault(operation.run, []).append(operation)
        for run, operations in kinds.items():
            results = run([operation.argument for operation in operations])
            for operation, result in zip(operations, results, strict=True):
                operation.result = result

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")


def spool_error(error: Exception) -> Exception:
    """The driver's error in the spool's words; anything else is a fault of ours and stays what it is."""
    if isinstance(error, apsw.FullError):
        return SpoolFull("no space left for the spool: the disk is full")
    if isinstance(error, apsw.Error):
        return SpoolError(f"the spool cannot be written: {error}")
    return error
