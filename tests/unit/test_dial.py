"""One TCP connection to a host with several addresses: who is tried when, what remains of the losers, and what is said when all fail."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest

from relay.mail.outcome import Failure, Phase
from relay.upstream import dial as dial_module
from relay.upstream.dial import Names, NoConnection, dial
from tests.support.eventually import eventually
from tests.support.upstream import unused_port

pytestmark = pytest.mark.both_loops

V4, V6 = socket.AF_INET, socket.AF_INET6
HOST = "smtp.acme.example"


class Told(Names):
    """A resolver that knows one host."""

    def __init__(self, *addresses: tuple[int, str, int]) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._answer = [(family, (host, port, 0, 0) if family == V6 else (host, port)) for family, host, port in addresses]

    async def find(self, host: str, port: int, family: int) -> list[tuple[int, Any]]:
        self.asked.append(family)
        return [each for each in self._answer if family in (0, each[0])]


class Server:
    """Takes connections on any loopback address, and knows which are open."""

    def __init__(self) -> None:
        self.port = 0
        self.came: list[str] = []
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came.append(writer.get_extra_info("sockname")[0])
        self.open += 1
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def listening(host: str = "0.0.0.0", port: int = 0) -> AsyncIterator[Server]:
    server = Server()
    running = await asyncio.start_server(server.serve, host, port)
    server.port = running.sockets[0].getsockname()[1]
    try:
        yield server
        await eventually(lambda: server.open == 0, "every connection to be closed")
    finally:
        running.close()
        await running.wait_closed()


@contextmanager
def black_hole(host: str, port: int = 0) -> Iterator[int]:
    """An address that answers no SYN: a listening socket whose queue is full. Gives its port."""
    family = V6 if ":" in host else V4
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket(family))
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind((host, port))
        silent.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        yield silent.getsockname()[1]


async def connect(names: Names, *, seconds: float = 10.0, source: str | None = None) -> tuple[str, float]:
    """The address that was connected to, and after how many seconds."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    connection, address = await dial(HOST, 587, source_address=source, timeout_seconds=seconds, names=names)
    with connection:
        assert connection.getpeername() == address
        return address[0], loop.time() - begun


async def soonest(names: Names, *, limit: float) -> tuple[str, float]:
    """The same in less than `limit`, or else the quickest of five: the machine may be busy with something else."""
    quickest = ("", float("inf"))
    for _ in range(5):
        quickest = min(quickest, await connect(names), key=lambda made: made[1])
        if quickest[1] < limit:
            break
    return quickest


async def refusal(work: Awaitable[object]) -> NoConnection:
    with pytest.raises(NoConnection) as caught:
        await work
    return caught.value


# -- the race --------------------------------------------------------------------------------------------------------------


async def test_a_dead_ipv6_address_in_front_costs_a_quarter_of_a_second() -> None:
    with black_hole("::1") as dead:
        async with listening() as server:
            names = Told((V6, "::1", dead), (V6, "::1", dead), (V4, "127.0.0.1", server.port))
            address, seconds = await soonest(names, limit=0.45)
    assert address == "127.0.0.1"
    assert 0.2 < seconds < 0.45, "the second address of the same family is not waited for"
    assert set(names.asked) == {0}


async def test_the_preferred_address_wins_when_it_answers() -> None:
    async with listening("::1") as preferred:
        names = Told((V6, "::1", preferred.port), (V4, "127.0.0.1", preferred.port))
        address, seconds = await soonest(names, limit=0.2)
    assert (address, seconds < 0.2) == ("::1", True)
    assert preferred.came


async def test_after_a_refusal_the_next_address_is_tried_at_once() -> None:
    async with listening("127.0.0.9") as server:
        refused = [(V4, f"127.0.0.{number}", server.port) for number in range(1, 8)]
        address, seconds = await soonest(Told(*refused, (V4, "127.0.0.9", server.port)), limit=0.2)
    assert address == "127.0.0.9"
    assert seconds < 0.2


async def test_an_address_that_is_slow_may_still_win() -> None:
    """The one in front gets its answer while the others fail: it is not given up for them."""
    with ExitStack() as stack:
        dead = stack.enter_context(black_hole("127.0.0.3"))
        names = Told((V4, "127.0.0.3", dead), (V4, "127.0.0.4", dead))
        dialling = asyncio.ensure_future(connect(names))
        await asyncio.wait([dialling], timeout=0.4)
        assert not dialling.done(), "the second was refused, and the first is waited for"
        stack.close()
        async with listening("127.0.0.3", dead):
            assert (await dialling)[0] == "127.0.0.3"


async def test_little_time_is_shared_so_that_the_last_address_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "_HEAD_START_SECONDS", 1.0)
    with ExitStack() as stack:
        dead = [(V4, "127.0.0.3", stack.enter_context(black_hole("127.0.0.3"))) for _ in range(4)]
        async with listening() as server:
            address, _ = await connect(Told(*dead, (V4, "127.0.0.1", server.port)), seconds=1.5)
    assert address == "127.0.0.1"


