"""A reply to DATA that is the upstream's own: through the real relay, from the client to a scripted upstream and back."""

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.spool.base import SpoolError
from relay.spool.sqlite import SqliteSpool
from tests.support.client import Client, Reply, stuffed
from tests.support.eventually import eventually
from tests.support.process import RelayProcess
from tests.support.upstream import Close, Garbage, Hang, Hold, Reset, ScriptedUpstream
from tests.system.relays import CONTENT, ROUTES, Running, running, to

pytestmark = pytest.mark.both_loops

WAITING: list[dict[str, Any]] = [{**ROUTES[0], "wait": "60s"}]
BRIEFLY: list[dict[str, Any]] = [{**ROUTES[0], "wait": "200ms"}]
WITH_FALLBACK: list[dict[str, Any]] = [{**WAITING[0], "fallback": "house"}]
SENDER, YOU = "app@acme.example", "you@example.org"


def words(reply: Reply) -> str:
    """The reply with our id as ID."""
    return re.sub(r"\b[0-9A-F]{13}\b", "ID", str(reply))


async def send(relay: Running, *recipients: str, code: int = 250, within: float = 15) -> str:
    async with asyncio.timeout(within):  # much shorter than the wait: who is told late was told by the clock
        return words(await relay.send(SENDER, recipients or (YOU,), code=code))


async def hand_over(client: Client, content: bytes = CONTENT) -> None:
    """A whole message, up to the final dot and not to the reply."""
    await client.greet()
    for line, code in ((f"MAIL FROM:<{SENDER}>", 250), (f"RCPT TO:<{YOU}>", 250), ("DATA", 354)):
        await client.command(line, code)
    await client.send(stuffed(content))


def statuses(relay: Running) -> list[str]:
    """The delivery log, oldest first."""
    return [entry.status for entry in sorted(relay.results(), key=lambda entry: entry.time)]


# -- what the upstream says --------------------------------------------------------------------------------------------------


async def test_the_client_hears_that_the_upstream_has_it(tmp_path: Path) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        assert await send(relay) == "250 2.0.0 Ok: sent as ID (upstream: 250 2.0.0 Ok: queued as 1)"
        await relay.empty()
        assert statuses(relay) == ["sent"]


REFUSALS = [
    ("mail", b"550 5.1.8 bad sender", "550 5.1.8 bad sender"),
    ("rcpt", b"550 5.1.1 nobody here", "550 5.1.1 nobody here"),
    ("rcpt", b"551 moved away", "551 5.0.0 moved away"),
    ("rcpt", b"521 5.3.2 no mail at all", "554 5.3.2 no mail at all"),
    ("data", b"554 5.6.0 not like this", "554 5.6.0 not like this"),
    ("final", b"552 5.2.2 full", "552 5.2.2 full"),
    ("final", b"554-5.7.1 This looks like spam,\r\n554 5.7.1 says our filter", "554 5.7.1 This looks like spam, says our filter"),
    ("final", b"599 5.9.9 odd", "554 5.9.9 odd"),
]


@pytest.mark.parametrize(("phase", "said", "heard"), REFUSALS)
async def test_the_client_hears_a_refusal_instead_of_a_bounce(tmp_path: Path, phase: Any, said: bytes, heard: str) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        acme.script(phase, said)
        async with relay.client() as client:
            await client.greet()
            reply = await client.deliver(SENDER, ["a@example.org", "b@example.org"], CONTENT, code=int(heard[:3]))
            assert words(reply) == f"{heard} (refused as ID)"
            # By the time the client is told nothing is left: the end was stored before.
            assert relay.queue() == [] and statuses(relay) == ["failed", "failed"]
            acme.heal()
            assert words(await client.deliver(SENDER, [YOU], CONTENT)).startswith("250 2.0.0 Ok: sent as ID")
            await client.quit()
        await relay.event("sent")
        assert relay.events("bounced") == []
        (refused,) = relay.events("refused")
        (failed,) = relay.events("failed")
        assert (refused["session"], refused["recipients"]) == (failed["session"], failed["recipients"])
        assert failed["id"] in refused["reply"]


