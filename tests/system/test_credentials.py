"""A wrong password, and its end: one refused login, fallback or patience, and no restart once the secret has been mended."""

from pathlib import Path

import pytest

from relay.delivery import scheduler
from relay.upstream import watch
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import ROUTES, SECRET, running, to

SENDER = "app@acme.example"
WRONG = "wrong-" + SECRET


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)


async def test_mail_waits_for_a_mended_secret_and_then_goes_without_a_restart(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(WRONG)
    async with ScriptedUpstream(users={"acme": SECRET}) as server:
        acme = to(server, username="acme", password={"file": str(secret)})
        async with running(tmp_path, upstreams={"acme": acme}, routes=ROUTES[:1]) as relay:
            for number in range(10):
                await relay.send(SENDER, [f"{number}@example.org"])
            await relay.event("deferred", count=10)
            assert len(server.logins) == 1
            secret.write_text(SECRET)
            await server.received(10)
            await relay.empty()
            assert [login.accepted for login in server.logins].count(False) == 1
            assert len(relay.events("auth-failed")) >= 1
            assert any("its secret has changed" in event["what"] for event in relay.events("note"))


async def test_a_secret_that_was_mended_before_anybody_noticed_delays_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(WRONG)
    async with ScriptedUpstream(users={"acme": SECRET}) as server:
        acme = to(server, username="acme", password={"file": str(secret)})
        async with running(tmp_path, upstreams={"acme": acme}, routes=ROUTES[:1]) as relay:
            secret.write_text(SECRET)
            for number in range(10):
                await relay.send(SENDER, [f"{number}@example.org"])
            await server.received(10)
            await relay.empty()
            assert relay.events("deferred", "failed", "auth-failed") == []
            assert [login.accepted for login in server.logins].count(False) == 1


async def test_a_wrong_password_uses_the_fallback_and_the_mended_one_the_primary_again(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(WRONG)
    async with ScriptedUpstream(users={"acme": SECRET}) as primary, ScriptedUpstream() as house:
        upstreams = {"acme": to(primary, username="acme", password={"file": str(secret)}), "house": to(house)}
        async with running(tmp_path, upstreams=upstreams, routes=[{**ROUTES[0], "fallback": "house"}]) as relay:
            for number in range(5):
                await relay.send(SENDER, [f"{number}@example.org"])
            await house.received(5)
            await relay.empty()
            assert (len(primary.logins), primary.accepted) == (1, [])
            secret.write_text(SECRET)
            await eventually(lambda: any("secret has changed" in event["what"] for event in relay.events("note")), "the new secret")
            await relay.send(SENDER, ["back@example.org"])
            await primary.received(1)
            await relay.empty()
            assert [event["event"] for event in relay.events("degraded", "recovered")] == ["degraded", "recovered"]
