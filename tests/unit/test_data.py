"""Content as it arrives: where it ends, where it is kept, and what is left when it cannot be taken."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from relay.clock import ManualClock
from relay.listener.budget import FREE_BYTES
from relay.listener.data import MEMORY_LIMIT_BYTES, Disconnected, Gathering, Input, Received, ordinary_content
from relay.spool.base import Content, ContentWriter, SpoolError, SpoolFull
from tests.support.eventually import eventually
from tests.support.front import FaultySpool

LINE = b"123456789 123456789 123456789 123456789 123456789 123456789 12\r\n"
LARGE = LINE * (2 * MEMORY_LIMIT_BYTES // len(LINE))  # enough to be written to a file, and to pause the transport


class Gate:
    """A writer whose every write waits until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.writing = asyncio.Event()
        self.octets = b""
        self.discarded = False

    async def write(self, octets: bytes) -> None:
        self.writing.set()
        await self.open.wait()
        self.octets += octets

    async def finish(self) -> Content:
        return Content(len(self.octets), None, Path("nowhere"))

    def discard(self) -> None:
        self.discarded = True


class Tap:
    """A transport that only knows whether it reads."""

    def __init__(self) -> None:
        self.reading = True

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True


def gathering(spill: object = None, *, limit: int = 100_000_000) -> Gathering:
    def open_gate() -> ContentWriter:
        assert spill is not None, "nothing was to be written"
        if isinstance(spill, Exception):
            raise spill
        return cast(ContentWriter, spill)

    return Gathering(limit, open_gate)


async def read(octets: bytes, into: Gathering) -> Received:
    source = Input()
    source.feed(octets)
    return await source.content(into)


async def test_content_that_fits_stays_in_memory() -> None:
    received = await read(LINE * 1000 + b".\r\n", gathering())
    assert received.content.octets == received.head == LINE * 1000
    assert (received.content.path, received.content.eight_bit, received.content.dotted, received.trouble) == (None, False, False, None)


@pytest.mark.parametrize("extra", [0, 1])
async def test_one_octet_more_than_memory_goes_to_a_file(tmp_path: Path, extra: int) -> None:
    octets = LINE * ((MEMORY_LIMIT_BYTES - 100) // len(LINE))
    octets += b"\xe4" * (MEMORY_LIMIT_BYTES - len(octets) - 2 + extra) + b"\r\n"
    spool = FaultySpool(tmp_path, ManualClock())
    received = await read(octets + b".\r\n", Gathering(10**9, spool.writer))
    content = received.content
    assert (content.path is not None) is bool(extra)
    assert (content.path.read_bytes() if content.path else content.octets) == octets
    assert (content.size, content.eight_bit) == (len(octets), True)
    assert received.head == octets
    await spool.close()


async def test_the_end_is_seen_when_it_arrives_while_the_file_is_written() -> None:
    """Everything that is left may come during one slow write; nothing more will wake the reader then."""
    gate, source = Gate(), Input()
    source.feed(LARGE)
    task = asyncio.create_task(source.content(gathering(gate)))
    await gate.writing.wait()
    source.feed(b"end\r\n.\r\nNOOP\r\nQUIT\r\n")
    gate.open.set()
    async with asyncio.timeout(20):
        received = await task
    assert gate.octets == LARGE + b"end\r\n"
    assert received.content.size == len(gate.octets)
    assert source.buffer == b"NOOP\r\nQUIT\r\n"


async def test_the_loss_of_the_connection_is_seen_when_it_happens_while_the_file_is_written() -> None:
    gate, source = Gate(), Input()
    source.feed(LARGE)
    task = asyncio.create_task(source.content(gathering(gate)))
    await gate.writing.wait()
    source.end()
    gate.open.set()
    with pytest.raises(Disconnected):
        async with asyncio.timeout(20):
            await task
    assert gate.discarded


async def test_a_cancelled_reader_leaves_no_file(tmp_path: Path) -> None:
    spool, source = FaultySpool(tmp_path, ManualClock()), Input()
    source.feed(LARGE)
    task = asyncio.create_task(source.content(Gathering(10**9, spool.writer)))
    while not list((tmp_path / "incoming").iterdir()):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not list((tmp_path / "incoming").iterdir()), "the file to go")
    await spool.close()


@pytest.mark.parametrize("error", [SpoolFull("full"), SpoolError("broken")])
async def test_content_that_cannot_be_stored_is_read_to_its_end(error: SpoolError) -> None:
    source = Input()
    source.feed(LARGE + b".\r\nQUIT\r\n")
    received = await source.content(gathering(error))
    assert received == Received(Content(0, b""), b"", error)
    assert source.buffer == b"QUIT\r\n"


async def test_a_file_that_cannot_be_finished_is_trouble_and_gone() -> None:
    class Unfinished(Gate):
        async def finish(self) -> Content:
            raise SpoolError("broken")

    gate = Unfinished()
    gate.open.set()
    received = await read(LARGE + b".\r\n", gathering(gate))
    assert isinstance(received.trouble, SpoolError)
    assert gate.discarded


