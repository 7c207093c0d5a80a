"""The embedded spool's own promises: what a restart finds, what a full disk does, and how it lies on the disk."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.clock import ManualClock
from relay.mail.envelope import Recipient, Summary
from relay.spool import commit, sqlite, sqlite_claims, sqlite_verbs
from relay.spool import sqlite_schema as sql
from relay.spool.base import EVERYTHING, FILE_ABOVE_BYTES, Lane, Next, Selection, SpoolDamaged, SpoolError, SpoolFull, SpoolInUse, Used
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, LANE, OTHER_LANE, SENT, content_of, draft, octets_of, settlement, stored_files
from tests.support.eventually import eventually

KEEP_LOG_SECONDS = 86_400.0
LARGE = b"L" * (FILE_ABOVE_BYTES + 1)


def open_spool(directory: Path, clock: ManualClock | None = None) -> SqliteSpool:
    return SqliteSpool(directory, clock or ManualClock(), backoff=lambda attempts: 60.0 * attempts, keep_log_seconds=KEEP_LOG_SECONDS)


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[SqliteSpool]:
    spool = open_spool(tmp_path / "spool")
    yield spool
    await spool.close()


def read(directory: Path, statement: str) -> list[Any]:
    """What another process would see in the database."""
    database = apsw.Connection(str(directory / sql.DATABASE), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        return list(database.execute(statement))
    finally:
        database.close()


def left(directory: Path) -> tuple[int, int, list[str]]:
    """How many messages and rows of content there are, and which files."""
    ((messages, contents),) = read(directory, "SELECT (SELECT count(*) FROM message), (SELECT count(*) FROM content)")
    return messages, contents, stored_files(directory)


# -- restarts -------------------------------------------------------------------------------------------------------------


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    small, large = draft(spool), draft(spool, content=LARGE)
    await spool.put([small, large], [False, False])
    await spool.close()
    again = open_spool(tmp_path)
    assert await again.next_due() == {LANE: 0.0}
    claims = {claim.id: claim for claim in await again.claim(LANE, 10)}
    assert claims.keys() == {small.id, large.id}
    assert octets_of(claims[large.id].content) == LARGE
    assert not any(r.in_doubt for claim in claims.values() for r in claim.envelope.recipients)
    assert again.new_id() > max(small.id, large.id)
    await again.close()


async def test_an_abrupt_end_loses_nothing_and_leaves_what_was_claimed_in_doubt(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path / "spool", clock)
    settled, put_claimed, waiting = draft(spool), draft(spool), draft(spool, due=1.0, content=LARGE)
    claimed = draft(spool, recipients=["a@x.example", Recipient("b@x.example", "NEVER")])
    first, _ = await spool.put([settled, put_claimed], [True, True])
    assert first is not None
    await spool.put([claimed], [False])
    assert [claim.id for claim in await spool.claim(LANE, 1)] == [claimed.id]
    await spool.put([waiting], [False])
    await spool.settle(settlement(first))
    shutil.copytree(tmp_path / "spool", tmp_path / "after")  # what a power cut would leave, for every commit is synced
    await spool.close()

    after = open_spool(tmp_path / "after", clock)
    now = clock.now()
    assert [claim.id for claim in await after.claim(LANE, 10)] == [waiting.id], "what was claimed waits for the time written with its claim"
    assert await after.next_due() == {LANE: 1_800_000_000.0 + 60.0}
    clock.advance(60)
    claims = {claim.id: claim for claim in await after.claim(LANE, 10)}
    assert claims.keys() == {put_claimed.id, claimed.id}
    assert all(r.in_doubt for claim in claims.values() for r in claim.envelope.recipients)
    assert {claim.attempt for claim in claims.values()} == {2}
    assert claims[claimed.id].envelope.recipients[1] == Recipient("b@x.example", "NEVER", in_doubt=True)
    assert clock.now() == now + 60
    await after.close()


async def test_a_deferral_after_a_restart_keeps_the_doubt(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "spool")
    await spool.put([draft(spool)], [True])
    shutil.copytree(tmp_path / "spool", tmp_path / "after")
    await spool.close()
    clock = ManualClock()
    clock.advance(3600)
    after = open_spool(tmp_path / "after", clock)
    for _ in range(3):
        (claim,) = await after.claim(LANE, 10)
        assert [r.in_doubt for r in claim.envelope.recipients] == [True]
        await after.settle(settlement(claim, DEFERRED, then=Next(clock.now(), LANE)))
    await after.close()


async def test_held_mail_stays_held_over_a_restart(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    (claim,) = await spool.put([draft(spool)], [True])
    assert claim is not None
    await spool.settle(settlement(claim, DEFERRED, then=Next(0.0, LANE, held="no route")))
    await spool.close()
    again = open_spool(tmp_path)
    assert await again.claim(LANE, 10) == []
    assert await again.next_due() == {}
    assert read(tmp_path, "SELECT held FROM message") == [("no route",)]
    await again.close()


async def test_ids_rise_over_a_restart_even_when_the_clock_was_set_back(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    (claim,) = await spool.put([draft(spool)], [True])
    assert claim is not None
    await spool.settle(settlement(claim))  # only the delivery log knows it now
    await spool.close()
    again = open_spool(tmp_path, ManualClock(1_700_000_000.0))
    assert again.new_id() > claim.id
    await again.close()


async def test_files_that_no_message_names_are_removed_at_the_start_and_the_others_kept(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    message = draft(spool, content=LARGE)
    await spool.put([message], [False])
    await spool.close()
    (tmp_path / "content" / "00000000000AB").write_bytes(b"put, and never committed")
    (tmp_path / "incoming" / "1-1").write_bytes(b"half arrived")
    again = open_spool(tmp_path)
    assert stored_files(tmp_path) == [f"content/{message.id}"]
    (claim,) = await again.claim(LANE, 1)
    assert octets_of(claim.content) == LARGE
    await again.close()


async def test_a_directory_that_is_held_is_refused_with_its_holder(spool: SqliteSpool, tmp_path: Path) -> None:
    with pytest.raises(SpoolInUse, match=rf"{tmp_path}/spool is in use by another relay \(process {os.getpid()}\)"):
        open_spool(tmp_path / "spool")
    await spool.put([draft(spool)], [False])


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    await open_spool(tmp_path).close()
    read(tmp_path, f"PRAGMA user_version = {sql.SCHEMA_VERSION + 1}")
    for _ in range(2):  # the second time as well: the directory is not held by the failure
        with pytest.raises(SpoolError, match="written by a newer relay") as caught:
            open_spool(tmp_path)
        assert type(caught.value) is SpoolError
    read(tmp_path, f"PRAGMA user_version = {sql.SCHEMA_VERSION}")
    await open_spool(tmp_path).close()


async def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / sql.DATABASE).write_bytes(b"not a database, but long enough to be one" * 100)
    for _ in range(2):
        with pytest.raises(SpoolError, match="cannot be opened") as caught:
            open_spool(tmp_path)
        assert type(caught.value) is SpoolDamaged


@pytest.mark.parametrize("length", [100, sql._PAGE_BYTES, 2 * sql._PAGE_BYTES])
async def test_a_database_that_is_damaged_at_its_root_is_refused_as_beyond_trying_again(tmp_path: Path, length: int) -> None:
    spool = open_spool(tmp_path)
    await spool.put([draft(spool, content=LARGE)], [False])
    await spool.close()
    os.truncate(tmp_path / sql.DATABASE, length)
    with pytest.raises(SpoolDamaged, match=r"cannot be opened: spool\.db is damaged at its root; restore it, or move it"):
        open_spool(tmp_path)
    assert len(stored_files(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"small", LARGE])
@pytest.mark.parametrize("length", [None, 0, 1])
async def test_a_database_that_has_gone_is_missed_and_what_is_left_of_its_mail_is_not_removed(
    tmp_path: Path, content: bytes, length: int | None
) -> None:  # fmt: skip
    """SQLite would remove the log of a database that is empty, and the sweep the files that no record names."""
    spool = open_spool(tmp_path / "spool")
    message = draft(spool, content=content)
    await spool.put([message], [False])
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path / "spool", crashed)
    await spool.close()
    kept, log = tmp_path / "kept", crashed / f"{sql.DATABASE}-wal"
    shutil.copy(crashed / sql.DATABASE, kept)
    octets = log.read_bytes()
    (crashed / sql.DATABASE).unlink()
    if length is not None:
        (crashed / sql.DATABASE).write_bytes(bytes(length))
    for _ in range(2):
        with pytest.raises(SpoolDamaged, match=r"spool\.db is missing or empty, but there is mail of its spool"):
            open_spool(crashed)
    assert log.read_bytes() == octets
    shutil.copy(kept, crashed / sql.DATABASE)
    again = open_spool(crashed)
    (claim,) = await again.claim(LANE, 1)
    assert octets_of(claim.content) == content
    await again.close()


async def test_content_whose_database_has_gone_is_not_removed(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    await spool.put([draft(spool, content=LARGE)], [False])
    await spool.close()
    (tmp_path / sql.DATABASE).unlink()
    with pytest.raises(SpoolDamaged, match="there is mail of its spool in content; restore it, or move content away, too"):
        open_spool(tmp_path)
    assert len(stored_files(tmp_path)) == 1


async def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(SpoolError, match=f"cannot be used: {tmp_path}/lock: Is a directory"):
        open_spool(tmp_path)
    (tmp_path / "lock").rmdir()
    await open_spool(tmp_path).close()
    (tmp_path / f"{sql.DATABASE}-wal").mkdir()
    with pytest.raises(SpoolError, match=r"cannot be opened: .*must belong to the user as whom relay runs") as caught:
        open_spool(tmp_path)
    assert type(caught.value) is SpoolError


async def test_a_spool_from_which_all_was_moved_away_begins_anew(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    await spool.put([draft(spool, content=LARGE)], [False])
    await spool.close()
    (tmp_path / sql.DATABASE).unlink()
    (tmp_path / "content").rename(tmp_path / "moved away")
    again = open_spool(tmp_path)
    assert await again.next_due() == {}
    await again.close()


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="cannot be used"):
        open_spool(tmp_path / "file")


async def test_nobody_else_may_read_the_mail(spool: SqliteSpool, tmp_path: Path) -> None:
    await spool.put([draft(spool), draft(spool, content=LARGE)], [False, False])
    readable = [path for path in (tmp_path / "spool").rglob("*") if path.stat().st_mode & 0o077]
    assert readable == []


# -- batches --------------------------------------------------------------------------------------------------------------


async def test_a_bad_put_beside_good_ones_is_told_and_the_others_are_taken(spool: SqliteSpool, tmp_path: Path) -> None:
    known = draft(spool)
    await spool.put([known], [True])
    good = [draft(spool) for _ in range(10)]
    bad = draft(spool)._replace(id=known.id)
    results = await asyncio.gather(*(spool.put([each], [False]) for each in (*good[:5], bad, *good[5:])), return_exceptions=True)
    assert [isinstance(result, SpoolError) for result in results] == [False] * 5 + [True] + [False] * 5
    assert {claim.id for claim in await spool.claim(LANE, 100)} == {message.id for message in good}
    await eventually(lambda: left(tmp_path / "spool") == (11, 11, []), "that much is left")


async def test_a_stale_settle_beside_good_ones_is_told_and_the_others_are_stored(spool: SqliteSpool, tmp_path: Path) -> None:
    claims = [claim for claim in await spool.put([draft(spool) for _ in range(40)], [True] * 40) if claim]
    stale = claims[7]._replace(token=999_999)
    bounce = draft(spool, sender="")
    ends = [
        settlement(claims[0], FAILED, bounce=bounce),
        settlement(stale, FAILED, bounce=draft(spool, sender="")),
        *(settlement(claim) for claim in claims[1:7]),
        settlement(claims[7], DEFERRED, then=Next(0.0, OTHER_LANE)),
        *(settlement(claim) for claim in claims[8:]),
    ]
    results = await asyncio.gather(*(spool.settle(end) for end in ends), return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["NoneType", "LeaseLost", *["NoneType"] * 39]
    assert [claim.id for claim in await spool.claim(LANE, 100)] == [bounce.id]
    assert [claim.id for claim in await spool.claim(OTHER_LANE, 100)] == [claims[7].id]
    assert read(tmp_path / "spool", "SELECT count(*) FROM log") == [(40,)]


async def test_text_that_the_database_cannot_take_is_refused_and_hurts_nobody(spool: SqliteSpool, tmp_path: Path) -> None:
    odd = draft(spool, content=LARGE, summary=Summary(subject="\ud800"))
    good = draft(spool)
    results = await asyncio.gather(spool.put([odd], [True]), spool.put([good], [False]), return_exceptions=True)
    assert isinstance(results[0], Exception)
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [good.id]
    await eventually(lambda: left(tmp_path / "spool") == (1, 1, []), "that much is left")


async def test_of_two_contents_of_which_one_cannot_be_stored_neither_is_left(
    spool: SqliteSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    first, second = draft(spool, content=LARGE), draft(spool, content=LARGE + b"2")
    rename = os.rename

    def refuse_the_second(source: Path, target: Path) -> None:
        if target.name == second.id:
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_second)
    with pytest.raises(SpoolFull):
        await spool.put([first, second], [True, False])
    await eventually(lambda: left(tmp_path / "spool") == (0, 0, []), "that much is left")


# -- trouble --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_full_database_takes_nothing_says_so_and_works_again_when_there_is_room(
    spool: SqliteSpool, tmp_path: Path, claimed: bool
) -> None:  # fmt: skip
    directory = tmp_path / "spool"
    kept = draft(spool)
    await spool.put([kept], [False])
    pages = spool._database.pragma("page_count")
    spool._database.pragma("max_page_count", pages)
    with pytest.raises(SpoolFull, match="no space left"):
        await spool.put([draft(spool, content=b"x" * 200_000), draft(spool)], [claimed, claimed])
    await eventually(lambda: left(directory) == (1, 1, []), "that much is left")
    assert "no space left" in str(spool.obstacle())
    spool._database.pragma("max_page_count", 1_000_000)
    await spool.put([draft(spool, content=b"x" * 200_000)], [claimed])
    assert spool.obstacle() is None
    assert kept.id in {claim.id for claim in await spool.claim(LANE, 10)}


async def test_a_full_database_leaves_no_file_of_a_large_message(spool: SqliteSpool, tmp_path: Path) -> None:
    spool._database.pragma("max_page_count", spool._database.pragma("page_count"))
    with pytest.raises(SpoolFull):
        await spool.put([draft(spool, content=LARGE, prefix=b"p" * 100_000)], [True])
    await eventually(lambda: left(tmp_path / "spool") == (0, 0, []), "that much is left")


async def test_a_settle_that_does_not_fit_can_be_stored_later(spool: SqliteSpool, tmp_path: Path) -> None:
    (claim,) = await spool.put([draft(spool)], [True])
    assert claim is not None
    spool._database.pragma("max_page_count", spool._database.pragma("page_count"))
    end = settlement(claim, FAILED, bounce=draft(spool, sender="", content=b"x" * 200_000))
    for _ in range(2):
        with pytest.raises(SpoolFull):
            await spool.settle(end)
    assert [each.token for each in await spool.renew([claim])] == [claim.token], "the claim is still ours"
    spool._database.pragma("max_page_count", 1_000_000)
    await spool.settle(end)
    assert len(await spool.claim(LANE, 10)) == 1
    await eventually(lambda: left(tmp_path / "spool")[0] == 1, "that much is left")


async def test_a_lease_that_could_not_be_ended_is_ended_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    await spool.put([draft(spool)], [True])
    clock.advance(sqlite_claims.LEASE_SECONDS)
    monkeypatch.setattr(sql, "EXPIRE", "UPDATE nonsense SET token = ?, doubt = ?")
    with pytest.raises(SpoolError):
        await spool.next_due()
    monkeypatch.undo()
    assert list(await spool.next_due()) == [LANE]
    await spool.close()


@pytest.mark.parametrize("name", [sql.DATABASE, f"{sql.DATABASE}-wal"])
async def test_no_mail_is_taken_into_a_file_that_was_removed_until_it_is_back(tmp_path: Path, name: str) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path / "spool", clock)
    path, aside = tmp_path / "spool" / name, tmp_path / "aside"
    path.rename(aside)
    await put_next_second(spool, clock)
    assert f"{path} was removed or replaced" in str(spool.obstacle())
    path.touch()
    await put_next_second(spool, clock)
    assert spool.obstacle() is not None, "another one of this name is no help"
    aside.rename(path)
    await put_next_second(spool, clock)
    assert spool.obstacle() is None
    await spool.close()


async def put_next_second(spool: SqliteSpool, clock: ManualClock) -> None:
    """The thread looks at the disk behind its commit: so the second one finds that done."""
    clock.advance(1)
    for _ in range(2):
        await spool.put([draft(spool)], [False])


@pytest.mark.parametrize("step", ["write", "fsync"])
async def test_a_full_disk_for_files_takes_nothing(
    spool: SqliteSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:  # fmt: skip
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(SpoolFull, match="no space left"):
        await spool.put([draft(spool, content=LARGE), draft(spool)], [True, True])
    await eventually(lambda: left(tmp_path / "spool") == (0, 0, []), "that much is left")
    monkeypatch.undo()
    await spool.put([draft(spool, content=LARGE), draft(spool)], [True, True])
    await eventually(lambda: left(tmp_path / "spool")[:2] == (2, 1), "that much is left")


async def test_a_checkpoint_that_fails_stops_nothing(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full just when the log is to be written back."""
    monkeypatch.setattr(sqlite, "_CHECKPOINT_BYTES", 0)
    failures = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal failures
        failures += 1
        raise apsw.FullError("database or disk is full")

    class Failing:
        """The database, but for checkpoints."""

        def __init__(self, database: apsw.Connection) -> None:
            self._database = database

        wal_checkpoint = staticmethod(fail)

        def __getattr__(self, name: str) -> object:
            return getattr(self._database, name)

    real = spool._database
    monkeypatch.setattr(spool, "_database", Failing(real))
    for _ in range(3):
        await asyncio.wait_for(spool.put([draft(spool)], [False]), 30)
    await eventually(lambda: failures >= 3, "checkpoints fail")
    monkeypatch.setattr(spool, "_database", real)
    assert len(await asyncio.wait_for(spool.claim(LANE, 10), 30)) == 3


