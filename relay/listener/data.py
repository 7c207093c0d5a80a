"""Content as a client sends it, up to the final dot (RFC 5321 section 4.1.1.4), and the octets that have arrived so far.

The end is found by searching the buffer for CRLF.CRLF, never line by line; content is made canonical chunk by chunk (first the line
ends, then the dots) and goes to a file once it outgrows memory. Only CRLF.CRLF ends it: a dot line framed otherwise is content. For a
client that knows no better, `lenient` takes a dot line between two bare LFs too, where nothing comes behind it.

State: the octets received and not yet used.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from relay.intake import FAULT, NO_SPACE
from relay.listener.budget import FREE_BYTES, LARGE_BYTES, Budget
from relay.mail.content import has_dot_line, is_canonical, normalize, unstuff
from relay.mail.reply import Reply
from relay.spool.base import Content, ContentWriter, SpoolError, SpoolFull

#: What arrives past this goes to a file (law 8): 1 MiB with its header. It is also the limit of one line.
MEMORY_LIMIT_BYTES = (1024 + 64) * 1024

#: Content that has not ended by then is processed in chunks of at least this size.
_CHUNK_BYTES = MEMORY_LIMIT_BYTES

#: The transport stops reading while this much waits to be used.
_PAUSE_BYTES = _CHUNK_BYTES + 256 * 1024

# The final dot and the line end before it, the final dot of empty content, and how any line begins with a dot.
_END = b"\r\n.\r\n"
_EMPTY = b".\r\n"
_DOT_LINE = b"\r\n."

# A dot line between bare LFs, and the same where what is before it was used already.
_LF_END = re.compile(rb"(?<!\r)\n\.\n")
_LF_REST = b".\n"

#: So long nothing may come behind a dot line between bare LFs. Who is only in the middle of sending does not pause for that long: longer
#: than the 200 ms after which Linux sends a lost segment again.
QUIET_SECONDS = 0.3


class Disconnected(Exception):
    """The client went away in the middle of the content."""


#: What is kept of content that cannot be taken.
NOTHING = Content(0, b"")


#: Why content cannot be taken: the client's doing, or the spool's.
Trouble = Literal["too large", "line too long", "bare line end", "not the end", "no memory"] | SpoolError

_REPLIES: dict[Trouble, Reply] = {
    "too large": Reply(552, "5.3.4", "Message too large"),
    "line too long": Reply(554, "5.6.0", "A line of the message is too long"),
    "bare line end": Reply(550, "5.6.0", "A bare CR or LF in the message"),
    "not the end": Reply(554, "5.5.1", "More came behind a dot between bare line feeds"),
    "no memory": Reply(452, "4.3.1", "Too much mail at once, try again later"),
}


def reply_to(trouble: Trouble) -> Reply:
    """What the client hears of it."""
    return _REPLIES.get(trouble) or (NO_SPACE if isinstance(trouble, SpoolFull) else FAULT)


class Received(NamedTuple):
    """Content as it arrived, canonical. `head` is its beginning, at least the first MEMORY_LIMIT_BYTES of it.

    `trouble` says why there is none. `lenient`: it ended between bare LFs.
    """

    content: Content
    head: bytes
    trouble: Trouble | None = None
    lenient: bool = False


def ordinary_content(data: bytes, *, limit_bytes: int) -> Received | None:
    """What has arrived, where it is all of the content and is kept as it came: most of it. None: an Input and a Gathering see to it.

    Its only dot line is its end, its line ends are CRLF, and there is no more of it than each session may have.
    """
    end = len(data) - len(_END)
    if not data.endswith(_END) or data.startswith(b".") or data.find(_DOT_LINE) != end or len(data) > FREE_BYTES:
        return None
    octets = data[: end + 2]
    text = octets.decode("latin-1")
    if len(octets) > limit_bytes or not is_canonical(text):
        return None
    return Received(Content(len(octets), octets, eight_bit=not text.isascii(), dotted=False), octets)


class Input:
    """What a client has sent and we have not used yet, and its share of the memory for mail."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.buffer = bytearray()
        self.ended = False
        self._budget = budget or Budget()
        self._held = 0  # of the budget: for the buffer, and for content that came out of it and is not in custody yet
        self._room = FREE_BYTES  # so long the buffer may become before more is taken
        self._starved = False  # the budget had nothing for the last of it
        self._transport: asyncio.ReadTransport | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._searched = 0
        self._doubtful = False

    def attach(self, transport: asyncio.ReadTransport) -> None:
        """From where the octets come: told to pause while too many wait."""
        self._transport = transport

    def feed(self, octets: bytes) -> None:
        """Add what has arrived."""
        self.buffer += octets
        if len(self.buffer) > self._room:
            self._grow()
        self._wake()

    def _grow(self) -> None:
        if len(self.buffer) <= _PAUSE_BYTES:
            if taken := self._budget.cover(len(self.buffer) - self._room):
                self._held += taken
                self._room += taken
                return
            self._starved = True
        if not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def claim(self, excess: int) -> int:
        """Take from the budget for content that came out of the buffer; how much that was, or 0."""
        taken = self._budget.cover(excess)
        self._held += taken
        return taken

    def reserve(self) -> bool:
        """Take from the budget all that content of any size needs, unless it has too little left."""
        missing = max(0, LARGE_BYTES - self._held)
        if not self._budget.take(missing):
            return False
        self._held += missing
        self._room, self._starved = _PAUSE_BYTES, False
        return True

    def release(self) -> None:
        """Give back what was held for content that is in custody now, or nowhere."""
        if self._held or self._starved:
            self._budget.give(self._held)
            self._held, self._room, self._starved = 0, FREE_BYTES, False
            if len(self.buffer) > FREE_BYTES:  # the next message
                self._grow()

    def abandon(self) -> None:
        """Nothing of it is wanted any more."""
        self.buffer.clear()
        self.release()

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

    def small_content(self, *, lenient: bool = False) -> bytes | None:
        """Content that has arrived whole, as it came and without its final dot, or None while the end is not there.

        For content of up to one chunk; `takes_time` says when `content` must be used instead.
        """
        buffer = self.buffer
        if buffer.startswith(_EMPTY):
            self.drop(len(_EMPTY))
            return b""
        start = max(0, self._searched - len(_END))
        end = buffer.find(_END, start)
        if lenient and self._lf_end(end, start) >= 0:
            self._doubtful = True
            return None
        if end < 0:
            self._searched = len(buffer)
            return None
        self._searched = 0
        self._room = FREE_BYTES  # what is held stays with the content
        return self.take(end + 2, dropping=len(_END) - 2)

    @property
    def takes_time(self) -> bool:
        """Whether content has come that is more than one chunk, or for which there is no memory, or that ends where it must be seen that
        nothing comes behind."""
        return self._doubtful or self._starved or len(self.buffer) > _CHUNK_BYTES

    async def content(self, gathering: "Gathering", *, lenient: bool = False) -> Received:
        """Gather everything up to the final dot. Raises Disconnected, and then nothing of it is kept.

        What is over the limit or cannot be stored is read to its end and thrown away: `trouble` then says why.
        """
        buffer = self.buffer
        before = b"\r\n"  # the line end that stands before the buffer
        searched = 0
        if not (self._doubtful or self.reserve()):
            gathering.fail("no memory")
        try:
            while True:
                chunk_bytes, line_bytes = (_CHUNK_BYTES, MEMORY_LIMIT_BYTES) if gathering.trouble is None else (FREE_BYTES, FREE_BYTES)
                if before == b"\r\n" and buffer.startswith(_EMPTY):
                    self.drop(len(_EMPTY))
                    return await gathering.finish()
                start = max(0, searched - len(_END))
                end = buffer.find(_END, start)
                if lenient and (place := self._lf_end(end, start, before)) >= 0:
                    return await self._lenient_end(place, gathering)
                if end >= 0:
                    await gathering.add(self.take(end + 2, dropping=len(_END) - 2))
                    return await gathering.finish()
                if len(buffer) > chunk_bytes and (lines := buffer.rfind(b"\n") + 1):
                    chunk = self.take(lines)
                    before, searched = (b"\r\n" if chunk.endswith(b"\r\n") else b"\n"), 0
                    await gathering.add(chunk)
                    continue  # more may have arrived meanwhile, and the end with it
                if len(buffer) > line_bytes:
                    gathering.fail("line too long")
                    self.drop(len(buffer) - 4)  # nothing of it is kept, but the final dot must still be found
                    before = b""
                searched = len(buffer)
                if gathering.trouble is not None:
                    self.release()
                await self._more()
        except BaseException:
            gathering.discard()
            raise
        finally:
            self._searched, self._doubtful = 0, False

    def take(self, count: int, *, dropping: int = 0) -> bytes:
        """The first octets, which are used now, and so many behind them. Copied once: a slice of a bytearray would be another copy."""
        with memoryview(self.buffer) as view:
            octets = bytes(view[:count])
        self.drop(count + dropping)
        return octets

    def _lf_end(self, before: int, start: int = 0, preceding: bytes = b"") -> int:
        """How much stands before a dot line between bare LFs that comes before the other end (at `before`, or not there): -1 for none.

        `preceding` is the line end in front of the buffer.
        """
        if preceding == b"\n" and self.buffer.startswith(_LF_REST):
            return 0
        found = _LF_END.search(self.buffer, start, before if before >= 0 else len(self.buffer))
        return found.start() + 1 if found else -1

    async def _lenient_end(self, place: int, gathering: "Gathering") -> Received:
        """Take what is before a dot line between bare LFs, unless more comes behind it: then it was none, and the rest is nobody's."""
        chunk = self.take(place, dropping=len(_LF_REST))
        if not self.buffer and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIET_SECONDS):
                    await self._waiter
        if self.buffer:
            gathering.fail("not the end")
        await gathering.add(chunk)
        return (await gathering.finish())._replace(lenient=True)

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
    """Canonical content that grows, in memory first and then in a file that `spill` opens. `limit_bytes`: at most.

    `strict`: a bare CR or LF is trouble. `stuffed`: lines that begin with a dot have another one in front, as DATA has them; content
    without that may also end without a line end, and gets one.
    """

    def __init__(self, limit_bytes: int, spill: Callable[[], ContentWriter], *, strict: bool = False, stuffed: bool = True) -> None:
        self._limit_bytes = limit_bytes
        self._spill = spill
        self._strict = strict
        self._stuffed = stuffed
        self._chunks: list[bytes] = []
        self._writer: ContentWriter | None = None
        self._head = b""
        self._size = 0
        self._dotted = False
        self.trouble: Trouble | None = None

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
                self.fail(error)
        if self.trouble is not None:
            self.discard()
            return Received(NOTHING, b"", self.trouble)
        octets = b"".join(self._chunks)
        return Received(Content(len(octets), octets, eight_bit=not octets.isascii(), dotted=self._dotted), octets)

    def fail(self, trouble: Trouble) -> None:
        """Keep nothing, and say why; the first trouble is told."""
        self.trouble = self.trouble or trouble
        self.discard()

    def discard(self) -> None:
        """Keep nothing."""
        self._chunks = []
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _canonical(self, chunk: bytes) -> bytes:
        sent, chunk = chunk, normalize(chunk)
        if self._strict and chunk is not sent:
            self.fail("bare line end")
        if has_dot_line(chunk):
            self._dotted = True
            if self._stuffed:
                chunk = unstuff(chunk)
        if not self._stuffed and chunk and not chunk.endswith(b"\r\n"):
            chunk += b"\r\n"
        self._size += len(chunk)
        if self._size > self._limit_bytes:
            self.fail("too large")
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
            self.fail(error)
