"""Who rides behind whom: more messages for an upstream than it gets connections.

Where an upstream does not take a message in one flight, its connections rest while it works on content. Then the commands of the next
message go out behind that content (RFC 2920 section 3.1 allows it), and the connection is theirs when the reply has come. So the
scheduler may begin more attempts than there are connections; they wait here for one that can take them.

State, for each upstream: how many of its connections are in use or being opened, and who waits, in turn.
"""

import asyncio
from collections import deque

from relay.config.upstreams import Upstream
from relay.upstream.session import Session


class Rides:
    """The connections of one upstream, as far as they are in use. Who has the right to one gives it up with `leave`."""

    def __init__(self, upstream: Upstream) -> None:
        """`upstream`: its settings; to be kept up to date, for only a session that was opened with these takes riders."""
        self.upstream = upstream
        self.waiting: deque[asyncio.Future[Session | None]] = deque()
        self._limit = upstream.limits.connections
        self._used = 0

    def board(self) -> bool:
        """Take the right to a connection, if there is one left."""
        if self._used >= self._limit:
            return False
        self._used += 1
        return True

    async def wait(self) -> Session | None:
        """Until it is one's turn: a session, behind whose message one rides or that is idle, or None, and then the right to open one.

        Raises what `refuse` was told.
        """
        turn: asyncio.Future[Session | None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._decline(turn.result())
            raise

    def offer(self, session: Session) -> None:
        """The session has handed over its content: the first who waits may send his commands behind it."""
        if (turn := self._next()) is not None:
            session.rider = True
            turn.set_result(session)

    def leave(self, session: Session | None = None) -> bool:
        """Give up the right to a connection; with `session`, which is idle now, to whoever waits for one. Answers whether it was taken."""
        if self.waiting and (turn := self._next()) is not None:
            turn.set_result(session)
            return True
        self._used -= 1
        return False

    def refuse(self, error: Exception) -> None:
        """Nobody who waits would be let in."""
        while (turn := self._next()) is not None:
            turn.set_exception(error)

    def _decline(self, session: Session | None) -> None:
        """It was one's turn, and one has gone."""
        if session is not None:
            session.rider = False
            if session.busy:  # it still belongs to the message before
                return
            session.cut()
        self.leave()

    def _next(self) -> asyncio.Future[Session | None] | None:
        while self.waiting:
            turn = self.waiting.popleft()
            if not turn.done():
                return turn
        return None
