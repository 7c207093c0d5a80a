"""Decide about a message and take custody of it: policy, route, trace field, spool, reply.

Called by listeners, verb by verb. What a route's conditions need is known at RCPT for all but null senders, so a refusal comes as early
as it can. Never meets delivery: the spool is between them, and a message that can go at once is handed over already claimed.

State: why no mail is taken, as it was told last. Laws: 250 only after the spool has the message; a fault of ours is 451 or 452, never 5xx.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import Protocol

from relay.clock import Clock
from relay.config.model import Config, Route
from relay.mail import dsn, header
from relay.mail.address import folded
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.permission import may_send, objection, user_objection
from relay.mail.reply import Reply
from relay.mail.rewrite import envelope_sender, rewrite_header
from relay.observe.journal import Journal
from relay.routing import Router, complete, expand_alias, upstreams_of
from relay.spool.base import Claim, Content, ContentWriter, Draft, Lane, MessageId, Spool, SpoolError, SpoolFull
from relay.spool.wait import Wait, Waits

#: RFC 5321 section 6.3 asks for at least 100 hops; real paths have under 20, and a loop that is cut at 50 costs half as much.
_HOPS_LIMIT = 50
_OWN_HOPS_LIMIT = 5
HEADER_LIMIT_BYTES = 1024 * 1024
# Each line costs microseconds of everybody's time, at intake and at each attempt. A megabyte of lines of 52 octets has as many.
_HEADER_LIMIT_LINES = 20_000

_date_of = lru_cache(maxsize=2)(formatdate)
_lane_of = lru_cache(maxsize=8192)(Lane)

# What a client calls itself goes into the trace field: only what cannot end a comment or a line there.
_UNSAFE_NAME = re.compile(r"[^A-Za-z0-9.:\[\]_-]")

#: Our own trouble, wherever it is met: never for good.
NO_SPACE = Reply(452, "4.3.1", "Insufficient storage, try again later")
FAULT = Reply(451, "4.3.0", "Local error, try again later")

_LOOP = Reply(554, "5.4.6", "Mail loop: too many Received header fields")
_COMES_BACK = Reply(554, "5.4.6", "Mail loop: this message is being sent from here")
_NOT_THE_USERS = Reply(553, "5.7.1", "Not one of the senders of this user")
_HEADER_TOO_LARGE = Reply(552, "5.3.4", "The header is too large")
_NO_ROUTE = Reply(550, "5.7.1", "No route for this sender")
_BARE_REFUSED = Reply(501, "5.1.3", "A recipient address needs a domain")
_BARE_SENDER_REFUSED = Reply(501, "5.1.7", "A sender address needs a domain")
# RFC 5321 section 4.3.2: what may follow the final dot. And so much of an upstream's words fits a line with the rest of ours.
_DATA_REFUSALS = range(550, 555)
_VERDICT_LIMIT = 400

_TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients")


class Dispatch(Protocol):
    """Where a message can go on without waiting in a lane: delivery, as intake sees it."""

    def reserve(self, lane: Lane) -> bool:
        """Whether the lane's upstream has a free slot; True takes it."""
        ...

    def release(self, lane: Lane) -> None:
        """Give a reserved slot back unused."""
        ...

    def start(self, claim: Claim) -> None:
        """Attempt `claim` in the slot that was reserved for it."""
        ...

    def wake(self, lane: Lane, when: float) -> None:
        """Mail waits in `lane`, due at `when`."""
        ...

    def paused(self, lane: Lane) -> bool:
        """Whether nothing is attempted there for a while, as the lane's upstream asked to be spared."""
        ...

    def attempting(self, message_id: str, upstreams: Collection[str]) -> bool:
        """Whether this message is being sent to one of these upstreams at the moment."""
        ...


@dataclass(slots=True)
class Transaction:
    """One mail transaction as it grows, and the client's wait for its verdict."""

    origin: Origin
    client_name: str
    protocol: str
    sender: str
    smtputf8: bool
    ret: str = ""
    envid: str = ""
    route: Route | None = None  # of all recipients, where it is known at MAIL
    recipients: dict[str, tuple[Recipient, Route | None]] = field(default_factory=dict)
    wait: Wait | None = None
    gone: bool = False
    id: MessageId | None = None  # where it was asked for before: the message has it, or the first of the parts

    def leave(self) -> None:
        """The client has closed its side: nobody may be there to hear a verdict."""
        self.gone = True
        if self.wait is not None:
            self.wait.end()


