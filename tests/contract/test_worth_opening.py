"""How many connections are opened for mail that comes in a burst: as many as it is worth, and not one for each message."""

import asyncio

import pytest

from relay.mail.outcome import Outcome
from relay.upstream import rides as rides_module
from relay.upstream.pool import Pool
from tests.support.eventually import eventually
from tests.support.upstream import Hold, ScriptedUpstream
from tests.system.upstreams import all_sent, outgoing, pool_to, settings, words

pytestmark = pytest.mark.both_loops

LIMIT = {"connections": 20}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no reason to open more."""
    monkeypatch.setattr(rides_module, "_SLOW_SECONDS", 60.0)


def burst(pool: Pool, count: int) -> "list[asyncio.Task[list[Outcome]]]":
    return [asyncio.ensure_future(pool.send("acme", outgoing(octets=b"%d\r\n" % number))) for number in range(count)]


@pytest.mark.parametrize(
    ("waiting", "backlog", "connections"), [(1, 0, 1), (9, 0, 1), (17, 0, 2), (60, 0, 6), (1, 1000, 1), (5, 1000, 5), (60, 1000, 20)]
)
async def test_connections_are_opened_as_mail_waits(waiting: int, backlog: int, connections: int) -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        pool.backlog = lambda name: backlog
        hold = asyncio.Event()
        server.script("greeting", Hold(hold))
        messages = burst(pool, waiting)
        await server.connected(connections)
        await asyncio.sleep(0.02)
        assert len(server.connections) == connections
        hold.set()
        assert all(map(all_sent, await asyncio.gather(*messages)))
        assert len(server.accepted) == waiting


async def test_where_few_wait_one_connection_after_the_other_is_opened() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        hold = asyncio.Event()
        server.script("final", Hold(hold))
        messages = burst(pool, 5)
        await eventually(lambda: sum(each.complete for each in server.transactions) == 5, "all to be under way at once")
        assert len(server.connections) == 5
        hold.set()
        assert all(map(all_sent, await asyncio.gather(*messages)))


async def test_who_waits_for_a_connection_takes_one_that_becomes_idle() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        hold = asyncio.Event()
        server.script("greeting", Hold(hold), connection=2)
        messages = burst(pool, 9)
        await eventually(lambda: sum(message.done() for message in messages) == 8)
        assert {transaction.connection for transaction in server.accepted} == {1}
        hold.set()
        assert all(map(all_sent, await asyncio.gather(*messages)))


async def test_where_one_cannot_be_opened_each_tries_for_himself_until_one_can() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        server.script("greeting", b"554 5.3.2 not now", times=7)
        messages = burst(pool, 10)
        outcomes = await asyncio.gather(*messages)
        assert (
            sorted(words([outcome for (outcome,) in outcomes])) == ["deferred upstream greeting fallback"] * 7 + ["sent message final"] * 3
        )
        hold = asyncio.Event()
        await pool.close()  # the idle ones
        server.script("greeting", Hold(hold))
        messages = burst(pool, 10)
        await asyncio.sleep(0.02)
        known = len(server.connections)
        hold.set()
        assert all(map(all_sent, await asyncio.gather(*messages)))
        assert known == 10 + 1, "all had tried; now one does"


async def test_who_is_cut_off_while_he_opens_one_leaves_it_to_others() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        hold = asyncio.Event()
        server.script("greeting", Hold(hold), connection=1)
        first, second, third = burst(pool, 3)
        await server.connected(1)
        while not first.done():  # Python 3.11's `wait_for` may swallow it
            first.cancel()
            await asyncio.sleep(0)
        assert all_sent(await second) and all_sent(await third)
        assert (pool._rides["acme"]._opening, pool._rides["acme"]._used) == (0, 0)
        hold.set()


async def test_who_is_cut_off_as_it_is_his_turn_leaves_it_to_others() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        hold = asyncio.Event()
        server.script("greeting", Hold(hold), connection=1)
        first, second, third, fourth = burst(pool, 4)
        await server.connected(1)
        rides = pool._rides["acme"]
        rides.opened()  # as if it were: it is the second one's turn
        rides.open()
        second.cancel()
        await asyncio.wait([second])
        assert rides._opening == 2, "the first one's, and what is the third one's now"
        hold.set()
        assert all(map(all_sent, await asyncio.gather(first, third, fourth)))
        assert (rides._opening, rides._used) == (0, 0)


async def test_where_one_takes_long_to_open_each_tries_for_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rides_module, "_SLOW_SECONDS", 0.02)
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits=LIMIT)) as pool:
        hold = asyncio.Event()
        server.script("greeting", Hold(hold))
        messages = burst(pool, 7)
        await server.connected(7)
        hold.set()
        assert all(map(all_sent, await asyncio.gather(*messages)))
        assert pool._rides["acme"]._slow is None
