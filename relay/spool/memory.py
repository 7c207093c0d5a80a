"""A spool that keeps nothing: the same protocol in plain dictionaries.

For tests of what stands above the spool, and the reference that the contract suite holds the durable spools against. Content that
came through a writer still goes to files, in a directory that the caller provides.

State: the queued messages, who has claimed them, and the delivery log.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from relay.clock import Clock
from relay.mail.envelope import Recipient
from relay.mail.outcome import Status
from relay.spool.base import (
    Claim,
    Content,
    ContentWriter,
    Draft,
    Lane,
    LeaseLost,
    LogEntry,
    MessageId,
    Next,
    Selection,
    Settlement,
    SpoolError,
    Used,
    Waiting,
)
from relay.spool.files import ContentFiles
from relay.spool.records import id_of, is_unwarned, matters, number_of
from relay.spool.room import Room

_LEASE_SECONDS = 15 * 60
_PAGE = 200


@dataclass(slots=True)
class _Message:
    draft: Draft
    due: float
    attempts: int = 0
    token: int | None = None
    lease_until: float = 0.0  # monotonic seconds
    held: str = ""

    @property
    def state(self) -> str:
        return "held" if self.held else "active" if self.token is not None else "deferred" if self.attempts else "due"


class MemorySpool:
    """See `spool.base.Spool`."""

    def __init__(self, directory: Path, clock: Clock, *, backoff: Callable[[int], float]) -> None:
        self._files = ContentFiles(directory, Room(directory, clock))
        self._clock = clock
        self._backoff = backoff
        self._messages: dict[MessageId, _Message] = {}
        self._tokens = itertools.count(1)
        self._last_id = 0
        self._retried_first: set[Lane] = set()
        self._used: Counter[tuple[str, int, int, int]] = Counter()  # upstream, seconds, start, and which of the two counts
        self.log: list[LogEntry] = []

    def new_id(self) -> MessageId:
        self._last_id = max(self._last_id + 1, int(self._clock.now() * 1_000_000))
        return id_of(self._last_id)

    def writer(self) -> ContentWriter:
        return self._files.writer()

    def discard(self, content: Content) -> None:
        if content.path is not None:
            self._files.discard(content.path)

    async def put(self, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Sequence[Claim | None]:
        self._check_new([draft.id for draft in drafts])
        stored: dict[int, Content] = {}
        for draft in drafts:
            if id(draft.content) not in stored:
                filed = draft.content.octets is None
                stored[id(draft.content)] = await self._files.store(draft.content, number_of(draft.id)) if filed else draft.content
        claims: list[Claim | None] = []
        for draft, claim in zip(drafts, claimed, strict=True):
            message = self._messages[draft.id] = _Message(draft._replace(content=stored[id(draft.content)]), draft.due)
            claims.append(self._begin(message) if claim else None)
        return claims

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        now = self._clock.now()
        waiting = [m for m in self._waiting() if m.draft.lane == lane and m.due <= now]
        fresh = sorted((m for m in waiting if not m.attempts), key=lambda m: m.due)
        retried = sorted((m for m in waiting if m.attempts), key=lambda m: m.due)
        turns = (retried, fresh) if lane in self._retried_first else (fresh, retried)
        self._retried_first ^= {lane}
        chosen = [m for pair in itertools.zip_longest(*turns) for m in pair if m is not None][:limit]
        return [self._begin(message) for message in chosen]

    async def settle(self, settlement: Settlement) -> None:
        claim, outcomes = settlement.claim, settlement.outcomes
        assert outcomes.keys() == {r.address for r in claim.envelope.recipients}, "every recipient is accounted for"
        message = self._messages.get(claim.id)
        if message is None or message.token != claim.token:
            raise LeaseLost(claim.id)
        if settlement.bounce is not None:
            self._check_new([settlement.bounce.id])
            self._messages[settlement.bounce.id] = _Message(settlement.bounce, settlement.bounce.due)
        self._note_settlement(message, settlement)
        for each in settlement.used:
            self._used.update(dict(zip(((*each[:3], which) for which in range(2)), each[3:], strict=True)))
        waiting = tuple(r for r in claim.envelope.recipients if outcomes[r.address].status is Status.DEFERRED)
        if waiting:
            self._continue(message, settlement, waiting)
        else:
            del self._messages[claim.id]
            self._let_go(message.draft.content)

    async def dated(self, claim: Claim) -> Claim:
        return claim  # times are kept as they came

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        now, until = self._clock.monotonic(), self._clock.now() + _LEASE_SECONDS
        renewed = []
        for claim in claims:
            message = self._messages.get(claim.id)
            if message is not None and message.token == claim.token and message.lease_until > now:
                message.lease_until = now + _LEASE_SECONDS
                renewed.append(claim._replace(lease_until=until))
        return renewed

    async def next_due(self) -> Mapping[Lane, float]:
        self._expire()
        due: dict[Lane, float] = {}
        for message in self._waiting():
            due[message.draft.lane] = min(message.due, due.get(message.draft.lane, message.due))
        return due

    async def used(self) -> Sequence[Used]:
        now, counts = int(self._clock.now()), Counter[tuple[str, int, int, int]]()
        for (upstream, seconds, start, which), count in self._used.items():
            counts[upstream, seconds, min(start, now), which] += count
        self._used = counts
        counted = (Used(*key, counts[*key, 0], counts[*key, 1]) for key in sorted({key[:3] for key in counts}))
        return [each for each in counted if matters(each, self._clock.now())]

    async def overdue(self, limit: int) -> Sequence[Claim]:
        now = self._clock.now()
        late = [m for m in self._messages.values() if m.held and m.token is None and m.due <= now]
        return [self._begin(message, ending=True) for message in sorted(late, key=lambda m: m.due)[:limit]]

    async def oldest(self, after: str, accepted_before: float) -> tuple[Sequence[Waiting], str | None]:
        now = self._clock.now()
        waiting = [m.draft for m in self._waiting() if m.due <= now and m.draft.created <= accepted_before and m.draft.id > after]
        page = [
            Waiting(d.id, d.lane, d.created, is_unwarned(d.envelope.sender, d.envelope.recipients))
            for d in sorted(waiting, key=lambda d: d.id)[:_PAGE]
        ]
        return page, page[-1].id if len(waiting) > _PAGE else None

    async def late(self, ids: Sequence[MessageId]) -> Sequence[Claim]:
        now = self._clock.now()
        waiting = {m.draft.id: m for m in self._waiting() if m.due <= now}
        return [self._begin(waiting[id], ending=True) for id in ids if id in waiting]

    async def hasten(self, lane: Lane) -> bool:
        now = self._clock.now()
        later = [m for m in self._waiting() if m.draft.lane == lane and m.due > now]
        for message in later:
            message.due = now
        return bool(later)

    async def hold(self, selection: Selection, reason: str) -> Sequence[MessageId]:
        chosen = [m for m in self._chosen(selection) if not m.held or m.due < inf]
        for message in chosen:
            message.held, message.due = reason, inf
            self._note_all(message, "held", reason)
        return [message.draft.id for message in chosen]

    async def release(self, selection: Selection) -> Sequence[Next]:
        now = self._clock.now()
        chosen = [m for m in self._chosen(selection) if m.held]
        for message in chosen:
            self._note_all(message, "released", f"was held: {message.held}")
            message.held, message.due = "", now
        return [Next(now, message.draft.lane) for message in chosen]

    async def reschedule(self, selection: Selection) -> Sequence[Next]:
        now = self._clock.now()
        chosen = [m for m in self._chosen(selection) if not m.held]
        for message in chosen:
            message.due = min(message.due, now)
        return [Next(now, message.draft.lane) for message in chosen]

    async def drop(self, selection: Selection) -> Sequence[MessageId]:
        chosen = self._chosen(selection)
        for message in chosen:
            self._note_all(message, "dropped", f"was held: {message.held}" if message.held else "by the operator")
            del self._messages[message.draft.id]
        for message in chosen:
            self._let_go(message.draft.content)
        return [message.draft.id for message in chosen]

    async def take(self, selection: Selection, limit: int) -> Sequence[Claim]:
        return [self._begin(message, ending=True) for message in self._chosen(selection)[:limit]]

    def obstacle(self, size: int = 0) -> SpoolError | None:
        return None

    async def close(self) -> None:
        self._files.close()

    def _check_new(self, ids: Sequence[MessageId]) -> None:
        if len(set(ids)) < len(ids) or any(each in self._messages for each in ids):
            raise SpoolError("a message with this id exists already")

    def _waiting(self) -> list[_Message]:
        return [m for m in self._messages.values() if m.token is None and not m.held]

    def _chosen(self, selection: Selection) -> list[_Message]:
        """What an operator's verb may touch of what was asked for, oldest first."""
        oldest = self._clock.now() - (selection.older_than or 0.0)
        return [
            m
            for m in sorted(self._messages.values(), key=lambda m: m.draft.id)
            if m.token is None
            and (not selection.ids or m.draft.id in selection.ids)
            and selection.route in ("", m.draft.lane.route)
            and selection.upstream in ("", m.draft.lane.upstream)
            and selection.state in ("", m.state)
            and (selection.older_than is None or m.draft.created <= oldest)
            and selection.admits(m.draft.envelope.sender, (r.address for r in m.draft.envelope.recipients))
        ]

    def _begin(self, message: _Message, *, ending: bool = False) -> Claim:
        now, token = self._clock.now(), next(self._tokens)
        message.token = -token if ending else token
        message.lease_until = self._clock.monotonic() + _LEASE_SECONDS
        if not ending:
            message.attempts += 1
            message.due = now + self._backoff(message.attempts)
        d = message.draft
        return Claim(
            d.id, message.token, d.lane, d.envelope, d.content, d.created, message.attempts, now + _LEASE_SECONDS, d.prefix, d.origin,
            d.summary, message.held,
        )  # fmt: skip

    def _continue(self, message: _Message, settlement: Settlement, waiting: tuple[Recipient, ...]) -> None:
        then, outcomes = settlement.next, settlement.outcomes
        assert then is not None, "a deferred recipient has a next time"
        kept = tuple(r._replace(in_doubt=r.in_doubt or outcomes[r.address].in_doubt) for r in waiting)
        message.draft = message.draft._replace(lane=then.lane, envelope=message.draft.envelope._replace(recipients=kept))
        message.due, message.held, message.token = then.when, then.held, None
        if not then.counted and settlement.claim.token > 0:
            message.attempts -= 1

    def _let_go(self, content: Content) -> None:
        """Remove the file of content that no message has any more."""
        if content.path is not None and all(m.draft.content.path != content.path for m in self._messages.values()):
            content.path.unlink(missing_ok=True)

    def _expire(self) -> None:
        for message in self._messages.values():
            if message.token is not None and message.lease_until <= self._clock.monotonic():
                tried, message.token = message.token > 0, None
                envelope = message.draft.envelope
                doubted = tuple(r._replace(in_doubt=r.in_doubt or tried) for r in envelope.recipients)
                message.draft = message.draft._replace(envelope=envelope._replace(recipients=doubted))

    def _note_settlement(self, message: _Message, settlement: Settlement) -> None:
        if settlement.tried:
            report = settlement.bounce.id if settlement.bounce is not None else ""
            for recipient in message.draft.envelope.recipients:
                outcome = settlement.outcomes[recipient.address]
                self._note(message, recipient, outcome.status.value, str(outcome.reply), report)
        elif settlement.next is not None and settlement.next.held:
            self._note_all(message, "held", settlement.next.held)

    def _note_all(self, message: _Message, status: str, reply: str) -> None:
        for recipient in message.draft.envelope.recipients:
            self._note(message, recipient, status, reply)

    def _note(self, message: _Message, recipient: Recipient, status: str, reply: str, report: str = "") -> None:
        d, now = message.draft, self._clock.now()
        entry = LogEntry(
            now, d.id, d.lane, d.envelope.sender, recipient.address, status, message.attempts, now - d.created, d.content.size, reply,
            d.created, d.summary, report,
        )  # fmt: skip
        self.log.append(entry)
