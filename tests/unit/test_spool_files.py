"""Content as files: the order of writes, what is left behind when one fails, who holds the directory."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from relay.clock import SystemClock
from relay.spool.base import Content, SpoolError, SpoolFull, SpoolInUse
from relay.spool.files import ContentFiles, DirectoryLock
from relay.spool.room import Room
from tests.contract.drafts import octets_of, stored_files

MEBIBYTE = 1024 * 1024


def files_in(directory: Path) -> ContentFiles:
    return ContentFiles(directory, Room(directory, SystemClock()))


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[ContentFiles]:
    files = files_in(tmp_path / "spool")
    yield files
    files.close()


def left(tmp_path: Path) -> list[str]:
    return stored_files(tmp_path / "spool")


def name_of(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


class Disk:
    """Records what is synced and renamed, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.fail: dict[str, OSError] = {}
        for name in ("fsync", "fdatasync", "write"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        rename = os.rename

        def recorded(source: os.PathLike[str], target: os.PathLike[str]) -> None:
            self._note("rename", Path(target).name)
            rename(source, target)

        monkeypatch.setattr(os, "rename", recorded)

    def _wrap(self, name: str, real: object) -> object:
        def recorded(descriptor: int, *rest: object) -> object:
            if "/spool/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                self._note(name, name_of(descriptor))
            return real(descriptor, *rest)  # type: ignore[operator]

        return recorded

    def _note(self, name: str, target: str) -> None:
        self.events.append(f"{name} {target}")
        if error := self.fail.get(f"{name} {target}") or self.fail.get(name):
            raise error


async def test_small_pieces_are_written_synced_renamed_and_the_directory_synced(
    files: ContentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    stored = await files.store(Content(3, b"abc"), 0xABC)
    temporary = disk.events[0].split()[1]
    assert disk.events == [f"write {temporary}", f"fsync {temporary}", "rename 0000000000ABC", "fsync content"]
    assert stored.path == files.path(0xABC)
    assert stored.path.read_bytes() == b"abc"
    assert stored.path.stat().st_mode & 0o777 == 0o600, "nobody else may read mail"


async def test_arriving_content_is_synced_before_it_is_finished(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    writer = files.writer()
    await writer.write(b"abc")
    content = await writer.finish()
    temporary = disk.events[0].split()[1]
    assert disk.events[-1] in (f"fsync {temporary}", f"fdatasync {temporary}")
    disk.events.clear()
    await files.store(content, 5)
    assert disk.events == ["rename 0000000000005", "fsync content"]


async def test_a_long_arrival_is_synced_on_the_way(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    writer = files.writer()
    for _ in range(20):
        await writer.write(b"x" * MEBIBYTE)
    assert sum("sync" in event for event in disk.events) == 2
    writer.discard()


async def test_a_new_directory_is_made_durable_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(name_of(descriptor)), fsync(descriptor))[1])
    files_in(tmp_path / "var" / "spool").close()
    assert {"spool", "var", tmp_path.name} <= set(synced)
    assert (tmp_path / "var" / "spool").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "fsync content"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_store_that_fails_leaves_nothing(
    files: ContentFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    disk.fail[step] = OSError(code, os.strerror(code))
    with pytest.raises(SpoolError, match=os.strerror(code)) as caught:
        await files.store(Content(3, b"abc"), 7)
    assert (type(caught.value) is SpoolFull) is (code != errno.EIO)
    assert left(tmp_path) == []
    disk.fail.clear()
    await files.store(Content(3, b"abc"), 7)
    assert left(tmp_path) == ["content/0000000000007"]


@pytest.mark.parametrize("step", ["rename", "fsync content"])
async def test_arrived_content_that_cannot_be_stored_is_gone(
    files: ContentFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    writer = files.writer()
    await writer.write(b"abc")
    content = await writer.finish()
    disk.fail[step] = OSError(errno.EIO, "broken")
    with pytest.raises(SpoolError):
        await files.store(content, 7)
    assert left(tmp_path) == []


@pytest.mark.parametrize("step", ["write", "fdatasync"])
async def test_a_writer_on_a_full_disk_says_so_and_leaves_nothing(
    files: ContentFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any], step: str
) -> None:  # fmt: skip
    disk = Disk(monkeypatch)
    disk.fail[step] = OSError(errno.ENOSPC, "full")
    writer = files.writer()

    async def fill() -> None:
        await writer.write(b"abc")
        await writer.finish()

    with pytest.raises(SpoolFull, match="no space left"):
        await fill()
    writer.discard()
    await eventually(lambda: left(tmp_path) == [], "the file to be gone")


async def test_a_writer_that_cannot_open_its_file_says_so(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SpoolFull):
        files.writer()
    monkeypatch.undo()


async def test_a_short_write_is_continued(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, octets: write(descriptor, octets[:1000]))
    octets = bytes(range(256)) * 100
    assert octets_of(await files.store(Content(len(octets), octets), 1)) == octets


async def test_a_store_never_overwrites_other_content(files: ContentFiles) -> None:
    first = await files.store(Content(5, b"first"), 1)
    with pytest.raises(SpoolError):
        await files.store(Content(6, b"second"), 1)
    assert octets_of(first._replace(octets=None)) == b"first"


async def test_discarding_never_closes_a_descriptor_under_a_write(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that is closed too early is soon somebody else's, and the write goes into the wrong file."""
    closed: list[int] = []
    wrong: list[int] = []
    close, write = os.close, os.write
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(descriptor: int, octets: bytes) -> int:
        loop.call_soon_threadsafe(started.set)
        for _ in range(200):
            os.stat("/")
            if descriptor in closed:
                wrong.append(descriptor)
                return len(octets)
        return write(descriptor, octets)

    writer = files.writer()
    monkeypatch.setattr(os, "write", slow)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor))[1])
    writing = asyncio.create_task(writer.write(b"x" * MEBIBYTE))
    await started.wait()
    writing.cancel()
    writer.discard()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await files.run(lambda: None)
    files.close()
    assert wrong == []
    assert len(closed) == 1, "and it is closed in the end"


async def test_a_sweep_removes_what_no_record_names(files: ContentFiles, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        await files.store(Content(1, b"x"), number)
    writer = files.writer()
    await writer.write(b"x")
    await writer.finish()
    (tmp_path / "spool" / "content" / "notes.txt").write_text("not ours")
    files.sweep({2}.__contains__)
    assert left(tmp_path) == ["content/0000000000002"]


async def test_what_is_removed_goes_by_and_by(files: ContentFiles, tmp_path: Path, eventually: Callable[..., Any]) -> None:
    large = b"x" * 9 * MEBIBYTE
    for number in (1, 2, 3):
        await files.store(Content(len(large), large), number)
    files.remove([1, 7, 2])  # 7 is gone already
    await eventually(lambda: left(tmp_path) == ["content/0000000000003"], "two are gone")
    assert files.path(3).stat().st_size == len(large)


async def test_what_could_not_be_removed_before_the_end_is_removed_at_the_next_start(files: ContentFiles, tmp_path: Path) -> None:
    for number in range(20):
        await files.store(Content(5 * MEBIBYTE, b"x" * 5 * MEBIBYTE), number)
    files.remove(range(20))
    files.close()
    assert left(tmp_path), "an end does not wait for it"
    again = files_in(tmp_path / "spool")
    again.sweep({}.__contains__)
    again.close()
    assert left(tmp_path) == []


async def test_a_directory_has_one_holder(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(SpoolInUse, match=rf"in use by another relay \(process {os.getpid()}\)"):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


async def test_a_holder_that_died_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("999999999\n")
    lock = DirectoryLock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    lock.release()
