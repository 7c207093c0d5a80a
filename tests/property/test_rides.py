"""Many messages through a pool to an upstream that answers late, in pieces and all at once, refuses, says goodbye, falls silent and
cuts at any octet. However that goes, each message has one outcome that is true: what is sent arrived once, in its own envelope, and
what is not did not arrive, unless it is in doubt. Afterwards nobody waits and no right to a connection is lost or was won,
nor have there ever been more of them than allowed.

Every run rolls other dice; the seed of a failed one is in its output.
"""

import asyncio
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random, SystemRandom

import pytest

from relay.config.upstreams import Upstream
from relay.mail.outcome import Outcome, Status
from relay.upstream.pool import Pool
from relay.upstream.rides import Busy
from relay.upstream.session import Session
from tests.support.eventually import eventually
from tests.system.upstreams import PATIENT, outgoing, pool_to, raw_server

pytestmark = pytest.mark.both_loops

MESSAGES = 30
SECONDS = float(os.environ.get("RELAY_RIDES_SECONDS", "5"))
ROUND_SECONDS = 30.0

#: Where the upstream falls silent. A machine that is slower than this makes an outcome of it, which must be as true.
IMPATIENT = {"connect": "300ms", "command": "100ms", "data": "100ms", "final": "100ms"}

REFUSALS = {
    "RSET": (b"421 4.3.2 closing", b"421 4.7.0 too fast", b"421 4.7.0 too many errors", b"521 5.3.2 go away"),
    "MAIL": (b"451 4.3.0 later", b"550 5.7.1 not you", b"421 4.3.2 closing", b"421 4.7.0 too fast", b"503 5.5.1 what?"),
    "RCPT": (b"451 4.2.1 later", b"550-5.1.1 there is\r\n550 5.1.1 nobody", b"452 4.5.3 too many", b"421 4.3.2 closing"),
    "DATA": (b"451 4.3.0 later", b"554 5.6.0 no", b"421 4.3.2 closing"),
    "final": (b"451 4.3.0 later", b"554-5.7.1 spam,\r\n554 5.7.1 I think", b"421 4.3.2 closing", b"521 5.3.2 go away"),
}

Arrived = tuple[str, tuple[str, ...], bytes]


