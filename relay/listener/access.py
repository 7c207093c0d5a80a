"""Who may connect to a listener, and how many at once, in all and from one client.

State: the number of connections of this listener, and of each client that has any.
"""

import asyncio
import fcntl
import socket
import termios
from functools import lru_cache
from typing import NamedTuple

from relay.config.values import Network, client_of, is_from
from relay.mail.reply import Reply
from relay.unix import uid_of_peer

NOT_ALLOWED = Reply(554, "5.7.1", "Access denied")
_TOO_MANY = Reply(421, "4.7.0", "Too many connections")
_TOO_MANY_OF_ONE = Reply(421, "4.7.0", "Too many connections from one client")

_NO_OCTETS = bytes(4)  # an int of the kernel's, zero


class Peer(NamedTuple):
    """Who is at the other end. `address` is where the client is, as a trusted proxy says where there is one.

    `uid` is that of a process on this machine, by a Unix socket. `secure`: TLS protects what it says. `probe`: the proxy speaks for
    itself, or does not say for whom: it may look whether we live, and send no mail.
    """

    address: str = ""
    uid: int | None = None
    secure: bool = False
    probe: bool = False

    @property
    def client(self) -> str:
        """Who it is for limits, conditions and the log."""
        return self.address or f"uid:{self.uid}"


NOBODY = Peer()


def peer_of(transport: asyncio.BaseTransport) -> Peer | None:
    """Who has connected; None when the connection was reset before we came to look at it."""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return Peer(_plain(name[0]))
    connection = transport.get_extra_info("socket")
    return Peer(uid=uid_of_peer(connection)) if connection is not None and connection.family == socket.AF_UNIX else None


def peer_of_socket(connection: socket.socket) -> Peer:
    """The same of a socket. Raises OSError when the connection is gone."""
    return Peer(uid=uid_of_peer(connection)) if connection.family == socket.AF_UNIX else Peer(_plain(connection.getpeername()[0]))


def has_spoken(transport: asyncio.BaseTransport) -> bool:
    """Whether octets of a client have arrived that nobody has read yet."""
    connection = transport.get_extra_info("socket")
    return fcntl.ioctl(connection.fileno(), termios.FIONREAD, _NO_OCTETS) != _NO_OCTETS


def _plain(address: str) -> str:
    """An IPv4 client of a dual-stack socket arrives as ::ffff:a.b.c.d, a link-local one with our interface behind a %."""
    if ":" not in address:
        return address
    address = address.partition("%")[0]
    return address.removeprefix("::ffff:") if "." in address else address


class Access:
    """The gate of one listener."""

    def __init__(self, networks: tuple[Network, ...], *, connections: int, per_client: int | None = None) -> None:
        self._connections = connections
        self._per_client = per_client or connections
        self._open = 0
        self._open_by: dict[str, int] = {}
        self.allows = lru_cache(maxsize=1024)(lambda client: client.startswith("uid:") or is_from(client_of(client), networks))

    def enter(self, client: str, *, probe: bool = False) -> Reply | None:
        """Count in a connection from `client` (an address, or a user, whom the socket itself has let in), or say why it is not.

        What entered must leave. A `probe` may come from anywhere.
        """
        if not (probe or self.allows(client)):
            return NOT_ALLOWED
        if self._open >= self._connections:
            return _TOO_MANY
        own = self._open_by.get(client, 0)
        if own >= self._per_client:
            return _TOO_MANY_OF_ONE
        self._open += 1
        self._open_by[client] = own + 1
        return None

    def leave(self, client: str) -> None:
        """Count out a connection that `enter` has counted in as this client's."""
        self._open -= 1
        left = self._open_by.pop(client) - 1
        if left:
            self._open_by[client] = left
