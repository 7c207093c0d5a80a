"""When which message is attempted: slots, turns, times, and upstreams that do not hold each other up."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import process_time
from typing import Any, Literal

import pytest

from relay.clock import Clock, ManualClock, SystemClock
from relay.config.model import Config
from relay.delivery import rounds, timeline
from relay.delivery import scheduler as module
from relay.delivery import settle as settle_module
from relay.delivery.attempt import Result, untried
from relay.delivery.breaker import Breakers
from relay.delivery.scheduler import Scheduler
from relay.delivery.settle import Settler
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Outcome, Phase, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, MessageId, Next, Selection, Settlement, SpoolError, Used
from relay.spool.memory import MemorySpool
from tests.support.eventually import eventually
from tests.unit.delivery import ROUTES, SENT, Log, config_of

GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))
ACME, SPARE, GLOBEX = Lane("acme", "acme"), Lane("spare", "acme"), Lane("globex", "globex")
CONTENT = b"From: app@acme.example\r\n\r\nhello\r\n"


class CountingSpool(MemorySpool):
    """Counts what it is asked for, fails when told to, and holds claims back when told to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked: Counter[str] = Counter()
        self.failing = False
        self.renewed: list[MessageId] = []

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        self._count("claim")
        return await super().claim(lane, limit)

    async def next_due(self) -> Mapping[Lane, float]:
        self._count("next_due")
        return await super().next_due()

    async def used(self) -> Sequence[Used]:
        self._count("used")
        return await super().used()

    async def settle(self, settlement: Settlement) -> None:
        self._count("settle")
        await super().settle(settlement)

    async def renew(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        self.renewed += [claim.id for claim in claims]
        return await super().renew(claims)

    def _count(self, what: str) -> None:
        self.asked[what] += 1
        if self.failing:
            raise SpoolError("disk on fire")


class FakeAttempts:
    """Upstreams that answer `answers[upstream]` (default: taken) once their gate is open."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.answers: dict[str, Outcome] = {}
        self.tried: list[tuple[MessageId, Lane, bool]] = []
        self.active: Counter[str] = Counter()
        self.most_active: Counter[str] = Counter()
        self.riding: set[str] = set()

    def hang(self, upstream: str) -> asyncio.Event:
        self.gates[upstream] = asyncio.Event()
        return self.gates[upstream]

    async def send(self, claim: Claim, *, fresh: bool) -> Result:
        upstream = claim.lane.upstream
        self.tried.append((claim.id, claim.lane, fresh))
        self.active[upstream] += 1
        self.most_active[upstream] = max(self.most_active[upstream], self.active[upstream])
        try:
            if upstream in self.gates:
                await self.gates[upstream].wait()
            await asyncio.sleep(0)
        finally:
            self.active[upstream] -= 1
        outcome = self.answers.get(upstream, SENT)
        return Result({recipient.address: outcome for recipient in claim.envelope.recipients})

    def lanes(self) -> list[Lane]:
        return [lane for _, lane, _ in self.tried]


@dataclass
class House:
    """A scheduler on a memory spool, serving until the test ends."""

    spool: CountingSpool
    clock: Any
    log: Log
    attempts: FakeAttempts = field(default_factory=FakeAttempts)
    config: Config = field(default_factory=lambda: config_of(upstreams={"acme": {"limits": {"connections": 2}}}))

    def __post_init__(self) -> None:
        self.service: asyncio.Task[None] | None = None
        self.build(self.config)

    def build(self, config: Config) -> None:
        self.config = config
        journal, clock, metrics = self.log.journal, self.clock, Metrics()
        self.breakers = Breakers(config.retry, journal, metrics, clock)
        settler = Settler(config, Router(config), self.spool, journal, clock, rng=Random(1), breakers=self.breakers, metrics=metrics)
        self.scheduler = Scheduler(
            config, self.spool, self.attempts, settler, journal, clock, breakers=self.breakers, metrics=metrics  # type: ignore[arg-type]
        )  # fmt: skip

    def serve(self) -> None:
        self.service = asyncio.ensure_future(self.scheduler.serve())

    async def put(self, *lanes: Lane, due: float | None = None, told: bool = False, claimed: bool = False) -> list[MessageId]:
        ids = []
        for lane in lanes:
            now = self.clock.now()
            content = Content(len(CONTENT), CONTENT)
            sender = "x@globex.example" if lane.route == "globex" else "app@acme.example"
            envelope = Envelope(sender, (Recipient("you@example.org"),))
            draft = Draft(self.spool.new_id(), lane, envelope, content, now, b"Received: x\r\n", Origin(), due=now if due is None else due)
            (claim,) = await self.spool.put([draft], [claimed])
            if claim is not None:
                self.scheduler.start(claim)
            elif told:
                self.scheduler.wake(lane, draft.due)
            ids.append(draft.id)
        return ids

    async def turns(self, count: int = 50) -> None:
        """Let the loop turn; every wait in these tests that needs no clock is over by then."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Move the clock as the scheduler's own timer would have felt it."""
        self.clock.advance(seconds)
        self.scheduler._changed.set()
        await self.turns()


async def close(house: House) -> None:
    house.scheduler.stop()
    for gate in house.attempts.gates.values():
        gate.set()
    house.spool.failing = False
    await house.scheduler.drained()
    if house.service is not None:
        house.service.cancel()
        await asyncio.gather(house.service, return_exceptions=True)
    house.log.text()
    await house.spool.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = ManualClock()
    built = House(CountingSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts), clock, Log(tmp_path, clock))
    yield built
    await close(built)


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncIterator[House]:
    """The same on the machine's own clock, for what must happen by itself."""
    clock: Clock = SystemClock()
    built = House(CountingSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts), clock, Log(tmp_path, clock))
    yield built
    await close(built)


