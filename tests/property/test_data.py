"""Our reader of content against a slow one that only follows the words of the contract, and against aiosmtpd's own.

The thresholds are shrunk, so that small content overflows chunks, memory and lines; writing to a file takes turns of the loop, so that
more arrives meanwhile.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiosmtpd import smtp
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.listener import data
from relay.listener.data import Disconnected, Gathering, Input, Received, ordinary_content
from relay.mail.content import normalize
from relay.spool.base import Content
from tests.support.client import Client
from tests.support.front import Front

MEMORY, CHUNK, PAUSE = 48, 16, 32

PIECES = [
    b"\r\n", b"\n", b"\r", b".", b"..", b"a", b"bc d", b"\0", b"\xe4", b"\r\n.", b".\r\n", b"\r\n.\r\n", b"\n.\n", b"\n.\r\n", b"\r\n.\n",
    b"\r.\r\n", b"\r\n.\r\r\n", b"\r\r\n", b"0123456789", b"MAIL FROM:<x@y.z>\r\n",
]  # fmt: skip
CONTENTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=40), st.lists(st.sampled_from(PIECES), min_size=20, max_size=60)).map(
    b"".join
)
CUTS = st.lists(st.integers(1, 40), max_size=30)
LIMITS = st.one_of(st.just(10_000), st.integers(0, 150))


class Expected(NamedTuple):
    """What must come of some octets. `tail`: what is behind the end; None where there is no end."""

    content: bytes
    tail: bytes | None
    longest_line: int


def reference(raw: bytes) -> Expected:
    """Octet by octet: the end is CRLF.CRLF alone, or .CRLF at the very beginning; first line ends, then dots."""
    before, tail = raw, None
    for place in range(len(raw)):
        if (place == 0 and raw[:3] == b".\r\n") or raw[place - 2 : place + 3] == b"\r\n.\r\n":
            before, tail = raw[:place], raw[place + 3 :]
            break
    lines, line, place, started = [], b"", 0, 0
    longest = 0
    while place < len(before):
        run = place
        while before[run : run + 1] == b"\r":
            run += 1
        if before[run : run + 1] == b"\n":  # a bare LF, or any run of CR before an LF
            longest = max(longest, run + 1 - started)
            lines.append(line)
            line, place = b"", run + 1
            started = place
        elif before[place : place + 1] == b"\r":
            line, place = line + b" ", place + 1
        else:
            line, place = line + before[place : place + 1], place + 1
    assert tail is None or not line, "the end is preceded by a line end"
    unstuffed = [text[1:] if text[:1] == b"." and text != b"." else text for text in lines]
    return Expected(b"".join(text + b"\r\n" for text in unstuffed), tail, max(longest, len(before) - started))


class SlowFile:
    """A writer that lets the loop turn at every step."""

    def __init__(self, path: Path, turns: int) -> None:
        self._path = path
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
        return Content(len(self._octets), self._octets, self._path, eight_bit=not self._octets.isascii())

    def discard(self) -> None:
        assert self.ended != "finished", "a finished file is not ours any more"
        self.ended = "discarded"


class Outcome(NamedTuple):
    received: Received | None
    disconnected: bool
    tail: bytes
    files: list[SlowFile]


async def receive(packets: list[bytes], *, limit: int, turns: int, eof: bool) -> Outcome:
    """Feed the packets as a session does; what is left in the input afterwards is the tail."""
    files: list[SlowFile] = []

    def spill() -> SlowFile:
        files.append(SlowFile(Path("nowhere"), turns))
        return files[-1]

    source, received, task = Input(), None, None
    for packet in packets:
        if received is None and task is None and not source.buffer:
            received = ordinary_content(packet, limit_bytes=limit)
            if received is not None:
                continue
        source.feed(packet)
        if received is None and task is None:
            gathering = Gathering(limit, spill)
            if (octets := source.small_content()) is not None:
                received = gathering.whole(octets)
            elif source.takes_time:
                task = asyncio.create_task(source.content(gathering))
        await asyncio.sleep(0)
    if eof:
        source.end()
    disconnected = False
    if task is not None:
        if eof:
            try:
                received = await task
            except Disconnected:
                disconnected = True
        else:
            for _ in range(len(packets) + 40 * turns + 200):
                await asyncio.sleep(0)
            if task.done():
                received = task.result()
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    return Outcome(received, disconnected, bytes(source.buffer), files)


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    packets, place = [], 0
    for size in sizes:
        packets.append(raw[place : place + size])
        place += size
    return [packet for packet in [*packets, raw[place:]] if packet]


@pytest.fixture(autouse=True)
def small_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", MEMORY)
    monkeypatch.setattr(data, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(data, "_PAUSE_BYTES", PAUSE)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@settings(max_examples=600)
@given(raw=CONTENTS, end=st.booleans(), tail=CONTENTS, sizes=CUTS, limit=LIMITS, turns=st.integers(0, 5), eof=st.booleans())
def test_the_reader_finds_what_the_contract_says(
    runner: asyncio.Runner, raw: bytes, end: bool, tail: bytes, sizes: list[int], limit: int, turns: int, eof: bool
) -> None:
    raw += (b"\r\n.\r\n" + tail) if end else b""
    expected = reference(raw)
    found = runner.run(receive(cut(raw, sizes), limit=limit, turns=turns, eof=eof))
    if expected.tail is None:
        assert found.received is None
        assert all(file.ended == "discarded" for file in found.files)
        return
    assert not found.disconnected
    assert found.received is not None, "the end was there and was not seen"
    assert found.tail == expected.tail
    too_large, too_long = len(expected.content) > limit, expected.longest_line > MEMORY
    if found.received.trouble is not None:
        assert (found.received.trouble, True) in {("too large", too_large), ("line too long", too_long)}
        assert found.received.content.size == 0
        assert all(file.ended == "discarded" for file in found.files)
        return
    assert not too_large
    content = found.received.content
    assert content.octets == expected.content
    assert content.size == len(expected.content)
    assert content.eight_bit == (not expected.content.isascii())
    assert content.dotted or b"\r\n." not in b"\r\n" + expected.content
    assert expected.content.startswith(found.received.head)
    assert len(found.received.head) >= min(MEMORY, content.size)
    assert (content.path is not None) == bool(found.files)
    assert content.path is not None or content.size <= max(MEMORY, data._CHUNK_BYTES * 20 + 1000)


@settings(max_examples=150)
@given(raw=CONTENTS, tail=CONTENTS)
def test_any_split_into_packets_gives_the_same(runner: asyncio.Runner, raw: bytes, tail: bytes) -> None:
    raw += b"\r\n.\r\n" + tail
    results = set()
    for packets in ([raw], [bytes([octet]) for octet in raw], cut(raw, [7] * len(raw))):
        found = runner.run(receive(packets, limit=10_000, turns=1, eof=False))
        assert found.received is not None
        if found.received.trouble is None:
            results.add((found.received.content.octets, found.tail))
    assert len(results) <= 1


WORDS = st.lists(st.sampled_from([b".", b"..", b"a", b"x y", b"\xff", b"\0", b"-" * 60, b"", b"\n", b"\r", b"\r\ra"]), max_size=6)
# A dot behind a bare line end: to aiosmtpd it stands within a line, to us it begins one. Only the contract says which.
LINES = st.lists(WORDS.map(b"".join).filter(lambda line: not re.search(rb"[\r\n]\.|\r\Z", line)), max_size=12)


class _Keeper:
    def __init__(self) -> None:
        self.contents: list[bytes] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: smtp.Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        self.contents.append(envelope.content)
        return "250 OK"


async def codes_of(port: int, content: bytes, chunk: int) -> list[int]:
    """One message and a pipelined tail; the codes of all replies from DATA on."""
    async with Client("127.0.0.1", port, chunk=chunk) as client:
        await client.expect(220)
        await client.command("HELO app", 250)
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.command("DATA", 354)
        await client.send(content + b".\r\nNOOP\r\nRCPT TO:<x@y.z>\r\nQUIT\r\n")
        codes = [(await client.reply()).code for _ in range(4)]
        await client.expect_close()
        return codes


@pytest.mark.both_loops
@pytest.mark.parametrize("limit", [600, 10_000])
async def test_it_agrees_with_aiosmtpd_about_content(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 800)  # of memory, and of a line: it has no such limit here
    examples = _examples()
    async with _stock(limit) as (keeper, port), Front(tmp_path, listener={"message_size": limit}) as front:
        for lines, chunk in examples:
            content = b"".join((b"." + line if line.startswith(b".") else line) + b"\r\n" for line in lines)
            if limit - 200 < len(content) < limit + 200:
                continue  # it counts the stuffed dots too, so the edges differ
            theirs = await codes_of(port, content, chunk)
            assert await codes_of(front.port, content, chunk) == theirs
            assert [message.content for message in front.taken] == [normalize(content) for content in keeper.contents]
    assert any(len(content) > 800 for content in keeper.contents) is (limit > 800)


@pytest.mark.both_loops
async def test_it_agrees_with_aiosmtpd_that_content_without_its_end_is_nothing(tmp_path: Path) -> None:
    content = b"S: x\r\n\r\n..a\r\n\nb\r\r\n.\r"
    async with _stock(1000) as (keeper, port), Front(tmp_path) as front:
        for length in range(len(content) + 1):
            for each in (port, front.port):
                async with Client("127.0.0.1", each, chunk=length % 3) as client:
                    await client.expect(220)
                    await client.command("HELO app", 250)
                    await client.command("MAIL FROM:<app@acme.example>", 250)
                    await client.command("RCPT TO:<you@example.org>", 250)
                    await client.command("DATA", 354)
                    await client.send(content[:length])
                    client.finish_sending()
                    await client.expect_close()
        assert keeper.contents == front.taken == []


@asynccontextmanager
async def _stock(limit: int) -> AsyncIterator[tuple[_Keeper, int]]:
    """An aiosmtpd as it comes, and its port."""
    keeper, loop = _Keeper(), asyncio.get_running_loop()
    stock = await loop.create_server(
        lambda: smtp.SMTP(keeper, data_size_limit=limit, hostname="stock.example", loop=loop), "127.0.0.1", 0
    )  # fmt: skip
    try:
        yield keeper, stock.sockets[0].getsockname()[1]
    finally:
        stock.close()
        await stock.wait_closed()


def _examples() -> list[tuple[list[bytes], int]]:
    """Lines without their ends, and how many octets go into a packet (0: all)."""
    examples: list[tuple[list[bytes], int]] = [([b"twenty octets of text"] * 100, 0)]

    @settings(max_examples=40, database=None)
    @given(lines=LINES, repeat=st.sampled_from([1, 1, 40]), chunk=st.sampled_from([0, 0, 3, 50]))
    def collect(lines: list[bytes], repeat: int, chunk: int) -> None:
        examples.append((lines * repeat, chunk))

    collect()
    return examples


def lenient_end(raw: bytes) -> tuple[int, int] | None:
    """Where the content of a lenient listener ends and where what is behind it begins, when that end is between bare LFs."""
    for place in range(len(raw)):
        if (place == 0 and raw[:3] == b".\r\n") or raw[place : place + 5] == b"\r\n.\r\n":
            return None
        if raw[place : place + 3] == b"\n.\n" and raw[max(0, place - 1) : place] != b"\r":
            return place + 1, place + 3
    return None


@settings(max_examples=400)
@given(raw=CONTENTS, behind=st.booleans(), tail=CONTENTS, sizes=CUTS, turns=st.integers(0, 3))
def test_a_lenient_reader_knows_one_more_end_where_nothing_is_behind(
    runner: asyncio.Runner, raw: bytes, behind: bool, tail: bytes, sizes: list[int], turns: int
) -> None:
    raw += b"x\n.\n" + (tail if behind else b"")
    end = lenient_end(raw)
    files: list[SlowFile] = []

    def spill() -> SlowFile:
        files.append(SlowFile(Path("nowhere"), turns))
        return files[-1]

    async def read() -> tuple[Received | None, bytes]:
        source, gathering = Input(), Gathering(10_000, spill)
        for packet in cut(raw, sizes):
            source.feed(packet)
            if (octets := source.small_content(lenient=True)) is not None:
                return gathering.whole(octets), bytes(source.buffer) + raw[raw.index(packet) + len(packet) :]
        source.end()
        try:
            return await source.content(gathering, lenient=True), bytes(source.buffer)
        except Disconnected:
            return None, bytes(source.buffer)

    received, left = runner.run(read())
    if received is not None and received.trouble == "line too long":
        return
    if end is None:
        assert (received is None) == (reference(raw).tail is None)
        assert received is None or not received.lenient
        return
    assert received is not None
    assert received.lenient
    if raw[end[1] :]:
        assert (received.trouble, received.content.size, left) == ("not the end", 0, raw[end[1] :])
        assert all(file.ended == "discarded" for file in files)
    else:
        assert received.content.octets == reference(raw[: end[0]] + b"\r\n.\r\n").content[:-2]
