"""Bytes in, replies out: one connection whose other side is the test."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from relay.mail.outcome import Failure
from relay.upstream.wire import _REPLY_LIMIT_BYTES, Broken, Wire

pytestmark = pytest.mark.both_loops


class FakeTransport(asyncio.Transport):
    """Keeps what is written; lets nothing out until the test drains it."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Wire | None = None
        self.written = b""
        self.unsent = 0
        self.largest_unsent = 0
        self.high_water = 1 << 62
        self.breaks_after = 1 << 62
        self.state = "open"

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, Wire)
        self.protocol = protocol

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert self.state == "open"
        assert self.protocol is not None
        if len(self.written) + len(data) > self.breaks_after:  # EPIPE: the protocol is told in the loop's next round
            self.abort()
            return
        was_below = self.unsent <= self.high_water
        self.written += data
        self.unsent += len(data)
        self.largest_unsent = max(self.largest_unsent, self.unsent)
        if was_below and self.unsent > self.high_water:
            self.protocol.pause_writing()

    def drain(self, octets: int) -> None:
        assert self.protocol is not None
        was_above = self.unsent > self.high_water
        self.unsent = max(0, self.unsent - octets)
        if was_above and self.unsent <= self.high_water:
            self.protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.state != "open"

    def close(self) -> None:
        self.abort("closed")

    def abort(self, state: str = "aborted") -> None:
        if self.state == "open":
            self.state = state
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


def connected(high_water: int = 1 << 62) -> tuple[Wire, FakeTransport]:
    transport = FakeTransport()
    transport.high_water = high_water
    return Wire(transport), transport


async def asked(wire: Wire, count: int = 1, *, timeout_seconds: float = 10.0) -> "asyncio.Task[list[list[bytes]]]":
    """A task that already waits for replies."""
    task = asyncio.ensure_future(wire.replies(count, timeout_seconds=timeout_seconds))
    await asyncio.sleep(0)
    return task


# -- replies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("octets", [b"250-a\r\n250-b\r\n250 c\r\n354 go\r\n", b"250-a\n250-b\n250 c\n354 go\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_replies_are_found_however_they_are_cut(octets: bytes, size: int) -> None:
    wire, _ = connected()
    task = await asked(wire, 2)
    for place in range(0, len(octets), size):
        wire.data_received(octets[place : place + size])
    assert await task == [[b"250-a", b"250-b", b"250 c"], [b"354 go"]]
    assert wire.lost is None


async def test_those_that_came_before_the_end_are_given_and_then_the_end() -> None:
    wire, _ = connected()
    task = await asked(wire, 3)
    wire.data_received(b"250 a\r\n250 b\r\n25")
    wire.eof_received()
    assert await task == [[b"250 a"], [b"250 b"]]
    with pytest.raises(Broken, match="closed the connection") as caught:
        await wire.replies(1, timeout_seconds=1)
    assert caught.value.failure is Failure.CLOSED


@pytest.mark.parametrize("error", [None, ConnectionResetError("reset by peer")])
async def test_a_lost_connection_ends_the_wait(error: Exception | None) -> None:
    wire, _ = connected()
    task = await asked(wire)
    wire.connection_lost(error)
    with pytest.raises(Broken, match="reset by peer" if error else "closed the connection"):
        await task
    assert wire.ended.done()


async def test_a_wait_ends_when_its_time_is_up_and_the_connection_with_it() -> None:
    wire, transport = connected()
    with pytest.raises(Broken, match=r"no answer within 0\.01 s") as caught:
        await wire.replies(1, timeout_seconds=0.01)
    assert caught.value.failure is Failure.TIMEOUT
    assert transport.state == "aborted"
    assert wire.lost is caught.value


async def test_a_shorter_wait_after_a_longer_one_is_short() -> None:
    wire, _ = connected()
    for timeout_seconds in (600.0, 60.0):
        task = await asked(wire, timeout_seconds=timeout_seconds)
        wire.data_received(b"250 Ok\r\n")
        await task
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Broken):
        await wire.replies(1, timeout_seconds=0.02)
    assert 0.01 < loop.time() - begun < 50


async def test_a_longer_wait_after_a_shorter_one_is_long() -> None:
    wire, _ = connected()
    task = await asked(wire, timeout_seconds=0.02)
    wire.data_received(b"250 Ok\r\n")
    await task
    later = await asked(wire, timeout_seconds=10)
    asyncio.get_running_loop().call_later(0.06, wire.data_received, b"250 Ok\r\n")
    assert await later == [[b"250 Ok"]]