# -- slots -----------------------------------------------------------------------------------------------------------------


async def test_where_messages_ride_twice_as_many_attempts_as_connections_are_under_way(house: House) -> None:
    house.attempts.riding.add("acme")
    gate = house.attempts.hang("acme")
    await house.put(*[ACME] * 30)
    house.serve()
    await house.turns()
    assert house.attempts.most_active["acme"] == 4
    gate.set()
    await house.turns()
    assert len(house.attempts.tried) == 30


async def test_an_upstream_gets_no_more_attempts_at_once_than_it_has_slots(house: House) -> None:
    gate = house.attempts.hang("acme")
    await house.put(*[ACME] * 30)
    house.serve()
    await house.turns()
    assert house.attempts.active["acme"] == 2
    gate.set()
    await eventually(lambda: len(house.attempts.tried) == 30, "all attempts")
    assert house.attempts.most_active["acme"] == 2
    await house.turns()
    assert await house.spool.next_due() == {}


async def test_an_upstream_that_hangs_holds_nobody_else_up(house: House) -> None:
    house.attempts.hang("acme")
    await house.put(*[ACME] * 50, *[GLOBEX] * 50)
    house.serve()
    await house.turns(300)
    assert Counter(house.attempts.lanes()) == {ACME: 2, GLOBEX: 50}
    assert house.scheduler.reserve(GLOBEX)
    house.scheduler.release(GLOBEX)


async def test_a_message_that_can_go_at_once_is_attempted_at_once_and_as_fresh(house: House) -> None:
    house.serve()
    await house.turns()
    assert house.scheduler.reserve(ACME)
    (fresh,) = await house.put(ACME, claimed=True)
    await house.turns()
    assert house.attempts.tried == [(fresh, ACME, True)]
    (queued,) = await house.put(ACME, told=True)
    await house.turns()
    assert house.attempts.tried[1:] == [(queued, ACME, False)]


async def test_reservations_are_bounded_and_come_back(house: House) -> None:
    house.serve()
    taken = 0
    while house.scheduler.reserve(ACME):
        taken += 1
        assert taken < 100
    assert taken >= 2
    for _ in range(taken):
        house.scheduler.release(ACME)
    again = 0
    while house.scheduler.reserve(ACME):
        again += 1
    assert again == taken
    for _ in range(again):
        house.scheduler.release(ACME)


