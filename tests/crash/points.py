"""A relay that kills itself, as kill -9 would, at a named point of its work: the program of a process, and its names for tests.

Wraps functions of the relay, or of `os`, and runs it. What is wrapped is found by name, so that a point that has gone fails the test.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from relay.delivery.settle import Settler
from relay.spool import files
from relay.spool.files import FileWriter
from relay.spool.sqlite import SqliteSpool
from relay.spool.sqlite_batch import Batches
from relay.spool.sqlite_claims import Claims

Condition = Callable[[tuple[Any, ...]], bool]


def _always(_: tuple[Any, ...]) -> bool:
    return True


def _batch_with(*names: str) -> Condition:
    """A batch that has an operation of these."""
    return lambda arguments: any(operations.run.__name__ in names for operations in arguments[1])


def _descriptor_in(folder: str) -> Condition:
    return lambda arguments: f"/{folder}" in os.readlink(f"/proc/self/fd/{arguments[0]}")


def _rename_to_content(arguments: tuple[Any, ...]) -> bool:
    return "/content/" in str(arguments[1])


#: Name -> whose function, its name, whether to die before or after it, and when it counts.
POINTS: dict[str, tuple[Any, str, str, Condition]] = {
    "a batch with new mail is about to be committed": (Batches, "commit", "before", _batch_with("put")),
    "a batch with new mail is committed": (Batches, "commit", "after", _batch_with("put")),
    "a batch with ends is about to be committed": (Batches, "commit", "before", _batch_with("end")),
    "a batch with ends is committed": (Batches, "commit", "after", _batch_with("end")),
    "a batch with deferrals is about to be committed": (Batches, "commit", "before", _batch_with("resume")),
    "a batch with deferrals is committed": (Batches, "commit", "after", _batch_with("resume")),
    "claims are made": (Claims, "claim", "after", _always),
    "claims are committed": (Batches, "commit", "after", _batch_with("claim")),
    "content is arriving in a file": (FileWriter, "_append", "after", _always),
    "a content file is about to be synced": (os, "fdatasync", "before", _descriptor_in("incoming")),
    "a content file is synced": (os, "fdatasync", "after", _descriptor_in("incoming")),
    "a content file is about to be renamed": (os, "rename", "before", _rename_to_content),
    "a content file is renamed": (os, "rename", "after", _rename_to_content),
    "the directory of contents is synced": (os, "fsync", "after", _descriptor_in("content")),
    "a content file is about to be removed": (files, "_remove", "before", _always),
    "an attempt has its outcome": (Settler, "settle", "before", _always),
    "the log is about to be written back": (SqliteSpool, "_checkpoint", "before", _always),
    "the log is written back": (SqliteSpool, "_checkpoint", "after", _always),
}


def arm(point: str, times: int) -> None:
    """Die when the point is reached so many times."""
    owner, name, moment, counts = POINTS[point]
    real = getattr(owner, name)
    left = times

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        if not counts(arguments):
            return real(*arguments, **more)
        if moment == "before":
            reached()
        result = real(*arguments, **more)
        if moment == "after":
            reached()
        return result

    setattr(owner, name, wrapped)


def launch(point: str, times: int) -> str:
    """The program, for `RelayProcess`."""
    return f"from tests.crash.points import main; main({point!r}, {times})"


def main(point: str, times: int) -> None:
    from relay.cli import main as relay

    arm(point, times)
    sys.argv[0] = "relay"
    sys.exit(relay())
