"""Open one session to one host of an upstream: connect, TLS, EHLO, AUTH.

aiosmtplib does the opening on a connection of ours (`upstream.dial`), step by step, so that a failure is known by its phase; after
that its transport is taken over (`upstream.wire`). TLS is verified and never downgraded; one login mechanism is chosen by us and no
second one is tried. State: none.
"""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, NoReturn, cast

import aiosmtplib

from relay.config.upstreams import Upstream
from relay.mail.outcome import Failure, Meaning, Outcome, Phase, Scope, outcome_of_failure, outcome_of_reply, row_for
from relay.mail.reply import MalformedReply, parse_reply, told
from relay.upstream.dial import Names, NoConnection, dial, reason_of
from relay.upstream.echo import without_secrets
from relay.upstream.expiry import validity_of
from relay.upstream.session import Session
from relay.upstream.tls import Contexts, Unusable
from relay.upstream.transaction import Offer
from relay.upstream.wire import Wire
from relay.upstream.xoauth2 import initial_response, meaning_of

# What the other side says of us, which OpenSSL's words do not tell from what we say of it.
_NOT_OURS = "it does not accept our client certificate"
_ALERTS: Mapping[str, str] = MappingProxyType({
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a client certificate, see client_certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it found nothing in common with us, or wants a client certificate, see client_certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust who issued our client certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it says that our client certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it says that our client certificate is revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _NOT_OURS,
    "SSLV3_ALERT_BAD_CERTIFICATE": _NOT_OURS,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _NOT_OURS,
    "TLSV1_ALERT_DECRYPT_ERROR": _NOT_OURS,
    "TLSV1_ALERT_ACCESS_DENIED": _NOT_OURS,
})  # fmt: skip


class Seen(NamedTuple):
    """What a session being opened has seen so far, for people. `here`: our own address on this connection."""

    here: str
    said: str = ""
    extensions: Mapping[str, str] = MappingProxyType({})
    mechanism: str = ""
    tls: ssl.SSLObject | None = None


_Mechanism = Callable[..., Awaitable[object]]
_PIECE = 8  # characters of a secret: six octets of what is in base64; shorter ones are found in ordinary words
_DIGITS = 20  # of a number in what is offered (RFC 1870 section 4)

#: Told of each phase that a session being opened has passed, with what was seen in it.
Witness = Callable[[Phase, Seen], None]


class CannotOpen(Exception):
    """The session could not be opened; `outcome` is what that means for every recipient. `failure`: None where a reply said so.
    `meaning`: of that reply as it came, where it is known and words of a secret have been taken out since."""

    def __init__(self, outcome: Outcome, failure: Failure | None = None, *, meaning: Meaning | None = None) -> None:
        super().__init__(str(outcome.reply))
        self.outcome = outcome
        self.failure = failure
        self.meaning = meaning

    @property
    def of_this_host(self) -> bool:
        """Whether it speaks of one host or address, and another one may take us."""
        return not (self.outcome.scope is Scope.CREDENTIAL or self.outcome.throttled or self.outcome.phase is Phase.AUTH)


async def open_session(
    upstream: Upstream, host: str, *, ehlo: str, contexts: Contexts, names: Names, witness: Witness | None = None
) -> Session:
    """Open a session to `host` of `upstream`. Raises CannotOpen."""
    try:
        context = await contexts.get(upstream)
    except Unusable as error:
        _fail(Phase.TLS, Failure.UNTRUSTED, str(error))
    timeout = upstream.timeouts.connect
    try:
        connection, address = await dial(host, upstream.port, source_address=upstream.source_address, timeout_seconds=timeout, names=names)
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
        transport = await _pass_phases(client, host, upstream, context, partial(_tell, witness, client, str(connection.getsockname()[0])))
    except BaseException as error:
        if isinstance(error, CannotOpen) and error.of_this_host:
            names.failed(address)
        opened = client.transport
        client.close()
        if opened is not None:
            # Closing waits half a minute for a server that does not answer the end of TLS, as Exim with GnuTLS does not.
            cast(asyncio.Transport, opened).abort()
        raise
    names.answered(address)
    validity = validity_of(transport.get_extra_info("peercert"))  # taken apart with the handshake; a second time costs as much
    session = Session(Wire(transport), _offer(client), upstream, validity=validity, limits=_limits(client))
    client.protocol = client.transport = None  # the library's two objects know each other: what TLS holds would wait for the collector
    return session


