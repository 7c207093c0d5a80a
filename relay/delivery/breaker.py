"""Whether an upstream is worth a connection at the moment: a circuit breaker for the way to it, and one for its credential.

Closed; open after failures that concern everybody; half-open when its time is up, for one message that tries while the others go on
as if it were open; closed by the first one that the upstream deals with. What is said about one recipient or message and a request to
slow down are no failures of the upstream; a reply lost after the last octet is one, though that message stays with it.

State: in memory, of upstreams that have failed since they last dealt with a message; a restart begins with all closed. No network, no
task, no timer: time is looked at when somebody asks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

from relay.clock import Clock
from relay.config.model import Retry
from relay.mail.outcome import TRANSACTION, Outcome, Phase, Scope, Status
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.spool.base import MessageId

#: What comes while one message tries is put off for so long at most: how that ends is soon known, and until then its lane is parked
#: (`timeline`), so that little of it is looked at.
_TRIAL_SECONDS = 5.0

#: After being open for so long, mail has been put off far into the future and is worth looking for in the spool.
_LONG_SECONDS = 300.0


class _Kind(NamedTuple):
    """What fails together. `patience`: failures in a row that open it; open for `first` seconds, then twice as long each time."""

    name: str
    patience: int
    first: float
    longest: float


# Envoy ejects a host for 30 s at first; Postfix gives up a destination for 5 min after its first failed session. One failed connection
# in a row of messages is common, three are not. Where the file's `retry` is less patient, it is less long.
_WAY: Final = _Kind("connection", 3, 30.0, 900.0)
# Providers lock an account after some ten wrong passwords (Active Directory's usual threshold), so the first refusal is enough.
_LOGIN: Final = _Kind("credential", 1, 900.0, 21_600.0)

#: Who tries when no message does.
PROBE: Final = MessageId("a probe")


@dataclass(slots=True)
class _Circuit:
    """One breaker. `since`: the first failure of this row; `open_since` and `until`: of one that is open. All in monotonic seconds.

    `phase` and `last`: in which of them, and which message, failed last.
    """

    kind: _Kind
    failures: int = 0
    since: float = 0.0
    open_seconds: float = 0.0  # 0: closed
    open_since: float = 0.0
    until: float = 0.0
    reply: str = ""
    phase: Phase | None = None
    last: MessageId | None = None


@dataclass(slots=True)
class _Trouble:
    """An upstream that fails. `trying`: the message that finds out whether it still does."""

    way: _Circuit
    login: _Circuit
    trying: MessageId | None = None

    @property
    def failing(self) -> list[_Circuit]:
        """What has failed since it last worked; never nothing."""
        return [circuit for circuit in (self.way, self.login) if circuit.failures]

    @property
    def open(self) -> _Circuit | None:
        """The open circuit that lasts longest."""
        return max((c for c in (self.way, self.login) if c.open_seconds), key=lambda c: c.until, default=None)


class FailingUpstream(NamedTuple):
    """An upstream that fails, for people: what does, since when (epoch), how often in a row, and seconds until it is tried; 0: now."""

    upstream: str
    kind: str
    since: float
    failures: int
    open_seconds: float
    reply: str


class Breakers:
    """The breakers of all upstreams."""

    def __init__(self, retry: Retry, journal: Journal, metrics: Metrics, clock: Clock) -> None:
        self._way = _WAY._replace(first=min(_WAY.first, retry.first), longest=min(_WAY.longest, retry.max))
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._troubles: dict[str, _Trouble] = {}

    # -- for attempts -----------------------------------------------------------------------------------------------------

    def admit(self, upstream: str, id: MessageId) -> Outcome | None:
        """None: go ahead, and `record` what it came to. Else the outcome for everybody, without touching the network."""
        trouble = self._troubles.get(upstream)
        if trouble is None or (circuit := trouble.open) is None:
            return None
        if trouble.trying is None and circuit.until <= self._clock.monotonic():
            trouble.trying = id
            return None
        return self._objection(upstream, circuit)

    def record(self, upstream: str, id: MessageId, outcomes: Iterable[Outcome]) -> bool:
        """Note what an admitted attempt came to. Answers whether the upstream works again after a long time."""
        trouble = self._troubles.get(upstream)
        works, failure = _signs(outcomes)
        if works:
            return trouble is not None and self._close(upstream, trouble)
        tried = trouble is not None and trouble.trying == id
        if trouble is not None and tried:
            trouble.trying = None
        if failure is None:
            return False
        if trouble is None:
            trouble = self._troubles[upstream] = _Trouble(_Circuit(self._way), _Circuit(_LOGIN))
        refuses = failure.scope is Scope.CREDENTIAL
        if refuses and trouble.way.failures:  # it was reached
            if trouble.way.open_seconds:
                self._metrics.breaker_closed(upstream=upstream, kind=_WAY.name)
            trouble.way = _Circuit(self._way)
        self._fail(upstream, trouble.login if refuses else trouble.way, id, failure, tried=tried)
        return False

    def record_probe(self, upstream: str, outcome: Outcome | None) -> bool:
        """Note what an admitted probe came to, None for success; answers as `record`. It says nothing of what fails later than a login."""
        trouble = self._troubles.get(upstream)
        if outcome is not None:
            return self.record(upstream, PROBE, [outcome])
        if trouble is None:
            return False
        if trouble.trying == PROBE:
            trouble.trying = None
        if any(circuit.phase in TRANSACTION for circuit in trouble.failing):
            return False
        return self._close(upstream, trouble)

    # -- for decisions ----------------------------------------------------------------------------------------------------

    def objection(self, upstream: str) -> Outcome | None:
        """What mail hears that is not to be tried now; None: it may be."""
        trouble = self._troubles.get(upstream) if self.ready_at(upstream) else None
        return self._objection(upstream, trouble.open) if trouble is not None and trouble.open is not None else None

    def ready_at(self, upstream: str) -> float:
        """From when on a message may try it (epoch); 0.0: now. While one tries: about what a connection takes to fail."""
        return self._closed_until(upstream, trial_seconds=self._way.first)

    def due_at(self, upstream: str) -> float:
        """Until when mail is put off that may not try it now (epoch); 0.0: it may."""
        return self._closed_until(upstream, trial_seconds=min(self._way.first, _TRIAL_SECONDS))

    def failing_since(self, upstream: str) -> float | None:
        """When the failures began of which none has been followed by a success (epoch)."""
        trouble = self._troubles.get(upstream)
        return None if trouble is None else self._epoch(min(circuit.since for circuit in trouble.failing))

    def reset(self, upstream: str) -> None:
        """There is reason to think that it works again: the next message may try."""
        if (trouble := self._troubles.get(upstream)) is not None:
            for circuit in (trouble.way, trouble.login):
                circuit.until = min(circuit.until, self._clock.monotonic())

    def troubles(self) -> list[FailingUpstream]:
        """Every upstream that fails at the moment, for people."""
        now = self._clock.monotonic()
        return [
            FailingUpstream(
                name, c.kind.name, self._epoch(c.since), c.failures, max(0.0, c.until - now) if c.open_seconds else 0.0, c.reply
            )
            for name, trouble in self._troubles.items()
            for c in trouble.failing
        ]

    # -- transitions ------------------------------------------------------------------------------------------------------

    def _fail(self, upstream: str, circuit: _Circuit, id: MessageId, outcome: Outcome, *, tried: bool) -> None:
        if circuit.open_seconds and not tried:
            return  # it had begun before the circuit opened
        if outcome.phase in TRANSACTION and circuit.last == id:
            return  # a message that breaks every session speaks of itself; if it was the one to try, the next one does
        circuit.last = id
        if not circuit.failures:
            circuit.since = self._clock.monotonic()
        circuit.failures += 1
        circuit.reply, circuit.phase = str(outcome.reply), outcome.phase
        now, kind = self._clock.monotonic(), circuit.kind
        if circuit.open_seconds:
            circuit.open_seconds = min(kind.longest, 2 * circuit.open_seconds)
        # A refusal to relay that comes as late as RCPT may be about odd recipients: one must not stop a tenant's mail.
        elif circuit.failures >= (_WAY.patience if outcome.phase is Phase.RCPT else kind.patience):
            circuit.open_seconds, circuit.open_since = kind.first, now
            self._metrics.breaker_opened(upstream=upstream, kind=kind.name)
            times = f" {circuit.failures} times in a row" if circuit.failures > 1 else ""
            what = f"upstream {upstream} {'failed' if kind is self._way else 'refused its credential'}{times}"
            then = f"it is left alone for {kind.first:g} s, and then tried with one message"
            self._journal.note("warning", f"{what}; {then}; last reply: {circuit.reply}")
        circuit.until = now + circuit.open_seconds

    def _close(self, upstream: str, trouble: _Trouble) -> bool:
        del self._troubles[upstream]
        circuit = trouble.open
        if circuit is None:
            return False
        for each in (trouble.way, trouble.login):
            if each.open_seconds:
                self._metrics.breaker_closed(upstream=upstream, kind=each.kind.name)
        seconds = self._clock.monotonic() - circuit.open_since
        self._journal.note("info", f"upstream {upstream} works again, after {seconds:.0f} s")
        return seconds >= _LONG_SECONDS

    def _objection(self, upstream: str, circuit: _Circuit) -> Outcome:
        since = datetime.fromtimestamp(self._epoch(circuit.since), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = "has refused its credential" if circuit.kind is _LOGIN else "has failed"
        text = f"not tried: {upstream} {what} since {since}; last: {circuit.reply}"
        return Outcome(Status.DEFERRED, Scope.UPSTREAM, Phase.RESOLVE, Reply(0, "", text), fallback=True)

    def _closed_until(self, upstream: str, *, trial_seconds: float) -> float:
        trouble = self._troubles.get(upstream)
        if trouble is None or (circuit := trouble.open) is None:
            return 0.0
        left = circuit.until - self._clock.monotonic()
        if trouble.trying is not None:
            left = max(left, trial_seconds)
        return self._clock.now() + left if left > 0 else 0.0

    def _epoch(self, since: float) -> float:
        """The wall time of a monotonic one, by the clock as it is set now: nothing that lasts is longer or shorter when it is set."""
        return self._clock.now() - (self._clock.monotonic() - since)


def _signs(outcomes: Iterable[Outcome]) -> tuple[bool, Outcome | None]:
    """Whether the outcomes of one attempt say that the upstream works, or else which of them says that it or its credential does not."""
    works = False
    failure: Outcome | None = None
    for outcome in outcomes:
        if outcome.status is Status.SENT:
            return True, None
        refused = outcome.scope is Scope.CREDENTIAL
        fails = outcome.scope is Scope.UPSTREAM and outcome.status is Status.DEFERRED and (outcome.fallback or outcome.in_doubt)
        if refused or fails:
            failure = outcome if failure is None or refused else failure
        elif outcome.status is Status.FAILED or outcome.scope in (Scope.RECIPIENT, Scope.MESSAGE):
            works = True
    return works and failure is None, failure
