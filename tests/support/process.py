"""The real `relay serve`, as a process: started on a configuration text, watched through its log, stopped or killed.

    async with RelayProcess(config, directory=tmp_path) as relay:
        host, port = relay.address()
        ...
        await relay.event("sent", recipient="you@example.org")

The configuration must say `log: {format: json}`; the log goes to `relay.log` in the directory, where a killed relay leaves it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.eventually import PATIENCE_SECONDS, eventually

REPOSITORY = Path(__file__).resolve().parents[2]
# The console script's content, so that the package need not be installed.
LAUNCH = "import sys; from relay.cli import main; sys.argv[0] = 'relay'; sys.exit(main())"
# What the log has where a killed relay left a line without its end: its successor's first event begins on a line of its own.
CUT = " (cut off: its writer was killed)\n"

Event = dict[str, Any]


class RelayProcess:
    """One relay with a directory of its own: its configuration, its log, and its working directory.

    `launch`: Python to run instead of the console script; a test's own program that becomes a relay. `pass_fds`: what it inherits.
    """

    def __init__(
        self, config: str, *, directory: Path, environment: Mapping[str, str] | None = None, launch: str = LAUNCH,
        pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.directory = directory
        self.config_file = directory / "config.yaml"
        self.log_file = directory / "relay.log"
        self.config_file.write_text(config)
        self._launch = launch
        self._pass_fds = pass_fds
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        self._environment = {**inherited, "PYTHONPATH": str(REPOSITORY), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.running:
            await self.kill()
        if error is not None:
            error.add_note(f"-- {self.log_file} --\n{self.log()[-8000:]}")

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self, *, within: float = 2 * PATIENCE_SECONDS) -> None:
        """Start it, again after a stop or a kill, and wait until it listens."""
        assert not self.running, "it runs already"
        with self.log_file.open("ab") as log:
            if self.log()[-1:] not in ("", "\n"):  # a kill can cut a write to a file at a page's end
                log.write(CUT.encode())
                log.flush()
            self._started_at = len(self.log())
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._launch, "serve", "-c", str(self.config_file)],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
            )
        try:
            await eventually(self._listening, "the relay to listen", within=within)
        except BaseException as error:
            await self.kill()
            error.add_note(f"-- {self.log_file} --\n{self.log()[self._started_at :]}")
            raise

    async def terminate(self, *, within: float = 2 * PATIENCE_SECONDS) -> int:
        """SIGTERM, and wait for its exit code."""
        self.signal(signal.SIGTERM)
        return await self.exited(within=within)

    async def kill(self) -> None:
        """SIGKILL: nothing is said, nothing is flushed."""
        if self._process and self._process.poll() is None:
            self._process.kill()
        await self.exited()

    def signal(self, number: signal.Signals) -> None:
        assert self._process, "it was never started"
        self._process.send_signal(number)

    async def exited(self, *, within: float = 2 * PATIENCE_SECONDS) -> int:
        """Wait until the process has ended; its exit code."""
        await eventually(lambda: not self.running, "the relay to end", within=within)
        assert self._process, "it was never started"
        code: int = self._process.wait()
        return code

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process, "it was never started"
        return self._process.pid

    # -- what it says --------------------------------------------------------------------------------------------------

    def address(self, listener: str = "") -> tuple[str, int]:
        """Host and port of the listener of that name, by default the first one, as of the last start."""
        for event in self._events(self.log()[self._started_at :]):
            if event.get("event") == "listening" and listener in ("", event.get("listener")):
                host, _, port = str(event["address"]).rpartition(":")
                return host.strip("[]"), int(port)
        raise LookupError(f"no listener {listener!r} is listening")

    def log(self) -> str:
        """Everything it has written to stdout and stderr, over all starts."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def events(self, name: str = "", **fields: object) -> list[Event]:
        """The events so far, over all starts, of this name and with these fields."""
        wanted = {**({"event": name} if name else {}), **fields}
        return [event for event in self._events(self.log()) if all(event.get(key) == value for key, value in wanted.items())]

    async def event(self, name: str, *, count: int = 1, within: float = PATIENCE_SECONDS, **fields: object) -> list[Event]:
        """Wait for at least `count` such events."""
        what = f"{count} event(s) {name} {fields or ''}".rstrip()
        await eventually(lambda: len(self.events(name, **fields)) >= count, what, within=within)
        return self.events(name, **fields)

    def _listening(self) -> bool:
        if not self.running:
            raise RelayDied(f"the relay ended with {self._process and self._process.returncode} before it listened")
        return any(event.get("event") == "listening" for event in self._events(self.log()[self._started_at :]))

    @staticmethod
    def _events(text: str) -> list[Event]:
        events = []
        for line in text.splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n") and not line.endswith(CUT):  # without an end it is still being written
                event = json.loads(line)
                assert isinstance(event, dict), line
                events.append(event)
        return events


class RelayDied(Exception):
    """The process ended when it should not have."""
