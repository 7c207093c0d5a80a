"""The table of fates: total, and never too hopeful."""

from itertools import product

import pytest

from relay.mail.outcome import (
    TABLE,
    Failure,
    Outcome,
    Phase,
    Scope,
    Status,
    outcome_of_failure,
    outcome_of_reply,
    row_for,
    rows_by_phase,
)
from relay.mail.reply import Reply

TEXTS = ("", "Ok", "Relay access denied", "Relaying denied", "Email address is not verified", "Try again later")
ENHANCED = ("", "2.0.0", "4.3.2", "4.7.0", "4.7.28", "5.1.1", "5.7.1", "5.7.60", "5.7", "nonsense")
BEFORE_FINAL = tuple(phase for phase in Phase if phase is not Phase.FINAL)
SETUP = (Phase.RESOLVE, Phase.CONNECT, Phase.TLS, Phase.GREETING, Phase.EHLO, Phase.STARTTLS)

SENT, DEFERRED, FAILED = Status.SENT, Status.DEFERRED, Status.FAILED
RECIPIENT, MESSAGE, UPSTREAM, CREDENTIAL = Scope.RECIPIENT, Scope.MESSAGE, Scope.UPSTREAM, Scope.CREDENTIAL


def replies() -> list[Reply]:
    """Every code with every enhanced code and text that the table might look at."""
    return [Reply(code, enhanced, text) for code in (0, *range(200, 600)) for enhanced in ENHANCED[:2] for text in TEXTS[:1]] + [
        Reply(code, enhanced, text)
        for code in (
            0,
            211,
            220,
            250,
            251,
            252,
            334,
            354,
            421,
            432,
            450,
            451,
            452,
            454,
            500,
            530,
            534,
            535,
            538,
            550,
            552,
            553,
            554,
        )
        for enhanced in ENHANCED
        for text in TEXTS
    ]


@pytest.mark.parametrize("phase", Phase)
def test_every_reply_has_a_fate_and_only_a_2xx_after_the_last_octet_is_sent(phase: Phase) -> None:
    for reply in replies():
        outcome = outcome_of_reply(phase, reply)
        assert (outcome.status is SENT) == (phase is Phase.FINAL and 200 <= reply.code < 300), reply
        assert (outcome.phase, outcome.reply) == (phase, reply)
        check_laws(outcome)


@pytest.mark.parametrize(("phase", "failure"), list(product(Phase, Failure)))
def test_every_failure_has_a_fate_and_none_is_sent(phase: Phase, failure: Failure) -> None:
    outcome = outcome_of_failure(phase, failure, "the words")
    assert outcome.status is not SENT
    assert outcome.reply == Reply(0, "", "the words")
    assert outcome.in_doubt == (phase is Phase.FINAL)
    check_laws(outcome)


def check_laws(outcome: Outcome) -> None:
    """What no row may break."""
    assert not outcome.in_doubt or (outcome.phase is Phase.FINAL and outcome.status is DEFERRED), outcome
    assert not (outcome.fallback and (outcome.in_doubt or outcome.throttled)), outcome
    assert not outcome.throttled or (outcome.status is DEFERRED and outcome.scope is UPSTREAM), outcome
    assert outcome.scope is not RECIPIENT or outcome.phase is Phase.RCPT, outcome
    assert not (outcome.status is FAILED and outcome.scope is CREDENTIAL), outcome
    if outcome.phase in (*SETUP, Phase.AUTH):
        assert outcome.status is DEFERRED, outcome


def test_nothing_but_a_5xx_or_a_lacking_extension_fails_a_message() -> None:
    for phase, reply in product(Phase, replies()):
        assert outcome_of_reply(phase, reply).status is not FAILED or reply.code >= 500
    failed = [(phase, failure) for phase, failure in product(Phase, Failure) if row_for(phase, failure).status is FAILED]
    assert failed == [(Phase.MAIL, Failure.LACKING)]


def test_a_message_in_doubt_is_only_one_without_an_answer() -> None:
    for reply in replies():
        assert outcome_of_reply(Phase.FINAL, reply).in_doubt == (reply.code == 0 or 300 <= reply.code < 400), reply


