"""Sessions and the memory budget: who finds none is refused for now, nobody is kept waiting, and everything is given back."""

import asyncio
from pathlib import Path

import pytest

from relay.listener.budget import FREE_BYTES, LARGE_BYTES, Budget
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

pytestmark = pytest.mark.both_loops

MIB = 1024 * 1024
MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"
ENVELOPE = b"MAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\n"
NO_MEMORY = "4.3.1 Too much mail at once, try again later"


def lines(count: int) -> bytes:
    return (b"x" * 98 + b"\r\n") * (count // 100)


async def start(client: Client, *, data: bool = True) -> None:
    await client.greet()
    await client.command("MAIL FROM:<app@acme.example>", 250)
    await client.command("RCPT TO:<you@example.org>", 250)
    if data:
        await client.command("DATA", 354)


async def test_ordinary_mail_asks_for_nothing(tmp_path: Path) -> None:
    async with Front(tmp_path, budget=Budget(0)) as front, front.client() as client:
        await client.greet()
        for size in (0, 4096, FREE_BYTES - 1000):
            await client.deliver("app@acme.example", ["you@example.org"], lines(size))
        assert len(front.taken) == 3


async def test_who_finds_none_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    async with Front(tmp_path, budget=Budget(MIB)) as front, front.client() as first, front.client() as second:
        await start(first)
        await start(second)
        await first.send(lines(700_000))
        await eventually(lambda: front.door.budget.taken >= 600_000)
        held = front.door.budget.taken
        await second.send(lines(700_000))
        await second.send(b".\r\n")
        await second.expect(452, NO_MEMORY)
        assert front.door.budget.taken == held
        await second.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        await first.send(b".\r\n")
        await first.expect(250, "queued as")
        assert [len(message.content) for message in front.taken] == [len(MESSAGE), 700_000]
        assert (front.door.budget.taken, front.counted("memory")) == (0, 1)


async def test_content_without_memory_is_read_to_its_end_and_not_kept(tmp_path: Path) -> None:
    async with Front(tmp_path, budget=Budget(200_000)) as front, front.client() as client:
        await start(client)
        (session,) = front.door._sessions
        for _ in range(50):
            await client.send(lines(100_000))
            assert len(session._input.buffer) < MIB
        await eventually(lambda: len(session._input.buffer) <= FREE_BYTES, "what has come to be dropped")
        assert front.door.budget.taken == 0
        await client.send(b"RSET\r\nQUIT\r\n.\r\n")
        await client.expect(452, NO_MEMORY)
        await client.command("NOOP", 250)
        assert front.taken == []


@pytest.mark.parametrize("limit", [LARGE_BYTES - 1, LARGE_BYTES])
async def test_large_content_gets_all_it_needs_at_once_or_nothing(tmp_path: Path, limit: int) -> None:
    async with Front(tmp_path, budget=Budget(limit)) as front, front.client() as client:
        await start(client)
        await client.send(lines(3_000_000))
        if limit == LARGE_BYTES:
            await eventually(lambda: front.door.budget.taken == LARGE_BYTES)
        await client.send(b".\r\n")
        await client.expect(250 if limit == LARGE_BYTES else 452)
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert front.door.budget.taken == 0


@pytest.mark.parametrize("command", ["MAIL FROM:<app@acme.example> SIZE=65537", "BDAT 65537 LAST"])
async def test_when_little_is_left_nothing_large_is_begun(tmp_path: Path, command: str) -> None:
    async with Front(tmp_path, budget=Budget(MIB)) as front, front.client() as client:
        await start(client, data=False)
        assert front.door.budget.take(MIB - 65_000)
        if "MAIL" in command:
            await client.command("RSET", 250)
        await client.send(f"{command}\r\n".encode() + (lines(65_536) + b"x" * 37 if "BDAT" in command else b""))
        await client.expect(452, NO_MEMORY)
        front.door.budget.give(MIB - 65_000)
        await client.command("RSET", 250)
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
        assert front.counted("memory") == 1


async def test_ordinary_mail_passes_when_large_mail_has_used_up_everything(tmp_path: Path) -> None:
    """Slow senders of large mail could otherwise keep everybody out."""
    async with Front(tmp_path, budget=Budget(LARGE_BYTES)) as front, front.client() as slow, front.client() as client:
        await start(slow)
        await slow.send(lines(2_000_000))
        await eventually(lambda: front.door.budget.taken == LARGE_BYTES)
        await client.greet()
        await client.deliver("app@acme.example", ["you@example.org"], lines(60_000), parameters="SIZE=60000")
        await client.command("MAIL FROM:<app@acme.example> SIZE=70000", 452, NO_MEMORY)
        await slow.send(b".\r\n")
        await slow.expect(250, "queued as")
        await client.deliver("app@acme.example", ["you@example.org"], lines(70_000), parameters="SIZE=70000")


@pytest.mark.parametrize("size", [700_000, 3_000_000])
async def test_chunks_without_memory_are_refused_and_keep_their_frame(tmp_path: Path, size: int) -> None:
    async with Front(tmp_path, budget=Budget(200_000)) as front, front.client() as client:
        await start(client, data=False)
        await client.send(f"BDAT {size}\r\n".encode() + lines(size) + b"BDAT 5 LAST\r\nhello" + b"NOOP\r\n")
        await client.expect(452, NO_MEMORY)
        await client.expect(452)
        await client.expect(250)
        assert front.door.budget.taken == 0
        await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)


