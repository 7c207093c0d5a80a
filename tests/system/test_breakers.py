"""Upstreams that fail for a while, over real sockets and a real spool: left alone, found again, and everybody's mail accounted for."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relay.delivery import breaker, scheduler
from relay.upstream import watch
from tests.support.eventually import eventually
from tests.support.upstream import Hold, ScriptedUpstream, unused_port
from tests.system.relays import CONTENT, ROUTES, SECRET, Running, running, to

pytestmark = pytest.mark.both_loops

SENDER, RECIPIENT = "app@acme.example", "you@example.org"
WITH_FALLBACK: list[dict[str, Any]] = [{**ROUTES[0], "fallback": "house"}]


async def send_many(relay: Running, count: int) -> None:
    async with relay.client() as client:
        await client.greet()
        for number in range(count):
            await client.deliver(SENDER, [f"{number}@example.org"], CONTENT)
        await client.quit()


def arrived(*servers: ScriptedUpstream) -> Counter[str]:
    return Counter(recipient for server in servers for transaction in server.accepted for recipient in transaction.recipients)


async def test_an_upstream_that_is_down_is_left_alone_and_its_mail_goes_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)
    async with ScriptedUpstream() as server:
        server.script("greeting", b"421 4.3.2 down")
        retry = {"first": "300ms", "max": "600ms", "expire": "1h"}
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1], retry=retry) as relay:
            await send_many(relay, 60)
            await eventually(lambda: len(relay.events("deferred")) >= 60, "all were put off")
            asked = len(server.connections)
            assert asked <= 10, "three, those under way with them, and one at a time"
            server.heal()
            await relay.empty()
            assert [e["what"].partition(" ")[2][:18] for e in relay.events("note")] == ["acme failed 3 time", "acme works again, "]
            assert len(relay.events("deferred")) < 200
    assert arrived(server) == {f"{number}@example.org": 1 for number in range(60)}


async def test_mail_moves_straight_to_the_fallback_while_one_message_asks_whether_the_primary_is_back(tmp_path: Path) -> None:
    async with ScriptedUpstream(port=unused_port()) as primary, ScriptedUpstream() as house:
        await primary.stop()
        retry = {"first": "500ms", "max": "500ms", "expire": "1h"}
        upstreams = {"acme": to(primary), "house": to(house)}
        async with running(tmp_path, upstreams=upstreams, routes=WITH_FALLBACK, retry=retry) as relay:
            await send_many(relay, 20)
            await house.received(20)
            answer = asyncio.Event()
            primary.script("greeting", Hold(answer))
            await primary.start()

            async def asks() -> bool:
                await relay.send(SENDER, [RECIPIENT])
                return bool(primary.connections)

            await eventually(asks, "a message that asks")
            before = len(house.accepted)
            for _ in range(10):
                await relay.send(SENDER, [RECIPIENT])
            await eventually(lambda: len(house.accepted) >= before + 10, "the others at the fallback")
            assert len(primary.connections) == 1
            answer.set()
            await relay.event("recovered")
            await relay.empty()
            assert Counter(e["event"] for e in relay.events("degraded", "recovered")) == {"degraded": 1, "recovered": 1}
            assert len(primary.accepted) >= 1


async def test_a_wrong_password_is_one_login_and_a_new_one_in_its_file_sets_all_mail_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    async with ScriptedUpstream(users={"acme": SECRET}) as server:
        keys = {"username": "acme", "password": {"file": str(secret)}, "limits": {"connections": 20}}
        async with running(tmp_path, upstreams={"acme": to(server, **keys)}, routes=ROUTES[:1]) as relay:
            await send_many(relay, 40)
            await eventually(lambda: len(relay.events("deferred")) >= 40, "all were put off")
            assert len(server.logins) == 1
            assert "refused its credential" in relay.events("note")[0]["what"]
            secret.write_text(SECRET)
            await relay.empty()
            assert sum(not attempt.accepted for attempt in server.logins) == 1
    assert arrived(server) == {f"{number}@example.org": 1 for number in range(40)}


async def test_a_refused_login_is_found_to_work_again_by_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_LOGIN", breaker._LOGIN._replace(first=0.5, longest=0.5))
    async with ScriptedUpstream(users={"acme": SECRET}) as server:
        server.script("auth", b"535 5.7.8 Account locked", times=2)
        upstreams = {"acme": to(server, username="acme", password=SECRET)}
        async with running(tmp_path, upstreams=upstreams, routes=ROUTES[:1]) as relay:
            await send_many(relay, 10)
            await relay.empty()
            assert [connection.user for connection in server.connections][:3] == ["", "", "acme"]
    assert arrived(server) == {f"{number}@example.org": 1 for number in range(10)}


async def test_a_fallback_waits_for_its_time(tmp_path: Path) -> None:
    async with ScriptedUpstream(port=unused_port()) as primary, ScriptedUpstream() as house:
        await primary.stop()
        routes = [{**ROUTES[0], "fallback": {"upstream": "house", "after": "700ms"}}]
        async with running(tmp_path, upstreams={"acme": to(primary), "house": to(house)}, routes=routes) as relay:
            await send_many(relay, 5)
            await relay.empty()
            first = relay.events("deferred")[0]["time"]
            (degraded,) = relay.events("degraded")
            assert degraded["time"] > first
            assert {entry.lane.upstream for entry in relay.results() if entry.status == "sent"} == {"house"}
            assert min(entry.delay for entry in relay.results() if entry.status == "sent") >= 0.6
    assert arrived(house) == {f"{number}@example.org": 1 for number in range(5)}


async def test_held_mail_comes_back_to_its_sender_when_it_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_REFRESH_SECONDS", 0.1)
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        acme.script("mail", b"421 4.3.2 down")
        upstreams = {"acme": to(acme), "house": to(house, senders=["house.example"]), "reports": to(house)}
        routes = [{"name": "reports", "sender": "<>", "upstream": "reports"}, {**ROUTES[0], "fallback": "house"}]
        retry = {"first": "50ms", "max": "100ms", "expire": "1s"}
        async with running(tmp_path, upstreams=upstreams, routes=routes, retry=retry) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await relay.event("held")
            (report,) = await house.received(1)
            await relay.empty()
            assert "may not send it" in relay.events("failed")[0]["reply"]
    assert report.recipients == [SENDER]
    assert b"may not send" in report.content.replace(b"\r\n ", b" ")


async def test_a_restart_begins_with_every_breaker_closed(tmp_path: Path) -> None:
    async with ScriptedUpstream(users={"acme": SECRET}) as server:
        server.script("auth", b"535 5.7.8 No", times=1)
        upstreams = {"acme": to(server, username="acme", password=SECRET)}
        async with running(tmp_path, upstreams=upstreams, routes=ROUTES[:1]) as relay:
            await relay.send(SENDER, [RECIPIENT])
            await relay.event("deferred")
        async with running(tmp_path, upstreams=upstreams, routes=ROUTES[:1]) as relay:
            await relay.empty()
    assert len(server.logins) == 2
    assert arrived(server) == {RECIPIENT: 1}
