"""Mail that relay-sendmail left on disk while no relay answered: taken at start, and every few seconds from then on.

The folder stands for a door that was closed at the time. A drop is taken as if its owner had come to that door and had said what is in
the file: the same rules, limits and replies, and `uid:N` as the client. Its form is described in `relay.sendmail.drop`.

State: when to try again what could not be taken. Laws: a drop goes only after the spool has its message for every recipient, and no
message is taken twice, whenever the relay may have been killed (`drop_files`); what is refused or is no drop is set aside and told, never
removed. Nothing in a file is believed that its owner could not say to a listener.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from relay.listener import drop_files
from relay.listener.access import Peer
from relay.listener.data import Gathering, Received, reply_to
from relay.listener.dialogue import Dialogue
from relay.listener.door import Door
from relay.listener.drop_files import Drop, NoDrop
from relay.mail.envelope import Origin
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.spool.base import MessageId

FOLDER = "drop"
ASIDE = "drop-refused"

LOOK_SECONDS = 5.0
_RETRY_SECONDS = (10.0, 300.0)  # the first time, and at most
_AT_ONCE = 1000  # drops in one look, for anybody may leave as many as he likes
_SLICE_BYTES = 1024 * 1024


class _Rest(NamedTuple):
    """Those recipients of a drop who were refused for now ("later") or for good ("never"), `reply` the first."""

    word: str
    recipients: tuple[bytes, ...]
    reply: Reply


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

    def __init__(self, directory: Path, door: Door | None, journal: Journal, *, knows: Callable[[MessageId], bool]) -> None:
        """`door`: None when there is none that the folder could stand for. Then nothing is taken. `knows`: whether a message is in the
        spool or was; it may block, and raise SpoolError."""
        self._folder = directory / FOLDER
        self._aside = directory / ASIDE
        self._door = door
        self._journal = journal
        self._knows = knows
        self._left: dict[str, _Left] = {}
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Make the folder and begin to look."""
        try:
            if self._door is None:
                if waiting := len(drop_files.names(self._folder)):
                    what = "no listener takes mail from this machine without a login"
                    self._journal.note("error", f"{waiting} files in {self._folder} are not taken: {what}")
                return
            self._aside.mkdir(mode=0o700, exist_ok=True)
            drop_files.make_folder(self._folder)
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
        names = await asyncio.to_thread(drop_files.names, self._folder)
        if not names or door.intake.obstacle() is not None:
            return
        there = set(map(drop_files.bare, names))
        self._left = {name: left for name, left in self._left.items() if name in there}
        now = time.monotonic()
        due = sorted(name for name in names if (left := self._left.get(drop_files.bare(name))) is None or left.when <= now)
        for name in due[:_AT_ONCE]:
            if self._stopping.is_set():
                return
            session = door.new_session_id()
            try:
                await self._pick_up(door, name, session)
            except Exception as error:  # law 9: it stays, and the others go on
                self._journal.fault(f"taking drop {_shown(name)}", error, session=session)
                self._postpone(name)

    async def _pick_up(self, door: Door, name: str, session: str) -> None:
        if (message_id := drop_files.id_in(name)) is not None and await self._was_taken(name, message_id):
            return
        try:
            drop = await asyncio.to_thread(drop_files.open_drop, self._folder / name)
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
        if not any(reply.positive for reply in replies):
            await self._not_taken(drop, session, next((reply for reply in replies if reply.code < 500), replies[-1]))
            return
        message_id = door.intake.new_id()
        rests = _rests(drop, replies)
        name = drop_files.named(drop.name, session)
        places = [drop_files.rest_place(self._folder, name, message_id, word=rest.word) for rest in rests]
        before, marked = self._folder / drop.name, self._folder / drop_files.marked(drop.name, message_id)
        try:
            # Before custody: where there is no room for them, nobody has got the message yet, and all of it is tried again.
            for place, rest in zip(places, rests, strict=True):
                await asyncio.to_thread(drop_files.write_rest, drop, place, rest.recipients)
            await asyncio.to_thread(drop_files.move, before, marked)
        except BaseException:
            _remove_all(places)
            raise
        reply = await self._content(door, dialogue, drop, message_id)  # whatever happens, the name says what to ask the spool for
        if not reply.positive:
            await asyncio.to_thread(_remove_all, places)
            await asyncio.to_thread(os.rename, marked, before)
            await self._not_taken(drop, session, reply)
            return
        for target, rest in zip(await asyncio.to_thread(drop_files.move_rests, places, self._aside), rests, strict=True):
            self._tell(drop.name, f"for {len(rest.recipients)} of its recipients left as {target}: {rest.reply}")
        await asyncio.to_thread(drop_files.remove, marked)

    async def _was_taken(self, name: str, message_id: MessageId) -> bool:
        """Whether the drop was in custody when it was last let go of. Then what was still to do is done, else undone."""
        rests = await asyncio.to_thread(drop_files.rests_of, self._folder, message_id)
        if not await asyncio.to_thread(self._knows, message_id):
            await asyncio.to_thread(_remove_all, rests)
            return False
        for target in await asyncio.to_thread(drop_files.move_rests, rests, self._aside):
            self._tell(name, f"for some of its recipients left as {target}")
        await asyncio.to_thread(drop_files.remove, self._folder / name)
        self._journal.note("info", f"drop {_shown(name)} was taken before, as {message_id}")
        return True

    async def _content(self, door: Door, dialogue: Dialogue, drop: Drop, message_id: MessageId) -> Reply:
        """The reply to the content, as intake has decided."""
        reply = _said(dialogue, b"DATA")
        if reply.code != 354:
            return reply
        received = await _gathered(drop, Gathering(door.settings.message_size, door.intake.spill))
        transaction = dialogue.take_transaction()
        transaction.gone = True  # nobody waits for a verdict
        transaction.id = message_id
        if received.trouble is not None:
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
        name = drop_files.bare(name)
        pause = self._left[name].pause if name in self._left else first
        self._left[name] = _Left(time.monotonic() + pause, min(2 * pause, most))

    async def _set_aside(self, name: str, session: str, reason: str) -> None:
        target = self._aside / drop_files.named(name, session)
        try:
            await asyncio.to_thread(drop_files.move, self._folder / name, target)
        except OSError as error:
            self._postpone(name)
            self._tell(name, f"is not taken, and cannot be set aside ({error.strerror}): {reason}")
        else:
            self._tell(name, f"is not taken, and set aside as {target}: {reason}")

    def _tell(self, name: str, what: str) -> None:
        self._journal.note("error", f"drop {_shown(name)} {what}")


