"""A raw SMTP client: says exactly what a test tells it, right or wrong, and checks what comes back.

async with Client(host, port) as client:
    await client.greet()
    await client.deliver("app@acme.example", ["you@example.org"], b"Subject: hi\\r\\n\\r\\nhello\\r\\n")
"""

import asyncio
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support.eventually import PATIENCE_SECONDS
from tests.support.wire import Wire


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply as it came: the code, and each line's text after the code."""

    code: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


class Client:
    """One connection. `host` may be the path of a Unix socket.

    `chunk`: send at most so many octets at a time, each in a segment of its own (1: octet by octet).
    """

    def __init__(self, host: str, port: int = 0, *, chunk: int = 0, deadline: float = PATIENCE_SECONDS) -> None:
        self._host = host
        self._port = port
        self._chunk = chunk
        self._deadline = deadline
        self._buffer = b""
        self._open: Wire | None = None
        self.transcript: list[str] = []
        self.extensions: tuple[str, ...] = ()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # -- single steps --------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        unix = self._host.startswith("/")
        family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in self._host else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self._host if unix else (self._host, self._port))
        except BaseException:
            connection.close()
            raise
        self._open = Wire(connection)

    async def send(self, octets: bytes) -> None:
        """Send these octets and wait for nothing."""
        self._note("c", octets)
        for start in range(0, len(octets), self._chunk or len(octets) or 1):
            await self._wire.send(octets[start : start + (self._chunk or len(octets))])
            await asyncio.sleep(0)

    async def reply(self) -> Reply:
        """Read one reply, whatever it is. Fails when the other side closes or says nothing in time."""
        lines: list[str] = []
        while True:
            line = (await self._line()).decode("utf-8", "replace")
            self.transcript.append(f"s> {line}")
            assert line[:3].isdigit() and line[3:4] in ("", " ", "-"), self._story(f"not a reply: {line!r}")
            lines.append(line[4:])
            if line[3:4] != "-":
                return Reply(int(line[:3]), tuple(lines))

    async def expect(self, code: int, text: str = "") -> Reply:
        """Read one reply, and fail unless it has this code and, if given, this text somewhere in it."""
        reply = await self.reply()
        assert reply.code == code and text in reply.text, self._story(f"expected {code} {text}".rstrip())
        return reply

    async def command(self, line: str, code: int, text: str = "") -> Reply:
        """Send one command and expect its reply."""
        await self.send(line.encode() + b"\r\n")
        return await self.expect(code, text)

    async def expect_close(self) -> None:
        """Fail unless the other side closes now without another word."""
        rest = self._buffer
        while not rest and (octets := await self._receive()):
            rest += octets
        assert not rest, self._story(f"expected the end, got {rest!r}")

    def finish_sending(self) -> None:
        """Send FIN and keep listening."""
        self._note("c", b"<FIN>")
        self._wire.finish_sending()

    def reset(self) -> None:
        """Drop the connection with RST."""
        self._wire.reset()
        self._open = None

    def close(self) -> None:
        if self._open:
            self._open.close()
            self._open = None

    # -- whole conversations -------------------------------------------------------------------------------------------

    async def greet(self, name: str = "client.test") -> Reply:
        """Expect the greeting, say EHLO, and remember the extensions."""
        await self.expect(220)
        return await self.hello(name)

    async def hello(self, name: str = "client.test") -> Reply:
        reply = await self.command(f"EHLO {name}", 250)
        self.extensions = reply.lines[1:]
        return reply

    async def start_tls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """STARTTLS and the handshake; EHLO is the caller's to repeat."""
        await self.command("STARTTLS", 220)
        await self.shake_hands(context, name)

    async def shake_hands(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """The TLS handshake alone, for implicit TLS."""
        async with asyncio.timeout(self._deadline):
            await self._wire.start_tls(context, server_side=False, server_hostname=name)

    async def deliver(self, sender: str, recipients: Iterable[str], content: bytes, *, parameters: str = "", code: int = 250) -> Reply:
        """One transaction, lock-step, with dots stuffed; gives the last reply, which must have `code`."""
        await self.command(f"MAIL FROM:<{sender}> {parameters}".rstrip(), 250)
        for recipient in recipients:
            await self.command(f"RCPT TO:<{recipient}>", 250)
        await self.command("DATA", 354)
        await self.send(stuffed(content))
        return await self.expect(code)

    async def quit(self) -> None:
        await self.command("QUIT", 221)
        await self.expect_close()

    # -- the wire --------------------------------------------------------------------------------------------------------

    @property
    def _wire(self) -> Wire:
        assert self._open, "the client is not connected"
        return self._open

    async def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            octets = await self._receive()
            assert octets, self._story(f"the other side closed after {self._buffer!r}")
            self._buffer += octets
        line, _, self._buffer = self._buffer.partition(b"\n")
        assert line.endswith(b"\r"), self._story(f"a reply line without CRLF: {line!r}")
        return line[:-1]

    async def _receive(self) -> bytes:
        try:
            async with asyncio.timeout(self._deadline):
                return await self._wire.receive()
        except TimeoutError:
            raise AssertionError(self._story(f"nothing came within {self._deadline:g} s")) from None

    def _note(self, side: str, octets: bytes) -> None:
        self.transcript.append(f"{side}> {octets[:200]!r}{f' ({len(octets)} octets)' if len(octets) > 200 else ''}")

    def _story(self, complaint: str) -> str:
        return "\n".join([complaint, *self.transcript[-20:]])


def stuffed(content: bytes) -> bytes:
    """Content as it goes over the wire: dots stuffed, a last line end supplied, and the end of data (RFC 5321 section 4.5.2)."""
    if content and not content.endswith(b"\r\n"):
        content += b"\r\n"
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"
