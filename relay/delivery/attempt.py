"""One try of one claimed message at one upstream: from the claim to one outcome for each recipient.

Matches the route again where the configuration may have changed since, rewrites, asks a last time whether this credential may send
this, and sends. Whatever goes wrong here is temporary and loud (law 9). What follows from the outcomes is `delivery.settle`.

State: how many recipients upstreams were seen to take at once.
"""

import asyncio
import errno
import math
import os
from collections.abc import AsyncGenerator, Callable, Container, Mapping
from typing import NamedTuple

from relay.clock import Clock
from relay.config.model import Config, Route
from relay.delivery.breaker import Breakers
from relay.delivery.verified import Verified
from relay.mail import header
from relay.mail.content import has_dot_line
from relay.mail.outcome import Failure, Outcome, Phase, Scope, Status, outcome_of_failure
from relay.mail.permission import objection, report_author
from relay.mail.reply import Reply
from relay.mail.rewrite import Rewrite, envelope_sender, rewrite_header
from relay.observe.journal import Journal
from relay.routing import Router, upstreams_of
from relay.spool.base import Claim, Content, Lane, Next, Used
from relay.upstream.pool import Pool
from relay.upstream.transaction import Outgoing

_SLICE_BYTES = 256 * 1024
_HEAD_BYTES = 1024 * 1024 + 64 * 1024  # a header block may have 1 MiB

# Codes that say "not more at once" rather than "not this one", where others of the transaction were taken (RFC 5321 section 4.5.3.1.10).
_TOO_MANY = (452, 552)
_CROWD_SECONDS = 3600.0

# At RCPT: no reply, the end of the session, and what is wrong with the login.
_OF_ALL = (0, 421, 530, 534, 535, 538)

# The machine lacks something for the moment; with the file there is nothing wrong.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class Result(NamedTuple):
    """What an attempt came to: outcomes by address, or where the message goes without having been tried.

    `header_block` is the message's own, for a bounce; empty when it was not read. `tried`: False when the upstream's breaker is open,
    or it is not verified. `revived`: the upstream works again after a long time. `transactions`: how many it took. Of an upstream with
    a pace, what is to be stored as `used`, and when one that asked us to slow down is given mail again (`resumes`, epoch).
    """

    outcomes: Mapping[str, Outcome]
    moved: Next | None = None
    header_block: bytes = b""
    tried: bool = True
    revived: bool = False
    transactions: int = 1
    used: tuple[Used, ...] = ()
    resumes: float = 0.0


class _Unread(Exception):
    """Content could not be read to its end: its final dot was not sent, and nobody has the message."""


