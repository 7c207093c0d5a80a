"""The report that tells a sender what could not be delivered (RFC 3464, RFC 6533, multipart of RFC 6522).

Made of bytes by hand: three parts, CRLF throughout, and pure ASCII, unless the address it goes to needs SMTPUTF8, so that any
upstream can take it. What upstreams said is quoted as they said it, made safe. Nobody is told about a null sender's message, or
where the client asked for silence (RFC 3461, NOTIFY). Pure: the caller gives the times and the id, and makes the envelope.
"""

import quopri
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime

from relay.mail.address import domain_of
from relay.mail.envelope import Envelope, Recipient
from relay.mail.outcome import Outcome, Status
from relay.mail.reply import Reply, printable
from relay.mail.rewrite import rewrite_header

_HEADER_LIMIT_OCTETS = 64 * 1024  # of the original header block
_WIDTH = 72
_EXPIRED = "4.4.7"  # RFC 3463: message expired
_LINE_END = re.compile(rb"\r\n|\r|\n")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")


@dataclass(frozen=True, slots=True)
class Bounce:
    """A report, ready to be queued with a null sender, and the recipients it speaks of. `recipient` is who it is for."""

    content: bytes
    recipient: str
    recipients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Undelivered:
    """What the report is about. `created` is in seconds since the epoch; `remote_mta` is the upstream's host, or `""`."""

    id: str
    envelope: Envelope
    failed: Sequence[tuple[Recipient, Outcome]]
    header_block: bytes
    created: float
    upstream: str
    remote_mta: str = ""


def make_bounce(message: Undelivered, *, reporting_mta: str, bounce_id: str, now: float) -> Bounce | None:
    """The report for the sender of `message`, or None when nobody may be told.

    A deferred outcome counts as expired: the time for trying is over. `bounce_id` is the queue id of the report itself.
    """
    sender = message.envelope.sender
    told = [(recipient, outcome) for recipient, outcome in message.failed if _wants_notice(recipient)]
    if not sender or not told:
        return None
    parts = (
        _words_part(message, told, reporting_mta=reporting_mta, now=now),
        _status_part(message, told, reporting_mta=reporting_mta),
        _shown_header(message.header_block),
    )
    boundary = f"=_{bounce_id}"
    while any(boundary.encode() in part for part in parts):
        boundary += "_"
    top = [
        f"From: Mail Delivery System <MAILER-DAEMON@{domain_of(sender) or reporting_mta}>",
        f"To: <{sender}>",
        "Subject: Undelivered Mail Returned to Sender",
        f"Date: {_date(now)}",
        f"Message-ID: <{bounce_id}@{reporting_mta}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\r\n boundary="{boundary}"',
        "",
        "This is a delivery report in MIME format.",
    ]
    body = b"".join(b"\r\n--" + boundary.encode() + b"\r\n" + part for part in parts)
    content = "\r\n".join(top).encode() + b"\r\n" + body + b"\r\n--" + boundary.encode() + b"--\r\n"
    return Bounce(content, sender, tuple(recipient.address for recipient, _ in told))


def _wants_notice(recipient: Recipient) -> bool:
    """RFC 3461 section 4.1: failures are reported unless NOTIFY is given and does not name them."""
    return not recipient.notify or "FAILURE" in recipient.notify.upper().split(",")


def _words_part(message: Undelivered, told: Sequence[tuple[Recipient, Outcome]], *, reporting_mta: str, now: float) -> bytes:
    """The part for the person."""
    lines = [
        *_wrapped(
            f"{reporting_mta} took your message into its queue and could not deliver it to "
            f"{'this recipient' if len(told) == 1 else 'these recipients'}. It will not try again."
        ),
        "",
    ]
    for recipient, outcome in told:
        lines += [f"<{printable(recipient.address)}>", *_story(message, recipient, outcome, now=now), ""]
    lines += [
        f"Queue id: {message.id}",
        f"Accepted: {_date(message.created)}",
        "",
        *_wrapped("Whoever runs the relay can find the whole story under this queue id. The header of your message is attached."),
    ]
    text = "\r\n".join(lines) + "\r\n"
    kind = b"Content-Type: text/plain; charset="
    if text.isascii():
        return kind + b"us-ascii\r\n\r\n" + text.encode("ascii")
    return kind + b"utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(text.encode())


