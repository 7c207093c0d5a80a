"""Many tenants and long queues in the real process: neither a start nor a message costs more than it must, and nobody waits for others.

The quick form is part of the tests; `make scale` is the whole one, ten thousand tenants and a hundred thousand queued messages, and
prints its figures. What is counted rather than timed is in tests/unit/test_backlog.py.
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from relay.clock import SystemClock
from relay.spool.base import Lane
from relay.spool.sqlite import SqliteSpool
from tests.contract.drafts import draft
from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import RelayProcess
from tests.support.sink import Sink

WHOLE = bool(os.environ.get("SCALE"))
TENANTS = 10_000 if WHOLE else 2_000
START_RATIO = 6.0 if WHOLE else 3.0  # to a start with ten tenants, which takes half a second: Python and the libraries
RESIDENT_BYTES = 400_000_000
QUEUED = 100_000 if WHOLE else 3_000
MESSAGES = 2_000 if WHOLE else 300
ROUNDS = 3  # the machine may be busy with something else: one good round shows that the relay is not what is in the way
CONTENT = b"From: app@fast.example\r\nSubject: hi\r\n\r\n" + b"x" * 2000 + b"\r\n"

HEAD = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
spool: {{directory: {directory}}}
log: {{format: json}}
"""
TENANT = """
  t{0}:
    host: 127.0.0.1
    port: {1}
    security: none
    username: relay@t{0}.example
    password: secret{0}
    auth: none
    senders: t{0}.example
"""
NOISY = """
upstreams:
  slow: {{host: 127.0.0.1, port: {slow}, security: none, senders: slow.example, timeouts: {{connect: 1s, command: 1s}}}}
  fast: {{host: 127.0.0.1, port: {fast}, security: none, senders: fast.example}}
routes:
  - {{name: slow, sender: slow.example, upstream: slow}}
  - {{name: fast, sender: fast.example, upstream: fast}}
"""


def tenants(directory: Path, count: int, *, port: int) -> str:
    """A configuration with so many tenants, each with an upstream, a credential and a route of its own."""
    upstreams = "".join(TENANT.format(number, port) for number in range(count))
    routes = "".join(f"  - {{name: t{number}, sender: t{number}.example, upstream: t{number}}}\n" for number in range(count))
    return f"{HEAD.format(directory=directory)}upstreams:\n{upstreams}routes:\n{routes}"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


async def deliver(relay: RelayProcess, sink: Sink, domains: Sequence[str], count: int) -> list[float]:
    """So many messages one after the other, the domains in turn; the seconds from each final dot until the upstream has the message."""
    times: list[float] = []
    async with Client(*relay.address()) as client:
        await client.greet()
        for number in range(count):
            domain = domains[number % len(domains)]
            await client.command(f"MAIL FROM:<app@{domain}>", 250)
            await client.command("RCPT TO:<you@example.org>", 250)
            await client.command("DATA", 354)
            before, began = sink.messages, time.perf_counter()
            await client.send(CONTENT.replace(b"fast.example", domain.encode()) + b".\r\n")
            await client.expect(250)
            await eventually(lambda before=before: sink.messages > before, "the message to arrive")  # type: ignore[misc]
            times.append(time.perf_counter() - began)
        await client.quit()
    return times