async def _pass_phases(
    client: aiosmtplib.SMTP, host: str, upstream: Upstream, context: ssl.SSLContext | None, tell: Callable[..., None]
) -> asyncio.Transport:
    """From a connection that was just made to one that may carry mail: one phase after the other, each told. Raises CannotOpen."""
    tell(Phase.CONNECT)
    greeting = await _connect(client, host, upstream)
    tell(Phase.GREETING, said=greeting)
    await _greet(client, host, upstream)
    tell(Phase.EHLO)
    if upstream.security == "starttls":
        await _start_tls(client, host, upstream, context)
        tell(Phase.STARTTLS)
    if mechanism := await _authenticate(client, host, upstream):
        tell(Phase.AUTH, mechanism=mechanism)
    transport = client.transport
    if transport is None or transport.is_closing():  # it left between its last reply and now
        _fail(Phase.EHLO, Failure.CLOSED, f"{host}:{upstream.port} closed the connection before the first message")
    return cast(asyncio.Transport, transport)


def _tell(
    witness: Witness | None, client: aiosmtplib.SMTP, here: str, phase: Phase, *, said: str = "", mechanism: str = ""
) -> None:  # fmt: skip
    if witness is not None:
        tls = client.transport.get_extra_info("ssl_object") if client.transport is not None else None
        offers = {told(name): told(value) for name, value in client.esmtp_extensions.items()}
        witness(phase, Seen(here, told(said), offers, mechanism, tls))


async def _connect(client: aiosmtplib.SMTP, host: str, upstream: Upstream) -> str:
    """The TLS handshake, where the connection begins with one, and the greeting, which is answered."""
    where = f"{host}:{upstream.port}"
    try:
        return (await client.connect()).message
    except aiosmtplib.SMTPConnectTimeoutError as error:
        phase = Phase.GREETING if "ready message" in error.message else Phase.TLS
        _fail(phase, Failure.TIMEOUT, f"{where} did not answer within {upstream.timeouts.connect:g} s")
    except aiosmtplib.SMTPResponseException as error:
        _refuse(Phase.GREETING, error, where, upstream)
    except aiosmtplib.SMTPConnectError as error:
        _fail_in_tls(error, where)
        cause = error.__cause__
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
        if error.code not in (500, 502, 504) or upstream.security == "starttls" or upstream.logs_in:
            _refuse(Phase.EHLO, error, host, upstream)
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


async def _authenticate(client: aiosmtplib.SMTP, host: str, upstream: Upstream) -> str:
    """Log in, where the settings say so; answers the mechanism."""
    if not upstream.logs_in:
        return ""
    assert upstream.username is not None and upstream.password is not None, "the configuration has both or none"
    offered = [mechanism.lower() for mechanism in client.server_auth_methods]
    known: dict[str, _Mechanism] = {
        "plain": client.auth_plain,
        "login": partial(_login, client),
        "cram-md5": client.auth_crammd5,
        "xoauth2": partial(_xoauth2, client),
    }
    passwords = ["plain", "login", "cram-md5"]
    wanted = ["xoauth2"] if upstream.by_token else passwords if upstream.auth == "auto" else [upstream.auth]
    chosen = next((mechanism for mechanism in wanted if mechanism in offered), None)
    if chosen is None:
        text = f"none of {', '.join(wanted)} is offered for the login (offered: {', '.join(offered) or 'nothing'})"
        _fail(Phase.AUTH, Failure.LACKING, text)
    login = known[chosen](upstream.username, upstream.password.reveal(), timeout=upstream.timeouts.command)
    try:
        await _step(Phase.AUTH, login, host, upstream)
    except CannotOpen as error:
        reply = error.outcome.reply
        outcome = error.outcome._replace(reply=reply._replace(text=_without_secret(reply.text, upstream)))
        meaning = row_for(outcome.phase, error.failure or reply, own=upstream.replies).meaning
        raise CannotOpen(outcome, error.failure, meaning=meaning) from None
    return chosen


async def _login(client: aiosmtplib.SMTP, user: str, password: str, /, *, timeout: float) -> None:
    """Log in with LOGIN, whose user name waits until it is asked for: a server that takes none at once would ask for it, and be told the
    password instead, for its log."""
    response = await client.execute_command(b"AUTH", b"LOGIN", timeout=timeout)
    for answer in (user, password):
        if response.code == 334:
            response = await client.execute_command(b64encode(answer.encode()), timeout=timeout)
    if response.code != 235:
        raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)


