"""One message in, exactly one out: whatever stands in it that some server takes for the end of a message.

The sequences are those of SMTP smuggling as published by SEC Consult in December 2023, and what others found after them. They go
through the relay to Postfix and to Exim, by DATA and by BDAT on either side, small and large. Needs both: .ci/run has them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.mail.content import normalize, unstuff
from tests.support.client import Client
from tests.support.upstream import ScriptedUpstream
from tests.system.receivers import Exim, Postfix, Receiver
from tests.system.relays import Running, running, to

ENDS = {
    "lf dot lf": b"\n.\n",
    "lf dot crlf": b"\n.\r\n",
    "crlf dot lf": b"\r\n.\n",
    "cr dot cr": b"\r.\r",
    "cr dot lf": b"\r.\n",
    "lf dot cr": b"\n.\r",
    "cr dot crlf": b"\r.\r\n",
    "crlf dot cr": b"\r\n.\r",
    "crlf dot crcrlf": b"\r\n.\r\r\n",
    "lf dot crcrlf": b"\n.\r\r\n",
    "crcrlf dot crcrlf": b"\r\r\n.\r\r\n",
    "crlf cr dot crlf": b"\r\n\r.\r\n",
    "crlf nul dot crlf": b"\r\n\0.\r\n",
    "crlf dot nul crlf": b"\r\n.\0\r\n",
    "crlf dot blank crlf": b"\r\n. \r\n",
    "lf stuffed dot lf": b"\n..\n",
    "crlf stuffed dot lf": b"\r\n..\n",
    "crlf stuffed dot crlf": b"\r\n..\r\n",
    "lf stuffed dot crlf": b"\n..\r\n",
    "two of them": b"\n.\n\r\n.\n",
    "vertical tab": b"\x0b.\x0b",
    "next line": b"\xc2\x85.\xc2\x85",
    "line separator": b"\xe2\x80\xa8.\xe2\x80\xa8",
}
SMUGGLED = b"MAIL FROM:<evil@acme.example>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\nSubject: smuggled\r\n\r\nsmuggled\r\n"
PADDING = b"0123456789 123456789 123456789 123456789 123456789 12345678\r\n" * 24_000

Tool = Callable[[str], str]


def content_of(number: int, end: bytes, *, large: bool) -> bytes:
    return b"From: app@acme.example\r\nSubject: case %d\r\n\r\n%bbody%b%b" % (number, PADDING if large else b"", end, SMUGGLED)


async def send(client: Client, content: bytes, *, chunked: bool, code: int = 250) -> None:
    """As it stands: nothing is stuffed."""
    await client.command("MAIL FROM:<app@acme.example>", 250)
    await client.command("RCPT TO:<you@example.org>", 250)
    if chunked:
        half = content.index(b"body") + 5  # between CR and LF, where the end begins with them
        await client.send(b"BDAT %d\r\n%b" % (half, content[:half]))
        await client.expect(250)
        await client.send(b"BDAT %d LAST\r\n%b" % (len(content) - half, content[half:]))
    else:
        await client.command("DATA", 354)
        await client.send(content + b".\r\n")
    await client.expect(code)


def arrives(content: bytes, *, chunked: bool) -> bytes:
    """What is to come out of it, with LF for line ends."""
    return (normalize(content) if chunked else unstuff(normalize(content))).replace(b"\r\n", b"\n")


async def send_all(relay: Running, *, chunked: bool, code: int = 250) -> list[bytes]:
    contents = [content_of(number, end, large=number % 6 == 0) for number, end in enumerate(ENDS.values())]
    for part in (contents[: len(contents) // 2], contents[len(contents) // 2 :]):
        for content in part:
            async with relay.client() as client:
                await client.greet()
                await send(client, content, chunked=chunked, code=code)
                await client.quit()
    return contents


@pytest.mark.parametrize("chunked_in", [False, True], ids=["data-in", "bdat-in"])
@pytest.mark.parametrize("chunked_out", [False, True], ids=["data-out", "bdat-out"])
@pytest.mark.parametrize("kind", [Postfix, Exim])
async def test_one_message_comes_out_of_one(tmp_path: Path, tool: Tool, kind: type[Receiver], chunked_in: bool, chunked_out: bool) -> None:
    program = tool("postfix" if kind is Postfix else "exim4")
    async with kind(program, chunking=chunked_out) as server:
        upstream = {"host": server.host, "port": server.port, "security": "none"}
        routes = [{"name": "acme", "sender": "acme.example", "upstream": "acme"}]
        async with running(tmp_path, upstreams={"acme": upstream}, routes=routes) as relay:
            contents = await send_all(relay, chunked=chunked_in)
            await relay.empty()
            assert {entry.status for entry in relay.results()} == {"sent"}
        kept = server.messages()
    assert len(kept) == len(contents)
    assert {message.sender for message in kept} == {"app@acme.example"}
    assert {message.recipients for message in kept} == {("you@example.org",)}
    found = {}
    for message in kept:
        number = re.search(rb"^[^\n]*Subject: case (\d+)$", message.content, re.MULTILINE)
        assert number
        found[int(number[1])] = message.content.partition(b"\n\n")[2]
    for number, (name, content) in enumerate(zip(ENDS, contents, strict=True)):
        body = arrives(content, chunked=chunked_in).partition(b"\n\n")[2]
        assert found[number].replace(b"\0", b"") == body.replace(b"\0", b""), name


@pytest.mark.parametrize("chunked_in", [False, True], ids=["data-in", "bdat-in"])
async def test_where_bare_line_ends_are_refused_none_comes_out(tmp_path: Path, chunked_in: bool) -> None:
    async with ScriptedUpstream() as server:
        listener = {"bind": "127.0.0.1:0", "name": "local", "newlines": "reject"}
        routes = [{"name": "acme", "sender": "acme.example", "upstream": "acme"}]
        async with running(tmp_path, upstreams={"acme": to(server)}, routes=routes, listeners=[listener]) as relay:
            good = 0
            for number, end in enumerate(ENDS.values()):
                bare = re.search(rb"\r(?!\n)|(?<!\r)\n", end) is not None
                good += not bare
                async with relay.client() as client:
                    await client.greet()
                    content = content_of(number, end, large=number % 6 == 0)
                    await send(client, content, chunked=chunked_in, code=550 if bare else 250)
                    await client.quit()
            await relay.empty()
        assert len(server.accepted) == good > 3
        assert {transaction.sender for transaction in server.accepted} == {"app@acme.example"}


async def test_without_the_relay_one_message_comes_out_as_two(tmp_path: Path, tool: Tool) -> None:
    """What is tried above is worth trying: this Postfix takes a dot line behind a bare LF for the end."""
    async with Postfix(tool("postfix"), chunking=False) as server:
        async with Client(server.host, server.port) as client:
            await client.greet()
            await send(client, content_of(1, ENDS["lf dot crlf"], large=False), chunked=False)
            for code in (250, 250, 354, 250):
                await client.expect(code)
            await client.quit()
        assert sorted(message.sender for message in server.messages()) == ["app@acme.example", "evil@acme.example"]
