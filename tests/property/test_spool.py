"""Laws of the spool, whatever is done to it in whatever order: rows come back as they were, no recipient is lost or settled twice."""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.mail.outcome import Outcome, Status
from relay.spool.base import EVERYTHING, Claim, Content, Lane, LeaseLost, Next, Selection, Settlement
from relay.spool.memory import MemorySpool
from relay.spool.records import id_of, pack_facts, pack_recipients, unpack_envelope, unpack_facts, unpack_recipients
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, SENT, draft, octets_of, settlement

T = TypeVar("T")
TEXT = st.text(max_size=20)
RECIPIENTS = st.lists(
    st.builds(Recipient, st.one_of(TEXT, st.just("[x@example.org"), st.emails()), TEXT, TEXT, st.booleans()), min_size=1, max_size=4
)


@given(recipients=RECIPIENTS, doubt=st.booleans())
def test_recipients_come_back(recipients: list[Recipient], doubt: bool) -> None:
    back = unpack_recipients(pack_recipients(recipients), in_doubt=doubt)
    assert back == tuple(r._replace(in_doubt=r.in_doubt or doubt) for r in recipients)


@given(
    envelope=st.builds(Envelope, TEXT, st.just(()), st.booleans(), TEXT, TEXT),
    origin=st.builds(Origin, TEXT, TEXT, TEXT, TEXT, TEXT),
    summary=st.builds(Summary, TEXT, TEXT, TEXT),
    eight_bit=st.booleans(),
    dotted=st.booleans(),
)
def test_facts_come_back(envelope: Envelope, origin: Origin, summary: Summary, eight_bit: bool, dotted: bool) -> None:
    text = pack_facts(envelope, origin, summary, Content(0, b"", eight_bit=eight_bit, dotted=dotted))
    back_origin, back_summary, facts = unpack_facts(text)
    assert (back_origin, back_summary) == (origin, summary)
    assert unpack_envelope(envelope.sender, (), facts) == envelope
    assert (bool(facts.get("8bit")), bool(facts.get("dots"))) == (eight_bit, dotted)


LANES = [Lane("acme", "one"), Lane("acme", "two"), Lane("house", "one")]
OUTCOMES = st.sampled_from([SENT, FAILED, DEFERRED, IN_DOUBT])
CONTENTS = st.sampled_from([b"", b"small\r\n", b"large" * 60_000])
SENDER = "app@acme.example"
SELECTIONS = st.one_of(
    st.just(EVERYTHING),
    st.builds(
        Selection,
        route=st.sampled_from(["", "one"]),
        upstream=st.sampled_from(["", "house"]),
        sender=st.sampled_from(["", "acme.example", "<>"]),
        recipient=st.sampled_from(["", "r1@x.example"]),
        state=st.sampled_from(["", "due", "deferred", "held", "active"]),
        older_than=st.sampled_from([None, 10.0]),
    ),
)


@dataclass
class Kept:
    """What the ledger knows of one message. `token` and `until`: the claim that counts at the moment, and its end."""

    lane: Lane
    due: float
    created: float
    octets: bytes
    fates: dict[str, str]
    sender: str = SENDER
    attempts: int = 0
    held: str = ""
    token: int = 0
    until: float = -inf
    doubted: set[str] = field(default_factory=set)

    @property
    def waiting(self) -> set[str]:
        return {address for address, fate in self.fates.items() if fate == "waits"}

    @property
    def state(self) -> str:
        return "held" if self.held else "active" if self.token else "deferred" if self.attempts else "due"

    def expire(self) -> None:
        if self.token > 0:
            self.doubted |= self.waiting
        self.token, self.until = 0, -inf


