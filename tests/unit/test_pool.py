"""The pool: who shares a session with whom, which one is used again, and what happens to one that has gone stale."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.providers import PROVIDERS, Provider
from relay.config.upstreams import Upstream
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


@pytest.mark.parametrize(
    ("keys", "provider_seconds", "seconds"),
    [({}, 9.0, 20.0), ({"provider": "generic"}, 9.0, 6.0), ({"provider": "generic"}, 30.0, 20.0), ({"provider": "generic"}, 600.0, 60.0)],
)
async def test_idle_sessions_are_closed_before_the_provider_does(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], provider_seconds: float, seconds: float
) -> None:
    monkeypatch.setattr(pool_module, "_SWEEP_SECONDS", 0.005)
    monkeypatch.setitem(PROVIDERS, "generic", Provider({}, idle_seconds=provider_seconds))
    clock = ManualClock()
    async with ScriptedUpstream() as server:
        pool = Pool({"acme": settings(server, **keys)}, hostname="relay.example.net", clock=clock)
        for number in range(3):
            assert all_sent(await pool.send("acme", outgoing()))
            assert len(server.connections) == 1, "it was used again"
            clock.advance(seconds - 0.1 if number < 2 else seconds)
        await eventually(lambda: server.open_connections == 0, "the session to be closed")
        assert server.connections[0].verbs[-1] == "QUIT"
        await pool.close()


@pytest.mark.parametrize("farewell", [b"", b"421 4.4.2 mx.acme.example Error: timeout exceeded\r\n"])
async def test_an_upstream_that_closes_idle_sessions_early_teaches_to_be_earlier(monkeypatch: pytest.MonkeyPatch, farewell: bytes) -> None:
    monkeypatch.setattr(pool_module, "_SWEEP_SECONDS", 0.005)
    clock, closing = ManualClock(), asyncio.Event()
    ends: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 short.test\r\n")
        for answer in (b"250 short.test\r\n", b"250 Ok\r\n", b"250 Ok\r\n", b"354 Go on\r\n"):
            await reader.readline()
            writer.write(answer)
        while await reader.readline() != b".\r\n":
            pass
        writer.write(b"250 Ok\r\n")
        asking, idle = asyncio.ensure_future(reader.readline()), asyncio.ensure_future(closing.wait())
        await asyncio.wait([asking, idle], return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        writer.write(farewell if not asking.done() else b"221 Bye\r\n")
        writer.close()
        ends.append(await asking)

    async with raw_server(serve) as upstream:
        pool = Pool({"acme": upstream}, hostname="relay.example.net", clock=clock)
        for idle_seconds, end, over in ((0.5, b"", True), (9.0, b"", True), (6.0, b"QUIT\r\n", False)):
            closing.clear()
            assert all_sent(await pool.send("acme", outgoing()))
            clock.advance(idle_seconds)
            if over:
                closing.set()
            await eventually(lambda: not pool._idle.get("acme"), "the session to be gone")
            await eventually(lambda: len(ends) and not pool._leaving, "its connection to be closed")
            assert ends.pop() == end
        assert pool._patience_seconds("acme") == 6.0
        clock.advance(3600.0)
        assert pool._patience_seconds("acme") == IDLE_SECONDS, "it may have been a restart"
        await pool.close()


@pytest.mark.parametrize(
    ("limits", "messages", "recipients"),
    [
        ("LIMITS MAILMAX=2 RCPTMAX=7", 2, 7),
        ("LIMITS rcptmax=20 RCPTDOMAINMAX=5", 3, 20),
        ("LIMITS MAILMAX=9", 3, 0),
        ("LIMITS MAILMAX=0 RCPTMAX=many FUTURE", 3, 0),
        ("LIMITS", 3, 0),
    ],
)
async def test_what_an_upstream_says_of_its_limits_is_kept(limits: str, messages: int, recipients: int) -> None:
    """RFC 9422."""
    async with ScriptedUpstream(offers=(limits,)) as server:
        async with pool_to(acme=settings(server, limits={"messages_per_connection": 3})) as pool:
            assert pool.recipients_limit("acme") == 0
            for _ in range(6):
                assert all_sent(await pool.send("acme", outgoing()))
            assert pool.recipients_limit("acme") == recipients
        assert [t.connection for t in server.accepted] == [number // messages + 1 for number in range(6)]


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
            session = pool._idle["acme"][0]
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


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        (b"421 4.7.0 Slow down", "deferred upstream rcpt throttled"),
        (b"421 4.3.2 Shutting down", "deferred upstream rcpt fallback"),
        (b"421 4.7.0 Error: too many errors", "deferred message rcpt"),
    ],
)
async def test_what_421_says_to_one_recipient_holds_for_all_whom_the_end_of_the_session_concerns(
    pipelining: bool, reply: bytes, meant: str
) -> None:
    """Else it would be a broken connection for the others, and throttling in the end a reason for the fallback."""
    async with ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server, pool_to(acme=settings(server)) as pool:
        server.script("rcpt", b"550 5.1.1 nobody", recipient="b@example.org")
        server.script("rcpt", reply, recipient="c@example.org")
        outcomes = await pool.send("acme", outgoing(*(f"{name}@example.org" for name in "abcd")))
        assert words(outcomes) == [meant, "failed recipient rcpt", meant, meant]


async def test_what_421_says_to_one_recipient_is_not_the_fate_of_a_message_that_was_handed_over() -> None:
    """Else who may have it would go to the fallback, where that is sure to be a second copy."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 odd.test\r\n")
        replies = {b"EHLO": b"250-odd.test\r\n250 PIPELINING", b"DATA": b"354 all the same"}
        while line := await reader.readline():
            told = b"421 4.3.2 Shutting down" if b"<b@" in line else replies.get(line[:4], b"250 Ok")
            writer.write(told + b"\r\n")
            if line == b"DATA\r\n":
                await reader.readuntil(b"\r\n.\r\n")
                return

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        doubt = "deferred upstream final in_doubt"
        outcomes = await pool.send("acme", outgoing(*(f"{name}@example.org" for name in "abc")))
        assert words(outcomes) == [doubt, "deferred upstream rcpt fallback", doubt]


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


