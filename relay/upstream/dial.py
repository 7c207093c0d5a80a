"""One TCP connection to a host: its addresses one after the other, each with its share of the time.

The loops' own `create_connection` waits at an address that swallows packets until all the time is gone and never comes to the next:
a dead IPv6 address in front of a living IPv4 one must cost a delay, not the mail.
"""

import asyncio
import os
import socket
from typing import Any

from relay.mail.outcome import Failure, Phase


class NoConnection(Exception):
    """No address of the host could be connected to; the text says why in plain words."""

    def __init__(self, phase: Phase, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.phase = phase
        self.failure = failure


async def dial(host: str, port: int, *, source_address: str | None, timeout_seconds: float) -> socket.socket:
    """A connected socket, which is then the caller's. Raises NoConnection."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    last = NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, f"the name {host} has no address")
    addresses = await _addresses(host, port, source_address, timeout_seconds)
    for number, (family, address) in enumerate(addresses):
        share = (deadline - loop.time()) / (len(addresses) - number)
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            # Not every loop does this for a socket that it did not make; without it each small write waits 40 ms for an ACK.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source_address:
                connection.bind((source_address, 0))
            async with asyncio.timeout(share):
                await loop.sock_connect(connection, address)
            return connection
        except TimeoutError:
            connection.close()
            text = f"{host}:{port} did not answer within {timeout_seconds:g} s"
            last = NoConnection(Phase.CONNECT, Failure.TIMEOUT, text)
        except OSError as error:
            connection.close()
            last = NoConnection(Phase.CONNECT, Failure.UNREACHABLE, f"{host}:{port}: {reason_of(error)}")
        except BaseException:
            connection.close()
            raise
    raise last


async def _addresses(host: str, port: int, source_address: str | None, timeout_seconds: float) -> list[tuple[int, Any]]:
    """Where the host is, in the resolver's order (RFC 6724): family and socket address. Only what `source_address` can reach."""
    family = socket.AF_UNSPEC if not source_address else socket.AF_INET6 if ":" in source_address else socket.AF_INET
    try:
        async with asyncio.timeout(timeout_seconds):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        text = f"the name {host} cannot be resolved: {error.strerror}"
        raise NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, text) from None
    except TimeoutError:
        text = f"the name {host} could not be resolved within {timeout_seconds:g} s"
        raise NoConnection(Phase.RESOLVE, Failure.TIMEOUT, text) from None
    except (ValueError, OSError) as error:  # no name at all to the resolver or to IDNA
        raise NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, f"the name {host} cannot be used: {error}") from None
    return [(kind, address) for kind, _, _, _, address in found]


def reason_of(error: OSError) -> str:
    """The system's words; the loops put addresses and more into theirs, each in another way."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