@pytest.mark.parametrize("size", [1, 10, len(LINE) * 3 - 1])
async def test_content_over_the_limit_is_read_to_its_end(size: int) -> None:
    source = Input()
    source.feed(LINE * 3 + b".\r\nQUIT\r\n")
    assert (await source.content(gathering(limit=size))).trouble == "too large"
    assert source.buffer == b"QUIT\r\n"


async def test_content_at_the_limit_is_taken() -> None:
    assert (await read(LINE * 3 + b".\r\n", gathering(limit=len(LINE) * 3))).trouble is None


async def test_a_file_over_the_limit_is_gone(tmp_path: Path) -> None:
    spool = FaultySpool(tmp_path, ManualClock())
    source = Input()
    source.feed(LARGE)
    task = asyncio.create_task(source.content(Gathering(len(LARGE) + 100_000, spool.writer)))
    while not list((tmp_path / "incoming").iterdir()):
        await asyncio.sleep(0)
    source.feed(LARGE + b".\r\n")
    assert (await task).trouble == "too large"
    await eventually(lambda: not list((tmp_path / "incoming").iterdir()), "the file to go")
    await spool.close()


async def test_reading_pauses_while_much_waits_and_goes_on_as_it_is_used() -> None:
    gate, source, tap = Gate(), Input(), Tap()
    source.attach(cast(asyncio.ReadTransport, tap))
    source.feed(LARGE)
    assert not tap.reading
    task = asyncio.create_task(source.content(gathering(gate)))
    await gate.writing.wait()
    assert tap.reading
    source.feed(LARGE)
    assert not tap.reading
    gate.open.set()
    while not tap.reading:
        await asyncio.sleep(0)
    source.feed(b".\r\n")
    assert (await task).content.size == 2 * len(LARGE)


async def test_an_endless_line_does_not_grow_and_its_end_is_found() -> None:
    source, tap = Input(), Tap()
    source.attach(cast(asyncio.ReadTransport, tap))
    source.feed(b"x" * 300_000)
    task = asyncio.create_task(source.content(gathering()))
    for _ in range(60):
        await asyncio.sleep(0)
        assert tap.reading
        source.feed(b"." * 100_000)
        assert len(source.buffer) < MEMORY_LIMIT_BYTES + 200_000
    await asyncio.sleep(0)
    source.feed(b"\r\n")
    await asyncio.sleep(0)
    source.feed(b".\r\nQUIT\r\n")
    assert (await task).trouble == "line too long"
    assert source.buffer == b"QUIT\r\n"


@pytest.mark.parametrize(
    ("packets", "content", "tail"),
    [
        ([b".\r\n"], b"", b""),
        ([b".", b"\r", b"\n"], b"", b""),
        ([b".\r\nQUIT\r\n"], b"", b"QUIT\r\n"),
        ([b"\r\n.\r\n"], b"\r\n", b""),
        ([b"a\r", b"\n.", b"\r\n", b"b"], b"a\r\n", b"b"),
        ([b"a\r\n.", b"\r\nb"], b"a\r\n", b"b"),
        ([b"a\r\n.\r\n.\r\n"], b"a\r\n", b".\r\n"),
    ],
)
def test_small_content_is_found_as_soon_as_it_is_whole(packets: list[bytes], content: bytes, tail: bytes) -> None:
    source, found = Input(), None
    for packet in packets:
        source.feed(packet)
        found = source.small_content() if found is None else found
    assert found == content
    assert source.buffer == tail


@pytest.mark.parametrize(
    "octets", [b"", b".", b".\r", b".\n", b"a\n.\n", b"a\n.\r\n", b"a\r\n.\n", b"a\r.\r\n", b"\r\n.\r\r\n", b"a\r\n..\r\n"]
)
def test_what_is_not_the_end_is_not_taken_for_it(octets: bytes) -> None:
    source = Input()
    for octet in octets:
        source.feed(bytes([octet]))
        assert source.small_content() is None
    assert source.buffer == octets


@pytest.mark.parametrize("octets", [b"a\r\n", b"\r\n", b"a.\r\n", b"S: \xe4\r\n\r\nb\r\n", b"x" * (FREE_BYTES - 5) + b"\r\n"])
def test_ordinary_content_comes_to_the_same_as_any_other(octets: bytes) -> None:
    assert ordinary_content(octets + b".\r\n", limit_bytes=len(octets)) == gathering().whole(octets)


@pytest.mark.parametrize(
    "octets",
    [
        b"", b"a", b".\r\n", b"a.\r\n", b"a\r\n", b"a\r\n.", b"a\r\n.\r\nQUIT\r\n", b"a\n.\r\n", b"a\r\n.\n",  # no end, or not all of it
        b".\r\nQUIT\r\n.\r\n", b"a\r\n.\r\nQUIT\r\n.\r\n",  # an end, and something behind it
        b"..a\r\n.\r\n", b"a\r\n..b\r\n.\r\n", b"a\nb\r\n.\r\n", b"a\rb\r\n.\r\n", b"a\r\r\n.\r\n",  # something to be done to it
        b"x" * (FREE_BYTES - 4) + b"\r\n.\r\n", b"x" * 99 + b"\r\n.\r\n",  # too much of it
    ],
)  # fmt: skip
def test_what_is_no_ordinary_content_is_left_alone(octets: bytes) -> None:
    assert ordinary_content(octets, limit_bytes=100 if len(octets) < 200 else 10**9) is None
