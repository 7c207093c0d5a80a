"""The ways in of a real relay: several listeners, Unix sockets over deaths and restarts, sockets from systemd, and a proxy."""

import asyncio
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import LAUNCH, REPOSITORY, RelayDied, RelayProcess
from tests.support.upstream import ScriptedUpstream, unused_port

CONFIG = """
hostname: relay.test
listeners:
{listeners}
upstreams:
  up: {{host: 127.0.0.1, port: {port}, security: none}}
routes:
  - {{name: by-user, client: "uid:{uid}", upstream: up}}
  - {{name: by-network, client: [127.0.0.0/8, "::1", 192.0.2.0/24], upstream: up}}
spool: {{directory: {directory}/spool}}
log: {{format: json}}
"""
CONTENT = b"From: app@acme.example\r\nTo: you@example.org\r\nSubject: hi\r\n\r\nhello\r\n"
BEHIND_PROXY = 'bind: "127.0.0.1:0", name: behind, proxy_protocol: 127.0.0.1, networks: 192.0.2.0/24'
# What systemd does before it starts a service (sd_listen_fds(3)).
HAND_OVER = """
import fcntl, os
high = [fcntl.fcntl(number, fcntl.F_DUPFD, 500) for number in {numbers}]
for place, number in enumerate(high):
    os.dup2(number, 3 + place)
    os.close(number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES={names!r})
"""


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    server = ScriptedUpstream()
    await server.start()
    yield server
    await server.stop()


def config(directory: Path, upstream: ScriptedUpstream, *listeners: str, uid: int = os.getuid()) -> str:
    lines = "\n".join(f"  - {{{listener}}}" for listener in listeners)
    return CONFIG.format(directory=directory, port=upstream.port, listeners=lines, uid=uid)


async def send(host: str, port: int = 0, *, header: bytes = b"") -> None:
    async with Client(host, port) as client:
        await client.send(header)
        await client.greet()
        await client.deliver("app@acme.example", ["you@example.org"], CONTENT)
        await client.quit()


