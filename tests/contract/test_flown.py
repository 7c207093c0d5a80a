"""More messages than connections where small mail is one flight: all of the next one is under way before the reply to the one before."""

import asyncio
import socket
import time
from functools import partial

import pytest

from relay.mail.outcome import Outcome
from relay.upstream.pool import Pool
from tests.contract.test_rides import Station, limited, sending, station
from tests.system.upstreams import all_sent, outgoing, pool_to, raw_server, sliced, words

pytestmark = pytest.mark.both_loops

A, B = "a@example.org", "b@example.org"
OFFERS = b"250-flown.test\r\n250-PIPELINING\r\n250-SIZE 100000\r\n250 CHUNKING\r\n"
TAKEN = b"250 Ok\r\n250 Ok\r\n250 taken\r\n"


Sending = asyncio.Task[list[Outcome]]

airport = partial(station, offers=OFFERS)


def flight(content: bytes, *, rides: bool) -> bytes:
    commands = f"MAIL FROM:<app@acme.example> SIZE={len(content)}\r\nRCPT TO:<a@example.org>\r\nBDAT {len(content)} LAST\r\n"
    return b"RSET\r\n" * rides + commands.encode() + content


async def lands(reader: asyncio.StreamReader, content: bytes, *, rides: bool = False) -> None:
    expected = flight(content, rides=rides)
    assert await asyncio.wait_for(reader.readexactly(len(expected)), 30) == expected


async def both_flown(played: Station, pool: Pool) -> tuple[Sending, Sending, asyncio.StreamReader, asyncio.StreamWriter]:
    """Two messages that are on their way over one connection."""
    first, second = sending(pool, b"one\r\n"), sending(pool, b"two\r\n")
    reader, writer = await played.connections.get()
    await lands(reader, b"one\r\n")
    await lands(reader, b"two\r\n", rides=True)
    return first, second, reader, writer


async def taken_anew(played: Station, content: bytes) -> None:
    """The message comes alone, on the next connection, and is taken."""
    reader, writer = await asyncio.wait_for(played.connections.get(), 30)
    await lands(reader, content)
    writer.write(TAKEN)


async def test_the_next_flight_comes_before_the_reply_to_the_one_before() -> None:
    async with airport() as (played, pool):
        first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
        reader, writer = await played.connections.get()
        await lands(reader, b"one\r\n")
        await lands(reader, b"two\r\n", rides=True)
        assert not first.done()
        writer.write(TAKEN)
        assert words(await first) == ["sent message final"]
        await lands(reader, b"three\r\n", rides=True)
        writer.write(b"250 Ok\r\n250 Ok\r\n250 Ok\r\n554 5.6.0 not this one\r\n")
        assert words(await second) == ["failed message final"]
        writer.write(b"250 Ok\r\n" + TAKEN)
        assert words(await third) == ["sent message final"]
        assert played.connections.empty()


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (b"550 5.7.1 not you\r\n503 no\r\n503 no\r\n", "failed upstream mail fallback"),
        (b"250 Ok\r\n550 5.1.1 nobody\r\n503 no\r\n", "failed recipient rcpt"),
        (b"250 Ok\r\n250 Ok\r\n451 4.3.0 later\r\n", "deferred message final"),
    ],
)
async def test_the_refusal_of_the_one_before_is_not_that_of_the_one_behind(refusal: bytes, expected: str) -> None:
    async with airport() as (played, pool):
        first, second, reader, writer = await both_flown(played, pool)
        writer.write(refusal + b"250 flushed\r\n" + TAKEN)
        assert words(await first) == [expected]
        assert words(await second) == ["sent message final"]
        third = sending(pool, b"three\r\n")
        await lands(reader, b"three\r\n")
        writer.write(TAKEN)
        assert all_sent(await third)


