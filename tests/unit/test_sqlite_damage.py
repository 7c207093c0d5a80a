"""A damaged database: what can be read goes on, what cannot is put aside and told of, and nothing is asked for for ever."""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.clock import ManualClock
from relay.spool import sqlite_claims, sqlite_verbs
from relay.spool import sqlite_schema as sql
from relay.spool.base import EVERYTHING, Claim, Draft, Lane, LeaseLost, MessageId, Next, Selection, SpoolError, Used
from relay.spool.records import number_of
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_claims import Lease
from relay.spool.sqlite_damage import read_page
from relay.spool.sqlite_schema import DATABASE
from relay.spool.sqlite_view import SqliteView
from tests.contract.drafts import DEFERRED, FAILED, LANE, OTHER_LANE, SENT, draft, settlement

PAGE_BYTES = 4096


class Attic:
    """A spool directory that is opened, damaged while it is closed, and opened again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.told: list[tuple[MessageId, Lane, str]] = []

    def open(self) -> SqliteSpool:
        return SqliteSpool(
            self.directory, self.clock, backoff=lambda attempts: 60.0, keep_log_seconds=1e9, quarantined=lambda *it: self.told.append(it)
        )  # fmt: skip

    async def fill(self, count: int, *, lane: Lane = LANE, octets: bytes = b"hello", claimed: bool = False) -> list[Draft]:
        spool = self.open()
        drafts = [
            draft(spool, lane=lane, recipients=[f"<{place:04}>@x.example"], content=octets, prefix=b"p" * 300, due=float(place))
            for place in range(count)
        ]
        await spool.put(drafts, [claimed] * count)
        await spool.close()
        return drafts

    def damage(self, needle: str | bytes, *, place: int = 0) -> None:
        """Overwrite the one page that has these octets, or the first or the last (0, -1) of several."""
        path = self.directory / DATABASE
        octets = bytearray(path.read_bytes())
        needle = needle.encode() if isinstance(needle, str) else needle
        pages = [start for start in range(0, len(octets), PAGE_BYTES) if needle in octets[start : start + PAGE_BYTES]]
        start = pages[place]
        octets[start : start + PAGE_BYTES] = b"\xff" * PAGE_BYTES
        path.write_bytes(octets)

    @property
    def aside(self) -> list[MessageId]:
        """The messages that were put aside when they were to be claimed."""
        return [id for id, lane, _ in self.told if lane == LANE]

    def change(self, statement: str, *values: object) -> None:
        with closing(apsw.Connection(str(self.directory / DATABASE))) as database:
            database.execute(statement, values)

    def make_lax(self, column: str) -> None:
        """Let a column have any value, as damage would: its declared type converts none, and it may be NULL."""
        with closing(apsw.Connection(str(self.directory / DATABASE))) as database:
            database.pragma("writable_schema", True)
            declared = sql.SCHEMA.partition("CREATE TABLE message (")[2].partition(f"\n    {column} ")[2].partition("NOT NULL")[0]
            database.execute(
                "UPDATE sqlite_schema SET sql = replace(sql, ?, ?) WHERE name = 'message'",
                (f" {column} {declared}NOT NULL", f" {column}{' ' + declared if declared == 'REAL ' else ''}"),
            )

    def view(self) -> SqliteView:
        return SqliteView(self.directory, self.clock)


@pytest.fixture
def attic(tmp_path: Path) -> Attic:
    return Attic(tmp_path / "spool")


# -- rows -----------------------------------------------------------------------------------------------------------------


async def test_messages_on_a_damaged_page_are_put_aside_and_the_others_of_their_lane_go_on(attic: Attic) -> None:
    drafts = await attic.fill(60)
    attic.damage("<0020>")
    spool = attic.open()
    claimed: list[str] = []
    while claims := await spool.claim(LANE, 7):
        assert len(claims) == 7 or len(claimed) + len(claims) + len(attic.aside) == 60, "a claim is not short because of the damaged"
        claimed += [claim.id for claim in claims]
        for claim in claims:
            await spool.settle(settlement(claim))
    aside = attic.aside
    assert drafts[20].id in aside
    assert len(aside) == len(set(aside)) < 20
    assert sorted([*claimed, *aside]) == [each.id for each in drafts]
    assert {reason.partition(":")[0] for _, lane, reason in attic.told if lane == LANE} == {"its record in the spool is damaged"}
    assert await spool.next_due() == {}, "nobody comes back for them"
    fresh = draft(spool)
    await spool.put([fresh], [False])
    assert [claim.id for claim in await spool.claim(LANE, 1)] == [fresh.id]
    assert spool.obstacle() is None
    await spool.close()


@pytest.mark.parametrize("where", ["record", "content"])
async def test_what_waits_is_shown_and_claimed_around_damage(attic: Attic, where: str) -> None:
    drafts = await attic.fill(60, octets=b"o" * 3000 if where == "content" else b"hello")
    if where == "record":
        attic.damage("<0020>")
    else:
        attic.damage(b"o" * 3000, place=20)
    spool = attic.open()
    shown: list[MessageId] = []
    after: str | None = ""
    while after is not None:
        page, after = await spool.oldest(after, attic.clock.now())
        shown += [waiting.id for waiting in page]
    claims = await spool.late(shown)
    assert 40 < len(claims) < 60
    assert shown == sorted(set(shown))
    assert set(shown) - {claim.id for claim in claims} <= {id for id, _, _ in attic.told}, "what could not be read is told of"
    assert (drafts[20].id in shown) == (where == "content")
    for claim in claims:
        await spool.settle(settlement(claim, FAILED))
    (again, _) = await spool.oldest("", attic.clock.now())
    assert await spool.late([waiting.id for waiting in again]) == []
    await spool.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (column, value)
        for column in ("attempts", "created", "recipients", "sender", "facts", "prefix", "size", "upstream", "route", "due", "doubt")
        for value in ("NULL", "x'61'", "7")
        if (column, value) != ("prefix", "x'61'") and (value != "7" or column not in ("attempts", "doubt", "due", "created", "size"))
        if (column, value) != ("created", "x'61'")  # later than any number: a clock that was ahead, which a start puts right
    ],
)
async def test_one_bit_that_makes_a_value_of_another_kind_keeps_nobody_else_waiting(attic: Attic, column: str, value: str) -> None:
    """A bit of a record's header says whether a value is text, a number, octets or nothing."""
    drafts = await attic.fill(10)
    attic.make_lax(column)
    attic.change(f"UPDATE message SET {column} = {value} WHERE id = {number_of(drafts[4].id)}")
    spool = attic.open()
    assert LANE in await spool.next_due()
    page, _ = await spool.oldest("", attic.clock.now())
    assert {each.id for each in drafts} - {drafts[4].id} <= {waiting.id for waiting in page}
    late = await spool.late([drafts[0].id, drafts[4].id])
    claimed = [claim.id for claim in [*late, *await spool.claim(LANE, 100)]]
    await spool.next_due()
    await spool.next_due()
    assert sorted(claimed) == [each.id for each in drafts if each is not drafts[4]]
    assert drafts[4].id in {id for id, _, _ in attic.told}
    with closing(attic.view()) as view:
        assert [queued.id for queued in view.queued(Selection(state="held"))] == [drafts[4].id]
    assert await spool.drop(Selection(ids=frozenset({drafts[4].id}))) == [drafts[4].id]
    await spool.close()


