"""When lanes are due, earliest first.

State: the earliest known time of each lane that waits, a heap of times, some of which may no longer be true, and by their upstreams the
lanes that are parked: not due before a certain time, whatever is added, unless the clock is set back.
"""

import heapq
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

from relay.spool.base import Lane

#: Times that may no longer be true are kept until there are this many more of them than of lanes.
_HINTS_LIMIT = 1000

#: A lane is parked for so long, longer where there are many of them: to put off a hundred thousand messages at once, whenever the breaker
#: has let one try, was half of all the work.
_PARKED_SECONDS = 2.0
_PARKED_SECONDS_EACH = 0.5


class _Park(NamedTuple):
    since: float
    until: float


class Timeline:
    """Lanes by their times (seconds since the epoch). `parked`: by upstream, its lanes that are; for a look."""

    def __init__(self) -> None:
        self._due: dict[Lane, float] = {}
        self._heap: list[tuple[float, Lane]] = []
        self.parked: dict[str, dict[Lane, _Park]] = {}
        self._parked_count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, lane: Lane, when: float) -> bool:
        """Note a time; False where an earlier one is known."""
        if when >= self._due.get(lane, inf):
            return False
        self._due[lane] = when
        heapq.heappush(self._heap, (when, lane))
        if len(self._heap) > 2 * len(self._due) + _HINTS_LIMIT:
            self._heap = [(due, known) for known, due in self._due.items()]
            self._heap += [(park.until, known) for parked in self.parked.values() for known, park in parked.items()]
            heapq.heapify(self._heap)
        return True

    def forget(self, lane: Lane) -> None:
        """Whatever is added next is news."""
        self._due.pop(lane, None)

    def park(self, lane: Lane, *, now: float, latest: float) -> None:
        """An open breaker has put mail of this lane off, and so would the rest of it fare: look at it slowly until it may be tried at
        `latest`. A lane that is parked already comes when it would have."""
        parked = self.parked.setdefault(lane.upstream, {})
        if lane not in parked:
            until = min(latest, now + max(_PARKED_SECONDS, _PARKED_SECONDS_EACH * self._parked_count))
            parked[lane] = _Park(now, until)
            self._parked_count += 1
            heapq.heappush(self._heap, (until, lane))

    def unpark(self, upstream: str) -> None:
        """The lanes of this upstream are due at once."""
        lanes = self.parked.pop(upstream, {})
        self._parked_count -= len(lanes)
        for lane in lanes:
            heapq.heappush(self._heap, (0.0, lane))

    def due(self, now: float) -> Iterator[Lane]:
        """Take out the lanes that are due; one may come twice, or too early."""
        while self._heap and self._heap[0][0] <= now:
            _, lane = heapq.heappop(self._heap)
            if (parked := self.parked.get(lane.upstream)) is not None and (park := parked.get(lane)) is not None:
                if park.since <= now < park.until:
                    heapq.heappush(self._heap, (park.until, lane))
                    continue
                del parked[lane]
                self._parked_count -= 1
                if not parked:
                    del self.parked[lane.upstream]
            yield lane

    def next(self) -> float | None:
        """When the next is due; None: nothing waits."""
        return self._heap[0][0] if self._heap else None
