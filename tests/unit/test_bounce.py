"""Reports: complete, readable by programs, and only where somebody may be told."""

import email
import email.policy
import quopri
from dataclasses import replace
from email.message import EmailMessage

import pytest

from relay.mail.bounce import About, Action, Bounce, Notice, make_bounce
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply

CREATED = 1_800_000_000.0
REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "No such user"))
BOB = Recipient("bob@example.org")


def message(*failed: tuple[Recipient, Outcome], sender: str = "app@acme.example", header: bytes = b"From: app@acme.example\r\n") -> About:
    return report(*(Notice(recipient, outcome, Action.FAILED) for recipient, outcome in failed), sender=sender, header=header)


def report(*notices: Notice, sender: str = "app@acme.example", header: bytes = b"From: app@acme.example\r\n", ret: str = "") -> About:
    envelope = Envelope(sender, tuple(notice.recipient for notice in notices), ret=ret)
    return About("0123456789abc", envelope, notices, header, CREATED, CREATED + 345_600, "acme", "mx.acme.example")


def bounce_of(about: About, *, now: float = CREATED + 60) -> Bounce | None:
    return make_bounce(about, reporting_mta="relay.example.net", bounce_id="0123456789abd", now=now)


def parsed(about: About, *, now: float = CREATED + 60) -> tuple[EmailMessage, str, list[dict[str, str]], bytes]:
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
    assert (bounce.recipient, bounce.told) == ("app@acme.example", (Notice(BOB, REFUSED, Action.FAILED),))
    report, *_ = parsed(message((BOB, REFUSED)))
    assert " ".join(report["Received"].split()) == "by relay.example.net id 0123456789abd; Fri, 15 Jan 2027 08:01:00 +0000"
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
        "Last-Attempt-Date": "Fri, 15 Jan 2027 08:01:00 +0000",
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
    assert [notice.recipient.address for notice in both.told] == (["bob@example.org"] if told else []) + ["carol@example.org"]
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


# -- other fates than failure ----------------------------------------------------------------------------------------------

LATER = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "Mailbox is busy"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.TIMEOUT, "no connection within 30 s")
TAKEN = outcome_of_reply(Phase.FINAL, Reply(250, "2.6.0", "Queued as 4711"))


def test_a_delay_is_told_in_words_of_its_own() -> None:
    about = report(Notice(BOB, LATER, Action.DELAYED))
    whole, words, (_, recipient), _ = parsed(about, now=CREATED + 4 * 3600)
    assert whole["Subject"] == "Delayed Mail, Still Being Tried"
    for part in ("You need do nothing", "Tue, 19 Jan 2027 08:00:00 +0000", "Not delivered yet after 4 hours", "450 4.2.1 Mailbox is busy"):
        assert part in " ".join(words.split())
    assert "will not try again" not in words
    assert (recipient["Action"], recipient["Status"]) == ("delayed", "4.2.1")
    assert recipient["Will-Retry-Until"] == "Tue, 19 Jan 2027 08:00:00 +0000"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (LATER, "4.2.1"),
        (outcome_of_reply(Phase.MAIL, Reply(451, "", "later")), "4.0.0"),
        (DOWN, "4.4.1"),
        (outcome_of_failure(Phase.TLS, Failure.UNTRUSTED, "wrong name"), "4.4.2"),
        (outcome_of_failure(Phase.FINAL, Failure.CLOSED, "lost"), "4.4.2"),
    ],
)
def test_the_status_of_a_delay_says_as_much_as_is_known(outcome: Outcome, status: str) -> None:
    _, _, (_, recipient), _ = parsed(report(Notice(BOB, outcome, Action.DELAYED)))
    assert recipient["Status"] == status


@pytest.mark.parametrize(("outcome", "status"), [(TAKEN, "2.6.0"), (outcome_of_reply(Phase.FINAL, Reply(250, "", "ok")), "2.0.0")])
def test_who_is_handed_on_without_a_promise_is_told_so(outcome: Outcome, status: str) -> None:
    whole, words, (_, recipient), shown = parsed(report(Notice(BOB._replace(notify="SUCCESS"), outcome, Action.RELAYED), ret="FULL"))
    assert whole["Subject"] == "Mail Handed On"
    said = " ".join(words.split())
    assert "does not promise reports" in said and f"Taken by the upstream acme, which said: {outcome.reply}" in said
    assert (recipient["Action"], recipient["Status"], recipient["Remote-MTA"]) == ("relayed", status, "dns; mx.acme.example")
    assert shown == b"From: app@acme.example\r\n"