async def _xoauth2(client: aiosmtplib.SMTP, user: str, token: str, /, *, timeout: float) -> None:
    """Log in with an access token. A refusal comes as a challenge, with JSON that says why, and then as a reply."""
    response = await client.execute_command(b"AUTH", b"XOAUTH2", initial_response(user, token), timeout=timeout)
    meaning = ""
    if response.code == 334:
        meaning = meaning_of(response.message)
        response = await client.execute_command(b"", timeout=timeout)
    if response.code != 235:
        said = f"{response.message} ({meaning})" if meaning else response.message
        raise aiosmtplib.SMTPAuthenticationError(response.code, said)


def _without_secret(text: str, upstream: Upstream) -> str:
    """What an upstream said to a login: a few repeat the line they did not like, and the log is no place for it."""
    assert upstream.username is not None and upstream.password is not None, "the configuration has both or none"
    user, secret = upstream.username, upstream.password.reveal()
    lines = (b64encode(f"\0{user}\0{secret}".encode()), initial_response(user, secret), b64encode(secret.encode()))
    return without_secrets(text, [*(line.decode() for line in lines), secret], piece=_PIECE)


async def _step(phase: Phase, work: Awaitable[object], host: str, upstream: Upstream) -> None:
    try:
        await work
    except (aiosmtplib.SMTPException, OSError) as error:
        _translate(phase, error, host, upstream)


def _translate(phase: Phase, error: Exception, host: str, upstream: Upstream) -> NoReturn:
    """The library's error, raised in `phase`, in our words."""
    if isinstance(error, aiosmtplib.SMTPResponseException):
        _refuse(phase, error, host, upstream)
    if isinstance(error, TimeoutError):
        _fail(phase, Failure.TIMEOUT, f"{host} did not answer {phase.name} within {upstream.timeouts.command:g} s")
    if isinstance(error, ConnectionError):
        _fail_in_tls(error, f"{host}:{upstream.port}")
        _fail(phase, Failure.CLOSED, f"{host} closed the connection at {phase.name}")
    _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {error}")


def _refuse(phase: Phase, error: aiosmtplib.SMTPResponseException, host: str, upstream: Upstream) -> NoReturn:
    """A negative reply, or (code -1) something that is no reply."""
    if error.code < 200:
        _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {error.message}")
    lines = [f"{error.code} {line}".encode("utf-8", "replace") for line in error.message.split("\n")]
    try:
        reply = parse_reply(lines)
    except MalformedReply as nonsense:
        _fail(phase, Failure.NONSENSE, f"{host} at {phase.name}: {nonsense}")
    raise CannotOpen(outcome_of_reply(phase, reply, own=upstream.replies)) from None


def _fail(phase: Phase, failure: Failure, text: str) -> NoReturn:
    raise CannotOpen(outcome_of_failure(phase, failure, text), failure) from None


def _offer(client: aiosmtplib.SMTP) -> Offer:
    extensions = client.esmtp_extensions
    limit = extensions.get("size", "")
    return Offer(
        pipelining="pipelining" in extensions,
        eight_bit="8bitmime" in extensions,
        smtputf8="smtputf8" in extensions,
        size="size" in extensions,
        size_limit=_number(limit),
        chunking="chunking" in extensions,
        dsn="dsn" in extensions,
    )


def _limits(client: aiosmtplib.SMTP) -> dict[str, int]:
    """What the upstream says of its limits (RFC 9422): a name and a number each, and what is not is passed over."""
    pairs = (word.partition("=") for word in client.esmtp_extensions.get("limits", "").upper().split())
    return {name: number for name, _, digits in pairs if (number := _number(digits))}


def _number(text: str) -> int:
    """A number that was offered; 0 for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else 0


def _fail_in_tls(error: BaseException, where: str) -> None:
    """Say so, if it was TLS. In version 1.3 the server looks at a client's certificate when the client is done and goes on."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__
    if cause is not None:
        _fail(Phase.TLS, Failure.UNTRUSTED, f"TLS with {where} failed: {_tls_reason(cause)}")


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = error.reason or str(error)
    return f"{_ALERTS[reason]} ({reason})" if reason in _ALERTS else reason
