"""How fast each upstream is given mail: by its limits, and more slowly for a while once it has asked for that.

A message that may not go now waits in its lane: it takes no slot, counts as no attempt, causes no fallback, and opens no breaker. A
request to slow down halves the pace and the connections and pauses the upstream; another one without a success between makes the
pause longer instead, up to `retry.max`. Successes raise both again, step by step.

State: of upstreams with `rate` or `recipient_rate` what they were given lately; of those that asked to slow down, how far they are from
what they had. Quotas are stored with the settles and restored; the rest is in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from relay.clock import Clock
from relay.config.model import Config
from relay.config.quantities import Rate
from relay.config.upstreams import Limits
from relay.delivery.limits import Limit, Quota, Spacing, is_quota, limit_of
from relay.mail.reply import Reply
from relay.observe.journal import Journal
from relay.observe.metrics import Metrics
from relay.spool.base import Used

#: After so long with success the pace rises by a quarter: from a half to all of it in three minutes.
_STEP_SECONDS = 60.0
_STEP = 1.25

#: Where no rate is configured, the pace is free again when it is so many times the one at which the upstream complained.
_FREE = 4.0

#: Transactions a second: the slowest pace, pauses do the rest; and what is halved where hardly anything was sent before the complaint, so
#: that it was hardly the pace. The lowest limit of any large provider is 30 a minute.
_SLOWEST = 1 / 60
_MODEST = 20 / 60

_UNITS = {1: "s", 60: "m", 3600: "h", 86400: "d"}


@dataclass(slots=True)
class _Slowed:
    """What a request to slow down has left. `per_second` and `connections` are allowed; all is well again at `goal` and `most`.

    `until` and `changed`: monotonic seconds. `pauses`: in a row, without a success between. `own`: no rate is configured.
    """

    per_second: float
    goal: float
    connections: float
    most: int
    own: bool
    spacing: Spacing
    changed: float
    reply: Reply
    until: float = 0.0
    pauses: int = 0


class Pacing(NamedTuple):
    """The pace of one upstream, for people. `limits`: those configured, each with how much of it is left.

    `pace`: what is allowed since it asked us to slow down, or `""`; `connections`: likewise, or 0. `pause_seconds`: until it is given mail
    again at all; `wait_seconds`: until the next transaction may go.
    """

    upstream: str
    limits: tuple[tuple[str, int], ...]
    wait_seconds: float
    pause_seconds: float = 0.0
    pace: str = ""
    connections: int = 0
    reply: str = ""


class Pace:
    """The pace of one upstream."""

    def __init__(self, upstream: str, limits: Limits, clock: Clock, *, empty_at: float) -> None:
        """`empty_at`: as of a `limits.Spacing`."""
        self.upstream = upstream
        self._clock = clock
        self._rates = limits.rate, limits.recipient_rate
        self._transactions = [limit_of(rate, clock, empty_at=empty_at) for rate in limits.rate]
        self._recipients = [limit_of(rate, clock, empty_at=empty_at) for rate in limits.recipient_rate]
        self.slowed: _Slowed | None = None

    # -- may it? ----------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many transactions may begin now."""
        if self.slowed is not None and self.slowed.until > self._clock.monotonic():
            return 0
        return min(limit.room() for limit in self._limits())

    def wait(self) -> float:
        """Seconds until a transaction may begin; 0.0: now."""
        return max(self.pause(), *(limit.wait() for limit in self._limits()))

    def pause(self) -> float:
        """Seconds until the upstream, which has asked us to slow down, is given mail again; 0.0: now."""
        return max(0.0, self.slowed.until - self._clock.monotonic()) if self.slowed is not None else 0.0

    @property
    def owes(self) -> bool:
        """Whether recipients beyond the limits were given to it."""
        return any(limit.room() < 0 for limit in self._recipients)

    @property
    def limited(self) -> bool:
        """Whether a pace is configured."""
        return bool(self._transactions or self._recipients)

    # -- it did -----------------------------------------------------------------------------------------------------------

    def charge(self, transactions: int, recipients: int = 0) -> None:
        """Note what goes; negative numbers give back what did not go after all."""
        if transactions:
            for limit in self._transactions:
                limit.charge(transactions)
            if self.slowed is not None:
                self.slowed.spacing.charge(transactions)
        if recipients:
            for limit in self._recipients:
                limit.charge(recipients)

    def used(self, transactions: int, recipients: int) -> tuple[Used, ...]:
        """What is to be stored of an attempt that came to this."""
        counts: dict[tuple[int, int], list[int]] = {}
        for place, count in enumerate((transactions, recipients)):
            for rate, limit in zip(self._rates[place], (self._transactions, self._recipients)[place], strict=True):
                if isinstance(limit, Quota):
                    counts.setdefault((rate.seconds, limit.slice_start()), [0, 0])[place] = count
        return tuple(Used(self.upstream, seconds, start, *count) for (seconds, start), count in counts.items())

    def restore(self, used: Used) -> None:
        """What it was given before a restart; oldest first."""
        for rates, limits, count in zip(self._rates, (self._transactions, self._recipients), used[3:], strict=True):
            for rate, limit in zip(rates, limits, strict=True):
                if isinstance(limit, Quota) and rate.seconds == used.seconds:
                    limit.restore(used.start, count)

    # -- slower and faster ------------------------------------------------------------------------------------------------

    def slow_down(self, reply: Reply, *, observed: float, connections: int, most: int, first: float, longest: float) -> bool:
        """The upstream asked for it. `observed`: transactions a second lately; `connections`: in use, of at most `most`; `first` and
        `longest`: seconds of a pause. Answers whether anything changes: several sessions hear the same at once."""
        now, slowed = self._clock.monotonic(), self.slowed
        if slowed is not None and slowed.until > now:
            return False
        if slowed is None:
            spaced = [rate.number / rate.seconds for rate in self._rates[0] if not is_quota(rate)]
            full = min(spaced) if spaced else max(observed, _MODEST)
            slowed = self.slowed = _Slowed(
                full, full if spaced else _FREE * full, min(connections, most), most, not spaced, self._spacing(full, now), now, reply
            )  # fmt: skip
        if slowed.pauses:  # not one success between: the pace is not what it minds
            slowed.connections = 1
        else:
            slowed.per_second = max(slowed.per_second / 2, _SLOWEST)
            slowed.connections = max(1, min(slowed.connections, connections) // 2)
        slowed.reply = reply
        slowed.changed = slowed.until = now + min(longest, first * 2.0 ** min(slowed.pauses, 30))
        slowed.pauses += 1
        slowed.spacing = self._spacing(slowed.per_second, slowed.until)
        return True

    def speed_up(self) -> bool:
        """The upstream took something. Answers whether it is back where it was before it asked us to slow down."""
        now, slowed = self._clock.monotonic(), self.slowed
        if slowed is None or slowed.until > now:  # what began before it asked says nothing
            return False
        slowed.pauses = 0
        if now - slowed.changed < _STEP_SECONDS:
            return False
        slowed.changed = now
        slowed.per_second = min(slowed.goal, slowed.per_second * _STEP)
        slowed.connections = min(slowed.most, max(slowed.connections + 1, slowed.connections * _STEP))
        slowed.spacing = self._spacing(slowed.per_second, now)
        if slowed.per_second < slowed.goal or slowed.connections < slowed.most:
            return False
        self.slowed = None
        return True

    def resume(self) -> None:
        """Somebody wants it tried now."""
        if self.slowed is not None:
            self.slowed.until = self.slowed.changed = self._clock.monotonic()
            self.slowed.spacing = self._spacing(self.slowed.per_second, self.slowed.until)

    # -- for people -------------------------------------------------------------------------------------------------------

    def pacing(self) -> Pacing:
        named = [
            (f"{in_words(rate)}{kind}", max(0, limit.room()))
            for rates, limits, kind in zip(self._rates, (self._transactions, self._recipients), ("", " recipients"), strict=True)
            for rate, limit in zip(rates, limits, strict=True)
        ]
        found = Pacing(self.upstream, tuple(named), self.wait())
        if (slowed := self.slowed) is None:
            return found
        return found._replace(
            pause_seconds=self.pause(), pace=in_words(slowed.per_second), connections=int(slowed.connections), reply=str(slowed.reply)
        )

    def reason(self) -> str:
        """Why mail waits."""
        if self.slowed is not None:
            return f"asks us to slow down: {self.slowed.reply}"
        return f"takes no more than {', '.join(limit for limit, _ in self.pacing().limits)}"

    def _limits(self) -> list[Limit]:
        limits = [*self._transactions, *self._recipients]
        if self.slowed is not None:
            limits.append(self.slowed.spacing)
        return limits

    def _spacing(self, per_second: float, begin: float) -> Spacing:
        """Without a burst: one may go at `begin`."""
        return Spacing(per_second, 1.0, self._clock.monotonic, empty_at=begin - 1 / per_second)


class Paces:
    """The paces of all upstreams that have one."""

    def __init__(self, config: Config, journal: Journal, metrics: Metrics, clock: Clock) -> None:
        self._upstreams = config.upstreams
        self._retry = config.retry
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._since = clock.monotonic()
        self._paces: dict[str, Pace] = {}
        # Until it is known what was used of quotas before the restart, nothing goes where there is one.
        self.restored = not any(is_quota(rate) for upstream in config.upstreams.values() for rate in _rates(upstream.limits))

    def of(self, upstream: str) -> Pace | None:
        """The pace of an upstream; None: as fast as it can."""
        if (pace := self._paces.get(upstream)) is None and upstream in self._upstreams and _rates(self._upstreams[upstream].limits):
            pace = self._make(upstream)
        return pace

    def restore(self, used: Iterable[Used]) -> None:
        """What upstreams were given before the restart; of each the oldest first."""
        self.restored = True
        for each in used:
            if (pace := self.of(each.upstream)) is not None:
                pace.restore(each)

    def slow_down(self, upstream: str, reply: Reply, *, observed: float, connections: int) -> Pace:
        """The upstream asked for it with this reply. `observed`: transactions a second lately; `connections`: in use."""
        pace = self.of(upstream) or self._make(upstream)
        changes = pace.slow_down(
            reply, observed=observed, connections=connections, most=self._upstreams[upstream].limits.connections,
            first=self._retry.first, longest=self._retry.max,
        )  # fmt: skip
        if changes:
            now = pace.pacing()
            self._metrics.throttled(upstream=upstream)
            self._journal.throttled(
                upstream=upstream, reply=str(reply), pace=f"{now.pace} over {_counted(now.connections, 'connection')}",
                next=f"in {now.pause_seconds:.0f} s",
            )  # fmt: skip
        return pace

    def speed_up(self, upstream: str) -> Pace | None:
        """The upstream took something. Answers its pace from here on."""
        pace = self._paces[upstream]
        if not pace.speed_up():
            return pace
        limits = ", ".join(map(in_words, self._upstreams[upstream].limits.rate))
        self._journal.note("info", f"upstream {upstream} is back at its {'limit of ' + limits if limits else 'full pace'}")
        if pace.limited:
            return pace
        del self._paces[upstream]
        return None

    def pacings(self) -> list[Pacing]:
        """Every upstream that has a pace and was given mail, or asked us to slow down, for people."""
        return [pace.pacing() for pace in self._paces.values()]

    def _make(self, upstream: str) -> Pace:
        pace = self._paces[upstream] = Pace(upstream, self._upstreams[upstream].limits, self._clock, empty_at=self._since)
        return pace


def in_words(rate: Rate | float) -> str:
    """A rate as the file has it, or one a second as a person would say it."""
    if isinstance(rate, Rate):
        return f"{rate.number}/{_UNITS[rate.seconds]}"
    return f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.3g}/m"


def _rates(limits: Limits) -> tuple[Rate, ...]:
    return limits.rate + limits.recipient_rate


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
