"""A real token server on 127.0.0.1 with TLS: it gives, rotates, ends and refuses tokens as RFC 6749, 7523, 7636 and 8628 have it, or badly.

    async with TokenServer(tls.server, rotates=True) as server:
        server.script(Answer(503, b"later"), times=1)
        ...
        assert [asked["grant_type"] for asked in server.asked] == ["refresh_token"]

Whoever uses it must trust the tests' CA: SSL_CERT_FILE says so to OpenSSL.
"""

import asyncio
import hashlib
import itertools
import json
import ssl
from base64 import urlsafe_b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

CLIENT, CLIENT_SECRET, FIRST = "relay-client", "client-secret-unseen", "first-refresh-token-unseen"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the test's own."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """Go on as usual, but only once the test has set the event."""

    until: asyncio.Event


@dataclass(frozen=True, slots=True)
class Hang:
    """Say nothing, or nothing more than this."""

    said: bytes = b""


@dataclass(frozen=True, slots=True)
class Close:
    """Close without an answer."""


@dataclass(frozen=True, slots=True)
class Drip:
    """A header without end, a byte at a time."""


@dataclass(frozen=True, slots=True)
class Flood:
    """A body that is longer than any answer, and no end of it."""


Action = Answer | Hold | Hang | Close | Drip | Flood


def refused(error: str, description: str = "", *, status: int = 400, **more: Any) -> Answer:
    return Answer(status, json.dumps({"error": error, "error_description": description, **more}).encode())


@dataclass(slots=True)
class _Device:
    user_code: str
    approved: bool = False
    denied: bool = False