@pytest.mark.parametrize(
    ("replies", "first_is", "second_is"),
    [
        (b"", "deferred upstream final in_doubt", "in_doubt"),
        (b"250 Ok\r\n", "deferred upstream final in_doubt", "in_doubt"),
        (TAKEN, "sent message final", "in_doubt"),
        (b"421 4.3.2 closing\r\n", "deferred upstream mail fallback", "fallback"),
        (b"250 Ok\r\n421 4.3.2 closing\r\n", "deferred upstream rcpt fallback", "fallback"),
        (b"250 Ok\r\n250 Ok\r\n421 4.3.2 closing\r\n", "deferred upstream final fallback", "fallback"),
        (TAKEN + b"421 4.3.2 closing\r\n", "sent message final", "fallback"),
        (TAKEN + b"250 flushed\r\n421 4.3.2 closing\r\n", "sent message final", "fallback"),
    ],
)
@pytest.mark.parametrize("again", [True, False])
async def test_the_one_behind_is_in_doubt_unless_the_end_was_announced(replies: bytes, first_is: str, second_is: str, again: bool) -> None:
    """It goes again at once to the same upstream. Where that fails, too, nobody else may get it if it is in doubt."""
    async with airport() as (played, pool):
        first, second, _, writer = await both_flown(played, pool)
        played.offers = OFFERS if again else b"554 5.3.2 no more\r\n"
        writer.write(replies)
        writer.close()
        assert words(await first) == [first_is]
        if again:
            await taken_anew(played, b"two\r\n")
            assert words(await second) == ["sent message final"]
        else:
            assert words(await second) == [f"deferred upstream ehlo {second_is}"]


GOES_ON = {
    "recipient": (b"250 Ok\r\n421 4.3.0 later\r\n503 no\r\n250 flushed\r\n" + TAKEN, "sent message final"),
    "content": (b"250 Ok\r\n250 Ok\r\n421 4.3.0 later\r\n250 flushed\r\n" + TAKEN, "sent message final"),
    "its RSET": (TAKEN + b"421 4.3.0 later\r\n" + TAKEN, "deferred upstream ehlo in_doubt"),
    "its MAIL": (TAKEN + b"250 flushed\r\n421 4.3.0 later\r\n250 Ok\r\n250 taken\r\n", "deferred upstream ehlo in_doubt"),
    "its MAIL, and means it": (TAKEN + b"250 flushed\r\n421 4.3.0 later\r\n503 no\r\n503 no\r\n", "deferred upstream ehlo fallback"),
}


@pytest.mark.parametrize(("replies", "expected"), GOES_ON.values(), ids=GOES_ON)
@pytest.mark.parametrize("pause", [0.0, 0.02])
async def test_who_says_goodbye_and_stays_may_have_taken_the_one_behind(replies: bytes, expected: str, pause: float) -> None:
    """As Exim does where an ACL says 421: what it answers then counts, and where it contradicts itself nobody else may get the message."""
    async with airport() as (played, pool):
        first, second, _, writer = await both_flown(played, pool)
        played.offers = b"554 5.3.2 no more\r\n"
        end = replies.index(b"later\r\n") + 7
        writer.write(replies[:end])
        await asyncio.sleep(pause)
        writer.write(replies[end:])
        await first
        assert words(await second) == [expected]


async def test_who_has_had_enough_of_resets_and_goes_has_not_taken_the_one_behind() -> None:
    """As Exim does after ten refused envelopes (smtp_accept_max_nonmail)."""
    async with airport() as (played, pool):
        first, second, _, writer = await both_flown(played, pool)
        writer.write(b"250 Ok\r\n550 5.1.1 nobody\r\n503 no\r\n554 Too many nonmail commands\r\n")
        writer.close()
        assert words(await first) == ["failed recipient rcpt"]
        reader, writer = await asyncio.wait_for(played.connections.get(), 30)
        await lands(reader, b"two\r\n")
        writer.write(b"250 Ok\r\n550 5.1.1 nobody\r\n503 no\r\n")
        assert words(await second) == ["failed recipient rcpt"]


