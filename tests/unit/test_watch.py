"""Secrets that change are found however they were renewed, once they are whole, and what cannot be read changes nothing."""

import asyncio
import errno
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.config.secrets import Secret, Use, resolve
from relay.upstream import watch as watch_module
from relay.upstream.watch import Readers, Watch
from tests.support.eventually import eventually

pytestmark = pytest.mark.both_loops

OLD, NEW = "old-and-unseen", "new-and-unseen"


class Holder:
    """Uses secrets, and remembers what became of them and what was told."""

    def __init__(self, **sources: Any) -> None:
        self.secrets = {name: resolve(source, {}) for name, source in sources.items()}
        self.taken: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []
        self.faults: list[tuple[str, Exception]] = []

    def uses(self) -> list[Use]:
        return [self._use(name) for name in self.secrets]

    def _use(self, name: str) -> Use:
        def take(old: Secret, new: Secret) -> bool:
            if self.secrets[name] is not old:
                return False
            self.secrets[name] = new
            self.taken.append((name, new.reveal()))
            return True

        return Use(name, lambda: self.secrets[name], take)

    def note(self, level: str, what: str) -> None:
        assert OLD not in what and NEW not in what
        self.notes.append((level, what))

    def fault(self, what: str, error: Exception) -> None:
        self.faults.append((what, error))


