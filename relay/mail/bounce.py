"""The report that tells a sender what became of mail (RFC 3464, RFC 6533, multipart of RFC 6522): failed, delayed, or handed on.

Made of bytes by hand: three parts, CRLF throughout, and pure ASCII unless the address it goes to needs SMTPUTF8 or a whole 8-bit
message is returned, so that any upstream can take it. What upstreams said is quoted as they said it, made safe. Pure: the caller
gives the times and the id, and makes the envelope.

Laws: nobody is told about a null sender's message, or what NOTIFY does not ask for (RFC 3461). One report speaks of each recipient once.
"""

import quopri
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from enum import Enum
from ipaddress import ip_address
from typing import NamedTuple

from relay.mail.address import domain_of, local_of
from relay.mail.dsn import decode_xtext, wants
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Outcome, Phase, Status
from relay.mail.reply import printable
from relay.mail.rewrite import rewrite_header

_HEADER_LIMIT_OCTETS = 64 * 1024  # of the original header block
_LINE_LIMIT_OCTETS = 998  # RFC 5322 section 2.1.1
_WIDTH = 72
_EXPIRED = "4.4.7"  # RFC 3463: message expired
_LINE_END = re.compile(rb"\r\n|\r|\n")


class Action(Enum):
    """What became of one recipient, in the words of RFC 3464 section 2.3.3; the worst first."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"


#: The event of RFC 3461 that a report of each action is about.
_EVENTS = {Action.FAILED: "FAILURE", Action.DELAYED: "DELAY", Action.RELAYED: "SUCCESS"}

_SUBJECTS = {
    Action.FAILED: "Undelivered Mail Returned to Sender",
    Action.DELAYED: "Delayed Mail, Still Being Tried",
    Action.RELAYED: "Mail Handed On",
}


class Notice(NamedTuple):
    """What the report has to say of one recipient. FAILED with a deferred outcome: the time for trying is over."""

    recipient: Recipient
    outcome: Outcome
    action: Action


@dataclass(frozen=True, slots=True)
class About:
    """What the report is about. `created` and `expires` are in seconds since the epoch; `remote_mta` is the upstream's host, or `""`.

    `rest` is what follows the header block, the empty line included, or None where that is not at hand. `given_up`: why the
    recipients that failed were given up without an attempt, as the end of "Not tried any more: …", or `""`.
    """

    id: str
    envelope: Envelope
    notices: Sequence[Notice]
    header_block: bytes
    created: float
    expires: float
    upstream: str
    remote_mta: str = ""
    rest: bytes | None = None
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class Bounce:
    """A report, ready to be queued with a null sender, and what it says. `recipient` is who it is for."""

    content: bytes
    recipient: str
    told: tuple[Notice, ...]


def make_bounce(about: About, *, reporting_mta: str, bounce_id: str, now: float) -> Bounce | None:
    """The report for the sender of the message, or None when nobody may be told. `bounce_id` is the queue id of the report itself."""
    sender = about.envelope.sender
    told = tuple(notice for notice in about.notices if wants(notice.recipient.notify, _EVENTS[notice.action]))
    if not sender or not told:
        return None
    recipient = _reachable(sender)
    original, returned = _original(about, told)
    parts = (
        _words_part(about, told, returned=returned, reporting_mta=reporting_mta, now=now),
        _status_part(about, told, reporting_mta=reporting_mta, now=now),
        original,
    )
    boundary = f"=_{bounce_id}"
    while any(boundary.encode() in part for part in parts):
        boundary += "_"
    top = [
        f"Received: by {reporting_mta} id {bounce_id};\r\n\t{_date(now)}",
        f"From: Mail Delivery System <MAILER-DAEMON@{domain_of(sender) or reporting_mta}>",
        f"To: <{recipient}>",
        f"Subject: {_SUBJECTS[next(action for action in Action if any(notice.action is action for notice in told))]}",
        f"Date: {_date(now)}",
        f"Message-ID: <{bounce_id}@{reporting_mta}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        *([] if original.isascii() else ["Content-Transfer-Encoding: 8bit"]),
        f'Content-Type: multipart/report; report-type=delivery-status;\r\n boundary="{boundary}"',
        "",
        "This is a delivery report in MIME format.",
    ]
    body = b"".join(b"\r\n--" + boundary.encode() + b"\r\n" + part for part in parts)
    content = "\r\n".join(top).encode() + b"\r\n" + body + b"\r\n--" + boundary.encode() + b"--\r\n"
    return Bounce(content, recipient, told)


def _reachable(sender: str) -> str:
    """The sender's address, in ASCII where that is the same mailbox: then no upstream need know SMTPUTF8 to take the report."""
    return f"{local_of(sender)}@{domain_of(sender)}" if local_of(sender).isascii() and not sender.isascii() else sender


