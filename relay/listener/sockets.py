"""The sockets of one listener: made where it binds, or handed over by systemd (sd_listen_fds(3)).

State: which descriptors systemd has handed over and nobody has taken, and the path of a Unix socket while it is ours. Laws: what
systemd has made stays as it is, and is never taken away from the file system.
"""

import asyncio
import errno
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

from relay.config.listeners import Listener
from relay.unix import SocketPath

_FIRST_DESCRIPTOR: Final = 3
# IPv6 is switched off in many containers, and `localhost` has an address of it there all the same.
_NO_IPV6: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

_UNNAMED: Final = "unknown"  # what sd_listen_fds_with_names(3) calls a socket without a name


class Inherited:
    """What systemd has handed over, by name: a socket unit may have several sockets, and they share its name."""

    def __init__(self, descriptors: dict[str, list[int]] | None = None) -> None:
        self._descriptors = descriptors or {}

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "Inherited":
        """Read what is meant for this process, and leave nothing of it to its children."""
        pid, count, names = (environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
        if pid != str(os.getpid()) or not count.isdecimal():
            return cls()
        known = names.split(":") if names else []
        descriptors: dict[str, list[int]] = {}
        for place in range(int(count)):
            descriptor = _FIRST_DESCRIPTOR + place
            os.set_inheritable(descriptor, False)
            descriptors.setdefault(known[place] if place < len(known) else _UNNAMED, []).append(descriptor)
        return cls(descriptors)

    @property
    def names(self) -> list[str]:
        """Of what nobody has taken."""
        return list(self._descriptors)

    def take(self, name: str) -> list[socket.socket]:
        """The listening sockets of that name. Raises OSError when there are none."""
        descriptors = self._descriptors.pop(name, None)
        if descriptors is None:
            had = f"it has handed over {', '.join(self._descriptors)}" if self._descriptors else "it has handed over none"
            raise OSError(f"systemd has handed over no socket named {name}: {had}")
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for taken in sockets:
            listens = taken.type == socket.SOCK_STREAM and taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not listens or taken.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
                for each in sockets:
                    each.close()
                raise OSError(f"systemd's socket {name} takes no connections: it must be a ListenStream= with Accept=no")
        return sockets


NOTHING_INHERITED: Final = Inherited()


class Sockets:
    """The sockets of a listener as configured."""

    def __init__(self, settings: Listener) -> None:
        self._settings = settings
        self._place = SocketPath(Path(settings.path), mode=settings.mode, name="the socket") if settings.path else None

    async def open(self, inherited: Inherited) -> list[socket.socket]:
        """At least one, bound. Raises OSError."""
        settings = self._settings
        if settings.inherited:
            return inherited.take(settings.inherited)
        if self._place is not None:
            return [self._place.bind()]
        return await _bound(settings.host, settings.port)

    def release(self) -> None:
        """Take away what is in the file system. The sockets themselves are closed by who got them."""
        if self._place is not None:
            self._place.release()


def address_of(listening: socket.socket) -> str:
    """Where a socket listens, with its real port."""
    if listening.family == socket.AF_UNIX:
        path = listening.getsockname()
        return f"unix:{path if isinstance(path, str) else '@' + path[1:].decode(errors='replace')}"
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`; without those of IPv6 where this machine has no such, as long as there are others."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                sockets.append(_bound_to(socket.socket(family, kind, protocol), address))
            except OSError as error:
                if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                    raise
                missing = error
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        for made in sockets:
            made.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return sockets


def _bound_to(made: socket.socket, address: Any) -> socket.socket:
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:  # 0.0.0.0 may have a listener of its own
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
