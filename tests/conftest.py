"""What every test gets: both loops where asked for, certificates, `eventually`, and no way to leave something behind.

A test fails when it leaves a task, a task's exception that nobody looked at, a coroutine nobody awaited, or an open socket or
file: also when all its assertions hold.
"""

import asyncio
import gc
import inspect
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvloop

from tests.support.certificates import Authority
from tests.support.eventually import eventually as _eventually

GOLDEN = Path(__file__).parent / "golden"
GRACE_SECONDS = 0.25  # for tasks that are already on their way out: a cancelled one needs a turn or two of the loop

hypothesis.settings.register_profile("default", print_blob=True, deadline=None)
hypothesis.settings.register_profile("ci", print_blob=True, deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="run the golden tests alone and write what they see")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--rewrite-golden"):
        kept = [item for item in items if "golden" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again, which makes the collection after each test cheap


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("both_loops"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """Make what a test dropped unclosed complain now, in its own teardown and not in a stranger's."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def watch_the_loop(request: pytest.FixtureRequest, collect_garbage: None) -> None:
    """Lay `tidy_loop` under every test that runs on a loop, and under no other."""
    function = getattr(request.node, "obj", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    if inspect.iscoroutinefunction(function) or request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("tidy_loop")


@pytest.fixture
async def tidy_loop() -> AsyncIterator[None]:
    """Fail on tasks that outlive the test and its fixtures, and on errors that only the loop got to see."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield
    deadline = loop.time() + GRACE_SECONDS
    while (left := asyncio.all_tasks() - {asyncio.current_task()}) and loop.time() < deadline:
        await asyncio.sleep(0.001)
    names = [f"{task.get_name()}: {task.get_coro()!r}" for task in left]
    del left
    gc.collect()  # an unretrieved exception is reported when its task goes
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    if names:
        pytest.fail("tasks left behind:\n" + "\n".join(names))
    if complaints:
        errors = [error for complaint in complaints if (error := complaint.get("exception"))]
        cause = BaseExceptionGroup("seen by the loop alone", errors) if errors else None
        raise AssertionError("\n".join(str(complaint["message"]) for complaint in complaints)) from cause


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA of the tests' own: `ca_file`, `server` (a context for this machine), `context(names…)`, `client_context()`."""
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """`await eventually(condition, "what it is")`; the same as tests.support.eventually."""
    return _eventually


@pytest.fixture
def tool() -> Callable[[str], str]:
    """`tool("swaks")` is its path. Without it the test is skipped on a person's machine and fails in CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None and os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        return path or pytest.skip(f"{name} is not installed")

    return find


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str | bytes], None]:
    """`golden("name.txt", actual)` compares with tests/golden/name.txt, byte by byte; `make golden` rewrites the file."""

    def compare(name: str, actual: str | bytes) -> None:
        file = GOLDEN / name
        octets = actual.encode() if isinstance(actual, str) else actual
        if request.config.getoption("--rewrite-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(octets)
        assert file.exists(), f"{file} does not exist: run `make golden` and review it"
        expected = file.read_bytes()
        if isinstance(actual, str):
            assert actual == expected.decode(), f"differs from {file}; if it is meant, run `make golden` and review the diff"
        assert octets == expected

    return compare