async def test_a_reservation_that_is_given_back_lets_waiting_mail_go(house: House) -> None:
    house.serve()
    await house.turns()
    reserved = 0
    while house.scheduler.reserve(ACME):
        reserved += 1
    (waiting,) = await house.put(ACME, told=True)
    await house.turns()
    assert house.attempts.tried == []
    for _ in range(reserved):
        house.scheduler.release(ACME)
    await house.turns()
    assert [tried[0] for tried in house.attempts.tried] == [waiting]


async def test_no_slot_leaks_whatever_an_attempt_comes_to(house: House) -> None:
    house.serve()
    for outcome in (SENT, GREYLISTED, outcome_of_reply(Phase.RCPT, Reply(550, "", "no"))):
        house.attempts.answers["acme"] = outcome
        for _ in range(10):
            if house.scheduler.reserve(ACME):
                await house.put(ACME, claimed=True)
            else:
                await house.put(ACME, told=True)
            await house.turns()
    slots = house.scheduler._slots["acme"]
    assert (slots.used, slots.promised, len(slots.window)) == (0, 0, 0)
    assert house.scheduler._octets == 0


async def test_fresh_mail_does_not_overtake_a_backlog(house: House) -> None:
    gate = house.attempts.hang("acme")
    backlog = await house.put(*[ACME] * 40)
    house.serve()
    await house.turns()
    assert not house.scheduler.reserve(ACME)
    (late,) = await house.put(ACME, told=True)
    gate.set()
    await eventually(lambda: len(house.attempts.tried) == 41, "all attempts")
    assert [tried[0] for tried in house.attempts.tried] == [*backlog, late]


async def test_the_lanes_of_one_upstream_take_turns(house: House) -> None:
    many, few = ACME, Lane("acme", "other")
    house.build(
        config_of(
            [{"name": "acme", "sender": "acme.example", "upstream": "acme"}, {"name": "other", "upstream": "acme"}],
            upstreams={"acme": {"limits": {"connections": 2}}},
        )
    )
    await house.put(*[many] * 60, *[few] * 3)
    house.serve()
    await eventually(lambda: len(house.attempts.tried) == 63, "all attempts")
    places = [place for place, lane in enumerate(house.attempts.lanes()) if lane == few]
    assert max(places) < 16


# -- time ------------------------------------------------------------------------------------------------------------------


async def test_mail_is_attempted_when_it_is_due_and_not_before(house: House) -> None:
    house.serve()
    await house.turns()
    await house.put(ACME, due=house.clock.now() + 30, told=True)
    await house.advance(29)
    assert house.attempts.tried == []
    await house.advance(1)
    assert len(house.attempts.tried) == 1


async def test_the_scheduler_wakes_by_itself_when_mail_is_due(quick: House) -> None:
    quick.serve()
    await quick.turns()
    await quick.put(ACME, due=quick.clock.now() + 0.05, told=True)
    await quick.put(GLOBEX, due=quick.clock.now() + 0.02, told=True)
    await eventually(lambda: quick.attempts.lanes() == [GLOBEX, ACME], "both attempts, in the order of their times")
    assert quick.spool.asked["claim"] <= 4


async def test_mail_that_nobody_told_of_is_found(quick: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.03)
    quick.serve()
    await quick.turns()
    await quick.put(ACME)
    await eventually(lambda: quick.attempts.lanes() == [ACME], "the attempt")


async def test_deferred_mail_behind_fresh_mail_of_its_lane_is_not_forgotten(house: House) -> None:
    house.attempts.answers["acme"] = GREYLISTED
    house.serve()
    (first,) = await house.put(ACME, told=True)
    await house.turns()
    house.attempts.answers["acme"] = SENT
    await house.put(ACME, told=True)
    await house.turns()
    assert len(house.attempts.tried) == 2
    for _ in range(20):
        await house.advance(5)
    assert [tried[0] for tried in house.attempts.tried].count(first) == 2
    assert await house.spool.next_due() == {}


