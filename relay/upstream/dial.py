"""One TCP connection to a host: a race of its addresses, IPv6 and IPv4 in turn, each with a short head start (RFC 8305).

The loops' own `create_connection` waits at an address that swallows packets until all the time is gone and never comes to the next:
a dead IPv6 address in front of a living IPv4 one must cost a quarter of a second, not the mail. Nor do names go through the loops'
resolver: it has two or four threads for everybody, and so many names whose servers are silent would stop the mail of all upstreams
(law 7). A name is asked for once, both families together: the resolver asks for them at the same time and sorts them (RFC 6724).

State: the names that are being looked up, and the addresses that have failed lately: they come after the others of their name, so that one
that takes connections and opens no session does not have all the mail.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import threading
from ipaddress import ip_address
from typing import Any

from relay.mail.outcome import Failure, Phase

#: Names that are looked up at once, each in a thread; of ten thousand dead ones not more are asked for at a time (`delivery.breaker`).
_LOOKUPS_LIMIT = 256

#: So long an address is alone with its answer before the next one is tried, too: the recommended value of RFC 8305 section 8.
_HEAD_START_SECONDS = 0.25

#: More addresses of one name are not tried; the largest providers have eight of each family. Postfix stops at five.
_ADDRESSES_LIMIT = 16

#: So long an address that has failed stands behind the others, as a host does (`upstream.hosts`).
_BEHIND_SECONDS = 300.0

_Found = list[tuple[int, Any]]


class Names:
    """Looks names up, each once for all who ask for it meanwhile, and in a thread of its own that nobody waits for at the end."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, int, int], asyncio.Future[_Found | Exception]] = {}
        self._behind: dict[Any, float] = {}  # addresses, and until when (loop time)

    async def find(self, host: str, port: int, family: int) -> _Found:
        """Family and socket address, in the resolver's order (RFC 6724). Raises OSError and ValueError."""
        if _is_address(host):
            return _look_up(host, port, family)
        key = (host, port, family)
        while key not in self._asked and len(self._asked) >= _LOOKUPS_LIMIT:
            await asyncio.wait(self._asked.values(), return_when=asyncio.FIRST_COMPLETED)
        if key not in self._asked:
            self._ask(key)
        answer = self._asked[key]
        await asyncio.wait([answer])  # who gives up waiting takes it from nobody
        found = answer.result()
        if isinstance(found, Exception):
            raise found
        return found

    def failed(self, address: Any) -> None:
        self._behind[address] = asyncio.get_running_loop().time() + _BEHIND_SECONDS

    def answered(self, address: Any) -> None:
        self._behind.pop(address, None)

    def order(self, found: _Found) -> _Found:
        """As they are to be tried: those that have failed behind the others, the last to fail at the end."""
        if not self._behind:
            return found
        now = asyncio.get_running_loop().time()
        self._behind = {address: until for address, until in self._behind.items() if until > now}
        return sorted(found, key=lambda each: self._behind.get(each[1], 0.0))

    def _ask(self, key: tuple[str, int, int]) -> None:
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                found: _Found | Exception = _look_up(*key)
            except Exception as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._tell, key, found)

        try:
            threading.Thread(target=work, name="resolver", daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "no thread is left to look it up") from error
        self._asked[key] = loop.create_future()

    def _tell(self, key: tuple[str, int, int], found: _Found | Exception) -> None:
        self._asked.pop(key).set_result(found)


