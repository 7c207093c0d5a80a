"""Time, behind one seam so that tests decide what time it is.

Wall time is seconds since the epoch (UTC, float): it is stored, compared across restarts and printed.
Durations inside one process are measured with `monotonic()`, which a stepped clock cannot bend.
"""

import time
from typing import Protocol

_STEP_SECONDS = 60.0


class Clock(Protocol):
    """Where the relay gets the time from."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; its zero means nothing."""
        ...


class SystemClock:
    """The machine's own clocks."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class Steps:
    """Notices that somebody has set wall time: a machine that starts with the wrong one, a mistake and its repair."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._distance = clock.now() - clock.monotonic()

    def last(self) -> float:
        """By how many seconds it was set since this was last asked; 0 for less than a minute, which is added to the next."""
        distance = self._clock.now() - self._clock.monotonic()
        step = distance - self._distance
        if abs(step) < _STEP_SECONDS:
            return 0.0
        self._distance = distance
        return step


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._monotonic = 0.0

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._monotonic += seconds

    def step(self, seconds: float) -> None:
        """Set wall time, as an administrator or NTP does."""
        self._now += seconds
