"""What one transaction leaves on a session, and the next one must clear away: nobody's mail goes out in another one's envelope."""

import asyncio

import pytest

from relay.mail.outcome import Status
from tests.support.upstream import ScriptedUpstream
from tests.system.upstreams import outgoing, pool_to, raw_server, settings, words

pytestmark = pytest.mark.both_loops

LIMITED = ("SIZE 1000", "CHUNKING")
REFUSED = "refused@example.org"


@pytest.mark.parametrize("offers", [LIMITED, LIMITED[:1]], ids=["bdat", "data"])
async def test_a_message_that_is_not_even_begun_leaves_the_reset_to_the_next_one(offers: tuple[str, ...]) -> None:
    async with ScriptedUpstream(offers=offers, without=("SIZE",)) as server, pool_to(acme=settings(server)) as pool:
        server.script("rcpt", b"550 5.1.1 No such user", recipient=REFUSED)
        (refused,) = await pool.send("acme", outgoing(REFUSED, sender="first@acme.example"))
        assert refused.status is Status.FAILED
        (too_large,) = await pool.send("acme", outgoing(octets=b"S: x\r\n\r\n" + b"x" * 2000 + b"\r\n", sender="second@acme.example"))
        assert "SIZE" in too_large.reply.text
        (sent,) = await pool.send("acme", outgoing(sender="third@acme.example"))
        assert sent.status is Status.SENT
        assert [transaction.sender for transaction in server.accepted] == ["third@acme.example"]
        assert len(server.connections) == 1


async def test_content_that_is_taken_in_a_refused_envelope_ends_the_session() -> None:
    """It went out in whatever envelope the upstream had in mind: nothing more is to go there."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.write(b"220 odd.test\r\n")
        await reader.readline()
        writer.write(b"250-odd.test\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
        odd = connections == 1
        while line := await reader.readline():
            if line.startswith(b"MAIL") and odd:
                writer.write(b"503 5.5.1 Sender already given\r\n")
                continue
            if line.startswith(b"BDAT"):
                await reader.readexactly(int(line.split()[1]))
            writer.write(b"250 2.0.0 Ok\r\n")

    async with raw_server(serve) as upstream, pool_to(acme=upstream) as pool:
        (first,) = await pool.send("acme", outgoing())
        assert first.status is not Status.SENT
        (second,) = await pool.send("acme", outgoing())
        assert second.status is Status.SENT
        assert connections == 2


@pytest.mark.parametrize("offers", [("CHUNKING",), ()], ids=["bdat", "data"])
async def test_a_session_that_is_out_of_step_costs_no_message(offers: tuple[str, ...]) -> None:
    async with ScriptedUpstream(offers=offers) as server, pool_to(acme=settings(server)) as pool:
        server.script("mail", b"503 5.5.1 Nested MAIL command", times=1)
        (outcome,) = await pool.send("acme", outgoing())
        assert words([outcome]) == ["deferred upstream mail fallback"]
        (again,) = await pool.send("acme", outgoing())
        assert again.status is Status.SENT
        assert len(server.connections) == 2
