"""Between the relay and its upstreams, connections are delayed, stalled, cut and corrupted at random: and every recipient is accounted for.

The real `relay serve` sends for some seconds (`make chaos`: ten minutes) through proxies, to upstreams in clear, with STARTTLS and
with TLS, and to Postfix where that is installed. It is stopped and started on the way. What was acknowledged has been
delivered, is in a report, or is queued; in the end nothing is queued, and what came twice came over a connection that was struck.
The seed is printed; RELAY_TEST_SEED repeats its choices, though not the timing.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from relay.clock import SystemClock
from relay.spool.sqlite_view import SqliteView
from tests.crash.test_kill import seeded
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream
from tests.system.proxy import Chaos
from tests.system.receivers import NOBODY, PASSWORD, USER, Postfix, Submission

SECONDS = float(os.environ.get("RELAY_CHAOS", "12"))
SESSIONS = 4
#: As many as may be under way: what is not delivered waits in the queue, and its end would be far behind the chaos's.
UNDER_WAY = 150
_ID = re.compile(rb"^X-Id: (\S+)\r?$", re.MULTILINE)
_FAILED = re.compile(rb"^Final-Recipient: rfc822;\s*(\S+?)\r?$", re.MULTILINE | re.IGNORECASE)

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
{upstreams}
routes:
{routes}
retry: {{first: 200ms, max: 1s, expire: 1h}}
spool: {{directory: {directory}}}
shutdown_timeout: 10s
log: {{format: json}}
"""
UPSTREAM = (
    "  {name}: {{host: localhost, port: {port}, security: {security}, {login}\n"
    "    limits: {{connections: 5, messages_per_connection: 20}},\n"
    "    timeouts: {{connect: 5s, command: 5s, data: 5s, final: 5s}}}}"
)

Fate = tuple[str, str]  # the message's id, and the recipient


@dataclass(slots=True)
class Account:
    """Who was promised what, and what became of it. `copies`: the connections over which each came, 0 where that is not known."""

    acknowledged: set[Fate] = field(default_factory=set)
    offered: set[Fate] = field(default_factory=set)
    bodies: dict[str, int] = field(default_factory=dict)
    copies: defaultdict[tuple[str, Fate], list[int]] = field(default_factory=lambda: defaultdict(list))
    reported: set[Fate] = field(default_factory=set)

    @property
    def under_way(self) -> int:
        """How many acknowledged recipients have not come yet; those that come before they are acknowledged do not matter."""
        return len(self.acknowledged) - len(self.copies) - len(self.reported)

    @property
    def delivered(self) -> set[Fate]:
        return {fate for _, fate in self.copies}

    def take(self, upstream: str, sender: str, recipients: Sequence[str], content: bytes, connection: int) -> None:
        """A message that an upstream has."""
        found = _ID.search(content)
        assert found, content[:1000]
        name = found[1].decode()
        if not sender:
            self.reported |= {(name, address.decode()) for address in _FAILED.findall(content)}
            return
        body = content.replace(b"\r\n", b"\n").partition(b"\n\n")[2]
        assert body == body_of(name, self.bodies[name]).replace(b"\r\n", b"\n"), f"{name} is not what was sent"
        for recipient in recipients:
            self.copies[upstream, (name, recipient)].append(connection)


def body_of(name: str, lines: int) -> bytes:
    return b"".join(b".%b %070d\r\n" % (name.encode(), number) for number in range(lines)) + b"Gr\xc3\xbc\xc3\x9fe\r\n"


