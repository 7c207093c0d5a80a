"""The open sessions of every upstream, each with that upstream's own credential.

Sessions are shared by nobody but the messages of one upstream: two tenants on the same host never meet (law 6). How many may be used
at once is the scheduler's business, who may log in is `login`'s; the pool keeps what it is given back and closes what has been idle
for too long or was opened with a secret that has changed.

State: the idle sessions by upstream name, newest last, and those that have been let go and whose connection is not closed yet.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from relay.clock import Clock
from relay.config.model import Upstream
from relay.mail.outcome import Outcome, Phase, Scope, Status
from relay.upstream.dial import Names
from relay.upstream.login import Login, Note, Readers
from relay.upstream.session import CannotOpen, Session, logs_in, open_session
from relay.upstream.tls import Contexts
from relay.upstream.transaction import Outgoing, Stale

#: Shorter than any large provider's own patience with an idle client, so that we are the one who says QUIT.
IDLE_SECONDS = 20.0
_SWEEP_SECONDS = 5.0
_LEAVE_SECONDS = 1.0  # at the end of the program, for the answer to QUIT


def _silent(level: str, what: str) -> None:
    """What is noted where nobody listens."""


@dataclass(slots=True)
class _Idle:
    session: Session
    since: float


class Pool:
    """Sends messages to upstreams over sessions that it keeps open. `secret_changed` is told the upstream's name."""

    def __init__(self, upstreams: Mapping[str, Upstream], *, hostname: str, clock: Clock, note: Note = _silent) -> None:
        self.secret_changed: Callable[[str], None] | None = None
        self._hostname = hostname
        self._clock = clock
        self._contexts = Contexts()
        self._names = Names()
        self._readers = Readers()
        self._logins = {
            name: Login(name, upstream, connect=self._connect, changed=self._change, note=note, readers=self._readers)
            for name, upstream in upstreams.items()
        }
        self._idle: dict[str, list[_Idle]] = {}
        self._leaving: set[Session] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        """Send `message` to the upstream called `name`: one outcome per recipient, in their order. Never raises for the other side."""
        login = self._logins[name]
        used, looks = login.upstream, login.looks
        outcomes = await self._send(name, message)
        first = outcomes[0]
        if first.scope is not Scope.CREDENTIAL or first.in_doubt or not all(each.scope is Scope.CREDENTIAL for each in outcomes):
            return outcomes
        if logs_in(used) and first.phase is not Phase.RCPT:  # there it may be the recipient that is odd
            self._leave(name)
        return await self._send(name, message) if await login.renewed(used, first, looks=looks) else outcomes

    async def _send(self, name: str, message: Outgoing) -> list[Outcome]:
        """Over an idle session, or a new one where there is none or it has gone stale."""
        session = self._take(name)
        in_doubt = False
        try:
            if session is not None:
                try:
                    return await session.send(message)
                except Stale as stale:
                    self._dismiss(session)
                    in_doubt = stale.in_doubt
            session = await self._logins[name].open()
            outcomes = await session.send(message)
            return list(map(_doubted, outcomes)) if in_doubt else outcomes
        except CannotOpen as error:
            session = None
            return [_doubted(error.outcome) if in_doubt else error.outcome] * len(message.recipients)
        finally:
            if session is not None:
                self._give_back(name, session)

    async def close(self) -> None:
        """Say QUIT everywhere and wait a moment for the answers."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for login in self._logins.values():
            login.close()
        self._readers.close()
        for name in list(self._idle):
            self._leave(name)
        if self._leaving:
            await asyncio.wait([session.ended for session in self._leaving], timeout=_LEAVE_SECONDS)
        for session in self._leaving:
            session.cut()
        if self._leaving:
            await asyncio.wait([session.ended for session in self._leaving], timeout=_LEAVE_SECONDS)

    async def _connect(self, upstream: Upstream) -> Session:
        """A session to the first host that takes us. A refused credential is not tried on the next host. Raises CannotOpen."""
        for host in upstream.host[:-1]:
            try:
                return await self._open(upstream, host)
            except CannotOpen as error:
                if error.outcome.scope is Scope.CREDENTIAL or error.outcome.throttled or error.outcome.phase is Phase.AUTH:
                    raise
        return await self._open(upstream, upstream.host[-1])

    async def _open(self, upstream: Upstream, host: str) -> Session:
        return await open_session(upstream, host, ehlo=upstream.ehlo or self._hostname, contexts=self._contexts, names=self._names)

    def _take(self, name: str) -> Session | None:
        sessions = self._idle.get(name)
        while sessions:
            session = sessions.pop().session
            if session.usable:
                return session
            self._dismiss(session)
        return None

    def _give_back(self, name: str, session: Session) -> None:
        if self._closed or not session.usable or session.upstream is not self._logins[name].upstream:
            self._dismiss(session)
            return
        self._idle.setdefault(name, []).append(_Idle(session, self._clock.monotonic()))
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _change(self, name: str) -> None:
        """The secret of an upstream has changed."""
        self._leave(name)
        if self.secret_changed is not None:
            self.secret_changed(name)

    def _leave(self, name: str) -> None:
        """Let the idle sessions of an upstream go."""
        for idle in self._idle.pop(name, ()):
            self._dismiss(idle.session)

    def _dismiss(self, session: Session) -> None:
        """Let a session go; it is remembered until its connection is closed."""
        session.quit()
        if not session.ended.done():
            self._leaving.add(session)
            session.ended.add_done_callback(lambda _: self._leaving.discard(session))

    def _sweep(self) -> None:
        """Close what has been idle for too long; the oldest are in front."""
        self._sweeper = None
        deadline = self._clock.monotonic() - IDLE_SECONDS
        for name, sessions in list(self._idle.items()):
            while sessions and (sessions[0].since <= deadline or not sessions[0].session.usable):
                self._dismiss(sessions.pop(0).session)
            if not sessions:
                del self._idle[name]
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)


def _doubted(outcome: Outcome) -> Outcome:
    """What it means where the message had been handed over once already, to a connection that had ended."""
    return outcome if outcome.status is Status.SENT else outcome._replace(in_doubt=True, fallback=False)
