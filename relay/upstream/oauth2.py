"""The access token of one upstream: asked for once for all who need it, some time before the last one expires, and anew when refused.

Whoever waits may be cancelled; the request goes on in its thread to its end, because the token that it used may be spent. A rotated
refresh token is stored before anything is done with the answer.

State, for each upstream: its settings with their secrets as last read, the token, the request under way, and the last failure for a
while. Laws: one request at a time; who has failed a moment ago is not asked again; tokens are handed on and never told.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from relay.clock import Clock
from relay.config.oauth import OAuth2, TokenServer, token_server
from relay.config.secrets import Secret, Use
from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure
from relay.upstream.token_error import TokenError
from relay.upstream.token_store import Chain, Slot, StoreError, TokenStore, Unreadable
from relay.upstream.token_threads import TokenThreads
from relay.upstream.watch import Note

#: A new token is asked for when a fifth of the old one's time is left, but not earlier than this; an hour is usual.
_EARLY_SECONDS: Final = 300.0
_LIFETIME_SECONDS: Final = 600.0  # of a token whose server does not say (RFC 6749 section 5.1 only recommends it)
_LONGEST_SECONDS: Final = 86_400.0
#: Longer than a request takes; its thread is not given up, only the waiting for it.
_WAIT_SECONDS: Final = 30.0
#: Whoever asks so soon after a failure shares it.
_SHARED_SECONDS: Final = 5.0
_TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")


class Granted(NamedTuple):
    """An access token and for how long it is good. `warning`: what an operator should know of how it was got."""

    token: Secret
    seconds: float
    warning: str = ""


class Found(NamedTuple):
    """What tokens are asked for with, as it is now. `signed`: the stored sign-in."""

    oauth2: OAuth2
    signed: str


class Asker:
    """Asks for a token, in the caller's thread. `seen`: the stored sign-in that was found last."""

    def __init__(self, name: str, upstream: Upstream, *, store: TokenStore, clock: Clock) -> None:
        assert upstream.oauth2 is not None and upstream.username is not None, "the configuration sees to it"
        self._name = name
        self._subject = upstream.oauth2.subject or upstream.username
        self._provider = upstream.provider
        self._store = store
        self._clock = clock
        self._unsaved: tuple[str, Chain] | None = None  # and which sign-in was stored then
        self.seen = ""

    def server(self, oauth2: OAuth2) -> TokenServer:
        return token_server(oauth2, self._provider)

    def ask(self, oauth2: OAuth2, trust: ssl.SSLContext) -> Granted:
        """A new token. Raises TokenError."""
        server = self.server(oauth2)
        form = {"client_id": oauth2.client_id or "", "client_secret": oauth2.client_secret.reveal() if oauth2.client_secret else ""}
        form = {key: value for key, value in form.items() if value} | ({"scope": server.scope} if server.scope else {})
        if oauth2.grant == "refresh_token":
            return self._refresh(oauth2, server, form, trust)
        if oauth2.grant == "client_credentials":
            form["grant_type"] = "client_credentials"
        else:
            form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": self._assertion(oauth2, server)}
        answer = _ask(server, form, trust)
        return Granted(*_token_in(answer))

    def _assertion(self, oauth2: OAuth2, server: TokenServer) -> str:
        from relay.upstream.assertion import assertion  # cryptography costs 40 ms, and few have service accounts

        assert oauth2.service_account is not None, "it is the grant"
        try:
            return assertion(
                oauth2.service_account, audience=server.token_url, scope=server.scope, subject=self._subject, now=self._clock.now()
            )
        except ValueError as error:
            raise TokenError(Failure.REFUSED, str(error)) from None

    def _refresh(self, oauth2: OAuth2, server: TokenServer, form: dict[str, str], trust: ssl.SSLContext) -> Granted:
        try:
            with self._store.slot(self._name) as slot:
                chain, warning = self._chain(oauth2, server, slot)
                slot.prepare()
                form |= {"grant_type": "refresh_token", "refresh_token": chain.refresh_token}
                try:
                    answer = _ask(server, form, trust)
                except TokenError as error:
                    raise self._explained(error) from None
                rotated = answer.get("refresh_token")
                if isinstance(rotated, str) and rotated and rotated != chain.refresh_token:
                    warning = self._keep(slot, chain._replace(refresh_token=rotated)) or warning
                return Granted(*_token_in(answer), warning)
        except StoreError as error:
            raise TokenError(Failure.UNREACHABLE, f"no place for the refresh token: {error}") from None

    def _chain(self, oauth2: OAuth2, server: TokenServer, slot: Slot) -> tuple[Chain, str]:
        """The refresh token to use, and a warning. Raises TokenError and OSError."""
        stored, warning = self._stored(slot)
        if self._unsaved is not None:  # what was not stored then is not used before it is stored now
            signed, unsaved = self._unsaved
            if stored is None or stored.signed == signed:  # else somebody has signed in since
                slot.save(unsaved)
                stored = unsaved
            self._unsaved = None
        configured = oauth2.refresh_token.reveal() if oauth2.refresh_token is not None else ""
        client = client_of(oauth2, server)
        self.seen = stored.signed if stored is not None else ""
        if stored is not None and stored.client == client and configured in ("", stored.began):
            return stored, warning
        if configured:
            return Chain(configured, configured, client), warning
        if stored is not None:
            warning = "the stored refresh token is another client's: client_id or token_url has changed"
        text = f"{warning or 'there is no refresh token'}; sign in with `relay oauth login {self._name}`"
        raise TokenError(Failure.REFUSED, text, sign_in=True)

    def _stored(self, slot: Slot) -> tuple[Chain | None, str]:
        """What is stored, and a warning where it cannot be read. Raises OSError."""
        try:
            return slot.load(), ""
        except Unreadable as error:
            return None, f"the stored refresh token cannot be read: {error}"

    def _keep(self, slot: Slot, chain: Chain) -> str:
        """Store a rotated token; what to say where that fails: the access token is good all the same."""
        try:
            slot.save(chain)
        except OSError as error:
            self._unsaved = self.seen, chain
            return f"its new refresh token cannot be stored, and is lost when the relay ends: {error.strerror or error}"
        return ""

    def _explained(self, error: TokenError) -> TokenError:
        if not error.sign_in:
            return error
        text = f"{error}; sign in again with `relay oauth login {self._name}`"
        return TokenError(error.failure, text, error=error.error, sign_in=True, wait_seconds=error.wait_seconds)