async def test_deferred_mail_and_its_bounce_in_one_lane_are_both_attempted_in_time(house: House) -> None:
    house.serve()
    await house.turns()
    (later,) = await house.put(ACME, due=house.clock.now() + 60, told=True)
    (now,) = await house.put(ACME, told=True)
    await house.turns()
    assert [tried[0] for tried in house.attempts.tried] == [now]
    house.scheduler._refresh_at = house.clock.monotonic() + 1000  # nobody looks into the spool meanwhile
    await house.advance(60)
    assert [tried[0] for tried in house.attempts.tried] == [now, later]


async def test_mail_that_moves_to_another_lane_is_attempted_there_at_once(house: House) -> None:
    house.attempts.answers["acme"] = outcome_of_reply(Phase.GREETING, Reply(421, "4.3.2", "down"))
    house.serve()
    await house.put(ACME, told=True)
    await house.turns()
    assert house.attempts.lanes() == [ACME, SPARE]


async def test_long_attempts_keep_their_leases_and_so_does_what_waits_for_a_slot(house: House) -> None:
    gate = house.attempts.hang("acme")
    await house.put(*[ACME] * 4)
    house.serve()
    await house.turns()
    for _ in range(40):
        await house.advance(60)
    assert len(set(house.spool.renewed)) == 4
    gate.set()
    await eventually(lambda: len(house.attempts.tried) == 4, "all attempts")
    await house.turns()
    assert await house.spool.next_due() == {}
    assert "was taken over" not in house.log.text()


async def test_a_bounce_is_attempted_too(house: House) -> None:
    house.attempts.answers["acme"] = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody"))
    house.serve()
    await house.put(ACME, told=True)
    await house.turns()
    assert house.attempts.lanes() == [ACME, ACME]
    assert await house.spool.next_due() == {}


async def test_the_timeline_does_not_collect_times_that_are_no_longer_true(house: House) -> None:
    for number in range(20_000):
        house.scheduler.wake(ACME, house.clock.now() + 1e6 - number)
    assert len(house.scheduler._timeline) < 2 * timeline._HINTS_LIMIT


# -- throttling ------------------------------------------------------------------------------------------------------------


async def test_a_request_to_slow_down_stops_the_upstream_for_a_while_and_nobody_else(house: House) -> None:
    house.attempts.answers["acme"] = THROTTLED
    await house.put(*[ACME] * 40)
    house.serve()
    await house.turns(200)
    first = len(house.attempts.tried)
    assert first == 2, "one for each slot, and then silence"
    assert not house.scheduler.reserve(ACME)
    await house.put(GLOBEX, told=True)
    await house.turns()
    assert house.attempts.lanes()[first:] == [GLOBEX]
    await house.advance(55)
    assert Counter(house.attempts.lanes())[ACME] == first
    house.attempts.answers["acme"] = SENT
    for _ in range(60):
        await house.advance(5)
    assert Counter(house.attempts.lanes())[ACME] == first + 40
    assert await house.spool.next_due() == {}


async def test_what_waited_for_a_slot_when_the_upstream_asked_to_slow_down_goes_on_in_time(house: House) -> None:
    gate = house.attempts.hang("acme")
    house.attempts.answers["acme"] = THROTTLED
    await house.put(*[ACME] * 6)
    house.serve()
    await house.turns()
    gate.set()
    await house.turns(100)
    assert len(house.attempts.tried) == 2
    house.attempts.answers["acme"] = SENT
    house.scheduler._refresh_at = house.clock.monotonic() + 1000  # nobody looks into the spool meanwhile
    for _ in range(20):
        await house.advance(6)
    assert len({tried[0] for tried in house.attempts.tried}) == 6
    attempts = {entry.id: entry.attempt for entry in house.spool.log if entry.status == "sent"}
    assert set(attempts.values()) == {1}


# -- trouble ---------------------------------------------------------------------------------------------------------------


async def test_while_the_spool_fails_nothing_spins_and_nothing_is_lost(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle_module, "_AGAIN_SECONDS", 0.001)
    await house.put(*[ACME] * 3)
    house.spool.failing = True
    house.serve()
    await house.turns(200)
    assert sum(house.spool.asked.values()) <= 2
    for _ in range(3):
        await house.advance(5)
    assert sum(house.spool.asked.values()) <= 8
    house.spool.failing = False
    await house.advance(5)
    await eventually(lambda: len(house.attempts.tried) == 3, "all attempts")
    await house.turns()
    assert await house.spool.next_due() == {}
    assert house.log.text().count("looking for due mail") == 3, "after 1, 2 and 4 failures"