# -- for the person -----------------------------------------------------------------------------------------------------------


def _words_part(about: About, told: Sequence[Notice], *, returned: str, reporting_mta: str, now: float) -> bytes:
    lines: list[str] = []
    for action in Action:
        if notices := [notice for notice in told if notice.action is action]:
            lines += [*_wrapped(_opening(action, about, reporting_mta, several=len(notices) > 1)), ""]
            for notice in notices:
                lines += [f"<{printable(notice.recipient.address)}>", *_story(about, notice, now=now), ""]
    lines += [
        f"Queue id: {about.id}",
        f"Accepted: {_date(about.created)}",
        "",
        *_wrapped(f"Whoever runs the relay can find the whole story under this queue id. {returned}"),
    ]
    text = "\r\n".join(lines) + "\r\n"
    kind = b"Content-Type: text/plain; charset="
    if text.isascii():
        return kind + b"us-ascii\r\n\r\n" + text.encode("ascii")
    return kind + b"utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(text.encode())


def _opening(action: Action, about: About, reporting_mta: str, *, several: bool) -> str:
    whom = "these recipients" if several else "this recipient"
    if action is Action.FAILED:
        return f"{reporting_mta} took your message into its queue and could not deliver it to {whom}. It will not try again."
    if action is Action.DELAYED:
        return (
            f"{reporting_mta} has your message in its queue and could not deliver it to {whom} yet. You need do nothing: "
            f"it goes on trying until {_date(about.expires)}."
        )
    return (
        f"{reporting_mta} has handed your message for {whom} on, as you asked to be told. The next server does not promise "
        "reports, so that you may hear no more of it."
    )


def _story(about: About, notice: Notice, *, now: float) -> list[str]:
    """What happened to one recipient, in indented lines."""
    recipient, outcome, action = notice
    said = f"{outcome.reply}" if outcome.reply.code else ""
    if about.given_up and action is Action.FAILED:
        lines = _wrapped(f"Not tried any more: {printable(about.given_up)}", indent="    ")
    else:
        what = _deed(notice, said=bool(said), upstream=printable(about.upstream), age=_length(now - about.created))
        lines = _wrapped(f"{what}{', which said:' if said else ':'}", indent="    ")
        lines += _wrapped(printable(said or outcome.reply.text or "no reason was given"), indent="      ")
    if recipient.in_doubt or outcome.in_doubt:
        lines += _wrapped(
            "Delivery unconfirmed: the connection was lost after the whole message had been sent and before the answer, "
            "so the recipient may have got it all the same.",
            indent="    ",
        )
    return lines


def _deed(notice: Notice, *, said: bool, upstream: str, age: str) -> str:
    if notice.action is Action.RELAYED:
        return f"Taken by the upstream {upstream}"
    if notice.outcome.status is not Status.DEFERRED:
        return f"{'Refused by' if said else 'Could not be sent through'} the upstream {upstream}"
    yet = "yet " if notice.action is Action.DELAYED else ""
    return f"Not delivered {yet}after {age} of trying, the last time through the upstream {upstream}"


# -- for programs -------------------------------------------------------------------------------------------------------------


def _status_part(about: About, told: Iterable[Notice], *, reporting_mta: str, now: float) -> bytes:
    """RFC 3464 section 2: a group of fields for the message, and one for each recipient."""
    groups = [[f"Reporting-MTA: dns; {reporting_mta}", f"X-Queue-ID: {about.id}", f"Arrival-Date: {_date(about.created)}"]]
    if about.envelope.envid:
        groups[0].insert(0, _folded(f"Original-Envelope-Id: {_plain(decode_xtext(about.envelope.envid))}"))
    groups += [_group(about, notice, now=now) for notice in told]
    text = "\r\n\r\n".join("\r\n".join(lines) for lines in groups)
    return b"Content-Type: message/delivery-status\r\n\r\n" + text.encode("ascii") + b"\r\n"


def _group(about: About, notice: Notice, *, now: float) -> list[str]:
    recipient, outcome, action = notice
    given_up = about.given_up if action is Action.FAILED else ""
    lines = []
    if recipient.orcpt:
        kind, _, address = recipient.orcpt.partition(";")
        lines.append(_folded(f"Original-Recipient: {_plain(kind)};{_address(decode_xtext(address))}"))
    kind = "rfc822" if recipient.address.isascii() else "utf-8"
    lines += [f"Final-Recipient: {kind};{_address(recipient.address)}", f"Action: {action.value}", f"Status: {_status(notice)}"]
    said = bool(outcome.reply.code) and not given_up
    if about.remote_mta and said:
        lines.append(f"Remote-MTA: dns; {_plain(_host(about.remote_mta))}")
    diagnostic = _plain(given_up or str(outcome.reply)) or "no reason was given"
    lines.append(_folded(f"Diagnostic-Code: {'smtp' if said else 'x-relay'}; {diagnostic}"))
    if not given_up:
        lines.append(f"Last-Attempt-Date: {_date(now)}")
    if action is Action.DELAYED:
        lines.append(f"Will-Retry-Until: {_date(about.expires)}")
    if recipient.in_doubt or outcome.in_doubt:
        lines.append("X-Delivery: unconfirmed")
    return lines


