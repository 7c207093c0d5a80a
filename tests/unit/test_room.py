"""Room for mail: limits are compared without I/O, and a fault lasts until the same thing works again."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from relay.clock import ManualClock, Steps
from relay.spool.base import SpoolError, SpoolFull
from relay.spool.room import Room

MB = 1_000_000


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What statvfs says of the disk."""
    found = SimpleNamespace(f_bavail=1000, f_frsize=MB, f_files=100, f_favail=50, error=None)

    def statvfs(_: object) -> SimpleNamespace:
        if found.error is not None:
            raise found.error
        return found

    monkeypatch.setattr(os, "statvfs", statvfs)
    return found


@pytest.mark.parametrize(
    ("free", "files", "waiting", "size", "said"),
    [
        (1000, 50, 0, 0, None),
        (100, 50, 0, 0, None),
        (99, 50, 0, 0, "the disk of the spool has 99.0 MB free, and min_free is 100.0 MB"),
        (110, 50, 0, 10 * MB, None),
        (110, 50, 0, 10 * MB + 1, "the disk of the spool has 110.0 MB free, and min_free is 100.0 MB"),
        (1000, 0, 0, 0, "the disk of the spool has 0.0 MB free, and min_free is 100.0 MB"),
        (1000, 50, 500 * MB, 0, None),
        (1000, 50, 499 * MB, MB, None),
        (1000, 50, 499 * MB, MB + 1, "499.0 MB of mail are waiting, and max_size is 500.0 MB"),
    ],
)
def test_the_limits(disk: SimpleNamespace, free: int, files: int, waiting: int, size: int, said: str | None) -> None:
    disk.f_bavail, disk.f_favail = free, files
    room = Room(Path("/spool"), ManualClock(), max_size_bytes=500 * MB, min_free_bytes=100 * MB)
    room.look()
    room.waiting_bytes = waiting
    obstacle = room.obstacle(size)
    assert (str(obstacle) if obstacle else None) == said
    assert said is None or isinstance(obstacle, SpoolFull)


def test_a_file_system_that_does_not_count_files_is_not_full(disk: SimpleNamespace) -> None:
    disk.f_files = disk.f_favail = 0
    room = Room(Path("/spool"), ManualClock(), min_free_bytes=MB)
    room.look()
    assert room.obstacle() is None


def test_without_limits_nothing_is_too_much(disk: SimpleNamespace) -> None:
    disk.f_bavail = 0
    room = Room(Path("/spool"), ManualClock())
    room.look()
    room.waiting_bytes = 10**15
    assert room.obstacle() is None


def test_the_disk_is_looked_at_once_a_second_and_what_cannot_be_seen_stays_as_it_was(disk: SimpleNamespace) -> None:
    clock = ManualClock()
    room = Room(Path("/spool"), clock, min_free_bytes=MB)
    room.look()
    disk.f_bavail = 0
    clock.advance(0.9)
    room.look()
    assert room.obstacle() is None
    clock.advance(0.1)
    room.look()
    assert room.obstacle() is not None
    disk.error = OSError(5, "Input/output error")
    clock.advance(1)
    room.look()
    assert room.obstacle() is not None
    disk.error, disk.f_bavail = None, 5
    clock.advance(1)
    room.look()
    assert room.obstacle() is None


def test_a_fault_lasts_until_a_probe_of_the_same_part_says_that_it_works(disk: SimpleNamespace) -> None:
    clock, probed = ManualClock(), list[str]()
    room = Room(Path("/spool"), clock)
    room.watch("files", lambda: probed.append("files"))
    room.watch("database", lambda: room.works("database"))
    room.failed("files", SpoolError("files fail"))
    room.failed("database", SpoolFull("the database is full"))
    assert str(room.obstacle()) == "files fail"
    room.look()
    assert probed == ["files"]
    assert not room.faulty("database")
    assert str(room.obstacle()) == "files fail", "that the database works says nothing about files"
    room.look()
    assert probed == ["files"], "a failing disk is probed once a second"
    clock.advance(1)
    room.look()
    assert probed == ["files", "files"]
    room.works("files")
    assert room.obstacle() is None


def test_steps_of_the_clock_are_told_once_and_small_ones_together() -> None:
    clock = ManualClock()
    steps = Steps(clock)
    clock.advance(86_400)
    assert steps.last() == 0
    clock.step(3600)
    assert steps.last() == 3600
    assert steps.last() == 0
    clock.step(-40)
    assert steps.last() == 0
    clock.step(-40)
    assert steps.last() == -80
    assert steps.last() == 0
