"""The SMTP server side of one connection: octets in, replies out (RFC 5321).

Commands are answered as they arrive, replies to pipelined commands leave together, and a task exists only while something takes time,
such as taking a message into custody; the end of the connection never cancels it.

What a command does is `listener.dialogue`, how a connection begins, is secured and ends `listener.connection`. State: one Session per
connection: how far it is with a command or content.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

from relay.intake import FAULT, Transaction
from relay.listener.access import has_spoken, peer_of
from relay.listener.chunks import Chunks
from relay.listener.connection import Connection, remembered
from relay.listener.data import Disconnected, Gathering, Received, ordinary_content, reply_to
from relay.listener.dialogue import CHUNK, CLOSING, COMMANDS, CONTENT, CREDENTIALS, HANDSHAKE, SILENCE, Later
from relay.mail.envelope import Origin
from relay.mail.reply import Reply
from relay.spool.base import SpoolError
from relay.spool.wait import Wait

#: RFC 5321 section 4.5.3.2.7: a server waits five minutes for the next command: from the last reply to its last octet.
IDLE_SECONDS = 300.0

#: Octets of content that earn a second, up to IDLE_SECONDS: at this pace content may take for ever. A 2400 baud line has 240 a second.
PACE = 100.0

#: Commands without a message taken into custody, besides ten for each recipient that a message may have: Postfix allows 100 that lead to
#: nothing; here there is room for a pool of connections that asks every minute for a day whether we are still there.
COMMANDS_LIMIT = 1500

# RFC 5321 section 4.5.3.1.4 has 512 octets; extensions' parameters and UTF-8 addresses need more. Postfix allows 2048.
_LINE_LIMIT_BYTES = 4096
_ERRORS_LIMIT = 10

# So many commands of one session are answered before others get their turn, and before it is seen that it does not read its replies.
_COMMANDS_AT_ONCE = 256

#: So long a connection that we have closed may take to get the last replies to its client; then it is cut off.
LINGER_SECONDS = 10.0

_STOPPING = Reply(421, "4.3.2", "Service shutting down")
_TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors")
_TOO_MANY_COMMANDS = Reply(421, "4.7.0", "Too many commands")
_IDLE = Reply(421, "4.4.2", "Idle for too long")
_SLOW = Reply(421, "4.4.2", "Too slow")
_LOST = Reply(421, "4.4.2", "Connection lost before the end of the content")  # for the log: nobody is there any more
_LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
_RESPONSE_TOO_LONG = Reply(500, "5.5.6", "Authentication response too long")


class Session(Connection):
    """One connection from one client. Its owner is the Door that it came through."""

    _farewell: tuple[Reply, str] = (_LOST, "lost")  # what the log has of a message that breaks off, and as what it counts

    # -- the connection's life --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = self._introduced or peer_of(transport)
        if peer is None:  # reset before we came to look at it: nobody is there to talk to
            self.transport.abort()
            return
        self._input.attach(self.transport)
        self._origin = Origin(self._settings.name, peer.client, "", self._door.new_session_id())
        self._dialogue.meet(self._origin, peer)
        self.deadline = self.loop.time() + IDLE_SECONDS
        self._door.opened(self)
        refusal = _STOPPING if self._door.stopping else self._door.access.enter(self._origin.client, probe=peer.probe)
        if refusal is not None:
            self._say(self._dialogue.refuse(refusal))
            self._hang_up()
            return
        self._admitted = True
        if self._dialogue.upgrading:
            self._secure()
        elif not peer.probe and has_spoken(transport):
            self._dialogue.expects = SILENCE  # RFC 5321 section 4.3.1: a client waits for the greeting
        else:
            self._greet()

    def data_received(self, data: bytes) -> None:
        if not (self._input.buffer or self._taking or self._closing or self._stalled or self._skipping):  # most of it, without the buffer
            expects = self._dialogue.expects
            if expects is COMMANDS and data.find(b"\n") == len(data) - 1 < _LINE_LIMIT_BYTES and not self._door.stopping:
                self._answer(data[:-1])
                return
            if expects is CONTENT and (received := ordinary_content(data, limit_bytes=self._settings.message_size)) is not None:
                self._dialogue.expects = COMMANDS
                self.deadline = self.loop.time() + IDLE_SECONDS
                self._begin(partial(self._take, received))
                return
        if self._receives:
            self.deadline = min(self.deadline + len(data) / PACE, self.loop.time() + IDLE_SECONDS)
        self._input.feed(data)
        if self._taking is None:
            self._advance()

    def _answer(self, line: bytes) -> None:
        """Do one command alone, from a client that waits for each reply."""
        reply = self._dialogue.answer(line)
        if reply is None:
            self._advance()  # a chunk follows, which may have no octets
            return
        if isinstance(reply, Reply) and reply.code in (250, 354) and self._commands + 1 < self._door.commands:  # nothing follows from it
            self._commands += 1
            self._write(remembered(reply))
        else:
            replies: list[bytes] = []
            self._heed(reply, replies)
            self._write(b"".join(replies))
        if not self._closing:
            self.deadline = self.loop.time() + IDLE_SECONDS

    def eof_received(self) -> bool:
        """A half-closed client still gets its replies; what it had pipelined is still done."""
        self._input.end()
        if self._handed is not None:
            self._handed.leave()  # it may have only half-closed; but who has timed out looks the same
        if self._taking is None:
            self._advance()
        return not self._dialogue.secure  # which cannot be closed by half

    def stop(self) -> None:
        """End as soon as nothing is under way: at once when waiting for a command, else after the message at hand."""
        if self._dialogue.upgrading:
            self.abort()
        elif self._taking is None and self._dialogue.expects not in (CONTENT, CHUNK) and not self._closing:
            self._say(_STOPPING)
            self._farewell = _STOPPING, "stopping"
            self._hang_up()

    def expire(self) -> None:
        """The deadline has passed. Its door looks from time to time."""
        if self.transport is None:
            return  # what is under way ends on its own
        if self._closing:
            self.transport.abort()
            return
        slow = self._receives or self._skipping or bool(self._input.buffer)
        reply, reason = (_IDLE, "unread") if self._stalled else (_SLOW, "slow") if slow else (_IDLE, "idle")
        if self._receives:
            self._farewell = reply, reason  # told of with the message, unless that is taken all the same
        else:
            self._door.count(reason)
        self._say(reply)
        self._hang_up()

    def _hang_up(self) -> None:
        """Close once the client has got what was said; it may not keep us by reading nothing."""
        self._closing = True
        if self.transport is None:
            return
        self.transport.close()
        self.deadline = self.loop.time() + LINGER_SECONDS

    def _ended(self) -> None:
        if self._admitted:
            self._admitted = False
            self._door.access.leave(self._origin.client)
        dialogue = self._dialogue
        if dialogue.transaction is not None and self._receives and (dialogue.chunks is None or dialogue.chunks.refusal is None):
            reply, reason = self._farewell
            dialogue.refuse(reply, reason=reason)
        dialogue.forget()
        self._input.abandon()
        self._door.closed(self)

    # -- the session ------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what can be done with what has arrived: commands, in order, until one needs more octets or time."""
        replies: list[bytes] = []
        while not self._closing and self._taking is None and not self._stalled:
            if len(replies) >= _COMMANDS_AT_ONCE:
                self.deadline = self.loop.time() + IDLE_SECONDS
                self._write(b"".join(replies))
                self.loop.call_soon(self._advance)
                return
            if self._dialogue.expects is CONTENT:
                if not self._receive():
                    break
                continue
            if self._dialogue.expects is CHUNK:
                if not self._receive_chunk(replies):
                    break
                continue
            if self._door.stopping:
                replies.append(remembered(_STOPPING))
                self._write(b"".join(replies))
                self._farewell = _STOPPING, "stopping"
                self._hang_up()
                return
            reply = self._next_reply()
            if reply is None:
                if self._dialogue.expects is CHUNK:
                    continue
                break
            self._heed(reply, replies)
        if replies:
            if not self._closing and self._dialogue.chunks is None:
                self.deadline = self.loop.time() + IDLE_SECONDS
            self._write(b"".join(replies))
        if self._input.ended and self._taking is None and not self._stalled and not self._closing:
            self._hang_up()  # half a command or half a message: nothing was promised about it

    @property
    def _receives(self) -> bool:
        """Whether what comes is content."""
        return self._adrift or self._dialogue.expects is CONTENT or self._dialogue.chunks is not None

    def _heed(self, reply: Reply | Later, replies: list[bytes]) -> None:
        """Add a reply to those that go out together, and do what follows from it: it may take time, have been one error too many, or
        be the end."""
        if isinstance(reply, Later):
            self._begin(reply.work)
            return
        replies.append(remembered(reply))
        self._commands += 1
        if reply.code >= 500 and reply not in CLOSING and self._is_one_error_too_many():
            reply = _TOO_MANY_ERRORS
            replies.append(remembered(reply))
        elif self._commands >= self._door.commands:
            reply = self._dialogue.refuse(_TOO_MANY_COMMANDS, reason="commands")
            replies.append(remembered(reply))
        if reply.code in (220, 221, 421) or (reply.code >= 500 and reply in CLOSING):
            self._write(b"".join(replies))
            replies.clear()
            if reply.code == 220:
                self._secure()
            else:
                self._dialogue.forget()  # nobody has lost what ends with a word
                self._hang_up()

    def _is_one_error_too_many(self) -> bool:
        self._errors += 1
        if self._errors < _ERRORS_LIMIT:
            return False
        self._dialogue.refuse(_TOO_MANY_ERRORS, reason="errors")
        return True

    def _next_reply(self) -> Reply | Later | None:
        """Read one command and do it, or None when none has arrived whole. A line may end with a bare LF."""
        buffer = self._input.buffer
        if not buffer:
            return None
        if self._dialogue.expects is SILENCE:
            return self._dialogue.foreign(bytes(buffer[:8]))
        end = buffer.find(b"\n")
        if end < 0:
            if HANDSHAKE.match(buffer) and not self._skipping:
                return self._dialogue.foreign(bytes(buffer[:8]))
            if len(buffer) > _LINE_LIMIT_BYTES:
                self._input.drop(len(buffer))
                self._skipping = True
            return None
        line = bytes(buffer[:end])
        self._input.drop(end + 1)
        if self._skipping or end > _LINE_LIMIT_BYTES:
            self._skipping = False
            if self._dialogue.expects is not CREDENTIALS:
                return _LINE_TOO_LONG
            self._dialogue.expects = COMMANDS
            return _RESPONSE_TOO_LONG
        return self._dialogue.respond(line) if self._dialogue.expects is CREDENTIALS else self._dialogue.answer(line)

    # -- content ----------------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Look for the content's end. True when there is something new to do, False to wait for more octets."""
        newlines = self._settings.newlines
        octets = self._input.small_content(lenient=newlines == "legacy")
        if octets is None and not self._input.takes_time:
            return False
        gathering = Gathering(self._settings.message_size, self._door.intake.spill, strict=newlines == "reject")
        self._dialogue.expects = COMMANDS
        if octets is not None:
            self._begin(partial(self._take, gathering.whole(octets)))
        else:
            self._begin(partial(self._receive_large, gathering))
        return True

    async def _conclude(self, work: Callable[[], Awaitable[Reply | None]]) -> None:
        """Answer when `work` has the reply, and go on with what has arrived meanwhile."""
        reply = wait = None
        try:
            reply = await work()
            del work  # and the content, which a thousand clients that wait must not keep in memory
            if (handed := self._handed) is not None and (wait := handed.wait) is not None:
                reply = await self._verdict(handed, wait)
        except Disconnected:
            pass  # nothing was promised, and what is left of the content is nobody's
        except Exception as error:  # law 9
            self._door.journal.fault("a reply to a client", error, session=self._origin.session)
            reply = FAULT
        finally:
            self._taking = self._handed = None
            if self.transport is None:
                self._ended()
        if reply is not None:
            self._say(reply)
            self.deadline = self.loop.time() + IDLE_SECONDS
            if reply.code >= 500 and wait is None and self._is_one_error_too_many():
                self._say(_TOO_MANY_ERRORS)
                self._hang_up()
            elif reply.code == 421:
                self._hang_up()
        if self._alone and self._input.buffer:  # it would be commands: nobody waits for what has not been said
            self._say(reply_to("not the end"))
            self._adrift = True
        self._alone = False
        if self._adrift:
            self._hang_up()
        self._advance()

    async def _receive_large(self, gathering: Gathering) -> Reply:
        self._adrift = True
        received = await self._input.content(gathering, lenient=self._settings.newlines == "legacy")
        self._alone = received.lenient and received.trouble is None
        self._adrift = received.trouble == "not the end"
        return await self._take(received)

    def _receive_chunk(self, replies: list[bytes]) -> bool:
        """Read the chunk at hand. True when there is something new to do, False to wait for more octets."""
        chunks = self._dialogue.chunks
        assert chunks is not None, "a chunk is expected after BDAT only"
        chunks.absorb(self._input)
        if chunks.overflows:
            self._begin(partial(self._store_chunk, chunks))
        elif chunks.left:
            return False
        elif (reply := self._dialogue.end_chunk()) is None:
            self._begin(partial(self._take_chunks, chunks))
        else:
            self._commands -= not chunks.small
            self._errors -= chunks.told and reply.code >= 500  # its client had sent more before it heard: one refusal is one error
            chunks.told = not reply.positive
            self._heed(reply, replies)
        return True

    async def _store_chunk(self, chunks: Chunks) -> None:
        try:
            await chunks.store()
        except Exception as error:  # law 9; what is left of the chunk is still to be read
            self._door.journal.fault("BDAT from a client", error, session=self._origin.session)
            chunks.refuse(FAULT)

    async def _take_chunks(self, chunks: Chunks) -> Reply:
        return await self._take(await chunks.finish())

    async def _take(self, received: Received) -> Reply:
        transaction = self._dialogue.take_transaction()
        if received.trouble is None:
            self.deadline = self.loop.time() + 2 * IDLE_SECONDS  # ours to answer now; the client waits ten minutes (RFC 5321)
            self._handed = transaction
            transaction.gone = self._input.ended
            try:
                reply = await self._door.intake.accept(transaction, received.content, received.head)
            finally:
                self._input.release()
        else:
            self._input.release()
            reply = reply_to(received.trouble)
            if isinstance(received.trouble, SpoolError):
                self._door.journal.note("error", f"receiving content: {received.trouble}")
        if reply.positive:
            self._commands = 0
            return reply
        return self._refused(reply, transaction)

    async def _verdict(self, transaction: Transaction, wait: Wait) -> Reply:
        reply = await self._door.intake.verdict(wait)
        return reply if reply.positive else self._refused(reply, transaction, reason="upstream")

    def _refused(self, reply: Reply, transaction: Transaction, *, reason: str = "") -> Reply:
        return self._dialogue.refuse(reply, transaction.sender or "<>", ",".join(transaction.recipients), reason=reason)
