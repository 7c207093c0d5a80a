"""Decide what one SMTP reply or network failure means for one recipient.

The only place where a code becomes a fate. Everything is a table, so that an operator's
"why was this deferred?" has one page to read. Pure: no clock, no I/O.

Laws: every (phase, event) pair has an entry; an unknown one is Deferred, never Sent.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from relay.mail.reply import Reply, told


class Phase(Enum):
    """How far an attempt had come, in the order of an SMTP session."""

    RESOLVE = "resolve"
    CONNECT = "connect"
    TLS = "tls"
    GREETING = "greeting"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"  # octets are under way, the last one is not yet handed to the transport
    FINAL = "final"  # the last octet is handed over: from here to the reply the message is in doubt


class Failure(Enum):
    """What else can happen in a phase than a reply."""

    UNREACHABLE = "unreachable"  # no address, refused, no route
    TIMEOUT = "timeout"
    CLOSED = "closed"  # the connection ended
    NONSENSE = "nonsense"  # bytes that are no SMTP reply
    UNTRUSTED = "untrusted"  # certificate or handshake
    LACKING = "lacking"  # an extension or mechanism that this message or configuration needs is not offered
    REFUSED = "refused"  # a token server gives no access token for what we show it
    SLOWED = "slowed"  # a token server wants fewer requests


class Status(Enum):
    SENT = "sent"
    DEFERRED = "deferred"
    FAILED = "failed"


class Scope(Enum):
    """How far an outcome speaks: about this recipient, this message, or everybody who uses this upstream or credential."""

    RECIPIENT = "recipient"
    MESSAGE = "message"
    UPSTREAM = "upstream"
    CREDENTIAL = "credential"


class Meaning(Enum):
    """What a reply tells a person to look at: finer than a fate, which may be the same for several."""

    OTHER = "other"
    THROTTLED = "throttled"  # slower, please
    QUOTA = "quota"  # what an hour, a day or a plan allows is used up
    CREDENTIAL = "credential"  # user name or password
    APP_PASSWORD = "app-password"  # the account's own password is not taken from programs
    AUTH_DISABLED = "auth-disabled"  # this kind of login is switched off for the account
    AUTH_NEEDED = "auth-needed"  # mail is taken from nobody who has not logged in
    MECHANISM = "mechanism"  # the login mechanism is unknown, too weak, or none of ours is offered
    TOKEN = "token"  # an OAuth2 access token: expired, without consent, or for something else
    SENDER = "sender"  # the envelope sender or From may not be used
    RELAYING = "relaying"  # it takes no mail for others from us
    ADDRESS = "address"  # the address that we connect from, or our EHLO name, is not on its list
    ACCOUNT = "account"  # the account is blocked, suspended or not yet released
    TLS_NEEDED = "tls-needed"


class Outcome(NamedTuple):
    """The fate of one recipient after one attempt.

    `in_doubt`: the upstream may have taken the message. `throttled`: it asks us to slow down; no attempt is counted and no
    fallback is tried. `fallback`: another upstream may be tried at once. `reports`: the upstream was given the recipient's wishes
    about reports (RFC 3461), and sends them from here on.
    """

    status: Status
    scope: Scope
    phase: Phase
    reply: Reply
    in_doubt: bool = False
    throttled: bool = False
    fallback: bool = False
    reports: bool = False


Pattern = tuple[str, str, str | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of fates: in these phases, on this event, this is the fate.

    `event` is a Failure, or a pattern over the reply: a code with `x` for any digit, an enhanced code with `x` for any number, and
    what its text must contain: one of the SAYINGS, by name, or any of these phrases in lower case. `""` for whatever it is.
    """

    phases: tuple[Phase, ...]
    event: Failure | Pattern
    status: Status
    scope: Scope
    why: str
    in_doubt: bool = False
    throttled: bool = False
    fallback: bool = False
    meaning: Meaning = Meaning.OTHER