async def test_what_the_upstream_refuses_is_no_error_of_the_client(tmp_path: Path) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        acme.script("rcpt", b"550 5.1.1 nobody here")
        async with relay.client() as client:
            await client.greet()
            for _ in range(12):
                await client.deliver(SENDER, [YOU], CONTENT, code=550)
            await client.quit()


async def test_what_the_upstream_lacks_is_a_refusal_too(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(without=("SMTPUTF8",)) as acme,
        running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay,
    ):
        reply = await relay.send(SENDER, ["bücher@example.org"], parameters="SMTPUTF8", code=554)
        assert words(reply) == "554 5.6.7 the upstream does not offer SMTPUTF8, which this address needs (refused as ID)"
        assert relay.queue() == []


NO_VERDICT: list[tuple[str, Any]] = [
    ("rcpt", b"450 4.2.0 greylisted"), ("mail", b"451 4.3.0 later"), ("final", b"452 4.3.1 full"), ("mail", b"421 4.7.0 slow down"),
    ("greeting", b"421 4.3.2 down"), ("connect", Reset()), ("data", Close()), ("final", Close()), ("final", Garbage()),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "said"), NO_VERDICT, ids=str)
async def test_what_may_yet_succeed_is_queued_at_once(tmp_path: Path, phase: Any, said: Any) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        acme.script(phase, said, times=1)
        assert await send(relay) == "250 2.0.0 Ok: queued as ID"
        await relay.event("sent")
        await relay.empty()
        assert relay.events("bounced") == []


async def test_an_upstream_that_asked_for_patience_is_not_waited_for(tmp_path: Path) -> None:
    retry = {"first": "20s", "max": "20s", "expire": "1h"}
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING, retry=retry) as relay:
        acme.script("mail", b"421 4.7.0 slow down")
        for _ in range(2):
            assert await send(relay, within=10) == "250 2.0.0 Ok: queued as ID"


@pytest.mark.parametrize("phase", ["greeting", "mail", "final"])
async def test_when_time_is_up_it_is_queued_and_what_comes_later_bounces(tmp_path: Path, phase: Any) -> None:
    go = asyncio.Event()
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=BRIEFLY) as relay:
        acme.script(phase, Hold(go), times=1)
        acme.script("rcpt", b"550 5.1.1 nobody here", recipient=YOU)
        if phase == "final":
            acme.heal()
            acme.script("final", Hold(go), times=1)
        assert await send(relay) == "250 2.0.0 Ok: queued as ID"
        go.set()
        await relay.event("sent")
        await relay.empty()
        assert len(relay.events("bounced")) == (0 if phase == "final" else 1)


async def test_mixed_recipients_are_queued_and_the_refused_bounce(tmp_path: Path) -> None:
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        acme.script("rcpt", b"550 5.1.1 nobody here", recipient="no@example.org")
        assert await send(relay, "no@example.org", YOU) == "250 2.0.0 Ok: queued as ID"
        (bounced,) = await relay.event("bounced")
        assert bounced["failed"] == "no@example.org"
        await relay.empty()


# -- fallbacks and several routes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["down", "refuses the login", "not this sender"])
async def test_the_fallback_gives_the_verdict(tmp_path: Path, fault: str) -> None:
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        match fault:
            case "down":
                await acme.stop()
            case "refuses the login":
                acme.script("mail", b"535 5.7.8 no")
            case "not this sender":
                acme.script("mail", b"550 5.7.1 not yours")
        async with running(tmp_path, upstreams={"acme": to(acme), "house": to(house)}, routes=WITH_FALLBACK) as relay:
            assert await send(relay) == "250 2.0.0 Ok: sent as ID (upstream: 250 2.0.0 Ok: queued as 1)"
            house.script("rcpt", b"550 5.1.1 nobody here", times=1)
            assert await send(relay, code=550) == "550 5.1.1 nobody here (refused as ID)"
            house.script("rcpt", b"450 4.2.0 later", times=1)
            assert await send(relay) == "250 2.0.0 Ok: queued as ID"
            await relay.empty()
            assert relay.events("bounced") == []


SPLIT: list[dict[str, Any]] = [
    {"name": "inside", "sender": "acme.example", "recipient": "inside.example", "upstream": "acme", "wait": "60s"},
    {"name": "outside", "sender": "acme.example", "upstream": "house"},
]