async def test_what_became_of_a_message_is_stored_once_whatever_is_damaged_around_its_record(attic: Attic) -> None:
    drafts = await attic.fill(60, octets=b"")
    attic.damage("<0020>")
    spool = attic.open()
    claims = await spool.claim(LANE, 100)
    bounces = []
    for place, claim in enumerate(claims):
        bounces.append(draft(spool, sender="", lane=OTHER_LANE))
        await spool.settle(settlement(claim, FAILED if place % 2 else SENT, bounce=bounces[-1]))
        with pytest.raises(LeaseLost):
            await spool.settle(settlement(claim, FAILED))
    await spool.close()
    spool = attic.open()
    attic.clock.advance(3600)
    assert not {claim.id for claim in await spool.claim(LANE, 100)} & {claim.id for claim in claims}, "nothing is sent a second time"
    assert [claim.id for claim in await spool.claim(OTHER_LANE, 100)] == [bounce.id for bounce in bounces]
    with closing(attic.view()) as view:
        assert [entry.id for entry in view.log()] == [claim.id for claim in claims]
        assert {queued.held for queued in view.queued(Selection(state="held"))} == {sql.STUCK}
    assert len(drafts) == 60
    await spool.close()


async def test_damage_in_what_is_known_of_quotas_keeps_no_mail_from_its_end(attic: Attic) -> None:
    drafts = await attic.fill(4)
    used = Used("upstream-with-a-quota", 3600, int(attic.clock.now()), 1, 1)
    spool = attic.open()
    claims = await spool.claim(LANE, 100)
    await spool.settle(settlement(claims[0])._replace(used=(used,)))
    assert await spool.used() == [used]
    await spool.close()
    attic.damage("upstream-with-a-quota")
    spool = attic.open()
    assert await spool.used() == []
    attic.clock.advance(3600)
    claims = await spool.claim(LANE, 100)
    assert len(claims) == 3
    for claim in claims[:2]:
        await spool.settle(settlement(claim)._replace(used=(used,)))
    await spool.settle(settlement(claims[2], DEFERRED, then=Next(attic.clock.now(), LANE))._replace(used=(used,)))
    await spool.close()
    with closing(attic.view()) as view:
        assert [entry.id for entry in view.log(Selection(state="sent"))] == [each.id for each in drafts[:3]]
        assert [queued.id for queued in view.queued()] == [drafts[3].id]