@pytest.mark.parametrize(("action", "asked"), [(Action.FAILED, "FAILURE"), (Action.DELAYED, "DELAY"), (Action.RELAYED, "SUCCESS")])
@pytest.mark.parametrize("notify", ["", "NEVER", "SUCCESS", "FAILURE", "DELAY", "SUCCESS,FAILURE,DELAY"])
def test_only_what_was_asked_for_is_told(notify: str, action: Action, asked: str) -> None:
    told = bounce_of(report(Notice(BOB._replace(notify=notify), LATER, action))) is not None
    assert told == (asked in notify or (not notify and action is not Action.RELAYED))


def test_one_report_tells_each_recipient_his_own_fate_and_the_worst_is_its_subject() -> None:
    about = report(
        Notice(Recipient("a@example.org", notify="SUCCESS"), TAKEN, Action.RELAYED),
        Notice(Recipient("b@example.org"), DOWN, Action.DELAYED),
        Notice(Recipient("c@example.org"), REFUSED, Action.FAILED),
        Notice(Recipient("d@example.org"), DOWN, Action.DELAYED),
    )
    whole, words, groups, _ = parsed(about)
    assert whole["Subject"] == "Undelivered Mail Returned to Sender"
    assert [(group["Final-Recipient"][7:8], group["Action"]) for group in groups[1:]] == [
        ("a", "relayed"), ("b", "delayed"), ("c", "failed"), ("d", "delayed"),
    ]  # fmt: skip
    places = [words.index(f"<{name}@example.org>") for name in "cbda"]
    assert places == sorted(places)
    assert "deliver it to these recipients yet" in " ".join(words.split())
    assert [group.get("Will-Retry-Until", "") != "" for group in groups[1:]] == [False, True, False, True]


def test_what_was_given_up_without_an_attempt_says_why() -> None:
    about = report(Notice(BOB, DOWN, Action.FAILED), Notice(Recipient("carol@example.org", in_doubt=True), DOWN, Action.FAILED))
    _, words, (_, bob, carol), _ = parsed(replace(about, given_up="the operator\r\nsays: wrong list"))
    assert "Not tried any more: the operator says: wrong list" in words
    assert "no connection" not in words and "Delivery unconfirmed" in words
    assert bob["Diagnostic-Code"] == "x-relay; the operator says: wrong list"
    assert "Remote-MTA" not in bob and "Last-Attempt-Date" not in bob
    assert (bob["Status"], carol["X-Delivery"]) == ("4.4.7", "unconfirmed")


def test_a_reason_that_is_missing_is_called_so() -> None:
    silent = Outcome(REFUSED.status, REFUSED.scope, Phase.RCPT, Reply(0, "", ""))
    _, words, (_, recipient), _ = parsed(message((BOB, silent)))
    assert "no reason was given" in words and recipient["Diagnostic-Code"] == "x-relay; no reason was given"


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("mx.acme.example", "dns; mx.acme.example"),
        ("192.0.2.1", "dns; [192.0.2.1]"),
        ("2001:db8::1", "dns; [IPv6:2001:db8::1]"),
        ("", None),
    ],
)
def test_the_upstream_is_named_by_its_host(host: str, shown: str | None) -> None:
    _, _, (_, recipient), _ = parsed(replace(message((BOB, REFUSED)), remote_mta=host))
    assert recipient.get("Remote-MTA") == shown


# -- the whole message -----------------------------------------------------------------------------------------------------

LACKING = outcome_of_failure(Phase.MAIL, Failure.LACKING, "the upstream does not offer 8BITMIME")


