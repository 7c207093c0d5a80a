"""Sessions at their limits: clients that are slow, silent or endless, many at once, and what all of that is counted as.

Where the pace of a client matters time passes as the test says. Else the times are a hundredth and less of the real ones: who has 300 s
has half a second.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from relay.listener import server
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"
ENVELOPE = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\n"
IDLE_SECONDS = 0.4
LATEST_SECONDS = 30.0  # on a machine that is busy with something else


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", IDLE_SECONDS)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)


async def start_data(client: Client) -> None:
    await client.greet()
    await client.command("MAIL FROM:<app@acme.example>", 250)
    await client.command("RCPT TO:<you@example.org>", 250)
    await client.command("DATA", 354)


async def in_a_command(client: Client) -> None:
    await client.greet()


async def in_a_line_that_is_too_long(client: Client) -> None:
    await client.greet()
    await client.send(b"x" * 5000)


async def behind_another_command(client: Client) -> None:
    await client.greet()
    await client.send(b"NOOP\r\nNO")
    await client.expect(250)


async def in_content(client: Client) -> None:
    await start_data(client)


async def in_a_chunk(client: Client) -> None:
    await client.greet()
    await client.send(ENVELOPE + b"BDAT 100000\r\n")
    await client.expect(250)
    await client.expect(250)


async def in_a_large_chunk(client: Client) -> None:
    await in_a_chunk(client)
    await client.send(b"x" * 100_000 + b"BDAT 40000000 LAST\r\n" + (b"x" * 98 + b"\r\n") * 12_000)
    await client.expect(250)


async def in_a_login(client: Client) -> None:
    await client.greet()
    await client.command("AUTH LOGIN", 334)


async def in_large_content(client: Client) -> None:
    await start_data(client)
    await client.send((b"x" * 98 + b"\r\n") * 12_000)


WHERE = [
    in_a_command, in_a_line_that_is_too_long, behind_another_command, in_a_login,
    in_content, in_large_content, in_a_chunk, in_a_large_chunk,
]  # fmt: skip
LOGIN = {"auth": "optional"}
USERS = {"users": {"erp": {"password": "secret", "senders": ["*"]}}}


@pytest.mark.parametrize("reach", WHERE, ids=lambda reach: reach.__name__)
async def test_who_trickles_is_cut_off(tmp_path: Path, reach: Callable[[Client], Awaitable[None]]) -> None:
    """Five octets a minute, never silent for long: whatever they are, they do not keep the session."""
    async with Front(tmp_path, USERS, listener=LOGIN) as front, front.client() as client:
        await reach(client)
        (session,) = front.door._sessions
        given = server.IDLE_SECONDS - 5  # all that was said before is heard, and has earned all that it can
        await eventually(lambda: session.deadline - asyncio.get_running_loop().time() > given, "the last of it to arrive")
        minutes = 0.0
        while not session._closing:
            with contextlib.suppress(ConnectionError):
                await client.send(b"x")
            front.passes(12)
            minutes += 0.2
            assert minutes < 10
        assert minutes > 4
        await client.expect(421, "4.4.2 Too slow")
        await eventually(lambda: front.door.sessions == 0)
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert (front.counted("slow"), front.taken) == (1, [])


async def test_many_small_chunks_are_no_progress_by_themselves(tmp_path: Path) -> None:
    """Ten of an octet a minute, each with its reply."""
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.send(ENVELOPE)
        await client.expect(250)
        await client.expect(250)
        (session,) = front.door._sessions
        chunks = 0
        while not session._closing:
            await client.send(b"BDAT 1\r\n")
            front.passes(3)
            if not session._closing:
                await client.send(b"x")
                await client.expect(250)
                front.passes(3)
            chunks += 1
            assert chunks < 100
        await client.expect(421, "4.4.2 Too slow")
        await client.expect_close()
        assert front.counted("slow") == 1


async def test_chunks_that_carry_something_do_not_count_as_commands(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.door.commands = 20
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.send(b"".join(b"BDAT 1024\r\n" + b"x" * 1022 + b"\r\n" for _ in range(100)) + b"BDAT 0 LAST\r\n")
        for _ in range(100):
            await client.expect(250)
        await client.expect(250, "queued as")
        await client.send(ENVELOPE + b"BDAT 1\r\nx" * 18)
        for code in (250, 250, *(250 for _ in range(17)), 250, 421):
            await client.expect(code)
        await client.expect_close()
        assert front.counted("commands") == 1


@pytest.mark.parametrize("size", [600, 1_300_000])
async def test_a_slow_and_steady_line_lives(tmp_path: Path, size: int) -> None:
    """At three times the pace that is asked for, for four times as long as a session may be idle."""
    async with Front(tmp_path) as front, front.client() as client:
        await start_data(client)
        await client.send((b"x" * 98 + b"\r\n") * (size // 100))
        (session,) = front.door._sessions
        for _ in range(80):
            before = session.deadline
            front.passes(4 * server.IDLE_SECONDS / 80)
            await client.send(b"y" * int(3 * server.PACE * 4 * server.IDLE_SECONDS / 80))
            await eventually(lambda before=before: session.deadline >= before - 1, "what was sent to count")
        await client.send(b"\r\n.\r\n")
        await client.expect(250, "queued as")
        assert front.counted("slow") == 0


async def test_who_asks_now_and_then_whether_we_are_there_stays(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        for _ in range(24):
            await client.command("NOOP", 250)
            front.passes(server.IDLE_SECONDS / 2)
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        assert (front.counted("slow"), front.counted("idle")) == (0, 0)


async def test_who_says_nothing_is_told_and_counted(impatient: None, tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.expect(421, "4.4.2 Idle for too long")
        await client.expect_close()
        assert front.counted("idle") == 1


@pytest.mark.parametrize("reads", [0, 1])
async def test_who_does_not_read_replies_is_cut_off(impatient: None, tmp_path: Path, reads: int) -> None:
    """Neither one who reads nothing nor one who reads an octet from time to time."""
    async with Front(tmp_path) as front:
        front.door.commands = 10**9
        connection = socket.create_connection(("127.0.0.1", front.port))
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await eventually(lambda: front.door.sessions == 1)

        async def flood() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await loop.sock_sendall(connection, b"EHLO x\r\n" * 8000)

        flooding = asyncio.create_task(flood())
        (session,) = front.door._sessions
        await eventually(lambda: session._stalled or session.transport is None)
        began = time.monotonic()
        while front.door.sessions:
            if reads:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    connection.recv(reads)
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < LATEST_SECONDS
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        connection.close()
        assert front.counted("unread") == 1


@pytest.mark.parametrize("command", ["NOOP", "RSET", "VRFY you", "HELP", "EHLO app", "HELO app"])
async def test_cheap_commands_have_an_end(tmp_path: Path, command: str) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.door.commands = 500
        await client.expect(220)
        await client.send(f"{command}\r\n".encode() * 600)
        codes = [(await client.reply()).code for _ in range(501)]
        assert codes[-1] == 421 and set(codes[:-1]) <= {214, 250, 252}
        await client.expect_close()
        assert front.counted("commands") == 1


async def test_one_who_waits_for_each_reply_may_say_as_much(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.door.commands = 20
        await client.expect(220)
        for code in [250] * 20 + [421]:
            await client.send(b"NOOP\r\n" if code == 250 else b"")
            await client.expect(code)
        await client.expect_close()


async def test_who_does_not_read_is_not_answered_until_he_does(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        (session,) = front.door._sessions
        for octets, code in ((b"NOOP\r\n", 250), (ENVELOPE + b"DATA\r\n", 250), (MESSAGE + b".\r\n", 250)):
            session.pause_writing()
            session.data_received(octets)
            assert bytes(session._input.buffer) == octets and session._taking is None
            session.resume_writing()
            for _ in range(octets.count(b"\r\n") if octets.startswith(b"MAIL") else 1):
                reply = await client.reply()
                assert reply.code in (code, 354)
        assert len(front.taken) == 1


async def test_transactions_that_come_to_nothing_have_an_end_too(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.door.commands = 501
        await client.greet()
        await client.send((ENVELOPE + b"RSET\r\n") * 167)
        codes = [(await client.reply()).code for _ in range(501)]
        assert (codes[-1], set(codes[:-1])) == (421, {250})
        await client.expect_close()


async def test_commands_are_counted_anew_after_each_message(tmp_path: Path) -> None:
    """A client that pipelines, with a command too many between messages, goes on for as long as it delivers."""
    async with Front(tmp_path) as front, front.client() as client:
        front.door.commands = 10
        await client.greet()
        for _ in range(20):
            await client.send(b"RSET\r\nNOOP\r\n" + ENVELOPE + b"DATA\r\n")
            for code in (250, 250, 250, 250, 354):
                await client.expect(code)
            await client.send(MESSAGE + b".\r\n")
            await client.expect(250, "queued as")
        assert (len(front.taken), front.counted("commands")) == (20, 0)


async def test_ten_errors_are_counted_once(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.expect(220)
        await client.send(b"WHAT\r\n" * 20)
        for _ in range(10):
            await client.expect(500)
        await client.expect(421, "4.7.0")
        await client.expect_close()
        assert front.counted("errors") == 1


async def test_one_client_leaves_room_for_others(tmp_path: Path) -> None:
    async with Front(tmp_path, listener={"connections_per_client": 2}) as front:
        async with front.client() as first, front.client() as second:
            await first.greet()
            await second.greet()
            async with front.client() as third:
                await third.expect(421, "4.7.0 Too many connections from one client")
                await third.expect_close()
            await first.quit()
            await eventually(lambda: front.door.sessions == 1)
            async with front.client() as third:
                await third.greet()
        await eventually(lambda: front.door.sessions == 0)
        assert (front.counted("connections_per_client"), front.door.access._open_by) == (1, {})


async def test_a_door_looks_after_its_sessions_only_while_it_has_any(impatient: None, tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        assert not front.door._sweeping
        async with front.client() as client:
            await client.greet()
            assert front.door._sweeping
            await client.quit()
        await eventually(lambda: not front.door._sweeping)
        async with front.client() as client:
            await client.greet()
            await client.expect(421, "4.4.2")


@pytest.mark.parametrize(
    ("listener", "said", "reason"),
    [
        ({"networks": "192.0.2.0/24"}, b"", "network"),
        ({"connections": 1}, b"", "connections"),
        ({"recipients": 1}, b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<a@example.org>\r\nRCPT TO:<b@example.org>\r\n", "recipients"),
        ({"message_size": 10}, b"MAIL FROM:<app@acme.example> SIZE=11\r\n", "size"),
        ({"message_size": 10}, ENVELOPE + b"DATA\r\nSubject: more than ten\r\n.\r\n", "size"),
        ({}, b"MAIL FROM:<app@nowhere.example>\r\n", "route"),
    ],
)  # fmt: skip
async def test_a_refusal_is_counted_by_its_reason(tmp_path: Path, listener: dict[str, object], said: bytes, reason: str) -> None:
    async with Front(tmp_path, listener=listener) as front, front.client() as client, front.client() as other:
        if said:
            await client.greet()
            await client.send(said)
        await eventually(lambda: front.counted(reason) >= 1, reason)
        other.close()
