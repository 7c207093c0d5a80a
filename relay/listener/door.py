"""One listener: the way in, who may come, and the sessions that are open.

State: the entrance and the sessions. Stopping closes the first and lets each of the others end when its work is done.
"""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from relay.config.listeners import Listener
from relay.intake import Intake
from relay.listener import server
from relay.listener.access import Access, Peer
from relay.listener.budget import FREE_BYTES, Budget
from relay.listener.certificate import Certificate
from relay.listener.credentials import Credentials
from relay.listener.data import reply_to
from relay.listener.entrance import Entrance
from relay.listener.logins import EXTENSIONS, Logins
from relay.listener.server import Session
from relay.listener.sockets import NOTHING_INHERITED, Inherited
from relay.listener.tls import Handshakes
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics

# So often in the time that a session may be idle it is looked whose time is up: every 5 s. One timer for all sessions, not one for each.
_SWEEPS = 60


class Door:
    """A listener as configured by `settings`. Sessions take from it what they share."""

    def __init__(
        self, settings: Listener, intake: Intake, journal: Journal, *, hostname: str, new_session_id: Callable[[], str],
        metrics: Metrics | None = None, budget: Budget | None = None, credentials: Credentials | None = None, directory: Path = Path(),
    ) -> None:  # fmt: skip
        """`budget`: the memory for mail on its way in, which all doors of a relay share. `credentials`: who may log in.
        `directory`: where a certificate is kept that we make ourselves."""
        self.settings = settings
        self.intake = intake
        self.journal = journal
        self.hostname = hostname.encode("ascii")
        self.new_session_id = new_session_id
        self.access = Access(settings.networks, connections=settings.connections, per_client=settings.connections_per_client)
        self.logins = Logins(settings, credentials, journal, count=self.count)
        self.budget = budget or Budget()
        self.commands = server.COMMANDS_LIMIT + 10 * settings.recipients
        self.stopping = False
        self.certificate = Certificate(settings, journal, hostname=hostname, directory=directory)
        self.handshakes = Handshakes(settings.name, journal, self.count)
        self._metrics = metrics or Metrics()
        self._sweeping = False
        self._sessions: set[Session] = set()
        self._entrance = Entrance(
            settings, lambda peer: Session(self, asyncio.get_running_loop(), peer), turned_away=self._turned_away
        )  # fmt: skip
        self._emptied: asyncio.Future[None] | None = None

    def extensions(self, peer: Peer) -> Reply:
        """The reply to EHLO for this client as it is now."""
        settings = self.settings
        starttls = settings.security == "starttls" and not peer.secure
        auth = self.logins.offers(peer) and not self.demands_tls(peer)
        return _extensions(self.hostname, settings.message_size, starttls=starttls, auth=auth)

    def demands_tls(self, peer: Peer) -> bool:
        """Whether this client must start TLS before anything else."""
        return self.settings.require_tls and not peer.secure

    async def open(self, inherited: Inherited = NOTHING_INHERITED) -> str:
        """Listen, and return the address with the real port. `inherited`: what systemd has handed over. Raises OSError."""
        if self.settings.security != "none":
            await self.certificate.open()
        return await self._entrance.open(inherited)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def stop(self) -> None:
        """Take no new connections and let each session end as soon as it can."""
        self.stopping = True
        self.certificate.close()
        self._entrance.stop()
        for session in list(self._sessions):
            session.stop()

    async def drained(self) -> None:
        """Wait until every session has ended."""
        await self._entrance.drained()
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
        if not self._sweeping:
            self._sweeping = True
            self._sweep()

    def closed(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def _turned_away(self, proxy: str, reason: str) -> None:
        self.count("proxy")
        self.journal.refused(
            session=self.new_session_id(), listener=self.settings.name, client=proxy, sender="", recipients="", reply=f"closed: {reason}"
        )  # fmt: skip

    def obstacle(self, size: int = 0) -> Reply | None:
        """Why content of so many octets would not be taken now."""
        if size > FREE_BYTES and self.budget.spent:  # ordinary mail needs nothing of it
            return reply_to("no memory")
        return self.intake.obstacle(size)

    def count(self, reason: str) -> None:
        """A client or its mail was refused, or a session was cut off, for `reason`."""
        self._metrics.refused(listener=self.settings.name, reason=reason)

    def _sweep(self) -> None:
        """End the sessions whose time is up, and look again later as long as there are any."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for session in [session for session in self._sessions if session.deadline <= now]:
            session.expire()
        self._sweeping = bool(self._sessions)
        if self._sweeping:
            loop.call_later(server.IDLE_SECONDS / _SWEEPS, self._sweep)


@lru_cache
def _extensions(hostname: bytes, message_size: int, *, starttls: bool, auth: bool) -> Reply:
    """A line for each extension."""
    lines = [hostname.decode(), "PIPELINING", f"SIZE {message_size}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "DSN", "CHUNKING"]
    if starttls:
        lines.append("STARTTLS")
    if auth:
        lines.extend(EXTENSIONS)
    return Reply(250, "", "\n".join(lines))