async def test_a_name_among_what_is_known_of_quotas_that_is_none_any_more_stops_nobody(attic: Attic) -> None:
    (_,) = await attic.fill(1)
    spool = attic.open()
    (claim,) = await spool.claim(LANE, 1)
    used = Used("acme", 86_400, int(attic.clock.now()), 1, 1)
    await spool.settle(settlement(claim)._replace(used=(used,)))
    await spool.close()
    attic.change("UPDATE used SET upstream = CAST(x'ff' AS TEXT)")
    spool = attic.open()
    assert await spool.used() == []
    await spool.close()


async def test_what_is_damaged_while_it_is_attempted_is_not_settled_for_ever(attic: Attic) -> None:
    """Its own record is what is damaged: the log has the outcome, the bounce is there, and nobody tries again before a restart."""
    await attic.fill(60)
    spool = attic.open()
    claims = await spool.claim(LANE, 100)
    await spool.close()
    attic.damage("<0020>")
    spool = attic.open()
    await spool.next_due()
    for claim in claims[20:22]:
        number = number_of(claim.id)
        spool._leases[claim.id] = Lease(number, 7, 1e9, (number, False, False))
    bounce = draft(spool, sender="", lane=OTHER_LANE)
    await spool.settle(settlement(claims[20]._replace(token=7), FAILED, bounce=bounce))
    await spool.settle(settlement(claims[21]._replace(token=7), DEFERRED, then=Next(0.0, LANE)))
    assert [claim.id for claim in await spool.claim(OTHER_LANE, 10)] == [bounce.id]
    assert {claims[20].id, claims[21].id} <= {id for id, _, _ in attic.told}
    with closing(attic.view()) as view:
        assert [(entry.id, entry.status) for entry in view.log()] == [(claims[20].id, "failed"), (claims[21].id, "deferred")]
    await spool.close()


async def test_a_claim_of_a_damaged_record_that_expires_keeps_nobody_from_looking(attic: Attic) -> None:
    await attic.fill(60)
    spool = attic.open()
    claims = await spool.claim(LANE, 30)
    await spool.close()
    attic.damage("<0020>")
    spool = attic.open()
    number = number_of(claims[20].id)
    spool._leases[claims[20].id] = Lease(number, 7, 0.0, (number, False, False))
    assert list(await spool.next_due()) == [LANE]
    assert spool._leases == {}
    await spool.close()


async def test_what_was_claimed_before_the_damage_is_taken_over_but_for_the_damaged(attic: Attic) -> None:
    drafts = await attic.fill(60, claimed=True)
    attic.damage("<0030>")
    attic.clock.advance(60)
    spool = attic.open()
    claims = await spool.claim(LANE, 100)
    assert {claim.attempt for claim in claims} == {2}
    assert all(claim.envelope.recipients[0].in_doubt for claim in claims)
    ids = {claim.id for claim in claims}
    lost = [each.id for each in drafts if each.id not in ids]
    assert drafts[30].id in lost
    assert len(lost) < 20
    assert lost == [each.id for each in drafts if lost[0] <= each.id <= lost[-1]], "one page of neighbours"
    ((first, _, reason),) = attic.told
    assert first < lost[0] <= lost[-1] <= reason.split()[6].rstrip(",")
    await spool.close()


