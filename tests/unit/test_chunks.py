"""Chunks: what BDAT may say, and what a chunk costs."""

import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from relay.listener.chunks import Chunks, parse_chunk
from relay.listener.data import Gathering, Input
from relay.spool.base import SpoolFull
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.front import Front

MEBIBYTE = 1024 * 1024


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("0", (0, False)),
        ("5", (5, False)),
        ("5 LAST", (5, True)),
        (" 5  last ", (5, True)),
        ("007 Last", (7, True)),
        ("9" * 18, (10**18 - 1, False)),
    ],
)
def test_a_size_and_perhaps_last(argument: str, expected: tuple[int, bool]) -> None:
    assert parse_chunk(argument) == expected


@pytest.mark.parametrize(
    "argument", ["", " ", "LAST", "-1", "+1", "1.0", "0x10", "5 6", "5 LAST LAST", "5,LAST", "1e3", "٣", "²", "9" * 19, "5\0", "5\t6"]
)
def test_anything_else_is_no_size(argument: str) -> None:
    with pytest.raises(ValueError, match=r"size"):
        parse_chunk(argument)


def test_a_declared_size_is_only_counted() -> None:
    def spill() -> None:
        raise AssertionError("nothing was to be written")

    tracemalloc.start()
    try:
        source, chunks = Input(), Chunks(Gathering(10**18, spill, stuffed=False), limit_bytes=10**18)  # type: ignore[arg-type]
        chunks.begin(10**18 - 1, last=True)
        source.feed(b"x" * 1000)
        chunks.absorb(source)
        assert chunks.left == 10**18 - 1001
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


async def test_a_chunk_over_the_limit_is_read_without_being_kept(tmp_path: Path) -> None:
    async with Front(tmp_path, listener={"message_size": 4 * MEBIBYTE}) as front, front.client() as client:
        await begin(client)
        tracemalloc.start()
        try:
            await client.send(b"BDAT %d LAST\r\n" % (30 * MEBIBYTE))
            block = b"RSET\r\n" * 10_000
            left = 30 * MEBIBYTE
            while left:
                await client.send(block[: min(left, len(block))])
                left -= min(left, len(block))
            await client.expect(552, "5.3.4")
            assert tracemalloc.get_traced_memory()[1] < 2 * MEBIBYTE
        finally:
            tracemalloc.stop()
        await client.quit()
        assert front.taken == []


async def test_a_size_that_no_message_has_is_nothing_to_ask_the_spool_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be full, and the operator be told that it takes no mail."""
    async with Front(tmp_path, listener={"message_size": 1000}) as front, front.client() as client:
        monkeypatch.setattr(front.spool, "obstacle", lambda size=0: SpoolFull("1 MB free") if size > MEBIBYTE else None)
        await begin(client)
        await client.send(b"BDAT %d LAST\r\n" % (2 * MEBIBYTE) + b"RSET\r\nXX" * (MEBIBYTE // 4))
        await client.expect(552, "5.3.4")
        await client.quit()
        assert front.events("note") == []


async def test_a_fault_of_ours_at_bdat_loses_no_framing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await begin(client)

        def broken(size: int = 0) -> None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(front.spool, "obstacle", broken)
            await client.send(b"BDAT 6 LAST\r\nQUIT\r\nBDAT 6 LAST\r\nQUIT\r\n")
            await client.expect(451, "4.3.0")
            await client.expect(503)
        await client.quit()
        assert len(front.events("fault")) == 1


async def test_a_fault_of_ours_while_a_chunk_is_stored_loses_no_framing(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.write_error = ZeroDivisionError("a bug")
        await begin(client)
        await client.send(b"BDAT 3000000\r\n" + b"RSET\r\n" * 500_000 + b"BDAT 6 LAST\r\nQUIT\r\n")
        await client.expect(451, "4.3.0")
        await client.expect(451, "4.3.0")
        await client.quit()
        await eventually(lambda: not front.arriving, "the file to go")
        assert len(front.events("fault")) == 1


async def test_a_fault_of_ours_at_the_last_chunk_is_temporary(tmp_path: Path) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        front.spool.put_error = ZeroDivisionError("a bug")
        await begin(client)
        await client.send(b"BDAT 6 LAST\r\nQUIT\r\nNOOP\r\n")
        await client.expect(451, "4.3.0")
        await client.expect(250)
        await client.quit()


@pytest.mark.parametrize("first", [b"BDAT 0\r\n", b"BDAT 60000000\r\n"], ids=["taken", "refused"])
async def test_chunks_without_octets_are_commands_and_have_their_limit(tmp_path: Path, first: bytes) -> None:
    async with Front(tmp_path) as front, front.client() as client:
        await begin(client)
        await client.send(first + (bytes(60_000_000) if b"6" in first else b""))
        code = (await client.reply()).code
        with suppress(ConnectionError):
            await client.send(b"BDAT 0\r\n" * 20_000)
        codes = [code]
        while codes[-1] != 421:
            codes.append((await client.reply()).code)
        assert set(codes) == {code, 421}
        assert len(codes) < 15_000


async def begin(client: Client) -> None:
    await client.greet()
    await client.command("MAIL FROM:<app@acme.example>", 250)
    await client.command("RCPT TO:<you@example.org>", 250)
