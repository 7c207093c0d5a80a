"""The real relay under load, killed or stopped at any moment: what was acknowledged arrives."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.spool.sqlite_schema import DATABASE
from tests.contract.drafts import stored_files
from tests.crash.load import Load, arrivals, config
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

#: How often the relay is killed; `make crash` sets RELAY_CRASH for the long form.
ROUNDS = 100 if os.environ.get("RELAY_CRASH") else 30
SESSIONS = 20


def seeded(what: str) -> random.Random:
    """Random moments, and how to have them again."""
    seed = int(os.environ.get("RELAY_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"{what}: RELAY_TEST_SEED={seed}")
    return random.Random(seed)


def count_in(directory: Path, what: str) -> int:
    """How many rows the relay's database has of `what`."""
    database = apsw.Connection(str(directory / "spool" / DATABASE), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        ((count,),) = database.execute(f"SELECT count(*) FROM {what}")
    finally:
        database.close()
    return int(count)


def left_in(directory: Path) -> tuple[int, int, list[str]]:
    """Messages, rows of content and files in the spool."""
    return count_in(directory, "message"), count_in(directory, "content"), stored_files(directory / "spool")


@pytest.mark.timeout(900)
async def test_what_was_acknowledged_arrives_however_often_the_relay_is_killed(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    rng = seeded("kill")
    load = Load(rng)
    async with ScriptedUpstream() as upstream:
        async with RelayProcess(config(tmp_path, upstream.port, connections=10), directory=tmp_path) as relay:
            for _ in range(ROUNDS):
                running = await load.until(relay, sessions=SESSIONS, acknowledged=rng.randrange(1, 150))
                load.ending()
                await relay.kill()
                await load.ended(running)
                await relay.start()
            await eventually(lambda: load.acknowledged <= arrivals(upstream.accepted).keys(), "all that was promised", within=60)
            await eventually(lambda: count_in(tmp_path, "message") == 0, "an empty queue", within=30)
            assert await relay.terminate() == 0
        seen = arrivals(upstream.accepted)
        faults = [event for event in relay.events() if event.get("level") == "error"]
    duplicates = sum(seen.values()) - len(seen)
    print(f"{ROUNDS} kills: {len(load.acknowledged)} acknowledged, {len(seen)} arrived, {duplicates} duplicates")
    assert load.acknowledged <= seen.keys()
    assert seen.keys() <= load.offered
    assert duplicates <= ROUNDS * (10 + SESSIONS), "no more than was under way at each kill"
    assert left_in(tmp_path) == (0, 0, [])
    assert faults == []


async def test_a_line_of_the_log_that_a_kill_has_cut_off_hides_no_other(tmp_path: Path) -> None:
    """The kernel ends a killed writer's line at the end of a page; the tests of kills read on behind it."""
    async with ScriptedUpstream() as upstream, RelayProcess(config(tmp_path, upstream.port, connections=1), directory=tmp_path) as relay:
        await relay.kill()
        with relay.log_file.open("a") as log:
            log.write('{"level": "info", "event": "sent", "rec')
        await relay.start()
        assert len(relay.events("listening")) == 2
        assert relay.events("sent") == []


@pytest.mark.timeout(120)
async def test_a_relay_that_is_asked_to_stop_under_load_loses_nothing_and_sends_nothing_twice(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:  # fmt: skip
    rng = seeded("stop")
    load = Load(rng)
    slowest = 0.0
    async with ScriptedUpstream() as upstream:
        async with RelayProcess(config(tmp_path, upstream.port, connections=3), directory=tmp_path) as relay:
            for _ in range(5):
                running = await load.until(relay, sessions=SESSIONS, acknowledged=rng.randrange(1, 250))
                load.ending()
                asked = time.monotonic()
                assert await relay.terminate(within=15) == 0
                slowest = max(slowest, time.monotonic() - asked)
                await load.ended(running)
                claimed = count_in(tmp_path, "message WHERE token IS NOT NULL OR doubt = 1")
                assert claimed == 0, "nothing is left claimed, so nothing comes back in doubt"
                await relay.start()
            await eventually(lambda: load.acknowledged <= arrivals(upstream.accepted).keys(), "all that was promised", within=60)
            await eventually(lambda: count_in(tmp_path, "message") == 0, "an empty queue", within=30)
            assert await relay.terminate() == 0
        seen = arrivals(upstream.accepted)
    print(f"5 stops: {len(load.acknowledged)} acknowledged, {len(seen)} arrived, the slowest stop took {slowest:.2f} s")
    assert load.acknowledged <= seen.keys() <= load.offered
    assert {name: count for name, count in seen.items() if count > 1} == {}
    assert slowest < 10
    assert left_in(tmp_path) == (0, 0, [])
    assert [event for event in relay.events() if event.get("level") == "error"] == []
