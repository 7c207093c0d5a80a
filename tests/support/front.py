"""The front of the relay without its back: a real listener and real intake over a spool in memory, and a delivery that only notes.

    async with Front(tmp_path) as front:
        async with front.client() as client:
            await client.greet()
            await client.deliver("app@acme.example", ["you@example.org"], b"Subject: hi\\r\\n\\r\\nhello\\r\\n")
        (message,) = front.taken

`config` is laid over a small one with two tenants, `listener` over its only listener. Faults are attributes of `front.spool`.
"""

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from relay.clock import ManualClock
from relay.config.model import Config
from relay.intake import Intake
from relay.listener.budget import Budget
from relay.listener.credentials import Credentials
from relay.listener.door import Door
from relay.listener.sockets import Inherited
from relay.mail.header import separator, split
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Claim, Content, ContentWriter, Draft, Lane, SpoolError, SpoolFull
from relay.spool.memory import MemorySpool
from relay.spool.wait import Waits
from tests.support.client import Client
from tests.support.eventually import PATIENCE_SECONDS

HOSTNAME = "relay.example"
CONFIG: dict[str, Any] = {
    "hostname": HOSTNAME,
    "upstreams": {"acme": {"host": "smtp.acme.example"}, "house": {"host": "smtp.house.example"}},
    "routes": [
        {"name": "acme", "sender": "acme.example", "upstream": "acme"},
        {"name": "globex", "sender": "globex.example", "upstream": "house"},
    ],
}


class Taken(NamedTuple):
    """One draft that the spool was given, and its content as it was then."""

    draft: Draft
    content: bytes

    @property
    def id(self) -> str:
        return self.draft.id

    @property
    def lane(self) -> Lane:
        return self.draft.lane

    @property
    def sender(self) -> str:
        return self.draft.envelope.sender

    @property
    def recipients(self) -> tuple[str, ...]:
        """Their addresses."""
        return tuple(recipient.address for recipient in self.draft.envelope.recipients)

    @property
    def prefix(self) -> bytes:
        return self.draft.prefix

    @property
    def sent(self) -> bytes:
        """What an upstream would get where nothing is rewritten."""
        block, rest = split(self.content)
        return self.prefix + block + separator(rest) + rest


