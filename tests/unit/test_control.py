"""The control socket: who may have the path, what a request may say, and clients that do not behave."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from relay.admin import control as module
from relay.admin.control import Control
from relay.admin.operator import Operator, Order, Progress, Verb
from relay.admin.request import Refused, parse_request
from relay.clock import SystemClock
from relay.observe.journal import Journal
from relay.spool.base import EVERYTHING, MessageId, Selection, SpoolError
from relay.unix import SocketInUse
from tests.support.eventually import eventually

ID = MessageId("649D2A1B3C4D5")
HOLD_ALL = {"version": 1, "verb": "hold", "selection": {}}


class Pages(Operator):
    """An operator whose queue is the pages it was given; it remembers its orders and how they ended."""

    def __init__(self, *pages: Progress, fails: Exception | None = None) -> None:
        self.pages = list(pages)
        self.orders: list[Order] = []
        self.ended: list[str] = []
        self.told = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._fails = fails

    async def count(self, selection: Selection) -> int:
        return sum(len(page.changed) for page in self.pages)

    async def carry_out(self, order: Order, tell: Callable[[Progress], Awaitable[None]]) -> None:
        self.orders.append(order)
        try:
            if self._fails:
                raise self._fails
            for page in self.pages:
                await self.gate.wait()
                await tell(page)
                self.told += 1
            self.ended.append("done")
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    journal = Journal(SystemClock(), format="json", level="debug", descriptor=descriptor)
    yield journal
    journal.close()
    os.close(descriptor)
    assert '"fault"' not in (tmp_path / "log").read_text()


Open = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path, journal: Journal) -> Open:
    @asynccontextmanager
    async def opened(
        operator: Operator | None = None, path: Path = tmp_path / "c.sock", alias: Path | None = None
    ) -> AsyncIterator[Control]:
        control = Control(path, operator or Pages(), journal, alias=alias or path)
        try:
            await control.open()
            yield control
            control.stop()
            await control.drained()
        finally:
            await control.abort()
            control.close()

    return opened


class Client:
    """One connection to the socket, line by line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, request: object) -> None:
        self.writer.write(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")
        await self.writer.drain()

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            line = await self.reader.readline()
        answer = json.loads(line)
        assert isinstance(answer, dict)
        assert answer.pop("version") == 1
        return answer

    async def ask(self, request: object) -> dict[str, Any]:
        await self.send(request)
        return await self.answer()

    async def ended(self) -> bool:
        try:
            async with asyncio.timeout(10):
                return await self.reader.read() == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c.sock"), limit=2**24)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


# -- the language ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "order"),
    [
        (HOLD_ALL, Order(Verb.HOLD, EVERYTHING, "", "me")),
        (
            {"version": 1, "verb": "drop", "selection": {"ids": [ID.lower(), "0" + ID]}, "reason": " spam "},
            Order(Verb.DROP, Selection(ids=frozenset({ID})), "spam", "me"),
        ),
        (
            {"version": 1, "verb": "bounce", "selection": {"sender": "ACME.example", "recipient": "*.x.example", "older_than": 60}},
            Order(Verb.BOUNCE, Selection(sender="acme.example", recipient="*.x.example", older_than=60.0), "", "me"),
        ),
        (
            {"version": 1, "verb": "retry", "selection": {"route": "r", "upstream": "u", "sender": "<>", "state": "deferred"}},
            Order(Verb.RETRY, Selection(route="r", upstream="u", sender="<>", state="deferred"), "", "me"),
        ),
        (
            {"version": 1, "verb": "hold", "selection": {"state": "due"}, "reason": "\u202egnp.exe"},
            Order(Verb.HOLD, Selection(state="due"), "gnp.exe", "me"),
        ),
        ({"version": 1, "verb": "count", "selection": {"state": "held"}}, Selection(state="held")),
    ],
)
def test_a_request_is_an_order(request_: dict[str, Any], order: Order | Selection) -> None:
    assert parse_request(json.dumps(request_).encode(), by="me") == order


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "not a line of JSON"),
        (b"GET / HTTP/1.1\r\n", "not a line of JSON"),
        (b"\xff\xfe\x00", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'{"version": 1, "verb": "hold", "selection": {"route": "\\udc80"}}', "not a line of JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "speaks version 1 of the control language, not null"),
        (b'{"version": 2, "verb": "hold"}', "version 1 of the control language, not 2"),
        (
            b'{"version": 1, "verb": "explode", "selection": {}}',
            'unknown verb "explode"; there are retry, hold, release, drop',
        ),
        (b'{"version": 1, "verb": ["hold"], "selection": {}}', 'unknown verb ["hold"]'),
        (b'{"version": 1, "verb": "hold", "selection": {}, "force": 1}', 'unknown key "force"'),
        (b'{"version": 1, "verb": "hold"}', "selection must be an object"),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": []}}', "ids must be a list of messages' ids, and not empty"),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": "649D2A1B3C4D5"}}', "ids must be a list"),
        (json.dumps({**HOLD_ALL, "selection": {"ids": [ID] * 10_001}}).encode(), "ids must have at most 10000 of them"),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": ["xyz"]}}', '"xyz" is not the id of a message'),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": [7]}}', "7 is not the id of a message"),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": ["FFFFFFFFFFFFFFFFFF"]}}', "is not the id of a message"),
        (b'{"version": 1, "verb": "drop", "selection": {"ids": ["-5"]}}', "is not the id of a message"),
        (b'{"version": 1, "verb": "drop", "selection": {"sender": ""}}', "sender must be text"),
        (b'{"version": 1, "verb": "drop", "selection": {"sender": null}}', "sender must be text"),
        (b'{"version": 1, "verb": "drop", "selection": {"sender": "@acme.example"}}', "sender: "),
        (b'{"version": 1, "verb": "drop", "selection": {"upstream": ""}}', "upstream must be text"),
        (b'{"version": 1, "verb": "drop", "selection": {"state": "sent"}}', "state must be one of due, active, deferred, held"),
        (b'{"version": 1, "verb": "drop", "selection": {"older_than": "2h"}}', "older_than must be a number of seconds"),
        (b'{"version": 1, "verb": "drop", "selection": {"older_than": NaN}}', "older_than must be a number of seconds"),
        (b'{"version": 1, "verb": "drop", "selection": {"older_than": -1}}', "older_than must be a number of seconds"),
        (b'{"version": 1, "verb": "drop", "selection": {"age": 5}}', 'unknown condition "age"; there are ids, route'),
        (b'{"version": 1, "verb": "hold", "selection": {}, "reason": 5}', "reason must be text"),
        (b'{"version": 1, "verb": "hold", "selection": {}, "reason": "a\\nb"}', "the reason must not contain control characters"),
        (b'{"version": 1, "verb": "hold", "selection": {}, "reason": "' + b"x" * 501 + b'"}', "at most 500 characters"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_words(line: bytes, words: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_request(line, by="me")
    assert words in str(refused.value)
    assert len(str(refused.value)) < 300


# -- who has the path --------------------------------------------------------------------------------------------------------


async def test_the_socket_is_for_its_owner_and_group_whatever_the_umask(opened: Open, tmp_path: Path) -> None:
    for mask in (0o077, 0o000):
        before = os.umask(mask)
        try:
            async with opened():
                assert stat.S_IMODE((tmp_path / "c.sock").stat().st_mode) == 0o660
        finally:
            os.umask(before)
    assert not (tmp_path / "c.sock").exists()


async def test_the_socket_of_a_relay_that_lives_is_never_replaced(opened: Open, tmp_path: Path) -> None:
    async with opened(Pages(Progress([ID], {}))):
        with pytest.raises(SocketInUse, match="belongs to another relay"):
            async with opened():
                pass
        async with client(tmp_path) as one:
            assert await one.ask({"version": 1, "verb": "count", "selection": {}}) == {"matched": 1, "more": False}


async def test_the_socket_of_a_dead_relay_is_replaced(opened: Open, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "c.sock"))
        dead.listen()
    async with opened(), client(tmp_path) as one:
        assert (await one.ask(b"?\n"))["error"] == "the request is not a line of JSON"


async def test_a_socket_at_which_another_program_listens_is_left_alone(opened: Open, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "c.sock"))
        other.listen()
        with pytest.raises(SocketInUse, match="another program listens at"):
            async with opened():
                pass
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(tmp_path / "c.sock"))


