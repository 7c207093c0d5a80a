"""The scripted upstream and the raw client, against each other: other tests lean on every word of theirs."""

import asyncio
import base64
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable

import pytest

from tests.support.certificates import Authority
from tests.support.client import Client, stuffed
from tests.support.eventually import PATIENCE_SECONDS, NeverHappened, eventually
from tests.support.upstream import (
    Close,
    Drip,
    Garbage,
    Half,
    Hang,
    Hold,
    Login,
    Phase,
    Reset,
    Say,
    ScriptedUpstream,
    Security,
    unused_port,
)

SENDER, RECIPIENT = "app@acme.example", "you@example.org"
CONTENT = b"Subject: hi\r\n\r\nhello\r\n"

pytestmark = pytest.mark.both_loops


def connect(upstream: ScriptedUpstream, *, chunk: int = 0, deadline: float = PATIENCE_SECONDS) -> Client:
    return Client(upstream.host, upstream.port, chunk=chunk, deadline=deadline)


# -- behaving --------------------------------------------------------------------------------------------------------------


async def test_a_transaction_is_recorded_with_everything_that_was_said() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        await client.greet("me.test")
        await client.deliver(SENDER, [RECIPIENT, "b@example.org"], CONTENT, parameters="SIZE=99 BODY=8BITMIME")
        (transaction,) = await upstream.received(1)
        assert transaction.sender == SENDER
        assert transaction.parameters == ("SIZE=99", "BODY=8BITMIME")
        assert transaction.recipients == [RECIPIENT, "b@example.org"]
        assert transaction.content == CONTENT
        assert (transaction.connection, transaction.number, transaction.helo) == (1, 1, "me.test")
        assert (transaction.tls, transaction.user, transaction.pipelined) == (False, "", False)
        await client.quit()
        assert upstream.connections[0].verbs == ["EHLO", "MAIL", "RCPT", "RCPT", "DATA", "QUIT"]
    assert upstream.open_connections == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".\r\n",
        b"..\r\n",
        b"a\r\n.\r\n.b\r\n",
        b"a\n.\nb\r\n",
        b"\r.\r\n",
        b"\r\n\r\n",
        bytes(range(256)) + b"\r\n",
        b".x\r\n" * 500,
    ],
    ids=["empty", "dot", "dots", "dot-lines", "bare-lf", "bare-cr", "blank", "every-octet", "long"],
)
@pytest.mark.parametrize("chunk", [0, 1], ids=["at-once", "by-octet"])
async def test_content_comes_out_as_it_went_in(content: bytes, chunk: int) -> None:
    async with ScriptedUpstream() as upstream, connect(upstream, chunk=chunk) as client:
        await client.greet()
        await client.deliver(SENDER, [RECIPIENT], content)
        (transaction,) = await upstream.received(1)
        assert transaction.content == content


async def test_a_dot_that_the_client_forgot_to_stuff_is_lost_as_at_any_server() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        await _data(client)
        await client.send(b".one\r\n..two\r\n.\r\n")
        await client.expect(250)
        assert upstream.accepted[0].content == b"one\r\n.two\r\n"


async def test_a_pipelined_flight_is_answered_in_order_and_seen_as_such() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("rcpt", b"550 5.1.1 nobody", recipient="nobody@example.org")
        await client.greet()
        flight = [f"MAIL FROM:<{SENDER}>", "RCPT TO:<nobody@example.org>", f"RCPT TO:<{RECIPIENT}>", "DATA"]
        await client.send("".join(f"{line}\r\n" for line in flight).encode())
        for code in (250, 550, 250, 354):
            await client.expect(code)
        await client.send(stuffed(CONTENT) + b"NOOP\r\nQUIT\r\n")
        for code in (250, 250, 221):
            await client.expect(code)
        (transaction,) = await upstream.received(1)
        assert transaction.pipelined
        assert (transaction.recipients, transaction.refused) == ([RECIPIENT], ["nobody@example.org"])
        assert upstream.connections[0].pipelined == [line.encode() for line in flight[1:]] + [b"NOOP", b"QUIT"]


