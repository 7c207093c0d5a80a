"""A provider's own words at a real socket: wherever they are said they are read by its rows, and the mail goes where they send it."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.upstream import Phase as ScriptPhase
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import ROUTES, running, to
from tests.system.upstreams import RECIPIENT, all_sent, outgoing, pool_to, settings, words

USERS = {"apikey": "secret-of-acme"}
LOGIN = {"username": "apikey", "password": "secret-of-acme"}

PLAYED: list[tuple[str, ScriptPhase, bytes, str]] = [
    ("google", "auth", b"534-5.7.9 Application-specific password required.\r\n534 5.7.9 x - gsmtp", "deferred credential auth fallback"),
    ("google-relay", "rcpt", b"450 4.2.1 Peak SMTP relay limit exceeded for customer.", "deferred upstream rcpt throttled"),
    ("google-relay", "rcpt", b"550-5.7.0 Mail relay denied [192.0.2.1].\r\n550 5.7.0 x", "deferred credential rcpt fallback"),
    ("microsoft365", "mail", b"550 5.7.30 Basic authentication is not supported", "deferred credential mail fallback"),
    ("microsoft365", "final", b"554 5.2.0 STOREDRV:SubmissionQuotaExceededException", "deferred upstream final throttled"),
    ("microsoft365", "final", b"550 5.7.750 Client blocked from sending from unregistered domain", "failed upstream final fallback"),
    ("ses", "mail", b"501 Invalid MAIL FROM address provided", "failed upstream mail fallback"),
    ("sendgrid", "auth", b"451 Authentication failed: Maximum credits exceeded", "deferred upstream auth throttled"),
    ("sendgrid", "mail", b"550 Unauthenticated senders not allowed", "deferred credential mail fallback"),
    ("mailgun", "rcpt", b"550 5.7.1 Relaying denied", "deferred credential rcpt fallback"),
    ("mailgun", "final", b"421 Domain mg.x is not allowed to send: Account disabled", "deferred credential final fallback"),
    ("brevo", "auth", b"525 5.7.1 Unauthorized IP address", "deferred credential auth fallback"),
    ("brevo", "final", b"502 5.7.0 Your SMTP account is not yet activated.", "deferred credential final fallback"),
    ("zoho", "final", b"553 Relaying disallowed as app@acme.example", "failed upstream final fallback"),
    ("yahoo", "final", b"550 Request failed; Mailbox unavailable", "failed upstream final fallback"),
]


@pytest.mark.parametrize("offers", [(), ("CHUNKING",)], ids=["DATA", "BDAT"])
@pytest.mark.parametrize(("provider", "phase", "said", "expected"), PLAYED, ids=[f"{each[0]} {each[1]}" for each in PLAYED])
async def test_what_a_provider_says_is_read_by_its_own_rows(
    provider: str, phase: ScriptPhase, said: bytes, expected: str, offers: tuple[str, ...]
) -> None:
    async with ScriptedUpstream(users=USERS, offers=offers) as server:
        async with pool_to(acme=settings(server, provider=provider, limits={"connections": 1}, **LOGIN)) as pool:
            server.script(phase, said, times=1)
            assert words(await pool.send("acme", outgoing())) == [expected]
            assert all_sent(await pool.send("acme", outgoing()))
        assert len(server.accepted) == 1


@pytest.mark.parametrize("phase", ["data", "final"])
async def test_without_a_provider_the_same_words_are_read_by_their_code(phase: ScriptPhase) -> None:
    async with ScriptedUpstream(users=USERS) as server, pool_to(acme=settings(server, **LOGIN)) as pool:
        server.script(phase, b"553 Relaying disallowed as app@acme.example", times=1)
        assert words(await pool.send("acme", outgoing())) == [f"failed message {phase}"]


async def test_a_421_that_asks_to_slow_down_in_a_provider_s_words_is_no_stale_session() -> None:
    """On a session that has carried mail a plain 421 to MAIL sends the message again at once, over a new one."""
    said = b"421 Domain mg.x is not allowed to send: recipient limit exceeded"
    async with ScriptedUpstream(users=USERS) as server, pool_to(acme=settings(server, provider="mailgun", **LOGIN)) as pool:
        assert all_sent(await pool.send("acme", outgoing()))
        server.script("mail", said, times=1)
        assert words(await pool.send("acme", outgoing())) == ["deferred upstream mail throttled"]
        assert len(server.connections) == 1


def house(server: ScriptedUpstream, **keys: Any) -> dict[str, Any]:
    return to(server, username="apikey", password="secret-of-acme", **keys)


async def test_mail_goes_by_the_fallback_when_a_provider_wants_its_login(tmp_path: Path) -> None:
    """By its code alone this would bounce every message."""
    async with ScriptedUpstream(users=USERS) as sendgrid, ScriptedUpstream() as other:
        sendgrid.script("mail", b"550 Unauthenticated senders not allowed")
        upstreams = {"acme": house(sendgrid, provider="sendgrid"), "house": to(other)}
        async with running(tmp_path, upstreams=upstreams, routes=[{**ROUTES[0], "fallback": "house"}]) as relay:
            await relay.send("app@acme.example", [RECIPIENT])
            await other.received(1)
            await relay.empty()
            assert [entry["upstream"] for entry in relay.events("sent")] == ["house"]
            assert relay.events("failed") == []
        assert sendgrid.accepted == []


async def test_mail_waits_for_a_quota_and_no_fallback_takes_it(tmp_path: Path) -> None:
    async with ScriptedUpstream() as google, ScriptedUpstream() as other:
        google.script("rcpt", b"550 5.7.1 Daily SMTP relay limit exceeded for customer.")
        upstreams = {"acme": to(google, provider="google-relay", ehlo="acme.example"), "house": to(other)}
        async with running(tmp_path, upstreams=upstreams, routes=[{**ROUTES[0], "fallback": "house"}]) as relay:
            await relay.send("app@acme.example", [RECIPIENT])
            event = (await relay.event("deferred"))[0]
            assert "fallback" not in event["next"]
            assert relay.events("failed", "degraded", "bounced") == []
        assert other.connections == []
