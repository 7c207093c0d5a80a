"""A TCP proxy between the relay and an upstream that delays, stalls, cuts and corrupts at random, until it is told to heal.

    async with Chaos(server.host, server.port, rng, clear=False) as proxy:
        ... proxy.port ...
        proxy.heal()

Each connection is given one fate when it begins, with the octet at which it strikes, from `rng`. `harmed` has the numbers of those that
it struck, as the upstream counts its connections. Law: no fate changes what a server in clear takes for content, or makes a reply out of
another one; what comes of it must be the relay's to bear.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 16_384
_LINGER_SECONDS = 0.2  # how long what the relay still says reaches the upstream, after the upstream was cut off from the relay

#: Longer than a greeting and a reply to EHLO, where in clear a corrupted word is an extension that is not offered: that may refuse mail.
_EHLO_BYTES = 300

#: What may happen to a connection, and how often. The others are slow at most.
FATES = {
    "none": 45,
    "refuse": 4,  # closed before anything is said
    "cut": 14,  # both ways at once, in the midst of what the relay says
    "lose the reply": 14,  # what the relay says arrives; from some octet of the replies on it hears nothing, and then the end
    "corrupt what is said": 8,
    "corrupt what is heard": 8,
    "stall": 2,  # nothing passes any more, and nobody is told
    "pause": 5,  # nothing passes for some seconds
}


@dataclass(slots=True)
class _Connection:
    """One connection and its fate, which strikes at octet `at`, of what the relay says or hears."""

    fate: str
    at: int
    number: int = 0
    struck: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def strikes(self, passed: int, length: int, *, heard: bool) -> bool:
        """Whether its fate is now, among `length` octets that come after `passed` others in this direction."""
        here = self.fate in ("lose the reply", "corrupt what is heard") if heard else self.fate in ("cut", "corrupt what is said")
        return not self.struck and here and passed + length > self.at


class Chaos:
    """The proxy, listening inside its `async with`. `clear`: the upstream speaks without TLS, so that its ears are spared."""

    def __init__(self, host: str, port: int, rng: random.Random, *, clear: bool) -> None:
        self._upstream = (host, port)
        self._rng = rng
        self._clear = clear
        self._healed = False
        self._connections = 0
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self.port = 0
        self.harmed: set[int] = set()
        self.fates: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]
        self._begin(self._accept(self._listening), "accept")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for task in list(self._tasks):
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._listening
        self._listening.close()
        faults = [each for each in results if isinstance(each, Exception)]
        if faults and error is None:
            raise ExceptionGroup("the proxy itself failed", faults)

    def heal(self) -> None:
        """From now on pass everything on, on new connections."""
        self._healed = True

    def _begin(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"chaos: {name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._tasks.discard(done) if done.cancelled() or done.exception() is None else None)

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            relay, _ = await asyncio.get_running_loop().sock_accept(listening)
            self._begin(self._serve(relay), "connection")

    def _decide(self) -> _Connection:
        fate = "none" if self._healed else self._rng.choices(list(FATES), list(FATES.values()))[0]
        if self._clear and fate == "corrupt what is said":
            fate = "cut"
        # A login is 300 octets in clear and 3,000 under TLS, and most messages are small: strike there as often as in large content.
        at = int(10 ** self._rng.uniform(0.5, 5.5))
        if self._clear and fate == "corrupt what is heard":
            at += _EHLO_BYTES
        return _Connection(fate, at)

    async def _serve(self, relay: socket.socket) -> None:
        loop, connection = asyncio.get_running_loop(), self._decide()
        self.fates[connection.fate] += 1
        upstream = socket.socket()
        upstream.setblocking(False)
        try:
            if connection.fate == "refuse":
                return
            async with self._lock:  # so that the upstream counts as we do
                self._connections += 1
                connection.number = self._connections
                await loop.sock_connect(upstream, self._upstream)
            for one in (relay, upstream):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(relay, upstream, connection, heard=False), name="chaos: say")
                pumps.create_task(self._pump(upstream, relay, connection, heard=True), name="chaos: hear")
        finally:
            if connection.struck and self._rng.random() < 0.5:
                for one in (relay, upstream):
                    with contextlib.suppress(OSError):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
            relay.close()
            upstream.close()

    async def _pump(self, source: socket.socket, target: socket.socket, connection: _Connection, *, heard: bool) -> None:
        loop, passed = asyncio.get_running_loop(), 0
        slow = self._rng.random() < 0.2 and not self._healed
        with contextlib.suppress(OSError):
            while octets := await self._receive(source, connection):
                if slow:
                    await asyncio.sleep(self._rng.uniform(0, 0.05))
                due = connection.fate in ("stall", "pause") and passed + len(octets) > connection.at
                if due and await self._stalls(connection):
                    while await self._receive(source, connection):
                        pass
                    break
                if connection.strikes(passed, len(octets), heard=heard):
                    octets = self._strike(connection, octets, passed)
                    if not octets or not connection.fate.startswith("corrupt"):
                        with contextlib.suppress(OSError):
                            await loop.sock_sendall(target, octets)
                        if heard:
                            await asyncio.sleep(_LINGER_SECONDS)
                        break
                await loop.sock_sendall(target, octets)
                passed += len(octets)
        connection.over.set()

    async def _receive(self, source: socket.socket, connection: _Connection) -> bytes:
        """What comes next; nothing when the other direction is over."""
        receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(source, _CHUNK_BYTES))
        ending = asyncio.ensure_future(connection.over.wait())
        try:
            await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() and not connection.over.is_set() else b""
        finally:
            for each in (receiving, ending):
                each.cancel()
            await asyncio.wait({receiving, ending})
            if not receiving.cancelled():
                receiving.exception()

    def _strike(self, connection: _Connection, octets: bytes, passed: int) -> bytes:
        """What still passes of these octets."""
        connection.struck = True
        self.harmed.add(connection.number)
        place = max(0, connection.at - passed)
        if not connection.fate.startswith("corrupt"):
            return octets[:place]
        # The highest bit is what no digit of a reply has: in clear it can become none.
        return octets[:place] + bytes([octets[place] ^ 0x80]) + octets[place + 1 :]

    async def _stalls(self, connection: _Connection) -> bool:
        """Whether it is for good; if not, some seconds have gone by."""
        connection.at = 1 << 60
        if connection.fate == "pause":
            await asyncio.sleep(self._rng.uniform(0, 2))
            return False
        connection.struck = True
        self.harmed.add(connection.number)
        return True
