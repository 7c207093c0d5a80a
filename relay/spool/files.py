"""Content as files: what is too large for a row of the spool, and what is too large for memory while it arrives.

Write order: octets, fsync of the file, rename into `content/`, fsync of that directory; only then may the record that names it be
committed. A file without a record is what a crash leaves: it is removed at the next start.

After a failed write or fsync nothing of a file is used: it is removed, and who sends the content again gets another.

State: the two directories, and the temporary files of content that is still arriving.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from relay.spool.base import Content, SpoolError, SpoolFull, SpoolInUse
from relay.spool.records import id_of
from relay.spool.room import Room

_T = TypeVar("_T")

#: A growing file is flushed every so often, so that the last fsync is short and no other commit waits behind a long one.
_FLUSH_EVERY_BYTES = 8 * 1024 * 1024

#: A file is removed in pieces of this size with a pause after each: where the file system trims freed blocks at once (`discard`),
#: four files of 50 MB removed together keep every fsync of the disk waiting for 200 ms, and so every acknowledgement.
_REMOVE_BYTES = 4 * 1024 * 1024
_REMOVE_PAUSE_SECONDS = 0.01

#: The directory of content, in the spool's.
CONTENT_DIRECTORY = "content"

#: The part of the spool that this is, to `Room`; and how much is written to see whether files can be: more than a row would hold.
FILES = "files"
_PROBE_BYTES = 1024 * 1024


class DirectoryLock:
    """The exclusive right to a spool directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise SpoolInUse(f"{directory} is in use by another relay (process {holder})") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


