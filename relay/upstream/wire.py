"""The bytes between us and an upstream once the session is open: commands out, replies in, content with back-pressure.

Takes over the transport that aiosmtplib opened, because that library sends one command at a time. Knows lines and replies, not what
they mean.

State: replies that have arrived and were not yet asked for, the one waiter, and how many replies somebody behind him will ask for.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

from relay.mail.outcome import Failure

_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux has it

#: One reply may be this long; aiosmtplib and Postfix allow less. More is nonsense, not a reply.
_REPLY_LIMIT_BYTES = 64 * 1024

#: One reply's lines, without line ends.
Lines = list[bytes]


class Broken(Exception):
    """The connection can no longer be used. `failure` says how, the text says it in plain words."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


class Wire(asyncio.Protocol):
    """One established connection. Used by one transaction at a time, and by a second one that has been sent ahead."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._rest = b""
        self._lines: Lines = []
        self._replies: list[Lines] = []
        self._wanted = 0
        self._ahead = 0
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._patience_seconds = 0.0
        self._last_patience_seconds = 0.0
        self._unsent_bytes = 0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.last_word = b""  # the last line of the last reply that was asked for
        self.lost: Broken | None = None  # why the connection cannot be used any more; what arrives unasked ends it, too
        self.ended: asyncio.Future[None] = self._loop.create_future()  # done when the transport is closed
        transport.set_protocol(self)

    def write(self, *octets: bytes) -> None:
        """Hand octets to the transport, all in one go. Raises Broken where it has ended: uvloop's then raise an error of their own."""
        if self.lost is not None or self._transport.is_closing():
            self._be_open()
        self._transport.write(octets[0] if len(octets) == 1 else b"".join(octets))  # uvloop's writelines costs more than the copy

    def write_ahead(self, *octets: bytes, replies: int) -> None:
        """Send what has its `replies` after those that are awaited at the moment (RFC 2920). `come_up` before asking for them.
        Raises Broken."""
        self._ahead = replies
        self.write(*octets)

    def come_up(self) -> None:
        """What was awaited before is here, or never will be: the next `replies` are those to what was sent ahead."""
        self._wanted, self._ahead = self._ahead, 0
        if _QUICKACK is None or self.lost is not None or self._transport.is_closing():
            return
        if (connection := self._transport.get_extra_info("socket")) is not None:
            # The next reply may wait for our acknowledgement of the one before (Nagle), and this for something to go with it: 40 ms.
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    async def replies(self, count: int, *, timeout_seconds: float, last_timeout_seconds: float = 0.0) -> list[Lines]:
        """The next `count` replies, or as many as arrived before the connection ended, if at least one did.

        `last_timeout_seconds`: when only the last one is missing, it may take so long. Raises Broken when there is none: the connection
        ended or the time ran out.
        """
        self._wanted, self._last_patience_seconds = count, last_timeout_seconds or timeout_seconds
        while (known := len(self._replies)) < count and self.lost is None:
            await self._wait(timeout_seconds if known < count - 1 else self._last_patience_seconds)
        if not self._replies:
            assert self.lost is not None, "the waiter ends with replies or a reason"
            raise self.lost
        taken = self._replies[:count]
        del self._replies[:count]
        self.last_word = taken[-1][-1]
        self._wanted = count - len(taken)
        return taken

    async def send(self, slices: AsyncIterator[bytes], *, timeout_seconds: float) -> bool:
        """Write slices as fast as the other side takes them; `timeout_seconds` without progress end it.

        True: the last octet is handed to the transport. False: a reply came before that. Raises Broken.
        """
        self._wanted = 1
        async for octets in slices:
            while self._paused and not self._replies and self.lost is None:
                await self._wait(timeout_seconds, unsent_bytes=self._transport.get_write_buffer_size())
            if self._replies:
                return False
            self.write(octets)
            self._be_open()  # a write that failed has handed nothing over
        return True

    def _be_open(self) -> None:
        """Raise Broken where the connection is lost, also when `connection_lost` is still to come in the loop's next round."""
        if self.lost is None and self._transport.is_closing():
            self._end(Broken(Failure.CLOSED, "the upstream closed the connection"))
        if self.lost is not None:
            raise self.lost

    def _wait(self, timeout_seconds: float, *, unsent_bytes: int = 0) -> "asyncio.Future[None]":
        """Done when released; `timeout_seconds` without another reply, or without any of the unsent octets going out, break the wire."""
        self._patience_seconds, self._unsent_bytes = timeout_seconds, unsent_bytes
        self._deadline = self._loop.time() + timeout_seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer()
        self._waiter = self._loop.create_future()
        return self._waiter

    def quit(self, *, timeout_seconds: float) -> None:
        """Say QUIT and close when the answer or the end comes, or after `timeout_seconds`."""
        if self.lost is None:
            self.lost = Broken(Failure.CLOSED, "closed by us")
            self._transport.write(b"QUIT\r\n")
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(timeout_seconds, self._abort)

    def close(self) -> None:
        """End the connection at once: what is on it is not in step any more."""
        if self.lost is None:
            self.lost = Broken(Failure.CLOSED, "closed by us")
        self._abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:  # the answer to QUIT, or an end that was already noticed
            self._transport.close()
            return
        if not (self._wanted or self._ahead):
            self._break_off(Broken(Failure.CLOSED, "the upstream spoke without being asked"))
            return
        known = len(self._replies)
        self._split(data)
        now = len(self._replies)
        piece = self._rest or self._lines
        if piece and len(self._rest) + sum(map(len, self._lines)) > _REPLY_LIMIT_BYTES:
            self._break_off(Broken(Failure.NONSENSE, f"a reply of more than {_REPLY_LIMIT_BYTES} octets"))
        elif now >= self._wanted:
            if (now + 1 if piece else now) > self._wanted + self._ahead:
                self._break_off(Broken(Failure.CLOSED, "the upstream said more than it was asked"))
            self._release()
        elif now > known:  # a piece of one begins no new wait, or there would be no end of it
            if now == self._wanted - 1:
                self._patience_seconds = self._last_patience_seconds
            self._deadline = self._loop.time() + self._patience_seconds

    def _split(self, data: bytes) -> None:
        """Cut what has arrived into replies, and keep what is less than one."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        reply, replies = self._lines, self._replies
        for line in lines:
            reply.append(line.rstrip(b"\r"))
            if line[3:4] != b"-":
                replies.append(reply)
                reply = []
        self._lines = reply

    def eof_received(self) -> bool:
        self._end(Broken(Failure.CLOSED, "the upstream closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._end(Broken(Failure.CLOSED, f"connection lost: {exc}" if exc else "the upstream closed the connection"))
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._release()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        """One timer a connection, left alone while waits come and go: it looks whether this one's time is up."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        unsent_bytes = self._transport.get_write_buffer_size() if self._unsent_bytes else 0
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes = unsent_bytes
            self._deadline = self._loop.time() + self._patience_seconds
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self._break_off(Broken(Failure.TIMEOUT, f"no answer within {self._patience_seconds:g} s"))

    def _break_off(self, reason: Broken) -> None:
        self._end(reason)
        self._abort()

    def _abort(self) -> None:
        if not self.ended.done():  # asyncio's transports fail when they are aborted after their end
            self._transport.abort()

    def _end(self, reason: Broken) -> None:
        if self.lost is None:
            self.lost = reason
        self._release()

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