class Tokens:
    """The token of one upstream."""

    def __init__(
        self, name: str, upstream: Upstream, *, store: TokenStore, threads: TokenThreads, clock: Clock, note: Note
    ) -> None:  # fmt: skip
        assert upstream.oauth2 is not None, "only then there are tokens"
        self._name = name
        self._oauth2 = upstream.oauth2
        self._asker = Asker(name, upstream, store=store, clock=clock)
        self._store = store
        self._threads = threads
        self._clock = clock
        self._note = note
        self._token: Secret | None = None
        self._early_at = self._expires_at = self._again_at = 0.0  # monotonic
        self._trouble: TokenError | None = None
        self._flight: asyncio.Future[Granted | TokenError] | None = None
        self._asked: OAuth2 | None = None  # what the last request was made with

    async def get(self) -> Secret:
        """A token that is good for a while. Raises TokenError."""
        while True:
            now = self._clock.monotonic()
            if self._token is not None and now < self._early_at:
                return self._token
            left = self._token if now < self._expires_at else None
            if self._trouble is not None and now < self._again_at:
                if left is None:
                    raise self._trouble
                return left
            flight = self._flight or self._start()
            asked = self._asked
            done, _ = await asyncio.wait([flight], timeout=_WAIT_SECONDS)
            if asked is not self._oauth2:  # there are other settings by now: what was asked with the old ones says nothing of them
                continue
            result = flight.result() if done else TokenError(Failure.TIMEOUT, f"the token server {self.host} did not answer in time")
            if isinstance(result, Granted):
                return result.token
            if left is None:
                raise result
            return left

    async def renew(self) -> bool:
        """Ask for another token than the one at hand, which was refused. Answers whether trying again says more than the refusal."""
        refused, self._token = self._token, None
        self._trouble = None
        try:
            return await self.get() != refused
        except TokenError:
            return True

    def read(self) -> Found:
        """What tokens are asked for with, as it is now. Blocks. Raises ValueError and OSError."""
        keys = ("client_secret", "refresh_token", "service_account")
        secrets = {key: secret for key in keys if (secret := getattr(self._oauth2, key)) is not None}
        changed = {key: now for key, secret in secrets.items() if (now := secret.read_again()) is not secret}
        return Found(self._oauth2.model_copy(update=changed) if changed else self._oauth2, self._read_signed())

    def take(self, found: Found) -> bool:
        """Use it from now on; answers whether it is other than what the last request was made with."""
        if found.oauth2 == self._oauth2 and found.signed == self._asker.seen:
            return False
        # A copy, as it is by its identity that a request under way is known to be older than this.
        self._oauth2, self._asker.seen = found.oauth2.model_copy(), found.signed
        self._token = self._trouble = None
        return True

    def use(self, oauth2: OAuth2) -> None:
        """Other settings."""
        self.take(Found(oauth2, self._asker.seen))

    def sign_in(self, exchange: Callable[[], None]) -> Iterator[Use]:
        """The stored sign-in, for who looks after files; `exchange` is called when there is another."""
        if self._oauth2.grant != "refresh_token":
            return
        current = Secret("", "`relay oauth login`", read=self._read_signed, path=self._store.path(self._name))

        def take(_: Secret, new: Secret) -> bool:
            nonlocal current
            current = new
            if self._asked is None or not self.take(Found(self._oauth2, new.reveal())):
                return False
            exchange()
            return True

        yield Use(f"upstream {self._name}: its sign-in", lambda: current, take)

    async def settled(self) -> None:
        """Wait for the request under way: what it brings may have to be stored."""
        if self._flight is not None:
            await asyncio.wait([self._flight])

    def _read_signed(self) -> str:
        return self._store.signed(self._name) if self._oauth2.grant == "refresh_token" else ""

    @property
    def host(self) -> str:
        return urlsplit(self._asker.server(self._oauth2).token_url).hostname or ""

    def _start(self) -> asyncio.Future[Granted | TokenError]:
        self._asked = self._oauth2
        self._flight = self._threads.run(self.host, partial(self._ask, self._oauth2))
        self._flight.add_done_callback(partial(self._land, self._asked))
        return self._flight

    def _ask(self, oauth2: OAuth2) -> Granted | TokenError:
        """In a thread: a token, or why there is none."""
        try:
            return self._asker.ask(oauth2, self._threads.trust())
        except TokenError as error:
            return error
        except Exception as error:  # its text may hold what we show
            return TokenError(Failure.NONSENSE, f"asking for a token failed unexpectedly: {type(error).__name__}")

    def _land(self, oauth2: OAuth2, flight: asyncio.Future[Granted | TokenError]) -> None:
        self._flight = None
        result, now = flight.result(), self._clock.monotonic()
        if isinstance(result, Granted) and result.warning:
            self._note("warning", f"upstream {self._name}: {result.warning}")
        if oauth2 is not self._oauth2:
            return
        if isinstance(result, TokenError):
            self._trouble, self._again_at = result, now + max(_SHARED_SECONDS, result.wait_seconds)
            return
        self._token, self._trouble = result.token, None
        self._expires_at = now + result.seconds
        self._early_at = self._expires_at - min(_EARLY_SECONDS, result.seconds / 5)


