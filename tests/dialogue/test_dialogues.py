"""The dialogues of this directory against the real listener, each one line by line, octet by octet, and in as few packets as possible.

A dialogue is a few lines of YAML, `---`, and steps:

    c -> TEXT        client c (or d, …) says TEXT and CRLF      c => OCTETS   exactly these octets
    c <- TEXT        the relay answers exactly this line        c <~ REGEX    one line that the expression describes
    c half-closes    sends FIN      c resets   sends RST        c closed      the relay has closed, without another word
    relay stops      no new connections, and each session ends as soon as it can
    got SENDER -> RECIPIENT, …: OCTETS      the next message in custody, its content as it would be sent apart from our prefix
    got nothing      and no other one
    log EVENT key=value …                   one such event; `log nothing WORD` none with that word in it

Sent text knows \\r \\n \\0 \\xHH \\\\ and {TEXT*COUNT}. The YAML has `listener` and other parts of a configuration, and besides
`spool` (what is wrong with it), `idle` (seconds), `ways` (of plain, octets, packet: where not all of them make sense).
"""

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from relay.listener import server
from relay.mail.content import stuff
from relay.spool.base import SpoolError, SpoolFull
from tests.support.client import Client
from tests.support.eventually import PATIENCE_SECONDS, eventually
from tests.support.front import HOSTNAME, Front

HERE = Path(__file__).parent
WAYS = ("plain", "octets", "packet")

_STEP = re.compile(r"([a-z]) (->|=>|<-|<~|half-closes|resets|closed)(?: (.*))?|(relay stops|got nothing|got|log)(?: (.*))?")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|([rnt0\\]))")
_REPEAT = re.compile(r"\{([^{}]+)\*(\d+)\}")
_PLAIN_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
_INTERNAL = re.compile(r"Traceback|Exception|[a-z]Error|\.py\b|/tmp|sqlite|incoming/|\d+ /", re.IGNORECASE)
_ENHANCED = re.compile(r"([245])\.\d{1,3}\.\d{1,3} [!-~]")


class Step(NamedTuple):
    number: int
    who: str
    what: str
    text: str


class Dialogue(NamedTuple):
    settings: dict[str, Any]
    steps: list[Step]


def read(path: Path) -> Dialogue:
    head, _, body = path.read_text().partition("---\n")
    offset = head.count("\n") + 1
    steps = []
    for number, line in enumerate(body.splitlines(), offset + 1):
        if not line or line.startswith("#"):
            continue
        match = _STEP.fullmatch(line)
        assert match, f"{path.name}:{number}: not a step: {line}"
        who, what, text, deed, more = match.groups("")
        steps.append(Step(number, who, what or deed, text or more))
    return Dialogue(yaml.safe_load(head) or {}, steps)


def octets_of(text: str) -> bytes:
    text = _REPEAT.sub(lambda found: found[1] * int(found[2]), text.encode().decode("latin-1"))
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _PLAIN_ESCAPES[found[2]], text).encode("latin-1")


def in_packets(steps: list[Step]) -> Iterator[Step]:
    """What a client says comes before what it hears, as far as nothing else happens in between; but it waits for the greeting."""
    said: dict[str, list[Step]] = {}
    heard: list[Step] = []
    greeted: set[str] = set()
    for step in [*steps, Step(0, "", "end", "")]:
        if step.what in ("<-", "<~") and step.who not in greeted | said.keys():
            greeted.add(step.who)
            yield step
        elif step.what in ("->", "=>"):
            said.setdefault(step.who, []).append(step)
        elif step.what in ("<-", "<~", "closed", "got", "got nothing"):
            heard.append(step)
        else:
            for who, own in said.items():
                yield Step(own[0].number, who, "=>", "".join(s.text + ("\\r\\n" if s.what == "->" else "") for s in own))
            if step.what == "half-closes":
                yield step
            yield from heard
            if step.what not in ("half-closes", "end"):
                yield step
            said, heard = {}, []


