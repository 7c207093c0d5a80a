"""When lanes are due, earliest first.

State: the earliest known time of each lane that waits, a heap of times, some of which may no longer be true, and the lanes that are
parked: not due before a certain time, whatever is added.
"""

import heapq
from collections.abc import Iterator
from math import inf

from relay.spool.base import Lane

#: Times that may no longer be true are kept until there are this many more of them than of lanes.
_HINTS_LIMIT = 1000

#: A lane is parked for so long, longer where there are many of them: to put off a hundred thousand messages at once, whenever the breaker
#: has let one try, was half of all the work.
_PARKED_SECONDS = 2.0
_PARKED_SECONDS_EACH = 0.5


class Timeline:
    """Lanes by their times (seconds since the epoch)."""

    def __init__(self) -> None:
        self._due: dict[Lane, float] = {}
        self._heap: list[tuple[float, Lane]] = []
        self._parked: dict[Lane, float] = {}

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
            heapq.heapify(self._heap)
        return True

    def forget(self, lane: Lane) -> None:
        """Whatever is added next is news."""
        self._due.pop(lane, None)

    def park(self, lane: Lane, *, now: float, latest: float) -> None:
        """An open breaker has put mail of this lane off, and so would the rest of it fare: look at it slowly until it may be tried at
        `latest`. A lane that is parked already comes when it would have."""
        if lane not in self._parked:
            until = min(latest, now + max(_PARKED_SECONDS, _PARKED_SECONDS_EACH * len(self._parked)))
            self._parked[lane] = until
            heapq.heappush(self._heap, (until, lane))

    def unpark(self, upstream: str) -> None:
        """The lanes of this upstream are due at once."""
        for lane in [lane for lane in self._parked if lane.upstream == upstream]:
            del self._parked[lane]
            heapq.heappush(self._heap, (0.0, lane))

    @property
    def parked(self) -> int:
        """How many lanes are."""
        return len(self._parked)

    def due(self, now: float) -> Iterator[Lane]:
        """Take out the lanes that are due; one may come twice, or too early."""
        while self._heap and self._heap[0][0] <= now:
            _, lane = heapq.heappop(self._heap)
            if (until := self._parked.get(lane, 0.0)) > now:
                heapq.heappush(self._heap, (until, lane))
                continue
            self._parked.pop(lane, None)
            yield lane

    def next(self) -> float | None:
        """When the next is due; None: nothing waits."""
        return self._heap[0][0] if self._heap else None
