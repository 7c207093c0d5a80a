"""Try upstreams without mail: connect, TLS, login. So a dead credential is known before mail needs it.

Two reasons: `probe` in the configuration says how often, and an upstream that was verified with other settings is tested by the relay
itself, which keeps the mark on success. What a probe comes to is the breaker's to know, like an attempt's; an open one is respected.

State: when each upstream's turn comes, and the probes under way. Laws: never two of one upstream at a time, few at once in all, none
where mail has just opened a session or has all connections; a probe never keeps the process from stopping.
"""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from relay.clock import Clock
from relay.config.upstreams import Upstream
from relay.delivery.breaker import PROBE, Breakers
from relay.delivery.verified import Marks, Verified
from relay.mail.outcome import Outcome, Scope
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.upstream.rides import Busy

#: At once: each may take as long as a connection does to fail, and ten thousand upstreams an hour are three a second.
_AT_ONCE: Final = 8
#: After a start, every upstream with a `probe` is tried once within this time, or within its interval if that is shorter.
_BEGIN_SECONDS: Final = 600.0
#: Changed settings are tried again after this, then twice as long each time.
_AGAIN_SECONDS: Final = 60.0
_AGAIN_LONGEST_SECONDS: Final = 3600.0
#: Marks are looked at some at a time, for there may be ten thousand of them.
_MARKS_AT_ONCE: Final = 20
_MARKS_SECONDS: Final = 0.1


class Opener(Protocol):
    """The pool, as probes see it."""

    async def probe(self, name: str) -> Outcome | None:
        """Open a session and end it; None where that works. Raises Busy."""
        ...

    def settings(self, name: str) -> Upstream: ...
    def opened_at(self, name: str) -> float | None: ...


