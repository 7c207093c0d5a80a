"""A spool that keeps nothing: the same protocol in plain dictionaries.

For tests of what stands above the spool, and the reference that the contract suite holds the durable spools against. Content that
came through a writer still goes to files, in a directory that the caller provides.

State: the queued messages, who has claimed them, and the delivery log.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from relay.clock import Clock
from relay.mail.envelope import Recipient
from relay.mail.outcome import Status
from relay.spool.base import Claim, Content, ContentWriter, Draft, Lane, LeaseLost, LogEntry, MessageId, Settlement, SpoolError
from relay.spool.files import ContentFiles
from relay.spool.records import id_of, number_of

_LEASE_SECONDS = 15 * 60


@dataclass(slots=True)
class _Message:
    draft: Draft
    due: float
    attempts: int = 0
    token: int | None = None
    lease_until: float = 0.0  # monotonic seconds
    held: str = ""


class MemorySpool:
    """See `spool.base.Spool`."""

    def __init__(self, directory: Path, clock: Clock, *, backoff: Callable[[int], float]) -> None:
        self._files = ContentFiles(directory)
        self._clock = clock
        self._backoff = backoff
        self._messages: dict[MessageId, _Message] = {}
        self._tokens = itertools.count(1)
        self._last_id = 0
        self._retried_first = False
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
        self._retried_first = not self._retried_first
        turns = (retried, fresh) if self._retried_first else (fresh, retried)
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
        waiting = tuple(r for r in claim.envelope.recipients if outcomes[r.address].status is Status.DEFERRED)
        if waiting:
            self._continue(message, settlement, waiting)
        else:
            del self._messages[claim.id]
            self._let_go(message.draft.content)
        if settlement.tried:
            self.log += [_log_entry(settlement, recipient, self._clock.now()) for recipient in claim.envelope.recipients]

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

    def unhealthy(self) -> str | None:
        return None

    async def close(self) -> None:
        self._files.close()

    def _check_new(self, ids: Sequence[MessageId]) -> None:
        if len(set(ids)) < len(ids) or any(each in self._messages for each in ids):
            raise SpoolError("a message with this id exists already")

    def _waiting(self) -> list[_Message]:
        return [m for m in self._messages.values() if m.token is None and not m.held]

    def _begin(self, message: _Message) -> Claim:
        now = self._clock.now()
        message.attempts += 1
        message.token = next(self._tokens)
        message.lease_until = self._clock.monotonic() + _LEASE_SECONDS
        message.due = now + self._backoff(message.attempts)
        d = message.draft
        return Claim(
            d.id, message.token, d.lane, d.envelope, d.content, d.created, message.attempts, now + _LEASE_SECONDS, d.prefix, d.origin,
            d.summary,
        )  # fmt: skip

    def _continue(self, message: _Message, settlement: Settlement, waiting: tuple[Recipient, ...]) -> None:
        then, outcomes = settlement.next, settlement.outcomes
        assert then is not None, "a deferred recipient has a next time"
        kept = tuple(r._replace(in_doubt=r.in_doubt or outcomes[r.address].in_doubt) for r in waiting)
        message.draft = message.draft._replace(lane=then.lane, envelope=message.draft.envelope._replace(recipients=kept))
        message.due, message.held, message.token = then.when, then.held, None
        if not then.counted:
            message.attempts -= 1

    def _let_go(self, content: Content) -> None:
        """Remove the file of content that no message has any more."""
        if content.path is not None and all(m.draft.content.path != content.path for m in self._messages.values()):
            content.path.unlink()

    def _expire(self) -> None:
        for message in self._messages.values():
            if message.token is not None and message.lease_until <= self._clock.monotonic():
                message.token = None
                envelope = message.draft.envelope
                doubted = tuple(r._replace(in_doubt=True) for r in envelope.recipients)
                message.draft = message.draft._replace(envelope=envelope._replace(recipients=doubted))


def _log_entry(settlement: Settlement, recipient: Recipient, now: float) -> LogEntry:
    claim, outcome = settlement.claim, settlement.outcomes[recipient.address]
    return LogEntry(
        now, claim.id, claim.lane, claim.envelope.sender, recipient.address, outcome.status.value, claim.attempt,
        now - claim.created, claim.content.size, str(outcome.reply), claim.created, claim.summary,
    )  # fmt: skip