def _status(notice: Notice) -> str:
    """RFC 3463: the upstream's own status where it is of the action's class, else the most that can be said."""
    outcome, enhanced = notice.outcome, notice.outcome.reply.enhanced
    if notice.action is Action.FAILED:
        if outcome.status is Status.DEFERRED:
            return _EXPIRED
        return enhanced if enhanced.startswith("5.") else "5.0.0"
    if notice.action is Action.RELAYED:
        return enhanced if enhanced.startswith("2.") else "2.0.0"
    if outcome.reply.code:
        return enhanced if enhanced.startswith("4.") else "4.0.0"
    return "4.4.1" if outcome.phase in (Phase.RESOLVE, Phase.CONNECT) else "4.4.2"  # no answer from the host; a bad connection


# -- the original -------------------------------------------------------------------------------------------------------------


def _original(about: About, told: Iterable[Notice]) -> tuple[bytes, str]:
    """The part with the original, and a sentence about it: all of it where RET=FULL asks so of a failure (RFC 3461 section 4.3)."""
    failed = [notice for notice in told if notice.action is Action.FAILED]
    if about.envelope.ret.upper() != "FULL" or not failed:
        return _shown_header(about.header_block), "The header of your message is attached."
    if about.rest is None:
        return _shown_header(about.header_block), "The header of your message is attached; the whole of it is too large to be returned."
    block = rewrite_header(about.header_block, None)
    whole = block + about.rest
    # An upstream that lacks 8BITMIME would not take an 8-bit report either.
    narrow = any(notice.outcome.phase is Phase.MAIL and not notice.outcome.reply.code for notice in failed)
    if block.isascii() and _is_fit(whole) and (whole.isascii() or not narrow):
        encoding = b"" if whole.isascii() else b"Content-Transfer-Encoding: 8bit\r\n"
        part = b"Content-Type: message/rfc822\r\n" + encoding + b"\r\n" + whole
    else:  # of the types that hold a message, only that of RFC 6532 may be encoded
        part = b"Content-Type: message/global\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(whole)
    return part, "Your message is attached."


def _shown_header(block: bytes) -> bytes:
    """The part with the original header block, at most 64 KiB of it, in whole lines and without hidden recipients."""
    block = _LINE_END.sub(b"\r\n", rewrite_header(block, None))
    if len(block) > _HEADER_LIMIT_OCTETS:
        block = block[: block.rfind(b"\n", 0, _HEADER_LIMIT_OCTETS) + 1]
    if block and not block.endswith(b"\r\n"):
        block += b"\r\n"
    if block.isascii() and _is_fit(block):
        return b"Content-Type: text/rfc822-headers\r\n\r\n" + block
    # Only the type of RFC 6533 may hold UTF-8, and it may be encoded.
    kind = b"message/global-headers" if _is_utf8(block) and not block.isascii() else b"text/rfc822-headers"
    return b"Content-Type: " + kind + b"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(block)


def _is_fit(octets: bytes) -> bool:
    """Whether the lines are such that any server takes them as they are, but for octets above 127."""
    return b"\x00" not in octets and len(max(octets.split(b"\r\n"), key=len)) <= _LINE_LIMIT_OCTETS


# -- words and octets ---------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text of a stranger on one line of printable ASCII."""
    return printable(text).encode("ascii", "replace").decode("ascii")


def _address(address: str) -> str:
    """An address in ASCII: RFC 6533's `\\x{…}` for the rest, and for what could end the field."""
    return "".join(character if "!" <= character <= "~" or character == " " else f"\\x{{{ord(character):X}}}" for character in address)


def _host(name: str) -> str:
    """A host as RFC 3464 section 2.3.5 wants it: an address stands in brackets."""
    try:
        address = ip_address(name)
    except ValueError:
        return name
    return f"[IPv6:{address}]" if address.version == 6 else f"[{address}]"


def _folded(line: str) -> str:
    breaks = len(line) > 900  # a word that RFC 5322's 998 might not hold
    return "\r\n".join(textwrap.wrap(line, _WIDTH, subsequent_indent=" ", break_long_words=breaks, break_on_hyphens=False))


def _wrapped(text: str, *, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _quoted(octets: bytes) -> bytes:
    """Quoted-printable; the lines stay lines."""
    return quopri.encodestring(octets.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(int(seconds), UTC))


def _length(seconds: float) -> str:
    """A length of time in the largest unit that says enough."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = round(seconds / size)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"
