"""What follows an attempt: every combination of outcomes that the contract names, as a table."""

from itertools import product

import pytest

from relay.config.model import Retry
from relay.delivery.retry import Plan, delay_seconds, give_up, plan
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


def test_an_upstream_that_the_route_does_not_name_has_no_fallback() -> None:
    decided = decide({"a": DOWN}, claim_of("a", upstream="gone"))
    assert decided.fallback == ""
    assert decided.next == Next(NOW + 60, Lane("acme", "r"))


OUTCOMES = (SENT, REFUSED, REJECTED, GREYLISTED, BUSY, DOWN, LOGIN_REFUSED, THROTTLED, FORBIDDEN, FORBIDDEN_FROM, LACKING, LOST)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("age", [0.0, RETRY.expire + 1])
@pytest.mark.parametrize("doubted", [False, True])
@pytest.mark.parametrize("shut", [(), ("acme",), ("spare",), ("spare", "house"), UPSTREAMS])
def test_the_laws_hold_for_every_pair_of_outcomes(upstream: str, age: float, doubted: bool, shut: tuple[str, ...]) -> None:
    for first, second in product(OUTCOMES, OUTCOMES):
        claim = claim_of(Recipient("a", in_doubt=doubted), "b", upstream=upstream, age=age)
        given = {"a": first, "b": second}
        decided = closed(given, claim, **dict.fromkeys(shut, 600.0))
        after = fates(decided)
        assert age or decided.fallback not in shut, "nobody is sent where nothing is taken"
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


# -- breakers, and fallbacks for which it is too early ------------------------------------------------------------------------

NOT_TRIED = outcome_of_failure(Phase.RESOLVE, Failure.UNREACHABLE, "not tried: acme has failed")


def closed(
    outcomes: dict[str, Outcome], claim: Claim | None = None, *, jitter: float = 1.0, tried: bool = True, **seconds: float
) -> Plan:  # fmt: skip
    """Decide while upstreams take nothing for so many seconds from now."""
    until = {name: NOW + after for name, after in seconds.items()}
    given = claim or claim_of(*outcomes)
    return plan(given, outcomes, upstreams=UPSTREAMS, retry=RETRY, now=NOW, jitter=jitter, closed=until, tried=tried)


@pytest.mark.parametrize("tried", [True, False])
def test_fallbacks_that_take_nothing_at_the_moment_are_passed_over(tried: bool) -> None:
    decided = closed({"a": DOWN if tried else NOT_TRIED}, acme=30, spare=30, tried=tried)
    assert decided.next == Next(NOW, Lane("house", "r"), counted=False)
    assert decided.fallback == "house"
    assert closed({"a": DOWN}, spare=0).fallback == "spare", "its time has just come"


def test_what_was_not_tried_and_has_nowhere_to_go_waits_for_the_first_that_takes_mail_and_does_not_count() -> None:
    for times, seconds in (
        ({"acme": 30, "spare": 60, "house": 90}, 30),
        ({"acme": 900, "spare": 60, "house": 90}, 60),
        ({"acme": 900, "spare": 90, "house": 60}, 60),
    ):
        decided = closed({"a": NOT_TRIED}, tried=False, jitter=0.9, **times)
        assert decided.next == Next(NOW + seconds, Lane("acme", "r"), counted=False)
        assert decided.fallback == ""
        assert fates(decided) == {"a": Status.DEFERRED}


def test_what_waits_for_a_breaker_comes_after_it_has_opened_and_spread_over_a_fifth_of_the_time() -> None:
    claim = claim_of("a", upstream="acme")
    for jitter, after in ((0.9, 0.0), (1.0, 0.1), (1.1, 0.2)):
        for seconds in (30.0, 900.0):
            decided = plan(
                claim, {"a": NOT_TRIED}, upstreams=("acme",), retry=RETRY, now=NOW, jitter=jitter, closed={"acme": NOW + seconds},
                tried=False,
            )  # fmt: skip
            assert decided.next is not None
            assert decided.next.when == pytest.approx(NOW + seconds * (1 + after))


@pytest.mark.parametrize(("seconds", "waits"), [(1800.0, 1800.0 + 180), (3500.0, 3500.0 + 180), (21_600.0, 1.1 * 3600)])
def test_what_waits_for_a_breaker_is_spread_over_minutes_and_put_off_no_further_than_any_mail(seconds: float, waits: float) -> None:
    for tried in (True, False):
        decided = plan(
            claim_of("a"), {"a": NOT_TRIED}, upstreams=("acme",), retry=RETRY, now=NOW, jitter=1.1, closed={"acme": NOW + seconds},
            tried=tried,
        )  # fmt: skip
        assert decided.next is not None
        assert decided.next.when == pytest.approx(NOW + waits)


