"""Whether an upstream's credential may send what is about to go out: fail-closed tenancy (law 6).

`objection` is asked at intake and again on the bytes that leave. Pure.
"""

from collections.abc import Sequence

from relay.mail.address import domain_of, patterns_for
from relay.mail.header import Scan, from_address


def objection(senders: Sequence[str], envelope_sender: str, found: Scan) -> str | None:
    """Why a credential bound to `senders` (domains and addresses; none: anything) may not send this, or None.

    The envelope sender (unless null) and the addresses in From and Sender must all be its own. A From that cannot be parsed strictly,
    or more than one, is not anybody's.
    """
    if not senders:
        return None
    if envelope_sender and not _owns(senders, envelope_sender):
        return f"the envelope sender {envelope_sender} is not one of its senders"
    author = from_address(found.from_values)
    if not author:
        return "the header From is missing, repeated or not one address"
    if not _owns(senders, author):
        return f"the From address {author} is not one of its senders"
    if found.sender_values:
        agent = from_address(found.sender_values)
        if not agent or not _owns(senders, agent):
            return f"the Sender address {agent or '(unreadable)'} is not one of its senders"
    return None


def report_author(senders: Sequence[str], sender: str) -> str | None:
    """The From of a report of ours to `sender` at an upstream bound to `senders`, or None where MAILER-DAEMON at his domain will do.

    Else himself, whose mail it sends, or the first address that it may use: a report is not lost to a credential of single addresses.
    """
    if not senders or _owns(senders, f"MAILER-DAEMON@{domain_of(sender)}"):
        return None
    if _owns(senders, sender):
        return sender
    return senders[0] if "@" in senders[0] else f"MAILER-DAEMON@{senders[0]}"


def _owns(senders: Sequence[str], address: str) -> bool:
    return any(pattern in senders for pattern in patterns_for(address))
