"""Connections from proxies, until their PROXY header has come: who they are for is known before anything else is said or done.

The header's octets are taken from the socket and not one more, so that a handshake or a command behind it is found there by who comes
next. Only trusted proxies are listened to. State: the listening socket, and a task for each connection whose header has not come whole.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from relay.config.values import Network, Uid, client_of, is_from
from relay.listener.access import Peer, peer_of_socket
from relay.listener.proxy import Header, Malformed, parse_header

#: A proxy speaks as soon as it has connected; the protocol asks for more than 3 s, a lost packet's worth. Postfix and Dovecot give 5.
HEADER_SECONDS = 5.0

#: When no connection can be accepted, because there are too many open files, asyncio's own servers wait as long.
_RETRY_SECONDS: Final = 1.0
_BACKLOG: Final = 1024
_AT_ONCE: Final = 100
_PEEK_BYTES: Final = 4096


class Arrivals:
    """The proxies' connections to one socket."""

    def __init__(
        self, listening: socket.socket, trusted: tuple[Network | Uid, ...], *, limit: int,
        welcome: Callable[[socket.socket, Peer], Awaitable[None]], turn_away: Callable[[socket.socket, Peer, str], None],
    ) -> None:  # fmt: skip
        """`welcome` gets a connection, which it closes in the end, and whose it is; `turn_away` is told why one is closed now.

        `limit`: of connections whose header has not come; more wait to be accepted.
        """
        self._listening = listening
        self._trusted = trusted
        self._limit = limit
        self._welcome = welcome
        self._turn_away = turn_away
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = False
        self._stopped = False
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._resume()

    def stop(self) -> None:
        """Accept no more, and forget those who have not said who they are."""
        self._stopped = True
        self._pause()
        self._listening.close()
        for task in self._tasks:
            task.cancel()

    async def drained(self) -> None:
        """Wait until nobody is between the socket and a session."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _resume(self) -> None:
        if not self._accepting and not self._stopped:
            self._accepting = True
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listening.fileno())

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if len(self._tasks) >= self._limit:
                self._pause()
                return
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._pause()
                self._loop.call_later(_RETRY_SECONDS, self._resume)
                return
            task = self._loop.create_task(self._arrive(connection), name="arrival")
            self._tasks.add(task)
            task.add_done_callback(partial(self._arrived, connection))

    def _arrived(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()  # where it was not handed on; a task that is cancelled before its first step has not done so itself
        self._tasks.discard(task)
        self._resume()

    async def _arrive(self, connection: socket.socket) -> None:
        """Read the header, and hand the connection on or say why not."""
        try:
            connection.setblocking(False)
            proxy = peer_of_socket(connection)
        except OSError:
            return  # reset before we came to look at it
        if not is_from(client_of(proxy.client), self._trusted):
            self._turn_away(connection, proxy, "not a trusted proxy")
            return
        try:
            async with asyncio.timeout(HEADER_SECONDS):
                header = await self._header(connection)
        except TimeoutError:
            self._turn_away(connection, proxy, f"no PROXY header in {HEADER_SECONDS:g} s")
        except Malformed as error:
            self._turn_away(connection, proxy, str(error))
        else:
            if header is not None:
                named = Peer(header.client) if header.client else proxy._replace(probe=True)
                await self._welcome(socket.socket(fileno=connection.detach()), named)

    async def _header(self, connection: socket.socket) -> Header | None:
        """None: the connection was closed again without a word, as by a proxy that looks whether we live. Raises Malformed."""
        octets = b""
        while True:
            await self._readable(connection)
            try:
                seen = connection.recv(_PEEK_BYTES, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:  # reset
                seen = b""
            if not seen and octets:
                raise Malformed("closed within its PROXY header")
            if not seen:
                return None
            header = parse_header(octets + seen)
            octets += connection.recv(len(seen) if header is None else header.size - len(octets))
            if header is not None:
                return header

    async def _readable(self, connection: socket.socket) -> None:
        future = self._loop.create_future()
        self._loop.add_reader(connection.fileno(), lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            self._loop.remove_reader(connection.fileno())