@pytest.mark.parametrize(
    ("options", "command", "code"),
    [
        ({"without": ["SIZE"]}, "MAIL FROM:<a@b> SIZE=1", 555),
        ({"without": ["8BITMIME"]}, "MAIL FROM:<a@b> BODY=8BITMIME", 555),
        ({"without": ["SMTPUTF8"]}, "MAIL FROM:<a@b> SMTPUTF8", 555),
        ({}, "MAIL FROM:<ä@b>", 553),
        ({}, "MAIL FROM:<a@b> RET=HDRS", 555),
        ({"offers": ["DSN"]}, "MAIL FROM:<a@b> RET=HDRS", 250),
        ({}, "MAIL FROM:<a@b> SIZE=999999999", 552),
        ({"users": {"u": "p"}}, "MAIL FROM:<a@b>", 530),
        ({"users": {"u": "p"}, "auth_required": False}, "MAIL FROM:<a@b>", 250),
        ({}, "MAIL FROM: <a@b>", 501),
        ({}, "RCPT TO:<a@b>", 503),
        ({}, "DATA", 503),
        ({}, "STARTTLS", 502),
        ({}, "AUTH PLAIN", 504),
        ({}, "XYZZY", 500),
    ],
)
async def test_what_was_not_offered_is_refused(options: dict[str, object], command: str, code: int) -> None:
    async with ScriptedUpstream(**options) as upstream, connect(upstream) as client:  # type: ignore[arg-type]
        await client.greet()
        await client.command(command, code)


async def test_the_limit_of_recipients_is_a_452() -> None:
    async with ScriptedUpstream(recipients=1) as upstream, connect(upstream) as client:
        await client.greet()
        await client.command(f"MAIL FROM:<{SENDER}>", 250)
        await client.command("RCPT TO:<a@example.org>", 250)
        await client.command("RCPT TO:<b@example.org>", 452)


async def test_a_server_without_esmtp_takes_mail_after_helo() -> None:
    async with ScriptedUpstream(helo_only=True) as upstream, connect(upstream) as client:
        await client.expect(220)
        await client.command("EHLO me.test", 502)
        reply = await client.command("HELO me.test", 250)
        assert len(reply.lines) == 1
        await client.deliver(SENDER, [RECIPIENT], CONTENT)
        assert len(upstream.accepted) == 1


async def test_without_enhanced_status_codes_the_usual_replies_have_none() -> None:
    async with ScriptedUpstream(without=["ENHANCEDSTATUSCODES"]) as upstream, connect(upstream) as client:
        await client.greet()
        reply = await client.command("MAIL FROM:<a@b>", 250)
        assert reply.text == "Ok"


# -- TLS and AUTH ----------------------------------------------------------------------------------------------------------


async def test_starttls_comes_before_auth_and_mail(tls: Authority) -> None:
    async with (
        ScriptedUpstream(users={"u": "p"}, security="starttls", tls=tls.server) as upstream,
        connect(upstream) as client,
    ):
        await client.greet()
        assert "STARTTLS" in client.extensions
        assert not any(extension.startswith("AUTH") for extension in client.extensions)
        await client.command("MAIL FROM:<a@b>", 530)
        await client.start_tls(tls.client_context())
        await client.hello()
        assert "AUTH PLAIN LOGIN CRAM-MD5" in client.extensions
        await client.command("AUTH PLAIN " + _b64(b"\0u\0p"), 235)
        await client.deliver(SENDER, [RECIPIENT], CONTENT)
        (transaction,) = upstream.accepted
        assert (transaction.tls, transaction.user) == (True, "u")
        assert upstream.connections[0].tls_version.startswith("TLSv1.")


