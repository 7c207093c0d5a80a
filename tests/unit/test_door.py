"""One listener's life: opens, counts its sessions, closes, waits for what is under way, ends it."""

import asyncio
import socket
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"


async def test_it_tells_the_real_port(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        host, _, port = front.address.rpartition(":")
        assert host == "127.0.0.1" and int(port) > 0


async def test_an_ipv6_address_stands_in_brackets(tmp_path: Path) -> None:
    async with Front(tmp_path, listener={"bind": "[::1]:0"}) as front:
        assert front.address == f"[::1]:{front.port}"
        async with Client("::1", front.port) as client:
            await client.greet()
            await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        assert b"([IPv6:::1])" in front.taken[0].prefix


async def test_a_taken_port_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        front = Front(tmp_path, listener={"bind": f"127.0.0.1:{taken.getsockname()[1]}"})
        with pytest.raises(OSError, match="in use"):
            await front.door.open()
        await front.close()


async def test_it_counts_its_sessions(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        async with front.client() as first, front.client() as second:
            await first.greet()
            await second.greet()
            assert front.door.sessions == 2
            await first.quit()
            await eventually(lambda: front.door.sessions == 1)
        await eventually(lambda: front.door.sessions == 0)


async def test_once_stopped_it_takes_no_connections(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        front.door.stop()
        await front.door.drained()
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            async with front.client() as client:
                await client.greet()


async def test_a_connection_that_was_accepted_just_before_it_stopped_hears_so(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        front.door.stopping = True  # the listening socket still has it in its queue
        async with front.client() as client:
            await client.expect(421, "4.3.2")
            await client.expect_close()


async def test_drained_waits_for_the_message_under_way(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.command("DATA", 354)
        await client.send(MESSAGE + b".\r\n")
        await eventually(lambda: front.spool.puts == 1)
        front.door.stop()
        drained = asyncio.create_task(front.door.drained())
        await asyncio.sleep(0)
        assert not drained.done()
        front.spool.gate.set()
        await client.expect(250, "queued as")
        await client.expect(421, "4.3.2")
        await client.expect_close()
        async with asyncio.timeout(20):
            await drained
        assert front.door.sessions == 0


async def test_drained_waits_for_a_message_whose_client_is_gone(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        front.spool.gate = asyncio.Event()
        client = front.client()
        await client.connect()
        await client.greet()
        await client.send(b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n" + MESSAGE + b".\r\n")
        await eventually(lambda: front.spool.puts == 1)
        client.reset()
        front.door.stop()
        drained = asyncio.create_task(front.door.drained())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not drained.done()
        front.spool.gate.set()
        async with asyncio.timeout(20):
            await drained
        assert len(front.taken) == 1


@pytest.mark.parametrize("octets", [b"", b"NOOP", b"MAIL FROM:<app@acme.example>\r\n", b"x" * 5000])
async def test_drained_does_not_wait_for_a_client_that_says_nothing(tmp_path: Path, octets: bytes) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.send(octets)
        if octets.endswith(b"\n"):
            await client.expect(250)
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.drained()
        await client.expect(421, "4.3.2")


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_abort_ends_sessions_in_the_middle_of_content_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.command("DATA", 354)
        await client.send((b"x" * 98 + b"\r\n") * (size // 100 + 1))
        if size > 1_000_000:
            await eventually(lambda: front.arriving)
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.abort()
        assert front.door.sessions == 0
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert front.taken == []


async def test_abort_ends_a_session_whose_message_is_being_taken(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await client.greet()
        await client.send(b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n" + MESSAGE + b".\r\n")
        await eventually(lambda: front.spool.puts == 1)
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.abort()
        assert (front.door.sessions, front.taken, front.dispatch.outstanding) == (0, [], 0)


async def test_abort_ends_a_session_whose_work_has_not_had_its_first_turn(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        (session,) = front.door._sessions
        session.data_received(b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n" + MESSAGE + b".\r\n")
        front.door.stop()
        async with asyncio.timeout(20):
            await front.door.abort()
        assert (front.door.sessions, front.taken) == (0, [])
