"""The real relay with a route that uses its own upstream only when it is verified: before the test, after it, and with new settings."""

import asyncio
import subprocess
import sys
from pathlib import Path

from tests.support.client import Client
from tests.support.process import LAUNCH, REPOSITORY, RelayProcess
from tests.support.upstream import Say, ScriptedUpstream

SECRET = "not-to-be-seen-anywhere"
CONTENT = b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"


def config_of(acme: ScriptedUpstream, spare: ScriptedUpstream, *, password: str = SECRET, more: str = "") -> str:
    return f"""
hostname: relay.example.net
listeners: [{{bind: "127.0.0.1:0"}}]
spool: {{directory: spool}}
log: {{format: json}}
upstreams:
  acme: {{host: 127.0.0.1, port: {acme.port}, security: none, username: app, password: {password}{more}}}
  spare: {{host: 127.0.0.1, port: {spare.port}, security: none}}
routes: [{{sender: acme.example, upstream: acme, fallback: spare, verified_only: true}}]
"""


async def send(relay: RelayProcess) -> None:
    async with Client(*relay.address()) as client:
        await client.greet()
        await client.deliver("app@acme.example", ["you@example.org"], CONTENT)
        await client.quit()


async def verify(relay: RelayProcess) -> int:
    """`relay test acme` as a process of its own."""
    command = [sys.executable, "-c", LAUNCH, "test", "acme", "-c", str(relay.config_file)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = await asyncio.to_thread(subprocess.run, command, cwd=relay.directory, env=environment, capture_output=True, text=True)
    assert SECRET not in done.stdout + done.stderr
    return done.returncode


async def by_acme(relay: RelayProcess, acme: ScriptedUpstream) -> None:
    """Send until one message goes by the route's own upstream: the mark is noticed within seconds."""
    known = len(acme.accepted)
    async with asyncio.timeout(20):
        while len(acme.accepted) == known:
            await send(relay)
            await relay.event("sent", count=len(relay.events("accepted")))


async def test_a_route_uses_its_fallback_until_the_test_has_succeeded_and_again_when_new_settings_fail(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"app": SECRET}) as acme, ScriptedUpstream() as spare:
        async with RelayProcess(config_of(acme, spare), directory=tmp_path) as relay:
            for _ in range(3):
                await send(relay)
            await spare.received(3)
            assert not acme.connections, "nobody has even connected there"
            (degraded,) = await relay.event("degraded")
            assert "run `relay test acme`" in degraded["reply"]

            acme.script("auth", Say(b"535 5.7.8 no"), times=1)
            assert await verify(relay) == 1
            await send(relay)
            await spare.received(4)

            assert await verify(relay) == 0
            await by_acme(relay, acme)
            await relay.event("recovered")
            assert len(relay.events("degraded")) == 1
            assert await relay.terminate() == 0

            # The settings change while it is down, and still work: it finds out by itself.
            relay.config_file.write_text(config_of(acme, spare, more=", auth: login"))
            await relay.start()
            await relay.event("note", what="upstream acme works with its new settings, and stays verified")
            await by_acme(relay, acme)
            assert await relay.terminate() == 0

            # And now they do not.
            known = len(acme.accepted)
            relay.config_file.write_text(config_of(acme, spare, password="wrong"))
            await relay.start()
            await relay.event("auth-failed", upstream="acme")
            await send(relay)
            await relay.event("degraded", count=2)
            assert "have changed" in relay.events("degraded")[-1]["reply"]
            assert len(acme.accepted) == known
            assert await relay.terminate() == 0
        assert SECRET not in relay.log()


async def test_mail_whose_fallback_is_down_too_waits_without_an_attempt_and_goes_when_it_is_verified(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"app": SECRET}) as acme, ScriptedUpstream() as spare:
        spare.script("greeting", Say(b"421 4.3.0 closed today"))
        async with RelayProcess(config_of(acme, spare) + "retry: {first: 200ms, max: 400ms, expire: 1h}\n", directory=tmp_path) as relay:
            await send(relay)
            await relay.event("deferred", upstream="spare", count=2)
            assert not acme.connections
            assert await verify(relay) == 0
            await acme.received(1)
            (sent,) = await relay.event("sent", upstream="acme")
            assert sent["attempt"] <= len(relay.events("deferred", upstream="spare")) + 1, "what was not tried is not counted"


async def test_a_dead_credential_is_known_before_mail_needs_it(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"app": "other"}) as acme, ScriptedUpstream() as spare:
        config = config_of(acme, spare, more=", probe: 300ms").replace(", verified_only: true", "")
        async with RelayProcess(config, directory=tmp_path) as relay:
            (event, *_) = await relay.event("auth-failed", upstream="acme", user="app")
            assert "535" in event["reply"]
            await send(relay)
            await spare.received(1)
            await relay.event("degraded")
            assert len(acme.logins) == 1, "the breaker is open: neither mail nor the next probe tries again"
            assert not acme.transactions
            assert await relay.terminate() == 0
