"""How the embedded spool adds, changes and removes the rows of messages: put, and the end of a claim.

`put` and `end` touch pages that are at hand and run on the loop; the rest runs in the writer thread; all of it inside a batch's
transaction. Removing a row may touch its neighbours' pages. Where one of them is damaged the row stays, marked as ended and held: what
became of the message is stored all the same, or it would be sent again at every start.

State: an estimate of how much has been logged since the last checkpoint.
"""

from collections.abc import Iterable
from typing import NamedTuple

import apsw

from relay.spool import sqlite_schema as sql
from relay.spool.base import LeaseLost, Used
from relay.spool.records import id_of
from relay.spool.sqlite_claims import Again, Claims, Lease, Place
from relay.spool.sqlite_damage import DAMAGE

_ROW_BYTES = 2048  # what a message's rows and pages come to in the log, beside its content; an estimate

#: Rows for `message` and for `content`.
Puts = tuple[list[tuple[object, ...]], list[tuple[int, bytes]]]


class Ending(NamedTuple):
    """What is needed to settle one claim: rows of the delivery log, the bounce's, if there is one, and what was used of quotas.

    `values`: what changes in a message that goes back to a lane; None for one that has nobody left to serve.
    """

    lease: Lease
    values: tuple[object, ...] | None
    log: list[tuple[object, ...]]
    bounce: Puts | None
    used: tuple[Used, ...]


class Rows:
    """Rows of one database. Every method takes what one batch has of its kind."""

    def __init__(self, database: apsw.Connection, claims: Claims) -> None:
        self._database = database
        self._cursor = database.cursor()  # for what each batch does: to make one costs as much as to put a row
        self._claims = claims
        self.logged_bytes = 0
        self._used_damaged = False

    def put(self, arguments: list[Puts]) -> list[None]:
        rows: list[tuple[object, ...]] = []
        blobs: list[tuple[int, bytes]] = []
        for messages, contents in arguments:
            rows += messages
            blobs += contents
        self._cursor.executemany(sql.PUT_MESSAGE, rows)
        self._cursor.executemany(sql.PUT_CONTENT, blobs)
        self.logged(len(arguments), sum([len(octets) for _, octets in blobs]))
        return [None] * len(arguments)

    def end(self, endings: list[Ending]) -> list[list[int]]:
        """Remove messages that have nobody left to serve. Answers, for each, the content files that nobody needs any more."""
        leases = [lease for lease, _, _, _, _ in endings]
        before = self._database.total_changes()
        try:
            self._cursor.executemany(sql.END_MESSAGE, [(number, token) for number, token, _, _ in leases])
            if self._database.total_changes() - before != len(leases):
                raise LeaseLost(id_of(leases[0].number))  # of one of them: the batch is undone and each is tried alone
            files = self.forget([place for _, _, _, place in leases])
        except apsw.CorruptError as error:
            raise Again from error
        self._conclude(endings)
        return files

    def resume(self, endings: list[Ending]) -> list[list[int]]:
        """Give messages back to their lanes."""
        for lease, values, _, _, _ in endings:
            assert values is not None, "it is known what is next"
            try:
                self._database.execute(sql.CONTINUE, (*values, lease.number, lease.token))
            except apsw.CorruptError as error:
                raise Again from error
            if not self._database.changes():
                raise LeaseLost(id_of(lease.number))
        self._conclude(endings)
        return [[] for _ in endings]

    def end_beside_damage(self, endings: list[Ending]) -> list[list[int]]:
        """Store what became of messages whose rows cannot be removed or changed as they should."""
        for lease, values, _, _, _ in endings:
            self._claims.leave(lease.number, sql.STUCK if values is None else sql.LOST)
        self._conclude(endings)
        return [[] for _ in endings]

    def used(self, nows: list[float]) -> list[list[Used]]:
        """What quotas still count, at this time; nothing where damage keeps it from being read."""
        try:
            return [[] if self._used_damaged else self._used(now) for now in nows]
        except DAMAGE as error:
            self._used_damaged = True
            raise Again from error

    def _used(self, now: float) -> list[Used]:
        self._database.execute(sql.USED_AHEAD, {"now": int(now)})
        self._database.execute(sql.FORGET_AHEAD, {"now": int(now)})
        return [Used(*row) for row in self._database.execute(sql.USED, (now,))]

    def forget(self, places: Iterable[Place]) -> list[list[int]]:
        """Remove content that no message has any more. Answers, for each, the files that can go once this is committed."""
        files: list[list[int]] = []
        blobs: list[tuple[int]] = []
        for content, filed, shared in places:
            needed = shared and self._database.execute(sql.SHARING, (content,)).fetchone()
            files.append([content] if filed and not needed else [])
            if not filed and not needed:
                blobs.append((content,))
        self._cursor.executemany(sql.END_CONTENT, blobs)
        return files

    def logged(self, messages: int, octets: int = 0) -> None:
        """Keep the estimate."""
        self.logged_bytes += _ROW_BYTES * messages + octets

    def _conclude(self, endings: list[Ending]) -> None:
        """What every settle does beside: its bounce and its lines in the delivery log."""
        log: list[tuple[object, ...]] = []
        bounces: list[Puts] = []
        used: list[Used] = []
        for _, _, lines, bounce, of_quotas in endings:
            log += lines
            used += of_quotas
            if bounce is not None:
                bounces.append(bounce)
        if bounces:
            self.put(bounces)
        self._cursor.executemany(sql.PUT_LOG, log)
        if used and not self._used_damaged:
            self._use(used)
        self.logged(2 * len(endings))

    def _use(self, used: Iterable[Used]) -> None:
        """Add to what is known of quotas; that it is damaged must not keep mail from its end."""
        counts: dict[tuple[str, int, int], tuple[int, int]] = {}
        for upstream, seconds, start, transactions, recipients in used:
            before = counts.get((upstream, seconds, start), (0, 0))
            counts[upstream, seconds, start] = before[0] + transactions, before[1] + recipients
        try:
            self._database.executemany(sql.USE, [(*key, *count) for key, count in counts.items()])
        except apsw.CorruptError as error:
            self._used_damaged = True
            raise Again from error
