"""When upstreams fail: fallbacks, retries, bounces, doubt, and every recipient accounted for at the end."""

import asyncio
import email
import email.policy
from collections import Counter
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from relay.delivery import breaker, scheduler
from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import Close, Hang, Hold, Reset, ScriptedUpstream, unused_port
from tests.system.relays import CONTENT, RETRY, ROUTES, SECRET, running, to

pytestmark = pytest.mark.both_loops

WITH_FALLBACK: list[dict[str, Any]] = [{**ROUTES[0], "fallback": "house"}]
SENDER, RECIPIENT = "app@acme.example", "you@example.org"


def report_in(content: bytes) -> EmailMessage:
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    return message


def statuses(report: EmailMessage) -> list[dict[str, str]]:
    """The groups of the machine-readable part."""
    part = next(part for part in report.walk() if part.get_content_type() == "message/delivery-status")
    groups = part.get_payload()
    assert isinstance(groups, list)
    return [dict(group.items()) for group in groups]


# -- fallback --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["down", "refuses the login", "no trust", "421 at the end", "hangs up at DATA", "offers no SMTPUTF8"])
async def test_the_fallback_takes_over_and_the_primary_recovers(
    tmp_path: Path, tls: Authority, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "_LOGIN", breaker._LOGIN._replace(first=1.0))
    without = ("SMTPUTF8",) if fault == "offers no SMTPUTF8" else ()
    primary = ScriptedUpstream(users={"acme": SECRET}, without=without, security="tls", tls=tls.server)
    async with primary, ScriptedUpstream() as house:
        wrong = tls.stranger().ca_file if fault == "no trust" else tls.ca_file
        keys: dict[str, Any] = {"security": "tls", "ca_file": str(wrong), "username": "acme", "password": SECRET}
        match fault:
            case "down":
                await primary.stop()
            case "refuses the login":
                primary.script("auth", b"535 5.7.8 No")
            case "421 at the end":
                primary.script("final", b"421 4.3.2 Shutting down")
            case "hangs up at DATA":
                primary.script("data", Close())
        recipient = "bücher@example.org" if without else RECIPIENT
        upstreams = {"acme": to(primary, **keys), "house": to(house)}
        async with running(tmp_path, upstreams=upstreams, routes=WITH_FALLBACK) as relay:
            for _ in range(3):
                await relay.send(SENDER, [recipient], parameters="SMTPUTF8" if without else "")
            await house.received(3)
            await relay.empty()
            (degraded,) = relay.events("degraded")
            assert (degraded["route"], degraded["upstream"], degraded["fallback"]) == ("acme", "acme", "house")
            assert primary.accepted == []
            if fault == "refuses the login":
                assert len(primary.logins) == 1, "a provider that is asked again and again locks the account"
            if fault == "no trust":
                return
            primary.heal()
            if fault == "down":
                await primary.start()

            async def recovered() -> list[dict[str, Any]]:
                await relay.send(SENDER, [RECIPIENT])
                return relay.events("recovered")

            (event,) = await eventually(recovered, "mail at the primary again")
            assert (event["route"], event["upstream"]) == ("acme", "acme")
            assert Counter(e["event"] for e in relay.events("degraded", "recovered")) == {"degraded": 1, "recovered": 1}


async def test_a_refused_login_is_tried_once_and_told_without_the_secret(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"acme": "another"}) as primary, ScriptedUpstream() as house:
        upstreams = {"acme": to(primary, username="acme", password=SECRET), "house": to(house)}
        async with running(tmp_path, upstreams=upstreams, routes=WITH_FALLBACK) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await house.received(1)
            (event,) = await relay.event("auth-failed")
            assert (event["upstream"], event["user"], event["reply"]) == ("acme", "acme", "535 5.7.8 Wrong user or password")
    assert len(primary.logins) == 1


async def test_a_fallback_rewrites_on_top_of_the_route(tmp_path: Path) -> None:
    over = {
        "from": "Acme via House <no-reply@house.example>",
        "reply_to": "original",
        "envelope_sender": "bounces@house.example",
        "subject_prefix": None,
    }
    routes = [{**ROUTES[0], "rewrite": {"subject_prefix": "[acme] "}, "fallback": [{"upstream": "house", "rewrite": over}]}]
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        acme.script("data", b"421 4.3.2 down", times=1)
        upstreams = {"acme": to(acme), "house": to(house, senders=["house.example"])}
        async with running(tmp_path, upstreams=upstreams, routes=routes) as relay:
            await relay.send(SENDER, [RECIPIENT])
            (there,) = await house.received(1)
            await relay.send(SENDER, [RECIPIENT])
            (here,) = await acme.received(1)
    assert (there.sender, here.sender) == ("bounces@house.example", SENDER)
    for line in (b"From: Acme via House <no-reply@house.example>", b"Reply-To: App <app@acme.example>", b"Subject: hi"):
        assert b"\r\n" + line + b"\r\n" in there.content
    assert b"\r\nFrom: App <app@acme.example>\r\n" in here.content
    assert b"\r\nSubject: [acme] hi\r\n" in here.content


