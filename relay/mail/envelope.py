"""What travels outside the content: who sent it, who shall get it, and how it reached us (RFC 5321 section 2.3.1).

Addresses are plain `str`, already parsed by `mail.address`: `local@domain`, or `""` for the null reverse-path. Values of the hot path
are NamedTuples throughout the program: a frozen dataclass costs five times as much to make.
"""

from typing import NamedTuple


class Recipient(NamedTuple):
    """One forward-path with what the client said about it.

    `notify` and `orcpt` are RFC 3461's parameters as given (`""`: not given). `in_doubt` says that an upstream may already
    have taken the message for this recipient: a transaction ended after the last octet and before its reply. `warned`: the sender
    has been told that it still waits.
    """

    address: str
    notify: str = ""
    orcpt: str = ""
    in_doubt: bool = False
    warned: bool = False


class Envelope(NamedTuple):
    """One transaction's envelope. `smtputf8`: the client declared it (RFC 6531). `ret` and `envid` are RFC 3461's."""

    sender: str
    recipients: tuple[Recipient, ...]
    smtputf8: bool = False
    ret: str = ""
    envid: str = ""


class Origin(NamedTuple):
    """Where a message came from: the facts that route conditions may ask for again at every attempt.

    `header_from` is the address in the header From, in lower case, or `""` when there is none or more than one.
    """

    listener: str = ""
    client: str = ""
    user: str = ""
    session: str = ""
    header_from: str = ""


class Summary(NamedTuple):
    """Header fields kept for the operator's eye in the delivery log: decoded, at most 200 characters each."""

    to: str = ""
    cc: str = ""
    subject: str = ""


NO_ORIGIN = Origin()
NO_SUMMARY = Summary()


class Facts(NamedTuple):
    """What a route's conditions look at, for one recipient."""

    sender: str
    recipient: str
    origin: Origin = NO_ORIGIN
