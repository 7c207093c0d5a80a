"""Which host of an upstream is asked first: those of its list in their order, but one that has failed only behind the others.

Each message would else wait anew for a host that is down. After a while one asks it again, and all do once it has answered.

State: for each upstream the hosts that have failed, and until when they stand behind.
"""

from collections.abc import Sequence
from typing import Final

from relay.clock import Clock
from relay.upstream.watch import Note

#: So long a host stands behind the others. Postfix keeps dead destinations in mind as long (minimal_backoff_time).
_BEHIND_SECONDS: Final = 300.0


class Hosts:
    """The order of hosts, by upstream. Asked only where there are several."""

    def __init__(self, clock: Clock, note: Note) -> None:
        self._clock = clock
        self._note = note
        self._behind: dict[tuple[str, str], float] = {}

    def order(self, upstream: str, hosts: Sequence[str]) -> Sequence[str]:
        """As they are to be tried. A host whose time is up is in its place for this once."""
        if not self._behind:
            return hosts
        now, behind = self._clock.monotonic(), []
        for host in hosts:
            until = self._behind.get((upstream, host))
            if until is not None and until > now:
                behind.append(host)
            elif until is not None:  # the others do not wait with this one for the answer
                self._behind[upstream, host] = now + _BEHIND_SECONDS
        return [*(host for host in hosts if host not in behind), *behind]

    def failed(self, upstream: str, host: str, why: str) -> None:
        if (upstream, host) not in self._behind:
            self._note("warning", f"upstream {upstream}: {host} fails and is asked after the other hosts for now: {why}")
        self._behind[upstream, host] = self._clock.monotonic() + _BEHIND_SECONDS

    def answered(self, upstream: str, host: str) -> None:
        if self._behind.pop((upstream, host), None) is not None:
            self._note("info", f"upstream {upstream}: {host} works again")
