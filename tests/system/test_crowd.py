"""A crowd at the door of the real process: many idle connections cost little memory, and many slow senders cost others no time.

The quick form is part of the tests; `make crowd` is the whole one, and prints its figures.
"""

import asyncio
import os
import re
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.client import Client
from tests.support.process import LAUNCH, RelayProcess
from tests.support.sink import Sink

WHOLE = bool(os.environ.get("CROWD"))
IDLE_CONNECTIONS = 5_000 if WHOLE else 1_000
IDLE_TLS_CONNECTIONS = 5_000 if WHOLE else 300
LIMITS_BYTES = {"plain": 25_000, "tls": 40_000}  # a TLS session of OpenSSL and the loop alone takes 25,000
AT_ONCE = 100  # fewer than wait in the queue of the listening socket

SLOW_SENDERS = 200
MESSAGES = 2_000 if WHOLE else 400
ROUNDS = 3  # the machine may be busy with something else: one good round shows that the relay is not what is in the way

CONFIG = """
hostname: relay.test
listeners:
  - {{bind: "127.0.0.1:0", name: plain, connections: 6000}}
  - {{bind: "127.0.0.1:0", name: tls, connections: 6000, security: tls, certificate: {certificate}, key: {key}}}
upstreams:
  house: {{host: 127.0.0.1, port: {port}, security: none}}
routes:
  - {{sender: "*", upstream: house}}
spool: {{directory: {directory}}}
log: {{format: json}}
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for the connections: ours here, and those of the process, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * IDLE_CONNECTIONS + 1_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def config(tmp_path: Path, tls: Authority, *, port: int = 25) -> str:
    files = tls.files()
    return CONFIG.format(certificate=files.certificate, key=files.key, port=port, directory=tmp_path / "spool")


def resident_bytes(pid: int) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def connect(address: tuple[str, int], count: int, context: ssl.SSLContext | None) -> list[socket.socket]:
    """So many clients that have said EHLO and say nothing more."""
    open_: list[socket.socket] = []
    while len(open_) < count:
        new = [socket.create_connection(address, timeout=30) for _ in range(min(AT_ONCE, count - len(open_)))]
        if context is not None:
            new = [context.wrap_socket(each, server_hostname="localhost") for each in new]
        for each in new:
            assert each.recv(1000).startswith(b"220 ")
            each.sendall(b"EHLO app\r\n")
        for each in new:
            assert each.recv(1000).startswith(b"250-")
        open_ += new
    return open_


@pytest.mark.parametrize(("connections", "allowed"), [(100, 700), (6000, 3000)])
async def test_it_allows_itself_as_many_files_as_its_listeners_need(tmp_path: Path, tls: Authority, connections: int, allowed: int) -> None:
    """And says so, where it may not."""
    text = config(tmp_path, tls).replace("connections: 6000", f"connections: {connections}")
    launch = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 3000)); {LAUNCH}"
    async with RelayProcess(text, directory=tmp_path, launch=launch) as relay:
        assert resource.prlimit(relay.pid, resource.RLIMIT_NOFILE) == (allowed, 3000)
        told = [event["what"] for event in relay.events("note") if "files may be open" in event["what"]]
        assert len(told) == (1 if allowed == 3000 else 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("listener", "count"), [("plain", IDLE_CONNECTIONS), ("tls", IDLE_TLS_CONNECTIONS)])
async def test_an_idle_connection_takes_little_memory(tmp_path: Path, tls: Authority, many_files: None, listener: str, count: int) -> None:
    async with RelayProcess(config(tmp_path, tls), directory=tmp_path) as relay:
        context = tls.client_context() if listener == "tls" else None
        crowd = connect(relay.address(listener), count // 5, context)  # these take what the start has left over
        before = resident_bytes(relay.pid)
        crowd += connect(relay.address(listener), count - len(crowd), context)
        each_bytes = (resident_bytes(relay.pid) - before) / (count - count // 5)
        print(f"{count} idle connections, {listener}: {each_bytes / 1000:.1f} kB each")
        for one in (crowd[0], crowd[-1]):
            one.sendall(b"NOOP\r\n")
            assert one.recv(1000).startswith(b"250 ")
        for each in crowd:
            each.close()
        assert each_bytes < LIMITS_BYTES[listener]
        assert await relay.terminate() == 0


async def deliver_and_measure(host: str, port: int) -> float:
    """The 99th percentile of the time from the final dot to the acknowledgement, over one session's messages."""
    times: list[float] = []
    async with Client(host, port) as client:
        await client.greet()
        for _ in range(MESSAGES):
            await client.command("MAIL FROM:<app@acme.example>", 250)
            await client.command("RCPT TO:<you@example.org>", 250)
            await client.command("DATA", 354)
            began = time.perf_counter()
            await client.send(b"Subject: hi\r\n\r\n" + b"x" * 2000 + b"\r\n.\r\n")
            await client.expect(250)
            times.append(time.perf_counter() - began)
        await client.quit()
    return sorted(times)[len(times) * 99 // 100]


async def trickle(sockets: list[socket.socket]) -> None:
    """Each sender's next line, one sender after the other, five lines a second from each: more than it takes to stay."""
    while True:
        for each in sockets:
            each.send(b"a line of forty octets, with its CRLF....\r\n")
            await asyncio.sleep(0.2 / len(sockets))


@pytest.mark.timeout(180)
async def test_slow_senders_take_no_time_from_others(tmp_path: Path, tls: Authority) -> None:
    async with Sink() as sink, RelayProcess(config(tmp_path, tls, port=sink.port), directory=tmp_path) as relay:
        address = relay.address("plain")
        slow = connect(address, SLOW_SENDERS, None)
        for each in slow:
            each.sendall(b"MAIL FROM:<slow@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n")
            assert each.recv(1000).startswith(b"250 ")
        for _ in range(ROUNDS):
            alone = await deliver_and_measure(*address)
            trickling = asyncio.create_task(trickle(slow))
            beside = await deliver_and_measure(*address)
            trickling.cancel()
            await asyncio.wait([trickling])
            print(f"p99 {alone * 1000:.1f} ms alone, {beside * 1000:.1f} ms beside {SLOW_SENDERS} slow senders")
            if beside < 2 * alone + 0.020:
                break
        assert beside < 2 * alone + 0.020, f"in each of {ROUNDS} rounds"
        for each in slow:
            each.close()
