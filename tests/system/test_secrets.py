"""Secrets that change under a relay that runs: as a file, a mounted volume and a command. Nothing is seen of them meanwhile."""

import base64
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.config.encryption import Keyring, new_key
from relay.config.password import hash_password
from relay.delivery import scheduler
from relay.upstream import watch
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream
from tests.system.relays import ROUTES, SECRET, running, to

SENDER = "app@acme.example"
OLD, NEW = f"old-{SECRET}", f"new-{SECRET}"
CONTENT = b"From: App <app@acme.example>\r\nSubject: hi\r\n\r\nhello\r\n"


def users(server: ScriptedUpstream, **passwords: str) -> None:
    """From now on these are right, and no others."""
    known = server._offer.users
    assert isinstance(known, dict)
    known.clear()
    known.update(passwords)


# -- found by looking --------------------------------------------------------------------------------------------------------


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "_REFRESH_SOON_SECONDS", 0.2)


@pytest.mark.usefixtures("look_often")
async def test_a_rotated_volume_costs_no_refused_login_and_the_idle_sessions_with_the_old_secret_end(tmp_path: Path) -> None:
    """As Kubernetes has it: the name is a link through `..data`, and `..data` a link that is renamed over."""
    mount = tmp_path / "mount"
    for revision, password in (("..1", OLD), ("..2", NEW)):
        (mount / revision).mkdir(parents=True)
        (mount / revision / "acme").write_text(password)
    (mount / "..data").symlink_to("..1")
    (mount / "acme").symlink_to("..data/acme")
    async with ScriptedUpstream(users={"acme": OLD}) as server:
        acme = to(server, username="acme", password={"file": f"{mount}/acme"})
        async with running(tmp_path, upstreams={"acme": acme}, routes=ROUTES[:1]) as relay:
            await relay.send(SENDER, ["before@example.org"])
            await server.received(1)
            users(server, acme=NEW)
            (mount / "..data_tmp").symlink_to("..2")
            (mount / "..data_tmp").rename(mount / "..data")
            await eventually(lambda: any("has changed" in event["what"] for event in relay.events("note")), "the new secret")
            await eventually(lambda: server.open_connections == 0, "the old session to end")
            await relay.send(SENDER, ["after@example.org"])
            await server.received(2)
            await relay.empty()
            assert [(login.password, login.accepted) for login in server.logins] == [(OLD, True), (NEW, True)]
            assert relay.events("deferred", "failed", "auth-failed") == []


@pytest.mark.usefixtures("look_often")
async def test_an_app_whose_password_has_changed_logs_in_with_the_new_one_and_no_more_with_the_old(tmp_path: Path) -> None:
    plain, hashed = tmp_path / "plain", tmp_path / "hashed"
    plain.write_text(OLD)
    hashed.write_text(hash_password(OLD))
    apps: dict[str, Any] = {
        "erp": {"password": {"file": str(plain)}, "senders": "acme.example"},
        "crm": {"password_hash": {"file": str(hashed)}, "senders": "acme.example"},
    }
    listeners = [{"bind": "127.0.0.1:0", "name": "local", "auth": "required", "networks": "127.0.0.0/8"}]
    async with (
        ScriptedUpstream() as server,
        running(tmp_path, upstreams={"acme": to(server)}, routes=ROUTES[:1], users=apps, listeners=listeners) as relay,
    ):

        async def code(user: str, password: str) -> int:
            async with relay.client() as client:
                await client.greet()
                word = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
                await client.send(f"AUTH PLAIN {word}\r\n".encode())
                return (await client.reply()).code

        for user in apps:
            assert await code(user, OLD) == 235
        plain.write_text(NEW)
        hashed.write_text(hash_password(NEW))
        await eventually(lambda: sum("has changed" in event["what"] for event in relay.events("note")) == 2, "both to change")
        for user in apps:
            assert await code(user, NEW) == 235
            assert await code(user, OLD) == 535


# -- told to -----------------------------------------------------------------------------------------------------------------

CONFIG = """
hostname: relay.example.net
listeners: [{{bind: "127.0.0.1:0"}}]
upstreams:
  acme: {{host: 127.0.0.1, port: {port}, security: none, username: acme, password: {{file: acme}}}}
  globex:
    {{host: 127.0.0.1, port: {port}, security: none, username: globex,
      password: {{command: [{python}, -c, "print(open('globex').read())"]}}}}
  initech: {{host: 127.0.0.1, port: {port}, security: none, username: initech, password: {{encrypted: "{encrypted}"}}}}
routes:
  - {{sender: acme.example, upstream: acme}}
  - {{sender: globex.example, upstream: globex}}
  - {{sender: initech.example, upstream: initech}}
spool: {{directory: spool}}
secrets: {{key_file: relay.key}}
log: {{format: json, level: debug}}
"""


@pytest.mark.timeout(90)
async def test_sighup_reads_files_and_commands_again_in_the_real_process(tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "relay.key").write_text(key)
    for name in ("acme", "globex"):
        (tmp_path / name).write_text(OLD)
    async with ScriptedUpstream(users={"acme": OLD, "globex": OLD, "initech": SECRET}) as server:
        text = CONFIG.format(port=server.port, python=sys.executable, encrypted=Keyring([key]).encrypt(SECRET))
        async with RelayProcess(text, directory=tmp_path) as relay:

            async def send(domain: str, count: int) -> None:
                async with Client(*relay.address()) as client:
                    await client.greet()
                    await client.deliver(f"app@{domain}.example", ["you@example.org"], CONTENT.replace(b"acme", domain.encode()))
                await server.received(count)

            for count, domain in enumerate(("acme", "globex", "initech"), 1):
                await send(domain, count)
            users(server, acme=NEW, globex=NEW, initech=SECRET)
            for name in ("acme", "globex"):
                (tmp_path / name).write_text(NEW)
            relay.signal(signal.SIGHUP)
            done = "2 secrets from files and commands read again: 2 changed, 0 could not be read"
            await relay.event("note", what=done)
            notes = [str(event["what"]) for event in relay.events("note")]
            assert "SIGHUP: secrets are read again; the configuration file is not, restart to use a new one" in notes
            assert "upstream acme: its secret has changed (file acme)" in notes
            assert f"upstream globex: its secret has changed (command {sys.executable})" in notes
            for count, domain in enumerate(("acme", "globex", "initech"), 4):
                await send(domain, count)
            assert all(login.accepted for login in server.logins)
            assert [login.password for login in server.logins if login.user == "acme"] == [OLD, NEW]
            (tmp_path / "acme").unlink()
            relay.signal(signal.SIGHUP)
            await relay.event("note", what="2 secrets from files and commands read again: 0 changed, 1 could not be read", level="warning")
            await send("acme", 7)
            assert await relay.terminate() == 0
            encoded = [base64.b64encode(f"\0{user}\0{word}".encode()).decode() for user in ("acme", "globex") for word in (OLD, NEW)]
            for unseen in (OLD, NEW, SECRET, key, *encoded):
                assert unseen not in relay.log()