class Stage:
    """One performance of a dialogue."""

    def __init__(self, front: Front, *, chunk: int) -> None:
        self._front = front
        self._chunk = chunk
        self._clients: dict[str, Client] = {}
        self._lines: dict[str, deque[str]] = {}
        self._checked = 0
        self._got = 0

    async def perform(self, step: Step) -> None:
        match step.what:
            case "->" | "=>":
                client = await self._client(step.who)
                with suppress(ConnectionError):  # who is cut off while talking still hears why
                    await client.send(octets_of(step.text) + (b"\r\n" if step.what == "->" else b""))
            case "<-":
                assert await self._line(step.who) == step.text
            case "<~":
                line = await self._line(step.who)
                assert re.fullmatch(step.text, line), line
            case "half-closes":
                (await self._client(step.who)).finish_sending()
            case "resets":
                (await self._client(step.who)).reset()
            case "closed":
                assert not self._lines[step.who], self._lines[step.who]
                await (await self._client(step.who)).expect_close()
            case "relay stops":
                self._front.waits.stop()
                self._front.door.stop()
            case "got":
                self._compare(step.text)
            case "got nothing":
                assert [(m.sender, m.recipients, m.content) for m in self._front.taken[self._got :]] == []
            case "log":
                pass

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def check_log(self, step: Step) -> None:
        name, *words = step.text.split(" ")
        if name == "nothing":
            assert not [event for event in self._front.events() if words[0] in str(event)]
            return
        wanted = [word.split("=", 1) for word in words]
        events = self._front.events(name)
        fitting = [event for event in events if all(value in str(event.get(key)).replace(" ", "_") for key, value in wanted)]
        assert len(fitting) == 1, events

    async def _client(self, who: str) -> Client:
        if who not in self._clients:
            self._clients[who] = self._front.client(chunk=self._chunk)
            self._lines[who] = deque()
            await self._clients[who].connect()
        return self._clients[who]

    async def _line(self, who: str) -> str:
        client = await self._client(who)
        lines = self._lines[who]
        if not lines:
            reply = await client.reply()
            for text in reply.lines:
                assert text.isascii() and len(f"{reply.code} {text}\r\n") <= 512, text  # RFC 5321 section 4.5.3.1.5
                assert not _INTERNAL.search(text), text
            if not (reply.code < 400 and (reply.lines[0].startswith(HOSTNAME) or reply.code >= 300)):
                code = _ENHANCED.match(reply.text)
                assert code and code[1] == str(reply.code)[0], f"no enhanced code: {reply}"
            last = len(reply.lines) - 1
            lines.extend(f"{reply.code}{'-' if place < last else ' '}{text}" for place, text in enumerate(reply.lines))
        return lines.popleft()

    def _compare(self, text: str) -> None:
        envelope, _, octets = text.partition(": ")
        sender, _, recipients = envelope.partition(" -> ")
        assert len(self._front.taken) > self._got, "nothing came into custody"
        message = self._front.taken[self._got]
        self._got += 1
        assert (message.sender or "<>", list(message.recipients)) == (sender, recipients.split(", "))
        assert stuff(message.sent[len(message.prefix) :]) == octets_of(octets)


def ill(front: Front, spool: str) -> None:
    match spool:
        case "":
            pass
        case "full":
            front.spool.ill = "no space left for the spool: the disk is full"
        case "full at put":
            front.spool.put_error = SpoolFull("no space left for the spool: /tmp/secret")
        case "broken at put":
            front.spool.put_error = SpoolError("the spool cannot be written: /tmp/secret")
        case "crashes at put":
            front.spool.put_error = ZeroDivisionError("a bug in spool.py")
        case "full at open":
            front.spool.open_error = SpoolFull("no space left for the spool")
        case "broken at write":
            front.spool.write_error = SpoolError("the spool cannot be written: /tmp/secret")
        case "full at write":
            front.spool.write_error = SpoolFull("no space left for the spool")
        case _:
            raise ValueError(spool)


def cases() -> Iterator[Any]:
    for path in sorted(HERE.glob("*.txt")):
        for way in read(path).settings.get("ways", WAYS):
            yield pytest.param(path.name, way, id=f"{path.stem}-{way}")


@pytest.mark.both_loops
@pytest.mark.parametrize(("name", "way"), list(cases()))
async def test_the_dialogue(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, steps = read(HERE / name)
    settings.pop("ways", None)
    if idle := settings.pop("idle", None):
        monkeypatch.setattr(server, "IDLE_SECONDS", idle)
    spool, listener = settings.pop("spool", ""), settings.pop("listener", {})
    async with Front(tmp_path, settings, listener=listener) as front:
        ill(front, spool)
        stage = Stage(front, chunk=1 if way == "octets" else 0)
        try:
            for step in in_packets(steps) if way == "packet" else steps:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    try:
                        await stage.perform(step)
                    except AssertionError as error:
                        error.add_note(f"{name}:{step.number}: {step.who} {step.what} {step.text}")
                        raise
        finally:
            stage.close()
        await eventually(lambda: front.door.sessions == 0, "every session to end")
        await eventually(lambda: not front.arriving, "files of what was not taken to go")
        assert front.dispatch.outstanding == 0
        for step in steps:
            if step.what == "log":
                stage.check_log(step)


def test_a_line_that_is_no_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text("---\nc ~> EHLO\n")
    with pytest.raises(AssertionError, match=r"wrong.txt:2: not a step"):
        read(path)


def test_octets_know_escapes_and_repeats() -> None:
    assert octets_of(r"a\r\n\x00\\n{ab*3}\xff") == b"a\r\n\0\\nababab\xff"
    assert octets_of("ü") == "ü".encode()
