"""The end of an attempt: stored once and whole, the sender told once, every event said once."""

import asyncio
import email
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from relay.clock import ManualClock
from relay.config.model import Config
from relay.delivery import settle
from relay.delivery.attempt import Result, untried
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.mail.envelope import Envelope, Origin, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, Draft, Lane, MessageId, Next, Selection, Settlement, SpoolError, SpoolFull
from relay.spool.memory import MemorySpool
from tests.unit.delivery import LANE, PREFIX, SENT, Log, config_of

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
REJECTED = outcome_of_reply(Phase.FINAL, Reply(554, "5.6.0", "no"))
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")
TOO_LARGE = outcome_of_failure(Phase.MAIL, Failure.LACKING, "SIZE")
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))
HEADER = b"From: App <app@acme.example>\r\nSubject: hi\r\n"


class BrittleSpool(MemorySpool):
    """Fails as often as it is told before it stores an outcome."""

    failures: list[Exception]

    async def settle(self, settlement: Settlement) -> None:
        if self.failures:
            raise self.failures.pop(0)
        await super().settle(settlement)


@dataclass
class House:
    """A spool with a settler on it, and the words that the tests use."""

    spool: BrittleSpool
    clock: ManualClock
    log: Log
    config: Config = field(default_factory=config_of)

    def __post_init__(self) -> None:
        self.use(self.config)

    def use(self, config: Config) -> None:
        self.config = config
        self.metrics = Metrics()
        self.breakers = Breakers(config.retry, self.log.journal, self.metrics, self.clock)
        self.settler = Settler(
            config, Router(config), self.spool, self.log.journal, self.clock, rng=random.Random(1), breakers=self.breakers,
            metrics=self.metrics,
        )  # fmt: skip

    async def claim(self, *recipients: Recipient | str, sender: str = "app@acme.example", lane: Lane = LANE, **envelope: Any) -> Claim:
        """A message that has just been put and claimed."""
        named = tuple(Recipient(r) if isinstance(r, str) else r for r in recipients or ("you@example.org",))
        content = Content(len(HEADER) + 4, HEADER + b"\r\nx\r\n")
        origin = Origin("local", "127.0.0.1", "", "S1", sender)
        kept = Envelope(sender, named, **envelope)
        draft = Draft(self.spool.new_id(), lane, kept, content, self.clock.now(), PREFIX, origin, due=self.clock.now())
        (claim,) = await self.spool.put([draft], [True])
        assert claim is not None
        return claim

    async def settle(self, claim: Claim, outcomes: Outcome | Mapping[str, Outcome]) -> list[Next]:
        if isinstance(outcomes, Outcome):
            outcomes = dict.fromkeys((r.address for r in claim.envelope.recipients), outcomes)
        return await self.settler.settle(claim, Result(outcomes, header_block=HEADER))

    async def waiting(self, lane: Lane = LANE) -> list[Claim]:
        """Claim everything that is due in the lane."""
        return list(await self.spool.claim(lane, 100))

    async def bounce(self, lane: Lane = LANE) -> Message:
        """The one message that is due there, which must be a report."""
        (claim,) = await self.waiting(lane)
        assert (claim.envelope.sender, claim.prefix) == ("", b"")
        assert claim.content.octets is not None
        return email.message_from_bytes(claim.content.octets)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = ManualClock()
    spool = BrittleSpool(tmp_path, clock, backoff=lambda attempts: 60.0 * attempts)
    spool.failures = []
    log = Log(tmp_path, clock)
    yield House(spool, clock, log)
    log.text()
    await spool.close()


def said(message: Message) -> list[dict[str, str]]:
    """The groups of a report's machine-readable part."""
    parts = message.get_payload()
    assert isinstance(parts, list)
    groups = parts[1].get_payload()
    assert isinstance(groups, list)
    return [dict(group.items()) for group in groups]  # type: ignore[union-attr]


# -- what is stored --------------------------------------------------------------------------------------------------------