@pytest.mark.timeout(300)
async def test_many_tenants_start_soon_fit_in_memory_and_cost_a_message_nothing(tmp_path: Path) -> None:
    async with Sink() as sink, AsyncExitStack() as stack:
        spent: dict[int, list[float]] = {10: [], TENANTS: []}
        start: dict[int, float] = {}
        relays: dict[int, RelayProcess] = {}
        for count in spent:
            directory = tmp_path / str(count)
            directory.mkdir()
            began = time.perf_counter()
            text = tenants(directory / "spool", count, port=sink.port)
            relays[count] = relay = await stack.enter_async_context(RelayProcess(text, directory=directory))
            started, resident = time.perf_counter() - began, resident_bytes(relay.pid)
            start[count] = cpu_seconds(relay.pid)
            print(f"{count} tenants: listening after {started:.2f} s, {start[count]:.2f} s of CPU, {resident / 1e6:.0f} MB")
            assert start[count] < START_RATIO * start[10]
            assert resident < RESIDENT_BYTES
        domains = [f"t{number}.example" for number in range(10)]
        for relay in relays.values():
            await deliver(relay, sink, domains, 50)
        for _ in range(ROUNDS):  # in turn: the speed of a machine that others use, too, changes within seconds
            for count, relay in relays.items():
                cpu = cpu_seconds(relay.pid)
                await deliver(relay, sink, domains, MESSAGES)
                spent[count].append((cpu_seconds(relay.pid) - cpu) / MESSAGES)
        for count, relay in relays.items():
            everywhere = [f"t{number}.example" for number in range(0, count, max(1, count // MESSAGES))]
            await deliver(relay, sink, everywhere, min(len(everywhere), MESSAGES))
            assert await relay.terminate() == 0
        rounds = list(zip(*spent.values(), strict=True))
        print(
            "a message, us of CPU, with 10 and", TENANTS, "tenants:", ", ".join(f"{few * 1e6:.0f} {many * 1e6:.0f}" for few, many in rounds)
        )
        assert min(many / few for few, many in rounds) < 1.5


async def fill(directory: Path, count: int) -> None:
    """A spool with so much mail for the lane of an upstream that hangs."""
    clock = SystemClock()
    spool = SqliteSpool(directory, clock, backoff=lambda attempts: 60.0, keep_log_seconds=86_400.0)
    now, content = clock.now(), CONTENT.replace(b"fast.example", b"slow.example")
    for _ in range(0, count, 500):
        drafts = [
            draft(spool, lane=Lane("slow", "slow"), sender="app@slow.example", content=content, created=now, due=now, prefix=b"X: y\r\n")
            for _ in range(500)
        ]
        await spool.put(drafts, [False] * len(drafts))
    await spool.close()


def worst(times: list[float]) -> float:
    """Their 99th percentile."""
    return sorted(times)[len(times) * 99 // 100]


@pytest.mark.timeout(600)
async def test_a_long_queue_for_an_upstream_that_hangs_costs_its_neighbour_nothing(tmp_path: Path) -> None:
    await fill(tmp_path / "filled", QUEUED)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hanging:  # the kernel takes connections, and nobody says a word
        async with Sink() as sink:
            took: dict[str, float] = {}
            busy: dict[str, float] = {}
            for _ in range(ROUNDS):
                for name in ("empty", "filled"):
                    directory = tmp_path / f"relay-{name}"
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir()
                    if name == "filled":
                        shutil.copytree(tmp_path / "filled", directory / "spool")
                    text = HEAD.format(directory=directory / "spool") + NOISY.format(slow=hanging.getsockname()[1], fast=sink.port)
                    async with RelayProcess(text, directory=directory) as relay:
                        if name == "filled":
                            await eventually(lambda log=relay.log: "it is left alone" in log(), "the breaker to open", within=30)  # type: ignore[misc]
                        await deliver(relay, sink, ["fast.example"], 50)
                        cpu = cpu_seconds(relay.pid)
                        took[name] = worst(await deliver(relay, sink, ["fast.example"], MESSAGES))
                        busy[name] = cpu_seconds(relay.pid) - cpu
                        await relay.kill()
                print(", ".join(f"{name}: p99 {took[name] * 1000:.1f} ms, {busy[name]:.2f} s of CPU" for name in took))
                if took["filled"] < 1.2 * took["empty"]:
                    break
            assert took["filled"] < (1.2 if WHOLE else 2.0) * took["empty"] + (0.0 if WHOLE else 0.020), f"in each of {ROUNDS} rounds"
