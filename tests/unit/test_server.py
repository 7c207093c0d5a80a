"""Sessions against clients that go away, never read, never stop, or come at the wrong moment. What is said is in tests/dialogue."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path

import pytest

from relay.listener import data, server
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"
ENVELOPE = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\n"
LARGE = (b"x" * 98 + b"\r\n") * 30_000


async def start_data(client: Client) -> None:
    await client.greet()
    await client.command("MAIL FROM:<app@acme.example>", 250)
    await client.command("RCPT TO:<you@example.org>", 250)
    await client.command("DATA", 354)


async def test_connections_that_are_reset_at_once_leave_nothing(tmp_path: Path) -> None:
    """By the time we look, uvloop does not know any more who it was."""
    async with Front(tmp_path, listener={"connections": 3}) as front:

        async def is_greeted() -> bool:
            async with front.client() as client:
                return (await client.reply()).code == 220

        for _ in range(5):
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", front.port)) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await eventually(is_greeted)
        await eventually(lambda: front.door.sessions == 0)
        assert front.events("fault") == []


async def test_a_place_is_free_again_however_a_session_ended(tmp_path: Path) -> None:
    async with Front(tmp_path, listener={"connections": 1}) as front:
        for ending in ("quit", "close", "reset", "half", "data", "errors", "garbage"):
            async with front.client() as client:
                await client.greet()
                match ending:
                    case "quit":
                        await client.quit()
                    case "reset":
                        client.reset()
                    case "half":
                        client.finish_sending()
                        await client.expect_close()
                    case "data":
                        await client.send(ENVELOPE + b"DATA\r\nSubject: x\r\n")
                        for code in (250, 250, 354):
                            await client.expect(code)
                    case "errors":
                        await client.send(b"\r\n" * 10)
                        for _ in range(10):
                            await client.expect(500)
                        await client.expect(421)
                    case "garbage":
                        await client.send(b"\x16\x03\x01\0\xff" * 10)
            await eventually(lambda: front.door.sessions == 0, ending)
        async with front.client() as client:
            await client.greet()
        assert front.events("fault") == []


async def test_a_client_that_never_reads_costs_little_memory_and_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    async with Front(tmp_path, listener={"connections": 1}) as front:
        connection = socket.create_connection(("127.0.0.1", front.port))
        connection.setblocking(False)
        await eventually(lambda: front.door.sessions == 1)
        (session,) = front.door._sessions
        assert session.transport is not None
        most = 0

        async def flood() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.get_running_loop().sock_sendall(connection, b"EHLO x\r\n" * 8000)

        flooding = asyncio.create_task(flood())
        while session.transport is not None:
            most = max(most, session.transport.get_write_buffer_size() + len(session._input.buffer))
            await asyncio.sleep(0.005)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        connection.close()
        assert 100_000 < most < 2 * data._PAUSE_BYTES + 500_000
        await eventually(lambda: front.door.sessions == 0)
        async with front.client() as client:
            await client.greet()


async def test_a_flood_of_commands_lets_others_take_their_turn(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as flood, front.client() as other:
        front.door.commands = 60_000
        await flood.greet()
        await other.greet()
        session = min(front.door._sessions, key=lambda session: session._origin.session)
        session.data_received(b"NOOP\n" * 50_000)  # all of it at once, as after a message that took its time
        await other.command("NOOP", 250)
        assert len(session._input.buffer) > 100_000
        for _ in range(50_000):
            await flood.expect(250)
        await flood.quit()


async def test_replies_to_pipelined_commands_wait_for_the_message_between_them(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await client.greet()
        await client.send(ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\nNOOP\r\n" + ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\nQUIT\r\n")
        for code in (250, 250, 354):
            await client.expect(code)
        await eventually(lambda: front.spool.puts == 1)
        front.spool.gate.set()
        await client.expect(250, "queued as")
        for code in (250, 250, 250, 354):
            await client.expect(code)
        await client.expect(250, "queued as")
        await client.expect(221)
        await client.expect_close()
        assert [message.content for message in front.taken] == [MESSAGE, MESSAGE]


@pytest.mark.parametrize("how", ["half", "close", "reset"])
async def test_a_client_that_leaves_after_the_dot_does_not_cancel_the_commit(tmp_path: Path, how: str) -> None:
    async with Front(tmp_path) as front:
        front.spool.gate = asyncio.Event()
        async with front.client() as client:
            await start_data(client)
            await client.send(MESSAGE + b".\r\n")
            await eventually(lambda: front.spool.puts == 1)
            match how:
                case "half":
                    client.finish_sending()
                case "close":
                    client.close()
                case "reset":
                    client.reset()
            for _ in range(20):
                await asyncio.sleep(0)
            front.spool.gate.set()
            await eventually(lambda: front.taken)
            if how == "half":
                await client.expect(250, "queued as")
                await client.expect_close()
        await eventually(lambda: front.door.sessions == 0)
        assert [event["event"] for event in front.events()] == ["accepted"]


@pytest.mark.parametrize("size", [1, 200, 20_000])
@pytest.mark.parametrize("how", ["half", "close", "reset"])
async def test_a_client_that_leaves_within_content_leaves_nothing(tmp_path: Path, how: str, size: int) -> None:
    async with Front(tmp_path) as front:
        async with front.client() as client:
            await start_data(client)
            await client.send(LARGE[: size * 100] + b"QUIT\r\nMAIL FROM:<a@acme.example>\r\n.")
            match how:
                case "half":
                    client.finish_sending()
                    await client.expect_close()
                case "reset":
                    client.reset()
        await eventually(lambda: front.door.sessions == 0)
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert [event["event"] for event in front.events()] == ["refused"]


@pytest.mark.parametrize(
    "sent",
    [ENVELOPE + b"DATA\r\n" + MESSAGE, ENVELOPE + b"DATA\r\n" + LARGE, ENVELOPE + b"BDAT 4\r\nab", ENVELOPE + b"BDAT 4\r\nab\r\nNOOP\r\n"],
    ids=["content", "large content", "within a chunk", "between chunks"],
)
async def test_a_message_that_broke_off_is_told_of(tmp_path: Path, sent: bytes) -> None:
    async with Front(tmp_path) as front:
        async with front.client() as client:
            await client.greet()
            await client.send(sent)
            await client.expect(250)
        await eventually(lambda: front.door.sessions == 0)
        (event,) = front.events("refused")
        assert (event["sender"], event["recipients"]) == ("app@acme.example", "you@example.org")
        assert event["reply"] == "421 4.4.2 Connection lost before the end of the content"
        assert front.counted("lost") == 1


@pytest.mark.parametrize("sent", [b"DATA\r\n" + MESSAGE, b"BDAT 4\r\nab", b"BDAT 2\r\nab"], ids=["content", "within a chunk", "between"])
async def test_a_message_that_came_too_slowly_is_told_of_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.send(ENVELOPE + sent)
        await eventually(lambda: front.door.sessions == 0)
        (event,) = front.events("refused")
        assert (event["recipients"], event["reply"]) == ("you@example.org", "421 4.4.2 Too slow")
        assert (front.counted("slow"), front.counted("lost")) == (1, 0)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"BDAT 4\r\nabcdQUIT\r\n", []),
        (b"BDAT 2000\r\n" + bytes(2000) + b"QUIT\r\n", ["552 5.3.4 Message too large"]),
        (b"BDAT 2000\r\n" + bytes(2000), ["552 5.3.4 Message too large"]),
        (b"BDAT 4\r\nabcd" + b"FOO\r\n" * 10, ["421 4.7.0 Too many errors"]),
    ],
    ids=["given up", "refused, then given up", "refused, then left", "too many errors"],
)
async def test_a_message_that_ended_with_a_word_is_not_told_of_as_lost(tmp_path: Path, sent: bytes, told: list[str]) -> None:
    async with Front(tmp_path, listener={"message_size": 1000}) as front:
        async with front.client() as client:
            await client.greet()
            await client.send(ENVELOPE + sent)
            client.finish_sending()
            await eventually(lambda: front.door.sessions == 0)
        assert [event["reply"] for event in front.events("refused")] == told


async def test_a_chunked_message_that_a_stop_ends_is_told_of_as_that(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.send(ENVELOPE + b"BDAT 2\r\nab")
        for _ in range(3):
            await client.expect(250)
        front.door.stop()
        await eventually(lambda: front.door.sessions == 0)
        assert [event["reply"] for event in front.events("refused")] == ["421 4.3.2 Service shutting down"]


async def test_a_recipient_that_is_not_even_named_blames_none_that_was_taken(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        await client.send(ENVELOPE + b"RCPT\r\n")
        for code in (250, 250, 501):
            await client.expect(code)
        (event,) = front.events("refused")
        assert (event["sender"], event.get("recipients", "")) == ("app@acme.example", "")


async def test_a_client_that_leaves_between_commands_is_nobodys_business(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        for sent in (b"", ENVELOPE, ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\n"):
            async with front.client() as client:
                await client.greet()
                await client.send(sent)
                for _ in range(sent.count(b"TO") + sent.count(b"\r\n.") + bool(sent)):
                    await client.reply()
            await eventually(lambda: front.door.sessions == 0)
        assert front.events("refused") == []


async def test_a_reset_while_content_is_written_ends_the_session(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        front.spool.write_gate = asyncio.Event()
        client = front.client()
        await client.connect()
        await start_data(client)
        await client.send(LARGE[:1_300_000])
        await eventually(lambda: front.arriving)
        client.reset()
        await eventually(lambda: all(session.transport is None for session in front.door._sessions))
        front.spool.write_gate.set()
        await eventually(lambda: front.door.sessions == 0)
        await eventually(lambda: not front.arriving, "files of what was not taken to go")


async def test_after_a_fault_within_content_what_follows_is_not_taken_for_commands(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.write_error = RuntimeError("a bug")
        await start_data(client)
        await client.send(LARGE + b"RSET\r\n" + ENVELOPE + b"DATA\r\nSubject: smuggled\r\n.\r\n")
        await client.expect(451, "4.3.0")
        with contextlib.suppress(ConnectionError):
            await client.expect_close()
        await eventually(lambda: front.door.sessions == 0)
        assert front.taken == []
        assert len(front.events("fault")) == 1


async def test_a_fault_with_whole_content_leaves_the_session_alive(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        for size in (100, len(LARGE)):
            front.spool.put_error = RuntimeError("a bug")
            await client.deliver("app@acme.example", ["you@example.org"], LARGE[:size], code=451)
            front.spool.put_error = None
            await client.deliver("app@acme.example", ["you@example.org"], LARGE[:size])
        assert len(front.taken) == 2
        await eventually(lambda: not front.arriving, "files of what was not taken to go")


async def test_large_messages_are_taken_whole_however_their_packets_fall(tmp_path: Path) -> None:
    async with Front(tmp_path) as front:
        for chunk in (7_001, 65_536, 1_000_003, len(LARGE) - 3):
            async with front.client(chunk=chunk) as client:
                await client.greet()
                await client.deliver("app@acme.example", ["you@example.org"], LARGE)
                await client.quit()
        assert [message.content == LARGE for message in front.taken] == [True] * 4
        await eventually(lambda: not front.arriving, "files of what was not taken to go")


async def test_slow_content_is_no_idleness(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await start_data(client)
        (session,) = front.door._sessions
        for _ in range(20):
            before = session.deadline
            front.passes(server.IDLE_SECONDS / 10)
            await client.send(b"a line of content\r\n" * 160)
            await eventually(lambda before=before: session.deadline > before - 1, "what was sent to count")
        await client.send(b".\r\n")
        await client.expect(250, "queued as")


async def test_silence_within_large_content_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.6)
    async with Front(tmp_path) as front, front.client() as client:
        await start_data(client)
        await client.send(LARGE)
        await client.expect(421, "4.4.2")
        await client.expect_close()
        await eventually(lambda: front.door.sessions == 0)
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert front.taken == []


async def test_the_time_a_commit_takes_is_not_the_clients_idleness(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await start_data(client)
        (session,) = front.door._sessions
        await client.send(MESSAGE + b".\r\n")
        await eventually(lambda: front.spool.puts == 1)
        left = session.deadline - asyncio.get_running_loop().time()
        assert 500 < left < 600.001  # RFC 5321 section 4.5.3.2.6: the client waits ten minutes for this reply
        front.spool.gate.set()
        await client.expect(250, "queued as")
        # A deadline is the loop's time plus seconds: taken apart again, the difference may be over by one rounding.
        assert 250 < session.deadline - asyncio.get_running_loop().time() < 300.001


async def test_an_endless_command_line_does_not_grow(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await client.greet()
        (session,) = front.door._sessions
        for _ in range(50):
            await client.send(b"x" * 65_536)
            assert len(session._input.buffer) <= 1_000_000
        await client.send(b"\nNOOP\r\n")
        await client.expect(500, "5.5.2")
        await client.expect(250)


async def test_a_bug_in_a_verb_is_temporary_and_loud_and_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        monkeypatch.setattr(front.intake, "add", lambda *_, **__: 1 / 0)
        await client.greet()
        await client.command("MAIL FROM:<app@acme.example>", 250)
        reply = await client.command("RCPT TO:<you@example.org>", 451)
        assert reply.text == "4.3.0 Local error, try again later"
        await client.command("NOOP", 250)
        (fault,) = front.events("fault")
        assert "ZeroDivisionError" in fault["traceback"] and fault["session"]


async def test_many_sessions_at_once_all_get_their_own_reply(tmp_path: Path) -> None:
    async def one(front: Front, number: int) -> str:
        async with front.client() as client:
            await client.greet()
            reply = await client.deliver("app@acme.example", [f"r{number}@example.org"], b"Subject: %d\r\n\r\n" % number)
            await client.quit()
            return reply.text.rpartition(" ")[2]

    async with Front(tmp_path) as front:
        ids = await asyncio.gather(*(one(front, number) for number in range(40)))
        assert {message.id: message.recipients[0] for message in front.taken} == {id: f"r{n}@example.org" for n, id in enumerate(ids)}
