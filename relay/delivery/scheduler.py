"""When which waiting message is attempted: slots for each upstream, lanes in turn, no task for what only waits.

A message that can go at once comes here already claimed (`reserve`, `start`); all others wait in the spool, and are claimed lane by
lane when they are due and their upstream has a free slot.

State: slots in use by upstream, lanes known to have waiting mail and when, and the running attempts. Law 7: an upstream that hangs
uses up its own slots and nothing else; one that has nothing due costs nothing.
"""

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from relay.clock import Clock
from relay.config.model import Config
from relay.delivery.attempt import Attempts, Result, untried
from relay.delivery.breaker import Breakers
from relay.delivery.settle import Settler
from relay.observe.journal import Journal
from relay.spool.base import Claim, Lane, Next, Selection, Spool, SpoolError

#: The spool is asked this often for due mail that nobody told us of, and soon after a lane was found empty.
_REFRESH_SECONDS = 60.0
_REFRESH_SOON_SECONDS = 5.0

#: Claims that wait in memory for a slot of their upstream, for each of its slots: read in one commit, not one by one.
_WINDOW_PER_SLOT = 3

#: While the contents of all claims in memory together exceed this, nothing is claimed ahead of a free slot (law 8).
_MEMORY_LIMIT_BYTES = 64 * 1024 * 1024

#: The timeline keeps times that may no longer be true until there are this many more of them than of lanes.
_HINTS_LIMIT = 1000

#: Held mail whose time is up is given up so many at once, each with its content in memory.
_OVERDUE_AT_ONCE = 100

#: Slots for lanes whose upstream is no longer configured: their mail is matched again or held, and touches no network.
_ORPHAN_SLOTS = 5


@dataclass(slots=True)
class _Slots:
    """One upstream's share. `used` slots are attempting, `promised` ones belong to messages that are being put or claimed.

    `window`: claims that wait for a slot. `ready`: lanes with due mail in the spool, in turn. `until`: the upstream asked us to slow
    down (monotonic seconds).
    """

    limit: int
    used: int = 0
    promised: int = 0
    window: deque[tuple[Claim, bool]] = field(default_factory=deque)
    ready: OrderedDict[Lane, None] = field(default_factory=OrderedDict)
    until: float = 0.0

    def room(self, *, ahead: bool) -> int:
        """How many more claims it can take; `ahead`: beyond its slots, into the window."""
        limit = self.limit * (1 + _WINDOW_PER_SLOT) if ahead else self.limit
        return limit - self.used - self.promised - len(self.window)


