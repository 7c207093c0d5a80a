"""TLS at the listener: STARTTLS and implicit, what is forgotten, what fails and how it is told. Certificates: test_certificate.py."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.config.values import parse_network
from relay.listener import server
from relay.listener import tls as handshakes
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"
ENVELOPE = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\n"


def front_with(directory: Path, authority: Authority, security: str = "starttls", **listener: Any) -> Front:
    files = authority.files()
    return Front(directory, listener={"security": security, "certificate": files.certificate, "key": files.key, **listener})


def trace(front: Front) -> str:
    return front.taken[-1].prefix.decode().partition(" with ")[2].partition(" ")[0]


def refusals(front: Front) -> dict[str, float]:
    samples = [sample for family in front.metrics.registry.collect() for sample in family.samples]
    return {sample.labels["reason"]: sample.value for sample in samples if sample.name == "relay_refused_total"}


async def test_starttls_is_offered_until_it_is_used(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls) as front, front.client() as client:
        await client.greet()
        assert "STARTTLS" in client.extensions
        await client.start_tls(tls.client_context())
        await client.hello()
        assert "STARTTLS" not in client.extensions
        await client.command("STARTTLS", 503, "5.5.1")
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        await client.quit()
        assert trace(front) == "ESMTPS"
        await eventually(lambda: front.door.sessions == 0)
        assert front.events("fault") == []


async def test_implicit_tls_greets_under_tls(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls") as front, front.client() as client:
        await client.shake_hands(tls.client_context())
        await client.greet()
        assert "STARTTLS" not in client.extensions
        await client.command("STARTTLS", 500)
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE, parameters="SMTPUTF8")
        await client.quit()
        assert trace(front) == "UTF8SMTPS"


async def test_without_tls_the_command_is_unknown_and_the_trace_says_so(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        assert "STARTTLS" not in client.extensions
        await client.command("STARTTLS", 500, "5.5.2")
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        assert trace(front) == "ESMTP"


@pytest.mark.parametrize(
    ("hello", "parameters", "protocol"), [("HELO", "", "SMTP"), ("EHLO", "", "ESMTPS"), ("EHLO", "SMTPUTF8", "UTF8SMTPS")]
)
async def test_the_trace_says_how_it_came(tmp_path: Path, tls: Authority, hello: str, parameters: str, protocol: str) -> None:
    async with front_with(tmp_path, tls) as front, front.client() as client:
        await client.expect(220)
        await client.command("HELO x", 250)
        await client.start_tls(tls.client_context())
        await client.command(f"{hello} x", 250)
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE, parameters=parameters)
        assert trace(front) == protocol


async def test_what_was_said_in_clear_is_forgotten(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls) as front, front.client() as client:
        await client.greet()
        await client.send(ENVELOPE)
        await client.expect(250)
        await client.expect(250)
        await client.start_tls(tls.client_context())
        await client.command("DATA", 503)
        await client.command("MAIL FROM:<app@acme.example>", 503, "EHLO or HELO first")
        await client.hello()
        await client.deliver("app@acme.example", ["other@example.org"], MESSAGE)
        assert [message.recipients for message in front.taken] == [("other@example.org",)]


INJECTED = b"EHLO evil\r\nMAIL FROM:<evil@acme.example>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\n"


@pytest.mark.parametrize("injected", [b"NOOP\r\n", INJECTED, b"QUI", b"X" * 2_000_000, b"DATA\r\nSubject: x\r\n"], ids=len)
async def test_nothing_that_came_behind_starttls_survives_it(tmp_path: Path, tls: Authority, injected: bytes) -> None:
    """Given to the session at once with STARTTLS, as from one packet."""
    async with front_with(tmp_path, tls) as front, front.client() as client:
        await client.greet()
        (session,) = front.door._sessions
        session.data_received(b"STARTTLS\r\n" + injected)
        await client.expect(220)
        await client.shake_hands(tls.client_context())
        await client.command("NOOP", 250)  # its reply would come behind those to what was injected
        await client.command("MAIL FROM:<app@acme.example>", 503)
        await client.hello()
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        await client.quit()
        assert [message.sender for message in front.taken] == ["app@acme.example"]


async def test_what_is_injected_in_a_packet_of_its_own_breaks_the_handshake(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls) as front:
        for injected in (b"NOOP\r\n", INJECTED):
            async with front.client() as client:
                await client.greet()
                await client.command("STARTTLS", 220)
                await client.send(injected)
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await client.shake_hands(tls.client_context())
            await eventually(lambda: front.door.sessions == 0)
        assert front.taken == []
        assert refusals(front) == {"tls_no_tls": 2}
        assert front.events("fault") == []


async def test_commands_before_starttls_in_the_same_packet_are_answered_in_clear(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls) as front, front.client() as client:
        await client.expect(220)
        await client.send(b"EHLO x\r\nNOOP\r\nSTARTTLS\r\n")
        for code in (250, 250, 220):
            await client.expect(code)
        await client.shake_hands(tls.client_context())
        await client.hello()
        await client.quit()


async def test_commands_in_the_packet_that_ends_the_handshake_are_answered(tmp_path: Path, tls: Authority) -> None:
    """A client of TLS 1.3 that does not wait for the greeting's last word may send its first command with its Finished."""
    async with front_with(tmp_path, tls) as front:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        side = tls.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        async with front.client() as client:
            await client.greet()
            await client.command("STARTTLS", 220)
            while True:
                try:
                    side.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await client.send(outgoing.read())
                    incoming.write(await client._wire.receive())
            side.write(b"EHLO x\r\nNOOP\r\n")
            await client.send(outgoing.read())
            replies = b""
            while replies.count(b"\r\n250 ") < 2 and b"250 2.0.0 Ok" not in replies:
                try:
                    replies += side.read()
                except ssl.SSLWantReadError:
                    incoming.write(await client._wire.receive())
            assert replies.endswith(b"250 2.0.0 Ok\r\n")
        await eventually(lambda: front.door.sessions == 0)


