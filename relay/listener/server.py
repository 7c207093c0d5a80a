"""The SMTP server side of one connection: octets in, replies out (RFC 5321). The only user of aiosmtpd.

A subclass of aiosmtpd's protocol that replaces its session loop, its parsers and its life cycle: the stock ones reflect over
themselves for each connection, wake a task for each command, parse addresses leniently and slowly, buffer content line by line, answer
our faults with 5xx and cancel the work when a client half-closes. Here commands are answered as they arrive, replies to pipelined
commands leave together, and a task exists only while a message is taken into custody; the end of the connection never cancels it.

What a command does is `listener.dialogue`. State: one Session per connection: what has arrived, and whether a message is being taken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar, cast

from aiosmtpd import smtp

from relay.intake import Transaction
from relay.listener.data import Disconnected, Gathering, Input, Received
from relay.listener.dialogue import Dialogue
from relay.mail.envelope import Origin
from relay.mail.reply import Reply
from relay.spool.base import SpoolFull
from relay.spool.wait import Wait

if TYPE_CHECKING:
    from relay.listener.door import Door

#: RFC 5321 section 4.5.3.2.7: a server waits five minutes for the next command, and as long for the next piece of content.
IDLE_SECONDS = 300.0

# RFC 5321 section 4.5.3.1.4 has 512 octets; extensions' parameters and UTF-8 addresses need more. Postfix allows 2048.
_LINE_LIMIT_BYTES = 4096
_ERRORS_LIMIT = 10

# So many commands of one session are answered before others get their turn, and before it is seen that it does not read its replies.
_COMMANDS_AT_ONCE = 256

#: So long a connection that we have closed may take to get the last replies to its client; then it is cut off.
LINGER_SECONDS = 10.0

_GREETING = b"220 %b ESMTP relay\r\n"
_STOPPING = Reply(421, "4.3.2", "Service shutting down")
_TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors")
_IDLE = Reply(421, "4.4.2", "Idle for too long")
_FAULT = Reply(451, "4.3.0", "Local error, try again later")
_NO_SPACE = Reply(452, "4.3.1", "Insufficient storage, try again later")
_LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
_TOO_LARGE = Reply(552, "5.3.4", "Message too large")
_LONG_CONTENT_LINE = Reply(554, "5.6.0", "A line of the message is too long")
_T = TypeVar("_T")


class Session(smtp.SMTP):
    """One connection from one client. Its owner is the Door that it came through."""

    def __init__(self, door: "Door", loop: asyncio.AbstractEventLoop) -> None:
        # Not SMTP.__init__: it reflects over the class for each connection, which costs more than a whole message.
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self._door = door
        self._settings = door.settings
        self._input = Input()
        self._deadline = 0.0
        self._timeout_handle = None
        self._origin = Origin()
        self._dialogue = Dialogue(door, self._origin)
        self._errors = 0
        self._admitted = False
        self._taking: asyncio.Task[None] | None = None  # content is being received into a file, or a message is being taken
        self._handed: Transaction | None = None  # what intake is deciding about, or holds for a verdict
        self._adrift = False  # within content whose end has not been found: what follows is not to be read as commands
        self._skipping = False  # the rest of a line that was too long
        self._stalled = False  # the client does not read its replies
        self._closing = False

    # -- the connection's life --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if peer is None:  # reset before we came to look at it: nobody is there to talk to
            self.transport.abort()
            return
        self._input.attach(self.transport)
        self._origin = Origin(self._settings.name, peer[0], "", self._door.new_session_id())
        self._dialogue = Dialogue(self._door, self._origin)
        self._deadline = self.loop.time() + IDLE_SECONDS
        self._timeout_handle = self.loop.call_at(self._deadline, self._expire)
        self._door.opened(self)
        refusal = _STOPPING if self._door.stopping else self._door.access.enter(self._origin.client)
        if refusal is not None:
            self._say(self._dialogue.refuse(refusal))
            self._hang_up()
            return
        self._admitted = True
        self.transport.write(_GREETING % self._door.hostname)

    def data_received(self, data: bytes) -> None:
        self._deadline = self.loop.time() + IDLE_SECONDS
        if data.find(b"\n") == len(data) - 1 < _LINE_LIMIT_BYTES and self._awaits_command:
            replies: list[bytes] = []  # one command alone, from a client that waits for each reply: most of them, without the buffer
            self._heed(self._dialogue.answer(data[:-1]), replies)
            self._write(replies)
            return
        self._input.feed(data)
        if self._taking is None:
            self._advance()

    def eof_received(self) -> bool:
        """A half-closed client still gets its replies; what it had pipelined is still done."""
        self._input.end()
        if self._handed is not None:
            self._handed.leave()  # it may have only half-closed; but who has timed out looks the same
        if self._taking is None:
            self._advance()
        return True

    def pause_writing(self) -> None:
        self._stalled = True

    def resume_writing(self) -> None:
        self._stalled = False
        if self._taking is None:
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._closing = True
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
        self._input.end()
        if self._handed is not None:
            self._handed.leave()
        if self._taking is None:
            self._ended()

    def stop(self) -> None:
        """End as soon as nothing is under way: at once when waiting for a command, else after the message at hand."""
        if self._taking is None and not self._dialogue.receiving and not self._closing:
            self._say(_STOPPING)
            self._hang_up()

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

    def _expire(self) -> None:
        """One timer a session: it looks whether there was progress since it was set, and sets itself again."""
        if self.loop.time() < self._deadline:
            self._timeout_handle = self.loop.call_at(self._deadline, self._expire)
        elif self.transport is not None:
            self._say(_IDLE)
            self._hang_up()

    def _hang_up(self) -> None:
        """Close once the client has got what was said; it may not keep us by reading nothing."""
        self._closing = True
        if self.transport is None:
            return
        self.transport.close()
        if self.transport.get_write_buffer_size():
            if self._timeout_handle is not None:
                self._timeout_handle.cancel()
            self._timeout_handle = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _ended(self) -> None:
        if self._admitted:
            self._admitted = False
            self._door.access.leave()
        self._door.closed(self)

    # -- the session ------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what can be done with what has arrived: commands, in order, until one needs more octets or time."""
        replies: list[bytes] = []
        while not self._closing and self._taking is None and not self._stalled:
            if self._dialogue.receiving:
                if not self._receive():
                    break
                continue
            if self._door.stopping:
                replies.append(_line(_STOPPING))
                self._write(replies)
                self._hang_up()
                return
            reply = self._next_reply()
            if reply is None:
                break
            self._heed(reply, replies)
            if len(replies) >= _COMMANDS_AT_ONCE:
                self._write(replies)
                self.loop.call_soon(self._advance)
                return
        self._write(replies)
        if self._input.ended and self._taking is None and not self._stalled and not self._closing:
            self._hang_up()  # half a command or half a message: nothing was promised about it

    @property
    def _awaits_command(self) -> bool:
        """Whether nothing has arrived that is not answered, and nothing stands against answering a command."""
        busy = self._input.buffer or self._taking or self._closing or self._stalled or self._skipping
        return not (busy or self._dialogue.receiving or self._door.stopping)

    def _heed(self, reply: Reply, replies: list[bytes]) -> None:
        """Add a reply to those that go out together, and do what follows from it: it may have been one error too many, or the end."""
        replies.append(_line(reply))
        if reply.code >= 500 and self._is_one_error_too_many():
            reply = _TOO_MANY_ERRORS
            replies.append(_line(reply))
        if reply.code in (221, 421):
            self._write(replies)
            replies.clear()
            self._hang_up()

    def _write(self, replies: list[bytes]) -> None:
        if replies and self.transport is not None:
            self.transport.write(b"".join(replies))

    def _is_one_error_too_many(self) -> bool:
        self._errors += 1
        return self._errors >= _ERRORS_LIMIT

    def _say(self, reply: Reply) -> None:
        if self.transport is not None:
            self.transport.write(_line(reply))

    def _next_reply(self) -> Reply | None:
        """Read one command and do it, or None when none has arrived whole. A line may end with a bare LF."""
        buffer = self._input.buffer
        end = buffer.find(b"\n")
        if end < 0:
            if len(buffer) > _LINE_LIMIT_BYTES:
                self._input.drop(len(buffer))
                self._skipping = True
            return None
        line = bytes(buffer[:end])
        self._input.drop(end + 1)
        if self._skipping or end > _LINE_LIMIT_BYTES:
            self._skipping = False
            return _LINE_TOO_LONG
        return self._dialogue.answer(line)

    # -- content ----------------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Look for the content's end. True when there is something new to do, False to wait for more octets."""
        gathering = Gathering(self._settings.message_size, self._door.intake.spill)
        octets = self._input.small_content()
        if octets is not None:
            self._dialogue.receiving = False
            self._begin(self._take, gathering.whole(octets))
        elif self._input.overflows:
            self._dialogue.receiving = False
            self._begin(self._receive_large, gathering)
        else:
            return False
        return True

    def _begin(self, work: Callable[[_T], Awaitable[Reply]], argument: _T) -> None:
        self._taking = self.loop.create_task(self._conclude(work, argument), name=f"session {self._origin.session}")

    async def _conclude(self, work: Callable[[_T], Awaitable[Reply]], argument: _T) -> None:
        """Answer DATA when `work` has the reply, and go on with what has arrived meanwhile."""
        reply = wait = None
        try:
            reply = await work(argument)
            del argument  # the content, which a thousand clients that wait must not keep in memory
            if (handed := self._handed) is not None and (wait := handed.wait) is not None:
                reply = await self._verdict(handed, wait)
        except Disconnected:
            pass  # nothing was promised, and what is left of the content is nobody's
        except Exception as error:  # law 9
            self._door.journal.fault("DATA from a client", error, session=self._origin.session)
            reply = _FAULT
        finally:
            self._taking = self._handed = None
            if self.transport is None:
                self._ended()
        if reply is not None:
            self._say(reply)
            self._deadline = self.loop.time() + IDLE_SECONDS
            if reply.code >= 500 and wait is None and self._is_one_error_too_many():
                self._say(_TOO_MANY_ERRORS)
                self._hang_up()
        if self._adrift:
            self._hang_up()
        self._advance()

    async def _receive_large(self, gathering: Gathering) -> Reply:
        self._adrift = True
        received = await self._input.content(gathering)
        self._adrift = False
        return await self._take(received)

    async def _take(self, received: Received) -> Reply:
        transaction = self._dialogue.take_transaction()
        if received.trouble is None:
            self._deadline = self.loop.time() + 2 * IDLE_SECONDS  # ours to answer now; the client waits ten minutes (RFC 5321)
            self._handed = transaction
            transaction.gone = self._input.ended
            reply = await self._door.intake.accept(transaction, received.content, received.head)
        elif received.trouble == "too large":
            reply = _TOO_LARGE
        elif received.trouble == "line too long":
            reply = _LONG_CONTENT_LINE
        else:
            reply = _NO_SPACE if isinstance(received.trouble, SpoolFull) else _FAULT
            self._door.journal.note("error", f"receiving content: {received.trouble}")
        return reply if reply.positive else self._refused(reply, transaction)

    async def _verdict(self, transaction: Transaction, wait: Wait) -> Reply:
        reply = await self._door.intake.verdict(wait)
        return reply if reply.positive else self._refused(reply, transaction)

    def _refused(self, reply: Reply, transaction: Transaction) -> Reply:
        return self._dialogue.refuse(reply, transaction.sender or "<>", ",".join(transaction.recipients))


@lru_cache(maxsize=256)
def _line(reply: Reply) -> bytes:
    """The reply for the wire. A text of several lines makes a reply of several lines (RFC 5321 section 4.2.1)."""
    first, *more = reply.text.split("\n")
    if not more:
        return reply.line() + b"\r\n"
    *between, last = (first, *more)
    lines = [f"{reply.code}-{text}\r\n" for text in between]
    return "".join([*lines, f"{reply.code} {last}\r\n"]).encode("ascii")
