"""The operator's verbs over a real spool, with a delivery that only remembers: what each changes, leaves alone, wakes, and says."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from relay.admin import operator as module
from relay.admin.operator import Operator, Order, Progress, Verb, in_words
from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Phase, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.spool.base import EVERYTHING, Claim, Content, Draft, Lane, MessageId, Next, Queued, Selection, Settlement
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from tests.support.eventually import eventually

LATER = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.1", "mailbox busy"))
A, B = Lane("acme", "first"), Lane("globex", "second")


class Delivery:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.woken: list[tuple[Lane, float]] = []
        self.tried: list[str] = []
        self.given_up: list[tuple[MessageId, str]] = []
        self.stores = asyncio.Event()
        self.stores.set()

    def wake(self, lane: Lane, when: float) -> None:
        self.woken.append((lane, when))

    def give_up(self, claims: Sequence[Claim], reason: str) -> list["asyncio.Task[None]"]:
        self.given_up += [(claim.id, reason) for claim in claims]
        return [asyncio.ensure_future(self._end()) for _ in claims]

    async def _end(self) -> None:
        await self.stores.wait()

    def try_now(self, upstream: str) -> None:
        self.tried.append(upstream)


class House:
    """A spool, an operator, and what the operator said."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock(1_800_000_000.0)
        self.directory = directory / "spool"
        self.spool = SqliteSpool(self.directory, self.clock, backoff=lambda attempts: 60.0, keep_log_seconds=1e9)
        self.delivery = Delivery()
        self._log = directory / "log"
        self._descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT)
        self.journal = Journal(self.clock, format="text", level="info", descriptor=self._descriptor)
        self.operator = Operator(self.spool, self.delivery, self.journal, view=self.view)
        self.told: list[Progress] = []

    def view(self) -> SqliteView:
        return SqliteView(self.directory, self.clock)

    async def close(self) -> None:
        self.operator.close()
        await self.spool.close()
        self.journal.close()
        os.close(self._descriptor)

    async def put(self, lane: Lane = A, *, claimed: bool = False, sender: str = "app@acme.example") -> MessageId:
        self.clock.advance(0.001)
        now = self.clock.now()
        envelope = Envelope(sender, (Recipient("you@example.org"),))
        draft = Draft(self.spool.new_id(), lane, envelope, Content(5, b"hello"), now, due=now)
        (self.claim,) = await self.spool.put([draft], [claimed])
        return draft.id

    async def deferred(self, lane: Lane = A, *, wait: float = 3600.0, held: str = "") -> MessageId:
        id = await self.put(lane, claimed=True)
        assert self.claim is not None
        then = Next(self.clock.now() + wait, lane, held=held)
        await self.spool.settle(Settlement(self.claim, {"you@example.org": LATER}, then))
        return id

    async def tell(self, progress: Progress) -> None:
        self.told.append(progress)

    async def order(self, verb: Verb, selection: Selection = EVERYTHING, reason: str = "") -> None:
        await self.operator.carry_out(Order(verb, selection, reason, "uid 0"), self.tell)

    @property
    def changed(self) -> list[str]:
        return [id for progress in self.told for id in progress.changed]

    @property
    def skipped(self) -> dict[str, str]:
        return {id: why for progress in self.told for id, why in progress.skipped.items()}

    def queue(self) -> dict[str, Queued]:
        view = self.view()
        try:
            return {queued.id: queued for queued in view.queued()}
        finally:
            view.close()

    def log(self) -> str:
        self.journal.close()
        return self._log.read_text()


@pytest.fixture
async def house(tmp_path: Path) -> Any:
    house = House(tmp_path)
    yield house
    await house.close()


ACTIVE, HELD = "being attempted", "held: release it instead"


@pytest.mark.parametrize(
    ("verb", "changed", "skipped"),
    [
        (Verb.RETRY, ["due", "deferred"], {"active": ACTIVE, "held": HELD, "for good": HELD}),
        (Verb.HOLD, ["due", "deferred", "held"], {"active": ACTIVE, "for good": "held already"}),
        (Verb.RELEASE, ["held", "for good"], {"due": "not held", "deferred": "not held", "active": ACTIVE}),
        (Verb.DROP, ["due", "deferred", "held", "for good"], {"active": ACTIVE}),
        (Verb.BOUNCE, ["due", "deferred", "held", "for good"], {"active": ACTIVE}),
    ],
)
async def test_each_verb_has_its_states(house: House, verb: Verb, changed: list[str], skipped: dict[str, str]) -> None:
    names = {
        await house.put(): "due",
        await house.deferred(): "deferred",
        await house.deferred(held="no route"): "held",
        await house.deferred(wait=float("inf"), held="an operator's"): "for good",
        await house.put(claimed=True): "active",
    }
    await house.order(verb)
    assert [names[MessageId(id)] for id in house.changed] == changed
    assert {names[MessageId(id)]: why for id, why in house.skipped.items()} == skipped
    assert house.delivery.tried == (["acme"] if verb in (Verb.RETRY, Verb.RELEASE) else [])


async def test_what_is_due_wakes_its_lanes_and_their_upstreams_get_a_chance(house: House) -> None:
    for lane in (A, B, A):
        await house.deferred(lane)
    await house.order(Verb.RETRY)
    assert sorted(house.delivery.woken) == [(A, house.clock.now()), (B, house.clock.now())]
    assert sorted(house.delivery.tried) == ["acme", "globex"]


