"""Whether a user may send what came in, and an upstream's credential what is about to go out: fail-closed tenancy (law 6).

Of a credential `objection` is asked at intake and again on the bytes that leave; of a user once, on the bytes that came. Pure.
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
    if envelope_sender and not may_send(senders, envelope_sender):
        return f"the envelope sender {envelope_sender} is not one of its senders"
    author = from_address(found.get(b"from", ()))
    if not author:
        return "the header From is missing, repeated or not one address"
    if not may_send(senders, author):
        return f"the From address {author} is not one of its senders"
    if b"sender" in found:
        agent = from_address(found[b"sender"])
        if not agent or not may_send(senders, agent):
            return f"the Sender address {agent or '(unreadable)'} is not one of its senders"
    return None


def user_objection(senders: Sequence[str], envelope_sender: str, found: Scan) -> str | None:
    """Why a user may not send what came, or None. `*` names everything, also what cannot be read."""
    if "*" in senders:
        return None
    return objection(senders, envelope_sender, found) if senders else "it has none"


def report_author(senders: Sequence[str], sender: str) -> str | None:
    """The From of a report of ours to `sender` at an upstream bound to `senders`, or None where MAILER-DAEMON at his domain will do.

    Else himself, whose mail it sends, or the first address that it may use: a report is not lost to a credential of single addresses.
    """
    if not senders or may_send(senders, f"MAILER-DAEMON@{domain_of(sender)}"):
        return None
    if may_send(senders, sender):
        return sender
    return senders[0] if "@" in senders[0] else f"MAILER-DAEMON@{senders[0]}"


def may_send(senders: Sequence[str], address: str) -> bool:
    """Whether `senders` names this address, or its domain."""
    return any(pattern in senders for pattern in patterns_for(address))