class Intake:
    """The relay's decisions about incoming mail."""

    def __init__(
        self, config: Config, router: Router, spool: Spool, dispatch: Dispatch, journal: Journal, clock: Clock, *,
        waits: Waits | None = None,
    ) -> None:  # fmt: skip
        """`waits`: where delivery finds the clients that are held for a verdict."""
        self._config = config
        self._router = router
        self._spool = spool
        self._dispatch = dispatch
        self._journal = journal
        self._clock = clock
        self._run = secrets.token_hex(4)  # makes Message-IDs of two relays with one host name differ
        self._obstacle = ""  # the last one told, while it lasts
        self._waits = waits or Waits()
        self._holds = any(route.wait for route in config.routes)

    def new_id(self) -> MessageId:
        """The id of a message to come, for whoever must know it before custody."""
        return self._spool.new_id()

    def spill(self) -> ContentWriter:
        """A file for content that outgrows memory. Raises SpoolError."""
        return self._spool.writer()

    def obstacle(self, size: int = 0) -> Reply | None:
        """Why content of so many octets would not be taken now: asked before 354, so that nothing is sent in vain."""
        obstacle = self._spool.obstacle(size)
        if obstacle is None:
            if self._obstacle:
                self._obstacle = ""
                self._journal.note("info", "the spool takes mail again")
            return None
        if size and self._spool.obstacle() is None:
            self._journal.note("warning", f"a message of {size} octets is not taken: {obstacle}")
        elif not self._obstacle:
            self._obstacle = str(obstacle)
            self._journal.note("error", f"no mail is taken: {obstacle}")
        return NO_SPACE if isinstance(obstacle, SpoolFull) else FAULT

    def begin(
        self, origin: Origin, client_name: str, protocol: str, sender: str, *, smtputf8: bool, ret: str = "", envid: str = ""
    ) -> Transaction | Reply:  # fmt: skip
        """Open a transaction at MAIL, or refuse the sender. `ret` and `envid` are RFC 3461's."""
        if sender and "@" not in sender and "@" not in (sender := complete(sender, self._config.domain)):
            return _BARE_SENDER_REFUSED
        if origin.user and sender and not may_send(self._config.users[origin.user].senders, sender):
            return _NOT_THE_USERS
        route = self._router.foresee(sender, origin)
        if isinstance(route, str):
            return Reply(550, "5.7.1", route)
        return Transaction(origin, client_name, protocol, sender, smtputf8, ret, envid, route)

    def add(self, transaction: Transaction, recipient: Recipient, *, limit: int) -> Reply | None:
        """Add a recipient at RCPT (several, where it is an alias), or refuse it. Raises nothing."""
        address = recipient.address
        if "@" not in address and "@" not in (address := complete(address, self._config.domain)):
            return _BARE_REFUSED
        taken = transaction.recipients
        chosen: dict[str, tuple[Recipient, Route | None]] = {}
        for target in expand_alias(address, self._config) if self._config.aliases else (address,):
            route = transaction.route
            if route is None and transaction.sender:  # a null sender's route may hang on the header From
                route = self._router.choose(transaction.sender, target, transaction.origin)
                if (refusal := _refusal(route)) is not None:
                    return refusal
            chosen[target] = (_asked(taken, recipient, address, target), route)
        if taken and len(taken) + sum(target not in taken for target in chosen) > limit:  # an alias alone may stand for more
            return _TOO_MANY_RECIPIENTS
        taken.update(chosen)
        return None

    async def accept(self, transaction: Transaction, content: Content, head: bytes) -> Reply:
        """Take custody. `head` is the content's beginning, at least all of its header block unless that is too large.

        Content in a file is gone when the reply is not positive. When it is and the transaction has a `wait` now, `verdict` has the reply.
        """
        reply = FAULT
        try:
            decided = self._decide(transaction, content, head)
            reply = decided if isinstance(decided, Reply) else await self._take(transaction, *decided)
        finally:
            if not reply.positive:
                self._spool.discard(content)
                if transaction.wait is not None:
                    self._waits.close(transaction.wait)
                    transaction.wait = None
        return reply

    async def verdict(self, wait: Wait) -> Reply:
        """Hold the reply until the upstream has spoken. The message is in custody: only its durable end makes this a 5xx (law 1)."""
        try:
            said = await wait.verdict()
        finally:
            self._waits.close(wait)
        return _passed_on(said, wait.ids[0]) if said is not None else _queued(wait.ids[0])

    def _decide(self, transaction: Transaction, content: Content, head: bytes) -> Reply | tuple[list[Draft], list[Recipient]]:
        """A refusal, or what goes into custody, and for whom nothing does."""
        block = header.block_of(head)
        if len(block) > _HEADER_LIMIT_LINES and (len(block) > HEADER_LIMIT_BYTES or block.count(b"\n") > _HEADER_LIMIT_LINES):
            return _HEADER_TOO_LARGE
        found = header.scan(block)
        if b"received" in found and self._loops(found):
            return _LOOP
        origin, sender = transaction.origin, transaction.sender
        if origin.user and (reason := user_objection(self._config.users[origin.user].senders, sender, found)):
            return Reply(553, "5.7.1", f"Not one of the senders of this user: {reason}")
        author = header.from_address(found.get(b"from", ()))
        origin = Origin(origin.listener, origin.client, origin.user, origin.session, author)
        by_route: dict[str, tuple[Route, list[Recipient]]] = {}
        refused: list[Recipient] = []
        for recipient, route in transaction.recipients.values():
            if not sender:
                route = self._router.choose(sender, recipient.address, origin)
            if route is None or route.reject is not None:
                refused.append(recipient)
            else:
                by_route.setdefault(route.name, (route, []))[1].append(recipient)
        if not by_route:
            return _refusal(route) or _NO_ROUTE
        groups = list(by_route.values())
        if b"received" in found and self._comes_back(found, [route for route, _ in groups]):
            return _COMES_BACK
        drafts = self._drafts(transaction, origin, content, found, groups)
        for draft in drafts:
            if (reply := self._forbidden(draft, found, block)) is not None:
                return reply
        if self._holds and not refused and not transaction.gone:
            seconds = max(route.wait for route, _ in groups)
            if seconds:  # opened before the message can be claimed, so that no verdict is missed
                transaction.wait = self._waits.open([draft.id for draft in drafts], seconds)
        return drafts, refused

    def _loops(self, found: header.Scan) -> bool:
        hops = len(found[b"received"])
        return hops >= _HOPS_LIMIT or (hops >= _OWN_HOPS_LIMIT and header.traces_of(found, self._config.hostname) >= _OWN_HOPS_LIMIT)

    def _comes_back(self, found: header.Scan, routes: Sequence[Route]) -> bool:
        """Whether it is a message that we are sending, and would go where it comes from: an upstream that is this relay, or leads to it.

        A filter that hands mail back while we wait for its reply is no loop: from there, another route leads to another upstream.
        """
        for message_id in header.ids_by(found, self._config.hostname):
            for route in routes:
                if self._dispatch.attempting(message_id, upstreams_of(route)):
                    names = ", ".join(upstreams_of(route))
                    self._journal.note("error", f"a loop: {message_id}, which route {route.name} is sending to {names}, has come back")
                    return True
        return False

    def _drafts(
        self, transaction: Transaction, origin: Origin, content: Content, found: header.Scan,
        groups: Sequence[tuple[Route, list[Recipient]]],
    ) -> list[Draft]:  # fmt: skip
        now = self._clock.now()
        summary = header.summary_of(found)
        drafts: list[Draft] = []
        placed: set[str] = set()
        prefix = b""
        for route, recipients in groups:
            assert route.upstream is not None, "a route that delivers has an upstream"
            message_id = transaction.id if transaction.id is not None and not drafts else self._spool.new_id()
            prefix = prefix or self._prefix(transaction, message_id, found, now)
            rules = self._router.rewrite_for(route, route.upstream)
            if rules is not None and rules.bcc:
                placed = placed or {folded(recipient.address) for _, each in groups for recipient in each}
                if folded(rules.bcc) not in placed:
                    placed.add(folded(rules.bcc))
                    recipients = [*recipients, Recipient(rules.bcc, notify="NEVER")]
            envelope = Envelope(transaction.sender, tuple(recipients), transaction.smtputf8, transaction.ret, transaction.envid)
            drafts.append(Draft(message_id, _lane_of(route.upstream, route.name), envelope, content, now, prefix, origin, summary, now))
        return drafts

    def _prefix(self, transaction: Transaction, message_id: str, found: header.Scan, now: float) -> bytes:
        """The header fields that we make, once: Received (RFC 5321 section 4.4), and Message-ID and Date where they are missing."""
        hostname, date = self._config.hostname, _date_of(int(now))
        recipients = transaction.recipients
        target = f"\r\n\tfor <{next(iter(recipients))}>" if len(recipients) == 1 else ""
        text = (
            f"Received: from {_named(transaction.client_name, transaction.origin.client)}\r\n"
            f"\tby {hostname} with {transaction.protocol} id {message_id}{target};\r\n\t{date}\r\n"
        )
        if b"message-id" not in found:
            text += f"Message-ID: <{message_id}.{self._run}@{hostname}>\r\n"
        if b"date" not in found:
            text += f"Date: {date}\r\n"
        return text.encode()

    def _forbidden(self, draft: Draft, found: header.Scan, block: bytes) -> Reply | None:
        """The refusal where the upstream's credential may not send this (law 6), judged by what would go out."""
        senders = self._config.upstreams[draft.lane.upstream].senders
        if not senders:
            return None
        route = self._router.route(draft.lane.route)
        rules = self._router.rewrite_for(route, draft.lane.upstream) if route else None
        if rules is not None:
            found = header.scan(rewrite_header(block, rules))
        reason = objection(senders, envelope_sender(draft.envelope.sender, rules), found)
        return Reply(550, "5.7.1", f"Not one of the senders of this upstream: {reason}") if reason else None

    async def _take(self, transaction: Transaction, drafts: list[Draft], refused: list[Recipient]) -> Reply:
        """Custody, and on to delivery. Only a null sender's recipients are `refused` now, and a null sender cannot be told."""
        dispatch = self._dispatch
        claimed = [dispatch.reserve(draft.lane) for draft in drafts]
        claims: Sequence[Claim | None] = []
        try:
            claims = await self._spool.put(drafts, claimed)
        except SpoolFull as error:
            self._journal.note("error", str(error))
            return NO_SPACE
        except SpoolError as error:
            self._journal.fault("taking custody", error, id=drafts[0].id)
            return FAULT
        finally:
            if not claims:
                for draft, reserved in zip(drafts, claimed, strict=True):
                    if reserved:
                        dispatch.release(draft.lane)
        for number, draft in enumerate(drafts):
            try:
                self._note(draft)
                if (claim := claims[number]) is not None:
                    dispatch.start(claim)
                else:
                    dispatch.wake(draft.lane, draft.due)
            except Exception as error:  # it is in custody: law 1 allows no other reply any more but a wait's
                self._journal.fault("handing over to delivery", error, id=draft.id)
                if (wait := self._waits.of(draft.id)) is not None:
                    wait.end()
        if transaction.wait is not None and any(dispatch.paused(draft.lane) for draft in drafts):
            transaction.wait.end()
        if refused:
            names = ",".join(r.address for r in refused)
            self._journal.unbounced(id=drafts[0].id, sender="<>", recipients=names, reason="no route for this sender")
        return _queued(drafts[0].id)

    def _note(self, draft: Draft) -> None:
        origin, recipients = draft.origin, draft.envelope.recipients
        self._journal.accepted(
            id=draft.id, session=origin.session, listener=origin.listener, client=origin.client, user=origin.user, route=draft.lane.route,
            upstream=draft.lane.upstream, sender=draft.envelope.sender or "<>", size=draft.content.size,
            recipients=recipients[0].address if len(recipients) == 1 else ",".join([r.address for r in recipients]),
        )  # fmt: skip


