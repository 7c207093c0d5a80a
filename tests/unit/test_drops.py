"""The drop folder: what relay-sendmail left is taken whole, once for each recipient, and nothing of it is ever lost."""

import asyncio
import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.listener import drop_files, drops
from relay.listener.drops import ASIDE, FOLDER, Drops, door_of
from relay.mail.envelope import Recipient
from relay.sendmail.drop import write
from relay.sendmail.message import Letter
from relay.spool.base import SpoolError
from tests.support.eventually import eventually
from tests.support.front import Front

CONTENT = b"From: app@acme.example\r\nSubject: hi\r\n\r\nhello\r\n.\r\n..two\r\n"
_SAID = drops._said
GOOD = b"relay-drop 1\r\nMAIL FROM:<app@acme.example>\r\nRCPT TO:<you@example.org>\r\nDATA\r\nSubject: hi\r\n\r\nhello\r\n.\r\n"
NOT_THERE = [
    {"name": "no", "sender": "acme.example", "recipient": "no.example", "reject": "not there"},
    {"name": "acme", "sender": "acme.example", "upstream": "acme"},
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(drops, "_RETRY_SECONDS", (0.02, 0.04))


class Yard:
    """A front with a drop folder."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.folder = front.directory / FOLDER
        self.aside = front.directory / ASIDE
        self.drops = self.restarted()

    def restarted(self) -> Drops:
        """As the next process has them."""
        return Drops(self.front.directory, door_of([self.front.door]), self.front.door.journal, knows=self.knows)

    def knows(self, message_id: str) -> bool:
        return message_id in [message.id for message in self.front.taken]

    def leave(self, *recipients: str, sender: str = "app@acme.example", content: bytes = CONTENT, **wishes: Any) -> str:
        return write(str(self.folder), Letter(sender, list(recipients or ["you@example.org"]), content, **wishes))

    def lay(self, octets: bytes, name: str = "0001-laid") -> None:
        """A file that some other program wrote."""
        (self.folder / f".{name}").write_bytes(octets)
        (self.folder / f".{name}").rename(self.folder / name)

    async def empty(self) -> None:
        await eventually(lambda: not os.listdir(self.folder), "an empty folder")

    def notes(self) -> list[str]:
        return [event["what"] for event in self.front.events("note")]


@asynccontextmanager
async def yard(directory: Path, *, before: Callable[[Yard], object] = lambda _: None, **front: Any) -> AsyncIterator[Yard]:
    async with Front(directory, **front) as built:
        found = Yard(built)
        before(found)
        found.drops.open()
        try:
            yield found
        finally:
            found.drops.stop()
            await found.drops.drained()


async def test_what_waits_is_taken_at_start_as_its_owner_left_it(tmp_path: Path) -> None:
    def leave(found: Yard) -> None:
        found.folder.mkdir()
        found.leave("you@example.org", "her@example.org", notify="NEVER", ret="HDRS", envid="a+2Bb")

    async with yard(tmp_path, before=leave) as found:
        await found.empty()
    (message,) = found.front.taken
    assert message.content == CONTENT
    assert message.draft.envelope.sender == "app@acme.example"
    assert message.draft.envelope.recipients == (Recipient("you@example.org", "NEVER"), Recipient("her@example.org", "NEVER"))
    assert (message.draft.envelope.ret, message.draft.envelope.envid) == ("HDRS", "a+2Bb")
    assert (message.draft.origin.client, message.draft.origin.listener) == (f"uid:{os.getuid()}", "local")
    assert message.prefix.startswith(f"Received: from relay.example (uid:{os.getuid()})\r\n\tby relay.example with ESMTP id ".encode())
    assert found.front.events("refused") == found.notes() == []


async def test_what_comes_later_is_taken_too_and_bare_names_are_completed(tmp_path: Path) -> None:
    config = {"domain": "acme.example", "aliases": {"root": "ops@acme.example"}}
    async with yard(tmp_path, config=config) as found:
        assert stat.S_IMODE(found.folder.stat().st_mode) == 0o3777
        assert stat.S_IMODE(found.aside.stat().st_mode) == 0o700
        found.leave("root", sender="www-data")
        await found.empty()
        found.leave("jörg@example.org", content=b"Subject: \xc3\xbc\r\n\r\n")
        await found.empty()
    assert [(message.sender, message.recipients) for message in found.front.taken] == [
        ("www-data@acme.example", ("ops@acme.example",)),
        ("app@acme.example", ("jörg@example.org",)),
    ]
    assert found.front.taken[1].draft.envelope.smtputf8


@pytest.mark.parametrize("size", [0, 1, 900_000, 1_048_576, 3_000_000])
async def test_content_of_any_size_arrives_octet_by_octet(tmp_path: Path, size: int) -> None:
    content = (b".%066d\r\n" * (size // 69))[: size - size % 69] if size > 1 else b"\r\n"[:0]
    async with yard(tmp_path) as found:
        found.leave(content=content % tuple(range(size // 69)) if size > 1 else content)
        await found.empty()
    assert found.front.taken[0].content == (content % tuple(range(size // 69)) if size > 1 else content)
    assert found.front.arriving == []


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"", "it does not begin like a drop"),
        (b"\x00" * 5000, "it does not begin like a drop"),
        (GOOD[1:], "it does not begin like a drop"),
        (GOOD.replace(b"DATA", b"DATE"), "it does not begin like a drop"),
        (GOOD.replace(b"\r\n", b"\n"), "it does not begin like a drop"),
        (GOOD.replace(b"drop 1", b"drop 2"), "it does not begin like a drop"),
        (GOOD[:-1], "its end is missing"),
        (GOOD[:-3], "its end is missing"),
        (GOOD.replace(b"RCPT TO:<you@example.org>\r\n", b""), "its commands are not MAIL, RCPT and DATA"),
        (GOOD.replace(b"RCPT TO", b"QUIT\r\nRCPT TO"), "its commands are not MAIL, RCPT and DATA"),
        (GOOD.replace(b"MAIL", b"AUTH PLAIN AGEAYg==\r\nMAIL"), "its commands are not MAIL, RCPT and DATA"),
        (GOOD.replace(b"MAIL", b"UID x\r\nMAIL"), "it does not say whose it is"),
        (GOOD.replace(b"<app@", b"<app@@"), "501 5.1.7 Bad sender address"),
        (GOOD.replace(b"<app@acme", b"<app@unknown"), "550 5.7.1 no route takes this sender"),
        (GOOD.replace(b"<you@", b"<you you@"), "501 5.1.3 Bad recipient address"),
        (GOOD.replace(b"hello", b"x" * 3_000_000), "554 5.6.0 A line of the message is too long"),
        (GOOD.replace(b"hello", b"x\r\n" * 700_000), "552 5.3.4 Message too large"),
        (GOOD.replace(b"Subject: hi\r\n", b"Received: a\r\n" * 60), "554 5.4.6 Mail loop"),
    ],
)
async def test_what_cannot_be_taken_is_set_aside_unchanged_and_told(tmp_path: Path, octets: bytes, reason: str) -> None:
    async with yard(tmp_path, listener={"message_size": 2_000_000}) as found:
        found.lay(octets)
        await found.empty()
        found.leave()
        await found.empty()
    (path,) = found.aside.iterdir()
    assert path.read_bytes() == octets
    (note,) = found.notes()
    assert note.startswith("drop 0001-laid is not taken, and set aside as ") and f"{path}: {reason}" in note
    assert len(found.front.taken) == 1
    assert found.front.arriving == []


async def test_it_is_taken_when_it_is_put_back_and_the_obstacle_is_gone(tmp_path: Path) -> None:
    async with yard(tmp_path) as found:
        found.lay(GOOD.replace(b"app@acme", b"app@unknown"))
        await found.empty()
        (path,) = found.aside.iterdir()
        path.write_bytes(GOOD)
        path.rename(found.folder / path.name)
        await found.empty()
    assert [message.sender for message in found.front.taken] == ["app@acme.example"]


async def test_files_that_are_no_files_of_their_own_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(GOOD)
    async with yard(tmp_path) as found:
        (found.folder / "link").symlink_to(secret)
        (found.folder / "hard").hardlink_to(secret)
        os.mkfifo(found.folder / "pipe")
        (found.folder / "directory").mkdir()
        await found.empty()
    assert found.front.taken == []
    assert sorted(path.name.partition(".")[0] for path in found.aside.iterdir()) == ["directory", "hard", "link", "pipe"]


async def test_a_refused_recipient_keeps_nobody_else_waiting_and_is_not_forgotten(tmp_path: Path) -> None:
    async with yard(tmp_path, config={"routes": NOT_THERE}) as found:
        found.leave("you@example.org", "a@no.example", "b@no.example", "her@example.org", notify="NEVER")
        await found.empty()
        (path,) = found.aside.iterdir()
        kept = path.read_bytes()
    assert [message.recipients for message in found.front.taken] == [("you@example.org", "her@example.org")]
    uid = os.getuid()
    assert kept.startswith(
        f"relay-drop 1\r\nUID {uid}\r\nMAIL FROM:<app@acme.example>\r\n"
        "RCPT TO:<a@no.example> NOTIFY=NEVER\r\nRCPT TO:<b@no.example> NOTIFY=NEVER\r\nDATA\r\nFrom:".encode()
    )
    (note,) = found.notes()
    assert "for 2 of its recipients" in note and "550 5.7.1 not there" in note


async def test_nobody_gets_a_second_copy_because_of_those_who_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    real = drop_files.write_rest

    def full(*arguments: Any) -> None:
        tries.append("full")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(drop_files, "write_rest", full)
    async with yard(tmp_path, config={"routes": NOT_THERE}) as found:
        name = found.leave("you@example.org", "a@no.example")
        await eventually(lambda: len(tries) > 2, "a few tries")
        assert os.listdir(found.folder) == [name] and found.front.taken == []
        monkeypatch.setattr(drop_files, "write_rest", real)
        await found.empty()
        assert len(list(found.aside.iterdir())) == 1
    assert [message.recipients for message in found.front.taken] == [("you@example.org",)]


@pytest.mark.parametrize("name", ["0001-drop", "x" * 250, "ä" * 120])
async def test_what_is_refused_is_set_aside_whatever_its_name_and_though_somebody_took_the_folder_away(tmp_path: Path, name: str) -> None:
    mixed = GOOD.replace(b"DATA\r\n", b"RCPT TO:<a@no.example>\r\nDATA\r\n")
    async with yard(tmp_path, config={"routes": NOT_THERE}) as found:
        found.aside.rmdir()
        found.lay(mixed, name)
        await found.empty()
        found.lay(b"nonsense", name)
        await found.empty()
        assert len(list(found.aside.iterdir())) == 2
    assert [message.recipients for message in found.front.taken] == [("you@example.org",)]
    assert found.front.events("fault") == []


async def test_a_message_that_is_refused_leaves_nothing_of_the_rest(tmp_path: Path) -> None:
    async with yard(tmp_path, config={"routes": NOT_THERE}, listener={"message_size": 1000}) as found:
        found.leave("you@example.org", "a@no.example", content=b"x\r\n" * 1000)
        await found.empty()
        (path,) = found.aside.iterdir()
        assert path.read_bytes().count(b"RCPT TO:") == 2
    assert found.front.taken == []


async def test_more_recipients_than_a_message_may_have_are_taken_one_after_the_other(tmp_path: Path) -> None:
    recipients = [f"r{number}@example.org" for number in range(7)]
    async with yard(tmp_path, listener={"recipients": 3}) as found:
        found.leave(*recipients)
        await found.empty()
    assert [len(message.recipients) for message in found.front.taken] == [3, 3, 1]
    assert sorted(address for message in found.front.taken for address in message.recipients) == recipients
    assert {message.content for message in found.front.taken} == {CONTENT}
    assert {message.draft.origin.client for message in found.front.taken} == {f"uid:{os.getuid()}"}


@pytest.mark.parametrize("fault", ["full", "put", "open", "unexpected"])
async def test_what_the_spool_cannot_take_now_stays_until_it_can(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"x\r\n" * 700_000
    looks = []
    async with yard(tmp_path) as found:
        spool, real = found.front.spool, os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or real(path))
        match fault:
            case "full":
                spool.ill = "no room"
            case "put":
                spool.put_error = SpoolError("broken")
            case "open":
                spool.open_error = SpoolError("broken")
            case "unexpected":
                monkeypatch.setattr(drops, "_said", lambda *_: 1 / 0)
        name = found.leave(content=content)
        looks.clear()
        await eventually(lambda: len(looks) > 10)
        assert [drop_files.bare(each) for each in os.listdir(found.folder)] == [name]
        monkeypatch.setattr(drops, "_said", _SAID)
        spool.ill = spool.put_error = spool.open_error = None
        await found.empty()
    assert [message.content for message in found.front.taken] == [content]
    assert list(found.aside.iterdir()) == []
    assert bool(found.front.events("fault")) is (fault in ("put", "unexpected"))


class Killed(BaseException):
    """What nobody catches: as if the process ended here."""


async def run_until_killed(found: Yard, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Let the drops of one process take what is there, and end it: before the spool has it, or after that and before the file is gone."""

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before custody":
            patch.setattr(found.front.door.intake, "accept", die)
        else:
            patch.setattr(drop_files, "move_rests" if moment == "after custody" else "remove", die)
        found.drops.open()
        assert found.drops._task is not None
        with pytest.raises(Killed):
            await found.drops._task
    found.drops._task = None
    found.drops = found.restarted()


@pytest.mark.parametrize("moment", ["before custody", "after custody", "before it is removed"])
@pytest.mark.parametrize("days", [0, 3])
async def test_a_relay_that_is_killed_takes_a_drop_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, days: int) -> None:
    async with Front(tmp_path, {"routes": NOT_THERE}, listener={"recipients": 2}) as front:
        found = Yard(front)
        found.folder.mkdir()
        found.leave("you@example.org", "a@no.example", "her@example.org", "b@no.example", "him@example.org")
        await run_until_killed(found, monkeypatch, moment)
        for path in found.folder.iterdir():
            os.utime(path, (time.time() - days * 86_400, time.time() - days * 86_400))
        found.drops.open()
        await found.empty()
        found.drops.stop()
        await found.drops.drained()
        assert [message.recipients for message in front.taken] == [("you@example.org", "her@example.org"), ("him@example.org",)]
        (path,) = found.aside.iterdir()
        assert path.read_bytes().count(b"RCPT TO:") == 2 and b"<a@no" in path.read_bytes() and b"<b@no" in path.read_bytes()
        assert len([note for note in found.notes() if "drop-refused" in note]) == 1