def returned(header: bytes, rest: bytes | None, *notices: Notice) -> tuple[Bounce, EmailMessage, str]:
    """The report with RET=FULL, the part with the original, and the words."""
    about = replace(report(*notices or (Notice(BOB, REFUSED, Action.FAILED),), header=header, ret="FULL"), rest=rest)
    bounce = bounce_of(about)
    assert bounce is not None
    assert max(map(len, bounce.content.split(b"\r\n"))) <= 998 and b"\x00" not in bounce.content
    whole = email.message_from_bytes(bounce.content, policy=email.policy.default)
    assert isinstance(whole, EmailMessage)
    words, _, original = whole.iter_parts()
    assert (whole["Content-Transfer-Encoding"] == "8bit") == (not bounce.content.isascii())
    return bounce, original, " ".join(words.get_content().split())


def test_the_whole_message_comes_back_when_it_was_asked_for() -> None:
    bounce, original, words = returned(b"Subject: hi\r\nBcc: secret@b.c\r\n", b"\r\nhello\r\n.\r\n--=_0123456789abd--\r\n")
    assert original.get_content_type() == "message/rfc822"
    assert b"Subject: hi\r\n\r\nhello\r\n.\r\n--=_0123456789abd--\r\n" in bounce.content
    assert b"secret" not in bounce.content
    assert "Your message is attached." in words


def test_a_whole_message_with_octets_above_127_comes_back_as_it_was() -> None:
    bounce, original, _ = returned(b"Subject: hi\r\n", b"\r\ngr\xfc\xdfe\r\n")
    assert (original.get_content_type(), original["Content-Transfer-Encoding"]) == ("message/rfc822", "8bit")
    assert b"\r\n\r\ngr\xfc\xdfe\r\n" in bounce.content


@pytest.mark.parametrize(
    ("header", "rest", "outcome"),
    [
        ("Subject: größe\r\n".encode(), b"\r\nhello\r\n", REFUSED),
        (b"Subject: hi\r\n", b"\r\n" + b"x" * 999 + b"\r\n", REFUSED),
        (b"Subject: hi\r\n", b"\r\na\x00b\r\n", REFUSED),
        (b"Subject: hi\r\n", b"\r\ngr\xfc\xdfe\r\n", LACKING),
        (b"Subject: \xfc\r\n", b"\r\nhello\r\n", REFUSED),
    ],
)
def test_a_whole_message_that_not_every_server_takes_comes_back_encoded(header: bytes, rest: bytes, outcome: Outcome) -> None:
    bounce, original, words = returned(header, rest, Notice(BOB, outcome, Action.FAILED))
    assert bounce.content.isascii()
    assert (original.get_content_type(), original["Content-Transfer-Encoding"]) == ("message/global", "quoted-printable")
    encoded = bounce.content.split(b"quoted-printable\r\n\r\n")[-1].split(b"\r\n--=_")[0]
    assert quopri.decodestring(encoded).replace(b"\r\n", b"\n").rstrip(b"\n") == (header + rest).replace(b"\r\n", b"\n").rstrip(b"\n")
    assert "Your message is attached." in words


def test_a_message_that_is_not_at_hand_comes_back_as_its_header_and_says_why() -> None:
    _, original, words = returned(b"Subject: hi\r\n", None)
    assert original.get_content_type() == "text/rfc822-headers"
    assert "The header of your message is attached; the whole of it is too large to be returned." in words


def test_a_delay_brings_no_more_than_the_header() -> None:
    _, original, words = returned(b"Subject: hi\r\n", b"\r\nhello\r\n", Notice(BOB, LATER, Action.DELAYED))
    assert original.get_content_type() == "text/rfc822-headers"
    assert words.endswith("The header of your message is attached.")


@pytest.mark.parametrize(
    ("sender", "recipient"),
    [
        ("app@bücher.example", "app@xn--bcher-kva.example"),
        ("jürgen@bücher.example", "jürgen@bücher.example"),
        ("App@Acme.example", "App@Acme.example"),
    ],
)
def test_a_report_goes_in_ascii_where_the_sender_can_be_reached_so(sender: str, recipient: str) -> None:
    bounce = bounce_of(message((BOB, REFUSED), sender=sender))
    assert bounce is not None and bounce.recipient == recipient
    assert f"To: <{recipient}>\r\n".encode() in bounce.content
    assert bounce.content.isascii() == recipient.isascii()
