"""The report that an attempt owes to a sender, as a draft for the spool: of whom it speaks and where it goes is decided here, what it
says in `mail.bounce`.

State: none but what it was built with. Laws: one report for an attempt, whatever became of how many; nobody is warned twice of a delay;
a report is routed as the sender's own mail is; nobody is told about a report.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from relay.clock import Clock
from relay.config.model import Config, Retry
from relay.delivery.retry import Plan
from relay.mail import header
from relay.mail.bounce import About, Action, Bounce, Notice, make_bounce
from relay.mail.dsn import wants
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Status
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, MessageId, Spool

_T = TypeVar("_T")

_HEAD_BYTES = 64 * 1024  # of a content file: as much header as a report shows

#: A report of more recipients is made in a thread: at a thousand of them, with all that upstreams may say, it takes two seconds.
_AT_ONCE = 20


class Report(NamedTuple):
    """A report to be queued, or None where nobody may be told; what it says of whom; and the claim to settle, which remembers who was
    warned of a delay. `fault`: why there is none although there should be."""

    claim: Claim
    draft: Draft | None = None
    told: Sequence[Notice] = ()
    fault: str = ""

    def addresses(self, action: Action) -> tuple[str, ...]:
        """The recipients who it says had this fate."""
        return tuple(notice.recipient.address for notice in self.told if notice.action is action)


class Reporter:
    """Makes reports."""

    def __init__(self, config: Config, router: Router, spool: Spool, clock: Clock) -> None:
        self._config = config
        self._router = router
        self._spool = spool
        self._clock = clock

    async def report(self, claim: Claim, decided: Plan, *, header_block: bytes = b"", given_up: str = "") -> Report:
        """What the sender is to be told of an attempt that came to `decided`.

        `header_block` is the message's own, without our prefix, or empty when it was not read. `given_up`: why it ends without an
        attempt, for the sender to read; of held mail whose time is up it is known.
        """
        if not claim.envelope.sender:
            return Report(claim)
        now, retry = self._clock.now(), self._router.retry_of(claim.lane.route)
        notices = list(_notices(claim, decided, late=_is_late(claim, decided, retry, now)))
        if not notices:
            return Report(claim)
        if claim.held and not given_up and all(notice.outcome.status is Status.DEFERRED for notice in notices):
            given_up = f"it was held until its time was up; {claim.held}"
        head, rest = await _original(claim.content, header_block)
        about = About(
            claim.id, claim.envelope, notices, claim.prefix + head, claim.created, claim.created + retry.expire, claim.lane.upstream,
            self._host(claim.lane.upstream), rest, given_up,
        )  # fmt: skip
        new_id = self._spool.new_id()
        make = partial(make_bounce, about, reporting_mta=self._config.hostname, bounce_id=new_id, now=now)
        if len(notices) > _AT_ONCE:
            bounce = await _beside_the_loop(make)
        else:
            bounce = make()
        if bounce is None:
            return Report(claim)
        return Report(_with_warned(claim, bounce.told), self._draft(claim, bounce, new_id, now=now), bounce.told)

    def _draft(self, claim: Claim, bounce: Bounce, new_id: MessageId, *, now: float) -> Draft:
        own = claim.origin
        origin = Origin(own.listener, own.client, own.user, own.session, claim.envelope.sender)
        route = self._router.report_route(bounce.recipient, origin, came_by=claim.lane.route)
        lane = Lane(route.upstream, route.name) if route is not None and route.upstream is not None else claim.lane
        content = Content(len(bounce.content), bounce.content, eight_bit=not bounce.content.isascii())
        envelope = Envelope("", (Recipient(bounce.recipient),), smtputf8=not bounce.recipient.isascii())
        return Draft(new_id, lane, envelope, content, now, origin=origin, due=now)

    def _host(self, upstream: str) -> str:
        """The host that gave a reply, where the upstream has only one."""
        settings = self._config.upstreams.get(upstream)
        return settings.host[0] if settings is not None and len(settings.host) == 1 else ""


def _is_late(claim: Claim, decided: Plan, retry: Retry, now: float) -> bool:
    """Whether those who still wait have waited so long that the sender should know. A fallback is tried first: that takes no time."""
    waits = decided.next is not None and not decided.next.held and not decided.fallback
    return waits and retry.warn_after is not None and now >= claim.created + retry.warn_after


def _notices(claim: Claim, decided: Plan, *, late: bool) -> Iterator[Notice]:
    """Who has something to be told of. `make_bounce` asks NOTIFY; but of success, only those hear who asked for it."""
    failed = {recipient.address: outcome for recipient, outcome in decided.failed}
    for recipient in claim.envelope.recipients:
        outcome = decided.outcomes[recipient.address]
        if outcome.status is Status.FAILED:
            yield Notice(recipient, failed[recipient.address], Action.FAILED)
        elif outcome.status is Status.SENT:
            if not outcome.reports and wants(recipient.notify, "SUCCESS"):
                yield Notice(recipient, outcome, Action.RELAYED)
        elif late and not recipient.warned:
            yield Notice(recipient, outcome, Action.DELAYED)


def _with_warned(claim: Claim, told: Sequence[Notice]) -> Claim:
    warned = {notice.recipient.address for notice in told if notice.action is Action.DELAYED}
    if not warned:
        return claim
    recipients = tuple(r._replace(warned=True) if r.address in warned else r for r in claim.envelope.recipients)
    return claim._replace(envelope=claim.envelope._replace(recipients=recipients))


async def _original(content: Content, header_block: bytes) -> tuple[bytes, bytes | None]:
    """The header block, and what follows it where that is small. What is a file too comes back as a header, also from the first attempt."""
    if content.octets is not None and content.path is None:
        head, rest = header.split(content.octets)
        return head, header.separator(rest) + rest
    if header_block or content.path is None:
        return header_block, None
    return await _beside_the_loop(partial(_header_of, content.path)), None


async def _beside_the_loop(work: Callable[[], _T]) -> _T:
    """What `work` answers, from a thread. Where the system has none left, from here: what became of the message waits to be stored."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:
        return work()


def _header_of(path: Path) -> bytes:
    """The header block of a content file; empty when it cannot be read, which must not keep the report back."""
    try:
        with open(path, "rb", buffering=0) as file:
            return header.block_of(os.pread(file.fileno(), _HEAD_BYTES, 0))
    except OSError:
        return b""