_SETUP = (Phase.RESOLVE, Phase.CONNECT, Phase.TLS, Phase.GREETING, Phase.EHLO, Phase.STARTTLS)
_COMMANDS = (Phase.MAIL, Phase.RCPT, Phase.DATA)
_BEFORE_FINAL = (*_SETUP, Phase.AUTH, *_COMMANDS, Phase.CONTENT)
TRANSACTION = (*_COMMANDS, Phase.CONTENT, Phase.FINAL)
_GREETED = (Phase.GREETING, Phase.EHLO, Phase.STARTTLS)  # before them nobody speaks
_ANY = (*_GREETED, Phase.AUTH, *TRANSACTION)
_LOGIN = (Phase.AUTH, Phase.MAIL)  # what is said later may be about words in the message
_LOGGED = (Phase.AUTH, *TRANSACTION)
_NOT_AUTH = (*_GREETED, *TRANSACTION)
_NOT_MAIL = (Phase.RCPT, Phase.DATA, Phase.FINAL)
_NOT_RCPT = (Phase.MAIL, Phase.DATA, Phase.FINAL)

# Named here, as the attributes of an enum take long to look up.
_FINAL = Phase.FINAL
_SENT, _DEFERRED, _FAILED = Status.SENT, Status.DEFERRED, Status.FAILED
_RECIPIENT, _MESSAGE, _UPSTREAM, _CREDENTIAL = Scope.RECIPIENT, Scope.MESSAGE, Scope.UPSTREAM, Scope.CREDENTIAL
_THROTTLED, _QUOTA, _SENDER, _RELAYING = Meaning.THROTTLED, Meaning.QUOTA, Meaning.SENDER, Meaning.RELAYING

#: What upstreams say in words where codes do not tell it apart: any of these phrases, in lower case.
SAYINGS: Mapping[str, tuple[str, ...]] = {
    "slow down": (
        "throttl", "too many connections", "too many concurrent", "concurrent connections", "connection limit", "rate limit", "ratelimit",
        "rate overlimit", "sending rate", "too many messages", "too much mail", "server busy",
    ),
    "session full": (
        "messages in this connection", "messages in this session", "message per connection", "messages per connection",
        "messages per session", "messages on this connection",
    ),
    "too many errors": ("too many errors", "too many bad commands"),
    "used up": (
        "sending limit", "sending quota", "daily message quota", "quotaexceededexception", "daily limit", "hourly limit", "emails per hour",
        "has exceeded permitted limits", "maximum credits",
    ),
    "STARTTLS first": ("starttls", "encryption required", "encryption is required", "tls required", "tls is required"),
    "app password": ("application-specific password", "app-specific password", "application specific password", "app password"),
    "login is off": (
        "basic authentication is disabled", "basic authentication is not supported", "smtpclientauthentication is disabled",
        "smtp auth is disabled", "smtp authentication is disabled",
    ),
    "not proven": ("dkim", "dmarc", " spf", "spf "),
    "no relaying": (
        "relay access denied", "relaying denied", "relay not permitted", "relaying not permitted", "not permitted to relay",
        "not allowed to relay", "unable to relay", "allowed rcpthosts", "not logged in", "client not authenticated",
        "client was not authenticated", "requires authentication", "authentication required", "authentication is required",
        "must authenticate",
    ),
    "account blocked": (
        "denied, banned sender", "denied, spam abuse", "bad outbound sender", "unusual sending activity", "sending suspended",
        "sending paused",
    ),
    "not this sender": (
        "not verified", "verified sender identity", "sendasdenied", "send as this sender", "not owned by user", "sender address rejected",
        "sender rejected", "not authorized to send", "not allowed to send", "not authorized to perform",
    ),
}  # fmt: skip

