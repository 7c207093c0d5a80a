"""What follows an attempt: every combination of outcomes that the contract names, as a table."""

from itertools import product

import pytest

from relay.config.model import Retry
from relay.delivery.retry import Plan, delay_seconds, plan
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Failure, Outcome, Phase, Scope, Status, outcome_of_failure, outcome_of_reply
from relay.mail.reply import Reply
from relay.spool.base import Claim, Content, Lane, MessageId, Next

NOW = 1_800_000_000.0
RETRY = Retry(first=60.0, max=3600.0, expire=4 * 86400.0)
UPSTREAMS = ("acme", "spare", "house")

SENT = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "Ok"))
REFUSED = outcome_of_reply(Phase.RCPT, Reply(550, "5.1.1", "nobody here"))
REJECTED = outcome_of_reply(Phase.FINAL, Reply(554, "5.6.0", "no"))
GREYLISTED = outcome_of_reply(Phase.RCPT, Reply(450, "4.2.0", "later"))
BUSY = outcome_of_reply(Phase.MAIL, Reply(451, "4.3.0", "later"))
DOWN = outcome_of_failure(Phase.CONNECT, Failure.UNREACHABLE, "refused")
UNTRUSTED = outcome_of_failure(Phase.TLS, Failure.UNTRUSTED, "expired")
LOGIN_REFUSED = outcome_of_reply(Phase.AUTH, Reply(535, "5.7.8", "wrong"))
THROTTLED = outcome_of_reply(Phase.MAIL, Reply(454, "4.7.0", "slow down"))
FORBIDDEN = outcome_of_reply(Phase.MAIL, Reply(550, "5.7.1", "not you"))
FORBIDDEN_FROM = outcome_of_reply(Phase.FINAL, Reply(554, "5.7.60", "not this From"))
LACKING = outcome_of_failure(Phase.MAIL, Failure.LACKING, "no SMTPUTF8")
LOST = outcome_of_failure(Phase.FINAL, Failure.TIMEOUT, "no reply")


def claim_of(*recipients: Recipient | str, upstream: str = "acme", attempt: int = 1, age: float = 0.0) -> Claim:
    named = tuple(Recipient(r) if isinstance(r, str) else r for r in recipients)
    return Claim(
        MessageId("1"), 1, Lane(upstream, "r"), Envelope("app@acme.example", named), Content(2, b"\r\n"), NOW - age, attempt, NOW + 900
    )


def decide(
    outcomes: dict[str, Outcome], claim: Claim | None = None, *, upstreams: tuple[str, ...] = UPSTREAMS, jitter: float = 1.0
) -> Plan:
    return plan(claim or claim_of(*outcomes), outcomes, upstreams=upstreams, retry=RETRY, now=NOW, jitter=jitter)


def fates(decided: Plan) -> dict[str, Status]:
    return {address: outcome.status for address, outcome in decided.outcomes.items()}


# -- one recipient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [SENT, REFUSED, REJECTED])
def test_what_is_decided_is_not_tried_again(outcome: Outcome) -> None:
    decided = decide({"a": outcome})
    assert decided.next is None
    assert decided.fallback == ""
    assert dict(decided.outcomes) == {"a": outcome}
    assert [(r.address, o) for r, o in decided.failed] == ([] if outcome is SENT else [("a", outcome)])


@pytest.mark.parametrize("outcome", [DOWN, UNTRUSTED, LOGIN_REFUSED, FORBIDDEN, FORBIDDEN_FROM, LACKING])
def test_a_fault_of_the_upstream_moves_the_message_to_the_next_one_at_once_and_uncounted(outcome: Outcome) -> None:
    decided = decide({"a": outcome})
    assert decided.fallback == "spare"
    assert decided.next == Next(NOW, Lane("spare", "r"), counted=False)
    assert fates(decided) == {"a": Status.DEFERRED}
    assert not decided.failed


def test_fallbacks_are_tried_in_their_order() -> None:
    assert decide({"a": DOWN}, claim_of("a", upstream="acme")).fallback == "spare"
    assert decide({"a": DOWN}, claim_of("a", upstream="spare")).fallback == "house"
    assert decide({"a": DOWN}, claim_of("a", upstream="house")).fallback == ""


@pytest.mark.parametrize("outcome", [DOWN, UNTRUSTED, LOGIN_REFUSED])
def test_after_the_last_fallback_the_message_waits_and_begins_again_with_the_first_upstream(outcome: Outcome) -> None:
    decided = decide({"a": outcome}, claim_of("a", upstream="house"))
    assert decided.next == Next(NOW + 60, Lane("acme", "r"))
    assert fates(decided) == {"a": Status.DEFERRED}


@pytest.mark.parametrize("outcome", [FORBIDDEN, FORBIDDEN_FROM, LACKING])
def test_a_permission_fault_and_a_lacking_extension_fail_where_no_fallback_is_left(outcome: Outcome) -> None:
    for claim, upstreams in ((claim_of("a", upstream="house"), UPSTREAMS), (claim_of("a"), ("acme",))):
        decided = decide({"a": outcome}, claim, upstreams=upstreams)
        assert decided.next is None
        assert [(r.address, o) for r, o in decided.failed] == [("a", outcome)]


