"""Many clients that send until they are cut off, and the account of what they were promised."""

import asyncio
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.record import Transaction

_ID = re.compile(rb"^X-Id: (\S+)\r$", re.MULTILINE)

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none, limits: {{connections: {connections}}}}}
routes:
  - {{sender: "*", upstream: up}}
retry: {{first: 1s, max: 2s, expire: 1h}}
spool: {{directory: {directory}}}
shutdown_timeout: 10s
log: {{format: json}}
"""


def config(directory: Path, port: int, *, connections: int) -> str:
    return CONFIG.format(directory=directory / "spool", port=port, connections=connections)


class Load:
    """Messages with ids of their own. `acknowledged`: for these a 250 has arrived. `offered`: all that may have gone out."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._numbers = itertools.count(1)
        self.offered: set[str] = set()
        self.acknowledged: set[str] = set()
        self._ending = False

    async def until(self, relay: RelayProcess, *, sessions: int, acknowledged: int) -> list[asyncio.Task[None]]:
        """Send from so many sessions at once; comes back when so many more are acknowledged, and goes on sending."""
        self._ending = False
        enough = len(self.acknowledged) + acknowledged
        reached = asyncio.Event()
        running = [asyncio.create_task(self._session(relay, enough, reached), name=f"load {n}") for n in range(sessions)]
        await asyncio.wait_for(reached.wait(), 30)
        return running

    async def ended(self, running: Iterable[asyncio.Task[None]]) -> None:
        """Wait for sessions that are being cut off."""
        await asyncio.gather(*running)

    def ending(self) -> None:
        """From now on it is no fault when a session breaks."""
        self._ending = True

    async def _session(self, relay: RelayProcess, enough: int, reached: asyncio.Event) -> None:
        try:
            async with Client(*relay.address()) as client:
                await client.greet()
                while not self._ending:
                    if len(self.acknowledged) >= enough:
                        reached.set()
                    await self._send(client)
        except (AssertionError, OSError):
            if not self._ending:
                raise

    async def _send(self, client: Client) -> None:
        name = f"m{next(self._numbers)}"
        size = self._rng.choices([200, 20_000, 300_000, 1_500_000], weights=[90, 8, 1, 1])[0]
        lines = b"".join(b"%074d\r\n" % number for number in range(size // 76))
        self.offered.add(name)
        recipients = [f"{name}@example.org"] if self._rng.random() < 0.9 else [f"{name}@example.org", f"{name}-too@example.org"]
        await client.deliver("app@acme.example", recipients, b"X-Id: %b\r\n\r\n%b" % (name.encode(), lines))
        self.acknowledged.add(name)


def arrivals(accepted: Iterable[Transaction]) -> Counter[str]:
    """How often each message was accepted, by id, and checks that each came whole."""
    seen: Counter[str] = Counter()
    for transaction in accepted:
        match = _ID.search(transaction.content)
        assert match, transaction.content[:300]
        _, _, body = transaction.content.partition(b"\r\n\r\n")
        assert body == b"".join(b"%074d\r\n" % number for number in range(len(body) // 76)), "content arrives as it was sent"
        seen[match[1].decode()] += 1
    return seen