def client_of(oauth2: OAuth2, server: TokenServer) -> str:
    """For whom a refresh token is: another client's is of no use."""
    return f"{oauth2.client_id} {server.token_url}"


def _token_in(answer: dict[str, Any]) -> tuple[Secret, float]:
    """The access token and its seconds (RFC 6749 section 5.1). Raises TokenError."""
    token, kind, seconds = answer.get("access_token"), answer.get("token_type", "Bearer"), answer.get("expires_in")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise TokenError(Failure.NONSENSE, "the token server answers without a usable access_token: is the address right?")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise TokenError(Failure.NONSENSE, "the token server gives tokens of another type than Bearer")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit():  # as older servers of Microsoft's have it
        seconds = int(seconds)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        seconds = _LIFETIME_SECONDS
    return Secret(token, "the token server"), float(min(seconds, _LONGEST_SECONDS))


def _ask(server: TokenServer, form: Mapping[str, str], trust: ssl.SSLContext) -> dict[str, Any]:
    """What the server answers. Raises TokenError."""
    from relay.upstream.token_request import ask  # an HTTP client costs 25 ms, and most relays have no use for it

    shown = [form[key] for key in ("client_secret", "refresh_token", "assertion") if key in form]
    return ask(server.token_url, form, trust=trust, secrets=shown)
