"""Delivery as a whole over days in a second: scheduler, attempts, settler and breakers on a spool in memory, upstreams that do as told.

The clock stands still until a test moves it; `House.pass_time` moves it in steps that are shorter than anything that is timed.
"""

import asyncio
import email
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.model import Config
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.scheduler import Scheduler
from relay.delivery.settle import Settler
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Content, Draft, Lane, MessageId, Selection, Settlement, SpoolError
from relay.spool.memory import MemorySpool
from relay.upstream.transaction import Outgoing
from tests.unit.delivery import LANE, PREFIX, SENT, Log, config_of

DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "Connection refused")
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
FORBIDDEN = outcome_of_reply(Phase.MAIL, Reply(550, "5.7.1", "not you"))
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")
THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))

ALONE: list[dict[str, Any]] = [{"name": "acme", "sender": "acme.example", "upstream": "acme"}]
BACKED: list[dict[str, Any]] = [{**ALONE[0], "fallback": "house"}]
REPORTS: dict[str, Any] = {"name": "reports", "sender": "<>", "upstream": "house"}
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


class Upstreams:
    """A pool whose upstreams answer `answers[name]` to everybody (default: taken), once their gate is open."""

    def __init__(self) -> None:
        self.answers: dict[str, Outcome] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.handed: list[tuple[str, Outgoing]] = []

    def recipients_limit(self, name: str) -> int:
        return 0

    riding = frozenset[str]()

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        self.handed.append((name, message))
        if name in self.gates:
            await self.gates[name].wait()
        await asyncio.sleep(0)
        return [self.answers.get(name, SENT)] * len(message.recipients)

    def count(self) -> Counter[str]:
        return Counter(name for name, _ in self.handed)