async def test_a_file_that_cannot_be_removed_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []
    real = drop_files.remove

    def broken(path: Path) -> None:
        if not path.name.startswith("."):
            tries.append(path)
            raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(drop_files, "remove", broken)
    async with yard(tmp_path) as found:
        found.leave()
        await eventually(lambda: len(tries) > 3, "a few tries")
        monkeypatch.setattr(drop_files, "remove", real)
        await found.empty()
    assert len(found.front.taken) == 1
    assert "was taken before" in found.notes()[-1]


async def test_what_only_looks_as_if_it_had_been_taken_is_taken(tmp_path: Path) -> None:
    async with yard(tmp_path) as found:
        found.lay(GOOD, "0001-laid~0123456789ABC")
        found.lay(GOOD, "0002-laid~")
        (found.folder / ".x.0123456789ABC.later").write_bytes(GOOD)
        await eventually(lambda: len(found.front.taken) == 2)
        await eventually(lambda: os.listdir(found.folder) == [], "the rest of an attempt that came to nothing to go, too")


async def test_nobody_else_s_drop_goes_because_of_what_looks_like_a_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may leave any file there, and read the ids of his own messages and the names of others' drops."""
    async with yard(tmp_path) as found:
        found.leave()
        await found.empty()
        known = found.front.taken[0].id
        found.front.spool.ill = "disk on fire"
        victim = found.leave("her@example.org", content=b"Subject: precious\r\n\r\n")
        stranger = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: stranger)
        for word in ("later", "never"):
            (found.folder / f".{victim}.{known}.{word}").write_bytes(GOOD)
        (found.aside / "kept.S1").write_bytes(b"refused")
        (found.folder / f".kept.S1.{known}.never").write_bytes(b"forged")
        found.lay(GOOD, f"0001-forged~{known}")
        found.front.spool.ill = None
        await eventually(lambda: not [name for name in os.listdir(found.folder) if not name.startswith(".")], "all drops to be taken")
        assert (found.aside / "kept.S1").read_bytes() == b"refused"
    assert [message.recipients for message in found.front.taken] == [("you@example.org",), ("her@example.org",)]


