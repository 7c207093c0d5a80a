"""Many large messages at once, and the upstream that they go to: in a process of its own, so that a test that measures is not busy.

Run as a program it prints the port of its sink; for each relay's address that it reads it sends, and prints `sent` and `arrived`.
"""

import asyncio
import subprocess
import sys
from types import TracebackType
from typing import Self

from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import REPOSITORY
from tests.support.sink import Sink

HEADER = b"From: a@acme.example\r\nSubject: large\r\nMessage-ID: <1@acme.example>\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\n\r\n"
LINES = (b"%070d abcdef\r\n" % 7) * 1000
_DEADLINE_SECONDS = 120.0


class LargeMail:
    """The process, inside its `async with`. `port`: of its sink."""

    def __init__(self, *, messages: int, message_bytes: int) -> None:
        self._arguments = [str(messages), str(message_bytes)]
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.system.large_mail", *self._arguments, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # fmt: skip
        self.port = int(await self._line())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._process and self._process.stdin, "it was never started"
        self._process.stdin.close()
        if self._process.returncode is None and error is not None:
            self._process.kill()
        await self._process.wait()

    async def send(self, host: str, port: int) -> None:
        """Send all messages to the relay; comes back when the last is acknowledged."""
        assert self._process and self._process.stdin, "it was never started"
        self._process.stdin.write(f"{host} {port}\n".encode())
        assert await self._line() == "sent"

    async def arrived(self) -> None:
        """Wait until all of them have come to the sink."""
        assert await self._line() == "arrived"

    async def _line(self) -> str:
        assert self._process and self._process.stdout, "it was never started"
        line = await asyncio.wait_for(self._process.stdout.readline(), _DEADLINE_SECONDS)
        return line.decode().strip()


async def _send(host: str, port: int, message_bytes: int) -> None:
    async with Client(host, port, deadline=_DEADLINE_SECONDS) as client:
        await client.greet()
        await client.command("MAIL FROM:<app@large.example>", 250)
        await client.command("RCPT TO:<you@example.org>", 250)
        await client.command("DATA", 354)
        await client.send(HEADER)
        sent = len(HEADER)
        while sent < message_bytes:
            await client.send(LINES)
            sent += len(LINES)
        await client.send(b".\r\n")
        await client.expect(250)


async def _main(messages: int, message_bytes: int) -> None:
    async with Sink() as sink:
        print(sink.port, flush=True)
        while address := await asyncio.to_thread(sys.stdin.readline):
            host, port = address.split()
            wanted, octets = sink.messages + messages, sink.octets
            await asyncio.gather(*(_send(host, int(port), message_bytes) for _ in range(messages)))
            print("sent", flush=True)
            await eventually(lambda wanted=wanted: sink.messages == wanted, "all to arrive", within=_DEADLINE_SECONDS)
            assert sink.octets - octets >= messages * message_bytes, "whole"
            print("arrived", flush=True)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
