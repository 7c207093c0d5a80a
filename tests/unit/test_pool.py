"""The pool: who shares a session with whom, which one is used again, and what happens to one that has gone stale."""

import asyncio
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.mail.outcome import Status
from relay.upstream import pool as pool_module
from relay.upstream import wire as wire_module
from relay.upstream.pool import IDLE_SECONDS, Pool
from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import Close, Hang, Hold, Reset, ScriptedUpstream
from tests.system.upstreams import all_sent, outgoing, pool_to, raw_server, secured, settings, words

pytestmark = pytest.mark.both_loops


async def test_upstreams_at_the_same_host_never_share_a_session() -> None:
    async with ScriptedUpstream(users={"acme": "a", "globex": "g"}) as server:
        acme = settings(server, username="acme", password="a")
        globex = settings(server, username="globex", password="g")
        async with pool_to(acme=acme, globex=globex, acme_again=acme) as pool:
            for name in ("acme", "globex", "acme_again", "acme", "globex"):
                assert all_sent(await pool.send(name, outgoing(f"{name}@example.org")))
        assert {t.recipients[0].partition("@")[0]: t.user for t in server.accepted} == {
            "acme": "acme",
            "globex": "globex",
            "acme_again": "acme",
        }
        assert len(server.connections) == 3
        assert all(len({t.recipients[0] for t in server.accepted if t.connection == c.number}) == 1 for c in server.connections)


async def test_messages_at_the_same_time_have_a_session_each_and_leave_them_for_the_next() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        hold = asyncio.Event()
        server.script("final", Hold(hold), times=3)
        sending = [asyncio.ensure_future(pool.send("acme", outgoing())) for _ in range(3)]
        await eventually(lambda: sum(t.complete for t in server.transactions) == 3, "three transactions under way")
        hold.set()
        assert all(all_sent(outcomes) for outcomes in await asyncio.gather(*sending))
        for _ in range(3):
            assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.connections) == 3


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_a_session_carries_no_more_messages_than_it_may(limit: int) -> None:
    async with ScriptedUpstream() as server:
        async with pool_to(acme=settings(server, limits={"messages_per_connection": limit})) as pool:
            for _ in range(6):
                assert all_sent(await pool.send("acme", outgoing()))
            assert [t.connection for t in server.accepted] == [number // limit + 1 for number in range(6)]
        await eventually(lambda: server.open_connections == 0, "every session to end")
        assert all(connection.verbs[-1] == "QUIT" for connection in server.connections)


async def test_idle_sessions_are_closed_with_quit_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_SWEEP_SECONDS", 0.005)
    clock = ManualClock()
    async with ScriptedUpstream() as server:
        pool = Pool({"acme": settings(server)}, hostname="relay.example.net", clock=clock)
        hold = asyncio.Event()
        server.script("final", Hold(hold), times=2)
        sending = [asyncio.ensure_future(pool.send("acme", outgoing())) for _ in range(2)]
        await eventually(lambda: sum(t.complete for t in server.transactions) == 2, "two transactions under way")
        hold.set()
        await asyncio.gather(*sending)
        clock.advance(IDLE_SECONDS - 1)
        assert all_sent(await pool.send("acme", outgoing()))  # keeps one of the two fresh
        fresh = server.accepted[-1].connection
        clock.advance(1)
        await eventually(lambda: server.open_connections == 1, "the older session to be closed")
        assert [c.number for c in server.connections if not c.closed] == [fresh]
        clock.advance(IDLE_SECONDS)
        await eventually(lambda: server.open_connections == 0, "the other session to be closed")
        assert [c.verbs[-1] for c in server.connections] == ["QUIT", "QUIT"]
        assert all_sent(await pool.send("acme", outgoing()))
        await pool.close()


@pytest.mark.parametrize("when", ["while idle", "at MAIL", "with 421 at MAIL", "with RST at MAIL"])
@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_session_that_has_gone_stale_costs_nothing_but_a_new_one(pipelining: bool, when: str) -> None:
    async with ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        if when == "while idle":
            await server.stop()
            await server.start()
        else:
            action: Any = {"at MAIL": Close(), "with 421 at MAIL": b"421 4.4.2 idle for too long", "with RST at MAIL": Reset()}[when]
            server.script("mail", action, times=1)
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.accepted) == 2
        assert len(server.connections) == 2


async def test_an_upstream_that_says_421_and_leaves_while_the_session_is_idle_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 short.test\r\n")
        for answer in (b"250 short.test\r\n", b"250 Ok\r\n", b"250 Ok\r\n", b"354 Go on\r\n"):
            await reader.readline()
            writer.write(answer)
        while await reader.readline() != b".\r\n":
            pass
        writer.write(b"250 Ok\r\n")
        await idle.wait()
        writer.write(b"421 4.4.2 Idle for too long\r\n")
        rest = await reader.read()
        assert b"MAIL" not in rest

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        for _ in range(3):
            idle.clear()
            assert all_sent(await pool.send("acme", outgoing()))
            session = pool._idle["acme"][0].session
            idle.set()
            await eventually(lambda session=session: not session.usable, "the session to notice")


async def test_a_stale_session_is_replaced_once_and_then_the_failure_counts() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        server.script("mail", Close())
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream mail fallback"]
        assert len(server.connections) == 2
        assert len(server.transactions) == 3


async def test_a_new_session_that_breaks_at_mail_is_not_opened_again() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        server.script("mail", Close())
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream mail fallback"]
        assert len(server.connections) == 1