async def test_fallbacks_are_tried_in_their_order_and_then_the_first_again(tmp_path: Path) -> None:
    async with ScriptedUpstream() as primary, ScriptedUpstream() as second, ScriptedUpstream() as third:
        for server in (primary, second, third):
            server.script("greeting", b"421 4.3.2 down", times=1)
        upstreams = {"acme": to(primary), "second": to(second), "third": to(third)}
        async with running(tmp_path, upstreams=upstreams, routes=[{**ROUTES[0], "fallback": ["second", "third"]}]) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await primary.received(1)
            await relay.empty()
            assert [(e["upstream"], e["attempt"]) for e in relay.events("deferred", "sent")] == [
                ("acme", 1),
                ("second", 1),
                ("third", 1),
                ("acme", 2),
            ]
            assert [e["event"] for e in relay.events("degraded", "recovered")] == ["degraded", "recovered"]


@pytest.mark.parametrize("reply", [b"450 4.2.0 greylisted", b"452 4.2.2 mailbox full"])
async def test_a_recipient_who_is_deferred_waits_for_the_primary(tmp_path: Path, reply: bytes) -> None:
    async with ScriptedUpstream() as primary, ScriptedUpstream() as house:
        primary.script("rcpt", reply, times=2)
        async with running(tmp_path, upstreams={"acme": to(primary), "house": to(house)}, routes=WITH_FALLBACK) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await primary.received(1)
            await relay.empty()
            assert [(e["event"], e["attempt"]) for e in relay.events("deferred", "sent")] == [("deferred", 1), ("deferred", 2), ("sent", 3)]
    assert house.connections == []


async def test_throttling_waits_without_a_fallback_and_without_counting(tmp_path: Path) -> None:
    async with ScriptedUpstream() as primary, ScriptedUpstream() as house:
        primary.script("mail", b"421 4.7.0 Too fast", times=2)
        async with running(tmp_path, upstreams={"acme": to(primary), "house": to(house)}, routes=WITH_FALLBACK) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await primary.received(1)
            await relay.empty()
            assert [(e["event"], e.get("attempt")) for e in relay.events("deferred", "throttled", "sent")] == [
                ("throttled", None),
                ("deferred", 1),
                ("throttled", None),
                ("deferred", 1),
                ("sent", 1),
            ]
            assert relay.events("degraded") == []
    assert house.connections == []


# -- doubt -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Close(), Reset(), Hang(), b"nonsense"], ids=str)
async def test_what_is_in_doubt_goes_to_the_same_upstream_again_and_never_to_the_fallback(tmp_path: Path, action: Any) -> None:
    async with ScriptedUpstream() as primary, ScriptedUpstream() as house:
        primary.script("final", action, times=1)
        primary.script("greeting", b"421 4.3.2 down", connection=2)
        primary.script("greeting", b"421 4.3.2 down", connection=3)
        keys = {"timeouts": {"final": "200ms"}}
        async with running(tmp_path, upstreams={"acme": to(primary, **keys), "house": to(house)}, routes=WITH_FALLBACK) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await primary.received(1)
            await relay.empty()
            assert [e.get("in_doubt") for e in relay.events("deferred")] == ["yes"] * 3
            assert relay.events("degraded") == []
    assert house.connections == []
    first, second = primary.transactions
    assert first.content == second.content
    assert first.content.count(b"Message-ID:") == 1


async def test_a_relay_that_is_stopped_in_the_middle_goes_on_at_the_same_upstream(tmp_path: Path) -> None:
    async with ScriptedUpstream() as primary, ScriptedUpstream() as house:
        primary.script("final", Hang(), times=1)
        setup: dict[str, Any] = {"upstreams": {"acme": to(primary), "house": to(house)}, "routes": WITH_FALLBACK}
        async with running(tmp_path, **setup, shutdown_timeout="100ms") as relay:
            await relay.send(SENDER, [RECIPIENT])
            await eventually(lambda: any(t.complete for t in primary.transactions), "the content at the upstream")
        assert [queued.state for queued in relay.queue()] == ["active"]
        primary.script("greeting", b"421 4.3.2 down", times=1)
        async with running(tmp_path, **setup) as relay:
            await primary.received(1)
            await relay.empty()
            assert [(e["upstream"], e.get("in_doubt")) for e in relay.events("deferred")] == [("acme", "yes")]
        assert house.connections == []


