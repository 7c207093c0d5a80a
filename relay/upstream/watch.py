"""Secrets that change while the relay runs: their files are looked at every few seconds, and all of them are read again when told to.

One task and one sweep for all, in a thread, by what `stat` says behind all links: so a secret is seen however it was renewed, by writing,
renaming or swapping a link, as Kubernetes does. What looks different is read once two looks agree, for it may be half written. What
cannot be read changes nothing and is told once.

State: what each file looked like when it was read, which of them look different now, and which faults have been told. A sweep has it to
itself: the task waits for it.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

from relay.config.machine import stamp_of
from relay.config.secrets import Secret, SecretError, Use

#: So often the files are looked at.
LOOK_SECONDS = 10.0

#: So soon again when one looks different.
AGAIN_SECONDS = 1.0

# Ten thousand files take some 30 ms: at most a hundredth of the time is spent so, however many there are and however often they change.
_REST: Final = 100

_HANG_SECONDS = 20.0  # twice what a command may take
_THREADS: Final = 32  # so many that hang cost the others nothing
_COMMANDS: Final = 4  # at once, of those that are run on request
_AT_ONCE: Final = 100  # so many are taken before the loop goes on with mail
_NO_THREAD_SECONDS: Final = 1.0  # so soon again when the system has no thread left
_NAMED: Final = 20  # a file system that is gone takes all secrets with it: no more of them are named at a time

Note = Callable[[Literal["info", "warning"], str], None]
_Look = int
_T = TypeVar("_T")


class Readers:
    """Threads that read secrets and certificates, for a file system may hang, and a command takes up to 10 s. Nobody waits for them at
    the end."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = 0
        self._asked: dict[str, asyncio.Future[Any]] = {}
        self._retry: asyncio.TimerHandle | None = None

    async def read(self, name: str, ask: Callable[[], _T]) -> _T:
        """What `ask` answers in good time; who asks for the same name meanwhile gets the same answer.

        Raises what `ask` raises, and SecretError when it takes too long.
        """
        answer: asyncio.Future[_T] | None = self._asked.get(name)
        if answer is None or answer.done():
            answer = self._asked[name] = self.run(ask)
            answer.add_done_callback(lambda done: self._asked.pop(name) if self._asked.get(name) is done else None)
        if not (await asyncio.wait([answer], timeout=_HANG_SECONDS))[0]:
            raise SecretError(f"it takes longer than {_HANG_SECONDS:g} s")
        return answer.result()

    def run(self, ask: Callable[[], _T]) -> asyncio.Future[_T]:
        """What `ask` answers, however long that takes."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def tell(result: _T | None, error: Exception | None) -> None:
            self._running -= 1
            self._next()
            if answer.done():
                return
            if error is None:
                answer.set_result(cast(_T, result))
            else:
                answer.set_exception(error)
                answer.exception()  # it need not be looked at: nobody may have waited so long

        def work() -> None:
            result, error = None, None
            try:
                result = ask()
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, result, error)

        self._waiting.append(work)
        self._next()
        return answer

    def close(self) -> None:
        """Begin no more."""
        self._waiting.clear()
        if self._retry is not None:
            self._retry.cancel()

    def _try_again(self) -> None:
        self._retry = None
        self._next()

    def _next(self) -> None:
        while self._waiting and self._running < _THREADS:
            try:
                threading.Thread(target=self._waiting[0], name="secrets", daemon=True).start()
            except RuntimeError:  # no thread is left, and who waits may be the only one who would ever ask
                self._retry = self._retry or asyncio.get_running_loop().call_later(_NO_THREAD_SECONDS, self._try_again)
                return
            self._waiting.popleft()
            self._running += 1


class _Reading(NamedTuple):
    """A secret in use and as it is now, the same one when nothing has changed; or what came in between."""

    use: Use
    old: Secret
    new: Secret
    error: Exception | None = None


class _Tally(NamedTuple):
    """What came of reading secrets."""

    read: int
    changed: int
    failed: int


class Watch:
    """Looks after all secrets in use. `fault` is told what should not happen. Opened once, then closed."""

    def __init__(self, uses: Iterable[Use], *, note: Note, fault: Callable[[str, Exception], None]) -> None:
        self._files: dict[str, list[Use]] = {}
        self._commands: list[Use] = []
        for use in uses:
            secret = use.current()
            if secret.path is not None:
                self._files.setdefault(str(secret.path), []).append(use)
            elif secret.can_change:
                self._commands.append(use)
        self._note = note
        self._fault = fault
        self._readers = Readers()
        self._known: dict[str, _Look] = {}
        self._different: dict[str, _Look] = {}
        self._told: set[str] = set()
        self._spent = 0.0
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._serve(), name="secrets")

    def read_all(self) -> None:
        """Read every secret again that can have changed, and say what came of it."""
        self._asked.set()

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._readers.close()

    # -- the task -------------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._pause):
                    await self._asked.wait()
            except TimeoutError:
                pass
            asked = self._asked.is_set()
            self._asked.clear()
            try:
                if asked:
                    await self._read_all()
                else:
                    await self._take(await self._swept())
            except Exception as error:  # law 9: the old secrets stay, and the next look comes
                self._fault("looking after the secrets", error)

    @property
    def _pause(self) -> float | None:
        if not self._files:
            return None
        return max(AGAIN_SECONDS if self._different else LOOK_SECONDS, self._spent * _REST)

    async def _read_all(self) -> None:
        self._told.clear()  # who asks is told, again if need be
        tallies = [await self._take(await self._swept(everything=True))]
        for start in range(0, len(self._commands), _COMMANDS):
            together = self._commands[start : start + _COMMANDS]
            tallies.append(await self._take(await asyncio.gather(*(self._readers.run(partial(_read, use)) for use in together))))
        read, changed, failed = (sum(numbers) for numbers in zip(*tallies, strict=True))
        what = f"{read} secrets from files and commands read again: {changed} changed, {failed} could not be read"
        self._note("warning" if failed else "info", what)

    async def _swept(self, *, everything: bool = False) -> list[_Reading]:
        """What a sweep has found. One that hangs is told once, and waited for: the next would hang at the same file."""
        sweep = self._readers.run(partial(self._sweep, everything=everything))
        if not (await asyncio.wait([sweep], timeout=_HANG_SECONDS))[0]:
            self._note("warning", f"looking at the files of secrets takes longer than {_HANG_SECONDS:g} s: a file system may hang")
        return await sweep

    async def _take(self, readings: Sequence[_Reading]) -> _Tally:
        """Use what has changed, and tell it."""
        changed, faults = 0, []
        for number, reading in enumerate(readings, 1):
            name = reading.use.name
            if reading.error is not None:
                faults.append(reading)
                continue
            self._told.discard(name)
            if reading.new is not reading.old and reading.use.take(reading.old, reading.new):
                changed += 1
                self._note("info", f"{name} has changed ({reading.new.source})")
            elif reading.new is not reading.old and reading.old.path is not None:
                self._known.pop(str(reading.old.path), None)  # somebody else has read another one meanwhile: see which is the newer
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        self._tell(faults)
        return _Tally(len(readings), changed, len(faults))

    def _tell(self, faults: Sequence[_Reading]) -> None:
        """Tell of those that have not been told of, and that may well happen, while a file is written."""
        untold = []
        for reading in faults:
            if not isinstance(reading.error, ValueError):
                assert reading.error is not None, "only what went wrong is told here"
                self._fault(f"reading again: {reading.use.name}", reading.error)
            elif reading.use.name not in self._told:
                untold.append(f"{reading.use.name} cannot be read again, so the old one stays: {reading.error}")
                self._told.add(reading.use.name)
        for what in untold[:_NAMED]:
            self._note("warning", what)
        if len(untold) > _NAMED:
            self._note("warning", f"{len(untold) - _NAMED} more secrets cannot be read again")

    # -- the sweep, in a thread -----------------------------------------------------------------------------------------------

    def _sweep(self, *, everything: bool = False) -> list[_Reading]:
        """Look at every file, and read what has changed: all of them, changed or not, when `everything` is wanted at once."""
        readings: list[_Reading] = []
        different: dict[str, _Look] = {}
        began = time.thread_time()
        for path, uses in self._files.items():
            look = hash(stamp_of(path))  # of ten thousand files
            if everything or (look != self._known.get(path) and look == self._different.get(path)):
                self._known[path] = look
                readings += map(_read, uses)
            elif look != self._known.get(path):
                different[path] = look
        self._different = different
        self._spent = time.thread_time() - began
        return readings


def _read(use: Use) -> _Reading:
    old = use.current()
    try:
        return _Reading(use, old, old.read_again())
    except Exception as error:
        return _Reading(use, old, old, error)
