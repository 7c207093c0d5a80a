"""One listener: the socket, who may come in, and the sessions that are open.

State: the listening socket and the sessions. Stopping closes the first and lets each of the others end when its work is done.
"""

import asyncio
from collections.abc import Callable

from relay.config.model import Listener
from relay.intake import Intake
from relay.listener.access import Access
from relay.listener.server import Session
from relay.observe.journal import Journal


class Door:
    """A listener as configured by `settings`. Sessions take from it what they share."""

    def __init__(self, settings: Listener, intake: Intake, journal: Journal, *, hostname: str, new_session_id: Callable[[], str]) -> None:
        self.settings = settings
        self.intake = intake
        self.journal = journal
        self.hostname = hostname.encode("ascii")
        self.new_session_id = new_session_id
        self.access = Access(settings.networks, connections=settings.connections)
        self.stopping = False
        self._sessions: set[Session] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen, and return the address with the real port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Session(self, loop), self.settings.host, self.settings.port, backlog=1024, reuse_address=True
        )
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def stop(self) -> None:
        """Take no new connections and let each session end as soon as it can."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            session.stop()

    async def drained(self) -> None:
        """Wait until every session has ended."""
        while tasks := [session.task for session in self._sessions if session.task is not None]:
            await asyncio.wait(tasks)

    async def abort(self) -> None:
        """End what is left. A message that is not acknowledged yet is the client's to send again."""
        tasks = [session.task for session in self._sessions if session.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def opened(self, session: Session) -> None:
        self._sessions.add(session)

    def closed(self, session: Session) -> None:
        self._sessions.discard(session)
