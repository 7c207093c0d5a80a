"""Who rides behind whom: more messages for an upstream than it gets connections.

Where an upstream does not take a message in one flight, its connections rest while it works on content. Then the commands of the next
message go out behind that content (RFC 2920 section 3.1 allows it), and the connection is theirs when the reply has come. So the
scheduler may begin more attempts than there are connections; they wait here for one that can take them.

State, for each upstream: how many of its connections are in use or being opened, and who waits, in turn; those who probe before the
others, for they are few and want a connection of their own.
"""

import asyncio
from collections import deque

from relay.config.upstreams import Upstream
from relay.upstream.session import Session

_Turn = asyncio.Future[Session | None]


class Busy(Exception):
    """All connections are in use, and have been for a while."""


class Rides:
    """The connections of one upstream, as far as they are in use. Who has the right to one gives it up with `leave`."""

    def __init__(self, upstream: Upstream) -> None:
        """`upstream`: its settings; to be kept up to date, for only a session that was opened with these takes riders."""
        self.upstream = upstream
        self.waiting: deque[_Turn] = deque()
        self._probing: deque[_Turn] = deque()
        self._limit = upstream.limits.connections
        self._used = 0

    def board(self) -> bool:
        """Take the right to a connection, if there is one left."""
        if self._used >= self._limit:
            return False
        self._used += 1
        return True

    def keep(self) -> None:
        """Take the right to a connection for one that was idle: there is room for it."""
        self._used += 1

    async def wait(self) -> Session | None:
        """Until it is one's turn: a session, behind whose message one rides or that is idle, or None, and then the right to open one.

        Raises what `refuse` was told.
        """
        return await self._wait_in(self.waiting)

    async def wait_to_probe(self, *, timeout_seconds: float) -> Session | None:
        """As `wait`, never behind a message. Raises Busy, too, when it takes longer."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._wait_in(self._probing)
        except TimeoutError:
            raise Busy from None

    async def _wait_in(self, queue: "deque[_Turn]") -> Session | None:
        turn: _Turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn in queue:
                queue.remove(turn)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._decline(turn.result())
            raise

    def offer(self, session: Session) -> None:
        """The session has handed over its content: the first who waits may send his commands behind it. None while somebody waits to
        probe: one who rides keeps the connection from him."""
        if not self._probing and (turn := self._next(self.waiting)) is not None:
            session.rider = True
            turn.set_result(session)

    def leave(self, session: Session | None = None) -> bool:
        """Give up the right to a connection; with `session`, which is idle now, to whoever waits for one. Answers whether it was taken."""
        if (self._probing or self.waiting) and (turn := self._next(self._probing) or self._next(self.waiting)) is not None:
            turn.set_result(session)
            return True
        self._used -= 1
        return False

    def withdraw(self, error: Exception) -> None:
        """Give up the right to a connection where nobody else would be given one now: who waits goes on waiting for those that are in
        use. Without any, he is refused."""
        self._used -= 1
        if not self._used:
            self.refuse(error)

    def refuse(self, error: Exception) -> None:
        """Nobody who waits would be let in."""
        while (turn := self._next(self._probing) or self._next(self.waiting)) is not None:
            turn.set_exception(error)

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
