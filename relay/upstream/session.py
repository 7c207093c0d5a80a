"""Open one session to one host of an upstream: connect, TLS, EHLO, AUTH; then send messages over it.

aiosmtplib does the opening on a connection of ours (`upstream.dial`), step by step, so that a failure is known by its phase; after
that its transport is taken over (`upstream.wire`). TLS is verified and never downgraded; one login mechanism is chosen by us and no
second one is tried.

State: the wire, what the upstream offers, how many messages it has carried.
"""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Awaitable
from typing import NoReturn, cast

import aiosmtplib

from relay.config.model import Upstream
from relay.mail.outcome import Failure, Outcome, Phase, outcome_of_failure, outcome_of_reply
from relay.mail.reply import MalformedReply, parse_reply
from relay.upstream.dial import Names, NoConnection, dial, reason_of
from relay.upstream.tls import Contexts
from relay.upstream.transaction import Offer, Outgoing, Transaction
from relay.upstream.wire import Wire

_QUIT_SECONDS = 5.0


class CannotOpen(Exception):
    """The session could not be opened; `outcome` is what that means for every recipient."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome


class Session:
    """One open, authenticated session. Carries one transaction at a time. `upstream`: the settings that it was opened with."""

    def __init__(self, wire: Wire, offer: Offer, upstream: Upstream) -> None:
        self.upstream = upstream
        self._wire = wire
        self._offer = offer
        self._dirty = False
        self._botched = False
        self.messages = 0

    @property
    def usable(self) -> bool:
        """Whether another message may be sent over it."""
        return not self._botched and self._wire.lost is None and self.messages < self.upstream.limits.messages_per_connection

    async def send(self, message: Outgoing) -> list[Outcome]:
        """One outcome for each recipient, in their order. Raises Stale when the session had ended while it was idle."""
        transaction = Transaction(self._wire, self._offer, self.upstream.timeouts, message)
        self._botched = True  # until proven otherwise: a cancelled transaction leaves the session out of step
        outcomes = await transaction.run(reused=self.messages > 0, reset=self._dirty)
        self._botched, self._dirty = transaction.botched, transaction.dirty
        self.messages += 1
        return outcomes

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the connection is closed."""
        return self._wire.ended

    def quit(self) -> None:
        """End the session politely if it is in step, at once if not."""
        if self._botched:
            self.cut()
        else:
            self._wire.quit(timeout_seconds=_QUIT_SECONDS)

    def cut(self) -> None:
        """End the session at once."""
        self._wire.close()


async def open_session(upstream: Upstream, host: str, *, ehlo: str, contexts: Contexts, names: Names) -> Session:
    """Open a session to `host` of `upstream`. Raises CannotOpen."""
    try:
        context = await contexts.get(upstream)
    except (OSError, ValueError) as error:
        _fail(Phase.TLS, Failure.UNTRUSTED, f"the CA file {upstream.ca_file} cannot be loaded: {error}")
    timeout = upstream.timeouts.connect
    try:
        connection = await dial(host, upstream.port, source_address=upstream.source_address, timeout_seconds=timeout, names=names)
    except NoConnection as error:
        _fail(error.phase, error.failure, str(error))
    client = aiosmtplib.SMTP(
        hostname=host,
        sock=connection,
        local_hostname=ehlo,
        timeout=timeout,
        use_tls=upstream.security == "tls",
        start_tls=False,
        tls_context=context,
    )
    try:
        await _connect(client, host, upstream)
        await _greet(client, host, upstream)
        if upstream.security == "starttls":
            await _start_tls(client, host, upstream, context)
        await _authenticate(client, host, upstream)
        transport = client.transport
        if transport is None or transport.is_closing():  # it left between its last reply and now
            _fail(Phase.EHLO, Failure.CLOSED, f"{host}:{upstream.port} closed the connection before the first message")
    except BaseException:
        client.close()
        raise
    return Session(Wire(cast(asyncio.Transport, transport)), _offer(client), upstream)


async def _connect(client: aiosmtplib.SMTP, host: str, upstream: Upstream) -> None:
    """The TLS handshake, where the connection begins with one, and the greeting."""
    where = f"{host}:{upstream.port}"
    try:
        await client.connect()
    except aiosmtplib.SMTPConnectTimeoutError as error:
        phase = Phase.GREETING if "ready message" in error.message else Phase.TLS
        _fail(phase, Failure.TIMEOUT, f"{where} did not answer within {upstream.timeouts.connect:g} s")
    except aiosmtplib.SMTPResponseException as error:
        _refuse(Phase.GREETING, error, where)
    except aiosmtplib.SMTPConnectError as error:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLError):
            _fail(Phase.TLS, Failure.UNTRUSTED, f"TLS with {where} failed: {_tls_reason(cause)}")
        if isinstance(cause, aiosmtplib.SMTPServerDisconnected):
            _fail(Phase.GREETING, Failure.CLOSED, f"{where} closed the connection instead of greeting")
        phase = Phase.TLS if upstream.security == "tls" else Phase.CONNECT
        _fail(phase, Failure.CLOSED, f"{where}: {reason_of(cause) if isinstance(cause, OSError) else error}")


