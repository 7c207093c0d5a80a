"""What the tests of delivery share: a small configuration, claims, an upstream pool that answers as told, and a journal to read."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from relay.clock import Clock
from relay.config.model import Config
from relay.mail.envelope import NO_ORIGIN, Envelope, Origin, Recipient
from relay.mail.outcome import Outcome, Phase, outcome_of_reply
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.spool.base import Claim, Content, Lane, MessageId
from relay.upstream.transaction import Outgoing

LANE = Lane("acme", "acme")
SENT = outcome_of_reply(Phase.FINAL, Reply(250, "2.0.0", "Ok"))
PREFIX = b"Received: from app ([127.0.0.1]) by relay.example.net with ESMTP id 1; now\r\n"
CONTENT = b"From: App <app@acme.example>\r\nSubject: hi\r\nBcc: secret@example.org\r\n\r\nhello\r\n"

ROUTES: list[dict[str, Any]] = [
    {"name": "acme", "sender": "acme.example", "upstream": "acme", "fallback": ["spare", "house"]},
    {"name": "globex", "sender": "globex.example", "upstream": "globex"},
]


def config_of(
    routes: Sequence[Mapping[str, Any]] | None = None, *, upstreams: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
) -> Config:
    """Upstreams acme, spare, house and globex, changed key by key by `upstreams`; the routes above unless others are given."""
    named = {name: {"host": f"smtp.{name}.example", "security": "none"} for name in ("acme", "spare", "house", "globex")}
    for name, keys in (upstreams or {}).items():
        named[name] = {"host": f"smtp.{name}.example", "security": "none", **keys}
    given = ROUTES if routes is None else list(routes)
    return Config.model_validate({"hostname": "relay.example.net", "upstreams": named, "routes": given, **more})


def claim_of(
    *recipients: Recipient | str,
    sender: str = "app@acme.example",
    lane: Lane = LANE,
    content: Content | bytes = CONTENT,
    created: float = 1_800_000_000.0,
    attempt: int = 1,
    prefix: bytes = PREFIX,
    origin: Origin = NO_ORIGIN,
    id: str = "00000000000A1",
) -> Claim:
    named = tuple(Recipient(r) if isinstance(r, str) else r for r in recipients or ("you@example.org",))
    kept = Content(len(content), content, eight_bit=not content.isascii()) if isinstance(content, bytes) else content
    return Claim(MessageId(id), 7, lane, Envelope(sender, named), kept, created, attempt, created + 900, prefix, origin)


class Handed(NamedTuple):
    """One transaction as it was handed to the pool: the upstream, the message, and all of its octets."""

    upstream: str
    message: Outgoing
    octets: bytes

    @property
    def recipients(self) -> list[str]:
        return [recipient.address for recipient in self.message.recipients]


class FakePool:
    """Upstreams that answer what `answer(upstream, recipients)` says, by default that they took it."""

    def __init__(self, answer: Callable[[str, list[str]], Sequence[Outcome]] | None = None) -> None:
        self._answer = answer or (lambda _, recipients: [SENT] * len(recipients))
        self.handed: list[Handed] = []
        self.limits: dict[str, int] = {}

    def recipients_limit(self, name: str) -> int:
        return self.limits.get(name, 0)

    riding = frozenset[str]()

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        octets = message.octets
        if message.rest is not None:
            octets += b"".join([piece async for piece in message.rest()])
        self.handed.append(Handed(name, message, octets))
        return list(self._answer(name, self.handed[-1].recipients))


class Log:
    """A journal of its own whose events can be read once all is said."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._descriptor = os.open(directory / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.journal = Journal(clock, format="json", level="debug", descriptor=self._descriptor)
        self._text: str | None = None

    def text(self) -> str:
        """Everything written. Ends the journal."""
        if self._text is None:
            self.journal.close()
            size = os.fstat(self._descriptor).st_size
            self._text = os.pread(self._descriptor, size, 0).decode()
            os.close(self._descriptor)
        return self._text

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names, or all of them, in their order."""
        found = [json.loads(line) for line in self.text().splitlines()]
        return [event for event in found if not names or event["event"] in names]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events()]
