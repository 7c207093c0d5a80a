"""One question to a token server (RFC 6749 section 3.2), and what is wrong where it gives no token, in plain words.

It blocks: who asks does so in a thread. TLS is verified, redirects are not followed, an answer has a limit, and proxies are those of the
environment (`https_proxy`). What a server says goes into no message before it is printable, short, and without what we have shown it.
"""

import http.client
import io
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from email.message import Message
from typing import IO, Any, Final
from urllib.parse import quote_plus, urlencode, urlsplit

from relay.mail.outcome import Failure
from relay.mail.reply import printable
from relay.upstream.dial import reason_of
from relay.upstream.echo import without_secrets
from relay.upstream.token_error import TokenError

#: For each step of a request, as curl's users set it, and for all of them together.
_STEP_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 20.0
_ANSWER_LIMIT_OCTETS: Final = 256 * 1024  # the largest tokens have some 10 KiB
_WORDS_LIMIT: Final = 300
_HEARD_LIMIT: Final = 4000  # characters that are looked through for secrets: of these come the words
_PIECE: Final = 12  # characters of a secret: a machine has made it, and the names of errors are words
_SLOW_DOWN_SECONDS: Final = 60.0
_SLOWEST_SECONDS: Final = 3600.0

#: Errors of RFC 6749 section 5.2, RFC 8628 section 3.5 and OpenID Connect, and whether signing in again helps.
_SIGN_IN: Final = {"invalid_grant", "interaction_required", "consent_required", "login_required"}
_CLIENT: Final = {
    "invalid_client": "the client_id or client_secret is wrong or has expired",
    "unauthorized_client": "this client may not ask for tokens in this way",
    "invalid_scope": "the scope is unknown there or not allowed to this client",
    "unsupported_grant_type": "the server does not give tokens in this way",
    "invalid_request": "the server does not understand what the oauth2 section makes us ask",
    "invalid_target": "the scope is for something that does not exist there",
    "access_denied": "access was denied",
}
_SLOWED: Final = {"slow_down", "rate_limit_exceeded", "too_many_requests"}
_PASSING: Final = {"temporarily_unavailable", "server_error", "internal_failure"}
# learn.microsoft.com/entra/identity-platform/reference-error-codes (2026-11); Microsoft may change them, so they only add words.
_MICROSOFT: Final = {
    "50034": "the user is unknown in this tenant",
    "50053": "the account is locked, or the address that we come from is blocked",
    "50055": "the user's password has expired",
    "50057": "the user's account is disabled",
    "50076": "the tenant wants a second factor from us: sign in anew",
    "50079": "the user must register a second factor: sign in anew",
    "50173": "the user's password was changed, which ends all sign-ins",
    "53003": "a rule of Conditional Access blocks it",
    "65001": "nobody has consented to this application's sending mail",
    "70008": "the sign-in has expired",
    "70043": "the sign-in has expired by a rule of the tenant",
    "90002": "there is no such tenant",
    "700016": "the client_id is unknown in this tenant",
    "700082": "the refresh token was not used for too long",
    "900023": "the tenant is no valid name",
    "7000215": "the client_secret is wrong: it wants the secret's value, not its id",
    "7000218": "this application needs a client_secret, or must be allowed as a public client",
    "7000222": "the client_secret has expired",
}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What we show is meant for one server."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class _Punctual(io.RawIOBase):
    """What a server sends, for as long as its time lasts: a header that drips would hold the thread and the token's lock for days."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._octets = connection.makefile("rb", buffering=0)
        self._deadline = time.monotonic() + _ANSWER_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._connection.settimeout(max(0.001, min(_STEP_SECONDS, self._deadline - time.monotonic())))
        if time.monotonic() > self._deadline:
            raise TimeoutError
        return self._octets.readinto(buffer)

    def close(self) -> None:
        self._octets.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Punctual(sock))


class _Connection(http.client.HTTPSConnection):
    response_class = _Response


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, trust: ssl.SSLContext) -> None:
        super().__init__(context=trust)
        self._trust = trust

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req, context=self._trust)


def ask(url: str, form: Mapping[str, str], *, trust: ssl.SSLContext, secrets: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object that a token server answers to `form`. `secrets`: what of it must not be repeated. Raises TokenError."""
    host = urlsplit(url).hostname or url
    opener = urllib.request.build_opener(_Https(trust), _NoRedirects())
    request = urllib.request.Request(url, urlencode(form).encode(), {"Accept": "application/json", "User-Agent": "relay"})
    try:
        try:
            with opener.open(request, timeout=_STEP_SECONDS) as response:
                return _object(_body(response), host)
        except urllib.error.HTTPError as refusal:
            with refusal:  # it may break off, too
                raise _refusal(refusal, _body(refusal), host, tuple(secrets)) from None
    except urllib.error.URLError as error:
        raise _unreachable(error.reason, host) from None
    except OSError as error:
        raise _unreachable(error, host) from None
    except (http.client.HTTPException, ValueError) as error:
        raise TokenError(Failure.NONSENSE, f"the token server {host} does not answer in HTTP: {type(error).__name__}") from None


