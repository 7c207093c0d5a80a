"""How drafts, claims and log entries become rows and come back: pure, no database.

`recipients` is the address itself for the plain single recipient, else a JSON list of [address, notify, orcpt, in doubt, warned],
of which the first schema's writer left out the last.
`facts` is a JSON object with the keys below that differ from their default; readers ignore keys that they do not know.
"""

import json
from collections.abc import Iterable, Sequence

from relay.mail.dsn import wants
from relay.mail.envelope import NO_SUMMARY, Envelope, Origin, Recipient, Summary
from relay.spool.base import Content, MessageId, Settlement, Used

_quote = json.encoder.encode_basestring
#: What the plain recipient is beside its address.
_PLAIN = Recipient("")[1:]
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def number_of(message_id: str) -> int:
    """The id as the integer that is its primary key. Raises ValueError for what is no id."""
    return int(message_id, 16)


def parse_id(text: str) -> MessageId:
    """An id as a person writes it, in the form in which ids compare. Raises ValueError for what is no id."""
    if not text.isascii() or not text.isalnum() or len(text) > 15:  # int() takes more; the primary key has 63 bits
        raise ValueError("not the id of a message")
    return id_of(int(text, 16))


def id_of(number: int) -> MessageId:
    return MessageId(f"{number:013X}")


def pack_recipients(recipients: Sequence[Recipient]) -> str:
    first = recipients[0] if len(recipients) == 1 else None
    if first is not None and first[1:] == _PLAIN and first.address[:1] != "[":
        return first.address
    return _encode([(r.address, r.notify, r.orcpt, int(r.in_doubt), int(r.warned)) for r in recipients])


def unpack_recipients(text: str, *, in_doubt: bool = False) -> tuple[Recipient, ...]:
    """`in_doubt`: whatever the row says, a claim ended without a word, so every recipient is in doubt.

    Raises ValueError for a text that damage has made something else.
    """
    if not isinstance(text, str):
        raise ValueError(f"recipients that are none: {text!r}")
    if text[:1] != "[":
        return (Recipient(text, in_doubt=in_doubt),)
    try:
        return tuple(
            Recipient(address + "", notify + "", orcpt + "", bool(doubt) or in_doubt, bool(warned))
            for address, notify, orcpt, doubt, warned in ((*values, 0)[:5] for values in json.loads(text))
        )
    except TypeError as error:
        raise ValueError(f"recipients that are none: {error}") from error


def recipients_of(text: str) -> tuple[Recipient, ...]:
    """The recipients of what is only looked at; none where damage has made the text something else."""
    try:
        return unpack_recipients(text)
    except ValueError:
        return ()


def addresses_of(text: str) -> tuple[str, ...]:
    """The recipients' addresses for an operator's eye, likewise."""
    return tuple(recipient.address for recipient in recipients_of(text))


def is_unwarned(sender: str, recipients: Iterable[Recipient]) -> bool:
    """Whether the sender may have to hear that one of the recipients still waits, and has not."""
    return sender != "" and any(not r.warned and wants(r.notify, "DELAY") for r in recipients)


def pack_facts(envelope: Envelope, origin: Origin, summary: Summary, content: Content) -> str:
    listener, client, user, session, header_from = origin
    to, cc, subject = summary
    _, _, utf8, ret, envid = envelope
    # By hand, as json makes an encoder for each call, which costs as much as all the rest of a put.
    members = (
        f'"listener":{_quote(listener)},' if listener else "",
        f'"client":{_quote(client)},' if client else "",
        f'"user":{_quote(user)},' if user else "",
        f'"session":{_quote(session)},' if session else "",
        f'"from":{_quote(header_from)},' if header_from else "",
        f'"to":{_quote(to)},' if to else "",
        f'"cc":{_quote(cc)},' if cc else "",
        f'"subject":{_quote(subject)},' if subject else "",
        f'"ret":{_quote(ret)},' if ret else "",
        f'"envid":{_quote(envid)},' if envid else "",
        '"utf8":true,' if utf8 else "",
        '"8bit":true,' if content.eight_bit else "",
        '"dots":true,' if content.dotted else "",
    )
    return f"{{{''.join(members)[:-1]}}}"


def unpack_facts(text: str) -> tuple[Origin, Summary, dict[str, str | bool]]:
    """The origin, the summary, and the rest: `ret`, `envid`, `utf8`, `8bit`, `dots` where they were set.

    Raises ValueError for a text that damage has made something else.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError(f"facts that are none: {text[:40]!r}")
    get = facts.get
    origin = Origin(get("listener", ""), get("client", ""), get("user", ""), get("session", ""), get("from", ""))
    return origin, Summary(get("to", ""), get("cc", ""), get("subject", "")), facts


def summary_of(text: str) -> str:
    """The summary in `facts` as a row of the delivery log has it; none where damage has made the text something else."""
    try:
        return pack_summary(unpack_facts(text)[1])
    except (ValueError, TypeError):
        return ""


def unpack_envelope(sender: str, recipients: tuple[Recipient, ...], facts: dict[str, str | bool]) -> Envelope:
    return Envelope(sender, recipients, bool(facts.get("utf8")), str(facts.get("ret", "")), str(facts.get("envid", "")))


def log_rows(settlement: Settlement, number: int, now: float) -> list[tuple[object, ...]]:
    """One row of the delivery log for each recipient of the attempt, or of a message that is held without one."""
    claim, outcomes, then, bounce, tried, _ = settlement
    held = then.held if then is not None and not tried else ""
    if not tried and not held:
        return []
    sender, recipients = claim.envelope.sender, claim.envelope.recipients
    created, attempt, size, text = claim.created, claim.attempt, claim.content.size, pack_summary(claim.summary)
    report = number_of(bounce.id) if bounce is not None else None
    rows: list[tuple[object, ...]] = []
    for recipient in recipients:
        outcome = outcomes[recipient.address]
        # `value` is a method behind a descriptor, and as dear as the row.
        status, reply = ("held", held) if held else (outcome.status.value, str(outcome.reply))
        rows.append((now, number, created, *claim.lane, sender, recipient.address, status, attempt, size, reply, text, report))
    return rows


def pack_summary(summary: Summary) -> str:
    to, cc, subject = summary
    return f"[{_quote(to)},{_quote(cc)},{_quote(subject)}]" if to or cc or subject else ""


def unpack_summary(text: str) -> Summary:
    return Summary(*json.loads(text)) if text else NO_SUMMARY


def matters(used: Used, now: float) -> bool:
    """Whether a quota may still count it: one window long, and what exceeded the quota for another."""
    return used.start + 2 * used.seconds > now


def continuation(settlement: Settlement, waiting: list[Recipient]) -> tuple[object, ...]:
    """The new values of a message that goes back to a lane, in the order of `sqlite_schema.CONTINUE`."""
    claim, then, outcomes = settlement.claim, settlement.next, settlement.outcomes
    assert then is not None, "a deferred recipient has a next time"
    kept = [r._replace(in_doubt=r.in_doubt or outcomes[r.address].in_doubt) for r in waiting]
    reply = str(outcomes[waiting[-1].address].reply) if settlement.tried else None
    uncounted = not then.counted and claim.token > 0  # a claim for ending counted nothing
    return (*then.lane, then.when, int(uncounted), then.held, pack_recipients(kept), reply)
