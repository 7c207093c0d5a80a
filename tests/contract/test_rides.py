"""More messages than connections where small mail is not one flight: the next one's commands go out behind the content before it."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome
from relay.upstream.pool import Pool
from tests.support.upstream import ScriptedUpstream
from tests.system.upstreams import PATIENT, all_sent, outgoing, pool_to, raw_server, settings, words

pytestmark = pytest.mark.both_loops

A = "a@example.org"
OFFERS = b"250-rides.test\r\n250 PIPELINING\r\n"
FLIGHT = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<a@example.org>\r\nDATA\r\n"


def limited(upstream: Upstream, **limits: int) -> Upstream:
    return upstream.model_copy(update={"limits": upstream.limits.model_copy(update={"connections": 1, **limits})})


class Station:
    """The other side of one connection at a time, which the test plays."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        writer.write(b"220 rides.test\r\n")
        await reader.readline()
        writer.write(OFFERS)
        await self.connections.put((reader, writer))
        await writer.wait_closed()


@asynccontextmanager
async def station(**limits: int) -> AsyncIterator[tuple[Station, Pool]]:
    played = Station()
    async with raw_server(played.serve) as upstream, pool_to(acme=limited(upstream, **limits)) as pool:
        yield played, pool
        for writer in played.writers:  # so that nobody waits for the answer to QUIT
            writer.close()


def sending(pool: Pool, content: bytes) -> "asyncio.Task[list[Outcome]]":
    return asyncio.ensure_future(pool.send("acme", outgoing(A, octets=content)))


async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, flown: bool = False) -> bytes:
    """Play one message up to the final dot, without the reply to it; answers the content."""
    if not flown:
        assert await reader.readexactly(len(FLIGHT)) == FLIGHT
    writer.write(b"250 Ok\r\n250 Ok\r\n354 go on\r\n")
    return (await reader.readuntil(b"\r\n.\r\n")).removesuffix(b".\r\n")


async def test_the_next_commands_come_before_the_reply_to_the_content() -> None:
    async with station() as (played, pool):
        first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
        reader, writer = await played.connections.get()
        assert await taken(reader, writer) == b"one\r\n"
        assert await reader.readexactly(len(FLIGHT)) == FLIGHT
        assert not first.done()
        writer.write(b"250 first\r\n")
        assert words(await first) == ["sent message final"]
        assert await taken(reader, writer, flown=True) == b"two\r\n"
        assert await reader.readexactly(len(FLIGHT)) == FLIGHT
        writer.write(b"554 5.6.0 not this one\r\n")
        assert words(await second) == ["failed message final"]
        assert await taken(reader, writer, flown=True) == b"three\r\n"
        writer.write(b"250 third\r\n")
        assert words(await third) == ["sent message final"]
        assert played.connections.empty()


async def test_replies_to_the_content_and_to_what_rides_may_come_together() -> None:
    async with station() as (played, pool):
        first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        await reader.readexactly(len(FLIGHT))
        writer.write(b"250 first\r\n250 Ok\r\n550 5.1.1 nobody\r\n503 5.5.1 nobody is there\r\n")
        assert words(await first) == ["sent message final"]
        assert words(await second) == ["failed recipient rcpt"]
        third = sending(pool, b"three\r\n")
        assert await reader.readexactly(6) == b"RSET\r\n"
        writer.write(b"250 Ok\r\n")
        assert await taken(reader, writer) == b"three\r\n"
        writer.write(b"250 third\r\n")
        assert all_sent(await third)


@pytest.mark.parametrize("farewell", [b"", b"421 4.3.2 going down\r\n", b"nonsense\r\n"])
async def test_who_rides_is_not_in_doubt_when_the_connection_ends(farewell: bytes) -> None:
    async with station() as (played, pool):
        first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        await reader.readexactly(len(FLIGHT))
        writer.write(farewell)
        writer.close()
        assert words(await first) == ["deferred upstream final fallback" if b"421" in farewell else "deferred upstream final in_doubt"]
        reader, writer = await played.connections.get()
        assert await taken(reader, writer) == b"two\r\n"
        writer.write(b"250 second\r\n")
        assert words(await second) == ["sent message final"]


async def test_the_last_message_of_a_connection_takes_no_rider() -> None:
    async with station(messages_per_connection=1) as (played, pool):
        first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        writer.write(b"250 first\r\n")
        assert all_sent(await first)
        assert await reader.readline() == b"QUIT\r\n"
        assert played.connections.empty()
        writer.write(b"221 2.0.0 Bye\r\n")
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        writer.write(b"250 second\r\n")
        assert all_sent(await second)


