"""Whether the spool can take mail: its limits, `max_size` and `min_free`, and a disk that does what it is told.

A limit is compared with numbers that are at hand: the sizes of the queued messages, counted as they come and go, and the free space as
of the last look. A fault stays until the very thing that failed has worked again, in earnest or in a probe; something else that works
proves nothing.

State: those numbers, the time of the last look, the faults, and which files must stay where they are. Law: asking costs no I/O.
"""

import os
from collections.abc import Callable
from pathlib import Path

from relay.clock import Clock
from relay.spool.base import SpoolError, SpoolFull

#: Looks at the disk are at least so far apart, and so are probes of a disk that fails.
LOOK_SECONDS = 1.0


class Room:
    """The room of the spool in `directory`. `max_size_bytes`: of all queued messages together; `min_free_bytes`: of the file system.

    `waiting_bytes` is kept by the spool. Probes are added with `watch`: each is called while its part of the spool has a fault.
    """

    def __init__(self, directory: Path, clock: Clock, *, max_size_bytes: int | None = None, min_free_bytes: int = 0) -> None:
        self.waiting_bytes = 0
        self._directory = directory
        self._clock = clock
        self._max_size_bytes = max_size_bytes
        self._min_free_bytes = min_free_bytes
        self._free_bytes: float = float("inf")
        self._look_at = 0.0  # monotonic seconds
        self._faults: dict[str, SpoolError] = {}
        self._probes: dict[str, Callable[[], None]] = {}
        self._kept: dict[Path, tuple[int, int]] = {}

    def obstacle(self, size: int = 0) -> SpoolError | None:
        """Why a message of so many octets cannot be taken now, or None."""
        if self._faults and (faults := list(self._faults.values())):  # a thread may have taken the last one away
            return faults[0]
        return self.full(size)

    def full(self, size: int) -> SpoolFull | None:
        """Why there is no room for so many octets, or None."""
        if self._free_bytes - size < self._min_free_bytes:
            return SpoolFull(f"the disk of the spool has {_words(self._free_bytes)} free, and min_free is {_words(self._min_free_bytes)}")
        if self._max_size_bytes is not None and self.waiting_bytes + size > self._max_size_bytes:
            return SpoolFull(f"{_words(self.waiting_bytes)} of mail are waiting, and max_size is {_words(self._max_size_bytes)}")
        return None

    def failed(self, part: str, error: SpoolError) -> None:
        """A part of the spool could not be written. From any thread."""
        self._faults[part] = error

    def works(self, part: str) -> None:
        """It was written, and synced. From any thread."""
        self._faults.pop(part, None)

    def faulty(self, part: str) -> bool:
        return part in self._faults

    def watch(self, part: str, probe: Callable[[], None]) -> None:
        """Have `probe` called, once a second, while `part` has a fault. It says what it finds to `failed` or `works`."""
        self._probes[part] = probe

    def keep(self, path: Path) -> None:
        """Take mail only while `path` is the file that it is now: what goes into one that was removed is gone after a restart."""
        if (found := _identity(path)) is not None:
            self._kept[path] = found
            self.watch(str(path), lambda: None)  # every look sees it

    def look(self) -> None:
        """See how much is free, whether what failed still does, and whether the files are there; not more often than once a second.
        Blocks: not for the loop."""
        now = self._clock.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        self.measure()
        for path, known in self._kept.items():
            if _identity(path) == known:
                self.works(str(path))
            else:
                self.failed(
                    str(path),
                    SpoolError(f"{path} was removed or replaced while it was in use; put it back: what waits in it is gone with a restart"),
                )
        for part in tuple(self._faults):
            self._probes[part]()

    def measure(self) -> None:
        """See how much is free."""
        try:
            found = os.statvfs(self._directory)
        except OSError:
            return  # what fails for good will fail a write, and that is reported
        no_files = found.f_files > 0 and found.f_favail == 0  # some file systems count none
        self._free_bytes = 0 if no_files else found.f_bavail * found.f_frsize


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _words(size: float) -> str:
    return f"{size / 1_000_000:.1f} MB"