async def test_two_damaged_pages_hide_nothing_between_them(attic: Attic) -> None:
    drafts = await attic.fill(90, claimed=True)
    attic.damage("<0030>")
    attic.damage("<0060>")
    attic.clock.advance(60)
    spool = attic.open()
    ids = {claim.id for claim in await spool.claim(LANE, 100)}
    assert drafts[45].id in ids
    assert {drafts[0].id, drafts[89].id} <= ids
    assert len(attic.told) == 2
    await spool.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("recipients = '[[1]'", "its record in the spool is damaged"),
        ("recipients = '[1, 2]'", "its record in the spool is damaged"),
        ("recipients = '[[\"a@x.example\"]]'", "its record in the spool is damaged"),
        ("recipients = '[[1, 2, 3, 4, 5]]'", "its record in the spool is damaged"),
        ("recipients = CAST(x'ff40' AS TEXT)", "its record in the spool is damaged"),
        ("facts = '{'", "its record in the spool is damaged"),
        ("facts = '[]'", "its record in the spool is damaged"),
        ("content = 7", "the content is missing from the spool"),
        ("size = 6", "its content in the spool is damaged"),
    ],
)
@pytest.mark.parametrize("verb", ["claim", "overdue", "take"])
async def test_a_message_that_makes_no_sense_is_held_without_end_with_the_reason(
    attic: Attic, change: str, reason: str, verb: str
) -> None:  # fmt: skip
    drafts = await attic.fill(3)
    attic.change(f"UPDATE message SET {change} WHERE id = ?", number_of(drafts[1].id))
    if verb == "overdue":
        attic.change("UPDATE message SET held = 'x', due = 1")
    spool = attic.open()
    ask: dict[str, Callable[[], Coroutine[Any, Any, Sequence[Claim]]]] = {
        "claim": lambda: spool.claim(LANE, 10),
        "overdue": lambda: spool.overdue(10),
        "take": lambda: spool.take(EVERYTHING, 10),
    }
    claims = await ask[verb]()
    assert [claim.id for claim in claims] == [drafts[0].id, drafts[2].id]
    ((id, _, told),) = attic.told
    assert (id, told.partition(":")[0]) == (drafts[1].id, reason)
    attic.clock.advance(1e9)
    assert await spool.overdue(10) == []
    await spool.close()


@pytest.mark.parametrize("name", ["upstream", "route"])
async def test_a_message_whose_lane_has_no_name_any_more_is_held_and_stops_nobody(attic: Attic, name: str) -> None:
    drafts = await attic.fill(3)
    attic.change(f"UPDATE message SET {name} = CAST(x'61ff' AS TEXT) WHERE id = ?", number_of(drafts[1].id))
    spool = attic.open()
    assert list(await spool.next_due()) == [LANE]
    ((id, _, told),) = attic.told
    assert (id, told.partition(":")[0]) == (drafts[1].id, "its record in the spool is damaged")
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [drafts[0].id, drafts[2].id]
    await spool.close()
    spool = attic.open()
    assert list(await spool.next_due()) == [LANE]
    assert len(attic.told) == 1
    await spool.close()


@pytest.mark.parametrize("again", [False, True])
async def test_a_name_that_is_damaged_in_an_index_alone_holds_nothing(attic: Attic, again: bool) -> None:
    lane = Lane("acmeacme", "acme")
    drafts = await attic.fill(3, lane=lane)
    path = attic.directory / DATABASE
    octets = path.read_bytes()
    (place,) = [start for start in range(0, len(octets), PAGE_BYTES) if octets[start] == 10 and b"acmeacme" in octets[start:][:PAGE_BYTES]]
    page = octets[place : place + PAGE_BYTES].replace(b"acmeacme", b"acme\xffcme", 1)
    path.write_bytes(octets[:place] + page + octets[place + PAGE_BYTES :])
    spool = attic.open()
    spool._claims._mended = again
    if again:
        with pytest.raises(SpoolError, match="damaged again"):
            await spool.next_due()
        await spool.close()
        spool = attic.open()
    assert list(await spool.next_due()) == [lane]
    assert len(await spool.claim(lane, 10)) == len(drafts)
    assert attic.told == []
    await spool.close()


