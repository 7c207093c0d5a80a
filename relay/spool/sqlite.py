"""The embedded spool: one SQLite database in WAL mode with synchronous=FULL, and files for large content.

Exactly one connection writes and checkpoints, in the writer thread of `spool.commit`; the operator's commands read through
`spool.sqlite_view`. Driver: apsw, because its wheel carries a SQLite without the WAL-reset corruption (fixed in 3.51.3) that the
interpreters' own library has, and because a test can give it a VFS that fails.

State: the database, the content files, and the tokens of the claims that this process has given out. All claims of an earlier
process are taken over at start: whoever they were for is in doubt (law 4).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import apsw

from relay.clock import Clock
from relay.mail.envelope import Recipient
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
    SpoolFull,
)
from relay.spool.commit import GroupCommit, Operation
from relay.spool.files import ContentFiles, DirectoryLock
from relay.spool.records import (
    id_of,
    log_rows,
    number_of,
    pack_facts,
    pack_recipients,
    unpack_envelope,
    unpack_facts,
    unpack_recipients,
)

#: An attempt may wait ten minutes after the final dot (RFC 5321 section 4.5.3.2.6) on top of a slow upload; the scheduler renews.
LEASE_SECONDS = 15 * 60

#: Checkpoint when the log has grown to this many pages, or when idle. 64 MiB: a longer log means fewer pages written twice.
_CHECKPOINT_PAGES = 16384
_LOG_ROWS_A_SWEEP = 2000
_FREE_PAGES = 4096


class SqliteSpool:
    """See `spool.base.Spool`. Made inside a running event loop.

    `backoff(attempts)` gives the seconds until the next try after that many: stored with every claim, before the network is touched.
    """

    def __init__(self, directory: Path, clock: Clock, *, backoff: Callable[[int], float], keep_log_seconds: float) -> None:
        """Raises SpoolInUse when another relay holds `directory`, SpoolError when it cannot be opened."""
        self._clock = clock
        self._backoff = backoff
        self._keep_log_seconds = keep_log_seconds
        try:
            self._files = ContentFiles(directory)
            self._lock = DirectoryLock(directory)
        except OSError as error:
            raise SpoolError(f"the spool directory {directory} cannot be used: {error.strerror}") from error
        try:
            self._database = sql.open_database(directory / sql.DATABASE)
            self._take_over()
        except apsw.Error as error:
            self._lock.release()
            raise SpoolError(f"the spool in {directory} cannot be opened: {error}") from error
        self._tokens = itertools.count(1)
        self._claimed: dict[int, tuple[int, float]] = {}  # message -> token and lease end, of this process's claims
        self._retried_first = False
        self._wal_pages = 0
        self._trouble: str | None = None
        self._database.set_wal_hook(self._note_wal)
        self._commits = GroupCommit(self._commit, self._housekeep)

    # -- intake -------------------------------------------------------------------------------------------------------

    def new_id(self) -> MessageId:
        self._last_id = max(self._last_id + 1, int(self._clock.now() * 1_000_000))
        return id_of(self._last_id)

    def writer(self) -> ContentWriter:
        return self._files.writer()

    async def put(self, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Sequence[Claim | None]:
        contents: dict[int, tuple[int, Content]] = {}  # id(content) -> its number, and what is stored
        for draft in drafts:
            if id(draft.content) not in contents:
                number, content = number_of(draft.id), draft.content
                if content.octets is None or content.size > FILE_ABOVE_BYTES:
                    content = await self._files.store(content, number)
                contents[id(draft.content)] = (number, content)
        shared = len(drafts) > len(contents)
        rows, claims = [], []
        for draft, claim in zip(drafts, claimed, strict=True):
            number, content = contents[id(draft.content)]
            token = next(self._tokens) if claim else None
            rows.append(self._row(draft, number, token, filed=content.path is not None, shared=shared))
            claims.append(self._claim_of(draft, content, token) if token is not None else None)
        blobs = [(number, content.octets) for number, content in contents.values() if content.path is None]
        try:
            await self._commits.submit(self._put, (rows, blobs))
        except SpoolError:
            self._forget(claims)
            filed = [number for number, content in contents.values() if content.path is not None]
            await self._files.run(lambda: self._files.remove(filed))
            raise
        return claims

    def _row(self, draft: Draft, content: int, token: int | None, *, filed: bool, shared: bool) -> tuple[object, ...]:
        envelope = draft.envelope
        facts = pack_facts(envelope, draft.origin, draft.summary, draft.content)
        due = draft.due if token is None else draft.created + self._backoff(1)
        return (
            number_of(draft.id), content, int(filed), int(shared), draft.lane.upstream, draft.lane.route, due, int(token is not None), token, 0, "",
            draft.created, envelope.sender, pack_recipients(envelope.recipients), facts, draft.prefix, draft.content.size, "",
        )  # fmt: skip

    def _claim_of(self, draft: Draft, content: Content, token: int) -> Claim:
        lease_until = self._clock.now() + LEASE_SECONDS
        self._claimed[number_of(draft.id)] = (token, lease_until)
        return Claim(
            draft.id, token, draft.lane, draft.envelope, content, draft.created, 1, lease_until, draft.prefix, draft.origin, draft.summary
        )  # fmt: skip

    def _put(self, argument: tuple[list[tuple[object, ...]], list[tuple[int, bytes]]]) -> None:
        rows, blobs = argument
        self._database.executemany(sql.PUT_MESSAGE, rows)
        if blobs:
            self._database.executemany(sql.PUT_CONTENT, blobs)

    # -- delivery -----------------------------------------------------------------------------------------------------

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        claims: Sequence[Claim] = await self._commits.submit(self._claim, (lane, limit, self._clock.now()))
        for claim in claims:
            self._claimed[number_of(claim.id)] = (claim.token, claim.lease_until)
        return claims

    def _claim(self, argument: tuple[Lane, int, float]) -> list[Claim]:
        lane, limit, now = argument
        fresh = self._database.execute(sql.CLAIMABLE, (*lane, 0, now, limit)).fetchall()
        retried = self._database.execute(sql.CLAIMABLE, (*lane, 1, now, limit)).fetchall()
        self._retried_first = not self._retried_first
        turns = (retried, fresh) if self._retried_first else (fresh, retried)
        rows = [row for pair in itertools.zip_longest(*turns) for row in pair if row is not None][:limit]
        claims = [self._claim_row(row, lane, now) for row in rows]
        return [claim for claim in claims if claim is not None]

    def _claim_row(self, row: Any, lane: Lane, now: float) -> Claim | None:
        number, content_number, filed, attempts, doubt, created, sender, recipients, facts_text, prefix, size = row
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
        return Claim(id_of(number), token, lane, envelope, content, created, attempts + 1, lease_until, prefix, origin, summary)

    async def settle(self, settlement: Settlement) -> None:
        claim = settlement.claim
        assert settlement.outcomes.keys() == {r.address for r in claim.envelope.recipients}, "every recipient is accounted for"
        bounce = settlement.bounce
        bounce_row = self._row(bounce, number_of(bounce.id), None, filed=False, shared=False) if bounce else None
        try:
            files = await self._commits.ride(self._settle, (settlement, bounce_row, self._clock.now()))
        finally:
            self._claimed.pop(number_of(claim.id), None)
        if files:
            await self._files.run(lambda: self._files.remove(files))

    def _settle(self, argument: tuple[Settlement, tuple[object, ...] | None, float]) -> list[int]:
        """Returns the numbers of the content files that nobody needs any more."""
        settlement, bounce_row, now = argument
        claim, files = settlement.claim, []
        number = number_of(claim.id)
        waiting = [r for r in claim.envelope.recipients if settlement.outcomes[r.address].status is Status.DEFERRED]
        if waiting:
            self._continue(settlement, waiting, number)
        else:
            ended = self._database.execute(sql.END, (number, claim.token)).fetchone()
            if ended is None:
                raise LeaseLost(claim.id)
            content, filed, shared = ended
            if not (shared and self._database.execute(sql.SHARING, (content,)).fetchone()):
                if filed:
                    files.append(content)
                else:
                    self._database.execute(sql.END_CONTENT, (content,))
        if settlement.bounce is not None and bounce_row is not None:
            assert settlement.bounce.content.octets is not None, "a bounce is small"
            self._put(([bounce_row], [(number_of(settlement.bounce.id), settlement.bounce.content.octets)]))
        self._database.executemany(sql.PUT_LOG, log_rows(settlement, number, now))
        return files

    def _continue(self, settlement: Settlement, waiting: list[Recipient], number: int) -> None:
        claim, then, outcomes = settlement.claim, settlement.next, settlement.outcomes
        assert then is not None, "a deferred recipient has a next time"
        kept = [Recipient(r.address, r.notify, r.orcpt, r.in_doubt or outcomes[r.address].in_doubt) for r in waiting]
        reply = str(outcomes[waiting[-1].address].reply)
        uncounted = 0 if then.counted else 1
        self._database.execute(
            sql.CONTINUE, (*then.lane, then.when, uncounted, then.held, pack_recipients(kept), reply, number, claim.token)
        )
        if not self._database.changes():
            raise LeaseLost(claim.id)

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        lease_until = self._clock.now() + LEASE_SECONDS
        renewed = []
        for claim in claims:
            number = number_of(claim.id)
            token, ends = self._claimed.get(number, (None, 0.0))
            if token == claim.token and ends > self._clock.now():
                self._claimed[number] = (claim.token, lease_until)
                renewed.append(claim._replace(lease_until=lease_until))
        return renewed

    async def next_due(self) -> Mapping[Lane, float]:
        now = self._clock.now()
        expired = [(number, token) for number, (token, ends) in self._claimed.items() if ends <= now]
        for number, _ in expired:
            del self._claimed[number]
        due: Mapping[Lane, float] = await self._commits.submit(self._next_due, expired)
        return due

    def _next_due(self, expired: list[tuple[int, int]]) -> dict[Lane, float]:
        self._database.executemany(sql.EXPIRE, expired)
        return {Lane(upstream, route): due for upstream, route, due in self._database.execute(sql.NEXT_DUE)}

    # -- health and housekeeping --------------------------------------------------------------------------------------

    def unhealthy(self) -> str | None:
        return self._trouble

    async def close(self) -> None:
        await self._commits.stop()
        self._checkpoint()
        self._database.close()
        self._files.close()
        self._lock.release()

    def _forget(self, claims: Sequence[Claim | None]) -> None:
        for claim in claims:
            if claim is not None:
                self._claimed.pop(number_of(claim.id), None)

    def _commit(self, batch: list[Operation]) -> None:
        """One transaction for the whole batch; if it fails, one for each operation, so that only the culprit has the error."""
        try:
            self._transact(batch)
            self._trouble = None
        except Exception as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if len(batch) > 1:
                for operation in batch:
                    self._commit([operation])
                return
            batch[0].error = _spool_error(error)
            if isinstance(error, apsw.Error):
                self._trouble = str(batch[0].error)
        if self._wal_pages > _CHECKPOINT_PAGES:
            self._checkpoint()

    def _transact(self, batch: list[Operation]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        for operation in batch:
            operation.error = None
            try:
                operation.result = operation.run(operation.argument)
            except LeaseLost as lost:  # raised before anything is changed
                operation.error = lost
        self._database.execute("COMMIT")

    def _housekeep(self) -> None:
        try:
            if self._wal_pages:
                self._checkpoint()
            self._database.execute(sql.FORGET_LOG, (self._clock.now() - self._keep_log_seconds, _LOG_ROWS_A_SWEEP))
            if self._database.pragma("freelist_count") > _FREE_PAGES:
                self._database.execute(f"PRAGMA incremental_vacuum({_FREE_PAGES // 4})").fetchall()
        except apsw.Error as error:  # nothing is lost: it is tried again; custody itself reports trouble when it meets it
            self._trouble = str(_spool_error(error))

    def _checkpoint(self) -> None:
        self._wal_pages = 0
        self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _note_wal(self, _: apsw.Connection, __: str, pages: int) -> int:
        self._wal_pages = pages
        return 0

    def _take_over(self) -> None:
        self._database.execute(sql.TAKE_OVER)
        self._last_id = self._database.execute(sql.LAST_ID).get
        kept = {number for (number,) in self._database.execute(sql.FILED)}
        self._files.sweep(kept.__contains__)


def _spool_error(error: Exception) -> Exception:
    """The driver's error in the spool's words; anything else is a fault of ours and stays what it is."""
    if isinstance(error, apsw.FullError):
        return SpoolFull("no space left for the spool: the disk is full")
    if isinstance(error, apsw.Error):
        return SpoolError(f"the spool cannot be written: {error}")
    return error
