"""The threads in which token servers are asked: so many for one server, so many for all, and the others wait in turn.

A server that hangs costs its own tenants (law 7): it holds its share of the threads and no more. Nobody waits for a thread at the end
of the program but for what may have to be stored. State: what waits and what runs, by server, and what is trusted.
"""

import asyncio
import contextlib
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, TypeVar

_AT_ONE_SERVER: Final = 8
_AT_ONCE: Final = 64
_AGAIN_SECONDS: Final = 1.0

_T = TypeVar("_T")


class TokenThreads:
    """Runs work that waits for token servers."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._running: Counter[str] = Counter()
        self._retry: asyncio.TimerHandle | None = None
        self._trust: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def run(self, server: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """What `work` returns, which must not raise. Cancel it and it runs all the same."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def tell(result: _T) -> None:
            self._running[server] -= 1
            self._next()
            if not future.cancelled():
                future.set_result(result)

        def errand() -> None:
            result = work()
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, result)

        self._waiting.setdefault(server, deque()).append(errand)
        self._next()
        return future

    def trust(self) -> ssl.SSLContext:
        """The system's trust store; made in the first thread that needs it (24 ms), and shared."""
        with self._lock:
            if self._trust is None:
                self._trust = ssl.create_default_context()
            return self._trust

    def _try_again(self) -> None:
        self._retry = None
        self._next()

    def _next(self) -> None:
        """Start what there is room for; a server that has had its turn goes behind the others."""
        for server in list(self._waiting):
            if self._running.total() >= _AT_ONCE:
                return
            if self._running[server] >= _AT_ONE_SERVER:
                continue
            try:
                threading.Thread(target=self._waiting[server][0], name="tokens", daemon=True).start()
            except RuntimeError:  # the system has no more of them now
                self._retry = self._retry or asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._try_again)
                return
            self._running[server] += 1
            errands = self._waiting.pop(server)
            errands.popleft()
            if errands:
                self._waiting[server] = errands