async def test_who_rides_may_be_cut_off_and_the_message_before_is_sent() -> None:
    async with station() as (played, pool):
        first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        await reader.readexactly(len(FLIGHT))
        second.cancel()
        await asyncio.wait([second])
        writer.write(b"250 first\r\n")
        assert all_sent(await first)
        reader, writer = await played.connections.get()  # the other one is out of step
        assert await taken(reader, writer) == b"three\r\n"
        writer.write(b"250 third\r\n")
        assert all_sent(await third)


async def test_who_rides_may_be_cut_off_as_the_message_before_ends() -> None:
    """In the very turn of the loop: his commands are on the connection, and nobody else's content may go behind them."""
    async with station() as (played, pool):

        async def send_first() -> None:
            assert all_sent(await pool.send("acme", outgoing(A, octets=b"one\r\n")))
            second.cancel()

        first = asyncio.ensure_future(send_first())
        second, third = sending(pool, b"two\r\n"), sending(pool, b"three\r\n")
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        await reader.readexactly(len(FLIGHT))
        writer.write(b"250 first\r\n250 Ok\r\n250 Ok\r\n354 go on\r\n")
        await first
        assert await reader.read() == b""
        reader, writer = await played.connections.get()
        assert await taken(reader, writer) == b"three\r\n"
        writer.write(b"250 third\r\n")
        assert all_sent(await third)
        assert second.cancelled()


async def test_nobody_rides_or_waits_for_ever_where_the_connection_breaks_as_content_is_written() -> None:
    """The one who would ride is told before the loop tells that it is gone; uvloop's transports raise an error of their own then."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        upstream = Upstream.model_validate({"host": "127.0.0.1", "port": server.getsockname()[1], "security": "none", "timeouts": PATIENT})

        async def greeted() -> socket.socket:
            connection, _ = await loop.sock_accept(server)
            await loop.sock_sendall(connection, b"220 rides.test\r\n")
            await loop.sock_recv(connection, 1000)
            await loop.sock_sendall(connection, OFFERS)
            await loop.sock_recv(connection, 1000)
            return connection

        async with pool_to(acme=limited(upstream)) as pool:
            first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
            connection = await greeted()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.send(b"250 Ok\r\n250 Ok\r\n354 go on\r\n")
            loop.call_soon(connection.close)  # reset after these have been read, and before they are answered
            assert words(await first) == ["deferred upstream final in_doubt"]
            for message in (second, third):
                (await greeted()).close()
                await asyncio.wait_for(message, 5)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
async def test_who_waits_may_be_cut_off_at_any_moment(rounds: int) -> None:
    async with station() as (played, pool):
        first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
        reader, writer = await played.connections.get()
        await taken(reader, writer)
        writer.write(b"250 first\r\n")
        await first
        for _ in range(rounds):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])

        async def play() -> None:
            """Whatever connection the third one takes, and whatever the second one has left on it."""
            nonlocal reader, writer
            while True:
                with suppress(asyncio.IncompleteReadError, ConnectionError):
                    while line := await reader.readline():
                        if line[:4] == b"DATA":
                            writer.write(b"354 go on\r\n")
                            await reader.readuntil(b".\r\n")
                        if line[:4] != b"QUIT":
                            writer.write(b"250 Ok\r\n")
                reader, writer = await played.connections.get()

        playing = asyncio.ensure_future(play())
        assert all_sent(await asyncio.wait_for(third, 5))
        playing.cancel()
        await asyncio.wait([playing])


async def test_no_more_connections_than_allowed_however_much_there_is_to_send() -> None:
    async with ScriptedUpstream() as server:
        upstream = settings(server, limits={"connections": 2, "messages_per_connection": 7})
        async with pool_to(acme=upstream) as pool:
            results = await asyncio.gather(*(pool.send("acme", outgoing(A, octets=b"%d\r\n" % number)) for number in range(40)))
            assert all(map(all_sent, results))
            assert sorted(int(transaction.content) for transaction in server.accepted) == list(range(40))
            assert len(server.connections) <= 7
            assert "acme" in pool.riding
            assert server.most_at_once == 2


async def test_where_one_flight_is_enough_nobody_rides() -> None:
    async with ScriptedUpstream(offers=("CHUNKING",)) as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing(A)))
        assert "acme" not in pool.riding
