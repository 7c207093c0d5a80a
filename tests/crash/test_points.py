"""kill -9 at every named point of the work: after the next start every recipient is accounted for."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from relay.sendmail.drop import write
from relay.sendmail.message import Letter
from tests.crash.load import config
from tests.crash.points import POINTS, launch
from tests.crash.test_kill import count_in, left_in, seeded
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

TAKEN, REFUSED, PUT_OFF = "taken@example.org", "refused@example.org", "later@example.org"
RECIPIENTS = ([TAKEN], [REFUSED], [PUT_OFF], [TAKEN, REFUSED, PUT_OFF])
SIZES = (300, 2_500_000, 20_000, 300_000, 300)
MESSAGES = 20


class Sender:
    """One client that sends one message after the other, until it has sent enough or the relay dies under it."""

    def __init__(self) -> None:
        self.recipients: dict[str, Sequence[str]] = {}
        self.acknowledged: set[str] = set()

    async def send(self, relay: RelayProcess) -> None:
        try:
            async with Client(*relay.address()) as client:
                await client.greet()
                while len(self.recipients) < MESSAGES:
                    await self._one(client)
        except (AssertionError, OSError):
            assert await relay.exited() == -9

    async def _one(self, client: Client) -> None:
        number = len(self.recipients)
        name, recipients = f"m{number}", RECIPIENTS[number % len(RECIPIENTS)]
        self.recipients[name] = recipients
        body = b"%074d\r\n" % 7 * (SIZES[number % len(SIZES)] // 76)
        await client.deliver("app@acme.example", recipients, b"X-Id: %b\r\n\r\n%b" % (name.encode(), body))
        self.acknowledged.add(name)


def fates(upstream: ScriptedUpstream) -> tuple[Counter[tuple[str, str]], set[tuple[str, str]]]:
    """How often the upstream took each message for each recipient; and which of them a bounce has told of."""
    taken: Counter[tuple[str, str]] = Counter()
    bounced: set[tuple[str, str]] = set()
    for transaction in upstream.accepted:
        name = transaction.content.split(b"X-Id: ")[1].split(b"\r\n")[0].decode()
        if transaction.sender:
            taken.update((name, recipient) for recipient in transaction.recipients)
        else:
            bounced |= {(name, address) for address in (TAKEN, REFUSED, PUT_OFF) if b"rfc822;" + address.encode() in transaction.content}
    return taken, bounced


@pytest.mark.parametrize("point", POINTS)
async def test_every_recipient_is_accounted_for_when_the_relay_dies_as(tmp_path: Path, eventually: Callable[..., Any], point: str) -> None:
    rng = seeded(point)
    sender = Sender()
    async with ScriptedUpstream() as upstream:
        upstream.script("rcpt", b"550 5.1.1 nobody of that name", recipient=REFUSED)
        upstream.script("rcpt", b"450 4.2.0 not now", recipient=PUT_OFF, times=3)
        text = config(tmp_path, upstream.port, connections=5).replace("first: 1s, max: 2s", "first: 200ms, max: 400ms")
        dying = RelayProcess(text, directory=tmp_path, launch=launch(point, rng.randrange(1, 4)))
        await dying.start()
        await sender.send(dying)
        assert await dying.exited() == -9, "it was killed, and at this point"
        promised = set(sender.acknowledged)
        async with RelayProcess(text, directory=tmp_path) as relay:
            await eventually(lambda: count_in(tmp_path, "message") == 0, "an empty queue", within=30)
            assert await relay.terminate() == 0
        taken, bounced = fates(upstream)
    owed = {(name, recipient) for name in promised for recipient in sender.recipients[name]}
    assert owed <= taken.keys() | bounced, "acknowledged, and neither sent nor bounced"
    assert {recipient for _, recipient in bounced} <= {REFUSED}
    assert not {recipient for _, recipient in taken} & {REFUSED}
    twice = {key: count for key, count in taken.items() if count > 1}
    assert len({name for name, _ in twice}) <= 5, "no more than were being attempted"
    assert left_in(tmp_path) == (0, 0, [])
    print(
        f"{point}: {len(promised)} acknowledged of {len(sender.recipients)}, {len(taken)} taken, {len(bounced)} bounced, {len(twice)} twice"
    )


@pytest.mark.parametrize("point", ["a batch with new mail is about to be committed", "a batch with new mail is committed"])
async def test_what_waits_in_the_drop_folder_is_taken_once_when_the_relay_dies_as(
    tmp_path: Path, eventually: Callable[..., Any], point: str
) -> None:
    async with ScriptedUpstream() as upstream:
        text = config(tmp_path, upstream.port, connections=5)
        dying = RelayProcess(text, directory=tmp_path, launch=launch(point, 1))
        await dying.start()
        (folder,) = tmp_path.rglob("drop")
        write(str(folder), Letter("app@acme.example", [TAKEN], b"X-Id: dropped\r\n\r\nhello\r\n"))
        assert await dying.exited() == -9, "it was killed, and at this point"
        assert len(list(folder.iterdir())) == 1
        async with RelayProcess(text, directory=tmp_path) as relay:
            await eventually(lambda: list(folder.iterdir()) == [] and count_in(tmp_path, "message") == 0, "nothing left", within=30)
            assert await relay.terminate() == 0
        taken, bounced = fates(upstream)
    assert (taken, bounced) == ({("dropped", TAKEN): 1}, set())
