"""Who opens a connection, and who rides behind whom: there may be more messages for an upstream than it gets connections.

A connection rests while its reply to a content is on the way. Then the next message goes out behind that content (RFC 2920 section 3.1
allows it), or its commands where it is not one flight, and the connection is its own when the reply has come. So the scheduler may
begin more attempts than there are connections; they wait here for one that can take them.

State, for each upstream: how many of its connections are in use or being opened, behind whom one may ride, and who waits, in turn; those
who want a connection of their own before the others, for they are few.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from relay.config.upstreams import Upstream
from relay.upstream.session import Session

_Turn = asyncio.Future[Session | None]

#: At the same time one connection is being opened for every so many messages that wait: opening one costs as much as sending ten, in
#: round trips and in work.
_WORTH_OPENING = 8

#: Where none has been opened for so long, each tries for himself: it may never be open, and those who wait need not wait for that, too.
_SLOW_SECONDS = 0.5


class Busy(Exception):
    """All connections are in use, and have been for a while."""


class Rides:
    """The connections of one upstream, as far as they are in use. Who has the right to one gives it up with `leave`; a connection that is
    being closed keeps its right until it is. Of those that are being opened only mail's are counted, not a probe's."""

    def __init__(self, upstream: Upstream, *, backlog: Callable[[], int]) -> None:
        """`upstream`: its settings; to be kept up to date, for only a session that was opened with these takes riders. `backlog`: how
        many messages wait for one of those who wait here to be done."""
        self.upstream = upstream
        self._backlog = backlog
        self._waiting: deque[_Turn] = deque()
        self._apart: deque[_Turn] = deque()
        self._afloat: dict[Session, None] = {}  # nothing but the reply to their content is awaited, and nobody rides
        self._limit = upstream.limits.connections
        self._used = 0
        self._opening = 0
        self._alone = False  # each tries for himself
        self._slow: asyncio.TimerHandle | None = None

    async def wait(self) -> Session | None:
        """Until it is one's turn: a session, behind whose message one rides or that is idle, or None, and then the right to open one.

        Raises what `refuse` was told.
        """
        if self._afloat and self._full and not (self._apart or self._waiting):
            session, _ = self._afloat.popitem()  # the newest: what hangs is old
            if session.upstream is self.upstream:
                session.rider = True
                return session
        return await self._wait_in(self._waiting)

    async def wait_apart(self) -> Session | None:
        """As `wait`, before all others and never behind a message."""
        return await self._wait_in(self._apart)

    async def wait_to_probe(self, *, timeout_seconds: float) -> Session | None:
        """As `wait_apart`. Raises Busy, too, when it takes longer."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self.wait_apart()
        except TimeoutError:
            raise Busy from None

    async def _wait_in(self, queue: "deque[_Turn]") -> Session | None:
        turn: _Turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        self._open_more()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn in queue:
                queue.remove(turn)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                session = turn.result()
                if session is None and queue is self._waiting:
                    self._end_opening()
                self._decline(session)
            raise

    @property
    def _full(self) -> bool:
        """Whether no more connections may be opened."""
        return self._used >= self._limit

    # -- of those who have the right to a connection ----------------------------------------------------------------------

    def keep(self) -> None:
        """Take the right to a connection for one that was idle: there is room for it."""
        self._used += 1

    def offer(self, session: Session) -> None:
        """The session has handed over its content. Where no more connections may be opened, the first who waits may ride behind it, or
        who comes before it has landed. Nobody while somebody waits apart: one who rides keeps the connection from him."""
        if not self._full:
            return
        if not self._apart and (turn := self._next(self._waiting)) is not None:
            session.rider = True
            turn.set_result(session)
        else:
            self._afloat[session] = None

    def land(self, session: Session) -> None:
        """The reply to its content is here, or never will be."""
        self._afloat.pop(session, None)

    def leave(self, session: Session | None = None) -> bool:
        """Give up the right to a connection; with `session`, which is idle now, to whoever waits for one. Answers whether it was taken."""
        if (turn := self._next(self._apart)) is not None:
            turn.set_result(session)
            return True
        if (turn := self._next(self._waiting)) is not None:
            if session is None:
                self.open()
            turn.set_result(session)
            return True
        self._used -= 1
        return False

    def has_room_beside(self, others: int) -> bool:
        """Whether so many other connections may be open beside those in use."""
        return self._used + others <= self._limit

    def _decline(self, session: Session | None) -> None:
        """It was one's turn, and one has gone."""
        if session is not None:
            session.rider = False
            if session.busy:  # it still belongs to the message before
                return
            session.cut()
        self.leave()

    def _next(self, queue: "deque[_Turn]") -> _Turn | None:
        while queue:
            turn = queue.popleft()
            if not turn.done():
                return turn
        return None

    # -- of those who open one --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Who has the right to a connection is about to open it."""
        self._opening += 1
        if self._slow is None:
            self._slow = asyncio.get_running_loop().call_later(_SLOW_SECONDS, self._lose_patience)

    def opened(self) -> None:
        """It is open."""
        self._end_opening()
        self._alone = False
        self._open_more()

    def fail(self) -> None:
        """It cannot be opened: until one can, each tries for himself."""
        self._end_opening()
        self._alone = True
        self._open_more()

    def abandon(self) -> None:
        """Who was opening it has gone."""
        self._end_opening()
        self._open_more()

    def refuse(self, error: Exception) -> None:
        """It cannot be opened, and nobody who waits would be let in."""
        self._end_opening()
        self._tell_all(error)

    def withdraw(self, error: Exception) -> None:
        """It cannot be opened, and nobody else would be given a connection now: the right to it is given up, too, but nobody gets it. Who
        waits goes on waiting for those that are in use; without any, he is refused."""
        self._end_opening()
        self._used -= 1
        if not self._used:
            self._tell_all(error)

    def _tell_all(self, error: Exception) -> None:
        while (turn := self._next(self._apart) or self._next(self._waiting)) is not None:
            turn.set_exception(error)

    def _end_opening(self) -> None:
        self._opening -= 1
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if self._opening:
            self._slow = asyncio.get_running_loop().call_later(_SLOW_SECONDS, self._lose_patience)

    def _lose_patience(self) -> None:
        self._slow, self._alone = None, True
        self._open_more()

    def _open_more(self) -> None:
        """Let those who wait open connections, as many as are worth it: mail that comes in a burst would otherwise pay for all of them
        before the first of it is sent, and then use few."""
        while not self._full:
            if (turn := self._next(self._apart)) is None:
                if not (self._alone or self._worth_opening()) or (turn := self._next(self._waiting)) is None:
                    return
                self.open()
            self._used += 1
            turn.set_result(None)

    def _worth_opening(self) -> bool:
        return not self._opening or self._opening < (len(self._waiting) + self._backlog()) // _WORTH_OPENING
