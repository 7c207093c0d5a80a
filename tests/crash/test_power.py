"""Power loss at every moment: what was acknowledged is there, whole, whatever the disk forgot. And the faults that this must find."""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.clock import ManualClock
from relay.spool import commit, files, sqlite
from relay.spool import sqlite_schema as sql
from relay.spool.base import Content, Draft
from relay.spool.files import ContentFiles
from relay.spool.sqlite import SqliteSpool
from tests.crash.account import Account, Found, Operation, examine, faults, life, operation_count
from tests.crash.power import Disk, Recorder, restore

KEEP_LOG_SECONDS = 86_400.0

#: How many rounds of operations are recorded, how many random parts are kept of what was not synced, and of how many moments between
#: two syncs. `make crash` sets RELAY_CRASH for the long form.
LONG = bool(os.environ.get("RELAY_CRASH"))
ROUNDS, PARTS, BETWEEN = (60, 3, 0.5) if LONG else (25, 1, 0.1)


@dataclass(slots=True)
class Recording:
    recorder: Recorder
    operations: list[Operation]
    sweeps: list[tuple[int, float]]  # moment, and how old the delivery log may be from then on


@pytest.fixture
def fast() -> Iterator[Path]:
    """A directory on a disk that costs nothing to sync, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens to large spools happens to this small one."""
    monkeypatch.setattr(sqlite, "FILE_ABOVE_BYTES", 8000)
    monkeypatch.setattr(sqlite, "_CHECKPOINT_BYTES", 30_000)
    monkeypatch.setattr(sqlite, "_FREE_PAGES", 8)
    monkeypatch.setattr(sqlite, "_LOG_ROWS_A_SWEEP", 4)
    monkeypatch.setattr(files, "_FLUSH_EVERY_BYTES", 16_000)
    monkeypatch.setattr(files, "_REMOVE_BYTES", 12_000)
    monkeypatch.setattr(files, "_REMOVE_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(commit, "RIDE_SECONDS", 0.002)


def seeded() -> int:
    seed = int(os.environ.get("RELAY_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"RELAY_TEST_SEED={seed}")
    return seed


async def record(root: Path, seed: int, *, rounds: int, ignored: frozenset[str], failing: float) -> Recording:
    """Record a spool's life on a disk. `failing`: the share of syncs that fail once the spool is open."""
    chance = random.Random(seed + 1)
    opened = False
    recorder = Recorder(root, ignored=ignored, fails=lambda _: opened and chance.random() < failing)
    clock = ManualClock()
    with recorder.recording():
        spool = SqliteSpool(root / "spool", clock, backoff=lambda attempts: 60.0, keep_log_seconds=KEEP_LOG_SECONDS)
        account = Account(spool, recorder, clock)
        opened = True
        try:
            await life(account, random.Random(seed), rounds=rounds, keep_log_seconds=KEEP_LOG_SECONDS)
        finally:
            opened = False
            await spool.close()
    return Recording(recorder, account.operations, account.sweeps)


class Cuts:
    """Cuts a recording at many moments and judges what is left."""

    def __init__(self, recording: Recording, root: Path, rng: random.Random) -> None:
        self._recording = recording
        self._root = root
        self._rng = rng
        self._known: dict[bytes, Found] = {}
        self.count = 0
        self.moments = 0
        self.wrong: list[str] = []

    @property
    def images(self) -> int:
        return len(self._known)

    async def all(self, *, parts: int, between: float, enough: int = 10) -> None:
        """Before and after every sync, and at a share of the moments in between; until `enough` is wrong."""
        disk = Disk(self._rng)
        events = self._recording.recorder.events
        for moment in range(len(events) + 1):
            at_sync = any(events[i].kind.startswith("sync") for i in (moment - 1, moment) if 0 <= i < len(events))
            if at_sync or self._rng.random() < between:
                self.moments += 1
                for image in disk.images(parts):
                    await self._judge(image, moment)
                if len(self.wrong) >= enough:
                    return
            if moment < len(events):
                disk.play(events[moment])

    async def _judge(self, image: dict[str, bytes | None], moment: int) -> None:
        self.count += 1
        digest = blake2b(digest_size=16)
        for path, octets in image.items():
            digest.update(path.encode() + b"\0" + (octets or b"") + b"\0")
        key = digest.digest()
        if key not in self._known:
            self._known[key] = await self._open(image)
        since = max((horizon for at, horizon in self._recording.sweeps if at <= moment), default=0.0)
        found = faults(self._known[key], self._recording.operations, moment, log_since=since)
        self.wrong += [f"cut at {moment}: {text}" for text in found]

    async def _open(self, image: dict[str, bytes | None]) -> Found:
        root = self._root / f"image-{len(self._known)}"
        root.mkdir()
        try:
            restore(image, root)
            return await examine(root / "spool", ManualClock(4_000_000_000.0))
        finally:
            shutil.rmtree(root)


async def cut(
    fast: Path, *, rounds: int = ROUNDS, parts: int = PARTS, between: float = BETWEEN, ignored: frozenset[str] = frozenset(),
    failing: float = 0.0,
) -> Cuts:  # fmt: skip
    seed = int(os.environ.get("RELAY_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"RELAY_TEST_SEED={seed}")
    (fast / "disk").mkdir()
    started = time.monotonic()
    recording = await record(fast / "disk", seed, rounds=rounds, ignored=ignored, failing=failing)
    cuts = Cuts(recording, fast, random.Random(seed))
    await cuts.all(parts=parts, between=between)
    print(
        f"{len(recording.recorder.events)} events {dict(Counter(event.kind for event in recording.recorder.events))}, "
        f"operations {operation_count(recording.operations)}; {cuts.count} cuts at {cuts.moments} moments, "
        f"{cuts.images} different disks opened, {len(cuts.wrong)} wrong, {time.monotonic() - started:.1f} s"
    )
    return cuts


@pytest.mark.timeout(1800)
async def test_whatever_a_power_cut_leaves_every_promise_is_kept(fast: Path) -> None:
    cuts = await cut(fast)
    assert cuts.wrong == []
    assert cuts.count > (8000 if LONG else 1000), "it was cut often enough to mean something"


@pytest.mark.timeout(1800)
async def test_a_sync_that_fails_breaks_no_promise_either(fast: Path) -> None:
    """What a failed sync should have written may never be, and later syncs succeed all the same: so it must be written again."""
    cuts = await cut(fast, between=BETWEEN / 2, failing=0.1)
    assert cuts.wrong == []


# -- the check itself: planted faults must be found ------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["normal", "off"])
async def test_a_commit_that_is_not_synced_is_found(fast: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    open_database = sql.open_database

    def careless(path: Path, **more: Any) -> apsw.Connection:
        database = open_database(path, **more)
        database.pragma("synchronous", level)
        return database

    monkeypatch.setattr(sql, "open_database", careless)
    cuts = await cut(fast, rounds=8)
    assert any("is gone, promised" in text for text in cuts.wrong)


@pytest.mark.parametrize(
    "kind",
    [
        "names",  # of a directory
        "files",  # of a content file
        "log",  # of a commit
        "database",  # of a checkpoint, before the log is begun anew
    ],
)
async def test_a_sync_that_is_left_out_is_found(fast: Path, kind: str) -> None:
    cuts = await cut(fast, rounds=15, parts=1, ignored=frozenset({kind}))
    assert cuts.wrong != []


async def test_a_record_that_is_committed_before_its_file_is_stored_is_found(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, put = ContentFiles.store, SqliteSpool.put
    late: list[Any] = []

    async def promise(self: ContentFiles, content: Content, number: int) -> Content:
        late.append(lambda: store(self, content, number))
        return content._replace(octets=None, path=self.path(number))

    async def put_first(self: SqliteSpool, drafts: Sequence[Draft], claimed: Sequence[bool]) -> Any:
        claims = await put(self, drafts, claimed)
        while late:
            await late.pop()()
        return claims

    monkeypatch.setattr(ContentFiles, "store", promise)
    monkeypatch.setattr(SqliteSpool, "put", put_first)
    cuts = await cut(fast, rounds=8)
    assert any("is gone, promised" in text or "unreadable" in text for text in cuts.wrong)
