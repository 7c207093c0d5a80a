"""A real SMTP server on 127.0.0.1 that plays an upstream, as well or as badly as a test wants, and records everything.

    async with ScriptedUpstream(users={"acme": "secret"}, tls=tls.server, security="starttls") as upstream:
        upstream.script("final", b"451 4.3.0 later", times=1)
        ...
        (transaction,) = await upstream.received(1)

This module answers for the server's life. `smtp_session` speaks, `playbook` misbehaves, `record` remembers.
"""

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Container, Iterable, Mapping
from types import TracebackType
from typing import Self

from tests.support.eventually import PATIENCE_SECONDS, eventually
from tests.support.playbook import Action, Close, Drip, Garbage, Half, Hang, Hold, Phase, Playbook, Reset, Say
from tests.support.record import Connection, Login, Record, Transaction
from tests.support.smtp_session import Offer, Security, Session
from tests.support.wire import Wire

__all__ = [
    "Action",
    "Close",
    "Connection",
    "Drip",
    "Garbage",
    "Half",
    "Hang",
    "Hold",
    "Login",
    "Phase",
    "Reset",
    "Say",
    "ScriptedUpstream",
    "Security",
    "Transaction",
]

_DICE = random.SystemRandom()  # Hypothesis and tests seed the other one, alike in all workers
OFFERED = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
MECHANISMS = ("PLAIN", "LOGIN", "CRAM-MD5")


class ScriptedUpstream:
    """The server, listening inside its `async with`.

    `users` (name to password) makes AUTH offered and, unless `auth_required` is false, demanded; `mechanisms` narrows it.
    `tokens`: the access tokens that XOAUTH2 takes, which is then offered, too.
    `security` needs a server context in `tls`. `without` takes extensions away from OFFERED and `offers` adds lines to it.
    `helo_only` refuses EHLO. `recipients` is the most of them in one transaction: 452 for the rest.
    """

    def __init__(
        self,
        *,
        users: Mapping[str, str] | None = None,
        tokens: Container[str] | None = None,
        mechanisms: Iterable[str] = MECHANISMS,
        auth_required: bool = True,
        security: Security = "none",
        tls: ssl.SSLContext | None = None,
        offers: Iterable[str] = (),
        without: Iterable[str] = (),
        helo_only: bool = False,
        recipients: int = 1000,
        port: int = 0,
    ) -> None:
        if (security == "none") is (tls is not None):
            raise ValueError("security starttls and tls need a context, none takes none")
        gone = set(without)
        if unknown := gone - {extension.split()[0] for extension in OFFERED}:
            raise ValueError(f"not offered anyway: {', '.join(sorted(unknown))}")
        self.host = "127.0.0.1"
        self.port = port
        self.most_at_once = 0  # connections
        self._offer = Offer(
            extensions=(*(extension for extension in OFFERED if extension.split()[0] not in gone), *offers),
            mechanisms=(*(mechanisms if users else ()), *(("XOAUTH2",) if tokens is not None else ())),
            users=dict(users or {}),
            tokens=tokens if tokens is not None else (),
            auth_required=auth_required and (bool(users) or tokens is not None),
            security=security,
            tls=tls,
            helo_only=helo_only,
            recipients=recipients,
        )
        self._playbook = Playbook()
        self._record = Record()
        self._listening: socket.socket | None = None
        self._sessions: dict[asyncio.Task[None], Wire] = {}
        self._faults: list[Exception] = []

    # -- the script --------------------------------------------------------------------------------------------------

    def script(
        self,
        phase: Phase,
        action: Action | bytes,
        *,
        times: int | None = None,
        connection: int | None = None,
        transaction: int | None = None,
        recipient: str | None = None,
    ) -> None:
        """Do `action` in `phase`: always, or only so many `times`, on the nth connection or transaction, for one recipient.

        The oldest rule that fits and is not used up decides. Plain bytes are a reply. Connections and transactions count from 1,
        refused ones too, transactions over all connections.
        """
        self._playbook.add(phase, action, times=times, connection=connection, transaction=transaction, recipient=recipient)

    def heal(self) -> None:
        """Forget the script: behave from now on."""
        self._playbook.clear()

    # -- the record --------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> list[Connection]:
        return self._record.connections

    @property
    def logins(self) -> list[Login]:
        return self._record.logins

    @property
    def transactions(self) -> list[Transaction]:
        return self._record.transactions

    @property
    def accepted(self) -> list[Transaction]:
        """The transactions that were given a 2xx after their content."""
        return [transaction for transaction in self.transactions if transaction.accepted]

    @property
    def open_connections(self) -> int:
        return sum(not connection.closed for connection in self.connections)

    async def received(self, count: int, *, within: float = PATIENCE_SECONDS) -> list[Transaction]:
        """Wait until at least `count` transactions were accepted, and return all of them."""
        what = f"{count} accepted transactions at {self.address}"
        await eventually(lambda: len(self.accepted) >= count, what, within=within)
        return self.accepted

    async def connected(self, count: int, *, within: float = PATIENCE_SECONDS) -> list[Connection]:
        """Wait until at least `count` connections were made, and return all of them."""
        await eventually(lambda: len(self.connections) >= count, f"{count} connections to {self.address}", within=within)
        return self.connections

    # -- the life ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.stop()
        if self._faults and error is None:
            raise ExceptionGroup("the scripted upstream itself failed", self._faults)

    async def start(self) -> None:
        """Listen; after a `stop`, on the same port again, which nobody has got meanwhile."""
        self.port = self.port or unused_port()
        listening = socket.create_server((self.host, self.port), backlog=256)
        listening.setblocking(False)
        self._listening = listening
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    async def stop(self) -> None:
        """Drop every connection and refuse new ones."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        sessions = dict(self._sessions)
        for task in sessions:
            task.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)
        for wire in sessions.values():  # a task that was cancelled before its first step has closed nothing
            wire.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):  # the client may have gone again
            accepted, _ = listening.accept()
            wire, connection = Wire(accepted), Connection(len(self.connections) + 1)
            self.connections.append(connection)
            self.most_at_once = max(self.most_at_once, self.open_connections)
            task = asyncio.create_task(self._serve(wire, connection), name=f"scripted upstream: {connection.number}")
            self._sessions[task] = wire
            task.add_done_callback(self._sessions.pop)

    async def _serve(self, wire: Wire, connection: Connection) -> None:
        session = Session(wire, connection, offer=self._offer, playbook=self._playbook, record=self._record)
        try:
            await session.run()
        except (ConnectionError, ssl.SSLError):
            pass  # the client went away: the record says how far it came
        except Exception as fault:
            self._faults.append(fault)
        finally:
            with contextlib.suppress(OSError):
                wire.close()
            connection.closed = True


def unused_port() -> int:
    """A port that nobody uses on any address, and that the kernel does not give away by itself meanwhile: it begins at 32768."""
    while True:
        port = _DICE.randrange(10_000, 32_768)
        with socket.socket() as asking, contextlib.suppress(OSError):
            asking.bind(("0.0.0.0", port))
            return port
