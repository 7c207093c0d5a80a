"""Bounces: complete, readable by programs, and only where somebody may be told."""

import email
import email.policy
from dataclasses import replace
from email.message import EmailMessage

import pytest

from relay.mail.bounce import Bounce, Undelivered, make_bounce
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply

CREATED = 1_800_000_000.0
REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "No such user"))
BOB = Recipient("bob@example.org")


def message(
    *failed: tuple[Recipient, Outcome], sender: str = "app@acme.example", header: bytes = b"From: app@acme.example\r\n"
) -> Undelivered:
    envelope = Envelope(sender, tuple(recipient for recipient, _ in failed))
    return Undelivered("0123456789abc", envelope, failed, header, CREATED, "acme", "mx.acme.example")


def bounce_of(about: Undelivered, *, now: float = CREATED + 60) -> Bounce | None:
    return make_bounce(about, reporting_mta="relay.example.net", bounce_id="0123456789abd", now=now)


def parsed(about: Undelivered, *, now: float = CREATED + 60) -> tuple[EmailMessage, str, list[dict[str, str]], bytes]:
    """The report, its words, the groups of its status part, and the header part."""
    bounce = bounce_of(about, now=now)
    assert bounce is not None
    assert b"\n" not in bounce.content.replace(b"\r\n", b"") and b"\r" not in bounce.content.replace(b"\r\n", b"")
    assert max(map(len, bounce.content.split(b"\r\n"))) <= 998
    report = email.message_from_bytes(bounce.content, policy=email.policy.default)
    assert isinstance(report, EmailMessage)
    assert report.get_content_type() == "multipart/report" and report["Content-Type"].params["report-type"] == "delivery-status"
    words, status, header = report.iter_parts()
    assert status.get_content_type() == "message/delivery-status"
    groups = [dict(group.items()) for group in status.get_payload()]
    return report, words.get_content(), groups, header.get_payload(decode=True)


def test_a_bounce_goes_to_the_sender_from_its_own_domain() -> None:
    bounce = bounce_of(message((BOB, REFUSED)))
    assert bounce is not None
    assert (bounce.recipient, bounce.recipients) == ("app@acme.example", ("bob@example.org",))
    report, *_ = parsed(message((BOB, REFUSED)))
    assert report["From"].addresses[0].addr_spec == "MAILER-DAEMON@acme.example"
    assert report["To"].addresses[0].addr_spec == "app@acme.example"
    assert report["Subject"] == "Undelivered Mail Returned to Sender"
    assert report["Auto-Submitted"] == "auto-replied"
    assert report["Message-ID"] == "<0123456789abd@relay.example.net>"
    assert report["Date"].datetime.timestamp() == CREATED + 60


def test_a_bounce_tells_programs_what_happened() -> None:
    _, _, (about, recipient), _ = parsed(message((BOB, REFUSED)))
    assert about == {
        "Reporting-MTA": "dns; relay.example.net",
        "X-Queue-ID": "0123456789abc",
        "Arrival-Date": "Fri, 15 Jan 2027 08:00:00 +0000",
    }
    assert recipient == {
        "Final-Recipient": "rfc822;bob@example.org",
        "Action": "failed",
        "Status": "5.1.1",
        "Remote-MTA": "dns; mx.acme.example",
        "Diagnostic-Code": "smtp; 550 5.1.1 No such user",
    }


def test_a_bounce_tells_people_what_happened() -> None:
    _, words, _, _ = parsed(message((BOB, REFUSED)))
    for part in ("<bob@example.org>", "Refused by the upstream acme", "550 5.1.1 No such user", "0123456789abc"):
        assert part in words
    assert "unconfirmed" not in words


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (outcome_of_reply(Phase.RCPT, Reply(550, "", "no")), "5.0.0"),
        (outcome_of_reply(Phase.FINAL, Reply(554, "5.6.0", "no")), "5.6.0"),
        (outcome_of_reply(Phase.FINAL, Reply(554, "4.6.0", "odd")), "5.0.0"),
        (outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "later")), "4.4.7"),
        (outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused"), "4.4.7"),
        (outcome_of_failure(Phase.MAIL, Failure.LACKING, "no SMTPUTF8"), "5.0.0"),
    ],
)
def test_the_status_is_the_upstreams_or_says_expired(outcome: Outcome, status: str) -> None:
    _, _, (_, recipient), _ = parsed(message((BOB, outcome)))
    assert recipient["Status"] == status


def test_an_expired_message_says_how_long_it_was_tried() -> None:
    late = outcome_of_failure(Phase.CONNECT, Failure.TIMEOUT, "no connection within 30 s")
    _, words, (_, recipient), _ = parsed(message((BOB, late)), now=CREATED + 345_600)
    assert "after 4 days" in words and "no connection within 30 s" in words
    assert recipient["Diagnostic-Code"] == "x-relay; no connection within 30 s"


