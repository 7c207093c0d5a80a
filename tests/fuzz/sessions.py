"""Whole sessions without a network, thousands a second: octets into a real Session, replies out, and what must hold afterwards.

    async with Rig(directory, newlines="normalize") as rig:
        heard = await rig.perform([b"EHLO x\\r\\n", b"QUIT\\r\\n"])

The thresholds are shrunk by `shrink`, so that content of some hundred octets goes to a file, is too long or too large.
"""

import asyncio
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from relay.listener import data, server
from relay.listener.server import Session
from tests.support.front import CONFIG, Front

#: Everything a client may hear. 451 is missing: it would be a fault of ours.
CODES = {214, 220, 221, 250, 252, 354, 421, 452, 500, 501, 503, 550, 552, 554, 555}
LIMIT_BYTES = 1500
ROUTES = [*CONFIG["routes"], {"name": "spam", "sender": "spam.example", "reject": "no"}]

_LINE = re.compile(rb"([2-5][0-9][0-9])([ -])([\x20-\x7e]*)")
_QUEUED = re.compile(rb"queued as [0-9A-F]+")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")


def shrink(set_attribute: Callable[[object, str, object], Any]) -> None:
    """Make the limits small. `set_attribute` is a monkeypatch's setattr, or setattr itself."""
    set_attribute(data, "MEMORY_LIMIT_BYTES", 200)
    set_attribute(data, "_CHUNK_BYTES", 200)
    set_attribute(data, "_PAUSE_BYTES", 300)
    set_attribute(data, "QUIET_SECONDS", 0.001)
    set_attribute(server, "_LINE_LIMIT_BYTES", 300)


class Heard(NamedTuple):
    """What came of a session: the replies without ids, and the contents taken into custody, each with its envelope."""

    replies: bytes
    taken: tuple[tuple[str, tuple[str, ...], bytes], ...]


class Pipe(asyncio.Transport):
    """A transport to nowhere that remembers what was written to it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, session: Session, idle: socket.socket) -> None:
        super().__init__({"peername": ("127.0.0.1", 25000), "socket": idle})
        self._loop = loop
        self._session = session
        self.written = bytearray()
        self.closed = False
        self.reading = True

    def write(self, octets: bytes | bytearray | memoryview) -> None:
        assert not self.closed, "a reply after the end"
        self.written += octets

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self._session.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Rig:
    """A listener without a socket, and the sessions that are played on it."""

    def __init__(self, directory: Path, *, newlines: str = "normalize") -> None:
        listener = {"message_size": LIMIT_BYTES, "recipients": 3, "newlines": newlines, "networks": ["127.0.0.0/8"]}
        self.front = Front(directory, {"routes": ROUTES, "aliases": {"root": ["a@x.example", "b@x.example"]}}, listener=listener)
        self._pair = socket.socketpair()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for end in self._pair:
            end.close()
        await self.front.close()
        await asyncio.sleep(0)
        assert self.front.events("fault") == []

    async def perform(self, packets: list[bytes], *, turns: int = 1) -> Heard:
        """Say all of it, with so many turns of the loop behind each packet, then FIN; and check what must always hold."""
        front, loop = self.front, asyncio.get_running_loop()
        front.taken.clear()
        session = Session(front.door, loop)
        pipe = Pipe(loop, session, self._pair[0])
        session.connection_made(pipe)
        for packet in packets:
            for _ in range(1000):
                if pipe.reading or pipe.closed:
                    break
                await asyncio.sleep(0)
            if pipe.closed:
                break
            session.data_received(packet)
            for _ in range(turns):
                await asyncio.sleep(0)
        if not pipe.closed:
            session.eof_received()
        async with asyncio.timeout(10):
            while front.door.sessions:
                await asyncio.sleep(0)
        return self._checked(bytes(pipe.written))

    def _checked(self, heard: bytes) -> Heard:
        front = self.front
        assert heard.endswith(b"\r\n") and heard.startswith(b"220 "), heard
        for line in heard[:-2].split(b"\r\n"):
            match = _LINE.fullmatch(line)
            assert match and len(line) <= 510, line
            assert int(match[1]) in CODES, line
        assert heard.count(b"queued as") == len(front.taken)
        assert front.dispatch.outstanding == 0, "a slot is reserved and not used"
        assert front.door.budget.taken == 0, "memory is taken and not given back"
        assert len(asyncio.all_tasks()) == 1, "a task is left"
        for message in front.taken:
            assert not _BARE.search(message.content)
            assert not message.content or message.content.endswith(b"\r\n")
            assert len(message.content) <= LIMIT_BYTES
        taken = tuple((message.sender, message.recipients, message.content) for message in front.taken)
        front.taken.clear()
        front.dispatch.started.clear()
        front.dispatch.woken.clear()
        return Heard(_QUEUED.sub(b"queued", heard), taken)
