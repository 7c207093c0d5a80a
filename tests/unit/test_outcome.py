"""The table of fates: total, and never too hopeful."""

import time
from itertools import product

import pytest

from relay.mail.outcome import (
    SAYINGS,
    TABLE,
    Failure,
    Meaning,
    Outcome,
    Phase,
    Scope,
    Status,
    outcome_of_failure,
    outcome_of_reply,
    row_for,
    rows_by_phase,
)
from relay.mail.reply import Reply, parse_reply

TEXTS = ("", "Ok", "Try again later", *(phrases[-1].capitalize() for phrases in SAYINGS.values()))
ENHANCED = ("", "2.0.0", "4.1.1", "4.2.1", "4.3.2", "4.7.0", "4.7.28", "5.1.1",
            "5.2.252", "5.3.4", "5.4.5", "5.6.0", "5.7.1", "5.7.60", "5.7", "nonsense")  # fmt: skip
BEFORE_FINAL = tuple(phase for phase in Phase if phase is not Phase.FINAL)
SPOKEN = tuple(Phase)[tuple(Phase).index(Phase.GREETING) :]  # nobody replies before
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
    assert failed == [(Phase.MAIL, Failure.LACKING), (Phase.RCPT, Failure.LACKING)]


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
        (SPOKEN, 530, "5.7.0", "", (DEFERRED, CREDENTIAL, "fallback")),
        (SPOKEN, 534, "5.7.9", "", (DEFERRED, CREDENTIAL, "fallback")),
        (SPOKEN, 535, "5.7.8", "", (DEFERRED, CREDENTIAL, "fallback")),
        (SPOKEN, 538, "5.7.11", "", (DEFERRED, CREDENTIAL, "fallback")),
        ((Phase.AUTH,), 500, "", "", (DEFERRED, CREDENTIAL, "fallback")),
        ((Phase.RCPT, Phase.MAIL, Phase.DATA), 554, "5.7.1", "<a@b.c>: Relay access denied", (DEFERRED, CREDENTIAL, "fallback")),
        # throttling
        (tuple(set(SPOKEN) - {Phase.STARTTLS}), 454, "4.7.0", "", (DEFERRED, UPSTREAM, "throttled")),
        (SPOKEN, 432, "4.3.2", "", (DEFERRED, UPSTREAM, "throttled")),
        (SPOKEN, 421, "4.7.28", "", (DEFERRED, UPSTREAM, "throttled")),
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
        assert (outcome.status, outcome.scope, flags_of(outcome)) == expected, phase


def flags_of(outcome: Outcome) -> str:
    flags = (("in doubt", outcome.in_doubt), ("throttled", outcome.throttled), ("fallback", outcome.fallback))
    return " ".join(word for word, holds in flags if holds)


