"""Content on its way to a real upstream: together with its end, no faster than it is read, and never all in memory."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import Hold, ScriptedUpstream
from tests.system.upstreams import all_sent, outgoing, pool_to, raw_server, secured, settings

pytestmark = pytest.mark.both_loops

SLICE = b"x" * 262_142 + b"\r\n"
SLICES = 256
#: What the kernel may keep for a connection between two sockets of one machine, and what the transport may hold on top of it.
KERNEL_BYTES = 16 * 1024 * 1024


def counted(made: list[int]) -> Callable[[], AsyncGenerator[bytes, None]]:
    async def rest() -> AsyncGenerator[bytes, None]:
        for number in range(SLICES):
            made.append(number)
            yield SLICE

    return rest


@pytest.mark.parametrize("security", ["none", "tls"])
async def test_a_slow_reader_holds_the_content_back(tls: Authority, security: str) -> None:
    server = ScriptedUpstream() if security == "none" else ScriptedUpstream(security="tls", tls=tls.server)
    async with server, pool_to(acme=settings(server) if security == "none" else secured(server, tls, "tls")) as pool:
        read_on = asyncio.Event()
        server.script("content", Hold(read_on, after=1000))
        made: list[int] = []
        message = outgoing(octets=b"S: x\r\n\r\n", rest=counted(made), size=8 + SLICES * len(SLICE))
        sending = asyncio.ensure_future(pool.send("acme", message))
        seen = -1
        while len(made) != seen or not made:  # until nothing more goes out
            seen = len(made)
            await asyncio.wait([sending], timeout=0.1)
        assert len(made) * len(SLICE) < KERNEL_BYTES
        read_on.set()
        assert all_sent(await sending)
        assert len(made) == SLICES
        (transaction,) = server.accepted
        assert len(transaction.content) == message.size
        assert transaction.content.endswith(SLICE)


def reading(
    answer: Callable[[asyncio.StreamReader], Awaitable[None]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A server that takes every envelope and leaves the content to `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 whole.test\r\n")
        await reader.readline()
        writer.write(b"250 whole.test\r\n")
        while True:
            for reply in (b"250 Ok\r\n", b"250 Ok\r\n", b"354 Go on\r\n"):
                if not await reader.readline():
                    return
                writer.write(reply)
            await answer(reader)
            writer.write(b"250 Ok\r\n")

    return serve


async def test_small_content_and_its_end_come_in_one_segment() -> None:
    segments: list[bytes] = []

    async def answer(reader: asyncio.StreamReader) -> None:
        segments.append(await reader.read(65536))

    async with raw_server(reading(answer)) as upstream, pool_to(acme=upstream) as pool:
        for number in range(20):
            assert all_sent(await pool.send("acme", outgoing(octets=b"S: %d\r\n\r\n.%b\r\n" % (number, b"x" * 50 * number))))
    assert [segment.endswith(b"\r\n.\r\n") for segment in segments] == [True] * 20
    assert segments[3] == b"S: 3\r\n\r\n.." + b"x" * 150 + b"\r\n.\r\n"


async def test_the_source_of_the_content_is_closed_however_it_ends() -> None:
    closed: list[str] = []

    async def rest() -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(SLICES):
                yield SLICE
        finally:
            closed.append("closed")

    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        message = outgoing(octets=b"S: x\r\n\r\n", rest=rest, size=1000)
        assert all_sent(await pool.send("acme", message))
        assert closed == ["closed"]
        hold = asyncio.Event()
        server.script("content", Hold(hold, after=1000))
        sending = asyncio.ensure_future(pool.send("acme", message))
        await eventually(lambda: len(server.transactions) == 2 and server.transactions[1].content, "the content to begin")
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
        assert closed == ["closed"] * 2
        hold.set()


async def test_a_source_that_fails_ends_the_session_and_not_the_message_at_the_upstream() -> None:
    async def rest() -> AsyncGenerator[bytes, None]:
        yield SLICE
        raise OSError("the disk is gone")

    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        with pytest.raises(OSError, match="the disk is gone"):
            await pool.send("acme", outgoing(octets=b"S: x\r\n\r\n", rest=rest, size=1000))
        await eventually(lambda: server.open_connections == 0, "the session to end")
        assert server.accepted == []
        assert not server.transactions[0].complete
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.connections) == 2