class FaultySpool(MemorySpool):
    """A spool in memory that remembers what it was given, and fails as it is told."""

    def __init__(self, directory: Path, clock: ManualClock) -> None:
        super().__init__(directory, clock, backoff=lambda attempts: 60.0 * attempts)
        self.taken: list[Taken] = []
        self.puts = 0
        self.ill: str | None = None
        self.put_error: Exception | None = None
        self.open_error: Exception | None = None
        self.write_error: Exception | None = None
        self.gate: asyncio.Event | None = None  # what is put waits for it
        self.write_gate: asyncio.Event | None = None  # what is written to a file waits for it

    def obstacle(self, size: int = 0) -> SpoolError | None:
        return SpoolFull(self.ill) if self.ill is not None else None

    def writer(self) -> ContentWriter:
        if self.open_error is not None:
            raise self.open_error
        return _FaultyWriter(super().writer(), self)

    async def put(self, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Sequence[Claim | None]:
        self.puts += 1
        if self.put_error is not None:
            raise self.put_error
        if self.gate is not None:
            await self.gate.wait()
        read = [_octets_of(draft.content) for draft in drafts]
        claims = await super().put(drafts, claimed)
        self.taken += [Taken(draft, octets) for draft, octets in zip(drafts, read, strict=True)]
        return claims


def _octets_of(content: Content) -> bytes:
    if content.octets is not None:
        assert content.path is None, "content is octets or a file"
        return content.octets
    assert content.path is not None, "content is octets or a file"
    return content.path.read_bytes()


class _FaultyWriter:
    def __init__(self, inner: ContentWriter, spool: FaultySpool) -> None:
        self._inner = inner
        self._spool = spool

    async def write(self, octets: bytes) -> None:
        if self._spool.write_error is not None:
            raise self._spool.write_error
        if self._spool.write_gate is not None:
            await self._spool.write_gate.wait()
        await self._inner.write(octets)

    async def finish(self) -> Content:
        return await self._inner.finish()

    def discard(self) -> None:
        self._inner.discard()


class NotingDispatch:
    """A delivery with `slots` free ones for each lane that only notes what it is given."""

    def __init__(self) -> None:
        self.slots = 1_000_000
        self.reserved: Counter[Lane] = Counter()
        self.started: list[Claim] = []
        self.woken: list[tuple[Lane, float]] = []
        self.sending: set[tuple[str, str]] = set()  # messages, and the upstreams to which they are being sent
        self.start_error: Exception | None = None
        self.pausing: set[str] = set()

    def reserve(self, lane: Lane) -> bool:
        if self.reserved[lane] >= self.slots:
            return False
        self.reserved[lane] += 1
        return True

    def release(self, lane: Lane) -> None:
        self.reserved[lane] -= 1

    def start(self, claim: Claim) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.reserved[claim.lane] -= 1
        self.started.append(claim)

    def wake(self, lane: Lane, when: float) -> None:
        self.woken.append((lane, when))

    def paused(self, lane: Lane) -> bool:
        return lane.upstream in self.pausing

    def attempting(self, message_id: str, upstreams: Collection[str]) -> bool:
        return any((message_id, upstream) in self.sending for upstream in upstreams)

    @property
    def outstanding(self) -> int:
        """Slots reserved and neither used nor given back."""
        return self.reserved.total()


class Front:
    """The rooms in front of the spool, built from a configuration; its listener is open inside the `async with`."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any] | None = None, *, listener: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        own = {"bind": "127.0.0.1:0", "name": "local", **(listener or {})}
        self.config = Config.model_validate({**CONFIG, "listeners": [own], **(config or {})})
        self.directory = directory
        self.clock = ManualClock()
        self.spool = FaultySpool(directory / "spool", self.clock)
        self.dispatch = NotingDispatch()
        self._log = directory / "journal.log"
        self._descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._journal: Journal | None = Journal(self.clock, format="json", level="debug", descriptor=self._descriptor)
        self.waits = Waits()
        self.intake = Intake(self.config, Router(self.config), self.spool, self.dispatch, self._journal, self.clock, waits=self.waits)
        self.metrics = Metrics()
        self.credentials = Credentials(self.config.users, self.clock, delay=lambda failures: 0.001 * failures)
        numbers = itertools.count(1)
        self.door = Door(
            self.config.listeners[0], self.intake, self._journal, hostname=HOSTNAME, new_session_id=lambda: f"S{next(numbers)}",
            metrics=self.metrics, budget=budget, credentials=self.credentials, directory=directory,
        )  # fmt: skip
        self.address = ""
        self.inherited = Inherited()

    async def __aenter__(self) -> Self:
        self.address = await self.door.open(self.inherited)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.door.stop()
        await self.door.abort()
        await self.close()
        assert error is not None or self.door.budget.taken == 0, "memory is given back by every session that ends"
        if error is not None:
            error.add_note(f"-- journal --\n{self._log.read_text()[-4000:]}")

    async def close(self) -> None:
        """End what was begun by the constructor; for a front whose listener was never opened."""
        self._end_journal()
        self.credentials.close()
        await self.spool.close()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def client(self, *, chunk: int = 0, deadline: float = PATIENCE_SECONDS) -> Client:
        """A raw client of this listener, not yet connected."""
        return Client("127.0.0.1", self.port, chunk=chunk, deadline=deadline)

    def passes(self, seconds: float) -> None:
        """Let time pass for the sessions: their deadlines come nearer, and whose time is up is told."""
        now = asyncio.get_running_loop().time()
        for session in list(self.door._sessions):
            session.deadline -= seconds
            if session.deadline <= now:
                session.expire()

    @property
    def taken(self) -> list[Taken]:
        """Everything in custody, in the order in which it came."""
        return self.spool.taken

    def counted(self, reason: str) -> float:
        """How many refusals were counted for this reason."""
        labels = {"listener": self.config.listeners[0].name, "reason": reason}
        return self.metrics.registry.get_sample_value("relay_refused_total", labels) or 0

    @property
    def arriving(self) -> list[str]:
        """Files of content that has no record: there is none once its session is over."""
        return sorted(path.name for path in (self.directory / "spool" / "incoming").iterdir())

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The journal's events. Ends the journal: ask when all is over."""
        self._end_journal()
        events = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [event for event in events if name in ("", event["event"])]

    def _end_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
            os.close(self._descriptor)
