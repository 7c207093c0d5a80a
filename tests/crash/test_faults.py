"""Storage that fails under the whole relay: what clients hear, that nothing is promised in vain, and that it mends by itself."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.clock import ManualClock, SystemClock
from relay.delivery.attempt import Result
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool import commit, room, sqlite_batch
from relay.spool import sqlite_schema as sql
from relay.spool.base import EVERYTHING, FILE_ABOVE_BYTES, Lane, Next, SpoolError, SpoolFull
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import DEFERRED, LANE, draft, octets_of, settlement
from tests.crash.failing import FailingDisk, failing_disk
from tests.crash.load import config
from tests.support.process import RelayDied, RelayProcess
from tests.support.upstream import Hold, ScriptedUpstream
from tests.system.relays import Running, running, to
from tests.unit.delivery import Log, config_of

SMALL, LARGE, SPILLED = 500, FILE_ABOVE_BYTES + 1000, 2 * 1024 * 1024
FULL = OSError(errno.ENOSPC, "No space left on device")
FAILS = OSError(errno.EIO, "Input/output error")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")

NO_SPACE, FAULT = "452 4.3.1 Insufficient storage, try again later", "451 4.3.0 Local error, try again later"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle relay looks after its disk more often than once a second."""
    monkeypatch.setattr(commit, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.05)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FailingDisk]:
    with failing_disk(tmp_path / "spool") as disk:
        yield disk


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


