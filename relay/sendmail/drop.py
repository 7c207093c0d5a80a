"""The drop folder: where a letter waits, on disk, while no relay answers.

A drop is a file of SMTP commands and content, as a client would send them:

    relay-drop 1
    UID 1000                     (only in what the relay writes itself; otherwise the file's owner is the sender)
    MAIL FROM:<www-data> ENVID=…
    RCPT TO:<you@example.org> NOTIFY=NEVER
    DATA
    … content, with transparency dots, to the final dot at the end of the file

Written under a name with a dot before, synced, and renamed: what has its final name is whole. Laws: when `write` returns, a crash loses
nothing; a file's group is the folder's (which has the set-group-ID bit), and no others may read it.
"""

import os
import time
from collections.abc import Mapping

from relay.sendmail.message import Letter

DEFAULT_FOLDER = "/var/lib/relay/drop"
MAGIC = b"relay-drop 1"
END = b"\r\n.\r\n"
_MODE = 0o640


def folder(environ: Mapping[str, str]) -> str:
    """Where drops go: `$RELAY_DROP`, else where the relay of the unit looks."""
    return environ.get("RELAY_DROP", "") or DEFAULT_FOLDER


def write(directory: str, letter: Letter, *, uid: int | None = None) -> str:
    """Leave `letter` in the folder, durably, and answer the name of the file. `uid`: on whose behalf, for the relay. Raises OSError."""
    name = f"{time.time_ns() // 1000:016X}-{os.urandom(4).hex()}"
    place, target = os.path.join(directory, f".{name}"), os.path.join(directory, name)
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            _write_all(descriptor, _commands(letter, uid))
            _write_all(descriptor, letter.stuffed())
            _give(descriptor, directory)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(place, target)
    except BaseException:
        os.unlink(place)
        raise
    _sync_names(directory)
    return name


def _commands(letter: Letter, uid: int | None) -> bytes:
    lines = [MAGIC.decode()]
    if uid is not None:
        lines.append(f"UID {uid}")
    mail = f"MAIL FROM:<{letter.sender}>"
    mail += "" if letter.content.isascii() else " BODY=8BITMIME"
    mail += " SMTPUTF8" if letter.smtputf8 else ""
    mail += f" RET={letter.ret}" if letter.ret else ""
    mail += f" ENVID={letter.envid}" if letter.envid else ""
    wishes = f" NOTIFY={letter.notify}" if letter.notify else ""
    lines += [mail, *(f"RCPT TO:<{recipient}>{wishes}" for recipient in letter.recipients), "DATA", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape")


def _give(descriptor: int, directory: str) -> None:
    """Let the folder's group read it, also where the folder does not see to that and root is who writes."""
    group = os.stat(directory).st_gid
    if os.geteuid() == 0 and os.fstat(descriptor).st_gid != group:
        os.fchown(descriptor, -1, group)
    os.fchmod(descriptor, _MODE)


def _sync_names(directory: str) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        os.sync()  # a folder that one may write to and not list cannot be opened to be synced alone
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(descriptor, view) :]
