"""A whole relay in the test's own process, between raw clients and scripted upstreams, with its log and queue to look into.

async with running(tmp_path, upstreams={"acme": to(server)}, routes=[…]) as relay:
    await relay.send("app@acme.example", ["you@example.org"], CONTENT)
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from relay.app import Relay
from relay.clock import SystemClock
from relay.config.model import Config
from relay.observe.journal import Journal
from relay.spool.base import LogEntry, Queued
from relay.spool.sqlite_view import SqliteView
from tests.support.client import Client, Reply
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream

CONTENT = b"From: App <app@acme.example>\r\nTo: you@example.org\r\nSubject: hi\r\n\r\nhello\r\n"
ROUTES: list[dict[str, Any]] = [
    {"name": "acme", "sender": "acme.example", "upstream": "acme"},
    {"name": "globex", "sender": "globex.example", "upstream": "globex"},
]
#: Quick, and yet so that nothing on a slow machine is tried twice before a test has looked at it.
RETRY = {"first": "50ms", "max": "100ms", "expire": "1h"}
TOLD = ("sent", "deferred", "failed")
SECRET = "not-to-be-seen-anywhere"


def to(server: ScriptedUpstream, **keys: Any) -> dict[str, Any]:
    """The configuration of an upstream that is `server`, in clear unless `keys` say otherwise."""
    timeouts = {"connect": "60s", "command": "60s", "data": "60s", "final": "60s"}
    return {"host": server.host, "port": server.port, "security": "none", "timeouts": timeouts, **keys}


class Running:
    """A relay that takes mail."""

    def __init__(self, directory: Path, journal: Journal, log: Path, address: str, stop: Callable[[], None]) -> None:
        self.stop = stop
        self._directory = directory
        self._journal = journal
        self._log = log
        host, _, port = address.rpartition(":")
        self.host, self.port = host, int(port)

    def client(self) -> Client:
        return Client(self.host, self.port)

    async def send(
        self, sender: str, recipients: Iterable[str], content: bytes = CONTENT, *, parameters: str = "", code: int = 250
    ) -> Reply:
        """One message by one session; the reply to its content, which must have `code`."""
        async with self.client() as client:
            await client.greet()
            reply = await client.deliver(sender, recipients, content, parameters=parameters, code=code)
            await client.quit()
            return reply

    def text(self) -> str:
        """Everything logged so far."""
        return self._log.read_text()

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names so far, or all of them."""
        lines = self.text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if not names or event["event"] in names]

    async def event(self, name: str, *, count: int = 1) -> list[dict[str, Any]]:
        """Wait for so many of them."""
        await eventually(lambda: len(self.events(name)) >= count, f"{count} event(s) {name}")
        return self.events(name)

    def queue(self) -> list[Queued]:
        view = SqliteView(self._directory, SystemClock())
        try:
            return list(view.queued())
        finally:
            view.close()

    def results(self) -> list[LogEntry]:
        """The delivery log."""
        view = SqliteView(self._directory, SystemClock())
        try:
            return list(view.log())
        finally:
            view.close()

    async def empty(self) -> None:
        """Wait until nothing is queued, and the log has told of every result: an outcome is stored first and told then."""
        await eventually(lambda: not self.queue(), "an empty queue")
        await eventually(lambda: self._told() == sum(entry.status in TOLD for entry in self.results()), "all results in the log")

    def _told(self) -> int:
        """How many results the log has: one for each recipient of an event."""
        results = [e for e in self.events(*TOLD) if e["status"] != "failed, nobody told"]
        return sum(len(event["recipients"].split(",")) for event in results)


@asynccontextmanager
async def running(
    directory: Path,
    *,
    upstreams: Mapping[str, Mapping[str, Any]],
    routes: Sequence[Mapping[str, Any]] = ROUTES,
    faults: bool = False,
    **more: Any,
) -> AsyncIterator[Running]:
    """Start a relay, and stop it as SIGTERM would. At its end no fault, unless `faults`, and no secret may be in the log."""
    spool, log = directory / "spool", directory / "relay.log"
    config = Config.model_validate(
        {
            "hostname": "relay.example.net",
            "listeners": [{"bind": "127.0.0.1:0", "name": "local"}],
            "upstreams": upstreams,
            "routes": list(routes),
            "retry": RETRY,
            "spool": {"directory": str(spool)},
            **more,
        }
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    journal = Journal(SystemClock(), format="json", level="debug", descriptor=descriptor)
    relay = Relay(config, journal)
    ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    service = asyncio.ensure_future(relay.serve(ready=ready.set_result))
    try:
        await asyncio.wait({service, ready}, return_when=asyncio.FIRST_COMPLETED)
        if service.done():
            service.result()
        built = Running(spool, journal, log, ready.result()[0], lambda: relay.stop("the test says so"))
        yield built
    except BaseException as error:
        error.add_note(f"-- {log} --\n{log.read_text()[-8000:]}")
        raise
    finally:
        relay.stop("the test is over")
        await service
        journal.close()
        os.close(descriptor)
    text = log.read_text()
    assert SECRET not in text
    assert faults or '"event": "fault"' not in text, text[-8000:]
