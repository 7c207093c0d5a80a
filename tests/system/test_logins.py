"""Apps that log in: real clients under STARTTLS and implicit TLS, routes by user, the trace, and a relay that ends while some wait.

The clients' own matrix is in `test_clients`; here it is what a login changes for a message and for the relay.
"""

import asyncio
import smtplib
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.config.password import hash_password
from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import SECRET, Running, running, to

HASH = hash_password(SECRET)
USERS: dict[str, dict[str, Any]] = {
    "erp": {"password": SECRET, "senders": ["acme.example"]},
    "crm": {"password_hash": HASH, "senders": ["acme.example", "globex.example"]},
}
ROUTES = [
    {"name": "crm", "user": "crm", "upstream": "globex"},
    {"name": "acme", "sender": "acme.example", "upstream": "acme"},
]
MESSAGE = b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"


def plain(user: str, password: str) -> str:
    return "AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode()).decode()


def listener(authority: Authority, **more: Any) -> dict[str, Any]:
    files = authority.files()
    return {"bind": "127.0.0.1:0", "name": "local", "security": "starttls", "auth": "required",
            "certificate": str(files.certificate), "key": str(files.key), **more}  # fmt: skip


async def run(*command: str, stdin: bytes = b"", **environment: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
    )  # fmt: skip
    async with asyncio.timeout(30):
        said, _ = await process.communicate(stdin)
    assert process.returncode == 0, said.decode(errors="replace")


async def swaks(relay: Running, ca: Path, mechanism: str) -> None:
    await run(
        "swaks", "--server", relay.host, "--port", str(relay.port), "--tls", "--tls-verify", "--tls-ca-path", str(ca),
        "--from", "app@acme.example", "--to", "you@example.org", "--data", MESSAGE.decode().replace("\r\n", "\\n"),
        "--auth", mechanism, "--auth-user", "crm", "--auth-password", SECRET,
    )  # fmt: skip


async def curl(relay: Running, ca: Path, mechanism: str) -> None:
    await run(
        "curl", "--silent", "--show-error", "--ssl-reqd", "--cacert", str(ca), "--url", f"smtp://{relay.host}:{relay.port}",
        "--mail-from", "app@acme.example", "--mail-rcpt", "you@example.org", "--user", f"crm:{SECRET}",
        "--login-options", f"AUTH={mechanism}", "--upload-file", "-", stdin=MESSAGE,
    )  # fmt: skip


async def msmtp(relay: Running, ca: Path, mechanism: str) -> None:
    await run(
        "msmtp", f"--host={relay.host}", f"--port={relay.port}", "--tls=on", f"--tls-trust-file={ca}", f"--auth={mechanism.lower()}",
        "--user=crm", f"--passwordeval=echo {SECRET}", "--from=app@acme.example", "you@example.org", stdin=MESSAGE,
    )  # fmt: skip


async def python(relay: Running, ca: Path, mechanism: str) -> None:
    def send() -> None:
        with smtplib.SMTP(relay.host, relay.port, timeout=20) as client:
            client.starttls(context=ssl.create_default_context(cafile=str(ca)))
            client.ehlo()
            client.user, client.password = "crm", SECRET  # what `login` sets before it tries every mechanism
            authenticate = {"PLAIN": client.auth_plain, "LOGIN": client.auth_login}[mechanism]
            assert client.auth(mechanism, authenticate)[0] == 235
            client.sendmail("app@acme.example", ["you@example.org"], MESSAGE)

    await asyncio.to_thread(send)


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("program", [swaks, curl, msmtp, python])
async def test_a_real_client_logs_in_under_tls_and_its_route_is_the_users(
    program: Callable[..., Any], mechanism: str, tmp_path: Path, tls: Authority
) -> None:
    async with ScriptedUpstream() as acme, ScriptedUpstream() as globex:
        upstreams = {"acme": to(acme), "globex": to(globex)}
        async with running(tmp_path, upstreams=upstreams, routes=ROUTES, users=USERS, listeners=[listener(tls)]) as relay:
            await program(relay, tls.ca_file, mechanism)
            (transaction,) = await globex.received(1)
            await relay.empty()
            (accepted,) = relay.events("accepted")
            assert accepted["user"] == "crm"
            assert relay.events("auth-failed") == []
        assert transaction.sender == "app@acme.example"
        assert b" with ESMTPSA id " in transaction.content
        assert b"hello\r\n" in transaction.content
        assert acme.transactions == []