def test_what_was_not_tried_goes_at_once_where_the_breaker_has_closed_meanwhile() -> None:
    decided = plan(claim_of("a"), {"a": NOT_TRIED}, upstreams=("acme",), retry=RETRY, now=NOW, jitter=1.0, tried=False)
    assert decided.next == Next(NOW, Lane("acme", "r"), counted=False)


def test_after_a_last_fallback_that_was_not_tried_the_round_counts_for_the_others_were() -> None:
    decided = closed({"a": NOT_TRIED}, claim_of("a", upstream="house", attempt=3), tried=False, house=900)
    assert decided.next == Next(NOW + 240, Lane("acme", "r"))


def test_mail_that_has_failed_waits_until_its_upstream_takes_mail_or_a_fallback_does() -> None:
    assert plan(claim_of("a"), {"a": DOWN}, upstreams=("acme",), retry=RETRY, now=NOW, jitter=0.9, closed={"acme": NOW + 900}).next == Next(
        NOW + 900, Lane("acme", "r")
    )
    assert closed({"a": DOWN}, jitter=0.9, acme=900, spare=600, house=500).next == Next(NOW + 500, Lane("acme", "r"))
    assert closed({"a": DOWN}, spare=600, house=500).next == Next(NOW + 60, Lane("acme", "r"))


@pytest.mark.parametrize("outcome", [DOWN, NOT_TRIED])
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_what_is_in_doubt_waits_for_its_own_upstream_also_where_that_is_closed(outcome: Outcome, upstream: str) -> None:
    doubted = claim_of(Recipient("a", in_doubt=True), upstream=upstream)
    decided = closed({"a": outcome}, doubted, jitter=0.9, tried=outcome is DOWN, **{upstream: 900})
    assert decided.next == Next(NOW + 900, Lane(upstream, "r"), counted=outcome is DOWN)
    assert decided.fallback == ""


@pytest.mark.parametrize("tried", [True, False])
def test_a_closed_breaker_never_puts_mail_off_past_its_expiry(tried: bool) -> None:
    for upstreams in (("acme",), UPSTREAMS):
        decided = plan(
            claim_of("a", age=RETRY.expire - 10), {"a": NOT_TRIED}, upstreams=upstreams, retry=RETRY, now=NOW, jitter=1.1, tried=tried,
            closed=dict.fromkeys(upstreams, NOW + 900),
        )  # fmt: skip
        assert decided.next is not None
        assert decided.next.when == NOW + 10


def test_what_expires_untried_fails_with_what_the_breaker_remembers() -> None:
    claim = claim_of("a", age=RETRY.expire)
    decided = plan(
        claim, {"a": NOT_TRIED}, upstreams=("acme",), retry=RETRY, now=NOW, jitter=1.0, closed={"acme": NOW + 900}, tried=False
    )  # fmt: skip
    assert decided.next is None
    assert decided.outcomes["a"].reply.text == "delivery time expired; last reply: not tried: acme has failed"
    assert decided.failed == [(claim.envelope.recipients[0], NOT_TRIED)]


def test_mail_that_expires_gets_its_fallback_also_where_it_is_too_early_for_it() -> None:
    assert closed({"a": DOWN}, claim_of("a", age=RETRY.expire), spare=3600, house=3600).fallback == "spare"


@pytest.mark.parametrize("outcome", [FORBIDDEN, LACKING])
def test_a_permission_fault_waits_for_a_fallback_that_takes_nothing_at_the_moment(outcome: Outcome) -> None:
    decided = closed({"a": outcome}, jitter=0.9, spare=40, house=40)
    assert fates(decided) == {"a": Status.DEFERRED}
    assert decided.next == Next(NOW + 40, Lane("acme", "r"))


def test_throttled_mail_comes_back_uncounted_also_where_a_breaker_is_open() -> None:
    decided = closed({"a": THROTTLED}, jitter=0.9, acme=900)
    assert decided.next == Next(NOW + 900, Lane("acme", "r"), counted=False)


# -- the end ---------------------------------------------------------------------------------------------------------------


def test_who_is_given_up_has_failed_for_the_reason_given() -> None:
    reason = outcome_of_reply(Phase.RESOLVE, Reply(550, "", "no"))
    claim = claim_of("a", Recipient("b", in_doubt=True))
    decided = give_up(claim, reason._replace(status=Status.FAILED))
    assert fates(decided) == {"a": Status.FAILED, "b": Status.FAILED}
    assert decided.next is None
    assert [r.address for r, _ in decided.failed] == ["a", "b"]


def test_held_mail_whose_time_is_up_has_expired() -> None:
    held = DOWN._replace(reply=Reply(0, "", "held: no route"), fallback=False)
    decided = give_up(claim_of("a"), held)
    assert str(decided.outcomes["a"].reply) == "4.4.7 delivery time expired; last reply: held: no route"
    assert [o for _, o in decided.failed] == [held]
