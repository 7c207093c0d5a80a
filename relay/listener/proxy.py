"""The PROXY protocol: who the client is that a proxy in front of us speaks for (haproxy's proxy-protocol.txt, versions 1 and 2).

Reads what a proxy says before the client's first octet, and where that ends. TLVs are skipped; a header without addresses (LOCAL,
UNKNOWN, families that are no Internet) says nothing about a client. What is not surely a header is malformed: guessing would let
a client choose its own address. Whether the sender is to be believed is `listener.arrival`'s to know. Pure.
"""

import re
import struct
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final, NamedTuple

_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_PREFIX: Final = struct.Struct("!12sBBH")
_VERSION_2: Final = 0x20
_LOCAL, _PROXY = 0x0, 0x1
_STREAM: Final = 0x1
_INET, _INET6, _UNIX = 0x1, 0x2, 0x3
#: Section 2.2: both addresses and both ports; what follows is TLVs.
_BLOCK_BYTES: Final = {_INET: 12, _INET6: 36, _UNIX: 216}

#: Section 2.1: the longest line, with CRLF.
_LINE_LIMIT_BYTES: Final = 107
_WORD: Final = b"PROXY "
_LINE = re.compile(r"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})")
_UNKNOWN = re.compile(r"PROXY UNKNOWN( .*)?")


class Malformed(ValueError):
    """No header, or a broken one: the connection is to be closed."""


class Header(NamedTuple):
    """A whole header. `client`: the address it names, an IPv4 one out of IPv6 clothes, or `""`. `size`: its octets."""

    client: str
    size: int


def parse_header(octets: bytes) -> Header | None:
    """The header at the beginning of `octets`, or None while more of it must come. Raises Malformed as soon as it can be none."""
    if octets.startswith(_SIGNATURE):
        return _binary(octets)
    if octets.startswith(_WORD):
        return _line(octets)
    if _SIGNATURE.startswith(octets) or _WORD.startswith(octets):
        return None
    raise Malformed("no PROXY header")


def _line(octets: bytes) -> Header | None:
    """Version 1."""
    end = octets.find(b"\r\n", 0, _LINE_LIMIT_BYTES)
    if end < 0:
        if len(octets) >= _LINE_LIMIT_BYTES:
            raise Malformed("a PROXY line that does not end")
        return None
    size = end + 2
    text = octets[:end].decode("latin-1")
    if _UNKNOWN.fullmatch(text):
        return Header("", size)
    match = _LINE.fullmatch(text)
    if match is None or max(int(match[4]), int(match[5])) > 65535:
        raise Malformed("a PROXY line that cannot be read")
    kind = IPv4Address if match[1] == "TCP4" else IPv6Address
    try:
        kind(match[3])
        return Header(_text(kind(match[2])), size)
    except AddressValueError:
        raise Malformed(f"a PROXY line without {match[1]} addresses") from None


def _binary(octets: bytes) -> Header | None:
    """Version 2."""
    if len(octets) < _PREFIX.size:
        return None
    _, version_command, family_transport, length = _PREFIX.unpack_from(octets)
    command = version_command & 0x0F
    if version_command & 0xF0 != _VERSION_2 or command not in (_LOCAL, _PROXY):
        raise Malformed("a PROXY header of another version")
    size = _PREFIX.size + length
    family, transport = family_transport >> 4, family_transport & 0x0F
    named = command == _PROXY and family_transport != 0
    if named and (transport != _STREAM or length < _BLOCK_BYTES.get(family, 65536)):
        raise Malformed("a PROXY header with addresses that cannot be read")
    if len(octets) < size:
        return None
    if not named or family == _UNIX:
        return Header("", size)
    kind, width = (IPv4Address, 4) if family == _INET else (IPv6Address, 16)
    return Header(_text(kind(octets[_PREFIX.size : _PREFIX.size + width])), size)


def _text(address: IPv4Address | IPv6Address) -> str:
    return str((address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address)