class Source:
    """Applications that send to all upstreams by turns, as fast as mail goes on. `restarting`: for now no session has to last."""

    def __init__(self, account: Account, upstreams: list[str], rng: random.Random) -> None:
        self.restarting = False
        self._account = account
        self._upstreams = upstreams
        self._rng = rng
        self._numbers = itertools.count(1)
        self._over = False

    def end(self) -> None:
        self._over = True

    async def send(self, relay: RelayProcess) -> None:
        """One session, and the next when the relay has closed it to be started again."""
        while not self._over:
            try:
                async with Client(*relay.address(), deadline=20) as client:
                    await client.greet()
                    while not self._over:
                        await self._message(client)
                    await client.quit()
            except (OSError, AssertionError, LookupError):
                if not self.restarting:
                    raise
            await eventually(lambda: not self.restarting, "the relay to run again", within=60)

    async def _message(self, client: Client) -> None:
        account, number = self._account, next(self._numbers)
        await eventually(lambda: self._over or account.under_way < UNDER_WAY, "mail to go on", within=60)
        name, upstream = f"m{number}", self._upstreams[number % len(self._upstreams)]
        recipients = [f"{name}@example.org"]
        if number % 7 == 0:
            recipients.append(f"{name}-too@example.org")
        if number % 11 == 0:
            recipients.append(NOBODY)
        account.bodies[name] = self._rng.choices([1, 20, 300, 4000], weights=[60, 30, 8, 2])[0]
        account.offered |= {(name, recipient) for recipient in recipients}
        content = b"From: app@%b.example\r\nX-Id: %b\r\n\r\n%b" % (upstream.encode(), name.encode(), body_of(name, account.bodies[name]))
        await client.deliver(f"app@{upstream}.example", recipients, content)
        account.acknowledged |= {(name, recipient) for recipient in recipients}


class Books:
    """Reads what the upstreams have, again and again, into the account."""

    def __init__(self, account: Account, servers: dict[str, ScriptedUpstream | Postfix]) -> None:
        self._account = account
        self._servers = servers
        self._read: dict[str, int] = dict.fromkeys(servers, 0)
        self._open: dict[str, list[int]] = {name: [] for name in servers}

    def read(self) -> None:
        for name, server in self._servers.items():
            if isinstance(server, Postfix):
                for kept in server.unseen():
                    self._account.take(name, kept.sender, kept.recipients, kept.content, 0)
            else:
                self._scripted(name, server)

    def _scripted(self, name: str, server: ScriptedUpstream) -> None:
        new = [*self._open[name], *range(self._read[name], len(server.transactions))]
        self._read[name], self._open[name] = len(server.transactions), []
        for place in new:
            transaction = server.transactions[place]
            if transaction.accepted:
                self._account.take(name, transaction.sender, transaction.recipients, transaction.content, transaction.connection)
                transaction.content = b""  # ten minutes of them are too much to keep
            elif not server.connections[transaction.connection - 1].closed:
                self._open[name].append(place)


@contextlib.asynccontextmanager
async def upstreams_and_proxies(
    rng: random.Random, tls: Authority
) -> AsyncIterator[tuple[dict[str, ScriptedUpstream | Postfix], dict[str, Chaos]]]:
    """The upstreams by name, and the proxies before them."""
    offers, users = ("CHUNKING",), {USER: PASSWORD}
    servers: dict[str, ScriptedUpstream | Postfix] = {
        "clear": ScriptedUpstream(offers=offers),
        "starttls": ScriptedUpstream(security="starttls", users=users, tls=tls.server),
        "tls": ScriptedUpstream(security="tls", users=users, tls=tls.server, offers=offers),
    }
    program = shutil.which("postfix") if os.geteuid() == 0 else None
    assert program or not os.environ.get("CI"), "postfix is not installed"
    if program:
        servers["postfix"] = Postfix(program, chunking=True, submission=Submission(tls.files()))
    async with contextlib.AsyncExitStack() as stack:
        proxies: dict[str, Chaos] = {}
        for name, server in servers.items():
            await stack.enter_async_context(server)
            if isinstance(server, ScriptedUpstream):
                server.script("rcpt", b"550 5.1.1 No such user", recipient=NOBODY)
            port = server.starttls_port if isinstance(server, Postfix) else server.port
            proxies[name] = await stack.enter_async_context(Chaos(server.host, port, random.Random(rng.random()), clear=name == "clear"))
        yield servers, proxies


def configuration(directory: Path, proxies: dict[str, Chaos], tls: Authority) -> str:
    upstreams = []
    for name, proxy in proxies.items():
        security = {"clear": "none", "postfix": "starttls"}.get(name, name)
        login = "" if name == "clear" else f"username: {USER}, password: '{PASSWORD}', ca_file: {tls.ca_file},"
        upstreams.append(UPSTREAM.format(name=name, port=proxy.port, security=security, login=login))
    routes = "\n".join(f"  - {{sender: {name}.example, upstream: {name}}}" for name in proxies)
    return CONFIG.format(upstreams="\n".join(upstreams), routes=routes, directory=directory / "spool")


