"""Limits and requests to slow down, as the scheduler keeps them: what may not go waits in its lane and costs nothing there."""

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.delivery import scheduler as module
from relay.delivery.attempt import Result
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Failure, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.spool.base import Claim, Content, Draft, Lane, MessageId
from tests.support.eventually import eventually
from tests.unit.delivery import SENT, Log, config_of
from tests.unit.test_scheduler import ACME, CONTENT, GLOBEX, GREYLISTED, SPARE, THROTTLED, CountingSpool, FakeAttempts, House, close

DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")


class Timed(FakeAttempts):
    """Notes when each attempt began, and says that it needed so many transactions."""

    clock: ManualClock
    transactions = 1

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[str, float]] = []

    async def send(self, claim: Claim, *, fresh: bool) -> Result:
        self.times.append((claim.lane.upstream, self.clock.monotonic()))
        return (await super().send(claim, fresh=fresh))._replace(transactions=self.transactions)

    def count(self, upstream: str = "acme", *, since: float = 0.0) -> int:
        return sum(name == upstream and time >= since for name, time in self.times)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = ManualClock()
    attempts = Timed()
    attempts.clock = clock
    built = House(CountingSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts), clock, Log(tmp_path, clock), attempts)
    yield built
    await close(built)


def limited(house: House, *, routes: list[dict[str, Any]] | None = None, connections: int = 5, **limits: Any) -> Timed:
    """Give acme these limits, and let an hour pass since the start."""
    house.build(config_of(routes, upstreams={"acme": {"limits": {"connections": connections, **limits}}}))
    house.clock.advance(3600)
    assert isinstance(house.attempts, Timed)
    return house.attempts


async def put_many(house: House, recipients: int, *, lane: Lane = ACME) -> MessageId:
    """One waiting message for so many."""
    envelope = Envelope("app@acme.example", tuple(Recipient(f"r{number}@example.org") for number in range(recipients)))
    now = house.clock.now()
    draft = Draft(house.spool.new_id(), lane, envelope, Content(len(CONTENT), CONTENT), now, b"Received: x\r\n", Origin(), due=now)
    await house.spool.put([draft], [False])
    house.scheduler.wake(lane, now)
    return draft.id


async def run_for(house: House, seconds: float, *, step: float = 0.05) -> None:
    until = house.clock.monotonic() + seconds
    while house.clock.monotonic() < until - step / 2:
        house.clock.advance(step)
        house.scheduler._changed.set()
        await house.turns(12)


# -- limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "seconds", "wanted"), [("5/s", 60, 300), ("2/s", 60, 120), ("30/m", 60, 30)])
async def test_a_backlog_goes_at_the_rate_that_is_configured(house: House, rate: str, seconds: float, wanted: int) -> None:
    attempts = limited(house, rate=rate)
    await house.put(*[ACME] * 400)
    house.serve()
    await house.turns()
    begun = house.clock.monotonic()
    await run_for(house, seconds)
    assert attempts.count(since=begun) == pytest.approx(wanted, rel=0.02)
    slots = house.scheduler._slots["acme"]
    assert (slots.used, slots.promised, len(slots.window)) == (0, 0, 0)
    assert house.spool.asked["claim"] <= attempts.count() + 3, "what may not go is not claimed"


async def test_fresh_mail_keeps_the_rate_too_and_what_must_wait_does_not_hold_a_slot(house: House) -> None:
    attempts = limited(house, rate="2/s")
    house.serve()
    await house.turns()
    begun = house.clock.monotonic()
    for _ in range(400):  # twenty clients a second
        claimed = house.scheduler.reserve(ACME)
        await house.put(ACME, claimed=claimed, told=not claimed)
        await run_for(house, 0.05)
    assert attempts.count(since=begun) == pytest.approx(40, abs=2)
    assert house.scheduler._slots["acme"].used == 0


async def test_a_reservation_that_is_not_used_costs_nothing_of_the_rate(house: House) -> None:
    limited(house, rate="50/h")
    house.serve()
    await house.turns()
    for _ in range(200):
        assert house.scheduler.reserve(ACME)
        house.scheduler.release(ACME)
    assert house.scheduler.pacings()[0].limits == (("50/h", 50),)


