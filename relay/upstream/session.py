"""One open, authenticated session with an upstream: it carries messages, one after the other.

How it is opened is `upstream.opening`; what is said for one message, `upstream.transaction`. The next message, or its commands, may go
out behind the content of this one: it rides (`upstream.rides`).

State: the wire, what the upstream offers, how many messages it has carried, and who comes next.
"""

import asyncio
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Phase
from relay.upstream.expiry import Validity
from relay.upstream.transaction import Offer, Outgoing, Stale, Transaction, without
from relay.upstream.wire import Wire

if TYPE_CHECKING:
    from relay.upstream.rides import Rides

_QUIT_SECONDS = 5.0
_NO_LIMITS: Mapping[str, int] = MappingProxyType({})
_NO_SMTPUTF8 = without(Phase.RCPT, "SMTPUTF8, which this address needs", "5.6.7")


class Session:
    """One open, authenticated session. Carries one transaction at a time, and the beginning of the next one behind its content.

    `upstream`: the settings that it was opened with. `validity`: of the certificate on the other side. `recipients_limit`: how many
    the upstream says that it takes in one transaction (RFC 9422), 0 where it does not. `busy`: a transaction is under way. `rider`: when
    it ends, the session belongs to another message, which has come for it already. `rides`: those who may. `idle_since`: the pool's.
    """

    def __init__(
        self, wire: Wire, offer: Offer, upstream: Upstream, *, validity: Validity | None = None, limits: Mapping[str, int] = _NO_LIMITS
    ) -> None:  # fmt: skip
        self.upstream = upstream
        self.validity = validity
        self.recipients_limit = limits.get("RCPTMAX", 0)
        self._messages_limit = min(upstream.limits.messages_per_connection, limits.get("MAILMAX", sys.maxsize))
        self._wire = wire
        self._offer = offer
        self._own = upstream.replies
        self._dirty = False
        self._botched = False  # out of step, for good
        self._closing = False  # the upstream has said that it closes the connection
        self._turn: asyncio.Future[None] | None = None  # of the rider: done when the transaction before his has ended
        self.busy = False
        self.rider = False
        self.rides: Rides | None = None
        self.messages = 0
        self.idle_since = 0.0

        #: Whether messages may ride on it.
        self.rideable = offer.pipelining

    @property
    def usable(self) -> bool:
        """Whether another message may be sent over it."""
        return not (self._botched or self._closing) and self._wire.lost is None and self.messages < self._messages_limit

    async def send(self, message: Outgoing, *, ahead: Transaction | None = None) -> list[Outcome]:
        """One outcome for each recipient, in their order. `ahead`: whose commands are sent already. Raises Stale when the session had
        ended while it was idle.
        """
        if message.smtputf8 and not self._offer.smtputf8 and message.sender.isascii():
            return await self._send_to_ascii(message)
        transaction = ahead or self._transaction(message)
        self.busy = True
        try:
            outcomes = await transaction.run(reused=self.messages > 0, reset=self._dirty)
            self._dirty = transaction.dirty
            self.messages += 1
        except Stale:
            self._closing = True
            raise
        except BaseException:  # cut off in the middle
            self._botched = True
            raise
        finally:
            self.busy = False
            self._botched |= transaction.botched
            self._closing |= transaction.closing
            if self.rides is not None:
                self.rides.land(self)
            if self._turn is not None and not self._turn.done():
                self._turn.set_result(None)
        return outcomes

    async def ride(self, message: Outgoing) -> list[Outcome]:
        """As `send`, behind the message whose content is handed over, or after it. Raises Stale when that was this session's last one: in
        doubt where all of this one was on its way, and the connection is out of step."""
        ahead = None
        try:
            if self.busy:
                self._turn = asyncio.get_running_loop().create_future()
                if not message.smtputf8:  # what this upstream may lack
                    ahead = self._transaction(message)
                    ahead.send_ahead()
                await self._turn
        except BaseException:  # what was sent ahead is on its way, whoever ends later
            self._botched = True
            raise
        finally:
            self.rider, self._turn = False, None
        flown = ahead is not None and ahead.flown
        if self._botched or not (flown or self.usable):  # what was answered before the end is still to be read
            raise Stale(in_doubt=flown)
        return await self.send(message, ahead=ahead)

    def _transaction(self, message: Outgoing) -> Transaction:
        handed_over = self._float if self.rideable else None
        return Transaction(self._wire, self._offer, self.upstream.timeouts, message, own=self._own, handed_over=handed_over)

    def _float(self) -> None:
        """The content is handed over, and nothing but the reply to it is awaited. A session with an old secret takes no rider."""
        rides = self.rides
        if rides is None or rides.upstream is not self.upstream or self._closing or self.messages + 1 >= self._messages_limit:
            return
        rides.offer(self)

    async def _send_to_ascii(self, message: Outgoing) -> list[Outcome]:
        """To those whose addresses need no SMTPUTF8, as if there were no others; these fail, and another upstream may take them."""
        outcomes = {each.address: _NO_SMTPUTF8 for each in message.recipients}
        if plain := [each for each in message.recipients if each.address.isascii()]:
            results = await self.send(message._replace(recipients=plain, smtputf8=False))
            outcomes |= {each.address: result for each, result in zip(plain, results, strict=True)}
        return [outcomes[each.address] for each in message.recipients]

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the connection is closed."""
        return self._wire.ended

    def quit(self) -> None:
        """End the session politely if it is in step, at once if not."""
        if self._botched or self._closing:
            self.cut()
        else:
            self._wire.quit(timeout_seconds=_QUIT_SECONDS)

    def cut(self) -> None:
        """End the session at once."""
        self._wire.close()