@pytest.mark.parametrize("size", [700_000, 3_000_000])
async def test_chunks_hold_memory_until_they_are_in_custody(tmp_path: Path, size: int) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await start(client, data=False)
        for _ in range(2):
            await client.send(f"BDAT {size // 2}\r\n".encode() + lines(size // 2))
            await client.expect(250)
        assert size - 2 * FREE_BYTES < front.door.budget.taken or front.door.budget.taken == LARGE_BYTES
        await client.command("BDAT 0 LAST", 250, "queued as")
        assert (front.door.budget.taken, len(front.taken[0].content)) == (0, size)


@pytest.mark.parametrize("end", ["RSET", "EHLO app", "reset", "close", "half"])
@pytest.mark.parametrize("begun", ["DATA", "BDAT"])
async def test_content_that_comes_to_nothing_gives_its_memory_back(tmp_path: Path, begun: str, end: str) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await start(client, data=False)
        await client.send(b"DATA\r\n" + lines(500_000) if begun == "DATA" else b"BDAT 500000\r\n" + lines(500_000))
        await client.expect(354 if begun == "DATA" else 250)
        await eventually(lambda: front.door.budget.taken >= 400_000)
        match end:
            case "reset":
                client.reset()
            case "close":
                client.close()
            case "half":
                client.finish_sending()
            case command if begun == "BDAT":
                await client.command(command, 250)
            case _:
                client.reset()
        await eventually(lambda: front.door.budget.taken == 0)


async def test_who_pipelines_without_memory_is_slowed_down_and_not_stalled(tmp_path: Path) -> None:
    """While the first message waits for the disk, the second has to wait in the client."""
    async with Front(tmp_path, budget=Budget(200_000)) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await client.greet()
        first = ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\n"
        second = ENVELOPE + b"DATA\r\n" + lines(5_000_000) + b".\r\n"
        third = ENVELOPE + b"DATA\r\n" + MESSAGE + b".\r\nNOOP\r\n"
        sending = asyncio.create_task(client.send(first + second + third))
        await eventually(lambda: front.spool.puts == 1)
        (session,) = front.door._sessions
        await eventually(lambda: session._input._paused)
        assert len(session._input.buffer) < MIB
        front.spool.gate.set()
        for code in (250, 250, 354, 250, 250, 250, 354, 452, 250, 250, 354, 250, 250):
            await client.expect(code)
        await sending
        assert [message.content for message in front.taken] == [MESSAGE, MESSAGE]


async def test_a_client_that_waits_for_a_verdict_holds_no_memory(tmp_path: Path) -> None:
    routes = [{"name": "acme", "sender": "acme.example", "upstream": "acme", "wait": "30s"}]
    async with Front(tmp_path, {"routes": routes}) as front, front.client() as client:
        await start(client)
        await client.send(lines(700_000))
        await eventually(lambda: front.door.budget.taken > 0)
        await client.send(b".\r\n")
        await eventually(lambda: front.taken)
        await eventually(lambda: front.door.budget.taken == 0)
        front.waits.stop()
        await client.expect(250, "queued as")


async def test_the_next_message_is_counted_beside_the_one_on_its_way_into_the_spool(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.gate = asyncio.Event()
        await start(client)
        await client.send(lines(700_000) + b".\r\n")
        await eventually(lambda: front.spool.puts == 1)
        await client.send(ENVELOPE + b"DATA\r\n" + lines(500_000))
        await eventually(lambda: front.door.budget.taken >= 1_050_000)
        front.spool.gate.set()
        for code in (250, 250, 250, 354):
            await client.expect(code)
        assert 400_000 <= front.door.budget.taken < 700_000
        await client.send(b".\r\n")
        await client.expect(250, "queued as")
        assert front.door.budget.taken == 0
