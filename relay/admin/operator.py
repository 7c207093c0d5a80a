"""The operator's verbs: what a person does to queued mail by hand, whichever way the order came.

An order is carried out a page at a time: read what is queued, have the spool do it, wake delivery, tell what came of each message. So
an order about a hundred thousand messages holds up neither mail nor another order, and can end between any two pages.

State: none but the thread that reads. Laws: an order is about what was queued when it was given, not about mail that came later, nor
about the bounces that it makes itself; what is told as changed is durable.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import Final, NamedTuple, Protocol

from relay.observe.journal import Journal
from relay.spool.base import EVERYTHING, Claim, Lane, MessageId, Next, Queued, Selection, Spool

#: Messages of one commit: a hundredth of a second's work for the spool, between which mail goes on.
PAGE_MESSAGES: Final = 500
#: Those that are given up come into memory, each with up to 256 KiB of content.
_PAGE_CLAIMS: Final = 50


class Verb(Enum):
    RETRY = "retry"
    HOLD = "hold"
    RELEASE = "release"
    DROP = "drop"
    BOUNCE = "bounce"


@dataclass(frozen=True, slots=True)
class Order:
    """What shall be done to which messages, and why. `by`: who says so, for the log."""

    verb: Verb
    selection: Selection
    reason: str = ""
    by: str = "the operator"


class Progress(NamedTuple):
    """What came of an order for some of its messages: those that it changed, and why not for the others."""

    changed: Sequence[MessageId]
    skipped: Mapping[str, str]


class View(Protocol):
    """The queue as it can be read beside the spool; used by one thread."""

    def queued(self, selection: Selection = ...) -> Iterator[Queued]: ...
    def close(self) -> None: ...


class Delivery(Protocol):
    """Delivery, as the operator's orders see it."""

    def wake(self, lane: Lane, when: float) -> None:
        """Mail waits in `lane`, due at `when`."""
        ...

    def give_up(self, claims: Sequence[Claim], reason: str) -> Collection[asyncio.Task[None]]:
        """End these claims as failed for this reason, each with its bounce; what is answered is done when that is stored."""
        ...

    def try_now(self, upstream: str) -> None:
        """Somebody wants this upstream tried, though it may have failed for long."""
        ...


_DONE: Final = {
    Verb.RETRY: "due now",
    Verb.HOLD: "held",
    Verb.RELEASE: "released",
    Verb.DROP: "dropped",
    Verb.BOUNCE: "given up",
}
_ACTIVE: Final = "being attempted"
#: Why a verb leaves a message of this state alone.
_OBJECTIONS: Final[Mapping[tuple[Verb, str], str]] = {
    **{(verb, "active"): _ACTIVE for verb in Verb},
    (Verb.RETRY, "held"): "held: release it instead",
    (Verb.RELEASE, "due"): "not held",
    (Verb.RELEASE, "deferred"): "not held",
}
_HELD_ALREADY: Final = "held already"  # of held mail the spool takes that which is held only until a certain time
_OVERTAKEN: Final = "meanwhile being attempted, or gone"