class WatchedSpool(MemorySpool):
    """Counts settles, and fails to bring mail forward when told to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.settled: Counter[MessageId] = Counter()
        self.failing = False

    async def settle(self, settlement: Settlement) -> None:
        self.settled[settlement.claim.id] += 1
        await super().settle(settlement)

    async def hasten(self, lane: Lane) -> bool:
        if self.failing:
            raise SpoolError("disk on fire")
        return await super().hasten(lane)


@dataclass
class House:
    """The whole of delivery, serving until the test ends."""

    spool: WatchedSpool
    clock: ManualClock
    log: Log
    upstreams: Upstreams = field(default_factory=Upstreams)

    def serve(self, config: Config) -> None:
        self.metrics = Metrics()
        router, journal, clock = Router(config), self.log.journal, self.clock
        self.breakers = Breakers(config.retry, journal, self.metrics, clock)
        attempts = Attempts(config, router, self.upstreams, journal, clock, breakers=self.breakers)  # type: ignore[arg-type]
        settler = Settler(config, router, self.spool, journal, clock, rng=Random(1), breakers=self.breakers, metrics=self.metrics)
        self.settler = settler
        self.scheduler = Scheduler(config, self.spool, attempts, settler, journal, clock, breakers=self.breakers, metrics=self.metrics)
        self.service = asyncio.ensure_future(self.scheduler.serve())

    async def put(
        self, count: int = 1, *, lane: Lane = LANE, recipient: Recipient | str = "you@example.org",
        sender: str = "app@acme.example",
    ) -> list[MessageId]:  # fmt: skip
        """Mail as intake hands it over: claimed where its upstream has a slot."""
        ids = []
        octets = b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"
        for _ in range(count):
            now, id = self.clock.now(), self.spool.new_id()
            envelope = Envelope(sender, (Recipient(recipient) if isinstance(recipient, str) else recipient,))
            origin = Origin("local", "127.0.0.1", "", "S1", sender)
            draft = Draft(id, lane, envelope, Content(len(octets), octets), now, PREFIX, origin, due=now)
            (claim,) = await self.spool.put([draft], [self.scheduler.reserve(lane)])
            if claim is not None:
                self.scheduler.start(claim)
            else:
                self.scheduler.wake(lane, now)
            ids.append(id)
            await self.turns(3)
        return ids

    async def turns(self, count: int = 60) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def pass_time(self, seconds: float, *, step: float = 5.0) -> None:
        """Move the clock, waking the scheduler as its own timer would."""
        while seconds > 0:
            self.clock.advance(min(step, seconds))
            seconds -= step
            self.scheduler._changed.set()
            await self.turns()

    async def left(self) -> int:
        return len(self.spool._messages)

    def names(self, *names: str) -> list[str]:
        return [event["event"] for event in self.log.events(*names)]

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"relay_{name}_total", labels) or 0.0


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = ManualClock()
    built = House(WatchedSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts), clock, Log(tmp_path, clock))
    yield built
    built.scheduler.stop()
    for gate in built.upstreams.gates.values():
        gate.set()
    await built.scheduler.drained()
    built.service.cancel()
    await asyncio.gather(built.service, return_exceptions=True)
    assert built.log.events("fault") == [] or built.spool.failing
    await built.spool.close()


# -- fallback --------------------------------------------------------------------------------------------------------------


async def test_a_broken_upstream_is_asked_three_times_and_then_mail_goes_straight_to_the_fallback(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(BACKED))
    await house.put(40)
    await house.turns(400)
    assert house.upstreams.count() == {"acme": 3, "house": 40}
    assert await house.left() == 0
    assert house.names("degraded", "recovered") == ["degraded"]
    assert house.counted("degraded", route="acme", upstream="house") == 1
    assert set(house.settler.degraded) == {"acme"}
    assert sum("not tried" in e["reply"] for e in house.log.events("deferred")) == 37


async def test_the_primary_is_tried_again_with_one_message_and_then_takes_all(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(BACKED))
    await house.put(5)
    await house.pass_time(30)
    gate = house.upstreams.gates["acme"] = asyncio.Event()
    del house.upstreams.answers["acme"]
    await house.put(10)
    await house.turns(200)
    assert house.upstreams.count() == {"acme": 4, "house": 14}, "one tries, the others go on"
    gate.set()
    await house.turns()
    await house.put(10)
    await house.turns(200)
    assert house.upstreams.count() == {"acme": 14, "house": 14}
    assert house.names("degraded", "recovered") == ["degraded", "recovered"]
    assert house.counted("recovered", route="acme", upstream="acme") == 1
    assert set(house.settler.degraded) == set()


async def test_while_the_primary_stays_broken_it_is_asked_ever_more_seldom(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(BACKED))
    for _ in range(240):  # four hours
        await house.put(1)
        await house.pass_time(60, step=30)
    asked = house.upstreams.count()["acme"]
    assert 15 <= asked <= 30, "30 s, 1, 2, 4, 8 and then every 15 minutes"
    assert house.upstreams.count()["house"] == 240
    assert house.names("degraded", "recovered") == ["degraded"]


async def test_a_fallback_of_a_fallback_lays_its_own_rules_over_those_of_the_route(house: House) -> None:
    routes = [
        {
            **ALONE[0],
            "rewrite": {"subject_prefix": "[acme] ", "set_headers": {"X-Tenant": "acme"}},
            "fallback": [
                {"upstream": "spare", "rewrite": {"from": "spare@acme.example", "subject_prefix": None}},
                {"upstream": "house", "rewrite": {"from": "Via <no-reply@house.example>", "envelope_sender": "b@house.example"}},
            ],
        }
    ]
    house.upstreams.answers |= {"acme": DOWN, "spare": DOWN}
    house.serve(config_of(routes))
    await house.put(4)
    await house.turns(300)
    assert house.upstreams.count() == {"acme": 3, "spare": 3, "house": 4}
    seen = {name: (message.sender, message.octets.partition(b"\r\n\r\n")[0].splitlines()[1:]) for name, message in house.upstreams.handed}
    assert seen == {
        "acme": ("app@acme.example", [b"From: App <app@acme.example>", b"Subject: [acme] hi", b"X-Tenant: acme"]),
        "spare": ("app@acme.example", [b"From: App <spare@acme.example>", b"Subject: hi", b"X-Tenant: acme"]),
        "house": ("b@house.example", [b"From: Via <no-reply@house.example>", b"Subject: [acme] hi", b"X-Tenant: acme"]),
    }
    assert [e["fallback"] for e in house.log.events("degraded")] == ["spare"]


async def test_where_every_upstream_is_broken_mail_waits_and_goes_out_by_the_first_that_is_back(house: House) -> None:
    house.upstreams.answers |= {"acme": DOWN, "house": DOWN}
    house.serve(config_of(BACKED))
    await house.put(20)
    await house.pass_time(2 * HOUR)
    assert await house.left() == 20
    assert sum(house.upstreams.count().values()) < 60
    del house.upstreams.answers["house"]
    await house.pass_time(20 * MINUTE)
    assert await house.left() == 0
    assert "house" in house.upstreams.count()


@pytest.mark.parametrize("outcome", [GREYLISTED, THROTTLED])
async def test_what_says_nothing_of_the_upstream_uses_no_fallback_and_opens_nothing(house: House, outcome: Outcome) -> None:
    house.upstreams.answers["acme"] = outcome
    house.serve(config_of(BACKED))
    await house.put(5)
    await house.pass_time(10 * MINUTE)
    assert set(house.upstreams.count()) == {"acme"}
    assert house.breakers.troubles() == []
    assert house.names("degraded") == []
    del house.upstreams.answers["acme"]
    await house.pass_time(HOUR)
    assert await house.left() == 0
    assert set(house.upstreams.count()) == {"acme"}


async def test_throttling_counts_no_attempt_and_the_upstream_is_asked_once_in_its_time(house: House) -> None:
    house.upstreams.answers["acme"] = THROTTLED
    house.serve(config_of(BACKED))
    await house.put(20)
    for minute in range(1, 6):
        await house.pass_time(60)
        assert house.upstreams.count()["acme"] <= 5 * (minute + 1)
    del house.upstreams.answers["acme"]
    await house.pass_time(5 * MINUTE)
    assert await house.left() == 0
    assert {entry.attempt for entry in house.spool.log} == {1}
    assert set(house.upstreams.count()) == {"acme"}


async def test_mail_in_doubt_stays_with_its_upstream_though_that_is_broken_and_others_go_by_the_fallback(house: House) -> None:
    house.upstreams.answers["acme"] = LOST
    house.serve(config_of(BACKED))
    await house.put(1, recipient="doubt@example.org")
    house.upstreams.answers["acme"] = DOWN
    await house.put(5)
    await house.pass_time(HOUR)
    assert await house.left() == 1
    assert {r.address for name, message in house.upstreams.handed if name == "house" for r in message.recipients} == {"you@example.org"}
    del house.upstreams.answers["acme"]
    await house.pass_time(20 * MINUTE)
    assert await house.left() == 0
    assert house.upstreams.handed[-1][0] == "acme"


async def test_an_upstream_that_takes_all_and_never_answers_is_left_alone_and_what_comes_later_goes_by_the_fallback(house: House) -> None:
    house.upstreams.answers["acme"] = LOST
    house.serve(config_of(BACKED))
    for number in range(20):
        await house.put(1, recipient=f"r{number}@example.org")
        await house.pass_time(1)
    doubt = {r.address for name, message in house.upstreams.handed if name == "acme" for r in message.recipients}
    assert doubt == {"r0@example.org", "r1@example.org", "r2@example.org"}
    assert house.upstreams.count() == {"acme": 3, "house": 17}
    await house.pass_time(2 * HOUR)
    assert await house.left() == 3, "they wait for nobody else"
    assert house.upstreams.count()["acme"] <= 25, "the breaker lets one of them try, and the pauses grow to a quarter of an hour"
    assert not doubt & {r.address for name, message in house.upstreams.handed if name == "house" for r in message.recipients}
    del house.upstreams.answers["acme"]
    await house.pass_time(HOUR)
    assert await house.left() == 0
    assert house.names("degraded", "recovered") == ["degraded", "recovered"]


# -- after -----------------------------------------------------------------------------------------------------------------


def patient(after: str, **more: Any) -> Config:
    return config_of([{**ALONE[0], "fallback": [{"upstream": "house", "after": after}], **more}])


async def test_a_fallback_waits_until_the_primary_has_been_failing_for_so_long(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(patient("10m"))
    await house.put(5)
    await house.pass_time(9 * MINUTE + 50)
    assert set(house.upstreams.count()) == {"acme"}
    assert set(house.settler.degraded) == set()
    await house.pass_time(3 * MINUTE)
    assert house.upstreams.count()["house"] == 5
    await house.put(5)
    await house.turns(200)
    assert house.upstreams.count()["house"] == 10, "from now on at once"
    assert house.names("degraded") == ["degraded"]


async def test_a_primary_that_comes_back_in_time_needs_no_fallback(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(patient("10m"))
    await house.put(5)
    await house.pass_time(7 * MINUTE)
    del house.upstreams.answers["acme"]
    await house.pass_time(10 * MINUTE)
    assert await house.left() == 0
    assert set(house.upstreams.count()) == {"acme"}
    house.upstreams.answers["acme"] = DOWN
    await house.put(1)
    await house.pass_time(9 * MINUTE)
    assert set(house.upstreams.count()) == {"acme"}, "the time begins anew"


async def test_who_is_not_permitted_at_the_primary_does_not_wait_for_a_fallback(house: House) -> None:
    house.upstreams.answers["acme"] = FORBIDDEN
    house.serve(patient("10m"))
    await house.put(1)
    await house.turns(100)
    assert house.upstreams.count() == {"acme": 1, "house": 1}


# -- without a fallback ----------------------------------------------------------------------------------------------------


async def test_a_backlog_waits_without_storms_and_is_gone_soon_after_the_upstream_is_back(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(ALONE))
    ids = await house.put(100)
    await house.pass_time(6 * HOUR, step=15)
    assert await house.left() == 100
    assert house.upstreams.count()["acme"] <= 40
    assert max(house.spool.settled.values()) <= 80, "rewritten every quarter of an hour or so, not every minute"
    told = Counter(event["id"] for event in house.log.events("deferred") if "not tried" in event["reply"])
    assert max(told.values()) <= 2, "told when it is new, and not again and again"
    assert len(house.spool.log) < 300
    del house.upstreams.answers["acme"]
    await house.pass_time(19 * MINUTE)
    assert await house.left() == 0
    assert len({entry.id for entry in house.spool.log if entry.status == "sent"} & set(ids)) == 100


async def test_when_a_long_failure_ends_what_was_put_off_goes_at_once(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(ALONE))
    await house.put(50)
    await house.pass_time(6 * HOUR, step=30)
    del house.upstreams.answers["acme"]
    while house.breakers.troubles():
        await house.pass_time(15)
    await house.turns(1000)
    assert await house.left() == 0


async def test_an_operator_may_have_it_tried_at_once(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of(ALONE))
    await house.put(5)
    await house.pass_time(2 * HOUR)
    asked = house.upstreams.count()["acme"]
    del house.upstreams.answers["acme"]
    house.scheduler.try_now("acme")
    for due in await house.spool.reschedule(Selection(upstream="acme")):
        house.scheduler.wake(due.lane, due.when)
    await house.turns(300)
    await house.pass_time(40)
    assert await house.left() == 0
    assert house.upstreams.count()["acme"] == asked + 5


async def test_mail_expires_in_time_though_its_upstream_is_not_tried(house: House) -> None:
    house.upstreams.answers["acme"] = DOWN
    house.serve(config_of([REPORTS, *ALONE], retry={"expire": "2h"}))
    await house.put(10)
    await house.pass_time(2 * HOUR - 60)
    assert await house.left() == 10
    await house.pass_time(3 * MINUTE)
    reports = [message for name, message in house.upstreams.handed if name == "house"]
    assert len(reports) == 10 - await house.left() == 10
    text = email.message_from_bytes(reports[0].octets).as_string()
    assert "4.4.7" in text
    assert "Connection refused" in text


async def test_a_route_may_have_a_patience_of_its_own(house: House) -> None:
    routes = [REPORTS, {**ALONE[0], "retry": {"first": "10m", "max": "10m", "expire": "1h"}}]
    house.upstreams.answers["acme"] = GREYLISTED
    house.serve(config_of(routes))
    await house.put(1)
    await house.pass_time(8 * MINUTE)
    assert house.upstreams.count()["acme"] == 1
    await house.pass_time(4 * MINUTE)
    assert house.upstreams.count()["acme"] == 2
    await house.pass_time(50 * MINUTE)
    assert [e["event"] for e in house.log.events("failed", "bounced")] == ["failed", "bounced"]
    assert house.upstreams.count()["house"] == 1


# -- the credential --------------------------------------------------------------------------------------------------------


async def test_a_refused_login_is_tried_once_in_a_quarter_of_an_hour_and_ever_more_seldom(house: House) -> None:
    house.upstreams.answers["acme"] = LOGIN_REFUSED
    house.serve(config_of(ALONE, upstreams={"acme": {"limits": {"connections": 1}}}))
    await house.put(10)
    await house.pass_time(14 * MINUTE)
    assert house.upstreams.count()["acme"] == 1
    await house.pass_time(6 * HOUR, step=30)
    assert house.upstreams.count()["acme"] <= 6
    assert len(house.log.events("auth-failed")) == house.upstreams.count()["acme"]


async def test_what_waited_for_a_new_secret_goes_out_when_it_is_there(house: House) -> None:
    house.upstreams.answers["acme"] = LOGIN_REFUSED
    house.serve(config_of(ALONE, upstreams={"acme": {"limits": {"connections": 1}}}))
    await house.put(20)
    await house.pass_time(3 * HOUR, step=30)
    asked = house.upstreams.count()["acme"]
    del house.upstreams.answers["acme"]
    await house.pass_time(MINUTE)
    assert house.upstreams.count()["acme"] == asked
    house.spool.failing = True
    house.scheduler.secret_changed("acme")
    await house.turns()
    house.spool.failing = False
    await house.pass_time(MINUTE)
    assert await house.left() == 0
    assert "looking for due mail" in house.log.text()
    house.spool.failing = True  # its fault was meant


# -- held ------------------------------------------------------------------------------------------------------------------


async def test_held_mail_bounces_with_its_reason_when_it_expires(house: House) -> None:
    house.serve(config_of([REPORTS]))
    for _ in range(3):
        id = house.spool.new_id()
        content = Content(len(PREFIX), PREFIX)
        envelope = Envelope("app@acme.example", (Recipient("you@example.org"),))
        await house.spool.put(
            [Draft(id, Lane("acme", "acme"), envelope, content, house.clock.now(), PREFIX, due=house.clock.now())], [False]
        )
    await house.pass_time(4 * DAY - HOUR, step=600)
    assert await house.left() == 3
    assert house.upstreams.handed == []
    await house.pass_time(2 * HOUR, step=60)
    await house.turns(300)
    assert await house.left() == 0
    reports = [message.octets for name, message in house.upstreams.handed if name == "house"]
    assert len(reports) == 3
    assert [e["reply"] for e in house.log.events("held")] == ["no route takes its sender any more"] * 3
    assert all(b"no route takes its sender any more" in octets.replace(b"\r\n ", b" ") for octets in reports)
    assert {e["reply"] for e in house.log.events("failed")} == {
        "4.4.7 delivery time expired; last reply: held: no route takes its sender any more"
    }


# -- everything at once ----------------------------------------------------------------------------------------------------

MOODS = (SENT, DOWN, LOGIN_REFUSED, GREYLISTED, REFUSED, FORBIDDEN, LOST, THROTTLED)


class Moody(Upstreams):
    """Upstreams that change their minds, and remember who was in doubt and where."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self.doubts: dict[str, str] = {}
        self.taken: Counter[str] = Counter()
        self.strayed: list[str] = []

    def change(self, names: tuple[str, ...], moods: tuple[Outcome, ...]) -> None:
        self.answers = {name: self._random.choice(moods) for name in names}

    riding = frozenset[str]()

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        (outcome, *_) = outcomes = await super().send(name, message)
        for recipient in message.recipients:
            if self.doubts.get(recipient.address, name) != name:
                self.strayed.append(f"{recipient.address} was in doubt at {self.doubts[recipient.address]} and went to {name}")
            if outcome.in_doubt:
                self.doubts[recipient.address] = name
            self.taken[recipient.address] += outcome is SENT
        return outcomes


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_upstreams_do_each_message_ends_once_and_doubt_stays_where_it_began(house: House, seed: int) -> None:
    print(f"seed {seed}")
    random = Random(seed)
    house.upstreams = moody = Moody(random)
    fallbacks = ["spare", {"upstream": "house", "after": "20m"}]
    routes = [{"name": "reports", "sender": "<>", "upstream": "globex"}, {**ALONE[0], "fallback": fallbacks, "retry": {"expire": "1d"}}]
    house.serve(config_of(routes))
    addresses = []
    for turn in range(60):
        moody.change(("acme", "spare", "house"), MOODS)
        for _ in range(random.randrange(4)):
            addresses.append(f"{turn}-{len(addresses)}@example.org")
            await house.put(recipient=addresses[-1])
        seconds = random.choice([10, 60, 600, 3600])
        await house.pass_time(seconds, step=max(30, seconds / 20))
    moody.answers = {}
    await house.pass_time(1.5 * DAY, step=600)
    assert await house.left() == 0
    assert moody.strayed == []
    ends = Counter(entry.recipient for entry in house.spool.log if entry.status in ("sent", "failed") and entry.recipient in addresses)
    assert ends == dict.fromkeys(addresses, 1)
    sent = {entry.recipient for entry in house.spool.log if entry.status == "sent"}
    assert {address: moody.taken[address] for address in addresses} == {address: int(address in sent) for address in addresses}
    failed = [address for address in addresses if address not in sent]
    assert len(house.log.events("bounced")) == len(failed) == moody.taken["app@acme.example"]
    assert Counter(house.names("degraded", "recovered"))["degraded"] - Counter(house.names("degraded", "recovered"))["recovered"] in (0, 1)
