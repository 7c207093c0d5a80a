"""What a scripted upstream shall do wrong, and when: actions, and the rules that hand them out.

A rule names a phase and may narrow it to the nth connection, the nth transaction or one recipient; it may be used up. The oldest
rule that fits and is not used up decides, so rules queue: twice this, then that, then as usual.
"""

import asyncio
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["connect", "greeting", "ehlo", "starttls", "tls", "auth", "mail", "rcpt", "data", "content", "final", "rset", "quit"]


@dataclass(frozen=True, slots=True)
class Say:
    """Reply with these octets instead; CRLF is added if missing. A 2xx or 3xx lets the session go on; after 421 it is closed.

    In the content phase: after so many octets of it, and then read on.
    """

    octets: bytes
    after: int = 0


@dataclass(frozen=True, slots=True)
class Drip:
    """Like Say, in one segment per octet. Without octets: what would have been said anyway."""

    octets: bytes = b""
    after: int = 0


@dataclass(frozen=True, slots=True)
class Half:
    """Send the first half of this reply and close."""

    octets: bytes = b"250 2.0.0 Ok"
    after: int = 0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Send something that is no SMTP reply, and no TLS record either."""

    octets: bytes = b"\x00\xff garbage \x16\x80\r\n"
    after: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection; in the content phase, after so many octets of it."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """Send RST; in the content phase, after so many octets of it."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Hang:
    """Neither answer nor read any more; in the content phase, after so many octets of it."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Hold:
    """Go on as usual, but only once the test has set the event; in the content phase, after so many octets of it."""

    until: asyncio.Event
    after: int = 0


Action = Say | Drip | Half | Garbage | Close | Reset | Hang | Hold


@dataclass(slots=True)
class _Rule:
    phase: Phase
    action: Action
    times: int | None
    connection: int | None
    transaction: int | None
    recipient: str | None

    def fits(self, phase: Phase, connection: int, transaction: int, recipient: str) -> bool:
        return (
            self.phase == phase
            and self.times != 0
            and self.connection in (None, connection)
            and self.transaction in (None, transaction)
            and self.recipient in (None, recipient)
        )


class Playbook:
    """The rules of one upstream."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def add(
        self,
        phase: Phase,
        action: Action | bytes,
        *,
        times: int | None,
        connection: int | None,
        transaction: int | None,
        recipient: str | None,
    ) -> None:
        """Add a rule behind the others. Plain bytes are a reply."""
        if phase not in get_args(Phase):
            raise ValueError(f"no such phase: {phase}")
        if isinstance(action, bytes):
            action = Say(action)
        self._rules.append(_Rule(phase, action, times, connection, transaction, recipient))

    def clear(self) -> None:
        self._rules.clear()

    def take(self, phase: Phase, *, connection: int, transaction: int, recipient: str = "") -> Action | None:
        """The action for this moment, or None to behave."""
        for rule in self._rules:
            if rule.fits(phase, connection, transaction, recipient):
                if rule.times is not None:
                    rule.times -= 1
                return rule.action
        return None