# What servers say, in their own words, and what must follow from it.
WORDS = [
    # Postfix
    (Phase.RCPT, "554 5.7.1 <you@example.org>: Relay access denied", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "454 4.7.1 <you@example.org>: Relay access denied", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "553 5.7.1 <app@acme.example>: Sender address rejected: not owned by user globex", FAILED, UPSTREAM, "fallback"),
    (Phase.RCPT, "553 5.7.1 <app@acme.example>: Sender address rejected: not logged in", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "450 4.1.8 <app@acme.example>: Sender address rejected: Domain not found", DEFERRED, RECIPIENT, ""),
    (Phase.GREETING, "421 4.7.0 mx Error: too many connections from 192.0.2.1", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "450 4.7.1 Error: too much mail from 192.0.2.1", DEFERRED, UPSTREAM, "throttled"),
    (Phase.RCPT, "452 4.5.3 Error: too many recipients", DEFERRED, RECIPIENT, ""),
    (Phase.MAIL, "452 4.3.1 Insufficient system storage", DEFERRED, MESSAGE, ""),
    (Phase.RCPT, "450 4.2.0 <you@example.org>: Recipient address rejected: Greylisted", DEFERRED, RECIPIENT, ""),
    (Phase.MAIL, "552 5.3.4 Message size exceeds fixed limit", FAILED, MESSAGE, ""),
    (Phase.MAIL, "421 4.7.0 mx.acme.example Error: too many errors", DEFERRED, MESSAGE, ""),
    (Phase.RCPT, "421 4.7.0 Too many errors on this connection, closing transmission channel", DEFERRED, MESSAGE, ""),
    (Phase.DATA, "421 4.7.0 mx.acme.example Too many bad commands; closing connection", DEFERRED, MESSAGE, ""),
    # Exim, Sendmail, OpenSMTPD, qmail, Dovecot, cPanel
    (Phase.RCPT, "550 relay not permitted", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "550 5.7.1 <you@example.org>... Relaying denied. Proper authentication required.", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "450 4.7.1 Sender rate overlimit - 61.2 / 1h", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "421 too many messages in this connection", DEFERRED, UPSTREAM, "fallback"),
    (Phase.MAIL, "421 4.7.0 Too many messages in this session", DEFERRED, UPSTREAM, "fallback"),
    (Phase.MAIL, "421 Max message per connection reached, closing transmission channel", DEFERRED, UPSTREAM, "fallback"),
    (Phase.MAIL, "421 4.7.0 Too many messages from you", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "421 too many messages in this connection", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "451 4.7.1 Ratelimit for the mailbox exceeded", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 Domain acme.example has exceeded the max emails per hour (150/150 (100%)) allowed", DEFERRED, UPSTREAM, "throttled"),
    (Phase.GREETING, "554 5.3.2 Too many connections", DEFERRED, UPSTREAM, "throttled"),
    # Exchange and Microsoft 365
    (Phase.RCPT, "550 5.7.1 Unable to relay", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.MAIL, "530 5.7.57 Client not authenticated to send mail", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.MAIL, "550 5.7.57 SMTP; Client was not authenticated to send anonymous mail during MAIL FROM", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.AUTH, "535 5.7.139 Authentication unsuccessful, basic authentication is disabled", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.FINAL, "550 5.7.60 SMTP; Client does not have permissions to send as this sender", FAILED, UPSTREAM, "fallback"),
    (Phase.RCPT, "550 5.7.60 SMTP; Client does not have permissions", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "554 5.2.252 SendAsDenied; a@acme.example not allowed to send as b@acme.example", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "554 5.2.0 STOREDRV.Submission.Exception:SendAsDeniedException.MapiExceptionSendAsDenied", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded", DEFERRED, UPSTREAM, "throttled"),
    (Phase.GREETING, "421 4.3.2 The maximum number of concurrent connections has exceeded a limit", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "421 4.3.2 Service not active", DEFERRED, UPSTREAM, "fallback"),
    (Phase.MAIL, "451 4.7.500 Server busy. Please try again later", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 5.7.232 Your message can't be sent because your tenant exceeded its daily limit", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 5.7.508 Access denied, 192.0.2.1 has exceeded permitted limits", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 5.7.501 Access denied, spam abuse detected", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.MAIL, "550 5.7.502 Access denied, banned sender", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.FINAL, "550 5.1.8 Access denied, bad outbound sender", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "550 5.7.505 Access denied, banned recipient", FAILED, RECIPIENT, ""),
    (Phase.FINAL, "550 5.7.509 Access denied, sending domain does not pass DMARC verification", FAILED, UPSTREAM, "fallback"),
    # Google
    (Phase.AUTH, "454 4.7.0 Too many login attempts, please try again later", DEFERRED, UPSTREAM, "throttled"),
    (Phase.AUTH, "534 5.7.9 Application-specific password required", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.MAIL, "421 4.7.0 Try again later, closing connection", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 5.4.5 Daily user sending limit exceeded", DEFERRED, UPSTREAM, "throttled"),
    (Phase.DATA, "550 5.4.5 Daily sending quota exceeded", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "550 5.4.5 Come back tomorrow", DEFERRED, UPSTREAM, "throttled"),
    (Phase.RCPT, "452 4.2.2 The recipient's inbox is out of storage space and has a message quota", DEFERRED, RECIPIENT, ""),
    (Phase.RCPT, "450 4.2.1 The user is receiving mail too quickly, rate limit", DEFERRED, RECIPIENT, ""),
    (Phase.RCPT, "550 5.2.1 The account is throttled", FAILED, RECIPIENT, ""),
    (Phase.FINAL, "550 5.7.26 This mail is unauthenticated, which poses a security risk", FAILED, MESSAGE, ""),
    # what speaks of one recipient or message, in words that others could take for more
    (Phase.RCPT, "550 5.1.1 <you@throttled.example>: Recipient address rejected: User unknown", FAILED, RECIPIENT, ""),
    (Phase.RCPT, "550 <ratelimit@example.org>: no such user", FAILED, RECIPIENT, ""),
    (Phase.RCPT, "550 No such user ratelimit@example.org here", FAILED, RECIPIENT, ""),
    (Phase.RCPT, "451 <throttle@example.org>: try again later", DEFERRED, RECIPIENT, ""),
    (Phase.FINAL, "550 rejected, sender throttle@acme.example is on our list", FAILED, MESSAGE, ""),
    (Phase.RCPT, "550 5.1.1 <you@example.org>: undeliverable address: host mx said: 550 Relay access denied", FAILED, RECIPIENT, ""),
    (Phase.RCPT, "450 4.1.1 <you@example.org>: unverified address: host mx said: 421 Too many connections", DEFERRED, RECIPIENT, ""),
    (Phase.RCPT, "552 5.7.0 The user has used up his message quota", FAILED, RECIPIENT, ""),
    (Phase.FINAL, "552 5.3.4 Message size: rate limit of octets exceeded", FAILED, MESSAGE, ""),
    (Phase.FINAL, "552 Message size exceeds permitted limits", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.6.0 Message refused: too many messages in one", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Rejected as phishing: reset your app password", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Rejected: spam abuse detected", FAILED, MESSAGE, ""),
    (Phase.FINAL, "550 5.7.26 This mail is unauthenticated. The sender must authenticate with SPF or DKIM.", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "550 5.7.1 SPF fail: authentication required", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "451 4.7.1 DMARC: authentication required", DEFERRED, MESSAGE, ""),
    # what repeats the message: links, subjects and other quotations are words of anybody's choice
    (Phase.FINAL, '554 5.7.1 Spam: subject "Sending quota exceeded" is on our list', FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Spam: 'Authentication required' is phishing", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Spam: ‘Relay access denied’ and “rate limit”", FAILED, MESSAGE, ""),
    (Phase.FINAL, "550 5.7.1 Rejected. Subject: Your sending limit is reached", FAILED, MESSAGE, ""),
    (Phase.FINAL, "451 4.7.1 Looks like spam (subject=too many messages)", DEFERRED, MESSAGE, ""),
    (Phase.FINAL, '554 5.7.1 "Rejected." Your words: "Sending quota exceeded"', FAILED, MESSAGE, ""),
    (Phase.FINAL, '554 5.7.1 "throttle@example.com" and "see throttle@example.com" are on our list', FAILED, MESSAGE, ""),
    (Phase.FINAL, '554 5.7.1 "See www.throttle.example/throttle" or https://x.example/throttle', FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Spam: “to “Rate limit” yours” and «to «Sending quota» yours»", FAILED, MESSAGE, ""),
    (Phase.FINAL, "550 5.7.1 Blocked link https://bad.example/Rate%20limit/throttle?x=daily-limit", FAILED, MESSAGE, ""),
    (Phase.FINAL, "550 5.7.1 Blocked link www.throttle.example", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Rejected (http://dkim.example/), see https://mx.example/why#sending-rate", FAILED, MESSAGE, ""),
    # and what only looks like it
    (Phase.FINAL, "554 User `arn:aws:iam::1:user/*' is not authorized to perform `ses:SendRawEmail' on `*'", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "554 User 'arn:aws:iam::1:x' is not authorized to perform 'ses:SendRawEmail'", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "550 You can't send: the account's daily limit isn't unlimited, it's used up", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, '550 "Daily limit" of "acme" is used up', DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 “Daily limit” of “acme” is used up", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "550 The users' daily limits, and their hosts' too, are used up", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "550 Wait 'til tomorrow: the daily limit isn't renewed before", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "550 The account is subject to a daily limit", DEFERRED, UPSTREAM, "throttled"),
    (Phase.RCPT, "554 Relay access denied, see https://mx.example/why", DEFERRED, CREDENTIAL, "fallback"),
    # Amazon, SendGrid, Zoho
    (Phase.FINAL, "454 Throttling failure: Maximum sending rate exceeded.", DEFERRED, UPSTREAM, "throttled"),
    (Phase.MAIL, "454 Throttling failure: Daily message quota exceeded.", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "554 Message rejected: Email address is not verified.", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "554 Message rejected: Sending suspended for this account.", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.FINAL, "554 Access denied: User `x` is not authorized to perform `ses:SendRawEmail`", FAILED, UPSTREAM, "fallback"),
    (Phase.FINAL, "550 The from address does not match a verified Sender Identity.", FAILED, UPSTREAM, "fallback"),
    (Phase.AUTH, "451 Authentication failed: Maximum credits exceeded", DEFERRED, UPSTREAM, "throttled"),
    (Phase.FINAL, "550 5.4.6 Unusual sending activity detected.", DEFERRED, CREDENTIAL, "fallback"),
    # logins: in these words it is never the recipient or the message
    (Phase.AUTH, "535 5.7.8 Error: application-specific password required", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.MAIL, "550 5.7.1 Basic authentication is disabled for this mailbox", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.RCPT, "550 SMTP AUTH is disabled", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.AUTH, "504 5.5.4 Unrecognized authentication type", DEFERRED, CREDENTIAL, "fallback"),
    # not what they look like
    (Phase.FINAL, "250 2.0.0 Ok, relay access denied to nobody, throttling off", SENT, MESSAGE, ""),
    (Phase.AUTH, "535 5.7.8 Too many messages from you, rate limit", DEFERRED, CREDENTIAL, "fallback"),
    (Phase.FINAL, "552 5.2.2 Mailbox quota exceeded", FAILED, MESSAGE, ""),
    (Phase.FINAL, "554 5.7.1 Message contains a virus", FAILED, MESSAGE, ""),
    (Phase.STARTTLS, "454 4.7.0 TLS not available due to local problem", DEFERRED, UPSTREAM, "fallback"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "event", "meaning"),
    [
        (Phase.MAIL, Reply(530, "5.7.0", "Must issue a STARTTLS command first"), Meaning.TLS_NEEDED),
        (Phase.AUTH, Reply(538, "5.7.11", "Encryption required for requested authentication mechanism"), Meaning.TLS_NEEDED),
        (Phase.MAIL, Reply(530, "5.7.0", "Authentication required"), Meaning.AUTH_NEEDED),
        (Phase.AUTH, Reply(535, "5.7.8", "Authentication credentials invalid"), Meaning.CREDENTIAL),
        (Phase.AUTH, Reply(554, "", "no"), Meaning.CREDENTIAL),
        (Phase.AUTH, Reply(534, "5.7.9", "too weak"), Meaning.MECHANISM),
        (Phase.AUTH, Reply(504, "5.5.4", "Unrecognized"), Meaning.MECHANISM),
        (Phase.AUTH, Reply(502, "5.5.1", "Command not implemented"), Meaning.MECHANISM),
        (Phase.AUTH, Failure.LACKING, Meaning.MECHANISM),
        (Phase.AUTH, Reply(534, "5.7.9", "Application-specific password required"), Meaning.APP_PASSWORD),
        (Phase.AUTH, Reply(535, "5.7.139", "basic authentication is disabled"), Meaning.AUTH_DISABLED),
        (Phase.MAIL, Reply(550, "5.7.30", "Basic authentication is not supported for Client Submission"), Meaning.AUTH_DISABLED),
        (Phase.RCPT, Reply(554, "5.7.1", "Relay access denied"), Meaning.RELAYING),
        (Phase.MAIL, Reply(553, "5.7.1", "not you"), Meaning.SENDER),
        (Phase.FINAL, Reply(554, "", "Email address is not verified"), Meaning.SENDER),
        (Phase.FINAL, Reply(550, "5.7.501", "Access denied, spam abuse detected"), Meaning.ACCOUNT),
        (Phase.MAIL, Reply(421, "4.7.0", "later"), Meaning.THROTTLED),
        (Phase.FINAL, Reply(454, "", "Throttling failure: Maximum sending rate exceeded"), Meaning.THROTTLED),
        (Phase.FINAL, Reply(454, "", "Throttling failure: Daily message quota exceeded"), Meaning.QUOTA),
        (Phase.DATA, Reply(421, "", "hourly limit reached"), Meaning.QUOTA),
        (Phase.RCPT, Reply(550, "5.1.1", "nobody"), Meaning.OTHER),
        (Phase.CONNECT, Failure.UNREACHABLE, Meaning.OTHER),
    ],
)
def test_a_row_says_what_to_look_at(phase: Phase, event: Reply | Failure, meaning: Meaning) -> None:
    assert row_for(phase, event).meaning is meaning


@pytest.mark.parametrize("unit", ["“", "‘", "«", " '", "`", ' "', "<", " a@", "subject ", "www."])
def test_what_a_reply_is_made_of_costs_linear_time(unit: str) -> None:
    """An upstream may say as much to each of a thousand recipients."""
    reply = Reply(550, "5.1.0", (unit * 100_000)[:100_000])
    started = time.process_time()
    row_for(Phase.RCPT, reply)
    assert time.process_time() - started < 2  # it takes 5 ms; where each quotation looks for its end, 10 s and more


def test_a_meaning_goes_with_its_fate() -> None:
    """So that what a person is told to do is what the relay waits for."""
    for row in TABLE:
        assert row.throttled == (row.meaning in (Meaning.THROTTLED, Meaning.QUOTA)) or row.in_doubt, row
        assert row.meaning is not Meaning.SENDER or (row.scope, row.fallback) == (UPSTREAM, True), row
        if row.meaning in (Meaning.CREDENTIAL, Meaning.APP_PASSWORD, Meaning.AUTH_DISABLED, Meaning.AUTH_NEEDED, Meaning.ACCOUNT):
            assert (row.status, row.scope, row.fallback) == (DEFERRED, CREDENTIAL, True), row


@pytest.mark.parametrize(("phase", "said", "status", "scope", "then"), WORDS, ids=[said for _, said, *_ in WORDS])
def test_the_words_of_real_servers_are_understood(phase: Phase, said: str, status: Status, scope: Scope, then: str) -> None:
    outcome = outcome_of_reply(phase, parse_reply([said.encode()]))
    assert (outcome.status, outcome.scope, flags_of(outcome)) == (status, scope, then)
    check_laws(outcome)


def test_what_is_no_reply_is_repeated_safely_and_not_at_length() -> None:
    text = outcome_of_failure(Phase.GREETING, Failure.NONSENSE, "not a reply: \x1b[2J\r\n250 " + 9000 * "x").reply.text
    assert text.startswith("not a reply:  [2J 250 x") and text.isprintable() and len(text) < 3000


def test_each_phrase_is_heard_in_any_case_and_decides() -> None:
    """With codes that alone would say something else, or the one code that the saying is about."""
    for saying, phrases in SAYINGS.items():
        rows = [row for row in TABLE if not isinstance(row.event, Failure) and row.event[2] == saying]
        assert rows
        for phrase, text in product(phrases, ("{}", "<a@b.c>: {}, sorry", "go away: {}")):
            assert phrase == phrase.lower()
            code = {"STARTTLS first": 530, "session full": 421, "too many errors": 421}.get(saying, 550)
            assert row_for(Phase.MAIL, Reply(code, "", text.format(phrase.upper()))) in rows, phrase


def test_each_row_decides_something() -> None:
    idle = {id(row) for row in TABLE}
    for event in [*Failure, *replies()]:
        idle -= {id(row_for(phase, event)) for phase in Phase}
        if not idle:
            break
    assert [row for row in TABLE if id(row) in idle] == []


def test_the_table_can_be_read_in_the_order_of_a_session() -> None:
    rows = list(rows_by_phase())
    phases = [phase for phase, _ in rows]
    assert phases == sorted(phases, key=list(Phase).index)
    assert len(rows) == sum(len(row.phases) for row in TABLE)
    assert all(row.why for _, row in rows)
