"""The memory that mail may take on its way into the spool, over all sessions of all listeners.

Each session has FREE_BYTES that nobody counts, so that ordinary mail asks for nothing. What it gathers beyond is taken from the budget
as it comes, and given back when the message is in custody or refused. Content that outgrows memory takes LARGE_BYTES once, for
all it will need on its way into a file, so that it cannot run dry in the middle.

State: the octets taken. Law: nobody waits for memory; where there is none, the message is refused for now (452 4.3.1).
"""

from typing import Final

#: By what contents and buffers hold: 64 messages of any size on their way into files, or 128 of 2 MiB, or as many small ones as connect.
BUDGET_BYTES: Final = 256 * 1024 * 1024

#: Of each session. A thousand sessions make 64 MiB of it, where all of them send that much at the same moment.
FREE_BYTES: Final = 64 * 1024
STEP_BYTES: Final = 64 * 1024

#: What content of any size holds at most: its head, a chunk on its way into the file, and what arrives meanwhile.
LARGE_BYTES: Final = 4 * 1024 * 1024

# With less than this share left no content that is known to be larger is begun, and what is left serves the messages under way.
_RESERVE: Final = 1 / 16


class Budget:
    """Octets of memory, of which there are `limit_bytes`."""

    def __init__(self, limit_bytes: int = BUDGET_BYTES) -> None:
        self._limit = limit_bytes
        self._enough = int(limit_bytes * (1 - _RESERVE))
        self.taken = 0

    @property
    def spent(self) -> bool:
        """Whether no content that will need some of it should be begun."""
        return self.taken > self._enough

    def take(self, count: int) -> bool:
        """Take so many octets, if there are as many."""
        if self.taken + count > self._limit:
            return False
        self.taken += count
        return True

    def cover(self, excess: int) -> int:
        """Take what so many octets need, in steps; how much that was, or 0 when there is not enough."""
        needed = -(-excess // STEP_BYTES) * STEP_BYTES
        return needed if self.take(needed) else 0

    def give(self, count: int) -> None:
        """Give octets back."""
        self.taken -= count
        assert self.taken >= 0, "what is given back was taken"
