"""One mail transaction on an open session, and exactly one outcome for each recipient (RFC 5321 section 3.3).

Small mail for one recipient is one flight from MAIL to the last octet where the upstream offers PIPELINING and CHUNKING (RFC 3030).
Other mail waits for the reply to DATA; MAIL, RCPT… and DATA are one flight where PIPELINING is offered (RFC 2920), and go one by one
where it is not. What replies mean is decided in `mail.outcome`.

What begins the next transaction may go out behind the content of this one, before its reply (RFC 2920 section 3.1): all of it where
that is one flight, else its commands.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from operator import attrgetter
from typing import NamedTuple

from relay.config.upstreams import Timeouts
from relay.mail.content import stuff
from relay.mail.envelope import Recipient
from relay.mail.outcome import Failure, Outcome, Phase, Row, Status, outcome_of_failure, outcome_of_reply
from relay.mail.reply import MalformedReply, Reply, parse_reply
from relay.upstream.wire import Broken, Lines, Wire

# Named here, as the attributes of an enum take long to look up.
_MAIL, _RCPT, _DATA, _CONTENT, _FINAL = Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.CONTENT, Phase.FINAL

_wishes = attrgetter("notify")

#: Content up to this size goes without asking first whether it is wanted: a round trip costs more than 64 KiB sent in vain.
_ONE_FLIGHT_BYTES = 64 * 1024


class Outgoing(NamedTuple):
    """A message as it goes to one upstream: rewritten, not yet dot-stuffed.

    `octets` is the whole content, or its beginning when `rest` gives the remainder in slices, from a file. `size` in octets.
    `dotted`: a line may begin with a dot. `ret` and `envid` are RFC 3461's, as the client gave them. `smtputf8`: an address needs it;
    `utf8_header`: the client declared it for the header alone, which goes with 8BITMIME where it is not offered, as others' do.
    """

    sender: str
    recipients: Sequence[Recipient]
    octets: bytes
    size: int
    rest: Callable[[], AsyncGenerator[bytes, None]] | None = None
    eight_bit: bool = False
    smtputf8: bool = False
    dotted: bool = True
    ret: str = ""
    envid: str = ""
    utf8_header: bool = False


class Offer(NamedTuple):
    """What an upstream offers in its EHLO reply, as far as a transaction cares. `size_limit` in octets, 0 for none (RFC 1870)."""

    pipelining: bool = False
    eight_bit: bool = False
    smtputf8: bool = False
    size: bool = False
    size_limit: int = 0
    chunking: bool = False
    dsn: bool = False


class Stale(Exception):
    """A reused connection had ended, or was out of step, before it answered MAIL: the message may go on a new one, to the same upstream.

    `in_doubt`: all of the message had been handed over, and what the upstream made of it cannot be known.
    """

    def __init__(self, *, in_doubt: bool) -> None:
        super().__init__("the connection had ended")
        self.in_doubt = in_doubt


class Transaction:
    """Sends one Outgoing over a Wire. Made for one use.

    After `run`, `botched` says that the connection is out of step, `closing` that the upstream has said it closes it, and
    `dirty` that RSET must come before the next MAIL.
    """

    def __init__(
        self,
        wire: Wire,
        offer: Offer,
        timeouts: Timeouts,
        message: Outgoing,
        *,
        own: Sequence[Row] = (),
        handed_over: Callable[[], None] | None = None,
    ) -> None:
        """`own`: what the provider's own replies mean. `handed_over` is called when the last octet of the content has been written,
        and nothing but replies is awaited: another one may `send_ahead`.
        """
        self._wire = wire
        self._offer = offer
        self._timeouts = timeouts
        self._message = message
        self._own = own
        self._handed_over = handed_over
        self._one_flight = offer.chunking and offer.pipelining and _is_small(message)
        self._refusals: dict[int, Outcome] = {}  # of recipients who were refused one by one, by their place
        self._fate: Outcome | None = None  # of all the others; once it is known, nothing is left to be decided
        self._phase = _MAIL
        self._reused = False  # the session has carried others before
        self._mail_at = 0  # among the commands and their replies: 1 behind RSET
        self._replies: list[Lines] = []
        self._sent_ahead: list[str] = []
        self.flown = False  # all of it is sent ahead
        self.botched = False
        self.closing = False
        self.dirty = False

    async def run(self, *, reused: bool, reset: bool) -> list[Outcome]:
        """One outcome per recipient, in their order. `reset`: begin with RSET. Raises Stale, only when `reused`."""
        self._reused = reused
        if self._sent_ahead:
            self._wire.come_up()
        elif (lacking := self._lacking()) is not None:
            self.dirty = reset  # whoever comes next still has to
            return [lacking] * len(self._message.recipients)
        else:
            self._mail_at = int(reset)
        try:
            if self._one_flight:
                await self._fly()
            elif await self._envelope():
                await self._content()
        except Broken as broken:
            failed = outcome_of_failure(self._phase, broken.failure, f"{broken} ({_MOMENT[self._phase]})")
            goodbye = (each for each in self._refusals.values() if each.reply.code == 421 and self._phase is not _FINAL)
            self._fill(next(goodbye, failed))  # 421 is why it broke (RFC 5321 section 3.8), and speaks of all who are left
        except MalformedReply as nonsense:
            self.botched = True
            self._fill(outcome_of_failure(self._phase, Failure.NONSENSE, f"{nonsense} ({_MOMENT[self._phase]})"))
        return self._outcomes()

    def send_ahead(self) -> None:
        """Send the commands while another transaction waits for the reply to its content, and with them the content where it is one
        flight; `run` when it has it."""
        if self._lacking() is None:
            self._mail_at = int(self._offer.chunking)  # the one before may be a flight whose envelope is refused, and would stay open
            flies, commands = self._one_flight, self._commands()
            with suppress(Broken):  # the other one will be told
                self._wire.write_ahead("".join(commands).encode(), *([self._message.octets] if flies else []), replies=len(commands))
                self._sent_ahead, self.flown = commands, flies

    def _outcomes(self) -> list[Outcome]:
        """One for each recipient, and whether the upstream also took what he wishes to be reported."""
        assert self._fate is not None, "whatever happened, it is somebody's fate"
        recipients = self._message.recipients
        outcomes = [self._fate] * len(recipients)
        for place, refusal in self._refusals.items():
            outcomes[place] = refusal
        if self._offer.dsn and any(map(_wishes, recipients)):
            pairs = zip(recipients, outcomes, strict=True)
            return [known._replace(reports=True) if each.notify and known.status is Status.SENT else known for each, known in pairs]
        return outcomes

    def _lacking(self) -> Outcome | None:
        """What it means for everybody when the upstream does not offer what the message needs."""
        message, offer = self._message, self._offer
        if message.eight_bit and not offer.eight_bit:
            return without(_MAIL, "8BITMIME", "5.6.3")
        if message.smtputf8 and not offer.smtputf8:
            return without(_MAIL, "SMTPUTF8", "5.6.7")
        if 0 < offer.size_limit < message.size:
            return without(_MAIL, f"SIZE {message.size} (its limit is {offer.size_limit})", "5.3.4")
        return None

    # -- all at once ------------------------------------------------------------------------------------------------------

    async def _fly(self) -> None:
        """MAIL, RCPT, BDAT and the content in one flight (RFC 3030 section 4.2): in doubt from here to the reply that decides."""
        commands, replies, timeouts = self._sent_ahead or self._commands(), self._replies, self._timeouts
        try:
            if not self._sent_ahead:
                self._wire.write("".join(commands).encode(), self._message.octets)
            self._phase = _FINAL
            if self._handed_over is not None:
                self._handed_over()
            while (wanted := len(commands) - len(replies)) > 0:
                replies += await self._wire.replies(wanted, timeout_seconds=timeouts.command, last_timeout_seconds=timeouts.final)
        except Broken as broken:
            left = broken.failure is Failure.CLOSED and self._said_goodbye()
            if self._stale() or (self._reset_refused and not left):
                raise Stale(in_doubt=self._phase is _FINAL and not left) from None
            self._judge()
            raise
        if self._reset_refused or self._stale():
            # What refuses RSET has not read this flight from its beginning, and what says 421 to MAIL may read on.
            self.botched = self._reset_refused
            raise Stale(in_doubt=self.botched or replies[-1][-1].startswith(b"2"))
        self._judge()
        reply = parse_reply(replies[-1])
        self.dirty = self._fate is not None or not reply.positive
        if reply.positive and self._fate is not None:
            self.botched = True  # taken in an envelope that it had refused: it is not at the place where we are
        self._fill(outcome_of_reply(_FINAL, reply, own=self._own))
        self._note(reply)

    def _said_goodbye(self) -> bool:
        """Whether the upstream's last word tells why it has closed the connection, and so has read no further: 421 (RFC 5321 section 3.8),
        also where that was for the transaction before, or to RSET what Exim says to somebody who has talked too much."""
        word = self._wire.last_word[:3]
        return word == b"421" or (word in (b"521", b"554") and len(self._replies) == self._mail_at == 1)

    # -- MAIL, RCPT, DATA -------------------------------------------------------------------------------------------------

    async def _envelope(self) -> bool:
        """Whether the upstream waits for the content."""
        commands, replies = self._sent_ahead or self._commands(), self._replies
        broken: Broken | None = None
        try:
            if not self._offer.pipelining:
                await self._converse(commands)
            else:
                if not self._sent_ahead:
                    self._wire.write("".join(commands).encode())
                while len(replies) < len(commands):
                    replies += await self._wire.replies(len(commands) - len(replies), timeout_seconds=self._timeouts.command)
        except Broken as error:
            self._phase = _MAIL if len(replies) <= self._mail_at else _RCPT if len(replies) < len(commands) - 1 else _DATA
            broken = error
        if self._stale():
            raise Stale(in_doubt=False)
        self._judge()
        if broken is not None:
            raise broken
        return self._go_ahead(len(commands))

    def _commands(self) -> list[str]:
        message = self._message
        content = f"BDAT {len(message.octets)} LAST\r\n" if self._one_flight else "DATA\r\n"
        commands = [self._mail(), *map(self._rcpt, message.recipients), content]
        return ["RSET\r\n", *commands] if self._mail_at else commands

    def _stale(self) -> bool:
        """Whether the session, a reused one, was over before this MAIL: it has no reply, or RSET was refused, or 421 is no request to slow
        down."""
        if not self._reused:
            return False
        first = self._from_mail()[:1]
        if first and first[0][-1].startswith(b"421"):
            return not outcome_of_reply(_MAIL, parse_reply(first[0]), own=self._own).throttled
        return not first or self._reset_refused

    def _from_mail(self) -> list[Lines]:
        """MAIL's reply and those behind it; where RSET was refused, only the reply to that, which speaks of what follows."""
        return self._replies[:1] if self._reset_refused else self._replies[self._mail_at :]

    @property
    def _reset_refused(self) -> bool:
        return self._mail_at == 1 and bool(self._replies) and not self._replies[0][-1].startswith(b"2")

    async def _converse(self, commands: list[str]) -> None:
        """One by one, and DATA only when somebody was taken."""
        for number, command in enumerate(commands):
            if command == "DATA\r\n" and not self._taken():
                return
            self._wire.write(command.encode())
            self._replies += await self._wire.replies(1, timeout_seconds=self._timeouts.command)
            if number <= self._mail_at and not self._replies[-1][-1].startswith(b"2"):
                return

    def _mail(self) -> str:
        message, offer = self._message, self._offer
        parameters = f" SIZE={message.size}" if offer.size else ""
        if offer.eight_bit and message.eight_bit:
            parameters += " BODY=8BITMIME"
        if message.smtputf8 or (message.utf8_header and offer.smtputf8):
            parameters += " SMTPUTF8"
        if offer.dsn and (message.ret or message.envid):
            parameters += _parameter("RET", message.ret) + _parameter("ENVID", message.envid)
        return f"MAIL FROM:<{message.sender}>{parameters}\r\n"

    def _rcpt(self, recipient: Recipient) -> str:
        parameters = ""
        if self._offer.dsn and (recipient.notify or recipient.orcpt):
            parameters = _parameter("NOTIFY", recipient.notify) + _parameter("ORCPT", recipient.orcpt)
        return f"RCPT TO:<{recipient.address}>{parameters}\r\n"

    def _taken(self) -> bool:
        """Whether MAIL and at least one RCPT were answered with 2xx."""
        codes = [lines[-1][:1] for lines in self._replies[self._mail_at :]]
        return codes[:1] == [b"2"] and b"2" in codes[1:]

    def _judge(self) -> None:
        """Give every recipient that MAIL's or its own reply speaks against its outcome."""
        recipients = len(self._message.recipients)
        for number, lines in enumerate(self._from_mail()[: 1 + recipients]):
            if len(lines) == 1 and lines[0][:4] in (b"250 ", b"250"):
                continue
            phase = _RCPT if number else _MAIL
            try:
                reply = parse_reply(lines)
            except MalformedReply:
                if self._phase is not _FINAL:
                    self._phase = phase
                raise
            if reply.positive:
                continue
            outcome = outcome_of_reply(phase, reply, own=self._own)
            if number == 0:
                self._fill(outcome)
                self.botched = self.botched or reply.code == 503  # nothing stands before MAIL: it has something else in mind
            elif self._fate is None:
                self._refusals[number - 1] = outcome
                if len(self._refusals) == recipients:
                    self._fate = outcome  # nobody is left
            self._note(reply)

    def _go_ahead(self, wanted: int) -> bool:
        """What the reply to DATA means, if there is one."""
        refused = self.dirty = self._fate is not None
        if len(self._replies) < wanted:  # never asked for
            return False
        self._phase = _DATA
        last = self._replies[-1]
        if not refused and len(last) == 1 and last[0][:4] == b"354 ":
            return True
        data = parse_reply(last)
        self.botched |= data.positive  # which is no go-ahead; and yet it may wait for content, and would take commands for that
        if data.code == 354 and not refused:
            return True
        self._fill(outcome_of_reply(_DATA, data, own=self._own))
        self.dirty = True
        self._note(data)
        return False

    # -- content ----------------------------------------------------------------------------------------------------------

    async def _content(self) -> None:
        message = self._message
        self._phase = _CONTENT
        if message.rest is None:
            # The dot goes in the same write as the content: apart, Nagle and delayed ACK cost 40 ms a message.
            octets = stuff(message.octets) if message.dotted else message.octets
            self._wire.write(octets, b".\r\n")
        else:
            async with aclosing(message.rest()) as rest, aclosing(_stuffed(message.octets, rest)) as slices:
                done = await self._wire.send(slices, timeout_seconds=self._timeouts.data)
            if not done:
                self.botched = True  # it answered in the middle: what it will do with the rest is anybody's guess
                reply = parse_reply((await self._wire.replies(1, timeout_seconds=self._timeouts.command))[0])
                self._fill(outcome_of_reply(_CONTENT, reply, own=self._own))
                return
        self._phase = _FINAL
        if self._handed_over is not None:
            self._handed_over()
        reply = parse_reply((await self._wire.replies(1, timeout_seconds=self._timeouts.final))[0])
        self._fill(outcome_of_reply(_FINAL, reply, own=self._own))
        self._note(reply)

    def _note(self, reply: Reply) -> None:
        """421 closes the channel (RFC 5321 section 3.8); a 3xx waits for something that it will not get."""
        self.closing |= reply.code == 421
        self.botched |= 300 <= reply.code < 400

    def _fill(self, outcome: Outcome) -> None:
        """Give `outcome` to everybody who has none yet."""
        self._fate = self._fate or outcome