@pytest.mark.parametrize("column", ["upstream", "route", "sender", "recipients", "facts", "held", "reply"])
async def test_a_text_that_cannot_be_read_hides_no_message_from_its_operator(attic: Attic, column: str) -> None:
    drafts = await attic.fill(3)
    attic.change(f"UPDATE message SET {column} = CAST(x'61ff62' AS TEXT) WHERE id = ?", number_of(drafts[1].id))
    with closing(attic.view()) as view:
        assert [queued.id for queued in view.queued()] == [each.id for each in drafts]
        queued = view.message(drafts[1].id)
        assert queued is not None
        shown = {
            "upstream": queued.lane.upstream, "route": queued.lane.route, "sender": queued.sender, "held": queued.held,
            "recipients": ",".join(queued.recipients), "reply": queued.last_reply, "facts": "a\ufffdb",
        }  # fmt: skip
        assert shown[column] == "a\ufffdb"
        if column in ("sender", "recipients", "facts"):
            with pytest.raises(SpoolError, match="damaged"):
                view.details(drafts[1].id)
    spool = attic.open()
    one = Selection(ids=frozenset({drafts[1].id}))
    assert await spool.hold(one, "look at it") == [drafts[1].id]
    await spool.release(one)
    await spool.next_due()
    while claims := await spool.claim(LANE, 10):  # where it can be claimed it goes like the others
        for claim in claims:
            await spool.settle(settlement(claim))
    dropped = await spool.drop(EVERYTHING)
    assert dropped == ([drafts[1].id] if column not in ("held", "reply") else [])
    await spool.close()
    with closing(attic.view()) as view:
        assert list(view.queued()) == []
        assert {entry.id for entry in view.log()} == {each.id for each in drafts}


@pytest.mark.parametrize("column", ["upstream", "route", "sender", "recipient", "status", "reply", "summary"])
async def test_a_text_that_cannot_be_read_hides_no_line_of_the_delivery_log(attic: Attic, column: str) -> None:
    drafts = await attic.fill(3)
    spool = attic.open()
    await spool.drop(EVERYTHING)
    await spool.close()
    attic.change(f"UPDATE log SET {column} = CAST(x'61ff62' AS TEXT) WHERE id = ?", number_of(drafts[1].id))
    with closing(attic.view()) as view:
        assert [entry.id for entry in view.log()] == [entry.id for entry in view.log(last=3)] == [each.id for each in drafts]


async def test_what_was_put_aside_is_shown_and_can_be_dropped(attic: Attic) -> None:
    drafts = await attic.fill(3)
    attic.change("UPDATE message SET recipients = '[[1]' WHERE id = ?", number_of(drafts[1].id))
    spool = attic.open()
    await spool.claim(LANE, 10)
    with closing(attic.view()) as view:
        queued = view.message(drafts[1].id)
        assert queued is not None
        assert (queued.state, queued.recipients, queued.due) == ("held", (), float("inf"))
        assert queued.held.startswith("its record in the spool is damaged")
        with pytest.raises(SpoolError, match="damaged"):
            view.details(drafts[1].id)
    assert await spool.drop(Selection(state="held")) == [drafts[1].id]
    with closing(attic.view()) as view:
        assert view.message(drafts[1].id) is None
        assert [(entry.recipient, entry.status) for entry in view.log()] == [("", "dropped")]
    await spool.close()


# -- content --------------------------------------------------------------------------------------------------------------


async def test_damaged_content_holds_its_messages_over_a_restart(attic: Attic) -> None:
    drafts = await attic.fill(4, octets=b"")
    spool = attic.open()
    odd = draft(spool, content=b"y" * 9000 + b"<the end>" + b"z" * 9000, due=2.5)
    await spool.put([odd], [False])
    await spool.close()
    attic.damage("<the end>")
    spool = attic.open()
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [each.id for each in drafts]
    await spool.close()
    spool = attic.open()
    attic.clock.advance(60)
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [each.id for each in drafts]
    ((id, _, reason),) = attic.told
    assert (id, reason.partition(":")[0]) == (odd.id, "its content in the spool is damaged")
    with closing(attic.view()) as view:
        assert [queued.id for queued in view.queued(Selection(state="held"))] == [odd.id]
        with pytest.raises(SpoolError, match="cannot be read"):
            view.content(odd.id)
    await spool.release(EVERYTHING)
    assert await spool.claim(LANE, 10) == []
    assert len(attic.told) == 2
    assert await spool.drop(Selection(state="held")) == [odd.id]
    await spool.close()


# -- indexes --------------------------------------------------------------------------------------------------------------


