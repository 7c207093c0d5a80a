"""More messages than connections where small mail is not one flight: the next one's commands go out behind the content before it."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from relay.clock import ManualClock
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome
from relay.upstream import pool as pool_module
from relay.upstream.pool import IDLE_SECONDS, Pool
from relay.upstream.rides import Busy
from tests.support.eventually import eventually
from tests.support.upstream import Close, Hold, ScriptedUpstream
from tests.system.upstreams import PATIENT, all_sent, outgoing, pool_to, raw_server, settings, words

pytestmark = pytest.mark.both_loops

A = "a@example.org"
OFFERS = b"250-rides.test\r\n250 PIPELINING\r\n"
FLIGHT = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<a@example.org>\r\nDATA\r\n"


def limited(upstream: Upstream, **limits: int) -> Upstream:
    return upstream.model_copy(update={"limits": upstream.limits.model_copy(update={"connections": 1, **limits})})


class Station:
    """The other side of one connection at a time, which the test plays."""

    def __init__(self, offers: bytes = OFFERS) -> None:
        self.offers = offers
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        writer.write(b"220 rides.test\r\n")
        await reader.readline()
        writer.write(self.offers)
        await self.connections.put((reader, writer))
        await writer.wait_closed()


@asynccontextmanager
async def station(*, offers: bytes = OFFERS, **limits: int) -> AsyncIterator[tuple[Station, Pool]]:
    played = Station(offers)
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
                await asyncio.wait_for(message, 30)


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
        assert all_sent(await asyncio.wait_for(third, 30))
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


USER = {"username": "acme", "password": "secret-of-acme"}


async def test_a_throttled_login_leaves_alone_who_can_go_by_the_connections_that_are_there() -> None:
    async with (
        ScriptedUpstream(users={"acme": "secret-of-acme"}) as server,
        pool_to(acme=settings(server, limits={"connections": 2}, **USER)) as pool,
    ):
        hold = asyncio.Event()
        server.script("final", Hold(hold), times=1)
        server.script("auth", b"454 4.7.0 Too many logins, try again later", connection=2)
        first = sending(pool, b"one\r\n")
        await eventually(lambda: bool(server.transactions) and server.transactions[0].complete)
        second, third, fourth = (sending(pool, octets) for octets in (b"two\r\n", b"three\r\n", b"four\r\n"))
        assert words(await second) == ["deferred upstream auth throttled"]
        assert not third.done() and not fourth.done()
        hold.set()
        assert all(map(all_sent, await asyncio.gather(first, third, fourth)))
        assert [transaction.connection for transaction in server.accepted] == [1, 1, 1]


async def test_where_no_connection_is_left_a_throttled_login_is_the_answer_for_all_who_wait() -> None:
    async with (
        ScriptedUpstream(users={"acme": "secret-of-acme"}) as server,
        pool_to(acme=settings(server, limits={"connections": 2}, **USER)) as pool,
    ):
        assert all_sent(await sending(pool, b"one\r\n"))  # the login is proven: none waits for another's
        server.script("final", Close(), times=1)
        server.script("auth", b"454 4.7.0 Too many logins, try again later")
        outcomes = await asyncio.wait_for(asyncio.gather(*(sending(pool, b"x\r\n") for _ in range(6))), 30)
        assert sorted(words([outcome for (outcome,) in outcomes])) == [
            *["deferred upstream auth throttled"] * 5,
            "deferred upstream final in_doubt",
        ]
        assert len(server.logins) < 5
        server.heal()
        assert all_sent(await sending(pool, b"two\r\n"))


async def test_a_session_that_is_let_go_counts_until_its_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_SWEEP_SECONDS", 0.005)
    clock = ManualClock()
    async with ScriptedUpstream() as server:
        pool = Pool({"acme": settings(server, limits={"connections": 1})}, hostname="relay.example.net", clock=clock)
        bye = asyncio.Event()
        server.script("quit", Hold(bye), times=1)
        assert all_sent(await sending(pool, b"one\r\n"))
        clock.advance(IDLE_SECONDS)
        await eventually(lambda: server.connections[0].verbs[-1] == "QUIT", "the session to be let go")
        second = sending(pool, b"two\r\n")
        await eventually(lambda: bool(pool._rides["acme"]._waiting), "the message to wait")
        assert len(server.connections) == 1
        bye.set()
        assert all_sent(await second)
        assert (len(server.connections), server.most_at_once) == (2, 1)
        await pool.close()


# -- probes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [0, 1, 2, 3])
async def test_a_probe_counts_as_a_connection_and_takes_the_place_of_an_idle_one(idle: int) -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits={"connections": 3})) as pool:
        if idle:
            hold = asyncio.Event()
            server.script("final", Hold(hold), times=idle)
            messages = [sending(pool, b"x\r\n") for _ in range(idle)]
            await eventually(lambda: sum(each.complete for each in server.transactions) == idle)
            hold.set()
            assert all(map(all_sent, await asyncio.gather(*messages)))
        assert await pool.probe("acme") is None
        assert len(server.connections) == idle + 1
        assert server.most_at_once == min(idle + 1, 3)
        await eventually(lambda: server.open_connections == min(idle, 2), "the probe to have gone")


async def test_a_probe_waits_for_a_connection_and_nobody_rides_meanwhile() -> None:
    async with station() as (played, pool):
        first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
        reader, writer = await played.connections.get()
        probe = asyncio.ensure_future(pool.probe("acme"))
        await eventually(lambda: "acme" in pool._rides and len(pool._rides["acme"]._apart) == 1)
        await taken(reader, writer)
        writer.write(b"250 first\r\n")
        assert all_sent(await first)
        assert await reader.readline() == b"QUIT\r\n"
        assert played.connections.empty()
        writer.close()
        reader, writer = await played.connections.get()
        assert await reader.readline() == b"QUIT\r\n"
        assert played.connections.empty()
        writer.close()
        assert await probe is None
        reader, writer = await played.connections.get()
        assert await taken(reader, writer) == b"two\r\n"
        writer.write(b"250 second\r\n")
        assert all_sent(await second)


async def test_a_probe_does_not_wait_for_ever_and_leaves_no_trace() -> None:
    played = Station()
    async with raw_server(played.serve) as upstream:
        short = upstream.model_copy(update={"timeouts": upstream.timeouts.model_copy(update={"connect": 0.05})})
        async with pool_to(acme=limited(short)) as pool:
            first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
            reader, writer = await played.connections.get()
            with pytest.raises(Busy):
                await pool.probe("acme")
            await taken(reader, writer)
            assert await reader.readexactly(len(FLIGHT)) == FLIGHT  # they ride again
            writer.write(b"250 first\r\n")
            await taken(reader, writer, flown=True)
            writer.write(b"250 second\r\n")
            assert all(map(all_sent, await asyncio.gather(first, second)))
            writer.close()


async def test_a_probe_that_waits_shares_a_refused_login() -> None:
    async with (
        ScriptedUpstream(users={"acme": "secret-of-acme"}) as server,
        pool_to(acme=settings(server, limits={"connections": 1}, **USER)) as pool,
    ):
        hold = asyncio.Event()
        server.script("greeting", Hold(hold))
        server.script("auth", b"535 5.7.8 no")
        first, probe = sending(pool, b"one\r\n"), asyncio.ensure_future(pool.probe("acme"))
        await eventually(lambda: "acme" in pool._rides and len(pool._rides["acme"]._apart) == 1)
        hold.set()
        assert words(await first) == ["deferred credential auth fallback"]
        outcome = await probe
        assert outcome is not None and words([outcome]) == ["deferred credential auth fallback"]
        assert len(server.logins) == 1


async def test_a_probe_that_waits_is_told_of_a_throttled_login_that_leaves_nobody_to_wait_for() -> None:
    async with (
        ScriptedUpstream(users={"acme": "secret-of-acme"}) as server,
        pool_to(acme=settings(server, limits={"connections": 1}, **USER)) as pool,
    ):
        hold = asyncio.Event()
        server.script("greeting", Hold(hold))
        server.script("auth", b"454 4.7.0 Too many logins, try again later")
        first, probe = sending(pool, b"one\r\n"), asyncio.ensure_future(pool.probe("acme"))
        await eventually(lambda: "acme" in pool._rides and len(pool._rides["acme"]._apart) == 1)
        hold.set()
        assert words(await first) == ["deferred upstream auth throttled"]
        await asyncio.sleep(0)
        assert probe.done()
        outcome = await probe
        assert outcome is not None and words([outcome]) == ["deferred upstream auth throttled"]
        assert len(server.logins) == 1


async def test_a_probe_counts_until_its_connection_is_closed_though_it_is_cut_off() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits={"connections": 1})) as pool:
        bye = asyncio.Event()
        server.script("quit", Hold(bye), times=1)
        probe = asyncio.ensure_future(pool.probe("acme"))
        await eventually(lambda: bool(server.connections) and server.connections[0].verbs[-1:] == ["QUIT"])
        probe.cancel()
        await asyncio.wait([probe])
        message = sending(pool, b"one\r\n")
        await asyncio.sleep(0)
        assert pool._rides["acme"]._waiting
        bye.set()
        assert all_sent(await message)
        assert server.most_at_once == 1


async def test_a_probe_waits_until_the_connection_whose_place_it_takes_is_closed() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits={"connections": 1})) as pool:
        assert all_sent(await sending(pool, b"one\r\n"))
        bye = asyncio.Event()
        server.script("quit", Hold(bye), times=1)
        probe = asyncio.ensure_future(pool.probe("acme"))
        await eventually(lambda: server.connections[0].verbs[-1] == "QUIT")
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(server.connections) == 1
        bye.set()
        assert await probe is None
        assert (len(server.connections), server.most_at_once) == (2, 1)
