"""The rounds: mail whose upstream may not be tried now, looked at page by page, the oldest first. What is too old ends, whose sender should
hear of the delay is told, and what can go home from a fallback does. And held mail whose time is up ends.

Nobody else comes there in time: behind an open breaker lanes are parked, and from those that wait for their pace nothing is claimed. Mail
that may be tried is left to that, however old it is.

State: how far this round has come, and what it has begun. Laws: one query for all lanes; a little at a time, and more when that is
stored, so that a hundred thousand that expire together take nobody else's turn; one whose end cannot be stored stops no other's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from math import inf

from relay.clock import Clock
from relay.config.model import Config
from relay.delivery.attempt import Result, for_everybody, untried
from relay.delivery.breaker import Breakers
from relay.delivery.pace import Pace
from relay.delivery.settle import Settler
from relay.spool.base import Claim, MessageId, Next, Spool, Waiting

#: So much is ended at once, each with its content in memory, and more so much later: six thousand a minute, for a tenth of what the loop
#: can do. Fifty at once were a tenth of a second in which other mail had to wait.
_AT_ONCE = 10
_PAUSE_SECONDS = 0.1

#: Where a pace lets the next one go so soon, what is too old has its turn, too: after a restart all of a queue may be.
_TURN_SECONDS = 10.0

#: Between pages on which there is nothing to do.
_STEP_SECONDS = 0.05

#: After an error of the spool.
_AGAIN_SECONDS = 5.0

#: Does something with a claim, and answers what is due then.
Work = Callable[[], Awaitable[Sequence[Next]]]


class Rounds:
    """Goes its rounds, a few steps each time it is asked to."""

    def __init__(
        self, config: Config, spool: Spool, settler: Settler, breakers: Breakers, clock: Clock, *, pace_of: Callable[[str], Pace | None],
        own: Callable[[Claim, Work], asyncio.Task[None]],
    ) -> None:  # fmt: skip
        """`pace_of`: the pace of an upstream that was given mail. `own`: runs the work with a claim as a task of its own."""
        self._spool = spool
        self._settler = settler
        self._breakers = breakers
        self._clock = clock
        self._pace_of = pace_of
        self._own = own
        retries = [config.retry, *(route.retry for route in config.routes if route.retry is not None)]
        self._youngest_seconds = min(min(retry.expire, retry.warn_after or inf) for retry in retries)
        self._after: str | None = None  # the id behind which the next page begins
        self._chosen: list[MessageId] = []  # what is to be claimed of this one
        self._holding = False  # there may be more held mail whose time is up
        self._returning: Collection[str] = ()
        self._begun: list[asyncio.Task[None]] = []
        self.at = inf  # when the next page is to be looked at (monotonic seconds)

    def begin(self) -> None:
        """Begin a round, unless one is under way."""
        if self.at == inf:
            self._after, self._holding, self._returning = "", True, tuple(self._settler.recovered)
            self.at = self._clock.monotonic()

    async def go(self) -> None:
        """Do some of it. Raises SpoolError."""
        self.at = self._clock.monotonic() + _AGAIN_SECONDS  # unless the spool answers
        self._begun = [task for task in self._begun if not task.done()]
        room = _AT_ONCE - len(self._begun)
        work = await (self._end_held(room) if self._holding else self._look(room)) if room else []
        self._begun += [self._own(claim, each) for claim, each in work]
        if work or not room:
            self.at = self._clock.monotonic() + _PAUSE_SECONDS
        elif self._chosen or self._after is not None:
            self.at = self._clock.monotonic() + _STEP_SECONDS
        else:
            self._settler.returned(self._returning)
            self.at = inf

    async def _end_held(self, room: int) -> list[tuple[Claim, Work]]:
        claims = await self._spool.overdue(room)
        self._holding = len(claims) == room
        return [(claim, partial(self._settler.give_up, claim, "")) for claim in claims]

    async def _look(self, room: int) -> list[tuple[Claim, Work]]:
        """Some of what is old; of all that waits, while there may be mail that can go home."""
        if not self._chosen and self._after is not None:
            youngest = self._clock.now() - (0.0 if self._returning else self._youngest_seconds)
            page, self._after = await self._spool.oldest(self._after, youngest)
            self._chosen = [waiting.id for waiting in page if self._concerns(waiting)]
        now = self._chosen[:room]
        claims = await self._spool.late(now) if now else ()
        del self._chosen[: len(now)]
        return [(claim, self._work(claim)) for claim in claims]

    def _concerns(self, waiting: Waiting) -> bool:
        upstream = waiting.lane.upstream
        pace = self._spent_pace(upstream)
        if pace is None and not self._breakers.ready_at(upstream):
            return False
        age, retry = self._clock.now() - waiting.created, self._settler.retry_of(waiting.lane)
        if (age >= retry.expire and _lasts(pace)) or (waiting.unwarned and retry.warn_after is not None and age >= retry.warn_after):
            return True
        return pace is not None and self._settler.home_of(waiting.lane) is not None

    def _work(self, claim: Claim) -> Work:
        """What becomes of a message by now. Behind an open breaker it fares as if it were tried, with its fallbacks."""
        lane, settler, now = claim.lane, self._settler, self._clock.now()
        if (objection := self._breakers.objection(lane.upstream)) is not None:
            return partial(settler.settle, claim, Result(for_everybody(claim, objection), tried=False))
        if (pace := self._spent_pace(lane.upstream)) is None:
            return partial(settler.keep, claim, "it may be tried now")
        if (home := settler.home_of(lane)) is not None and not any(r.in_doubt for r in claim.envelope.recipients):
            return partial(settler.settle, claim, Result(untried(claim), Next(now, home, counted=False)))
        reason = f"{lane.upstream} {pace.reason()}"
        if now >= claim.created + settler.retry_of(lane).expire and _lasts(pace):
            return partial(settler.give_up, claim, "", waited_for=reason)
        return partial(settler.keep, claim, reason)

    def _spent_pace(self, upstream: str) -> Pace | None:
        """The pace that lets nothing go to an upstream now."""
        pace = self._pace_of(upstream)
        return pace if pace is not None and pace.room() <= 0 else None


def _lasts(pace: Pace | None) -> bool:
    """Whether what has to wait, for this pace or for an open breaker, has to for a while."""
    return pace is None or pace.wait() > _TURN_SECONDS
