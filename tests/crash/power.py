"""A disk that forgets: records what the spool does to its files, and rebuilds what a power cut at any moment could leave.

`Recorder` watches SQLite through a VFS and everything else through the `os` module, and keeps each write, truncation, name and sync in
order. `Disk` plays a recording forward: what was synced is durable, of the rest a cut leaves nothing, all, or any part, with writes torn
at 512 octets, and names without their files or files without their names. The index of the log (-shm) never survives.

Harsher than any file system: a file's sync makes no name durable, and a sync that fails never writes what it was asked to write, while
the next one succeeds all the same (as Linux does).
"""

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest

SECTOR_BYTES = 512
DIRECTORY = -1  # stands for the inode of a directory


class Event(NamedTuple):
    """One thing done to the disk. `kind`: write, truncate, sync, sync-failed, link, rename, unlink or sync-names.

    `inode` is a number for each file that ever was. Names are (directory, name), with the directory relative to the recording's root.
    """

    kind: str
    inode: int = 0
    offset: int = 0
    octets: bytes = b""
    name: tuple[str, str] = ("", "")
    target: tuple[str, str] = ("", "")


class Recorder:
    """Records what happens below `root`, from all threads.

    `ignored`: kinds of syncs that the disk only pretends to do, to plant a fault: names, files, database, log. `fails(kind)` says whether
    a sync of that kind fails.
    """

    def __init__(self, root: Path, *, ignored: frozenset[str] = frozenset(), fails: Callable[[str], bool] = lambda kind: False) -> None:
        self.root = os.path.realpath(root)
        self.events: list[Event] = []
        self._ignored = ignored
        self._fails = fails
        self._lock = threading.Lock()
        self._inodes: dict[tuple[str, str], int] = {}
        self._descriptors: dict[int, tuple[int, str]] = {}  # inode and path of each
        self._last = 0

    @property
    def now(self) -> int:
        """How many events there are: the moment between the last one and the next."""
        return len(self.events)

    def place(self, path: Any) -> tuple[str, str] | None:
        """Directory and name of a path below the root; of the root itself both are empty."""
        full = os.path.abspath(os.fspath(path))
        if full == self.root:
            return "", ""
        if not full.startswith(self.root + "/"):
            return None
        directory, _, name = full[len(self.root) + 1 :].rpartition("/")
        return directory, name

    def add(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)

    def inode(self, name: tuple[str, str]) -> int:
        """The file of that name, which is made where there is none."""
        with self._lock:
            if name not in self._inodes:
                self._last += 1
                self._inodes[name] = self._last
                self.events.append(Event("link", self._last, name=name))
            return self._inodes[name]

    def unlinked(self, name: tuple[str, str]) -> None:
        with self._lock:
            if self._inodes.pop(name, None) is not None:
                self.events.append(Event("unlink", name=name))

    def synced(self, kind: str, inode: int) -> bool:
        """Record the sync of a file; False when it fails."""
        if self._fails(kind):
            self.add(Event("sync-failed", inode))
            return False
        if kind not in self._ignored:
            self.add(Event("sync", inode))
        return True

    def names_synced(self, directory: str) -> bool:
        if self._fails("names"):
            return False
        if "names" not in self._ignored:
            self.add(Event("sync-names", name=(directory, "")))
        return True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch, until the block ends."""
        vfs = RecordingVfs(self)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("open", "close", "write", "fsync", "fdatasync", "rename", "unlink", "truncate", "mkdir"):
                    patch.setattr(os, name, self._watch(name, getattr(os, name)))
                yield
        finally:
            vfs.unregister()

    def _watch(self, name: str, real: Any) -> Any:
        seen = getattr(self, f"_{name}")

        def watched(*arguments: Any, **more: Any) -> Any:
            return seen(real, *arguments, **more)

        return watched

    # -- the `os` module as the spool's files use it -----------------------------------------------------------------------

    def _open(self, real: Any, path: Any, flags: int, *mode: Any, **more: Any) -> int:
        descriptor: int = real(path, flags, *mode, **more)
        if "dir_fd" not in more and (name := self.place(path)):
            inode = DIRECTORY if os.path.isdir(path) else self.inode(name)
            self._descriptors[descriptor] = inode, "/".join(filter(None, name))
        return descriptor

    def _write(self, real: Any, descriptor: int, octets: Any) -> int:
        known = self._descriptors.get(descriptor)
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if known else 0
        count: int = real(descriptor, octets)
        if known:
            self.add(Event("write", known[0], offset, bytes(octets[:count])))
        return count

    def _close(self, real: Any, descriptor: int) -> None:
        self._descriptors.pop(descriptor, None)
        real(descriptor)

    def _fsync(self, real: Any, descriptor: int) -> None:
        known = self._descriptors.get(descriptor)
        if known is None:
            return
        inode, path = known
        ok = self.names_synced(path) if inode == DIRECTORY else self.synced("files", inode)
        if not ok:
            raise OSError(5, "Input/output error")

    _fdatasync = _fsync

    def _rename(self, real: Any, source: Any, target: Any) -> None:
        real(source, target)
        old, new = self.place(source), self.place(target)
        assert old and new
        with self._lock:
            inode = self._inodes[new] = self._inodes.pop(old)
            self.events.append(Event("rename", inode, name=old, target=new))

    def _unlink(self, real: Any, path: Any, **more: Any) -> None:
        real(path, **more)
        if "dir_fd" not in more and (name := self.place(path)):
            self.unlinked(name)

    def _truncate(self, real: Any, path: Any, size: int) -> None:
        real(path, size)
        if name := self.place(path):
            self.add(Event("truncate", self.inode(name), size))

    def _mkdir(self, real: Any, path: Any, *mode: Any, **more: Any) -> None:
        real(path, *mode, **more)
        if name := self.place(path):
            self.add(Event("link", DIRECTORY, name=name))


class RecordingFile(apsw.VFSFile):
    """A file of SQLite's, recorded."""

    def __init__(self, recorder: Recorder, name: Any, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self._recorder = recorder
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        place = recorder.place(path)
        assert place is not None, path
        self._place = place
        self._inode = recorder.inode(place)
        self._kind = "database" if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else "log"
        self._new = self._kind == "log"

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._recorder.add(Event("write", self._inode, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._recorder.add(Event("truncate", self._inode, newsize))

    def xSync(self, flags: int) -> None:
        if not self._recorder.synced(self._kind, self._inode):
            raise apsw.IOError("a sync that fails")
        if self._new:  # with the first sync of a journal or log, SQLite's own VFS syncs the directory too
            self._new = False
            self._recorder.add(Event("sync-names", name=(self._place[0], "")))


class RecordingVfs(apsw.VFS):
    """SQLite's files, recorded. The default for new connections until `unregister`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__("recording", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return RecordingFile(self._recorder, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        if place := self._recorder.place(filename):
            self._recorder.unlinked(place)


class Disk:
    """A recording played forward event by event, with what is durable so far and what is not."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._files: dict[int, bytearray] = {}
        self._names: dict[tuple[str, str], int] = {}
        self._loose: dict[int, list[Event]] = {}  # by file, what has not been synced
        self._loose_names: list[Event] = []

    def play(self, event: Event) -> None:
        match event.kind:
            case "write" | "truncate":
                self._loose.setdefault(event.inode, []).append(event)
            case "sync":
                _apply(self._files.setdefault(event.inode, bytearray()), self._loose.pop(event.inode, ()))
            case "sync-failed":
                lucky = self._part(self._loose.pop(event.inode, []))
                _apply(self._files.setdefault(event.inode, bytearray()), lucky)
            case "sync-names":
                directory = event.name[0]
                ours = [e for e in self._loose_names if (e.target[0] if e.kind == "rename" else e.name[0]) == directory]
                self._loose_names = [e for e in self._loose_names if e not in ours]
                _rename(self._names, ours)
            case _:
                self._loose_names.append(event)

    def settled(self) -> bool:
        """Whether a cut here leaves only one thing."""
        return not self._loose_names and not any(self._loose.values())

    def images(self, parts: int) -> Iterator[dict[str, bytes | None]]:
        """What a cut at this moment may leave: every path with its content, None for a directory."""
        yield self._image({}, [])
        if self.settled():
            return
        everything, names = self._loose, self._loose_names
        yield self._image(everything, names)
        if names:
            yield self._image({}, names)
            yield self._image(everything, [])
        for _ in range(parts):
            some = {inode: self._part(events) for inode, events in everything.items()}
            yield self._image(some, [e for e in names if self._rng.random() < 0.5])

    def _image(self, loose: dict[int, list[Event]], loose_names: Iterable[Event]) -> dict[str, bytes | None]:
        names = dict(self._names)
        _rename(names, loose_names)
        image: dict[str, bytes | None] = {}
        for (directory, name), inode in sorted(names.items()):
            if directory and image.get(directory, b"") is not None:
                continue  # the directory itself is not there
            path = "/".join(filter(None, (directory, name)))
            if inode == DIRECTORY:
                image[path] = None
                continue
            octets = self._files.get(inode, bytearray())
            if loose.get(inode):
                octets = bytearray(octets)
                _apply(octets, loose[inode])
            image[path] = bytes(octets)
        return image

    def _part(self, events: list[Event]) -> list[Event]:
        """Some of what was not synced, with some writes torn."""
        kept: list[Event] = []
        for event in events:
            fate = self._rng.random()
            if fate < 0.4:
                kept.append(event)
            elif fate < 0.7 and event.kind == "write":
                kept += [piece for piece in _sectors(event) if self._rng.random() < 0.5]
        return kept


def _sectors(event: Event) -> Iterator[Event]:
    start, end = event.offset, event.offset + len(event.octets)
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield event._replace(offset=start, octets=event.octets[start - event.offset : stop - event.offset])
        start = stop


def _apply(octets: bytearray, events: Iterable[Event]) -> None:
    for event in events:
        if event.kind == "truncate":
            del octets[event.offset :]
            octets.extend(bytes(event.offset - len(octets)))
        else:
            octets.extend(bytes(max(0, event.offset - len(octets))))
            octets[event.offset : event.offset + len(event.octets)] = event.octets


def _rename(names: dict[tuple[str, str], int], events: Iterable[Event]) -> None:
    for event in events:
        if event.kind == "unlink":
            names.pop(event.name, None)
        elif event.kind == "rename":
            names.pop(event.name, None)
            names[event.target] = event.inode
        else:
            names[event.name] = event.inode


def restore(image: dict[str, bytes | None], root: Path) -> None:
    """Write an image to a real directory."""
    for path, octets in image.items():
        if octets is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(octets)
