"""One client's connection: how it begins, also under TLS, how replies leave, the one task it may have, and its end. What is said on it is
`listener.server`. The only user of aiosmtpd.

A subclass of aiosmtpd's protocol that replaces its session loop, its parsers and its life cycle: the stock ones reflect over
themselves for each connection, wake a task for each command, parse addresses leniently and slowly, buffer content line by line, answer
our faults with 5xx, cancel the work when a client half-closes and keep what came behind STARTTLS.

State: what one connection has, and what has arrived on it. Law: the end of the connection does not cancel the task.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from aiosmtpd import smtp

from relay.intake import Transaction
from relay.listener.access import Peer
from relay.listener.data import Disconnected, Input
from relay.listener.dialogue import Dialogue
from relay.listener.tls import HandshakeError, shake_hands
from relay.mail.envelope import NO_ORIGIN
from relay.mail.reply import Reply

if TYPE_CHECKING:
    from relay.listener.door import Door

_GREETING = b"220 %b ESMTP relay\r\n"


class Connection(smtp.SMTP):
    """What a session has in common with any other protocol on a connection."""

    def __init__(self, door: "Door", loop: asyncio.AbstractEventLoop, peer: Peer | None = None) -> None:
        """`peer`: who is known already, because a proxy has said so."""
        # Not SMTP.__init__: it reflects over the class for each connection, which costs more than a whole message.
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self._door = door
        self._settings = door.settings
        self._introduced = peer
        self._input = Input(door.budget)
        self.deadline = 0.0
        self._origin = NO_ORIGIN
        self._dialogue = Dialogue(door)
        self._errors = 0
        self._commands = 0  # since the last message that was taken
        self._admitted = False
        self._taking: asyncio.Task[None] | None = None  # content is being received into a file, or a message is being taken
        self._handed: Transaction | None = None  # what intake is deciding about, or holds for a verdict
        self._adrift = False  # within content whose end has not been found: what follows is not to be read as commands
        self._alone = False  # nothing may come behind the content before it is answered
        self._skipping = False  # the rest of a line that was too long
        self._stalled = False  # the client does not read its replies
        self._closing = False

    def _advance(self) -> None:
        """Do what can be done with what has arrived."""
        raise NotImplementedError

    def _hang_up(self) -> None:
        """Close once the client has got what was said."""
        raise NotImplementedError

    async def _conclude(self, work: Callable[[], Awaitable[Reply | None]]) -> None:
        """Do `work`, answer, and go on."""
        raise NotImplementedError

    def _ended(self) -> None:
        """Nothing more will happen on it. May come twice."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        self._stalled = True

    def resume_writing(self) -> None:
        self._stalled = False
        if self._taking is None:
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        if self.transport is None:
            return
        self.transport = None
        self._closing = True
        self._input.end()
        if self._handed is not None:
            self._handed.leave()
        if self._taking is None:
            self._ended()

    def abort(self) -> None:
        """End now. A message that is not acknowledged yet is the client's to send again."""
        if self._taking is not None:
            self._taking.cancel()
            self._taking.add_done_callback(self._aborted)
        if self.transport is not None:
            self.transport.abort()

    def _aborted(self, _: "asyncio.Task[None]") -> None:
        self._taking = None  # a task that was cancelled before its first step has not said so itself
        if self.transport is None:
            self._ended()

    def _begin(self, work: Callable[[], Awaitable[Reply | None]]) -> None:
        self._taking = self.loop.create_task(self._conclude(work), name=f"session {self._origin.session}")

    def _greet(self) -> None:
        if self.transport is not None:
            self.transport.write(_GREETING % self._door.hostname)

    def _write(self, octets: bytes) -> None:
        if octets and self.transport is not None:
            self.transport.write(octets)

    def _say(self, reply: Reply) -> None:
        if self.transport is not None and not self._dialogue.upgrading:  # who waits for TLS understands nothing else
            self.transport.write(on_the_wire(reply))

    # -- TLS --------------------------------------------------------------------------------------------------------------

    def _secure(self) -> None:
        """Begin with TLS. What has come behind STARTTLS may be somebody else's: it is forgotten (RFC 3207 section 4.2)."""
        if self._input.ended or self.transport is None or self.transport.is_closing():
            self._hang_up()
            return
        self.transport.pause_reading()
        self._begin(self._shake_hands)

    async def _shake_hands(self) -> None:
        assert self.transport is not None, "a task that is cancelled before its first step does not get here"
        # Where TLS is first, uvloop reads on as a connection begins, whether it is paused or not.
        early = bytes(self._input.buffer) if self._settings.security == "tls" else b""
        self._input.abandon()
        self._input = Input(self._door.budget)
        try:
            self.transport = await shake_hands(self.transport, self, self._door.certificate.context, early=early)
        except BaseException as error:
            self.connection_lost(None)  # in a handshake nobody else says so
            if isinstance(error, HandshakeError):
                self._door.handshakes.failed(self._origin.client, error.failure)
                raise Disconnected from None
            raise
        self._stalled = False
        self._input.attach(self.transport)
        self._dialogue.secured()
        if self._settings.security == "tls":
            self._greet()


def on_the_wire(reply: Reply) -> bytes:
    """The reply for the wire. A text of several lines makes a reply of several lines (RFC 5321 section 4.2.1)."""
    if not reply.text:
        return b"%d \r\n" % reply.code  # RFC 4954 has a blank behind 334, also where no more follows
    if "\n" not in reply.text:
        return reply.line() + b"\r\n"
    *between, last = reply.text.split("\n")
    lines = [f"{reply.code}-{text}\r\n" for text in between]
    return "".join([*lines, f"{reply.code} {last}\r\n"]).encode("ascii")


#: The same for what is said again and again: nearly every reply to a command, but none that has a message's id in it.
remembered = lru_cache(maxsize=256)(on_the_wire)
