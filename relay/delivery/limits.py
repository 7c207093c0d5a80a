"""How much may go now, and how long until more may: the arithmetic of rates. It reads a clock and nothing else.

Two kinds. A `Spacing` keeps its distance, with a burst of one second's worth: rates a second and a minute (GCRA, one number of state).
A `Quota` lets all of it go at once and counts in slices of its window, each of which counts until its last moment has left the window:
rates an hour and a day. What is charged may exceed what was left: that is owed, and waited for.

Laws: in no window does more go than the rate says, but a Spacing's burst and what a single charge exceeds it by.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from math import floor

from relay.clock import Clock
from relay.config.quantities import Rate

#: A rate over a longer time than this is a quota.
_SPACED_SECONDS = 60

#: The more slices, the sooner what has left the window is free again, and the more there is to store.
_SLICES = 24


class Spacing:
    """At most `number` in `seconds`, evenly, in the time of a clock that never goes back."""

    __slots__ = ("_free_at", "_interval", "_slack", "_time")

    def __init__(self, number: float, seconds: float, time: Callable[[], float], *, empty_at: float) -> None:
        """`empty_at`: until then somebody may have used it up."""
        self._time = time
        self._interval = seconds / number
        self._slack = max(0.0, 1.0 - self._interval)
        self._free_at = empty_at + self._interval + self._slack  # when the next would go without any burst

    def room(self) -> int:
        now = self._time()
        return floor((now + self._slack - max(self._free_at, now)) / self._interval + 1.0 + 1e-9)

    def wait(self) -> float:
        return max(0.0, self._free_at - self._slack - self._time())

    def charge(self, count: int) -> None:
        """Note that so many go; a negative number gives back what did not go after all."""
        self._free_at = max(self._free_at, self._time()) + count * self._interval


class Quota:
    """At most `number` in any `seconds`, in the time of a clock that a restart does not reset and somebody may set."""

    __slots__ = ("_number", "_seconds", "_slices", "_time", "_used", "_width")

    def __init__(self, number: int, seconds: int, time: Callable[[], float]) -> None:
        self._time = time
        self._number = number
        self._seconds = seconds
        self._width = seconds // _SLICES
        self._slices: deque[list[int]] = deque()  # when each began, and its count
        self._used = 0

    def room(self) -> int:
        self._forget()
        return self._number - self._used

    def wait(self) -> float:
        self._forget()
        left, end, slices = self._used, 0.0, self._slices.copy()
        while left >= self._number:
            end = self._end(slices[0])
            left -= self._drop(slices)
        return max(0.0, end - self._time())

    def charge(self, count: int) -> None:
        """As of a Spacing."""
        self._forget()
        if count < 0:
            count = -min(-count, self._slices[-1][1]) if self._slices else 0
        elif not self._slices or self._slices[-1][0] < self.slice_start():
            self._slices.append([self.slice_start(), 0])
        if count:
            self._slices[-1][1] += count
            self._used += count

    def slice_start(self) -> int:
        """When the present slice began."""
        return int(self._time()) // self._width * self._width

    def restore(self, start: int, count: int) -> None:
        """What was charged in an earlier life; oldest first, and before anything else."""
        self._slices.append([start, count])
        self._used += count

    def _forget(self) -> None:
        """Let go of what has left the window. What one slice exceeds the number by is owed for another window."""
        now = self._time()
        slices = self._slices
        while slices and slices[-1][0] > now:  # the clock was set back
            _, count = slices.pop()
            if slices and slices[-1][0] > now:
                slices[-1][1] += count
            else:
                slices.append([self.slice_start(), count])
        while slices and self._end(slices[0]) <= now:
            self._used -= self._drop(slices)

    def _end(self, part: list[int]) -> int:
        """When all of a slice has left the window."""
        return part[0] + self._width + self._seconds

    def _drop(self, slices: deque[list[int]]) -> int:
        """Take the first slice away; answers how much of the quota that makes free."""
        start, count = slices.popleft()
        if count <= self._number:
            return count
        place = bisect_left(slices, [start + self._seconds])
        slices.insert(place, [start + self._seconds, count - self._number])
        return self._number


Limit = Spacing | Quota


def limit_of(rate: Rate, clock: Clock, *, empty_at: float) -> Limit:
    """`empty_at`: as of a Spacing."""
    if rate.seconds > _SPACED_SECONDS:
        return Quota(rate.number, rate.seconds, clock.now)
    return Spacing(rate.number, rate.seconds, clock.monotonic, empty_at=empty_at)


def is_quota(rate: Rate) -> bool:
    return rate.seconds > _SPACED_SECONDS
