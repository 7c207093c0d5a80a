"""Signing in by a code that a person types in on any device (RFC 8628)."""

import ssl
import time
from typing import Any, Final

from relay.config.oauth import OAuth2, TokenServer
from relay.mail.outcome import Failure
from relay.mail.reply import printable
from relay.upstream.token_error import TokenError
from relay.upstream.token_request import ask

_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
_INTERVAL_SECONDS: Final = 5.0  # where the server does not say; and so much more after each slow_down (RFC 8628 section 3.5)
_LEAST_SECONDS: Final = 1.0  # whatever it says
_GOOD_SECONDS: Final = 900.0
_LONGEST_SECONDS: Final = 3600.0
_WORDS: Final = {
    "access_denied": "the sign-in was refused there, or by the person",
    "authorization_declined": "the sign-in was refused by the person",
    "expired_token": "nobody signed in while the code was good: try again",
    "bad_verification_code": "the server does not know the code any more: try again",
}


def sign_in(oauth2: OAuth2, server: TokenServer) -> dict[str, Any]:
    """Show the code, wait for the person, and answer what the token server gives. Raises TokenError."""
    assert server.device_url is not None, "the command has looked"
    trust = ssl.create_default_context()
    client = {"client_id": oauth2.client_id or ""}
    if oauth2.client_secret is not None:  # a client that has one proves itself here, too (RFC 8628 section 3.1)
        client["client_secret"] = oauth2.client_secret.reveal()
    scope = {"scope": server.scope} if server.scope else {}
    begun = ask(server.device_url, client | scope, trust=trust, secrets=(client.get("client_secret", ""),))
    code, user_code = begun.get("device_code"), begun.get("user_code")
    where = begun.get("verification_uri", begun.get("verification_url"))
    if not all(isinstance(value, str) and value for value in (code, user_code, where)):
        raise TokenError(Failure.NONSENSE, "the server gives no code to type in: is device_url right?")
    good = _seconds(begun.get("expires_in"), _GOOD_SECONDS)
    print(f"\n    Open    {printable(str(where))}\n    and enter  {printable(str(user_code))}\n")
    print(f"Waiting for you to do so; the code is good for {good / 60:.0f} minutes …", flush=True)
    form = client | {"grant_type": _GRANT, "device_code": str(code)}
    return _poll(server.token_url, form, trust, interval=max(_LEAST_SECONDS, _seconds(begun.get("interval"), _INTERVAL_SECONDS)), good=good)


def _poll(url: str, form: dict[str, str], trust: ssl.SSLContext, *, interval: float, good: float) -> dict[str, Any]:
    """Ask until the person has signed in."""
    deadline = time.monotonic() + good
    while time.monotonic() + interval < deadline:
        time.sleep(interval)
        try:
            return ask(url, form, trust=trust, secrets=(form["device_code"], form.get("client_secret", "")))
        except TokenError as error:
            if error.error == "slow_down":
                interval += _INTERVAL_SECONDS
            elif error.failure in (Failure.TIMEOUT, Failure.UNREACHABLE, Failure.SLOWED):
                interval = min(2 * interval + error.wait_seconds, 60.0)
            elif error.error != "authorization_pending":
                raise TokenError(error.failure, _WORDS.get(error.error, str(error)), error=error.error) from None
    raise TokenError(Failure.REFUSED, _WORDS["expired_token"])


def _seconds(value: object, usual: float) -> float:
    """A number of seconds that a server names, within reason."""
    return float(min(value, _LONGEST_SECONDS)) if isinstance(value, int | float) and value >= 0 else usual