async def test_a_file_that_is_no_socket_is_left_alone(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "c.sock").write_text("precious")
    with pytest.raises(OSError, match=r"the control socket .*c\.sock cannot be made: Address already in use"):
        async with opened():
            pass
    assert (tmp_path / "c.sock").read_text() == "precious"


async def test_a_directory_that_is_missing_is_said(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be made: No such file or directory"):
        async with opened(path=tmp_path / "missing" / "c.sock"):
            pass


async def test_a_socket_elsewhere_is_found_through_a_link_in_the_spool(opened: Open, tmp_path: Path) -> None:
    alias = tmp_path / "spool" / "control.sock"
    alias.parent.mkdir()
    alias.symlink_to(tmp_path / "gone")  # what a relay that was killed leaves
    async with opened(alias=alias):
        reader, writer = await asyncio.open_unix_connection(str(alias))
        writer.write(b"{}\n")
        assert b"version 1" in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert list(alias.parent.iterdir()) == []
    async with opened(path=alias):  # and now it is the socket itself
        assert alias.is_socket()
        assert not alias.is_symlink()


# -- clients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_an_order_is_answered_page_by_page(opened: Open, tmp_path: Path) -> None:
    operator = Pages(Progress([ID], {}), Progress((), {"649D2A1B3C4D6": "being attempted"}))
    async with opened(operator), client(tmp_path) as one:
        for _ in range(2):  # a connection is good for many requests
            assert await one.ask(HOLD_ALL) == {"changed": [ID], "skipped": {}, "more": True}
            assert await one.answer() == {"changed": [], "skipped": {"649D2A1B3C4D6": "being attempted"}, "more": True}
            assert await one.answer() == {"more": False}
    assert operator.orders[0] == Order(Verb.HOLD, EVERYTHING, "", f"uid {os.getuid()}")


@pytest.mark.both_loops
async def test_a_large_answer_arrives_whole(opened: Open, tmp_path: Path) -> None:
    ids = [MessageId(f"{number:013X}") for number in range(60_000)]
    async with opened(Pages(Progress(ids, {}))), client(tmp_path) as one:
        assert (await one.ask(HOLD_ALL))["changed"] == ids
        assert await one.answer() == {"more": False}


async def test_a_refused_request_does_not_end_the_connection(opened: Open, tmp_path: Path) -> None:
    async with opened(Pages()), client(tmp_path) as one:
        assert "unknown verb" in (await one.ask({**HOLD_ALL, "verb": "x"}))["error"]
        assert await one.ask(HOLD_ALL) == {"more": False}


async def test_trouble_of_the_spool_is_an_answer(opened: Open, tmp_path: Path) -> None:
    async with opened(Pages(fails=SpoolError("the spool cannot be written: disk I/O error"))), client(tmp_path) as one:
        assert await one.ask(HOLD_ALL) == {"error": "the spool cannot be written: disk I/O error", "more": False}


async def test_a_fault_of_ours_is_an_answer_and_loud(opened: Open, tmp_path: Path, journal: Journal) -> None:
    async with opened(Pages(fails=ZeroDivisionError("our mistake"))), client(tmp_path) as one:
        answer = await one.ask(HOLD_ALL)
        assert answer == {"error": "a fault of the relay's own, see the log; what was not told as done may be as it was", "more": False}
        assert "matched" in await one.ask({"version": 1, "verb": "count", "selection": {}})
    journal.close()
    assert "ZeroDivisionError: our mistake" in (tmp_path / "log").read_text()
    (tmp_path / "log").write_text("")


@pytest.mark.both_loops
async def test_a_request_that_never_ends_is_cut_off(opened: Open, tmp_path: Path) -> None:
    async with opened(), client(tmp_path) as one:
        flood = asyncio.ensure_future(one.send(b"x" * (4 * 1024 * 1024)))
        assert (await one.answer())["error"] == "the request has more than 1048576 bytes"
        assert await one.ended()
        await asyncio.gather(flood, return_exceptions=True)


@pytest.mark.both_loops
async def test_a_client_that_does_not_read_is_cut_off_and_its_order_ends(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNREAD_SECONDS", 0.05)
    page = Progress([MessageId(f"{number:013X}") for number in range(20_000)], {})
    operator = Pages(*[page] * 100)
    async with opened(operator):
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            deaf.connect(str(tmp_path / "c.sock"))
            deaf.send(json.dumps(HOLD_ALL).encode() + b"\n")
            await eventually(lambda: operator.ended == ["TimeoutError"], "the end of the order")
            assert operator.told < 100


@pytest.mark.both_loops
async def test_an_order_ends_with_the_client_that_gave_it(opened: Open, tmp_path: Path) -> None:
    operator = Pages(*[Progress([ID], {})] * 1000)
    async with opened(operator):
        async with client(tmp_path) as one:
            operator.gate.clear()
            await one.send(HOLD_ALL)
            await eventually(lambda: operator.orders, "the order")
        operator.gate.set()
        await eventually(lambda: operator.ended, "its end")
        assert operator.told < 1000


async def test_a_client_that_says_nothing_is_let_go(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.05)
    async with opened(), client(tmp_path) as one:
        assert await one.ended()


async def test_a_client_too_many_is_told_so_and_the_others_go_on(opened: Open, tmp_path: Path) -> None:
    async with opened():
        many = [await asyncio.open_unix_connection(str(tmp_path / "c.sock")) for _ in range(17)]
        assert b"16 clients are connected already" in await many[16][0].readline()
        many[0][1].write(b"?\n")
        assert b"not a line of JSON" in await many[0][0].readline()
        for _, writer in many:
            writer.close()


async def test_stopping_lets_the_page_under_way_finish_and_says_so(opened: Open, tmp_path: Path) -> None:
    operator = Pages(*[Progress([ID], {})] * 3)
    operator.gate.clear()
    async with opened(operator) as control, client(tmp_path) as busy, client(tmp_path) as idle:
        await busy.send(HOLD_ALL)
        await eventually(lambda: operator.orders, "the order")
        control.stop()
        operator.gate.set()
        assert (await busy.answer())["changed"] == [ID]
        assert await busy.answer() == {"error": "the relay is stopping; what was not told as done is as it was", "more": False}
        assert await busy.ended()
        assert await idle.ended()
        await control.drained()
    assert operator.told == 0
    assert operator.ended == ["_Stopping"]