async def test_implicit_tls_offers_a_login_at_once(tmp_path: Path, tls: Authority) -> None:
    async with ScriptedUpstream() as acme:
        settings = listener(tls, security="tls")
        async with running(tmp_path, upstreams={"acme": to(acme)}, routes=ROUTES[1:], users=USERS, listeners=[settings]) as relay:
            async with Client(relay.host, relay.port) as client:
                await client.shake_hands(tls.client_context())
                await client.greet()
                assert "AUTH PLAIN LOGIN" in client.extensions
                await client.command(plain("erp", SECRET), 235)
                await client.deliver("app@acme.example", ["you@example.org"], MESSAGE)
                await client.quit()
            await acme.received(1)
            await relay.empty()


async def test_a_login_in_clear_does_not_outlive_starttls(tmp_path: Path, tls: Authority) -> None:
    async with (
        ScriptedUpstream() as acme,
        running(tmp_path, upstreams={"acme": to(acme)}, routes=ROUTES[1:], users=USERS, listeners=[listener(tls)]) as relay,
        relay.client() as client,
    ):
        await client.greet()
        await client.command(plain("erp", SECRET), 235)
        await client.start_tls(tls.client_context())
        await client.hello()
        await client.command("MAIL FROM:<app@acme.example>", 530)
        await client.command(plain("erp", SECRET), 235)
        await client.command("MAIL FROM:<app@acme.example>", 250)
        await client.quit()


async def test_a_guesser_is_kept_waiting_and_others_are_not(tmp_path: Path, tls: Authority) -> None:
    """With the delays of the real relay: one second, then two; a stop ends them."""
    async with (
        ScriptedUpstream() as acme,
        running(tmp_path, upstreams={"acme": to(acme)}, routes=ROUTES[1:], users=USERS, listeners=[listener(tls)]) as relay,
    ):
        loop = asyncio.get_running_loop()
        async with relay.client() as guesser, relay.client() as slow, relay.client() as other:
            begun = loop.time()
            await guesser.greet()
            await guesser.command(plain("crm", "guess"), 535, "5.7.8")
            assert loop.time() - begun >= 1
            await slow.greet()
            await slow.send(plain("crm", "guess").encode() + b"\r\nNOOP\r\n")
            begun = loop.time()
            await other.greet()
            await other.command(plain("erp", SECRET), 235)
            await other.deliver("app@acme.example", ["you@example.org"], MESSAGE)
            assert loop.time() - begun < 1.9  # the second guess costs two seconds
            relay.stop()
            await slow.expect(535)
            await slow.expect(421)
            await slow.expect_close()
        await eventually(lambda: relay.events("stopped"), "the end of the relay")
        (first, second) = relay.events("auth-failed")
        assert (first["client"], first["user"], first["listener"]) == ("127.0.0.1", "crm", "local")
        assert second["session"] != first["session"]


async def test_what_the_user_may_not_send_is_not_in_custody_and_bounces_of_his_come_his_way(tmp_path: Path, tls: Authority) -> None:
    """The report about a user's mail takes the routes of the user."""
    async with ScriptedUpstream() as acme, ScriptedUpstream() as globex:
        globex.script("rcpt", b"550 5.1.1 nobody here", times=1)
        upstreams = {"acme": to(acme), "globex": to(globex)}
        async with running(tmp_path, upstreams=upstreams, routes=ROUTES, users=USERS, listeners=[listener(tls)]) as relay:
            async with relay.client() as client:
                await client.greet()
                await client.command(plain("crm", SECRET), 235)
                await client.command("MAIL FROM:<a@initech.example>", 553, "5.7.1")
                await client.deliver("a@globex.example", ["you@example.org"], b"From: a@initech.example\r\n\r\nx\r\n", code=553)
                await client.deliver("a@globex.example", ["you@example.org"], b"From: a@globex.example\r\n\r\nx\r\n")
                await client.quit()
            await relay.event("bounced")
            await relay.empty()
            assert [event["route"] for event in relay.events("sent")] == ["crm"]
        (report,) = globex.accepted
        assert (report.sender, report.recipients) == ("", ["a@globex.example"])
        assert acme.transactions == []
