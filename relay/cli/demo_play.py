"""The demo's course: set the scene, start the relay in this process, send three messages, show what arrives, clear up.

The relay's journal is read through a pipe, one JSON object a line, and kept in a file for whoever wants to look.

Tasks, all ended by `play`: `relay` (the relay itself, stopped as by a signal), `events` (ends with the pipe), `letters` (cancelled).
"""

import asyncio
import json
import os
import re
import signal
import smtplib
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from relay.app import Relay
from relay.cli.demo_report import Ink, Report
from relay.cli.demo_scene import LETTERS, Scene, free_port, send
from relay.clock import SystemClock
from relay.config.load import load
from relay.observe.journal import Journal, capture_logging
from relay.spool.base import SpoolError

_HOST = "127.0.0.1"
_ARRIVAL_SECONDS = 15.0
_QUEUED_AS = re.compile(r"queued as ([0-9A-F]+)")
_EVENT_LIMIT_BYTES = 1024 * 1024


class CannotPlay(Exception):
    """The demo cannot run here; the text says why."""


async def play(*, port: int, once: bool) -> bool:
    """Run the demo until a signal, or `once`. Answers whether every letter arrived as it should. Raises CannotPlay."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="relay-demo-") as directory:
        return await _Play(Path(directory), port=port, once=once, stop=stop).run()


class _Play:
    """One performance in `directory`."""

    def __init__(self, directory: Path, *, port: int, once: bool, stop: asyncio.Event) -> None:
        self._ink = Ink(coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        self._scene = Scene(directory, lambda arrival: self._report.arrived(arrival))
        self._report = Report(self._scene.ports, self._ink)
        self._wanted_port = port
        self._port = free_port(_HOST, port)
        self._once = once
        self._stop = stop
        self._shown: dict[str, asyncio.Event] = {}

    async def run(self) -> bool:
        try:
            await self._scene.open(f"{_HOST}:{self._port}")
            self._introduce()
            async with self._relay_running() as serving:
                letters = asyncio.create_task(self._send_letters(), name="letters")
                stopped = asyncio.create_task(self._stop.wait(), name="stop")
                try:
                    await asyncio.wait((letters, stopped, serving), return_when=asyncio.FIRST_COMPLETED)
                    if letters.done():
                        letters.result()
                    if letters.done() and not self._once:
                        self._invite()
                        await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    letters.cancel()
                    stopped.cancel()
                    await asyncio.gather(letters, stopped, return_exceptions=True)
            return self._judge()
        finally:
            await self._scene.close()

    # -- the relay ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _relay_running(self) -> "AsyncIterator[asyncio.Task[None]]":
        read_end, write_end = os.pipe()
        journal = Journal(SystemClock(), format="json", level="info", descriptor=write_end)
        events = asyncio.create_task(self._read_events(read_end), name="events")
        try:
            capture_logging(journal)
            journal.attach(asyncio.get_running_loop())
            relay = Relay(load(self._scene.config_file), journal)
            ready = asyncio.Event()
            serving = asyncio.create_task(relay.serve(ready=lambda _: ready.set()), name="relay")
            opened = asyncio.create_task(ready.wait(), name="ready")
            try:
                await asyncio.wait((serving, opened), return_when=asyncio.FIRST_COMPLETED)
                if ready.is_set():
                    yield serving
            finally:
                opened.cancel()
                relay.stop("the demo ends")
                try:
                    await serving
                except* (OSError, SpoolError) as group:
                    raise CannotPlay(f"the relay cannot run: {group.exceptions[0]}") from None
        finally:
            journal.close()
            os.close(write_end)
            await events

    async def _read_events(self, read_end: int) -> None:
        """Show events until the pipe ends, also those that nobody wants to see any more: a full pipe would hold the journal up."""
        stream = asyncio.StreamReader(limit=_EVENT_LIMIT_BYTES)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb"))
        try:
            with self._scene.log_file.open("wb", buffering=0) as log:
                while line := await stream.readline():
                    log.write(line)
                    if message_id := self._report.note(json.loads(line)):
                        self._shown.setdefault(message_id, asyncio.Event()).set()
        finally:
            transport.close()

    # -- what is said and done ----------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        ink, line = self._ink, self._report.line
        line(ink("bold", "relay demo: three tenants' apps, their mail providers, and the relay between, all on this machine"))
        line()
        for text in self._scene.config_file.read_text().splitlines():
            line(ink("dim", f"    {text}"))
        line()
        if self._wanted_port not in (0, self._port):
            line(
                ink(
                    "yellow",
                    f"{_HOST}:{self._wanted_port} is taken, or not for this user: the relay listens on {_HOST}:{self._port} instead",
                )
            )
        line(f"The relay listens on {_HOST}:{self._port}. Each tenant's app sends one message to it, without any login:")
        line()

    async def _send_letters(self) -> None:
        """One after the other, so that they are shown in order. Raises CannotPlay when one is refused."""
        for letter in LETTERS:
            try:
                reply = await asyncio.to_thread(send, letter, _HOST, self._port)
            except (OSError, smtplib.SMTPException) as error:
                raise CannotPlay(f"the message of {letter.sender} was not taken: {error}") from None
            found = _QUEUED_AS.search(reply)
            if found is None:
                raise CannotPlay(f"the relay answered {reply!r}")
            self._report.expect(found[1], letter)
            try:
                async with asyncio.timeout(_ARRIVAL_SECONDS):
                    await self._shown.setdefault(found[1], asyncio.Event()).wait()
            except TimeoutError:
                self._report.line(self._ink("red", f"the message of {letter.sender} did not arrive within {_ARRIVAL_SECONDS:.0f} s"))

    def _invite(self) -> None:
        line, ink = self._report.line, self._ink
        app = f"smtplib.SMTP('{_HOST}', {self._port})"
        content = "From: you@globex.example\\nSubject: hello\\n\\nhello"
        one_liner = f"import smtplib; {app}.sendmail('you@globex.example', 'friend@example.org', '{content}')"
        line("Now you. Send from any address at acme.example, globex.example or initech.example; another sender is refused:")
        line()
        line(ink("bold", f"    swaks --server {_HOST}:{self._port} --from you@acme.example --to friend@example.org"))
        line(ink("bold", f'    python3 -c "{one_liner}"'))
        line()
        line(f"The relay's own log: {self._scene.log_file}")
        line("Ctrl-C ends the demo and removes its files.")
        line()

    def _judge(self) -> bool:
        verdicts = self._report.verdicts
        well = len(verdicts) == len(LETTERS) and all(verdicts.values())
        if self._once:
            all_three = "Each message arrived at the right provider with the right login."
            self._report.line(self._ink("green", all_three) if well else self._ink("red", "Not every message arrived where it should."))
            return well
        self._report.line("The demo has ended; its files are removed.")
        return True