async def test_the_clock_of_a_wait_that_is_over_ends_nothing() -> None:
    wire, transport = connected()
    task = await asked(wire, timeout_seconds=0.01)
    wire.data_received(b"250 Ok\r\n")
    await task
    await asyncio.wait([wire.ended], timeout=0.05)
    assert (wire.lost, transport.state) == (None, "open")


@pytest.mark.parametrize("piece", [b"2", b"250-another line\r\n"])
async def test_each_reply_of_a_flight_starts_the_clock_again_and_a_piece_of_one_does_not(piece: bytes) -> None:
    wire, _ = connected()
    loop = asyncio.get_running_loop()
    for number in range(1, 6):
        loop.call_later(0.03 * number, wire.data_received, b"250 Ok\r\n")
    assert len(await wire.replies(5, timeout_seconds=0.06)) == 5
    for number in range(1, 400):
        loop.call_later(0.03 * number, wire.data_received, piece)
    begun = loop.time()
    with pytest.raises(Broken, match="no answer"):
        await wire.replies(1, timeout_seconds=0.06)
    assert loop.time() - begun < 10


@pytest.mark.parametrize("octets", [b"250 unasked\r\n", b"4", b"\r\n", b"\xff" * 10])
async def test_whatever_comes_unasked_ends_the_connection(octets: bytes) -> None:
    wire, transport = connected()
    wire.data_received(octets)
    assert wire.lost is not None
    assert "without being asked" in str(wire.lost)
    assert transport.state == "aborted"
    with pytest.raises(Broken):
        await wire.replies(1, timeout_seconds=1)


@pytest.mark.parametrize("more", [b"250 another\r\n", b"250-half", b"4"])
async def test_what_comes_behind_the_last_reply_that_was_asked_for_ends_the_connection(more: bytes) -> None:
    wire, _ = connected()
    task = await asked(wire)
    wire.data_received(b"250 Ok\r\n" + more)
    assert await task == [[b"250 Ok"]]
    assert wire.lost is not None


async def test_commands_sent_ahead_have_their_replies_behind_those_that_are_awaited() -> None:
    wire, transport = connected()
    task = await asked(wire)
    wire.write_ahead(b"MAIL\r\nRCPT\r\n", replies=2)
    assert transport.written == b"MAIL\r\nRCPT\r\n"
    wire.data_received(b"250 taken\r\n250 mail\r\n25")
    assert await task == [[b"250 taken"]]
    wire.data_received(b"0 rcpt\r\n")
    wire.come_up()
    assert await wire.replies(2, timeout_seconds=1) == [[b"250 mail"], [b"250 rcpt"]]
    assert wire.lost is None


@pytest.mark.parametrize("more", [b"250 another\r\n", b"4"])
async def test_more_replies_than_to_what_was_sent_ahead_end_the_connection(more: bytes) -> None:
    wire, _ = connected()
    task = await asked(wire)
    wire.write_ahead(b"MAIL\r\n", replies=1)
    wire.data_received(b"250 taken\r\n250 mail\r\n" + more)
    assert await task == [[b"250 taken"]]
    assert wire.lost is not None


async def test_what_was_sent_ahead_is_without_reply_when_the_connection_ends_before() -> None:
    wire, _ = connected()
    task = await asked(wire)
    wire.write_ahead(b"MAIL\r\n", replies=1)
    wire.data_received(b"250 taken\r\n")
    wire.connection_lost(None)
    assert await task == [[b"250 taken"]]
    wire.come_up()
    with pytest.raises(Broken, match="closed the connection"):
        await wire.replies(1, timeout_seconds=1)


@pytest.mark.parametrize("piece", [b"x" * 1000, b"250-" + b"x" * 1000 + b"\r\n"])
async def test_a_reply_without_end_is_not_collected(piece: bytes) -> None:
    wire, transport = connected()
    task = await asked(wire)
    sent = 0
    while wire.lost is None:
        assert sent <= _REPLY_LIMIT_BYTES + 2 * len(piece)
        wire.data_received(piece)
        sent += len(piece)
    with pytest.raises(Broken, match="a reply of more than") as caught:
        await task
    assert caught.value.failure is Failure.NONSENSE
    assert transport.state == "aborted"


