"""Connections to upstreams as the whole relay makes them: hosts, client certificates, and what an upstream does not offer."""

import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import running, to

LOGIN = {"username": "acme", "password": "not-to-be-seen-anywhere"}
ALL: list[dict[str, Any]] = [{"name": "all", "upstream": "acme"}]


def demanding(tls: Authority) -> ssl.SSLContext:
    context = tls.context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(str(tls.ca_file))
    return context


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_client_certificate_and_a_login_go_to_the_host_that_works(tls: Authority, tmp_path: Path, security: Any) -> None:
    files = tls.files("relay.example.net")
    async with ScriptedUpstream(users={"acme": LOGIN["password"]}, security=security, tls=demanding(tls)) as server:
        keys = {"security": security, "ca_file": str(tls.ca_file), "client_certificate": str(files.certificate)}
        keys |= {"client_key": str(files.key), **LOGIN}
        acme = to(server, **keys) | {"host": ["127.0.0.3", "localhost"]}
        async with running(tmp_path, upstreams={"acme": acme}, routes=ALL) as relay:
            for _ in range(3):
                await relay.send("app@acme.example", ["you@example.org"])
            await relay.empty()
            notes = [event["what"] for event in relay.events() if "127.0.0.3" in event.get("what", "")]
        assert [(t.user, t.tls) for t in server.accepted] == [("acme", True)] * 3
    (note,) = notes
    assert note == f"upstream acme: 127.0.0.3 fails and is asked after the other hosts for now: 127.0.0.3:{server.port}: Connection refused"


async def test_a_certificate_that_expires_soon_is_told_once(tls: Authority, tmp_path: Path) -> None:
    async with ScriptedUpstream(security="tls", tls=tls.context(days=3)) as server:
        acme = to(server, security="tls", ca_file=str(tls.ca_file), limits={"messages_per_connection": 1})
        async with running(tmp_path, upstreams={"acme": acme}, routes=ALL) as relay:
            for _ in range(3):
                await relay.send("app@acme.example", ["you@example.org"])
            await relay.empty()
            told = [event["what"] for event in relay.events() if "certificate" in event.get("what", "")]
    assert told == [f"upstream acme: the certificate of 127.0.0.1:{server.port} expires in 2 days; it must be renewed there"]
    assert len(server.connections) == 3


@pytest.mark.parametrize("fallback", [True, False])
async def test_without_smtputf8_only_those_who_need_it_go_elsewhere_or_bounce(tmp_path: Path, fallback: bool) -> None:
    async with ScriptedUpstream(without=["SMTPUTF8"]) as old, ScriptedUpstream() as new:
        routes: list[dict[str, Any]] = [{"name": "all", "upstream": "acme", **({"fallback": "house"} if fallback else {})}]
        async with running(tmp_path, upstreams={"acme": to(old), "house": to(new)}, routes=routes) as relay:
            await relay.send("app@acme.example", ["a@example.org", "jürgen@example.org", "b@example.org"], parameters="SMTPUTF8")
            await relay.empty()
            results = sorted((entry.recipient, entry.status, entry.lane.upstream) for entry in relay.results())
        await eventually(lambda: len(old.accepted) == (1 if fallback else 2), "the mail, and the bounce")
        assert old.accepted[0].recipients == ["a@example.org", "b@example.org"]
        assert [t.recipients for t in new.accepted] == ([["jürgen@example.org"]] if fallback else [])
        assert ("a@example.org", "sent", "acme") in results
        assert ("jürgen@example.org", "sent" if fallback else "failed", "house" if fallback else "acme") in results
        if not fallback:
            assert old.accepted[1].recipients == ["app@acme.example"]
            assert b"5.6.7" in old.accepted[1].content
