"""Reports from end to end: what a client asks to be told goes to the upstream that promises it, and is honoured by the relay otherwise."""

import email
import email.policy
from collections import Counter
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually
from tests.support.record import Transaction
from tests.support.upstream import ScriptedUpstream, unused_port
from tests.system.relays import CONTENT, ROUTES, Running, running, to

pytestmark = pytest.mark.both_loops

ACME = ROUTES[:1]
SENDER = "app@acme.example"
DAYS = {"first": "50ms", "max": "100ms", "expire": "1h"}


async def send(relay: Running, *recipients: str, parameters: str = "", content: bytes = CONTENT, sender: str = SENDER) -> None:
    """One message; `recipients` are what follows `RCPT TO:`."""
    async with relay.client() as client:
        await client.greet()
        assert "DSN" in client.extensions
        await client.command(f"MAIL FROM:<{sender}> {parameters}".rstrip(), 250)
        for recipient in recipients:
            await client.command(f"RCPT TO:{recipient}", 250)
        await client.command("DATA", 354)
        await client.send(content + b".\r\n")
        await client.expect(250)
        await client.quit()


def report_in(transaction: Transaction) -> EmailMessage:
    message = email.message_from_bytes(transaction.content, policy=email.policy.default)
    assert isinstance(message, EmailMessage) and message.get_content_type() == "multipart/report"
    assert transaction.sender == ""
    return message


def groups(report: EmailMessage) -> list[dict[str, str]]:
    """The machine-readable part."""
    (part,) = [part for part in report.iter_parts() if part.get_content_type() == "message/delivery-status"]
    return [dict(group.items()) for group in part.get_payload()]  # type: ignore[union-attr]


async def test_wishes_go_to_an_upstream_that_promises_them_and_no_report_is_made(tmp_path: Path) -> None:
    async with ScriptedUpstream(offers=["DSN"]) as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME) as relay:
        await send(relay, "<a@example.org> NOTIFY=success,failure ORCPT=rfc822;A@example.org", parameters="RET=FULL ENVID=order+2B7")
        (transaction,) = await acme.received(1)
        assert {"RET=FULL", "ENVID=order+2B7"} <= set(transaction.parameters)
        assert set(transaction.recipient_parameters["a@example.org"]) == {"NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;A@example.org"}
        await relay.empty()
        assert relay.events("bounced") == [] and len(acme.accepted) == 1


async def test_an_alias_passes_its_name_on(tmp_path: Path) -> None:
    more = {"domain": "example.net", "aliases": {"root": "ops@example.org"}}
    async with ScriptedUpstream(offers=["DSN"]) as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME, **more) as relay:
        await send(relay, "<root>")
        (transaction,) = await acme.received(1)
        assert transaction.recipient_parameters["ops@example.org"] == ("ORCPT=rfc822;root@example.net",)


async def test_who_asks_for_success_hears_that_it_was_handed_on_where_nobody_promises_more(tmp_path: Path) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME) as relay:
        await send(relay, "<a@example.org> NOTIFY=SUCCESS", "<b@example.org>", parameters="ENVID=order+2B7 RET=FULL")
        _, reported = await acme.received(2)
        report = report_in(reported)
        whole, recipient = groups(report)
        assert (whole["Original-Envelope-Id"], recipient["Action"], recipient["Final-Recipient"]) == (
            "order+7",
            "relayed",
            "rfc822;a@example.org",
        )
        assert reported.recipients == [SENDER]
        assert [part.get_content_type() for part in report.iter_parts()][2] == "text/rfc822-headers"
        await relay.empty()
        assert len(acme.accepted) == 2


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data", "final"])
async def test_a_failure_brings_the_whole_message_back_where_that_was_asked_for(tmp_path: Path, phase: Any) -> None:
    content = CONTENT.replace(b"hello", "größe".encode()) + b"..\r\n"
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME) as relay:
        acme.script(phase, b"554 5.6.0 not like this", times=1)
        await send(relay, "<a@example.org> ORCPT=rfc822;A+2Bx@example.org", parameters="BODY=8BITMIME RET=FULL", content=content)
        (reported,) = await acme.received(1)
        report = report_in(reported)
        _, recipient = groups(report)
        assert (recipient["Action"], recipient["Original-Recipient"]) == ("failed", "rfc822;A+x@example.org")
        assert recipient["Diagnostic-Code"] == "smtp; 554 5.6.0 not like this"
        assert "BODY=8BITMIME" in reported.parameters
        original = reported.content.split(b"message/rfc822\r\n")[1]
        assert b"\r\n\r\n" + "größe".encode() + b"\r\n.\r\n" in original and original.count(b"\r\nSubject: hi\r\n") == 1
        await relay.empty()


