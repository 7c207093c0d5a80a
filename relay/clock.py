"""Time, behind one seam so that tests decide what time it is.

Wall time is seconds since the epoch (UTC, float): it is stored, compared across restarts and printed.
Durations inside one process are measured with `monotonic()`, which a stepped clock cannot bend.
"""

import time
from typing import Protocol


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
