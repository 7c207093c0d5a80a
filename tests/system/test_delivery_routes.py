"""From an app's session to the right upstream with the right credential: tenants, rewriting, splitting, completion, UTF-8."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import CONTENT, ROUTES, SECRET, running, to

pytestmark = pytest.mark.both_loops

RECEIVED = b"Received: from client.test ([127.0.0.1])\r\n\tby relay.example.net with ESMTP id "


def fields(content: bytes) -> list[bytes]:
    return content.partition(b"\r\n\r\n")[0].split(b"\r\n")


async def test_each_tenant_has_an_upstream_and_a_credential_of_its_own(tmp_path: Path, tls: Authority) -> None:
    acme = ScriptedUpstream(users={"acme-user": SECRET}, security="starttls", tls=tls.server)
    globex = ScriptedUpstream(users={"globex-user": SECRET + "2"}, security="tls", tls=tls.server)
    async with acme, globex:
        trust = {"ca_file": str(tls.ca_file)}
        upstreams = {
            "acme": to(acme, **trust, security="starttls", username="acme-user", password=SECRET, senders=["acme.example"]),
            "globex": to(globex, **trust, security="tls", username="globex-user", password=SECRET + "2", senders=["globex.example"]),
        }
        async with running(tmp_path, upstreams=upstreams) as relay:
            for number in range(5):
                await relay.send("app@acme.example", [f"{number}@example.org"])
                await relay.send("App@GLOBEX.example", [f"{number}@example.org"], CONTENT.replace(b"acme", b"globex"))
            await acme.received(5)
            await globex.received(5)
            await relay.empty()
        for server, user, sender in ((acme, "acme-user", "app@acme.example"), (globex, "globex-user", "App@GLOBEX.example")):
            assert {(t.user, t.sender, t.tls) for t in server.accepted} == {(user, sender, True)}
            assert sorted(t.recipients[0] for t in server.accepted) == [f"{number}@example.org" for number in range(5)]
            assert all(login.accepted for login in server.logins)
            assert server.open_connections == 0
            assert all(connection.verbs[-1] == "QUIT" for connection in server.connections)


async def test_a_message_is_delivered_byte_for_byte_below_our_own_fields(tmp_path: Path) -> None:
    body = b"".join([b".dot\r\n..\r\n.\r\n", bytes(range(1, 10)) + b"\x0b\x0c\r\n", b"x" * 5000 + b"\r\n"])
    content = b"From: app@acme.example\r\nSubject: a\r\n folded\r\nX-Odd:value\r\nDate: now\r\nMessage-ID: <1@acme.example>\r\n\r\n" + body
    async with ScriptedUpstream() as server:
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            reply = await relay.send("app@acme.example", ["you@example.org"], content)
            (transaction,) = await server.received(1)
        own, _, rest = transaction.content.partition(b"From:")
        assert b"From:" + rest == content
        assert own.startswith(RECEIVED + reply.text.split()[-1].encode())
        assert own.count(b"\r\n") == 4


async def test_large_messages_with_and_without_line_ends_arrive_whole(tmp_path: Path) -> None:
    contents = [
        b"Subject: lines\r\n\r\n" + b".a line of a large message\r\n" * 150_000,
        b"Subject: one line\r\n\r\n" + b"." + b"x" * 900_000 + b"\r\n",
    ]
    async with ScriptedUpstream() as server:
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            for content in contents:
                await relay.send("app@acme.example", ["you@example.org"], content)
            await server.received(2)
            await relay.empty()
            await eventually(lambda: not list((tmp_path / "spool" / "content").iterdir()), "the files to be removed, by and by")
        assert sorted(t.content.partition(b"Subject:")[2] for t in server.accepted) == sorted(c.partition(b"Subject:")[2] for c in contents)


async def test_a_route_rewrites_what_it_says_and_hides_what_nobody_may_see(tmp_path: Path) -> None:
    rewrite = {
        "from": "Acme Billing <no-reply@acme.example>",
        "reply_to": "original",
        "envelope_sender": "bounces@acme.example",
        "set_headers": {"X-Tenant": "acme"},
        "remove_headers": ["X-Mailer"],
        "subject_prefix": "[acme] ",
        "bcc": "archive@acme.example",
    }
    content = b"Bcc: hidden@example.org\r\nX-Mailer: old\r\nReturn-Path: <x@y>\r\n" + CONTENT
    async with (
        ScriptedUpstream() as server,
        running(tmp_path, upstreams={"acme": to(server)}, routes=[{**ROUTES[0], "rewrite": rewrite}]) as relay,
    ):
        await relay.send("app@acme.example", ["you@example.org", "two@example.org"], content)
        (transaction,) = await server.received(1)
        await relay.empty()
        (event,) = await relay.event("sent")
    assert transaction.sender == "bounces@acme.example"
    assert transaction.recipients == ["you@example.org", "two@example.org", "archive@acme.example"]
    assert event["recipients"] == "you@example.org,two@example.org,archive@acme.example"
    assert [field for field in fields(transaction.content) if not field.startswith((b"Received:", b"\t", b"Date:", b"Message-ID:"))] == [
        b"From: Acme Billing <no-reply@acme.example>",
        b"To: you@example.org",
        b"Subject: [acme] hi",
        b"Reply-To: App <app@acme.example>",
        b"X-Tenant: acme",
    ]
    assert transaction.content.endswith(b"\r\n\r\nhello\r\n")


async def test_a_message_whose_recipients_take_two_routes_is_split(tmp_path: Path) -> None:
    routes = [
        {"name": "partner", "sender": "acme.example", "recipient": "partner.example", "upstream": "partner"},
        {"name": "rest", "sender": "acme.example", "upstream": "acme", "rewrite": {"bcc": "archive@acme.example"}},
    ]
    async with (
        ScriptedUpstream() as acme,
        ScriptedUpstream() as partner,
        running(tmp_path, upstreams={"acme": to(acme), "partner": to(partner)}, routes=routes) as relay,
    ):
        await relay.send("app@acme.example", ["a@partner.example", "b@example.org", "c@partner.example", "d@example.org"])
        (there,) = await partner.received(1)
        (here,) = await acme.received(1)
        await relay.empty()
    assert there.recipients == ["a@partner.example", "c@partner.example"]
    assert here.recipients == ["b@example.org", "d@example.org", "archive@acme.example"]
    assert there.content == here.content
    assert b"b@example.org" not in there.content.partition(b"From:")[0]


async def test_a_domain_is_completed_and_aliases_are_followed_before_routing(tmp_path: Path) -> None:
    async with ScriptedUpstream() as server:
        more: dict[str, Any] = {
            "domain": "acme.example",
            "aliases": {"root": ["ops@acme.example", "night@example.org"], "ops@acme.example": "o@x.org"},
        }
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1], **more) as relay:
            await relay.send("cron", ["root", "scanner", "you@example.org", "ROOT@acme.example"])
            (transaction,) = await server.received(1)
    assert transaction.sender == "cron@acme.example"
    assert transaction.recipients == ["o@x.org", "night@example.org", "scanner@acme.example", "you@example.org"]


@pytest.mark.parametrize("pipelining", [True, False])
async def test_utf8_in_addresses_and_content_arrives_as_it_was_sent(tmp_path: Path, pipelining: bool) -> None:
    content = "From: Jürgen <jürgen@acme.example>\r\nSubject: Grüße ☃\r\n\r\nÄpfel\r\n".encode()
    async with (
        ScriptedUpstream(without=() if pipelining else ("PIPELINING",)) as server,
        running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay,
    ):
        await relay.send("jürgen@acme.example", ["bücher@bücher.example"], content, parameters="SMTPUTF8 BODY=8BITMIME")
        (transaction,) = await server.received(1)
    assert transaction.sender == "jürgen@acme.example"
    assert transaction.recipients == ["bücher@bücher.example"]
    assert {"SMTPUTF8", "BODY=8BITMIME"} <= set(transaction.parameters)
    assert transaction.content.endswith(content)


async def test_recipients_beyond_what_the_upstream_takes_go_in_further_transactions_at_once(tmp_path: Path) -> None:
    recipients = [f"r{number}@example.org" for number in range(25)]
    async with ScriptedUpstream(recipients=10) as server, running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
        await relay.send("app@acme.example", recipients)
        await server.received(3)
        await relay.empty()
        assert relay.events("deferred") == []
        assert [entry.status for entry in relay.results()] == ["sent"] * 25
    assert [t.recipients for t in server.accepted] == [recipients[:10], recipients[10:20], recipients[20:]]


async def test_an_upstream_that_may_not_send_for_a_rewritten_from_never_sees_it(tmp_path: Path) -> None:
    """The last look is at the bytes that would leave: here a fallback whose credential is for others."""
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        acme.script("mail", b"421 4.3.2 down")
        upstreams = {"acme": to(acme), "house": to(house, senders=["house.example"])}
        async with running(tmp_path, upstreams=upstreams, routes=[{**ROUTES[0], "fallback": "house"}]) as relay:
            await relay.send("app@acme.example", ["you@example.org"])
            (event,) = await relay.event("held")
            assert (event["upstream"], event["route"]) == ("house", "acme")
            assert "may not send it" in event["reply"]
            (queued,) = relay.queue()
            assert queued.state == "held"
    assert house.transactions == []
