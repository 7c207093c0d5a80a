"""Who may log in, and with which secret: one login at a time until this secret has once succeeded.

A wrong password costs one refused login and not one for every slot: providers lock accounts for less. Those who wait for their turn
share the fate of the one who was refused. After a refusal the secret is read again from its source; a changed one is used at once,
and the file of an unchanged one is looked at from time to time.

State, for each upstream: its settings with the secret as last read, whether that has succeeded, and the last failure. Laws: nobody
logs in with a secret that was refused while he waited; a secret is compared and handed on, never told.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from relay.config.model import Upstream
from relay.config.secrets import Secret
from relay.mail.outcome import Outcome, Phase, Scope
from relay.upstream.session import CannotOpen, Session, logs_in

#: How often the file of a refused secret is looked at: whoever writes a new one tells nobody.
_LOOK_SECONDS = 60.0

#: Reading may hang, and a command may take 10 s: not on the loop, and not in the threads that read mail.
_READERS = 4

Note = Callable[[Literal["info", "warning"], str], None]


class Readers:
    """Threads that read secrets again, made at first use."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="secrets")

    def read(self, secret: Secret) -> asyncio.Future[Secret]:
        return asyncio.get_running_loop().run_in_executor(self._threads, secret.read_again)

    def close(self) -> None:
        """Wait for nobody: a command ends by itself within its time."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Login:
    """The way in at one upstream. `upstream`: its settings with the secret in use. `looks`: how often its source was read again."""

    def __init__(
        self,
        name: str,
        upstream: Upstream,
        *,
        connect: Callable[[Upstream], Awaitable[Session]],
        changed: Callable[[str], None],
        note: Note,
        readers: Readers,
    ) -> None:
        self.upstream = upstream
        self.looks = 0
        self._name = name
        self._connect = connect
        self._changed = changed
        self._note = note
        self._readers = readers
        self._proven = not logs_in(upstream)
        self._turn = asyncio.Lock()
        self._failure: Outcome | None = None
        self._failed_at = 0.0  # seconds of the loop
        self._refusals = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(self) -> Session:
        """A session that is logged in. Raises CannotOpen."""
        while not self._proven:
            refusals, begun = self._refusals, asyncio.get_running_loop().time()
            async with self._turn:
                if not self._proven:
                    self._share(refusals, begun)
                    return await self._prove()
        return await self._connect(self.upstream)

    async def renewed(self, used: Upstream, refusal: Outcome, *, looks: int) -> bool:
        """Whether there is another secret than the one in `used`, which was refused: its source is read again.

        `looks` is how often it had been read when the attempt began: what somebody else has found since holds for this one too.
        """
        if not logs_in(used):
            return False
        if used is self.upstream:
            self._proven = False
        async with self._turn:
            if used is self.upstream and looks == self.looks:
                if not self._take(await self._read()):
                    if refusal.phase is Phase.AUTH:  # also for those who have come meanwhile
                        self._fail(refusal, shared=True)
                    self._watch()
                self.looks += 1
        return used is not self.upstream

    def close(self) -> None:
        """Look at no file any more."""
        self._closed = True
        self._unwatch()

    def _share(self, refusals: int, begun: float) -> None:
        """Fail as another one has failed during the wait: refused or slowed down, or when the wait was as long as a connection may take."""
        if self._failure is None:
            return
        waited = asyncio.get_running_loop().time() - begun >= self.upstream.timeouts.connect
        if self._refusals > refusals or (waited and self._failed_at >= begun):
            raise CannotOpen(self._failure)

    async def _prove(self) -> Session:
        used = self.upstream
        try:
            session = await self._connect(used)
        except CannotOpen as error:
            self._fail(error.outcome, shared=error.outcome.scope is Scope.CREDENTIAL or error.outcome.throttled)
            raise
        if used is self.upstream:
            self._proven = True
        return session

    def _fail(self, outcome: Outcome, *, shared: bool) -> None:
        self._failure, self._failed_at = outcome, asyncio.get_running_loop().time()
        self._refusals += shared

    # -- the secret -------------------------------------------------------------------------------------------------------

    async def _read(self) -> Secret | None:
        """The secret as it is now; None when it cannot be had, and then the old one stays."""
        assert self.upstream.password is not None, "only a secret is refused"
        try:
            return await self._readers.read(self.upstream.password)
        except ValueError as error:
            self._note("warning", f"upstream {self._name}: its secret cannot be read again: {error}")
            return None

    def _take(self, secret: Secret | None) -> bool:
        """Use another secret from now on; answers whether it is another one."""
        if secret is None or secret == self.upstream.password:
            return False
        self.upstream = self.upstream.model_copy(update={"password": secret})
        self._proven = False
        self._unwatch()
        self._note("info", f"upstream {self._name}: its secret has changed ({secret.source})")
        self._changed(self._name)
        return True

    def _watch(self) -> None:
        """Look at the file of a refused secret until it is another one or is taken after all."""
        assert self.upstream.password is not None, "only a secret is refused"
        if self.upstream.password.is_in_file:
            self._unwatch()
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        assert self.upstream.password is not None, "only a secret is watched"
        self._readers.read(self.upstream.password).add_done_callback(self._looked)

    def _looked(self, reading: asyncio.Future[Secret]) -> None:
        if reading.cancelled() or self._closed or self._proven:
            return
        unreadable = isinstance(reading.exception(), ValueError)  # gone for the moment, or half written
        if unreadable or not self._take(reading.result()):
            self._watch()