async def test_a_lane_that_could_not_be_claimed_is_found_again_soon(house: House) -> None:
    house.serve()
    await house.turns()
    house.spool.failing = True
    await house.put(ACME, told=True)
    await house.turns()
    assert house.attempts.tried == []
    house.spool.failing = False
    await house.advance(5)
    assert len(house.attempts.tried) == 1


async def test_an_attempt_that_cannot_be_settled_is_told_and_holds_no_slot(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def explode(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(house.spool, "settle", explode)
    house.serve()
    await house.put(*[ACME] * 5, told=True)
    await eventually(lambda: len(house.attempts.tried) == 5, "all attempts")
    await house.turns()
    assert house.scheduler._slots["acme"].used == 0
    assert len(house.log.events("fault")) == 5


async def test_an_idle_scheduler_does_nothing(house: House) -> None:
    house.serve()
    await house.turns(500)
    assert house.spool.asked == {"next_due": 1}


@pytest.mark.parametrize("hanging", [True, False])
async def test_a_busy_scheduler_asks_the_spool_no_more_than_it_must(house: House, hanging: bool) -> None:
    if hanging:
        house.attempts.hang("acme")
    await house.put(*[ACME] * 100)
    house.serve()
    await house.turns(2000)
    assert len(house.attempts.tried) == (2 if hanging else 100)
    assert house.spool.asked["next_due"] <= 2
    assert house.spool.asked["claim"] <= (3 if hanging else 52)


async def test_mail_of_an_upstream_that_is_gone_is_attempted_in_a_few_slots_of_its_own(house: House) -> None:
    gone = Lane("gone", "acme")
    gate = house.attempts.hang("gone")
    await house.put(*[gone] * 20)
    house.serve()
    await house.turns()
    assert house.attempts.active["gone"] == module._ORPHAN_SLOTS
    gate.set()
    await eventually(lambda: len(house.attempts.tried) == 20, "all attempts")


# -- the end ---------------------------------------------------------------------------------------------------------------


async def test_stopping_begins_nothing_and_gives_back_what_waits(house: House) -> None:
    gate = house.attempts.hang("acme")
    await house.put(*[ACME] * 12)
    house.serve()
    await house.turns()
    assert house.scheduler.stop() == 2
    assert not house.scheduler.reserve(GLOBEX)
    await house.put(GLOBEX, told=True)
    gate.set()
    await house.scheduler.drained()
    await house.turns()
    assert len(house.attempts.tried) == 2
    claims = [*await house.spool.claim(ACME, 100), *await house.spool.claim(GLOBEX, 100)]
    assert len(claims) == 11
    assert all(claim.attempt == 1 and not claim.envelope.recipients[0].in_doubt for claim in claims)


async def test_mail_put_while_stopping_stays_in_the_spool(house: House) -> None:
    house.serve()
    await house.turns()
    assert house.scheduler.reserve(ACME)
    house.scheduler.stop()
    await house.put(ACME, claimed=True)
    await house.scheduler.drained()
    assert house.attempts.tried == []
    (claim,) = await house.spool.claim(ACME, 100)
    assert (claim.attempt, claim.envelope.recipients[0].in_doubt) == (1, False)


async def test_aborting_cuts_off_what_hangs_and_settles_nothing(house: House) -> None:
    house.attempts.hang("acme")
    await house.put(*[ACME] * 2)
    house.serve()
    await house.turns()
    house.scheduler.stop()
    waiting = asyncio.ensure_future(house.scheduler.drained())
    await house.turns()
    assert not waiting.done()
    await house.scheduler.abort()
    await waiting
    assert house.attempts.active["acme"] == 0
    assert house.spool.asked["settle"] == 0
    assert house.log.events("fault") == []


async def test_the_backlog_is_what_waits_in_memory_and_more_where_the_spool_has_more(house: House) -> None:
    house.attempts.hang("acme")
    house.serve()
    assert house.scheduler.backlog("acme") == 0
    await house.put(*[ACME] * 2, told=True)
    await house.turns()
    assert (len(house.attempts.tried), house.scheduler.backlog("acme")) == (2, 0)
    await house.put(*[ACME] * 3, told=True)
    await house.turns()
    assert house.scheduler.backlog("acme") == 3
    await house.put(*[ACME] * 50, told=True)
    await house.turns()
    assert house.scheduler.backlog("acme") >= 10 * 2
    assert house.scheduler.backlog("globex") == house.scheduler.backlog("nobody") == 0


class Deaf(asyncio.Event):
    """Does not hear that it is cancelled for the first time, as `asyncio.wait_for` of Python 3.11 where it is just done."""

    async def wait(self) -> Literal[True]:
        with suppress(asyncio.CancelledError):
            return await super().wait()
        return await super().wait()


async def test_aborting_cuts_off_what_does_not_hear_it_at_once(house: House) -> None:
    house.attempts.gates["acme"] = Deaf()
    await house.put(ACME)
    house.serve()
    await house.turns()
    house.scheduler.stop()
    await asyncio.wait_for(house.scheduler.abort(), 5)
    assert house.attempts.active["acme"] == 0


# -- the end of held mail, operators, and upstreams that come back -----------------------------------------------------------


async def hold(house: House, count: int, *, until: float) -> None:
    for _ in range(count):
        await house.put(GLOBEX)
    for claim in await house.spool.claim(GLOBEX, count):
        then = Next(until, GLOBEX, counted=False, held="why")
        await house.spool.settle(Settlement(claim, untried(claim), then, tried=False))


async def test_held_mail_is_given_up_when_its_time_is_up_a_batch_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_AT_ONCE", 3)
    await hold(house, 8, until=house.clock.now() + 100)
    house.serve()
    await house.advance(99)
    assert {entry.status for entry in house.spool.log} == {"held"}
    for _ in range(16):
        await house.advance(5)
    await eventually(lambda: len([e for e in house.spool.log if e.status == "failed"]) == 8, "all given up")
    await eventually(lambda: len(house.attempts.tried) == 8, "their reports")
    assert house.scheduler._octets == 0


async def test_a_scheduler_that_stops_gives_up_no_held_mail(house: House) -> None:
    await hold(house, 1, until=house.clock.now())
    house.scheduler.stop()
    house.serve()
    await house.turns()
    assert [claim.held for claim in await house.spool.overdue(10)] == ["why"]


async def test_what_an_operator_gives_up_ends_beside_the_slots_and_is_waited_for_at_the_end(house: House) -> None:
    house.attempts.hang("acme")
    await house.put(*[ACME] * 2)
    house.serve()
    await house.turns()
    await house.put(*[ACME] * 3, due=house.clock.now() + 1000)
    claims = await house.spool.take(Selection(upstream="acme"), 10)
    house.scheduler.give_up(claims, "enough")
    house.scheduler.stop()
    assert house.scheduler._octets == 5 * len(CONTENT)
    for gate in house.attempts.gates.values():
        gate.set()
    await house.scheduler.drained()
    assert sorted(entry.status for entry in house.spool.log) == ["failed"] * 3 + ["sent"] * 2
    assert house.scheduler._octets == 0


async def test_what_a_new_secret_frees_is_due_at_once_and_what_is_held_stays(house: House) -> None:
    house.serve()
    await house.put(*[ACME] * 3, due=house.clock.now() + 10_000)
    await hold(house, 1, until=house.clock.now() + 10_000)
    await house.turns()
    assert house.attempts.tried == []
    house.scheduler.secret_changed("acme")
    house.scheduler.secret_changed("globex")
    await house.turns(100)
    assert house.attempts.lanes() == [ACME] * 3


async def test_mail_that_cannot_be_brought_forward_stops_no_other_and_is_tried_again_soon(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Lane) -> None:
        raise SpoolError("disk on fire")

    works = house.spool.hasten
    monkeypatch.setattr(house.spool, "hasten", fail)
    house.serve()
    await house.put(ACME, due=house.clock.now() + 10_000)
    house.scheduler.secret_changed("acme")
    await house.turns()
    for _ in range(3):
        await house.put(GLOBEX, told=True)
        await house.turns()
    assert house.attempts.lanes() == [GLOBEX] * 3
    monkeypatch.setattr(house.spool, "hasten", works)
    await house.advance(5)
    assert house.attempts.lanes() == [GLOBEX] * 3 + [ACME]
    assert len(house.log.events("fault")) == 1


async def test_when_many_upstreams_come_back_at_once_the_mail_of_others_goes_on_meanwhile(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"t{number}" for number in range(5)]
    routes = [{"name": name, "sender": f"{name}.example", "upstream": name} for name in names]
    house.build(config_of([*ROUTES, *routes], upstreams={name: {} for name in names}))
    asked: list[str] = []
    gate = asyncio.Event()

    async def hasten(lane: Lane) -> bool:
        asked.append(lane.upstream)
        await gate.wait()
        gate.clear()
        return False

    monkeypatch.setattr(house.spool, "hasten", hasten)
    await house.put(*(Lane(name, name) for name in names[:3]), due=house.clock.now() + 10_000)
    house.serve()
    for name in names:
        house.scheduler.secret_changed(name)
    tried = []
    for _ in range(3):
        await house.turns()
        await house.put(GLOBEX, told=True)
        gate.set()
        await house.turns()
        tried.append(len(house.attempts.tried))
    assert asked == names[:3], "one after the other, and only where mail waits"
    assert tried == [1, 2, 3]


def test_ten_thousand_lanes_of_one_upstream_become_due_in_no_time(tmp_path: Path) -> None:
    async def seconds() -> float:
        clock = ManualClock()
        house = House(CountingSpool(tmp_path, clock, backoff=lambda attempts: 60.0), clock, Log(tmp_path, clock))
        for number in range(10_000):
            house.scheduler.wake(Lane("acme", f"r{number}"), 0.0)
        begun = process_time()
        house.scheduler._collect()
        spent = process_time() - begun
        assert len(house.scheduler._slots["acme"].ready) == 10_000
        await close(house)
        return spent

    assert asyncio.run(seconds()) < 0.5  # 0.05 s; looking through what is ready for each of them takes 3 s


async def test_an_upstream_may_be_tried_whatever_its_breaker_says(house: House) -> None:
    outcome = outcome_of_reply(Phase.AUTH, Reply(535, "", "no"))
    house.breakers.record("acme", MessageId("01"), [outcome])
    assert house.breakers.ready_at("acme")
    house.scheduler.try_now("acme")
    assert not house.breakers.ready_at("acme")


async def test_upstreams_with_nothing_due_are_not_looked_at(house: House) -> None:
    names = [f"t{number}" for number in range(500)]
    routes = [{"name": name, "sender": f"{name}.example", "upstream": name} for name in names]
    house.build(config_of(routes, upstreams={name: {} for name in names}))
    house.serve()
    for name in names[:3]:
        await house.put(Lane(name, name), told=True)
    await house.put(ACME, told=True)
    await house.turns(100)
    assert len(house.attempts.tried) == 4
    assert len(house.scheduler._slots) == 4
    assert house.scheduler._asking == {}


@pytest.mark.parametrize("others", [ACME, GLOBEX])
async def test_a_message_is_known_to_be_under_way_at_its_upstream(house: House, others: Lane) -> None:
    house.attempts.hang("acme")
    house.serve()
    (id,) = await house.put(ACME, told=True)
    await house.turns()
    assert house.scheduler.attempting(id, {"acme", "globex"})
    assert not house.scheduler.attempting(id, {"globex"})
    assert not house.scheduler.attempting("0", {others.upstream})


async def test_a_throttled_upstream_is_paused(house: House) -> None:
    house.attempts.answers["acme"] = THROTTLED
    house.serve()
    await house.put(ACME, told=True)
    await house.turns()
    assert house.scheduler.paused(ACME)
    assert not house.scheduler.paused(GLOBEX)
    house.attempts.answers["acme"] = SENT
    await house.advance(60)
    assert not house.scheduler.paused(ACME)
