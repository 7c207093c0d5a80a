"""What a PROXY header says, where it ends, and what is none: versions 1 and 2 of haproxy's proxy-protocol.txt."""

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.listener.proxy import Header, Malformed, parse_header

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("203.0.113.1") + struct.pack("!HH", 40000, 25)
V6 = ipaddress.IPv6Address("2001:db8::7").packed + ipaddress.IPv6Address("2001:db8::1").packed + struct.pack("!HH", 40000, 25)
MAPPED = ipaddress.IPv6Address("::ffff:192.0.2.7").packed * 2 + struct.pack("!HH", 40000, 25)
UNIX = b"/run/app.sock".ljust(108, b"\0") * 2
TLV = b"\x01\x00\x02h2" + b"\x04\x00\x03\x00\x00\x00"


def binary(block: bytes = b"", *, version_command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", version_command, family, len(block) if length is None else length) + block


WHOLE = [
    (b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25\r\n", "192.0.2.7"),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"),
    (b"PROXY TCP4 192.0.2.7 203.0.113.1 0 0\r\n", "192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 25\r\n", "2001:db8::7"),
    (b"PROXY TCP6 2001:DB8:0:0:0:0:0:7 2001:db8::1 40000 25\r\n", "2001:db8::7"),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:203.0.113.1 40000 25\r\n", "192.0.2.7"),
    (b"PROXY TCP6 " + b"ffff:" * 7 + b"ffff " + b"ffff:" * 7 + b"ffff 65535 65535\r\n", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    (b"PROXY UNKNOWN\r\n", ""),
    (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", ""),
    (b"PROXY UNKNOWN anything at all\r\n", ""),
    (binary(V4), "192.0.2.7"),
    (binary(V6, family=0x21), "2001:db8::7"),
    (binary(MAPPED, family=0x21), "192.0.2.7"),
    (binary(UNIX, family=0x31), ""),
    (binary(V4 + TLV), "192.0.2.7"),
    (binary(V6 + TLV * 100, family=0x21), "2001:db8::7"),
    (binary(V4 + b"\xff" * 65523), "192.0.2.7"),
    (binary(family=0x00), ""),
    (binary(TLV, family=0x00), ""),
    (binary(version_command=0x20, family=0x00), ""),
    (binary(V4, version_command=0x20), ""),  # the family of LOCAL is to be ignored
    (binary(b"x", version_command=0x20, family=0xFF), ""),
]


@pytest.mark.parametrize(("octets", "client"), WHOLE)
def test_a_header_says_who_the_client_is_and_where_it_ends(octets: bytes, client: str) -> None:
    assert parse_header(octets) == Header(client, len(octets))


@pytest.mark.parametrize(("octets", "client"), WHOLE)
@pytest.mark.parametrize("behind", [b"EHLO app\r\n", b"\r\n", b"\x16\x03\x01", SIGNATURE, b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n"])
def test_what_stands_behind_is_none_of_it(octets: bytes, client: str, behind: bytes) -> None:
    assert parse_header(octets + behind) == Header(client, len(octets))


@pytest.mark.parametrize(("octets", "client"), WHOLE)
def test_every_beginning_of_a_header_asks_for_more(octets: bytes, client: str) -> None:
    for end in [*range(min(len(octets), 300)), len(octets) - 1]:
        assert parse_header(octets[:end]) is None


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO app\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PROXYTCP4",
        b"proxy TCP4 192.0.2.7 203.0.113.1 40000 25\r\n",
        b"\r\n\r\n\0\r\nQUIt",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP5 192.0.2.7 203.0.113.1 40000 25\r\n",
        b"PROXY UDP4 192.0.2.7 203.0.113.1 40000 25\r\n",
        b"PROXY UNKNOWNED\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25 \r\n",
        b"PROXY TCP4  192.0.2.7 203.0.113.1 40000 25\r\n",
        b"PROXY TCP4\t192.0.2.7 203.0.113.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25\n\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 65536\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 99999 25\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 040 25\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 -1 25\r\n",
        b"PROXY TCP4 192.0.2.256 203.0.113.1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.007 203.0.113.1 40000 25\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 40000 25\r\n",
        b"PROXY TCP6 192.0.2.7 203.0.113.1 40000 25\r\n",
        b"PROXY TCP6 2001:db8::7%eth0 2001:db8::1 40000 25\r\n",
        b"PROXY TCP4 192.0.2.7 localhost 40000 25\r\n",
        b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25" + b" " * 70 + b"\r\n",
        b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n",
        b"PROXY " + b"x" * 101,
        "PROXY TCP4 192.0.2.٧ 203.0.113.1 40000 25\r\n".encode(),
        binary(V4, version_command=0x11),
        binary(V4, version_command=0x31),
        binary(V4, version_command=0x22),
        binary(V4, family=0x10),
        binary(V4, family=0x12),
        binary(V6, family=0x22),
        binary(V4, family=0x41),
        binary(V4, family=0x01),
        binary(V4[:-1]),
        binary(V4, family=0x21),
        binary(V6, family=0x31),
    ],
)
def test_what_is_no_header_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        parse_header(octets)


def test_a_broken_header_is_known_before_all_of_it_has_come() -> None:
    with pytest.raises(Malformed):
        parse_header(binary(length=11))
    with pytest.raises(Malformed):
        parse_header(b"PROXX")


@given(
    st.binary(max_size=300)
    | st.binary(max_size=300).map(lambda rest: SIGNATURE + rest)
    | st.text(max_size=80).map(lambda t: f"PROXY {t}\r\n".encode())
)
def test_whatever_comes_it_is_a_header_or_not_and_more_octets_change_no_answer(octets: bytes) -> None:
    try:
        header = parse_header(octets)
    except Malformed:
        with pytest.raises(Malformed):
            parse_header(octets + b"more\r\n")
        return
    if header is not None:
        assert 0 < header.size <= len(octets)
        assert parse_header(octets[: header.size]) == header == parse_header(octets + b"more\r\n")
        assert header.client == "" or str(ipaddress.ip_address(header.client)) == header.client
