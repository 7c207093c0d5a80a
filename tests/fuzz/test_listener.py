"""Octets nobody should send, at the real listener: it answers from a short list of codes, or closes, and goes on as if nothing was.

A failure prints how to reproduce it.
"""

import asyncio
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.eventually import eventually
from tests.support.front import CONFIG, Front
from tests.support.wire import Wire

#: Everything a client may hear. 451 is missing: it would be a fault of ours.
CODES = {214, 220, 221, 250, 252, 354, 421, 452, 500, 501, 503, 550, 552, 554, 555}
_LINE = re.compile(rb"([2-5][0-9][0-9])([ -])([\x20-\x7e]*)")
ROUTES = [*CONFIG["routes"], {"name": "spam", "sender": "spam.example", "reject": "no"}]
LISTENER = {"message_size": 3000, "recipients": 3}

COMMANDS = [
    b"EHLO app", b"HELO app", b"MAIL FROM:<app@acme.example>", b"MAIL FROM:<>", b"MAIL FROM:<a@spam.example> SIZE=10",
    b"RCPT TO:<you@x.example>", b"RCPT TO:root", b"RCPT TO:<\xc3\xbc@b\xc3\xbccher.example>",
    b"MAIL FROM:<\xc3\xbc@acme.example> SMTPUTF8 BODY=8BITMIME", b"DATA", b"RSET", b"NOOP", b"VRFY x", b"HELP", b"QUIT",
    b"From: app@acme.example", b"Subject: x", b"", b".", b"..", b"AUTH LOGIN", b"STARTTLS", b"BDAT 5 LAST", b"GET / HTTP/1.1",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]  # fmt: skip
ENVELOPE = [b"EHLO app", b"MAIL FROM:<app@acme.example>", b"RCPT TO:<you@x.example>"]
WHOLE = [*ENVELOPE, b"DATA", b"From: app@acme.example", b"", b"x", b".", b"NOOP", b"QUIT"]
ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"", b"\0\r\n", b" \r\n"])
SPLICES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\x00", b"<", b">", b'"', b"\\", b"@", b"[", b"(", b"%s", b"\xe2\x80\xa8"]),
    st.sampled_from([b"A" * 5000, b" " * 300]),
)
WORDS = st.one_of(st.sampled_from(COMMANDS), st.binary(max_size=40))


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Lines of commands, or of a whole message, with pieces cut out, doubled, swapped and put in."""
    lines = draw(st.one_of(st.lists(WORDS, max_size=25), st.just(WHOLE), st.just(WHOLE * 2)))
    octets = b"".join(line + draw(ENDS) for line in lines)
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, len(octets))), draw(st.integers(0, 12))
        piece = draw(st.one_of(SPLICES, st.just(octets[start : start + length] * 2)))
        octets = octets[:start] + piece + octets[start + draw(st.integers(0, length)) :]
    return octets


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Front]]:
    async def build() -> Front:
        return await Front(
            tmp_path_factory.mktemp("fuzz"), {"routes": ROUTES, "aliases": {"root": ["a@x.example", "b@x.example"]}}, listener=LISTENER
        ).__aenter__()

    with asyncio.Runner() as runner:
        front = runner.run(build())
        yield runner, front
        runner.run(front.__aexit__(None, None, None))
        assert front.events("fault") == []


async def converse(front: Front, packets: list[bytes]) -> bytes:
    """Wait for the greeting, say all of it, then FIN; everything that was answered until the relay closed."""
    front.taken.clear()
    heard = b""
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", front.port))
    wire = Wire(connection)
    try:
        async with asyncio.timeout(10):
            while not heard.endswith(b"\r\n"):
                heard += await wire.receive()
            with suppress(ConnectionError):
                for packet in packets:
                    await wire.send(packet)
                    await asyncio.sleep(0)
            wire.finish_sending()
            while octets := await wire.receive():
                heard += octets
    finally:
        wire.close()
    await eventually(lambda: front.door.sessions == 0, "the session to end", within=5)
    return heard


def check(front: Front, said: bytes, heard: bytes) -> None:
    assert heard.endswith(b"\r\n") and heard.startswith(b"220 "), heard
    for line in heard[:-2].split(b"\r\n"):
        match = _LINE.fullmatch(line)
        assert match and len(line) <= 510, line
        assert int(match[1]) in CODES, line
    assert heard.count(b"queued as") == len(front.taken) <= said.count(b".\r\n")
    assert front.arriving == []
    for message in front.taken:
        assert not re.search(rb"\r(?!\n)|(?<!\r)\n", message.sent)
        header = message.sent.partition(b"\r\n\r\n")[0]
        assert header.startswith(b"Received: from ")
        assert all(re.match(rb"[ \t]|[!-9;-~]+[ \t]*:", line) for line in message.prefix[:-2].split(b"\r\n"))


@settings(max_examples=600)
@given(said=conversations(), cuts=st.lists(st.integers(1, 60), max_size=12))
def test_mutated_conversations_are_answered_from_the_list(scene: tuple[asyncio.Runner, Front], said: bytes, cuts: list[int]) -> None:
    packets, place = [], 0
    for size in cuts:
        packets.append(said[place : place + size])
        place += size
    runner, front = scene
    check(front, said, runner.run(converse(front, [*packets, said[place:]])))


@settings(max_examples=200)
@given(said=st.lists(st.binary(max_size=400), max_size=4))
def test_random_octets_are_answered_from_the_list(scene: tuple[asyncio.Runner, Front], said: list[bytes]) -> None:
    runner, front = scene
    check(front, b"".join(said), runner.run(converse(front, said)))


ARGUMENTS = st.text(
    st.one_of(st.sampled_from('<>@."\\[]:,;() \t=+-_%é\u2028\u200b\x00\x7f'), st.characters(codec="utf-8"), st.sampled_from("abcAB19")),
    max_size=60,
)


@settings(max_examples=600)
@given(sender=ARGUMENTS, recipient=ARGUMENTS, name=ARGUMENTS, angled=st.booleans(), utf8=st.booleans())
def test_addresses_and_names_of_any_kind_are_taken_or_refused_for_good(
    scene: tuple[asyncio.Runner, Front], sender: str, recipient: str, name: str, angled: bool, utf8: bool
) -> None:
    paths = [f"<{text}>" if angled else text for text in (sender, recipient)]
    said = "\r\n".join(
        [f"EHLO {name}", f"MAIL FROM:{paths[0]}{' SMTPUTF8' if utf8 else ''}", f"RCPT TO:{paths[1]}", "RSET",
         "MAIL FROM:<app@acme.example> SMTPUTF8", f"RCPT TO:{paths[1]}", "DATA", "", ".", "QUIT", ""]
    ).encode()  # fmt: skip
    runner, front = scene
    check(front, said, runner.run(converse(front, [said])))


def test_what_is_known_to_be_nasty_is_answered_from_the_list(scene: tuple[asyncio.Runner, Front]) -> None:
    runner, front = scene
    for said in (b"".join(line + b"\r\n" for line in COMMANDS), b"\xff" * 10_000, b"\n" * 100, b"\r\n" * 5 + b"DATA\r\n", b"." * 5000):
        check(front, said, runner.run(converse(front, [said])))
