"""One TCP connection under full control of a test: exact bytes, TLS started at any moment, RST, half-close.

Used by both ends of the test support. Built on non-blocking sockets and `ssl.MemoryBIO` instead of streams, so that nothing is
read ahead of a STARTTLS, nothing is buffered that a test did not ask for, and asyncio and uvloop behave alike.
"""

import asyncio
import contextlib
import socket
import ssl
import struct

CHUNK_BYTES = 64 * 1024


class Wire:
    """A connected socket, in clear or under TLS."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # the other side may have gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None

    @property
    def tls_version(self) -> str:
        """For example `TLSv1.3`, or `""` in clear."""
        return (self._tls.version() or "") if self._tls else ""

    async def receive(self) -> bytes:
        """The next bytes, at most 64 KiB; `b""` at the end, however it came."""
        try:
            if self._tls is None:
                return await self._receive_raw()
            return await self._receive_tls(self._tls)
        except (ConnectionError, ssl.SSLError):
            return b""

    async def send(self, octets: bytes) -> None:
        """Send all of it. Raises ConnectionError when the other side is gone."""
        if self._tls is None:
            await self._send_raw(octets)
            return
        for start in range(0, len(octets), CHUNK_BYTES):
            self._tls.write(octets[start : start + CHUNK_BYTES])
            await self._flush()

    async def start_tls(self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None) -> None:
        """Do the handshake. Raises ssl.SSLError when it fails and ConnectionError when the other side goes away."""
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                octets = await self._receive_raw()
                if not octets:
                    raise ConnectionResetError("the other side closed during the handshake") from None
                self._incoming.write(octets)
            except ssl.SSLError:
                with contextlib.suppress(ConnectionError):
                    await self._flush()  # the alert
                raise
        await self._flush()
        self._tls = tls

    def finish_sending(self) -> None:
        """Send FIN and keep reading."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST: what was not yet read by the other side is lost."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Close with FIN. Unread input is drained first, for otherwise the kernel would send RST instead."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while self._socket.recv(CHUNK_BYTES):
                pass
        self._socket.close()

    async def _receive_tls(self, tls: ssl.SSLObject) -> bytes:
        while True:
            try:
                return tls.read(CHUNK_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                octets = await self._receive_raw()
                if not octets:
                    return b""
                self._incoming.write(octets)

    async def _flush(self) -> None:
        octets = self._outgoing.read()
        if octets:
            await self._send_raw(octets)

    async def _receive_raw(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, CHUNK_BYTES)

    async def _send_raw(self, octets: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, octets)