async def test_what_was_sent_is_gone_and_told_once(house: House) -> None:
    house.clock.advance(1.5)
    claim = await house.claim()
    house.clock.advance(2.25)
    assert await house.settle(claim, SENT) == []
    assert await house.spool.next_due() == {}
    (event,) = house.log.events()
    assert event == {
        "time": "2027-01-15T08:00:03.750Z", "level": "info", "event": "sent", "id": claim.id, "session": "S1", "route": "acme",
        "upstream": "acme", "sender": "app@acme.example", "recipients": "you@example.org", "size": len(HEADER) + 4,
        "reply": "250 2.0.0 Ok", "status": "sent", "attempt": 1, "delay": "2.250",
    }  # fmt: skip


async def test_what_is_deferred_waits_its_time_with_jitter(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org")
    (due,) = await house.settle(claim, GREYLISTED)
    assert due.lane == LANE
    assert 54 <= due.when - house.clock.now() <= 66
    assert await house.spool.next_due() == {LANE: due.when}
    (event,) = house.log.events()
    assert (event["event"], event["level"], event["recipients"]) == ("deferred", "warning", "a@example.org,b@example.org")
    assert event["next"].startswith("in ")
    assert event["next"].endswith(" s at acme")
    assert "in_doubt" not in event


async def test_the_jitter_differs_from_message_to_message(house: House) -> None:
    whens = {(await house.settle(await house.claim(), GREYLISTED))[0].when for _ in range(10)}
    assert len(whens) == 10


async def test_only_those_who_wait_stay_in_the_queue_and_doubt_is_remembered(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org", "c@example.org")
    await house.settle(claim, {"a@example.org": SENT, "b@example.org": LOST, "c@example.org": GREYLISTED})
    house.clock.advance(70)
    (again,) = await house.waiting()
    assert [(r.address, r.in_doubt) for r in again.envelope.recipients] == [("b@example.org", True), ("c@example.org", False)]
    assert again.attempt == 2
    assert {e["recipients"]: e.get("in_doubt", "") for e in house.log.events("deferred")} == {"b@example.org": "yes", "c@example.org": ""}


async def test_a_moved_message_is_due_there_at_once_and_nothing_is_said(house: House) -> None:
    claim = await house.claim()
    there = Next(house.clock.now(), Lane("globex", "globex"), counted=False)
    assert await house.settler.settle(claim, Result(untried(claim), there)) == [there]
    (again,) = await house.waiting(Lane("globex", "globex"))
    assert again.attempt == 1
    assert house.log.names() == []


async def test_a_held_message_waits_for_a_person_and_is_told_once(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org", sender="")
    assert await house.settler.settle(claim, Result(untried(claim), Next(house.clock.now(), LANE, counted=False, held="why"))) == []
    assert await house.spool.next_due() == {}
    (event,) = house.log.events()
    assert (event["event"], event["reply"], event["sender"], event["recipients"]) == ("held", "why", "<>", "a@example.org,b@example.org")


# -- the spool has trouble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SpoolError("disk on fire"), SpoolFull("no space left")])
async def test_an_outcome_that_cannot_be_stored_is_stored_later(house: House, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    house.spool.failures = [error] * 100
    await house.settle(await house.claim(), SENT)
    assert await house.spool.next_due() == {}
    assert [entry.status for entry in house.spool.log] == ["sent"]
    assert house.log.names() == ["fault"] * 7 + ["sent"], "after 1, 2, 4, 8, 16, 32 and 64"


@pytest.mark.parametrize("moved", [False, True])
async def test_a_lost_claim_changes_nothing_and_says_so(house: House, moved: bool) -> None:
    claim = await house.claim()
    stale = claim._replace(token=claim.token + 1)
    then = Next(house.clock.now(), LANE, counted=False, held="why") if moved else None
    assert await house.settler.settle(stale, Result(untried(claim) if moved else {"you@example.org": REFUSED}, then)) == []
    assert house.log.names() == ["note"]
    assert claim.id in house.log.events()[0]["what"]
    assert house.spool.log == []


@pytest.mark.parametrize(
    "routes", [[], [{"name": "acme", "sender": "acme.example", "reject": "no"}], [{"name": "acme", "upstream": "house"}]]
)
@pytest.mark.parametrize("outcome", [SENT, DOWN, GREYLISTED, REFUSED, LOST, LOGIN_REFUSED])
async def test_an_outcome_is_stored_whatever_became_of_the_route(house: House, routes: list[dict[str, Any]], outcome: Outcome) -> None:
    house.use(config_of(routes))
    await house.settle(await house.claim(lane=Lane("gone", "acme")), outcome)
    assert len(house.spool.log) == 1
    assert "fault" not in house.log.names()


# -- bounces ---------------------------------------------------------------------------------------------------------------


async def test_a_failure_is_reported_to_the_sender_by_his_own_route(house: House) -> None:
    house.use(config_of([{"name": "reports", "sender": "acme.example", "upstream": "spare"}, {"name": "acme", "upstream": "acme"}]))
    claim = await house.claim()
    (due,) = await house.settle(claim, REFUSED)
    assert due == Next(house.clock.now(), Lane("spare", "reports"))
    report = await house.bounce(Lane("spare", "reports"))
    assert (report["From"], report["To"]) == ("Mail Delivery System <MAILER-DAEMON@acme.example>", "<app@acme.example>")
    about_message, about_recipient = said(report)
    assert about_message["X-Queue-ID"] == claim.id
    assert about_recipient["Final-Recipient"] == "rfc822;you@example.org"
    assert (about_recipient["Action"], about_recipient["Status"]) == ("failed", "5.1.1")
    assert house.log.names() == ["failed", "bounced"]
    (event,) = house.log.events("bounced")
    assert (event["id"], event["recipients"], event["failed"]) == (claim.id, "app@acme.example", "you@example.org")


async def test_a_report_that_cannot_be_made_is_made_later(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    make, failures = house.spool.new_id, [RuntimeError("a fault of ours")] * 3

    def new_id() -> MessageId:
        if failures:
            raise failures.pop()
        return make()

    claim = await house.claim()
    monkeypatch.setattr(house.spool, "new_id", new_id)
    await house.settle(claim, REFUSED)
    assert house.log.names() == ["fault", "failed", "bounced"]


async def test_mail_whose_report_cannot_be_made_at_all_is_held_with_those_who_failed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    claim = await house.claim("a@example.org", "b@example.org")
    monkeypatch.setattr(house.spool, "new_id", lambda: 1 / 0)
    async with asyncio.timeout(10):
        assert await house.settle(claim, {"a@example.org": SENT, "b@example.org": REFUSED}) == []
    (held,) = await house.spool.take(Selection(), 10)
    assert [r.address for r in held.envelope.recipients] == ["b@example.org"]
    assert held.held == "the report to its sender cannot be made, see the log: division by zero"
    assert house.log.names() == ["fault", "fault", "sent", "held"]
    (event,) = house.log.events("held")
    assert (event["recipients"], event["reply"]) == ("b@example.org", held.held)


async def test_the_reason_of_a_hold_is_fit_to_be_shown_whatever_the_error_repeats(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> MessageId:
        raise ValueError("bad header: \x1b[2J\n" + "x" * 100_000)

    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    claim = await house.claim()
    monkeypatch.setattr(house.spool, "new_id", fail)
    await house.settle(claim, REFUSED)
    (held,) = await house.spool.take(Selection(), 10)
    assert "bad header: " in held.held
    assert held.held.isprintable()
    assert len(held.held) < 10_000


async def test_mail_that_was_sent_is_not_held_for_its_report(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_AGAIN_SECONDS", 0.0)
    claim = await house.claim(Recipient("a@example.org", "SUCCESS"))
    monkeypatch.setattr(house.spool, "new_id", lambda: 1 / 0)
    async with asyncio.timeout(10):
        assert await house.settle(claim, SENT) == []
    assert not await house.spool.take(Selection(), 10)
    assert house.log.names() == ["fault", "fault", "sent"]


async def test_a_report_whose_sender_has_no_route_any_more_stays_in_the_lane_it_came_from(house: House) -> None:
    house.use(config_of([{"name": "acme", "sender": "globex.example", "upstream": "acme"}]))
    await house.settle(await house.claim(), REFUSED)
    await house.bounce()


async def test_one_report_speaks_of_all_who_failed_in_one_attempt(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org", "c@example.org", "d@example.org")
    outcomes = {"a@example.org": REFUSED, "b@example.org": SENT, "c@example.org": REJECTED, "d@example.org": GREYLISTED}
    assert len(await house.settle(claim, outcomes)) == 2
    report = await house.bounce()
    assert [(g["Final-Recipient"], g["Status"]) for g in said(report)[1:]] == [
        ("rfc822;a@example.org", "5.1.1"),
        ("rfc822;c@example.org", "5.6.0"),
    ]
    told = [(event["event"], event["recipients"], event.get("reply")) for event in house.log.events()]
    assert told == [
        ("failed", "a@example.org", "550 5.1.1 nobody here"),
        ("sent", "b@example.org", "250 2.0.0 Ok"),
        ("failed", "c@example.org", "554 5.6.0 no"),
        ("deferred", "d@example.org", "450 4.2.0 later"),
        ("bounced", "app@acme.example", None),
    ]


async def test_recipients_with_the_same_reply_share_one_line(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org", "c@example.org")
    await house.settle(claim, {"a@example.org": SENT, "b@example.org": GREYLISTED, "c@example.org": SENT})
    assert [(e["event"], e["recipients"]) for e in house.log.events()] == [
        ("sent", "a@example.org,c@example.org"),
        ("deferred", "b@example.org"),
    ]


async def test_what_has_expired_is_reported_as_expired_with_the_last_reply(house: House) -> None:
    claim = await house.claim(Recipient("you@example.org", in_doubt=True))
    house.clock.advance(5 * 86400)
    await house.settle(claim, GREYLISTED)
    report = await house.bounce()
    (group,) = said(report)[1:]
    assert (group["Status"], group["Diagnostic-Code"], group["X-Delivery"]) == ("4.4.7", "smtp; 450 4.2.0 later", "unconfirmed")
    assert "after 5 days of trying" in str(report)
    (event,) = house.log.events("failed")
    assert event["reply"] == "4.4.7 delivery time expired; last reply: 450 4.2.0 later"


@pytest.mark.parametrize(
    ("sender", "recipient", "reason"),
    [
        ("", Recipient("you@example.org"), "a bounce is never bounced"),
        ("app@acme.example", Recipient("you@example.org", notify="NEVER"), "the sender asked for no notice"),
        ("app@acme.example", Recipient("you@example.org", notify="DELAY,SUCCESS"), "the sender asked for no notice"),
    ],
)
async def test_where_nobody_may_be_told_the_log_has_it(house: House, sender: str, recipient: Recipient, reason: str) -> None:
    assert await house.settle(await house.claim(recipient, sender=sender), REFUSED) == []
    assert await house.spool.next_due() == {}
    first, second = house.log.events()
    assert (first["event"], first["status"]) == ("failed", "failed")
    assert (second["event"], second["status"], second["reply"]) == ("failed", "failed, nobody told", reason)


async def test_the_log_tells_apart_who_is_in_the_report_and_who_is_not(house: House) -> None:
    claim = await house.claim("a@example.org", Recipient("archive@acme.example", notify="NEVER"))
    await house.settle(claim, REFUSED)
    assert [g["Final-Recipient"] for g in said(await house.bounce())[1:]] == ["rfc822;a@example.org"]
    assert [(e["failed"]) for e in house.log.events("bounced")] == ["a@example.org"]
    assert [(e["recipients"], e["status"]) for e in house.log.events("failed")] == [
        ("a@example.org,archive@acme.example", "failed"),
        ("archive@acme.example", "failed, nobody told"),
    ]


async def test_a_report_and_the_end_of_its_message_are_stored_in_one_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settlement] = []
    store: Callable[..., Any] = house.spool.settle

    async def watch(settlement: Settlement) -> None:
        seen.append(settlement)
        await store(settlement)

    monkeypatch.setattr(house.spool, "settle", watch)
    await house.settle(await house.claim(), REFUSED)
    (settlement,) = seen
    assert settlement.bounce is not None
    assert settlement.next is None


async def test_a_report_for_an_international_sender_says_that_it_needs_smtputf8(house: House) -> None:
    house.use(config_of([{"name": "all", "upstream": "acme"}]))
    await house.settle(await house.claim(sender="jürgen@acme.example", smtputf8=True, lane=Lane("acme", "all")), REFUSED)
    (claim,) = await house.waiting(Lane("acme", "all"))
    assert claim.envelope.smtputf8
    assert claim.content.eight_bit


# -- upstreams -------------------------------------------------------------------------------------------------------------


async def test_who_was_sent_to_alike_is_told_of_together(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org", "c@example.org")
    other = SENT._replace(reply=Reply(250, "2.0.0", "Ok, too"))
    assert await house.settle(claim, {"a@example.org": SENT, "b@example.org": other, "c@example.org": SENT}) == []
    sent = [(event["recipients"], event["reply"]) for event in house.log.events("sent")]
    assert sent == [("a@example.org,c@example.org", str(SENT.reply)), ("b@example.org", "250 2.0.0 Ok, too")]


async def test_degraded_and_recovered_are_said_once_for_each_change(house: House) -> None:
    for _ in range(3):
        (due,) = await house.settle(await house.claim(), DOWN)
        assert due == Next(house.clock.now(), Lane("spare", "acme"), counted=False)
    await house.settle(await house.claim(lane=Lane("spare", "acme")), SENT)
    await house.settle(await house.claim(), SENT)
    await house.settle(await house.claim(), SENT)
    await house.settle(await house.claim(), DOWN)
    changes = [(e["event"], e["route"], e["upstream"], e.get("fallback")) for e in house.log.events("degraded", "recovered")]
    assert changes == [("degraded", "acme", "acme", "spare"), ("recovered", "acme", "acme", None), ("degraded", "acme", "acme", "spare")]
    (first, *_) = house.log.events("degraded")
    assert (first["level"], first["reply"]) == ("warning", "refused")
    assert house.log.events("deferred")[0]["next"] == "fallback spare, now"


async def test_a_recipient_refused_by_the_primary_is_no_sign_of_its_recovery(house: House) -> None:
    await house.settle(await house.claim(), DOWN)
    await house.settle(await house.claim(), GREYLISTED)
    assert house.log.events("recovered") == []


async def test_messages_that_only_the_fallback_can_take_are_not_told_of_one_by_one(house: House) -> None:
    for _ in range(3):
        (due,) = await house.settle(await house.claim(), TOO_LARGE)
        assert due.lane == Lane("spare", "acme")
        await house.settle(await house.claim(), SENT)
    house.clock.advance(3601)
    await house.settle(await house.claim(), TOO_LARGE)
    await house.settle(await house.claim(), DOWN)
    assert [event["event"] for event in house.log.events("degraded", "recovered")] == ["degraded", "recovered", "degraded"]


async def test_each_route_is_degraded_on_its_own(house: House) -> None:
    house.use(
        config_of(
            [
                {"name": "a", "sender": "a.example", "upstream": "acme", "fallback": "house"},
                {"name": "b", "sender": "b.example", "upstream": "acme", "fallback": "house"},
            ]
        )
    )
    for route in "ab":
        await house.settle(await house.claim(sender=f"x@{route}.example", lane=Lane("acme", route)), DOWN)
    assert [event["route"] for event in house.log.events("degraded")] == ["a", "b"]


@pytest.mark.parametrize("upstream", ["acme", "house"])
async def test_a_refused_login_is_an_event_of_its_own_without_the_password(house: House, upstream: str) -> None:
    house.use(config_of(upstreams={upstream: {"username": "relay", "password": "not-to-be-seen"}}))
    await house.settle(await house.claim("a@example.org", "b@example.org", lane=Lane(upstream, "acme")), LOGIN_REFUSED)
    (event,) = house.log.events("auth-failed")
    assert (event["level"], event["upstream"], event["user"], event["reply"]) == ("error", upstream, "relay", "535 5.7.8 wrong")
    assert "not-to-be-seen" not in house.log.text()


async def test_a_refused_login_is_told_also_when_the_first_recipient_had_another_fate_or_time_is_up(house: House) -> None:
    denied = outcome_of_reply(Phase.RCPT, Reply(554, "5.7.1", "Relay access denied"))
    await house.settle(await house.claim("a@example.org", "b@example.org"), {"a@example.org": GREYLISTED, "b@example.org": denied})
    late = await house.claim(lane=Lane("house", "acme"))
    house.clock.advance(5 * 86400)
    await house.settle(late, LOGIN_REFUSED)
    assert [(e["upstream"], e["reply"]) for e in house.log.events("auth-failed")] == [
        ("acme", "554 5.7.1 Relay access denied"),
        ("house", "535 5.7.8 wrong"),
    ]


async def test_throttling_degrades_nothing(house: House) -> None:
    claim = await house.claim("a@example.org", "b@example.org")
    (due,) = await house.settle(claim, {"a@example.org": GREYLISTED, "b@example.org": THROTTLED})
    assert due.lane == LANE
    assert not due.counted
    assert house.log.events("degraded") == []


# -- breakers, fallbacks that wait, and what is given up -----------------------------------------------------------------------


def not_tried(text: str = "not tried: acme has failed") -> Outcome:
    return outcome_of_failure(Phase.RESOLVE, Failure.UNREACHABLE, text)


async def put_off(house: House, claim: Claim) -> list[Next]:
    """Settle an attempt that was not made."""
    outcomes = dict.fromkeys((r.address for r in claim.envelope.recipients), not_tried())
    return await house.settler.settle(claim, Result(outcomes, tried=False))


def break_open(house: House, upstream: str) -> None:
    for number in range(3):
        house.breakers.admit(upstream, MessageId(f"0{number}"))
        house.breakers.record(upstream, MessageId(f"0{number}"), [DOWN])


async def test_mail_that_waits_for_a_breaker_is_told_of_while_it_is_new_and_then_no_more(house: House) -> None:
    house.use(config_of([{"name": "acme", "sender": "acme.example", "upstream": "acme"}]))
    break_open(house, "acme")
    claim = await house.claim()
    (due,) = await put_off(house, claim)
    assert due.lane == LANE
    assert 30 <= due.when - house.clock.now() <= 36
    house.clock.advance(40)
    (again,) = await house.waiting()
    assert again.attempt == 1
    await put_off(house, again)
    assert [e["reply"] for e in house.log.events("deferred")] == ["not tried: acme has failed"]
    assert [entry.status for entry in house.spool.log] == ["deferred"]


async def test_mail_that_moves_past_an_open_breaker_is_told_of_however_old_it_is(house: House) -> None:
    break_open(house, "acme")
    break_open(house, "spare")
    claim = await house.claim()
    house.clock.advance(20)
    assert await put_off(house, claim) == [Next(house.clock.now(), Lane("house", "acme"), counted=False)]
    old = await house.claim()
    house.clock.advance(3600)
    assert (await put_off(house, old))[0].lane == Lane("spare", "acme"), "half-open: it may be tried"
    assert [e["next"] for e in house.log.events("deferred")] == ["fallback house, now", "fallback spare, now"]
    (event,) = house.log.events("degraded")
    assert (event["upstream"], event["fallback"]) == ("acme", "house")
    assert house.metrics.registry.get_sample_value("relay_degraded_total", {"route": "acme", "upstream": "house"}) == 1


async def test_mail_that_expires_while_its_upstream_is_closed_is_reported_with_the_last_reply(house: House) -> None:
    house.use(config_of([{"name": "acme", "sender": "acme.example", "upstream": "acme"}]))
    claim = await house.claim()
    house.clock.advance(4 * 86_400)
    break_open(house, "acme")
    await put_off(house, claim)
    (group,) = said(await house.bounce())[1:]
    assert group["Status"] == "4.4.7"
    assert "not tried: acme has failed" in group["Diagnostic-Code"]


AFTER: list[dict[str, Any]] = [
    {"name": "acme", "sender": "acme.example", "upstream": "acme", "fallback": ["spare", {"upstream": "house", "after": "10m"}]}
]


@pytest.mark.parametrize("step", [0.0, -86_400.0, 86_400.0])
async def test_a_fallback_that_is_not_to_be_used_yet_is_waited_for_from_the_first_failure_on_however_clocks_are_set(
    house: House, step: float
) -> None:
    house.use(config_of(AFTER))
    house.breakers.record("acme", MessageId("01"), [DOWN])
    house.clock.advance(9.5 * 60)
    house.clock.step(step)
    (due,) = await house.settle(await house.claim(lane=Lane("spare", "acme")), DOWN)
    assert due.lane == LANE
    assert 30 <= due.when - house.clock.now() <= 36
    house.clock.advance(30)
    (due,) = await house.settle(await house.claim(lane=Lane("spare", "acme")), DOWN)
    assert due == Next(house.clock.now(), Lane("house", "acme"), counted=False)


async def test_mail_that_is_at_a_fallback_already_does_not_wait_for_it(house: House) -> None:
    house.use(config_of(AFTER))
    for outcome in (GREYLISTED, LOST):
        (due,) = await house.settle(await house.claim(lane=Lane("house", "acme")), outcome)
        assert due.lane == Lane("house", "acme")
        assert due.when - house.clock.now() <= 66


async def test_the_time_of_a_fallback_begins_now_where_the_primary_has_just_taken_mail(house: House) -> None:
    fallback = [{"upstream": "house", "after": "30s"}]
    house.use(config_of([{"name": "acme", "sender": "acme.example", "upstream": "acme", "fallback": fallback}]))
    (due,) = await house.settle(await house.claim(), DOWN)
    assert due.lane == LANE
    assert 30 <= due.when - house.clock.now() <= 36


async def test_a_route_is_retried_by_its_own_times(house: House) -> None:
    house.use(config_of([{"name": "acme", "sender": "acme.example", "upstream": "acme", "retry": {"first": "10m", "expire": "1h"}}]))
    (due,) = await house.settle(await house.claim(), GREYLISTED)
    assert 540 <= due.when - house.clock.now() <= 660
    old = await house.claim()
    house.clock.advance(3600)
    await house.settle(old, GREYLISTED)
    assert [e["event"] for e in house.log.events("failed")] == ["failed"]


async def test_who_is_given_up_by_an_operator_fails_for_the_reason_he_gave(house: House) -> None:
    claim = await house.claim("a@example.org", Recipient("b@example.org", in_doubt=True))
    (due,) = await house.settler.give_up(claim, "given up by the operator")
    assert due.lane == LANE
    groups = said(await house.bounce())[1:]
    assert [(g["Action"], g["Diagnostic-Code"], g.get("X-Delivery")) for g in groups] == [
        ("failed", "x-relay; given up by the operator", None),
        ("failed", "x-relay; given up by the operator", "unconfirmed"),
    ]
    assert house.log.names() == ["failed", "bounced"]
    assert house.log.events("failed")[0]["reply"] == "given up by the operator"
    assert {entry.status for entry in house.spool.log} == {"failed"}


async def test_held_mail_whose_time_is_up_is_reported_with_the_reason_of_the_hold(house: House) -> None:
    claim = await house.claim()
    await house.settler.settle(claim, Result(untried(claim), Next(house.clock.now() + 60, LANE, counted=False, held="no route")))
    assert await house.spool.overdue(10) == []
    house.clock.advance(60)
    (again,) = await house.spool.overdue(10)
    assert again.held == "no route"
    await house.settler.give_up(again, "")
    (group,) = said(await house.bounce())[1:]
    assert group["Status"] == "4.4.7"
    assert "no route" in group["Diagnostic-Code"]
    assert await house.spool.overdue(10) == []
    (event,) = house.log.events("failed")
    assert event["reply"] == "4.4.7 delivery time expired; last reply: held: no route"


async def test_what_was_sent_for_a_claim_that_was_lost_is_not_told(house: House) -> None:
    claim = await house.claim()
    assert await house.settle(claim._replace(token=claim.token + 1), SENT) == []
    assert house.log.names() == ["note"]


async def test_a_claim_that_was_lost_is_not_given_up(house: House) -> None:
    claim = await house.claim()
    assert await house.settler.give_up(claim._replace(token=claim.token + 1), "no") == []
    assert house.log.names() == ["note"]


async def test_a_claim_that_was_lost_is_not_kept(house: House) -> None:
    claim = await house.claim()
    assert await house.settler.keep(claim._replace(token=claim.token + 1), "its turn") == []
    assert house.log.names() == ["note"]
