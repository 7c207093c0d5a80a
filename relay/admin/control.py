"""The control socket: the operator's orders from other processes of this machine, one JSON object a line in and out.

Who may open the socket (mode 0660) may give orders; the log names the user. A client costs nobody anything: requests are limited in
size, clients in number, and one that neither asks nor reads is cut off. `docs/operations.md` has the language.

State: the listening socket, and a task for each client. Law: stopping waits for the page that is under way, so that no claim is left
behind.
"""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any, Final

from relay.admin.operator import Operator, Order, Progress
from relay.admin.request import VERSION, Refused, parse_request
from relay.observe.journal import Journal
from relay.spool.base import SpoolError
from relay.unix import SocketPath, uid_of_peer

_MODE: Final = 0o660
_REQUEST_LIMIT_BYTES: Final = 1024 * 1024  # ten thousand ids are 160,000
_CLIENTS_LIMIT: Final = 16
_IDLE_SECONDS: Final = 60.0
_UNREAD_SECONDS: Final = 10.0

_TOO_LONG: Final = f"the request has more than {_REQUEST_LIMIT_BYTES} bytes"
_TOO_MANY: Final = f"{_CLIENTS_LIMIT} clients are connected already; try again"
_STOPPING: Final = "the relay is stopping; what was not told as done is as it was"
_FAULT: Final = "a fault of the relay's own, see the log; what was not told as done may be as it was"


class _Stopping(Exception):
    """The relay stops between two pages of an order."""


class Control:
    """The server. Made inside a running loop; opened once, then stopped, drained and closed."""

    def __init__(self, path: Path, operator: Operator, journal: Journal, *, alias: Path) -> None:
        """`alias` becomes a link to the socket, unless it is the socket: where those look who know only the spool."""
        self._path = path
        self._place = SocketPath(path, mode=_MODE, name="the control socket")
        self._alias = alias
        self._operator = operator
        self._journal = journal
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._busy: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def open(self) -> None:
        """Listen. Raises SocketInUse, or OSError with the path in its words."""
        # Not start_unix_server, which from Python 3.13 on takes the path away before we let go of it.
        self._server = await asyncio.start_server(self._admit, sock=self._place.bind(), limit=_REQUEST_LIMIT_BYTES)
        try:
            self._link()
        except OSError as error:
            raise OSError(f"{self._alias}, where commands look for {self._path}, cannot be made: {error.strerror}") from error

    def stop(self) -> None:
        """Take no more clients and orders; an order that is being carried out ends with its page."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
        for task in self._clients.keys() - self._busy:
            task.cancel()

    async def drained(self) -> None:
        """Wait for the orders that are being carried out."""
        if self._clients:
            await asyncio.wait(self._clients)

    async def abort(self) -> None:
        """Cut off what is under way."""
        running = list(self._clients)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def close(self) -> None:
        """Take the socket away, if it was ours."""
        if self._server is not None and self._alias.is_symlink():
            with contextlib.suppress(OSError):
                self._alias.unlink()
        self._place.release()

    def _link(self) -> None:
        target = self._path.absolute()
        if target == self._alias.absolute():
            return
        with contextlib.suppress(FileNotFoundError):
            self._alias.unlink()
        self._alias.symlink_to(target)

    # -- one client -----------------------------------------------------------------------------------------------------

    def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._stopping or len(self._clients) >= _CLIENTS_LIMIT:
            writer.write(_line(error=_STOPPING if self._stopping else _TOO_MANY, more=False))
            writer.close()
            return
        writer.transport.set_write_buffer_limits(0)  # `drain` waits for the last octet
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="control")
        self._clients[task] = writer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        writer = self._clients.pop(task)  # has to be there when it is aborted: from Python 3.13 on it complains if it goes first
        writer.transport.abort()  # all is said, or nobody reads it
        self._busy.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._journal.fault("serving the control socket", error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        by = _user(writer)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while line := await self._request(reader, writer):
                self._busy.add(task)
                await self._answer(line, writer, by)
                self._busy.discard(task)
                if self._stopping:
                    break

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """The next line, or nothing when there is none or it is too long."""
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                return await reader.readline()
        except ValueError:  # readline's word for a line beyond the limit
            await self._say(writer, error=_TOO_LONG, more=False)
            return b""

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter, by: str) -> None:
        try:
            order = parse_request(line, by=by)
            if isinstance(order, Order):
                await self._carry_out(order, writer)
            else:
                await self._say(writer, matched=await self._operator.count(order), more=False)
        except (Refused, SpoolError) as error:
            await self._say(writer, error=str(error), more=False)
        except _Stopping:
            await self._say(writer, error=_STOPPING, more=False)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            self._journal.fault("carrying out an order", error)
            await self._say(writer, error=_FAULT, more=False)

    async def _carry_out(self, order: Order, writer: asyncio.StreamWriter) -> None:
        async def tell(progress: Progress) -> None:
            await self._say(writer, changed=list(progress.changed), skipped=dict(progress.skipped), more=True)
            if self._stopping:
                raise _Stopping

        await self._operator.carry_out(order, tell)
        await self._say(writer, more=False)

    async def _say(self, writer: asyncio.StreamWriter, **fields: Any) -> None:
        """Write one line, and wait until it is gone. Raises TimeoutError when nobody reads it, ConnectionError when the client has left."""
        writer.write(_line(**fields))
        async with asyncio.timeout(_UNREAD_SECONDS):
            await writer.drain()


def _line(**fields: Any) -> bytes:
    return json.dumps({"version": VERSION, **fields}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def _user(writer: asyncio.StreamWriter) -> str:
    """Who is at the other end, for the log."""
    return f"uid {uid_of_peer(writer.get_extra_info('socket'))}"
