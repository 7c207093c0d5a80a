"""Real servers as upstreams, with TLS and logins: what arrives, what they refuse, and what becomes of mail while they restart.

Postfix with Cyrus SASL and with Dovecot, Exim, and OpenSMTPD, which are installed by .ci/run. Each keeps what it takes, and the relay
in the test's own process sends to its ports for STARTTLS and for TLS with every mechanism that it has.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.system.receivers import (
    LATER,
    NOBODY,
    PASSWORD,
    SIZE_LIMIT,
    STRANGER,
    USER,
    Exim,
    Kept,
    OpenSmtpd,
    Postfix,
    PostfixWithDovecot,
    Receiver,
    Submission,
)
from tests.system.relays import Running, running

SENDER, RECIPIENT = "app@acme.example", "you@example.org"
HEADER = (
    b"From: App <app@acme.example>\r\nTo: you@example.org\r\nDate: Mon, 01 Jun 2026 10:00:00 +0000\r\nMessage-ID: <%b@acme.example>\r\n"
    b"Subject: %b\r\n"
)
BODIES = {
    "plain": b"\r\nhello\r\n",
    "empty": b"\r\n",
    "dots": b"\r\n.\r\n..\r\n...\r\n. \r\n.a\r\n",
    "blank-lines": b"\r\n\r\n\r\nhello  \r\n\t\r\n \r\n\r\n\r\n",
    "header": b"X-Folded: one\r\n\ttwo\r\n   three\r\nX-Twice: 1\r\nX-Twice: 2\r\nX-Empty:\r\nx-odd:no space\r\n\r\nhello\r\n",
    "eight-bit": b"Content-Type: text/plain; charset=utf-8\r\n\r\nGr\xc3\xbc\xc3\x9fe\r\n\xff\xfe\x80\r\n",
    "commands": b"\r\nQUIT\r\nRSET\r\nMAIL FROM:<x@y.example>\r\n250 2.0.0 Ok\r\nBDAT 3 LAST\r\n",
    "controls": b"\r\n\x01\x07\x0b\x0c\x1b\x7f\r\n",
    "long-line": b"\r\n" + b"x" * 998 + b"\r\n." + b"y" * 900 + b"\r\n",
    "over-a-flight": b"\r\n" + b"".join(b".%d of them, and a little more to fill the line\r\n" % n for n in range(2500)),
    "in-a-file": b"\r\n" + b"".join(b"%060d\r\n.%060d\r\n" % (n, n) for n in range(12_000)),
}

Tool = Callable[[str], str]
SERVERS = {
    "postfix-cyrus": (Postfix, "postfix", ("saslpasswd2",)),
    "postfix-dovecot": (PostfixWithDovecot, "postfix", ("dovecot",)),
    "exim": (Exim, "exim4", ()),
    "opensmtpd": (OpenSmtpd, "opensmtpd", ("chroot",)),
}
each_server = pytest.mark.parametrize("name", SERVERS)


def server_called(name: str, tool: Tool, tls: Authority) -> Receiver:
    kind, program, others = SERVERS[name]
    for other in others:
        tool(other)
    return kind(tool(program), chunking=kind is not OpenSmtpd, submission=Submission(tls.files()))


def to(server: Receiver, tls: Authority, security: str = "starttls", **keys: Any) -> dict[str, Any]:
    """The configuration of an upstream that is `server`."""
    port = server.starttls_port if security == "starttls" else server.tls_port
    login = {"username": USER, "password": PASSWORD, "ca_file": str(tls.ca_file)}
    return {"host": "localhost", "port": port, "security": security, **login, **keys}


@asynccontextmanager
async def relay_to(directory: Path, upstream: dict[str, Any], **more: Any) -> AsyncIterator[Running]:
    async with running(directory, upstreams={"up": upstream}, routes=[{"name": "all", "sender": "*", "upstream": "up"}], **more) as relay:
        yield relay


def content_of(name: str, body: bytes) -> bytes:
    return HEADER % (name.encode(), name.encode()) + body


def without_trace(kept: Kept) -> bytes:
    """What the server keeps below the Received fields: its own, and the relay's."""
    trace = re.match(rb"(?:Received:[^\n]*\n(?:[ \t][^\n]*\n)+)+", kept.content)
    assert trace and trace[0].count(b"\nReceived:") == 1, kept.content[:2000]
    return kept.content[trace.end() :]


