"""Databases of earlier relays: everything is there after the upgrade, and can be delivered.

`spool_schema_1.sql` was dumped from a spool that the first relay wrote, cut off with attempts under way.
"""

from collections.abc import AsyncIterator
from contextlib import closing
from math import inf
from pathlib import Path

import apsw
import pytest

from relay.clock import ManualClock
from relay.mail.envelope import Origin, Recipient, Summary
from relay.spool import sqlite_schema as sql
from relay.spool.base import EVERYTHING, FILE_ABOVE_BYTES, Claim, Lane, Selection, Used
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from tests.contract.drafts import LANE, OTHER_LANE, octets_of, settlement, stored_files
from tests.support.eventually import eventually

DUMP = Path(__file__).parents[1] / "contract" / "spool_schema_1.sql"
WRITTEN = 1_800_000_902.5  # when it was cut off; its messages are from 1_800_000_000
DAY = 86_400.0
FILES = {"6651728988002": b"L" * (FILE_ABOVE_BYTES + 1), "6651728988006": b"S" * (FILE_ABOVE_BYTES + 2)}

CONTENT = {
    "grün@exämple.org": b"\xc3\xbc\r\n\x00\r\n\r\n",
    "later@x.example": b"due later\r\n",
    "large@x.example": FILES["6651728988002"],
    "part1@x.example": b"shared by three\r\n",
    "part2@x.example": b"shared by three\r\n",
    "filed0@x.example": FILES["6651728988006"],
    "filed1@x.example": FILES["6651728988006"],
    "deferred@x.example": b"mixed\r\n",
    "app@acme.example": b"report\r\n",
    "doubt@x.example": b"doubt\r\n",
    "expired@x.example": b"expired\r\n",
    "active@x.example": b"active\r\n",
    "claimed@x.example": b"claimed\r\n",
    "held@x.example": b"held\r\n",
}
IN_DOUBT = {"doubt@x.example", "expired@x.example", "never@x.example", "active@x.example", "claimed@x.example"}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A spool directory as the first relay left it."""
    directory = tmp_path / "spool"
    (directory / "content").mkdir(parents=True)
    with closing(apsw.Connection(str(directory / sql.DATABASE))) as database:
        database.execute(DUMP.read_text())
        database.pragma("journal_mode", "wal")
    for name, octets in FILES.items():
        (directory / "content" / name).write_bytes(octets)
    return directory


def opened(directory: Path, clock: ManualClock) -> SqliteSpool:
    return SqliteSpool(directory, clock, backoff=lambda attempts: 60.0 * attempts, keep_log_seconds=1e9)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(WRITTEN + 3600)


@pytest.fixture
async def spool(first: Path, clock: ManualClock) -> AsyncIterator[SqliteSpool]:
    spool = opened(first, clock)
    yield spool
    await spool.close()


async def claim_all(spool: SqliteSpool) -> dict[str, Claim]:
    claims = [claim for lane in (LANE, OTHER_LANE, Lane("globex", "globex")) for claim in await spool.claim(lane, 100)]
    return {claim.envelope.recipients[0].address: claim for claim in claims}


async def test_all_mail_of_the_first_relay_can_be_delivered(spool: SqliteSpool, first: Path) -> None:
    claims = await claim_all(spool)
    assert claims.keys() == CONTENT.keys() - {"held@x.example"}
    assert {address: octets_of(claim.content) for address, claim in claims.items()} == {
        address: octets for address, octets in CONTENT.items() if address in claims
    }
    assert {r.address for claim in claims.values() for r in claim.envelope.recipients if r.in_doubt} == IN_DOUBT
    await spool.release(Selection(recipient="held@x.example"))
    held = await claim_all(spool)
    assert octets_of(held["held@x.example"].content) == CONTENT["held@x.example"]
    for claim in (*claims.values(), *held.values()):
        await spool.settle(settlement(claim))
    (lost,) = await spool.drop(EVERYTHING)
    with closing(SqliteView(first, ManualClock())) as view:
        assert [*view.queued()] == []
        sent = {entry.recipient for entry in view.log(Selection(state="sent"))}
        assert [entry.recipient for entry in view.log(Selection(ids=frozenset({lost})))] == ["lost@x.example"]
    assert sent == {
        *CONTENT,
        "part0@x.example",
        "sent@x.example",
        "plain@x.example",
        "never@x.example",
        "[odd]@example.org",
        '"a b"@x.example',
    }
    await eventually(lambda: stored_files(first) == [], "no file to be left")


async def test_what_the_first_relay_knew_of_a_message_is_still_known(spool: SqliteSpool) -> None:
    claims = await claim_all(spool)
    claim = claims["grün@exämple.org"]
    assert claim.envelope.sender == "müller@acme.example"
    assert claim.envelope.recipients == (
        Recipient("grün@exämple.org", "SUCCESS,FAILURE", "utf-8;grün@exämple.org"),
        Recipient("[odd]@example.org"),
        Recipient('"a b"@x.example', "NEVER"),
    )
    assert (claim.envelope.smtputf8, claim.envelope.ret, claim.envelope.envid) == (True, "HDRS", "x+2By")
    assert claim.origin == Origin("local", "2001:db8::7", "erp", "S123", "billing@acme.example")
    assert claim.summary == Summary("you, and others", "c@example.org", "Grüße")
    assert (claim.prefix, claim.created, claim.attempt) == (b"Received: from \xff\r\n", 1_800_000_000.0, 1)
    assert (claims["deferred@x.example"].attempt, claims["claimed@x.example"].attempt) == (2, 2)


async def test_the_log_of_the_first_relay_goes_on(spool: SqliteSpool, first: Path) -> None:
    for claim in (await claim_all(spool)).values():
        await spool.settle(settlement(claim))
        break
    with closing(SqliteView(first, ManualClock())) as view:
        entries = [*view.log()]
    assert [entry.status for entry in entries[:7]] == ["sent", "sent", "deferred", "failed", "deferred", "deferred", "failed"]
    assert {entry.report for entry in entries} == {""}
    assert entries[-1].status == "sent"


@pytest.mark.parametrize(("age", "given_up"), [(0.0, 4 * DAY), (3 * DAY, 4 * DAY), (3.5 * DAY, 4.5 * DAY), (30 * DAY, 31 * DAY)])
async def test_held_mail_ends_after_four_days_but_never_within_a_day_of_the_upgrade(first: Path, age: float, given_up: float) -> None:
    clock = ManualClock(1_800_000_000.0 + age)
    spool = opened(first, clock)
    await spool.close()
    spool = opened(first, clock)  # a second start changes nothing more
    clock.advance(given_up - age - 1)
    assert await spool.overdue(10) == []
    clock.advance(1)
    assert [claim.held for claim in await spool.overdue(10)] == ["no route takes its sender any more"]
    with closing(SqliteView(first, clock)) as view:
        dues = {queued.held: queued.due for queued in view.queued(Selection(state="held"))}
    assert dues["the content is missing from the spool"] == inf, "an operator must see it"
    await spool.close()


def second_of(directory: Path) -> Path:
    """The same directory, as the relay left it that had no table for quotas yet."""
    sql.open_database(directory / sql.DATABASE, now=WRITTEN).close()
    with closing(apsw.Connection(str(directory / sql.DATABASE))) as database:
        database.execute("DROP TABLE used")
        database.pragma("user_version", 2)
    return directory


async def test_the_spool_of_the_second_relay_is_shown_and_brought_up_to_date(first: Path, clock: ManualClock) -> None:
    second = second_of(first)
    with closing(SqliteView(second, clock)) as view:
        assert len([*view.queued()]) == 15
        assert len([*view.log()]) == 7
    spool = opened(second, clock)
    assert await spool.used() == []
    claims = [*(await claim_all(spool)).values()]
    used = Used("acme", 86400, int(clock.now()), 1, 1)
    for claim in claims:
        await spool.settle(settlement(claim)._replace(used=(used,)))
    await spool.close()
    spool = opened(second, clock)
    assert await spool.used() == [used._replace(transactions=len(claims), recipients=len(claims))]
    await spool.close()


@pytest.mark.parametrize("version", [1, 2])
def test_an_upgraded_database_is_the_same_as_a_new_one(first: Path, tmp_path: Path, version: int) -> None:
    shapes = []
    old = first if version == 1 else second_of(first)
    for path in (old / sql.DATABASE, tmp_path / "new.db"):
        with closing(sql.open_database(path, now=WRITTEN)) as database:
            indexes = set(database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index'"))
            columns = [
                (table, *column[1:])
                for table in ("message", "content", "log", "used")
                for column in database.execute(f"PRAGMA table_info({table})")
            ]
            shapes.append((indexes, columns, database.pragma("user_version"), database.pragma("auto_vacuum")))
            assert database.pragma("integrity_check") == "ok"
    assert shapes[0] == shapes[1]
    assert shapes[0][2] == sql.SCHEMA_VERSION


async def test_an_upgrade_that_is_cut_off_begins_again(first: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_FROM_1", sql._FROM_1 + "SELECT nonsense;")
    with pytest.raises(Exception, match="nonsense"):
        opened(first, clock)
    monkeypatch.undo()
    spool = opened(first, clock)
    assert len(await claim_all(spool)) == len(CONTENT) - 1
    await spool.close()


def test_a_spool_of_the_first_relay_is_shown_without_an_upgrade(first: Path, clock: ManualClock) -> None:
    before = (first / sql.DATABASE).read_bytes()
    with closing(SqliteView(first, clock)) as view:
        assert len([*view.queued()]) == 15
        assert len([*view.queued(Selection(state="active"))]) == 2
        assert len([*view.log()]) == 7
        assert [entry.report for entry in view.log(last=1)] == [""]
        (held,) = view.queued(Selection(recipient="held@x.example"))
        assert view.message(held.id) == held
        content = view.content(held.id)
        assert content is not None
        assert octets_of(content) == b"held\r\n"
    assert (first / sql.DATABASE).read_bytes() == before
