"""The composition root: build every room, start, drain, stop. The only module that knows everyone.

Start: spool, delivery, control socket, then listeners, so that nothing is taken before it can be kept. Stop: listeners and operators'
orders, then delivery, then the spool, within `shutdown_timeout`; what is not done by then stays in the spool.
"""

import asyncio
import gc
import itertools
import random
import signal
import time
from collections.abc import Callable, Sequence

import uvloop

from relay.admin.control import Control
from relay.admin.operator import Operator
from relay.clock import SystemClock
from relay.config.machine import CONTROL
from relay.config.model import Config
from relay.delivery.attempt import Attempts
from relay.delivery.breaker import Breakers
from relay.delivery.retry import delay_seconds
from relay.delivery.scheduler import Scheduler
from relay.delivery.settle import Settler
from relay.intake import Intake
from relay.listener.door import Door
from relay.observe.journal import Journal, capture_logging
from relay.observe.metrics import Metrics
from relay.routing import Router
from relay.spool.base import Lane, MessageId, SpoolDamaged, SpoolError
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_view import SqliteView
from relay.spool.wait import Waits
from relay.upstream.pool import Pool

EX_TEMPFAIL = 75
EX_CONFIG = 78  # the unit is not restarted after this one

#: After the timeout, what is left is cut off; this long may that take.
_ABORT_SECONDS = 2.0

# Collect garbage after this many new containers instead of 700: messages make many and hardly any cycles.
_COLLECT_AFTER = 20_000


class Relay:
    """One running relay."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        self._stop = asyncio.Event()
        self._reason = ""

    def stop(self, reason: str) -> None:
        """Drain and end `serve`."""
        self._reason = self._reason or reason
        self._stop.set()

    async def serve(self, *, ready: Callable[[list[str]], None] | None = None) -> None:
        """Run until `stop`. `ready` is told the addresses once mail is taken. Raises SpoolError or OSError when it cannot start."""
        config, journal, clock = self._config, self._journal, SystemClock()

        def backoff(attempts: int) -> float:
            return delay_seconds(config.retry, attempts)

        def quarantined(id: MessageId, lane: Lane, reason: str) -> None:
            journal.held(id=id, route=lane.route, upstream=lane.upstream, sender="", recipients="", reason=reason)

        spool = SqliteSpool(
            config.spool.directory, clock, backoff=backoff, keep_log_seconds=config.spool.keep_log, quarantined=quarantined,
            max_size_bytes=config.spool.max_size, min_free_bytes=config.spool.min_free,
        )  # fmt: skip
        router = Router(config)
        pool = Pool(config.upstreams, hostname=config.hostname, clock=clock, note=journal.note)
        metrics = Metrics()
        breakers = Breakers(config.retry, journal, metrics, clock)
        attempts = Attempts(config, router, pool, journal, clock, breakers=breakers)
        waits = Waits()
        settler = Settler(config, router, spool, journal, clock, rng=random.Random(), breakers=breakers, metrics=metrics, waits=waits)
        scheduler = Scheduler(config, spool, attempts, settler, journal, clock, breakers=breakers)
        pool.secret_changed = scheduler.secret_changed
        intake = Intake(config, router, spool, scheduler, journal, clock, waits=waits)
        directory = config.spool.directory
        operator = Operator(spool, scheduler, journal, view=lambda: SqliteView(directory, clock))
        control = Control(config.control, operator, journal, alias=directory / CONTROL)
        numbers = itertools.count(int(time.time() * 1000))
        doors = [
            Door(listener, intake, journal, hostname=config.hostname, new_session_id=lambda: f"S{next(numbers):X}")
            for listener in config.listeners
        ]
        try:
            async with asyncio.TaskGroup() as services:
                delivery = services.create_task(scheduler.serve(), name="scheduler")
                try:
                    await control.open()
                    await self._open(doors, ready)
                    await self._stop.wait()
                finally:
                    waits.stop()
                    await self._drain(doors, scheduler, control)
                    delivery.cancel()
        finally:
            control.close()
            operator.close()
            await pool.close()
            await spool.close()
            journal.stopped(reason=self._reason or "a service failed")

    async def _open(self, doors: list[Door], ready: Callable[[list[str]], None] | None) -> None:
        addresses = []
        for door in doors:
            address = await door.open()
            self._journal.listening(listener=door.settings.name, address=address)
            addresses.append(address)
        if ready is not None:
            ready(addresses)

    async def _drain(self, doors: list[Door], scheduler: Scheduler, control: Control) -> None:
        for door in doors:
            door.stop()
        control.stop()
        self._journal.draining(sessions=sum(door.sessions for door in doors), attempts=scheduler.stop())
        try:
            async with asyncio.timeout(self._config.shutdown_timeout):
                for door in doors:
                    await door.drained()
                await control.drained()
                await scheduler.drained()
        except TimeoutError:
            try:
                async with asyncio.timeout(_ABORT_SECONDS):
                    for door in doors:
                        await door.abort()
                    await control.abort()
                    await scheduler.abort()
            except TimeoutError:
                self._journal.note("error", "some work could not be cut off in time; it stays in the spool")


def run(config: Config, *, warnings: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or SIGINT. `warnings` go to the log first. Answers the exit code: 0, 75 when it could not
    start, 78 when it never will with this spool."""
    journal = Journal(SystemClock(), format=config.log.format, level=config.log.level)
    capture_logging(journal)
    for warning in warnings:
        journal.note("warning", warning)
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


async def _main(config: Config, journal: Journal) -> None:
    loop = asyncio.get_running_loop()
    journal.attach(loop)
    loop.set_exception_handler(lambda _, context: journal.fault(str(context.get("message")), context.get("exception")))
    relay = Relay(config, journal)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relay.stop, signal.Signals(number).name)
    # Its default would end the process without draining, and a unit's or a habit's "reload" must not cost a session.
    loop.add_signal_handler(signal.SIGHUP, journal.note, "warning", "SIGHUP: reloading is not available yet; restart to use a new file")
    await relay.serve()
