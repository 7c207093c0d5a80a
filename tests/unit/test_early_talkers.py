"""Who speaks before the greeting is no SMTP client, and hears nothing else."""

import socket
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.front import Front
from tests.support.wire import Wire

SAID = b"HELO app\r\nMAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n"


def connect(front: Front, said: bytes = b"") -> socket.socket:
    """Without giving the loop a turn: what is said has arrived before the relay looks at the connection."""
    connection = socket.create_connection(("127.0.0.1", front.port), 5)
    connection.sendall(said)
    return connection


async def heard(connection: socket.socket) -> bytes:
    wire, octets = Wire(connection), b""
    try:
        while more := await wire.receive():
            octets += more
    finally:
        wire.close()
    return octets


@pytest.mark.both_loops
@pytest.mark.parametrize("said", [SAID, b"E", b"\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02", b"\0" * 5000])
async def test_who_does_not_wait_for_the_greeting_is_cut_off(tmp_path: Path, said: bytes) -> None:
    async with Front(tmp_path) as front:
        assert await heard(connect(front, said)) == b"554 5.5.1 This is an SMTP server\r\n"
        await eventually(lambda: front.door.sessions == 0, "the session to end")
        assert front.taken == []
        assert [event["reply"] for event in front.events("refused")] == ["554 5.5.1 This is an SMTP server"]


@pytest.mark.both_loops
async def test_who_connects_and_closes_is_no_early_talker(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        connection = connect(front)
        connection.shutdown(socket.SHUT_WR)
        assert (await heard(connection)).startswith(b"220 ")
        await eventually(lambda: front.door.sessions == 0, "the session to end")
        assert front.events("refused") == []


async def test_who_talks_early_and_goes_leaves_nothing(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        connection = connect(front, SAID)
        connection.shutdown(socket.SHUT_WR)
        connection.close()
        await eventually(lambda: front.door.sessions == 0, "the session to end")
        assert front.taken == []
