"""When which waiting message is attempted: slots for each upstream, lanes in turn, no task for what only waits.

A message that can go at once comes here already claimed (`reserve`, `start`); all others wait in the spool, and are claimed lane by
lane when they are due, their upstream has a free slot, and its pace allows it.

State: slots in use by upstream, lanes known to have waiting mail and when, and the running attempts. Law 7: an upstream that hangs
uses up its own slots and nothing else; one that has nothing due, or may not be given what it has, costs nothing.
"""

import asyncio
import heapq
from collections.abc import Collection, Coroutine, Sequence
from functools import partial
from itertools import islice
from math import inf
from typing import Any

from relay.clock import Clock
from relay.config.model import Config
from relay.delivery.attempt import Attempts, Result, untried
from relay.delivery.breaker import Breakers
from relay.delivery.pace import Pace, Paces, Pacing
from relay.delivery.rounds import Rounds, Work
from relay.delivery.settle import Settler
from relay.delivery.slots import Slots, account
from relay.delivery.timeline import Timeline
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.spool.base import Claim, Lane, Next, Spool, SpoolError

#: The spool is asked this often for due mail that nobody told us of, and soon after a lane was found empty.
_REFRESH_SECONDS = 60.0
_REFRESH_SOON_SECONDS = 5.0

#: While the contents of all claims in memory together exceed this, nothing is claimed ahead of a free slot (law 8).
_MEMORY_LIMIT_BYTES = 64 * 1024 * 1024

#: Slots for lanes whose upstream is no longer configured: their mail is matched again or held, and touches no network.
_ORPHAN_SLOTS = 5

#: A client that waits for a verdict does so for a minute at most: no use where the pace allows nothing for longer.
_PATIENCE_SECONDS = 60.0

#: What was cut off is waited for so long, and then cut off again.
_CUT_SECONDS = 0.5

#: Timers may be early by so much.
_TICK_SECONDS = 0.001


