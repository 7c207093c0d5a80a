"""Try an upstream step by step, the way mail goes there, and say what each step found and what a failure means.

Every host and every address is tried: connected to, encrypted, greeted. The login is tried once for each host and never again after a
refusal, for providers lock accounts; a test message is sent once. Sessions are opened by the same code that opens them for mail.

State: what was found so far. Laws: one diagnosis for each failure; neither secret nor token is among what is found.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from relay.clock import SystemClock
from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure, Meaning, Outcome, Phase, Scope, Status, outcome_of_failure, row_for
from relay.mail.reply import Reply
from relay.upstream.case import Case
from relay.upstream.diagnosis import Diagnosis, diagnose
from relay.upstream.dial import Names, family_of
from relay.upstream.look import (
    NOTHING_SEEN,
    Look,
    address_towards,
    days_left,
    look_at_plain,
    look_at_tls,
    look_for_ports,
    read_certificate,
)
from relay.upstream.oauth2 import Tokens
from relay.upstream.opening import CannotOpen, Seen, Witness, open_session
from relay.upstream.session import Session
from relay.upstream.tls import Contexts, Unusable
from relay.upstream.token_error import TokenError
from relay.upstream.token_store import TokenStore
from relay.upstream.token_threads import TokenThreads
from relay.upstream.transaction import Outgoing

#: A server that greets takes less; one that waits for TLS would keep us for all of `timeouts.connect`.
_SILENT_SECONDS: Final = 3.0
_LEAVE_SECONDS: Final = 2.0
#: Let's Encrypt renews a month before the end: with so little left, something is wrong with that.
_SOON_DAYS: Final = 14
_NO_FACTS: Final[Mapping[str, Any]] = MappingProxyType({})


class Step(NamedTuple):
    """One step that was taken, with what it found for people, and for scripts. `seconds`: None where it came with the one before."""

    name: str
    seconds: float | None
    found: str
    facts: Mapping[str, Any] = _NO_FACTS


class FailedStep(NamedTuple):
    """A step that failed. `seconds`: how long it took to."""

    phase: Phase
    seconds: float
    reply: Reply
    diagnosis: Diagnosis


class Trial(NamedTuple):
    """What came of one address; none where the host's name led nowhere. `complete`: mail could go this way."""

    host: str
    address: str
    steps: Sequence[Step]
    trouble: FailedStep | None = None
    complete: bool = False


