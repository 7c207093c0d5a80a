"""One listener: the socket, who may come in, and the sessions that are open.

State: the listening socket and the sessions. Stopping closes the first and lets each of the others end when its work is done.
"""

import asyncio
from collections.abc import Callable

from relay.config.model import Listener
from relay.intake import Intake
from relay.listener.access import Access
from relay.listener.server import Session
from relay.mail.reply import Reply
from relay.observe.journal import Journal


class Door:
    """A listener as configured by `settings`. Sessions take from it what they share."""

    def __init__(self, settings: Listener, intake: Intake, journal: Journal, *, hostname: str, new_session_id: Callable[[], str]) -> None:
        self.settings = settings
        self.intake = intake
        self.journal = journal
        self.hostname = hostname.encode("ascii")
        self.new_session_id = new_session_id
        self.extensions = _extensions(settings, hostname)
        self.access = Access(settings.networks, connections=settings.connections)
        self.stopping = False
        self._sessions: set[Session] = set()
        self._server: asyncio.Server | None = None
        self._emptied: asyncio.Future[None] | None = None

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
        while self._sessions:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    async def abort(self) -> None:
        """End what is left, finished or not."""
        for session in list(self._sessions):
            session.abort()
        await self.drained()

    def opened(self, session: Session) -> None:
        self._sessions.add(session)

    def closed(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


def _extensions(settings: Listener, hostname: str) -> Reply:
    """The reply to EHLO, a line for each extension."""
    lines = (hostname, "PIPELINING", f"SIZE {settings.message_size}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "DSN")
    return Reply(250, "", "\n".join(lines))
