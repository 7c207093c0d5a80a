"""A pool with real sockets to scripted upstreams: what the tests of the upstream room share."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from relay.clock import ManualClock
from relay.config.upstreams import Upstream
from relay.mail.envelope import Recipient
from relay.mail.outcome import Outcome, Status
from relay.upstream.pool import Pool
from relay.upstream.transaction import Outgoing
from tests.support.certificates import Authority
from tests.support.eventually import eventually
from tests.support.upstream import Hold, ScriptedUpstream

SENDER, RECIPIENT = "app@acme.example", "you@example.org"
CONTENT = b"Subject: hi\r\n\r\nhello\r\n"

#: For tests in which nothing shall wait: a slow machine must not turn success into a timeout.
PATIENT = {"connect": "60s", "command": "60s", "data": "60s", "final": "60s"}


def settings(server: ScriptedUpstream, **keys: Any) -> Upstream:
    """The configuration of an upstream that is `server`, in clear unless `keys` say otherwise."""
    return Upstream.model_validate({"host": server.host, "port": server.port, "security": "none", "timeouts": PATIENT, **keys})


def secured(server: ScriptedUpstream, authority: Authority, security: str = "starttls", **keys: Any) -> Upstream:
    """The same with TLS that trusts the tests' CA."""
    return settings(server, **{"security": security, "ca_file": str(authority.ca_file), **keys})


def outgoing(*recipients: str, octets: bytes = CONTENT, sender: str = SENDER, **facts: Any) -> Outgoing:
    facts.setdefault("size", len(octets))
    return Outgoing(sender, [Recipient(address) for address in recipients or [RECIPIENT]], octets, **facts)


def sliced(*slices: bytes) -> Callable[[], AsyncGenerator[bytes, None]]:
    """The rest of a message in exactly these slices."""

    async def rest() -> AsyncGenerator[bytes, None]:
        for octets in slices:
            yield octets

    return rest


@asynccontextmanager
async def pool_to(**upstreams: Upstream) -> AsyncIterator[Pool]:
    pool = Pool(upstreams, hostname="relay.example.net", clock=ManualClock())
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def raw_server(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[Upstream]:
    """The configuration of an upstream that is a function, for what the scripted one is too well-behaved to do."""
    running: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running[task] = writer
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield Upstream.model_validate({"host": "127.0.0.1", "port": port, "security": "none", "timeouts": PATIENT})
    except BaseException:
        for task in running:  # it may wait for what the test has not come to
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise
    finally:
        server.close()
        for writer in running.values():
            writer.transport.abort()
    await asyncio.gather(*running)


async def open_sessions(pool: Pool, server: ScriptedUpstream, count: int, name: str = "acme") -> None:
    """Have so many messages under way at once that so many sessions are open, and idle afterwards."""
    hold, before = asyncio.Event(), len(server.transactions)
    server.script("final", Hold(hold), times=count)
    messages = [asyncio.ensure_future(pool.send(name, outgoing())) for _ in range(count)]
    await eventually(lambda: sum(each.complete for each in server.transactions[before:]) == count, "all to be under way")
    hold.set()
    assert all(map(all_sent, await asyncio.gather(*messages)))


def words(outcomes: Sequence[Outcome]) -> list[str]:
    """Outcomes in short: status, scope, phase and flags."""
    return [
        " ".join(
            [o.status.value, o.scope.value, o.phase.value]
            + [flag for flag in ("in_doubt", "throttled", "fallback") if getattr(o, flag)]
        )
        for o in outcomes
    ]  # fmt: skip


def all_sent(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and all(outcome.status is Status.SENT for outcome in outcomes)