class Attempts:
    """Tries claims."""

    def __init__(
        self, config: Config, router: Router, pool: Pool, journal: Journal, clock: Clock, *, breakers: Breakers,
        verified: Verified | None = None,
    ) -> None:  # fmt: skip
        """`verified`: asked for routes with `verified_only`."""
        self._verified = verified
        self._config = config
        self._router = router
        self._pool = pool
        self._journal = journal
        self._clock = clock
        self._breakers = breakers
        self._turn = asyncio.Lock()
        self._crowds: dict[str, tuple[int, float]] = {}  # how many recipients an upstream takes at once, and until when we rely on it

    async def send(self, claim: Claim, *, fresh: bool) -> Result:
        """Try the message. `fresh`: it was routed a moment ago and has not been in the spool's queue. Never raises."""
        outcomes: dict[str, Outcome] = {}
        try:
            route = self._router.route(claim.lane.route)
            if not fresh:
                route, moved = self._target(claim)
                if moved is not None:
                    return Result(untried(claim), moved)
            assert route is not None, "a lane's route exists, or the message was moved"
            upstream, closed = claim.lane.upstream, None
            if route.verified_only and self._verified is not None and upstream == route.upstream:
                closed = self._verified.objection(upstream)
            if (closed := closed or self._breakers.admit(upstream, claim.id)) is not None:
                return Result(for_everybody(claim, closed), tried=False)
            try:
                result = await self._try(claim, route, outcomes)
            finally:
                revived = self._breakers.record(upstream, claim.id, outcomes.values())
            return result._replace(revived=True) if revived else result
        except _Unread as error:
            self._journal.fault("reading a message", error, id=claim.id)
            unread = Outcome(Status.DEFERRED, Scope.MESSAGE, Phase.CONTENT, Reply(0, "", f"its content cannot be read now: {error}"))
            return Result({r.address: outcomes.get(r.address, unread) for r in claim.envelope.recipients})
        except Exception as error:
            self._journal.fault("an attempt", error, id=claim.id, session=claim.origin.session)
            # Whether the upstream has it is not known, so nobody else may get it.
            outcome = outcome_of_failure(Phase.FINAL, Failure.CLOSED, "local error while delivering, see the log")
            return Result({r.address: outcomes.get(r.address, outcome) for r in claim.envelope.recipients})

    @property
    def riding(self) -> Container[str]:
        """The upstreams where messages ride behind others (`upstream.rides`), so that more attempts than connections are of use."""
        return self._pool.riding

    def _target(self, claim: Claim) -> tuple[Route | None, Next | None]:
        """The route that takes the message now, and where it must go first, if not to the lane it is in."""
        lane, now = claim.lane, self._clock.now()
        known = self._router.route(lane.route)
        recipients = [r.address for r in claim.envelope.recipients]
        if _is_report(claim):
            routes = [self._router.report_route(address, claim.origin, came_by=lane.route) for address in recipients]
        else:
            if known is not None and known.upstream is not None and (rules := self._router.rewrite_for(known, known.upstream)) is not None:
                # The hidden copy was never routed: it goes where the others go, and where it went with them once they are done.
                recipients = [address for address in recipients if address != rules.bcc]
            routes = [self._router.choose(claim.envelope.sender, address, claim.origin) for address in recipients] or [known]
        route = routes[0]
        if len({each.name if each is not None else "" for each in routes}) > 1:
            return None, self._hold(claim, "its recipients now take different routes")
        if route is None:
            return None, self._hold(claim, "no route takes its sender any more")
        if route.upstream is None:
            return None, self._hold(claim, f"route {route.name} now rejects it: {route.reject}")
        if lane.upstream in upstreams_of(route) and lane.route == route.name:
            return route, None
        upstream = lane.upstream if lane.upstream in upstreams_of(route) else route.upstream
        return route, Next(now, Lane(upstream, route.name), counted=False)

    def _hold(self, claim: Claim, reason: str) -> Next:
        """Held until somebody acts, or it expires like mail that is tried."""
        return Next(claim.created + self._router.retry_of(claim.lane.route).expire, claim.lane, counted=False, held=reason)

    async def _try(self, claim: Claim, route: Route, outcomes: dict[str, Outcome]) -> Result:
        """Send to everybody. `outcomes` grows as the transactions end, so that an error in a later one forgets nobody."""
        envelope, name = claim.envelope, claim.lane.upstream
        upstream = self._config.upstreams[name]
        rules = self._report_rules(claim, route) if _is_report(claim) else self._router.rewrite_for(route, name)
        head, rest = claim.content.octets, None
        try:
            if head is None:
                head, rest = await self._read(claim.content)
        except OSError as error:
            return self._unreadable(claim, error)
        original = header.block_of(head)
        before = claim.prefix + original
        block = rewrite_header(before, rules)
        sender = envelope_sender(envelope.sender, rules) or ("" if upstream.null_sender == "keep" else upstream.null_sender)
        if upstream.senders and (reason := objection(upstream.senders, sender, header.scan(block))) is not None:
            held = f"upstream {name} may not send it: {reason}"
            return Result(untried(claim), self._hold(claim, held))
        if untouched := block is before and bool(original):  # nearly always
            octets = claim.prefix + head
        else:
            body = memoryview(head)[len(original) :]
            octets = b"".join((block, header.separator(bytes(body[:2])), body))
        message = Outgoing(
            sender=sender,
            recipients=envelope.recipients,
            octets=octets,
            size=len(octets) + claim.content.size - len(head),
            rest=rest,
            eight_bit=claim.content.eight_bit or not block.isascii(),
            dotted=claim.content.dotted or (not untouched and has_dot_line(block)),  # the prefix has no such line
            smtputf8=not (sender.isascii() and all(r.address.isascii() for r in envelope.recipients)),
            ret=envelope.ret,
            envid=envelope.envid,
            utf8_header=envelope.smtputf8 and not block.isascii(),
        )
        if len(envelope.recipients) > 1:
            transactions = await self._send_all(name, message, outcomes, limit=upstream.limits.recipients)
            return Result(outcomes, header_block=original, transactions=transactions)
        (outcomes[envelope.recipients[0].address],) = await self._pool.send(name, message)
        return Result(outcomes, header_block=original)

    def _unreadable(self, claim: Claim, error: OSError) -> Result:
        """Later, where the machine lacks something; else held without end: a person must see it, and may find the file again."""
        if error.errno not in _PASSING:
            held = f"its content cannot be read: {error.strerror}"
            return Result(untried(claim), Next(math.inf, claim.lane, counted=False, held=held))
        self._journal.fault("reading a message", error, id=claim.id)
        reply = Reply(0, "", f"its content cannot be read now: {error.strerror}")
        return Result(for_everybody(claim, Outcome(Status.DEFERRED, Scope.MESSAGE, Phase.RESOLVE, reply)))

    def _report_rules(self, claim: Claim, route: Route) -> Rewrite | None:
        """What changes on the way out of a report of ours: it gets a fallback's From, or one that the credential may use."""
        over = next((item.rewrite for item in route.fallback if item.upstream == claim.lane.upstream), None)
        name, address = (over.from_.name, over.from_.address) if over is not None and over.from_ is not None else (None, None)
        address = address or report_author(self._config.upstreams[claim.lane.upstream].senders, claim.envelope.recipients[0].address)
        return Rewrite(from_name=name, from_address=address) if name or address else None

    async def _send_all(self, upstream: str, message: Outgoing, outcomes: dict[str, Outcome], *, limit: int) -> int:
        """Send in as many transactions as the recipients need: `limit` each, and again those that were too many for the upstream.
        Answers how many these were."""
        limit = min(limit, self._pool.recipients_limit(upstream) or limit)
        if self._crowds:
            limit = min(limit, self._crowd(upstream, limit))
        waiting, guess, transactions = list(message.recipients), 0, 0
        while waiting:
            transactions += 1
            now, waiting = waiting[:limit], waiting[limit:]
            results = await self._pool.send(upstream, message._replace(recipients=now) if len(now) < len(message.recipients) else message)
            outcomes |= zip((r.address for r in now), results, strict=True)
            if any(result.status is Status.SENT for result in results):
                if guess and results[0].status is Status.SENT:  # it was refused beside the others, and taken without them
                    self._crowds[upstream] = (guess, self._clock.monotonic() + _CROWD_SECONDS)
                again = [who for who, result in zip(now, results, strict=True) if _is_too_many(result)]
                guess = len(now) - len(again) if again else 0
                limit = guess or limit
                waiting = again + waiting
                for recipient in again:
                    del outcomes[recipient.address]
            elif fault := next(filter(_speaks_for_all, results), None):
                outcomes |= dict.fromkeys((r.address for r in waiting), fault._replace(in_doubt=False))
                break
        return transactions

    def _crowd(self, upstream: str, limit: int) -> int:
        """How many recipients the upstream was seen to take at once, not long ago."""
        known, until = self._crowds.get(upstream, (limit, math.inf))
        if until > self._clock.monotonic():
            return known
        del self._crowds[upstream]
        return limit

    async def _read(self, content: Content) -> tuple[bytes, Callable[[], AsyncGenerator[bytes, None]] | None]:
        """The content of a file, or its head and how to get the rest. Raises OSError."""
        assert content.path is not None, "content has octets or a path"
        path, loop = content.path, asyncio.get_running_loop()
        try:
            head = await loop.run_in_executor(None, _read_head, path, content.size)
        except RuntimeError as error:  # the system has no thread left, as `dial` has it
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error

        async def rest() -> AsyncGenerator[bytes, None]:
            place = len(head)
            while place < content.size:
                try:
                    octets = await loop.run_in_executor(None, _read_slice, path, place, _SLICE_BYTES)
                except (OSError, RuntimeError) as error:  # RuntimeError: the system has no thread left
                    raise _Unread(str(error)) from error
                if not octets:
                    raise _Unread("the file is shorter than it was")
                place += len(octets)
                async with self._turn:  # one of the large messages works on its slice in each round of the loop, not all of them
                    await asyncio.sleep(0)
                yield octets

        return head, rest if len(head) < content.size else None