class Scheduler:
    """Claims due mail and runs its attempts. Implements `intake.Dispatch`."""

    def __init__(
        self, config: Config, spool: Spool, attempts: Attempts, settler: Settler, journal: Journal, clock: Clock, *, breakers: Breakers
    ) -> None:  # fmt: skip
        self._spool = spool
        self._attempts = attempts
        self._settler = settler
        self._breakers = breakers
        self._journal = journal
        self._clock = clock
        self._slots = {name: _Slots(upstream.limits.connections) for name, upstream in config.upstreams.items()}
        self._ready: dict[str, _Slots] = {}  # the upstreams with lanes in their turn
        self._due: dict[Lane, float] = {}  # the earliest known time for each lane that waits
        self._timeline: list[tuple[float, Lane]] = []  # heap; entries that differ from _due are hints, and may be wrong
        self._changed = asyncio.Event()
        self._refresh_at = 0.0  # monotonic seconds
        self._running: dict[asyncio.Task[None], Claim] = {}
        self._loop = asyncio.get_running_loop()
        self._throttle_seconds = config.retry.first
        self._revived: set[str] = set()  # upstreams whose mail was put off for long, and could go now
        self._octets = 0
        self._claiming = asyncio.Lock()
        self._stopping = False

    # -- for intake -------------------------------------------------------------------------------------------------------

    def reserve(self, lane: Lane) -> bool:
        slots = self._slots[lane.upstream]
        if self._stopping or slots.ready or slots.until > self._clock.monotonic() or slots.room(ahead=self._roomy) <= 0:
            return False
        slots.promised += 1
        return True

    def release(self, lane: Lane) -> None:
        slots = self._slots[lane.upstream]
        slots.promised -= 1
        if slots.ready:
            self._changed.set()

    def start(self, claim: Claim) -> None:
        self._admit(self._slots[claim.lane.upstream], claim, fresh=True)

    def wake(self, lane: Lane, when: float) -> None:
        if when < self._due.get(lane, float("inf")):
            self._due[lane] = when
            heapq.heappush(self._timeline, (when, lane))
            if len(self._timeline) > 2 * len(self._due) + _HINTS_LIMIT:
                self._timeline = [(due, known) for known, due in self._due.items()]
                heapq.heapify(self._timeline)
            self._changed.set()

    def paused(self, lane: Lane) -> bool:
        return self._slots[lane.upstream].until > self._clock.monotonic()

    # -- for operators, and for the pool ----------------------------------------------------------------------------------

    def give_up(self, claims: Sequence[Claim], reason: str) -> Collection[asyncio.Task[None]]:
        """End claimed messages as failed, each with its bounce; what is answered is done when that is stored. `reason` is for their
        senders; `""`: held until their time was up."""
        self._octets += sum(len(claim.content.octets or b"") for claim in claims)
        return [self._own(claim, self._end(claim, reason)) for claim in claims]

    def try_now(self, upstream: str) -> None:
        """Somebody wants this upstream tried, though its breaker may be open."""
        self._breakers.reset(upstream)

    def secret_changed(self, upstream: str) -> None:
        """What waits because the old one was refused can go."""
        self._breakers.reset(upstream)
        self._revive(upstream)

    def attempting(self, message_id: str, upstreams: Collection[str]) -> bool:
        return any(claim.id == message_id and claim.lane.upstream in upstreams for claim in self._running.values())

    # -- the service ------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run until cancelled. Ends only with what must stop the process."""
        while True:
            self._changed.clear()
            try:
                await self._refresh()
                self._collect()
                await self._claim()
            except SpoolError as error:
                self._journal.fault("looking for due mail", error)
            try:
                async with asyncio.timeout(self._pause()):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def stop(self) -> int:
        """Begin no more attempts, give back what waits for a slot; answers how many attempts are under way."""
        self._stopping = True
        under_way = len(self._running)
        for slots in self._slots.values():
            while slots.window:
                self._return(slots.window.popleft()[0])
        return under_way

    async def drained(self) -> None:
        """Wait until no claim is being made and no attempt is under way."""
        async with self._claiming:
            pass
        while self._running:
            await asyncio.wait(self._running)

    async def abort(self) -> None:
        """Cut off what is under way. It stays claimed in the spool: the next start takes it over as in doubt."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _refresh(self) -> None:
        if self._clock.monotonic() < self._refresh_at:
            return
        self._refresh_at = self._clock.monotonic() + _REFRESH_SOON_SECONDS  # unless the spool answers
        held = [*self._running.values(), *(claim for slots in self._slots.values() for claim, _ in slots.window)]
        await self._spool.renew(held)  # before leases are looked at
        waiting = await self._spool.next_due()
        for lane, when in waiting.items():
            self.wake(lane, when)
        await self._bring_forward(waiting)
        async with self._claiming:
            overdue = await self._spool.overdue(_OVERDUE_AT_ONCE) if not self._stopping else ()
            self.give_up(overdue, "")
        more = len(overdue) == _OVERDUE_AT_ONCE
        pause = 0.0 if self._revived else _REFRESH_SOON_SECONDS if more else _REFRESH_SECONDS
        self._refresh_at = self._clock.monotonic() + pause

    async def _bring_forward(self, waiting: Iterable[Lane]) -> None:
        """Make mail due that was put off while its upstream did not work: of one upstream, and then others' mail is claimed, for the spool
        looks through all of the queue."""
        self._revived.intersection_update(lane.upstream for lane in waiting)
        if self._revived:
            upstream = min(self._revived)
            self._wake_all(await self._spool.reschedule(Selection(upstream=upstream)))
            self._revived.discard(upstream)

    def _collect(self) -> None:
        """Move lanes that have become due into their upstream's turn."""
        now = self._clock.now()
        while self._timeline and self._timeline[0][0] <= now:
            _, lane = heapq.heappop(self._timeline)
            slots = self._slots_of(lane)
            slots.ready.setdefault(lane)
            self._ready[lane.upstream] = slots

    async def _claim(self) -> None:
        """Claim for every upstream that has room and ready lanes, each lane its share, all in one commit of the spool."""
        wanted: list[tuple[Lane, int]] = []
        for slots in self._ready.values():
            room = slots.room(ahead=self._roomy)
            if room <= 0 or self._stopping or slots.until > self._clock.monotonic():
                continue
            if len(slots.window) > slots.limit:
                continue  # enough to go on with: claim many at once when fewer are left
            lanes = list(islice(slots.ready, room))
            for place, lane in enumerate(lanes):
                share = room // len(lanes) + (1 if place < room % len(lanes) else 0)
                slots.ready.move_to_end(lane)
                slots.promised += share
                wanted.append((lane, share))
        async with self._claiming:
            results = await asyncio.gather(*(self._claim_lane(lane, share) for lane, share in wanted), return_exceptions=True)
        if (error := next((result for result in results if isinstance(result, BaseException)), None)) is not None:
            raise error  # only now: the claims beside it are admitted
        if any(results):
            self._changed.set()  # lanes that gave all they were asked for may have more

    async def _claim_lane(self, lane: Lane, share: int) -> bool:
        """Claim and start; answers whether the lane may have more that is due."""
        claims: Sequence[Claim] = ()
        slots = self._slots[lane.upstream]
        self._due.pop(lane, None)  # from here on a wake is news
        try:
            claims = await self._spool.claim(lane, share)
        finally:
            slots.promised -= share - len(claims)
            if len(claims) < share:
                del slots.ready[lane]
                if not slots.ready:
                    del self._ready[lane.upstream]
                self._refresh_at = min(self._refresh_at, self._clock.monotonic() + _REFRESH_SOON_SECONDS)
        for claim in claims:
            self._admit(slots, claim, fresh=False)
        return len(claims) == share

    @property
    def _roomy(self) -> bool:
        return self._octets < _MEMORY_LIMIT_BYTES

    def _slots_of(self, lane: Lane) -> _Slots:
        return self._slots.setdefault(lane.upstream, _Slots(_ORPHAN_SLOTS))

    def _pause(self) -> float:
        """Seconds until something is due by itself."""
        moments = [self._refresh_at - self._clock.monotonic()]
        if self._timeline:
            moments.append(self._timeline[0][0] - self._clock.now())
        moments += [s.until - self._clock.monotonic() for s in self._ready.values() if s.until > self._clock.monotonic()]
        return max(0.0, min(moments))

    # -- attempts ---------------------------------------------------------------------------------------------------------

    def _admit(self, slots: _Slots, claim: Claim, *, fresh: bool) -> None:
        """Take a promised claim: into a slot, or into the window until there is one."""
        slots.promised -= 1
        self._octets += len(claim.content.octets or b"")
        if self._stopping:
            self._return(claim)
        elif slots.used < slots.limit:
            self._begin(slots, claim, fresh=fresh)
        else:
            slots.window.append((claim, fresh))

    def _begin(self, slots: _Slots, claim: Claim, *, fresh: bool) -> None:
        slots.used += 1
        self._own(claim, self._attempt(claim, fresh=fresh))

    def _own(self, claim: Claim, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=f"attempt {claim.id}")
        self._running[task] = claim
        task.add_done_callback(self._ended)
        return task

    async def _attempt(self, claim: Claim, *, fresh: bool) -> None:
        slots = self._slots[claim.lane.upstream]
        try:
            result = await self._attempts.send(claim, fresh=fresh)
            if any(outcome.throttled for outcome in result.outcomes.values()):
                slots.until = self._clock.monotonic() + self._throttle_seconds  # before the next one takes the slot
        finally:
            self._leave(slots)
        if result.revived:
            self._revive(claim.lane.upstream)
        await self._settle(claim, result)

    async def _end(self, claim: Claim, reason: str) -> None:
        self._wake_all(await self._settler.give_up(claim, reason))

    def _revive(self, upstream: str) -> None:
        self._revived.add(upstream)
        self._refresh_at = 0.0
        self._changed.set()

    def _return(self, claim: Claim) -> None:
        self._own(claim, self._give_back(claim))

    async def _give_back(self, claim: Claim) -> None:
        """End a claim whose attempt never began: it is not in doubt."""
        await self._settle(claim, Result(untried(claim), Next(self._clock.now(), claim.lane, counted=False)))

    async def _settle(self, claim: Claim, result: Result) -> None:
        self._wake_all(await self._settler.settle(claim, result))

    def _wake_all(self, dues: Iterable[Next]) -> None:
        for due in dues:
            self.wake(due.lane, due.when)

    def _leave(self, slots: _Slots) -> None:
        """A slot is free: the next claim of the window takes it."""
        slots.used -= 1
        if slots.until > self._clock.monotonic():
            while slots.window:
                self._return(slots.window.popleft()[0])
        elif slots.window and not self._stopping:
            claim, fresh = slots.window.popleft()
            self._begin(slots, claim, fresh=fresh)
        if slots.ready and len(slots.window) <= slots.limit:
            self._changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        claim = self._running.pop(task)
        self._octets -= len(claim.content.octets or b"")
        if not task.cancelled() and (error := task.exception()) is not None:
            self._journal.fault("settling an attempt", error, id=claim.id)