#: The table of fates. The first row that fits decides.
TABLE: tuple[Row, ...] = (
    # -- codes that ask us to slow down: wait, no fallback ----------------------------------------------------------------
    # RFC 3207 gives 454 to a server whose TLS is broken, and many send it with 4.7.0: that is no request to slow down.
    Row((Phase.STARTTLS,), ("454", "", ""), _DEFERRED, _UPSTREAM, "TLS is not available there", fallback=True),
    # Exim's words, and Yahoo's: the next connection is welcome at once.
    Row((Phase.MAIL,), ("421", "", "session full"), _DEFERRED, _UPSTREAM, "no more mail on this connection", fallback=True),
    # How Postfix, Exchange and Sendmail end a session, with 4.7.0: after twenty refused recipients it is about these, and nobody else.
    Row(_COMMANDS, ("421", "", "too many errors"), _DEFERRED, _MESSAGE, "too many errors in this session"),
    Row(_ANY, ("421", "", "used up"), _DEFERRED, _UPSTREAM, "a quota is used up", throttled=True, meaning=_QUOTA),
    Row(_ANY, ("454", "4.7.0", ""), _DEFERRED, _UPSTREAM, "throttled", throttled=True, meaning=_THROTTLED),
    Row(_ANY, ("432", "4.3.2", ""), _DEFERRED, _UPSTREAM, "throttled: too many connections", throttled=True, meaning=_THROTTLED),
    Row(_ANY, ("421", "4.7.x", ""), _DEFERRED, _UPSTREAM, "throttled", throttled=True, meaning=_THROTTLED),
    Row(_ANY, ("421", "", "slow down"), _DEFERRED, _UPSTREAM, "throttled", throttled=True, meaning=_THROTTLED),
    Row((Phase.AUTH,), ("454", "", ""), _DEFERRED, _UPSTREAM, "temporary authentication failure", throttled=True, meaning=_THROTTLED),
    # -- codes about everybody, whoever the message is for ----------------------------------------------------------------
    Row(_ANY, ("421", "", ""), _DEFERRED, _UPSTREAM, "the upstream is closing the connection", fallback=True),
    Row(_ANY, ("530", "", "STARTTLS first"), _DEFERRED, _CREDENTIAL, "the upstream wants TLS", fallback=True, meaning=Meaning.TLS_NEEDED),
    Row(_ANY, ("530", "", ""), _DEFERRED, _CREDENTIAL, "the upstream wants a login", fallback=True, meaning=Meaning.AUTH_NEEDED),
    Row(_LOGIN, ("5xx", "", "app password"), _DEFERRED, _CREDENTIAL, "wants an app password", fallback=True, meaning=Meaning.APP_PASSWORD),
    Row(_LOGGED, ("5xx", "", "login is off"), _DEFERRED, _CREDENTIAL, "such logins are off", fallback=True, meaning=Meaning.AUTH_DISABLED),
    Row(_ANY, ("534", "", ""), _DEFERRED, _CREDENTIAL, "it refuses this login mechanism", fallback=True, meaning=Meaning.MECHANISM),
    Row(_ANY, ("535", "", ""), _DEFERRED, _CREDENTIAL, "the upstream refuses the credential", fallback=True, meaning=Meaning.CREDENTIAL),
    Row(_ANY, ("538", "", ""), _DEFERRED, _CREDENTIAL, "it wants encryption for this login", fallback=True, meaning=Meaning.TLS_NEEDED),
    # -- one mailbox (RFC 3463 section 3.3), whose quota and rate are not ours ----------------------------------------------
    Row((Phase.RCPT,), ("4xx", "4.2.x", ""), _DEFERRED, _RECIPIENT, "the mailbox takes nothing now"),
    Row((Phase.RCPT,), ("5xx", "5.2.x", ""), _FAILED, _RECIPIENT, "the mailbox takes nothing"),
    # -- one address, or what is in the message: such replies repeat words of others, as who asks there was told them -------------
    Row((Phase.RCPT,), ("4xx", "4.1.1", ""), _DEFERRED, _RECIPIENT, "the address is not known yet"),
    Row((Phase.RCPT,), ("5xx", "5.1.1", ""), _FAILED, _RECIPIENT, "there is no such address"),
    Row(_NOT_RCPT, ("5xx", "5.3.4", ""), _FAILED, _MESSAGE, "the message is too large"),
    Row(_NOT_RCPT, ("5xx", "5.6.x", ""), _FAILED, _MESSAGE, "the content is not taken"),
    # -- words that ask us to slow down -------------------------------------------------------------------------------------
    Row(_ANY, ("4xx", "", "used up"), _DEFERRED, _UPSTREAM, "a quota is used up", throttled=True, meaning=_QUOTA),
    Row(_ANY, ("4xx", "", "slow down"), _DEFERRED, _UPSTREAM, "throttled", throttled=True, meaning=_THROTTLED),
    Row(_NOT_AUTH, ("5xx", "", "used up"), _DEFERRED, _UPSTREAM, "a quota is used up", throttled=True, meaning=_QUOTA),
    Row(_NOT_AUTH, ("5xx", "", "slow down"), _DEFERRED, _UPSTREAM, "throttled", throttled=True, meaning=_THROTTLED),
    # RFC 3463 section 3.5: the mail system is congested, which never is for good. Large providers say it of a used up quota.
    Row(TRANSACTION, ("5xx", "5.4.5", ""), _DEFERRED, _UPSTREAM, "a quota is used up", throttled=True, meaning=_QUOTA),
    # Without SPF, DKIM and DMARC "the sender must authenticate" by others' rules: a login of ours is not what is missing.
    Row(TRANSACTION, ("4xx", "", "not proven"), _DEFERRED, _MESSAGE, "this sender is not proven"),
    Row(TRANSACTION, ("5xx", "", "not proven"), _FAILED, _UPSTREAM, "this sender is not proven", fallback=True, meaning=_SENDER),
    # -- the credential is at fault -----------------------------------------------------------------------------------------
    Row(TRANSACTION, ("4xx", "", "no relaying"), _DEFERRED, _CREDENTIAL, "not allowed to relay", fallback=True, meaning=_RELAYING),
    Row(TRANSACTION, ("5xx", "", "no relaying"), _DEFERRED, _CREDENTIAL, "not allowed to relay", fallback=True, meaning=_RELAYING),
    Row(
        _NOT_RCPT, ("5xx", "", "account blocked"), _DEFERRED, _CREDENTIAL, "the account is blocked", fallback=True, meaning=Meaning.ACCOUNT
    ),
    # RFC 4954 section 4: 504 for a mechanism it does not know; 500 to 502 from a server that does not know AUTH at all.
    Row((Phase.AUTH,), ("50x", "", ""), _DEFERRED, _CREDENTIAL, "not a login it knows", fallback=True, meaning=Meaning.MECHANISM),
    Row((Phase.AUTH,), ("5xx", "", ""), _DEFERRED, _CREDENTIAL, "authentication refused", fallback=True, meaning=Meaning.CREDENTIAL),
    Row((Phase.AUTH,), ("4xx", "", ""), _DEFERRED, _UPSTREAM, "authentication deferred", fallback=True),
    Row(_BEFORE_FINAL, Failure.REFUSED, _DEFERRED, _CREDENTIAL, "no access token is given", fallback=True, meaning=Meaning.TOKEN),
    Row(_BEFORE_FINAL, Failure.SLOWED, _DEFERRED, _UPSTREAM, "its token server is throttled", throttled=True, meaning=_THROTTLED),
    Row((Phase.AUTH,), Failure.LACKING, _DEFERRED, _CREDENTIAL, "no usable login is offered", fallback=True, meaning=Meaning.MECHANISM),
    # -- the upstream is at fault -----------------------------------------------------------------------------------------
    Row(_GREETED, ("xxx", "", ""), _DEFERRED, _UPSTREAM, "the session could not be opened", fallback=True),
    Row((Phase.MAIL,), ("503", "", ""), _DEFERRED, _UPSTREAM, "the session is out of step", fallback=True),
    Row((Phase.MAIL,), Failure.LACKING, _FAILED, _UPSTREAM, "the upstream lacks what this message needs", fallback=True),
    Row((Phase.RCPT,), Failure.LACKING, _FAILED, _RECIPIENT, "the upstream lacks what this recipient's address needs", fallback=True),
    Row((Phase.FINAL,), Failure.TIMEOUT, _DEFERRED, _UPSTREAM, "no reply after the last octet", in_doubt=True),
    Row((Phase.FINAL,), Failure.CLOSED, _DEFERRED, _UPSTREAM, "connection lost after the last octet", in_doubt=True),
    Row((Phase.FINAL,), Failure.NONSENSE, _DEFERRED, _UPSTREAM, "no SMTP reply after the last octet", in_doubt=True),
    Row(_BEFORE_FINAL, Failure.UNREACHABLE, _DEFERRED, _UPSTREAM, "unreachable", fallback=True),
    Row(_BEFORE_FINAL, Failure.TIMEOUT, _DEFERRED, _UPSTREAM, "no answer in time", fallback=True),
    Row(_BEFORE_FINAL, Failure.CLOSED, _DEFERRED, _UPSTREAM, "connection lost", fallback=True),
    Row(_BEFORE_FINAL, Failure.NONSENSE, _DEFERRED, _UPSTREAM, "not an SMTP reply", fallback=True),
    Row(_BEFORE_FINAL, Failure.UNTRUSTED, _DEFERRED, _UPSTREAM, "TLS failed", fallback=True),
    Row(_BEFORE_FINAL, Failure.LACKING, _DEFERRED, _UPSTREAM, "not offered by the upstream", fallback=True),
    # -- the sender may not use this upstream: another one may take it ---------------------------------------------------
    Row((Phase.MAIL,), ("5xx", "5.7.x", ""), _FAILED, _UPSTREAM, "this sender is not permitted", fallback=True, meaning=_SENDER),
    Row((Phase.MAIL,), ("553", "", ""), _FAILED, _UPSTREAM, "this sender is not permitted", fallback=True, meaning=_SENDER),
    Row(_NOT_MAIL, ("5xx", "5.7.60", ""), _FAILED, _UPSTREAM, "may not send as this From", fallback=True, meaning=_SENDER),
    Row(TRANSACTION, ("5xx", "", "not this sender"), _FAILED, _UPSTREAM, "this sender is not permitted", fallback=True, meaning=_SENDER),
    # -- this recipient or this message -----------------------------------------------------------------------------------
    Row((Phase.RCPT,), ("2xx", "", ""), _DEFERRED, _UPSTREAM, "taken, and the transaction went no further"),
    Row((Phase.RCPT,), ("4xx", "", ""), _DEFERRED, _RECIPIENT, "the recipient is deferred"),
    Row((Phase.RCPT,), ("5xx", "", ""), _FAILED, _RECIPIENT, "the recipient is refused"),
    Row((Phase.FINAL,), ("2xx", "", ""), _SENT, _MESSAGE, "taken"),
    Row(TRANSACTION, ("4xx", "", ""), _DEFERRED, _MESSAGE, "the message is deferred"),
    Row(TRANSACTION, ("5xx", "", ""), _FAILED, _MESSAGE, "the message is refused"),
    # -- all the rest: a reply that has no business here ------------------------------------------------------------------
    Row(_BEFORE_FINAL, ("xxx", "", ""), _DEFERRED, _UPSTREAM, "an unexpected reply", fallback=True),
    Row((Phase.FINAL,), ("xxx", "", ""), _DEFERRED, _UPSTREAM, "an unexpected reply", in_doubt=True),
    Row((Phase.FINAL,), Failure.UNREACHABLE, _DEFERRED, _UPSTREAM, "connection lost after the last octet", in_doubt=True),
    Row((Phase.FINAL,), Failure.UNTRUSTED, _DEFERRED, _UPSTREAM, "TLS failed after the last octet", in_doubt=True),
    Row((Phase.FINAL,), Failure.LACKING, _DEFERRED, _UPSTREAM, "not offered by the upstream", in_doubt=True),
    Row((Phase.FINAL,), Failure.REFUSED, _DEFERRED, _UPSTREAM, "no access token is given", in_doubt=True),
    Row((Phase.FINAL,), Failure.SLOWED, _DEFERRED, _UPSTREAM, "its token server is throttled", in_doubt=True),
)

