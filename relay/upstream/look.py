"""A second look at a server that could not be used: what it speaks, which certificate it shows, on which ports it listens.

For people, never for mail: nothing here is trusted, no name and no password is sent. Whatever cannot be seen is left empty, and a look
takes some seconds at most.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.x509.oid import NameOID

from relay.mail.reply import printable

_LOOK_SECONDS: Final = 5.0
_LINE_BYTES: Final = 4096
_LINES: Final = 100

#: Where servers take mail from programs: RFC 8314, RFC 6409, RFC 5321, and what providers add where 25 and 587 are blocked.
USUAL_PORTS: Final = (465, 587, 25, 2525)


class Certificate(NamedTuple):
    """What a certificate says. `names`: those it is good for; `issuer`: who signed it. `expired`: when it was read."""

    names: tuple[str, ...]
    issuer: str
    since: datetime
    until: datetime
    self_signed: bool
    expired: bool


class Look(NamedTuple):
    """What was seen. `greeting`: in clear text. `tls`: the version that it speaks, with whomever. `ports`: others that answer."""

    greeting: str = ""
    starttls: bool = False
    tls: str = ""
    certificate: Certificate | None = None
    ports: tuple[int, ...] = ()


NOTHING_SEEN: Final = Look()


def read_certificate(der: bytes) -> Certificate:
    """What the certificate says. Raises ValueError when it is none."""
    found = x509.load_der_x509_certificate(der)
    names: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        alternative = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += [printable(name) for name in alternative.get_values_for_type(x509.DNSName)]
        names += [str(address) for address in alternative.get_values_for_type(x509.IPAddress)]
    names = names or _common(found.subject)
    issuer = _common(found.issuer) or [printable(found.issuer.rfc4514_string())]
    self_signed = found.issuer == found.subject
    since, until = found.not_valid_before_utc, found.not_valid_after_utc
    return Certificate(tuple(names), issuer[0], since, until, self_signed, expired=until < datetime.now(UTC))


def _common(name: x509.Name) -> list[str]:
    kinds = (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
    return [printable(str(found.value)) for kind in kinds for found in name.get_attributes_for_oid(kind)]


def days_left(certificate: Certificate) -> int:
    return (certificate.until - datetime.now(UTC)).days


async def look_at_tls(address: str, port: int, *, host: str, source: str | None = None, starttls: bool = False) -> Look:
    """TLS with whoever is there, from the first octet or after STARTTLS: its version and certificate."""
    seen, context = NOTHING_SEEN, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLError, ValueError):  # what the machine's OpenSSL no longer has cannot be seen
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
    at_once = None if starttls else context
    async with _tolerant(), _connected(address, port, source, context=at_once, host=host) as (reader, writer):
        if starttls:
            await _dialogue(reader, writer)
            await _said(reader, writer, b"STARTTLS\r\n")
            await writer.start_tls(context, server_hostname=host)
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True)
        seen = Look(tls=tls.version() or "TLS", certificate=read_certificate(der) if der else None)
    return seen


async def look_at_plain(address: str, port: int, *, source: str | None = None) -> Look:
    """SMTP in clear text: its greeting, and whether it offers STARTTLS."""
    seen = NOTHING_SEEN
    async with _tolerant(), _connected(address, port, source) as (reader, writer):
        greeting, offered = await _dialogue(reader, writer)
        seen = Look(greeting=greeting, starttls=offered)
    return seen


async def look_for_ports(address: str, *, other_than: int, source: str | None = None, ports: Iterable[int] = USUAL_PORTS) -> Look:
    """Which of the usual ports take connections."""

    async def open_there(port: int) -> int:
        reached = 0
        async with _tolerant(), _connected(address, port, source):
            reached = port
        return reached

    found = await asyncio.gather(*(open_there(port) for port in ports if port != other_than))
    return Look(ports=tuple(port for port in found if port))


def address_towards(address: str) -> str:
    """Our own address on the way there, as far as this machine knows; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as unsent:
        unsent.connect((address, 9))
        return str(unsent.getsockname()[0])
    return ""


@asynccontextmanager
async def _tolerant() -> AsyncIterator[None]:
    """What fails in here was not to be seen, and what takes too long."""
    with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_LOOK_SECONDS):  # TimeoutError is an OSError
            yield


@asynccontextmanager
async def _connected(
    address: str, port: int, source: str | None, *, context: ssl.SSLContext | None = None, host: str | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:  # fmt: skip
    """A connection; with a `context` one that begins with TLS."""
    local, name = (source, 0) if source else None, host if context is not None else None
    reader, writer = await asyncio.open_connection(
        address, port, local_addr=local, limit=_LINE_BYTES, ssl=context, server_hostname=name
    )  # fmt: skip
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # without waiting: a handshake that was given up tells nobody that the connection has ended


async def _dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bool]:
    """The greeting, empty where it is none, and whether STARTTLS is offered."""
    greeting = await _said(reader, writer)
    if not greeting or not greeting[0].startswith("220"):
        return "", False
    offered = await _said(reader, writer, b"EHLO [127.0.0.1]\r\n")
    return greeting[0], any(line[4:].strip().upper() == "STARTTLS" for line in offered)


async def _said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: bytes = b"") -> list[str]:
    """The lines of one reply to `command`."""
    if command:
        writer.write(command)
    lines: list[str] = []
    while len(lines) < _LINES:
        line = await reader.readuntil(b"\n")
        lines.append(printable(line.rstrip(b"\r\n")))
        if line[3:4] != b"-":
            break
    return lines