@pytest.mark.parametrize(
    ("recipient", "outcome"),
    [
        (BOB._replace(in_doubt=True), REFUSED),
        (BOB, outcome_of_failure(Phase.FINAL, Failure.CLOSED, "connection lost")),
    ],
)
def test_a_message_in_doubt_is_called_unconfirmed(recipient: Recipient, outcome: Outcome) -> None:
    _, words, _, _ = parsed(message((recipient, outcome)))
    assert "Delivery unconfirmed" in words


def test_nobody_is_told_about_a_null_senders_message() -> None:
    assert bounce_of(message((BOB, REFUSED), sender="")) is None


@pytest.mark.parametrize(
    ("notify", "told"),
    [("", True), ("FAILURE", True), ("success,failure", True), ("NEVER", False), ("never", False), ("SUCCESS,DELAY", False)],
)
def test_notify_decides_who_is_spoken_of(notify: str, told: bool) -> None:
    quiet = BOB._replace(notify=notify)
    assert (bounce_of(message((quiet, REFUSED))) is not None) is told
    both = bounce_of(message((quiet, REFUSED), (Recipient("carol@example.org"), REFUSED)))
    assert both is not None
    assert both.recipients == (("bob@example.org",) if told else ()) + ("carol@example.org",)
    assert (b"bob@example.org" in both.content) is told


def test_what_the_client_gave_for_reports_comes_back() -> None:
    about = message((BOB._replace(orcpt="rfc822;Bob+2Bx@example.org"), REFUSED))
    about = replace(about, envelope=about.envelope._replace(envid="order+2B7"))
    _, _, (whole, recipient), _ = parsed(about)
    assert whole["Original-Envelope-Id"] == "order+7"
    assert recipient["Original-Recipient"] == "rfc822;Bob+x@example.org"


def test_the_header_comes_back_without_hidden_recipients() -> None:
    header = b"From: a@b.c\r\nBcc: secret@b.c\r\nSubject: hi\r\n there\r\n"
    _, _, _, shown = parsed(message((BOB, REFUSED), header=header))
    assert shown.splitlines() == [b"From: a@b.c", b"Subject: hi", b" there"]


def test_a_huge_header_is_cut_at_a_line() -> None:
    bounce = bounce_of(message((BOB, REFUSED), header=b"X-Line: " + b"x" * 90 + b"\r\n" + b"X-More: y\r\n" * 10_000))
    assert bounce is not None and 60_000 < len(bounce.content) < 70_000
    assert b"\r\nX-More: y\r\n\r\n--=_" in bounce.content


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("Subject: ü\r\n".encode(), "message/global-headers"),
        (b"Subject: \xfc\r\n", "text/rfc822-headers"),
        (b"Subject: " + b"x" * 2000 + b"\r\n", "text/rfc822-headers"),
        (b"Subject: a\rb\nc\r\n", "text/rfc822-headers"),
        (b"", "text/rfc822-headers"),
        (b"Subject: no line end", "text/rfc822-headers"),
    ],
)
def test_any_header_makes_an_ascii_report(header: bytes, kind: str) -> None:
    report, *_ = parsed(message((BOB, REFUSED), header=header))
    bounce = bounce_of(message((BOB, REFUSED), header=header))
    assert bounce is not None and bounce.content.isascii()
    assert list(report.iter_parts())[2].get_content_type() == kind


def test_an_international_recipient_is_named_in_ascii() -> None:
    about = message((Recipient("jürgen@bücher.example"), outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "Gibt's nicht: jürgen"))))
    _, words, (_, recipient), _ = parsed(about)
    assert recipient["Final-Recipient"] == r"utf-8;j\x{FC}rgen@b\x{FC}cher.example"
    assert recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 Gibt's nicht: j?rgen"
    assert "<jürgen@bücher.example>" in words and "Gibt's nicht: jürgen" in words


def test_an_upstreams_words_cannot_forge_a_field_or_a_part() -> None:
    evil = Outcome(REFUSED.status, REFUSED.scope, Phase.RCPT, Reply(550, "5.1.1", "x\r\nAction: delivered\r\n\r\n--=_0123456789abd--" * 20))
    _, words, (_, recipient), _ = parsed(message((BOB, evil)))
    assert recipient["Action"] == "failed"
    assert "Action: delivered" in words


def test_the_boundary_is_nowhere_in_the_parts() -> None:
    report, _, _, shown = parsed(message((BOB, REFUSED), header=b"A: 1\r\n--=_0123456789abd\r\nB: 2\r\n"))
    assert b"--=_0123456789abd" in shown and b"B: 2" in shown
    assert len(list(report.iter_parts())) == 3
