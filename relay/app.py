"""The composition root: build every room, start, drain, stop. The only module that knows everyone.

Start: spool, delivery, control socket, then listeners, so that nothing is taken before it can be kept. Stop: listeners and operators'
orders, then delivery, then the spool, within `shutdown_timeout`; what is not done by then stays in the spool.
"""

import asyncio
import gc
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import uvloop

from relay.admin.control import Control
from relay.admin.operator import Operator
from relay.clock import SystemClock
from relay.config.encryption import keys_at
from relay.config.machine import CONTROL
from relay.config.model import Config
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.probes import Probes
from relay.delivery.retry import delay_seconds
from relay.delivery.scheduler import Scheduler
from relay.delivery.settle import Settler
from relay.delivery.verified import Marks, Verified
from relay.intake import Intake
from relay.listener.budget import Budget
from relay.listener.credentials import Credentials
from relay.listener.door import Door
from relay.listener.drops import Drops, door_of
from relay.listener.sockets import NOTHING_INHERITED, Inherited
from relay.observe.journal import Journal, capture_logging
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Lane, MessageId, SpoolDamaged, SpoolError
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from relay.spool.wait import Waits
from relay.upstream.pool import Pool
from relay.upstream.token_store import TokenStore
from relay.upstream.watch import Watch

EX_TEMPFAIL = 75
EX_CONFIG = 78  # the unit is not restarted after this one

#: After the timeout, what is left is cut off; this long may that take.
_ABORT_SECONDS = 2.0

# Besides a file for each connection from apps: upstreams, the spool, content on its way in and out, the threads' pipes.
_OTHER_FILES = 500

# Collect garbage after this many new containers instead of 700: messages make many and hardly any cycles.
_COLLECT_AFTER = 20_000


class Relay:
    """One running relay."""

    def __init__(self, config: Config, journal: Journal, *, inherited: Inherited = NOTHING_INHERITED) -> None:
        """`inherited`: the sockets that systemd has handed over."""
        self._config = config
        self._inherited = inherited
        self._journal = journal
        self._stop = asyncio.Event()
        self._reason = ""
        self._watch: Watch | None = None
        self._read_all = False  # a reload came before there was a watch

    def reload(self, reason: str) -> None:
        """Read the secrets again: all of a reload that there is as yet."""
        self._journal.note("warning", f"{reason}: secrets are read again; the configuration file is not, restart to use a new one")
        if self._watch is not None:
            self._watch.read_all()
        self._read_all = self._watch is None

    def stop(self, reason: str) -> None:
        """Drain and end `serve`."""
        self._reason = self._reason or reason
        self._stop.set()

    async def serve(self, *, ready: Callable[[list[str]], None] | None = None) -> None:
        """Run until `stop`. `ready` is told the addresses once mail is taken. Raises SpoolError or OSError when it cannot start."""
        house = _build(self._config, self._journal)
        try:
            async with asyncio.TaskGroup() as services:
                delivery = services.create_task(house.scheduler.serve(), name="scheduler")
                try:
                    await house.control.open()
                    await self._open(house.doors, ready)
                    house.drops.open()
                    house.watch.open()
                    self._watch = house.watch
                    if self._read_all:
                        house.watch.read_all()
                    house.probes.open()
                    await self._stop.wait()
                finally:
                    house.waits.stop()
                    house.credentials.stop()
                    await self._drain(house)
                    delivery.cancel()
        finally:
            house.control.close()
            house.operator.close()
            house.credentials.close()
            await house.watch.close()
            await house.pool.close()
            await house.spool.close()
            failed = "a service failed" if self._watch is not None else "it could not start"
            self._journal.stopped(reason=self._reason or failed)

    async def _open(self, doors: list[Door], ready: Callable[[list[str]], None] | None) -> None:
        addresses = []
        for door in doors:
            address = await door.open(self._inherited)
            self._journal.listening(listener=door.settings.name, address=address)
            addresses.append(address)
        if self._inherited.names:
            self._journal.note("warning", f"systemd has handed over sockets that no listener takes: {', '.join(self._inherited.names)}")
        if ready is not None:
            ready(addresses)

    async def _drain(self, house: "_House") -> None:
        for door in house.doors:
            door.stop()
        house.control.stop()
        house.drops.stop()
        house.probes.stop()
        self._journal.draining(sessions=sum(door.sessions for door in house.doors), attempts=house.scheduler.stop())
        try:
            async with asyncio.timeout(self._config.shutdown_timeout):
                for room in house.busy:
                    await room.drained()
        except TimeoutError:
            try:
                async with asyncio.timeout(_ABORT_SECONDS):
                    for room in house.busy:
                        await room.abort()
            except TimeoutError:
                self._journal.note("error", "some work could not be cut off in time; it stays in the spool")


@dataclass(frozen=True, slots=True)
class _House:
    """The rooms that are started and stopped."""

    spool: SqliteSpool
    pool: Pool
    scheduler: Scheduler
    waits: Waits
    credentials: Credentials
    doors: list[Door]
    operator: Operator
    control: Control
    drops: Drops
    watch: Watch
    probes: Probes

    @property
    def busy(self) -> list["_Busy"]:
        """Those with work that may be under way, in the order in which it ends."""
        return [*self.doors, self.control, self.drops, self.probes, self.scheduler]


class _Busy(Protocol):
    async def drained(self) -> None: ...
    async def abort(self) -> None: ...


