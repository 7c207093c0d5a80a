"""What becomes of a message after an attempt: done, tried again, moved to a fallback, or given up. Pure.

Laws: a recipient in doubt never leaves its upstream; a fallback is tried only where every recipient that still waits may use it; what
has expired fails with the last reply it got. An attempt that was not made does not count.
"""

from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from relay.config.model import Retry
from relay.mail.envelope import Recipient
from relay.mail.outcome import Outcome, Status
from relay.mail.reply import Reply
from relay.spool.base import Claim, Lane, Next

# RFC 3463 section 3.5: delivery time expired.
_EXPIRED = "4.4.7"

#: Mail that waits for a breaker comes within a fifth of the time it waits, and of this.
_SPREAD_OVER_SECONDS = 900.0

NOTHING_CLOSED: Mapping[str, float] = MappingProxyType({})


class Plan(NamedTuple):
    """The end of one attempt. `fallback`: the upstream the message moves to, or `""`.

    `failed`: who shall be told of in a bounce, each with the outcome of the attempt itself; deferred means that time is up.
    """

    outcomes: Mapping[str, Outcome]
    next: Next | None
    failed: Sequence[tuple[Recipient, Outcome]]
    fallback: str = ""


def delay_seconds(retry: Retry, attempts: int) -> float:
    """Seconds until the next try after `attempts` of them, without jitter: doubling from `first` up to `max`."""
    return min(retry.max, retry.first * 2.0 ** min(attempts - 1, 30))


def plan(
    claim: Claim, outcomes: Mapping[str, Outcome], *, upstreams: Sequence[str], retry: Retry, now: float, jitter: float,
    closed: Mapping[str, float] = NOTHING_CLOSED, tried: bool = True, resumes: float = 0.0,
) -> Plan:  # fmt: skip
    """Decide. `upstreams` are the route's, in the order they are tried; `jitter` multiplies the delay, about 0.9 to 1.1.

    `closed`: upstreams that take nothing before a certain time (epoch): their breaker is open, or it is too early for this fallback.
    `tried`: False when the outcomes say no more than that the claim's own upstream is one of them. `resumes`: when an upstream that
    asked us to slow down is given mail again (epoch).
    """
    recipients, here = claim.envelope.recipients, claim.lane.upstream
    left = _after(here, upstreams)
    waiting = [r for r in recipients if _waits(r, outcomes[r.address], left)]
    doubt = any(r.in_doubt or outcomes[r.address].in_doubt for r in waiting)
    movable = left if waiting and not doubt and all(outcomes[r.address].fallback for r in waiting) else ()
    expired = now >= claim.created + retry.expire
    fallback = next((name for name in movable if expired or closed.get(name, now) <= now), "")
    decided = {**outcomes, **{r.address: outcomes[r.address]._replace(status=Status.DEFERRED) for r in waiting}}
    if not fallback and expired:
        decided = {address: _expired(outcome) for address, outcome in decided.items()}
    deferred = [decided[r.address] for r in recipients if decided[r.address].status is Status.DEFERRED]
    failed = [(r, outcomes[r.address]) for r in recipients if decided[r.address].status is Status.FAILED]
    if not deferred:
        return Plan(decided, None, failed)
    if fallback:
        return Plan(decided, Next(now, Lane(fallback, claim.lane.route), counted=False), failed, fallback)
    throttled = any(outcome.throttled for outcome in deferred)
    stays = doubt or throttled or not all(outcome.fallback for outcome in deferred)
    upstream = here if stays else upstreams[0]
    waits_here = not tried and upstream == here
    when = now + (0.0 if waits_here else jitter * delay_seconds(retry, 1 if throttled else claim.attempt))
    when = max(when, resumes)
    if upstream == here:  # not later than any mail, for what the breaker waits for may be mended by a restart, which forgets it
        when = max(when, min(_reopens(closed.get(here, now), now=now, jitter=jitter), now + jitter * retry.max))
    when = min(when, claim.created + retry.expire, *(_reopens(closed[name], now=now, jitter=jitter) for name in movable))
    counted = not (throttled or waits_here)
    return Plan(decided, Next(max(now, when), Lane(upstream, claim.lane.route), counted=counted), failed)


def give_up(claim: Claim, outcome: Outcome) -> Plan:
    """The end of a message that nobody tries any more, for the reason in `outcome`; a deferred one says that its time is up."""
    recipients = claim.envelope.recipients
    return Plan(dict.fromkeys((r.address for r in recipients), _expired(outcome)), None, [(r, outcome) for r in recipients])


def unreported(decided: Plan, lane: Lane, reason: str) -> Plan:
    """The same where its report cannot be made: who failed stays, held until a person has seen it. Who waits is held with them."""
    if not decided.failed:
        return decided
    failed = {recipient.address for recipient, _ in decided.failed}
    outcomes = {who: o._replace(status=Status.DEFERRED) if who in failed else o for who, o in decided.outcomes.items()}
    return Plan(outcomes, Next(inf, lane, held=reason), ())


def _reopens(when: float, *, now: float, jitter: float) -> float:
    """A time soon after `when`, another one for each message, so that not all come at once; the first comes first."""
    return when + max(0.0, jitter - 0.9) * min(max(0.0, when - now), _SPREAD_OVER_SECONDS)


def _waits(recipient: Recipient, outcome: Outcome, left: Sequence[str]) -> bool:
    """Whether the recipient is still to be served, here or by one of the fallbacks that are `left`."""
    return outcome.status is Status.DEFERRED or (
        outcome.status is Status.FAILED and outcome.fallback and bool(left) and not recipient.in_doubt
    )


def _after(upstream: str, upstreams: Sequence[str]) -> Sequence[str]:
    """The upstreams behind this one."""
    return upstreams[upstreams.index(upstream) + 1 :] if upstream in upstreams else ()


def _expired(outcome: Outcome) -> Outcome:
    if outcome.status is not Status.DEFERRED:
        return outcome
    return outcome._replace(status=Status.FAILED, reply=Reply(0, _EXPIRED, f"delivery time expired; last reply: {outcome.reply}"))