class Custody(RuleBasedStateMachine):
    """Two claimants and an operator on one spool. The ledger says, for each recipient of each message, whether it waits or how it ended."""

    spool: MemorySpool | SqliteSpool
    kind = "sqlite"

    @initialize()
    def open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="spool-"))
        self.clock = ManualClock()
        self.ledger: dict[str, Kept] = {}
        self.claims: tuple[list[Claim], list[Claim]] = ([], [])  # of each claimant, whether or not still good
        self.ended: list[Settlement] = []
        self._open()

    def _open(self) -> None:
        async def make() -> MemorySpool | SqliteSpool:
            if self.kind == "memory":
                return MemorySpool(self.directory, self.clock, backoff=lambda attempts: 10.0 * attempts)
            return SqliteSpool(self.directory, self.clock, backoff=lambda attempts: 10.0 * attempts, keep_log_seconds=1e9)

        self.spool = self._do(make())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self._do(self.spool.close())
            self._do(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.directory)

    def _present(self) -> dict[str, Kept]:
        return {id: kept for id, kept in self.ledger.items() if kept.waiting}

    def _note(self, claim: Claim, claimant: int) -> None:
        """A claim was given: to nobody else at the same time, and with everything that is known of the message."""
        kept = self.ledger[claim.id]
        assert not kept.token, "a claim is exclusive until it expires"
        assert (claim.lane, claim.held, claim.created) == (kept.lane, kept.held, kept.created)
        assert {r.address for r in claim.envelope.recipients} == kept.waiting
        assert {r.address for r in claim.envelope.recipients if r.in_doubt} == kept.doubted & kept.waiting
        assert octets_of(claim.content) == kept.octets
        kept.token, kept.until = claim.token, claim.lease_until
        if claim.token > 0:
            assert not kept.held
            kept.attempts += 1
            kept.due = self.clock.now() + 10.0 * kept.attempts
        assert claim.attempt == kept.attempts
        self.claims[claimant].append(claim)

    # -- intake and delivery ----------------------------------------------------------------------------------------------

    @rule(
        lanes=st.lists(st.sampled_from(LANES), min_size=1, max_size=3),
        recipients=st.integers(1, 3),
        octets=CONTENTS,
        delay=st.sampled_from([0.0, 0.0, 30.0]),
        claimed=st.booleans(),
        claimant=st.integers(0, 1),
    )
    def put(self, lanes: list[Lane], recipients: int, octets: bytes, delay: float, claimed: bool, claimant: int) -> None:
        content = Content(len(octets), octets)
        addresses = [f"r{place}@x.example" for place in range(recipients)]
        now = self.clock.now()
        drafts = [draft(self.spool, lane=lane, recipients=addresses, content=content, created=now, due=now + delay) for lane in lanes]
        for each in drafts:
            assert each.id not in self.ledger
            self.ledger[each.id] = Kept(each.lane, now + delay, now, octets, dict.fromkeys(addresses, "waits"))
        for claim in self._do(self.spool.put(drafts, [claimed] * len(drafts))):
            assert (claim is not None) is claimed
            if claim is not None:
                self._note(claim, claimant)

    @rule(lane=st.sampled_from(LANES), limit=st.integers(1, 3), claimant=st.integers(0, 1))
    def claim(self, lane: Lane, limit: int, claimant: int) -> None:
        now = self.clock.now()
        ready = [k for k in self._present().values() if k.lane == lane and k.due <= now and not k.token and not k.held]
        claims = self._do(self.spool.claim(lane, limit))
        assert len(claims) == min(limit, len(ready))
        for claim in claims:
            assert (claim.lane, claim.token > 0) == (lane, True)
            assert self.ledger[claim.id].due <= now
            self._note(claim, claimant)

    @precondition(lambda self: any(self.claims))
    @rule(
        data=st.data(), then=st.sampled_from(LANES), delay=st.sampled_from([0.0, 20.0]), counted=st.booleans(),
        held=st.sampled_from(["", "", "", "no route"]), bounces=st.booleans(),
    )  # fmt: skip
    def settle(self, data: st.DataObject, then: Lane, delay: float, counted: bool, held: str, bounces: bool) -> None:
        owner = data.draw(st.sampled_from([claims for claims in self.claims if claims]))
        claim = data.draw(st.sampled_from(owner))
        outcomes: dict[str, Outcome] = {r.address: data.draw(OUTCOMES) for r in claim.envelope.recipients}
        bounce = draft(self.spool, sender="", lane=then, due=self.clock.now(), content=b"report") if bounces else None
        end = settlement(claim, outcomes, then=Next(self.clock.now() + delay, then, counted, held), bounce=bounce)
        kept = self.ledger[claim.id]
        try:
            self._do(self.spool.settle(end))
        except LeaseLost:
            assert kept.token != claim.token, "the claim was good"
            return
        assert kept.token == claim.token, "a stale claim was settled"
        kept.token, kept.until = 0, -inf
        owner.remove(claim)
        self.ended.append(end)
        for address, outcome in outcomes.items():
            assert kept.fates[address] == "waits", "settled twice"
            if outcome.status is not Status.DEFERRED:
                kept.fates[address] = outcome.status.value
            elif outcome.in_doubt:
                kept.doubted.add(address)
        kept.lane, kept.due, kept.held = then, self.clock.now() + delay, held
        kept.attempts -= int(not counted and claim.token > 0)
        if bounce is not None:
            self.ledger[bounce.id] = Kept(then, bounce.due, bounce.created, b"report", {"you@example.org": "waits"}, sender="")

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        """The same end, with the same bounce, is stored once."""
        with pytest.raises(LeaseLost):
            self._do(self.spool.settle(data.draw(st.sampled_from(self.ended))))

    @rule(seconds=st.sampled_from([1.0, 15.0, 60.0, 890.0, 901.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(claimant=st.integers(0, 1))
    def renew(self, claimant: int) -> None:
        now = self.clock.now()
        expected = [c.token for c in self.claims[claimant] if self.ledger[c.id].token == c.token and self.ledger[c.id].until > now]
        renewed = self._do(self.spool.renew(self.claims[claimant]))
        assert [claim.token for claim in renewed] == expected
        for claim in renewed:
            self.ledger[claim.id].until = claim.lease_until

    @rule()
    def expire(self) -> None:
        now = self.clock.now()
        due = self._do(self.spool.next_due())
        expected: dict[Lane, float] = {}
        for kept in self._present().values():
            if kept.token and kept.until <= now:
                kept.expire()
            if not kept.token and not kept.held:
                expected[kept.lane] = min(kept.due, expected.get(kept.lane, inf))
        assert due == expected, "every message that waits is in a lane that is due some time"

    # -- held mail, and the operator --------------------------------------------------------------------------------------

    def _chosen(self, selection: Selection) -> dict[str, Kept]:
        """What a verb may touch, written down a second time."""
        return {
            id: kept
            for id, kept in self._present().items()
            if not kept.token
            and (not selection.ids or id in selection.ids)
            and (not selection.route or kept.lane.route == selection.route)
            and (not selection.upstream or kept.lane.upstream == selection.upstream)
            and (not selection.sender or bool(kept.sender) is (selection.sender != "<>"))
            and (not selection.recipient or selection.recipient in kept.waiting)
            and (not selection.state or kept.state == selection.state)
            and (selection.older_than is None or kept.created <= self.clock.now() - selection.older_than)
        }

    def _drawn(self, selection: Selection, data: st.DataObject) -> Selection:
        """The selection, or some messages by their ids."""
        known = sorted(self.ledger)
        ids: list[str] = data.draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
        return replace(selection, ids=frozenset(ids))

    @rule(limit=st.integers(1, 3), claimant=st.integers(0, 1))
    def overdue(self, limit: int, claimant: int) -> None:
        late = {id for id, kept in self._present().items() if kept.held and not kept.token and kept.due <= self.clock.now()}
        claims = self._do(self.spool.overdue(limit))
        assert len(claims) == min(limit, len(late))
        for claim in claims:
            assert claim.id in late
            assert claim.token < 0
            self._note(claim, claimant)

    @rule(selection=SELECTIONS, data=st.data())
    def hold(self, selection: Selection, data: st.DataObject) -> None:
        selection = self._drawn(selection, data)
        chosen = {id: kept for id, kept in self._chosen(selection).items() if not kept.held or kept.due < inf}
        assert list(self._do(self.spool.hold(selection, "by the operator"))) == sorted(chosen)
        for kept in chosen.values():
            kept.held, kept.due = "by the operator", inf

    @rule(selection=SELECTIONS, data=st.data())
    def release(self, selection: Selection, data: st.DataObject) -> None:
        selection, now = self._drawn(selection, data), self.clock.now()
        chosen = {id: kept for id, kept in self._chosen(selection).items() if kept.held}
        assert list(self._do(self.spool.release(selection))) == [Next(now, chosen[id].lane) for id in sorted(chosen)]
        for kept in chosen.values():
            kept.held, kept.due = "", now

    @rule(selection=SELECTIONS, data=st.data())
    def reschedule(self, selection: Selection, data: st.DataObject) -> None:
        selection, now = self._drawn(selection, data), self.clock.now()
        chosen = {id: kept for id, kept in self._chosen(selection).items() if not kept.held}
        assert list(self._do(self.spool.reschedule(selection))) == [Next(now, chosen[id].lane) for id in sorted(chosen)]
        for kept in chosen.values():
            kept.due = min(kept.due, now)

    @rule(selection=SELECTIONS, data=st.data())
    def drop(self, selection: Selection, data: st.DataObject) -> None:
        selection = self._drawn(selection, data)
        chosen = self._chosen(selection)
        assert list(self._do(self.spool.drop(selection))) == sorted(chosen)
        for kept in chosen.values():
            kept.fates |= dict.fromkeys(kept.waiting, "dropped")

    @rule(selection=SELECTIONS, data=st.data(), limit=st.integers(1, 4), claimant=st.integers(0, 1))
    def take(self, selection: Selection, data: st.DataObject, limit: int, claimant: int) -> None:
        selection = self._drawn(selection, data)
        chosen = sorted(self._chosen(selection))[:limit]
        claims = self._do(self.spool.take(selection, limit))
        assert [claim.id for claim in claims] == chosen
        for claim in claims:
            assert claim.token < 0
            self._note(claim, claimant)

    # -- always -----------------------------------------------------------------------------------------------------------

    @invariant()
    def a_message_stays_exactly_as_long_as_somebody_waits(self) -> None:
        if hasattr(self, "spool"):
            assert self._messages() == len(self._present())

    @invariant()
    def the_log_says_once_how_each_recipient_ended(self) -> None:
        if hasattr(self, "spool"):
            ends = Counter(entry for entry in self._log() if entry[2] in ("sent", "failed", "dropped"))
            fates = {(id, address, fate) for id, kept in self.ledger.items() for address, fate in kept.fates.items() if fate != "waits"}
            assert ends == Counter(fates)

    def _messages(self) -> int:
        if isinstance(self.spool, MemorySpool):
            return len(self.spool._messages)
        ((count,),) = self.spool._database.execute("SELECT count(*) FROM message")
        return int(count)

    def _log(self) -> list[tuple[str, str, str]]:
        if isinstance(self.spool, MemorySpool):
            return [(entry.id, entry.recipient, entry.status) for entry in self.spool.log]
        return [
            (id_of(id), recipient, status)
            for id, recipient, status in self.spool._database.execute("SELECT id, recipient, status FROM log")
        ]


class DurableCustody(Custody):
    """The same, with a relay that comes back: all claims are taken over, and whoever was being tried is in doubt."""

    @rule()
    def start_again(self) -> None:
        self._do(self.spool.close())
        for kept in self.ledger.values():
            kept.expire()
        for claims in self.claims:
            claims.clear()  # tokens begin anew, and whoever held one is gone with the process
        self.ended.clear()
        self._open()

    @invariant()
    def no_content_is_left_over(self) -> None:
        if hasattr(self, "spool"):
            assert isinstance(self.spool, SqliteSpool)
            stray = "SELECT count(*) FROM content WHERE id NOT IN (SELECT content FROM message)"
            missing = "SELECT count(*) FROM message WHERE filed = 0 AND content NOT IN (SELECT id FROM content)"
            assert [list(self.spool._database.execute(text)) for text in (stray, missing)] == [[(0,)], [(0,)]]
            self.spool._files._removal.submit(bool).result()  # what is being removed is gone now
            files = {path.name for path in (self.directory / "content").iterdir()}
            named = {f"{number:013X}" for (number,) in self.spool._database.execute("SELECT content FROM message WHERE filed = 1")}
            assert files == named


@pytest.mark.parametrize(("machine", "kind", "examples"), [(Custody, "memory", 60), (DurableCustody, "sqlite", 40)])
def test_no_recipient_is_lost_or_settled_twice(
    machine: type[Custody], kind: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("relay.spool.commit.RIDE_SECONDS", 0.0)
    monkeypatch.setattr(machine, "kind", kind)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None))