class NoConnection(Exception):
    """No address of the host could be connected to; the text says why in plain words."""

    def __init__(self, phase: Phase, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.phase = phase
        self.failure = failure


async def dial(
    host: str, port: int, *, source_address: str | None, timeout_seconds: float, names: Names
) -> tuple[socket.socket, Any]:  # fmt: skip
    """A connected socket, which is then the caller's, and the address that it leads to. Raises NoConnection."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    waiting = names.order(_interleaved(await _addresses(names, host, port, source_address, timeout_seconds)))[:_ADDRESSES_LIMIT]
    if not waiting:
        raise NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, f"the name {host} has no address")
    running: dict[asyncio.Task[socket.socket], Any] = {}
    faults: dict[str, str] = {}
    try:
        while True:
            if waiting:
                family, address = waiting.pop(0)
                running[asyncio.create_task(_connect(family, address, source_address), name=f"dial {host}")] = address
            left = max(0.0, deadline - loop.time())
            patience = min(_HEAD_START_SECONDS, left / (len(waiting) + 1)) if waiting else left
            done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                fault = task.exception()
                if fault is None:
                    return task.result(), running.pop(task)
                if not isinstance(fault, OSError):
                    raise fault
                address = running.pop(task)
                names.failed(address)
                faults[address[0]] = reason_of(fault)
            if not waiting and not (done and running):
                for address in running.values():
                    names.failed(address)
                unanswered = [address[0] for address in running.values()]
                raise _no_connection(host, port, faults, unanswered=unanswered, timeout_seconds=timeout_seconds)
    finally:
        for task in running:
            task.add_done_callback(_close)
            task.cancel()


async def _connect(family: int, address: Any, source_address: str | None) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        # Not every loop does this for a socket that it did not make; without it each small write waits 40 ms for an ACK.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source_address:
            _bind(connection, source_address)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def _bind(connection: socket.socket, source_address: str) -> None:
    try:
        connection.bind((source_address, 0))
    except OSError as error:
        text = f"source_address {source_address} cannot be used on this machine: {reason_of(error)}"
        raise NoConnection(Phase.CONNECT, Failure.UNREACHABLE, text) from None


def _close(task: "asyncio.Task[socket.socket]") -> None:
    """One who lost the race may have arrived all the same, between the winner and his own end."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _interleaved(addresses: _Found) -> _Found:
    """One of each family in turn, beginning with the family that the resolver prefers (RFC 8305 section 4)."""
    first = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    return [each for pair in itertools.zip_longest(first, others) for each in pair if each is not None]


def _no_connection(host: str, port: int, faults: dict[str, str], *, unanswered: list[str], timeout_seconds: float) -> NoConnection:
    """What is said when every address has failed: once where all failed alike, else address by address."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    failure = Failure.TIMEOUT if unanswered else Failure.UNREACHABLE
    if not faults:
        text = f"{where} did not answer within {timeout_seconds:g} s"
    elif not unanswered and len(set(faults.values())) == 1:
        text = f"{where}: {next(iter(faults.values()))}"
    else:
        silent = dict.fromkeys(unanswered, f"no answer within {timeout_seconds:g} s")
        text = f"{where}: {', '.join(f'{reason} ({address})' for address, reason in (faults | silent).items())}"
    return NoConnection(Phase.CONNECT, failure, text)


async def _addresses(names: Names, host: str, port: int, source_address: str | None, timeout_seconds: float) -> _Found:
    """Where the host is. Only what `source_address` can reach."""
    family = family_of(source_address)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await names.find(host, port, family)
    except socket.gaierror as error:
        text = f"the name {host} cannot be resolved: {error.strerror}"
        if source_address:
            text += f" (IPv{6 if family == socket.AF_INET6 else 4} only, as source_address {source_address} needs)"
        raise NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, text) from None
    except TimeoutError:
        text = f"the name {host} could not be resolved within {timeout_seconds:g} s"
        raise NoConnection(Phase.RESOLVE, Failure.TIMEOUT, text) from None
    except (ValueError, OSError) as error:  # no name at all to the resolver or to IDNA
        raise NoConnection(Phase.RESOLVE, Failure.UNREACHABLE, f"the name {host} cannot be used: {error}") from None


def family_of(source_address: str | None) -> int:
    """The addresses that can be reached from there."""
    return socket.AF_UNSPEC if not source_address else socket.AF_INET6 if ":" in source_address else socket.AF_INET


def _look_up(host: str, port: int, family: int) -> _Found:
    return [(kind, address) for kind, _, _, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)]


def _is_address(host: str) -> bool:
    """Whether it is no name at all, and nothing has to be asked for."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def reason_of(error: OSError) -> str:
    """The system's words; the loops put addresses and more into theirs, each in another way."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