_MOMENT = {
    Phase.MAIL: "waiting for the reply to MAIL",
    Phase.RCPT: "waiting for the reply to RCPT",
    Phase.DATA: "waiting for the reply to DATA",
    Phase.CONTENT: "sending the content",
    Phase.FINAL: "after the last octet: it may have the message",
}


def _is_small(message: Outgoing) -> bool:
    return message.rest is None and message.size <= _ONE_FLIGHT_BYTES and len(message.recipients) == 1


def without(phase: Phase, extension: str, enhanced: str) -> Outcome:
    """What it means that the upstream does not offer an extension; the enhanced code (RFC 3463, RFC 6531 section 3.5) is for the bounce."""
    outcome = outcome_of_failure(phase, Failure.LACKING, "")
    return outcome._replace(reply=Reply(0, enhanced, f"the upstream does not offer {extension}"))


def _parameter(keyword: str, value: str) -> str:
    return f" {keyword}={value}" if value else ""


async def _stuffed(head: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Head and rest dot-stuffed, and the final dot in one slice with the last octets.

    A slice may end anywhere, also between CR, LF and a dot: the last two octets before it decide what its first ones mean.
    """
    before, held = b"\r\n", head
    async for octets in rest:
        yield (before + held).replace(b"\r\n.", b"\r\n..")[len(before) :]
        before, held = (before + held)[-2:], octets
    yield (before + held).replace(b"\r\n.", b"\r\n..")[len(before) :] + b".\r\n"
