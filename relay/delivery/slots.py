"""One upstream's share of the attempts: its slots, what waits for them, and what they mean for its pace.

State: counts, the claims that wait for a slot, and the lanes with due mail. Decides nothing about when; that is the scheduler's.
"""

from collections import OrderedDict, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from math import inf

from relay.clock import Clock
from relay.delivery.attempt import Result
from relay.delivery.pace import Pace, Paces
from relay.mail.outcome import TRANSACTION, Outcome, Status
from relay.spool.base import Claim, Lane

#: Claims that wait in memory for a slot of their upstream, for each of its slots: read in one commit, not one by one.
_WINDOW_PER_SLOT = 3

#: Messages in the spool for which there is no room in memory count as so many for each slot.
_SPOOLED_PER_SLOT = 10

_MINUTE_SECONDS = 60.0


@dataclass(slots=True)
class Slots:
    """`used` slots are attempting, `promised` ones belong to messages that are being put or claimed, of at most `limit`.

    `most`: its connections in good times. `riding`: the upstreams where as many messages again may ride behind those under way.
    `pace`: None where there is none to keep. `window`: claims that wait for a slot. `ready`: lanes with due mail in the spool, in turn.
    `looked_at`: when the scheduler looks again by itself (monotonic seconds). The rest is what was begun in the present minute and in
    the one before.
    """

    upstream: str
    most: int
    pace: Pace | None = None
    riding: Container[str] = ()
    used: int = 0
    promised: int = 0
    window: deque[tuple[Claim, bool]] = field(default_factory=deque)
    ready: OrderedDict[Lane, None] = field(default_factory=OrderedDict)
    looked_at: float = inf
    _minute: float = 0.0
    _begun: int = 0
    _before: int = 0

    @property
    def limit(self) -> int:
        if self.pace is None or self.pace.slowed is None:
            return self.most * 2 if self.upstream in self.riding else self.most
        return int(self.pace.slowed.connections)

    def room(self, *, ahead: bool) -> int:
        """How many more claims it can take; `ahead`: beyond its slots, into the window, which needs no pace."""
        limit = self.limit
        if ahead and self.pace is None:
            limit += self.most * _WINDOW_PER_SLOT
        return limit - self.used - self.promised - len(self.window)

    @property
    def backlog(self) -> int:
        """About how many messages wait for a slot: of those in the spool it is not known how many are due, only that there are some."""
        return len(self.window) + (self.most * _SPOOLED_PER_SLOT if self.ready else 0)

    def promise(self, count: int) -> None:
        self.promised += count
        if self.pace is not None:
            self.pace.charge(count, count)

    def take_back(self, count: int) -> None:
        """What was promised is not needed."""
        self.promised -= count
        if self.pace is not None:
            self.pace.charge(-count, -count)

    def begin(self, recipients: int, now: float) -> None:
        """An attempt takes a slot."""
        self.used += 1
        if now - self._minute >= _MINUTE_SECONDS:
            self._before = self._begun if now - self._minute < 2 * _MINUTE_SECONDS else 0
            self._minute, self._begun = now, 0
        self._begun += 1
        if self.pace is not None:
            self.pace.charge(0, recipients - 1)

    def observed(self, now: float) -> float:
        """Attempts a second, over the last minute."""
        age = min(_MINUTE_SECONDS, now - self._minute)
        return (self._begun + self._before * (1 - age / _MINUTE_SECONDS)) / _MINUTE_SECONDS


def account(slots: Slots, claim: Claim, result: Result, throttled: Sequence[Outcome], *, paces: Paces, clock: Clock) -> Result:
    """What an attempt means for the pace of its upstream, which may be new or at its end; answers the result with what is to be stored
    of that. `throttled`: the outcomes that ask us to slow down."""
    upstream, recipients = slots.upstream, len(claim.envelope.recipients)
    if throttled:
        connections = min(slots.used, slots.most)  # the others ride
        slots.pace = paces.slow_down(upstream, throttled[0].reply, observed=slots.observed(clock.monotonic()), connections=connections)
    elif any(outcome.status is Status.SENT for outcome in result.outcomes.values()):
        slots.pace = paces.speed_up(upstream)
    if (pace := slots.pace) is None:
        return result
    resumes = clock.now() + pace.pause() if throttled else 0.0
    if result.moved is not None or not any(outcome.phase in TRANSACTION for outcome in result.outcomes.values()):
        # It was not tried, or no session could be opened.
        pace.charge(-1, -recipients)
        return result._replace(resumes=resumes)
    pace.charge(result.transactions - 1)
    return result._replace(used=pace.used(result.transactions, recipients), resumes=resumes)
