"""The spool: durable custody of accepted mail, and the only meeting point of intake and delivery.

This module is the protocol and its laws; `sqlite` and `memory` implement it and pass one contract suite.

Laws: after `put` returns, a crash loses nothing. What `put` was given is taken whole or not at all. A claim is exclusive until it
expires; settling with a stale token changes nothing and raises LeaseLost. A settle is one step: results, bounce, lane and next
time are durable together, and content is removed only after the last recipient is accounted for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, NewType, Protocol

from relay.mail.address import patterns_for
from relay.mail.envelope import NO_ORIGIN, NO_SUMMARY, Envelope, Origin, Summary
from relay.mail.outcome import Outcome

#: What clients, logs and operators call a message: 13 or more hexadecimal digits, rising with time.
MessageId = NewType("MessageId", str)

#: Content above this many octets is a file of its own, not a row (SQLite reads and writes larger blobs slower than the file system).
FILE_ABOVE_BYTES = 256 * 1024


class SpoolError(Exception):
    """Custody could not be taken or changed: an I/O error, a damaged file. Nothing was changed; try again later."""


class SpoolFull(SpoolError):
    """No room: the disk is full or the spool's own limit is reached."""


class SpoolInUse(SpoolError):
    """Another relay holds this directory."""


class SpoolDamaged(SpoolError):
    """What is in the directory is no spool that this relay can read. Trying again changes nothing; a person must act."""


class LeaseLost(Exception):
    """The claim has expired or was taken over; somebody else decides about the message now."""


class Lane(NamedTuple):
    """The due messages of one route at one upstream."""

    upstream: str
    route: str


class Content(NamedTuple):
    """The content of one message: `octets`, or a file at `path`. `size` in octets. `eight_bit`: has an octet above 127.

    `dotted`: may have a line that begins with a dot; where it is known to have none, sending need not look.
    """

    size: int
    octets: bytes | None = None
    path: Path | None = None
    eight_bit: bool = False
    dotted: bool = True


class Draft(NamedTuple):
    """One message for one lane, before custody.

    `prefix` are the header fields that we made at intake (Received, missing Message-ID and Date): they go before the content,
    whose bytes are never edited. `due`: seconds since the epoch.
    Drafts of one `put` that carry the same `content` object share it on disk: a message split over several routes.
    """

    id: MessageId
    lane: Lane
    envelope: Envelope
    content: Content
    created: float
    prefix: bytes = b""
    origin: Origin = NO_ORIGIN
    summary: Summary = NO_SUMMARY
    due: float = 0.0


class Claim(NamedTuple):
    """An exclusive right to attempt one message until `lease_until` (seconds since the epoch).

    `attempt` counts from 1. A claim by `overdue`, `late` or `take` is not for trying the message: its token is negative, its
    `attempt` is the last one begun (0: none), and `held` says why the message was held, if it was.
    """

    id: MessageId
    token: int
    lane: Lane
    envelope: Envelope
    content: Content
    created: float
    attempt: int
    lease_until: float
    prefix: bytes = b""
    origin: Origin = NO_ORIGIN
    summary: Summary = NO_SUMMARY
    held: str = ""


class Waiting(NamedTuple):
    """A message that waits for an attempt and is due. `unwarned`: its sender may have to hear of a delay, and has not."""

    id: MessageId
    lane: Lane
    created: float
    unwarned: bool


class Next(NamedTuple):
    """What becomes of the recipients that are still to be served: due at `when` (seconds since the epoch) in `lane`.

    `counted`: whether the attempt that ends here counts (a throttled one does not). `held`: why nobody shall try, or `""`; then
    `when` is when the message is given up (infinity: only by an operator).
    """

    when: float
    lane: Lane
    counted: bool = True
    held: str = ""


class Used(NamedTuple):
    """What an upstream was given in one slice of the window of a quota. The window has so many `seconds`; `start`: seconds since the
    epoch."""

    upstream: str
    seconds: int
    start: int
    transactions: int
    recipients: int


class Settlement(NamedTuple):
    """The end of one claim: an outcome for every recipient it had, what is next for those deferred, and the bounce, if any.

    `tried`: False when the message goes elsewhere without an attempt: nothing for the delivery log but that it is held, and its last
    reply stays. `used`: what the attempt used of the upstream's quotas, to be added to what is known.
    """

    claim: Claim
    outcomes: Mapping[str, Outcome]
    next: Next | None = None
    bounce: Draft | None = None
    tried: bool = True
    used: tuple[Used, ...] = ()


#: Of a queued message.
STATES: Final = ("due", "active", "deferred", "held")


class Queued(NamedTuple):
    """The operator's view of one queued message. `state` is one of the STATES.

    `due` of a held message: when it is given up. What damage has made unreadable is empty.
    """

    id: MessageId
    state: str
    lane: Lane
    sender: str
    recipients: tuple[str, ...]
    size: int
    created: float
    due: float
    attempts: int
    held: str = ""
    last_reply: str = ""
    in_doubt: bool = False


