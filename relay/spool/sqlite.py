"""The embedded spool: one SQLite database in WAL mode with synchronous=FULL, and files for large content.

Exactly one connection writes and checkpoints; `spool.commit` hands it between the loop, which adds and removes rows, and the writer
thread, which does all that may wait for the disk. The operator's commands read through `spool.sqlite_view`. Driver: apsw, because its
wheel carries a SQLite without the WAL-reset corruption (fixed in 3.51.3) that the interpreters' own library has, and because a test
can give it a VFS that fails.

State: the database, the content files, and the leases of the claims that this process has given out. All claims of an earlier
process are taken over at start: whoever they were for is in doubt (law 4).
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import apsw

from relay.clock import Clock, Steps
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
    Next,
    Selection,
    Settlement,
    SpoolDamaged,
    SpoolError,
    Used,
    Waiting,
)
from relay.spool.commit import Batch, GroupCommit, Kind
from relay.spool.files import ContentFiles, DirectoryLock
from relay.spool.records import (
    continuation,
    id_of,
    log_rows,
    number_of,
    pack_facts,
    pack_recipients,
)
from relay.spool.room import Room
from relay.spool.sqlite_batch import Batches, storage_fault
from relay.spool.sqlite_claims import LEASE_SECONDS, Again, Claims, Lease, Place
from relay.spool.sqlite_rows import Ending, Puts, Rows
from relay.spool.sqlite_verbs import Page, Step, Verbs

#: Checkpoint when about so much has been logged, or when idle. The longer the log, the fewer pages are written twice.
_CHECKPOINT_BYTES = 64 * 1024 * 1024
_LOG_ROWS_A_SWEEP = 10_000  # more than fit into the log between two checkpoints, so that it shrinks under load too
_FORGET_LOG_SECONDS = 60.0  # until the next sweep behind one that found nothing: it looks at all those rows
_FORGET_USED_SECONDS = 3600.0  # it looks at every row, some dozen for each upstream with a quota
_FREE_PAGES = 4096
_DAMAGES_LIMIT = 1000  # what one operation goes around; a damaged page has some dozen messages
_CHECKPOINT = "checkpoint"  # to `Room`


class SqliteSpool:
    """See `spool.base.Spool`. Made inside a running event loop.

    `backoff(attempts)` gives the seconds until the next try after that many: stored with every claim, before the network is touched.
    `quarantined` is told of every message that damage has made unreadable: id, lane (empty where it is not known), and the reason.
    """

    def __init__(
        self, directory: Path, clock: Clock, *, backoff: Callable[[int], float], keep_log_seconds: float,
        quarantined: Callable[[MessageId, Lane, str], None] = lambda *_: None, max_size_bytes: int | None = None, min_free_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Raises SpoolInUse when another relay holds `directory`, SpoolDamaged when it holds no spool, SpoolError when it fails."""
        self._clock = clock
        self._steps = Steps(clock)
        self._step = 0.0  # by which the clock was set, and what is stored does not know it yet
        self._backoff = backoff
        self._quarantined = quarantined
        self._keep_log_seconds = keep_log_seconds
        self._last_id = 0
        self._forgets_log_at = self._forgets_used_at = 0.0
        self._room = Room(directory, clock, max_size_bytes=max_size_bytes, min_free_bytes=min_free_bytes)
        try:
            self._files = ContentFiles(directory, self._room)
            self._lock = DirectoryLock(directory)
        except OSError as error:
            raise SpoolError(f"the spool directory {directory} cannot be used: {sql.in_words(error)}") from error
        try:
            self._database = sql.open_database(directory / sql.DATABASE, now=clock.now())
            self._claims = Claims(self._database, clock, backoff=backoff, path=self._files.path)
            self._take_over()
        except (apsw.Error, OSError, SpoolError) as error:
            self._lock.release()
            if isinstance(error, SpoolError):
                raise
            kind = SpoolDamaged if isinstance(error, apsw.NotADBError | apsw.CorruptError) else SpoolError
            raise kind(f"the spool in {directory} cannot be opened: {sql.in_words(error)}") from error
        self._rows = Rows(self._database, self._claims)
        self._verbs = Verbs(self._database, self._claims, self._rows)
        self._leases: dict[MessageId, Lease] = {}  # of the claims that this process has given out
        self._batches = Batches(self._database, self._room, quick=(self._rows.put, self._rows.end))
        self._room.watch(_CHECKPOINT, self._housekeep)
        for name in (sql.DATABASE, f"{sql.DATABASE}-wal"):
            self._room.keep(directory / name)
        self._room.look()
        self._commits = GroupCommit(self._batches.prepare, self._commit, self._rest)

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
        rows: list[tuple[object, ...]] = []
        blobs: list[tuple[int, bytes]] = []
        size = 0
        for draft in drafts:
            size += draft.content.size
        shared = len(drafts) > 1 and len(drafts) > len({id(draft.content) for draft in drafts})
        try:
            if (full := self._room.full(size)) is not None:
                raise full
            for draft in drafts:
                if id(draft.content) not in contents:
                    number, content = number_of(draft.id), draft.content
                    if content.octets is None or content.size > FILE_ABOVE_BYTES:
                        content = await self._files.store(content, number)
                    else:
                        blobs.append((number, content.octets))
                    contents[id(draft.content)] = number, content
            for draft, wanted in zip(drafts, claimed, strict=True):  # a lease begins when nothing is waited for but the commit
                number, content = contents[id(draft.content)]
                place = number, content.path is not None, shared
                token = next(self._claims.tokens) if wanted else None
                rows.append(self._row(draft, place, token))
                claims.append(self._lend(draft, content, place, token) if token is not None else None)
            await self._commits.submit(self._rows.put, (rows, blobs))
        except Exception:
            for claim in claims:
                if claim is not None:
                    self._let_go(claim.id, claim.token)
            if filed := [number for number, content in contents.values() if content.path is not None]:
                self._files.remove(filed)
            raise
        self._room.waiting_bytes += size
        return claims

    def _row(self, draft: Draft, place: Place, token: int | None) -> tuple[object, ...]:
        id, lane, envelope, content, created, prefix, origin, summary, due = draft
        if token is not None:
            due = created + self._backoff(1)
        recipients, facts = pack_recipients(envelope.recipients), pack_facts(envelope, origin, summary, content)
        return (
            number_of(id), *place, *lane, due, token is not None, token, 0, "", created, envelope.sender, recipients, facts, prefix,
            content.size, "",
        )  # fmt: skip

    def _lend(self, draft: Draft, content: Content, place: Place, token: int) -> Claim:
        """The claim of a draft that is stored as claimed."""
        id, lane, envelope, _, created, prefix, origin, summary, _ = draft
        self._leases[id] = Lease(number_of(id), token, self._clock.monotonic() + LEASE_SECONDS, place)
        return Claim(id, token, lane, envelope, content, created, 1, self._clock.now() + LEASE_SECONDS, prefix, origin, summary)

    # -- delivery -----------------------------------------------------------------------------------------------------

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        await self._keep_step()
        return self._note(await self._ask(self._claims.claim, (lane, limit, self._clock.now())))

    async def used(self) -> Sequence[Used]:
        found: Sequence[Used] = await self._ask(self._rows.used, self._clock.now())
        return found

    async def overdue(self, limit: int) -> Sequence[Claim]:
        await self._keep_step()
        return self._note(await self._ask(self._claims.overdue, (limit, self._clock.now())))

    async def oldest(self, after: str, accepted_before: float) -> tuple[Sequence[Waiting], str | None]:
        await self._keep_step()
        now = self._clock.now()
        page = Page(Selection(older_than=now - accepted_before), self._last_id, now, after=number_of(after) if after else 0)
        step: Step = await self._ask(self._verbs.look, page)
        return step.answers, id_of(step.following.after) if step.following is not None else None

    async def late(self, ids: Sequence[MessageId]) -> Sequence[Claim]:
        return self._note(await self._ask(self._claims.late, ([number_of(id) for id in ids], self._clock.now())))

    async def hasten(self, lane: Lane) -> bool:
        found: int = await self._ask(self._claims.hasten, (lane, self._clock.now()))
        self._tell_news()
        return found > 0

    def _note(self, claimed: Sequence[tuple[Claim, Lease]]) -> list[Claim]:
        """Remember the leases of claims, and tell of what could not be claimed."""
        self._leases |= {claim.id: lease for claim, lease in claimed}
        self._tell_news()
        return [claim for claim, _ in claimed]

    def _tell_news(self) -> None:
        while self._claims.news:
            number, (lane, reason) = self._claims.news.popitem()
            self._quarantined(id_of(number), lane, reason)

    async def _ask(self, operation: Kind, argument: Any) -> Any:
        """Have the operation done, again while it meets damage that was not known."""
        for _ in range(_DAMAGES_LIMIT):
            try:
                return await self._commits.submit(operation, argument)
            except Again as again:
                argument = again.argument or argument
        raise SpoolError("the spool's database is damaged in too many places")

    async def settle(self, settlement: Settlement) -> None:
        claim, outcomes, then, bounce, _, used = settlement
        recipients = claim.envelope.recipients
        assert outcomes.keys() == {r.address for r in recipients}, "every recipient is accounted for"
        lease = self._leases.get(claim.id)
        if lease is None or lease.token != claim.token:
            raise LeaseLost(claim.id)
        report: Puts | None = None
        if bounce is not None:
            assert bounce.content.octets is not None, "a bounce is small"
            mark = number_of(bounce.id)
            report = ([self._row(bounce, (mark, False, False), None)], [(mark, bounce.content.octets)])
        waiting = [r for r in recipients if outcomes[r.address].status is Status.DEFERRED]
        values = continuation(settlement, waiting) if waiting else None
        now = self._clock.now()
        ending = Ending(lease, values, log_rows(settlement, lease.number, now), report, used)
        # What goes on at once, to a fallback or as a bounce, does not wait for company.
        store = self._commits.submit if bounce is not None or (then is not None and then.when <= now) else self._commits.ride
        try:
            unneeded = await store(self._rows.resume if waiting else self._rows.end, ending)
        except Again:
            unneeded = await self._settle_beside_damage(ending)
        except LeaseLost:
            self._let_go(claim.id, lease.token)
            raise
        self._let_go(claim.id, lease.token)
        self._room.waiting_bytes += (bounce.content.size if bounce else 0) - (0 if waiting else claim.content.size)
        if unneeded:
            self._files.remove(unneeded)

    async def _settle_beside_damage(self, ending: Ending) -> list[int]:
        """What became of a message must be stored, whatever is damaged around its record."""
        unneeded: list[int]
        try:
            await self._commits.submit(self._claims.mend, None)
            unneeded = await self._commits.submit(self._rows.resume if ending.values is not None else self._rows.end, ending)
        except (Again, SpoolError):
            unneeded = await self._ask(self._rows.end_beside_damage, ending)
        self._tell_news()
        return unneeded

    async def dated(self, claim: Claim) -> Claim:
        await self._keep_step()
        created: float | None = await self._ask(self._claims.created, number_of(claim.id))
        return claim if created is None else claim._replace(created=created)

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        now, until = self._clock.monotonic(), self._clock.now() + LEASE_SECONDS
        renewed = []
        for claim in claims:
            lease = self._leases.get(claim.id)
            if lease is not None and lease.token == claim.token and lease.until > now:
                self._leases[claim.id] = lease._replace(until=now + LEASE_SECONDS)
                renewed.append(claim._replace(lease_until=until))
        return renewed

    async def next_due(self) -> Mapping[Lane, float]:
        await self._keep_step()
        now = self._clock.monotonic()
        expired = [(id, lease) for id, lease in self._leases.items() if lease.until <= now]
        due: Mapping[Lane, float] = await self._ask(self._claims.next_due, [(lease.number, lease.token) for _, lease in expired])
        for id, lease in expired:
            self._let_go(id, lease.token)
        self._tell_news()
        return due

    async def _keep_step(self) -> None:
        """Before times are compared: whether the clock that wrote them is still this one."""
        self._step += self._steps.last()
        if step := self._step:
            self._step = 0.0
            try:
                await self._ask(self._claims.step, (step, self._clock.now()))
            except SpoolError:
                self._step += step
                raise

    # -- the operator's verbs -----------------------------------------------------------------------------------------

    async def hold(self, selection: Selection, reason: str) -> Sequence[MessageId]:
        return [id async for step in self._walk(self._verbs.hold, selection, reason=reason) for id in step.answers]

    async def release(self, selection: Selection) -> Sequence[Next]:
        return [then async for step in self._walk(self._verbs.release, selection) for then in step.answers]

    async def reschedule(self, selection: Selection) -> Sequence[Next]:
        return [then async for step in self._walk(self._verbs.reschedule, selection) for then in step.answers]

    async def drop(self, selection: Selection) -> Sequence[MessageId]:
        return [id async for step in self._walk(self._verbs.drop, selection) for id in step.answers]

    async def take(self, selection: Selection, limit: int) -> Sequence[Claim]:
        return [claim async for step in self._walk(self._verbs.take, selection, limit=limit) for claim in self._note(step.answers)]

    async def _walk(
        self, verb: Callable[[list[Page]], list[Step]], selection: Selection, *, reason: str = "", limit: int = 0
    ) -> AsyncIterator[Step]:  # fmt: skip
        """Apply a verb to all that is in the queue by now, page by page, each in the next batch."""
        page: Page | None = Page(selection, self._last_id, self._clock.now(), reason, limit)
        while page is not None:
            step: Step = await self._ask(verb, page)
            self._rows.logged(len(step.answers))
            self._files.remove(step.files)
            self._room.waiting_bytes -= step.octets
            yield step
            page = step.following

    # -- health and housekeeping --------------------------------------------------------------------------------------

    def obstacle(self, size: int = 0) -> SpoolError | None:
        return self._room.obstacle(size)

    async def close(self) -> None:
        await self._commits.stop()
        try:
            self._checkpoint()
        except apsw.Error:  # the log has all of it, and is read at the next start
            self._database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._database.close()
        self._files.close()
        self._lock.release()

    def _let_go(self, id: MessageId, token: int) -> None:
        """Forget a lease, unless the message has been claimed again in the meantime."""
        lease = self._leases.get(id)
        if lease is not None and lease.token == token:
            del self._leases[id]

    def _commit(self, batch: Batch) -> None:
        self._batches.commit(batch)
        if self._rows.logged_bytes > _CHECKPOINT_BYTES:
            self._housekeep()  # under load there is no idle moment for it
        self._room.look()

    def _rest(self) -> None:
        self._housekeep()
        self._room.look()

    def _housekeep(self) -> None:
        try:
            self._checkpoint()
            if self._clock.monotonic() >= self._forgets_log_at:
                self._database.execute(sql.FORGET_LOG, (self._clock.now() - self._keep_log_seconds, _LOG_ROWS_A_SWEEP))
                if not self._database.changes():
                    self._forgets_log_at = self._clock.monotonic() + _FORGET_LOG_SECONDS
            if self._clock.monotonic() >= self._forgets_used_at:
                self._forgets_used_at = self._clock.monotonic() + _FORGET_USED_SECONDS
                self._database.execute(sql.FORGET_USED, (self._clock.now(),))
            if self._database.pragma("freelist_count") > _FREE_PAGES:
                self._database.execute(f"PRAGMA incremental_vacuum({_FREE_PAGES // 4})").fetchall()
        except apsw.CorruptError:  # a page of the delivery log, which then grows: mail can be taken and sent all the same
            self._room.works(_CHECKPOINT)
        except Exception as error:  # nothing is lost: it is tried again, and what was committed before is
            self._room.failed(_CHECKPOINT, storage_fault(error) if isinstance(error, apsw.Error) else SpoolError(f"local error: {error}"))
        else:
            self._room.works(_CHECKPOINT)

    def _checkpoint(self) -> None:
        self._rows.logged_bytes = 0
        self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _take_over(self) -> None:
        self._claims.take_over()
        try:
            self._last_id = int(self._database.execute(sql.LAST_ID).get)
            self._database.execute(sql.FROM_THE_FUTURE, {"now": self._clock.now()})
            self._room.waiting_bytes = int(self._database.execute(sql.WAITING_BYTES).get)
            kept = {number for (number,) in self._database.execute(sql.FILED)}
        except apsw.CorruptError:
            return  # ids go by the clock, and no file is a stray for certain
        self._files.sweep(kept.__contains__)
