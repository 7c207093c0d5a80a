"""Who may connect to a listener, and how many at once.

State: the number of connections of this listener.
"""

from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from relay.mail.reply import Reply

_NOT_ALLOWED = Reply(554, "5.7.1", "Access denied")
_TOO_MANY = Reply(421, "4.7.0", "Too many connections")


class Access:
    """The gate of one listener."""

    def __init__(self, networks: tuple[IPv4Network | IPv6Network, ...], *, connections: int) -> None:
        self._connections = connections
        self._open = 0
        self._allowed = lru_cache(maxsize=1024)(lambda client: _is_in(client, networks))

    def enter(self, client: str) -> Reply | None:
        """Count a connection from `client` (an IP address) in, or say why not. What entered must leave."""
        if not self._allowed(client):
            return _NOT_ALLOWED
        if self._open >= self._connections:
            return _TOO_MANY
        self._open += 1
        return None

    def leave(self) -> None:
        self._open -= 1


def _is_in(client: str, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    """An IPv4 client of a dual-stack socket arrives as ::ffff:a.b.c.d."""
    address = ip_address(client.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address in network for network in networks)
