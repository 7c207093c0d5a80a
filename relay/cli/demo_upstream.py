"""A small SMTP server that plays a mail provider in the demo: TLS, a password, and a report of what arrived.

Takes mail only over TLS and after the right password, and delivers it nowhere.

State: the listening socket and the open connections.
"""

import asyncio
import base64
import binascii
import hmac
import ssl
from collections.abc import Callable
from typing import Literal, NamedTuple

_LINE_LIMIT_BYTES = 1024 * 1024
_EXTENSIONS = ("PIPELINING", "SIZE 52428800", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")


class Arrival(NamedTuple):
    """One message as it came in. `tls` is the protocol's version, `login` whose password was right."""

    upstream: str
    tls: str
    login: str
    sender: str
    recipients: tuple[str, ...]
    content: bytes


class DemoUpstream:
    """A provider called `name` with one customer. `security` says when TLS begins. `arrived` is told of each message."""

    def __init__(
        self, name: str, context: ssl.SSLContext, *, security: Literal["starttls", "tls"], username: str, password: str,
        arrived: Callable[[Arrival], None],
    ) -> None:  # fmt: skip
        self.name = name
        self.security = security
        self.username = username
        self.password = password
        self._context = context
        self._arrived = arrived
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        """Listen, and return the port."""
        context = self._context if self.security == "tls" else None
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context, limit=_LINE_LIMIT_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served in a task"
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError, ValueError):
            pass  # the client has gone, or the demo ends
        finally:
            writer.close()
            self._connections.discard(task)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        login, sender, recipients = "", "", list[str]()
        writer.write(f"220 {self.name} ESMTP\r\n".encode())
        while line := await reader.readline():
            verb, _, argument = line.decode("utf-8", "replace").strip().partition(" ")
            reply = "250 2.0.0 Ok"
            match verb.upper():
                case "EHLO":
                    offers = [self.name, *_EXTENSIONS, *(["AUTH PLAIN LOGIN"] if _tls(writer) else ["STARTTLS"])]
                    reply = "\r\n".join([*(f"250-{offer}" for offer in offers[:-1]), f"250 {offers[-1]}"])
                case "STARTTLS" if not _tls(writer):
                    writer.write(b"220 2.0.0 Go ahead\r\n")
                    await writer.start_tls(self._context)
                    continue
                case "AUTH" if _tls(writer):
                    login = await self._authenticate(argument, reader, writer)
                    reply = "235 2.7.0 Welcome" if login else "535 5.7.8 Wrong user name or password"
                case "MAIL" if login:
                    sender, recipients = _path(argument), []
                case "RCPT" if login:
                    recipients.append(_path(argument))
                case "DATA" if recipients:
                    writer.write(b"354 Go ahead\r\n")
                    content = await _content(reader)
                    self._arrived(Arrival(self.name, _tls(writer), login, sender, tuple(recipients), content))
                    recipients, reply = [], f"250 2.0.0 Ok: {self.name} has it"
                case "MAIL" | "RCPT" | "AUTH":
                    reply = "530 5.7.0 Authentication required, over TLS"
                case "RSET" | "NOOP":
                    recipients = []
                case "QUIT":
                    writer.write(b"221 2.0.0 Bye\r\n")
                    return
                case _:
                    reply = "503 5.5.1 Not now, or not known"
            writer.write(f"{reply}\r\n".encode())
            await writer.drain()

    async def _authenticate(self, argument: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Who logs in, or `""`."""
        mechanism, _, initial = argument.partition(" ")
        if mechanism.upper() == "PLAIN":
            words = _decoded(initial or await _ask(reader, writer, "")).split("\0")
            user, password = words[1:] if len(words) == 3 else ("", "")
        else:
            user = _decoded(initial or await _ask(reader, writer, "User Name"))
            password = _decoded(await _ask(reader, writer, "Password"))
        right = user == self.username and hmac.compare_digest(password.encode(), self.password.encode())
        return user if right else ""


async def _content(reader: asyncio.StreamReader) -> bytes:
    lines = []
    while (line := await reader.readuntil(b"\r\n")) != b".\r\n":
        lines.append(line[1:] if line[:1] == b"." else line)
    return b"".join(lines)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: str) -> str:
    writer.write(b"334 %b\r\n" % base64.b64encode(question.encode()))
    return (await reader.readline()).decode("ascii", "replace").strip()


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text).decode("utf-8", "replace")
    except binascii.Error:
        return ""


def _tls(writer: asyncio.StreamWriter) -> str:
    """The version of TLS in use, or `""`."""
    tls = writer.get_extra_info("ssl_object")
    return (tls.version() or "") if tls is not None else ""


def _path(argument: str) -> str:
    return argument.partition("<")[2].partition(">")[0]