async def test_a_message_without_its_content_is_held_and_its_lane_goes_on(spool: SqliteSpool, tmp_path: Path) -> None:
    messages = [draft(spool, due=float(place)) for place in range(3)]
    await spool.put(messages, [False] * 3)
    read(tmp_path / "spool", f"DELETE FROM content WHERE id = {int(messages[1].id, 16)}")
    claims = await spool.claim(LANE, 10)
    assert [claim.id for claim in claims] == [messages[0].id, messages[2].id]
    rows = read(tmp_path / "spool", "SELECT held, token FROM message WHERE held <> ''")
    assert rows == [("the content is missing from the spool", None)], "held, and claimed by nobody"
    assert await spool.next_due() == {}


async def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    message = draft(spool)
    await spool.close()
    with pytest.raises(SpoolError, match="closed"):
        await asyncio.wait_for(spool.put([message], [False]), 30)


async def test_closing_writes_everything_back_into_the_database(tmp_path: Path) -> None:
    spool = open_spool(tmp_path)
    await spool.put([draft(spool)], [False])
    await spool.close()
    assert not (tmp_path / f"{sql.DATABASE}-wal").exists()


# -- the delivery log -----------------------------------------------------------------------------------------------------


async def test_the_log_has_a_row_for_each_recipient_of_each_attempt(spool: SqliteSpool, tmp_path: Path) -> None:
    message = draft(spool, recipients=["a@x.example", "b@x.example", "c@x.example"], summary=Summary("to", "cc", "süß"))
    (claim,) = await spool.put([message], [True])
    assert claim is not None
    await spool.settle(
        settlement(claim, {"a@x.example": SENT, "b@x.example": DEFERRED, "c@x.example": FAILED}, then=Next(0.0, OTHER_LANE))
    )  # fmt: skip
    (claim,) = await spool.claim(OTHER_LANE, 1)
    await spool.settle(settlement(claim))
    rows = read(tmp_path / "spool", "SELECT id, upstream, route, recipient, status, attempt, reply, size, summary FROM log ORDER BY number")
    common = (len(octets_of(message.content)), '["to","cc","süß"]')
    number = int(message.id, 16)
    assert rows == [
        (number, *LANE, "a@x.example", "sent", 1, "250 2.0.0 Ok", *common),
        (number, *LANE, "b@x.example", "deferred", 1, "450 4.2.0 later", *common),
        (number, *LANE, "c@x.example", "failed", 1, "550 5.1.1 nobody", *common),
        (number, *OTHER_LANE, "b@x.example", "sent", 2, "250 2.0.0 Ok", *common),
    ]


