"""What is known of large providers: their settings, and what their own replies lead to.

The replies are in the providers' own words, from their documents and from what people reported; nobody asked the providers themselves.
"""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from relay.config import quantities
from relay.config.providers import PROVIDERS, Provider, ProviderName, filled, known_as
from relay.config.upstreams import Upstream
from relay.mail.outcome import Meaning, Outcome, Phase, Row, Scope, Status, outcome_of_reply, row_for
from relay.mail.reply import Reply, parse_reply
from tests.unit.test_outcome import ENHANCED, check_laws, flags_of

ROOT = Path(__file__).parents[2]
NAMES = get_args(ProviderName)
CODES = (0, 220, 250, 354, 403, 421, 432, 450, 451, 454, 501, 502, 525, 530, 534, 535, 550, 552, 553, 554)
SENT, DEFERRED, FAILED = Status.SENT, Status.DEFERRED, Status.FAILED
RECIPIENT, MESSAGE = Scope.RECIPIENT, Scope.MESSAGE

SLOW = (DEFERRED, Scope.UPSTREAM, "throttled")
ACCOUNT = (DEFERRED, Scope.CREDENTIAL, "fallback")
SENDER = (FAILED, Scope.UPSTREAM, "fallback")
AUTH, MAIL, RCPT, DATA, FINAL = Phase.AUTH, Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.FINAL