async def test_implicit_tls_carries_large_content(tls: Authority) -> None:
    content = b"0123456789abcde\r\n" * 100_000
    async with ScriptedUpstream(security="tls", tls=tls.server) as upstream, connect(upstream) as client:
        await client.shake_hands(tls.client_context())
        await client.greet()
        await client.deliver(SENDER, [RECIPIENT], content)
        assert upstream.accepted[0].content == content


@pytest.mark.parametrize("fault", ["wrong name", "expired", "stranger"])
async def test_a_bad_certificate_is_refused_by_a_client_that_looks(tls: Authority, fault: str) -> None:
    context = {
        "wrong name": lambda: tls.context("other.example"),
        "expired": lambda: tls.context(expired=True),
        "stranger": lambda: tls.stranger().server,
    }[fault]()
    async with ScriptedUpstream(security="tls", tls=context) as upstream, connect(upstream) as client:
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.shake_hands(tls.client_context())
        client.close()
        await eventually(lambda: upstream.connections[0].closed)
        assert upstream.transactions == []


@pytest.mark.parametrize("password", ["p", "wrong"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "PLAIN initial", "LOGIN", "LOGIN initial", "CRAM-MD5"])
async def test_every_login_is_recorded_with_its_mechanism(mechanism: str, password: str) -> None:
    good = password == "p"
    async with ScriptedUpstream(users={"u": "p"}) as upstream, connect(upstream) as client:
        await client.greet()
        code = 235 if good else 535
        if mechanism == "CRAM-MD5":
            challenge = base64.b64decode((await client.command("AUTH CRAM-MD5", 334)).text)
            await client.command(_b64(b"u " + _hmac_md5(password.encode(), challenge)), code)
        elif mechanism == "PLAIN":
            await client.command("AUTH PLAIN", 334)
            await client.command(_b64(b"\0u\0" + password.encode()), code)
        elif mechanism == "PLAIN initial":
            await client.command("AUTH PLAIN " + _b64(b"\0u\0" + password.encode()), code)
        else:
            if mechanism == "LOGIN":
                await client.command("AUTH LOGIN", 334)
                await client.command(_b64(b"u"), 334)
            else:
                await client.command("AUTH LOGIN " + _b64(b"u"), 334)
            await client.command(_b64(password.encode()), code)
        name = mechanism.split()[0]
        told = "" if name == "CRAM-MD5" else password
        assert upstream.logins == [Login(1, name, "u", told, good, False)]
        await client.command("MAIL FROM:<a@b>", 250 if good else 530)


# -- misbehaving -----------------------------------------------------------------------------------------------------------


async def _nothing(client: Client) -> None:
    pass


async def _greet(client: Client) -> None:
    await client.expect(220)


async def _ehlo(client: Client) -> None:
    await client.greet()


async def _mail(client: Client) -> None:
    await client.greet()
    await client.command("MAIL FROM:<a@b>", 250)


async def _rcpt(client: Client) -> None:
    await _mail(client)
    await client.command("RCPT TO:<c@d>", 250)


async def _data(client: Client) -> None:
    await _rcpt(client)
    await client.command("DATA", 354)


