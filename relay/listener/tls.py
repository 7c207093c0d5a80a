"""TLS on a client's connection: the handshake, and in plain words why one came to nothing.

Knows transports and OpenSSL's reasons, neither SMTP nor certificates. A client that fails is told of once an hour and counted every
time: a device that nobody repairs tries for ever.

State: who was told of, and when.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Final, NamedTuple, cast

from relay.observe.journal import Journal, Level

#: A client has so long for its handshake; one that sends nothing costs a place among the connections.
HANDSHAKE_SECONDS = 30.0

#: So long a client may take to confirm the end of TLS: what was said to it is on its way by then.
CLOSING_SECONDS = 1.0

_TELL_AGAIN_SECONDS: Final = 3600.0
_TOLD_LIMIT: Final = 1000


class Failure(NamedTuple):
    """Why a handshake failed: a word for the metrics, and a sentence about the client."""

    reason: str
    words: str


class HandshakeError(Exception):
    """There is no TLS, and the connection is gone."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.words)
        self.failure = failure


_NO_TLS: Final = Failure("no_tls", "it does not speak TLS where TLS was expected")
_UNTRUSTED: Final = Failure("certificate", "it does not accept the certificate")
_HUNG_UP: Final = Failure("hung_up", "it hung up during the handshake")
_BY_REASON: Final = {
    "HTTP_REQUEST": Failure("no_tls", "it speaks HTTP, not TLS"),
    "HTTPS_PROXY_REQUEST": Failure("no_tls", "it speaks HTTP, not TLS"),
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "UNKNOWN_PROTOCOL": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "UNSUPPORTED_PROTOCOL": Failure("version", "it knows no version of TLS that `minimum_tls` of this listener allows"),
    "TLSV1_ALERT_PROTOCOL_VERSION": Failure("version", "it takes none of our versions of TLS"),
    "INAPPROPRIATE_FALLBACK": Failure("version", "it came back with an older version of TLS, as if the newer one had failed"),
    "NO_SHARED_CIPHER": Failure("cipher", "it knows no cipher that we have for our certificate"),
    "NO_SUITABLE_SIGNATURE_ALGORITHM": Failure("cipher", "it knows no signature that our certificate can make"),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": Failure("cipher", "it found nothing in common with us"),
    "TLSV1_ALERT_UNKNOWN_CA": Failure("certificate", "it does not trust who issued the certificate"),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": Failure("certificate", "it says that the certificate has expired"),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _UNTRUSTED,
    "SSLV3_ALERT_BAD_CERTIFICATE": _UNTRUSTED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _UNTRUSTED,
    "TLSV1_ALERT_DECRYPT_ERROR": _UNTRUSTED,
}


async def shake_hands(
    transport: asyncio.Transport, protocol: asyncio.Protocol, context: ssl.SSLContext, *, early: bytes
) -> asyncio.Transport:
    """Begin TLS as the server, and return the transport that `protocol` now has. Raises HandshakeError.

    `early`: what has already been read of the handshake.
    """
    loop = asyncio.get_running_loop()
    if early:  # it can be taken when start_tls has set up TLS, which it does by call_soon in its first step
        loop.call_soon(loop.call_soon, _hand_over, transport, early)
    try:
        secured = await loop.start_tls(
            transport, protocol, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS, ssl_shutdown_timeout=CLOSING_SECONDS
        )
    except OSError as error:
        raise HandshakeError(_failure(error)) from None
    if secured is None or secured.is_closing():  # the connection ended without an error
        raise HandshakeError(_HUNG_UP)
    return secured


def _hand_over(transport: asyncio.Transport, octets: bytes) -> None:
    protocol = cast(asyncio.BufferedProtocol, transport.get_protocol())
    while octets and not transport.is_closing():
        buffer = memoryview(protocol.get_buffer(len(octets)))
        count = min(len(buffer), len(octets))
        buffer[:count] = octets[:count]
        protocol.buffer_updated(count)
        octets = octets[count:]


def _failure(error: OSError) -> Failure:
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "unknown"
        return _BY_REASON.get(reason) or Failure("other", f"OpenSSL says: {reason.lower().replace('_', ' ')}")
    if isinstance(error, ConnectionAbortedError):
        return Failure("timeout", f"the handshake took longer than {HANDSHAKE_SECONDS:g} seconds")
    return _HUNG_UP


class Handshakes:
    """The failed handshakes of one listener."""

    def __init__(self, listener: str, journal: Journal, count: Callable[[str], None]) -> None:
        """`count` is told the reason of every failure."""
        self._listener = listener
        self._journal = journal
        self._count = count
        self._told: dict[tuple[str, Failure], float] = {}

    def failed(self, client: str, failure: Failure) -> None:
        """Count it, and say it unless that was said lately."""
        self._count(f"tls_{failure.reason}")
        now, key = time.monotonic(), (client, failure)
        if now - self._told.get(key, -_TELL_AGAIN_SECONDS) < _TELL_AGAIN_SECONDS:
            return
        self._told.pop(key, None)
        if len(self._told) >= _TOLD_LIMIT:
            del self._told[next(iter(self._told))]
        self._told[key] = now
        level: Level = "info" if failure is _HUNG_UP else "warning"  # as every probe of the port does
        self._journal.note(level, f"no TLS with {client} at listener {self._listener}: {failure.words}")