async def test_a_long_order_is_told_page_by_page_and_gives_an_upstream_one_chance(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_MESSAGES", 2)
    ids = [await house.deferred() for _ in range(5)]
    await house.order(Verb.RETRY)
    assert [list(progress.changed) for progress in house.told] == [ids[:2], ids[2:4], ids[4:]]
    assert house.delivery.tried == ["acme"]


async def test_bouncing_takes_few_into_memory_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE_CLAIMS", 2)
    ids = [await house.put() for _ in range(5)]
    taken: list[int] = []
    take = house.spool.take

    async def counting(selection: Selection, limit: int) -> Sequence[Claim]:
        claims = await take(selection, limit)
        taken.append(len(claims))
        return claims

    monkeypatch.setattr(house.spool, "take", counting)
    await house.order(Verb.BOUNCE, reason="enough")
    assert taken == [2, 2, 1]
    assert house.delivery.given_up == [(id, "enough") for id in ids]


async def test_what_is_given_up_is_told_when_its_end_is_stored_and_not_before(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_PAGE_CLAIMS", 2)
    ids = [await house.put() for _ in range(3)]
    house.delivery.stores.clear()
    order = asyncio.ensure_future(house.order(Verb.BOUNCE))
    await eventually(lambda: bool(house.delivery.given_up), "the first two")
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert (house.told, len(house.delivery.given_up)) == ([], 2), "nor is more taken into memory"
    house.delivery.stores.set()
    await order
    assert house.changed == ids


async def test_mail_that_comes_during_an_order_is_left_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_MESSAGES", 1)
    first = [await house.put(), await house.put()]
    late: list[MessageId] = []

    async def tell(progress: Progress) -> None:
        house.told.append(progress)
        late.append(await house.put())  # such as the bounce that the order itself makes

    await house.operator.carry_out(Order(Verb.BOUNCE, EVERYTHING), tell)
    assert house.changed == first
    assert {house.queue()[id].state for id in late} == {"due"}


@pytest.mark.parametrize("verb", list(Verb))
async def test_what_is_overtaken_by_an_attempt_is_told_as_left_alone(house: House, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    held = "no route" if verb is Verb.RELEASE else ""
    ids = [await house.deferred(wait=0.0, held=held) for _ in range(2)]
    name = {Verb.RETRY: "reschedule", Verb.BOUNCE: "take"}.get(verb, verb.value)
    real = getattr(house.spool, name)

    async def overtaken(selection: Selection, *rest: Any) -> Any:
        if held:
            await release(Selection(ids=frozenset(ids[:1])))
        await house.spool.claim(A, 1)
        return await real(selection, *rest)

    release = house.spool.release
    monkeypatch.setattr(house.spool, name, overtaken)
    await house.order(verb)
    assert house.changed == ids[1:]
    assert house.skipped == {ids[0]: "meanwhile being attempted, or gone"}


async def test_ids_that_are_not_there_are_told_and_so_are_those_that_do_not_fit(house: House) -> None:
    id = await house.put()
    await house.order(Verb.HOLD, Selection(ids=frozenset({id, MessageId("0000000000001")})))
    assert (house.changed, house.skipped) == ([id], {"0000000000001": "not in the queue"})
    house.told.clear()
    await house.order(Verb.RELEASE, Selection(ids=frozenset({id}), upstream="globex"))
    assert (house.changed, house.skipped) == ([], {id: "not in the queue, or not like that"})


async def test_an_order_that_is_broken_off_ends_between_two_pages_and_is_logged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_MESSAGES", 2)
    ids = [await house.put() for _ in range(6)]

    async def tell(progress: Progress) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await house.operator.carry_out(Order(Verb.HOLD, Selection(route="first"), "wrong invoices", "uid 7"), tell)
    assert [house.queue()[id].state for id in ids] == ["held"] * 2 + ["due"] * 4
    assert 'what="uid 7: queue hold of route first (wrong invoices): 2 held, 0 left alone"' in house.log()


async def test_an_order_that_is_cancelled_lets_go_of_the_queue(house: House) -> None:
    await house.put()
    begun = asyncio.Event()

    async def tell(progress: Progress) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(house.operator.carry_out(Order(Verb.HOLD, EVERYTHING), tell))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await house.operator.count(EVERYTHING) == 1


async def test_reasons_reach_the_queue_and_have_a_default(house: House) -> None:
    one, two = await house.put(), await house.put()
    await house.order(Verb.HOLD, Selection(ids=frozenset({one})), "wrong invoices")
    await house.order(Verb.HOLD, Selection(ids=frozenset({two})))
    assert [house.queue()[id].held for id in (one, two)] == ["wrong invoices", "held by the operator"]


async def test_as_many_ids_as_a_request_may_have_are_found(house: House) -> None:
    id = await house.put()
    ids = frozenset({id, *(MessageId(f"{number:013X}") for number in range(9_999))})
    await house.order(Verb.HOLD, Selection(ids=ids))
    assert house.changed == [id]
    assert len(house.skipped) == 9_999


async def test_counting_changes_nothing(house: House) -> None:
    ids: Iterator[MessageId] = iter([await house.put(), await house.put(B)])
    assert await house.operator.count(EVERYTHING) == 2
    assert await house.operator.count(Selection(upstream="globex")) == 1
    assert [house.queue()[id].state for id in ids] == ["due", "due"]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (EVERYTHING, "everything"),
        (Selection(ids=frozenset("BA")), "A B"),
        (Selection(ids=frozenset("ABCDEF"), state="held"), "6 messages, state held"),
        (Selection(sender="<>", older_than=7200.0), "sender <>, older than 7200 s"),
    ],
)
def test_a_selection_in_words(selection: Selection, words: str) -> None:
    assert in_words(selection) == words
