"""The open sessions of every upstream, each with that upstream's own credential.

Sessions are shared by nobody but the messages of one upstream: two tenants on the same host never meet (law 6). How many may be open
at once, and whose turn it is, is the business of `rides`, who may log in is `login`'s; the pool keeps what it is given back and closes
what has been idle for too long or was opened with a secret that has changed.

State: the idle sessions by upstream name, newest last; how long they may be idle and how many recipients a message may have, where an
upstream has taught it; and the sessions that have been let go and whose connection is not closed yet.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from relay.clock import Clock
from relay.config.providers import PROVIDERS
from relay.config.secrets import Use
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Phase, Scope, Status
from relay.upstream.dial import Names
from relay.upstream.expiry import Expiries, Validity
from relay.upstream.hosts import Hosts
from relay.upstream.login import Login
from relay.upstream.oauth2 import Tokens
from relay.upstream.opening import CannotOpen, open_session
from relay.upstream.rides import Rides
from relay.upstream.session import Session
from relay.upstream.tls import Contexts
from relay.upstream.token_store import TokenStore
from relay.upstream.token_threads import TokenThreads
from relay.upstream.transaction import Outgoing, Stale
from relay.upstream.watch import Note, Readers

#: Shorter than the patience of any server with an idle client, so that we are the one who says QUIT: where nothing is known of it,
#: where it is a provider's, and where it has closed a session itself. Such a session is not kept longer than a minute, as it may
#: count against a limit of connections.
IDLE_SECONDS = 20.0
_SHARE = 2 / 3
_IDLE_LIMIT_SECONDS = 60.0
_LEARNT_SECONDS = 3600.0  # it may have been a restart
_NOT_FOR_IDLENESS_SECONDS = 1.0  # who closes sooner has another reason

_CREDENTIAL = Scope.CREDENTIAL  # named, as the attributes of an enum take long to look up

_SWEEP_SECONDS = 1.0
_LEAVE_SECONDS = 1.0  # at the end of the program, for the answer to QUIT
_TOKENS_SECONDS = 5.0  # and for a token server's, which may have to be stored


def _silent(level: str, what: str) -> None:
    """What is noted where nobody listens."""


class Pool:
    """Sends messages to upstreams over sessions that it keeps open. `secret_changed` is told the upstream's name. `backlog` is asked how
    many messages wait for it, beside those that are being sent. `riding`: where more messages than connections are of use, as the next
    ones ride behind those under way.
    """

    def __init__(
        self, upstreams: Mapping[str, Upstream], *, hostname: str, clock: Clock, note: Note = _silent, store: TokenStore | None = None
    ) -> None:
        """`store`: the refresh tokens, where an upstream has `oauth2`."""
        self.secret_changed: Callable[[str], None] | None = None
        self.backlog: Callable[[str], int] = lambda name: 0
        self.riding: set[str] = set()
        self._hostname = hostname
        self._clock = clock
        self._contexts = Contexts(clock=clock, note=note)
        self._names = Names()
        self._hosts = Hosts(clock, note)
        self._expiries = Expiries(clock, note)
        self._readers = Readers()
        threads = TokenThreads()
        self._tokens = {
            name: Tokens(name, upstream, store=store, threads=threads, clock=clock, note=note)
            for name, upstream in upstreams.items()
            if upstream.by_token and store is not None
        }
        self._logins = {
            name: Login(
                name, upstream, connect=partial(self._connect, name), changed=self._change, note=note, readers=self._readers,
                tokens=self._tokens.get(name),
            )
            for name, upstream in upstreams.items()
        }  # fmt: skip
        self._idle: dict[str, list[Session]] = {}
        self._learnt: dict[str, tuple[float, float]] = {}
        self._recipients: dict[str, int] = {}
        self._rides: dict[str, Rides] = {}
        self._opened: dict[str, float] = {}
        self._leaving: set[Session] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    async def send(self, name: str, message: Outgoing) -> list[Outcome]:
        """Send `message` to the upstream called `name`: one outcome per recipient, in their order. Never raises for the other side."""
        login = self._logins[name]
        used, looks = login.upstream, login.looks
        outcomes = await self._send(name, message)
        first = outcomes[0]
        if first.scope is not _CREDENTIAL or not all(each.scope is _CREDENTIAL for each in outcomes):
            return outcomes
        if used.logs_in and first.phase is not Phase.RCPT:  # there it may be the recipient that is odd
            self._leave(name)
        if await login.renewed(used, first, looks=looks):
            in_doubt = first.in_doubt  # since before that login
            outcomes = await self._send(name, message)
            return list(map(_doubted, outcomes)) if in_doubt else outcomes
        return outcomes

    async def probe(self, name: str) -> Outcome | None:
        """Open a session without mail and end it: None where that works, else why not. A refused secret is read again, as for mail.
        Raises Busy where mail has all connections and keeps them."""
        login = self._logins[name]
        used, looks = login.upstream, login.looks
        outcome = await self._probe(name)
        if outcome is None or outcome.scope is not Scope.CREDENTIAL or not used.logs_in:
            return outcome
        self._leave(name)
        return await self._probe(name) if await login.renewed(used, outcome, looks=looks) else outcome

    async def _probe(self, name: str) -> Outcome | None:
        """With the right to a connection, like mail, and where one is idle in its place: some upstreams count strictly."""
        rides, patience = self._rides_of(name), self.settings(name).timeouts.connect
        try:
            session = await rides.wait_to_probe(timeout_seconds=patience)
        except CannotOpen as error:
            return error.outcome
        try:
            if session is None and not rides.has_room_beside(len(self._idle.get(name, ()))):
                session = self._take(name)
            if session is not None:
                await self._see_off(session)
            session = await self._logins[name].open()
            self._dismiss(session)
        except CannotOpen as error:
            return error.outcome
        finally:
            self._give_back(name, session)
        return None

    async def _see_off(self, session: Session) -> None:
        """Let a session go, and wait until its connection is closed: the upstream counts it until then."""
        self._dismiss(session)
        await asyncio.wait([session.ended])

    def settings(self, name: str) -> Upstream:
        """The settings in use, with the secret as it was last read."""
        return self._logins[name].upstream

    def opened_at(self, name: str) -> float | None:
        """When a session was last opened, login and all (monotonic)."""
        return self._opened.get(name)

    async def _send(self, name: str, message: Outgoing) -> list[Outcome]:
        """Over an idle session, behind another message, or over a new session; over another one where it has gone stale."""
        rides, in_doubt = self._rides.get(name) or self._rides_of(name), False
        try:
            while True:
                session = self._take(name)
                if idle := session is not None:
                    rides.keep()
                else:
                    session = await rides.wait()
                if session is None:
                    break
                try:
                    outcomes = await (session.send(message) if idle else session.ride(message))
                except Stale as stale:
                    in_doubt = stale.in_doubt
                except BaseException:
                    self._hand_on(name, session)
                    raise
                else:
                    self._hand_on(name, session)
                    return outcomes
                if in_doubt or not session.rider:
                    await self._replace(name, session)
                    break
                self._dismiss(session)  # he who rode behind has the right to its place
            outcomes = await self._send_anew(name, message)
        except CannotOpen as error:
            outcomes = [error.outcome] * len(message.recipients)
        return list(map(_doubted, outcomes)) if in_doubt else outcomes

    async def _send_anew(self, name: str, message: Outgoing) -> list[Outcome]:
        """Over a new session, which one has the right to open. Raises CannotOpen."""
        rides = self._rides[name]
        try:
            session = await self._logins[name].open()
        except CannotOpen as error:
            if error.outcome.throttled and error.outcome.scope is not _CREDENTIAL:
                rides.withdraw(error)
                raise
            if error.outcome.scope is _CREDENTIAL:
                rides.refuse(error)
            else:
                rides.fail()
            self._give_back(name, None)
            raise
        except BaseException:
            rides.abandon()
            self._give_back(name, None)
            raise
        rides.opened()
        try:
            return await session.send(message)
        finally:
            self._hand_on(name, session)

    async def _replace(self, name: str, stale: Session) -> None:
        """See off a session that has gone stale, and have the right to open another one. Raises CannotOpen."""
        rides = self._rides[name]
        session: Session | None = stale
        if stale.rider:  # he has the right to its place
            self._dismiss(stale)
            session = await rides.wait_apart()
            if session is None and not rides.has_room_beside(len(self._idle.get(name, ()))):
                session = self._take(name)
        if session is not None:
            try:
                await self._see_off(session)
            except BaseException:
                self._give_back(name, session)
                raise
        rides.open()

    def _hand_on(self, name: str, session: Session) -> None:
        """One has sent over it. It is the rider's now, or still of the one before, or anybody's."""
        if not (session.rider or session.busy):
            self._give_back(name, session)

    def _rides_of(self, name: str) -> Rides:
        if (rides := self._rides.get(name)) is None:
            rides = self._rides[name] = Rides(self._logins[name].upstream, backlog=lambda: self.backlog(name))
        return rides

    def uses(self) -> Iterator[Use]:
        """The secrets of the upstreams that can change."""
        return itertools.chain.from_iterable(login.uses() for login in self._logins.values())

    def recipients_limit(self, name: str) -> int:
        """How many recipients the upstream says that it takes at once (RFC 9422); 0 where it does not, or nobody has asked yet."""
        return self._recipients.get(name, 0)

    def certificates(self, name: str) -> dict[str, Validity]:
        """How long the certificates of the upstream's hosts are good, as they were last seen."""
        upstream = self._logins[name].upstream
        found = ((host, self._expiries.of(host, upstream.port)) for host in upstream.host)
        return {host: validity for host, validity in found if validity is not None}

    async def close(self) -> None:
        """Say QUIT everywhere and wait a moment for the answers."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._readers.close()
        for name in list(self._idle):
            self._leave(name)
        if self._leaving:
            await asyncio.wait([session.ended for session in self._leaving], timeout=_LEAVE_SECONDS)
        for session in self._leaving:
            session.cut()
        if self._leaving:
            await asyncio.wait([session.ended for session in self._leaving], timeout=_LEAVE_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TOKENS_SECONDS):
                for tokens in self._tokens.values():
                    await tokens.settled()

    async def _connect(self, name: str, upstream: Upstream) -> Session:
        """A session to the first host that takes us. A refused credential is not tried on the next host. Raises CannotOpen."""
        if len(upstream.host) == 1:
            return await self._open(name, upstream, upstream.host[0])
        *others, last = self._hosts.order(name, upstream.host)
        for host in others:
            try:
                return await self._open(name, upstream, host)
            except CannotOpen as error:
                if not error.of_this_host:
                    raise
                self._hosts.failed(name, host, str(error))
        return await self._open(name, upstream, last)

    async def _open(self, name: str, upstream: Upstream, host: str) -> Session:
        ehlo = upstream.ehlo or self._hostname
        session = await open_session(upstream, host, ehlo=ehlo, contexts=self._contexts, names=self._names)
        self._hosts.answered(name, host)
        self._opened[name] = self._clock.monotonic()
        self._recipients[name] = session.recipients_limit
        session.rides = self._rides_of(name)
        (self.riding.add if session.rideable else self.riding.discard)(name)
        if session.validity is not None:
            self._expiries.saw(name, host, upstream.port, session.validity)
        session.ended.add_done_callback(partial(self._ended, name, session))
        return session

    def _take(self, name: str) -> Session | None:
        sessions = self._idle.get(name)
        while sessions:
            session = sessions.pop()
            if session.usable:
                return session
            self._dismiss(session)
        return None

    def _give_back(self, name: str, session: Session | None) -> None:
        """Keep the session for the next message if it is of use, or give up the right to a connection, once this one is closed."""
        rides = self._rides[name]
        if session is not None and (self._closed or not session.usable or session.upstream is not self._logins[name].upstream):
            self._dismiss(session)
            if not session.ended.done():  # the upstream counts it until then
                session.ended.add_done_callback(lambda _: rides.leave())
                return
            session = None
        if rides.leave(session) or session is None:
            return
        session.idle_since = self._clock.monotonic()
        self._idle.setdefault(name, []).append(session)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _change(self, name: str) -> None:
        """The secret of an upstream has changed."""
        self._leave(name)
        self._rides_of(name).upstream = self._logins[name].upstream
        if self.secret_changed is not None:
            self.secret_changed(name)

    def _ended(self, name: str, session: Session, _: object) -> None:
        """A connection is closed. When it was idle the other side has closed it, and sooner than we expected."""
        if session in self._idle.get(name, ()):
            self._idle[name].remove(session)
            now = self._clock.monotonic()
            if now - session.idle_since >= _NOT_FOR_IDLENESS_SECONDS:
                self._learnt[name] = _SHARE * (now - session.idle_since), now + _LEARNT_SECONDS

    def _patience_seconds(self, name: str) -> float:
        """How long a session may be idle."""
        provider = self._logins[name].upstream.provider
        usual = min(_SHARE * PROVIDERS[provider].idle_seconds, _IDLE_LIMIT_SECONDS) if provider is not None else IDLE_SECONDS
        learnt, until = self._learnt.get(name, (usual, 0.0))
        return min(usual, learnt) if until > self._clock.monotonic() else usual

    def _leave(self, name: str) -> None:
        """Let the idle sessions of an upstream go."""
        for session in self._idle.pop(name, ()):
            self._retire(session)

    def _retire(self, session: Session) -> None:
        """Let an idle session go. It is in use until its connection is closed, for that is how the upstream counts."""
        self._dismiss(session)
        rides = session.rides
        if rides is not None and not session.ended.done():
            rides.keep()
            session.ended.add_done_callback(lambda _: rides.leave())

    def _dismiss(self, session: Session) -> None:
        """Let a session go; it is remembered until its connection is closed."""
        session.quit()
        if not session.ended.done():
            self._leaving.add(session)
            session.ended.add_done_callback(lambda _: self._leaving.discard(session))

    def _sweep(self) -> None:
        """Close what has been idle for too long; the oldest are in front. What the other side has closed is `_ended`'s to learn from."""
        self._sweeper = None
        now = self._clock.monotonic()
        for name, sessions in list(self._idle.items()):
            deadline = now - self._patience_seconds(name)
            while sessions and sessions[0].idle_since <= deadline:
                self._retire(sessions.pop(0))
            if not sessions:
                del self._idle[name]
        if self._idle:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)


def _doubted(outcome: Outcome) -> Outcome:
    """What it means where the message had been handed over once already, to a connection that had ended."""
    return outcome if outcome.status is Status.SENT else outcome._replace(in_doubt=True, fallback=False)
