"""Clients that wait for the upstream's verdict, many at once, with a relay that is killed and stopped under them: every reply was true."""

import asyncio
import email
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream, unused_port

CONFIG = """
hostname: relay.test
listeners: [{{bind: "127.0.0.1:0", name: local}}]
upstreams:
  up: {{host: 127.0.0.1, port: {up}, security: none, limits: {{connections: 5}}}}
  side: {{host: 127.0.0.1, port: {side}, security: none, limits: {{connections: 5}}}}
  down: {{host: 127.0.0.1, port: {down}, security: none}}
routes:
  - {{name: split, recipient: side.example, upstream: side, wait: 60s}}
  - {{name: brief, sender: brief.example, upstream: up, wait: 5ms}}
  - {{name: second, sender: second.example, upstream: down, fallback: up, wait: 60s}}
  - {{name: long, sender: long.example, upstream: up, wait: 60s}}
retry: {{first: 100ms, max: 500ms, expire: 1h}}
spool: {{directory: {directory}}}
shutdown_timeout: 10s
log: {{format: json}}
"""
SENDERS = ("app@brief.example", "app@second.example", "app@long.example")
RECIPIENTS = ("yes@up.example", "no@up.example", "later@up.example", "yes@side.example", "no@side.example")
_ID = re.compile(rb"^X-Id: (\S+)\r$", re.MULTILINE)
_FINAL_RECIPIENT = re.compile(rb"^Final-Recipient: rfc822;(\S+)\r?$", re.MULTILINE)

Account = dict[str, set[str]]


class Clients:
    """They send, and remember what they were told: for each message the recipients, and the reply or None."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.told: dict[str, tuple[set[str], str | None]] = {}
        self.ending = False

    async def session(self, relay: RelayProcess) -> None:
        try:
            async with Client(*relay.address(), deadline=30) as client:
                await client.greet()
                while not self.ending:
                    await self._send(client)
        except (AssertionError, OSError):
            if not self.ending:
                raise

    async def _send(self, client: Client) -> None:
        rng, name = self._rng, f"m{len(self.told) + 1}"
        weights = [4, 8, 1, 2, 4]
        recipients = set(rng.choices(RECIPIENTS, weights, k=rng.choice([1, 1, 2])))
        self.told[name] = (recipients, None)
        await client.command(f"MAIL FROM:<{rng.choice(SENDERS)}>", 250)
        for recipient in sorted(recipients):
            await client.command(f"RCPT TO:<{recipient}>", 250)
        await client.command("DATA", 354)
        await client.send(b"From: app@long.example\r\nX-Id: %b\r\n\r\nhello\r\n.\r\n" % name.encode())
        if rng.random() < 0.02:
            self.told[name] = (recipients, None)
            raise OSError  # this one does not wait for its answer
        self.told[name] = (recipients, str(await client.reply()))


def accounts(*upstreams: ScriptedUpstream) -> tuple[Account, Account]:
    """Who has got each message, and about whom a bounce of it has arrived."""
    arrived, bounced = defaultdict(set), defaultdict(set)
    for transaction in (each for upstream in upstreams for each in upstream.accepted):
        match = _ID.search(transaction.content)
        assert match, transaction.content
        report = not transaction.sender
        if report:
            assert email.message_from_bytes(transaction.content).get_content_type() == "multipart/report"
        names = [found.decode() for found in _FINAL_RECIPIENT.findall(transaction.content)] if report else transaction.recipients
        (bounced if report else arrived)[match[1].decode()].update(names)
    return arrived, bounced


@pytest.mark.timeout(150)
async def test_every_reply_was_true_however_often_the_relay_is_killed_or_stopped(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    seed = int(os.environ.get("RELAY_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"wait: RELAY_TEST_SEED={seed}")
    rng = random.Random(seed)
    clients = Clients(rng)
    down = ScriptedUpstream(port=unused_port())
    async with ScriptedUpstream() as up, ScriptedUpstream() as side:
        for upstream in (up, side, down):
            upstream.script("rcpt", b"550 5.1.1 nobody here", recipient="no@up.example")
            upstream.script("rcpt", b"550 5.1.1 nobody here", recipient="no@side.example")
            upstream.script("rcpt", b"450 4.2.0 later", recipient="later@up.example", times=20)
        config = CONFIG.format(up=up.port, side=side.port, down=down.port, directory=tmp_path / "spool")
        async with RelayProcess(config, directory=tmp_path) as relay:
            for number in range(4):
                clients.ending = False
                enough = len(clients.told) + rng.randrange(40, 120)
                running = [asyncio.create_task(quietly(clients, relay), name=f"load {n}") for n in range(20)]
                await eventually(lambda enough=enough: len(clients.told) >= enough, "load", within=30)
                clients.ending = True
                if number % 2:
                    assert await relay.terminate() == 0
                else:
                    await relay.kill()
                await asyncio.gather(*running)
                await relay.start()

            def settled() -> bool:
                arrived, bounced = accounts(up, side, down)
                queued = {name: who for name, (who, reply) in clients.told.items() if reply and "queued as" in reply}
                return all(who == arrived[name] | bounced[name] for name, who in queued.items())

            # What was on its way to it at a kill is in doubt there, and goes nowhere else.
            async with down:
                await eventually(settled, "everybody of what was queued to be sent to or reported", within=60)
                assert await relay.terminate() == 0
        arrived, bounced = accounts(up, side, down)
        errors = [event for event in relay.events() if event.get("level") == "error"]
    kinds: Counter[str] = Counter()
    for name, (who, reply) in clients.told.items():
        told = "nothing" if reply is None else "refused" if reply[0] == "5" else reply.split()[3]
        kinds[told] += 1
        if told == "sent":
            assert (arrived[name], bounced[name]) == (who, set()), (name, who, reply)
        elif told == "refused":
            assert (arrived[name], bounced[name]) == (set(), set()), (name, who, reply)
            assert all(recipient.startswith("no@") for recipient in who)
    print(f"2 kills, 2 stops: {dict(kinds)}")
    assert min(kinds[told] for told in ("sent", "refused", "queued")) > 10, kinds
    assert errors == []


async def quietly(clients: Clients, relay: RelayProcess) -> None:
    """One client after the other, as some of them leave."""
    while not clients.ending:
        try:
            await clients.session(relay)
        except OSError:
            continue