class Findings(NamedTuple):
    """All trials. `remarks`: what works and should be looked at all the same."""

    trials: Sequence[Trial]
    remarks: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether mail can go: by one way, as the relay needs no more."""
        return any(trial.complete for trial in self.trials)

    @property
    def trouble(self) -> FailedStep | None:
        """Of a test that failed, the one to speak of: where it came furthest."""
        if self.ok:
            return None
        order = list(Phase)
        troubles = [trial.trouble for trial in self.trials if trial.trouble is not None]
        return max(troubles, key=lambda trouble: order.index(trouble.phase), default=None)


#: Told of what comes of a host's address, as it comes.
Told = Callable[[str, str, Step | FailedStep], None]

#: Opens a session to a host with these settings, where these names say it is.
Open = Callable[[Upstream, str, Names, Witness], Awaitable[Session]]


class Examination:
    """The examination of one upstream, once."""

    def __init__(
        self, name: str, upstream: Upstream, *, opener: Open, names: Names, told: Told, message: Outgoing | None = None,
        tokens: Tokens | None = None,
    ) -> None:  # fmt: skip
        """`message` is sent at the end. `tokens`: where the login is with an access token."""
        self._name = name
        self._upstream = upstream
        self._opener = opener
        self._names = names
        self._told = told
        self._message = message
        self._tokens = tokens
        self._logged_in: set[str] = set()  # hosts where the login has been tried
        self._refused = False
        self._untaken = False  # the message was given to somebody, and not taken
        self._remarks: list[str] = []

    async def run(self) -> Findings:
        trials = [] if self._tokens is None else await self._get_token(self._tokens)
        for host in self._upstream.host:
            trials += await self._try_host(host)
        if any(trial.complete for trial in trials):
            for trial in trials:
                if trial.trouble is not None:
                    where = f"{trial.host} ({trial.address})" if trial.address else trial.host
                    self._remarks.append(f"mail can go, but not by {where}: {trial.trouble.diagnosis.what}")
            self._remark_settings()
        return Findings(trials, tuple(dict.fromkeys(self._remarks)))

    def _remark_settings(self) -> None:
        if self._upstream.security == "none" and self._upstream.logs_in:
            self._remarks.append("the password goes in clear text: say `security: starttls` or `tls` where the server has it")
        if self._upstream.security != "none" and not self._upstream.verify:
            self._remarks.append("the certificate is not checked (`verify: false`): anybody in between can read mail and password")

    async def _get_token(self, tokens: Tokens) -> list[Trial]:
        """Have a token for the login. Answers what went wrong."""
        begun, host = time.monotonic(), tokens.host
        try:
            token = await tokens.get()
        except TokenError as error:
            self._refused = True
            outcome = outcome_of_failure(Phase.AUTH, error.failure, str(error))
            return [Trial(host, "", (), await self._explain(outcome, error.failure, host, "", time.monotonic() - begun, Seen("")))]
        self._upstream = self._upstream.with_secret("password", token)
        self._told(host, "", Step("token", time.monotonic() - begun, "an access token"))
        return []

    # -- one host ---------------------------------------------------------------------------------------------------------

    async def _try_host(self, host: str) -> list[Trial]:
        begun = time.monotonic()
        try:
            addresses = await self._addresses(host)
        except CannotOpen as error:
            trouble = await self._explain(error.outcome, error.failure, host, "", time.monotonic() - begun, Seen(""))
            return [Trial(host, "", (), trouble)]
        listed = ", ".join(address[0] for _, address in addresses)
        resolved = Step("resolve", time.monotonic() - begun, listed, {"addresses": [address[0] for _, address in addresses]})
        self._told(host, "", resolved)
        return [await self._try_address(host, family, address, resolved) for family, address in addresses]

    async def _addresses(self, host: str) -> list[tuple[int, Any]]:
        """Where the host is: each address once. Raises CannotOpen."""
        upstream, failure = self._upstream, Failure.UNREACHABLE
        try:
            async with asyncio.timeout(upstream.timeouts.connect):
                found = await self._names.find(host, upstream.port, family_of(upstream.source_address))
            if found:
                return [(family, address) for family, address in {address[0]: (family, address) for family, address in found}.values()]
            text = "it has no address"
        except TimeoutError:
            failure, text = Failure.TIMEOUT, f"it could not be resolved within {upstream.timeouts.connect:g} s"
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
        raise CannotOpen(outcome_of_failure(Phase.RESOLVE, failure, text), failure)

    # -- one address ------------------------------------------------------------------------------------------------------

    async def _try_address(self, host: str, family: int, address: Any, resolved: Step) -> Trial:
        steps, where = [resolved], str(address[0])
        last, seen = time.monotonic(), Seen("")

        def witness(phase: Phase, found: Seen) -> None:
            nonlocal last, seen
            now = time.monotonic()
            for step in _steps(phase, found, now - last, self._upstream, before=seen.extensions):
                steps.append(step)
                self._told(host, where, step)
            if phase is not Phase.AUTH and found.tls is not None:
                self._remark_certificate(found)
            last, seen = now, found

        settings = self._settings(host)
        opening = self._opener(settings, host, _Single(family, address), witness)
        try:
            session = await self._opened(asyncio.ensure_future(opening), where, host, steps)
        except CannotOpen as error:
            outcome, failure = error.outcome, error.failure
            self._note_login(host, settings, outcome)
            trouble = await self._explain(outcome, failure, host, where, time.monotonic() - last, seen, meaning=error.meaning)
            return Trial(host, where, steps, trouble)
        self._note_login(host, settings, None)
        try:
            complete = (settings.logs_in or not self._upstream.logs_in) and not self._untaken
            if complete and self._message is not None:
                outcome = await self._send(session, self._message)
                if outcome.status is not Status.SENT:
                    self._untaken = True
                    trouble = await self._explain(outcome, _failure_of(outcome), host, where, time.monotonic() - last, seen)
                    return Trial(host, where, steps, trouble)
                steps.append(Step("message", time.monotonic() - last, str(outcome.reply), {"reply": str(outcome.reply)}))
                self._told(host, where, steps[-1])
            return Trial(host, where, steps, complete=complete)
        finally:
            await _leave(session)

    def _settings(self, host: str) -> Upstream:
        """With the login where it is still to be tried; without it elsewhere."""
        if not self._upstream.logs_in or not (self._refused or host in self._logged_in):
            return self._upstream
        return self._upstream.model_copy(update={"auth": "none"})

    def _note_login(self, host: str, used: Upstream, outcome: Outcome | None) -> None:
        """Remember what became of the login. `outcome`: None where it succeeded."""
        if not used.logs_in:
            return
        if outcome is None:
            self._logged_in.add(host)
        elif outcome.phase is Phase.AUTH or outcome.scope is Scope.CREDENTIAL:
            self._refused = True

    async def _send(self, session: Session, message: Outgoing) -> Outcome:
        self._message = None  # whatever comes of it, it goes once
        return (await session.send(message))[0]

    async def _opened(self, opening: "asyncio.Future[Session]", address: str, host: str, steps: Sequence[Step]) -> Session:
        """The session, once it is open. One who says nothing is looked at meanwhile: he may be waiting for TLS. Raises CannotOpen."""
        try:
            done, _ = await asyncio.wait({opening}, timeout=_SILENT_SECONDS)
            silent = not done and steps[-1].name == "connect" and self._upstream.security != "tls"
            if silent and (await self._look_at_tls(address, host)).tls:
                text = f"no greeting within {_SILENT_SECONDS:g} s"
                raise CannotOpen(outcome_of_failure(Phase.GREETING, Failure.TIMEOUT, text), Failure.TIMEOUT)
            return await opening
        finally:
            if not opening.done():
                opening.cancel()
                await asyncio.wait({opening})

    # -- what it means ----------------------------------------------------------------------------------------------------

    async def _explain(
        self, outcome: Outcome, failure: Failure | None, host: str, address: str, seconds: float, seen: Seen, *,
        meaning: Meaning | None = None,
    ) -> FailedStep:  # fmt: skip
        upstream, reply = self._upstream, outcome.reply
        if meaning is None:
            meaning = row_for(outcome.phase, failure or reply, own=upstream.replies).meaning if failure or reply.code else Meaning.OTHER
        if meaning is Meaning.CREDENTIAL and upstream.by_token:
            meaning = Meaning.TOKEN  # servers refuse a token in the words that they have for a password
        here = upstream.source_address or seen.here or (address_towards(address) if address else "")
        look = await self._look_again(outcome.phase, failure, address, host)
        case = Case(upstream, host, address, outcome.phase, reply, failure, meaning, here, bool(seen.here), seen.extensions, look)
        provider = upstream.known.help
        trouble = FailedStep(outcome.phase, seconds, reply, diagnose(case, name=self._name, provider_help=provider))
        self._told(host, address, trouble)
        return trouble

    async def _look_again(self, phase: Phase, failure: Failure | None, address: str, host: str) -> Look:
        """What else there is to see where it has failed."""
        upstream = self._upstream
        if phase is Phase.CONNECT or (phase is Phase.STARTTLS and failure is Failure.LACKING):
            return await look_for_ports(address, other_than=upstream.port, source=upstream.source_address)
        if phase not in (Phase.TLS, Phase.GREETING):
            return NOTHING_SEEN
        seen = await self._look_at_tls(address, host, starttls=phase is Phase.TLS and upstream.security == "starttls")
        if seen.tls or upstream.security != "tls":
            return seen
        return await look_at_plain(address, upstream.port, source=upstream.source_address)

    async def _look_at_tls(self, address: str, host: str, *, starttls: bool = False) -> Look:
        return await look_at_tls(address, self._upstream.port, host=host, source=self._upstream.source_address, starttls=starttls)

    def _remark_certificate(self, seen: Seen) -> None:
        der = seen.tls.getpeercert(binary_form=True) if seen.tls is not None else None
        if der:
            certificate = read_certificate(der)
            if (days := days_left(certificate)) < _SOON_DAYS:
                name = ", ".join(certificate.names[:3])
                self._remarks.append(f"the certificate for {name} expires on {certificate.until:%Y-%m-%d}, in {days} days")


class _Single(Names):
    """A resolver that knows one address, for trying that one alone."""

    def __init__(self, family: int, address: Any) -> None:
        super().__init__()
        self._found = [(family, address)]

    async def find(self, host: str, port: int, family: int) -> list[tuple[int, Any]]:
        return self._found


async def _leave(session: Session) -> None:
    session.quit()
    await asyncio.wait([session.ended], timeout=_LEAVE_SECONDS)
    session.cut()


def _failure_of(outcome: Outcome) -> Failure | None:
    """What kind of failure an outcome without a reply speaks of."""
    if outcome.reply.code:
        return None
    return Failure.LACKING if outcome.status is Status.FAILED else Failure.CLOSED


def _steps(phase: Phase, seen: Seen, seconds: float, upstream: Upstream, *, before: Mapping[str, str]) -> list[Step]:
    """What was seen in a phase, as steps. `before`: the extensions offered until then."""
    match phase:
        case Phase.CONNECT:
            return [Step("connect", seconds, f"from {seen.here}", {"from": seen.here})]
        case Phase.GREETING:
            greeting = Step("greeting", None if upstream.security == "tls" else seconds, seen.said, {"said": seen.said})
            return [_tls_step("tls", seconds, seen), greeting] if upstream.security == "tls" else [greeting]
        case Phase.EHLO:
            return [Step("ehlo", seconds, _offers(seen.extensions), {"extensions": dict(seen.extensions)})]
        case Phase.STARTTLS:
            new = {name: value for name, value in seen.extensions.items() if before.get(name) != value}
            step = _tls_step("starttls", seconds, seen)
            facts = {**step.facts, "extensions": dict(seen.extensions)}
            return [step._replace(found=f"{step.found}; then {_offers(new)}" if new else step.found, facts=facts)]
        case Phase.AUTH:
            mechanism = seen.mechanism.upper()
            facts = {"mechanism": mechanism, "username": upstream.username}
            return [Step("auth", seconds, f"{mechanism}, as {upstream.username}", facts)]
    return []


def _tls_step(name: str, seconds: float, seen: Seen) -> Step:
    """A handshake: version, cipher, certificate."""
    if seen.tls is None:
        return Step(name, seconds, "")
    version, cipher = seen.tls.version() or "TLS", (seen.tls.cipher() or ("",))[0]
    words = [f"{version} {cipher}"]
    facts: dict[str, Any] = {"version": version, "cipher": cipher}
    if der := seen.tls.getpeercert(binary_form=True):
        found = read_certificate(der)
        more = f" and {len(found.names) - 1} more" if len(found.names) > 1 else ""
        words.append(f"certificate for {(found.names or ('nobody',))[0]}{more}, by {found.issuer}, until {found.until:%Y-%m-%d}")
        facts["certificate"] = {"names": list(found.names), "issuer": found.issuer, "until": found.until.isoformat()}
    return Step(name, seconds, "; ".join(words), facts)


def _offers(extensions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}".strip().upper() for name, value in extensions.items()) or "no extensions"


async def examine(
    name: str, upstream: Upstream, *, ehlo: str, told: Told, message: Outgoing | None = None, store: TokenStore | None = None
) -> Findings:
    """Examine `upstream`, called `name`, as the relay would use it. `store`: its refresh token, where it has `oauth2`."""
    clock = SystemClock()
    contexts = Contexts(clock=clock, note=_unheard)
    tokens = None
    if store is not None and upstream.by_token:
        tokens = Tokens(name, upstream, store=store, threads=TokenThreads(), clock=clock, note=_unheard)

    def opener(settings: Upstream, host: str, names: Names, witness: Witness) -> Awaitable[Session]:
        return open_session(settings, host, ehlo=ehlo, contexts=contexts, names=names, witness=witness)

    with contextlib.suppress(Unusable):  # told when a session is opened; what it takes to load it is no part of a connection's time
        await contexts.get(upstream)
    return await Examination(name, upstream, opener=opener, names=Names(), told=told, message=message, tokens=tokens).run()


def _unheard(level: str, what: str) -> None:
    """What is noted beside the steps."""
