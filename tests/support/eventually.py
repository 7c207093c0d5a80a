"""Wait for a condition with a deadline: the only way in which a test may let time pass."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")
_LONGEST_PAUSE_SECONDS = 0.01

#: After which something that should happen counts as never happening. Long, as the machine may be busy with something else.
PATIENCE_SECONDS = 30.0


class NeverHappened(AssertionError):
    """The condition did not come true in time; the text says which."""


async def eventually(condition: Callable[[], _T | Awaitable[_T]], what: str = "", *, within: float = PATIENCE_SECONDS) -> _T:
    """Wait until `condition()` (plain or async) gives something true, and return that.

    `what` names the condition in the failure; `within` is in seconds. An AssertionError of the condition counts as "not yet",
    and the last one is the cause of the failure.
    """
    deadline = time.monotonic() + within
    pause = 0.0
    while True:
        cause: AssertionError | None = None
        answer: object = None
        try:
            outcome = condition()
            value = await outcome if inspect.isawaitable(outcome) else outcome
            if value:
                return value
            answer = value
        except AssertionError as error:
            cause = error
        if time.monotonic() > deadline:
            raise NeverHappened(f"waited {within:g} s for {what or _name(condition)}; last answer: {cause or answer!r}") from cause
        await asyncio.sleep(pause)
        pause = min(pause + 0.001, _LONGEST_PAUSE_SECONDS)


def _name(condition: Callable[..., object]) -> str:
    code = getattr(condition, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{getattr(condition, '__qualname__', condition)!s}{place}"