class Fiend:
    """The upstream. `arrived`: sender, recipients and content of what it has taken, whether or not it got to say so."""

    def __init__(self, dice: Random, *, offers: bytes) -> None:
        self.arrived: list[Arrived] = []
        self.held = 0
        self._dice = dice
        self._offers = offers
        self.one_flight = b"CHUNKING" in offers
        self.silent = dice.choice([0, 0, 0, 0.02])
        self.faults: list[BaseException] = []
        self._refusing, self._cutting, self._pausing = dice.choice([0, 0.1, 0.3]), dice.choice([0, 0.3, 0.8]), dice.choice([0, 0.2, 0.6])
        self._good = False
        self._release = asyncio.Event()

    def heal(self) -> None:
        """Behave from now on, on new connections, and hold the reply to each content until `let_go`."""
        self._good = True

    def let_go(self) -> None:
        self._release.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies: asyncio.Queue[bytes] = asyncio.Queue()
        good = self._good
        cut_after = self._dice.randrange(1, 1500) if not good and self._dice.random() < self._cutting else None
        replies.put_nowait(b"220 fiend.test\r\n")
        telling = asyncio.ensure_future(self._tell(replies, writer, cut_after, good=good))
        conversing = asyncio.ensure_future(self._converse(reader, replies, good=good))
        try:
            await asyncio.wait([telling, conversing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            telling.cancel()
            conversing.cancel()
            await asyncio.wait([telling, conversing])
            ends = [task.exception() for task in (telling, conversing) if not task.cancelled()]
            self.faults += [end for end in ends if end is not None and not isinstance(end, (ConnectionError, asyncio.IncompleteReadError))]

    async def _converse(self, reader: asyncio.StreamReader, replies: "asyncio.Queue[bytes]", *, good: bool) -> None:
        """Until one of both says goodbye and that is told, or the other side has gone."""
        sender, recipients = "", list[str]()
        while line := await reader.readline():
            verb = line[:4].decode().upper()
            if verb == "EHLO":
                reply = b"250-fiend.test\r\n250-SIZE\r\n" + self._offers
            elif verb == "QUIT":
                reply = b"221 bye\r\n"
            elif verb == "RSET":
                sender, recipients, reply = "", [], self._answer(verb, b"250 Ok", good=good)
            elif verb == "BDAT":
                content = await reader.readexactly(int(line.split()[1]))
                reply = await self._take(sender, recipients, content, good=good)
                sender, recipients = "", []
            elif verb == "DATA" and recipients:
                if (reply := self._answer("DATA", b"354 go on", good=good)).startswith(b"354"):
                    replies.put_nowait(reply)
                    content = (await reader.readuntil(b"\r\n.\r\n")).removesuffix(b".\r\n").replace(b"\r\n..", b"\r\n.")
                    reply = await self._take(sender, recipients, content, good=good)
                    sender, recipients = "", []
            elif verb == "MAIL" and not sender:
                if (reply := self._answer(verb, b"250 Ok", good=good)).startswith(b"250"):
                    sender = _address(line)
            elif verb == "RCPT" and sender:
                if (reply := self._answer(verb, b"250-Ok,\r\n250 whoever it is", good=good)).startswith(b"250"):
                    recipients.append(_address(line))
            else:
                reply = b"503 5.5.1 not now\r\n"
            replies.put_nowait(reply)
            if reply.startswith((b"221", b"421", b"521")):
                replies.put_nowait(b"")
                await reader.read()
                return

    async def _take(self, sender: str, recipients: list[str], content: bytes, *, good: bool) -> bytes:
        if not recipients:
            return b"503 5.5.1 for nobody\r\n"
        reply = self._answer("final", b"250 taken", good=good)
        if reply.startswith(b"250"):
            self.arrived.append((sender, tuple(recipients), content))
        if good:
            self.held += 1
            await self._release.wait()
            self.held -= 1
        return reply

    def _answer(self, phase: str, usual: bytes, *, good: bool) -> bytes:
        refused = not good and self._dice.random() < self._refusing
        return (self._dice.choice(REFUSALS[phase]) if refused else usual) + b"\r\n"

    async def _tell(self, replies: "asyncio.Queue[bytes]", writer: asyncio.StreamWriter, cut_after: int | None, *, good: bool) -> None:
        """Write replies in pieces of any size, whenever it likes, until it is fed up."""
        dice, told = self._dice, 0
        while True:
            octets = last = await replies.get()
            while last and not replies.empty() and dice.random() < 0.5:
                octets += (last := replies.get_nowait())
            while octets:
                if not good and dice.random() < self.silent:
                    await asyncio.Event().wait()
                if not good and dice.random() < self._pausing:
                    await asyncio.sleep(dice.choice([0, 0, 0.001, 0.005]))
                end = len(octets) if good or dice.random() < 0.5 else dice.randrange(1, len(octets) + 1)
                if writer.transport.is_closing():
                    return
                if cut_after is not None and told + end >= cut_after:
                    writer.write(octets[: cut_after - told])
                    self._cut(writer)
                    return
                writer.write(octets[:end])
                told, octets = told + end, octets[end:]
            if not last:  # goodbye
                return

    def _cut(self, writer: asyncio.StreamWriter) -> None:
        if self._dice.random() < 0.5:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()


def _address(line: bytes) -> str:
    return line[line.index(b"<") + 1 : line.index(b">")].decode()


@asynccontextmanager
async def fiend(dice: Random, *, connections: int) -> AsyncIterator[tuple[Fiend, Pool]]:
    offers = dice.choice([b"250 PIPELINING\r\n"] * 3 + [b"250-PIPELINING\r\n250 CHUNKING\r\n"] * 3 + [b"250 HELP\r\n"])
    played = Fiend(dice, offers=offers)
    limits = {"connections": connections, "messages_per_connection": dice.choice([2, 5, 100])}
    async with raw_server(played.serve) as upstream:
        settings = Upstream.model_validate(
            {
                **upstream.model_dump(include={"host", "port", "security"}),
                "timeouts": IMPATIENT if played.silent else PATIENT,
                "limits": limits,
            }
        )
        async with pool_to(acme=settings) as pool:
            count(pool, limit=connections)
            yield played, pool


def count(pool: Pool, *, limit: int) -> None:
    """See to it that no connection is opened beside as many as there may be, those on their way out among them."""
    opened, opening = list[Session](), 0
    open_one = pool._open

    async def counted(name: str, upstream: Upstream, host: str) -> Session:
        nonlocal opening
        opened[:] = [session for session in opened if not session.ended.done()]
        assert len(opened) + opening < limit, f"{len(opened)} connections and {opening} to be, and {limit} are allowed"
        opening += 1
        try:
            opened.append(await open_one(name, upstream, host))
            return opened[-1]
        finally:
            opening -= 1

    pool._open = counted  # type: ignore[method-assign]


class Mailer:
    """Sends messages, each with words of its own everywhere, and keeps the accounts."""

    def __init__(self, dice: Random, pool: Pool) -> None:
        self._dice = dice
        self._pool = pool
        self.outcomes: dict[str, Outcome | None] = {}  # by recipient; None where the attempt was cancelled

    async def send(self, number: int) -> None:
        recipients = [f"r{number}-{each}@example.org" for each in range(self._dice.choice([1, 1, 1, 3]))]
        message = outgoing(*recipients, sender=f"s{number}@acme.example", octets=b"Subject: c%d\r\n\r\n.\r\n" % number)
        self.outcomes |= dict.fromkeys(recipients)
        if self._dice.random() < 0.05:
            with suppress(Busy):  # where the upstream is silent the others may keep all connections for longer
                await self._pool.probe("acme")
        outcomes = await self._pool.send("acme", message)
        assert len(outcomes) == len(recipients)
        self.outcomes |= zip(recipients, outcomes, strict=True)


def account(fiend: Fiend, mailer: Mailer) -> None:
    """Everybody's outcome is true. In one flight all goes to an idle connection, and again where that had ended."""
    assert not fiend.faults, fiend.faults
    most = 2 if fiend.one_flight else 1
    arrivals = Counter[str]()
    for sender, recipients, content in fiend.arrived:
        number = sender.removeprefix("s").removesuffix("@acme.example")
        assert content == f"Subject: c{number}\r\n\r\n.\r\n".encode(), f"{content!r} came in the envelope of {sender}"
        assert all(recipient.startswith(f"r{number}-") for recipient in recipients), f"{recipients} stood beside {sender}"
        arrivals.update(recipients)
    for recipient, outcome in mailer.outcomes.items():
        if outcome is None:
            assert arrivals[recipient] <= most
        elif outcome.status is Status.SENT:
            assert 1 <= arrivals[recipient] <= most, f"{recipient} arrived {arrivals[recipient]} times: {outcome}"
        else:
            assert arrivals[recipient] <= outcome.in_doubt * most, f"{recipient} arrived {arrivals[recipient]} times: {outcome}"


async def play(seed: int) -> None:
    dice = Random(seed)
    connections = dice.randrange(1, 4)
    async with fiend(dice, connections=connections) as (played, pool):
        mailer = Mailer(dice, pool)
        cancelling = dice.choice([0, 0.1, 0.3])
        rivals = [dice.randrange(MESSAGES) if dice.random() < cancelling else None for _ in range(MESSAGES)]

        async def send(number: int, rival: int | None) -> None:
            await mailer.send(number)
            if rival is not None:  # in the very turn of the loop in which one's own is done
                sending[rival].cancel()

        sending = [asyncio.ensure_future(send(number, rival)) for number, rival in enumerate(rivals)]
        await asyncio.wait(sending)
        for task in sending:
            assert task.cancelled() or task.exception() is None, task.exception()
        account(played, mailer)

        played.heal()
        await pool.close()  # the idle ones are not good
        held = [asyncio.ensure_future(mailer.send(number)) for number in range(MESSAGES, MESSAGES + connections + 2)]
        if not played.silent:  # else the time might be up before all are there
            await eventually(lambda: played.held >= connections, "as many messages under way as connections are allowed")
            assert played.held == connections
        played.let_go()
        await asyncio.gather(*held)
        account(played, mailer)


async def test_whatever_the_upstream_does_everybody_s_outcome_is_true() -> None:
    base, end = SystemRandom().randrange(2**32), time.monotonic() + SECONDS
    seed = base
    while time.monotonic() < end:
        print(f"seed {seed}")
        await asyncio.wait_for(play(seed), ROUND_SECONDS)
        seed += 1