def _body(response: Any) -> bytes:
    """What follows the header, up to one octet more than we take. Raises OSError."""
    body = b""
    while len(body) <= _ANSWER_LIMIT_OCTETS and (octets := response.read1(65536)):
        body += octets
    return body


def _object(body: bytes, host: str) -> dict[str, Any]:
    if len(body) > _ANSWER_LIMIT_OCTETS:
        raise TokenError(Failure.NONSENSE, f"the token server {host} answers with more than {_ANSWER_LIMIT_OCTETS >> 10} KiB")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise TokenError(Failure.NONSENSE, f"the token server {host} does not answer in JSON: is the address right?")
    return answer


def _unreachable(reason: object, host: str) -> TokenError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return TokenError(Failure.UNTRUSTED, f"the certificate of the token server {host} is not trusted: {reason.verify_message}")
    if isinstance(reason, ssl.SSLError):
        return TokenError(Failure.UNTRUSTED, f"TLS with the token server {host} failed: {reason.reason or type(reason).__name__}")
    if isinstance(reason, TimeoutError):
        return TokenError(Failure.TIMEOUT, f"the token server {host} did not answer in time")
    words = reason_of(reason) if isinstance(reason, OSError) and not _is_lookup(reason) else getattr(reason, "strerror", None)
    return TokenError(Failure.UNREACHABLE, f"the token server {host} cannot be reached: {words or _words(str(reason), ())}")


def _is_lookup(error: OSError) -> bool:
    """Whether it is the resolver's, whose numbers are not the system's."""
    return type(error).__name__ == "gaierror"


def _refusal(reply: urllib.error.HTTPError, body: bytes, host: str, secrets: tuple[str, ...]) -> TokenError:
    """What an answer means that is no 2xx."""
    where = f"the token server {host}"
    wait = _wait(reply.headers)
    try:
        answer = _object(body, host)
    except TokenError:
        answer = {}
    error = answer.get("error")
    code = _words(error, secrets) if isinstance(error, str) else ""
    said = f"{where} says {' '.join(filter(None, (str(reply.code), code)))}{_description(answer, secrets)}"
    if reply.code == 429 or code in _SLOWED:
        return TokenError(Failure.SLOWED, said, error=code, wait_seconds=wait or _SLOW_DOWN_SECONDS)
    if reply.code >= 500 or code in _PASSING:
        return TokenError(Failure.UNREACHABLE, said, error=code, wait_seconds=wait)
    if 300 <= reply.code < 400:
        return TokenError(Failure.NONSENSE, f"{where} sends us elsewhere ({reply.code}), and we do not follow: is the address right?")
    if not code:
        return TokenError(Failure.NONSENSE, f"{said}: is the address right?")
    ours = f": {_CLIENT[code]}" if code in _CLIENT else ""
    return TokenError(Failure.REFUSED, said + ours, error=code, sign_in=code in _SIGN_IN)


def _description(answer: Mapping[str, Any], secrets: tuple[str, ...]) -> str:
    """The server's explanation, and ours where it has a number of Microsoft's."""
    given = answer.get("error_description")
    text = _words(given.partition("Trace ID:")[0], secrets) if isinstance(given, str) else ""
    numbers = answer.get("error_codes")
    known = [_MICROSOFT[str(number)] for number in numbers if str(number) in _MICROSOFT] if isinstance(numbers, list) else []
    return "".join([f" ({text})" if text else "", f": {known[0]}" if known else ""])


def _words(text: str, secrets: tuple[str, ...]) -> str:
    """A stranger's words, fit for a log line, without what he was shown."""
    text = without_secrets(text[:_HEARD_LIMIT], [*secrets, *map(quote_plus, secrets)], piece=_PIECE)
    return printable(" ".join(text.split()))[:_WORDS_LIMIT]


def _wait(headers: Message) -> float:
    """Seconds that the server asks us to wait; 0.0 where it does not say or says it as a date."""
    value = headers.get("Retry-After", "").strip()
    return min(float(value), _SLOWEST_SECONDS) if value.isascii() and value.isdigit() else 0.0