CORPUS: list[tuple[str, Phase, str, tuple[Status, Scope, str], Meaning]] = [
    ("google", AUTH, "534-5.7.9 Application-specific password required. Learn more at\r\n534 5.7.9 ", ACCOUNT, Meaning.APP_PASSWORD),
    ("google", AUTH, "535-5.7.8 Username and Password not accepted. Learn more at\r\n535 5.7.8 ", ACCOUNT, Meaning.CREDENTIAL),
    ("google", AUTH, "534-5.7.14", ACCOUNT, Meaning.ACCOUNT),
    ("google", AUTH, "454 4.7.0 Too many login attempts, please try again later. w6sm - gsmtp", SLOW, Meaning.THROTTLED),
    ("google", AUTH, "454 4.7.0 Cannot authenticate due to temporary system problem. Try again later.", SLOW, Meaning.THROTTLED),
    ("google", AUTH, "504 5.7.4 Unrecognized Authentication Type.", ACCOUNT, Meaning.MECHANISM),
    ("google", MAIL, "530-5.7.0 Authentication Required. Learn more at\r\n530 5.7.0 ", ACCOUNT, Meaning.AUTH_NEEDED),
    ("google", MAIL, "530 5.7.0 Must issue a STARTTLS command first. 41sm - gsmtp", ACCOUNT, Meaning.TLS_NEEDED),
    ("google", FINAL, "550-5.4.5 Daily user sending limit exceeded. For more information on Gmail\r\n550 5.4.5", SLOW, Meaning.QUOTA),
    ("google", MAIL, "550 5.4.5 Daily sending quota exceeded.", SLOW, Meaning.QUOTA),
    ("google", MAIL, "550 5.7.1 Email quota exceeded.", SLOW, Meaning.QUOTA),
    ("google", RCPT, "550 5.7.0 Mail Sending denied. This error occurs if the sender account is disabled or", ACCOUNT, Meaning.ACCOUNT),
    ("google-relay", MAIL, "550-5.7.1 Invalid credentials for relay [192.0.2.1]. The IP address", ACCOUNT, Meaning.ADDRESS),
    ("google-relay", RCPT, "550-5.7.0 Mail relay denied [192.0.2.1]. Invalid credentials for relay for\r\n550", ACCOUNT, Meaning.ADDRESS),
    ("google-relay", RCPT, "450 4.2.1 Peak SMTP relay limit exceeded for customer. This is a temporary error.", SLOW, Meaning.THROTTLED),
    ("google-relay", RCPT, "550 5.4.5 Daily SMTP relay limit exceeded for user.", SLOW, Meaning.QUOTA),
    ("google-relay", RCPT, "550 5.7.1 Daily SMTP relay limit exceeded for customer.", SLOW, Meaning.QUOTA),
    ("google-relay", Phase.EHLO, "421 4.7.0 Try again later, closing connection. (EHLO) - gsmtp", SLOW, Meaning.THROTTLED),
    ("microsoft365", AUTH, "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect.", ACCOUNT, Meaning.CREDENTIAL),
    ("microsoft365", AUTH, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", AUTH, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", AUTH, "535 5.7.139 Authentication unsuccessful, basic authentication is disabled.", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", AUTH, "535 5.7.139 Authentication unsuccessful, the request did not meet the", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", AUTH, "535 5.7.3 Authentication unsuccessful", ACCOUNT, Meaning.CREDENTIAL),
    ("microsoft365", MAIL, "550 5.7.30 Basic authentication is not supported for Client Submission.", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", AUTH, "550 5.7.30 Basic authentication is not supported for Client Submission.", ACCOUNT, Meaning.AUTH_DISABLED),
    ("microsoft365", MAIL, "530 5.7.57 Client not authenticated to send mail.", ACCOUNT, Meaning.AUTH_NEEDED),
    ("microsoft365", MAIL, "530 5.7.57 SMTP; Client was not authenticated to send anonymous mail during", ACCOUNT, Meaning.AUTH_NEEDED),
    ("microsoft365", RCPT, "550 5.7.64 TenantAttribution; Relay Access Denied", ACCOUNT, Meaning.RELAYING),
    ("microsoft365", RCPT, "550 5.7.708 Service unavailable. Access denied, traffic not accepted from this IP.", ACCOUNT, Meaning.ADDRESS),
    ("microsoft365", FINAL, "550 5.1.8 Access denied, bad outbound sender", ACCOUNT, Meaning.ACCOUNT),
    ("microsoft365", FINAL, "550 5.7.705 Access denied, tenant has exceeded threshold.", ACCOUNT, Meaning.ACCOUNT),
    ("microsoft365", FINAL, "432 4.3.2 Concurrent connections limit exceeded. Visit", SLOW, Meaning.THROTTLED),
    ("microsoft365", AUTH, "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded", SLOW, Meaning.THROTTLED),
    ("microsoft365", MAIL, "451 4.7.500 Server busy. Please try again later from [192.0.2.1]. (S77719)", SLOW, Meaning.THROTTLED),
    ("microsoft365", MAIL, "451 4.7.650 Access denied, please try again later", SLOW, Meaning.THROTTLED),
    ("microsoft365", FINAL, "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to", SLOW, Meaning.QUOTA),
    ("microsoft365", FINAL, "554 5.2.2 mailbox full; STOREDRV.Submission.Exception:QuotaExceededException", SLOW, Meaning.QUOTA),
    ("microsoft365", FINAL, "550 5.1.90 Your message can't be sent because you've reached your daily limit for", SLOW, Meaning.QUOTA),
    ("microsoft365", FINAL, "550 5.7.232 Your message can't be sent because your trial tenant has exceeded its", SLOW, Meaning.QUOTA),
    ("microsoft365", FINAL, "550 5.7.233 Your message can't be sent because your tenant exceeded its daily limit", SLOW, Meaning.QUOTA),
    ("microsoft365", FINAL, "550 5.7.750 Client blocked from sending from unregistered domain", SENDER, Meaning.SENDER),
    ("microsoft365", FINAL, "554 5.2.252 SendAsDenied; a@acme.example not allowed to send as b@acme.example;", SENDER, Meaning.SENDER),
    ("microsoft365", FINAL, "554 5.2.0 STOREDRV.Submission.Exception:SendAsDeniedException", SENDER, Meaning.SENDER),
    ("microsoft365", MAIL, "550 5.7.60 SMTP; Client does not have permissions to send as this sender", SENDER, Meaning.SENDER),
    ("ses", Phase.GREETING, "421 Too many concurrent SMTP connections", SLOW, Meaning.THROTTLED),
    ("ses", FINAL, "454 Throttling failure: Maximum sending rate exceeded.", SLOW, Meaning.THROTTLED),
    ("ses", FINAL, "454 Throttling failure: Daily message quota exceeded.", SLOW, Meaning.QUOTA),
    ("ses", AUTH, "454 Temporary authentication failure", SLOW, Meaning.THROTTLED),
    ("ses", FINAL, "454 Temporary service failure", (DEFERRED, MESSAGE, ""), Meaning.OTHER),
    ("ses", MAIL, "530 Authentication required", ACCOUNT, Meaning.AUTH_NEEDED),
    ("ses", AUTH, "535 Authentication Credentials Invalid", ACCOUNT, Meaning.CREDENTIAL),
    ("ses", AUTH, "535 Account not subscribed to SES", ACCOUNT, Meaning.ACCOUNT),
    ("ses", MAIL, "501 Invalid MAIL FROM address provided", SENDER, Meaning.SENDER),
    ("ses", FINAL, "554 Message rejected: Email address is not verified. The following identities failed the", SENDER, Meaning.SENDER),
    ("ses", FINAL, "554 Access denied: User `arn:aws:iam::1:user/x' is not authorized to perform", SENDER, Meaning.SENDER),
    ("ses", FINAL, "554 Message rejected: Sending paused for this account. For more information, please check", ACCOUNT, Meaning.ACCOUNT),
    ("ses", FINAL, "552 Message is too long.", (FAILED, MESSAGE, ""), Meaning.OTHER),
    ("sendgrid", AUTH, "451 Authentication failed: Maximum credits exceeded", SLOW, Meaning.QUOTA),
    ("sendgrid", AUTH, "535 Authentication failed: Bad username / password", ACCOUNT, Meaning.CREDENTIAL),
    ("sendgrid", AUTH, "535 Authentication failed: The provided authorization grant is invalid, expired, or", ACCOUNT, Meaning.CREDENTIAL),
    ("sendgrid", MAIL, "550 Unauthenticated senders not allowed", ACCOUNT, Meaning.AUTH_NEEDED),
    ("sendgrid", FINAL, "550 The from address does not match a verified Sender Identity. Mail cannot be sent", SENDER, Meaning.SENDER),
    ("sendgrid", FINAL, "403 You are not authorized to send from that email", (DEFERRED, Scope.UPSTREAM, "fallback"), Meaning.SENDER),
    ("mailgun", AUTH, "535 5.7.0 Mailgun is not loving your login or password", ACCOUNT, Meaning.CREDENTIAL),
    ("mailgun", RCPT, "550 5.7.1 Relaying denied", ACCOUNT, Meaning.AUTH_NEEDED),
    ("mailgun", DATA, "421 Domain sandbox1.mailgun.org is not allowed to send: Sandbox subdomains are for test", ACCOUNT, Meaning.ACCOUNT),
    ("mailgun", FINAL, "421 Domain mg.acme.example is not allowed to send: Account disabled", ACCOUNT, Meaning.ACCOUNT),
    ("mailgun", FINAL, "421 Domain mg.acme.example is not allowed to send: recipient limit exceeded", SLOW, Meaning.QUOTA),
    ("postmark", AUTH, "535 5.7.8 Error: authentication failed: UGFzc3dvcmQ6", ACCOUNT, Meaning.CREDENTIAL),
    ("brevo", AUTH, "525 5.7.1 Unauthorized IP address", ACCOUNT, Meaning.ADDRESS),
    ("brevo", AUTH, "535 5.7.8 Authentication failed", ACCOUNT, Meaning.CREDENTIAL),
    ("brevo", MAIL, "502 5.7.0 Please authenticate first", ACCOUNT, Meaning.AUTH_NEEDED),
    ("brevo", FINAL, "502 5.7.0 Your SMTP account is not yet activated. Please contact us at", ACCOUNT, Meaning.ACCOUNT),
    ("brevo", FINAL, "450 Your SMTP account is not yet activated. Please contact us at contact@sendinblue.com", ACCOUNT, Meaning.ACCOUNT),
    ("zoho", FINAL, "553 Relaying disallowed as noreply@acme.example", SENDER, Meaning.SENDER),
    ("zoho", FINAL, "552 Relaying disallowed as noreply@acme.example", SENDER, Meaning.SENDER),
    ("zoho", FINAL, "550 5.4.6 Unusual sending activity detected. <a", ACCOUNT, Meaning.ACCOUNT),
    ("zoho", AUTH, "554 5.1.8 Sender Address Blocked", ACCOUNT, Meaning.ACCOUNT),
    ("zoho", FINAL, "554 5.1.8 Email Outgoing Blocked", ACCOUNT, Meaning.ACCOUNT),
    ("zoho", AUTH, "535 Authentication Failed", ACCOUNT, Meaning.CREDENTIAL),
    ("zoho", MAIL, "530 5.5.1 Authentication Required.", ACCOUNT, Meaning.AUTH_NEEDED),
    ("yahoo", AUTH, "535 5.7.0 (#AUTH005) Too many bad auth attempts.", ACCOUNT, Meaning.APP_PASSWORD),
    ("yahoo", AUTH, "535 5.7.0 (#MBR1212) Incorrect username or password.", ACCOUNT, Meaning.CREDENTIAL),
    ("yahoo", FINAL, "550 Request failed; Mailbox unavailable", SENDER, Meaning.SENDER),
]  # fmt: skip

# What providers say of one recipient, or of one message: no row of theirs may make more of it.
ABOUT_A_RECIPIENT = [
    "550 5.1.1 The email account that you tried to reach does not exist. Please try double-checking the address.",
    "550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup",
    "550 5.4.1 Recipient address rejected: Access denied. [AM0EUR02FT020.eop-EUR02.prod.protection.outlook.com]",
    "550 5.7.1 The user or domain that you are sending to (or from) has a policy that prohibited the mail that you sent.",
    "550 5.2.1 The email account that you tried to reach is disabled.",
    "550 5.7.703 Your message can't be delivered because messages to x@y.example are blocked by your organization.",
    "554 5.7.1 <you@example.org>: Recipient address rejected: Access denied",
    "550 5.5.0 Requested action not taken: mailbox unavailable",
    "550 Request failed; Mailbox unavailable",
    "552 5.2.2 The email account that you tried to reach is over quota.",
    "554 5.2.2 mailbox full",
    "452 4.2.2 The email account that you tried to reach is over quota.",
    "450 4.2.1 The user you are trying to contact is receiving mail too quickly.",
    "450 4.1.1 You tried to send to an address that has bounced before",
    "452 4.5.3 Your message has too many recipients.",
]
ABOUT_A_MESSAGE = [
    "552 5.3.4 Message size exceeds fixed maximum message size",
    "552-5.7.0 This message was blocked because its content presents a potential\r\n552 5.7.0 security issue.",
    "554 5.6.0 Mail message is malformed. Not accepted.",
    "550 5.7.1 Our system has detected that this message is likely unsolicited mail.",
    "451 4.3.0 Mail server temporarily rejected message.",
]


def heard(said: str) -> Reply:
    return parse_reply([line.encode() for line in said.split("\r\n")])


def fate(outcome: Outcome) -> tuple[Status, Scope, str]:
    return outcome.status, outcome.scope, flags_of(outcome)


def every_reply() -> list[Reply]:
    said = [*(said for _, _, said, *_ in CORPUS), *ABOUT_A_RECIPIENT, *ABOUT_A_MESSAGE]
    return [*map(heard, said), *(Reply(code, enhanced, "") for code, enhanced in product(CODES, ENHANCED))]


@pytest.mark.parametrize(
    ("name", "phase", "said", "expected", "meaning"), CORPUS, ids=[f"{name} {phase.value} {said[:40]}" for name, phase, said, *_ in CORPUS]
)
def test_the_words_of_providers_are_understood(
    name: str, phase: Phase, said: str, expected: tuple[Status, Scope, str], meaning: Meaning
) -> None:
    reply, own = heard(said), PROVIDERS[name].replies
    outcome = outcome_of_reply(phase, reply, own=own)
    assert fate(outcome) == expected
    assert row_for(phase, reply, own=own).meaning is meaning
    check_laws(outcome)


def test_each_row_of_a_provider_is_hit_by_something_it_says() -> None:
    hit = {(name, id(row_for(phase, heard(words), own=PROVIDERS[name].replies))) for name, phase, words, *_ in CORPUS}
    assert [(name, row) for name in NAMES for row in own_rows(name) if (name, id(row)) not in hit] == []


def own_rows(name: str) -> tuple[Row, ...]:
    """Those that the relay shares with Google's mailboxes are said by these."""
    rows = PROVIDERS[name].replies
    return tuple(row for row in rows if row not in PROVIDERS["google"].replies) if name == "google-relay" else rows


@pytest.mark.parametrize("name", NAMES)
def test_the_laws_of_the_table_hold_with_the_rows_of_every_provider(name: str) -> None:
    own = PROVIDERS[name].replies
    for phase, reply in product(Phase, every_reply()):
        outcome = outcome_of_reply(phase, reply, own=own)
        assert (outcome.status is SENT) == (phase is FINAL and reply.positive), (phase, reply)
        assert outcome.status is not FAILED or reply.code >= 500, (phase, reply)
        assert outcome.in_doubt == (phase is FINAL and (reply.code == 0 or 300 <= reply.code < 400)), (phase, reply)
        check_laws(outcome)


@pytest.mark.parametrize(("name", "said"), list(product(NAMES, ABOUT_A_RECIPIENT)))
def test_no_row_of_a_provider_makes_more_of_a_refused_recipient(name: str, said: str) -> None:
    own = outcome_of_reply(RCPT, heard(said), own=PROVIDERS[name].replies)
    assert own.scope is RECIPIENT
    assert own == outcome_of_reply(RCPT, heard(said))


@pytest.mark.parametrize(("name", "said"), list(product(NAMES, ABOUT_A_MESSAGE)))
def test_no_row_of_a_provider_makes_more_of_a_refused_message(name: str, said: str) -> None:
    own = outcome_of_reply(FINAL, heard(said), own=PROVIDERS[name].replies)
    assert own.scope is MESSAGE
    assert own == outcome_of_reply(FINAL, heard(said))


def test_a_provider_s_rows_have_phrases_in_lower_case_and_codes_of_refusals() -> None:
    for name, row in ((each, row) for each in NAMES for row in PROVIDERS[each].replies):
        assert isinstance(row.event, tuple), name
        code, _, phrases = row.event
        assert code[0] in "45", (name, row)
        assert phrases == "" or (isinstance(phrases, tuple) and phrases and all(each == each.lower() != "" for each in phrases)), (
            name,
            row,
        )
        assert row.meaning is not Meaning.OTHER, (name, row)


def test_what_helps_is_said_for_what_a_provider_says_of_the_login() -> None:
    """Only the provider's own words can say where to click."""
    for name in NAMES:
        said = {row.meaning for row in PROVIDERS[name].replies} & {Meaning.APP_PASSWORD, Meaning.AUTH_DISABLED, Meaning.ADDRESS}
        assert said <= PROVIDERS[name].help.keys(), name
        assert PROVIDERS[name].login or name == "generic"


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of a table in a page, by provider."""
    lines = [
        [cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in (ROOT / page).read_text().splitlines() if line[:1] == "|"
    ]
    return {cells[0]: cells[1:] for cells in lines if cells[0] in NAMES}


def test_the_readme_counts_what_was_played() -> None:
    told = {name: int(cells[0]) for name, cells in rows_of("README.md").items()}
    assert told == Counter(name for name, *_ in CORPUS)


def test_the_page_on_providers_says_what_is_filled_in() -> None:
    told = rows_of("docs/providers.md")
    assert set(told) == set(NAMES)
    for name, (host, security, *_, limits) in told.items():
        known = Upstream.model_validate({"provider": name, "host": "smtp.x.example"})
        assert host.startswith(("yours to name", str(PROVIDERS[name].settings.get("host"))))
        assert security == f"{known.security} ({known.port})"
        for rate in (*known.limits.rate, *known.limits.recipient_rate):
            assert str(rate) in limits, name


# -- settings ----------------------------------------------------------------------------------------------------------------


def upstream(name: str, **keys: Any) -> Upstream:
    wanted = {"host": "email-smtp.eu-central-1.amazonaws.com"} if name == "ses" else {"host": "smtp.x.example"} if name == "generic" else {}
    return Upstream.model_validate({"provider": name, **wanted, **keys})


@pytest.mark.parametrize(
    ("name", "host", "port", "security"),
    [
        ("google", "smtp.gmail.com", 587, "starttls"),
        ("google-relay", "smtp-relay.gmail.com", 587, "starttls"),
        ("microsoft365", "smtp.office365.com", 587, "starttls"),
        ("ses", "email-smtp.eu-central-1.amazonaws.com", 587, "starttls"),
        ("sendgrid", "smtp.sendgrid.net", 587, "starttls"),
        ("mailgun", "smtp.mailgun.org", 587, "starttls"),
        ("postmark", "smtp.postmarkapp.com", 587, "starttls"),
        ("brevo", "smtp-relay.brevo.com", 587, "starttls"),
        ("zoho", "smtp.zoho.com", 465, "tls"),
        ("yahoo", "smtp.mail.yahoo.com", 465, "tls"),
        ("generic", "smtp.x.example", 587, "starttls"),
    ],
)
def test_a_provider_fills_host_port_and_security(name: str, host: str, port: int, security: str) -> None:
    known = upstream(name)
    assert (known.host, known.port, known.security, known.verify) == ((host,), port, security, True)
    assert known.known is PROVIDERS[name]
    assert upstream(name, host="other.example", port=2525).model_dump(include={"host", "port"}) == {
        "host": ("other.example",),
        "port": 2525,
    }


def test_every_name_of_a_provider_has_one() -> None:
    assert set(NAMES) == set(PROVIDERS)


def test_the_port_follows_the_security_of_the_file_not_that_of_the_provider() -> None:
    assert upstream("google", security="tls").port == 465
    assert upstream("zoho", security="starttls").port == 587


def test_limits_are_laid_over_those_of_the_provider_key_by_key() -> None:
    limits = upstream("microsoft365", limits={"rate": ["10/m", "500/d"]}).limits
    assert limits.rate == (quantities.Rate(10, 60), quantities.Rate(500, 86400))
    assert (limits.connections, limits.recipient_rate, limits.recipients) == (3, (quantities.Rate(10_000, 86400),), 500)


def test_what_a_file_says_of_a_provider_is_not_changed_by_filling() -> None:
    given = {"provider": "microsoft365", "limits": {"connections": 1}}
    assert filled(given)["limits"] == {"connections": 1, "rate": "30/m", "recipient_rate": "10000/d", "recipients": 500}
    assert given == {"provider": "microsoft365", "limits": {"connections": 1}}
    assert PROVIDERS["microsoft365"].settings["limits"]["connections"] == 3


def test_only_ses_and_generic_need_a_host() -> None:
    for name in NAMES:
        if name in ("ses", "generic"):
            with pytest.raises(ValidationError):
                Upstream.model_validate({"provider": name})
        else:
            assert Upstream.model_validate({"provider": name}).host


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("smtp.gmail.com", "google"),
        ("SMTP.Gmail.com.", "google"),
        ("smtp.office365.com", "microsoft365"),
        ("acme-example.mail.protection.outlook.com", "microsoft365"),
        ("email-smtp.us-east-1.amazonaws.com", "ses"),
        ("smtp.eu.mailgun.org", "mailgun"),
        ("smtp.zoho.eu", "zoho"),
        ("smtppro.zoho.com", "zoho"),
        ("smtp.acme.example", "generic"),
        ("smtp.gmail.com.evil.example", "generic"),
        ("127.0.0.1", "generic"),
    ],
)
def test_a_provider_is_known_by_its_host_too(host: str, name: str) -> None:
    assert known_as(None, (host,)) is PROVIDERS[name]
    assert Upstream.model_validate({"host": host.rstrip(".")}).replies == PROVIDERS[name].replies


def test_the_provider_that_the_file_names_goes_before_the_host() -> None:
    assert known_as("generic", ("smtp.gmail.com",)) == Provider({}, needs_login=False)
    assert known_as("ses", ("smtp.gmail.com",)) is PROVIDERS["ses"]