class Counter:
    """Counts the sweeps of a watch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sweeps = 0
        sweep = Watch._sweep

        def counted(watch: Watch, *, everything: bool = False) -> Any:
            found = sweep(watch, everything=everything)
            self.sweeps += 1
            return found

        monkeypatch.setattr(Watch, "_sweep", counted)

    async def some_more(self, count: int = 4) -> None:
        aim = self.sweeps + count
        await eventually(lambda: self.sweeps >= aim, f"{count} more looks")


@pytest.fixture(autouse=True)
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Counter:
    monkeypatch.setattr(watch_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "_REST", 0)
    return Counter(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(OLD + "\n")
    return path


@asynccontextmanager
async def watching(holder: Holder) -> AsyncIterator[Watch]:
    watch = Watch(holder.uses(), note=holder.note, fault=holder.fault)
    watch.open()
    try:
        yield watch
    finally:
        await watch.close()


# -- how a secret is renewed -------------------------------------------------------------------------------------------------


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def by_rename(path: Path, text: str) -> None:
    beside = path.with_name("beside")
    beside.write_text(text)
    beside.replace(path)


def anew(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def with_an_older_time(path: Path, text: str) -> None:
    """As `cp -p` and rsync leave it, and of the same size."""
    by_rename(path, text)
    os.utime(path, (1, 1))


@pytest.mark.parametrize("renew", [in_place, by_rename, anew, with_an_older_time])
async def test_a_file_that_changes_is_a_secret_that_changes(renew: Callable[[Path, str], None], file: Path, sweeps: Counter) -> None:
    holder = Holder(acme={"file": str(file)})
    async with watching(holder):
        await sweeps.some_more()
        renew(file, NEW)
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")
        await sweeps.some_more()
        assert holder.taken == [("acme", NEW)]
        assert holder.notes == [("info", f"acme has changed (file {file})")]


class Mounted:
    """A secret as Kubernetes mounts it: the names are links through `..data`, which is a link that is renamed over."""

    def __init__(self, directory: Path, **values: str) -> None:
        self.directory = directory
        directory.mkdir()
        self._revision = 0
        self.update(**values)
        for name in values:
            (directory / name).symlink_to(Path("..data", name))

    def update(self, **values: str) -> None:
        old = self.directory / f"..{self._revision}"
        self._revision += 1
        new = self.directory / f"..{self._revision}"
        new.mkdir()
        for name, value in values.items():
            (new / name).write_text(value)
        beside = self.directory / "..data_tmp"
        beside.symlink_to(new.name)
        beside.rename(self.directory / "..data")
        if old.exists():
            for path in old.iterdir():
                path.unlink()
            old.rmdir()


async def test_the_swap_of_a_link_as_kubernetes_does_it_is_seen(tmp_path: Path, sweeps: Counter) -> None:
    mounted = Mounted(tmp_path / "mount", acme=OLD, globex=OLD)
    holder = Holder(acme={"file": f"{mounted.directory}/acme"}, globex={"file": f"{mounted.directory}/globex"})
    async with watching(holder):
        await sweeps.some_more()
        mounted.update(acme=NEW, globex=OLD)
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")
        mounted.update(acme=OLD, globex=NEW)
        await eventually(lambda: holder.taken[1:] == [("acme", OLD), ("globex", NEW)], "the next ones")
        await sweeps.some_more()
        assert len(holder.notes) == 3


async def test_what_was_renewed_before_the_first_look_is_found(file: Path) -> None:
    holder = Holder(acme={"file": str(file)})
    file.write_text(NEW)
    async with watching(holder):
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")


async def test_a_file_that_many_use_is_looked_at_once(file: Path, sweeps: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    look = watch_module.stamp_of

    def counted(path: str) -> Any:
        looks.append(path)
        return look(path)

    monkeypatch.setattr(watch_module, "stamp_of", counted)
    holder = Holder(**{f"tenant{number}": {"file": str(file)} for number in range(50)})
    async with watching(holder):
        await sweeps.some_more()
        file.write_text(NEW)
        await eventually(lambda: len(holder.taken) == 50, "all of them")
        assert 0 <= len(looks) - sweeps.sweeps <= 1


async def test_only_the_one_that_has_changed_is_read(tmp_path: Path, sweeps: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_text(OLD)
    holder = Holder(**{f"tenant{number}": {"file": f"{tmp_path}/{number}"} for number in range(20)})
    async with watching(holder):
        await sweeps.some_more()
        read: list[str] = []
        reading = watch_module._read

        def counted(use: Use) -> Any:
            read.append(use.name)
            return reading(use)

        monkeypatch.setattr(watch_module, "_read", counted)
        (tmp_path / "7").write_text(NEW)
        await eventually(lambda: bool(holder.taken), "the new secret")
        await sweeps.some_more()
        assert read == ["tenant7"]


# -- what is not whole -------------------------------------------------------------------------------------------------------


async def test_a_file_is_read_when_two_looks_agree(file: Path) -> None:
    holder = Holder(acme={"file": str(file)})
    watch = Watch(holder.uses(), note=holder.note, fault=holder.fault)
    assert watch._sweep() == []
    assert len(watch._sweep()) == 1  # the first time
    assert watch._sweep() == []
    for end in range(3, len(NEW)):
        file.write_text(NEW[:end])
        assert watch._sweep() == []
        assert watch._pause == watch_module.AGAIN_SECONDS
    file.write_text(NEW)
    assert watch._sweep() == []
    (reading,) = watch._sweep()
    assert reading.new.reveal() == NEW
    assert watch._sweep() == []
    assert watch._pause == watch_module.LOOK_SECONDS
    await watch.close()


async def test_looking_takes_a_hundredth_of_the_time_however_many_files_there_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_REST", 100)
    holder = Holder(acme={"file": str(file)})
    watch = Watch(holder.uses(), note=holder.note, fault=holder.fault)
    watch._spent = 0.4
    assert watch._pause == 40
    await watch.close()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
        (lambda path: path.write_bytes(b"x" * 70_000), "is too large for a secret"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), os.strerror(errno.ELOOP)),
    ],
)
async def test_what_cannot_be_read_changes_nothing_is_told_once_and_heals(
    spoil: Callable[[Path], Any], reason: str, file: Path, sweeps: Counter
) -> None:
    holder = Holder(acme={"file": str(file)})
    async with watching(holder):
        await sweeps.some_more()
        spoil(file)
        await eventually(lambda: bool(holder.notes), "the note")
        await sweeps.some_more()
        ((level, what),) = holder.notes
        assert (level, what.startswith("acme cannot be read again, so the old one stays: ")) == ("warning", True)
        assert reason in what
        assert holder.secrets["acme"].reveal() == OLD
        if file.is_dir():
            file.rmdir()
        by_rename(file, NEW)
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")


async def test_a_file_that_comes_back_as_it_was_may_be_told_of_again_when_it_goes_again(file: Path, sweeps: Counter) -> None:
    holder = Holder(acme={"file": str(file)})
    async with watching(holder):
        for times in (1, 2):
            await sweeps.some_more()
            file.unlink()
            await eventually(lambda times=times: len(holder.notes) == times, "the note")  # type: ignore[misc]
            file.write_text(OLD)
        await sweeps.some_more()
        assert (len(holder.notes), holder.taken) == (2, [])


async def test_a_file_system_that_goes_names_some_of_its_secrets_and_counts_the_others(tmp_path: Path, sweeps: Counter) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    for number in range(30):
        (mount / str(number)).write_text(OLD)
    holder = Holder(**{f"tenant{number}": {"file": f"{mount}/{number}"} for number in range(30)})
    async with watching(holder):
        await sweeps.some_more()
        mount.rename(tmp_path / "gone")
        await eventually(lambda: len(holder.notes) == 21, "the notes")
        assert holder.notes[-1] == ("warning", "10 more secrets cannot be read again")
        await sweeps.some_more()
        assert len(holder.notes) == 21


async def test_a_value_of_no_use_is_not_taken(file: Path, sweeps: Counter) -> None:
    def check(value: str) -> None:
        if value == NEW:
            raise ValueError("must be another one")

    holder = Holder()
    holder.secrets["acme"] = resolve({"file": str(file)}, {}, check=check)
    async with watching(holder):
        await sweeps.some_more()
        file.write_text(NEW)
        await eventually(lambda: bool(holder.notes), "the note")
        assert "must be another one" in holder.notes[0][1]
        assert holder.taken == []


# -- on request --------------------------------------------------------------------------------------------------------------


async def test_all_are_read_again_on_request_files_commands_and_what_seems_the_same(tmp_path: Path, file: Path) -> None:
    told = tmp_path / "told"
    told.write_text(OLD)
    command = {"command": [sys.executable, "-c", f"print(open({str(told)!r}).read())"]}
    holder = Holder(acme={"file": str(file)}, globex=command, initech="plain")
    async with watching(holder) as watch:
        watch.read_all()
        await eventually(lambda: len(holder.notes) == 1, "the answer")
        told.write_text(NEW)
        file.unlink()
        watch.read_all()
        await eventually(lambda: holder.notes[-1][1].startswith("2 secrets"), "the answer")
        await eventually(lambda: len(holder.notes) == 4, "all notes")
        watch.read_all()
        await eventually(lambda: len(holder.notes) == 6, "the answer")
        assert "cannot be read again" in holder.notes[4][1], "who asks again is told again"
        del holder.notes[4:]
        assert holder.taken == [("globex", NEW)]
        assert holder.notes[0] == ("info", "2 secrets from files and commands read again: 0 changed, 0 could not be read")
        assert holder.notes[-1] == ("warning", "2 secrets from files and commands read again: 1 changed, 1 could not be read")


async def test_nothing_is_watched_where_nothing_can_change_and_a_request_is_still_answered(sweeps: Counter) -> None:
    holder = Holder(acme="plain")
    async with watching(holder) as watch:
        watch.read_all()
        await eventually(lambda: bool(holder.notes), "the answer")
        assert holder.notes == [("info", "0 secrets from files and commands read again: 0 changed, 0 could not be read")]
        assert sweeps.sweeps == 1


async def test_a_command_that_hangs_delays_no_file(file: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    go = tmp_path / "go"
    go.touch()
    slow.write_text(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint({OLD!r})")
    holder = Holder(globex={"command": [sys.executable, str(slow)]}, acme={"file": str(file)})
    go.unlink()
    file.write_text(NEW)
    async with watching(holder) as watch:
        watch.read_all()
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")
        assert not any("secrets from files" in what for _, what in holder.notes)
        go.touch()
        await eventually(lambda: any("secrets from files" in what for _, what in holder.notes), "the answer")


# -- together with others ----------------------------------------------------------------------------------------------------


async def test_who_has_found_a_newer_one_meanwhile_keeps_it_and_the_file_is_read_again(file: Path, sweeps: Counter) -> None:
    holder = Holder(acme={"file": str(file)})
    (use,) = holder.uses()
    newest = Secret("newest")

    def late(old: Secret, new: Secret) -> bool:
        if holder.secrets["acme"] is old and new.reveal() == NEW:
            holder.secrets["acme"] = newest  # a refused login has read it again
            file.write_text("newest")
        return use.take(old, new)

    watch = Watch([use._replace(take=late)], note=holder.note, fault=holder.fault)
    watch.open()
    try:
        await sweeps.some_more()
        file.write_text(NEW)
        await eventually(lambda: holder.secrets["acme"] is newest, "the newer one")
        await sweeps.some_more()
        assert holder.secrets["acme"].reveal() == "newest"
        assert holder.taken == []
    finally:
        await watch.close()


async def test_a_fault_in_one_is_loud_and_no_others_matter(tmp_path: Path, sweeps: Counter) -> None:
    def broken() -> str:
        raise RuntimeError("broken")

    for name in ("one", "two"):
        (tmp_path / name).write_text(OLD)
    holder = Holder(two={"file": f"{tmp_path}/two"})
    holder.secrets = {"one": Secret(OLD, "file one", read=broken, path=tmp_path / "one"), **holder.secrets}
    async with watching(holder):
        (tmp_path / "two").write_text(NEW)
        await eventually(lambda: holder.taken == [("two", NEW)], "the other one")
        assert [(what, str(error)) for what, error in holder.faults] == [("reading again: one", "broken")]
        await sweeps.some_more()
        assert len(holder.faults) == 1


async def test_a_fault_in_taking_one_leaves_the_watch_alive(file: Path, sweeps: Counter) -> None:
    holder = Holder(acme={"file": str(file)})

    def fails(old: Secret, new: Secret) -> bool:
        raise RuntimeError("broken")

    watch = Watch([holder.uses()[0]._replace(take=fails)], note=holder.note, fault=holder.fault)
    watch.open()
    try:
        file.write_text(NEW)
        await eventually(lambda: bool(holder.faults), "the fault")
        await sweeps.some_more()
    finally:
        await watch.close()


# -- what hangs --------------------------------------------------------------------------------------------------------------


class Fifo:
    """A secret's file that hangs whoever reads it, as a file system does whose server is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink()
        os.mkfifo(path)
        self.writer = os.open(path, os.O_RDWR)

    def end(self, text: str) -> None:
        """Let those who hang read this."""
        os.write(self.writer, text.encode())
        self.path.unlink()
        self.path.write_text(text)
        os.close(self.writer)


