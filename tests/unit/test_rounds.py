"""The rounds: what nobody may try now ends in time, its sender hears of the delay, and none of that costs others their turn."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest

from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Phase, outcome_of_failure
from relay.spool.base import Claim, Content, Draft, Lane, MessageId, Next, Settlement, SpoolError, Waiting
from tests.unit.delivery import CONTENT, PREFIX, SENT, config_of
from tests.unit.test_backlog import ACME, GLOBEX, ROUTES, House

LOST = outcome_of_failure(Phase.FINAL, Failure.CLOSED, "gone")
HOUR, DAY = 3600.0, 86400.0
RETRY = {"first": "1m", "max": "10m", "expire": "2h"}
WARNING = RETRY | {"warn_after": "1h"}
ONE_A_DAY = {"acme": {"limits": {"rate": "1/d"}}}


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Callable[..., House]]:
    built: list[House] = []

    def make(routes: Sequence[dict[str, Any]] = ROUTES, **more: Any) -> House:
        house = House(tmp_path, config_of(routes, **{"retry": RETRY, **more}))
        house.clock.advance(HOUR)
        built.append(house)
        return house

    yield make
    for house in built:
        await house.close()


async def put(house: House, *recipients: Recipient, lane: Lane = ACME, sender: str = "app@acme.example") -> MessageId:
    now = house.clock.now()
    named = recipients or (Recipient("you@example.org"),)
    prefix = PREFIX if sender else b""
    draft = Draft(house.spool.new_id(), lane, Envelope(sender, named), Content(len(CONTENT), CONTENT), now, prefix, due=now)
    await house.spool.put([draft], [False])
    house.scheduler.wake(lane, now)
    return draft.id


def ended(house: House) -> set[str]:
    return {entry.id for entry in house.spool.log if entry.status == "failed"}


def reports(house: House) -> list[bytes]:
    """The reports that wait to be sent."""
    waiting = [m.draft.content.octets or b"" for m in house.spool._messages.values() if not m.draft.envelope.sender]
    return [octets for octets in waiting if b"multipart/report" in octets]


# -- the end ---------------------------------------------------------------------------------------------------------------


async def test_what_expires_together_behind_an_open_breaker_ends_thousands_a_minute_and_its_neighbour_waits_for_none_of_it(
    build: Callable[..., House],
) -> None:
    house = build()
    await house.put(ACME, 1000, told=True)
    await house.rest()
    await house.pass_time(2 * HOUR - 60, step=20)
    assert ended(house) == set()
    await house.pass_time(60, step=20)
    counts: list[int] = []
    for _ in range(130):
        settled = house.spool.settled
        await house.put(GLOBEX, told=True)
        await house.pass_time(0.1, step=0.1)
        counts.append(house.spool.settled - settled)
    assert len(ended(house)) == 1000
    assert house.sent("globex") == 130
    assert max(counts) <= 40, "a few at a time"
    assert len(reports(house)) == 1000, "one for each"
    replies = {entry.reply[:80] for entry in house.spool.log if entry.status == "failed"}
    assert all(reply.startswith("4.4.7 delivery time expired; last reply: not tried: acme has failed since") for reply in replies)


async def test_where_a_fallback_would_be_tried_too_late_what_expires_is_tried_there(build: Callable[..., House]) -> None:
    house = build([ROUTES[0] | {"fallback": [{"upstream": "house", "after": "1d"}]}, ROUTES[1]])
    await house.put(ACME, 200, told=True)
    await house.rest()
    await house.pass_time(2 * HOUR + 60, step=5)
    await house.pass_time(30, step=0.2)
    assert house.sent("house") == 200
    assert ended(house) == set()


async def test_mail_in_doubt_behind_an_open_breaker_ends_without_a_fallback(build: Callable[..., House]) -> None:
    house = build([ROUTES[0] | {"fallback": [{"upstream": "house", "after": "1d"}]}, ROUTES[1]])
    id = await put(house)
    (claim,) = await house.spool.claim(ACME, 1)
    outcomes = {recipient.address: LOST for recipient in claim.envelope.recipients}
    await house.spool.settle(Settlement(claim, outcomes, Next(house.clock.now(), ACME)))
    await house.put(ACME, 50, told=True)
    await house.rest()
    await house.pass_time(2 * HOUR + 60, step=5)
    await house.pass_time(30, step=0.2)
    assert ended(house) == {id}
    assert house.sent("house") == 50, "the others"
    (report,) = reports(house)
    assert b"X-Delivery: unconfirmed" in report


async def test_what_may_be_tried_is_tried_however_old_it_is(build: Callable[..., House]) -> None:
    house = build()
    await house.put(GLOBEX, 100)
    house.clock.advance(DAY)
    rounds = house.scheduler._rounds
    rounds.begin()
    while rounds.at < inf:
        await rounds.go()
    await house.pass_time(60)
    assert house.sent("globex") == 100
    assert ended(house) == set()


async def test_nothing_more_is_begun_before_what_was_begun_is_stored(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    await house.put(ACME, 100, told=True)
    await house.rest()
    settle, gate, begun = house.spool.settle, asyncio.Event(), Counter[str]()

    async def slow(settlement: Settlement) -> None:
        await gate.wait()
        await settle(settlement)

    monkeypatch.setattr(house.spool, "settle", slow)
    monkeypatch.setattr(house.spool, "late", counted(begun, "late", house.spool.late))
    house.clock.advance(3 * HOUR)
    await house.pass_time(60, step=1)
    assert begun["late"] == 1
    gate.set()
    await house.pass_time(10, step=0.1)
    assert begun["late"] > 1
    assert len(ended(house)) == 100


@pytest.mark.parametrize("error", [0, 1])
async def test_while_the_spool_fails_the_rounds_stop_nobody_and_go_on_later(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    house = build()
    name = ("oldest", "late")[error]
    works = getattr(house.spool, name)

    async def fail(*_: object) -> Sequence[Waiting]:
        raise SpoolError("disk on fire")

    await house.put(ACME, 30, told=True)
    await house.rest()
    monkeypatch.setattr(house.spool, name, fail)
    await house.pass_time(2 * HOUR + 60, step=20)
    await house.put(GLOBEX, told=True)
    await house.rest()
    assert house.sent("globex") == 1
    monkeypatch.setattr(house.spool, name, works)
    await house.pass_time(120, step=1)
    assert len(ended(house)) == 30


@pytest.mark.parametrize("way", ["breaker", "pace"])
async def test_what_may_be_tried_again_by_the_time_it_is_looked_at_is_tried(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    house = build(upstreams={"acme": {"limits": {"rate": "50/d"}}} if way == "pace" else {})
    if way == "pace":
        house.down.clear()
    await house.put(ACME, 80, told=True)
    await house.rest()
    late, looked = house.spool.late, set[str]()

    async def mend(ids: Sequence[MessageId]) -> Sequence[Claim]:
        claims = await late(ids)
        looked.update(claim.id for claim in claims)
        house.down.clear()
        house.breakers.record("acme", MessageId("0A"), [SENT])
        if way == "pace":
            house.clock.advance(DAY)
        return claims

    monkeypatch.setattr(house.spool, "late", mend)
    await house.pass_time(2 * HOUR + 60, step=20)
    await house.pass_time(20 * 60, step=5)
    assert looked
    assert looked <= {entry.id for entry in house.spool.log if entry.status == "sent"}
    assert not looked & ended(house)


async def test_mail_in_doubt_at_a_fallback_that_may_take_no_more_does_not_go_home(build: Callable[..., House]) -> None:
    house = build([ROUTES[0] | {"fallback": "house"}, ROUTES[1]], upstreams={"house": {"limits": {"rate": "1/d"}}}, retry={})
    at_house = Lane("house", "acme")
    await house.put(ACME, 20, told=True)
    await house.rest()
    doubt, *_ = await house.spool.claim(at_house, 1)
    outcomes = {recipient.address: LOST for recipient in doubt.envelope.recipients}
    await house.spool.settle(Settlement(doubt, outcomes, Next(house.clock.now(), at_house)))
    house.down.clear()
    await house.pass_time(60, step=5)
    await house.put(ACME, told=True)
    await house.pass_time(120, step=1)
    assert [(id, m.draft.lane) for id, m in house.spool._messages.items()] == [(doubt.id, at_house)]
    assert Counter(entry.lane.upstream for entry in house.spool.log if entry.status == "sent") == {"house": 1, "acme": 19}
    assert await house.waiting(at_house)


# -- the delay -------------------------------------------------------------------------------------------------------------


async def test_who_sent_mail_that_only_waits_for_its_pace_hears_of_the_delay_once(build: Callable[..., House]) -> None:
    house = build(retry=WARNING, upstreams=ONE_A_DAY)
    house.down.clear()
    first = await put(house)
    await house.rest()
    waiting = [await put(house) for _ in range(120)]
    silent = await put(house, Recipient("you@example.org", notify="NEVER"))
    report = await put(house, sender="")
    await house.pass_time(HOUR - 60, step=20)
    assert reports(house) == []
    await house.pass_time(120, step=1)
    await house.pass_time(30, step=0.2)
    assert len(reports(house)) == 120
    assert all(b"acme takes no more than 1/d" in each and b"Action: delayed" in each for each in reports(house))
    settled = house.spool.settled
    await house.pass_time(1200, step=20)
    assert house.spool.settled - settled <= 120, "the reports; nobody is told twice, and what is told of is left alone"
    assert {*waiting, silent, report} <= house.spool._messages.keys()
    assert first not in house.spool._messages
    await house.pass_time(HOUR, step=20)
    assert {*waiting, silent} <= ended(house)


async def test_mail_whose_sender_was_told_keeps_its_place(build: Callable[..., House]) -> None:
    house = build(retry=WARNING | {"expire": "4d"}, upstreams=ONE_A_DAY)
    house.down.clear()
    await put(house)
    await house.rest()
    old = [await put(house) for _ in range(3)]
    await house.pass_time(HOUR + 90, step=10)
    young = await put(house)
    assert [claim.id for claim in await house.spool.claim(ACME, 10) if claim.envelope.sender] == [*old, young]


async def test_who_sent_mail_behind_an_open_breaker_hears_of_the_delay_in_time(build: Callable[..., House]) -> None:
    house = build(retry=WARNING)
    await house.put(ACME, 300, told=True)
    await house.rest()
    await house.pass_time(HOUR, step=5)
    assert reports(house) == []
    await house.pass_time(600 + 120, step=1)  # what was put off comes within `max`
    assert len(reports(house)) == 300
    assert ended(house) == set()


# -- bounds ----------------------------------------------------------------------------------------------------------------


async def test_a_thousand_tenants_that_wait_for_their_pace_are_one_question(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"t{number}" for number in range(1000)]
    house = build(
        [{"name": name, "sender": f"{name}.example", "upstream": name} for name in names],
        upstreams={name: {"limits": {"rate": "1/d"}} for name in names},
    )
    asked = Counter[str]()
    for name in ("oldest", "late", "overdue"):
        monkeypatch.setattr(house.spool, name, counted(asked, name, getattr(house.spool, name)))
    for name in names:
        for _ in range(2):
            await put(house, lane=Lane(name, name), sender=f"app@{name}.example")
    await house.rest()
    assert len(house.pool.handed) == 1000
    await house.pass_time(600, step=20)
    assert asked["late"] == 0
    assert asked["oldest"] <= 12
    assert asked["overdue"] <= 12


def counted(asked: Counter[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    async def count(*arguments: object) -> Any:
        asked[name] += 1
        return await method(*arguments)

    return count


# -- one that cannot be ended ----------------------------------------------------------------------------------------------


async def test_one_whose_end_cannot_be_stored_keeps_nobody_else_from_his(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    await house.put(ACME, 401, told=True)
    await house.rest()
    settle, stuck, found = house.spool.settle, set[MessageId](), asyncio.Event()

    async def fail(settlement: Settlement) -> None:
        if settlement.claim.token < 0 and not stuck:
            stuck.add(settlement.claim.id)
            await found.wait()
        await settle(settlement)

    monkeypatch.setattr(house.spool, "settle", fail)
    await house.pass_time(2 * HOUR + 60, step=20)
    await house.pass_time(20, step=0.1)
    others = len(ended(house))
    asked = Counter[str]()
    monkeypatch.setattr(house.spool, "oldest", counted(asked, "oldest", house.spool.oldest))
    await house.pass_time(180, step=1)
    found.set()
    await house.rest()
    assert stuck <= ended(house)
    assert others == 400
    assert 3 <= asked["oldest"] <= 4, "one round a minute, as ever"


async def test_mail_that_is_old_and_only_has_to_wait_its_turn_at_a_steady_pace_is_tried(build: Callable[..., House]) -> None:
    house = build(upstreams={"acme": {"limits": {"rate": "10/s"}}})
    house.down.clear()
    for _ in range(100):
        await put(house)
    house.clock.advance(3 * DAY)  # as if it had not run meanwhile
    await house.pass_time(60, step=0.03)
    assert ended(house) == set()
    assert house.sent("acme") == 100