def content(name: str, size: int) -> bytes:
    return b"X-Id: %b\r\n\r\n" % name.encode() + b"%074d\r\n" % 7 * (size // 76)


async def offer(relay: Running, name: str, size: int = SMALL) -> str:
    """Send a message as far as the relay lets it; the last reply."""
    async with relay.client() as client:
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.send(b"DATA\r\n")
        reply = await client.reply()
        if reply.code == 354:
            await client.send(content(name, size) + b".\r\n")
            reply = await client.reply()
        return f"{reply}"


def names(upstream: ScriptedUpstream) -> list[str]:
    return sorted(t.content.split(b"X-Id: ")[1].split(b"\r\n")[0].decode() for t in upstream.accepted)


def notes(relay: Running) -> list[str]:
    return [event["what"] for event in relay.events("note") if "mail" in event["what"]]


@pytest.mark.parametrize(
    ("what", "error", "size", "reply", "said"),
    [
        ("log write", apsw.FullError("database or disk is full"), SMALL, NO_SPACE, "no space left for the spool"),
        ("log write", apsw.IOError("disk I/O error"), SMALL, FAULT, "cannot be written: disk I/O error"),
        ("log write", apsw.ReadOnlyError("attempt to write a readonly database"), SMALL, FAULT, "is read-only"),
        ("log sync", apsw.IOError("disk I/O error"), SMALL, FAULT, "cannot be written: disk I/O error"),
        ("files write", FULL, LARGE, NO_SPACE, "no space left for the spool: No space left on device"),
        ("files write", FULL, SPILLED, NO_SPACE, "no space left for the spool: No space left on device"),
        ("files write", FAILS, SPILLED, FAULT, "cannot be written: Input/output error"),
        ("files sync", FAILS, LARGE, FAULT, "cannot be written: Input/output error"),
        ("files sync", FAILS, SPILLED, FAULT, "cannot be written: Input/output error"),
        ("files open", READ_ONLY, SPILLED, FAULT, "cannot be written: Read-only file system"),
        ("names sync", FAILS, LARGE, FAULT, "cannot be written: Input/output error"),
    ],
)
async def test_nothing_is_promised_that_could_not_be_stored_and_the_relay_mends_by_itself(
    tmp_path: Path, disk: FailingDisk, upstream: ScriptedUpstream, eventually: Callable[..., Any], what: str, error: Exception, size: int,
    reply: str, said: str,
) -> None:  # fmt: skip
    async with running(tmp_path, upstreams={"acme": to(upstream)}, routes=[{"upstream": "acme"}], faults=True) as relay:
        assert (await offer(relay, "before", size)).startswith("250")
        await relay.empty()
        disk.fail(what, error)
        assert await offer(relay, "while", size) == reply
        assert await offer(relay, "then", SMALL) == reply, "and whoever comes then is told before the content"
        failed = disk.failures[what]
        await eventually(lambda: disk.failures[what] > failed, "it tries by itself")
        assert await offer(relay, "later", SMALL) == reply
        disk.mend()

        async def taken() -> bool:
            return (await offer(relay, "after", size)).startswith("250")

        await until(taken)
        await relay.empty()
        assert names(upstream) == ["after", "before"]
        await eventually(lambda: notes(relay)[-1:] == ["the spool takes mail again"], "it says so")
        assert said in notes(relay)[0]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("error", [apsw.FullError("full"), apsw.IOError("disk I/O error")])
async def test_an_outcome_that_cannot_be_stored_is_stored_later_and_nothing_is_sent_twice(
    tmp_path: Path, disk: FailingDisk, upstream: ScriptedUpstream, eventually: Callable[..., Any], error: Exception
) -> None:  # fmt: skip
    answer = asyncio.Event()
    upstream.script("final", Hold(answer), times=1)
    async with running(tmp_path, upstreams={"acme": to(upstream)}, routes=[{"upstream": "acme"}], faults=True) as relay:
        assert (await offer(relay, "m")).startswith("250")
        await eventually(lambda: upstream.transactions and upstream.transactions[0].complete, "the content is there")
        disk.fail("log write", error)
        answer.set()
        await eventually(lambda: relay.events("fault"), "the relay says that it cannot store the outcome")
        assert len(relay.queue()) == 1
        disk.mend()
        await relay.empty()
        assert names(upstream) == ["m"]


async def test_a_checkpoint_that_fails_stops_intake_until_it_works_and_loses_nothing(
    tmp_path: Path, disk: FailingDisk, upstream: ScriptedUpstream, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    """Mail could still be logged, but the log would grow for ever."""
    async with running(tmp_path, upstreams={"acme": to(upstream)}, routes=[{"upstream": "acme"}], faults=True) as relay:
        disk.fail("database write", apsw.FullError("full"))
        assert (await offer(relay, "first")).startswith("250")
        await eventually(lambda: disk.failures["database write"] > 2, "the checkpoint is tried again and again")
        assert await offer(relay, "second") == NO_SPACE
        disk.mend()

        async def taken() -> bool:
            return (await offer(relay, "third")).startswith("250")

        await until(taken)
        await relay.empty()
        assert names(upstream) == ["first", "third"]


# -- the spool alone -------------------------------------------------------------------------------------------------------


def open_spool(directory: Path, clock: Any = None, **limits: Any) -> SqliteSpool:
    return SqliteSpool(directory, clock or SystemClock(), backoff=lambda attempts: 60.0, keep_log_seconds=1e9, **limits)


async def test_a_commit_that_had_nothing_to_write_is_no_sign_of_health(
    tmp_path: Path, disk: FailingDisk, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    monkeypatch.setattr(commit, "IDLE_SECONDS", 3600)
    spool = open_spool(tmp_path / "spool")
    disk.fail("log write", apsw.FullError("full"))
    with pytest.raises(SpoolFull):
        await spool.put([draft(spool)], [False])
    for _ in range(3):
        await spool.next_due()
    assert "no space left" in str(spool.obstacle())
    disk.mend()
    await spool.put([draft(spool)], [False])
    assert spool.obstacle() is None
    await spool.close()


@pytest.mark.parametrize("what", ["database write", "database sync", "log sync"])
async def test_a_spool_on_a_disk_that_fails_can_be_closed_and_loses_nothing(tmp_path: Path, disk: FailingDisk, what: str) -> None:
    spool = open_spool(tmp_path / "spool")
    message = draft(spool)
    await spool.put([message], [False])
    disk.fail(what, apsw.IOError("disk I/O error"))
    await spool.close()
    disk.mend()
    spool = open_spool(tmp_path / "spool")
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [message.id]
    await spool.close()


async def test_another_process_that_holds_the_database_stops_neither_the_loop_nor_the_relay_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    monkeypatch.setattr(sqlite_batch, "_PATIENCE_SECONDS", 0.3)
    spool = open_spool(tmp_path)
    other = apsw.Connection(str(tmp_path / sql.DATABASE))
    other.execute("BEGIN IMMEDIATE")
    put = asyncio.ensure_future(spool.put([draft(spool)], [False]))
    turns = 0
    while not put.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 10, "the loop went on meanwhile"
    assert "another process holds its database" in str(put.exception())
    assert "another process" in str(spool.obstacle())
    other.execute("COMMIT")
    await eventually(lambda: spool.obstacle() is None, "it works again")
    await spool.put([draft(spool)], [False])
    other.close()
    await spool.close()


async def test_a_sync_that_fails_once_costs_nothing(tmp_path: Path) -> None:
    """The batch is written again, whole, and synced again: nothing of it is taken for written because it was written before."""
    with failing_disk(tmp_path / "spool") as disk:
        spool = open_spool(tmp_path / "spool")
        disk.fail("log sync", apsw.IOError("once"))
        meet = disk.meet

        def once(what: str) -> None:
            try:
                meet(what)
            except apsw.IOError:
                disk.mend()
                raise

        disk.meet = once  # type: ignore[method-assign]
        await asyncio.gather(*(spool.put([draft(spool)], [False]) for _ in range(3)))
        assert disk.failures == {"log sync": 1}
        assert len(await spool.claim(LANE, 10)) == 3
        await spool.close()


async def test_the_limits_are_kept_over_restarts_and_by_everything_that_comes_and_goes(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, max_size_bytes=1000)
    first, second = draft(spool, content=b"x" * 600), draft(spool, content=b"x" * 400)
    (claim,) = await spool.put([first], [True])
    assert claim is not None
    with pytest.raises(SpoolFull, match="max_size"):
        await spool.put([draft(spool, content=b"x" * 401)], [False])
    await spool.put([second], [False])
    assert isinstance(spool.obstacle(1), SpoolFull)
    assert spool.obstacle() is None
    await spool.settle(settlement(claim, DEFERRED, then=Next(0.0, LANE)))
    assert isinstance(spool.obstacle(1), SpoolFull), "it still waits"
    await spool.close()

    spool = open_spool(tmp_path, max_size_bytes=1000)
    assert isinstance(spool.obstacle(1), SpoolFull)
    bounce = draft(spool, sender="", content=b"x" * 100)
    claims = {claim.id: claim for claim in await spool.claim(LANE, 10)}
    await spool.settle(settlement(claims[first.id], bounce=bounce))
    assert spool.obstacle(500) is None
    assert isinstance(spool.obstacle(501), SpoolFull), "a bounce takes room, and is never refused"
    await spool.settle(settlement(claims[second.id]))
    assert spool.obstacle(900) is None
    await spool.close()


async def test_what_an_operator_drops_makes_room(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, max_size_bytes=1000)
    await spool.put([draft(spool, content=b"x" * 600), draft(spool, content=b"x" * 400)], [False, False])
    assert len(await spool.drop(EVERYTHING)) == 2
    assert spool.obstacle(1000) is None
    await spool.close()


async def test_what_does_not_fit_leaves_no_file(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    spool = open_spool(tmp_path, max_size_bytes=1000)
    writer = spool.writer()
    await writer.write(b"x" * 2000)
    with pytest.raises(SpoolFull):
        arrived = await writer.finish()
        try:
            await spool.put([draft(spool, content=arrived)], [False])
        finally:
            spool.discard(arrived)  # as intake does
    await eventually(lambda: not list((tmp_path / "incoming").iterdir()), "it is removed")
    assert list((tmp_path / "content").iterdir()) == []
    await spool.close()


async def test_the_client_hears_of_the_limits_at_mail_and_before_the_content(
    tmp_path: Path, upstream: ScriptedUpstream, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    limits = {"directory": str(tmp_path / "spool"), "max_size": 10_000, "min_free": 0}
    async with running(tmp_path, upstreams={"acme": to(upstream)}, routes=[{"upstream": "acme"}], spool=limits) as relay:
        async with relay.client() as client:
            await client.greet()
            await client.command("MAIL FROM:<app@acme.example> SIZE=10001", 452, "4.3.1")
            await client.command("MAIL FROM:<app@acme.example> SIZE=9000", 250)
            await client.command("RSET", 250)
        assert await offer(relay, "larger than it said", 20_000) == NO_SPACE
        assert (await offer(relay, "small")).startswith("250")
        await relay.empty()
    limits = {"directory": str(tmp_path / "other"), "min_free": "1000TB"}
    (tmp_path / "2").mkdir()
    async with running(tmp_path / "2", upstreams={"acme": to(upstream)}, routes=[{"upstream": "acme"}], spool=limits) as relay:
        assert await offer(relay, "no room") == NO_SPACE
        await eventually(lambda: "min_free" in "".join(notes(relay)), "it says why")
    assert names(upstream) == ["small"]


# -- damage, and starting on it ---------------------------------------------------------------------------------------------


async def test_a_damaged_page_costs_its_own_message_and_no_other(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    drafts = [draft(spool, content=b"%d" % place * 20_000) for place in range(9)]
    await spool.put(drafts, [False] * 9)
    await spool.close()
    file = tmp_path / sql.DATABASE
    octets = bytearray(file.read_bytes())
    place = octets.index(b"4" * 4000) // 4096 * 4096
    octets[place : place + 4096] = b"\xff" * 4096
    file.write_bytes(octets)

    told: list[Any] = []
    spool = open_spool(tmp_path, quarantined=lambda *what: told.append(what))
    claims = await spool.claim(LANE, 10)
    whole = [d.id for d in drafts if d is not drafts[4]]
    assert [claim.id for claim in claims] == whole
    assert all(octets_of(claim.content) == d.content.octets for claim in claims for d in drafts if d.id == claim.id)
    assert [what[0] for what in told] == [drafts[4].id]
    for claim in claims:
        await spool.settle(settlement(claim))
    await spool.put([draft(spool)], [False])
    assert spool.obstacle() is None
    await spool.close()


async def test_a_relay_does_not_start_on_what_is_no_spool_and_says_that_trying_again_is_no_use(tmp_path: Path) -> None:
    relay = RelayProcess(config(tmp_path, 25, connections=1), directory=tmp_path)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / sql.DATABASE).write_bytes(b"this is not a database at all " * 500)
    with pytest.raises(RelayDied):
        await relay.start()
    assert await relay.exited() == 78
    assert "is no database; restore it, or move it, its -wal and content/ away to begin with none" in relay.log()


# -- the clock ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-86_400.0, -30 * 365 * 86_400.0])
async def test_a_clock_that_is_set_back_keeps_no_mail_waiting(tmp_path: Path, step: float) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    fresh, retried, held = (draft(spool, due=clock.now(), created=clock.now()) for _ in range(3))
    await spool.put([fresh], [False])
    claims = [claim for claim in await spool.put([retried, held], [True, True]) if claim is not None]
    await spool.settle(settlement(claims[0], DEFERRED, then=Next(clock.now() + 60, LANE)))
    await spool.settle(settlement(claims[1], DEFERRED, then=Next(clock.now() + 86_400, LANE, held="no route")))
    clock.step(step)
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [fresh.id]
    assert await spool.next_due() == {LANE: clock.now() + 60}
    clock.advance(60)
    (claim,) = await spool.claim(LANE, 10)
    assert (claim.id, claim.created) == (retried.id, clock.now() - 60)
    assert await spool.overdue(10) == []
    clock.advance(86_400 - 60)
    assert [claim.id for claim in await spool.overdue(10)] == [held.id]
    await spool.close()


@pytest.mark.parametrize("step", [86_400.0, 30 * 365 * 86_400.0])
async def test_a_clock_that_is_set_forward_makes_no_mail_old(tmp_path: Path, step: float) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    fresh, retried, held = (draft(spool, due=clock.now(), created=clock.now()) for _ in range(3))
    await spool.put([fresh], [False])
    claims = [claim for claim in await spool.put([retried, held], [True, True]) if claim is not None]
    await spool.settle(settlement(claims[0], DEFERRED, then=Next(clock.now() + 60, LANE)))
    await spool.settle(settlement(claims[1], DEFERRED, then=Next(clock.now() + 86_400, LANE, held="no route")))
    clock.advance(100)
    clock.step(step)
    after = draft(spool, due=clock.now(), created=clock.now())
    await spool.put([after], [False])
    claimed = {claim.id: claim.created for claim in await spool.claim(LANE, 10)}
    assert claimed == {fresh.id: clock.now() - 100, retried.id: clock.now() - 100, after.id: clock.now()}
    assert await spool.overdue(10) == []
    clock.advance(86_400 - 101)
    assert await spool.overdue(10) == []
    clock.advance(1)
    assert [claim.id for claim in await spool.overdue(10)] == [held.id]
    await spool.close()


async def test_a_clock_that_is_set_forward_gives_nothing_up_that_is_being_tried(tmp_path: Path) -> None:
    clock, lane = ManualClock(), Lane("acme", "acme")
    spool, log, metrics = open_spool(tmp_path / "spool", clock), Log(tmp_path, clock), Metrics()
    settings = config_of(retry={"expire": "4h", "warn_after": "2h"})
    breakers = Breakers(settings.retry, log.journal, metrics, clock)
    settler = Settler(settings, Router(settings), spool, log.journal, clock, rng=random.Random(1), breakers=breakers, metrics=metrics)
    (claim,) = await spool.put([draft(spool, lane=lane, created=clock.now(), due=clock.now())], [True])
    assert claim is not None
    clock.step(86_400)
    (then,) = await settler.settle(claim, Result({"you@example.org": DEFERRED}))
    assert then.lane == lane
    clock.advance(4 * 3600)
    (claim,) = await spool.claim(lane, 10)
    assert (claim.attempt, claim.created) == (2, clock.now() - 4 * 3600)
    (_,) = await settler.settle(claim, Result({"you@example.org": DEFERRED}))
    assert log.names() == ["deferred", "failed", "bounced"], "its time is up when it is old"
    await spool.close()


async def test_a_clock_that_is_set_while_the_disk_fails_makes_no_mail_old_either(tmp_path: Path, disk: FailingDisk) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path / "spool", clock)
    await spool.put([draft(spool, due=clock.now(), created=clock.now())], [False])
    disk.fail("log write", apsw.IOError("broken"))
    clock.step(86_400)
    for _ in range(2):
        with pytest.raises(SpoolError):
            await spool.claim(LANE, 10)
    disk.mend()
    (claim,) = await spool.claim(LANE, 10)
    assert claim.created == clock.now()
    await spool.close()


async def test_mail_from_the_future_is_tried_after_a_start(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    message = draft(spool, due=clock.now() + 3600, created=clock.now())
    await spool.put([message], [False])
    await spool.close()
    spool = open_spool(tmp_path, early := ManualClock(clock.now() - 86_400))
    (claim,) = await spool.claim(LANE, 10)
    assert (claim.id, claim.created) == (message.id, early.now())
    await spool.close()
