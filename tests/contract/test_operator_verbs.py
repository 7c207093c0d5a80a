"""What the operator's verbs promise, held against every spool: what they touch, what they leave alone, and what the log says of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.mail.envelope import Summary
from relay.spool.base import EVERYTHING, FILE_ABOVE_BYTES, Claim, Draft, Lane, LeaseLost, LogEntry, MessageId, Next, Selection, Spool
from relay.spool.memory import MemorySpool
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, LANE, OTHER_LANE, SENT, content_of, draft, octets_of, settlement, stored_files
from tests.support.eventually import eventually

LEASE_SECONDS = 15 * 60.0
DAY = 86_400.0


@dataclass
class Office:
    """A spool with one message in each state."""

    spool: Spool
    clock: ManualClock
    directory: Path
    claims: dict[str, Claim] = field(default_factory=dict)
    ids: dict[str, MessageId] = field(default_factory=dict)

    async def fill(self) -> None:
        now = self.clock.now()
        for name, due in (("due", now), ("later", now + 3600)):
            await self.put(name, due=due)
        for name in ("active", "deferred", "held", "ended"):
            self.claims[name] = await self.put_claimed(name)
        await self.settle("deferred", Next(now + 600, OTHER_LANE))
        await self.settle("held", Next(now + DAY, LANE, counted=False, held="no route"))
        await self.settle("ended", Next(now, LANE, counted=False, held="by damage"))
        await self.spool.hold(Selection(ids=frozenset({self.ids["ended"]})), "without end")

    async def put(self, name: str, *, due: float) -> None:
        await self.spool.put([self.draft(name, due=due)], [False])

    async def put_claimed(self, name: str) -> Claim:
        (claim,) = await self.spool.put([self.draft(name)], [True])
        assert claim is not None
        return claim

    def draft(self, name: str, *, due: float = 0.0) -> Draft:
        message = draft(self.spool, recipients=[f"{name}@x.example"], created=self.clock.now(), due=due, summary=Summary(subject=name))
        self.ids[name] = message.id
        return message

    async def settle(self, name: str, then: Next) -> None:
        await self.spool.settle(settlement(self.claims[name], DEFERRED, then=then)._replace(tried=not then.held))

    def named(self, ids: object) -> set[str]:
        names = {id: name for name, id in self.ids.items()}
        return {names[id] for id in ids}  # type: ignore[attr-defined]

    def only(self, *names: str) -> Selection:
        return Selection(ids=frozenset(self.ids[name] for name in names))

    async def claimable(self) -> set[str]:
        """Who would be tried by now, on either lane; they are claimed by the question."""
        claims = [*await self.spool.claim(LANE, 100), *await self.spool.claim(OTHER_LANE, 100)]
        return self.named(claim.id for claim in claims)

    def log(self, name: str) -> list[LogEntry]:
        if isinstance(self.spool, MemorySpool):
            return [entry for entry in self.spool.log if entry.id == self.ids[name]]
        with closing(SqliteView(self.directory, self.clock)) as view:
            return [*view.log(self.only(name))]


@pytest.fixture(params=["memory", "sqlite"])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Office]:
    clock = ManualClock()
    spool: MemorySpool | SqliteSpool
    if request.param == "memory":
        spool = MemorySpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts)
    else:
        spool = SqliteSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts, keep_log_seconds=10 * DAY)
    yield Office(spool, clock, tmp_path)
    await spool.close()


@pytest.fixture
async def office(empty: Office) -> Office:
    await empty.fill()
    return empty


# -- what each verb touches -----------------------------------------------------------------------------------------------


async def test_hold_takes_all_but_what_is_attempted_and_what_is_held_without_end(office: Office) -> None:
    assert office.named(await office.spool.hold(EVERYTHING, "maintenance")) == {"due", "later", "deferred", "held"}
    assert await office.spool.next_due() == {}
    office.clock.advance(100 * DAY)
    assert await office.spool.overdue(10) == [], "what an operator holds is never given up by itself"
    assert await office.claimable() == set()
    assert await office.spool.hold(EVERYTHING, "again") == []


async def test_release_makes_held_mail_due_now_and_nothing_else(office: Office) -> None:
    now = office.clock.now()
    assert await office.spool.release(EVERYTHING) == [Next(now, LANE), Next(now, LANE)]
    assert await office.spool.next_due() == {LANE: now, OTHER_LANE: now + 600}
    assert await office.claimable() == {"due", "held", "ended"}
    assert await office.spool.release(EVERYTHING) == []


async def test_reschedule_makes_waiting_mail_due_now_and_leaves_held_mail_alone(office: Office) -> None:
    now = office.clock.now()
    assert await office.spool.reschedule(EVERYTHING) == [Next(now, LANE), Next(now, LANE), Next(now, OTHER_LANE)]
    assert await office.claimable() == {"due", "later", "deferred"}


async def test_what_was_due_longer_keeps_its_place_when_it_is_rescheduled(empty: Office) -> None:
    await empty.put("young", due=empty.clock.now() - 5)
    await empty.put("old", due=empty.clock.now() - 500)
    await empty.spool.reschedule(EVERYTHING)
    assert [claim.id for claim in await empty.spool.claim(LANE, 1)] == [empty.ids["old"]]


async def test_drop_removes_all_but_what_is_attempted(office: Office) -> None:
    assert office.named(await office.spool.drop(EVERYTHING)) == {"due", "later", "deferred", "held", "ended"}
    assert await office.spool.next_due() == {}
    assert await office.spool.release(EVERYTHING) == []
    await office.spool.settle(settlement(office.claims["active"]))


async def test_take_claims_all_but_what_is_attempted(office: Office) -> None:
    claims = await office.spool.take(EVERYTHING, 100)
    assert office.named(claim.id for claim in claims) == {"due", "later", "deferred", "held", "ended"}
    assert {claim.envelope.recipients[0].address: (claim.held, claim.attempt) for claim in claims} == {
        "due@x.example": ("", 0),
        "later@x.example": ("", 0),
        "deferred@x.example": ("", 1),
        "held@x.example": ("no route", 0),
        "ended@x.example": ("without end", 0),
    }
    assert all(octets_of(claim.content) == b"Subject: hi\r\n\r\nhello\r\n" for claim in claims)
    assert await office.spool.take(EVERYTHING, 100) == []
    assert await office.claimable() == set()
    for claim in claims:
        await office.spool.settle(settlement(claim, FAILED))
        with pytest.raises(LeaseLost):
            await office.spool.settle(settlement(claim, FAILED))
    assert await office.spool.drop(EVERYTHING) == []


async def test_take_claims_no_more_than_asked_for_oldest_first(office: Office) -> None:
    assert office.named(claim.id for claim in await office.spool.take(EVERYTHING, 2)) == {"due", "later"}
    assert office.named(claim.id for claim in await office.spool.take(EVERYTHING, 2)) == {"deferred", "held"}


@pytest.mark.parametrize("verb", ["hold", "release", "reschedule", "drop", "take"])
async def test_a_message_that_is_attempted_is_left_alone(office: Office, verb: str) -> None:
    selection = office.only("active")
    spool = office.spool
    done: dict[str, Callable[[], Coroutine[Any, Any, Sequence[object]]]] = {
        "hold": lambda: spool.hold(selection, "x"),
        "release": lambda: spool.release(selection),
        "reschedule": lambda: spool.reschedule(selection),
        "drop": lambda: spool.drop(selection),
        "take": lambda: spool.take(selection, 10),
    }
    assert await done[verb]() == []
    await spool.settle(settlement(office.claims["active"]))
    assert [entry.status for entry in office.log("active")] == ["sent"]


# -- selections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(route=LANE.route), "due later deferred held ended"),
        (Selection(upstream=OTHER_LANE.upstream), "deferred"),
        (Selection(upstream="nobody"), ""),
        (Selection(sender="acme.example"), "due later deferred held ended"),
        (Selection(sender="other.example"), ""),
        (Selection(sender="<>"), ""),
        (Selection(recipient="held@x.example"), "held"),
        (Selection(recipient="*.example"), "due later deferred held ended"),
        (Selection(state="due"), "due later"),
        (Selection(state="deferred"), "deferred"),
        (Selection(state="held"), "held ended"),
        (Selection(state="active"), ""),
        (Selection(older_than=0.0), "due later deferred held ended"),
        (Selection(older_than=1.0), ""),
        (Selection(state="held", recipient="ended@x.example", route=LANE.route), "ended"),
        (Selection(ids=frozenset({"0000000000001"})), ""),
    ],
)
async def test_a_selection_chooses(office: Office, selection: Selection, expected: str) -> None:
    assert office.named(await office.spool.drop(selection)) == set(expected.split())


async def test_ids_choose_together_with_the_filters(office: Office) -> None:
    both = office.only("due", "held")
    assert office.named(await office.spool.drop(Selection(ids=both.ids, state="held"))) == {"held"}
    assert office.named(await office.spool.drop(both)) == {"due"}


async def test_an_age_counts_from_acceptance(office: Office) -> None:
    office.clock.advance(100)
    await office.put("young", due=0.0)
    assert "young" not in office.named(await office.spool.drop(Selection(older_than=50.0)))
    assert office.named(await office.spool.drop(EVERYTHING)) == {"young"}


# -- held mail's end ------------------------------------------------------------------------------------------------------


async def test_held_mail_is_overdue_when_its_time_is_up_and_not_before(office: Office) -> None:
    office.clock.advance(DAY - 1)
    assert await office.spool.overdue(10) == []
    office.clock.advance(1)
    (claim,) = await office.spool.overdue(10)
    assert (claim.id, claim.held, claim.attempt, claim.lane) == (office.ids["held"], "no route", 0, LANE)
    assert claim.token < 0
    assert await office.spool.overdue(10) == []
    bounce = draft(office.spool, sender="", lane=OTHER_LANE, due=office.clock.now())
    await office.spool.settle(settlement(claim, FAILED, bounce=bounce))
    assert await office.spool.release(office.only("held")) == []
    (entry,) = office.log("held")[1:]
    assert (entry.status, entry.report, entry.attempt) == ("failed", bounce.id, 0)


async def test_the_longest_overdue_comes_first_and_no_more_than_asked_for(empty: Office) -> None:
    now = empty.clock.now()
    for name, due in (("b", now + 2), ("a", now + 1), ("c", now + 3)):
        empty.claims[name] = await empty.put_claimed(name)
        await empty.settle(name, Next(due, LANE, held="x"))
    empty.clock.advance(10)
    assert [empty.named([claim.id]) for claim in await empty.spool.overdue(2)] == [{"a"}, {"b"}]
    assert [empty.named([claim.id]) for claim in await empty.spool.overdue(2)] == [{"c"}]


@pytest.mark.parametrize("verb", ["overdue", "take"])
async def test_a_claim_for_ending_that_expires_leaves_no_doubt_and_the_message_as_it_was(office: Office, verb: str) -> None:
    office.clock.advance(DAY)
    claims = await (office.spool.overdue(10) if verb == "overdue" else office.spool.take(EVERYTHING, 10))
    assert office.ids["held"] in {claim.id for claim in claims}
    (renewed,) = await office.spool.renew(claims[:1])
    assert renewed.token == claims[0].token
    office.clock.advance(LEASE_SECONDS)
    await office.spool.next_due()
    with pytest.raises(LeaseLost):
        await office.spool.settle(settlement(claims[0], FAILED))
    (again,) = await office.spool.overdue(10)
    assert (again.id, again.held, again.attempt) == (office.ids["held"], "no route", 0)
    assert not any(r.in_doubt for r in again.envelope.recipients)
    if verb == "take":
        (deferred,) = await office.spool.take(office.only("deferred"), 1)
        assert not any(r.in_doubt for r in deferred.envelope.recipients)


@pytest.mark.parametrize("held", ["", "no route"])
async def test_a_claim_for_ending_that_is_given_back_counts_no_attempt(office: Office, held: str) -> None:
    (claim,) = await office.spool.take(office.only("deferred"), 1)
    then = Next(office.clock.now(), OTHER_LANE, counted=False, held=held)
    await office.spool.settle(settlement(claim, DEFERRED, then=then)._replace(tried=False))
    if held:
        await office.spool.release(office.only("deferred"))
    (again,) = await office.spool.claim(OTHER_LANE, 10)
    assert again.attempt == 2


async def test_released_mail_is_tried_again_and_held_again_until_its_own_end(office: Office) -> None:
    await office.spool.release(office.only("ended"))
    claim = next(claim for claim in await office.spool.claim(LANE, 10) if claim.id == office.ids["ended"])
    assert (claim.held, claim.attempt) == ("", 1)
    await office.spool.settle(settlement(claim, IN_DOUBT, then=Next(office.clock.now() + 5, LANE, held="again"))._replace(tried=False))
    assert await office.spool.overdue(10) == []
    office.clock.advance(5)
    (late,) = await office.spool.overdue(10)
    assert (late.id, late.held, late.attempt) == (office.ids["ended"], "again", 1)
    assert late.envelope.recipients[0].in_doubt


async def test_mail_held_without_end_is_never_overdue(office: Office) -> None:
    office.claims["for ever"] = await office.put_claimed("for ever")
    await office.settle("for ever", Next(inf, LANE, held="unreadable"))
    office.clock.advance(1000 * DAY)
    assert office.ids["for ever"] not in {claim.id for claim in await office.spool.overdue(100)}


# -- the log --------------------------------------------------------------------------------------------------------------


async def test_the_log_tells_what_was_done_to_a_message(office: Office) -> None:
    await office.spool.hold(office.only("deferred"), "looks odd")
    office.clock.advance(50)
    await office.spool.release(office.only("deferred"))
    await office.spool.reschedule(office.only("deferred"))
    await office.spool.hold(office.only("deferred"), "odd indeed")
    await office.spool.drop(office.only("deferred"))
    entries = office.log("deferred")
    assert [(entry.status, entry.reply) for entry in entries] == [
        ("deferred", "450 4.2.0 later"),
        ("held", "looks odd"),
        ("released", "was held: looks odd"),
        ("held", "odd indeed"),
        ("dropped", "was held: odd indeed"),
    ]
    assert {(e.lane, e.recipient, e.sender, e.attempt, e.summary.subject) for e in entries[1:]} == {
        (OTHER_LANE, "deferred@x.example", "app@acme.example", 1, "deferred")
    }
    assert [entry.delay for entry in entries] == [0, 0, 50, 50, 50]


async def test_the_log_has_a_line_for_each_recipient_and_tells_of_holds_that_no_operator_made(empty: Office) -> None:
    message = draft(empty.spool, recipients=["a@x.example", "b@x.example"])
    empty.ids["both"] = message.id
    (claim,) = await empty.spool.put([message], [True])
    assert claim is not None
    empty.claims["both"] = claim
    await empty.settle("both", Next(inf, LANE, counted=False, held="no route"))
    await empty.spool.drop(EVERYTHING)
    assert [(entry.recipient, entry.status, entry.reply) for entry in empty.log("both")] == [
        ("a@x.example", "held", "no route"),
        ("b@x.example", "held", "no route"),
        ("a@x.example", "dropped", "was held: no route"),
        ("b@x.example", "dropped", "was held: no route"),
    ]


async def test_the_log_knows_the_report_that_an_attempt_made(empty: Office) -> None:
    claim = await empty.put_claimed("failed")
    bounce = draft(empty.spool, sender="")
    await empty.spool.settle(settlement(claim, FAILED, bounce=bounce))
    empty.claims["sent"] = await empty.put_claimed("sent")
    await empty.spool.settle(settlement(empty.claims["sent"], SENT))
    assert [entry.report for entry in empty.log("failed") + empty.log("sent")] == [bounce.id, ""]


# -- content --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, FILE_ABOVE_BYTES + 1])
async def test_dropped_content_goes_with_its_last_message(empty: Office, size: int) -> None:
    writer = empty.spool.writer()
    await writer.write(b"x" * size)
    content = await writer.finish() if size > 10 else content_of(b"x" * size)
    if size <= 10:
        writer.discard()
    parts = [draft(empty.spool, content=content, lane=lane) for lane in (LANE, LANE, OTHER_LANE)]
    await empty.spool.put(parts, [False] * 3)
    assert len(await empty.spool.drop(Selection(upstream=LANE.upstream))) == 2
    (claim,) = await empty.spool.claim(OTHER_LANE, 1)
    assert octets_of(claim.content) == b"x" * size
    await empty.spool.settle(settlement(claim, DEFERRED, then=Next(0.0, OTHER_LANE)))
    assert len(await empty.spool.drop(EVERYTHING)) == 1
    await eventually(lambda: stored_files(empty.directory) == [], "no file to be left")


# -- many, and at the same time -------------------------------------------------------------------------------------------


async def test_many_messages_are_all_met_and_only_those(empty: Office) -> None:
    lanes = [Lane(f"up{place % 3}", "r") for place in range(1500)]
    drafts = [draft(empty.spool, lane=lane, recipients=[f"r{place % 7}@x.example"]) for place, lane in enumerate(lanes)]
    for start in range(0, 1500, 300):
        await empty.spool.put(drafts[start : start + 300], [False] * 300)
    held = await empty.spool.hold(Selection(upstream="up1", recipient="r3@x.example"), "x")
    expected = [each.id for place, each in enumerate(drafts) if place % 3 == 1 and place % 7 == 3]
    assert list(held) == expected
    assert len(await empty.spool.release(EVERYTHING)) == len(expected)
    assert len(await empty.spool.reschedule(Selection(upstream="up2"))) == 500
    claims = await empty.spool.take(Selection(recipient="r6@x.example"), 300)
    assert len(claims) == 214
    dropped = await empty.spool.drop(EVERYTHING)
    assert len(dropped) == 1500 - 214
    assert not {claim.id for claim in claims} & set(dropped)


async def test_verbs_and_claims_at_the_same_time_never_share_a_message(empty: Office) -> None:
    drafts = [draft(empty.spool) for _ in range(60)]
    await empty.spool.put(drafts, [False] * 60)
    claimed, taken, dropped, again = await asyncio.gather(
        empty.spool.claim(LANE, 20), empty.spool.take(EVERYTHING, 20), empty.spool.drop(EVERYTHING), empty.spool.drop(EVERYTHING)
    )
    ids = [*(claim.id for claim in (*claimed, *taken)), *dropped, *again]
    assert sorted(ids) == sorted(each.id for each in drafts)
