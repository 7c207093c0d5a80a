"""How drafts, claims and log entries become rows and come back: pure, no database.

`recipients` is the address itself for the plain single recipient, else a JSON list of [address, notify, orcpt, in doubt, warned],
of which the first schema's writer left out the last.
`facts` is a JSON object with the keys below that differ from their default; readers ignore keys that they do not know.
"""

import json
from collections.abc import Iterable

from relay.mail.dsn import wants
from relay.mail.envelope import NO_SUMMARY, Envelope, Origin, Recipient, Summary
from relay.spool.base import Content, MessageId, Settlement, Used

_quote = json.encoder.encode_basestring
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


def pack_recipients(recipients: Iterable[Recipient]) -> str:
    recipients = tuple(recipients)
    if len(recipients) == 1 and recipients[0] == Recipient(recipients[0].address) and recipients[0].address[:1] != "[":
        return recipients[0].address
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
    texts = (
        ("listener", origin.listener),
        ("client", origin.client),
        ("user", origin.user),
        ("session", origin.session),
        ("from", origin.header_from),
        ("to", summary.to),
        ("cc", summary.cc),
        ("subject", summary.subject),
        ("ret", envelope.ret),
        ("envid", envelope.envid),
    )
    flags = (("utf8", envelope.smtputf8), ("8bit", content.eight_bit), ("dots", content.dotted))
    # By hand, as json makes an encoder for each call, which costs as much as all the rest of a put.
    members = [f'"{key}":{_quote(text)}' for key, text in texts if text]
    members += [f'"{key}":true' for key, flag in flags if flag]
    return "{" + ",".join(members) + "}"


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
    claim, outcomes, then = settlement.claim, settlement.outcomes, settlement.next
    held = then.held if then is not None and not settlement.tried else ""
    if not settlement.tried and not held:
        return []
    text = pack_summary(claim.summary)
    report = number_of(settlement.bounce.id) if settlement.bounce is not None else None
    return [
        (
            now, number, claim.created, *claim.lane, claim.envelope.sender, r.address, "held" if held else outcomes[r.address].status.value,
            claim.attempt, claim.content.size, held or str(outcomes[r.address].reply), text, report,
        )
        for r in claim.envelope.recipients
    ]  # fmt: skip


def pack_summary(summary: Summary) -> str:
    return f"[{','.join(map(_quote, summary))}]" if summary != NO_SUMMARY else ""


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