async def test_a_watch_that_is_closed_while_a_read_hangs_is_gone_at_once(file: Path, sweeps: Counter) -> None:
    holder = Holder(acme={"file": str(file)})
    fifo = Fifo(file)
    async with asyncio.timeout(10):
        async with watching(holder) as watch:
            watch.read_all()
            await eventually(lambda: watch._readers._running == 1, "the read to begin")
        assert sweeps.sweeps == 0
    fifo.end("")


async def test_a_file_system_that_hangs_is_told_once_and_what_it_says_at_last_is_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_HANG_SECONDS", 0.05)
    holder = Holder(acme={"file": str(file)})
    fifo = Fifo(file)
    async with watching(holder):
        await eventually(lambda: bool(holder.notes), "the note")
        assert holder.notes == [("warning", "looking at the files of secrets takes longer than 0.05 s: a file system may hang")]
        fifo.end(NEW)
        await eventually(lambda: holder.taken == [("acme", NEW)], "the new secret")
        assert len(holder.notes) == 2


async def test_who_reads_waits_for_so_long_and_with_others_of_the_same_name_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_HANG_SECONDS", 0.05)
    readers, go, asked = Readers(), threading.Event(), 0

    def hangs() -> str:
        nonlocal asked
        asked += 1
        go.wait(10)
        raise ValueError("too late for anybody")

    for _ in range(3):
        answers = await asyncio.gather(*(readers.read("acme", hangs) for _ in range(5)), return_exceptions=True)
        assert {str(answer) for answer in answers} == {"it takes longer than 0.05 s"}
    assert asked == 1
    assert await readers.read("globex", lambda: OLD) == OLD
    go.set()
    await eventually(lambda: readers._running == 0, "its end")
    assert await readers.read("acme", lambda: NEW) == NEW
    with pytest.raises(ValueError, match="broken"):
        await readers.read("acme", lambda: int("broken"))


async def test_so_many_may_hang_and_the_next_one_waits_for_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_THREADS", 3)
    readers, go = Readers(), [threading.Event() for _ in range(3)]
    hanging = [readers.run(lambda event=event: event.wait(10)) for event in go]  # type: ignore[misc]
    next_one = asyncio.ensure_future(readers.read("acme", lambda: NEW))
    await eventually(lambda: len(readers._waiting) == 1, "one to wait")
    go[1].set()
    assert await next_one == NEW
    for event in go:
        event.set()
    await asyncio.gather(*hanging)


async def test_a_system_without_threads_is_asked_again_though_nobody_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_NO_THREAD_SECONDS", 0.01)
    readers, tries = Readers(), 0

    def fails(thread: threading.Thread) -> None:
        nonlocal tries
        tries += 1
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        both = [readers.run(lambda: OLD), readers.run(lambda: NEW)]
        await eventually(lambda: tries > 5, "a few tries")
    assert await asyncio.gather(*both) == [OLD, NEW]
