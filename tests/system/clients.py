"""From an application to a scripted upstream, with the real relay between: what the tests of real mail programs share."""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.process import REPOSITORY, RelayProcess
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

NOWHERE = "127.0.0.1:1"

_OURS = re.compile(
    rb"Received: [^\r\n]*\r\n(?:\t[^\r\n]*\r\n)+"
    rb"(?:Message-ID: <[0-9A-F]+\.[0-9a-f]+@relay\.example>\r\n)?(?:Date: [^\r\n]*\r\n)?"
)


async def execute(*command: str, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run a program to its end: its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": "/usr/sbin:/usr/bin:/bin", **environment},
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            said, _ = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None, "it has ended"
    return process.returncode, said.decode(errors="replace")


class Line:
    """From an application to an upstream, with a relay between. `host` and `port` are the first listener's."""

    def __init__(self, relay: RelayProcess, upstream: ScriptedUpstream) -> None:
        self.relay = relay
        self.upstream = upstream
        self.host, self.port = relay.address()

    async def run(self, *command: str, stdin: bytes = b"", **environment: str) -> str:
        """Run a program to its end; it must be content. What it said."""
        code, said = await execute(*command, stdin=stdin, cwd=self.relay.directory, **environment)
        assert code == 0, said
        return said

    async def arrived(self, count: int = 1) -> list[Transaction]:
        """What arrived, and nothing else did: every message that was accepted was sent, once."""
        transactions = await self.upstream.received(count)
        await self.relay.event("sent", count=count)
        assert await self.relay.terminate() == 0
        assert len(self.relay.events("accepted")) == len(self.relay.events("sent")) == len(self.upstream.transactions) == count
        assert self.relay.events("fault") == []
        return transactions


@asynccontextmanager
async def line_of(
    directory: Path, *, listeners: str = '[{bind: "127.0.0.1:0"}]', senders: str = "[acme.example]", more: str = ""
) -> AsyncIterator[Line]:
    """A line through a relay with these listeners; `more` of its configuration follows on lines of their own."""
    async with ScriptedUpstream() as upstream:
        config = f"""
hostname: relay.example
domain: acme.example
listeners: {listeners}
upstreams: {{acme: {{host: {upstream.host}, port: {upstream.port}, security: none{senders and f", senders: {senders}"}}}}}
routes: [{{sender: acme.example, upstream: acme}}]
spool: {{directory: {directory / "spool"}}}
log: {{format: json}}
{more}
"""
        async with RelayProcess(config, directory=directory) as relay:
            yield Line(relay, upstream)


def split_ours(content: bytes) -> tuple[list[str], bytes]:
    """The names of the fields that we put before, and what comes behind them."""
    match = _OURS.match(content)
    assert match, content[:500]
    return re.findall(r"^([A-Za-z-]+):", match[0].decode(), re.MULTILINE), content[match.end() :]


def sendmail_in(directory: Path, *, name: str = "sendmail") -> str:
    """relay-sendmail as a program of its own, as pip installs it."""
    program = directory / name
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom relay.sendmail import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return str(program)
