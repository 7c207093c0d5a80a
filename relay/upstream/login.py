"""Who may log in, and with which secret: one login at a time until this secret has once succeeded.

A wrong password costs one refused login and not one for every slot: providers lock accounts for less. Those who wait for their turn
share the fate of the one who was refused. After a refusal the secret is read again from its source, and a changed one is used at once;
`watch` finds the others.

State, for each upstream: its settings with the secret as last read, whether that has succeeded, and the last failure. Laws: nobody
logs in with a secret that was refused while he waited; a secret is compared and handed on, never told.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from relay.config.secrets import Secret, Use
from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Phase, Scope, outcome_of_failure
from relay.upstream.oauth2 import Tokens
from relay.upstream.opening import CannotOpen
from relay.upstream.session import Session
from relay.upstream.token_error import TokenError
from relay.upstream.watch import Note, Readers


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
        tokens: Tokens | None = None,
    ) -> None:
        """`tokens`: where the login is with access tokens."""
        self.upstream = upstream
        self.looks = 0
        self._name = name
        self._connect = connect
        self._changed = changed
        self._note = note
        self._readers = readers
        self._tokens = tokens
        self._another = False
        self._proven = not upstream.logs_in
        self._turn = asyncio.Lock()
        self._failure: Outcome | None = None
        self._failed_at = 0.0  # seconds of the loop
        self._refusals = 0

    async def open(self) -> Session:
        """A session that is logged in. Raises CannotOpen."""
        while not self._proven:
            refusals, begun = self._refusals, asyncio.get_running_loop().time()
            async with self._turn:
                if not self._proven:
                    self._share(refusals, begun)
                    return await self._prove()
        return await self._enter(self.upstream)

    async def renewed(self, used: Upstream, refusal: Outcome, *, looks: int) -> bool:
        """Whether there is another secret than the one in `used`, which was refused: its source is read again.

        `looks` is how often it had been read when the attempt began: what somebody else has found since holds for this one too.
        """
        if not used.logs_in:
            return False
        if used is self.upstream:
            self._proven = False
        async with self._turn:
            if used is self.upstream and looks == self.looks:
                if self._tokens is not None:
                    self._another = await self._renew(self._tokens, refusal)
                else:
                    secret = await self._read()
                    self._another = used is self.upstream and self._take(secret)
                if used is self.upstream and not self._another and refusal.phase is Phase.AUTH:
                    self._fail(refusal, shared=True)  # also for those who have come meanwhile
                self.looks += 1
        return used is not self.upstream or self._another

    def uses(self) -> Iterator[Use]:
        """Its secrets that can change, for those who find out."""
        for key, secret in self.upstream.secrets.items():
            if secret.can_change:
                name = f"upstream {self._name}: its {'secret' if key == 'password' else key}"
                yield Use(name, partial(self._current, key), partial(self._exchange, key))
        if self._tokens is not None:
            yield from self._tokens.sign_in(self._restart)

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
            session = await self._enter(used)
        except CannotOpen as error:
            self._fail(error.outcome, shared=error.outcome.scope is Scope.CREDENTIAL or error.outcome.throttled)
            raise
        if used is self.upstream:
            self._proven = True
        return session

    async def _enter(self, used: Upstream) -> Session:
        """A session with the password, or with an access token in its place. Raises CannotOpen."""
        if self._tokens is None:
            return await self._connect(used)
        try:
            token = await self._tokens.get()
        except TokenError as error:
            raise CannotOpen(outcome_of_failure(Phase.AUTH, error.failure, str(error)), error.failure) from None
        session = await self._connect(used.with_secret("password", token))
        session.upstream = used  # it is good for as long as the settings are, whatever becomes of the token
        return session

    def _fail(self, outcome: Outcome, *, shared: bool) -> None:
        self._failure, self._failed_at = outcome, asyncio.get_running_loop().time()
        self._refusals += shared

    # -- the secret -------------------------------------------------------------------------------------------------------

    async def _read(self) -> Secret | None:
        """The secret as it is now; None when it cannot be had, and then the old one stays."""
        assert self.upstream.password is not None, "only a secret is refused"
        try:
            return await self._readers.read(self._name, self.upstream.password.read_again)
        except ValueError as error:
            self._note("warning", f"upstream {self._name}: its secret cannot be read again: {error}")
            return None

    def _take(self, secret: Secret | None) -> bool:
        """Use another secret from now on; answers whether it is another one."""
        if secret is None or secret == self.upstream.password:
            return False
        self._change("password", secret)
        self._note("info", f"upstream {self._name}: its secret has changed ({secret.source})")
        return True

    async def _renew(self, tokens: Tokens, refusal: Outcome) -> bool:
        """Whether there is something else to try: a new token where the upstream has refused one, or what the token server may take."""
        if refusal.reply.code:
            return refusal.phase in (Phase.AUTH, Phase.MAIL) and await tokens.renew()
        try:
            found = await self._readers.read(self._name, tokens.read)
        except (ValueError, OSError) as error:
            self._note("warning", f"upstream {self._name}: what its tokens are asked for with cannot be read again: {error}")
            return False
        if not tokens.take(found):
            return False
        self.upstream = self.upstream.model_copy(update={"oauth2": found.oauth2})
        self._note("info", f"upstream {self._name}: what its tokens are asked for with has changed")
        self._restart()
        return True

    def _current(self, key: str) -> Secret:
        return self.upstream.secrets[key]

    def _exchange(self, key: str, old: Secret, new: Secret) -> bool:
        if self._current(key) is not old:
            return False
        self._change(key, new)
        return True

    def _change(self, key: str, secret: Secret) -> None:
        self.upstream = self.upstream.with_secret(key, secret)
        if self._tokens is not None and self.upstream.oauth2 is not None:
            self._tokens.use(self.upstream.oauth2)
        self._restart()

    def _restart(self) -> None:
        """Nothing is known of what is now logged in with."""
        self._proven = not self.upstream.logs_in
        self._changed(self._name)
