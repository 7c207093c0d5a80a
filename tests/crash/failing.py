"""A disk that fails as it is told: for SQLite through a VFS, for content files through the `os` module.

    with failing_disk(directory) as disk:
        disk.fail("log write", apsw.FullError("full"))
        ...
        disk.mend()

What can fail is `PART write` and `PART sync`, where PART is log, database, files or names, and `files open`.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest


class FailingDisk:
    """Everything works until told otherwise. `failures` counts what was made to fail."""

    def __init__(self, directory: Path) -> None:
        self._directory = os.path.realpath(directory) + "/"
        self._errors: dict[str, Exception] = {}
        self.failures: Counter[str] = Counter()

    def fail(self, what: str, error: Exception) -> None:
        self._errors[what] = error

    def mend(self) -> None:
        self._errors.clear()

    def meet(self, what: str) -> None:
        """Raises the error that this shall meet with, if any."""
        if (error := self._errors.get(what)) is not None:
            self.failures[what] += 1
            raise type(error)(*error.args)

    def part(self, descriptor: int) -> str:
        """Which part of the spool a descriptor of the `os` module belongs to, or `""`."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return self.part_of(path)

    def part_of(self, path: str) -> str:
        if not f"{path}/".startswith(self._directory):
            return ""
        if os.path.isdir(path):
            return "names"
        return "files" if "/content/" in path or "/incoming/" in path else ""

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Put the disk under the `os` module."""
        real_open, real_write, real_fsync, real_fdatasync = os.open, os.write, os.fsync, os.fdatasync

        def open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and self.part_of(os.path.realpath(path)) == "files":
                self.meet("files open")
            return real_open(path, flags, *rest, **more)

        def write(descriptor: int, octets: Any) -> int:
            if part := self.part(descriptor):
                self.meet(f"{part} write")
            return real_write(descriptor, octets)

        def fsync(descriptor: int) -> None:
            if part := self.part(descriptor):
                self.meet(f"{part} sync")
            real_fsync(descriptor)

        def fdatasync(descriptor: int) -> None:
            if part := self.part(descriptor):
                self.meet(f"{part} sync")
            real_fdatasync(descriptor)

        for name, replacement in (("open", open), ("write", write), ("fsync", fsync), ("fdatasync", fdatasync)):
            patch.setattr(os, name, replacement)


class _File(apsw.VFSFile):
    def __init__(self, disk: FailingDisk, name: Any, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self._disk = disk
        self._part = "database" if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else "log"

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.meet(f"{self._part} write")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._disk.meet(f"{self._part} sync")
        super().xSync(flags)


class _Vfs(apsw.VFS):
    def __init__(self, disk: FailingDisk) -> None:
        self._disk = disk
        super().__init__("failing", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self._disk, name, flags)


@contextmanager
def failing_disk(directory: Path) -> Iterator[FailingDisk]:
    """The disk under everything in `directory` that is opened inside the block."""
    disk = FailingDisk(directory)
    vfs = _Vfs(disk)
    try:
        with pytest.MonkeyPatch.context() as patch:
            disk.watch(patch)
            yield disk
    finally:
        vfs.unregister()
