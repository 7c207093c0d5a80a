"""Laws of the spool, whatever is done to it in whatever order: rows come back as they were, no recipient is lost or settled twice."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from relay.clock import ManualClock
from relay.mail.envelope import Envelope, Origin, Recipient, Summary
from relay.mail.outcome import Outcome, Status
from relay.spool.base import Claim, Content, Lane, LeaseLost, Next
from relay.spool.memory import MemorySpool
from relay.spool.records import pack_facts, pack_recipients, unpack_envelope, unpack_facts, unpack_recipients
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import DEFERRED, FAILED, IN_DOUBT, SENT, draft, octets_of, settlement

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


class Custody(RuleBasedStateMachine):
    """Two claimants on one spool. The ledger says, for each recipient of each message, whether it still waits or how it ended."""

    spool: MemorySpool | SqliteSpool
    kind = "sqlite"

    @initialize()
    def open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="spool-"))
        self.clock = ManualClock()
        self.ledger: dict[str, dict[str, str]] = {}
        self.contents: dict[str, bytes] = {}
        self.doubted: set[tuple[str, str]] = set()
        self.held: set[str] = set()
        self.claims: tuple[list[Claim], list[Claim]] = ([], [])  # of each claimant, whether or not still good
        self.good: dict[str, tuple[int, float]] = {}  # message -> token and end of the claim that counts
        self._open()

    def _open(self) -> None:
        async def make() -> MemorySpool | SqliteSpool:
            if self.kind == "memory":
                return MemorySpool(self.directory, self.clock, backoff=lambda attempts: 10.0 * attempts)
            return SqliteSpool(self.directory, self.clock, backoff=lambda attempts: 10.0 * attempts, keep_log_seconds=1e9)

        self.spool = self.loop.run_until_complete(make())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run_until_complete(self.spool.close())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.directory)

    def _note(self, claim: Claim, claimant: int) -> None:
        token, until = self.good.get(claim.id, (0, -1.0))
        assert claim.id not in self.good or until <= self.clock.now(), "a claim is exclusive until it expires"
        assert claim.token != token
        waiting = {address for address, fate in self.ledger[claim.id].items() if fate == "waits"}
        assert {r.address for r in claim.envelope.recipients} == waiting
        assert {(claim.id, r.address) for r in claim.envelope.recipients if r.in_doubt} == {
            (claim.id, address) for address in waiting if (claim.id, address) in self.doubted
        }
        assert claim.id not in self.held
        assert octets_of(claim.content) == self.contents[claim.id]
        self.good[claim.id] = (claim.token, claim.lease_until)
        self.claims[claimant].append(claim)

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
        due = self.clock.now() + delay
        drafts = [draft(self.spool, lane=lane, recipients=addresses, content=content, created=self.clock.now(), due=due) for lane in lanes]
        for each in drafts:
            assert each.id not in self.ledger
            self.ledger[each.id] = dict.fromkeys(addresses, "waits")
            self.contents[each.id] = octets
        for claim in self.loop.run_until_complete(self.spool.put(drafts, [claimed] * len(drafts))):
            assert (claim is not None) is claimed
            if claim is not None:
                self._note(claim, claimant)

    @rule(lane=st.sampled_from(LANES), limit=st.integers(1, 3), claimant=st.integers(0, 1))
    def claim(self, lane: Lane, limit: int, claimant: int) -> None:
        claims = self.loop.run_until_complete(self.spool.claim(lane, limit))
        assert len(claims) <= limit
        for claim in claims:
            assert claim.lane == lane
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
        try:
            self.loop.run_until_complete(self.spool.settle(end))
        except LeaseLost:
            assert self.good.get(claim.id, (0, 0.0))[0] != claim.token, "the claim was good"
            return
        assert self.good[claim.id][0] == claim.token, "a stale claim was settled"
        del self.good[claim.id]
        owner.remove(claim)
        for address, outcome in outcomes.items():
            assert self.ledger[claim.id][address] == "waits", "settled twice"
            if outcome.status is not Status.DEFERRED:
                self.ledger[claim.id][address] = outcome.status.value
            elif outcome.in_doubt:
                self.doubted.add((claim.id, address))
        if held and "waits" in self.ledger[claim.id].values():
            self.held.add(claim.id)
        if bounce is not None:
            self.ledger[bounce.id] = {"you@example.org": "waits"}
            self.contents[bounce.id] = b"report"

    @rule(seconds=st.sampled_from([1.0, 15.0, 60.0, 890.0, 901.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(claimant=st.integers(0, 1))
    def renew(self, claimant: int) -> None:
        renewed = self.loop.run_until_complete(self.spool.renew(self.claims[claimant]))
        now = self.clock.now()
        expected = [c.token for c in self.claims[claimant] if self.good.get(c.id, (0, 0.0))[0] == c.token and self.good[c.id][1] > now]
        assert [claim.token for claim in renewed] == expected
        self.good |= {claim.id: (claim.token, claim.lease_until) for claim in renewed}

    @rule()
    def expire(self) -> None:
        due = self.loop.run_until_complete(self.spool.next_due())
        now = self.clock.now()
        for message, (_, until) in list(self.good.items()):
            if until <= now:
                del self.good[message]
                self.doubted |= {(message, address) for address, fate in self.ledger[message].items() if fate == "waits"}
        waiting = [m for m, fates in self.ledger.items() if "waits" in fates.values() and m not in self.good and m not in self.held]
        assert bool(due) is bool(waiting), "every message that waits is in a lane that is due some time"

    @invariant()
    def content_stays_exactly_as_long_as_it_is_needed(self) -> None:
        if hasattr(self, "spool"):
            waiting = sum("waits" in fates.values() for fates in self.ledger.values())
            assert self._messages() == waiting

    def _messages(self) -> int:
        if isinstance(self.spool, MemorySpool):
            return len(self.spool._messages)
        ((count,),) = self.spool._database.execute("SELECT count(*) FROM message")
        return int(count)


class DurableCustody(Custody):
    """The same, with a relay that comes back: all claims are taken over, and whoever they were for is in doubt."""

    @rule()
    def start_again(self) -> None:
        self.loop.run_until_complete(self.spool.close())
        for message in self.good:
            self.doubted |= {(message, address) for address, fate in self.ledger[message].items() if fate == "waits"}
        self.good.clear()
        for claims in self.claims:
            claims.clear()  # tokens begin anew, and whoever held one is gone with the process
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
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))  # type: ignore[no-untyped-call]