# -- content ---------------------------------------------------------------------------------------------------------------


async def pieces(count: int, size: int, made: list[int] | None = None) -> AsyncIterator[bytes]:
    for number in range(count):
        if made is not None:
            made.append(number)
        yield b"x" * size


async def test_content_is_written_no_faster_than_it_is_taken() -> None:
    wire, transport = connected(high_water=1000)
    made: list[int] = []
    task = asyncio.ensure_future(wire.send(pieces(100, 400, made), timeout_seconds=10))
    while not task.done():
        await asyncio.sleep(0)
        assert len(made) * 400 - (len(transport.written) - transport.unsent) <= 1000 + 2 * 400
        transport.drain(100)
    assert await task is True
    assert len(transport.written) == 40_000
    assert transport.largest_unsent <= 1400


async def test_content_that_is_taken_slowly_but_steadily_is_not_late() -> None:
    wire, transport = connected(high_water=1000)
    task = asyncio.ensure_future(wire.send(pieces(3, 4000), timeout_seconds=0.4))
    while not task.done():
        transport.drain(150)
        await asyncio.wait([task], timeout=0.01)
    assert await task is True


async def test_content_that_is_not_taken_any_more_is_given_up() -> None:
    wire, transport = connected(high_water=1000)
    with pytest.raises(Broken, match="no answer within") as caught:
        await wire.send(pieces(3, 2000), timeout_seconds=0.02)
    assert caught.value.failure is Failure.TIMEOUT
    assert transport.state == "aborted"


@pytest.mark.parametrize("paused", [True, False])
async def test_a_reply_ends_the_content(paused: bool) -> None:
    wire, transport = connected(high_water=1000 if paused else 1 << 62)

    async def slices() -> AsyncIterator[bytes]:
        yield b"x" * 2000
        asyncio.get_running_loop().call_soon(wire.data_received, b"552 5.3.4 too large\r\n")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        yield b"y"
        raise AssertionError("nobody asks for more")

    assert await wire.send(slices(), timeout_seconds=10) is False
    assert b"y" not in transport.written
    assert await wire.replies(1, timeout_seconds=1) == [[b"552 5.3.4 too large"]]


@pytest.mark.parametrize("breaks_after", [0, 2000, 5999])
async def test_content_whose_last_octet_could_not_be_written_is_not_handed_over(breaks_after: int) -> None:
    wire, transport = connected()
    transport.breaks_after = breaks_after
    with pytest.raises(Broken) as caught:
        await wire.send(pieces(3, 2000), timeout_seconds=10)
    assert caught.value.failure is Failure.CLOSED
    await wire.ended


async def test_nothing_is_written_to_a_connection_that_is_about_to_be_lost() -> None:
    wire, transport = connected()
    transport.abort()
    with pytest.raises(Broken):
        await wire.send(pieces(1, 10), timeout_seconds=10)
    assert transport.written == b""
    await wire.ended


@pytest.mark.parametrize("paused", [True, False])
async def test_the_end_of_the_connection_ends_the_content(paused: bool) -> None:
    wire, _ = connected(high_water=1000 if paused else 1 << 62)
    asyncio.get_running_loop().call_soon(wire.eof_received)

    async def slices() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 2000
            await asyncio.sleep(0)

    with pytest.raises(Broken, match="closed the connection"):
        await wire.send(slices(), timeout_seconds=10)


# -- the end ---------------------------------------------------------------------------------------------------------------


async def test_quit_is_said_once_and_the_answer_closes() -> None:
    wire, transport = connected()
    wire.quit(timeout_seconds=10)
    wire.quit(timeout_seconds=10)
    assert transport.written == b"QUIT\r\n"
    wire.data_received(b"221 bye\r\n")
    assert transport.state == "closed"
    await wire.ended
    assert wire.lost is not None


async def test_quit_without_an_answer_ends_after_its_time() -> None:
    wire, transport = connected()
    wire.quit(timeout_seconds=0.01)
    await asyncio.wait_for(wire.ended, 30)
    assert transport.state == "aborted"


async def test_closing_twice_or_after_the_end_does_nothing() -> None:
    wire, transport = connected()
    wire.close()
    await wire.ended
    transport.state = "open"  # asyncio's transports fail when they are aborted after their end
    wire.close()
    wire.quit(timeout_seconds=1)
    assert (transport.state, transport.written) == ("open", b"")