#: What a reply repeats of a message are words of anybody's choice: neither throttle@example.com nor the subject "Rate limit" is a request
#: to slow down. Addresses, links, subjects and quotations are taken out; a quotation at the beginning is the reply itself, and stays. None
#: looks for its end past the beginning of another one: 2,000 of them would be quadratic.
_REPEATED = re.compile(
    r"""^("[^"@</]*" | '[^'`@</]*'(?!\w)) | <[^<>]*> | (?<![^\s<>:;,()])[^\s<>:;,()@]+@[^\s<>:;,()]+
    | \bhttps?://[^\s<>"]+ | \bwww\.[^\s<>"]+ | \bsubject\s*[:=].*
    | (?<!^)(?<!\w) (?: "[^"]*" | “[^“”]*” | ‘[^‘’]*’ | «[^«»]*» | '[^'`]*'(?!\w) | `[^'`]*['`] )""",
    re.VERBOSE,
)

#: The rows that a reply can meet, by phase and first digit: nearly every reply is a 2xx, which few rows are about.
_BY_DIGIT: dict[tuple[Phase, str], tuple[Row, ...]] = {
    (phase, digit): tuple(
        row for row in TABLE if phase in row.phases and not isinstance(row.event, Failure) and row.event[0][0] in ("x", digit)
    )
    for phase in Phase
    for digit in "0123456789"
}