def _story(message: Undelivered, recipient: Recipient, outcome: Outcome, *, now: float) -> list[str]:
    """What happened to one recipient, in indented lines."""
    upstream = printable(message.upstream)
    said = f"{outcome.reply}" if outcome.reply.code else ""
    if outcome.status is Status.DEFERRED:
        what = f"Not delivered after {_length(now - message.created)} of trying, the last time through the upstream {upstream}"
    else:
        what = f"{'Refused by' if said else 'Could not be sent through'} the upstream {upstream}"
    lines = _wrapped(f"{what}{', which said:' if said else ':'}", indent="    ")
    lines += _wrapped(printable(said or outcome.reply.text or "no reason was given"), indent="      ")
    if recipient.in_doubt or outcome.in_doubt:
        lines += _wrapped(
            "Delivery unconfirmed: the connection was lost after the whole message had been sent and before the answer, "
            "so the recipient may have got it all the same.",
            indent="    ",
        )
    return lines


def _status_part(message: Undelivered, told: Sequence[tuple[Recipient, Outcome]], *, reporting_mta: str) -> bytes:
    """The part for programs (RFC 3464 section 2)."""
    groups = [[f"Reporting-MTA: dns; {reporting_mta}", f"X-Queue-ID: {message.id}", f"Arrival-Date: {_date(message.created)}"]]
    if message.envelope.envid:
        groups[0].insert(0, _folded(f"Original-Envelope-Id: {_plain(_from_xtext(message.envelope.envid))}"))
    for recipient, outcome in told:
        lines = []
        if recipient.orcpt:
            kind, _, address = recipient.orcpt.partition(";")
            lines.append(_folded(f"Original-Recipient: {_plain(kind)};{_address(_from_xtext(address))}"))
        kind = "rfc822" if recipient.address.isascii() else "utf-8"
        lines += [f"Final-Recipient: {kind};{_address(recipient.address)}", "Action: failed", f"Status: {_status(outcome)}"]
        if message.remote_mta:
            lines.append(f"Remote-MTA: dns; {_plain(message.remote_mta)}")
        lines.append(_folded(f"Diagnostic-Code: {'smtp' if outcome.reply.code else 'x-relay'}; {_diagnostic(outcome.reply)}"))
        if recipient.in_doubt or outcome.in_doubt:
            lines.append("X-Delivery: unconfirmed")
        groups.append(lines)
    text = "\r\n\r\n".join("\r\n".join(lines) for lines in groups)
    return b"Content-Type: message/delivery-status\r\n\r\n" + text.encode("ascii") + b"\r\n"


def _shown_header(block: bytes) -> bytes:
    """The part with the original header block, at most 64 KiB of it, in whole lines and without hidden recipients."""
    block = _LINE_END.sub(b"\r\n", rewrite_header(block, None))
    if len(block) > _HEADER_LIMIT_OCTETS:
        block = block[: block.rfind(b"\n", 0, _HEADER_LIMIT_OCTETS) + 1]
    if block and not block.endswith(b"\r\n"):
        block += b"\r\n"
    if block.isascii() and b"\x00" not in block and len(max(block.split(b"\r\n"), key=len)) <= 998:
        return b"Content-Type: text/rfc822-headers\r\n\r\n" + block
    # Only the type of RFC 6533 may hold UTF-8, and it may be encoded.
    kind = b"message/global-headers" if _is_utf8(block) and not block.isascii() else b"text/rfc822-headers"
    return b"Content-Type: " + kind + b"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(block)


def _status(outcome: Outcome) -> str:
    if outcome.status is Status.DEFERRED:
        return _EXPIRED
    return outcome.reply.enhanced if outcome.reply.enhanced.startswith("5.") else "5.0.0"


def _diagnostic(reply: Reply) -> str:
    return _plain(str(reply)) or "no reason was given"


def _plain(text: str) -> str:
    """Text of a stranger on one line of printable ASCII."""
    return printable(text).encode("ascii", "replace").decode("ascii")


def _address(address: str) -> str:
    """An address in ASCII: RFC 6533's `\\x{…}` for the rest, and for what could end the field."""
    return "".join(character if "!" <= character <= "~" or character == " " else f"\\x{{{ord(character):X}}}" for character in address)


def _from_xtext(text: str) -> str:
    """Decode RFC 3461's xtext."""
    return _XTEXT.sub(lambda match: chr(int(match[1], 16)), text)


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