@pytest.mark.parametrize("reply", [b"421 4.7.0 Slow down", b"454 4.7.0 Slow down", b"451 4.3.0 later"])
async def test_a_request_to_slow_down_on_a_used_session_is_no_reason_to_connect_again(reply: bytes) -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        server.script("mail", reply)
        (outcome,) = await pool.send("acme", outgoing())
        assert str(outcome.reply) == reply.decode()
        assert len(server.connections) == 1


async def test_nothing_is_retried_once_mail_was_answered() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        server.script("rcpt", Close(), times=1)
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream rcpt fallback"]
        assert all_sent(await pool.send("acme", outgoing()))
        server.script("final", Close(), times=1)
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream final in_doubt"]
        assert len(server.connections) == 2
        assert len(server.transactions) == 4


# -- RSET ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_refused_transaction_is_reset_before_the_next(pipelining: bool) -> None:
    async with ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server, pool_to(acme=settings(server)) as pool:
        server.script("rcpt", b"550 5.1.1 nobody", times=1)
        assert words(await pool.send("acme", outgoing())) == ["failed recipient rcpt"]
        assert all_sent(await pool.send("acme", outgoing()))
        assert all_sent(await pool.send("acme", outgoing()))
        verbs = server.connections[0].verbs
        assert verbs.count("RSET") == 1
        assert verbs.index("RSET") == (4 if pipelining else 3)


@pytest.mark.parametrize("action", [b"500 5.5.2 what?", b"451 4.3.0 no", b"421 4.4.2 bye", Close(), Reset()], ids=str)
@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_session_that_cannot_be_reset_is_stale(pipelining: bool, action: Any) -> None:
    async with ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server, pool_to(acme=settings(server)) as pool:
        server.script("rcpt", b"550 5.1.1 nobody", times=1)
        assert words(await pool.send("acme", outgoing())) == ["failed recipient rcpt"]
        server.script("rset", action)
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.connections) == 2
        assert len(server.accepted) == 1


@pytest.mark.parametrize("pipelining", [True, False])
async def test_an_end_between_rset_and_mail_is_stale_too(pipelining: bool) -> None:
    async with ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server, pool_to(acme=settings(server)) as pool:
        for action in (b"421 4.4.2 bye", Close()):
            server.script("rcpt", b"550 5.1.1 nobody", times=1)
            assert words(await pool.send("acme", outgoing())) == ["failed recipient rcpt"]
            server.script("mail", action, times=1)
            assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.accepted) == 2


# -- the end ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["none", "tls"])
async def test_closing_says_quit_everywhere_and_waits_for_the_answers(tls: Authority, security: Any) -> None:
    async with ScriptedUpstream(security=security, tls=tls.server if security == "tls" else None) as server:
        upstream = settings(server) if security == "none" else secured(server, tls, "tls")
        pool = Pool({"a": upstream, "b": upstream}, hostname="relay.example.net", clock=ManualClock())
        assert all_sent(await pool.send("a", outgoing()))
        assert all_sent(await pool.send("b", outgoing()))
        await pool.close()
        await eventually(lambda: server.open_connections == 0, "both sessions to end")
        assert [connection.verbs[-1] for connection in server.connections] == ["QUIT", "QUIT"]


async def test_closing_does_not_wait_for_an_upstream_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_LEAVE_SECONDS", 0.05)
    async with ScriptedUpstream() as server:
        server.script("quit", Hang())
        pool = Pool({"acme": settings(server)}, hostname="relay.example.net", clock=ManualClock())
        assert all_sent(await pool.send("acme", outgoing()))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await pool.close()
        assert loop.time() - begun < 1


async def test_an_upstream_that_does_not_answer_quit_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    from relay.upstream import session as session_module

    monkeypatch.setattr(session_module, "_QUIT_SECONDS", 0.01)
    async with ScriptedUpstream() as server, pool_to(acme=settings(server, limits={"messages_per_connection": 1})) as pool:
        server.script("quit", Hang())
        assert all_sent(await pool.send("acme", outgoing()))
        (session,) = pool._leaving
        await session.ended
        assert not pool._leaving


async def test_a_message_that_ends_after_the_pool_was_closed_leaves_no_session() -> None:
    async with ScriptedUpstream() as server:
        pool = Pool({"acme": settings(server)}, hostname="relay.example.net", clock=ManualClock())
        hold = asyncio.Event()
        server.script("final", Hold(hold))
        sending = asyncio.ensure_future(pool.send("acme", outgoing()))
        await eventually(lambda: any(t.complete for t in server.transactions), "the transaction to be under way")
        await pool.close()
        hold.set()
        assert (await sending)[0].status is Status.SENT
        await eventually(lambda: server.open_connections == 0, "the session to end")
        await pool.close()


async def test_an_unreasonable_flood_on_an_idle_session_is_not_collected() -> None:
    flooded = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 chatty.test\r\n")
        for answer in (b"250 chatty.test\r\n", b"550 5.1.8 no\r\n"):
            await reader.readline()
            writer.write(answer)
        try:
            while True:
                writer.write(b"250 and another thing\r\n" * 1000)
                await writer.drain()
        finally:
            flooded.set()

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        assert words(await pool.send("acme", outgoing())) == ["failed message mail"]
        await asyncio.wait_for(flooded.wait(), 5)
        assert wire_module._REPLY_LIMIT_BYTES < 1_000_000