#: How to come to a phase, and what to send there.
PHASES: dict[Phase, tuple[Callable[[Client], Awaitable[None]], bytes]] = {
    "greeting": (_nothing, b""),
    "ehlo": (_greet, b"EHLO me.test\r\n"),
    "auth": (_ehlo, b"AUTH PLAIN AHUAcA==\r\n"),
    "mail": (_ehlo, b"MAIL FROM:<a@b>\r\n"),
    "rcpt": (_mail, b"RCPT TO:<c@d>\r\n"),
    "data": (_rcpt, b"DATA\r\n"),
    "content": (_data, b"some of it\r\n"),
    "final": (_data, b"all of it\r\n.\r\n"),
    "rset": (_ehlo, b"RSET\r\n"),
    "quit": (_ehlo, b"QUIT\r\n"),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_any_phase_can_answer_what_the_script_says(phase: Phase) -> None:
    async with _with_auth_optional() as upstream:
        upstream.script(phase, b"499 4.9.9 as told", times=1)
        async with connect(upstream) as client:
            approach, octets = PHASES[phase]
            await approach(client)
            await client.send(octets)
            await client.expect(499, "4.9.9 as told")


@pytest.mark.parametrize("phase", PHASES)
async def test_any_phase_can_close_the_connection(phase: Phase) -> None:
    async with _with_auth_optional() as upstream:
        upstream.script(phase, Close())
        async with connect(upstream) as client:
            approach, octets = PHASES[phase]
            await approach(client)
            await client.send(octets)
            await client.expect_close()
            await eventually(lambda: upstream.open_connections == 0)


@pytest.mark.parametrize("phase", PHASES)
async def test_any_phase_can_hang(phase: Phase) -> None:
    async with _with_auth_optional() as upstream:
        upstream.script(phase, Hang())
        async with connect(upstream) as client:
            approach, octets = PHASES[phase]
            await approach(client)
            await client.send(octets)
            silent = asyncio.ensure_future(client.reply())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not silent.done()
            silent.cancel()
            await asyncio.gather(silent, return_exceptions=True)
            assert upstream.open_connections == 1


async def test_421_closes_the_connection() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("mail", b"421 4.3.2 going down")
        await client.greet()
        await client.command("MAIL FROM:<a@b>", 421)
        await client.expect_close()


async def test_a_reset_is_seen_as_such() -> None:
    async with ScriptedUpstream() as upstream:
        upstream.script("greeting", Reset())
        with socket.create_connection((upstream.host, upstream.port)) as connection:
            await eventually(lambda: upstream.connections and upstream.connections[0].closed)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)