@dataclass(slots=True)
class TokenServer:
    """`valid`: the access tokens that are good now, for an upstream to look at. `refresh_tokens`: those that it takes.

    `rotates`: each refresh token is good once, and the answer has the next. `verify`: looks at a signed assertion.
    """

    tls: ssl.SSLContext
    rotates: bool = False
    lifetime: int = 3600
    interval: int = 0
    verify: Callable[[str], bool] = lambda _: False
    asked: list[dict[str, str]] = field(default_factory=list)
    valid: set[str] = field(default_factory=set)
    given: list[str] = field(default_factory=list)
    refresh_tokens: set[str] = field(default_factory=lambda: {FIRST})
    devices: dict[str, _Device] = field(default_factory=dict)
    port: int = 0
    _codes: dict[str, dict[str, str]] = field(default_factory=dict)
    _script: list[tuple[Action, int | None]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _server: asyncio.Server | None = None
    _open: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    def script(self, action: Action, *, times: int | None = None) -> None:
        """What happens instead, from now on or so many times. The oldest that is not used up decides."""
        self._script.append((action, times))

    def heal(self) -> None:
        self._script.clear()

    def expire(self) -> None:
        """No access token is good any more."""
        self.valid.clear()

    def url(self, path: str = "token") -> str:
        return f"https://127.0.0.1:{self.port}/{path}"

    def settings(self, **more: Any) -> dict[str, Any]:
        """An `oauth2` section that gets its tokens here."""
        keys = {"token_url": self.url(), "client_id": CLIENT, "client_secret": CLIENT_SECRET, "scope": "mail", "refresh_token": FIRST}
        return {key: value for key, value in (keys | more).items() if value is not None}

    # -- the life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and drop those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = dict(self._open)
        for task, writer in tasks.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, TimeoutError):
                await self._answer(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            del self._open[task]
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        _, target, _ = head.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        form, path = dict(parse_qsl(body.decode())), urlsplit(target).path
        if path == "/token":
            self.asked.append(form)
            answer = await self._acted(writer) or self._token(form)
        elif path == "/device":
            answer = self._device(form)
        else:
            answer = self._authorize(target)
        lines = [
            f"HTTP/1.1 {answer.status} X",
            f"Content-Length: {len(answer.body)}",
            "Content-Type: application/json",
            "Connection: close",
        ]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + answer.body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _acted(self, writer: asyncio.StreamWriter) -> Answer | None:
        """What the script has for this request; the connection ends where that is no answer."""
        while self._script and self._script[0][1] == 0:
            self._script.pop(0)
        if not self._script:
            return None
        action, times = self._script[0]
        if times is not None:
            self._script[0] = (action, times - 1)
        match action:
            case Answer():
                return action
            case Hold(until):
                await until.wait()
                return None
            case Hang(said):
                writer.write(said)
                await asyncio.Event().wait()
            case Drip():
                writer.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            case Flood():
                # Not without end: where a write fails while another is flushed, asyncio of 3.11 ends the transport twice.
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000)
                await asyncio.Event().wait()
        raise ConnectionResetError

    # -- what it says ------------------------------------------------------------------------------------------------------

    def _token(self, form: dict[str, str]) -> Answer:
        grant = form.get("grant_type", "")
        if grant == "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return self._give() if self.verify(form["assertion"]) else refused("invalid_grant", "Invalid JWT Signature.")
        if (form.get("client_id"), form.get("client_secret", CLIENT_SECRET)) != (CLIENT, CLIENT_SECRET):
            return refused("invalid_client", f"bad secret {form.get('client_secret')}", status=401)
        if grant == "client_credentials":
            return self._give() if "client_secret" in form else refused("invalid_client", status=401)
        if grant == "refresh_token":
            return self._refresh(form["refresh_token"])
        if grant == "authorization_code":
            return self._exchange(form)
        if grant == "urn:ietf:params:oauth:grant-type:device_code":
            return self._poll(form["device_code"])
        return refused("unsupported_grant_type")

    def _refresh(self, token: str) -> Answer:
        if token not in self.refresh_tokens:
            return refused("invalid_grant", f"AADSTS700082: The token {token} is over.\r\nTrace ID: 1", error_codes=[700082])
        if not self.rotates:
            return self._give()
        self.refresh_tokens.discard(token)
        return self._give(refresh=True)

    def _exchange(self, form: dict[str, str]) -> Answer:
        asked = self._codes.pop(form["code"], None)
        challenge = urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        if asked is None or (asked["code_challenge"], asked["redirect_uri"]) != (challenge, form["redirect_uri"]):
            return refused("invalid_grant", "no such code")
        return self._give(refresh=True)

    def _poll(self, code: str) -> Answer:
        device = self.devices.get(code)
        if device is None:
            return refused("expired_token")
        if device.denied:
            return refused("access_denied")
        return self._give(refresh=True) if device.approved else refused("authorization_pending")

    def _give(self, *, refresh: bool = False) -> Answer:
        number = next(self._numbers)
        token = f"access-token-unseen-{number}"
        self.valid.add(token)
        self.given.append(token)
        answer: dict[str, Any] = {"access_token": token, "token_type": "Bearer", "expires_in": self.lifetime}
        if refresh:
            answer["refresh_token"] = f"refresh-token-unseen-{number}"
            self.refresh_tokens.add(answer["refresh_token"])
        return Answer(200, json.dumps(answer).encode())

    def _device(self, form: dict[str, str]) -> Answer:
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT, CLIENT_SECRET):  # RFC 8628 section 3.1
            return refused("invalid_client", f"bad secret {form.get('client_secret')}", status=401)
        code, user_code = f"device-{next(self._numbers)}", "WDJB-MJHT"
        self.devices[code] = _Device(user_code)
        said = {"device_code": code, "user_code": user_code, "verification_uri": self.url("enter"), "expires_in": 900}
        return Answer(200, json.dumps(said | {"interval": self.interval}).encode())

    def _authorize(self, target: str) -> Answer:
        """A user who signs in at once, and consents."""
        asked = {key: values[0] for key, values in parse_qs(urlsplit(target).query).items()}
        code = f"code-{next(self._numbers)}"
        self._codes[code] = asked
        query = urlencode({"code": code, "state": asked["state"]})
        return Answer(302, b"", (("Location", f"{asked['redirect_uri']}?{query}"),))