class ContentFiles:
    """The files of one spool directory. Blocking work runs in a few threads of its own.

    `room` is told when a file cannot be written, and when one can again.
    """

    def __init__(self, directory: Path, room: Room) -> None:
        self._room = room
        room.watch(FILES, self.probe)
        self._incoming = directory / "incoming"
        self._content = directory / CONTENT_DIRECTORY
        for path in (directory, self._incoming, self._content):
            _make_directory(path, mode=0o700)
        sync_directory(directory)
        with contextlib.suppress(PermissionError):  # who made it may have been killed before its name was durable
            sync_directory(directory.absolute().parent)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="spool-files")
        self._removal = ThreadPoolExecutor(1, thread_name_prefix="spool-removal")
        self._turn = asyncio.Lock()
        self._count = 0

    def path(self, number: int) -> Path:
        """Where content `number` lives."""
        return self._content / id_of(number)

    def writer(self) -> "FileWriter":
        """A new file for content that is still arriving. Raises SpoolFull or SpoolError."""
        self._count += 1
        try:
            return FileWriter(self._incoming / f"{os.getpid()}-{self._count}", self.run, self.discard, self._turn)
        except OSError as error:
            raise self._failed(error) from error

    async def store(self, content: Content, number: int) -> Content:
        """Make `content` durable as file `number`. Raises SpoolFull or SpoolError, and then leaves nothing behind."""
        stored = await self.run(lambda: self._store(content, number))
        self._room.works(FILES)
        return stored

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove content whose record is gone, by and by. A file that stays behind is removed at the next start."""
        for number in numbers:
            self.discard(self.path(number))

    def sweep(self, kept: Callable[[int], bool]) -> None:
        """Remove every file that no record names. Only while nobody writes."""
        strays = [path for path in self._content.iterdir() if not kept(_number(path.name))]
        strays += self._incoming.iterdir()
        for path in strays:
            path.unlink()

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run blocking file work in a thread; OSError becomes SpoolFull or SpoolError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            raise self._failed(error) from error

    def probe(self) -> None:
        """Write a file, and sync it and its name. Blocks."""
        place = self._incoming / f"{os.getpid()}-probe"
        try:
            try:
                with open(place, "wb", buffering=0, opener=_private) as file:
                    _write_all(file.fileno(), bytes(_PROBE_BYTES))
                    os.fsync(file.fileno())
                sync_directory(self._content)
            finally:
                place.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error)
        else:
            self._room.works(FILES)

    def _failed(self, error: OSError) -> SpoolError:
        fault = storage_error(error)
        if not isinstance(error, FileExistsError):
            self._room.measure()
            self._room.failed(FILES, fault)
        return fault

    def close(self) -> None:
        self._removal.shutdown(cancel_futures=True)
        self._threads.shutdown()

    def discard(self, path: Path) -> None:
        """Remove one file by and by."""
        self._removal.submit(_remove, path)

    def _store(self, content: Content, number: int) -> Content:
        place, target = content.path or self._incoming / f"{os.getpid()}-{number:X}", self.path(number)
        try:
            if content.octets is not None:
                with open(place, "xb", buffering=0, opener=_private) as file:
                    _write_all(file.fileno(), content.octets)
                    os.fsync(file.fileno())
            if target.exists():
                raise FileExistsError(errno.EEXIST, "there is content with this number already")
            os.rename(place, target)
            place = target
            sync_directory(self._content)
        except OSError:
            place.unlink(missing_ok=True)
            raise
        return content._replace(path=target)


class FileWriter:
    """One file that grows with its content. See `spool.base.ContentWriter`."""

    def __init__(
        self, path: Path, run: Callable[[Callable[[], None]], Awaitable[None]], remove: Callable[[Path], None], turn: asyncio.Lock
    ) -> None:  # fmt: skip
        self._path = path
        self._run = run
        self._remove = remove
        self._turn = turn
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._flushed = 0
        self._ascii = True
        self._lock = threading.Lock()  # over the next two, which say who closes the file
        self._busy = False
        self._unwanted = False

    async def write(self, octets: bytes) -> None:
        """Append. Raises SpoolFull or SpoolError; the caller then discards the writer."""
        self._size += len(octets)
        self._ascii = self._ascii and octets.isascii()
        await self._work(lambda: self._append(octets))
        async with self._turn:  # who writes has a large chunk to work on next: one of them in each round of the loop, not all
            await asyncio.sleep(0)

    async def finish(self) -> Content:
        """Make the content durable and return it. The file still belongs to nobody: put it or discard it."""
        await self._work(self._sync)
        self._close()
        return Content(self._size, None, self._path, eight_bit=not self._ascii)

    def discard(self) -> None:
        with self._lock:
            self._unwanted = True
            if not self._busy:
                self._close()
        self._remove(self._path)

    async def _work(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread. A discard in the meantime (its caller was cancelled) leaves closing to the thread: a descriptor that is
        closed under a write is soon another file's, and the write goes there."""

        def guarded() -> None:
            if self._begin():
                try:
                    work()
                finally:
                    self._end()

        await self._run(guarded)

    def _begin(self) -> bool:
        with self._lock:
            self._busy = not self._unwanted
            return self._busy

    def _end(self) -> None:
        with self._lock:
            self._busy = False
            if self._unwanted:
                self._close()

    def _append(self, octets: bytes) -> None:
        _write_all(self._descriptor, octets)
        if self._size - self._flushed >= _FLUSH_EVERY_BYTES:
            self._sync()
            self._flushed = self._size

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path, *, mode: int) -> None:
    """Make a directory where there is none, and its name durable: what is put into it later is safe only then."""
    if not path.is_dir():
        _make_directory(path.parent, mode=0o777)
        path.mkdir(mode=mode, exist_ok=True)
        sync_directory(path.parent)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        while size > _REMOVE_BYTES:
            size -= _REMOVE_BYTES
            os.truncate(path, size)
            time.sleep(_REMOVE_PAUSE_SECONDS)
        path.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def storage_error(error: OSError) -> SpoolError:
    """An operating system's error in the spool's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SpoolFull(f"no space left for the spool: {error.strerror}")
    return SpoolError(f"the spool cannot be written: {error.strerror}")


def _write_all(descriptor: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(descriptor, view) :]


def _number(name: str) -> int:
    try:
        return int(name, 16)
    except ValueError:
        return -1