@pytest.mark.parametrize("outcome", [GREYLISTED, BUSY])
def test_a_4xx_about_the_recipient_or_the_message_waits_at_the_same_upstream(outcome: Outcome) -> None:
    for upstream in UPSTREAMS:
        decided = decide({"a": outcome}, claim_of("a", upstream=upstream))
        assert decided.next == Next(NOW + 60, Lane(upstream, "r"))
        assert decided.fallback == ""


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_what_is_in_doubt_waits_at_the_same_upstream(upstream: str) -> None:
    decided = decide({"a": LOST}, claim_of("a", upstream=upstream))
    assert decided.next == Next(NOW + 60, Lane(upstream, "r"))
    assert decided.fallback == ""


@pytest.mark.parametrize("outcome", [DOWN, UNTRUSTED, LOGIN_REFUSED, GREYLISTED, BUSY, LOST])
def test_doubt_of_an_earlier_attempt_keeps_the_message_at_its_upstream(outcome: Outcome) -> None:
    for upstream in UPSTREAMS:
        decided = decide({"a": outcome}, claim_of(Recipient("a", in_doubt=True), upstream=upstream))
        assert decided.fallback == ""
        assert decided.next is not None
        assert decided.next.lane.upstream == upstream


@pytest.mark.parametrize("outcome", [FORBIDDEN, FORBIDDEN_FROM, LACKING])
def test_a_permission_fault_of_a_message_in_doubt_fails_for_it_may_not_go_elsewhere(outcome: Outcome) -> None:
    decided = decide({"a": outcome}, claim_of(Recipient("a", in_doubt=True)))
    assert decided.next is None
    assert [r.address for r, _ in decided.failed] == ["a"]


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("attempt", [1, 2, 9])
def test_throttled_mail_waits_for_the_same_upstream_and_no_attempt_is_counted(upstream: str, attempt: int) -> None:
    decided = decide({"a": THROTTLED}, claim_of("a", upstream=upstream, attempt=attempt))
    assert decided.next == Next(NOW + 60, Lane(upstream, "r"), counted=False)
    assert decided.throttled
    assert decided.fallback == ""


# -- time ------------------------------------------------------------------------------------------------------------------


def test_the_delay_doubles_from_first_up_to_max() -> None:
    delays = [delay_seconds(RETRY, attempts) for attempts in range(1, 10)]
    assert delays == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert delay_seconds(RETRY, 100_000) == 3600


@pytest.mark.parametrize(("attempt", "jitter", "seconds"), [(1, 0.9, 54), (1, 1.1, 66), (3, 1.0, 240), (3, 0.9, 216), (50, 1.1, 3960)])
def test_the_next_time_is_the_delay_times_the_jitter(attempt: int, jitter: float, seconds: float) -> None:
    decided = decide({"a": BUSY}, claim_of("a", attempt=attempt), jitter=jitter)
    assert decided.next is not None
    assert decided.next.when == pytest.approx(NOW + seconds)


def test_the_next_time_is_never_past_the_expiry() -> None:
    decided = decide({"a": BUSY}, claim_of("a", attempt=30, age=RETRY.expire - 10))
    assert decided.next is not None
    assert decided.next.when == NOW + 10


@pytest.mark.parametrize("outcome", [GREYLISTED, BUSY, LOST, THROTTLED])
@pytest.mark.parametrize("age", [RETRY.expire, RETRY.expire + 5])
def test_what_has_expired_fails_with_4_4_7_and_its_last_reply(outcome: Outcome, age: float) -> None:
    decided = decide({"a": outcome}, claim_of("a", age=age))
    assert decided.next is None
    failed = decided.outcomes["a"]
    assert failed.status is Status.FAILED
    assert failed.reply.enhanced == "4.4.7"
    assert str(outcome.reply) in failed.reply.text
    assert failed.in_doubt == outcome.in_doubt


def test_the_report_of_what_has_expired_is_about_the_last_reply_itself() -> None:
    decided = decide({"a": GREYLISTED, "b": REFUSED}, claim_of("a", "b", age=RETRY.expire))
    assert [(r.address, o) for r, o in decided.failed] == [("a", GREYLISTED), ("b", REFUSED)]


def test_an_expired_message_still_gets_the_fallbacks_that_it_has_not_met() -> None:
    expired = RETRY.expire + 5
    assert decide({"a": DOWN}, claim_of("a", age=expired)).fallback == "spare"
    last = decide({"a": DOWN}, claim_of("a", upstream="house", age=expired))
    assert last.next is None
    assert last.outcomes["a"].reply.enhanced == "4.4.7"


# -- several recipients ----------------------------------------------------------------------------------------------------