@pytest.mark.parametrize(
    ("inside", "outside", "heard", "bounces"),
    [
        (None, None, "250 2.0.0 Ok: sent as ID (upstream: 250 2.0.0 Ok: queued as 1)", 0),
        (b"550 5.1.1 no", b"551 5.1.6 gone", "550 5.1.1 no (refused as ID)", 0),
        (b"550 5.1.1 no", None, "250 2.0.0 Ok: queued as ID", 1),
        (None, b"550 5.1.1 no", "250 2.0.0 Ok: queued as ID", 1),
        (b"550 5.1.1 no", b"450 4.2.0 later", "250 2.0.0 Ok: queued as ID", 1),
        (b"450 4.2.0 later", b"550 5.1.1 no", "250 2.0.0 Ok: queued as ID", 1),
    ],
)
async def test_a_split_message_has_one_verdict(
    tmp_path: Path, inside: bytes | None, outside: bytes | None, heard: str, bounces: int
) -> None:  # fmt: skip
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        for server, said in ((acme, inside), (house, outside)):
            if said is not None:
                server.script("rcpt", said, times=1)
        async with running(tmp_path, upstreams={"acme": to(acme), "house": to(house)}, routes=SPLIT) as relay:
            assert await send(relay, "a@inside.example", YOU, code=int(heard[:3])) == heard
            await relay.empty()
            assert len(relay.events("bounced")) == bounces


# -- waiting for a slot, and many at once ----------------------------------------------------------------------------------


async def test_the_verdict_comes_also_when_the_upstream_was_busy_at_first(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with ScriptedUpstream() as acme:
        acme.script("final", Hold(go), times=1)
        acme.script("rcpt", b"550 5.1.1 nobody here", recipient="no@example.org")
        async with running(tmp_path, upstreams={"acme": to(acme, limits={"connections": 1})}, routes=WAITING) as relay:
            first = [asyncio.ensure_future(send(relay)) for _ in range(8)]
            await acme.received(0)
            last = asyncio.ensure_future(send(relay, "no@example.org", code=550))
            await relay.event("accepted", count=9)
            assert not any(task.done() for task in (*first, last))
            go.set()
            assert all(reply.startswith("250 2.0.0 Ok: sent as ID") for reply in await asyncio.gather(*first))
            assert await last == "550 5.1.1 nobody here (refused as ID)"


async def test_hundreds_wait_at_once_without_a_slot_or_a_thread_of_their_own(tmp_path: Path) -> None:
    go, count = asyncio.Event(), 300
    async with ScriptedUpstream() as acme, ScriptedUpstream() as house:
        acme.script("final", Hold(go))
        routes = [*WAITING, {**ROUTES[1], "upstream": "house"}]
        async with running(tmp_path, upstreams={"acme": to(acme), "house": to(house)}, routes=routes) as relay:
            waiting = [asyncio.ensure_future(send(relay, within=60)) for _ in range(count)]
            await eventually(lambda: len(relay.events("accepted")) >= count, "all to be in custody", within=50)
            async with asyncio.timeout(30):
                await relay.send("app@globex.example", [YOU])
            await house.received(1)
            assert not any(task.done() for task in waiting)
            go.set()
            assert {reply[:26] for reply in await asyncio.gather(*waiting)} == {"250 2.0.0 Ok: sent as ID ("}


# -- clients that go, relays that stop, spools that fail -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["resets", "half-closes", "closes"])
@pytest.mark.parametrize("refuses", [True, False])
async def test_a_refusal_that_nobody_is_there_to_hear_is_a_bounce(tmp_path: Path, how: str, refuses: bool) -> None:
    go = asyncio.Event()
    async with ScriptedUpstream() as acme, running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay:
        acme.script("mail", Hold(go), times=1)
        if refuses:
            acme.script("rcpt", b"550 5.1.1 nobody here", recipient=YOU)
        client = relay.client()
        await client.connect()
        await hand_over(client)
        (accepted,) = await relay.event("accepted")
        match how:
            case "resets":
                client.reset()
            case "half-closes":
                client.finish_sending()
                assert words(await client.reply()) == "250 2.0.0 Ok: queued as ID"
                client.close()
            case "closes":
                client.close()
        await eventually(lambda: not any(task.get_name().startswith("session") for task in asyncio.all_tasks()), "the wait to end")
        go.set()
        await relay.event("sent")  # the message, or the bounce
        await relay.empty()
        assert [event["id"] for event in relay.events("bounced")] == ([accepted["id"]] if refuses else [])


async def test_a_relay_that_stops_holds_nobody(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with ScriptedUpstream() as acme:
        acme.script("mail", Hold(go), times=1)
        async with running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING) as relay, relay.client() as client:
            await hand_over(client)
            await relay.event("accepted")
            relay.stop()
            assert words(await client.expect(250)) == "250 2.0.0 Ok: queued as ID"
            await client.expect(421)
            go.set()
        assert [transaction.sender for transaction in acme.accepted] == [SENDER]


async def test_a_refusal_that_cannot_be_stored_is_queued_and_bounces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [SpoolError("disk on fire")] * 2
    settle: Callable[..., Any] = SqliteSpool.settle

    async def burning(spool: SqliteSpool, settlement: Any) -> None:
        if failures:
            raise failures.pop()
        await settle(spool, settlement)

    monkeypatch.setattr(SqliteSpool, "settle", burning)
    async with ScriptedUpstream() as acme:
        acme.script("rcpt", b"550 5.1.1 nobody here", recipient=YOU)
        async with running(tmp_path, upstreams={"acme": to(acme)}, routes=WAITING, faults=True) as relay:
            assert await send(relay) == "250 2.0.0 Ok: queued as ID"
            await relay.event("bounced")
            await relay.empty()


CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none}}
  other: {{host: 127.0.0.1, port: {other}, security: none}}
