"""What a spool has promised, moment by moment, and what is wrong with what it holds after a crash.

Every operation is noted with the moment it began and the moment it was acknowledged, in events of a `power.Recorder`. A crash at moment k
must leave every operation acknowledged by then done, every one begun by then done or not done, but not half done, and no other.
"""

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relay.clock import ManualClock
from relay.mail.envelope import Recipient
from relay.mail.outcome import Outcome, Status
from relay.spool.base import EVERYTHING, Claim, Content, Draft, Lane, MessageId, Next, Settlement, SpoolError, Used
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, LANE, OTHER_LANE, SENT, draft, octets_of
from tests.crash.power import Recorder

#: What every settle uses of a quota whose window has no end.
USED = Used("acme", 10**10, 0, 1, 3)


@dataclass(frozen=True, slots=True)
class Message:
    """What must be known of a queued message after a crash. `active`: somebody was trying it, so it comes back in doubt."""

    octets: bytes
    prefix: bytes
    lane: Lane
    recipients: tuple[Recipient, ...]
    attempts: int = 0
    held: str = ""
    active: bool = False


@dataclass(slots=True, eq=False)
class Operation:
    """From `began` to `ended` (never, when the crash came first or it was `refused`): what each message became, None for gone."""

    what: str
    began: int
    after: dict[MessageId, Message | None]
    ended: int | None = None
    refused: int | None = None
    logged: list[tuple[float, MessageId, str, str]] = field(default_factory=list)


class Account:
    """Runs operations on a spool and keeps the account of them."""

    def __init__(self, spool: SqliteSpool, recorder: Recorder, clock: ManualClock) -> None:
        self.spool = spool
        self.recorder = recorder
        self.clock = clock
        self.operations: list[Operation] = []
        self.current: dict[MessageId, Message] = {}
        self.claims: list[Claim] = []
        self.sweeps: list[tuple[int, float]] = []  # when, and how old the delivery log may be from then on

    def _begin(self, what: str, after: dict[MessageId, Message | None]) -> Operation:
        operation = Operation(what, self.recorder.now, after)
        self.operations.append(operation)
        return operation

    def _end(self, operation: Operation) -> None:
        operation.ended = self.recorder.now
        for number, message in operation.after.items():
            if message is None:
                self.current.pop(number, None)
            else:
                self.current[number] = message

    def _refuse(self, operation: Operation) -> None:
        operation.refused = self.recorder.now

    async def put(self, drafts: Sequence[Draft], octets: bytes, *, claimed: Sequence[bool]) -> None:
        after: dict[MessageId, Message | None] = {
            d.id: Message(octets, d.prefix, d.lane, d.envelope.recipients, int(c), "", c) for d, c in zip(drafts, claimed, strict=True)
        }
        operation = self._begin("put", after)
        try:
            claims = await self.spool.put(drafts, claimed)
        except SpoolError:
            self._refuse(operation)
            return
        self._end(operation)
        self.claims += [claim for claim in claims if claim is not None]

    async def claim(self, lane: Lane, limit: int) -> None:
        # Which ones it takes is the spool's choice: every one that could be claimed may be.
        could = {n: replace(m, attempts=m.attempts + 1, active=True) for n, m in self.current.items() if not m.active and m.lane == lane}
        operations = [self._begin("claim", {number: message}) for number, message in could.items() if not message.held]
        try:
            claims = await self.spool.claim(lane, limit)
        except SpoolError:
            for operation in operations:
                self._refuse(operation)
            return
        taken = {claim.id for claim in claims}
        for operation in operations:
            if operation.after.keys() <= taken:
                self._end(operation)
            else:  # a batch that is tried again may choose others
                self._refuse(operation)
        self.claims += claims

    async def settle(self, claim: Claim, outcomes: Sequence[Outcome], *, then: Next | None, bounce: Draft | None) -> None:
        recipients = claim.envelope.recipients
        by_address = {r.address: outcome for r, outcome in zip(recipients, outcomes, strict=True)}
        before = self.current[claim.id]
        waiting = tuple(r for r in recipients if by_address[r.address].status is Status.DEFERRED)
        after: dict[MessageId, Message | None] = {claim.id: None}
        if waiting:
            assert then is not None
            waiting = tuple(r._replace(in_doubt=r.in_doubt or by_address[r.address].in_doubt) for r in waiting)
            after[claim.id] = replace(before, recipients=waiting, lane=then.lane, held=then.held, active=False, attempts=claim.attempt)
        if bounce is not None:
            after[bounce.id] = Message(octets_of(bounce.content), bounce.prefix, bounce.lane, bounce.envelope.recipients)
        operation = self._begin("settle", after)
        now = self.clock.now()
        try:
            await self.spool.settle(Settlement(claim, by_address, then, bounce, used=(USED,)))
        except SpoolError:
            self._refuse(operation)
            self.claims.append(claim)  # to be settled again
            return
        operation.logged = [(now, claim.id, address, outcome.status.value) for address, outcome in by_address.items()]
        self._end(operation)


