"""How connections reach one listener: its sockets, and for each what accepts there.

A connection that nobody speaks for goes to a session as it comes; one from a proxy only when its header is known (`listener.arrival`).

State: the sockets while they are open. Law: once stopped, nothing of them is left, and nobody is on the way in but who has to be waited
for.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from relay.config.listeners import Listener
from relay.listener.access import NOT_ALLOWED, Peer
from relay.listener.arrival import Arrivals
from relay.listener.sockets import NOTHING_INHERITED, Inherited, Sockets, address_of

_BACKLOG: Final = 1024


class Entrance:
    """The way in as configured by `settings`. Opened once, then stopped and drained."""

    def __init__(
        self, settings: Listener, session: Callable[[Peer | None], asyncio.Protocol], *, turned_away: Callable[[str, str], None]
    ) -> None:  # fmt: skip
        """`session` makes one for who comes in; None: who that is the connection itself tells. `turned_away` hears who did not, and why."""
        self._settings = settings
        self._session = session
        self._turned_away = turned_away
        self._sockets = Sockets(settings)
        self._servers: list[asyncio.Server] = []
        self._arrivals: list[Arrivals] = []

    async def open(self, inherited: Inherited = NOTHING_INHERITED) -> str:
        """Accept connections, and return where, with real ports. Raises OSError."""
        sockets = await self._sockets.open(inherited)
        try:
            addresses = [address_of(listening) for listening in sockets]
            while sockets:
                await self._accept(sockets[0])
                del sockets[0]
        except BaseException:
            for listening in sockets:
                listening.close()
            self.stop()
            raise
        return ", ".join(addresses)

    def stop(self) -> None:
        """Accept nobody any more."""
        for server in self._servers:
            server.close()
        for arrivals in self._arrivals:
            arrivals.stop()
        self._servers = []
        self._sockets.release()

    async def drained(self) -> None:
        """Wait until nobody is between a socket and a session."""
        for arrivals in self._arrivals:
            await arrivals.drained()

    async def _accept(self, listening: socket.socket) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        if settings.proxy_protocol:
            self._arrivals.append(
                Arrivals(listening, settings.proxy_protocol, limit=settings.connections, welcome=self._welcome, turn_away=self._turn_away)
            )
        else:  # Unix sockets too: create_unix_server takes their paths away from Python 3.13 on, also those that are not ours
            self._servers.append(await loop.create_server(lambda: self._session(None), sock=listening, backlog=_BACKLOG))

    async def _welcome(self, connection: socket.socket, peer: Peer) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self._session(peer), connection)
        except BaseException:
            connection.close()
            raise

    def _turn_away(self, connection: socket.socket, proxy: Peer, reason: str) -> None:
        self._turned_away(proxy.client, reason)
        if self._settings.security != "tls":
            with contextlib.suppress(OSError):
                connection.send(NOT_ALLOWED.line() + b"\r\n")