class Operator:
    """Carries out orders. Made inside a running loop; close it."""

    def __init__(self, spool: Spool, delivery: Delivery, journal: Journal, *, view: Callable[[], View]) -> None:
        """`view` opens the queue for reading; it is called in a thread, and may raise SpoolError."""
        self._spool = spool
        self._delivery = delivery
        self._journal = journal
        self._view = view
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="operator")

    def close(self) -> None:
        self._reader.shutdown()

    async def count(self, selection: Selection) -> int:
        """How many queued messages an order with this selection would be about. Raises SpoolError."""
        async with self._pages(selection) as pages:
            found = 0
            while page := await pages():
                found += len(page)
        return found

    async def carry_out(self, order: Order, tell: Callable[[Progress], Awaitable[None]]) -> None:
        """Do it, telling after each page what came of its messages. Ends early with whatever `tell` raises. Raises SpoolError."""
        changed = skipped = 0
        tried: set[str] = set()  # upstreams: one chance for each order, not for each page
        unseen = set(order.selection.ids)
        try:
            async with self._pages(order.selection) as pages:
                while page := await pages():
                    unseen.difference_update(queued.id for queued in page)
                    progress = await self._do(order, page, tried)
                    changed, skipped = changed + len(progress.changed), skipped + len(progress.skipped)
                    await tell(progress)
            if unseen:
                skipped += len(unseen)
                await tell(Progress((), dict.fromkeys(sorted(unseen), self._absence(order.selection))))
        finally:
            self._note(order, changed, skipped)

    async def _do(self, order: Order, page: Sequence[Queued], tried: set[str]) -> Progress:
        """One page, in one commit."""
        skipped: dict[str, str] = {queued.id: why for queued in page if (why := _OBJECTIONS.get((order.verb, queued.state)))}
        wanted = {queued.id: queued.state for queued in page if queued.id not in skipped}
        changed = await self._change(order, list(wanted), tried) if wanted else ()
        for id in wanted.keys() - set(changed):
            skipped[id] = _HELD_ALREADY if (order.verb, wanted[id]) == (Verb.HOLD, "held") else _OVERTAKEN
        return Progress(changed, skipped)

    async def _change(self, order: Order, ids: Sequence[MessageId], tried: set[str]) -> Sequence[MessageId]:
        chosen = Selection(ids=frozenset(ids))
        match order.verb:
            case Verb.HOLD:
                return await self._spool.hold(chosen, order.reason or "held by the operator")
            case Verb.DROP:
                return await self._spool.drop(chosen)
            case Verb.BOUNCE:
                return await self._give_up(ids, order.reason or "given up by the operator")
            case Verb.RELEASE:
                return await self._woken(ids, await self._spool.release(chosen), tried)
            case Verb.RETRY:
                return await self._woken(ids, await self._spool.reschedule(chosen), tried)

    async def _give_up(self, ids: Sequence[MessageId], reason: str) -> Sequence[MessageId]:
        taken: list[MessageId] = []
        for start in range(0, len(ids), _PAGE_CLAIMS):
            some = ids[start : start + _PAGE_CLAIMS]
            claims = await self._spool.take(Selection(ids=frozenset(some)), len(some))
            if ending := self._delivery.give_up(claims, reason):
                await asyncio.wait(ending)
            taken += [claim.id for claim in claims]
        return taken

    async def _woken(self, ids: Sequence[MessageId], due: Sequence[Next], tried: set[str]) -> Sequence[MessageId]:
        """Wake the lanes of what is due now; answers which of the messages that is."""
        earliest: dict[Lane, float] = {}
        for then in due:
            earliest[then.lane] = min(then.when, earliest.get(then.lane, then.when))
        for upstream in {lane.upstream for lane in earliest} - tried:
            tried.add(upstream)
            self._delivery.try_now(upstream)
        for lane, when in earliest.items():
            self._delivery.wake(lane, when)
        return ids if len(due) == len(ids) else await self._waiting(ids)

    async def _waiting(self, ids: Sequence[MessageId]) -> Sequence[MessageId]:
        """Those that wait for an attempt; of the others some were overtaken by one, and which of them only the queue can tell."""
        async with self._pages(Selection(ids=frozenset(ids))) as pages:
            return [queued.id for queued in await pages() if queued.state in ("due", "deferred")]

    @asynccontextmanager
    async def _pages(self, selection: Selection) -> AsyncIterator[Callable[[], Awaitable[Sequence[Queued]]]]:
        """What is queued now, page by page, oldest first; at the end an empty page."""
        loop, until = asyncio.get_running_loop(), self._spool.new_id()
        view = await loop.run_in_executor(self._reader, self._view)
        rows = view.queued(selection)

        def read() -> Sequence[Queued]:
            return [queued for queued in islice(rows, PAGE_MESSAGES) if queued.id < until]

        try:
            yield lambda: loop.run_in_executor(self._reader, read)
        finally:
            await loop.run_in_executor(self._reader, view.close)

    def _absence(self, selection: Selection) -> str:
        filtered = replace(selection, ids=frozenset()) != EVERYTHING
        return "not in the queue, or not like that" if filtered else "not in the queue"

    def _note(self, order: Order, changed: int, skipped: int) -> None:
        """One line in the log for each order: who did what to how much, and why."""
        why = f" ({order.reason})" if order.reason else ""
        what = f"{order.by}: queue {order.verb.value} of {in_words(order.selection)}{why}"
        self._journal.note("info", f"{what}: {changed} {_DONE[order.verb]}, {skipped} left alone")


def in_words(selection: Selection) -> str:
    """A selection for a log line; long lists of ids are counted."""
    ids = sorted(selection.ids)
    words = [" ".join(ids) if len(ids) <= 5 else f"{len(ids)} messages"] if ids else []
    names = ("route", "upstream", "sender", "recipient", "state")
    words += [f"{name} {value}" for name in names if (value := getattr(selection, name))]
    words += [f"older than {selection.older_than:g} s"] if selection.older_than is not None else []
    return ", ".join(words) or "everything"
