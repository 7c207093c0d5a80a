"""Rates and quotas as the upstream sees them: the real process, twenty clients that send as fast as they may, restarts in between.

The quick form is part of the tests; `make pace` is the whole one, a minute long, and prints its figures.
"""

import asyncio
import os
from bisect import bisect_left
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.eventually import eventually
from tests.support.process import RelayProcess
from tests.support.sink import Sink

WHOLE = bool(os.environ.get("PACE"))
SECONDS = 60 if WHOLE else 5
CLIENTS = 20
NAMES = ("five", "two", "thirty", "quota")

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  five: {{host: 127.0.0.1, port: {five}, security: none, limits: {{rate: 5/s}}}}
  two: {{host: 127.0.0.1, port: {two}, security: none, limits: {{rate: 2/s}}}}
  thirty: {{host: 127.0.0.1, port: {thirty}, security: none, limits: {{rate: [30/m, 1000/d], recipient_rate: 1000/h}}}}
  quota: {{host: 127.0.0.1, port: {quota}, security: none, limits: {{rate: 50/h}}}}
routes:
  - {{name: five, sender: five.example, upstream: five}}
  - {{name: two, sender: two.example, upstream: two}}
  - {{name: thirty, sender: thirty.example, upstream: thirty}}
  - {{name: quota, sender: quota.example, upstream: quota}}
spool: {{directory: {directory}}}
log: {{format: json}}
"""


async def send(relay: RelayProcess, name: str, count: int) -> None:
    """One client after the other's reply, as fast as it gets them."""
    async with Client(*relay.address()) as client:
        await client.greet()
        for _ in range(count):
            await client.deliver(f"app@{name}.example", ["you@example.org"], b"Subject: hi\r\n\r\nhello\r\n")
        await client.quit()


async def send_together(relay: RelayProcess, name: str, count: int) -> None:
    await asyncio.gather(*(send(relay, name, count // CLIENTS) for _ in range(CLIENTS)))


async def until(when: float) -> None:
    loop = asyncio.get_running_loop()
    await eventually(lambda: loop.time() >= when, "the time to pass", within=SECONDS + 30)


def most_in_any(times: list[float], seconds: float) -> int:
    return max(bisect_left(times, start + seconds) - place for place, start in enumerate(times))


async def test_rates_are_kept_whoever_sends_and_across_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = asyncio.get_running_loop()
    async with Sink() as five, Sink() as two, Sink() as thirty:
        ports = {"five": five.port, "two": two.port, "thirty": thirty.port, "quota": 9}
        async with RelayProcess(CONFIG.format(**ports, directory=tmp_path / "spool"), directory=tmp_path) as relay:
            for name, rate in (("five", 5), ("two", 4), ("thirty", 1)):
                await send_together(relay, name, int(rate * SECONDS * 1.3) // CLIENTS * CLIENTS + 2 * CLIENTS)
            begun = loop.time()
            await until(begun + SECONDS + 1)
            counts = {sink.port: bisect_left(sink.times, begun + SECONDS) - bisect_left(sink.times, begun) for sink in (five, two, thirty)}
            await relay.terminate()
            await relay.start()
            restarted = loop.time()
            await until(restarted + SECONDS / 2)
    after = [time for time in two.times if time >= restarted]
    if WHOLE:
        with capsys.disabled():
            for name, sink, wanted in (("5/s", five, 300), ("2/s", two, 120), ("30/m", thirty, 30)):
                print(f"\n{name}: {counts[sink.port]} of {wanted} in 60 s, at most {most_in_any(sink.times, 60)} in any 60 s", end="")
            print(f"\n2/s after a restart: {len(after)} in {SECONDS / 2:.0f} s, at most {most_in_any(two.times, 10)} in any 10 s")
    assert counts[five.port] == pytest.approx(5 * SECONDS, rel=0.02, abs=2)
    assert counts[two.port] == pytest.approx(2 * SECONDS, rel=0.02, abs=2)
    assert counts[thirty.port] == pytest.approx(SECONDS / 2, rel=0.02, abs=1)
    # A second's worth of burst at first, and what a busy machine makes arrive together.
    assert most_in_any(five.times, SECONDS) <= 5 * SECONDS + 6
    assert most_in_any(two.times, SECONDS) <= 2 * SECONDS + 3
    assert len(after) == pytest.approx(SECONDS, rel=0.02, abs=2), "it went on, and with no burst but one"


async def test_a_quota_is_kept_across_a_kill_and_a_restart(tmp_path: Path) -> None:
    async with Sink() as sink:
        ports = {"five": 9, "two": 9, "thirty": 9, "quota": sink.port}
        async with RelayProcess(CONFIG.format(**ports, directory=tmp_path / "spool"), directory=tmp_path) as relay:
            await send_together(relay, "quota", 40)
            await relay.event("sent", count=40)  # told once it is stored
            await relay.kill()
            await relay.start()
            await send_together(relay, "quota", 40)
            await eventually(lambda: sink.messages >= 50, "the rest of the quota")
            await relay.terminate()
            await relay.start()
            await send_together(relay, "quota", 20)
            await send(relay, "quota", 1)
            await relay.terminate()
    assert sink.messages == 50
