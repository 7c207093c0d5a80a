"""Sessions grown from all dialogues by mutation, those kept that reach new code: each ends as it may, and the same in packets and at once.

A short run belongs to the tests; `make fuzz` makes RELAY_FUZZ inputs a mode, and prints figures. A failure prints the input and the seed.
"""

import asyncio
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.dialogue.test_dialogues import HERE, octets_of, read
from tests.fuzz.sessions import Heard, Rig, shrink

INPUTS = int(os.environ.get("RELAY_FUZZ", "600"))
SEED = int(os.environ.get("RELAY_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
PER_RIG = 2000  # the spool in memory keeps what it took: a new one now and then
TRACED = f"{os.sep}relay{os.sep}"
GROWTH_LIMIT_KIB = 40 * 1024

TOKENS = [
    b"\r\n", b"\n", b"\r", b".", b"\r\n.\r\n", b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r\r\n", b"\0", b"\xff", b"\x16\x03\x01",
    b"\x80\x2e\x01\x03", b"BDAT 5\r\n12345", b"BDAT 0 LAST\r\n", b"BDAT 300\r\n", b"BDAT 99999999999 LAST\r\n", b"BDAT\r\n",
    b"DATA\r\n", b"RSET\r\n", b"QUIT\r\n", b"EHLO x\r\n", b"HELO x\r\n", b"MAIL FROM:<app@acme.example>\r\n",
    b"RCPT TO:<you@x.example>\r\n", b"MAIL FROM:<>\r\n", b"NOOP\r\n", b"GET / HTTP/1.1\r\n", b"Host: x\r\n", b"STARTTLS\r\n",
    b"AUTH PLAIN =\r\n", b"AUTH LOGIN\r\n", b"*\r\n", b"A" * 310, b"line\r\n" * 60, b"Received: x\r\n", b" SIZE=99",
    b" BODY=BINARYMIME", b" SMTPUTF8", b"<", b">", b"@", b'"', b"\\", b"\xc3\xbc", b" LAST",
]  # fmt: skip
ENVELOPE = [b"EHLO x\r\n", b"MAIL FROM:<app@acme.example>\r\n", b"RCPT TO:<you@x.example>\r\n"]
# What hangs on how the octets come: a line over the limit, which is seen when so much stands in the buffer.
BY_PACKETS = re.compile(rb"A line of the message|Line too long|More came behind|452 4\.3\.1")

Session = tuple[bytes, ...]


def seeds() -> list[Session]:
    """What each client says in each dialogue, a packet a step."""
    found: list[Session] = [(*ENVELOPE, b"DATA\r\n", b"x\r\n.\r\n"), (*ENVELOPE, b"BDAT 3\r\n", b"abc", b"BDAT 4 LAST\r\n", b"d\r\ne")]
    for path in sorted(HERE.glob("*.txt")):
        by_client: dict[str, list[bytes]] = {}
        for step in read(path).steps:
            if step.what in ("->", "=>"):
                octets = octets_of(step.text) + (b"\r\n" if step.what == "->" else b"")
                by_client.setdefault(step.who, []).append(octets)
        found += [tuple(packets) for packets in by_client.values() if sum(map(len, packets)) < 3000]
    return found


def mutated(chance: random.Random, corpus: list[Session]) -> Session:
    packets = list(chance.choice(corpus))
    for _ in range(chance.choice([1, 1, 2, 3, 6])):
        place = chance.randrange(len(packets) + 1)
        match chance.randrange(9):
            case 0:
                packets.insert(place, chance.choice(TOKENS))
            case 1 if packets:
                del packets[place % len(packets)]
            case 2:
                other = chance.choice(corpus)
                packets = packets[:place] + list(other[chance.randrange(len(other) + 1) :])
            case 3 if packets:
                packets.insert(place, packets[place % len(packets)])
            case 4 if packets:
                octets = packets[place % len(packets)]
                at = chance.randrange(len(octets) + 1)
                packets[place % len(packets)] = octets[:at] + chance.choice(TOKENS) + octets[at + chance.choice([0, 0, 1, 3]) :]
            case 5 if packets:
                octets = packets.pop(place % len(packets))
                at = chance.randrange(len(octets) + 1)
                packets[place:place] = [piece for piece in (octets[:at], octets[at:]) if piece]
            case 6 if len(packets) > 1:
                at = place % (len(packets) - 1)
                packets[at : at + 2] = [packets[at] + packets[at + 1]]
            case 7 if packets:
                octets = packets[place % len(packets)]
                packets[place % len(packets)] = re.sub(
                    rb"\d+", lambda _: b"%d" % chance.choice([0, 1, 5, 7, 200, 1500, 2**70]), octets, count=1
                )
            case 8 if packets and (octets := packets[place % len(packets)]):
                at = chance.randrange(len(octets))
                packets[place % len(packets)] = octets[:at] + bytes([chance.randrange(256)]) + octets[at + 1 :]
    joined, kept = 0, []
    for packet in packets:
        joined += len(packet)
        if packet and joined < 6000:
            kept.append(packet)
    return tuple(kept)


class Coverage:
    """Which steps from line to line of the relay's own code have been taken."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self._new = False

    def __enter__(self) -> None:
        self._new = False
        sys.settrace(self._enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def take_new(self) -> bool:
        return self._new

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if TRACED not in frame.f_code.co_filename:
            return None
        code, last = id(frame.f_code), [0]

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            edge = (code, last[0], frame.f_lineno)
            last[0] = frame.f_lineno
            if edge not in self.seen:
                self.seen.add(edge)
                self._new = True
            return step

        return step


async def fuzz(newlines: str, inputs: int) -> str:
    chance, coverage, corpus = random.Random(SEED), Coverage(), seeds()
    waiting: list[Session] = list(corpus)
    begun, taken, before, done = time.monotonic(), 0, 0, 0
    while done < inputs:
        with tempfile.TemporaryDirectory() as directory:
            async with Rig(Path(directory), newlines=newlines) as rig:
                for _ in range(min(PER_RIG, inputs - done)):
                    done += 1
                    packets = waiting.pop() if waiting else mutated(chance, corpus)
                    try:
                        if done % 4 and not waiting:
                            heard = await rig.perform(list(packets), turns=chance.choice([0, 1, 1, 5]))
                        else:
                            with coverage:
                                heard = await rig.perform(list(packets))
                            if coverage.take_new():
                                corpus.append(packets)
                        taken += len(heard.taken)
                        if newlines != "legacy":
                            compare(heard, await rig.perform([b"".join(packets)] if packets else []))
                    except BaseException as error:
                        error.add_note(f"newlines: {newlines}, seed {SEED}, input {done}: {packets!r}")
                        raise
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = before or memory
        assert memory - before < GROWTH_LIMIT_KIB, f"memory has grown from {before} to {memory} KiB"
    seconds = time.monotonic() - begun
    return (
        f"{newlines}: {inputs:,} inputs (seed {SEED}) in {seconds:,.0f} s, {taken:,} messages taken, {len(corpus):,} inputs kept for "
        f"{len(coverage.seen):,} steps of code, memory from {before // 1024} to {memory // 1024} MiB"
    )


def compare(in_packets: Heard, at_once: Heard) -> None:
    """How the octets came makes no difference."""
    if BY_PACKETS.search(in_packets.replies) or BY_PACKETS.search(at_once.replies):
        return
    assert in_packets == at_once


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        shrink(patch.setattr)
        yield


@pytest.mark.parametrize("newlines", ["normalize", "reject", "legacy"])
def test_mutated_sessions_end_as_they_may(newlines: str) -> None:
    with asyncio.Runner() as runner:
        print(runner.run(fuzz(newlines, INPUTS)))
