"""Content as a client sends it by BDAT, in chunks of the size it declares (RFC 3030).

The chunks of a transaction are one content: line ends are made canonical over all of them together, so that a CR at the end of one and
the LF at the beginning of the next are one line end. Dots mean nothing here. Octets of a chunk that is refused are read and dropped, as
the next command comes behind them; what was declared is only counted, never made room for.

State: what is left of the chunk at hand, and the end of the content, as far as it is no whole line yet.
"""

from relay.listener import data
from relay.listener.budget import FREE_BYTES
from relay.listener.data import Gathering, Input, Received, Trouble
from relay.mail.reply import Reply

# Nobody has 10^18 octets, and longer numbers are no numbers but attempts.
_DIGITS_LIMIT = 18


#: A chunk of less is a command like any other: a message of 50 million chunks would be a flood of them.
_SMALL_BYTES = 1024


class Chunks:
    """The chunks of one transaction. `refusal`: what each of them hears from now on, as one was refused; `told`: it was heard once."""

    def __init__(self, gathering: Gathering, *, limit_bytes: int) -> None:
        self.left = 0
        self.last = False
        self.small = True
        self.refusal: Reply | None = None
        self.told = False
        self._gathering = gathering
        self._limit_bytes = limit_bytes
        self._declared = 0
        self._covered = FREE_BYTES
        self._source: Input | None = None
        self._pending = bytearray()

    def begin(self, size: int, *, last: bool) -> None:
        """So many octets come now."""
        self.left, self.last = size, last
        self.small = size < _SMALL_BYTES
        self._declared += size
        if self._declared > self._limit_bytes:
            self._fail("too large")

    def refuse(self, reply: Reply) -> None:
        """Take nothing of this content any more."""
        self.refusal = reply
        self.discard()

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong with the content so far."""
        return self._gathering.trouble

    def absorb(self, source: Input) -> None:
        """Take what has arrived of this chunk, as much as fits in memory; `overflows` then says whether there may be more."""
        if self.refusal is not None or self._gathering.trouble is not None:
            dropped = min(self.left, len(source.buffer))
            source.drop(dropped)
            self.left -= dropped
            return
        count = min(self.left, len(source.buffer), data.MEMORY_LIMIT_BYTES + 1 - len(self._pending))
        self._pending += source.take(count)
        self.left -= count
        self._source = source
        if (excess := len(self._pending) - self._covered) > 0:
            taken = source.claim(excess)
            self._covered += taken
            if not taken:
                self._fail("no memory")

    @property
    def overflows(self) -> bool:
        """Whether `store` must make room before more is absorbed."""
        return len(self._pending) > data.MEMORY_LIMIT_BYTES

    async def store(self) -> None:
        """Make canonical what stands in memory, and write it to the file where it is too much."""
        if self._source is not None and not self._source.reserve():
            self._fail("no memory")
            return
        lines = self._pending.rfind(b"\n") + 1
        if not lines:
            self._fail("line too long")
            return
        chunk = bytes(self._pending[:lines])
        del self._pending[:lines]
        await self._gathering.add(chunk)
        if self._gathering.trouble is not None:
            self._pending.clear()

    async def finish(self) -> Received:
        """The content, after the last chunk."""
        rest, self._pending = bytes(self._pending), bytearray()
        try:
            if rest:
                await self._gathering.add(rest)
            return await self._gathering.finish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Keep nothing."""
        self._pending.clear()
        self._gathering.discard()
        if self._source is not None:
            self._source.release()

    def _fail(self, trouble: Trouble) -> None:
        self._gathering.fail(trouble)
        self.discard()


def parse_chunk(argument: str) -> tuple[int, bool]:
    """The size that BDAT declares, and whether it is the last. Raises ValueError."""
    words = argument.split()
    size, *more = words or [""]
    if not (size.isascii() and size.isdigit() and len(size) <= _DIGITS_LIMIT):
        raise ValueError("the size of a chunk is a number")
    if more and (len(more) > 1 or more[0].upper() != "LAST"):
        raise ValueError("only LAST may follow the size")
    return int(size), bool(more)