async def test_stopping_waits_for_what_is_under_way(tmp_path: Path) -> None:
    async with ScriptedUpstream() as server:
        hold = asyncio.Event()
        server.script("final", Hold(hold))
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await eventually(lambda: any(t.complete for t in server.transactions), "the content at the upstream")
            asyncio.get_running_loop().call_later(0.1, hold.set)
        assert relay.queue() == []
        assert [e["event"] for e in relay.events("draining", "sent", "stopped")] == ["draining", "sent", "stopped"]
        assert server.open_connections == 0


# -- retry, expiry, bounce -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script_phase", ["mail", "data", "final"])
async def test_a_temporary_refusal_is_retried_with_the_same_bytes(tmp_path: Path, script_phase: Any) -> None:
    async with ScriptedUpstream() as server:
        server.script(script_phase, b"451 4.3.0 later", times=2)
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            await relay.send(SENDER, [RECIPIENT], b"Subject: no id and no date\r\n\r\nx\r\n")
            await server.received(1)
            await relay.empty()
            assert [(e["event"], e["attempt"], e["reply"][:3]) for e in relay.events("deferred", "sent")] == [
                ("deferred", 1, "451"),
                ("deferred", 2, "451"),
                ("sent", 3, "250"),
            ]
            assert [entry.status for entry in relay.results()] == ["deferred", "deferred", "sent"]
    contents = {t.content for t in server.transactions if t.complete}
    assert len(contents) == 1


async def test_a_refused_message_comes_back_to_its_sender_through_his_own_upstream(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"a": SECRET}) as acme, ScriptedUpstream(users={"g": SECRET}) as globex:
        acme.script("rcpt", b"550 5.1.1 Nobody of that name\r\n", recipient=RECIPIENT)
        upstreams = {
            "acme": to(acme, username="a", password=SECRET, senders=["acme.example"]),
            "globex": to(globex, username="g", password=SECRET, senders=["globex.example"]),
        }
        async with running(tmp_path, upstreams=upstreams) as relay:
            reply = await relay.send(SENDER, [RECIPIENT], b"Bcc: hidden@example.org\r\n" + CONTENT)
            (transaction,) = await acme.received(1)
            await relay.empty()
            (bounced,) = relay.events("bounced")
    assert globex.connections == []
    assert (transaction.sender, transaction.recipients, transaction.user) == ("", [SENDER], "a")
    message_id = reply.text.split()[-1]
    report = report_in(transaction.content)
    assert report["From"] == "Mail Delivery System <MAILER-DAEMON@acme.example>"
    assert report["To"] == "app@acme.example"
    assert report["Auto-Submitted"] == "auto-replied"
    about_message, about_recipient = statuses(report)
    assert about_message["Reporting-MTA"] == "dns; relay.example.net"
    assert about_message["X-Queue-ID"] == message_id == bounced["id"]
    assert about_recipient["Final-Recipient"] == "rfc822;you@example.org"
    assert (about_recipient["Action"], about_recipient["Status"]) == ("failed", "5.1.1")
    assert about_recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 Nobody of that name"
    shown = next(part for part in report.walk() if part.get_content_type() == "text/rfc822-headers").get_content()
    assert "Subject: hi" in shown
    assert "hidden@example.org" not in shown


@pytest.mark.parametrize(("sender", "from_"), [("", "app@acme.example"), (SENDER, "app@acme.example")])
async def test_a_refused_bounce_ends_in_the_log(tmp_path: Path, sender: str, from_: str) -> None:
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"550 5.1.1 nobody")
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            await relay.send(sender, [RECIPIENT], CONTENT.replace(b"app@acme.example", from_.encode()))
            await relay.empty()
            await eventually(lambda: any(e["status"] == "failed, nobody told" for e in relay.events("failed")), "the last word")
            assert len(relay.events("bounced")) == (1 if sender else 0)
    assert server.accepted == []