async def test_nobody_else_waits_for_an_upstream_that_has_to(house: House) -> None:
    attempts = limited(house, rate="30/m")
    await house.put(*[ACME] * 50, *[GLOBEX] * 50)
    house.serve()
    await house.turns(300)
    assert (attempts.count("acme"), attempts.count("globex")) == (1, 50)


async def test_an_upstream_that_may_not_go_is_not_looked_at_until_it_may(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(house, rate="1/h")
    await house.put(*[ACME] * 3)
    house.serve()
    await house.turns()
    looks = Counter[str]()
    room = module.Scheduler._room

    def counting(scheduler: module.Scheduler, slots: Any) -> int:
        looks[slots.upstream] += 1
        return room(scheduler, slots)

    monkeypatch.setattr(module.Scheduler, "_room", counting)
    for _ in range(100):
        await house.put(GLOBEX, told=True)
        await house.turns(20)
    assert looks["globex"] >= 100
    assert looks["acme"] == 0


async def test_a_hundred_recipients_are_more_than_one(house: House) -> None:
    attempts = limited(house, recipient_rate="100/m", connections=1)
    for _ in range(4):
        await put_many(house, 50)
    house.serve()
    await house.turns()
    begun = house.clock.monotonic()
    await run_for(house, 100, step=0.5)
    assert [time - begun for _, time in attempts.times] == pytest.approx([0, 30, 60, 90], abs=1)


async def test_messages_for_many_that_were_claimed_together_go_one_by_one_where_recipients_are_limited(house: House) -> None:
    attempts = limited(house, recipient_rate="10/s", connections=5)
    for _ in range(5):
        await put_many(house, 100)
    house.serve()
    await house.turns()
    begun = house.clock.monotonic()
    await run_for(house, 60, step=0.5)
    assert [time - begun for _, time in attempts.times] == pytest.approx([0, 10, 20, 30, 40], abs=1.5)
    entries = [entry.attempt for entry in house.spool.log]
    assert entries == [1] * 500, "those that were given back are not counted"


async def test_transactions_that_a_message_needs_beyond_the_first_are_paid_for(house: House) -> None:
    attempts = limited(house, rate="1/s")
    attempts.transactions = 10
    await house.put(*[ACME] * 3)
    house.serve()
    await house.turns()
    begun = house.clock.monotonic()
    await run_for(house, 25, step=0.5)
    assert [time - begun for _, time in attempts.times] == pytest.approx([0, 10, 20], abs=1)


async def test_a_quota_goes_at_once_and_then_waits_across_a_restart(house: House) -> None:
    attempts = limited(house, rate="50/h")
    await house.put(*[ACME] * 120)
    house.serve()
    await house.turns(600)
    assert attempts.count() == 50
    await run_for(house, 600, step=10)
    assert attempts.count() == 50
    assert house.service is not None
    house.service.cancel()
    house.build(house.config)
    house.serve()
    await house.turns(300)
    await run_for(house, 2900, step=10)
    assert attempts.count() == 50, "the relay that started again knows what the first one has sent"
    await run_for(house, 300, step=10)
    assert attempts.count() == 100
    assert not house.scheduler.paused(GLOBEX)
    assert house.scheduler.paused(ACME), "no client need wait so long for a verdict"


async def test_nothing_goes_where_there_is_a_quota_before_it_is_known_what_is_left(house: House) -> None:
    attempts = limited(house, rate="50/h")
    await house.put(*[ACME] * 2)
    house.spool.failing = True
    house.serve()
    await house.turns()
    assert not house.scheduler.reserve(ACME)
    assert house.scheduler.reserve(GLOBEX)
    house.scheduler.release(GLOBEX)
    house.spool.failing = False
    await run_for(house, 10, step=1)
    assert attempts.count() == 2


async def test_a_machine_that_slept_through_a_quota_s_window_sends_within_a_minute(house: House) -> None:
    attempts = limited(house, rate="50/d")
    await house.put(*[ACME] * 60)
    house.serve()
    await house.turns(300)
    assert attempts.count() == 50
    await run_for(house, 300, step=10)
    house.clock.step(2 * 86400)  # wall time went on, and the time of timers did not
    await run_for(house, 61, step=1)
    assert attempts.count() == 60


# -- turns -----------------------------------------------------------------------------------------------------------------


async def test_routes_that_share_an_upstream_take_turns_and_so_do_fresh_and_retried_mail(house: House) -> None:
    few, many = Lane("acme", "few"), Lane("acme", "many")
    attempts = limited(
        house,
        rate="2/s",
        routes=[{"name": "few", "sender": "acme.example", "upstream": "acme"}, {"name": "many", "upstream": "acme"}],
    )
    house.attempts.answers["acme"] = GREYLISTED
    await house.put(*[few] * 20, *[many] * 20)
    house.serve()
    await run_for(house, 25)
    assert attempts.count() == 40
    house.attempts.answers["acme"] = SENT
    house.clock.advance(100)  # all of them are due again
    fresh = await house.put(*[few] * 40, *[many] * 40)
    for lane in (few, many):
        house.scheduler.wake(lane, house.clock.now())
    await run_for(house, 20)
    first = attempts.tried[40:80]
    kinds = Counter((lane.route, "fresh" if id in fresh else "retried") for id, lane, _ in first)
    assert kinds == {(route, kind): pytest.approx(10, abs=2) for route in ("few", "many") for kind in ("fresh", "retried")}


# -- slower on request -----------------------------------------------------------------------------------------------------


async def test_a_spent_quota_of_the_provider_is_not_hammered_and_loses_nothing(house: House) -> None:
    attempts = limited(house, connections=5)
    attempts.answers["acme"] = outcome_of_reply(Phase.DATA, Reply(550, "5.4.5", "Daily sending quota exceeded"))
    ids = await house.put(*[ACME] * 100)
    house.serve()
    await house.turns()
    await run_for(house, 12 * 3600, step=30)
    assert attempts.count() <= 5 + 3 * 6 + 12, "one for each pause, and the pauses grow to an hour"
    assert {lane.upstream for _, lane, _ in attempts.tried} == {"acme"}, "and no fallback is used for it"
    assert not house.breakers.troubles()
    attempts.answers["acme"] = SENT
    await run_for(house, 2 * 3600, step=10)
    assert sorted(entry.id for entry in house.spool.log if entry.status == "sent") == sorted(ids)
    assert {entry.attempt for entry in house.spool.log if entry.status == "sent"} == {1}
    assert house.log.events("degraded", "failed", "bounced") == []
    assert 10 <= len(house.log.events("throttled")) <= 30
    assert house.scheduler.pacings() == []


async def test_what_was_promised_before_the_upstream_asked_to_slow_down_waits_all_the_same(house: House) -> None:
    attempts = limited(house, connections=4)
    attempts.answers["acme"] = THROTTLED
    house.serve()
    await house.turns()
    assert all(house.scheduler.reserve(ACME) for _ in range(4))
    await house.put(ACME, claimed=True)
    await house.turns()
    late = await house.put(*[ACME] * 3, claimed=True)
    await house.turns()
    assert attempts.count() == 1, "the others would have come in the pause it asked for"
    attempts.answers["acme"] = SENT
    await run_for(house, 120, step=2)
    assert {tried[0] for tried in attempts.tried[1:]} >= set(late)
    assert {entry.attempt for entry in house.spool.log if entry.status == "sent"} == {1}
    slots = house.scheduler._slots["acme"]
    assert (slots.used, slots.promised, len(slots.window)) == (0, 0, 0)


async def test_successes_bring_the_pace_back_and_the_window_with_it(house: House) -> None:
    attempts = limited(house, connections=2)
    attempts.answers["acme"] = THROTTLED
    await house.put(*[ACME] * 2)
    house.serve()
    await house.turns()
    (slowed,) = house.scheduler.pacings()
    assert (slowed.upstream, slowed.pace, slowed.connections, slowed.pause_seconds) == ("acme", "10/m", 1, 60)
    attempts.answers["acme"] = SENT
    for _ in range(15):
        await house.put(ACME, told=True)
        await run_for(house, 60, step=5)
    assert house.scheduler.pacings() == []
    assert house.scheduler._slots["acme"].pace is None
    await house.put(*[ACME] * 30, told=True)
    await house.turns(300)
    assert len(house.attempts.tried) == 2 + 2 + 15 + 30


async def test_a_throttled_message_says_when_it_is_tried_again(house: House) -> None:
    attempts = limited(house)
    attempts.answers["acme"] = THROTTLED
    house.serve()
    (id,) = await house.put(ACME, told=True)
    for pause in (60, 120, 240):
        await house.turns()
        due = (await house.spool.next_due())[ACME]
        assert pause - 6 <= due - house.clock.now() <= 1.1 * pause
        await run_for(house, due - house.clock.now() + 5, step=5)
    assert [tried[0] for tried in attempts.tried] == [id] * 4


@pytest.mark.parametrize("throttled", [True, False])
async def test_mail_that_waits_for_the_pace_expires_all_the_same(house: House, throttled: bool) -> None:
    limits: dict[str, Any] = {} if throttled else {"rate": "1/d"}
    house.build(config_of(upstreams={"acme": {"limits": {"connections": 2, **limits}}}, retry={"expire": "2h"}))
    attempts = house.attempts
    assert isinstance(attempts, Timed)
    if throttled:
        attempts.answers["acme"] = THROTTLED
    old = await house.put(*[ACME] * 150)
    house.serve()
    await house.turns()
    await run_for(house, 3600, step=30)
    late = await house.put(*[ACME] * 5, told=True)
    await run_for(house, 3500, step=30)
    assert [entry for entry in house.spool.log if entry.status == "failed"] == []
    await run_for(house, 400, step=5)
    failed = {entry.id: entry for entry in house.spool.log if entry.status == "failed"}
    assert failed.keys() == set(old) - {entry.id for entry in house.spool.log if entry.status == "sent"}
    assert not failed.keys() & set(late)
    why = "acme asks us to slow down: 454 4.7.0 slow down" if throttled else "acme takes no more than 1/d"
    untried = failed[old[-1]]
    assert (untried.attempt, untried.reply) == (0, f"4.4.7 delivery time expired; last reply: {why}")
    assert all(entry.report for entry in failed.values()), "the sender is told"


async def test_an_operator_may_have_it_tried_during_a_pause(house: House) -> None:
    attempts = limited(house)
    attempts.answers["acme"] = THROTTLED
    house.serve()
    await house.put(ACME, told=True)
    await house.turns()
    late, *later = await house.put(*[ACME] * 4, told=True)
    await house.turns()
    assert attempts.count() == 1
    attempts.answers["acme"] = SENT
    house.scheduler.try_now("acme")
    await house.turns()
    assert [tried[0] for tried in attempts.tried[1:]] == [late]
    await run_for(house, 120, step=2)
    assert {tried[0] for tried in attempts.tried[2:]} >= set(later)


async def test_mail_moves_on_from_an_upstream_that_is_down_however_slow_its_pace(house: House) -> None:
    attempts = limited(house, rate="1/m")
    for number in range(3):
        house.breakers.record("acme", MessageId(f"0{number}"), [DOWN])
    assert house.breakers.ready_at("acme")

    async def send(claim: Claim, *, fresh: bool) -> Result:
        if claim.lane.upstream != "acme":
            return await Timed.send(attempts, claim, fresh=fresh)
        closed = house.breakers.admit("acme", claim.id)
        assert closed is not None
        return Result({recipient.address: closed for recipient in claim.envelope.recipients}, tried=False)

    attempts.send = send  # type: ignore[method-assign]
    await house.put(*[ACME] * 20)
    house.serve()
    await eventually(lambda: attempts.count("spare") == 20, "all of it to take the fallback")
    assert {lane for _, lane, _ in attempts.tried} == {SPARE}
    assert house.scheduler.pacings()[0].limits == (("1/m", 1),), "nothing was used up"


async def test_only_transactions_are_counted_and_not_attempts_to_connect(house: House) -> None:
    attempts = limited(house, rate="10/h")
    attempts.answers["acme"] = DOWN
    await house.put(*[ACME] * 40)
    house.serve()
    await house.turns(300)
    assert attempts.count("acme") == 40
    assert house.scheduler.pacings()[0].limits == (("10/h", 10),)


async def test_pacing_opens_no_breaker_and_degrades_no_route(house: House) -> None:
    limited(house, rate=["2/s", "10/h"])
    await house.put(*[ACME] * 30)
    house.serve()
    await run_for(house, 120, step=0.5)
    assert house.breakers.troubles() == []
    assert house.log.events("degraded", "throttled", "deferred") == []
