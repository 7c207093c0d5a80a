"""Content in chunks against a slow reader that only follows the words of the contract: however it is cut, the same comes of it.

The thresholds are shrunk, so that small content overflows memory and lines; writing to a file takes turns of the loop.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.listener import data
from relay.listener.chunks import Chunks
from relay.listener.data import Gathering, Input, Received
from relay.spool.base import Content

MEMORY = 48

PIECES = [
    b"\r\n", b"\n", b"\r", b".", b"..", b"a", b"bc d", b"\0", b"\xe4", b"\r\n.", b".\r\n", b"\r\n.\r\n", b"\n.\n", b"\r\r\n", b"0123456789",
    b"QUIT\r\n", b"BDAT 3 LAST\r\n",
]  # fmt: skip
CONTENTS = st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
CUTS = st.lists(st.integers(0, 60), max_size=12)
LIMITS = st.one_of(st.just(10_000), st.integers(0, 150))


class Expected(NamedTuple):
    content: bytes
    longest_line: int
    bare: bool


def reference(raw: bytes) -> Expected:
    """Octet by octet. A line has its LF; what is behind the last one is a line that gets a line end."""
    content, line, place, started, longest, bare = b"", b"", 0, 0, 0, False
    while place < len(raw):
        run = place
        while raw[run : run + 1] == b"\r":
            run += 1
        if raw[run : run + 1] == b"\n":
            bare |= run - place != 1
            content, line, place = content + line + b"\r\n", b"", run + 1
            longest, started = max(longest, place - started), place
        elif raw[place : place + 1] == b"\r":
            bare, line, place = True, line + b" ", place + 1
        else:
            line, place = line + raw[place : place + 1], place + 1
    return Expected(content + (line + b"\r\n" if line else b""), max(longest, len(raw) - started + 1), bare)


class SlowFile:
    def __init__(self, turns: int) -> None:
        self._turns = turns
        self._octets = b""
        self.ended = ""

    async def write(self, octets: bytes) -> None:
        for _ in range(self._turns):
            await asyncio.sleep(0)
        self._octets += octets

    async def finish(self) -> Content:
        assert not self.ended
        self.ended = "finished"
        return Content(len(self._octets), self._octets, Path("nowhere"), eight_bit=not self._octets.isascii())

    def discard(self) -> None:
        assert self.ended != "finished", "a finished file is not ours any more"
        self.ended = "discarded"


async def receive(
    chunks: list[bytes], packets: list[int], *, limit: int, strict: bool, turns: int
) -> tuple[Received, bytes, list[SlowFile]]:
    """What comes of the chunks, what is left in the input, and the files that were begun."""
    files: list[SlowFile] = []

    def spill() -> SlowFile:
        files.append(SlowFile(turns))
        return files[-1]

    source = Input()
    taken = Chunks(Gathering(limit, spill, strict=strict, stuffed=False), limit_bytes=limit)
    arriving, sizes = b"".join(chunks) + b"QUIT\r\n", iter(packets)
    for place, chunk in enumerate(chunks):
        taken.begin(len(chunk), last=place == len(chunks) - 1)
        while True:
            taken.absorb(source)
            if taken.overflows:
                await taken.store()
            elif taken.left == 0:
                break
            else:
                size = next(sizes, 7) or 1
                source.feed(arriving[:size])
                arriving = arriving[size:]
    return await taken.finish(), bytes(source.buffer) + arriving, files


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    chunks, place = [], 0
    for size in sizes:
        chunks.append(raw[place : place + size])
        place += size
    return [*chunks, raw[place:]]


@pytest.fixture(autouse=True)
def small_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", MEMORY)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@settings(max_examples=600)
@given(raw=CONTENTS, sizes=CUTS, packets=CUTS, limit=LIMITS, strict=st.booleans(), turns=st.integers(0, 3))
def test_chunks_are_one_content(
    runner: asyncio.Runner, raw: bytes, sizes: list[int], packets: list[int], limit: int, strict: bool, turns: int
) -> None:
    expected = reference(raw)
    received, tail, files = runner.run(receive(cut(raw, sizes), packets, limit=limit, strict=strict, turns=turns))
    assert tail == b"QUIT\r\n", "the framing is lost"
    too_large, too_long = max(len(raw), len(expected.content)) > limit, expected.longest_line > MEMORY + 1
    bare = strict and expected.bare
    assert (received.trouble is not None) == (too_large or too_long or bare)
    if received.trouble is not None:
        assert (received.trouble, True) in {("too large", too_large), ("line too long", too_long), ("bare line end", bare)}
        assert received.content.size == 0
        assert all(file.ended == "discarded" for file in files)
        return
    content = received.content
    assert content.octets == expected.content
    assert (content.size, content.eight_bit) == (len(expected.content), not expected.content.isascii())
    assert content.dotted or b"\r\n." not in b"\r\n" + expected.content
    assert expected.content.startswith(received.head)
    assert len(received.head) >= min(MEMORY, content.size)
    assert (content.path is not None) == bool(files)