def _shown(name: str) -> str:
    return ascii(drop_files.bare(name))[1:-1]


def _said(dialogue: Dialogue, line: bytes) -> Reply:
    reply = dialogue.answer(line)
    assert isinstance(reply, Reply), "MAIL, RCPT and DATA are answered at once"
    return reply


def _rests(drop: Drop, replies: Sequence[Reply]) -> list[_Rest]:
    pairs = list(zip(drop.recipients, replies, strict=True))
    later = [(recipient, reply) for recipient, reply in pairs if not reply.positive and reply.code < 500]
    never = [(recipient, reply) for recipient, reply in pairs if reply.code >= 500]
    return [
        _Rest(word, tuple(recipient for recipient, _ in found), found[0][1])
        for word, found in (("later", later), ("never", never))
        if found
    ]  # fmt: skip


def _remove_all(places: Iterable[Path]) -> None:
    for place in places:
        drop_files.remove(place)


async def _gathered(drop: Drop, gathering: Gathering) -> Received:
    """The content, read in slices of whole lines."""
    place, kept = drop.start, b""
    try:
        while place < drop.end:
            octets = await asyncio.to_thread(os.pread, drop.descriptor, min(_SLICE_BYTES, drop.end - place), place)
            if not octets:
                raise OSError("the file became shorter")
            place += len(octets)
            lines, kept = _whole_lines(kept + octets)
            if len(kept) > _SLICE_BYTES:
                gathering.fail("line too long")
                break
            await gathering.add(lines)
        return await gathering.finish()
    except BaseException:
        gathering.discard()
        raise


def _whole_lines(octets: bytes) -> tuple[bytes, bytes]:
    end = octets.rfind(b"\n") + 1
    return octets[:end], octets[end:]
