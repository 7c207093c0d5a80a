"""Who waits, until when, and what is heard: the wait itself, and the end of an attempt that answers it."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.delivery import settle as settle_module
from relay.delivery import verdict as verdict_module
from relay.delivery.attempt import Result, untried
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, Status, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, LeaseLost, MessageId, Next, Settlement, SpoolError, SpoolFull
from relay.spool.memory import MemorySpool
from relay.spool.wait import Wait, Waits
from tests.support.eventually import eventually
from tests.unit.delivery import LANE, PREFIX, SENT, Log, config_of

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
REJECTED = outcome_of_reply(Phase.FINAL, Reply(554, "5.6.0", "no"))
UNPERMITTED = outcome_of_reply(Phase.MAIL, Reply(553, "5.7.1", "not yours"))
LACKING = outcome_of_failure(Phase.MAIL, Failure.LACKING, "the upstream does not offer SMTPUTF8")
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))
A, B = MessageId("A"), MessageId("B")
OK, NO = Reply(250, "2.0.0", "taken"), Reply(550, "5.1.1", "nobody")
HOUSE = Lane("house", "acme")
YOU = "you@example.org"


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# -- the wait itself -------------------------------------------------------------------------------------------------------


async def test_time_up_is_no_verdict_and_a_late_one_is_not_heard() -> None:
    wait = Wait([A], 0.001)
    assert await wait.verdict() is None
    assert not await wait.refused(A, NO)
    wait.sent(A, OK)
    assert await wait.verdict() is None


@pytest.mark.parametrize("early", [True, False])
async def test_a_verdict_is_heard_whether_it_comes_before_or_after_the_question(early: bool) -> None:
    wait = Wait([A], 60)
    asking = asyncio.ensure_future(wait.verdict())
    if not early:
        await turns()
    wait.sent(A, OK)
    assert await asking == OK


async def test_a_refusal_is_heard_only_when_it_is_stored_and_time_cannot_take_it_back() -> None:
    wait = Wait([A], 0.001)
    asking = asyncio.ensure_future(wait.verdict())
    assert await wait.refused(A, NO)
    await asyncio.sleep(0.01)  # time is up now
    wait.end()
    await turns()
    assert not asking.done() and wait.refusing
    wait.stored(A)
    assert await asking == NO


async def test_a_refusal_that_cannot_be_stored_is_none() -> None:
    wait = Wait([A], 60)
    asking = asyncio.ensure_future(wait.verdict())
    assert await wait.refused(A, NO)
    wait.give_up()
    assert await asking is None
    assert not wait.refusing


async def test_once_one_part_is_stored_there_is_no_way_back() -> None:
    wait = Wait([A, B], 60)
    first = asyncio.ensure_future(wait.refused(A, NO))
    assert await wait.refused(B, NO) and await first
    wait.stored(A)
    wait.give_up()
    wait.end()
    assert wait.refusing and wait.binding
    wait.stored(B)
    assert await wait.verdict() == NO


PARTS = [
    # what the parts A and B hear (None: nothing within the time), and the verdict
    ("sent", "sent", OK),
    ("refused", "refused", NO),
    ("sent", "refused", None),
    ("refused", "sent", None),
    ("sent", "end", None),
    ("end", "refused", None),
    ("sent", None, None),
    ("refused", None, None),
    (None, "refused", None),
]


@pytest.mark.parametrize(("a", "b", "expected"), PARTS)
async def test_the_parts_of_a_split_message_have_one_verdict(a: str | None, b: str | None, expected: Reply | None) -> None:
    wait = Wait([A, B], 0.05)
    bounced: list[MessageId] = []

    async def play(part: MessageId, word: str | None) -> None:
        if word == "sent":
            wait.sent(part, OK)
        elif word == "end":
            wait.end()
        elif word == "refused":
            if await wait.refused(part, NO):
                wait.stored(part)
            else:
                bounced.append(part)

    playing = [asyncio.ensure_future(play(A, a)), asyncio.ensure_future(play(B, b))]
    assert await wait.verdict() == expected
    await asyncio.gather(*playing)
    refused = [part for part, word in ((A, a), (B, b)) if word == "refused"]
    assert bounced == ([] if expected == NO else refused), "told by a bounce, or by the reply, never by both or none"


async def test_a_relay_that_stops_holds_nobody() -> None:
    waits = Waits()
    wait = waits.open([A, B], 60)
    asking = asyncio.ensure_future(wait.verdict())
    await turns()
    waits.stop()
    async with asyncio.timeout(20):
        assert await asking is None
        assert await waits.open([A], 60).verdict() is None


async def test_a_closed_wait_is_forgotten() -> None:
    waits = Waits()
    wait = waits.open([A, B], 60)
    assert waits.of(A) is wait and waits.of(B) is wait
    waits.close(wait)
    assert waits.of(A) is None and waits.of(B) is None
    assert await wait.verdict() is None


async def test_who_is_cut_off_while_waiting_leaves_the_others_alone() -> None:
    wait = Wait([A, B], 60)
    cut = asyncio.ensure_future(wait.refused(A, NO))
    asking = asyncio.ensure_future(wait.verdict())
    await turns()
    cut.cancel()
    await turns()
    assert not asking.done()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not await wait.refused(B, NO), "nobody waits any more: a bounce"


# -- the end of an attempt that answers --------------------------------------------------------------------------------------


class BrittleSpool(MemorySpool):
    """Fails as often as it is told before it stores an outcome, remembers what it stored, and takes its time over it: a disk."""

    failures: list[Exception | None]
    stored: list[Settlement]

    async def settle(self, settlement: Settlement) -> None:
        failure = self.failures.pop(0) if self.failures else None
        await asyncio.sleep(0)
        if failure is None:
            await super().settle(settlement)
            self.stored.append(settlement)
        await asyncio.sleep(0)
        if failure is not None:
            raise failure


@dataclass
class House:
    spool: BrittleSpool
    clock: ManualClock
    log: Log
    waits: Waits

    def __post_init__(self) -> None:
        config = config_of()
        self.settler = Settler(
            config, Router(config), self.spool, self.log.journal, self.clock, rng=random.Random(1),
            breakers=Breakers(config.retry, self.log.journal, Metrics(), self.clock), metrics=Metrics(), waits=self.waits,
        )  # fmt: skip

    async def claim(self, *recipients: str | Recipient, lane: Lane = LANE) -> Claim:
        content = Content(4, b"\r\nx\r\n")
        kept = Envelope("app@acme.example", tuple(Recipient(r) if isinstance(r, str) else r for r in recipients or (YOU,)))
        origin = Origin("local", "127.0.0.1", "", "S1", "app@acme.example")
        draft = Draft(self.spool.new_id(), lane, kept, content, self.clock.now(), PREFIX, origin, due=self.clock.now())
        (claim,) = await self.spool.put([draft], [True])
        assert claim is not None
        return claim

    async def settle(self, claim: Claim, outcomes: Outcome | Mapping[str, Outcome]) -> list[Next]:
        if isinstance(outcomes, Outcome):
            outcomes = dict.fromkeys((r.address for r in claim.envelope.recipients), outcomes)
        return await self.settler.settle(claim, Result(outcomes))

    @property
    def bounces(self) -> int:
        return sum(settlement.bounce is not None for settlement in self.spool.stored)


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(settle_module, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(verdict_module, "_AGAIN_SECONDS", 0.0)
    clock = ManualClock()
    spool = BrittleSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts)
    spool.failures, spool.stored = [], []
    log = Log(tmp_path, clock)
    yield House(spool, clock, log, Waits())
    log.text()
    await spool.close()


async def test_without_a_wait_a_refusal_bounces(house: House) -> None:
    await house.settle(await house.claim(), REFUSED)
    assert house.bounces == 1


@pytest.mark.parametrize("outcome", [REFUSED, REJECTED])
async def test_a_refusal_that_the_client_hears_ends_the_message_without_a_bounce(house: House, outcome: Outcome) -> None:
    claim = await house.claim("a@example.org", "b@example.org")
    wait = house.waits.open([claim.id], 60)
    assert await house.settle(claim, outcome) == []
    assert await wait.verdict() == outcome.reply
    assert house.bounces == 0 and await house.spool.next_due() == {}
    assert [entry.status for entry in house.spool.log] == ["failed", "failed"]
    assert house.log.names() == ["failed"]


async def test_a_message_that_everybody_gets_is_answered_with_the_upstreams_words(house: House) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    await house.settle(claim, SENT)
    assert await wait.verdict() == SENT.reply
    assert house.log.names() == ["sent"]


NO_VERDICT: list[tuple[str, Outcome | dict[str, Outcome], Lane]] = [
    ("deferred", GREYLISTED, LANE),
    ("in doubt", LOST, LANE),
    ("throttled", THROTTLED, LANE),
    ("down without a fallback", DOWN, HOUSE),
    ("a refused login without a fallback", LOGIN_REFUSED, HOUSE),
    ("refused on a new connection, and the old one may have taken it", {YOU: REFUSED._replace(in_doubt=True)}, LANE),
    ("one sent, one refused", {"a@example.org": SENT, "b@example.org": REFUSED}, LANE),
    ("one deferred, one refused", {"a@example.org": GREYLISTED, "b@example.org": REFUSED}, LANE),
    ("one for the fallback, one refused", {"a@example.org": DOWN, "b@example.org": REFUSED}, LANE),
    ("one for the fallback, one sent", {"a@example.org": DOWN, "b@example.org": SENT}, LANE),
]


@pytest.mark.parametrize(("outcomes", "lane"), [pytest.param(*case[1:], id=case[0]) for case in NO_VERDICT])
async def test_what_is_no_verdict_ends_the_wait_at_once(house: House, outcomes: Any, lane: Lane) -> None:
    claim = await house.claim(*(outcomes if isinstance(outcomes, dict) else ()), lane=lane)
    wait = house.waits.open([claim.id], 60)
    await house.settle(claim, outcomes)
    async with asyncio.timeout(20):
        assert await wait.verdict() is None
    failed = isinstance(outcomes, dict) and any(outcome.status is Status.FAILED for outcome in outcomes.values())
    assert house.bounces == failed, "who is refused hears it by a bounce"


async def test_what_has_expired_is_no_verdict_of_the_upstream(house: House) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    house.clock.advance(5 * 86400)
    await house.settle(claim, GREYLISTED)
    assert await wait.verdict() is None
    assert house.bounces == 1


async def test_what_an_operator_bounces_is_a_bounce(house: House) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    await house.settler.give_up(claim, "not wanted")
    assert await wait.verdict() is None
    assert house.bounces == 1


@pytest.mark.parametrize("outcome", [DOWN, LOGIN_REFUSED, UNPERMITTED, LACKING])
@pytest.mark.parametrize(("answer", "heard"), [(SENT, SENT.reply), (REFUSED, REFUSED.reply), (UNPERMITTED, UNPERMITTED.reply)])
async def test_the_wait_goes_on_with_the_fallback(house: House, outcome: Outcome, answer: Outcome, heard: Reply) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    lane = LANE
    for _ in range(2):
        (due,) = await house.settle(claim, outcome)
        assert due.lane != lane
        lane = due.lane
        (claim,) = await house.spool.claim(lane, 1)
    await house.settle(claim, answer)
    assert await wait.verdict() == heard
    assert house.bounces == 0


@pytest.mark.parametrize(
    ("seconds", "held", "goes_on"), [(0, "", True), (0, "no route takes it", False), (60, "", False), (float("inf"), "an operator", False)]
)
async def test_a_message_that_moves_untried_is_waited_for_where_it_is_due_now(
    house: House, seconds: float, held: str, goes_on: bool
) -> None:  # fmt: skip
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    await house.settler.settle(claim, Result(untried(claim), Next(house.clock.now() + seconds, HOUSE, counted=False, held=held)))
    if goes_on:
        (again,) = await house.spool.claim(HOUSE, 1)
        await house.settle(again, SENT)
    assert await wait.verdict() == (SENT.reply if goes_on else None)


async def two_parts(house: House, seconds: float = 60) -> tuple[Claim, Claim, Wait]:
    first, second = await house.claim("a@example.org"), await house.claim("b@example.org", lane=HOUSE)
    return first, second, house.waits.open([first.id, second.id], seconds)


async def test_both_parts_refused_are_stored_before_the_client_hears_it(house: House) -> None:
    first, second, wait = await two_parts(house)
    asking = asyncio.ensure_future(wait.verdict())
    settling = asyncio.ensure_future(house.settle(first, REFUSED))
    await turns()
    assert not house.spool.stored and not asking.done(), "the first waits for what becomes of the second"
    await house.settle(second, REJECTED)
    await settling
    assert await asking == REFUSED.reply
    assert house.bounces == 0 and len(house.spool.stored) == 2


async def test_both_parts_sent_are_told_as_sent_also_to_who_wants_to_hear_of_success(house: House) -> None:
    claims = [await house.claim(Recipient(YOU, notify="SUCCESS"), lane=lane) for lane in (LANE, HOUSE)]
    wait = house.waits.open([claim.id for claim in claims], 60)
    for claim in claims:
        await house.settle(claim, SENT)
    assert await wait.verdict() == SENT.reply


@pytest.mark.parametrize("outcome", [SENT, GREYLISTED])
async def test_one_part_refused_and_the_other_not_is_a_bounce(house: House, outcome: Outcome) -> None:
    first, second, wait = await two_parts(house)
    settling = asyncio.ensure_future(house.settle(first, REFUSED))
    await turns()
    await house.settle(second, outcome)
    await settling
    assert await wait.verdict() is None
    assert house.bounces == 1


# -- the spool has trouble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SpoolError("disk on fire"), SpoolFull("no space left")])
async def test_a_refusal_that_cannot_be_stored_becomes_a_bounce(house: House, error: Exception) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    house.spool.failures = [error] * 3
    await house.settle(claim, REFUSED)
    assert await wait.verdict() is None
    assert house.bounces == 1
    assert house.log.names() == ["fault"] * 3 + ["failed", "bounced"]


async def test_a_refusal_of_a_claim_that_is_lost_is_neither_told_nor_stored(house: House) -> None:
    claim = await house.claim()
    wait = house.waits.open([claim.id], 60)
    await house.settle(claim._replace(token=claim.token + 1), REFUSED)
    assert await wait.verdict() is None
    assert house.spool.stored == [] and house.log.names() == ["note"]


async def test_when_the_first_part_cannot_be_stored_all_parts_bounce(house: House) -> None:
    first, second, wait = await two_parts(house)
    house.spool.failures = [SpoolError("disk on fire")]
    await asyncio.gather(house.settle(first, REFUSED), house.settle(second, REFUSED))
    assert await wait.verdict() is None
    assert house.bounces == 2


async def test_when_a_later_part_cannot_be_stored_the_client_hears_nothing_until_it_is(house: House) -> None:
    first, second, wait = await two_parts(house, 0.001)
    house.spool.failures = [None, *[SpoolError("disk on fire")] * 3]
    asking = asyncio.ensure_future(wait.verdict())
    await asyncio.gather(house.settle(first, REFUSED), house.settle(second, REFUSED))
    assert await asking == REFUSED.reply
    assert house.bounces == 0 and len(house.spool.stored) == 2


async def test_when_a_later_part_is_lost_its_new_owner_reports_it_and_the_client_hears_of_the_refusal(house: House) -> None:
    first, second, wait = await two_parts(house)
    house.spool.failures = [None, LeaseLost("taken over"), LeaseLost("taken over")]
    await asyncio.gather(house.settle(first, REFUSED), house.settle(second, REFUSED))
    assert await wait.verdict() == REFUSED.reply
    assert house.bounces == 0 and len(house.spool.stored) == 1


# -- any order of anything -----------------------------------------------------------------------------------------------------


async def test_whatever_happens_in_whatever_order_each_refusal_is_told_once(house: House) -> None:
    """Random fates, failures, times up and disconnections: told by the reply alone, or by a bounce alone, and never lost."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        claims = [await house.claim(f"{place}@example.org", lane=LANE if place else HOUSE) for place in range(rng.randint(1, 3))]
        wait = house.waits.open([claim.id for claim in claims], rng.choice([60, 60, 60, 0]))
        house.spool.stored.clear()
        house.spool.failures = [rng.choice([None, None, SpoolError("disk on fire")]) for _ in range(rng.randint(0, 4))]
        fates = {claim.id: rng.choice([REFUSED, REFUSED, REFUSED, REJECTED, SENT, GREYLISTED]) for claim in claims}

        async def settle(claim: Claim, fate: Outcome, late: int) -> None:
            for _ in range(late):
                await asyncio.sleep(0)
            await house.settle(claim, fate)

        asking = asyncio.ensure_future(wait.verdict())
        settling = [asyncio.ensure_future(settle(claim, fates[claim.id], rng.randint(0, 6))) for claim in claims]
        for _ in range(rng.randint(0, 12)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            wait.end()
        await asyncio.gather(*settling)
        heard = await asking
        house.waits.close(wait)
        assert len(house.spool.stored) == len(claims)
        for settlement in house.spool.stored:
            fate = fates[settlement.claim.id]
            told_by_bounce = settlement.bounce is not None
            told_by_reply = heard is not None and heard.code >= 500
            assert (told_by_bounce, told_by_reply) == {
                Status.FAILED: (not told_by_reply, told_by_reply), Status.SENT: (False, False), Status.DEFERRED: (False, False),
            }[fate.status], (heard, fates)  # fmt: skip
        if heard is not None and heard.positive:
            assert {fate.status for fate in fates.values()} == {Status.SENT}
        if heard is not None and heard.code >= 500:
            assert {fate.status for fate in fates.values()} == {Status.FAILED}
        house.spool.failures = []
    await eventually(lambda: all(house.waits.of(claim.id) is None for claim in claims), "no wait is left")