async def test_a_message_that_goes_elsewhere_untried_is_not_in_the_log_and_keeps_its_last_reply(spool: SqliteSpool, tmp_path: Path) -> None:
    (claim,) = await spool.put([draft(spool)], [True])
    assert claim is not None
    await spool.settle(settlement(claim, DEFERRED, then=Next(0.0, LANE)))
    (claim,) = await spool.claim(LANE, 1)
    await spool.settle(settlement(claim, IN_DOUBT, then=Next(0.0, OTHER_LANE, counted=False))._replace(tried=False))
    assert read(tmp_path / "spool", "SELECT status FROM log") == [("deferred",)]
    assert read(tmp_path / "spool", "SELECT upstream, reply FROM message") == [(OTHER_LANE.upstream, "450 4.2.0 later")]


async def settle_some(spool: SqliteSpool, count: int) -> None:
    for claim in await spool.put([draft(spool) for _ in range(count)], [True] * count):
        assert claim is not None
        await spool.settle(settlement(claim))


@pytest.fixture
def short_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(commit, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(commit, "RIDE_SECONDS", 0.001)
    yield


@pytest.mark.usefixtures("short_idle")
async def test_log_rows_go_when_they_are_too_old_and_not_before(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    await settle_some(spool, 3)
    clock.advance(KEEP_LOG_SECONDS - 10)
    await settle_some(spool, 2)
    assert read(tmp_path, "SELECT count(*) FROM log") == [(5,)]
    clock.advance(100)
    await spool.next_due()  # the thread wakes up, and then is idle again
    await eventually(lambda: read(tmp_path, "SELECT count(*) FROM log") == [(2,)], "the three old rows are gone")
    await spool.close()


async def test_a_log_of_which_nothing_is_old_is_not_read_every_second(tmp_path: Path) -> None:
    clock, sweeps = ManualClock(), list[str]()
    spool = open_spool(tmp_path, clock)
    spool._database.exec_trace = lambda _, text, __: (sweeps.append(text) if text == sql.FORGET_LOG else None, True)[1]
    for _ in range(5):
        spool._housekeep()
    assert len(sweeps) == 1
    clock.advance(60)
    spool._housekeep()
    assert len(sweeps) == 2
    await spool.close()


@pytest.mark.usefixtures("short_idle")
async def test_log_rows_go_under_load_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "IDLE_SECONDS", 3600.0)
    monkeypatch.setattr(sqlite, "_CHECKPOINT_BYTES", 20_000)
    clock = ManualClock()
    spool = open_spool(tmp_path, clock)
    for _ in range(30):
        await settle_some(spool, 3)
        clock.advance(KEEP_LOG_SECONDS / 4)
    ((rows,),) = read(tmp_path, "SELECT count(*) FROM log")
    assert rows < 45, "90 were written, and 12 are young enough to be kept"
    await spool.close()


@pytest.mark.usefixtures("short_idle")
async def test_what_was_used_of_quotas_goes_when_it_counts_no_more_even_where_the_clock_was_years_ahead(tmp_path: Path) -> None:
    clock = ManualClock()
    clock.step(1e9)
    spool = open_spool(tmp_path, clock)
    await eventually(lambda: spool._forgets_used_at > clock.monotonic(), "the first sweep")
    clock.step(-1e9)
    (claim,) = await spool.put([draft(spool)], [True])
    assert claim is not None
    used = tuple(Used("acme", seconds, int(clock.now()), 1, 1) for seconds in (3600, 86_400))
    await spool.settle(settlement(claim)._replace(used=used))
    assert read(tmp_path, "SELECT count(*) FROM used") == [(2,)]
    clock.advance(3 * 3600)
    await spool.next_due()
    await eventually(lambda: read(tmp_path, "SELECT seconds FROM used") == [(86_400,)], "the hour's row is gone")
    await spool.close()


# -- on the disk ----------------------------------------------------------------------------------------------------------


async def test_a_commit_is_on_the_disk_when_it_returns(spool: SqliteSpool) -> None:
    settings = {name: spool._database.pragma(name) for name in ("journal_mode", "synchronous", "wal_autocheckpoint", "auto_vacuum")}
    assert settings == {"journal_mode": "wal", "synchronous": 2, "wal_autocheckpoint": 0, "auto_vacuum": 2}


async def test_a_file_is_durable_before_the_record_that_names_it(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {place.parent.name if place.is_file() else place.name}{'/file' if place.is_file() else ''}")
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        events.append(f"rename {target.parent.name}/file")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    spool._database.set_commit_hook(lambda: bool(events.append("commit")))
    await spool.put([draft(spool, content=LARGE)], [True])
    assert events == ["fsync incoming/file", "rename content/file", "fsync content", "commit"]


async def test_a_file_is_removed_only_after_the_commit_that_ends_its_message(spool: SqliteSpool, tmp_path: Path) -> None:
    (claim,) = await spool.put([draft(spool, content=LARGE)], [True])
    assert claim is not None
    seen: list[list[str]] = []
    spool._database.set_commit_hook(lambda: bool(seen.append(stored_files(tmp_path / "spool"))))
    await spool.settle(settlement(claim))
    assert seen == [[f"content/{claim.id}"]]
    await eventually(lambda: stored_files(tmp_path / "spool") == [], "the file is gone")


async def test_many_puts_share_a_commit(spool: SqliteSpool) -> None:
    commits: list[None] = []
    spool._database.set_commit_hook(lambda: bool(commits.append(None)))
    await asyncio.gather(*(spool.put([draft(spool)], [True]) for _ in range(200)))
    assert len(commits) < 20


async def test_a_put_that_is_given_up_while_content_goes_to_its_file_lends_nothing(
    spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(spool._files, "store", lambda *_: never)
    large = b"Subject: large\r\n\r\n" + b"x" * FILE_ABOVE_BYTES + b"\r\n"
    putting = asyncio.create_task(spool.put([draft(spool), draft(spool, content=large)], [True, True]))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    assert never.cancelled() and spool._leases == {}


async def test_what_goes_on_at_once_does_not_wait_for_company(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "RIDE_SECONDS", 60.0)
    (to_fallback, refused) = await spool.put([draft(spool), draft(spool)], [True, True])
    assert to_fallback is not None and refused is not None
    async with asyncio.timeout(30):
        await spool.settle(settlement(to_fallback, DEFERRED, then=Next(ManualClock().now(), OTHER_LANE)))
        await spool.settle(settlement(refused, FAILED, bounce=draft(spool)))


@pytest.mark.parametrize(
    ("statement", "plan"),
    [
        (sql.CLAIMABLE, "SEARCH message USING INDEX waiting (upstream=? AND route=? AND <expr>=? AND due<?)"),
        (sql.FURTHER_ROUTES, "SEARCH message USING INDEX waiting (upstream=? AND route>?)"),
        (sql.FURTHER_UPSTREAMS, "SEARCH message USING INDEX waiting (upstream>?)"),
        (sql.FIRST_RETRIED, "SEARCH message USING INDEX waiting (upstream=? AND route=? AND <expr>=?)"),
        (sql.OVERDUE, "SEARCH message USING INDEX held (due<?)"),
        (sql.MESSAGE, "SEARCH message USING INTEGER PRIMARY KEY"),
        (sql.SHARING, "SEARCH message USING COVERING INDEX sharing (content=?)"),
        (sql.CONTINUE, "SEARCH message USING INTEGER PRIMARY KEY"),
        (sql.EXPIRE, "SEARCH message USING INTEGER PRIMARY KEY"),
        (sql.END_MESSAGE, "SEARCH message USING INTEGER PRIMARY KEY"),
        (sql.END_CONTENT, "SEARCH content USING INTEGER PRIMARY KEY"),
    ],
)
async def test_a_long_queue_is_never_read_whole(spool: SqliteSpool, statement: str, plan: str) -> None:
    steps = [row[3] for row in spool._database.execute(f"EXPLAIN QUERY PLAN {statement}", (0,) * statement.count("?"))]
    assert any(plan in step for step in steps), steps
    assert not any("SORT" in step or "TEMP B-TREE" in step for step in steps), steps


async def test_mail_that_is_put_claimed_never_enters_an_index(spool: SqliteSpool) -> None:
    await spool.put([draft(spool) for _ in range(5)], [True] * 5)
    for index, condition in (("waiting", "held = ''"), ("held", "held != ''")):
        ((count,),) = spool._database.execute(f"SELECT count(*) FROM message INDEXED BY {index} WHERE token IS NULL AND {condition}")
        assert count == 0


async def test_a_verb_on_a_long_queue_goes_page_by_page_and_mail_flows_between(spool: SqliteSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_verbs, "_PAGE_ROWS", 10)
    await spool.put([draft(spool) for _ in range(95)], [False] * 95)
    commits: list[None] = []
    spool._database.set_commit_hook(lambda: bool(commits.append(None)))
    holding = asyncio.ensure_future(spool.hold(EVERYTHING, "x"))
    taken = 0
    while not holding.done():
        await spool.put([draft(spool)], [True])
        taken += 1
    assert len(await holding) == 95, "what came after the order is not held"
    assert len(commits) >= 10
    assert taken >= 5


async def test_a_page_ends_early_where_messages_have_many_recipients(
    spool: SqliteSpool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_verbs, "_PAGE_LOG_ROWS", 10)
    drafts = [draft(spool, recipients=[f"r{place}@x.example" for place in range(4)]) for _ in range(8)]
    await spool.put(drafts, [False] * 8)
    commits: list[None] = []
    spool._database.set_commit_hook(lambda: bool(commits.append(None)))
    assert list(await spool.hold(EVERYTHING, "x")) == [each.id for each in drafts]
    assert len(commits) >= 3
    assert read(tmp_path / "spool", "SELECT count(*) FROM log") == [(32,)]


async def test_a_claim_for_ending_that_a_crash_cuts_off_leaves_the_message_as_it_was(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = open_spool(tmp_path / "spool", clock)
    held, waiting, tried = (draft(spool, created=clock.now()) for _ in range(3))
    claim, *_ = await spool.put([held, waiting, tried], [True, False, True])
    assert claim is not None
    await spool.settle(settlement(claim, DEFERRED, then=Next(clock.now() + 5, LANE, counted=False, held="no route"))._replace(tried=False))
    assert len(await spool.take(Selection(ids=frozenset({waiting.id})), 10)) == 1
    clock.advance(5)
    assert [claim.id for claim in await spool.overdue(10)] == [held.id]
    shutil.copytree(tmp_path / "spool", tmp_path / "after")
    await spool.close()

    after = open_spool(tmp_path / "after", clock)
    (again,) = await after.overdue(10)
    assert (again.id, again.held, again.envelope.recipients[0].in_doubt) == (held.id, "no route", False)
    clock.advance(3600)
    claims = await after.claim(LANE, 10)
    assert {claim.id: (claim.attempt, claim.envelope.recipients[0].in_doubt) for claim in claims} == {
        waiting.id: (1, False),
        tried.id: (2, True),
    }
    await after.close()


async def test_many_lanes_are_told_apart(spool: SqliteSpool) -> None:
    lanes = [Lane(f"up{place}", f"route{place % 7}") for place in range(50)]
    content = content_of(b"shared")
    await spool.put([draft(spool, lane=lane, content=content, due=float(place)) for place, lane in enumerate(lanes)], [False] * 50)
    assert await spool.next_due() == {lane: float(place) for place, lane in enumerate(lanes)}