def outcome_of_reply(phase: Phase, reply: Reply, *, own: Sequence[Row] = ()) -> Outcome:
    """What `reply`, given in `phase`, means for a recipient of the transaction. `own`: a provider's own rows, looked at first."""
    if phase is _FINAL and 200 <= reply.code < 300:  # the row for it, without looking through the table: nearly every message ends here
        return Outcome(_SENT, _MESSAGE, phase, reply)
    return _outcome(row_for(phase, reply, own=own), phase, reply)


def outcome_of_failure(phase: Phase, failure: Failure, text: str) -> Outcome:
    """What a failure without a reply means. `text` says in plain words what happened; it becomes the outcome's reply, code 0."""
    return _outcome(row_for(phase, failure), phase, Reply(0, "", told(text)))


def row_for(phase: Phase, event: Reply | Failure, *, own: Sequence[Row] = ()) -> Row:
    """The row that decides: the first of a provider's `own`, or else of the table."""
    if isinstance(event, Failure):
        rows: Sequence[Row] = TABLE
    else:
        rows, event = (*own, *_BY_DIGIT[phase, f"{event.code:03}"[0]]), event._replace(text=_REPEATED.sub(r"\1<>", event.text.lower()))
    for row in rows:
        if phase in row.phases and _fits(row.event, event):
            return row
    raise AssertionError(f"the table of fates has no row for {phase} and {event}")  # test_outcome proves it total


def rows_by_phase(rows: Sequence[Row] = TABLE) -> Iterator[tuple[Phase, Row]]:
    """Every row once per phase it speaks for, in the order of a session: for people to read."""
    for phase in Phase:
        for row in rows:
            if phase in row.phases:
                yield phase, row


def _outcome(row: Row, phase: Phase, reply: Reply) -> Outcome:
    return Outcome(row.status, row.scope, phase, reply, row.in_doubt, row.throttled, row.fallback)


def _fits(pattern: Failure | Pattern, event: Reply | Failure) -> bool:
    if isinstance(pattern, Failure) or isinstance(event, Failure):
        return pattern is event
    code, enhanced, saying = pattern
    if not all(p in ("x", digit) for p, digit in zip(code, f"{event.code:03}", strict=True)):
        return False
    if enhanced and not _fits_enhanced(enhanced, event.enhanced):
        return False
    return not saying or any(map(event.text.__contains__, SAYINGS[saying] if isinstance(saying, str) else saying))


def _fits_enhanced(pattern: str, enhanced: str) -> bool:
    wanted, got = pattern.split("."), enhanced.split(".")
    return len(got) == len(wanted) and all(w in ("x", g) for w, g in zip(wanted, got, strict=True))