def waiting_in(directory: Path) -> set[Fate]:
    """Who is still queued, by recipient and by nothing else: every one but NOBODY is of one message alone."""
    view = SqliteView(directory / "spool", SystemClock())
    try:
        queued = [(message.sender, recipient) for message in view.queued() for recipient in message.recipients]
    finally:
        view.close()
    return {(recipient.partition("@")[0].partition("-")[0] if sender else "report", recipient) for sender, recipient in queued}


def report(account: Account, proxies: dict[str, Chaos], relay: RelayProcess) -> None:
    fates = sum((proxy.fates for proxy in proxies.values()), Counter[str]())
    twice = sum(len(connections) - 1 for connections in account.copies.values())
    doubtful = len({event["id"] for event in relay.events("deferred") if event.get("in_doubt")})
    print(f"chaos for {SECONDS:g} s: {sum(fates.values())} connections, of which " + ", ".join(f"{n} {fate}" for fate, n in fates.items()))
    print(
        f"{len(account.acknowledged)} recipients acknowledged: {len(account.delivered)} delivered, {len(account.reported)} reported; "
        f"{twice} came again, {doubtful} messages were deferred in doubt"
    )


@pytest.mark.timeout(SECONDS * 2 + 240)
async def test_every_recipient_is_accounted_for_whatever_becomes_of_connections(tmp_path: Path, tls: Authority) -> None:
    rng = seeded("chaos")
    account = Account()
    async with upstreams_and_proxies(rng, tls) as (servers, proxies):
        books = Books(account, servers)
        async with (
            RelayProcess(configuration(tmp_path, proxies, tls), directory=tmp_path) as relay,
            sending(Source(account, list(proxies), rng), relay) as (source, sessions),
        ):
            for _ in range(2):
                await go_on(SECONDS / 2, sessions, books)
                source.restarting = True
                assert await relay.terminate() == 0
                books.read()
                missing = account.acknowledged - account.delivered - account.reported - waiting_in(tmp_path)
                assert {fate for fate in missing if fate[1] != NOBODY} == set(), "neither delivered nor reported nor queued"
                await relay.start()
                source.restarting = False
            source.end()
            await asyncio.gather(*sessions)
            for proxy in proxies.values():
                proxy.heal()
            await eventually(lambda: not waiting_in(tmp_path), "an empty queue", within=60)
            assert await relay.terminate() == 0
        books.read()
    report(account, proxies, relay)
    check(account, proxies)
    assert [event for event in relay.events() if event.get("level") == "error"] == []


@contextlib.asynccontextmanager
async def sending(source: Source, relay: RelayProcess) -> AsyncIterator[tuple[Source, list[asyncio.Task[None]]]]:
    """Sessions that send until the source ends, or the test does."""
    sessions = [asyncio.create_task(source.send(relay), name=f"source {number}") for number in range(SESSIONS)]
    try:
        yield source, sessions
    finally:
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)


async def go_on(seconds: float, sessions: list[asyncio.Task[None]], books: Books) -> None:
    """Let them send for so long; their errors are the test's."""
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        done, _ = await asyncio.wait(sessions, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        for session in done:
            session.result()
        books.read()


def check(account: Account, proxies: dict[str, Chaos]) -> None:
    """Every recipient is accounted for."""
    assert account.acknowledged <= account.delivered | account.reported
    assert account.delivered | account.reported <= account.offered
    assert {fate for fate in account.reported if fate[1] != NOBODY} == set(), "nobody is refused but one"
    assert {fate for fate in account.delivered if fate[1] == NOBODY} == set()
    assert any(proxy.harmed for proxy in proxies.values()), "there was no chaos"
    again = {key: connections for key, connections in account.copies.items() if len(connections) > 1}
    for (name, fate), connections in again.items():
        if name != "postfix":  # which does not say by which connection a message came
            well = [connection for connection in connections if connection not in proxies[name].harmed]
            assert len(well) <= 1, f"{fate} came twice to {name}, and connections {well} of {connections} were well"
    if "postfix" in proxies:
        copies = sum(len(connections) - 1 for (name, _), connections in again.items() if name == "postfix")
        assert copies <= len(proxies["postfix"].harmed), "one message at most is under way on a connection"
