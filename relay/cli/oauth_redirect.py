"""Signing in with a browser that comes back to this machine (RFC 8252 section 7.3), which proves with PKCE that we sent it (RFC 7636).

Where the browser is another machine's it cannot come back; its address then says all the same what is wanted, and may be typed in.
"""

import contextlib
import hmac
import secrets
import selectors
import socket
import ssl
import sys
import time
import webbrowser
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit

from relay.config.oauth import OAuth2, TokenServer
from relay.mail.outcome import Failure
from relay.mail.reply import printable
from relay.upstream.token_error import TokenError
from relay.upstream.token_request import ask

_GOOD_SECONDS: Final = 900.0
_REQUEST_SECONDS: Final = 5.0
_REQUEST_LIMIT_OCTETS: Final = 16_384
_DONE: Final = "Signed in. You can close this page and go back to the terminal."
_NOT_DONE: Final = "There was no sign-in: the terminal says why."
_STRANGE: Final = "This is not the answer to the sign-in that is waited for."


def sign_in(oauth2: OAuth2, server: TokenServer, *, port: int, start: bool) -> dict[str, Any]:
    """Send the person to the server, wait for the way back, and answer what the token server gives. `start` a browser. Raises TokenError
    and OSError."""
    assert server.authorize_url is not None, "the command has looked"
    verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
    listening = socket.create_server(("127.0.0.1", port))
    with contextlib.closing(listening):
        # Microsoft lets any port pass with `localhost` alone; for others RFC 8252 advises against the name.
        host = "localhost" if server.provider == "microsoft" else "127.0.0.1"
        back = f"http://{host}:{listening.getsockname()[1]}"
        challenge = urlsafe_b64encode(sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code", "client_id": oauth2.client_id or "", "redirect_uri": back, "state": state,
            "code_challenge": challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        query |= {"scope": server.scope} if server.scope else {}
        if server.provider == "google":  # or there is no refresh token, and none the second time
            query |= {"access_type": "offline", "prompt": "consent"}
        url = f"{server.authorize_url}{'&' if '?' in server.authorize_url else '?'}{urlencode(query)}"
        code = _code(listening, url, state, start=start)
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": back,
        "client_id": oauth2.client_id or "",
        "code_verifier": verifier,
    }
    if oauth2.client_secret is not None:
        form["client_secret"] = oauth2.client_secret.reveal()
    shown = (code, verifier, form.get("client_secret", ""))
    return ask(server.token_url, form, trust=ssl.create_default_context(), secrets=shown)


def _code(listening: socket.socket, url: str, state: str, *, start: bool) -> str:
    """Say where to go, and wait for the code. Raises TokenError."""
    if start and webbrowser.open(url):
        print("Your browser has opened. If it has not, open this address:", flush=True)
    else:
        print("Open this address in a browser:", flush=True)
    print(f"\n    {url}\n")
    print("If that browser is on another machine, it ends at a page that it cannot open: paste that page's address here.", flush=True)
    deadline = time.monotonic() + _GOOD_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        with contextlib.suppress(OSError, ValueError):  # no standard input, or a plain file
            selector.register(sys.stdin, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is listening:
                    found = _visited(listening, state)
                elif line := sys.stdin.readline():
                    found = _answered(line.strip(), state)
                    if found is None:
                        print(_STRANGE, flush=True)
                else:
                    selector.unregister(sys.stdin)
                    continue
                if found is not None:
                    return found
    raise TokenError(Failure.REFUSED, f"nobody came back from the sign-in within {_GOOD_SECONDS / 60:.0f} minutes")


def _visited(listening: socket.socket, state: str) -> str | None:
    """The code that a browser brings; None where it is not the one we wait for. Raises TokenError."""
    visitor, _ = listening.accept()
    with contextlib.closing(visitor), contextlib.suppress(OSError):
        target = _target(visitor)
        try:
            found = _answered(target, state)
        except TokenError:
            _show(visitor, "400 Bad Request", _NOT_DONE)
            raise
        _show(visitor, *(("200 OK", _DONE) if found is not None else ("404 Not Found", _STRANGE)))
        return found
    return None


def _target(visitor: socket.socket) -> str:
    """What a browser asks for. All of its header is read: what is left unread when we close resets the connection. Raises OSError."""
    deadline, request = time.monotonic() + _REQUEST_SECONDS, b""
    while b"\r\n\r\n" not in request and len(request) < _REQUEST_LIMIT_OCTETS:
        visitor.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (octets := visitor.recv(4096)):
            break
        request += octets
    words = request.partition(b"\n")[0].decode("ascii", "replace").split(" ")
    return words[1] if len(words) == 3 and words[0] == "GET" else ""


def _show(visitor: socket.socket, status: str, text: str) -> None:
    page = f"<!doctype html><meta charset=utf-8><title>relay</title><p>{text}</p>".encode()
    fields = ("Content-Type: text/html", f"Content-Length: {len(page)}", "Cache-Control: no-store", "Connection: close")
    with contextlib.suppress(OSError):  # it may be gone, and what it brought is good all the same
        visitor.sendall("\r\n".join((f"HTTP/1.1 {status}", *fields, "", "")).encode() + page)


def _answered(target: str, state: str) -> str | None:
    """The code in an address that is the answer to our question; None where it is something else. Raises TokenError."""
    try:
        query = {key: values[0] for key, values in parse_qs(urlsplit(target).query).items()}
    except ValueError:
        return None
    if not hmac.compare_digest(query.get("state", "").encode(), state.encode()):
        return None
    if "error" in query:
        said = " ".join(filter(None, (query["error"], query.get("error_description"))))
        raise TokenError(Failure.REFUSED, f"the sign-in was refused: {printable(said)[:300]}", error=query["error"])
    return query.get("code") or None