def test_only_the_recipients_that_wait_are_asked_whether_a_fallback_may_be_used() -> None:
    decided = decide({"a": SENT, "b": DOWN, "c": REFUSED})
    assert decided.fallback == "spare"
    assert fates(decided) == {"a": Status.SENT, "b": Status.DEFERRED, "c": Status.FAILED}
    assert [r.address for r, _ in decided.failed] == ["c"]


@pytest.mark.parametrize("other", [GREYLISTED, BUSY, LOST])
def test_a_recipient_who_must_stay_keeps_the_others_with_him(other: Outcome) -> None:
    decided = decide({"a": DOWN, "b": other})
    assert decided.fallback == ""
    assert decided.next == Next(NOW + 60, Lane("acme", "r"))
    assert fates(decided) == {"a": Status.DEFERRED, "b": Status.DEFERRED}


@pytest.mark.parametrize("other", [GREYLISTED, BUSY, LOST])
@pytest.mark.parametrize("fault", [FORBIDDEN, FORBIDDEN_FROM, LACKING])
def test_a_permission_fault_beside_a_recipient_who_must_stay_is_not_final_while_a_fallback_is_left(other: Outcome, fault: Outcome) -> None:
    decided = decide({"a": fault, "b": other})
    assert fates(decided) == {"a": Status.DEFERRED, "b": Status.DEFERRED}
    assert not decided.failed
    assert decided.next == Next(NOW + 60, Lane("acme", "r"))
    at_last = decide({"a": fault, "b": other}, claim_of("a", "b", upstream="house"))
    assert fates(at_last) == {"a": Status.FAILED, "b": Status.DEFERRED}
    assert [(r.address, o) for r, o in at_last.failed] == [("a", fault)]


def test_a_recipient_in_doubt_whom_his_upstream_now_refuses_fails_while_the_others_wait() -> None:
    decided = decide({"a": FORBIDDEN_FROM, "b": GREYLISTED}, claim_of(Recipient("a", in_doubt=True), "b"))
    assert fates(decided) == {"a": Status.FAILED, "b": Status.DEFERRED}


def test_a_permission_fault_that_could_not_move_in_time_is_reported_with_its_reply() -> None:
    decided = decide({"a": FORBIDDEN_FROM, "b": GREYLISTED}, claim_of("a", "b", age=RETRY.expire))
    assert fates(decided) == {"a": Status.FAILED, "b": Status.FAILED}
    assert [(r.address, o) for r, o in decided.failed] == [("a", FORBIDDEN_FROM), ("b", GREYLISTED)]


def test_one_throttled_recipient_makes_the_attempt_uncounted_and_keeps_the_message() -> None:
    decided = decide({"a": DOWN, "b": THROTTLED, "c": SENT})
    assert decided.next == Next(NOW + 60, Lane("acme", "r"), counted=False)
    assert decided.throttled


def test_an_upstream_that_the_route_does_not_name_has_no_fallback() -> None:
    decided = decide({"a": DOWN}, claim_of("a", upstream="gone"))
    assert decided.fallback == ""
    assert decided.next == Next(NOW + 60, Lane("acme", "r"))


OUTCOMES = (SENT, REFUSED, REJECTED, GREYLISTED, BUSY, DOWN, LOGIN_REFUSED, THROTTLED, FORBIDDEN, FORBIDDEN_FROM, LACKING, LOST)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("age", [0.0, RETRY.expire + 1])
@pytest.mark.parametrize("doubted", [False, True])
def test_the_laws_hold_for_every_pair_of_outcomes(upstream: str, age: float, doubted: bool) -> None:
    for first, second in product(OUTCOMES, OUTCOMES):
        claim = claim_of(Recipient("a", in_doubt=doubted), "b", upstream=upstream, age=age)
        given = {"a": first, "b": second}
        decided = decide(given, claim)
        after = fates(decided)
        waiting = [address for address, status in after.items() if status is Status.DEFERRED]
        assert after.keys() == given.keys(), "nobody is forgotten"
        assert (decided.next is not None) == bool(waiting), "who waits has a time, and only who waits"
        assert {r.address for r, _ in decided.failed} == {a for a, s in after.items() if s is Status.FAILED}, "who failed is told of"
        for address, outcome in given.items():
            assert (outcome is SENT) == (after[address] is Status.SENT), "nothing is sent that was not, and nothing sent is undone"
            if outcome in (REFUSED, REJECTED):
                assert after[address] is Status.FAILED
        in_doubt = {a for a, o in given.items() if o.in_doubt} | ({"a"} if doubted else set())
        if in_doubt & set(waiting):
            assert decided.next is not None
            assert decided.next.lane.upstream == upstream, "what is in doubt never leaves its upstream"
        if decided.next is not None:
            assert decided.next.when >= NOW
            assert decided.next.lane.route == "r"
            if any(given[a].scope in (Scope.RECIPIENT, Scope.MESSAGE) for a in waiting):
                assert decided.next.lane.upstream == upstream, "a 4xx of a recipient or a message is no reason to go elsewhere"
        if age and not decided.fallback:
            assert not waiting, "what has expired waits no longer"