@pytest.mark.parametrize("reply", [b"421 mx.acme.example closing", b"421-4.4.2 idle\r\n421 4.4.2 for too long", b"421 4.3.2 Shutting down"])
@pytest.mark.parametrize("offers", [(), ("CHUNKING",)])
async def test_421_in_any_form_at_a_session_that_was_used_is_no_failure(offers: tuple[str, ...], reply: bytes) -> None:
    async with ScriptedUpstream(offers=offers) as server, pool_to(acme=settings(server)) as pool:
        for number in range(3):
            assert all_sent(await pool.send("acme", outgoing()))
            server.script("mail", reply, connection=number + 1)
        assert [t.connection for t in server.accepted] == [1, 2, 3]


async def test_after_one_stale_session_the_others_are_not_tried_as_well() -> None:
    async with ScriptedUpstream() as server, pool_to(acme=settings(server)) as pool:
        hold = asyncio.Event()
        server.script("final", Hold(hold), times=3)
        sending = [asyncio.ensure_future(pool.send("acme", outgoing())) for _ in range(3)]
        await eventually(lambda: sum(t.complete for t in server.transactions) == 3, "three transactions under way")
        hold.set()
        await asyncio.gather(*sending)
        for number in (1, 2, 3):
            server.script("mail", b"421 4.4.2 idle for too long", connection=number)
        for _ in range(3):
            assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.accepted) == 6
        assert sum(c.verbs.count("MAIL") for c in server.connections) == 7, "one of the stale ones was asked, and then a new one"


# -- hosts -----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_hosts(first: ScriptedUpstream, second: ScriptedUpstream) -> AsyncIterator[Upstream]:
    """An upstream with two hosts: names for two servers that share a port, on two addresses."""
    first.host, second.host = "127.0.0.1", "127.0.0.2"
    async with first:
        second.port = first.port
        async with second:
            yield settings(first, host=["127.0.0.1", "127.0.0.2"], limits={"messages_per_connection": 1})


