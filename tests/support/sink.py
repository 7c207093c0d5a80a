"""An upstream that takes everything as fast as it comes and keeps nothing: it counts messages and octets.

For tests of size and speed. It offers PIPELINING and SIZE, answers commands by their first letters, and looks at content only for
its end. One connection costs one protocol object and no task.
"""

import asyncio
from types import TracebackType
from typing import Self

_END = b"\r\n.\r\n"
_REPLIES = {
    b"EHLO": b"250-sink.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 1000000000\r\n",
    b"HELO": b"250 sink.test\r\n",
    b"DATA": b"354 Go ahead\r\n",
    b"QUIT": b"221 2.0.0 Bye\r\n",
}


class Sink:
    """The server, listening inside its `async with`. `messages`, the `times` of their ends (by the loop), and `octets` of content (with its
    stuffing), so far."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self.messages = 0
        self.times: list[float] = []
        self.octets = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Transport] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), self.host, 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._server, "it was never started"
        self._server.close()
        for transport in list(self._connections):
            transport.abort()
        await self._server.wait_closed()
        while self._connections:
            await asyncio.sleep(0)

    def opened(self, transport: asyncio.Transport) -> None:
        self._connections.add(transport)

    def closed(self, transport: asyncio.Transport) -> None:
        self._connections.discard(transport)


class _Connection(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._transport: asyncio.Transport | None = None
        self._rest = b""  # of a command line, or the last octets of content, where its end may begin
        self._in_content = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sink.opened(transport)
        transport.write(b"220 sink.test ESMTP\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._transport, "it was made"
        self._sink.closed(self._transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport, "it was made"
        replies: list[bytes] = []
        data = self._rest + data
        while data:
            if self._in_content:
                end = data.find(_END)
                if end < 0:
                    keep = min(len(data), len(_END) - 1)
                    self._sink.octets += len(data) - keep
                    data = data[len(data) - keep :]
                    break
                self._sink.octets += end
                self._sink.messages += 1
                self._sink.times.append(asyncio.get_running_loop().time())
                self._in_content = False
                data = data[end + len(_END) :]
                replies.append(b"250 2.0.0 Ok\r\n")
                continue
            line, newline, rest = data.partition(b"\n")
            if not newline:
                break
            data = rest
            verb = line[:4].upper()
            replies.append(_REPLIES.get(verb, b"250 2.0.0 Ok\r\n"))
            if verb == b"DATA":
                self._in_content = True
                data = b"\r\n" + data  # the end may be the very first line
                self._sink.octets -= 2
        self._rest = data
        if replies:
            self._transport.write(b"".join(replies))
            if replies[-1].startswith(b"221"):
                self._transport.close()