async def test_who_comes_while_a_reply_is_on_its_way_rides_too() -> None:
    async with airport() as (played, pool):
        first = sending(pool, b"one\r\n")
        reader, writer = await played.connections.get()
        await lands(reader, b"one\r\n")
        second = sending(pool, b"two\r\n")
        await lands(reader, b"two\r\n", rides=True)
        writer.write(TAKEN)
        assert words(await first) == ["sent message final"]
        writer.write(b"250 flushed\r\n" + TAKEN)
        assert words(await second) == ["sent message final"]


@pytest.mark.parametrize("offers", [OFFERS, b"250-flown.test\r\n250 PIPELINING\r\n"])
async def test_replies_to_riders_do_not_wait_for_delayed_acknowledgements(offers: bytes) -> None:
    """Postfix leaves Nagle's algorithm on, and its replies wait for our acknowledgement of the one before: 40 ms where nothing is sent."""
    slow, count = 0.04, 30

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        writer.write(b"220 nagle.test\r\n")
        while line := await reader.readline():
            if line.startswith(b"DATA"):
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
            if line.startswith(b"QUIT"):
                return
            writer.write(offers if line.startswith(b"EHLO") else b"250 Ok\r\n")

    async with raw_server(serve) as upstream, pool_to(acme=limited(upstream)) as pool:
        begun = time.monotonic()
        messages = [asyncio.ensure_future(pool.send("acme", outgoing(A, B))) for _ in range(count)]
        assert all(map(all_sent, await asyncio.gather(*messages)))
        assert time.monotonic() - begun < slow * count / 2


async def test_what_was_answered_before_the_end_counts() -> None:
    async with airport() as (played, pool):
        first, second, _, writer = await both_flown(played, pool)
        writer.write(TAKEN + b"250 flushed\r\n" + TAKEN)
        writer.close()
        assert words(await first) == ["sent message final"]
        assert words(await second) == ["sent message final"]
        assert played.connections.empty()


async def test_what_reads_a_refused_content_as_commands_is_not_believed() -> None:
    """Such servers exist. Their replies to the lines of the one are not those to the other, however much they look like them."""
    async with airport() as (played, pool):
        content = b"Received: by relay\r\nRSET\r\nRSET\r\nRSET\r\nRSET\r\n"
        first, second = sending(pool, content), sending(pool, b"two\r\n")
        reader, writer = await played.connections.get()
        await lands(reader, content)
        await lands(reader, b"two\r\n", rides=True)
        writer.write(b"250 Ok\r\n550 5.1.1 nobody\r\n503 no\r\n" + b"500 what?\r\n" + 3 * b"250 flushed\r\n")
        assert words(await first) == ["failed recipient rcpt"]
        await taken_anew(played, b"two\r\n")
        assert words(await second) == ["sent message final"]


