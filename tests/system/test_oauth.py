"""OAuth 2.0 from end to end: the relay, a token server with TLS, an upstream that takes XOAUTH2, and an operator who signs in."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from relay.upstream import oauth2, watch
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import LAUNCH, REPOSITORY, RelayProcess
from tests.support.token_server import FIRST, Answer, Hold, TokenServer, refused
from tests.support.upstream import Hang, ScriptedUpstream
from tests.system.relays import CONTENT, RETRY, running, to

UNSEEN = "unseen"
SENDER, RECIPIENT = "app@acme.example", "you@example.org"


@pytest.fixture
async def server(tls: Authority) -> AsyncIterator[TokenServer]:
    async with TokenServer(tls.server) as server:
        yield server


def configuration(directory: Path, upstreams: Mapping[str, Any], **route: Any) -> str:
    keys = {
        "hostname": "relay.example.net",
        "listeners": [{"bind": "127.0.0.1:0"}],
        "upstreams": upstreams,
        "routes": [{"name": "acme", "sender": "acme.example", "upstream": "acme", **route}],
        "retry": RETRY,
        "spool": {"directory": str(directory / "spool")},
        "log": {"format": "json", "level": "debug"},
    }
    return json.dumps(keys)  # which is YAML, too


@asynccontextmanager
async def process(directory: Path, tls: Authority, upstreams: Mapping[str, Any], **route: Any) -> AsyncIterator[RelayProcess]:
    text = configuration(directory, upstreams, **route)
    async with RelayProcess(text, directory=directory, environment={"SSL_CERT_FILE": str(tls.ca_file)}) as relay:
        relay.config_file.chmod(0o600)
        yield relay
        assert await relay.terminate() == 0
    assert UNSEEN not in relay.log()


async def send(relay: RelayProcess) -> None:
    async with Client(*relay.address()) as client:
        await client.greet()
        await client.deliver(SENDER, [RECIPIENT], CONTENT)
        await client.quit()


def by_token(smtp: ScriptedUpstream, server: TokenServer, **oauth2: Any) -> dict[str, Any]:
    return to(smtp, username="mailer@acme.example", oauth2=server.settings(**oauth2))


async def test_mail_goes_by_xoauth2_and_an_expired_token_costs_one_more(tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    async with ScriptedUpstream(tokens=server.valid) as smtp, process(tmp_path, tls, {"acme": by_token(smtp, server)}) as relay:
        await send(relay)
        await smtp.received(1)
        server.expire()
        smtp.script("mail", b"421 4.3.0 closing", times=1)
        await send(relay)
        await smtp.received(2)
        assert [(login.user, login.password, login.accepted) for login in smtp.logins] == [
            ("mailer@acme.example", "access-token-unseen-1", True),
            ("mailer@acme.example", "access-token-unseen-1", False),
            ("mailer@acme.example", "access-token-unseen-2", True),
        ]
        await relay.event("sent", count=2)
        assert not relay.events("deferred")


async def test_a_relay_that_is_killed_between_rotation_and_use_has_the_new_token(
    tmp_path: Path, tls: Authority, server: TokenServer
) -> None:
    server.rotates = True
    async with ScriptedUpstream(tokens=server.valid) as smtp:
        smtp.script("auth", Hang(), times=1)
        async with process(tmp_path, tls, {"acme": by_token(smtp, server)}) as relay:
            await send(relay)
            await eventually(lambda: bool(smtp.logins), "the login")
            await relay.kill()
            await relay.start()
            await smtp.received(1)
        assert [asked["refresh_token"] for asked in server.asked] == [FIRST, "refresh-token-unseen-1"]


async def test_a_token_server_that_is_down_makes_mail_wait_or_take_the_fallback(
    tmp_path: Path, tls: Authority, server: TokenServer
) -> None:
    server.script(Answer(503, b"later"))
    async with ScriptedUpstream(tokens=server.valid) as smtp, ScriptedUpstream() as other:
        upstreams = {"acme": by_token(smtp, server), "house": to(other)}
        async with process(tmp_path, tls, upstreams, fallback={"upstream": "house", "after": "300ms"}) as relay:
            await send(relay)
            (deferred,) = (await relay.event("deferred"))[:1]
            assert deferred["reply"].endswith("the token server 127.0.0.1 says 503")
            await other.received(1)
            await relay.event("degraded")
        assert "relay oauth login" not in relay.log()


async def test_mail_that_waits_for_a_token_server_goes_once_it_answers(
    tmp_path: Path, tls: Authority, server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca_file))
    monkeypatch.setattr(oauth2, "_SHARED_SECONDS", 0.1)
    await server.stop()
    everybody = [{"sender": "*", "upstream": "acme"}]
    async with (
        ScriptedUpstream(tokens=server.valid) as smtp,
        running(tmp_path, upstreams={"acme": by_token(smtp, server)}, routes=everybody) as relay,
    ):
        await relay.send(SENDER, [RECIPIENT])
        (deferred, *_) = await relay.event("deferred")
        assert "the token server 127.0.0.1 cannot be reached: Connection refused" in deferred["reply"]
        await server.start()
        await smtp.received(1)
        await relay.empty()
        assert UNSEEN not in relay.text()


# -- signing in --------------------------------------------------------------------------------------------------------------


class Operator:
    """A `relay oauth login acme`, under way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said = ""

    async def says(self, pattern: str) -> re.Match[str]:
        """Wait for words on standard output."""
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            while not (match := re.search(pattern, self.said)):
                octets = await self._process.stdout.read(4096)
                assert octets, f"it ended: {self.said}"
                self.said += octets.decode()
        return match

    async def types(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        await self._process.stdin.drain()

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        async with asyncio.timeout(20):
            rest, _ = await self._process.communicate()
        self.said += rest.decode()
        assert UNSEEN not in self.said
        assert self._process.returncode is not None
        return self._process.returncode


@asynccontextmanager
async def login(config: Path, tls: Authority, *words: str, name: str = "acme") -> AsyncIterator[Operator]:
    environment = {**os.environ, "SSL_CERT_FILE": str(tls.ca_file), "PYTHONPATH": str(REPOSITORY)}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCH, "oauth", "login", "-c", str(config), name, *words,
        stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=environment,
    )  # fmt: skip
    try:
        yield Operator(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        process._transport.close()  # type: ignore[attr-defined]


def unsigned(directory: Path, server: TokenServer, smtp: ScriptedUpstream | None = None, **oauth2: Any) -> Path:
    """A configuration in which nobody has signed in yet."""
    urls = {"device_url": server.url("device"), "authorize_url": server.url("authorize"), "refresh_token": None}
    upstream = by_token(smtp, server, **urls | oauth2) if smtp is not None else {"host": "a.example", "username": "mailer@acme.example"}
    config = directory / "config.yaml"
    (directory / "spool").mkdir(exist_ok=True)
    config.write_text(configuration(directory, {"acme": upstream | {"oauth2": server.settings(**urls | oauth2)}}))
    return config


async def test_mail_that_waits_for_a_sign_in_goes_on_by_itself(
    tmp_path: Path, tls: Authority, server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca_file))
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.05)
    server.rotates = True
    async with ScriptedUpstream(tokens=server.valid) as smtp:
        config = unsigned(tmp_path, server, smtp)
        upstreams = json.loads(config.read_text())["upstreams"]
        async with running(tmp_path, upstreams=upstreams, routes=[{"sender": "*", "upstream": "acme"}]) as relay:
            await relay.send(SENDER, [RECIPIENT])
            (deferred, *_) = await relay.event("deferred")
            assert "there is no refresh token; sign in with `relay oauth login acme`" in deferred["reply"]
            async with login(config, tls) as operator:
                await operator.says(r"enter +WDJB-MJHT")
                next(iter(server.devices.values())).approved = True
                assert await operator.ended() == 0
                assert "Sign in as mailer@acme.example" in operator.said
                assert f"stored, encrypted, in {tmp_path}/spool/oauth/acme." in operator.said
            await smtp.received(1)
            await relay.empty()
            assert UNSEEN not in relay.text()
            changed = [event for event in relay.events() if "sign-in has changed" in str(event)]
            assert len(changed) <= 1  # none where the mail's own next attempt came first; never for what the relay itself stores