async def _greet(client: aiosmtplib.SMTP, host: str, upstream: Upstream) -> None:
    """EHLO, or HELO where nothing that needs EHLO is asked for (RFC 5321 section 3.2)."""
    timeout = upstream.timeouts.command
    try:
        await client.ehlo(timeout=timeout)
    except aiosmtplib.SMTPHeloError as error:
        if error.code not in (500, 502, 504) or upstream.security == "starttls" or logs_in(upstream):
            _refuse(Phase.EHLO, error, host)
        await _step(Phase.EHLO, client.helo(timeout=timeout), host, upstream)
    except (aiosmtplib.SMTPException, OSError) as error:
        _translate(Phase.EHLO, error, host, upstream)


async def _start_tls(client: aiosmtplib.SMTP, host: str, upstream: Upstream, context: ssl.SSLContext | None) -> None:
    if not client.supports_extension("starttls"):
        _fail(Phase.STARTTLS, Failure.LACKING, f"{host}:{upstream.port} does not offer STARTTLS, and mail does not go without")
    try:
        await client.starttls(tls_context=context, server_hostname=host, timeout=upstream.timeouts.command)
    except ssl.SSLError as error:
        _fail(Phase.TLS, Failure.UNTRUSTED, f"TLS with {host}:{upstream.port} failed: {_tls_reason(error)}")
    except (aiosmtplib.SMTPException, OSError) as error:
        # The library says of its own words which of the two steps it was.
        _translate(Phase.TLS if "upgrading transport" in str(error) else Phase.STARTTLS, error, host, upstream)
    await _step(Phase.EHLO, client.ehlo(timeout=upstream.timeouts.command), host, upstream)


async def _authenticate(client: aiosmtplib.SMTP, host: str, upstream: Upstream) -> None:
    if not logs_in(upstream):
        return
    assert upstream.username is not None and upstream.password is not None, "the configuration has both or none"
    offered = [mechanism.lower() for mechanism in client.server_auth_methods]
    known = {"plain": client.auth_plain, "login": client.auth_login, "cram-md5": client.auth_crammd5}
    wanted = list(known) if upstream.auth == "auto" else [upstream.auth]
    chosen = next((mechanism for mechanism in wanted if mechanism in offered), None)
    if chosen is None:
        text = f"none of {', '.join(wanted)} is offered for the login (offered: {', '.join(offered) or 'nothing'})"
        _fail(Phase.AUTH, Failure.LACKING, text)
    login = known[chosen](upstream.username, upstream.password.reveal(), timeout=upstream.timeouts.command)
    try:
        await _step(Phase.AUTH, login, host, upstream)
    except CannotOpen as error:
        reply = error.outcome.reply
        raise CannotOpen(error.outcome._replace(reply=reply._replace(text=_without_secret(reply.text, upstream)))) from None


def _without_secret(text: str, upstream: Upstream) -> str:
    """What an upstream said to a login: a few repeat the line they did not like, and the log is no place for it."""
    assert upstream.username is not None and upstream.password is not None, "the configuration has both or none"
    user, secret = upstream.username, upstream.password.reveal()
    for told in (b64encode(f"\0{user}\0{secret}".encode()).decode(), b64encode(secret.encode()).decode(), secret):
        text = text.replace(told, "(secret)") if told else text
    return text


async def _step(phase: Phase, work: Awaitable[object], host: str, upstream: Upstream) -> None:
    try:
        await work
    except (aiosmtplib.SMTPException, OSError) as error:
        _translate(phase, error, host, upstream)


def _translate(phase: Phase, error: Exception, host: str, upstream: Upstream) -> NoReturn:
    """The library's error, raised in `phase`, in our words."""
    if isinstance(error, aiosmtplib.SMTPResponseException):
        _refuse(phase, error, host)
    if isinstance(error, TimeoutError):
        _fail(phase, Failure.TIMEOUT, f"{host} did not answer {phase.name} within {upstream.timeouts.command:g} s")
    if isinstance(error, ConnectionError):
        _fail(phase, Failure.CLOSED, f"{host} closed the connection at {phase.name}")
    _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {error}")


def _refuse(phase: Phase, error: aiosmtplib.SMTPResponseException, host: str) -> NoReturn:
    """A negative reply, or (code -1) something that is no reply."""
    if error.code < 200:
        _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {error.message}")
    lines = [f"{error.code} {line}".encode("utf-8", "replace") for line in error.message.split("\n")]
    try:
        reply = parse_reply(lines)
    except MalformedReply as nonsense:
        _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {nonsense}")
    raise CannotOpen(outcome_of_reply(phase, reply)) from None


def _fail(phase: Phase, failure: Failure, text: str) -> NoReturn:
    raise CannotOpen(outcome_of_failure(phase, failure, text)) from None


def logs_in(upstream: Upstream) -> bool:
    """Whether mail goes there with a login."""
    return upstream.username is not None and upstream.auth != "none"


def _offer(client: aiosmtplib.SMTP) -> Offer:
    extensions = client.esmtp_extensions
    limit = extensions.get("size", "")
    return Offer(
        pipelining="pipelining" in extensions,
        eight_bit="8bitmime" in extensions,
        smtputf8="smtputf8" in extensions,
        size="size" in extensions,
        size_limit=int(limit) if limit.isascii() and limit.isdigit() else 0,
        chunking="chunking" in extensions,
        dsn="dsn" in extensions,
    )


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.reason or str(error)