async def test_one_flight_at_a_time_is_behind_another() -> None:
    async with airport() as (played, pool):
        messages = [sending(pool, b"%d\r\n" % number) for number in range(4)]
        reader, writer = await played.connections.get()
        await lands(reader, b"0\r\n")
        await lands(reader, b"1\r\n", rides=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        writer.write(TAKEN)
        await lands(reader, b"2\r\n", rides=True)
        writer.write(b"250 flushed\r\n" + TAKEN)
        await lands(reader, b"3\r\n", rides=True)
        writer.write(2 * (b"250 flushed\r\n" + TAKEN))
        assert all(map(all_sent, await asyncio.gather(*messages)))


async def test_nobody_rides_while_another_connection_may_be_opened() -> None:
    async with airport(connections=3) as (played, pool):
        contents = [b"one\r\n", b"two\r\n", b"three\r\n"]
        messages = [sending(pool, content) for content in contents]
        for content in contents:
            reader, writer = await played.connections.get()
            await lands(reader, content)
        for writer in played.writers:
            writer.write(TAKEN)
        assert all(map(all_sent, await asyncio.gather(*messages)))


@pytest.mark.parametrize("many", [True, False])
async def test_what_is_not_one_flight_sends_its_commands_behind_one(many: bool) -> None:
    async with airport() as (played, pool):
        first = sending(pool, b"one\r\n")
        message = outgoing(A, B, octets=b"two\r\n") if many else outgoing(A, octets=b"two", rest=sliced(b"\r\n"), size=5)
        second, third = asyncio.ensure_future(pool.send("acme", message)), sending(pool, b"three\r\n")
        reader, writer = await played.connections.get()
        await lands(reader, b"one\r\n")
        commands = await reader.readuntil(b"DATA\r\n")
        assert commands.startswith(b"RSET\r\nMAIL")
        writer.write(
            b"250 Ok\r\n550 5.1.1 nobody\r\n503 no\r\n" + b"250 flushed\r\n250 Ok\r\n250 Ok\r\n" + b"250 Ok\r\n" * many + b"354 go on\r\n"
        )
        assert words(await first) == ["failed recipient rcpt"]
        assert await reader.readuntil(b"\r\n.\r\n") == b"two\r\n.\r\n"
        await lands(reader, b"three\r\n", rides=True)
        writer.write(b"250 taken\r\n250 flushed\r\n" + TAKEN)
        assert all_sent(await second) and all_sent(await third)


async def test_what_the_upstream_does_not_take_stays_on_the_ground() -> None:
    async with airport() as (played, pool):
        first = sending(pool, b"one\r\n")
        second = asyncio.ensure_future(pool.send("acme", outgoing(A, octets=b"x" * 60_000, size=200_000)))
        third = sending(pool, b"three\r\n")
        reader, writer = await played.connections.get()
        await lands(reader, b"one\r\n")
        writer.write(TAKEN)
        assert words(await second) == ["failed upstream mail fallback"]
        await lands(reader, b"three\r\n")
        writer.write(TAKEN)
        assert all_sent(await first) and all_sent(await third)


@pytest.mark.parametrize("gone", ["first", "second"])
async def test_who_is_cut_off_leaves_the_other_one_his_due(gone: str) -> None:
    """A flight that is cut off may have been taken, and its connection is out of step."""
    async with airport() as (played, pool):
        first, second, _, writer = await both_flown(played, pool)
        (first if gone == "first" else second).cancel()
        await asyncio.wait([first if gone == "first" else second])
        if gone == "first":
            await taken_anew(played, b"two\r\n")
            assert all_sent(await second)
        else:
            writer.write(TAKEN)
            assert all_sent(await first)
            third = sending(pool, b"three\r\n")
            await taken_anew(played, b"three\r\n")
            assert all_sent(await third)


@pytest.mark.parametrize("replies", [b"", b"421 4.4.2 idle for too long\r\n"])
async def test_where_a_connection_ends_under_two_of_them_its_place_is_given_up_once(replies: bytes) -> None:
    """Each needs another connection, and there is one place for both of them."""
    async with airport() as (played, pool):
        first, second, third = (sending(pool, octets) for octets in (b"one\r\n", b"two\r\n", b"three\r\n"))
        reader, writer = await played.connections.get()
        await lands(reader, b"one\r\n")
        await lands(reader, b"two\r\n", rides=True)
        writer.write(TAKEN)
        assert all_sent(await first)
        await lands(reader, b"three\r\n", rides=True)
        writer.write(replies)
        writer.close()
        reader, writer = await asyncio.wait_for(played.connections.get(), 30)
        await lands(reader, b"three\r\n")
        assert played.connections.empty()
        writer.write(TAKEN)
        assert all_sent(await third)
        if replies:  # not in doubt: it may go as before
            await lands(reader, b"two\r\n", rides=True)
            writer.write(b"250 flushed\r\n" + TAKEN)
        else:
            assert await reader.readline() == b"QUIT\r\n"
            assert played.connections.empty()
            writer.close()
            await taken_anew(played, b"two\r\n")
        assert all_sent(await second)
        assert pool._rides["acme"]._used == 0