class LogEntry(NamedTuple):
    """What became of one recipient, from the delivery log: the result of an attempt, or held, released or dropped without one.

    `delay`: seconds from acceptance to this result. `report`: the report that the same attempt made to the sender, or `""`.
    """

    time: float
    id: MessageId
    lane: Lane
    sender: str
    recipient: str
    status: str
    attempt: int
    delay: float
    size: int
    reply: str
    created: float
    summary: Summary = NO_SUMMARY
    report: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which messages or results an operator asks for; what is left empty selects all.

    `sender` and `recipient` are conditions as routes have them, in the form in which they compare: an address, a domain, `*.domain`
    or `<>`. `state`: that of a queued message, or the status in the delivery log. `older_than`: seconds since acceptance or since
    the result.
    """

    ids: frozenset[str] = frozenset()
    route: str = ""
    upstream: str = ""
    sender: str = ""
    recipient: str = ""
    state: str = ""
    older_than: float | None = None

    def admits(self, sender: str, recipients: Iterable[str]) -> bool:
        """Whether the sender and one of the recipients are as asked for."""
        if not _meets(self.sender, sender):
            return False
        return not self.recipient or any(_meets(self.recipient, address) for address in recipients)


EVERYTHING = Selection()


def _meets(condition: str, address: str) -> bool:
    if condition == "<>":
        return not address
    return not condition or condition in patterns_for(address)


class ContentWriter(Protocol):
    """Takes content as it arrives, in memory while it is small and in a file of the spool when it grows.

    After `finish()` the content may be put; after `discard()` nothing is left. One of the two must be called.
    """

    async def write(self, octets: bytes) -> None: ...
    async def finish(self) -> Content: ...
    def discard(self) -> None: ...


class Spool(Protocol):
    """Durable custody. After put() returns, a crash loses nothing."""

    def new_id(self) -> MessageId:
        """An id that this spool has never given before."""
        ...

    def writer(self) -> ContentWriter:
        """A place for content that is still arriving."""
        ...

    def discard(self, content: Content) -> None:
        """Throw away content that was written and will not be put."""
        ...

    async def put(self, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Sequence[Claim | None]:
        """Take custody of all `drafts` or none. Where `claimed` says so the draft is stored as already claimed for its first attempt.

        Raises SpoolFull or SpoolError; then nothing was taken and the content is discarded.
        """
        ...

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        """Claim up to `limit` messages of `lane` that are due now; fresh and retried mail in turn."""
        ...

    async def settle(self, settlement: Settlement) -> None:
        """End a claim. Raises LeaseLost when the claim is no longer ours, SpoolError when it could not be stored."""
        ...

    async def dated(self, claim: Claim) -> Claim:
        """The same claim, with the time of acceptance as the clock has it now, which may have been set since the claim was made."""
        ...

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """Prolong claims. Those that were lost are missing from the answer."""
        ...

    async def next_due(self) -> Mapping[Lane, float]:
        """When each lane that has waiting mail is due next. Held mail does not count.

        Leases end here, not by themselves: what was claimed for too long waits again, in doubt if it was claimed to be tried.
        """
        ...

    async def used(self) -> Sequence[Used]:
        """What settlements have used of quotas that still matters, for each upstream the oldest first. What was used by a clock that was
        ahead of this one counts as used now."""
        ...

    async def overdue(self, limit: int) -> Sequence[Claim]:
        """Claim up to `limit` held messages whose time is up, to be given up. What is held without end is never among them."""
        ...

    async def oldest(self, after: str, accepted_before: float) -> tuple[Sequence[Waiting], str | None]:
        """One page of what waits, is due and was accepted before then, whatever its lane: the oldest first, behind the id `after` (`""`:
        from the beginning). And behind which id the next page begins; None: there is none."""
        ...

    async def late(self, ids: Sequence[MessageId]) -> Sequence[Claim]:
        """Claim those of these messages that still wait and are due: to be given up, moved to another lane, or put back, and not for an
        attempt."""
        ...

    async def hasten(self, lane: Lane) -> bool:
        """Make some hundreds of what waits in a lane due now; answers whether there may be more. Beside `reschedule` because it looks at
        nothing but the lane."""
        ...

    # The operator's verbs. None touches a message that is being attempted. Each works in steps, so that a long queue stops nobody:
    # a message that comes or goes meanwhile may have escaped it.

    async def hold(self, selection: Selection, reason: str) -> Sequence[MessageId]:
        """Hold without end, what is held until a certain time too. Answers which; not those that were held without end already."""
        ...

    async def release(self, selection: Selection) -> Sequence[Next]:
        """Make held mail due now. Answers what is due, and where: one for each message."""
        ...

    async def reschedule(self, selection: Selection) -> Sequence[Next]:
        """Make mail that waits, and is not held, due now. Answers what is due, and where: one for each message."""
        ...

    async def drop(self, selection: Selection) -> Sequence[MessageId]:
        """Remove mail with its content. Answers which."""
        ...

    async def take(self, selection: Selection, limit: int) -> Sequence[Claim]:
        """Claim up to `limit` messages, held or not, due or not, to be given up."""
        ...

    def obstacle(self, size: int = 0) -> SpoolError | None:
        """Why custody of so many octets cannot be taken at the moment, as `put` would say it, or None. Cheap: no I/O."""
        ...

    async def close(self) -> None:
        """Finish what is under way and let the directory go."""
        ...
