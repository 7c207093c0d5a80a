"""The files of the drop folder: read, written again for some of their recipients, and named by what has become of them. All of it blocks.

A drop gets another name before the spool is given its message: `NAME~ID`, with the id that the message will have. So who finds such a
name, after a crash, can ask the spool whether it has the message. What is left for recipients who were refused is written before that,
too, as `.NAME.ID.later` or `.NAME.ID.never`, and gets its own name once the message is in custody. State: none but the files.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from relay.sendmail.drop import END, MAGIC
from relay.spool.base import MessageId
from relay.spool.files import sync_directory

# Anybody may leave a file there and nobody remove another's, as in /tmp; a file's group is the relay's, so that the relay can read it.
_FOLDER_MODE: Final = 0o3777

_COMMANDS_LIMIT_BYTES: Final = 1024 * 1024  # ten thousand recipients
_SLICE_BYTES: Final = 1024 * 1024
_NAME_BYTES: Final = 200  # of 255 on every file system, with room for what is put before and behind it
_ABANDONED_SECONDS: Final = 86_400.0  # a file that was never finished: its writer has died, and has not said that it was taken

_DATA: Final = b"\r\nDATA\r\n"
_MARKED: Final = re.compile(r"(.*)~([0-9A-F]{13,15})", re.DOTALL)
_REST: Final = re.compile(r"\.(.*)\.([0-9A-F]{13,15})\.(later|never)", re.DOTALL)


class NoDrop(Exception):
    """The file is not what relay-sendmail writes; the message says why."""


class Drop(NamedTuple):
    """One file: whose it is, the commands before DATA, and where its content begins and ends (without the final dot)."""

    name: str
    descriptor: int
    uid: int
    mail: bytes
    recipients: tuple[bytes, ...]
    start: int
    end: int


def make_folder(path: Path) -> None:
    """One that is there keeps its mode: the unit may have made it, or an operator who lets fewer users in."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    path.chmod(_FOLDER_MODE)


def names(folder: Path) -> set[str]:
    """The drops that are finished. Those that never will be are removed."""
    found, hidden = set[str](), list[os.DirEntry[str]]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden.append(entry) if entry.name.startswith(".") else found.add(entry.name)
    except FileNotFoundError:
        return found
    ids = set(map(id_in, found))
    for entry in hidden:
        rest = _REST.fullmatch(entry.name)
        if not (rest and rest[2] in ids) and _is_abandoned(entry):
            remove(Path(entry.path))
    return found


def _is_abandoned(entry: "os.DirEntry[str]") -> bool:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _ABANDONED_SECONDS


def open_drop(path: Path) -> Drop:
    """Raises NoDrop, or FileNotFoundError when it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NoDrop(f"it cannot be read: {error.strerror}") from None
    try:
        return _read(path.name, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise NoDrop(f"it cannot be read: {error.strerror}") from None
    except BaseException:
        os.close(descriptor)
        raise


def _read(name: str, descriptor: int) -> Drop:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # a link would give another user's file our owner's name
        raise NoDrop("it is not a file of its own")
    head = os.pread(descriptor, _COMMANDS_LIMIT_BYTES, 0)
    commands, data, _ = head.partition(_DATA)
    first, *lines = commands.split(b"\r\n")
    if first != MAGIC or not data:
        raise NoDrop("it does not begin like a drop")
    start = len(commands) + len(_DATA)
    if os.pread(descriptor, len(END), max(0, found.st_size - len(END))) != END:
        raise NoDrop("its end is missing")
    uid = found.st_uid
    if lines and lines[0].startswith(b"UID ") and uid == os.geteuid():  # written by us, on somebody's behalf
        uid = _number(lines.pop(0)[4:])
    if len(lines) < 2 or not lines[0].startswith(b"MAIL FROM:") or not all(line.startswith(b"RCPT TO:") for line in lines[1:]):
        raise NoDrop("its commands are not MAIL, RCPT and DATA")
    return Drop(name, descriptor, uid, lines[0], tuple(lines[1:]), start, max(start, found.st_size - len(b".\r\n")))


def _number(text: bytes) -> int:
    if not text.isdigit():
        raise NoDrop("it does not say whose it is")
    return int(text)


def write_rest(drop: Drop, place: Path, recipients: Sequence[bytes]) -> None:
    """Write the drop for some of its recipients, durably but for its name."""
    commands = b"\r\n".join([MAGIC, b"UID %d" % drop.uid, drop.mail, *recipients, b"DATA", b""])
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(commands)
        at = drop.start
        while octets := os.pread(drop.descriptor, _SLICE_BYTES, at):
            file.write(octets)
            at += len(octets)
        file.flush()
        os.fsync(file.fileno())


def move(place: Path, target: Path) -> None:
    """Give a file another name, durably. Whoever has looked through the folder of refused drops may have taken it away with them."""
    target.parent.mkdir(mode=0o700, exist_ok=True)
    os.rename(place, target)
    sync_directory(target.parent)


def named(name: str, session: str) -> str:
    """The name of what comes of a drop: no older one's, nor too long, whatever program has named the drop."""
    return f"{_short(bare(name))}.{session}"


def marked(name: str, message_id: str) -> str:
    """The name of a drop that is about to become this message."""
    return f"{_short(bare(name))}~{message_id}"


def bare(name: str) -> str:
    """The name without a mark."""
    found = _MARKED.fullmatch(name)
    return found[1] if found else name


def id_in(name: str) -> MessageId | None:
    """The id in the mark of a name, if it has one."""
    found = _MARKED.fullmatch(name)
    return MessageId(found[2]) if found else None


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


def rest_place(folder: Path, name: str, message_id: str, *, word: str) -> Path:
    """Where a rest waits for the message to be in custody. `name`: what it will be called. `word`: "later" or "never"."""
    return folder / f".{name}.{message_id}.{word}"


def rests_of(folder: Path, message_id: str) -> list[Path]:
    """What waits for the message to be in custody, of what we have written: by another's file a drop of somebody else could be replaced."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if (rest := _REST.fullmatch(entry.name)) and rest[2] == message_id and _is_ours(entry)]
    return sorted(folder / entry.name for entry in found)


def _is_ours(entry: "os.DirEntry[str]") -> bool:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def move_rests(places: Iterable[Path], aside: Path) -> list[Path]:
    """The message is in custody: give the rests their names, and answer where they are. What was refused for good goes aside."""
    targets = []
    for place in places:
        found = _REST.fullmatch(place.name)
        assert found is not None, "only rests are given"
        targets.append((aside if found[3] == "never" else place.parent) / found[1])
        move(place, targets[-1])
    return targets


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