@pytest.mark.parametrize("action", [Close(), Garbage(), Reset()], ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_the_handshake_can_fail(tls: Authority, security: Security, action: Close | Garbage | Reset) -> None:
    async with ScriptedUpstream(security=security, tls=tls.server) as upstream:
        upstream.script("tls", action)
        async with connect(upstream) as client:
            if security == "starttls":
                await client.greet()
                await client.command("STARTTLS", 220)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await client.shake_hands(tls.client_context())


async def test_dripped_half_and_garbled_replies_are_just_that() -> None:
    async with ScriptedUpstream() as upstream:
        upstream.script("greeting", Drip(b"220-slow\r\n220 and steady"), times=1)
        upstream.script("greeting", Drip(), times=1)
        upstream.script("greeting", Half(b"220 half and no more"), times=1)
        upstream.script("greeting", Garbage(b"\x00\xff\r\n"), times=1)
        async with connect(upstream) as client:
            assert (await client.expect(220)).lines == ("slow", "and steady")
        async with connect(upstream) as client:
            await client.expect(220, "ESMTP")
        async with connect(upstream) as client:
            with pytest.raises(AssertionError, match="closed after b'220 half a"):
                await client.expect(220)
        async with connect(upstream) as client:
            with pytest.raises(AssertionError, match="not a reply"):
                await client.expect(220)
        async with connect(upstream) as client:
            await client.expect(220)


async def test_the_connection_can_end_in_the_middle_of_the_content() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("content", Close(after=10))
        await _data(client)
        await client.send(b"0123456789abcdef\r\n" * 10)
        await client.expect_close()
        (transaction,) = upstream.transactions
        assert (transaction.content, transaction.complete, transaction.accepted) == (b"0123456789", False, False)


async def test_a_content_that_ends_before_the_mark_is_taken_as_usual() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("content", Close(after=1000))
        await client.greet()
        await client.deliver(SENDER, [RECIPIENT], CONTENT)


async def test_an_upstream_that_stops_reading_makes_the_sender_wait() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("content", Hang(after=1))
        await _data(client)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.send(b"x" * 64_000_000)


async def test_a_reply_can_be_held_until_the_test_lets_it_go() -> None:
    release = asyncio.Event()
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("final", Hold(release))
        await _data(client)
        await client.send(stuffed(CONTENT))
        await eventually(lambda: upstream.transactions[0].complete)
        assert upstream.accepted == []
        release.set()
        await client.expect(250)
        assert len(upstream.accepted) == 1


async def test_a_message_whose_reply_is_lost_is_on_record_as_complete() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("final", Close())
        await _data(client)
        await client.send(stuffed(CONTENT))
        await client.expect_close()
        (transaction,) = upstream.transactions
        assert (transaction.complete, transaction.accepted, transaction.reply) == (True, False, b"")


async def test_rules_queue_and_narrow() -> None:
    async with ScriptedUpstream() as upstream:
        upstream.script("mail", b"421 4.3.2 first two connections", times=2)
        upstream.script("mail", b"450 4.2.0 second transaction of all that follow", transaction=4)
        upstream.script("ehlo", b"554 5.0.0 not you", connection=4)
        for _ in range(2):
            async with connect(upstream) as client:
                await client.greet()
                await client.command("MAIL FROM:<a@b>", 421)
        async with connect(upstream) as client:
            await client.greet()
            await client.deliver(SENDER, [RECIPIENT], CONTENT)
            await client.command("MAIL FROM:<a@b>", 450)
            await client.deliver(SENDER, [RECIPIENT], CONTENT)
        async with connect(upstream) as client:
            await client.expect(220)
            await client.command("EHLO x", 554)
            upstream.heal()
            await client.command("EHLO x", 250)
        assert [transaction.number for transaction in upstream.accepted] == [3, 5]


async def test_a_refused_mail_opens_no_transaction() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as client:
        upstream.script("mail", Say(b"550 5.7.1 no"))
        await client.greet()
        await client.command("MAIL FROM:<a@b>", 550)
        await client.command("RCPT TO:<c@d>", 503)
        assert upstream.transactions[0].reply == b"550 5.7.1 no"


# -- its life --------------------------------------------------------------------------------------------------------------


async def test_a_stopped_upstream_refuses_and_comes_back_on_its_port() -> None:
    async with ScriptedUpstream() as upstream, connect(upstream) as first:
        await first.greet()
        await upstream.stop()
        await first.expect_close()
        with pytest.raises(ConnectionRefusedError):
            await connect(upstream).connect()
        await upstream.start()
        async with connect(upstream) as second:
            await second.greet()
        assert len(upstream.connections) == 2


async def test_nobody_listens_on_an_unused_port() -> None:
    with pytest.raises(ConnectionRefusedError):
        await Client("127.0.0.1", unused_port()).connect()


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_closes_connections_however_young(turns: int) -> None:
    async with ScriptedUpstream() as upstream:
        client = socket.create_connection((upstream.host, upstream.port))  # blocking, for the loop must not turn yet
        for _ in range(turns):
            await asyncio.sleep(0)
    with client, contextlib.suppress(ConnectionResetError):
        client.settimeout(5)
        while client.recv(1000):
            pass


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="context"):
        ScriptedUpstream(security="tls")
    with pytest.raises(ValueError, match="not offered anyway: XYZZY"):
        ScriptedUpstream(without=["XYZZY"])
    with pytest.raises(ValueError, match="no such phase"):
        ScriptedUpstream().script("nonsense", Close())  # type: ignore[arg-type]


async def test_waiting_in_vain_says_for_what() -> None:
    async with ScriptedUpstream() as upstream:
        with pytest.raises(NeverHappened, match="1 accepted transactions at 127"):
            await upstream.received(1, within=0.05)


def _with_auth_optional() -> ScriptedUpstream:
    return ScriptedUpstream(users={"u": "p"}, auth_required=False)


def _b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


def _hmac_md5(key: bytes, message: bytes) -> bytes:
    """RFC 2195's keyed MD5, from RFC 2104's definition rather than from the library that the upstream uses."""
    from hashlib import md5

    key = key.ljust(64, b"\0")
    inner, outer = bytes(octet ^ 0x36 for octet in key), bytes(octet ^ 0x5C for octet in key)
    return md5(outer + md5(inner + message).digest()).hexdigest().encode()