async def test_unfinished_files_are_left_alone_for_a_day(tmp_path: Path) -> None:
    async with yard(tmp_path) as found:
        for name, age in ((".new", 0.0), (".old", 90_000.0)):
            (found.folder / name).write_bytes(b"relay-drop 1\r\n")
            os.utime(found.folder / name, (time.time() - age, time.time() - age))
        await eventually(lambda: os.listdir(found.folder) == [".new"])
    assert found.front.taken == [] and found.notes() == []


async def test_stopping_ends_with_the_drop_at_hand(tmp_path: Path) -> None:
    async with yard(tmp_path) as found:
        found.front.spool.gate = asyncio.Event()
        first, second = found.leave(), found.leave()
        await eventually(lambda: found.front.spool.puts == 1)
        found.drops.stop()
        found.front.spool.gate.set()
        await found.drops.drained()
        assert os.listdir(found.folder) == [max(first, second)]


@pytest.mark.parametrize(
    ("listener", "stands"),
    [
        ({}, True),
        ({"networks": ["127.0.0.0/8"], "security": "starttls"}, True),
        ({"auth": "optional", "auth_without_tls": True}, True),
        ({"auth": "required", "auth_exempt": ["127.0.0.1"]}, True),
        ({"bind": "unix:SOCKET"}, True),
        ({"bind": "unix:SOCKET", "mode": "0660"}, False),
        ({"bind": "unix:SOCKET", "auth": "required"}, False),
        ({"networks": ["10.0.0.0/8"]}, False),
        ({"auth": "required"}, False),
        ({"security": "starttls", "require_tls": True}, False),
        ({"proxy_protocol": ["127.0.0.1"]}, False),
    ],
)
async def test_the_folder_stands_for_a_door_that_is_open_to_every_local_user(
    tmp_path: Path, listener: dict[str, Any], stands: bool
) -> None:
    own = {key: value.replace("SOCKET", str(tmp_path / "s")) if key == "bind" else value for key, value in listener.items()}
    users = {"erp": {"password": "x", "senders": ["*"]}} if "auth" in own else {}
    front = Front(tmp_path, {"users": users}, listener=own)
    try:
        found = Yard(front)
        assert (door_of([front.door]) is front.door) is stands
        found.drops.open()
        found.drops.stop()
        await found.drops.drained()
        assert found.folder.exists() is stands
    finally:
        await front.close()


async def test_drops_for_which_no_door_is_open_are_told(tmp_path: Path) -> None:
    async with yard(tmp_path, before=lambda found: found.folder.mkdir() or found.leave(), listener={"networks": ["10.0.0.0/8"]}) as found:
        pass
    (note,) = found.notes()
    assert note == f"1 files in {found.folder} are not taken: no listener takes mail from this machine without a login"