@pytest.mark.parametrize(("notify", "reports"), [("NEVER", 0), ("SUCCESS", 0), ("DELAY", 0), ("FAILURE", 1)])
async def test_only_who_asks_for_failures_hears_of_them(tmp_path: Path, notify: str, reports: int) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME) as relay:
        acme.script("rcpt", b"550 5.1.1 nobody", recipient="a@example.org")
        await send(relay, f"<a@example.org> NOTIFY={notify}")
        await relay.event("failed")
        await relay.empty()
        assert len(acme.accepted) == len(relay.events("bounced")) == reports


async def test_a_delay_is_told_once_and_the_mail_still_arrives(tmp_path: Path) -> None:
    retry = {**DAYS, "warn_after": "200ms"}
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=ACME, retry=retry) as relay:
        acme.script("rcpt", b"450 4.2.1 later", recipient="a@example.org")
        await send(relay, "<a@example.org>", "<b@example.org> NOTIFY=FAILURE")
        _, warned = await acme.received(2)
        _, recipient = groups(report_in(warned))
        assert (recipient["Action"], recipient["Final-Recipient"], recipient["Status"]) == ("delayed", "rfc822;a@example.org", "4.2.1")
        seen = len(relay.events("deferred"))
        await relay.event("deferred", count=seen + 3)
        assert len(relay.events("bounced")) == 1
        acme.heal()
        await relay.empty()
        assert Counter(recipient for each in acme.accepted for recipient in each.recipients) == Counter(
            ["a@example.org", "b@example.org", SENDER]
        )


async def test_a_report_leaves_by_a_credential_of_single_addresses(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as acme,
        running(tmp_path, upstreams={"acme": to(acme, senders=["app@acme.example"])}, routes=ACME) as relay,
    ):
        acme.script("rcpt", b"550 5.1.1 nobody", recipient="a@example.org")
        await send(relay, "<a@example.org>")
        (reported,) = await acme.received(1)
        report = report_in(reported)
        assert (report["From"], reported.recipients) == ("Mail Delivery System <app@acme.example>", [SENDER])
        await relay.empty()


async def test_a_report_goes_back_where_the_route_is_for_other_recipients(tmp_path: Path) -> None:
    routes = [{"name": "partners", "sender": "acme.example", "recipient": "example.org", "upstream": "acme"}]
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=routes) as relay:
        acme.script("rcpt", b"550 5.1.1 nobody", recipient="a@example.org")
        await send(relay, "<a@example.org>")
        (reported,) = await acme.received(1)
        assert reported.recipients == [SENDER]
        await relay.empty()


@pytest.mark.parametrize("fallback", [False, True])
async def test_a_relay_whose_upstream_is_itself_says_so_at_once(tmp_path: Path, fallback: bool) -> None:
    port = unused_port()
    here = {"host": "127.0.0.1", "port": port, "security": "none"}
    upstreams = {"acme": {**here, "port": unused_port()}, "self": here} if fallback else {"self": here}
    route = {"name": "acme", "sender": "acme.example", **({"upstream": "acme", "fallback": "self"} if fallback else {"upstream": "self"})}
    listeners = [{"bind": f"127.0.0.1:{port}", "name": "local"}]
    async with running(tmp_path, upstreams=upstreams, routes=[route], listeners=listeners) as relay:
        await relay.send(SENDER, ["you@example.org"])
        await eventually(lambda: not relay.queue(), "an empty queue")
        refused = relay.events("refused")
        # The message, and the report of that: each comes back once and no more.
        assert [event["reply"] for event in refused] == ["554 5.4.6 Mail loop: this message is being sent from here"] * 2
        assert len(relay.events("accepted")) == 1
        assert all("a loop: " in event["what"] for event in relay.events("note") if event["level"] == "error")
        last = "a bounce is never bounced"  # the log has it a moment after the spool
        await eventually(lambda: [event["reply"] for event in relay.events("failed")][-1:] == [last], "the log's last word")


async def test_a_filter_that_hands_mail_back_while_it_is_waited_for_is_no_loop(tmp_path: Path) -> None:
    """The filter is another relay in front of its own listener: what it holds us for is the second half of the way."""
    back = unused_port()
    filtering = [{"name": "filter", "upstream": "relay", "wait": "5s"}]
    first = tmp_path / "filter"
    second = tmp_path / "relay"
    first.mkdir()
    second.mkdir()
    there = {"relay": {"host": "127.0.0.1", "port": back, "security": "none"}}
    async with (
        ScriptedUpstream() as acme,
        running(first, upstreams=there, routes=filtering, hostname="filter.example.net") as filter_,
        running(
            second,
            upstreams={"filter": {"host": filter_.host, "port": filter_.port, "security": "none"}, "acme": to(acme)},
            listeners=[{"bind": "127.0.0.1:0", "name": "local"}, {"bind": f"127.0.0.1:{back}", "name": "filtered"}],
            routes=[{"name": "clean", "listener": "filtered", "upstream": "acme"}, {"name": "all", "upstream": "filter"}],
        ) as relay,
    ):
        await relay.send(SENDER, ["you@example.org"])
        (transaction,) = await acme.received(1)
        assert transaction.content.count(b"by relay.example.net") == 2
        await relay.empty()
        assert relay.events("refused") == []
