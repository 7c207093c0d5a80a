"""Group commit: what is submitted while a batch is under way shares the next one, and what rides waits for company, but not for long."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from relay.spool import commit
from relay.spool.base import SpoolError
from relay.spool.commit import Batch, GroupCommit


def nothing(_: list[Any]) -> list[Any]:
    raise AssertionError("the test's commit runs nothing")


def arguments_of(batch: Batch) -> list[Any]:
    return [argument for operations in batch for argument in operations.arguments]


class Recorder:
    """Stands for the database: notes each batch, waits at the gate, and fails what it is told to fail."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.prepared: list[tuple[list[Any], bool]] = []
        self.swept = 0
        self.gate = threading.Event()
        self.gate.set()
        self.commits = GroupCommit(self._prepare, self._commit, self._housekeep)

    def _prepare(self, batch: Batch) -> None:
        self.prepared.append((arguments_of(batch), threading.current_thread() is threading.main_thread()))

    def _commit(self, batch: Batch) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.batches.append(arguments_of(batch))
        self.gate.wait(60)
        for operations in batch:
            operations.ends = [each if isinstance(each, Exception) else f"done {each}" for each in operations.arguments]

    def _housekeep(self) -> None:
        self.swept += 1

    def submit(self, argument: object) -> asyncio.Future[Any]:
        return self.commits.submit(nothing, argument)

    def ride(self, argument: object) -> asyncio.Future[Any]:
        return self.commits.ride(nothing, argument)


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.gate.set()
    await recorder.commits.stop()


async def test_one_operation_waits_for_nobody(recorder: Recorder) -> None:
    assert await recorder.submit("a") == "done a"
    assert await recorder.submit("b") == "done b"
    assert recorder.batches == [["a"], ["b"]]


async def test_what_comes_during_a_commit_shares_the_next(recorder: Recorder, eventually: Callable[..., Any]) -> None:
    recorder.gate.clear()
    first = recorder.submit(0)
    await eventually(lambda: recorder.batches, "the first batch")
    rest = [recorder.submit(number) for number in range(1, 50)]
    recorder.gate.set()
    await asyncio.gather(first, *rest)
    assert recorder.batches == [[0], list(range(1, 50))]


async def test_a_batch_is_prepared_on_the_loop_and_only_when_the_thread_rests(recorder: Recorder, eventually: Callable[..., Any]) -> None:
    recorder.gate.clear()
    first = recorder.submit("a")
    await eventually(lambda: recorder.batches, "the first batch")
    second = recorder.submit("b")
    await asyncio.sleep(0)
    assert recorder.prepared == [(["a"], True)]
    recorder.gate.set()
    await asyncio.gather(first, second)
    assert recorder.prepared == [(["a"], True), (["b"], True)]


async def test_behind_a_crowd_the_next_batch_gathers_and_behind_one_it_does_not(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = asyncio.get_running_loop().time
    monkeypatch.setattr(commit, "GATHER_SECONDS", 1000.0)
    async with asyncio.timeout(30):
        await recorder.submit("alone")
        began = clock()
        await asyncio.gather(*(recorder.submit(number) for number in range(commit.CROWD)))
    monkeypatch.setattr(commit, "GATHER_SECONDS", clock() - began + 0.1)
    await recorder.submit("behind a crowd")
    assert clock() - began >= commit.GATHER_SECONDS
    monkeypatch.setattr(commit, "GATHER_SECONDS", 1000.0)
    async with asyncio.timeout(30):
        await recorder.submit("behind one")


async def test_what_rides_goes_with_the_next_that_does_not(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "RIDE_SECONDS", 60.0)
    riders = [recorder.ride("r1"), recorder.ride("r2")]
    await recorder.submit("a")
    assert [rider.result() for rider in riders] == ["done r1", "done r2"]
    assert recorder.batches == [["r1", "r2", "a"]]


async def test_what_rides_alone_goes_after_a_moment(recorder: Recorder) -> None:
    assert await asyncio.wait_for(recorder.ride("r"), 30) == "done r"
    assert await asyncio.wait_for(recorder.ride("s"), 30) == "done s"
    assert recorder.batches == [["r"], ["s"]]


async def test_an_error_reaches_the_one_it_is_about(recorder: Recorder, eventually: Callable[..., Any]) -> None:
    recorder.gate.clear()
    futures = [recorder.submit("first")]
    await eventually(lambda: recorder.batches, "the first batch")
    futures += [recorder.submit("good"), recorder.submit(KeyError("bad")), recorder.ride("also good")]
    recorder.gate.set()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [str(result) for result in results] == ["done first", "done good", "'bad'", "done also good"]


async def test_who_stopped_waiting_is_not_missed(recorder: Recorder, eventually: Callable[..., Any]) -> None:
    recorder.gate.clear()
    first = recorder.submit("first")
    await eventually(lambda: recorder.batches, "the first batch")
    gone, stays = recorder.submit("gone"), recorder.submit("stays")
    gone.cancel()
    recorder.gate.set()
    assert await asyncio.gather(first, stays) == ["done first", "done stays"]
    assert recorder.batches[1] == ["gone", "stays"]


async def test_stopping_commits_what_waits(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "RIDE_SECONDS", 60.0)
    rider, urgent = recorder.ride("r"), recorder.submit("a")
    last = recorder.ride("s")
    await recorder.commits.stop()
    assert await asyncio.gather(rider, urgent, last) == ["done r", "done a", "done s"]


async def test_after_the_end_nothing_is_taken_and_nobody_waits_for_ever(recorder: Recorder) -> None:
    await recorder.commits.stop()
    for give in (recorder.submit, recorder.ride):
        with pytest.raises(SpoolError, match="closed"):
            await asyncio.wait_for(give("late"), 30)


async def test_an_idle_thread_keeps_house(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]) -> None:
    monkeypatch.setattr(commit, "IDLE_SECONDS", 0.01)
    await recorder.submit("a")
    await eventually(lambda: recorder.swept >= 3, "the house is kept")
    assert await recorder.submit("b") == "done b"


async def test_a_writer_that_meets_the_unexpected_fails_its_batch_says_so_and_goes_on(recorder: Recorder) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    recorder.commits._commit = lambda batch: batch[5].run([])[0]  # an IndexError
    with pytest.raises(SpoolError, match="local error in the spool"):
        await recorder.submit("a")
    assert [type(context["exception"]) for context in told] == [IndexError]
    recorder.commits._commit = recorder._commit
    assert await recorder.submit("b") == "done b"