def _queued(message_id: str) -> Reply:
    return Reply(250, "2.0.0", f"Ok: queued as {message_id}")


@lru_cache(maxsize=1024)  # the same clients come again and again
def _named(name: str, client: str) -> str:
    """What a client calls itself, and where it is: an address literal (RFC 5321 section 4.1.3), or its user on this machine."""
    literal = client if client.startswith("uid:") else f"[IPv6:{client}]" if ":" in client else f"[{client}]"
    return f"{_UNSAFE_NAME.sub('?', name) or 'unknown'} ({literal})"


def _passed_on(verdict: Reply, message_id: str) -> Reply:
    """What the client hears of the upstream's reply: on one line (RFC 5321 section 4.5.3.1.5), and with codes that fit DATA."""
    words = verdict.text.encode("ascii", "replace").decode("ascii")[:_VERDICT_LIMIT]
    if verdict.positive:
        said = str(verdict._replace(text=words))
        return Reply(250, "2.0.0", f"Ok: sent as {message_id} (upstream: {said})")
    code = verdict.code if verdict.code in _DATA_REFUSALS else 554
    enhanced = verdict.enhanced if verdict.enhanced.startswith("5.") else "5.0.0"
    return Reply(code, enhanced, f"{words or 'Refused by the upstream'} (refused as {message_id})")


def _asked(taken: Mapping[str, tuple[Recipient, Route | None]], recipient: Recipient, address: str, target: str) -> Recipient:
    """`target`, which `address` stands for, with what the client asked to hear about it (RFC 3461 section 5.2.7: an alias keeps that)."""
    known = taken.get(target)
    if known is None and target == recipient.address:
        return recipient
    notify, orcpt = recipient.notify, recipient.orcpt
    if target != address and not orcpt:
        orcpt = dsn.original_recipient(address)
    if known is not None:
        notify, orcpt = dsn.both(known[0].notify, notify), known[0].orcpt or orcpt
    return Recipient(target, notify, orcpt)


def _refusal(route: Route | None) -> Reply | None:
    if route is None:
        return _NO_ROUTE
    return Reply(550, "5.7.1", route.reject) if route.reject is not None else None
