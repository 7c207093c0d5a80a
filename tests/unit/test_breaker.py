"""When an upstream is left alone, and when it is tried again: every transition, with a clock that stands still until it is moved."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.clock import ManualClock
from relay.config.model import Retry
from relay.delivery.breaker import PROBE, Breakers
from relay.mail.outcome import Failure, Outcome, Phase, Scope, Status, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.metrics import Metrics
from relay.spool.base import MessageId
from tests.unit.delivery import SENT, Log

DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "Connection refused")
UNTRUSTED = outcome_of_failure(Phase.TLS, Failure.UNTRUSTED, "the certificate has expired")
CLOSING = outcome_of_reply(Phase.MAIL, Reply(421, "4.3.2", "down"))
BROKEN = outcome_of_failure(Phase.DATA, Failure.CLOSED, "connection lost")
LOGIN_DEFERRED = outcome_of_reply(Phase.AUTH, Reply(451, "4.3.0", "later"))
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
UNAUTHENTICATED = outcome_of_reply(Phase.MAIL, Reply(530, "5.7.0", "log in first"))
NO_RELAY = outcome_of_reply(Phase.RCPT, Reply(554, "5.7.1", "Relay access denied"))

REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
BUSY = outcome_of_reply(Phase.MAIL, Reply(451, "4.3.0", "later"))
FORBIDDEN = outcome_of_reply(Phase.MAIL, Reply(550, "5.7.1", "not you"))
LACKING = outcome_of_failure(Phase.MAIL, Failure.LACKING, "no SMTPUTF8")

THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")
GONE = outcome_of_failure(Phase.FINAL, Failure.CLOSED, "connection lost after the content")

MINUTE, HOUR = 60.0, 3600.0


class Desk:
    """The breakers of upstream `acme`, and messages that are tried one after the other."""

    def __init__(self, log: Log, clock: ManualClock, retry: Retry) -> None:
        self.log = log
        self.clock = clock
        self.metrics = Metrics()
        self.breakers = Breakers(retry, log.journal, self.metrics, clock)
        self._numbers = 0

    def id(self) -> MessageId:
        self._numbers += 1
        return MessageId(f"{self._numbers:013X}")

    def admits(self, id: MessageId | None = None) -> bool:
        return self.breakers.admit("acme", id or self.id()) is None

    def tries(self, *outcomes: Outcome, id: MessageId | None = None) -> bool:
        """One message is admitted and comes to this; whether the upstream works again after a long time."""
        id = id or self.id()
        assert self.admits(id)
        return self.breakers.record("acme", id, outcomes)

    def open_seconds(self) -> float:
        """How long it is closed to messages, found by trying."""
        ready = self.breakers.ready_at("acme")
        return ready - self.clock.now() if ready else 0.0

    def count(self, name: str, kind: str) -> float:
        return self.metrics.registry.get_sample_value(f"relay_breaker_{name}_total", {"upstream": "acme", "kind": kind}) or 0.0

    def notes(self) -> list[str]:
        return [event["what"] for event in self.log.events("note")]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    clock = ManualClock()
    log = Log(tmp_path, clock)
    yield Desk(log, clock, Retry())
    log.text()


# -- closed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [DOWN, UNTRUSTED, CLOSING, BROKEN, LOGIN_DEFERRED, LOST, GONE])
def test_three_failures_in_a_row_open_it_for_half_a_minute(desk: Desk, outcome: Outcome) -> None:
    for _ in range(2):
        desk.tries(outcome)
        assert desk.open_seconds() == 0
    desk.tries(outcome)
    assert desk.open_seconds() == 30
    assert not desk.admits()
    assert desk.count("opened", "connection") == 1
    (note,) = desk.notes()
    assert "acme" in note
    assert str(outcome.reply) in note


@pytest.mark.parametrize("success", [SENT, REFUSED, GREYLISTED, BUSY, FORBIDDEN, LACKING])
def test_a_message_that_it_deals_with_begins_the_row_anew(desk: Desk, success: Outcome) -> None:
    for _ in range(5):
        desk.tries(DOWN)
        desk.tries(DOWN)
        assert desk.breakers.failing_since("acme") is not None
        assert not desk.tries(success)
        assert desk.breakers.failing_since("acme") is None
    assert desk.open_seconds() == 0
    assert desk.breakers.troubles() == []


def test_a_request_to_slow_down_is_neither_failure_nor_success(desk: Desk) -> None:
    for _ in range(10):
        desk.tries(THROTTLED)
    assert desk.breakers.failing_since("acme") is None
    desk.tries(DOWN)
    desk.tries(DOWN)
    desk.tries(THROTTLED)
    assert desk.admits()
    desk.tries(DOWN)
    assert not desk.admits()


@pytest.mark.parametrize("outcome", [LOGIN_REFUSED, UNAUTHENTICATED])
def test_the_first_refused_login_opens_it_for_a_quarter_of_an_hour(desk: Desk, outcome: Outcome) -> None:
    desk.tries(outcome)
    assert desk.open_seconds() == 15 * MINUTE
    assert (desk.count("opened", "credential"), desk.count("opened", "connection")) == (1, 0)


def test_one_odd_recipient_does_not_stop_the_mail_of_a_tenant_and_three_messages_do(desk: Desk) -> None:
    odd = desk.id()
    for _ in range(5):
        desk.tries(NO_RELAY, id=odd)
    assert desk.open_seconds() == 0
    desk.tries(NO_RELAY)
    assert desk.open_seconds() == 0
    desk.tries(NO_RELAY)
    assert desk.open_seconds() == 15 * MINUTE


@pytest.mark.parametrize("outcome", [BROKEN, LOST, GONE])
def test_a_message_that_breaks_every_session_counts_once(desk: Desk, outcome: Outcome) -> None:
    poison = desk.id()
    for _ in range(10):
        desk.tries(outcome, id=poison)
    assert desk.open_seconds() == 0


def test_a_login_that_works_says_nothing_of_replies_that_were_lost_after_it(desk: Desk) -> None:
    opened(desk, LOST)
    desk.clock.advance(30)
    assert desk.breakers.admit("acme", PROBE) is None
    assert not desk.breakers.record_probe("acme", None)
    assert desk.breakers.failing_since("acme") is not None
    desk.tries(LOST)
    assert desk.open_seconds() == 60


def test_a_message_that_finds_no_session_counts_each_time_it_tries(desk: Desk) -> None:
    only = desk.id()
    for _ in range(3):
        desk.tries(DOWN, id=only)
    assert desk.open_seconds() == 30


@pytest.mark.parametrize(
    ("outcomes", "seconds"),
    [
        ((SENT, CLOSING), 0.0),
        ((REFUSED, CLOSING), 30.0),
        ((CLOSING, REFUSED), 30.0),
        ((GREYLISTED, LOST), 30.0),
        ((SENT, LOST), 0.0),
        ((THROTTLED, REFUSED), 0.0),
        ((CLOSING, UNAUTHENTICATED), 900.0),
        ((UNAUTHENTICATED, CLOSING), 900.0),
        ((UNAUTHENTICATED, SENT), 0.0),
        ((), 0.0),
    ],
)
def test_what_several_recipients_say_together(desk: Desk, outcomes: tuple[Outcome, ...], seconds: float) -> None:
    for _ in range(3):
        if desk.admits():
            desk.tries(*outcomes)
    assert desk.open_seconds() == seconds


def test_each_upstream_has_a_breaker_of_its_own(desk: Desk) -> None:
    for _ in range(3):
        desk.tries(DOWN)
    assert desk.breakers.admit("globex", desk.id()) is None
    assert desk.breakers.ready_at("globex") == 0.0
    assert desk.breakers.failing_since("globex") is None


def test_where_the_file_retries_sooner_it_is_open_for_less_long_but_a_login_is_not_tried_more_often(tmp_path: Path) -> None:
    clock = ManualClock()
    log = Log(tmp_path, clock)
    desk = Desk(log, clock, Retry(first=5.0, max=20.0, expire=3600.0))
    for seconds in (5, 10, 20, 20):
        while desk.open_seconds() == 0:
            desk.tries(DOWN)
        assert desk.open_seconds() == seconds
        clock.advance(seconds)
    desk.tries(LOGIN_REFUSED)
    assert desk.open_seconds() == 15 * MINUTE
    log.text()


# -- open ------------------------------------------------------------------------------------------------------------------


def opened(desk: Desk, outcome: Outcome = DOWN) -> Desk:
    while desk.open_seconds() == 0:
        desk.tries(outcome)
    return desk


def test_an_open_one_answers_with_the_last_reply_and_a_fallback_may_be_tried(desk: Desk) -> None:
    opened(desk)
    outcome = desk.breakers.admit("acme", desk.id())
    assert outcome is not None
    assert (outcome.status, outcome.scope, outcome.fallback) == (Status.DEFERRED, Scope.UPSTREAM, True)
    assert (outcome.in_doubt, outcome.throttled) == (False, False)
    assert str(outcome.reply) == "not tried: acme has failed since 2027-01-15 08:00:00 UTC; last: Connection refused"


def test_one_that_is_open_for_its_credential_says_so(desk: Desk) -> None:
    opened(desk, LOGIN_REFUSED)
    outcome = desk.breakers.admit("acme", desk.id())
    assert outcome is not None
    assert str(outcome.reply) == "not tried: acme has refused its credential since 2027-01-15 08:00:00 UTC; last: 535 5.7.8 wrong"
    assert outcome.scope is Scope.UPSTREAM, "nobody has logged in: it is no refused login"


def test_attempts_that_had_begun_before_do_not_prolong_it(desk: Desk) -> None:
    slow = [desk.id() for _ in range(5)]
    assert all(desk.admits(id) for id in slow)
    opened(desk)
    desk.clock.advance(20)
    for id in slow:
        desk.breakers.record("acme", id, [DOWN])
    assert desk.open_seconds() == 10
    assert desk.count("opened", "connection") == 1


def test_a_success_of_an_attempt_that_had_begun_before_closes_it(desk: Desk) -> None:
    slow = desk.id()
    assert desk.admits(slow)
    opened(desk)
    desk.breakers.record("acme", slow, [SENT])
    assert desk.admits()
    assert desk.open_seconds() == 0


# -- half-open -------------------------------------------------------------------------------------------------------------


def test_when_its_time_is_up_one_message_tries_and_the_others_come_later(desk: Desk) -> None:
    opened(desk)
    desk.clock.advance(29.9)
    assert not desk.admits()
    desk.clock.advance(0.1)
    assert desk.open_seconds() == 0
    first = desk.id()
    assert desk.admits(first)
    assert not any(desk.admits() for _ in range(10))
    assert desk.open_seconds() == 30
    assert desk.breakers.due_at("acme") - desk.clock.now() == 5, "how that ends is known long before"
    assert not desk.breakers.record("acme", first, [SENT])
    assert all(desk.admits() for _ in range(10))
    assert (desk.count("opened", "connection"), desk.count("closed", "connection")) == (1, 1)
    assert len(desk.notes()) == 2


@pytest.mark.parametrize(("outcome", "first", "longest"), [(DOWN, 30.0, 15 * MINUTE), (LOGIN_REFUSED, 15 * MINUTE, 6 * HOUR)])
def test_each_time_it_is_open_for_twice_as_long_up_to_a_limit_and_that_is_told_once(
    desk: Desk, outcome: Outcome, first: float, longest: float
) -> None:
    opened(desk, outcome)
    seen = []
    for _ in range(8):
        seen.append(desk.open_seconds())
        desk.clock.advance(seen[-1])
        desk.tries(outcome)
    assert seen == [min(longest, first * 2**turn) for turn in range(8)]
    assert desk.count("opened", "connection") + desk.count("opened", "credential") == 1
    assert len(desk.notes()) == 1
    desk.clock.advance(longest)
    assert desk.tries(SENT), "what was put off for so long is worth bringing forward"
    opened(desk, outcome)
    assert desk.open_seconds() == first


def test_after_a_short_time_nothing_need_be_brought_forward(desk: Desk) -> None:
    opened(desk)
    desk.clock.advance(30)
    assert not desk.tries(SENT)


@pytest.mark.parametrize("outcomes", [(THROTTLED,), ()])
def test_a_message_that_finds_out_nothing_lets_the_next_one_try(desk: Desk, outcomes: tuple[Outcome, ...]) -> None:
    opened(desk)
    desk.clock.advance(30)
    desk.tries(*outcomes)
    first, second = desk.id(), desk.id()
    assert desk.admits(first)
    assert not desk.admits(second)
    desk.breakers.record("acme", first, [DOWN])
    assert desk.open_seconds() == 60


def test_a_message_that_breaks_every_session_does_not_keep_it_open(desk: Desk) -> None:
    poison = desk.id()
    for id in (desk.id(), desk.id(), poison):
        desk.tries(BROKEN, id=id)
    for _ in range(5):
        desk.clock.advance(30)
        desk.tries(BROKEN, id=poison)
    assert desk.open_seconds() == 0
    desk.tries(SENT)
    assert desk.admits()


def test_an_attempt_from_before_does_not_decide_for_the_message_that_tries(desk: Desk) -> None:
    slow = desk.id()
    assert desk.admits(slow)
    opened(desk)
    desk.clock.advance(30)
    first = desk.id()
    assert desk.admits(first)
    desk.breakers.record("acme", slow, [DOWN])
    assert not desk.admits()
    assert desk.open_seconds() == 30
    desk.breakers.record("acme", first, [SENT])
    assert desk.admits()


def test_a_login_that_cannot_be_tried_again_for_the_way_is_blocked_stays_to_be_tried(desk: Desk) -> None:
    opened(desk, LOGIN_REFUSED)
    desk.clock.advance(15 * MINUTE)
    desk.tries(DOWN)
    desk.tries(DOWN)
    assert desk.open_seconds() == 0
    desk.tries(DOWN)
    assert desk.open_seconds() == 30
    assert {(t.kind, t.failures) for t in desk.breakers.troubles()} == {("connection", 3), ("credential", 1)}
    desk.clock.advance(30)
    desk.tries(LOGIN_REFUSED)
    assert desk.open_seconds() == 30 * MINUTE
    assert [t.kind for t in desk.breakers.troubles()] == ["credential"]
    assert desk.count("closed", "connection") == 1


def test_a_refused_login_shows_that_the_way_is_free(desk: Desk) -> None:
    desk.tries(DOWN)
    desk.tries(DOWN)
    desk.tries(LOGIN_REFUSED)
    assert [t.kind for t in desk.breakers.troubles()] == ["credential"]
    assert desk.count("closed", "connection") == 0


# -- from outside ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [DOWN, LOGIN_REFUSED])
def test_whoever_has_reason_to_may_have_it_tried_at_once(desk: Desk, outcome: Outcome) -> None:
    opened(desk, outcome)
    desk.breakers.reset("acme")
    assert desk.open_seconds() == 0
    first = desk.id()
    assert desk.admits(first)
    assert not desk.admits(), "with one message all the same"
    desk.breakers.record("acme", first, [outcome])
    assert desk.open_seconds() > 0
    desk.breakers.reset("acme")
    desk.tries(SENT)
    assert desk.admits()


def test_to_have_one_tried_that_has_not_failed_changes_nothing(desk: Desk) -> None:
    desk.breakers.reset("acme")
    assert desk.breakers.troubles() == []
    assert desk.admits()


def test_what_fails_can_be_shown(desk: Desk) -> None:
    since = desk.clock.now()
    desk.tries(DOWN)
    assert [tuple(t) for t in desk.breakers.troubles()] == [("acme", "connection", since, 1, 0.0, "Connection refused")]
    desk.clock.advance(10)
    desk.tries(CLOSING)
    desk.tries(CLOSING)
    desk.clock.advance(10)
    assert [tuple(t) for t in desk.breakers.troubles()] == [("acme", "connection", since, 3, 20.0, "421 4.3.2 down")]
    assert desk.breakers.failing_since("acme") == since
    desk.clock.advance(100)
    assert [t.open_seconds for t in desk.breakers.troubles()] == [0.0]
