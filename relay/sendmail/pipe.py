"""`sendmail -bs`: the caller speaks SMTP on standard input and output, and the relay answers. Nothing is changed on the way."""

import os
import socket
from collections.abc import Callable

_CHUNK_BYTES = 64 * 1024


def exchange(connection: socket.socket) -> None:
    """Carry octets both ways until the relay ends the session. Raises OSError."""
    import select

    connection.settimeout(None)
    sources: dict[int, Callable[[bytes], None]] = {connection.fileno(): _say}
    if octets := os.read(connection.fileno(), _CHUNK_BYTES):
        _say(octets)
        sources[0] = connection.sendall  # not before the greeting: who talks earlier is cut off
    while connection.fileno() in sources:
        ready, _, _ = select.select(list(sources), [], [])
        for descriptor in ready:
            octets = os.read(descriptor, _CHUNK_BYTES)
            if octets:
                sources[descriptor](octets)
                continue
            del sources[descriptor]
            if descriptor == 0:  # the relay answers what it has got, and then ends the session
                connection.shutdown(socket.SHUT_WR)


def _say(octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(1, view) :]