@pytest.mark.parametrize("outcome", ["denied", "expired", "slow", "down"])
async def test_a_device_sign_in_that_does_not_go_smoothly(outcome: str, tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    if outcome == "slow":
        server.script(refused("authorization_pending"), times=2)
    if outcome == "down":
        server.script(Answer(503, b""), times=2)
    async with login(unsigned(tmp_path, server), tls, "--no-browser") as operator:
        await operator.says("enter +WDJB-MJHT")
        device = next(iter(server.devices.values()))
        if outcome == "denied":
            device.denied = True
        elif outcome == "expired":
            server.devices.clear()
        else:
            device.approved = True
        assert await operator.ended() == (1 if outcome in ("denied", "expired") else 0)
        said = {"denied": "refused there", "expired": "nobody signed in while the code was good", "slow": "Signed in", "down": "Signed in"}
        assert said[outcome] in operator.said
        assert (tmp_path / "spool/oauth/acme").exists() == (outcome in ("slow", "down"))


async def _get(port: int, target: str) -> str:
    """What a browser would be shown."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    cookies = "x" * 10_000  # of everything else that is developed on this machine
    writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookies}\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return answer


async def _redirected(server: TokenServer, url: str, tls: Authority) -> str:
    """Where the token server's page of sign-in sends the browser."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=tls.client_context(), server_hostname="127.0.0.1")
    parts = urlsplit(url)
    writer.write(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    found = re.search(r"Location: (\S+)", answer)
    assert found
    return found[1]


@pytest.mark.parametrize("pasted", [False, True])
async def test_a_sign_in_with_a_browser_that_comes_back_or_whose_address_is_pasted(
    pasted: bool, tmp_path: Path, tls: Authority, server: TokenServer
) -> None:
    config = unsigned(tmp_path, server, device_url=None)
    async with login(config, tls, "--no-browser") as operator:
        url = (await operator.says(r"\n    (https://\S+)"))[1]
        await operator.says("paste")
        back = await _redirected(server, url, tls)
        port = urlsplit(back).port
        assert port is not None
        assert "404" in await _get(port, "/favicon.ico")
        assert "404" in await _get(port, f"/?{urlencode({'code': 'x', 'state': 'of-somebody-else'})}")
        assert "404" in await _get(port, f"/?{urlencode({'code': 'x'})}")
        if pasted:
            await operator.types("https://example.org/?code=x&state=y")
            await operator.says("not the answer")
            await operator.types(back)
        else:
            assert "Signed in" in await _get(port, f"/?{urlsplit(back).query}")
        assert await operator.ended() == 0
        assert server.asked[-1]["grant_type"] == "authorization_code"
        assert "code_verifier" in server.asked[-1]


async def test_a_sign_in_that_is_refused_in_the_browser(tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    async with login(unsigned(tmp_path, server, device_url=None), tls, "--no-browser") as operator:
        url = (await operator.says(r"\n    (https://\S+)"))[1]
        await operator.says("paste")
        back = urlsplit(await _redirected(server, url, tls))
        state = re.search("state=([^&]+)", back.query)
        assert back.port is not None and state is not None
        page = await _get(back.port, f"/?error=access_denied&error_description=No%0d%0aWay&state={state[1]}")
        assert "There was no sign-in" in page
        assert await operator.ended() == 1
        assert "the sign-in was refused: access_denied No Way" in operator.said


async def test_a_strange_code_gets_no_token(tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    async with login(unsigned(tmp_path, server, device_url=None), tls, "--no-browser") as operator:
        url = (await operator.says(r"\n    (https://\S+)"))[1]
        await operator.says("paste")
        back = await _redirected(server, url, tls)
        await operator.types(re.sub("code=[^&]+", "code=another", back))
        assert await operator.ended() == 1
        assert "invalid_grant (no such code)" in operator.said


@pytest.mark.parametrize(
    ("name", "oauth2", "code", "said"),
    [
        ("acne", {}, 64, "no such upstream: acne, did you mean 'acme'?"),
        ("acme", {"client_credentials": True}, 64, "nobody needs to sign in"),
        ("acme", {"client_id": None}, 78, "upstreams.acme.oauth2.client_id: is missing"),
        ("acme", {"device_url": None, "authorize_url": None}, 78, "add device_url or authorize_url to `oauth2`"),
        ("acme", {"client_secret": {"env": "NOT_SET_ANYWHERE"}}, 78, "the environment variable NOT_SET_ANYWHERE is not set"),
        ("acme", {"client_id": "another"}, 1, "the client_id or client_secret is wrong"),
    ],
)
async def test_a_sign_in_that_cannot_begin_says_why(
    name: str, oauth2: dict[str, Any], code: int, said: str, tmp_path: Path, tls: Authority, server: TokenServer
) -> None:
    async with login(unsigned(tmp_path, server, **oauth2), tls, name=name) as operator:
        assert await operator.ended() == code, operator.said
        assert said in operator.said


async def test_a_sign_in_needs_no_other_secret_and_no_token_that_is_missing(tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    config = unsigned(tmp_path, server, refresh_token={"file": "/nowhere"})
    text = json.loads(config.read_text())
    text["upstreams"]["other"] = {"host": "b.example", "username": "x", "password": {"env": "NOT_SET_ANYWHERE"}}
    config.write_text(json.dumps(text))
    async with login(config, tls) as operator:
        await operator.says("enter +WDJB-MJHT")
        next(iter(server.devices.values())).approved = True
        assert await operator.ended() == 0


async def test_twenty_messages_at_once_ask_for_one_token(tmp_path: Path, tls: Authority, server: TokenServer) -> None:
    go = asyncio.Event()
    server.script(Hold(go))
    async with ScriptedUpstream(tokens=server.valid) as smtp:
        upstream = by_token(smtp, server) | {"limits": {"connections": 20}}
        async with process(tmp_path, tls, {"acme": upstream}) as relay:
            await asyncio.gather(*(send(relay) for _ in range(20)))
            await eventually(lambda: len(server.asked) == 1, "the request")
            go.set()
            await smtp.received(20)
        assert len(server.asked) == 1