@asynccontextmanager
async def stopped_cleanly(relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    async with relay:
        yield relay
        assert await relay.terminate() == 0
    assert relay.events("fault") == []


async def test_each_listener_has_settings_and_a_name_of_its_own(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    text = config(
        tmp_path,
        upstream,
        'bind: "127.0.0.1:0", name: first, message_size: 1000',
        'bind: "[::1]:0", name: second, recipients: 1',
        f"bind: unix:{tmp_path}/smtp.sock, name: socket",
        BEHIND_PROXY,
    )
    async with stopped_cleanly(RelayProcess(text, directory=tmp_path)) as relay:
        await relay.event("listening", count=4)
        for name in ("first", "second"):
            await send(*relay.address(name))
        await send(f"{tmp_path}/smtp.sock")
        await send(*relay.address("behind"), header=b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25\r\n")
        await relay.event("sent", count=4)
        told = {event["listener"]: (event["client"], event["route"]) for event in relay.events("accepted")}
        assert told == {
            "first": ("127.0.0.1", "by-network"),
            "second": ("::1", "by-network"),
            "socket": (f"uid:{os.getuid()}", "by-user"),
            "behind": ("192.0.2.7", "by-network"),
        }
        async with Client(*relay.address("first")) as client:
            assert "SIZE 1000" in (await client.greet()).lines
        async with Client(*relay.address("second")) as client:
            await client.greet()
            await client.command("MAIL FROM:<app@acme.example>", 250)
            await client.command("RCPT TO:<a@example.org>", 250)
            await client.command("RCPT TO:<b@example.org>", 452, "4.5.3")


# -- Unix sockets ---------------------------------------------------------------------------------------------------------


async def test_a_unix_socket_outlives_no_stop_and_hinders_no_start(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    path = tmp_path / "smtp.sock"
    text = config(tmp_path, upstream, f'bind: unix:{path}, name: socket, mode: "0660"')
    async with stopped_cleanly(RelayProcess(text, directory=tmp_path)) as relay:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        await send(str(path))
        await relay.kill()
        assert path.is_socket(), "nobody was there to take it away"
        await relay.start()
        await send(str(path))
        assert await relay.terminate() == 0
        assert not path.exists()
        await relay.start()
        await send(str(path))
    assert not path.exists()


async def test_a_second_relay_leaves_the_socket_of_the_first_alone(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    path = tmp_path / "smtp.sock"
    (tmp_path / "other").mkdir()
    listener = f"bind: unix:{path}, name: socket"
    async with stopped_cleanly(RelayProcess(config(tmp_path, upstream, listener), directory=tmp_path)):
        other = RelayProcess(config(tmp_path / "other", upstream, listener), directory=tmp_path / "other")
        with pytest.raises(RelayDied):
            await other.start()
        assert await other.exited() == 75
        assert f"the socket {path} belongs to another relay" in other.log()
        await send(str(path))


async def test_a_route_for_one_user_is_not_for_another(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    user = 65534 if os.geteuid() == 0 else os.getuid()
    with TemporaryDirectory(dir="/tmp") as directory:  # tmp_path is closed to others
        path = Path(directory)
        path.chmod(0o755)
        text = config(tmp_path, upstream, f"bind: unix:{path}/s, name: elsewhere", uid=user + 1)
        async with stopped_cleanly(RelayProcess(text, directory=tmp_path)) as relay:
            client = Client(f"{path}/s")
            myself = os.geteuid()
            os.seteuid(user)
            try:
                await client.connect()
            finally:
                os.seteuid(myself)
            await client.greet()
            await client.command("MAIL FROM:<app@acme.example>", 550, "5.7.1")
            client.close()
            (event,) = await relay.event("refused")
            assert (event["client"], event["sender"]) == (f"uid:{user}", "app@acme.example")


# -- sockets from systemd -------------------------------------------------------------------------------------------------


def handing_over(text: str, directory: Path, **sockets: socket.socket) -> RelayProcess:
    numbers = [each.fileno() for each in sockets.values()]
    launch = HAND_OVER.format(numbers=numbers, names=":".join(sockets)) + LAUNCH
    return RelayProcess(text, directory=directory, launch=launch, pass_fds=numbers)


async def test_with_a_socket_from_systemd_a_restart_refuses_nobody(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    path = tmp_path / "s.sock"
    with socket.create_server(("127.0.0.1", 0)) as first, socket.socket(socket.AF_UNIX) as second:
        second.bind(str(path))
        second.listen()
        port = first.getsockname()[1]
        text = config(tmp_path, upstream, "bind: systemd:mail, name: first", "bind: systemd:local, name: socket")
        async with stopped_cleanly(handing_over(text, tmp_path, mail=first, local=second)) as relay:
            await relay.event("listening", count=2)
            assert relay.address("first") == ("127.0.0.1", port)
            await send("127.0.0.1", port)
            await send(str(path))
            assert await relay.terminate() == 0
            assert path.is_socket(), "it is systemd's"
            waiting = [asyncio.create_task(send("127.0.0.1", port)), asyncio.create_task(send(str(path)))]
            await asyncio.sleep(0)
            await relay.start()
            await asyncio.gather(*waiting)
            await relay.event("sent", count=4)
    assert {event["client"] for event in relay.events("accepted")} == {"127.0.0.1", f"uid:{os.getuid()}"}


async def test_a_socket_that_nobody_wants_is_said_and_one_that_is_missing_too(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given, socket.create_server(("127.0.0.1", 0)) as unwanted:
        text = config(tmp_path, upstream, "bind: systemd:mail, name: first")
        async with stopped_cleanly(handing_over(text, tmp_path, mail=given, other=unwanted)) as relay:
            assert "systemd has handed over sockets that no listener takes: other" in relay.log()
    relay = RelayProcess(text, directory=tmp_path)
    with pytest.raises(RelayDied):
        await relay.start()
    assert await relay.exited() == 75
    assert "cannot run: systemd has handed over no socket named mail: it has handed over none" in relay.log()


async def test_the_first_connection_starts_it_and_is_served(tmp_path: Path, upstream: ScriptedUpstream, tool: Callable[[str], str]) -> None:
    port = unused_port()
    argv = [tool("systemd-socket-activate"), "-l", f"127.0.0.1:{port}", "--fdname=mail", "-E", f"PYTHONPATH={REPOSITORY}"]
    argv += [sys.executable, "-c", LAUNCH]
    launch = f"import os, sys; os.execv({argv[0]!r}, {argv!r} + sys.argv[1:])"
    text = config(tmp_path, upstream, "bind: systemd:mail, name: first")
    relay = RelayProcess(text, directory=tmp_path, launch=launch)
    starting = asyncio.create_task(relay.start())
    try:
        await eventually(lambda: "Listening on" in relay.log(), "the socket to be open")
        await send("127.0.0.1", port)
        await starting
        await relay.event("sent")
        assert relay.address("first") == ("127.0.0.1", port)
        assert await relay.terminate() == 0
    finally:
        starting.cancel()
        if relay.running:
            await relay.kill()


async def test_the_socket_unit_fits_the_service() -> None:
    text = (REPOSITORY / "systemd" / "relay.socket").read_text()
    sections: dict[str, dict[str, list[str]]] = {}
    for part in text.partition("[")[2].split("\n["):
        name, _, lines = part.partition("]\n")
        section = sections.setdefault(name, {})
        for line in lines.splitlines():
            if line and not line.startswith("#"):
                key, _, value = line.partition("=")
                section.setdefault(key, []).append(value)
    assert sections["Socket"]["FileDescriptorName"] == ["smtp"]
    assert sections["Socket"].get("Accept", ["no"]) == ["no"]
    assert "ListenStream" in sections["Socket"] and sections["Install"]["WantedBy"] == ["sockets.target"]


async def test_systemd_takes_the_units(tmp_path: Path, tool: Callable[[str], str]) -> None:
    for name in ("relay.socket", "relay.service"):
        text = (
            (REPOSITORY / "systemd" / name).read_text().replace("/opt/relay/bin/relay", sys.executable).replace("User=relay", "User=root")
        )
        (tmp_path / name).write_text(text.replace("Group=relay", "Group=root"))
    command = [tool("systemd-analyze"), "verify", "--man=no", str(tmp_path / "relay.socket"), str(tmp_path / "relay.service")]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    complaints = [line for line in out.decode().splitlines() if "relay." in line]
    assert complaints == [] and process.returncode == 0, f"{shlex.join(command)}\n{out.decode()}"


# -- a proxy --------------------------------------------------------------------------------------------------------------


async def test_behind_a_proxy_nothing_goes_without_its_header_and_a_stop_is_clean(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    text = config(tmp_path, upstream, BEHIND_PROXY)
    async with stopped_cleanly(RelayProcess(text, directory=tmp_path)) as relay:
        host, port = relay.address("behind")
        async with Client(host, port) as client:
            await client.send(b"EHLO app\r\n")
            await client.expect(554, "5.7.1")
        for header, code in ((b"PROXY TCP4 198.51.100.1 203.0.113.1 1 2\r\n", 554), (b"PROXY UNKNOWN\r\n", 220)):
            async with Client(host, port) as client:
                await client.send(header)
                await client.expect(code)
        await relay.event("refused", count=2)
        assert [event["client"] for event in relay.events("refused")] == ["127.0.0.1", "198.51.100.1"]
        silent = Client(host, port)
        await silent.connect()
        await silent.send(b"PROXY TCP4 192.0.2.7 203.")
        await send(host, port, header=b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 25\r\n")
        (event,) = await relay.event("sent")
        assert event["recipients"] == "you@example.org"
    silent.close()
