"""A drop on disk: what order it is written in, and that a failure at any step leaves nothing that looks like one."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.sendmail import drop
from relay.sendmail.message import Letter

LETTER = Letter(
    "me@acme.example", ["you@example.org", "jörg@example.org"], b"Subject: hi\r\n\r\n.\r\n", notify="NEVER", ret="FULL", envid="a"
)
STEPS = ("open", "write", "fchmod", "fsync", "rename")


def watch(monkeypatch: pytest.MonkeyPatch, steps: list[str], *, failing: str = "") -> None:
    """Note what is done to files, and let one of it fail."""

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            steps.append(name if name != "fsync" else f"fsync {'names' if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else 'content'}")
            if name == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))


def test_it_is_whole_and_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    watch(monkeypatch, steps)
    name = drop.write(str(tmp_path), LETTER)
    assert steps == ["open", "write", "write", "fchmod", "fsync content", "rename", "open", "fsync names"]
    assert (tmp_path / name).read_bytes() == (
        "relay-drop 1\r\nMAIL FROM:<me@acme.example> SMTPUTF8 RET=FULL ENVID=a\r\nRCPT TO:<you@example.org> NOTIFY=NEVER\r\n"
        "RCPT TO:<jörg@example.org> NOTIFY=NEVER\r\nDATA\r\nSubject: hi\r\n\r\n..\r\n.\r\n"
    ).encode()
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("failing", STEPS)
def test_a_failure_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    watch(monkeypatch, [], failing=failing)
    with pytest.raises(OSError, match="No space left"):
        drop.write(str(tmp_path), LETTER)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_names_rise_with_time(tmp_path: Path) -> None:
    names = [drop.write(str(tmp_path), LETTER) for _ in range(20)]
    assert sorted(names) == names and len(set(names)) == 20


def test_a_folder_that_one_may_not_list_is_synced_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.open, []

    def forbidden(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr(os, "sync", lambda: synced.append(1))
    drop.write(str(tmp_path), LETTER)
    assert synced == [1]


def test_root_gives_it_to_the_folders_group(tmp_path: Path) -> None:
    """Where the folder has no set-group-ID bit, the relay could not read it otherwise."""
    os.chown(tmp_path, -1, 12345) if os.geteuid() == 0 else None
    name = drop.write(str(tmp_path), LETTER)
    assert (tmp_path / name).stat().st_gid == tmp_path.stat().st_gid


@pytest.mark.parametrize(
    ("environ", "expected"), [({}, "/var/lib/relay/drop"), ({"RELAY_DROP": "/x"}, "/x"), ({"RELAY_DROP": ""}, "/var/lib/relay/drop")]
)
def test_the_folder_may_be_named(environ: dict[str, str], expected: str) -> None:
    assert drop.folder(environ) == expected