async def test_each_of_many_recipients_has_a_fate_of_its_own(tmp_path: Path) -> None:
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"550 5.1.1 nobody", recipient="gone@example.org")
        server.script("rcpt", b"550 5.7.1 not wanted", recipient="angry@example.org")
        server.script("rcpt", b"450 4.2.0 later", recipient="busy@example.org", times=1)
        recipients = ["here@example.org", "gone@example.org", "busy@example.org", "angry@example.org", "there@example.org"]
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1]) as relay:
            await relay.send(SENDER, recipients)
            await server.received(3)
            await relay.empty()
            fates = {(entry.recipient, entry.status) for entry in relay.results()}
    assert fates == {
        ("here@example.org", "sent"),
        ("there@example.org", "sent"),
        ("gone@example.org", "failed"),
        ("angry@example.org", "failed"),
        ("busy@example.org", "deferred"),
        ("busy@example.org", "sent"),
        (SENDER, "sent"),
    }
    delivered = Counter(recipient for t in server.accepted for recipient in t.recipients)
    assert delivered == {"here@example.org": 1, "there@example.org": 1, "busy@example.org": 1, SENDER: 1}
    (report,) = [report_in(t.content) for t in server.accepted if not t.sender]
    assert [group["Final-Recipient"] for group in statuses(report)[1:]] == ["rfc822;gone@example.org", "rfc822;angry@example.org"]


async def test_what_expires_comes_back_with_its_last_reply(tmp_path: Path) -> None:
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"450 4.2.0 Mailbox busy", recipient=RECIPIENT)
        retry = {"first": "50ms", "max": "50ms", "expire": "250ms"}
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1], retry=retry) as relay:
            await relay.send(SENDER, [RECIPIENT])
            (transaction,) = await server.received(1)
            await relay.empty()
            attempts = len(relay.events("deferred"))
    assert 2 <= attempts <= 6
    (group,) = statuses(report_in(transaction.content))[1:]
    assert (group["Status"], group["Diagnostic-Code"]) == ("4.4.7", "smtp; 450 4.2.0 Mailbox busy")


async def test_a_bounce_is_not_rewritten_like_the_tenants_own_mail(tmp_path: Path) -> None:
    rewrite = {
        "from": "Acme <no-reply@acme.example>",
        "subject_prefix": "[acme] ",
        "bcc": "archive@acme.example",
        "envelope_sender": "b@acme.example",
    }
    async with ScriptedUpstream() as server:
        server.script("rcpt", b"550 5.1.1 nobody", recipient=RECIPIENT)
        server.script("rcpt", b"550 5.1.1 nobody", recipient="archive@acme.example")
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=[{**ROUTES[0], "rewrite": rewrite}]) as relay:
            await relay.send(SENDER, [RECIPIENT])
            (transaction,) = await server.received(1)
            await relay.empty()
    assert (transaction.sender, transaction.recipients) == ("", [SENDER])
    report = report_in(transaction.content)
    assert report["From"] == "Mail Delivery System <MAILER-DAEMON@acme.example>"
    assert report["Subject"] == "Undelivered Mail Returned to Sender"
    assert [group["Final-Recipient"] for group in statuses(report)[1:]] == ["rfc822;you@example.org"]


# -- bulkheads -------------------------------------------------------------------------------------------------------------


async def test_an_upstream_that_hangs_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    async with ScriptedUpstream() as acme, ScriptedUpstream() as globex:
        acme.script("final", Hang())
        upstreams = {"acme": to(acme, limits={"connections": 2}), "globex": to(globex)}
        async with running(tmp_path, upstreams=upstreams, shutdown_timeout="50ms") as relay:
            for _ in range(20):
                await relay.send(SENDER, [RECIPIENT])
            for _ in range(20):
                await relay.send("app@globex.example", [RECIPIENT], CONTENT.replace(b"acme", b"globex"))
            await globex.received(20)
            assert len(acme.connections) == 2
        assert len(relay.queue()) == 20


async def test_an_upstream_that_is_down_sees_no_storm_and_everything_comes_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)
    port = unused_port()
    async with ScriptedUpstream(port=port) as server:
        await server.stop()
        retry = {**RETRY, "first": "200ms", "max": "400ms"}
        async with running(tmp_path, upstreams={"acme": to(server, limits={"connections": 3})}, routes=ROUTES[:1], retry=retry) as relay:
            for number in range(30):
                await relay.send(SENDER, [f"{number}@example.org"])
            await relay.event("deferred", count=30)
            await server.start()
            await server.received(30)
            await relay.empty()
            tries = Counter(e["id"] for e in relay.events("deferred"))
            assert max(tries.values()) <= 6
    assert Counter(t.recipients[0] for t in server.accepted) == {f"{number}@example.org": 1 for number in range(30)}
    assert len(server.connections) <= 3