async def test_what_of_the_handshake_came_before_it_began_is_part_of_it(
    tmp_path: Path, tls: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on uvloop, which reads as soon as a connection is made."""
    real, hello = server.Session.connection_made, b""

    def connection_made(self: server.Session, transport: asyncio.BaseTransport) -> None:
        real(self, transport)
        self.data_received(hello)

    monkeypatch.setattr(server.Session, "connection_made", connection_made)
    async with front_with(tmp_path, tls, "tls") as front:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        side = tls.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
        hello = outgoing.read()
        async with front.client() as client:
            assert (await said(side, client, incoming, outgoing)).startswith(b"220 ")
        await eventually(lambda: front.door.sessions == 0)


async def said(side: ssl.SSLObject, client: Client, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> bytes:
    """The handshake, and the first that the server says."""
    while True:
        try:
            side.do_handshake()
            return side.read()
        except ssl.SSLWantReadError:
            await client.send(outgoing.read())
            incoming.write(await client._wire.receive())


async def test_a_listener_that_requires_tls_takes_no_mail_and_no_login_in_clear(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, require_tls=True) as front, front.client() as client:
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 530, "5.7.0 STARTTLS first")
        await client.command("RCPT TO:<you@example.org>", 503)
        for command, code in (("NOOP", 250), ("RSET", 250), ("HELO x", 250)):
            await client.command(command, code)
        await client.start_tls(tls.client_context())
        await client.hello()
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        await client.quit()
        assert refusals(front) == {"tls": 1}


async def test_large_mail_arrives_whole_under_tls(tmp_path: Path, tls: Authority) -> None:
    content = b"Subject: large\r\n\r\n" + (b"x" * 98 + b"\r\n") * 50_000
    for security in ("starttls", "tls"):
        async with front_with(tmp_path / security, tls, security) as front, front.client() as client:
            if security == "tls":
                await client.shake_hands(tls.client_context())
                await client.greet()
            else:
                await client.greet()
                await client.start_tls(tls.client_context())
                await client.hello()
            for _ in range(2):
                await client.deliver("app@acme.example", ["you@example.org"], content)
            await client.quit()
            assert [message.content == content for message in front.taken] == [True, True]


async def test_pipelined_messages_under_tls(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls") as front, front.client() as client:
        await client.shake_hands(tls.client_context())
        await client.greet()
        await client.send((ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\n") * 5 + b"QUIT\r\n")
        for _ in range(5):
            for code in (250, 250, 354, 250):
                await client.expect(code)
        await client.expect(221)
        await client.expect_close()
        assert len(front.taken) == 5


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_during_the_handshake_leaves_nothing(tmp_path: Path, tls: Authority, security: str, how: str) -> None:
    async with front_with(tmp_path, tls, security, connections=1) as front:
        for begun in (b"", b"\x16\x03\x01\x02\x00\x01"):
            async with front.client() as client:
                if security == "starttls":
                    await client.greet()
                    await client.command("STARTTLS", 220)
                else:
                    await eventually(lambda: front.door.sessions == 1)
                await client.send(begun)
                client.reset() if how == "reset" else client.close()
            await eventually(lambda: front.door.sessions == 0)
        async with front.client() as client:  # its place is free
            if security == "tls":
                await client.shake_hands(tls.client_context())
            await client.greet()
        await eventually(lambda: front.door.sessions == 0)
        assert refusals(front) == {"tls_hung_up": 2}
        assert front.events("fault") == []
        assert [event["what"] for event in front.events("note")] == [
            "no TLS with 127.0.0.1 at listener local: it hung up during the handshake"
        ]


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_an_idle_handshake_ends(tmp_path: Path, tls: Authority, security: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_SECONDS", 0.2)
    async with front_with(tmp_path, tls, security) as front, front.client() as client:
        if security == "starttls":
            await client.greet()
            await client.command("STARTTLS", 220)
        await client.expect_close()
        await eventually(lambda: front.door.sessions == 0)
        assert refusals(front) == {"tls_timeout": 1}
        assert front.events("fault") == []
        (note,) = front.events("note")
        assert note["what"].endswith("the handshake took longer than 0.2 seconds")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_stop_does_not_wait_for_handshakes(tmp_path: Path, tls: Authority, begun: bool) -> None:
    async with front_with(tmp_path, tls, "tls") as front, front.client() as client:
        await eventually(lambda: front.door.sessions == 1)
        if begun:
            await client.send(b"\x16\x03\x01\x02\x00\x01")
        front.door.stop()
        await asyncio.wait_for(front.door.drained(), 20)
        await client.expect_close()


async def test_a_stop_in_an_idle_session_is_said_under_tls(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls") as front, front.client() as client:
        await client.shake_hands(tls.client_context())
        await client.greet()
        front.door.stop()
        await client.expect(421, "4.3.2")
        await asyncio.wait_for(front.door.drained(), 20)  # though the client does not confirm the end
        await client.expect_close()


async def test_who_may_not_enter_gets_no_handshake(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls", networks=[parse_network("10.0.0.0/8")]) as front:
        async with front.client() as client:
            await client.expect_close()
        await eventually(lambda: front.door.sessions == 0)
        assert [event["reply"] for event in front.events("refused")] == ["554 5.7.1 Access denied"]


FAILURES: list[tuple[str, Callable[[ssl.SSLContext], None] | bytes, str, str]] = [
    ("starttls", b"EHLO x\r\nMAIL FROM:<a@acme.example>\r\n", "tls_no_tls", "it does not speak TLS where TLS was expected"),
    ("tls", b"EHLO x\r\nMAIL FROM:<a@acme.example>\r\n", "tls_no_tls", "it does not speak TLS where TLS was expected"),
    ("tls", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tls_no_tls", "it speaks HTTP, not TLS"),
    ("tls", b"\0" * 100, "tls_no_tls", "it does not speak TLS where TLS was expected"),
    ("tls", lambda context: setattr(context, "verify_mode", ssl.CERT_REQUIRED), "tls_certificate",
     "it does not trust who issued the certificate"),
    ("tls", lambda context: context.set_ciphers("DHE-RSA-AES128-GCM-SHA256"), "tls_cipher",
     "it knows no cipher that we have for our certificate"),
]  # fmt: skip


@pytest.mark.parametrize(("security", "client_does", "reason", "words"), FAILURES)
async def test_a_failed_handshake_is_told_in_plain_words_once_and_counted(
    tmp_path: Path, tls: Authority, security: str, client_does: Callable[[ssl.SSLContext], None] | bytes, reason: str, words: str
) -> None:
    async with front_with(tmp_path, tls, security) as front:
        for _ in range(3):
            async with front.client() as client:
                if security == "starttls":
                    await client.greet()
                    await client.command("STARTTLS", 220)
                if isinstance(client_does, bytes):
                    await client.send(client_does)
                    await eventually(lambda: front.door.sessions == 0)
                    continue
                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                if reason == "tls_cipher":
                    context.maximum_version = ssl.TLSVersion.TLSv1_2
                client_does(context)
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await client.shake_hands(context)
                    await client.expect_close()
                    raise ConnectionError
            await eventually(lambda: front.door.sessions == 0)
        assert refusals(front) == {reason: 3}
        assert [event["what"] for event in front.events("note")] == [f"no TLS with 127.0.0.1 at listener local: {words}"]
        assert front.events("fault") == []


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(
    ("minimum", "client", "works"),
    [("1.0", "TLSv1", True), ("1.1", "TLSv1", False), ("1.1", "TLSv1_1", True), ("1.2", "TLSv1_1", False), ("1.2", "TLSv1_2", True),
     ("1.3", "TLSv1_2", False), ("1.3", "TLSv1_3", True)],
)  # fmt: skip
async def test_the_oldest_version_is_what_the_listener_says(tmp_path: Path, minimum: str, client: str, works: bool) -> None:
    """With the certificate of our own making, as old devices have it."""
    listener = {"security": "tls", "minimum_tls": minimum, "networks": [parse_network("127.0.0.0/8")]}
    async with Front(tmp_path, listener=listener) as front:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion[client]
        async with front.client() as old:
            if works:
                await old.shake_hands(context)
                await old.greet()
                assert old._wire.tls_version == {"TLSv1_1": "TLSv1.1", "TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}.get(client, client)
                await old.deliver("app@acme.example", ["you@example.org"], MESSAGE)
                await old.quit()
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await old.shake_hands(context)
        await eventually(lambda: front.door.sessions == 0)
        assert refusals(front) == ({} if works else {"tls_version": 1})


async def test_the_end_of_a_secure_session_is_no_news(tmp_path: Path, tls: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """TLS cannot be closed by half; asyncio warns whoever tries."""
    async with front_with(tmp_path, tls, "tls") as front:
        for how in ("quit", "notify", "fin", "reset"):
            async with front.client() as client:
                await client.shake_hands(tls.client_context())
                await client.greet()
                match how:
                    case "quit":
                        await client.quit()
                    case "notify":
                        assert client._wire._tls is not None
                        with pytest.raises(ssl.SSLWantReadError):
                            client._wire._tls.unwrap()
                        await client._wire._flush()
                        await client.expect_close()
                    case "fin":
                        client.finish_sending()
                    case "reset":
                        client.reset()
            await eventually(lambda: front.door.sessions == 0, how)
        assert front.events() == []
    assert caplog.records == []


async def test_a_message_is_kept_when_its_client_ends_tls_after_the_dot(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls") as front:
        front.spool.gate = asyncio.Event()
        async with front.client() as client:
            await client.shake_hands(tls.client_context())
            await client.greet()
            await client.send(ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\n")
            await eventually(lambda: front.spool.puts == 1)
            client.finish_sending()
            front.spool.gate.set()
            await eventually(lambda: front.taken)
        await eventually(lambda: front.door.sessions == 0)
        assert [event["event"] for event in front.events()] == ["accepted"]


async def test_a_client_that_reads_nothing_is_cut_off_under_tls(tmp_path: Path, tls: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    async with front_with(tmp_path, tls, "tls") as front, front.client() as client:
        await client.shake_hands(tls.client_context())
        client._wire._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flooding = asyncio.create_task(_flood(client))
        await eventually(lambda: front.door.sessions == 0)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        assert front.events("fault") == []


async def _flood(client: Client) -> None:
    while True:
        await client._wire.send(b"EHLO x\r\n" * 1000)


async def test_sessions_can_be_resumed_with_a_ticket(tmp_path: Path, tls: Authority) -> None:
    async with front_with(tmp_path, tls, "tls") as front:
        context, session = tls.client_context(), None
        for resumed in (False, True):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            side = context.wrap_bio(incoming, outgoing, server_hostname="localhost", session=session)
            async with front.client() as client:
                await said(side, client, incoming, outgoing)
            assert side.session_reused is resumed
            session = side.session
        await eventually(lambda: front.door.sessions == 0)