@pytest.mark.parametrize(
    ("phase", "action"),
    [
        ("down", None),
        ("connect", Close()),
        ("greeting", b"421 4.3.2 down for maintenance"),
        ("greeting", b"554 5.3.2 not here"),
        ("ehlo", b"451 4.3.0 later"),
        ("starttls", b"454 4.3.0 TLS not available"),
        ("tls", Close()),
        ("tls", "untrusted"),
    ],
    ids=str,
)
async def test_the_next_host_takes_the_mail_and_the_one_that_failed_is_left_alone(tls: Authority, phase: Any, action: Any) -> None:
    clock, notes = ManualClock(time.time()), list[str]()
    stranger = tls.stranger().server
    first = ScriptedUpstream(security="starttls", tls=stranger if action == "untrusted" else tls.server)
    second = ScriptedUpstream(security="starttls", tls=tls.context("127.0.0.2"))
    async with two_hosts(first, second) as upstream:
        upstream = upstream.model_copy(update={"security": "starttls", "ca_file": tls.ca_file})
        pool = Pool({"acme": upstream}, hostname="relay.example.net", clock=clock, note=lambda _, what: notes.append(what))
        if phase == "down":
            await first.stop()
        elif action != "untrusted":
            first.script(phase, action)
        for _ in range(3):
            assert all_sent(await pool.send("acme", outgoing()))
        assert (len(second.accepted), len(first.accepted)) == (3, 0)
        assert len(first.connections) == (0 if phase == "down" else 1), "it was asked once"
        (note,) = (note for note in notes if "fails" in note)
        assert "127.0.0.1" in note
        if action == "untrusted":
            first._offer = replace(first._offer, tls=tls.server)
        first.heal()
        if phase == "down":
            await first.start()
        clock.advance(300)
        for _ in range(2):
            assert all_sent(await pool.send("acme", outgoing()))
        assert len(first.accepted) == 2
        assert notes[-1] == "upstream acme: 127.0.0.1 works again"
        await pool.close()


async def test_a_host_that_is_asked_last_is_asked_when_the_others_fail() -> None:
    first, second = ScriptedUpstream(), ScriptedUpstream()
    async with two_hosts(first, second) as upstream, pool_to(acme=upstream) as pool:
        first.script("greeting", b"421 4.3.2 down", times=1)
        assert all_sent(await pool.send("acme", outgoing()))
        second.script("greeting", b"421 4.3.2 down")
        assert all_sent(await pool.send("acme", outgoing()))
        assert [len(first.accepted), len(second.accepted)] == [1, 1]


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


@pytest.mark.parametrize("offers", [(), ("CHUNKING",)])
@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_request_to_slow_down_at_rset_is_no_reason_to_connect_again(pipelining: bool, offers: tuple[str, ...]) -> None:
    async with (
        ScriptedUpstream(without=() if pipelining else ("PIPELINING",), offers=offers) as server,
        pool_to(acme=settings(server)) as pool,
    ):
        server.script("rcpt", b"550 5.1.1 nobody", times=1)
        assert words(await pool.send("acme", outgoing())) == ["failed recipient rcpt"]
        server.script("rset", b"421 4.7.0 Slow down")
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream mail throttled"]
        assert len(server.connections) == 1
        server.heal()
        assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.accepted) == 1


@pytest.mark.parametrize("reads_on", [True, False])
async def test_a_flight_is_in_doubt_where_what_slowed_us_down_at_rset_does_not_close(reads_on: bool) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.write(b"220 odd.test\r\n")
        refused = {b"RCPT": b"550 5.1.1 nobody", b"BDAT": b"503 5.5.1 for nobody"} if connections == 1 else {b"BDAT": b"451 4.3.0 later"}
        replies = {b"EHLO": b"250-odd.test\r\n250-PIPELINING\r\n250 CHUNKING", **refused}
        while line := await reader.readline():
            if line.startswith(b"BDAT"):
                await reader.readexactly(int(line.split()[1]))
            told = b"421 4.7.0 Slow down" if line == b"RSET\r\n" else replies.get(line[:4], b"250 Ok")
            writer.write(told + b"\r\n")
            if line == b"RSET\r\n":
                replies = {}  # and takes it
                if not reads_on:
                    await reader.read()

    async with raw_server(serve) as upstream:
        hasty = upstream.model_copy(update={"timeouts": upstream.timeouts.model_copy(update={"command": 0.2, "final": 0.2})})
        async with pool_to(acme=hasty) as pool:
            assert words(await pool.send("acme", outgoing())) == ["failed recipient rcpt"]
            assert words(await pool.send("acme", outgoing())) == ["deferred message final in_doubt"]
            assert connections == 2


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
    from relay.upstream import session as session_module

    monkeypatch.setattr(pool_module, "_LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(session_module, "_QUIT_SECONDS", 60.0)
    async with ScriptedUpstream() as server:
        server.script("quit", Hang())
        pool = Pool({"acme": settings(server)}, hostname="relay.example.net", clock=ManualClock())
        assert all_sent(await pool.send("acme", outgoing()))
        async with asyncio.timeout(30):
            await pool.close()


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
        await asyncio.wait_for(flooded.wait(), 30)
        assert wire_module._REPLY_LIMIT_BYTES < 1_000_000