class Probes:
    """All probes of one relay. Made inside a running loop; opened once, then stopped and drained."""

    def __init__(
        self, upstreams: Mapping[str, Upstream], pool: Opener, journal: Journal, metrics: Metrics, clock: Clock, *, breakers: Breakers,
        verified: Verified, marks: Marks, revive: Callable[[str], None], rng: random.Random, watched: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """`watched`: upstreams that routes use only when they are verified. `revive` is told of one that works after a long time."""
        self._upstreams = upstreams
        self._pool = pool
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._breakers = breakers
        self._verified = verified
        self._marks = marks
        self._revive = revive
        self._rng = rng
        self._watched = frozenset(watched)
        self._unseen = deque(sorted(self._watched))
        self._queue: list[tuple[float, str]] = []
        self._turns: dict[str, float] = {}  # what the queue says beside it is outdated
        self._failures: dict[str, int] = {}
        self._urgent: set[str] = set()
        self._running: dict[asyncio.Task[None], str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def open(self) -> None:
        """Begin."""
        now = self._clock.monotonic()
        for name, upstream in self._upstreams.items():
            if upstream.probe is not None:
                self._schedule(name, now + self._rng.uniform(0.0, min(upstream.probe, _BEGIN_SECONDS)))
        self.look()

    def changed(self, name: str) -> None:
        """The settings of an upstream are others than those that were verified: test them soon."""
        if name not in self._urgent and not self._stopped:
            self._urgent.add(name)
            self._schedule(name, self._clock.monotonic())
            self._set_timer()

    def secret_changed(self, name: str) -> None:
        """The secret of an upstream is another one: what was known of the old one is no reason to wait."""
        self._urgent.discard(name)
        if self._upstreams[name].probe is not None:
            self.changed(name)
        elif name in self._watched:
            self._verified.is_changed(name)  # which tells `changed`

    def stop(self) -> None:
        """Begin no more probes, and cut off those under way: no mail hangs on them."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._running:
            task.cancel()

    async def drained(self) -> None:
        while self._running:
            await asyncio.wait(self._running)

    async def abort(self) -> None:
        """Nothing is left to cut off."""

    def look(self) -> None:
        """Begin what is due."""
        for _ in range(min(_MARKS_AT_ONCE, len(self._unseen))):
            self._verified.is_changed(self._unseen.popleft())  # which tells `changed`
        now = self._clock.monotonic()
        while self._queue and self._queue[0][0] <= now and len(self._running) < _AT_ONCE:
            when, name = heapq.heappop(self._queue)
            if self._turns.get(name) == when and name not in self._running.values():
                del self._turns[name]
                self._begin(name, now)
        self._set_timer()

    # -- one probe --------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, now: float) -> None:
        """Try it now, or find out when."""
        interval, opened = self._upstreams[name].probe, self._pool.opened_at(name)
        if name not in self._urgent and interval is not None and opened is not None and opened + interval > now:
            self._schedule(name, opened + self._jittered(interval))
        elif self._breakers.admit(name, PROBE) is not None:
            left = self._breakers.ready_at(name) - self._clock.now()
            self._schedule(name, now + max(1.0, left))
        else:
            task = asyncio.get_running_loop().create_task(self._probe(name), name=f"probe {name}")
            self._running[task] = name
            task.add_done_callback(self._ended)

    async def _probe(self, name: str) -> None:
        used = self._pool.settings(name)
        try:
            outcome = await self._pool.probe(name)
        except Busy:  # with mail, which tells as much
            self._breakers.record(name, PROBE, ())
            return
        except Exception as error:
            self._journal.fault(f"the probe of upstream {name}", error)
            self._breakers.record(name, PROBE, ())
            return
        if self._breakers.record_probe(name, outcome):
            self._revive(name)
        self._tell(name, outcome)
        self._failures[name] = self._failures.get(name, 0) + 1 if outcome is not None else 0
        if outcome is None and self._verified.is_changed(name):
            await self._keep_mark(name, used)

    async def _keep_mark(self, name: str, used: Upstream) -> None:
        """The new settings work as those that were verified did."""
        if self._pool.settings(name) is not used:  # they have changed during the probe: those in use are to be tested
            return
        try:
            await asyncio.to_thread(self._marks.record, name, used, now=self._clock.now())
        except OSError as error:
            self._journal.note("warning", f"upstream {name} works with its new settings, and stays unverified: {error}")
            return
        self._verified.forget(name)
        self._journal.note("info", f"upstream {name} works with its new settings, and stays verified")

    def _tell(self, name: str, outcome: Outcome | None) -> None:
        self._metrics.probed(upstream=name, works=outcome is None)
        if outcome is None:
            if self._failures.get(name):
                self._journal.note("info", f"the probe of upstream {name} succeeds again")
            return
        self._journal.note("warning", f"the probe of upstream {name} failed at {outcome.phase.value}: {outcome.reply}")
        if outcome.scope is Scope.CREDENTIAL:
            self._journal.auth_failed(upstream=name, user=self._upstreams[name].username or "", reply=str(outcome.reply))

    def _ended(self, task: asyncio.Task[None]) -> None:
        name = self._running.pop(task)
        if self._stopped:
            return
        now, interval, failures = self._clock.monotonic(), self._upstreams[name].probe, self._failures.get(name, 0)
        self._urgent.discard(name)
        again = min(_AGAIN_LONGEST_SECONDS, _AGAIN_SECONDS * 2.0 ** min(max(0, failures - 1), 10))
        if self._verified.is_changed(name):  # then it is urgent again, but not at once
            self._urgent.add(name)
            self._schedule(name, now + self._jittered(again))
        elif interval is not None:
            self._schedule(name, now + self._jittered(interval))
        self.look()

    # -- time -------------------------------------------------------------------------------------------------------------

    def _schedule(self, name: str, when: float) -> None:
        self._turns[name] = when
        heapq.heappush(self._queue, (when, name))

    def _jittered(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.9, 1.1)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waits = [_MARKS_SECONDS] if self._unseen else []
        if self._queue and len(self._running) < _AT_ONCE:
            waits.append(max(0.0, self._queue[0][0] - self._clock.monotonic()))
        if waits and not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(min(waits), self.look)