def subject_of(kept: Kept) -> str:
    found = re.search(rb"^Subject: (.*)$", kept.content, re.MULTILINE)
    assert found, kept.content[:2000]
    return found[1].decode()


async def deliver(
    relay: Running, name: str, *, sender: str = SENDER, recipients: tuple[str, ...] = (RECIPIENT,), body: bytes = b"\r\n"
) -> None:
    await relay.send(sender, recipients, content_of(name, body))


# -- what arrives ---------------------------------------------------------------------------------------------------------------


@each_server
async def test_every_login_over_both_kinds_of_tls_carries_mail_unchanged(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server:
        ways = [(mechanism, security) for mechanism in server.mechanisms for security in ("starttls", "tls")]
        upstreams = {f"{mechanism}.{security}": to(server, tls, security, auth=mechanism) for mechanism, security in ways}
        routes = [{"name": way, "sender": f"{way}@acme.example", "upstream": way} for way in upstreams]
        async with running(tmp_path, upstreams=upstreams, routes=routes) as relay:
            for way in upstreams:
                for body in BODIES if way.startswith("plain") else ("dots",):
                    await deliver(relay, f"{way} {body}", sender=f"{way}@acme.example", body=BODIES[body])
            await relay.empty()
            assert relay.events("deferred", "failed") == []
        kept = server.messages()
    assert len(kept) == 2 * len(BODIES) + len(ways) - 2
    for message in kept:
        way, body = subject_of(message).split(" ")
        assert message.sender == f"{way}@acme.example"
        assert message.recipients == (RECIPIENT,)
        assert without_trace(message) == content_of(subject_of(message), BODIES[body]).replace(b"\r\n", b"\n"), way
        assert re.search(rb"with e?smtpsa", message.content, re.IGNORECASE), "a login under TLS"


@each_server
async def test_a_header_behind_the_line_of_a_mailbox_arrives_as_a_header(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server, relay_to(tmp_path, to(server, tls)) as relay:
        content = content_of("mailbox", b"\r\nhello\r\n")
        await relay.send(SENDER, [RECIPIENT], b"From app Tue Nov 22 10:00:00 2026\r\n" + content)
        await relay.empty()
        (message,) = server.messages()
        assert without_trace(message) == content.replace(b"\r\n", b"\n")


@each_server
async def test_addresses_in_utf_8_go_where_they_can(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server, relay_to(tmp_path, to(server, tls)) as relay:
        async with relay.client() as client:
            await client.greet()
            content = content_of("utf-8", b"X-Name: Gr\xc3\xbc\xc3\x9fe\r\n\r\nhello\r\n")
            await client.deliver(SENDER, ["jürgen@example.org"], content, parameters="SMTPUTF8 BODY=8BITMIME")
            await client.quit()
        await relay.empty()
        kept = server.messages()
        if name == "opensmtpd":
            (failed,) = relay.events("failed")
            assert "SMTPUTF8" in failed["reply"]
            assert [(message.sender, message.recipients) for message in kept] in ([("", (SENDER,))], [])
        else:
            (message,) = kept
            assert message.recipients == ("jürgen@example.org",)
            assert without_trace(message) == content.replace(b"\r\n", b"\n")


# -- what is refused --------------------------------------------------------------------------------------------------------------


@each_server
async def test_what_it_refuses_is_reported_and_what_it_puts_off_waits(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server, relay_to(tmp_path, to(server, tls)) as relay:
        await deliver(relay, "three", recipients=(NOBODY, RECIPIENT, LATER))
        await deliver(relay, "alone", recipients=(NOBODY,))
        await deliver(relay, "stranger", sender=STRANGER)
        too_large = b"\r\n" + b"%0998d\r\n" % 0 * (SIZE_LIMIT // 1000 + 1)
        await deliver(relay, "large", body=too_large)
        await relay.event("failed", count=4)
        await relay.event("deferred", count=2)  # again and again
        failed = {(event["sender"], event["recipients"], event["reply"].split(" ")[0]) for event in relay.events("failed")}
        refusals = {"postfix-cyrus": "553", "postfix-dovecot": "553", "exim": "550", "opensmtpd": "550"}
        assert failed >= {(SENDER, NOBODY, "550"), (STRANGER, RECIPIENT, refusals[name])}
        assert {(event["recipients"], event["reply"].split(" ")[1]) for event in relay.events("deferred")} == {(LATER, "4.2.1")}
        await eventually(lambda: [waiting.recipients for waiting in relay.queue()] == [(LATER,)], "the reports to be sent")
        assert [waiting.in_doubt for waiting in relay.queue()] == [False]
        # The server is told to take it; nothing else than a restart has to happen here.
        await server.stop()
        server.deferring = False
        await server.start()
        await relay.empty()
        kept = Counter((message.sender, message.recipients) for message in server.messages())
    reports = Counter({("", (SENDER,)): 3, ("", (STRANGER,)): 1})
    assert kept == Counter({(SENDER, (RECIPIENT,)): 1, (SENDER, (LATER,)): 1}) + reports


@each_server
async def test_a_wrong_password_costs_one_login_and_no_mail(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server, relay_to(tmp_path, to(server, tls, password="not this one")) as relay:
        for number in range(5):
            await deliver(relay, f"{number}")
        await eventually(lambda: len({event["id"] for event in relay.events("deferred")}) == 5, "all deferred")
        await eventually(lambda: server.failed_logins() == 1, "the server to write its log")
        assert all(" 535 " in f" {event['reply']}" for event in relay.events("deferred"))
        assert len(relay.queue()) == 5
        assert relay.events("failed", "sent") == []
        assert server.messages() == []
        assert "not this one" not in relay.text()


@each_server
async def test_a_certificate_of_a_stranger_gets_neither_login_nor_mail(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    stranger = str(tls.stranger().ca_file)
    async with server_called(name, tool, tls) as server:
        upstreams = {security: to(server, tls, security, ca_file=stranger) for security in ("starttls", "tls")}
        routes = [{"name": security, "sender": f"{security}@acme.example", "upstream": security} for security in upstreams]
        async with running(tmp_path, upstreams=upstreams, routes=routes) as relay:
            for security in upstreams:
                await deliver(relay, security, sender=f"{security}@acme.example")
            await eventually(lambda: {event["upstream"] for event in relay.events("deferred")} == set(upstreams), "both deferred")
            assert all("certificate" in event["reply"] for event in relay.events("deferred")), relay.events("deferred")
            assert relay.events("sent", "failed") == []
        assert server.messages() == []


# -- a restart ---------------------------------------------------------------------------------------------------------------------


@each_server
async def test_a_restart_in_the_middle_of_a_flow_loses_nothing(tmp_path: Path, tool: Tool, tls: Authority, name: str) -> None:
    async with server_called(name, tool, tls) as server:
        limits = {"connections": 5}
        async with relay_to(tmp_path, to(server, tls, limits=limits)) as relay:
            acknowledged: list[str] = []
            over = asyncio.Event()

            async def flow(session: int) -> None:
                async with Client(relay.host, relay.port) as client:
                    await client.greet()
                    while not over.is_set():
                        subject = f"{session}-{len(acknowledged)}"
                        body = b"\r\n" + b"x" * 60 * (len(acknowledged) % 7) + b"\r\n"
                        await client.deliver(SENDER, [RECIPIENT], content_of(subject, body))
                        acknowledged.append(subject)
                    await client.quit()

            async with asyncio.TaskGroup() as flows:
                for session in range(4):
                    flows.create_task(flow(session), name=f"flow {session}")
                for _ in range(2):
                    before = len(relay.events("sent"))
                    await eventually(lambda before=before: len(relay.events("sent")) > before + 20, "mail to flow", within=20)
                    await server.stop()
                    before = len(acknowledged)
                    await eventually(lambda before=before: len(acknowledged) > before + 20, "mail to be taken meanwhile", within=20)
                    await server.start()
                over.set()
            await eventually(lambda: not relay.queue(), "an empty queue", within=90)
            doubtful = len({event["id"] for event in relay.events("deferred") if event.get("in_doubt")})
            assert relay.events("failed", "bounced") == []
        arrived = Counter(subject_of(message) for message in server.messages())
    duplicates = sum(arrived.values()) - len(arrived)
    print(f"{name}: {len(acknowledged)} acknowledged, {len(arrived)} arrived, {duplicates} twice, {doubtful} in doubt meanwhile")
    assert arrived.keys() == set(acknowledged)
    assert duplicates <= 2 * limits["connections"], "no more than was under way at each stop"
