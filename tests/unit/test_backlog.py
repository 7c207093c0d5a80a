"""What a long queue for an upstream that does not work costs everybody else: counted, not timed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.clock import ManualClock
from relay.config.model import Config
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.scheduler import Scheduler
from relay.delivery.settle import Settler
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool import sqlite_claims
from relay.spool.base import EVERYTHING, Claim, Content, Draft, Lane, Next, Settlement
from relay.spool.memory import MemorySpool
from relay.spool.sqlite import SqliteSpool
from relay.upstream.transaction import Outgoing
from tests.contract.drafts import DEFERRED, draft, settlement
from tests.unit.delivery import CONTENT, PREFIX, SENT, FakePool, Log, config_of

GONE = outcome_of_failure(Phase.CONNECT, Failure.TIMEOUT, "no answer")
ACME, GLOBEX = Lane("acme", "acme"), Lane("globex", "globex")
ROUTES = [
    {"name": "acme", "sender": "acme.example", "upstream": "acme"},
    {"name": "globex", "sender": "globex.example", "upstream": "globex"},
]
WITH_FALLBACK = [ROUTES[0] | {"fallback": "house"}, ROUTES[1]]
QUEUE = 400
CLAIMED_AT_ONCE = 20  # five slots, and three claims that wait for each


class CountingSpool(MemorySpool):
    """Counts the messages claimed from each lane, and the settles."""

    def __init__(self, directory: Path, clock: ManualClock) -> None:
        super().__init__(directory, clock, backoff=lambda attempts: 60.0 * attempts)
        self.claimed: list[Lane] = []
        self.settled = 0

    async def claim(self, lane: Lane, limit: int) -> Sequence[Claim]:
        claims = await super().claim(lane, limit)
        self.claimed += [lane] * len(claims)
        return claims

    async def settle(self, settlement: Settlement) -> None:
        self.settled += 1
        await super().settle(settlement)


class SlowPool(FakePool):
    """Answers as fast as it can, but while `answering` is cleared."""

    answering: asyncio.Event | None = None

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        if self.answering is not None:
            await self.answering.wait()
        return await super().send(name, message)


class House:
    """The whole of delivery, between a spool in memory and upstreams that answer what the test says."""

    def __init__(self, directory: Path, config: Config) -> None:
        self.clock = ManualClock()
        self.spool = CountingSpool(directory, self.clock)
        self.log = Log(directory, self.clock)
        self.down = {"acme"}
        self.pool = SlowPool(self._answer)
        journal, metrics, router = self.log.journal, Metrics(), Router(config)
        self.breakers = Breakers(config.retry, journal, metrics, self.clock)
        attempts = Attempts(config, router, self.pool, journal, self.clock, breakers=self.breakers)  # type: ignore[arg-type]
        settler = Settler(config, router, self.spool, journal, self.clock, rng=Random(1), breakers=self.breakers, metrics=metrics)
        self.scheduler = Scheduler(config, self.spool, attempts, settler, journal, self.clock, breakers=self.breakers, metrics=metrics)
        self.service = asyncio.ensure_future(self.scheduler.serve())

    def _answer(self, upstream: str, recipients: list[str]) -> list[Outcome]:
        return [GONE if upstream in self.down else SENT] * len(recipients)

    def sent(self, upstream: str) -> int:
        return sum(handed.upstream == upstream for handed in self.pool.handed) if upstream not in self.down else 0

    async def put(self, lane: Lane, count: int = 1, *, told: bool = False) -> None:
        now = self.clock.now()
        envelope = Envelope(f"app@{lane.route.partition('-')[0]}.example", (Recipient("you@example.org"),))
        content = Content(len(CONTENT), CONTENT)
        drafts = [Draft(self.spool.new_id(), lane, envelope, content, now, PREFIX, due=now) for _ in range(count)]
        await self.spool.put(drafts, [False] * count)
        if told:
            self.scheduler.wake(lane, now)

    async def rest(self) -> None:
        """Until nothing happens any more without the clock."""
        seen = -1
        while seen != (seen := len(self.spool.claimed) + self.spool.settled + len(self.pool.handed)):
            for _ in range(50):
                await asyncio.sleep(0)

    async def pass_time(self, seconds: float, *, step: float = 0.5) -> None:
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self.scheduler._changed.set()  # as its timer would
            await self.rest()

    async def waiting(self, lane: Lane) -> bool:
        return lane in await self.spool.next_due()

    async def close(self) -> None:
        self.scheduler.stop()
        await self.scheduler.drained()
        self.service.cancel()
        await asyncio.gather(self.service, return_exceptions=True)
        self.log.text()
        await self.spool.close()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    built = House(tmp_path, config_of(ROUTES))
    yield built
    await built.close()


async def test_a_long_queue_behind_an_open_breaker_is_put_off_slowly(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    assert house.breakers.ready_at("acme")
    assert len(house.spool.claimed) <= 2 * CLAIMED_AT_ONCE
    before = house.spool.settled
    await house.pass_time(20)
    assert 0 < house.spool.settled - before <= 10 * CLAIMED_AT_ONCE + CLAIMED_AT_ONCE
    assert len(house.pool.handed) <= 5, "nothing is tried while the breaker is open"


async def test_it_costs_its_neighbour_nothing(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    before = len(house.spool.claimed)
    await house.put(GLOBEX, 100, told=True)
    await house.rest()
    assert house.sent("globex") == 100
    assert house.spool.claimed[before:].count(ACME) <= CLAIMED_AT_ONCE


async def test_mail_that_comes_to_a_parked_lane_does_not_wake_it(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    before = len(house.spool.claimed)
    for _ in range(50):
        await house.put(ACME, told=True)
        await house.rest()
    assert len(house.spool.claimed) - before <= CLAIMED_AT_ONCE


async def test_once_the_upstream_works_again_all_of_it_goes_at_once(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    await house.pass_time(10)
    house.down.clear()
    tried = len(house.pool.handed)
    await house.pass_time(30)  # the breaker was open for 30 s; what it has put off comes a little later
    assert len(house.spool._messages) == tried, "those that were tried wait for their own time"
    await house.pass_time(60)
    assert not await house.waiting(ACME)
    assert len(house.spool._messages) == 0


@pytest.mark.parametrize("order", ["try_now", "secret_changed"])
async def test_who_wants_it_tried_need_not_wait_until_the_lane_is_looked_at(house: House, order: str) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    house.down.clear()
    getattr(house.scheduler, order)("acme")
    await house.rest()
    assert house.sent("acme") >= QUEUE - 2 * CLAIMED_AT_ONCE


async def test_what_is_claimed_beside_the_message_that_tries_goes_soon_after_it(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    house.down.clear()
    house.pool.answering = asyncio.Event()
    await house.spool.reschedule(EVERYTHING)
    house.scheduler.try_now("acme")
    house.scheduler.wake(ACME, house.clock.now())
    await house.pass_time(1)
    house.pool.answering.set()
    await house.pass_time(15)  # of which it may take up to five until a lane is looked at again
    assert len(house.spool._messages) == 0


async def test_mail_is_not_looked_at_more_often_while_one_message_tries_for_long(house: House) -> None:
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    house.pool.answering = asyncio.Event()
    house.scheduler.try_now("acme")
    await house.rest()
    before = house.spool.settled
    await house.pass_time(20)
    house.pool.answering.set()
    assert house.spool.settled - before <= 10 * CLAIMED_AT_ONCE + CLAIMED_AT_ONCE


async def test_with_a_fallback_the_queue_moves_on_at_once(tmp_path: Path) -> None:
    house = House(tmp_path, config_of(WITH_FALLBACK))
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    assert house.sent("house") == QUEUE
    await house.close()


async def test_what_moved_to_a_fallback_that_may_take_no_more_goes_back_once_its_own_upstream_works(tmp_path: Path) -> None:
    house = House(tmp_path, config_of(WITH_FALLBACK, upstreams={"house": {"limits": {"rate": "50/d"}}}))
    house.clock.advance(3600)
    await house.put(ACME, QUEUE, told=True)
    await house.rest()
    assert house.sent("house") == 50
    await house.pass_time(600, step=5)
    house.down.clear()
    assert await house.waiting(Lane("house", "acme")), "while nobody knows that it works"
    await house.put(ACME, told=True)
    await house.pass_time(90, step=1)
    assert house.sent("house") == 50
    assert house.spool._messages == {}
    await house.close()
    assert len(house.log.events("sent")) == QUEUE + 1
    assert [event["event"] for event in house.log.events("degraded", "recovered")] == ["degraded", "recovered"]


async def test_many_lanes_of_one_dead_upstream_cost_no_more_than_one(tmp_path: Path) -> None:
    names = [f"acme-{n}" for n in range(200)]
    routes = [{"name": name, "sender": f"{n}.acme.example", "upstream": "acme"} for n, name in enumerate(names)]
    house = House(tmp_path, config_of([*routes, {"name": "all", "sender": "acme.example", "upstream": "acme"}]))
    for name in names:
        await house.put(Lane("acme", name), 5, told=True)
    await house.rest()
    await house.pass_time(30)
    before = house.spool.settled
    await house.pass_time(20)
    assert house.spool.settled - before <= 10 * CLAIMED_AT_ONCE
    await house.close()


async def test_what_waits_behind_an_open_breaker_still_ends_when_its_time_is_up(tmp_path: Path) -> None:
    house = House(tmp_path, config_of(ROUTES, retry={"first": "1m", "max": "10m", "expire": "1h"}))
    await house.put(ACME, 100, told=True)
    await house.rest()
    await house.pass_time(3600 + 900, step=15)
    assert len(house.spool._messages) == 0 or all(not m.draft.envelope.sender for m in house.spool._messages.values()), (
        "only bounces are left"
    )
    await house.close()
    assert len(house.log.events("failed")) == 100


# -- the spool ------------------------------------------------------------------------------------------------------------


LANES = st.builds(Lane, st.sampled_from(["a", "b", "b2", "c"]), st.sampled_from(["x", "xx", "y", "z"]))


@settings(max_examples=25)
@given(mail=st.lists(st.tuples(LANES, st.integers(1, 50), st.booleans()), max_size=40), page=st.integers(1, 5))
def test_each_lane_is_due_when_its_first_message_is(
    tmp_path_factory: pytest.TempPathFactory, mail: list[tuple[Lane, int, bool]], page: int
) -> None:
    async def check() -> None:
        clock = ManualClock()
        spool = SqliteSpool(tmp_path_factory.mktemp("spool"), clock, backoff=lambda attempts: 60.0, keep_log_seconds=60.0)
        expected: dict[Lane, float] = {}
        for lane, due, retried in mail:
            (claim,) = await spool.put([draft(spool, lane=lane, due=float(due))], [retried])
            if claim is not None:
                await spool.settle(settlement(claim, DEFERRED, then=Next(float(due), lane)))
            expected[lane] = min(due, expected.get(lane, due))
        assert await spool.next_due() == expected
        await spool.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_claims, "_LOOK_ROWS", page)
        asyncio.run(check())
