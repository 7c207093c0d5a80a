"""Content as a client sends it, up to the final dot (RFC 5321 section 4.1.1.4), and the octets that have arrived so far.

The end is found by searching the buffer for CRLF.CRLF, never line by line; content is made canonical chunk by chunk (first the line
ends, then the dots) and goes to a file once it outgrows memory. Only CRLF.CRLF ends it: a dot line framed otherwise is content.

State: the octets received and not yet used.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from relay.mail.content import has_dot_line, normalize, unstuff
from relay.spool.base import Content, ContentWriter, SpoolError

#: What arrives past this goes to a file (law 8): 1 MiB with its header. It is also the limit of one line.
MEMORY_LIMIT_BYTES = (1024 + 64) * 1024

#: Content that has not ended by then is processed in chunks of at least this size.
_CHUNK_BYTES = MEMORY_LIMIT_BYTES

#: The transport stops reading while this much waits to be used.
_PAUSE_BYTES = _CHUNK_BYTES + 256 * 1024

# The final dot and the line end before it, and the final dot of empty content.
_END = b"\r\n.\r\n"
_EMPTY = b".\r\n"


class Disconnected(Exception):
    """The client went away in the middle of the content."""


#: What is kept of content that cannot be taken.
NOTHING = Content(0, b"")


class Received(NamedTuple):
    """Content as it arrived, canonical. `head` is its beginning, at least the first MEMORY_LIMIT_BYTES of it.

    `trouble` says why there is none: `too large`, `line too long`, or the spool's error.
    """

    content: Content
    head: bytes
    trouble: str | SpoolError | None = None


class Input:
    """What a client has sent and we have not used yet."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ended = False
        self._transport: asyncio.ReadTransport | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._searched = 0

    def attach(self, transport: asyncio.ReadTransport) -> None:
        """From where the octets come: told to pause while too many wait."""
        self._transport = transport

    def feed(self, octets: bytes) -> None:
        """Add what has arrived."""
        self.buffer += octets
        if len(self.buffer) > _PAUSE_BYTES and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True
        self._wake()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._wake()

    def drop(self, count: int) -> None:
        """Forget the first `count` octets; they have been used."""
        del self.buffer[:count]
        if self._paused and len(self.buffer) <= _PAUSE_BYTES and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def small_content(self) -> bytes | None:
        """Content that has arrived whole, as it came and without its final dot, or None while the end is not there.

        For content of up to one chunk; `overflows` says when it is more, and that `content` must be used.
        """
        buffer = self.buffer
        if buffer.startswith(_EMPTY):
            self.drop(len(_EMPTY))
            return b""
        end = buffer.find(_END, max(0, self._searched - len(_END)))
        if end < 0:
            self._searched = len(buffer)
            return None
        self._searched = 0
        octets = self._first(end + 2)
        self.drop(end + len(_END))
        return octets

    @property
    def overflows(self) -> bool:
        return len(self.buffer) > _CHUNK_BYTES

    async def content(self, gathering: "Gathering") -> Received:
        """Gather everything up to the final dot. Raises Disconnected, and then nothing of it is kept.

        What is over the limit or cannot be stored is read to its end and thrown away: `trouble` then says why.
        """
        buffer = self.buffer
        framed = True  # the octets before the buffer are a CRLF
        searched = 0
        try:
            while True:
                if framed and buffer.startswith(_EMPTY):
                    self.drop(len(_EMPTY))
                    break
                end = buffer.find(_END, max(0, searched - len(_END)))
                if end >= 0:
                    chunk = self._first(end + 2)
                    self.drop(end + len(_END))
                    await gathering.add(chunk)
                    break
                if len(buffer) > _CHUNK_BYTES and (lines := buffer.rfind(b"\n") + 1):
                    chunk = self._first(lines)
                    self.drop(lines)
                    framed, searched = chunk.endswith(b"\r\n"), 0
                    await gathering.add(chunk)
                    continue  # more may have arrived meanwhile, and the end with it
                if len(buffer) > MEMORY_LIMIT_BYTES:
                    gathering.trouble = "line too long"
                    self.drop(len(buffer) - 4)  # nothing of it is kept, but the final dot must still be found
                    framed = False
                searched = len(buffer)
                await self._more()
            self._searched = 0
            return await gathering.finish()
        except BaseException:
            gathering.discard()
            raise

    def _first(self, count: int) -> bytes:
        """A copy of the first octets, made once: a slice of a bytearray would be a copy of its own."""
        with memoryview(self.buffer) as view:
            return bytes(view[:count])

    async def _more(self) -> None:
        if self.ended:
            raise Disconnected
        if self._paused and self._transport is not None:  # one long line: it may grow up to the limit of a line
            self._paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Gathering:
    """Canonical content that grows, in memory first and then in a file that `spill` opens. `limit_bytes`: at most."""

    def __init__(self, limit_bytes: int, spill: Callable[[], ContentWriter]) -> None:
        self._limit_bytes = limit_bytes
        self._spill = spill
        self._chunks: list[bytes] = []
        self._writer: ContentWriter | None = None
        self._head = b""
        self._size = 0
        self._dotted = False
        self.trouble: str | SpoolError | None = None

    async def add(self, chunk: bytes) -> None:
        """Take whole lines as they came from the client."""
        if (chunk := self._canonical(chunk)) and self.trouble is None:
            if self._writer is None and self._size <= MEMORY_LIMIT_BYTES:
                self._chunks.append(chunk)
            else:
                await self._write(chunk)

    def whole(self, octets: bytes) -> Received:
        """Take content that has arrived whole and fits in memory."""
        octets = self._canonical(octets)
        if self.trouble is not None:
            return Received(NOTHING, b"", self.trouble)
        return Received(Content(len(octets), octets, eight_bit=not octets.isascii(), dotted=self._dotted), octets)

    async def finish(self) -> Received:
        """The content, durable where it is in a file, or the trouble."""
        if self.trouble is None and self._writer is not None:
            try:
                content = await self._writer.finish()
                return Received(content._replace(dotted=self._dotted), self._head)
            except SpoolError as error:
                self.trouble = error
        if self.trouble is not None:
            self.discard()
            return Received(NOTHING, b"", self.trouble)
        octets = b"".join(self._chunks)
        return Received(Content(len(octets), octets, eight_bit=not octets.isascii(), dotted=self._dotted), octets)

    def discard(self) -> None:
        """Keep nothing."""
        self._chunks = []
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _canonical(self, chunk: bytes) -> bytes:
        chunk = normalize(chunk)
        if has_dot_line(chunk):
            self._dotted = True
            chunk = unstuff(chunk)
        self._size += len(chunk)
        if self._size > self._limit_bytes:
            self.trouble = self.trouble or "too large"
        if self.trouble is not None:
            self.discard()
        return chunk

    async def _write(self, chunk: bytes) -> None:
        try:
            if self._writer is None:
                self._writer = self._spill()
                self._chunks.append(chunk)
                self._head = chunk = b"".join(self._chunks)
                self._chunks = []
            await self._writer.write(chunk)
        except SpoolError as error:
            self.trouble = error
            self.discard()