async def test_who_loses_the_race_is_closed_also_when_he_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "_HEAD_START_SECONDS", 0.0)
    async with listening() as server:
        addresses = [(V4, f"127.0.0.{number}", server.port) for number in range(1, 6)]
        made = 0
        while len(server.came) <= made:  # until a loser arrives
            assert made < 2000
            await connect(Told(*addresses))
            made += 1
        await eventually(lambda: server.open == 0, "winners and losers to be closed")


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
async def test_a_race_that_is_cut_off_leaves_nothing(delay: float) -> None:
    with black_hole("127.0.0.3") as first, black_hole("127.0.0.4") as second:
        dialling = asyncio.ensure_future(connect(Told((V4, "127.0.0.3", first), (V4, "127.0.0.4", second))))
        await asyncio.wait([dialling], timeout=delay)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
    await eventually(lambda: not [t for t in asyncio.all_tasks() if t.get_name().startswith("dial")], "both attempts to end")


async def test_of_very_many_addresses_only_the_first_are_tried() -> None:
    async with listening("127.0.1.1") as server:
        refused = [(V4, f"127.0.0.{number}", server.port) for number in range(1, 1 + dial_module._ADDRESSES_LIMIT)]
        assert (await connect(Told(*refused[1:], (V4, "127.0.1.1", server.port))))[0] == "127.0.1.1"
        fault = await refusal(connect(Told(*refused, (V4, "127.0.1.1", server.port))))
        assert fault.failure is Failure.UNREACHABLE


@pytest.mark.parametrize(
    ("families", "order"),
    [
        ("", []),
        ("6", [0]),
        ("66644", [0, 3, 1, 4, 2]),
        ("46666", [0, 1, 2, 3, 4]),
        ("4646", [0, 1, 2, 3]),
        ("444", [0, 1, 2]),
    ],
)
async def test_families_take_turns_and_the_resolver_says_who_begins(families: str, order: list[int]) -> None:
    found: list[tuple[int, Any]] = [(V6 if family == "6" else V4, place) for place, family in enumerate(families)]
    assert [place for _, place in dial_module._interleaved(found)] == order


# -- what is said ----------------------------------------------------------------------------------------------------------


async def test_where_all_addresses_fail_alike_it_is_said_once() -> None:
    port = unused_port()
    fault = await refusal(connect(Told((V4, "127.0.0.1", port), (V4, "127.0.0.2", port))))
    assert (fault.phase, fault.failure) == (Phase.CONNECT, Failure.UNREACHABLE)
    assert str(fault) == "smtp.acme.example:587: Connection refused"


async def test_where_none_answers_it_is_a_timeout() -> None:
    with black_hole("127.0.0.3") as dead:
        fault = await refusal(connect(Told((V4, "127.0.0.3", dead), (V4, "127.0.0.3", dead)), seconds=0.1))
    assert (fault.phase, fault.failure) == (Phase.CONNECT, Failure.TIMEOUT)
    assert str(fault) == "smtp.acme.example:587 did not answer within 0.1 s"


async def test_where_addresses_fail_differently_each_is_told() -> None:
    with black_hole("::1") as dead:
        fault = await refusal(connect(Told((V6, "::1", dead), (V4, "127.0.0.1", unused_port())), seconds=0.2))
    assert fault.failure is Failure.TIMEOUT
    assert str(fault) == "smtp.acme.example:587: Connection refused (127.0.0.1), no answer within 0.2 s (::1)"


async def test_a_name_without_addresses_is_not_resolved() -> None:
    fault = await refusal(connect(Told()))
    assert (fault.phase, str(fault)) == (Phase.RESOLVE, "the name smtp.acme.example has no address")


# -- source_address --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "family", "winner"), [("127.0.0.9", V4, "127.0.0.1"), ("::1", V6, "::1")])
async def test_a_source_address_restricts_the_family(source: str, family: int, winner: str) -> None:
    async with listening(winner) as server:
        names = Told((V6, "::1", server.port), (V4, "127.0.0.1", server.port))
        address, _ = await connect(names, source=source)
    assert address == winner
    assert names.asked == [family]


async def test_a_source_address_of_another_machine_is_named() -> None:
    port = unused_port()
    fault = await refusal(connect(Told((V4, "127.0.0.1", port), (V4, "127.0.0.2", port)), source="192.0.2.77"))
    assert fault.phase is Phase.CONNECT
    assert str(fault) == "source_address 192.0.2.77 cannot be used on this machine: Cannot assign requested address"


async def test_a_host_without_an_address_of_that_family_is_told_with_the_reason() -> None:
    fault = await refusal(dial("127.0.0.1", 587, source_address="::1", timeout_seconds=5, names=Names()))
    assert fault.phase is Phase.RESOLVE
    assert str(fault).endswith("(IPv6 only, as source_address ::1 needs)")
