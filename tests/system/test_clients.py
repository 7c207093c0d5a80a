"""Real mail programs send through the real process to a scripted upstream: what they meant to say arrives octet by octet.

What may differ is ours: the fields that are put before the header, and CRLF for whatever line ends there were.
"""

import asyncio
import json
import re
import smtplib
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.process import RelayProcess
from tests.support.record import Transaction
from tests.support.upstream import ScriptedUpstream

SENDER, RECIPIENTS = "app@acme.example", ["you@example.org", "her@example.org"]
HEADER = b"From: App <app@acme.example>\r\nTo: you@example.org\r\nSubject: from a real client\r\nDate: Fri, 15 Jan 2027 08:00:00 +0000\r\n"
BODY = (
    b"plain\r\n.\r\n..\r\n...three dots\r\n.one dot\r\n\r\nFrom here on\r\n\tblanks at the end \t \r\n"
    + b"a long line "
    + b"x" * 900
    + b"\r\nlast line\r\n"
)
MESSAGE = HEADER + b"Message-ID: <1@app.acme.example>\r\n\r\n" + BODY
OCTETS = MESSAGE.replace(b"last line", "Grüße, 8 bits: \u00ff".encode())

_OURS = re.compile(
    rb"Received: [^\r\n]*\r\n(?:\t[^\r\n]*\r\n)+"
    rb"(?:Message-ID: <[0-9A-F]+\.[0-9a-f]+@relay\.example>\r\n)?(?:Date: [^\r\n]*\r\n)?"
)

Tool = Callable[[str], str]


class Line:
    """From an application to an upstream, with a relay between."""

    def __init__(self, relay: RelayProcess, upstream: ScriptedUpstream) -> None:
        self.relay = relay
        self.upstream = upstream
        self.host, self.port = relay.address()

    async def run(self, *command: str, stdin: bytes = b"", **environment: str) -> None:
        """Run a program to its end; it must be content."""
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": "/usr/bin:/bin", **environment}
        )  # fmt: skip
        async with asyncio.timeout(30):
            said, _ = await process.communicate(stdin)
        assert process.returncode == 0, said.decode(errors="replace")

    async def arrived(self, count: int = 1) -> list[Transaction]:
        """What arrived, and nothing else did: every message that was accepted was sent, once."""
        transactions = await self.upstream.received(count)
        await self.relay.event("sent", count=count)
        assert await self.relay.terminate() == 0
        assert len(self.relay.events("accepted")) == len(self.relay.events("sent")) == len(self.upstream.transactions) == count
        assert self.relay.events("fault") == []
        return transactions


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with ScriptedUpstream() as upstream:
        config = f"""
            hostname: relay.example
            listeners: [{{bind: "127.0.0.1:0"}}]
            upstreams: {{acme: {{host: {upstream.host}, port: {upstream.port}, security: none}}}}
            routes: [{{sender: acme.example, upstream: acme}}]
            spool: {{directory: {tmp_path / "spool"}}}
            log: {{format: json}}
        """
        async with RelayProcess(config, directory=tmp_path) as relay:
            yield Line(relay, upstream)


def split_ours(content: bytes) -> tuple[list[str], bytes]:
    """The names of the fields that we put before, and what comes behind them."""
    match = _OURS.match(content)
    assert match, content[:500]
    return re.findall(r"^([A-Za-z-]+):", match[0].decode(), re.MULTILINE), content[match.end() :]


async def test_smtplib(line: Line) -> None:
    def send() -> None:
        with smtplib.SMTP(line.host, line.port, local_hostname="app.acme.example") as client:
            assert client.sendmail(SENDER, RECIPIENTS, OCTETS, mail_options=["BODY=8BITMIME"]) == {}
            assert client.sendmail(SENDER, RECIPIENTS[:1], BODY) == {}

    await asyncio.to_thread(send)
    transactions = {len(transaction.recipients): transaction for transaction in await line.arrived(2)}
    assert transactions[2].sender == SENDER and transactions[2].recipients == RECIPIENTS
    assert "BODY=8BITMIME" in transactions[2].parameters
    assert split_ours(transactions[2].content) == (["Received"], OCTETS)
    assert split_ours(transactions[1].content) == (["Received", "Message-ID", "Date"], b"\r\n" + BODY)
    assert b"Received: from app.acme.example ([127.0.0.1])\r\n\tby relay.example with ESMTP id " in transactions[2].content


@pytest.mark.parametrize("pipeline", [True, False])
async def test_swaks(line: Line, tool: Tool, tmp_path: Path, pipeline: bool) -> None:
    (tmp_path / "message").write_bytes(OCTETS.replace(b"\r\n", b"\n"))
    await line.run(
        tool("swaks"), "--server", line.host, "--port", str(line.port), "--from", SENDER, "--to", ",".join(RECIPIENTS),
        "--helo", "app.acme.example", "--data", f"@{tmp_path / 'message'}", *(["--pipeline"] if pipeline else []),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    ours, theirs = split_ours(transaction.content)
    assert ours == ["Received"]
    assert theirs == OCTETS + b"\r\n"  # it puts an empty line before the final dot


async def test_curl(line: Line, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "message").write_bytes(OCTETS)
    recipients = [option for recipient in RECIPIENTS for option in ("--mail-rcpt", recipient)]
    await line.run(
        tool("curl"), "-sS", f"smtp://{line.host}:{line.port}/app", "--mail-from", SENDER, *recipients,
        "--upload-file", str(tmp_path / "message"),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_msmtp(line: Line, tool: Tool, tmp_path: Path) -> None:
    await line.run(
        tool("msmtp"), "--file=/dev/null", f"--host={line.host}", f"--port={line.port}", "--tls=off", "--auth=off", f"--from={SENDER}",
        *RECIPIENTS, stdin=OCTETS.replace(b"\r\n", b"\n"), HOME=str(tmp_path),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


NODEMAILER = """
const transport = require("nodemailer").createTransport({host: process.env.HOST, port: +process.env.PORT, name: "app", ignoreTLS: true});
transport.sendMail({envelope: {from: process.env.SENDER, to: JSON.parse(process.env.RECIPIENTS)}, raw: require("fs").readFileSync(0)},
  (error, info) => { if (error) { console.error(error); process.exit(1); } console.log(info.response); transport.close(); });
"""


async def test_nodemailer(line: Line, tool: Tool) -> None:
    if not Path("/usr/share/nodejs/nodemailer").exists():
        tool("nodemailer, the Debian package node-nodemailer,")
    await line.run(
        tool("node"), "-e", NODEMAILER, stdin=OCTETS, NODE_PATH="/usr/share/nodejs", HOST=line.host, PORT=str(line.port), SENDER=SENDER,
        RECIPIENTS=json.dumps(RECIPIENTS),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_smtp_source(line: Line, tool: Tool) -> None:
    await line.run(
        tool("smtp-source"), "-s", "4", "-m", "20", "-l", "5000", "-r", "2", "-f", SENDER, "-t", "you@example.org",
        f"inet:{line.host}:{line.port}",
    )  # fmt: skip
    transactions = await line.arrived(20)
    for transaction in transactions:
        ours, theirs = split_ours(transaction.content)
        assert ours == ["Received"]
        assert (transaction.sender, len(transaction.recipients)) == (SENDER, 2)
        assert theirs.startswith(b"From: <app@acme.example>\r\n") and theirs.endswith(b"XXXXXXX\r\n")
        assert abs(len(theirs) - 5000) < 300
    assert len({transaction.content for transaction in transactions}) == 20