routes:
  - {{sender: "*", upstream: up, fallback: other, wait: 60s}}
retry: {{first: 100ms, max: 1s, expire: 1h}}
spool: {{directory: {directory}}}
log: {{format: json}}
"""


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def test_those_who_wait_do_not_wait_in_memory(tmp_path: Path) -> None:
    """Their content is on disk already: 60 clients with 1 MB each must not cost 60 MB."""
    content = CONTENT + b"x" * 76 + b"\r\n" + b"%074d\r\n" % 0 * 12_500
    go = asyncio.Event()
    async with ScriptedUpstream() as up:
        up.script("mail", Hold(go))
        text = CONFIG.format(port=up.port, other=up.port, directory=tmp_path / "spool")
        text = text.replace("security: none}", "security: none, limits: {connections: 1}}")
        async with RelayProcess(text, directory=tmp_path) as relay:
            before = resident_mb(relay.pid)
            clients = [Client(*relay.address()) for _ in range(60)]
            for client in clients:
                await client.connect()
                await hand_over(client, content)
            await relay.event("accepted", count=len(clients))
            grown = resident_mb(relay.pid) - before
            go.set()
            for client in clients:
                await client.expect(250)
                client.close()
            assert await relay.terminate() == 0
    print(f"{len(clients)} clients that wait with {len(content)} octets each: {grown:.0f} MB more")
    assert grown < 35


@pytest.mark.parametrize("phase", ["mail", "final"])
async def test_a_relay_that_is_killed_while_a_client_waits_sends_it_again_to_the_same_upstream(tmp_path: Path, phase: Any) -> None:
    async with ScriptedUpstream() as up, ScriptedUpstream() as other:
        up.script(phase, Hang(), times=1)
        text = CONFIG.format(port=up.port, other=other.port, directory=tmp_path / "spool")
        async with RelayProcess(text, directory=tmp_path) as relay:
            client = Client(*relay.address())
            await client.connect()
            await hand_over(client)
            await relay.event("accepted")
            await eventually(lambda: up.transactions, "the upstream to be asked")
            await relay.kill()
            client.close()
            up.script("greeting", b"421 4.3.2 down", connection=len(up.connections) + 1)  # in doubt: no fallback even so
            await relay.start()
            (sent,) = await relay.event("sent")
            assert sent["upstream"] == "up"
            assert await relay.terminate() == 0
    assert other.connections == []