class Scheduler:
    """Claims due mail and runs its attempts. Implements `intake.Dispatch`."""

    def __init__(
        self, config: Config, spool: Spool, attempts: Attempts, settler: Settler, journal: Journal, clock: Clock, *, breakers: Breakers,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self._spool = spool
        self._attempts = attempts
        self._settler = settler
        self._breakers = breakers
        self._journal = journal
        self._clock = clock
        self._upstreams = config.upstreams
        self._paces = Paces(config, journal, metrics, clock)
        self._slots: dict[str, Slots] = {}  # of upstreams that were given mail
        self._asking: dict[str, Slots] = {}  # the upstreams from whose lanes more can be claimed, as far as is known
        self._resting: list[tuple[float, str]] = []  # heap: when (monotonic) to look at upstreams whose pace allows nothing now
        self._timeline = Timeline()
        self._rounds = Rounds(config, spool, settler, breakers, clock, pace_of=self._pace_of, own=self._end)
        self._changed = asyncio.Event()
        self._refresh_at = 0.0  # monotonic seconds
        self._running: dict[asyncio.Task[None], Claim] = {}
        self._loop = asyncio.get_running_loop()
        self._revived: set[str] = set()  # upstreams whose mail was put off for long, and could go now
        self._put_off: dict[Lane, None] = {}  # the lanes of such mail
        self._octets = 0
        self._claiming = asyncio.Lock()
        self._stopping = False

    # -- for intake -------------------------------------------------------------------------------------------------------

    def reserve(self, lane: Lane) -> bool:
        slots = self._slots.get(lane.upstream) or self._slots_of(lane.upstream)
        if self._stopping or slots.ready or self._room(slots) <= 0:
            return False
        slots.promise(1)
        return True

    def release(self, lane: Lane) -> None:
        slots = self._slots_of(lane.upstream)
        slots.take_back(1)
        self._ask(slots)

    def start(self, claim: Claim, *, fresh: bool = True) -> None:
        """Take a promised claim: into a slot, or into the window until there is one. `fresh`: it has not been in the queue."""
        slots = self._slots[claim.lane.upstream]
        slots.promised -= 1
        self._octets += len(claim.content.octets or b"")
        if self._stopping:
            self._return(claim)
        elif slots.pace is not None and (slots.pace.owes or slots.pace.pause() > 0 or slots.used >= slots.limit):
            # Since it was promised, the upstream has asked us to slow down, or got more recipients than could be known.
            slots.pace.charge(-1, -1)
            self._return(claim)
        elif slots.used < slots.limit:
            self._begin(slots, claim, fresh=fresh)
        else:
            slots.window.append((claim, fresh))

    def wake(self, lane: Lane, when: float) -> None:
        if self._timeline.add(lane, when):
            self._changed.set()

    def paused(self, lane: Lane) -> bool:
        pace = self._slots_of(lane.upstream).pace
        return pace is not None and (pace.pause() > 0 or pace.wait() > _PATIENCE_SECONDS)

    # -- for operators, and for the pool ----------------------------------------------------------------------------------

    def give_up(self, claims: Sequence[Claim], reason: str) -> Collection[asyncio.Task[None]]:
        """End claimed messages as failed, each with its bounce; what is answered is done when that is stored. `reason` is for their
        senders."""
        return [self._end(claim, partial(self._settler.give_up, claim, reason)) for claim in claims]

    def try_now(self, upstream: str) -> None:
        """Somebody wants this upstream tried, though its breaker may be open."""
        self._breakers.reset(upstream)
        self._timeline.unpark(upstream)
        self._changed.set()
        if (slots := self._slots.get(upstream)) is not None and slots.pace is not None:
            slots.pace.resume()
            self._ask(slots)

    def secret_changed(self, upstream: str) -> None:
        """What waits because the old one was refused can go."""
        self._breakers.reset(upstream)
        self._timeline.unpark(upstream)
        self._revive(upstream)

    def backlog(self, upstream: str) -> int:
        """About how many messages wait for a slot of this upstream."""
        return slots.backlog if (slots := self._slots.get(upstream)) is not None else 0

    def attempting(self, message_id: str, upstreams: Collection[str]) -> bool:
        return any(claim.id == message_id and claim.lane.upstream in upstreams for claim in self._running.values())

    def pacings(self) -> list[Pacing]:
        """The paces that are kept at the moment, for people."""
        return self._paces.pacings()

    # -- the service ------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run until cancelled. Ends only with what must stop the process. Lasting trouble of the spool is told each time half as often."""
        failures = 0
        while True:
            self._changed.clear()
            try:
                await self._refresh()
                self._collect()
                await self._claim()
                await self._go_round()
                failures = 0
            except SpoolError as error:
                failures += 1
                if failures.bit_count() == 1:
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
        while self._running:
            for task in self._running:  # again, as `asyncio.wait_for` of Python 3.11 does not pass it on where it is just done
                task.cancel()
            await asyncio.wait(self._running, timeout=_CUT_SECONDS)

    async def _refresh(self) -> None:
        if self._clock.monotonic() < self._refresh_at:
            return
        self._refresh_at = self._clock.monotonic() + _REFRESH_SOON_SECONDS  # unless the spool answers
        held = [*self._running.values(), *(claim for slots in self._slots.values() for claim, _ in slots.window)]
        await self._spool.renew(held)  # before leases are looked at
        if self._put_off:
            await self._bring_forward()
            return
        waiting = await self._spool.next_due()
        for lane, when in waiting.items():
            self.wake(lane, when)
        if not self._paces.restored:  # until then nothing goes where there is a quota
            self._paces.restore(await self._spool.used())
            for slots in self._slots.values():
                self._ask(slots)
        self._put_off = dict.fromkeys(lane for lane in waiting if lane.upstream in self._revived)
        self._revived.clear()
        self._rounds.begin()
        self._refresh_at = self._clock.monotonic() + (0.0 if self._put_off else _REFRESH_SECONDS)

    async def _bring_forward(self) -> None:
        """Make mail due that was put off while its upstream did not work: a page of one lane, and then others' mail is claimed."""
        lane = next(iter(self._put_off))
        if await self._spool.hasten(lane):
            self.wake(lane, self._clock.now())
        else:
            del self._put_off[lane]
        self._refresh_at = 0.0
        self._changed.set()

    async def _go_round(self) -> None:
        """The next page of the rounds, if it is time for it."""
        if not self._stopping and self._rounds.at <= self._clock.monotonic():
            async with self._claiming:
                await self._rounds.go()

    def _pace_of(self, upstream: str) -> Pace | None:
        return slots.pace if (slots := self._slots.get(upstream)) is not None else None

    def _collect(self) -> None:
        """Move lanes that have become due into their upstream's turn."""
        for lane in self._timeline.due(self._clock.now()):
            slots = self._slots_of(lane.upstream)
            slots.ready.setdefault(lane)
            self._asking[lane.upstream] = slots
        monotonic = self._clock.monotonic()
        while self._resting and self._resting[0][0] <= monotonic:
            when, upstream = heapq.heappop(self._resting)
            slots = self._slots[upstream]
            if slots.looked_at == when:
                slots.looked_at = inf
                self._asking[upstream] = slots

    async def _claim(self) -> None:
        """Claim for every upstream that has room and ready lanes, each lane its share, all in one commit of the spool."""
        wanted: list[tuple[Lane, int]] = []
        asking, self._asking = self._asking, {}
        for slots in asking.values():
            room = self._room(slots)
            if self._stopping or not slots.ready:
                continue
            if room <= 0:
                self._rest(slots)
                continue
            if len(slots.window) > slots.limit:
                continue  # enough to go on with: claim many at once when fewer are left
            lanes = list(islice(slots.ready, room))
            for place, lane in enumerate(lanes):
                share = room // len(lanes) + (1 if place < room % len(lanes) else 0)
                slots.ready.move_to_end(lane)
                slots.promise(share)
                wanted.append((lane, share))
        async with self._claiming:
            results = await asyncio.gather(*(self._claim_lane(lane, share) for lane, share in wanted), return_exceptions=True)
        if (error := next((result for result in results if isinstance(result, BaseException)), None)) is not None:
            raise error  # only now: the claims beside it are admitted

    async def _claim_lane(self, lane: Lane, share: int) -> None:
        """Claim and start."""
        claims: Sequence[Claim] = ()
        slots = self._slots[lane.upstream]
        self._timeline.forget(lane)  # from here on a wake is news
        try:
            claims = await self._spool.claim(lane, share)
        finally:
            slots.take_back(share - len(claims))
            if len(claims) < share:
                slots.ready.pop(lane, None)
                self._refresh_at = min(self._refresh_at, self._clock.monotonic() + _REFRESH_SOON_SECONDS)
        for claim in claims:
            self.start(claim, fresh=False)
        self._ask(slots)

    def _slots_of(self, upstream: str) -> Slots:
        if (slots := self._slots.get(upstream)) is None:
            most = self._upstreams[upstream].limits.connections if upstream in self._upstreams else _ORPHAN_SLOTS
            slots = self._slots[upstream] = Slots(upstream, most, self._paces.of(upstream), self._attempts.riding)
        return slots

    def _room(self, slots: Slots) -> int:
        """How many more messages may be promised a slot. What an open breaker sends elsewhere needs no pace."""
        room = slots.room(ahead=self._octets < _MEMORY_LIMIT_BYTES)
        if slots.pace is None or room <= 0 or self._breakers.ready_at(slots.upstream):
            return room
        return min(room, slots.pace.room()) if self._paces.restored else 0

    def _ask(self, slots: Slots) -> None:
        """There may be room for mail that is due."""
        if slots.ready:
            self._asking[slots.upstream] = slots
            self._changed.set()

    def _rest(self, slots: Slots) -> None:
        """Look again when the pace allows it, or soon: wall time, which quotas go by, may leap. For a slot, the end of an attempt asks."""
        if slots.pace is None or not self._paces.restored or slots.room(ahead=False) <= 0:
            return
        when = self._clock.monotonic() + min(slots.pace.wait() + _TICK_SECONDS, _REFRESH_SECONDS)
        if when < slots.looked_at:
            slots.looked_at = when
            heapq.heappush(self._resting, (when, slots.upstream))

    def _pause(self) -> float:
        """Seconds until something is due by itself."""
        moments = [(self._refresh_at if self._stopping else min(self._refresh_at, self._rounds.at)) - self._clock.monotonic()]
        if (due := self._timeline.next()) is not None:
            moments.append(due - self._clock.now())
        if self._resting:
            moments.append(self._resting[0][0] - self._clock.monotonic())
        return max(0.0, min(moments))

    # -- attempts ---------------------------------------------------------------------------------------------------------

    def _begin(self, slots: Slots, claim: Claim, *, fresh: bool) -> None:
        slots.begin(len(claim.envelope.recipients), self._clock.monotonic())
        self._own(claim, self._attempt(claim, fresh=fresh))

    def _own(self, claim: Claim, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=f"attempt {claim.id}")
        self._running[task] = claim
        task.add_done_callback(self._ended)
        return task

    async def _attempt(self, claim: Claim, *, fresh: bool) -> None:
        lane = claim.lane
        slots = self._slots[lane.upstream]
        try:
            result = await self._attempts.send(claim, fresh=fresh)
            throttled = [outcome for outcome in result.outcomes.values() if outcome.throttled]
            if throttled or slots.pace is not None:  # before the next one takes the slot
                result = account(slots, claim, result, throttled, paces=self._paces, clock=self._clock)
        finally:
            self._leave(slots)
        if result.revived:
            self._revive(lane.upstream)
        if lane.upstream in self._timeline.parked and result.tried and not self._breakers.ready_at(lane.upstream):
            self._timeline.unpark(lane.upstream)
            self._changed.set()
        dues = await self._settler.settle(claim, result)
        if not result.tried and any(due.lane == lane for due in dues) and (ready := self._breakers.ready_at(lane.upstream)):
            self._timeline.park(lane, now=self._clock.now(), latest=ready)
            slots.ready.pop(lane, None)
        for due in dues:
            self.wake(due.lane, due.when)

    def _end(self, claim: Claim, work: Work) -> asyncio.Task[None]:
        """Have done what ends a claim that was not made for an attempt."""
        self._octets += len(claim.content.octets or b"")
        return self._own(claim, self._do(work))

    async def _do(self, work: Work) -> None:
        for due in await work():
            self.wake(due.lane, due.when)

    def _revive(self, upstream: str) -> None:
        self._revived.add(upstream)
        self._refresh_at = 0.0
        self._changed.set()

    def _return(self, claim: Claim) -> None:
        """End a claim whose attempt never began, and is not in doubt: back to where it was."""
        then = Next(self._clock.now(), claim.lane, counted=False)
        self._own(claim, self._do(partial(self._settler.settle, claim, Result(untried(claim), then))))

    def _leave(self, slots: Slots) -> None:
        """A slot is free: the next claim of the window takes it."""
        slots.used -= 1
        if slots.pace is not None:  # since it asked us to slow down: what was claimed ahead goes back
            while slots.window:
                self._return(slots.window.popleft()[0])
        elif slots.window and not self._stopping:
            claim, fresh = slots.window.popleft()
            self._begin(slots, claim, fresh=fresh)
        if slots.ready and len(slots.window) <= slots.limit:
            self._ask(slots)

    def _ended(self, task: asyncio.Task[None]) -> None:
        claim = self._running.pop(task)
        self._octets -= len(claim.content.octets or b"")
        if not task.cancelled() and (error := task.exception()) is not None:
            self._journal.fault("settling an attempt", error, id=claim.id)