def _build(config: Config, journal: Journal) -> _House:
    """Every room, from the bottom up. Inside a running loop. Raises SpoolError."""
    clock, metrics, waits, directory = SystemClock(), Metrics(), Waits(), config.spool.directory
    spool = _open_spool(config, journal, clock)
    router = Router(config)
    store = TokenStore(directory, keys_at(config.secrets.key_file, os.environ), note=_from_thread(journal))
    pool = Pool(config.upstreams, hostname=config.hostname, clock=clock, note=journal.note, store=store)
    breakers = Breakers(config.retry, journal, metrics, clock)
    marks = Marks(directory)
    verified = Verified(marks, pool.settings, clock)
    attempts = Attempts(config, router, pool, journal, clock, breakers=breakers, verified=verified)
    settler = Settler(
        config, router, spool, journal, clock, rng=random.Random(), breakers=breakers, metrics=metrics, waits=waits, verified=verified
    )  # fmt: skip
    scheduler = Scheduler(config, spool, attempts, settler, journal, clock, breakers=breakers, metrics=metrics)
    probes = Probes(
        config.upstreams, pool, journal, metrics, clock, breakers=breakers, verified=verified, marks=marks, rng=random.Random(),
        revive=scheduler.secret_changed, watched={route.upstream for route in config.routes if route.verified_only and route.upstream},
    )  # fmt: skip
    verified.changed = probes.changed

    def secret_changed(name: str) -> None:
        scheduler.secret_changed(name)
        probes.secret_changed(name)

    pool.secret_changed = secret_changed
    pool.backlog = scheduler.backlog
    intake = Intake(config, router, spool, scheduler, journal, clock, waits=waits)
    credentials, budget, numbers = Credentials(config.users, clock), Budget(), itertools.count(int(time.time() * 1000))
    doors = [
        Door(
            listener, intake, journal, hostname=config.hostname, new_session_id=lambda: f"S{next(numbers):X}",
            metrics=metrics, budget=budget, credentials=credentials, directory=directory,
        )
        for listener in config.listeners
    ]  # fmt: skip

    def knows(message_id: MessageId) -> bool:
        with closing(SqliteView(directory, clock)) as view:
            return view.knows(message_id)

    operator = Operator(spool, scheduler, journal, view=lambda: SqliteView(directory, clock))
    control = Control(config.control, operator, journal, alias=directory / CONTROL)
    drops = Drops(directory, door_of(doors), journal, knows=knows)
    watch = Watch([*pool.uses(), *credentials.uses()], note=journal.note, fault=journal.fault)
    return _House(spool, pool, scheduler, waits, credentials, doors, operator, control, drops, watch, probes)


def _from_thread(journal: Journal) -> Callable[[str], None]:
    """What a thread may note something with."""
    loop = asyncio.get_running_loop()

    def note(what: str) -> None:
        loop.call_soon_threadsafe(journal.note, "info", what)

    return note


def _open_spool(config: Config, journal: Journal, clock: SystemClock) -> SqliteSpool:
    def backoff(attempts: int) -> float:
        return delay_seconds(config.retry, attempts)

    def quarantined(id: MessageId, lane: Lane, reason: str) -> None:
        journal.held(id=id, route=lane.route, upstream=lane.upstream, sender="", recipients="", reason=reason)

    return SqliteSpool(
        config.spool.directory, clock, backoff=backoff, keep_log_seconds=config.spool.keep_log, quarantined=quarantined,
        max_size_bytes=config.spool.max_size, min_free_bytes=config.spool.min_free,
    )  # fmt: skip


def run(config: Config, *, warnings: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or SIGINT. `warnings` go to the log first. Answers the exit code: 0, 75 when it could not
    start, 78 when it never will with this spool."""
    journal = Journal(SystemClock(), format=config.log.format, level=config.log.level)
    capture_logging(journal)
    for warning in warnings:
        journal.note("warning", warning)
    _allow_files(sum(listener.connections for listener in config.listeners) + _OTHER_FILES, journal)
    gc.freeze()  # what is loaded by now lives as long as the process; looking at it again costs milliseconds
    gc.set_threshold(_COLLECT_AFTER, 20, 20)
    code = 0
    try:
        uvloop.run(_main(config, journal))
    except* (SpoolError, OSError) as group:
        for error in group.exceptions:
            journal.note("error", f"cannot run: {error}")
        code = EX_CONFIG if any(isinstance(error, SpoolDamaged) for error in group.exceptions) else EX_TEMPFAIL
    finally:
        journal.close()
    return code


def _allow_files(wanted: int, journal: Journal) -> None:
    """Raise the soft limit of open files, 1024 on most machines, to what the listeners' `connections` may come to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        journal.note("warning", f"at most {allowed} files may be open, and the listeners' connections may need {wanted}: raise LimitNOFILE")


async def _main(config: Config, journal: Journal) -> None:
    loop = asyncio.get_running_loop()
    journal.attach(loop)
    loop.set_exception_handler(lambda _, context: journal.fault(str(context.get("message")), context.get("exception")))
    relay = Relay(config, journal, inherited=Inherited.from_environment(os.environ))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relay.stop, signal.Signals(number).name)
    loop.add_signal_handler(signal.SIGHUP, relay.reload, signal.SIGHUP.name)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # `relay serve` has kept those that came earlier
    await relay.serve(ready=lambda _: gc.freeze())  # as above: what ten thousand upstreams take
