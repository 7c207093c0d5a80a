"""Read what a client sends: command lines, and content up to the final dot (RFC 5321 section 4.1.1.4).

Content is found by searching the buffer for CRLF.CRLF, never line by line; it is made canonical chunk by chunk (first the line ends,
then the dots) and goes to a file once it outgrows memory. Only CRLF.CRLF ends it: a dot line framed otherwise is content.

State: the bytes received and not yet read. Uses the private `_buffer`, `_eof`, `_wait_for_data` and `_maybe_resume_transport` of
asyncio's StreamReader (as aiosmtpd itself does), because its public methods search and copy line by line.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from relay.mail.content import has_dot_line, normalize, unstuff
from relay.spool.base import Content, ContentWriter, SpoolError

#: What arrives past this goes to a file (law 8). It is also the limit of one line.
MEMORY_LIMIT_BYTES = 1024 * 1024

#: Content is processed when this much has gathered; the transport pauses at twice as much.
_CHUNK_BYTES = 256 * 1024

# The final dot and the line end before it.
_END = b"\r\n.\r\n"


class Disconnected(Exception):
    """The client went away in the middle of a line or of the content."""


class LineTooLong(Exception):
    """A command line over the limit; it has been read and thrown away."""


class Received(NamedTuple):
    """Content as it arrived, canonical. `head` is its beginning, at least the first MEMORY_LIMIT_BYTES of it.

    `trouble` says why there is none: `"too large"`, `"line too long"`, or the spool's error.
    """

    content: Content
    head: bytes
    trouble: str | SpoolError | None = None


class Reader(asyncio.StreamReader):
    """A stream reader that knows command lines and content."""

    _buffer: bytearray
    _eof: bool

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=_CHUNK_BYTES, loop=loop)

    @property
    def idle(self) -> bool:
        """Whether nothing has arrived that was not read."""
        return not self._buffer

    async def line(self, *, limit_bytes: int) -> bytes:
        """The next line without its line end, which may be a bare LF. Raises Disconnected or LineTooLong."""
        buffer = self._buffer
        while (end := buffer.find(b"\n")) < 0:
            if len(buffer) > limit_bytes:
                await self._skip_line()
                raise LineTooLong
            await self._more()
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        self._maybe_resume_transport()  # type: ignore[attr-defined]
        if end > limit_bytes:
            raise LineTooLong
        return line

    async def content(self, *, limit_bytes: int, spill: Callable[[], ContentWriter], progress: Callable[[], None]) -> Received:
        """Everything up to the final dot. `spill` opens a file; `progress` is called whenever something has arrived.

        What is over the limit or cannot be stored is read to its end and thrown away: `trouble` then says why. Raises Disconnected.
        """
        gathering = Gathering(limit_bytes, spill)
        buffer = self._buffer
        framed = True  # the octets before the buffer are a CRLF
        searched = 0
        try:
            while True:
                if framed and buffer.startswith(b".\r\n"):
                    del buffer[:3]
                    break
                end = buffer.find(_END, max(0, searched - len(_END)))
                if end >= 0:
                    await gathering.add(bytes(buffer[: end + 2]))
                    del buffer[: end + len(_END)]
                    break
                searched = len(buffer)
                if searched > _CHUNK_BYTES:
                    framed = await self._take_lines(gathering, framed=framed)
                    searched = len(buffer)
                await self._more()
                progress()
            self._maybe_resume_transport()  # type: ignore[attr-defined]
            return await gathering.finish()
        except BaseException:
            gathering.discard()
            raise

    async def _take_lines(self, gathering: "Gathering", *, framed: bool) -> bool:
        """Move the complete lines of the buffer on. Answers whether they end with a CRLF."""
        buffer = self._buffer
        end = buffer.rfind(b"\n") + 1
        if not end:
            if len(buffer) > MEMORY_LIMIT_BYTES:
                gathering.trouble = "line too long"
                del buffer[:-4]  # nothing of it is kept, but the final dot must still be found
                return False
            return framed
        chunk = bytes(buffer[:end])
        del buffer[:end]
        self._maybe_resume_transport()  # type: ignore[attr-defined]
        await gathering.add(chunk)
        return chunk.endswith(b"\r\n")

    async def _more(self) -> None:
        if self._eof:
            raise Disconnected
        await self._wait_for_data("relay")  # type: ignore[attr-defined]

    async def _skip_line(self) -> None:
        while (end := self._buffer.find(b"\n")) < 0:
            self._buffer.clear()
            self._maybe_resume_transport()  # type: ignore[attr-defined]
            await self._more()
        del self._buffer[: end + 1]


class Gathering:
    """Canonical content that grows, in memory first and then in a file."""

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
        chunk = normalize(chunk)
        if has_dot_line(chunk):
            self._dotted = True
            chunk = unstuff(chunk)
        self._size += len(chunk)
        if self._size > self._limit_bytes:
            self.trouble = self.trouble or "too large"
        if self.trouble is not None:
            self.discard()
            return
        if self._writer is None and self._size <= MEMORY_LIMIT_BYTES:
            self._chunks.append(chunk)
            return
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

    async def finish(self) -> Received:
        if self.trouble is None and self._writer is not None:
            try:
                content = await self._writer.finish()
                return Received(content._replace(dotted=self._dotted), self._head)
            except SpoolError as error:
                self.trouble = error
        if self.trouble is not None:
            self.discard()
            return Received(Content(0, b""), b"", self.trouble)
        octets = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return Received(Content(len(octets), octets, eight_bit=not octets.isascii(), dotted=self._dotted), octets)

    def discard(self) -> None:
        self._chunks = []
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