def _is_report(claim: Claim) -> bool:
    """Whether it is a report of ours: nothing else has neither sender nor prefix."""
    return not (claim.prefix or claim.envelope.sender)


def for_everybody(claim: Claim, outcome: Outcome) -> dict[str, Outcome]:
    """One outcome for all recipients."""
    return dict.fromkeys((r.address for r in claim.envelope.recipients), outcome)


def untried(claim: Claim) -> dict[str, Outcome]:
    """Outcomes for a message that goes elsewhere without having been tried."""
    return for_everybody(claim, outcome_of_failure(Phase.RESOLVE, Failure.UNREACHABLE, "not tried"))


def _speaks_for_all(outcome: Outcome) -> bool:
    """Whether those not yet tried would fare alike. Who may not be relayed to, or does not like the sender, speaks for himself."""
    if outcome.phase is Phase.RCPT and not outcome.throttled and outcome.reply.code not in _OF_ALL:
        return False
    return outcome.scope in (Scope.UPSTREAM, Scope.CREDENTIAL)


def _is_too_many(outcome: Outcome) -> bool:
    """Whether the recipient may be taken in another transaction. X.2.X is about his mailbox (RFC 3463 section 3.3)."""
    return outcome.phase is Phase.RCPT and outcome.reply.code in _TOO_MANY and outcome.reply.enhanced[1:3] != ".2"


def _read_head(path: os.PathLike[str], size: int) -> bytes:
    """The beginning of a file that must have `size` octets: one that has lost its end must not go out as if that were all."""
    if (found := os.stat(path).st_size) != size:
        raise OSError(errno.EIO, f"the file has {found} octets instead of {size}")
    return _read_slice(path, 0, _HEAD_BYTES)


def _read_slice(path: os.PathLike[str], place: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, place)
