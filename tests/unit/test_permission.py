"""Who may send for whom, fail closed."""

import pytest

from relay.config.upstreams import Upstream
from relay.mail.header import Scan, scan
from relay.mail.permission import objection, report_author, user_objection

ACME = ("acme.example",)


def found(*fields: str) -> Scan:
    return scan("".join(f"{field}\r\n" for field in fields).encode())


@pytest.mark.parametrize(
    ("senders", "envelope_sender", "fields"),
    [
        ((), "who@ever.example", ["Subject: no From at all"]),
        (ACME, "app@acme.example", ["From: app@acme.example"]),
        (ACME, "APP@ACME.Example", ["From: The App <APP@Acme.EXAMPLE>"]),
        (ACME, "", ["From: app@acme.example"]),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender: boss@acme.example"]),
        (("*.acme.example",), "app@eu.acme.example", ["From: a@b.eu.acme.example"]),
        (("app@acme.example",), "app+tag@acme.example", ["From: App@acme.example"]),
        (("acme.example", "billing@globex.example"), "app@acme.example", ["From: billing@globex.example"]),
        (("*",), "who@ever.example", ["From: some@body.example"]),
        (("xn--bcher-kva.example",), "a@bücher.example", ["From: a@xn--bcher-kva.example"]),
        (ACME, "app@acme.example", ["From: =?utf-8?q?J=C3=BCrgen?= <app@acme.example>"]),
        (ACME, "app@acme.example", ["Reply-To: x@globex.example", "From: app@acme.example"]),
    ],
)
def test_what_is_ones_own_may_go(senders: tuple[str, ...], envelope_sender: str, fields: list[str]) -> None:
    assert objection(senders, envelope_sender, found(*fields)) is None


@pytest.mark.parametrize(
    ("senders", "envelope_sender", "fields", "reason"),
    [
        (ACME, "x@globex.example", ["From: app@acme.example"], "the envelope sender x@globex.example is not one of its senders"),
        (ACME, "x@sub.acme.example", ["From: app@acme.example"], "the envelope sender"),
        (("*.acme.example",), "x@acme.example", ["From: x@a.acme.example"], "the envelope sender"),
        (("app@acme.example",), "boss@acme.example", ["From: app@acme.example"], "the envelope sender"),
        (("app+tag@acme.example",), "app@acme.example", ["From: app@acme.example"], "the envelope sender"),
        (ACME, "app@acme.example", ["From: x@globex.example"], "the From address x@globex.example is not one of its senders"),
        (ACME, "", ["From: x@globex.example"], "the From address"),
        (ACME, "app@acme.example", [], "the header From is missing"),
        (("*",), "app@acme.example", [], "the header From is missing"),
        (ACME, "app@acme.example", ["From:"], "the header From is missing"),
        (ACME, "app@acme.example", ["From: app"], "the header From is missing"),
        (ACME, "app@acme.example", ["From: app@acme.example", "From: app@acme.example"], "repeated"),
        (ACME, "app@acme.example", ["From: app@acme.example", "From\r\n : x@globex.example"], "repeated"),
        (ACME, "app@acme.example", ["From\v: x@globex.example", "From: app@acme.example"], "repeated"),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender\r\n\t\f: x@globex.example"], "the Sender address x@globex.example"),
        (ACME, "app@acme.example", ["From: app@acme.example, x@globex.example"], "not one address"),
        (ACME, "app@acme.example", ["From: <app@acme.example> x@globex.example"], "not one address"),
        (ACME, "app@acme.example", ['From: "app@acme.example" <x@globex.example>'], "x@globex.example"),
        (ACME, "app@acme.example", ["From: app@acme.example (x) <x@globex.example>"], "the "),
        (ACME, "app@acme.example", ["From: group: app@acme.example;"], "not one address"),
        (ACME, "app@acme.example", ["From: =?utf-8?q?app=40acme.example?="], "not one address"),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender: x@globex.example"], "the Sender address x@globex.example"),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender:"], "the Sender address (unreadable)"),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender: a@acme.example", "Sender: b@acme.example"], "(unreadable)"),
        (ACME, "app@acme.example", ["From: app@acme.example", "Sender: a@acme.example, b@acme.example"], "(unreadable)"),
    ],
)
def test_what_is_not_for_sure_ones_own_may_not(senders: tuple[str, ...], envelope_sender: str, fields: list[str], reason: str) -> None:
    said = objection(senders, envelope_sender, found(*fields))
    assert said is not None
    assert reason in said


@pytest.mark.parametrize("senders", [ACME, ("*",), ()])
@pytest.mark.parametrize("fields", [["From: app@acme.example"], ["From: x@globex.example"], ["From: a, b"], []])
def test_a_user_may_send_what_his_senders_name_and_a_star_names_all(senders: tuple[str, ...], fields: list[str]) -> None:
    allowed = "*" in senders or (senders == ACME and fields == ["From: app@acme.example"])
    assert (user_objection(senders, "app@acme.example", found(*fields)) is None) is allowed


def test_the_configuration_writes_senders_in_the_form_that_is_compared() -> None:
    upstream = Upstream.model_validate({"host": "h.example", "senders": ["ACME.example", "Bücher.example", "Billing@Globex.EXAMPLE"]})
    for sender in ("x@acme.EXAMPLE", "x@xn--bcher-kva.example", "x@BÜCHER.example", "BILLING@globex.example"):
        assert objection(upstream.senders, sender, found(f"From: {sender}")) is None


@pytest.mark.parametrize(
    ("senders", "sender", "author"),
    [
        ((), "app@acme.example", None),
        (ACME, "app@acme.example", None),
        (("mailer-daemon@acme.example", "x@acme.example"), "app@acme.example", None),
        (("app@acme.example",), "app@acme.example", "app@acme.example"),
        (("billing@acme.example", "app@acme.example"), "App+tag@acme.example", "App+tag@acme.example"),
        (("billing@acme.example",), "app@intern.example", "billing@acme.example"),
        (("acme.example", "billing@globex.example"), "app@intern.example", "MAILER-DAEMON@acme.example"),
        (("acme.example",), "root@[192.0.2.1]", "MAILER-DAEMON@acme.example"),
    ],
)
def test_a_report_bears_a_name_that_its_upstream_may_send_for(senders: tuple[str, ...], sender: str, author: str | None) -> None:
    assert report_author(senders, sender) == author
    assert author is None or objection(senders, "", found(f"From: Mail Delivery System <{author}>")) is None