async def test_a_damaged_index_is_made_anew(attic: Attic) -> None:
    lane = Lane("needle-in-an-upstream", "r")
    drafts = await attic.fill(200, lane=lane, octets=b"")
    with closing(apsw.Connection(str(attic.directory / DATABASE))) as database:
        root = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'waiting'").get
    octets = bytearray((attic.directory / DATABASE).read_bytes())
    octets[(root - 1) * PAGE_BYTES : root * PAGE_BYTES] = b"\xff" * PAGE_BYTES
    (attic.directory / DATABASE).write_bytes(octets)
    spool = attic.open()
    assert [claim.id for claim in await spool.claim(lane, 300)] == [each.id for each in drafts]
    assert attic.told == []
    await spool.close()


# -- the operator's view and verbs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 500])
async def test_a_listing_and_the_verbs_pass_a_damaged_page_over(attic: Attic, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_verbs, "_PAGE_ROWS", rows)
    drafts = await attic.fill(60)
    attic.damage("<0020>")
    with closing(attic.view()) as view:
        shown = [queued.id for queued in view.queued()]
        assert view.message(drafts[40].id) is not None
        assert view.message(drafts[20].id) is None
    assert drafts[20].id not in shown
    assert {drafts[0].id, drafts[59].id} <= set(shown)
    assert len(shown) > 40
    spool = attic.open()
    assert list(await spool.hold(EVERYTHING, "x")) == shown
    assert len(await spool.release(EVERYTHING)) == len(shown)
    dropped = set(await spool.drop(EVERYTHING))
    with closing(attic.view()) as view:
        stuck = {queued.id: queued.held for queued in view.queued()}
    assert sorted([*dropped, *stuck]) == shown
    assert len(stuck) < 25, "the neighbours of the damaged page"
    assert set(stuck.values()) == {"it has ended; the spool is damaged and its record could not be removed"}
    await spool.close()


def rows_of(numbers: list[int], bad: set[int]) -> Callable[[int, int], list[Any]]:
    """A table with these ids; what reads one of `bad` fails."""

    def fetch(after: int, limit: int) -> list[Any]:
        chosen = [number for number in numbers if number > after][:limit]
        if bad.intersection(chosen):
            raise apsw.CorruptError("malformed")
        return [(number,) for number in chosen]

    return fetch


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ((), (100, 200, 300, 400, 500, 600)),
        ((100,), (200, 300, 400, 500, 600)),
        ((300,), (100, 200, 400, 500, 600)),
        ((300, 400, 500), (100, 200, 600)),
        ((600,), (100, 200, 300, 400, 500)),
        ((100, 300, 600), (200, 400, 500)),
        ((100, 200, 300, 400, 500, 600), ()),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_all_rows_before_between_and_behind_the_damage_are_found_once(bad: tuple[int, ...], found: tuple[int, ...], limit: int) -> None:
    fetch = rows_of([100, 200, 300, 400, 500, 600], set(bad))
    seen: list[int] = []
    after, until, rounds = 0, 700, 0
    while after < until:
        rows, after, _ = read_page(fetch, after=after, until=until, limit=limit)
        seen += [number for (number,) in rows]
        rounds += 1
        assert rounds < 50, "it goes on"
    assert tuple(seen) == found


# -- errors that may pass -------------------------------------------------------------------------------------------------


async def test_a_message_that_gives_an_io_error_is_left_for_a_while(attic: Attic, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = await attic.fill(3)
    spool = attic.open()
    octets = sqlite_claims.Claims._octets

    def broken(self: sqlite_claims.Claims, number: int, content: int, size: int) -> bytes:
        if content == number_of(drafts[1].id):
            raise apsw.IOError("disk I/O error")
        return octets(self, number, content, size)

    monkeypatch.setattr(sqlite_claims.Claims, "_octets", broken)
    claims = await spool.claim(LANE, 10)
    assert [claim.id for claim in claims] == [drafts[0].id, drafts[2].id]
    assert await spool.claim(LANE, 10) == []
    assert await spool.next_due() == {}
    for claim in claims:
        await spool.settle(settlement(claim))
    monkeypatch.undo()
    attic.clock.advance(sqlite_claims._READ_AGAIN_SECONDS)
    assert list(await spool.next_due()) == [LANE]
    assert [claim.id for claim in await spool.claim(LANE, 10)] == [drafts[1].id]
    await spool.close()