async def life(account: Account, rng: random.Random, *, rounds: int, keep_log_seconds: float) -> None:
    """Put, claim and settle at random, several at a time, over more than the log is kept."""
    for number in range(rounds):
        works = [_put(account, rng, number) for _ in range(rng.choice([1, 1, 2, 5]))]
        ready, account.claims = account.claims, []
        rng.shuffle(ready)
        keep = rng.randrange(3)
        account.claims = ready[:keep]
        works += [_settle(account, rng, claim) for claim in ready[keep:]]
        await asyncio.gather(*works)
        if rng.random() < 0.5:
            await account.claim(rng.choice([LANE, OTHER_LANE]), rng.randrange(1, 4))
        account.clock.advance(keep_log_seconds / rounds * 2)
        account.sweeps.append((account.recorder.now, account.clock.now() - keep_log_seconds))


async def _put(account: Account, rng: random.Random, number: int) -> None:
    spool = account.spool
    size = rng.choice([60, 300, 5000, 20_000, 40_000])
    octets = b"X-Number: %d\r\n\r\n" % number + rng.randbytes(size // 8) * 8
    content = Content(len(octets), octets, eight_bit=True, dotted=False)
    if size > 5000 and rng.random() < 0.5:  # as it arrives
        writer = spool.writer()
        try:
            for start in range(0, len(octets), 9000):
                await writer.write(octets[start : start + 9000])
            content = await writer.finish()
        except SpoolError:
            writer.discard()
            return
    recipients = [["you@example.org"], [Recipient("a@x.example", "NEVER"), "b@x.example"], ["ü@x.example"]][rng.randrange(3)]
    lanes = [LANE, OTHER_LANE] if rng.random() < 0.2 else [rng.choice([LANE, OTHER_LANE])]
    prefix = b"Received: %d\r\n" % number
    drafts = [draft(spool, lane=lane, recipients=recipients, content=content, prefix=prefix) for lane in lanes]
    await account.put(drafts, octets, claimed=[rng.random() < 0.6 for _ in drafts])


async def _settle(account: Account, rng: random.Random, claim: Claim) -> None:
    outcomes = [rng.choice([SENT, SENT, FAILED, DEFERRED, IN_DOUBT]) for _ in claim.envelope.recipients]
    then = bounce = None
    if any(outcome.status is Status.DEFERRED for outcome in outcomes):
        held = "no route any more" if rng.random() < 0.2 else ""
        then = Next(account.clock.now() + rng.choice([0.0, 60.0]), rng.choice([LANE, OTHER_LANE]), held=held)
    if FAILED in outcomes:
        bounce = draft(account.spool, sender="", recipients=["app@acme.example"], content=b"Subject: bounce\r\n\r\n" + rng.randbytes(700))
    await account.settle(claim, outcomes, then=then, bounce=bounce)


@dataclass(slots=True)
class Found:
    """What a spool holds after a restart."""

    messages: dict[MessageId, Message]
    log: set[tuple[float, MessageId, str, str]]
    unreadable: dict[str, str]  # message, or the whole -> why
    used: int = 0  # settles that are counted as use of the quota


async def examine(directory: Path, clock: ManualClock) -> Found:
    """Open a spool that a crash has left, and take everything out of it that is there."""
    try:
        spool = SqliteSpool(directory, clock, backoff=lambda attempts: 60.0, keep_log_seconds=1e9)
    except SpoolError as error:
        return Found({}, set(), {"the spool": str(error)})
    view = SqliteView(directory, clock)
    try:
        held = {queued.id: queued.held for queued in view.queued()}
        log = {(entry.time, entry.id, entry.recipient, entry.status) for entry in view.log()}
        await spool.release(EVERYTHING)
        messages: dict[MessageId, Message] = {}
        unreadable: dict[str, str] = {}
        for lane in await spool.next_due():
            for claim in await spool.claim(lane, 100_000):
                try:
                    octets = octets_of(claim.content)
                except OSError as error:
                    unreadable[claim.id] = str(error)
                    continue
                if len(octets) != claim.content.size:  # as an attempt sees it
                    unreadable[claim.id] = f"has {len(octets)} octets instead of {claim.content.size}"
                    continue
                recipients, attempts = claim.envelope.recipients, claim.attempt - 1
                messages[claim.id] = Message(octets, claim.prefix, claim.lane, recipients, attempts, held[claim.id])
        if len(messages) < len(held):
            unreadable |= {queued.id: queued.held for queued in view.queued() if queued.id not in messages and queued.id not in unreadable}
        (sound,) = spool._database.execute("PRAGMA integrity_check").fetchone()
        if sound != "ok":
            unreadable["the database"] = str(sound)
        used = sum(each.transactions for each in await spool.used())
        return Found(messages, log, unreadable, used)
    finally:
        view.close()
        await spool.close()


def faults(found: Found, operations: Iterable[Operation], moment: int, *, log_since: float) -> list[str]:
    """What is wrong with what was found after a crash at this moment."""
    expected: dict[MessageId, Message | None] = {}
    logged: set[tuple[float, MessageId, str, str]] = set()
    open_to_doubt: list[Operation] = []
    started = sorted((o for o in operations if o.began <= moment), key=lambda o: o.ended if o.ended is not None else 1 << 60)
    # What a failed commit wrote may be found until the next one has written over it.
    written_over = max((o.began for o in started if o.ended is not None and o.ended <= moment), default=-1)
    for operation in started:
        if operation.ended is not None and operation.ended <= moment:
            expected |= operation.after
            logged |= {line for line in operation.logged if line[0] >= log_since}
        elif operation.refused is None or operation.refused > written_over:
            open_to_doubt.append(operation)
    for operation in open_to_doubt:  # done whole, or not at all: what is half done is not as promised
        if all(_same(found.messages.get(number), message) for number, message in operation.after.items()):
            expected |= operation.after
    refused = {number for operation in open_to_doubt if operation.refused is not None for number in operation.after}
    told = [f"unreadable: {number} {text}" for number, text in found.unreadable.items() if number not in refused]
    for number, message in expected.items():
        there = found.messages.get(number)
        if not _same(there, message):
            told.append(f"{number} is {_words(there)}, promised {_words(message)}")
    told += [f"{number} is there, and was never taken" for number in found.messages if number not in expected]
    told += [f"the delivery log lacks {line}" for line in sorted(logged - found.log)]
    counted = sum(o.what == "settle" and o not in open_to_doubt and o.refused is None for o in started)
    doubtful = sum(o.what == "settle" for o in open_to_doubt)
    if "the spool" not in found.unreadable and not counted <= found.used <= counted + doubtful:
        told.append(f"{found.used} settles have used the quota, promised {counted} and perhaps {doubtful} more")
    return told


def _same(there: Message | None, promised: Message | None) -> bool:
    if promised is not None and promised.active:  # whoever was trying it may have sent it
        doubted = tuple(r._replace(in_doubt=True) for r in promised.recipients)
        promised = replace(promised, recipients=doubted, active=False)
    return there == promised


def _words(message: Message | None) -> str:
    if message is None:
        return "gone"
    names = ",".join(r.address + ("?" if r.in_doubt else "") for r in message.recipients)
    return f"{len(message.octets)} octets for {names} in {message.lane.upstream}, {message.attempts} attempts, held {message.held!r}"


def operation_count(operations: Iterable[Operation]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for operation in operations:
        if operation.what == "claim" and operation.ended is None:
            continue  # might have been chosen, and was not
        kind = operation.what if operation.ended is not None else f"{operation.what} refused"
        counts[kind] = counts.get(kind, 0) + 1
    return counts
