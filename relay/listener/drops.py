"""Mail that relay-sendmail left on disk while no relay answered: taken at start, and every few seconds from then on.

The folder stands for a door that was closed at the time. A drop is taken as if its owner had come to that door and had said what is in
the file: the same rules, limits and replies, and `uid:N` as the client. Its form is described in `relay.sendmail.drop`.

State: when to try again what could not be taken. Laws: a drop goes only after the spool has its message for every recipient; what is
refused or is no drop is set aside and told, never removed. Nothing in a file is believed that its owner could not say to a listener.
"""

import asyncio
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from relay.listener.access import Peer
from relay.listener.data import Gathering, Received, reply_to
from relay.listener.dialogue import Dialogue
from relay.listener.door import Door
from relay.mail.envelope import Origin
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.sendmail.drop import END, MAGIC

FOLDER = "drop"
ASIDE = "drop-refused"

# Anybody may leave a file there and nobody remove another's, as in /tmp; a file's group is the relay's, so that the relay can read it.
_FOLDER_MODE = 0o3777

LOOK_SECONDS = 5.0
_RETRY_SECONDS = (10.0, 300.0)  # the first time, and at most
_AT_ONCE = 1000  # drops in one look, for anybody may leave as many as he likes
_COMMANDS_LIMIT_BYTES = 1024 * 1024  # ten thousand recipients
_SLICE_BYTES = 1024 * 1024
_ABANDONED_SECONDS = 86_400.0  # a file that was never finished: its writer has died, and has not said that it was taken

_DATA = b"\r\nDATA\r\n"
_TOO_LONG = Reply(554, "5.6.0", "A line of the message is too long")


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


class _Left(NamedTuple):
    """A drop that could not be taken: not before `when`, and so long after the next time (seconds of the monotonic clock)."""

    when: float
    pause: float


def door_of(doors: Iterable[Door]) -> Door | None:
    """The first door that takes mail from every user of this machine without a login: only then may a folder stand for one."""
    return next((door for door in doors if _is_open_to_all(door)), None)


def _is_open_to_all(door: Door) -> bool:
    settings = door.settings
    if settings.proxy_protocol or settings.inherited or (settings.path and not settings.mode & 0o002):
        return False
    peer = Peer(uid=os.geteuid()) if settings.path else Peer("127.0.0.1")
    return door.access.allows(peer.client) and not door.demands_tls(peer) and not door.logins.demands(peer)


