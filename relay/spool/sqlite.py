"""The embedded spool: one SQLite database in WAL mode with synchronous=FULL, and files for large content.

Exactly one connection writes and checkpoints; `spool.commit` hands it between the loop, which adds and removes rows, and the writer
thread, which does all that may wait for the disk. The operator's commands read through `spool.sqlite_view`. Driver: apsw, because its
wheel carries a SQLite without the WAL-reset corruption (fixed in 3.51.3) that the interpreters' own library has, and because a test
can give it a VFS that fails.

State: the database, the content files, and the tokens of the claims that this process has given out. All claims of an earlier
process are taken over at start: whoever they were for is in doubt (law 4).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from relay.clock import Clock
from relay.mail.outcome import Status
from relay.spool import sqlite_schema as sql
from relay.spool.base import (
    FILE_ABOVE_BYTES,
    Claim,
    Content,
    ContentWriter,
    Draft,
    Lane,
    LeaseLost,
    MessageId,
    Settlement,
    SpoolError,
)
from relay.spool.commit import GroupCommit, Operation
from relay.spool.files import ContentFiles, DirectoryLock
from relay.spool.records import (
    continuation,
    id_of,
    log_rows,
    number_of,
    pack_facts,
    pack_recipients,
    unpack_envelope,
    unpack_facts,
    unpack_recipients,
)
from relay.spool.sqlite_batch import Batches, spool_error

#: An attempt may wait ten minutes after the final dot (RFC 5321 section 4.5.3.2.6) on top of a slow upload; the scheduler renews.
LEASE_SECONDS = 15 * 60

#: Checkpoint when about so much has been logged, or when idle. The longer the log, the fewer pages are written twice.
_CHECKPOINT_BYTES = 64 * 1024 * 1024
_ROW_BYTES = 2048  # what a message's rows and pages come to in the log, beside its content; an estimate
_LOG_ROWS_A_SWEEP = 10_000  # more than fit into the log between two checkpoints, so that it shrinks under load too
_FREE_PAGES = 4096


#: Rows for `message` and for `content`.
_Rows = tuple[list[tuple[object, ...]], list[tuple[int, bytes]]]


class _Lease(NamedTuple):
    """One claim of ours: until when (monotonic seconds: a clock that is set forward ends no lease), and where its content is."""

    token: int
    until: float
    content: int
    filed: bool
    shared: bool


class _Ending(NamedTuple):
    """What the writer thread needs to settle one claim."""

    number: int
    lease: _Lease
    bounce: _Rows
    log: list[tuple[object, ...]]


class SqliteSpool:
    """See `spool.base.Spool`. Made inside a running event loop.

    `backoff(attempts)` gives the seconds until the next try after that many: stored with every claim, before the network is touched.
    """

    def __init__(self, directory: Path, clock: Clock, *, backoff: Callable[[int], float], keep_log_seconds: float) -> None:
        """Raises SpoolInUse when another relay holds `directory`, SpoolError when it cannot be opened."""
        self._clock = clock
        self._backoff = backoff
        self._keep_log_seconds = keep_log_seconds
        self._last_id = 0
        try:
            self._files = ContentFiles(directory)
            self._lock = DirectoryLock(directory)
        except OSError as error:
            raise SpoolError(f"the spool directory {directory} cannot be used: {error.strerror}") from error
        try:
            self._database = sql.open_database(directory / sql.DATABASE)
            self._take_over()
        except (apsw.Error, OSError) as error:
            self._lock.release()
            raise SpoolError(f"the spool in {directory} cannot be opened: {error}") from error
        except SpoolError:
            self._lock.release()
            raise
        self._tokens = itertools.count(1)
        self._leases: dict[int, _Lease] = {}  # of the claims that this process has given out, by message
        self._retried_first = False
        self._wal_bytes = 0
        self._batches = Batches(self._database, quick=(self._put, self._end))
        self._commits = GroupCommit(self._batches.prepare, self._commit, self._housekeep)

    # -- intake -------------------------------------------------------------------------------------------------------

    def new_id(self) -> MessageId:
        self._last_id = max(self._last_id + 1, int(self._clock.now() * 1_000_000))
        return id_of(self._last_id)

    def writer(self) -> ContentWriter:
        return self._files.writer()

    def discard(self, content: Content) -> None:
        if content.path is not None:
            self._files.discard(content.path)

    async def put(self, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Sequence[Claim | None]:
        contents: dict[int, tuple[int, Content]] = {}  # id(content) -> its number, and what is stored
        claims: list[Claim | None] = []
        try:
            for draft in drafts:
                if id(draft.content) not in contents:
                    number, content = number_of(draft.id), draft.content
                    if content.octets is None or content.size > FILE_ABOVE_BYTES:
                        content = await self._files.store(content, number)
                    contents[id(draft.content)] = (number, content)
            await self._put_stored(drafts, claimed, contents, claims)
        except Exception:
            self._forget(claims)
            if filed := [number for number, content in contents.values() if content.path is not None]:
                self._files.remove(filed)
            raise
        return claims

    async def _put_stored(
        self, drafts: Sequence[Draft], claimed: Sequence[bool], contents: Mapping[int, tuple[int, Content]], claims: list[Claim | None]
    ) -> None:  # fmt: skip
        shared = len(drafts) > len(contents)
        rows = []
        for draft, claim in zip(drafts, claimed, strict=True):
            number, content = contents[id(draft.content)]
            token = next(self._tokens) if claim else None
            rows.append(self._row(draft, number, token, filed=content.path is not None, shared=shared))
            claims.append(self._claim_of(draft, content, token) if token is not None else None)
            if token is not None:
                lease = _Lease(token, self._clock.monotonic() + LEASE_SECONDS, number, content.path is not None, shared)
                self._leases[number_of(draft.id)] = lease
        blobs = [(number, content.octets) for number, content in contents.values() if content.path is None]
        await self._commits.submit(self._put, (rows, blobs))

    def _row(self, draft: Draft, content: int, token: int | None, *, filed: bool, shared: bool) -> tuple[object, ...]:
        envelope = draft.envelope
        facts = pack_facts(envelope, draft.origin, draft.summary, draft.content)
        due = draft.due if token is None else draft.created + self._backoff(1)
        return (
            number_of(draft.id), content, int(filed), int(shared), draft.lane.upstream, draft.lane.route, due, int(token is not None),
            token, 0, "", draft.created, envelope.sender, pack_recipients(envelope.recipients), facts, draft.prefix, draft.content.size, "",
        )  # fmt: skip

    def _claim_of(self, draft: Draft, content: Content, token: int) -> Claim:
        lease_until = self._clock.now() + LEASE_SECONDS
        return Claim(
            draft.id, token, draft.lane, draft.envelope, content, draft.created, 1, lease_until, draft.prefix, draft.origin, draft.summary
        )

    def _put(self, arguments: list[_Rows]) -> list[None]:
        blobs = [blob for _, blobs in arguments for blob in blobs]
        self._insert(sql.put_messages, [row for rows, _ in arguments for row in rows])
        self._insert(sql.put_contents, blobs)
        self._wal_bytes += _ROW_BYTES * len(arguments) + sum(len(octets) for _, octets in blobs)
        return [None] * len(arguments)

    def _insert(self, statement: Callable[[int], str], rows: Sequence[tuple[object, ...]]) -> None:
        """Insert rows, as many as one statement takes at a time."""
        for start in range(0, len(rows), sql.ROWS_A_STATEMENT):
            some = rows[start : start + sql.ROWS_A_STATEMENT]
            self._database.execute(statement(len(some)), [value for row in some for value in row])

    # -- delivery -----------------------------------------------------------------------------------------------------

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        claimed: list[tuple[Claim, _Lease]] = await self._commits.submit(self._claim, (lane, limit, self._clock.now()))
        self._leases |= {number_of(claim.id): lease for claim, lease in claimed}
        return [claim for claim, _ in claimed]

    def _claim(self, arguments: list[tuple[Lane, int, float]]) -> list[list[tuple[Claim, _Lease]]]:
        return [self._claim_some(lane, limit, now) for lane, limit, now in arguments]

    def _claim_some(self, lane: Lane, limit: int, now: float) -> list[tuple[Claim, _Lease]]:
        fresh = self._database.execute(sql.CLAIMABLE, (*lane, 0, now, limit)).fetchall()
        retried = self._database.execute(sql.CLAIMABLE, (*lane, 1, now, limit)).fetchall()
        self._retried_first = not self._retried_first
        turns = (retried, fresh) if self._retried_first else (fresh, retried)
        rows = [row for pair in itertools.zip_longest(*turns) for row in pair if row is not None][:limit]
        claims = [self._claim_row(row, lane, now) for row in rows]
        return [claim for claim in claims if claim is not None]

    def _claim_row(self, row: Any, lane: Lane, now: float) -> tuple[Claim, _Lease] | None:
        number, content_number, filed, shared, attempts, doubt, created, sender, recipients, facts_text, prefix, size = row
        lease_until, token = now + LEASE_SECONDS, next(self._tokens)
        self._database.execute(sql.CLAIM, (token, now + self._backoff(attempts + 1), number))
        origin, summary, facts = unpack_facts(facts_text)
        envelope = unpack_envelope(sender, unpack_recipients(recipients, in_doubt=bool(doubt)), facts)
        octets = None
        if not filed:
            found = self._database.execute(sql.CONTENT, (content_number,)).fetchone()
            if found is None:  # damage: keep what is left for the operator instead of failing every claim of the lane
                self._database.execute(sql.QUARANTINE, ("the content is missing from the spool", number))
                return None
            octets = found[0]
        path = self._files.path(content_number) if filed else None
        content = Content(size, octets, path, bool(facts.get("8bit")), bool(facts.get("dots")))
        claim = Claim(id_of(number), token, lane, envelope, content, created, attempts + 1, lease_until, prefix, origin, summary)
        return claim, _Lease(token, self._clock.monotonic() + LEASE_SECONDS, content_number, bool(filed), bool(shared))

    async def settle(self, settlement: Settlement) -> None:
        claim, outcomes, bounce = settlement.claim, settlement.outcomes, settlement.bounce
        recipients = claim.envelope.recipients
        assert outcomes.keys() == {r.address for r in recipients}, "every recipient is accounted for"
        number = number_of(claim.id)
        lease = self._leases.get(number)
        if lease is None or lease.token != claim.token:
            raise LeaseLost(claim.id)
        rows: _Rows = ([], [])
        if bounce is not None:
            assert bounce.content.octets is not None, "a bounce is small"
            mark = number_of(bounce.id)
            rows = ([self._row(bounce, mark, None, filed=False, shared=False)], [(mark, bounce.content.octets)])
        waiting = [r for r in recipients if outcomes[r.address].status is Status.DEFERRED]
        ending = _Ending(number, lease, rows, log_rows(settlement, number, self._clock.now()))
        try:
            if waiting:
                await self._commits.ride(self._continue, (ending, continuation(settlement, waiting)))
                unneeded: list[int] = []
            else:
                unneeded = await self._commits.ride(self._end, ending)
        except LeaseLost:
            self._let_go(number, lease.token)
            raise
        self._let_go(number, lease.token)
        if unneeded:
            self._files.remove(unneeded)

    def _end(self, arguments: list[_Ending]) -> list[list[int]]:
        """Remove messages that have nobody left to serve. Answers, for each, the content files that nobody needs any more."""
        keys = [(ending.number, ending.lease.token) for ending in arguments]
        for start in range(0, len(keys), sql.ROWS_A_STATEMENT):
            some = keys[start : start + sql.ROWS_A_STATEMENT]
            self._database.execute(sql.end_messages(len(some)), [value for key in some for value in key])
            if self._database.changes() != len(some):
                raise LeaseLost(id_of(some[0][0]))  # of one of them: the batch is undone and each is tried alone
        files: list[list[int]] = [[] for _ in arguments]
        blobs: list[tuple[int]] = []
        for ending, unneeded in zip(arguments, files, strict=True):
            lease = ending.lease
            if lease.shared and self._database.execute(sql.SHARING, (lease.content,)).fetchone():
                continue
            if lease.filed:
                unneeded.append(lease.content)
            else:
                blobs.append((lease.content,))
        self._insert(sql.end_contents, blobs)
        self._conclude(arguments)
        return files

    def _continue(self, arguments: list[tuple[_Ending, tuple[object, ...]]]) -> list[None]:
        """Give messages back to their lanes."""
        for ending, values in arguments:
            self._database.execute(sql.CONTINUE, (*values, ending.number, ending.lease.token))
            if not self._database.changes():
                raise LeaseLost(id_of(ending.number))
        self._conclude([ending for ending, _ in arguments])
        return [None] * len(arguments)

    def _conclude(self, endings: list[_Ending]) -> None:
        """What every settle does beside: its bounce and its lines in the delivery log."""
        self._put([ending.bounce for ending in endings])
        self._insert(sql.put_log, [row for ending in endings for row in ending.log])
        self._wal_bytes += _ROW_BYTES * len(endings)

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        now, until = self._clock.monotonic(), self._clock.now() + LEASE_SECONDS
        renewed = []
        for claim in claims:
            lease = self._leases.get(number_of(claim.id))
            if lease is not None and lease.token == claim.token and lease.until > now:
                self._leases[number_of(claim.id)] = lease._replace(until=now + LEASE_SECONDS)
                renewed.append(claim._replace(lease_until=until))
        return renewed

    async def next_due(self) -> Mapping[Lane, float]:
        now = self._clock.monotonic()
        expired = [(number, lease.token) for number, lease in self._leases.items() if lease.until <= now]
        due: Mapping[Lane, float] = await self._commits.submit(self._next_due, expired)
        for number, token in expired:
            self._let_go(number, token)
        return due

    def _next_due(self, arguments: list[list[tuple[int, int]]]) -> list[dict[Lane, float]]:
        for expired in arguments:
            self._database.executemany(sql.EXPIRE, expired)
        due = {Lane(upstream, route): due for upstream, route, due in self._database.execute(sql.NEXT_DUE)}
        return [due] * len(arguments)

    # -- health and housekeeping --------------------------------------------------------------------------------------

    def unhealthy(self) -> str | None:
        return self._batches.trouble

    async def close(self) -> None:
        await self._commits.stop()
        self._checkpoint()
        self._database.close()
        self._files.close()
        self._lock.release()

    def _forget(self, claims: Sequence[Claim | None]) -> None:
        for claim in claims:
            if claim is not None:
                self._let_go(number_of(claim.id), claim.token)

    def _let_go(self, number: int, token: int) -> None:
        """Forget a lease, unless the message has been claimed again in the meantime."""
        lease = self._leases.get(number)
        if lease is not None and lease.token == token:
            del self._leases[number]

    def _commit(self, batch: list[Operation]) -> None:
        self._batches.commit(batch)
        if self._wal_bytes > _CHECKPOINT_BYTES:
            self._housekeep()  # under load there is no idle moment for it

    def _housekeep(self) -> None:
        try:
            self._checkpoint()
            self._database.execute(sql.FORGET_LOG, (self._clock.now() - self._keep_log_seconds, _LOG_ROWS_A_SWEEP))
            if self._database.pragma("freelist_count") > _FREE_PAGES:
                self._database.execute(f"PRAGMA incremental_vacuum({_FREE_PAGES // 4})").fetchall()
        except apsw.Error as error:  # nothing is lost: it is tried again; custody itself reports trouble when it meets it
            self._batches.trouble = str(spool_error(error))

    def _checkpoint(self) -> None:
        self._wal_bytes = 0
        self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _take_over(self) -> None:
        self._database.execute(sql.TAKE_OVER)
        self._last_id = int(self._database.execute(sql.LAST_ID).get)
        kept = {number for (number,) in self._database.execute(sql.FILED)}
        self._files.sweep(kept.__contains__)
