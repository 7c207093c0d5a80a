"""Small mail in one flight (RFC 3030): the same promises as ever, and in doubt from the moment it leaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relay.mail.envelope import Recipient
from relay.mail.outcome import Status
from tests.contract.test_transport import CONTENTS, QUICK, Way
from tests.support.certificates import Authority
from tests.support.upstream import Close, Garbage, Half, Hang, Hold, Phase, Reset, ScriptedUpstream, Security
from tests.system.upstreams import all_sent, outgoing, pool_to, raw_server, secured, settings, words

pytestmark = pytest.mark.both_loops

A, B = "a@example.org", "b@example.org"


@asynccontextmanager
async def way_to(*offers: str, tls: Authority | None = None, security: Security = "none", quick: bool = False) -> AsyncIterator[Way]:
    server = ScriptedUpstream(security=security, tls=tls.server if tls else None, offers=("CHUNKING", *offers))
    keys: dict[str, Any] = {"timeouts": QUICK} if quick else {}
    async with server, pool_to(acme=secured(server, tls, security, **keys) if tls else settings(server, **keys)) as pool:
        yield Way(server, pool)


@pytest.fixture(params=["none", "starttls", "tls"])
def security(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
async def test_what_is_sent_is_what_arrives(tls: Authority, security: Security, content: bytes) -> None:
    async with way_to(tls=tls if security != "none" else None, security=security) as way:
        for _ in range(2):
            assert words(await way.send(outgoing(A, octets=content))) == ["sent message final"]
        assert [transaction.content for transaction in way.server.accepted] == [content] * 2
        verbs = ["MAIL", "RCPT", "BDAT" if len(content) <= 65536 else "DATA"]
        assert way.server.connections[0].verbs[-6:] == verbs * 2


async def test_who_shares_a_message_is_asked_for_before_it_is_sent() -> None:
    async with way_to() as way:
        assert words(await way.send(outgoing(A, B))) == ["sent message final"] * 2
        assert way.server.connections[0].verbs[-1] == "DATA"


@pytest.mark.parametrize(
    ("script_phase", "reply", "expected"),
    [
        ("mail", b"451 4.3.0 later", "deferred message mail"),
        ("mail", b"550 5.7.1 not you", "failed upstream mail fallback"),
        ("mail", b"530 5.7.0 Authentication required", "deferred credential mail fallback"),
        ("mail", b"421 4.7.0 slow down", "deferred upstream mail throttled"),
        ("mail", b"421 4.3.2 closing", "deferred upstream mail fallback"),
        ("rcpt", b"550 5.1.1 nobody", "failed recipient rcpt"),
        ("rcpt", b"450 4.2.0 later", "deferred recipient rcpt"),
        ("rcpt", b"421 4.3.2 closing", "deferred upstream rcpt fallback"),
        ("final", b"451 4.3.0 later", "deferred message final"),
        ("final", b"554 5.6.0 no", "failed message final"),
        ("final", b"421 4.3.2 closing", "deferred upstream final fallback"),
        ("final", b"354 go on", "deferred upstream final in_doubt"),
    ],
)
async def test_a_refusal_is_the_fate_and_the_next_message_goes_on(script_phase: Phase, reply: bytes, expected: str) -> None:
    async with way_to() as way:
        way.server.script(script_phase, reply, transaction=1)
        (outcome,) = await way.send(outgoing(A))
        assert (words([outcome]), str(outcome.reply)) == ([expected], reply.decode())
        assert all_sent(await way.send(outgoing(A, octets=b"second\r\n")))
        assert [t.content for t in way.server.accepted] == [b"second\r\n"]
        assert len(way.server.connections) == (2 if reply[:1] == b"3" or b"421" in reply else 1)


@pytest.mark.parametrize("action", [Close(), Reset(), Hang(), Garbage(), Half()], ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("script_phase", ["mail", "rcpt", "final"])
async def test_without_a_reply_that_decides_it_is_in_doubt(script_phase: Phase, action: Any) -> None:
    async with way_to(quick=True) as way:
        way.server.script(script_phase, action, transaction=1)
        assert words(await way.send(outgoing(A))) == ["deferred upstream final in_doubt"]
        assert all_sent(await way.send(outgoing(A)))


@pytest.mark.parametrize("action", [Close(), Reset(), Hang()], ids=lambda action: type(action).__name__)
async def test_a_refusal_that_was_told_counts_though_the_connection_is_lost_behind_it(action: Any) -> None:
    async with way_to(quick=True) as way:
        way.server.script("rcpt", b"550 5.1.1 nobody")
        way.server.script("mail", b"250 2.1.0 Ok\r\n550 5.1.1 nobody", times=1)
        way.server.script("rcpt", action, times=1)
        assert words(await way.send(outgoing(A))) == ["failed recipient rcpt"]


async def test_the_last_reply_may_take_longer_than_the_others() -> None:
    async with way_to(quick=True) as way:
        for script_phase in ("mail", "final"):
            hold = asyncio.Event()
            way.server.script(script_phase, Hold(hold), times=1)
            asyncio.get_running_loop().call_later(0.1, hold.set)
        assert all_sent(await way.send(outgoing(A)))


@pytest.mark.parametrize("came_back", [True, False])
@pytest.mark.parametrize("read_all", [True, False])
async def test_a_kept_connection_that_ends_without_a_word_may_have_taken_the_message(came_back: bool, read_all: bool) -> None:
    """It is sent again at once to the same upstream; where that fails, too, nobody else may get it."""
    flights: list[bytes] = []
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) > 1 and not came_back:
            return
        writer.write(b"220 brief.test\r\n")
        await reader.readline()
        writer.write(b"250-brief.test\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
        flights.append(await reader.readuntil(b"hello\r\n"))
        writer.write(b"250 Ok\r\n250 Ok\r\n250 Ok\r\n")
        await (reader.readuntil(b"hello\r\n") if read_all else reader.readexactly(4))
        writer.transport.abort()

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        message = outgoing(A, octets=b"hello\r\n")
        assert all_sent(await pool.send("acme", message))
        (outcome,) = await pool.send("acme", message)
        if came_back:
            assert (outcome.status, len(flights)) == (Status.SENT, 2)
        else:
            assert words([outcome]) == ["deferred upstream greeting in_doubt"]


async def test_a_kept_connection_that_says_421_has_taken_nothing() -> None:
    async with way_to() as way:
        assert all_sent(await way.send(outgoing(A)))
        way.server.script("mail", b"421 4.4.2 idle for too long", transaction=2)
        way.server.script("mail", b"451 4.3.0 later", transaction=3)
        assert words(await way.send(outgoing(A))) == ["deferred message mail"]


async def test_all_of_it_is_one_write(tls: Authority) -> None:
    flights: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 whole.test\r\n")
        await reader.readline()
        writer.write(b"250-whole.test\r\n250-PIPELINING\r\n250-SIZE\r\n250-DSN\r\n250 CHUNKING\r\n")
        flights.append(await reader.read(100_000))
        writer.write(b"250 Ok\r\n250 Ok\r\n250 Ok\r\n")
        await reader.read()

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        message = outgoing(octets=b".\r\nhello\r\n", ret="HDRS", envid="x+2Bz")
        wishes = Recipient(A, notify="SUCCESS,DELAY", orcpt="rfc822;old+2Ba@example.org")
        (outcome,) = await pool.send("acme", message._replace(recipients=[wishes]))
        assert (outcome.status, outcome.reports) == (Status.SENT, True)
    assert flights == [
        b"MAIL FROM:<app@acme.example> SIZE=10 RET=HDRS ENVID=x+2Bz\r\n"
        b"RCPT TO:<a@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;old+2Ba@example.org\r\nBDAT 10 LAST\r\n.\r\nhello\r\n"
    ]


async def test_wishes_for_reports_go_only_where_they_are_understood() -> None:
    async with way_to() as way:
        message = outgoing(ret="FULL", envid="x")._replace(recipients=[Recipient(A, notify="SUCCESS"), Recipient(B)])
        assert [outcome.reports for outcome in await way.send(message)] == [False, False]
        assert way.server.accepted[0].parameters == (f"SIZE={message.size}",)
    async with way_to("DSN") as way:
        assert [outcome.reports for outcome in await way.send(message)] == [True, False]
        assert way.server.accepted[0].parameters[1:] == ("RET=FULL", "ENVID=x")
        assert way.server.accepted[0].recipient_parameters == {A: ("NOTIFY=SUCCESS",), B: ()}
