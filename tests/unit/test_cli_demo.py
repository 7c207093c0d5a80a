"""The demo's parts: the provider that wants TLS and a password, and the verdict on what arrived."""

import asyncio
import smtplib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from relay.cli.demo_certificates import Authority
from relay.cli.demo_report import Ink, Report
from relay.cli.demo_scene import LETTERS
from relay.cli.demo_upstream import Arrival, DemoUpstream

Security = Literal["starttls", "tls"]


@dataclass
class Provider:
    upstream: DemoUpstream
    trust: ssl.SSLContext
    port: int
    arrivals: list[Arrival] = field(default_factory=list)

    def session(self) -> smtplib.SMTP:
        """A session under TLS, whichever way."""
        if self.upstream.security == "tls":
            return smtplib.SMTP_SSL("127.0.0.1", self.port, context=self.trust, timeout=10)
        app = smtplib.SMTP("127.0.0.1", self.port, timeout=10)
        app.starttls(context=self.trust)
        return app


@pytest.fixture(params=["starttls", "tls"])
async def provider(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Provider]:
    authority, arrivals = Authority(tmp_path), list[Arrival]()
    upstream = DemoUpstream(
        "acme", authority.server("acme"), security=request.param, username="app", password="right", arrived=arrivals.append
    )
    port = await upstream.open()
    yield Provider(upstream, ssl.create_default_context(cafile=authority.ca_file), port, arrivals)
    await upstream.close()


async def in_thread(provider: Provider, work: Callable[[smtplib.SMTP], object]) -> None:
    def session() -> None:
        with provider.session() as app:
            work(app)

    await asyncio.to_thread(session)


async def test_a_provider_takes_mail_over_verified_tls_from_who_has_the_password(provider: Provider) -> None:
    content = "Subject: hi\r\n\r\n.a line with a dot\r\nand one more\r\n"

    def work(app: smtplib.SMTP) -> None:
        app.login("app", "right")
        app.sendmail("me@acme.example", ["a@x.example", "b@x.example"], content)
        app.sendmail("me@acme.example", ["c@x.example"], content)

    await in_thread(provider, work)
    first, second = provider.arrivals
    expected = ("acme", "TLSv1.3", "app", "me@acme.example", ("a@x.example", "b@x.example"), content.encode())
    assert first == Arrival(*expected)
    assert second.recipients == ("c@x.example",)


@pytest.mark.parametrize(("user", "password"), [("app", "wrong"), ("other", "right")])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_a_provider_refuses_a_wrong_login(provider: Provider, user: str, password: str, mechanism: str) -> None:
    def work(app: smtplib.SMTP) -> None:
        app.ehlo()
        app.esmtp_features["auth"] = mechanism
        with pytest.raises(smtplib.SMTPAuthenticationError):
            app.login(user, password)
        assert app.mail("me@acme.example")[0] == 530

    await in_thread(provider, work)
    assert not provider.arrivals


@pytest.mark.parametrize("provider", ["starttls"], indirect=True)
async def test_a_provider_offers_no_login_before_tls(provider: Provider) -> None:
    def work() -> None:
        with smtplib.SMTP("127.0.0.1", provider.port, timeout=10) as app:
            app.ehlo()
            assert not app.has_extn("auth")
            assert app.docmd("AUTH", "PLAIN AGFwcAByaWdodA==")[0] == 530
            assert app.mail("me@acme.example")[0] == 530

    await asyncio.to_thread(work)


ACME = LETTERS[0]
ARRIVED = Arrival("acme", "TLSv1.3", "relay@acme.example", "billing@acme.example", ("anna@customer.example",), b"")


@pytest.mark.parametrize(
    ("change", "final_from", "well"),
    [
        ({}, ACME.final_from, True),
        ({"upstream": "house"}, ACME.final_from, False),
        ({"login": "apikey"}, ACME.final_from, False),
        ({"tls": ""}, ACME.final_from, False),
        ({"recipients": ("else@customer.example",)}, ACME.final_from, False),
        ({}, ACME.author, False),
    ],
)
def test_a_letter_is_judged_by_upstream_login_tls_recipient_and_from(change: dict[str, object], final_from: str, well: bool) -> None:
    assert ACME.arrived_well(ARRIVED._replace(**change), final_from) is well


def test_a_block_is_printed_when_provider_and_relay_both_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"acme": 1}, Ink(coloured=False))
    sent = {"event": "sent", "id": "ABC1", "sender": "billing@acme.example", "recipients": "anna@customer.example"}
    sent |= {"route": "acme", "upstream": "acme", "reply": "250 ok", "delay": "0.020"}
    assert report.note(sent) == ""
    report.expect("ABC1", ACME)
    report.arrived(ARRIVED._replace(content=f"Received: from x\r\n\tby y with ESMTP id ABC1;\r\nFrom: {ACME.final_from}\r\n\r\n".encode()))
    assert report.note(sent) == "ABC1"
    assert report.verdicts == {"ABC1": True}
    assert "20 ms after it came in: 250 ok" in capsys.readouterr().out


def test_colours_are_for_terminals() -> None:
    assert Ink(coloured=False)("red", "x") == "x"
    assert Ink(coloured=True)("red", "x") == "\x1b[31mx\x1b[0m"