@pytest.mark.parametrize(
    ("phases", "code", "enhanced", "text", "expected"),
    [
        # upstream: try the next
        (SETUP, 421, "", "", (DEFERRED, UPSTREAM, "fallback")),
        (tuple(Phase), 421, "4.3.2", "shutting down", (DEFERRED, UPSTREAM, "fallback")),
        (SETUP, 554, "5.7.1", "no", (DEFERRED, UPSTREAM, "fallback")),
        (SETUP, 220, "", "hello", (DEFERRED, UPSTREAM, "fallback")),
        ((Phase.STARTTLS,), 454, "4.7.0", "TLS not available", (DEFERRED, UPSTREAM, "fallback")),
        ((Phase.AUTH,), 435, "", "", (DEFERRED, UPSTREAM, "fallback")),
        # credential
        (tuple(Phase), 530, "5.7.0", "", (DEFERRED, CREDENTIAL, "fallback")),
        (tuple(Phase), 534, "5.7.9", "", (DEFERRED, CREDENTIAL, "fallback")),
        (tuple(Phase), 535, "5.7.8", "", (DEFERRED, CREDENTIAL, "fallback")),
        (tuple(Phase), 538, "5.7.11", "", (DEFERRED, CREDENTIAL, "fallback")),
        ((Phase.AUTH,), 500, "", "", (DEFERRED, CREDENTIAL, "fallback")),
        ((Phase.RCPT, Phase.MAIL, Phase.DATA), 554, "5.7.1", "<a@b.c>: Relay access denied", (DEFERRED, CREDENTIAL, "fallback")),
        # throttling
        (tuple(set(Phase) - {Phase.STARTTLS}), 454, "4.7.0", "", (DEFERRED, UPSTREAM, "throttled")),
        (tuple(Phase), 432, "4.3.2", "", (DEFERRED, UPSTREAM, "throttled")),
        (tuple(Phase), 421, "4.7.28", "", (DEFERRED, UPSTREAM, "throttled")),
        ((Phase.AUTH,), 454, "", "", (DEFERRED, UPSTREAM, "throttled")),
        # permission
        ((Phase.MAIL,), 550, "5.7.1", "", (FAILED, UPSTREAM, "fallback")),
        ((Phase.MAIL,), 553, "", "", (FAILED, UPSTREAM, "fallback")),
        ((Phase.DATA, Phase.FINAL), 550, "5.7.60", "", (FAILED, UPSTREAM, "fallback")),
        ((Phase.FINAL,), 554, "", "Message rejected: Email address is not verified.", (FAILED, UPSTREAM, "fallback")),
        # recipient and message
        ((Phase.RCPT,), 450, "4.2.1", "", (DEFERRED, RECIPIENT, "")),
        ((Phase.RCPT,), 452, "4.5.3", "", (DEFERRED, RECIPIENT, "")),
        ((Phase.RCPT,), 550, "5.1.1", "", (FAILED, RECIPIENT, "")),
        ((Phase.RCPT,), 250, "2.1.5", "", (DEFERRED, UPSTREAM, "")),
        ((Phase.MAIL, Phase.DATA, Phase.CONTENT, Phase.FINAL), 451, "4.3.0", "", (DEFERRED, MESSAGE, "")),
        ((Phase.MAIL, Phase.DATA, Phase.CONTENT, Phase.FINAL), 552, "5.3.4", "", (FAILED, MESSAGE, "")),
        ((Phase.FINAL,), 250, "2.0.0", "", (SENT, MESSAGE, "")),
        ((Phase.MAIL, Phase.DATA, Phase.CONTENT), 250, "2.0.0", "", (DEFERRED, UPSTREAM, "fallback")),
        ((Phase.FINAL,), 354, "", "", (DEFERRED, UPSTREAM, "in doubt")),
    ],
)
def test_a_reply_means_what_the_contract_says(
    phases: tuple[Phase, ...], code: int, enhanced: str, text: str, expected: tuple[Status, Scope, str]
) -> None:
    for phase in phases:
        outcome = outcome_of_reply(phase, Reply(code, enhanced, text))
        flags = (("in doubt", outcome.in_doubt), ("throttled", outcome.throttled), ("fallback", outcome.fallback))
        assert (outcome.status, outcome.scope, " ".join(word for word, holds in flags if holds)) == expected, phase


def test_each_row_decides_something() -> None:
    events = [*Failure, *replies()]
    deciding = {id(row_for(phase, event)) for phase in Phase for event in events}
    assert [row for row in TABLE if id(row) not in deciding] == []


def test_the_table_can_be_read_in_the_order_of_a_session() -> None:
    rows = list(rows_by_phase())
    phases = [phase for phase, _ in rows]
    assert phases == sorted(phases, key=list(Phase).index)
    assert len(rows) == sum(len(row.phases) for row in TABLE)
    assert all(row.why for _, row in rows)