class Drops:
    """The drop folder of the spool in `directory`, and the task that looks into it. Opened once, then stopped and drained."""

    def __init__(self, directory: Path, door: Door | None, journal: Journal) -> None:
        """`door`: None when there is none that the folder could stand for. Then nothing is taken."""
        self._folder = directory / FOLDER
        self._aside = directory / ASIDE
        self._door = door
        self._journal = journal
        self._left: dict[str, _Left] = {}
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Make the folder and begin to look."""
        try:
            if self._door is None:
                if waiting := len(_names(self._folder)):
                    what = "no listener takes mail from this machine without a login"
                    self._journal.note("error", f"{waiting} files in {self._folder} are not taken: {what}")
                return
            self._aside.mkdir(mode=0o700, exist_ok=True)
            _make_folder(self._folder)
        except OSError as error:
            self._journal.note("error", f"the drop folder {self._folder} cannot be made: {error.strerror}")
            return
        self._task = asyncio.get_running_loop().create_task(self._serve(self._door), name="drops")

    def stop(self) -> None:
        """Take no more; the drop at hand is still taken."""
        self._stopping.set()

    async def drained(self) -> None:
        """Wait for the drop at hand."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def abort(self) -> None:
        """Cut off what is under way: the drop stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _serve(self, door: Door) -> None:
        while not self._stopping.is_set():
            try:
                await self._look(door)
            except Exception as error:  # law 9
                self._journal.fault("looking into the drop folder", error)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _look(self, door: Door) -> None:
        """Take what has come, the oldest first, unless the spool takes nothing now."""
        names = await asyncio.to_thread(_names, self._folder)
        if not names or door.intake.obstacle() is not None:
            return
        self._left = {name: left for name, left in self._left.items() if name in names}
        now = time.monotonic()
        due = sorted(name for name in names if name not in self._left or self._left[name].when <= now)
        for name in due[:_AT_ONCE]:
            if self._stopping.is_set():
                return
            session = door.new_session_id()
            try:
                await self._pick_up(door, name, session)
            except Exception as error:  # law 9: it stays, and the others go on
                self._journal.fault(f"taking drop {ascii(name)[1:-1]}", error, session=session)
                self._postpone(name)

    async def _pick_up(self, door: Door, name: str, session: str) -> None:
        try:
            drop = await asyncio.to_thread(_open, self._folder / name)
        except NoDrop as error:
            await self._set_aside(name, session, str(error))
            return
        except FileNotFoundError:
            return  # its owner has taken it back
        try:
            await self._take(door, drop, session)
        finally:
            os.close(drop.descriptor)

    async def _take(self, door: Door, drop: Drop, session: str) -> None:
        """Bring one drop through the door, and remove it or what is done of it."""
        origin = Origin(door.settings.name, f"uid:{drop.uid}", "", session)
        dialogue = Dialogue(door, origin, Peer(uid=drop.uid))
        dialogue.answer(b"EHLO " + door.hostname)
        reply = _said(dialogue, drop.mail)
        if not reply.positive:
            await self._not_taken(drop, session, reply)
            return
        replies = [_said(dialogue, recipient) for recipient in drop.recipients]
        if any(reply.positive for reply in replies):
            reply = await self._content(door, dialogue, drop)
        else:
            reply = next((reply for reply in replies if reply.code < 500), replies[-1])
        if not reply.positive:
            await self._not_taken(drop, session, reply)
            return
        pairs = list(zip(drop.recipients, replies, strict=True))
        for folder, rest in (
            (self._folder, [(recipient, reply) for recipient, reply in pairs if not reply.positive and reply.code < 500]),
            (self._aside, [(recipient, reply) for recipient, reply in pairs if reply.code >= 500]),
        ):
            if rest:
                path = folder / f"{drop.name}.{session}"
                await asyncio.to_thread(_write_rest, drop, path, [recipient for recipient, _ in rest])
                self._tell(drop.name, f"for {len(rest)} of its recipients left as {path}: {rest[0][1]}")
        await asyncio.to_thread(_remove, self._folder / drop.name)

    async def _content(self, door: Door, dialogue: Dialogue, drop: Drop) -> Reply:
        """The reply to the content, as intake has decided."""
        reply = _said(dialogue, b"DATA")
        if reply.code != 354:
            return reply
        received = await _gathered(drop, Gathering(door.settings.message_size, door.intake.spill))
        transaction = dialogue.take_transaction()
        transaction.gone = True  # nobody waits for a verdict
        if isinstance(received, Reply):
            reply = received
        elif received.trouble is not None:
            reply = reply_to(received.trouble)
        else:
            reply = await door.intake.accept(transaction, received.content, received.head)
        return reply if reply.positive else dialogue.refuse(reply, transaction.sender or "<>", ",".join(transaction.recipients))

    async def _not_taken(self, drop: Drop, session: str, reply: Reply) -> None:
        """Leave it for later, or set it aside."""
        if reply.code >= 500:
            await self._set_aside(drop.name, session, str(reply))
            return
        self._postpone(drop.name)

    def _postpone(self, name: str) -> None:
        first, most = _RETRY_SECONDS
        pause = self._left[name].pause if name in self._left else first
        self._left[name] = _Left(time.monotonic() + pause, min(2 * pause, most))

    async def _set_aside(self, name: str, session: str, reason: str) -> None:
        target = self._aside / f"{name}.{session}"
        try:
            await asyncio.to_thread(os.rename, self._folder / name, target)
        except OSError as error:
            self._postpone(name)
            self._tell(name, f"is not taken, and cannot be set aside ({error.strerror}): {reason}")
        else:
            self._tell(name, f"is not taken, and set aside as {target}: {reason}")

    def _tell(self, name: str, what: str) -> None:
        self._journal.note("error", f"drop {ascii(name)[1:-1]} {what}")


def _said(dialogue: Dialogue, line: bytes) -> Reply:
    reply = dialogue.answer(line)
    assert isinstance(reply, Reply), "MAIL, RCPT and DATA are answered at once"
    return reply


async def _gathered(drop: Drop, gathering: Gathering) -> Received | Reply:
    """The content, read in slices of whole lines, or why it cannot be taken."""
    place, kept = drop.start, b""
    try:
        while place < drop.end:
            octets = await asyncio.to_thread(os.pread, drop.descriptor, min(_SLICE_BYTES, drop.end - place), place)
            if not octets:
                raise OSError("the file became shorter")
            place += len(octets)
            lines, kept = _whole_lines(kept + octets)
            if len(kept) > _SLICE_BYTES:
                gathering.discard()
                return _TOO_LONG
            await gathering.add(lines)
        return await gathering.finish()
    except BaseException:
        gathering.discard()
        raise


def _whole_lines(octets: bytes) -> tuple[bytes, bytes]:
    end = octets.rfind(b"\n") + 1
    return octets[:end], octets[end:]


# -- files; all of it blocks -------------------------------------------------------------------------------------------------


def _make_folder(path: Path) -> None:
    """One that is there keeps its mode: the unit may have made it, or an operator who lets fewer users in."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    path.chmod(_FOLDER_MODE)


def _names(folder: Path) -> set[str]:
    """The drops that are finished. Those that never will be are removed."""
    names = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    names.add(entry.name)
                elif _is_abandoned(entry):
                    _remove(Path(entry.path))
    except FileNotFoundError:
        pass
    return names


def _is_abandoned(entry: "os.DirEntry[str]") -> bool:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _ABANDONED_SECONDS


def _open(path: Path) -> Drop:
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


def _write_rest(drop: Drop, path: Path, recipients: list[bytes]) -> None:
    """Leave the drop for some of its recipients at `path`, durably."""
    place = path.with_name(f".{path.name}")
    commands = b"\r\n".join([MAGIC, b"UID %d" % drop.uid, drop.mail, *recipients, b"DATA", b""])
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(commands)
        at = drop.start
        while octets := os.pread(drop.descriptor, _SLICE_BYTES, at):
            file.write(octets)
            at += len(octets)
        file.flush()
        os.fsync(file.fileno())
    os.rename(place, path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
